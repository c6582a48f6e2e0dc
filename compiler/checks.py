"""What is checked before any other work."""

from __future__ import annotations

from rich.progress import Progress

from duq.compiler.checkpoint import Checkpoint, check_finite
from duq.compiler.errors import CheckpointError


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
