"""Writes a pi0 or pi0.5 checkpoint of any size from a seed: `duq-make-checkpoint --help`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.make_checkpoint()

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from duq.compiler.choices import VARIANTS
from duq.runtime.cli_errors import check_output_directory, one_line_errors
from duq.runtime.command_line import check_choice, choice, command_app, is_quiet

LAYOUTS = ("openpi", "jax", "lerobot")
DTYPES = ("bfloat16", "float32")
ROBOTS = ("aloha", "droid", "libero", "none")

app = command_app()


@app.command()
def _make(
    out: Annotated[Path, typer.Option(help="Directory to create. It appears only when everything is written.")],
    variant: Annotated[
        str,
        choice(
            VARIANTS,
            "--variant",
            help="tiny: 26 M weights, 1 s. small: 200 M. dummy: openpi's test Gemmas under the real SigLIP (0.9 GB). "
            "full: gemma_2b + gemma_300m + So400m/14 (6.5 GB, about two minutes).",
        ),
    ] = "tiny",
    pi05: Annotated[
        bool, typer.Option("--pi05", help="pi0.5 (adaptive norms, state in the prompt) instead of pi0.")
    ] = False,
    layout: Annotated[
        str,
        choice(
            LAYOUTS,
            "--layout",
            help="openpi's PyTorch directory, its JAX directory (Orbax) or LeRobot's pretrained_model/.",
        ),
    ] = "openpi",
    robot: Annotated[
        str, choice(ROBOTS, "--robot", help="Whose normalization statistics to add; none adds no statistics.")
    ] = "aloha",
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal bytes.")] = 0,
    dtype: Annotated[str, choice(DTYPES, "--dtype", help="How the weights are stored.")] = "bfloat16",
    action_horizon: Annotated[int, typer.Option(min=1, help="Actions in a chunk.")] = 50,
    depth: Annotated[int | None, typer.Option(min=1, help="Layers of the LLM and the action expert.")] = None,
    vision_depth: Annotated[int | None, typer.Option(min=1, help="Layers of SigLIP.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Rows of the token embedding.")] = None,
) -> None:
    """Make a checkpoint of the true pi0 / pi0.5 architecture, to try everything without a download.

    The weights are random, but have what makes trained ones hard to quantize: a few residual channels 20 to 60 times
    larger than the rest, spread norm gains, large MLP channels, and small weights where the input is large. Beside them
    come config.json, normalization statistics and a small SentencePiece tokenizer, so that prompts work.

    [bold]Examples[/bold]

      duq-make-checkpoint --out /tmp/pi0

      duq-make-checkpoint --out /tmp/pi05 --variant small --pi05 --layout lerobot --robot libero

      duq-make-checkpoint --out /tmp/full --variant full --depth 4 --vocab-size 8192
    """
    for flag, value, known in (
        ("--variant", variant, VARIANTS), ("--layout", layout, LAYOUTS), ("--robot", robot, ROBOTS), ("--dtype", dtype, DTYPES),
    ):  # fmt: skip
        check_choice(flag, value, known)
    check_output_directory("--out", out)
    from duq.compiler.checkpoint.synthetic import make_checkpoint, make_config, weight_bytes

    sizes: dict[str, Any] = dict(
        action_horizon=action_horizon, depth=depth, vision_depth=vision_depth, vocab_size=vocab_size
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    total = weight_bytes(make_config(variant, pi05, **sizes), dtype)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=is_quiet()) as progress:
        task = progress.add_task(f"writing {out.name}", total=total)
        make_checkpoint(
            out,
            variant=variant,
            pi05=pi05,
            layout=layout,
            seed=seed,
            dtype=dtype,
            robot=robot,
            advance=lambda written: progress.advance(task, written),
            **sizes,
        )
    policy = "pi0.5" if pi05 else "pi0"
    Console().print(f"{out}: {policy} {variant}, {total / 1e6:,.0f} MB of {dtype} weights", highlight=False)


def main() -> None:
    with one_line_errors():
        app()
