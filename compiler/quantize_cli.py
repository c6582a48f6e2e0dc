"""What `duq-quantize` does, and what `duq-compile` does as well; their options are in commands.py."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from duq.compiler.checkpoint import Checkpoint, load_checkpoint
from duq.compiler.checkpoint.training import training_config
from duq.compiler.checks import check_inputs, check_tokenizer
from duq.compiler.commands import quantize_main as quantize_main
from duq.compiler.errors import CalibrationError, DuqError
from duq.compiler.pipeline import quantize_checkpoint
from duq.compiler.quant import Quantization, Recipe, load_transforms, save_quantization
from duq.compiler.quant.calibrate import calibration_inputs
from duq.compiler.quant.linears import check_selection
from duq.compiler.quant.store import check_destination
from duq.compiler.settings import Choices, PolicySettings, settings_of, settle
from duq.runtime.cli_errors import check_output_directory, warnings_printed
from duq.runtime.command_line import print_line as print_line
from duq.runtime.command_line import progress_bar as progress_bar
from duq.runtime.inspect import settings_rows

LISTED_LINEARS = 10


def quantize_policy(
    recipe: Recipe,
    choices: Choices,
    checkpoint: str,
    out: Path,
    *,
    calibration: Path | None,
    calibration_seed: int,
    packs: Path | None,
    tokenizer: Path | None,
    base: str | None,
    asset_id: str | None,
    device: str,
    as_json: bool,
) -> None:
    """What `duq-quantize` does, with its options by name. Raises DuqError for what is wrong with them, before any long work."""
    start = time.perf_counter()
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
    if as_json:
        found = {"packs": str(out), "bytes": sum(file.stat().st_size for file in out.iterdir())}
        typer.echo(result_json(found, quantization, settings_of(policy, settings), time.perf_counter() - start))
    else:
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
    path: str, choices: Choices, asset_id: str | None, tokenizer: Path | None, base: str | None = None
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


def result_json(found: dict[str, Any], quantization: Quantization, manifest: dict, seconds: float) -> str:
    """What --json prints: `found`, and what both commands know. manifest: the part of it about the settings."""
    linears = {
        pack.name: {
            "weight_bits": pack.weight_bits,
            "shape": list(pack.shape),
            "sqnr_db": pack.sqnr_db if math.isfinite(pack.sqnr_db) else None,
        }
        for pack in quantization.packs.values()
    }
    settings = {name: {"value": value, "from": origin or None} for name, value, origin in settings_rows(manifest)}
    return json.dumps(
        {
            **found,
            "seconds": seconds,
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "recipe": quantization.recipe.to_json(),
            "linears": linears,
            "settings": settings,
            "warnings": warnings_printed(),
        },
        indent=1,
    )
