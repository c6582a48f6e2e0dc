"""What is checked before any other work, and what is kept when later work fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress

from duq.compiler.checkpoint import Checkpoint, check_finite
from duq.compiler.checkpoint.storage import is_there, read_tokenizer
from duq.compiler.data import check_source
from duq.compiler.errors import CheckpointError, DuqError
from duq.compiler.quant import Quantization, save_quantization
from duq.compiler.quant.store import is_quantization


def check_weights(checkpoint: Checkpoint, progress: Progress) -> None:
    """Raises CheckpointError if a weight is NaN or infinite. Done once for a checkpoint, before any other work."""
    if checkpoint.finite:
        return
    task = progress.add_task("Checking the weights", total=None)
    try:
        check_finite(checkpoint.weights, lambda done, total: progress.update(task, completed=done, total=total))
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    checkpoint.finite = True


def check_inputs(calibration: Path | None, tokenizer: Path | None) -> None:
    """Raises CalibrationError or CheckpointError, before a checkpoint is converted, for files that could not be read after it."""
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    if calibration is not None:
        check_source(calibration)


def check_tokenizer(file: Path) -> None:
    """Raises CheckpointError unless the file is a SentencePiece model."""
    if not is_there(file):
        raise CheckpointError(f"--tokenizer {file}: no such file; give a SentencePiece model")
    read_tokenizer(file)


@contextmanager
def packs_kept(
    quantization: Quantization, checkpoint: Checkpoint, out: Path, given: Path | None, report: Callable[[str], None]
) -> Iterator[None]:
    """If compiling to `out` fails, writes the packs beside it that were made for it, and reports where: they took long.

    given: the packs that the user named. Those that are complete need no keeping.
    """
    try:
        yield
    except Exception:
        if quantization.packs and not (given is not None and is_quantization(given)):
            report(_keep(quantization, checkpoint, out))
        raise


def _keep(quantization: Quantization, checkpoint: Checkpoint, out: Path) -> str:
    places = [out.with_name(f"{out.name}.packs{number}") for number in ("", *(f"-{n}" for n in range(2, 100)))]
    place = next((each for each in places if not each.exists() and not each.is_symlink()), places[-1])
    try:
        with Progress(disable=True) as progress:
            save_quantization(quantization, place, checkpoint.fingerprint, progress)
    except (DuqError, OSError) as error:
        return f"note: the packs could not be kept: {error}"
    return f"note: the packs are kept in {place}; go on with --packs {place}"
