"""Trains a small pi0 on demonstrations, from scratch: `python examples/train_metaworld.py --help`.

Flow-matching behavior cloning as pi0 does it (arXiv 2410.24164): for an expert's chunk a, noise e and a time t, the
network sees x_t = t e + (1 - t) a and learns the velocity u = e - a.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout
    from duq.commands import command

    command("train_metaworld.py", "duq.examples.train_metaworld:main", "compile")()

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

from duq.compiler.checkpoint.names import openpi_name
from duq.compiler.checkpoint.synthetic.files import TOKENIZER_SIZE, dimensions, openpi_settings, train_tokenizer, write_json
from duq.compiler.model import Pi0
from duq.examples import metaworld_data
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.files import check_output_folder, replacing_folder
from duq.runtime.tokenizer import Tokenizer

POLICY = ModelConfig(  # 8.7 M weights; heads of 72 and 256, as every pi0 has
    pi05=False,
    vision=VisionConfig(width=288, depth=4, mlp_width=576, heads=4, image_size=112),
    llm=GemmaConfig(width=256, depth=4, mlp_width=512, heads=2, kv_heads=1, head_dim=256),
    expert=GemmaConfig(width=192, depth=4, mlp_width=512, heads=2, kv_heads=1, head_dim=256),
    vocab_size=TOKENIZER_SIZE,
    action_horizon=16,
)
NOISES = 2  # drawn for each observation: the action expert is much cheaper than the prefix which they share
SHIFT, JITTER, STATE_NOISE = 3, 0.1, 0.005  # of images in pixels, of their brightness and contrast, of the state
EMA_DECAY = 0.999
HELD_OUT = 20  # one episode of so many is not trained on
REPORT_STEPS = 200

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@dataclass
class Batches:
    """Demonstrations on the device; `take` makes batches of them."""

    images: Tensor  # uint8 [N, C, S, S, 3]
    tokens: Tensor  # int64 [N, T]
    token_mask: Tensor  # bool [N, T]
    states: Tensor  # float32 [N, action_dim]
    actions: Tensor  # float32 [N, H, action_dim]

    @classmethod
    def of(cls, data: metaworld_data.Demonstrations, config: ModelConfig, tokenizer: bytes, device: str) -> Batches:
        encode = Tokenizer(tokenizer).encode
        prompts, which = np.unique(data.prompts, return_inverse=True)
        ids = [torch.tensor(encode(prompt)) for prompt in prompts]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)[which]
        pad = config.action_dim - data.states.shape[1], config.action_dim - data.actions.shape[2]
        states, actions = torch.from_numpy(data.states), torch.from_numpy(data.actions.astype(np.float32))
        parts = (
            torch.from_numpy(metaworld_data.decode(data.images)),
            tokens.clamp_min(0),
            tokens >= 0,
            F.pad(states, (0, pad[0])),
            F.pad(actions[:, : config.action_horizon], (0, pad[1])),
        )
        return cls(*(part.to(device) for part in parts))

    def __len__(self) -> int:
        return len(self.states)

    def take(self, index: Tensor, shift: int = 0, jitter: float = 0.0) -> Batches:
        """Moments [B], their images in float32 [B, C, 3, S, S] as the model takes them.

        shift: images are moved by up to so many pixels; jitter: of brightness and contrast. Both at random, each image by
        itself.
        """
        size, cameras = self.images.shape[2], torch.arange(self.images.shape[1], device=index.device)
        moved = torch.randint(-shift, shift + 1, (2, len(index), len(cameras), 1), device=index.device)
        rows, columns = (torch.arange(size, device=index.device) + moved).clamp(0, size - 1)
        pixels = self.images[index[:, None, None, None], cameras[:, None, None], rows[..., None], columns[..., None, :]]
        gain, bias = jitter * torch.randn(2, len(index), len(cameras), 1, 1, 1, device=index.device)
        images = (pixels.to(torch.float32) / 127.5 - 1) * (1 + gain) + bias
        others = (tensor[index] for tensor in (self.tokens, self.token_mask, self.states, self.actions))
        return Batches(images.permute(0, 1, 4, 2, 3), *others)


def flow_matching_loss(model: Pi0, batch: Batches, noise: Tensor, times: Tensor) -> Tensor:
    """Mean squared error of the velocities. noise [B, R, H, A] and times [B, R]: R draws for each of the B observations."""
    image_mask = batch.token_mask.new_ones(len(batch), batch.images.shape[1] * model.config.vision.tokens)
    mask = torch.cat((image_mask, batch.token_mask), dim=1)
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=noise.is_cuda):  # not the expert: x_t wants its digits
        _, past = model.prefix(model.embed_images(batch.images), batch.tokens, mask)

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(noise.shape[1], dim=0)

    actions, t = batch.actions[:, None], times[..., None, None]
    x_t = (t * noise + (1 - t) * actions).flatten(0, 1)
    past = [(repeat(key.to(noise.dtype)), repeat(value.to(noise.dtype))) for key, value in past]
    velocity = model.velocity(repeat(batch.states), x_t, times.flatten(), repeat(mask), past)
    return F.mse_loss(velocity, (noise - actions).flatten(0, 1))


def draw_noise(batch: Batches, draws: int) -> tuple[Tensor, Tensor]:
    """Noise, and times from pi0's Beta(1.5, 1) scaled to 0.001..1, more often noisy: u^(1 / 1.5) has that law."""
    noise = torch.randn(len(batch), draws, *batch.actions.shape[1:], device=batch.actions.device)
    uniform = torch.rand(len(batch), draws, device=batch.actions.device)
    return noise, uniform ** (1 / 1.5) * 0.999 + 0.001


def initialize(model: Pi0) -> Pi0:
    """PyTorch's defaults but for the embeddings, and velocities of zero to begin with."""
    nn.init.normal_(model.vision.embeddings.position_embedding.weight, std=0.02)
    nn.init.normal_(model.llm.embed_tokens.weight, std=model.config.llm.width**-0.5)  # Gemma multiplies by sqrt(width)
    nn.init.zeros_(model.action_out_proj.weight)
    nn.init.zeros_(model.action_out_proj.bias)
    return model


@dataclass
class Schedule:
    """How long to train and how fast: until `steps` or `minutes` are over, whichever comes first."""

    steps: int = 10_000
    minutes: float = math.inf
    batch: int = 256
    learning_rate: float = 1e-3
    warmup: int = 300

    def rate(self, step: int, progress: float) -> float:
        """Linear warm-up, then a cosine to zero over what there is of steps and time (`progress` from 0 to 1)."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(
    config: ModelConfig,
    data: Batches,
    held_out: Batches,
    schedule: Schedule,
    seed: int,
    report: Callable[[float, dict], None],
) -> Pi0:
    """The trained policy: the moving average of its weights. `report(progress, losses)` is called now and then."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # TF32, on GPUs
    model = initialize(Pi0(config)).to(data.states.device)
    average = copy.deepcopy(model).requires_grad_(False)
    weights, averages = list(model.parameters()), list(average.parameters())
    optimizer = make_optimizer(weights)
    started, progress, step, recent = time.perf_counter(), 0.0, 0, []
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, progress)
        batch = data.take(torch.randint(len(data), (schedule.batch,), device=data.states.device), SHIFT, JITTER)
        batch.states = batch.states + STATE_NOISE * torch.randn_like(batch.states) * (
            batch.states != 0
        )  # not of the padding
        loss = flow_matching_loss(model, batch, *draw_noise(batch, NOISES))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(tuple(averages), tuple(weights), 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        recent.append(loss.detach())
        step, seconds = step + 1, time.perf_counter() - started
        progress = max(step / schedule.steps, seconds / 60 / schedule.minutes)
        if step % REPORT_STEPS == 0 or progress >= 1:
            losses = {"loss": torch.stack(recent).mean().item(), "held_out": held_out_loss(average, held_out)}
            report(min(progress, 1.0), {"step": step, "seconds": round(seconds), **losses})
            recent.clear()
    return average


def make_optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; biases and gains do not decay."""
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": 0.05},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=weights[0].is_cuda)


@torch.no_grad()
def held_out_loss(model: Pi0, data: Batches) -> float:
    """The loss on a fixed sample of moments, noise and times."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = data.take(torch.randint(len(data), (min(512, len(data)),), device=data.states.device))
        return flow_matching_loss(model, batch, *draw_noise(batch, NOISES)).item()


def save_checkpoint(out: Path, model: Pi0, tokenizer: bytes, losses: list[dict]) -> None:
    """Writes openpi's layout in bfloat16, without norm stats: the simulator's observations are bare model inputs.

    `out`, a new or empty directory, appears when everything is written; `losses` go into training.json.
    """
    weights = {openpi_name(name): tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    with replacing_folder(out) as draft:
        save_file(weights, draft / "model.safetensors", {"format": "pt"})
        (draft / "model.safetensors").chmod(0o644)
        settings = openpi_settings(model.config, "bfloat16", dimensions(model.config))
        write_json(draft / "config.json", settings | {"rotary": "exact"})  # trained in float32, and only then rounded
        write_json(draft / "training.json", {"losses": losses})
        (draft / "tokenizer.model").write_bytes(tokenizer)


@app.command()
def _train(
    demonstrations: Annotated[Path, typer.Argument(help="What collect_metaworld.py recorded.")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to create.")],
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = Schedule.steps,
    minutes: Annotated[float, typer.Option(min=0.01, help="The most it may take.")] = 20.0,
    batch: Annotated[int, typer.Option(min=1, help="Observations in a step.")] = Schedule.batch,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The largest.")] = Schedule.learning_rate,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a small pi0 on demonstrations, from scratch, and write a checkpoint that [bold]duq-compile[/bold] takes.

    One GPU, some minutes. On the CPU it works, for trying things out.

    [bold]Examples[/bold]

      python examples/train_metaworld.py demonstrations.npz --out checkpoint

      python examples/train_metaworld.py demonstrations.npz --out checkpoint --device cpu --steps 100 --batch 16
    """
    check_output_folder("--out", out)
    if device == "cuda" and not torch.cuda.is_available():
        raise DuqError("--device cuda: PyTorch finds no GPU that it can use; --device cpu trains slowly")
    recorded, tokenizer = metaworld_data.load(demonstrations), train_tokenizer()
    everything = Batches.of(recorded, POLICY, tokenizer, device)
    episodes = torch.from_numpy(np.unique(recorded.episodes, return_inverse=True)[1]).to(device)
    kept = episodes % HELD_OUT != 0
    data, held_out = (Batches(*(t[part] for t in vars(everything).values())) for part in (kept, ~kept))
    history = []
    with Progress() as progress:
        task = progress.add_task("Training", total=1.0)

        def report(done: float, losses: dict) -> None:
            history.append(losses)
            progress.update(task, completed=done)
            progress.console.print(", ".join(f"{key} {value:.4g}" for key, value in losses.items()))

        model = train(POLICY, data, held_out, Schedule(steps, minutes, batch, learning_rate), seed, report)
    save_checkpoint(out, model, tokenizer, history)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights")


def main() -> None:
    with one_line_errors():
        app()
