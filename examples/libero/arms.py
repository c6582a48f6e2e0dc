"""Compiles a policy at every quantization that is compared: `python examples/libero/arms.py --help`."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout
    from duq.commands import command

    command("arms.py", "duq.examples.libero.arms:main", "compile")()

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import load_recipe, save_quantization
from duq.compiler.quant.linears import select_linears
from duq.compiler.quant.transforms import LinearTransform
from duq.compiler.settings import Choices, settle
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import CudaOptions
from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import check_output_directory, one_line_errors
from duq.runtime.observations import load_observations

CAMERAS = 2
CALIBRATION = "calibration.npz"  # in the checkpoint that train.py wrote
VISION, LLM, EXPERT = r"^vision\.", r"^llm\.", r"^expert\."


@dataclass(frozen=True)
class Arm:
    """A recipe. solver: what else than ten Euler steps integrates the flow. engine: it becomes a plan, and else packs, which
    PyTorch runs. bare: without any transform."""

    title: str
    preset: str = "llm+expert-mlp"
    settings: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    engine: bool = True
    bare: bool = False


PLAIN = {"compensate": False}
ARMS = {
    "none": Arm("engine, float", "none"),
    "w4a8-llm": Arm("W4A8, language model", "llm", PLAIN),
    "w4a8": Arm("W4A8, and the expert's MLPs, not compensated", settings=PLAIN),
    "w4a8-compensated": Arm("the same, compensated: the default", settings={"compensate": True}),
    "w4a8-expert": Arm("W4A8, expert alone", "all", PLAIN | {"include": EXPERT}),
    "w4a8-llm-expert": Arm("W4A8, language model and whole expert", "all", PLAIN | {"include": f"{LLM}|{EXPERT}"}),
    "w4a8-all": Arm("W4A8, all linears", "all", PLAIN),
    "w8a8-vision": Arm("W8A8, vision", "all", PLAIN | {"include": VISION, "weight_bits": 8}),
    "w8a8": Arm("W8A8, all linears", "all", PLAIN | {"weight_bits": 8}),
    "w4a16": Arm("W4A16, all linears", "all", PLAIN | {"activation_bits": 0}),
    "duquant": Arm("duquant, the default's linears", settings={"scheme": "duquant"}),
    "w4a8-euler-5": Arm("w4a8, 5 Euler steps", settings=PLAIN, solver={"num_steps": 5}),
    "w4a8-ab2-5": Arm("w4a8, 5 Adams-Bashforth steps", settings=PLAIN, solver={"num_steps": 5, "solver": "ab2"}),
    "reference": Arm("original fake quantization, the default's linears", settings={"scheme": "reference"}, engine=False),
    "bare": Arm(
        "INT4 without any transform, all linears",
        "all",
        {"scheme": "duquant", "row_rotation": "0"},
        engine=False,
        bare=True,
    ),
}

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def make(name: str, policy: Path, out: Path, sm: int | None) -> Path:
    """Writes the plan, or the directory of packs, of one arm; what is there already is kept."""
    arm = ARMS[name]
    file = out / f"{name}.plan" if arm.engine else out / f"{name}.packs"
    if file.exists():
        return file
    checkpoint, settings = settle(load_checkpoint(policy), Choices(robot="libero", delta_actions=False, **arm.solver))
    recipe = load_recipe(arm.preset, arm.settings, environment={})
    preprocessor = settings.preprocessor(checkpoint, CAMERAS)
    inputs = [preprocessor.model_inputs(each) for each in load_observations(policy / CALIBRATION)]
    inputs = inputs[: recipe.calibration_steps]
    transforms = {linear: LinearTransform() for linear in select_linears(recipe, checkpoint.config)} if arm.bare else None
    with Progress(disable=True) as progress:
        quantization = quantize_checkpoint(checkpoint, recipe, inputs, progress, transforms)
        if arm.engine:
            common: dict[str, Any] = {"robot": "libero", "cameras": CAMERAS, "settings": settings}
            # many processes at once would time each other
            options = Options(**common) if sm is None else CudaOptions(sm=(sm,), timing=False, **common)
            compile_policy(checkpoint, quantization, file, options, progress)
        else:
            save_quantization(quantization, file, checkpoint.fingerprint, progress)
    return file


def _make(name: str, policy: Path, out: Path, sm: int | None) -> Path:
    """In a worker, of one thread."""
    torch.set_num_threads(1)
    return make(name, policy, out, sm)


@app.command()
def _arms(
    policy: Annotated[Path, typer.Argument(help="Checkpoint that train.py wrote.")],
    out: Annotated[Path, typer.Option(help="Directory for plans and packs; those that are there are kept.")],
    arm: Annotated[list[str] | None, typer.Option(help=f"Repeatable; by default all: {', '.join(ARMS)}.")] = None,
    sm: Annotated[int | None, typer.Option(help="GPU to compile for, such as 90; without, for the CPU.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
) -> None:
    """Compile a policy at every quantization that is compared, and print the command that compares them.

    [bold]Example[/bold]

      python examples/libero/arms.py policy --out arms --sm 90 --jobs 13
    """
    check_output_directory("--out", out)
    chosen = arm or list(ARMS)
    for name in chosen:
        if name not in ARMS:
            raise DuqError(f"--arm {name}: unknown, one of {', '.join(ARMS)}")
    load_checkpoint(policy)
    if not (policy / CALIBRATION).is_file():
        raise DuqError(f"{policy}: holds no {CALIBRATION}; examples/libero/train.py writes it")
    out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("Compiling", total=len(chosen))
        for done in as_completed([pool.submit(_make, name, policy, out, sm) for name in chosen]):
            done.result()
            progress.advance(bar)
    plans = [f"--plan {out / name}.plan" for name in chosen if ARMS[name].engine]
    packs = [f"--torch {name}={policy}@{out / name}.packs" for name in chosen if not ARMS[name].engine]
    torches = [f"--torch fp32={policy}", *packs] if plans else []
    print(" ".join(["python examples/libero/evaluate.py", *torches, *plans, "--places permuted"]))


def main() -> None:
    with one_line_errors():
        app()
