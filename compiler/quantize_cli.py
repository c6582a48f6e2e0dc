"""``duq-quantize``, and the recipe options that it shares with ``duq-compile``."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from duq.compiler.checkpoint import Checkpoint, load_checkpoint
from duq.compiler.checkpoint.training import training_config
from duq.compiler.checks import check_inputs, check_tokenizer
from duq.compiler.errors import CalibrationError, DuqError
from duq.compiler.pipeline import quantize_checkpoint
from duq.compiler.policy_options import with_policy_options
from duq.compiler.quant import Quantization, Recipe, load_recipe, load_transforms, save_quantization
from duq.compiler.quant.calibrate import calibration_inputs
from duq.compiler.quant.linears import check_selection
from duq.compiler.quant.recipe import PRESETS, SCHEMES, recipe_origins
from duq.compiler.quant.store import check_destination
from duq.compiler.settings import Choices, PolicySettings, settle
from duq.runtime.cli_errors import check_output_directory, one_line_errors

CHECKPOINT_HELP = (
    "openpi (PyTorch or JAX) or LeRobot checkpoint: its directory, a PEFT adapter's, or hf://owner/name\\[@revision]."
)
RECIPE_PANEL = "Recipe (override --quant)"
LISTED_LINEARS = 10


def _option(kind: Any, flag: str, description: str) -> Any:
    return Annotated[kind | None, typer.Option(flag, help=description, rich_help_panel=RECIPE_PANEL)]


# Recipe key -> flag. The values are checked by the recipe, which also reads them from files and the environment.
RECIPE_OPTIONS = {
    "scheme": _option(str, "--scheme", f"{', '.join(SCHEMES)}."),
    "scope": _option(str, "--scope", "Quantize only linears whose name starts so (regular expression)."),
    "include": _option(str, "--include", "Quantize only linears whose name contains this (regular expression)."),
    "exclude": _option(str, "--exclude", "But not those whose name contains this (regular expression)."),
    "weight_bits": _option(int, "--weight-bits", "4, 8, or 16 for float weights."),
    "layer_bits": _option(
        list[str], "--layer-bits", "PATTERN:BITS, such as layers.0:8. Repeatable; the last match counts."
    ),
    "auto_bits": _option(float, "--auto-bits", "Mean weight bits to spend, such as 4.5: the linears that lose most get 8."),
    "activation_bits": _option(int, "--activation-bits", "8, or 0 for float activations (W4A16)."),
    "activation_scale": _option(str, "--activation-scale", "per-token (dynamic) or per-tensor (calibrated)."),
    "block_size": _option(int, "--block-size", "Channels in a block of the input rotation: 16, 32, 64 or 128."),
    "permute": _option(bool, "--permute/--no-permute", "Zigzag permutation of the input channels."),
    "row_rotation": _option(str, "--row-rotation", "0, or restore: rotate the output channels and back."),
    "activation_percentile": _option(float, "--activation-percentile", "Of |x|, for calibrated activation scales."),
    "calibration_steps": _option(int, "--calibration-steps", "Observations to calibrate on."),
    "compensate": _option(bool, "--compensate/--no-compensate", "GPTQ-style compensation of the rounding errors."),
    "damping": _option(float, "--damping", "Of the compensation, relative to the mean activation energy."),
}
QuantOption = Annotated[
    str | None, typer.Option("--quant", help=f"Preset ({', '.join(PRESETS)}) or recipe file (.yaml, .toml).")
]
PacksOption = Annotated[
    Path | None,
    typer.Option(
        "--packs", envvar="OPENPI_DUQUANT_PACKDIR", help="Directory of DuQuant packs to take the transforms from."
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="Observations: a LeRobotDataset folder, duq-serve's recordings, or .npz files."),
]
CalibrationSeedOption = Annotated[
    int, typer.Option("--calibration-seed", min=0, help="Of the choice of frames from a LeRobotDataset.")
]
BaseOption = Annotated[
    Path | None, typer.Option("--base", help="The policy that an adapter was trained on; by default the one it names.")
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="SentencePiece model; by default the one in the checkpoint.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to calibrate and quantize: cpu or cuda.")]
AssetOption = Annotated[
    str | None, typer.Option("--asset-id", help="Which normalization statistics, if the checkpoint has several.")
]


def with_recipe_options(command: Callable) -> Callable:
    """Gives a typer command the option ``--quant`` and one for each recipe key, and passes it the ``recipe``.

    And, to a command that has a parameter of that name, ``origins``: what set each key that is not at its default.
    """
    own = inspect.signature(command, eval_str=True)
    parameters = [parameter for parameter in own.parameters.values() if parameter.name not in ("recipe", "origins")]
    options = {"quant": QuantOption, **RECIPE_OPTIONS}
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]

    @functools.wraps(command)
    def with_recipe(**arguments: Any) -> Any:
        source, overrides = arguments.pop("quant"), {key: arguments.pop(key) for key in RECIPE_OPTIONS}
        if "origins" in own.parameters:
            arguments["origins"] = recipe_origins(source, overrides)
        return command(recipe=load_recipe(source, overrides), **arguments)

    with_recipe.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_recipe.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_recipe


app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
@with_policy_options
@with_recipe_options
def _quantize(
    recipe: Recipe,
    choices: Choices,
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    out: Annotated[Path, typer.Option("--out", help="Directory of packs to write.")],
    calibration: CalibrationOption = None,
    calibration_seed: CalibrationSeedOption = 0,
    packs: PacksOption = None,
    tokenizer: TokenizerOption = None,
    base: BaseOption = None,
    asset_id: AssetOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Quantize a policy: calibrate it on observations and write the packs that [bold]duq-compile --packs[/bold] takes.

    [bold]Examples[/bold]

      duq-quantize checkpoints/pi0 --calibration observations.npz --out packs

      duq-quantize checkpoints/pi0 --calibration dataset/ --robot aloha --quant all --layer-bits layers.0:8 --out packs
    """
    if calibration is None:
        raise CalibrationError("--calibration is missing: quantization needs observations to measure activations on")
    check_device(device)
    check_output_directory("--out", out)
    check_destination(out)
    check_inputs(calibration, tokenizer)
    policy, settings = open_policy(checkpoint, choices, asset_id, tokenizer, base)
    check_selection(recipe, policy.config)
    transforms = load_transforms(packs, policy, recipe) if packs is not None and use_packs(packs) else None
    inputs = calibration_inputs(
        calibration, settings.preprocessor(policy), recipe.calibration_steps, seed=calibration_seed, report=print_line
    )
    with progress_bar() as progress:
        quantization = quantize_checkpoint(policy, recipe, inputs, progress, transforms, device)
        save_quantization(quantization, out, policy.fingerprint, progress)
    print_summary(quantization, policy, out)


def check_device(device: str) -> None:
    """Raises DuqError unless --device is one that PyTorch computes on here."""
    if device not in ("cpu", "cuda"):
        raise DuqError(f"--device {device}: unknown, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise DuqError("--device cuda: PyTorch finds no GPU that it can use; leave --device out to quantize on the CPU")
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:  # a GPU that this PyTorch has no kernels for, or whose memory is taken
        raise DuqError(f"--device {device}: PyTorch cannot compute there: {str(error).partition(chr(10))[0]}") from error


def open_policy(
    path: str, choices: Choices, asset_id: str | None, tokenizer: Path | None, base: Path | None = None
) -> tuple[Checkpoint, PolicySettings]:
    """The checkpoint with `tokenizer` in place of its own if given, and the settings around it."""
    preferred = training_config(choices.config).settings.asset_id if choices.config else None
    with _reading() as show:
        checkpoint = load_checkpoint(path, asset_id, base=base, preferred_asset=preferred, progress=show)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
        checkpoint = replace(checkpoint, tokenizer=tokenizer)
    checkpoint, settings = settle(checkpoint, choices)
    for note in settings.notes:
        print_line(f"note: {note}")
    for line in settings.ignored:
        print_line(f"warning: {checkpoint.path}: config.json has {line}, whose meaning is not known; it is ignored")
    return checkpoint, settings


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    """Shows how far a checkpoint's conversion is; nothing where none is needed."""
    bar = progress_bar()
    tasks: list[TaskID] = []

    def show(done: int, total: int) -> None:
        if not tasks:
            bar.start()
            tasks.append(bar.add_task("Reading the checkpoint", total=total))
        bar.update(tasks[0], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


def use_packs(packs: Path | None) -> bool:
    """Whether packs are given. The original scripts create the directory they name, so there it may not exist yet."""
    by_variable = str(packs) == os.environ.get("OPENPI_DUQUANT_PACKDIR")
    return packs is not None and (packs.is_dir() or not by_variable)


def print_line(line: str) -> None:
    """To stderr, where progress and warnings go."""
    typer.echo(line, err=True)


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def print_summary(quantization: Quantization, checkpoint: Checkpoint, out: Path) -> None:
    packs = sorted(quantization.packs.values(), key=lambda pack: pack.sqnr_db)
    table = Table("linear", "weights", "SQNR dB", title=f"The {min(LISTED_LINEARS, len(packs))} worst linears")
    for pack in packs[:LISTED_LINEARS]:
        table.add_row(pack.name, f"INT{pack.weight_bits} {pack.shape[0]} x {pack.shape[1]}", f"{pack.sqnr_db:.1f}")
    console = Console()
    if packs:
        console.print(table)
    size = sum(pack.weight_q.nbytes + pack.weight_scale.nbytes for pack in packs) / 1e6
    mean = sum(pack.sqnr_db for pack in packs) / max(1, len(packs))
    console.print(
        f"{out}: {len(packs)} linears, {size:,.1f} MB of integer weights, mean SQNR {mean:.1f} dB", highlight=False
    )


def quantize_main() -> None:
    with one_line_errors():
        app()
