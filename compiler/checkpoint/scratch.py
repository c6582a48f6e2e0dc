"""Tensors on disk that no file of the checkpoint holds as they are: converted and merged weights."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping

import torch

from duq.compiler.errors import CheckpointError

ALIGNMENT = 64
BLOCK = 8 << 20  # bytes written at a time


class Scratch:
    """Tensors in a temporary file that has no name, so that it goes when the last tensor does.

    Written with `write`, from any thread; then `tensors` maps them, so that like a checkpoint's own they are read when
    they are used and take no memory that the system could not have back.
    """

    def __init__(self, layout: Mapping[str, torch.Tensor]):
        """`layout`: name -> a tensor (of the meta device) of the shape and dtype to make room for.

        Raises CheckpointError when the folder for temporary files has too little space.
        """
        self.layout, self.offsets, end = dict(layout), {}, 0
        for name, tensor in self.layout.items():
            self.offsets[name] = end
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.size, self.folder = end, tempfile.gettempdir()
        free = shutil.disk_usage(self.folder).free
        if end > free:
            raise CheckpointError(
                f"{self.folder} has {free:,} bytes free, and the converted weights take {end:,} there while duq runs; "
                "make room, or set TMPDIR to another folder"
            )
        self.file = tempfile.TemporaryFile(prefix="duq-weights-", dir=self.folder, buffering=0)
        self.file.truncate(end)
        self.finite = True  # so far: what was written holds neither NaN nor infinity

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Puts `values`, of the tensor's dtype, into it from its element `start` on, in C order."""
        offset = self.offsets[name] + start * values.element_size()
        rows = max(1, BLOCK // (values[:1].nbytes or 1))
        for block in values.split(rows):  # small ones: what is transposed is still in the processor's cache
            if block.ndim == 2 and not block.is_contiguous():
                block = block.T.contiguous().T  # which torch transposes several times faster
            block = block.contiguous()
            if not all(torch.isfinite(bound) for bound in torch.aminmax(block)):
                self.finite = False
            offset += self._put(memoryview(block.flatten().view(torch.uint8).numpy()), offset)

    def _put(self, data: memoryview, offset: int) -> int:
        size = len(data)
        try:
            while data:
                written = os.pwrite(self.file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            message = f"{self.folder}: {error.strerror}; set TMPDIR to a folder with {self.size:,} bytes free"
            raise CheckpointError(message) from error
        return size

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> tensor, memory-mapped."""
        if not self.size:
            return {}
        memory = mmap.mmap(self.file.fileno(), self.size)
        return {
            name: torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.offsets[name]).view(
                tensor.shape
            )
            for name, tensor in self.layout.items()
        }
