"""What `make demo` runs around the compiler: observations from real photographs, then the policy against PyTorch."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import skimage.data
import torch
import typer
from rich.console import Console
from rich.table import Table

from compiler.checkpoint import load_checkpoint
from compiler.model import build_model
from runtime import Policy
from runtime.observations import load_observations, save_observations
from runtime.preprocess import ModelInputs, Preprocessor

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
PHOTOGRAPHS = (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee)
PROMPTS = ("pick up the cup", "open the drawer", "push the button")


@app.command()
def observations(out: Path, count: int = 8, seed: int = 0) -> None:
    """Writes LIBERO observations whose cameras see crops of photographs that scikit-image ships."""
    rng = np.random.default_rng(seed)
    photographs = [photograph() for photograph in PHOTOGRAPHS]

    def camera(index: int) -> np.ndarray:
        photograph = photographs[index % len(photographs)]
        top, left = (rng.integers(0, size - 256) for size in photograph.shape[:2])
        return photograph[top : top + 256, left : left + 256]

    save_observations(
        out,
        [
            {
                "observation/image": camera(index),
                "observation/wrist_image": camera(index + 1),
                "observation/state": rng.normal(0, 0.3, 8).astype(np.float32),
                "prompt": PROMPTS[index % len(PROMPTS)],
            }
            for index in range(count)
        ],
    )


@app.command()
def run(
    checkpoint: Path, plan: Path, data: Annotated[Path, typer.Argument(help="Observations, as written above.")]
) -> None:
    """Runs the plan and the PyTorch reference on the same observations and noise, and prints how they compare."""
    source, policy = load_checkpoint(checkpoint), Policy(plan)
    policy.warmup()
    model = build_model(source)
    preprocessor = Preprocessor(
        source.config, robot=policy.metadata["robot"], norm_stats=source.norm_stats, tokenizer=source.tokenizer.read_bytes()
    )
    table = Table("observation", "prompt", "engine ms", "cosine", "max error", "SQNR dB", title="Engine against PyTorch fp32")
    shape = (source.config.action_horizon, source.config.action_dim)
    for index, observation in enumerate(load_observations(data)):
        noise = np.random.default_rng(index).standard_normal(shape, np.float32)
        reply = policy.infer(observation, noise=noise)
        expected = preprocessor.robot_actions(_reference(model, preprocessor.model_inputs(observation), noise), observation)
        error = reply["actions"] - expected
        cosine = (reply["actions"] * expected).sum() / np.linalg.norm(reply["actions"]) / np.linalg.norm(expected)
        table.add_row(
            str(index),
            str(observation["prompt"]),
            f"{reply['policy_timing']['infer_ms']:.1f}",
            f"{cosine:.5f}",
            f"{np.abs(error).max():.4f}",
            f"{10 * np.log10(np.square(expected).sum() / np.square(error).sum()):.1f}",
        )
    Console().print(table)


def _reference(model: torch.nn.Module, inputs: ModelInputs, noise: np.ndarray) -> np.ndarray:
    fields = (inputs.images, inputs.image_mask, inputs.tokens, inputs.token_mask, inputs.state, noise)
    return model.sample_actions(*(torch.from_numpy(field)[None] for field in fields))[0].numpy()


if __name__ == "__main__":
    app()
