"""What every form of checkpoint is opened as, before its weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from duq.compiler.checkpoint.storage import is_there
from duq.runtime.config import ModelConfig

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass
class Stored:
    """A checkpoint that was opened: names, shapes and dtypes are known, and whatever takes long is still to be done."""

    folder: Path
    form: str  # for people: "openpi JAX (Orbax), float32"
    layout: str  # "openpi" | "lerobot": whose files lie beside the weights
    origin: str  # "jax" | "torch": what the policy was trained with
    files: list[Path]  # that define the weights, in a fixed order
    tensors: dict[str, torch.Tensor]  # canonical name -> mapped from the checkpoint, or on the meta device: yet to be made
    # Makes those of the meta device; and whether all of them were seen to be finite on the way.
    make: Callable[[Progress | None], tuple[dict[str, torch.Tensor], bool]] = lambda progress: ({}, False)
    notes: list[str] = field(default_factory=list)
    buffers: dict[str, list[float]] = field(default_factory=dict)  # statistics among the tensors (LeRobot 0.3)
    beside: list[Path] = field(default_factory=list)  # folders where to look for other files next (an adapter's base)
    finite: bool = False  # after `read`: no weight is NaN or infinite, which needs no further look
    vision_heads: int | None = None  # where the tensors' shapes tell
    check: Callable[[ModelConfig], None] = lambda config: None  # raises where the dimensions are not the checkpoint's own

    def file(self, name: str) -> Path:
        """The file `name` of the checkpoint; for an adapter its own, else its base's. It need not exist.

        Raises CheckpointError for what has the name and is no file.
        """
        places = [folder / name for folder in (self.folder, *self.beside)]
        return next((place for place in places if is_there(place)), places[0])

    def read(self, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        """Canonical name -> memory-mapped tensor. Converts and merges what has to be; `progress` follows that."""
        made, finite = self.make(progress)
        self.finite = finite and made.keys() == self.tensors.keys()
        return {name: made.get(name, tensor) for name, tensor in self.tensors.items()}
