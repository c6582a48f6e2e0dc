"""Which program of a `cuda` plan a GPU runs: the schedule made for one SM, with its kernels as machine code or as PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from duq.plugins.cublas import WORKSPACE_BYTES
from duq.plugins.errors import KernelError
from duq.plugins.gpu import GPUS, gpu_of, runs_code_of
from duq.plugins.libraries import Version

STREAMS = 3  # of the CUDA graph: the main one, the branch of the state token, the first denoising step


@dataclass(frozen=True)
class Program:
    """`sm` is what the schedule was made for; `image` is what the kernels are loaded from, and their key in it.

    compiled_by: the NVRTC that made the image.
    """

    sm: int
    image: Literal["cubin", "ptx"]
    compiled_by: Version = Version(13, 0)  # of every plan that does not say

    @property
    def driver(self) -> Version:
        """The oldest driver that loads it, by its CUDA: machine code loads on all of a major version, PTX on no older one."""
        return Version(self.compiled_by.major, 0) if self.image == "cubin" else self.compiled_by

    @property
    def schedule(self) -> str:
        """The plan's entry with its launches."""
        return f"schedule/sm{self.sm}.json"

    def runs_on(self, sm: int) -> bool:
        """Whether a GPU of compute capability `sm` loads its kernels."""
        return runs_code_of(sm, self.sm) if self.image == "cubin" else sm >= self.sm

    @property
    def runs_on_text(self) -> str:
        """The GPUs that load its kernels, for people."""
        if self.image == "ptx":
            return f"SM {self.sm} and later"
        return "SM " + ", ".join(
            str(sm) for sm in sorted({gpu.sm for gpu in GPUS.values()} | {self.sm}) if self.runs_on(sm)
        )

    def to_json(self) -> dict[str, Any]:
        return {"sm": self.sm, "image": self.image, "driver": str(self.driver)}


def programs_of(manifest: Mapping[str, Any]) -> list[Program]:
    """All programs of a `cuda` plan, by SM."""
    graphs = manifest.get("graphs") or {}
    ptx = graphs.get("ptx", ())  # plans of older versions have none and do not say so
    by = {"compiled_by": Version.parse(graphs["nvrtc"])} if "nvrtc" in graphs else {}
    return [
        Program(sm, image, **by) for sm in manifest["sm"] for image in ("cubin", "ptx") if image == "cubin" or sm in ptx
    ]


def best_first(programs: Iterable[Program], sm: int, cuda: Version) -> list[Program]:
    """Those that a GPU of compute capability `sm` runs with a driver for `cuda`: made for it, then machine code, then PTX,
    the latest SM first."""
    fitting = [each for each in programs if each.runs_on(sm) and each.driver <= cuda]
    return sorted(fitting, key=lambda each: (each.sm == sm, each.image == "cubin", each.sm), reverse=True)


def shared_bytes_of(schedule: Mapping[str, Any]) -> int:
    """The most shared memory that a thread block of the schedule asks for."""
    launches = (launch for variant in schedule["variants"] for launch in [*variant["prefix"], *variant["step"]])
    return max((launch["shared"] for launch in launches if "shared" in launch), default=0)


def program_for(
    fitting: Iterable[Program], sm: int, shared_bytes: int, schedule_of: Callable[[Program], dict[str, Any]]
) -> tuple[Program, dict[str, Any]] | None:
    """The first of `best_first` whose thread blocks find the shared memory that they need, and its schedule; None where none
    does."""
    opened = ((each, schedule_of(each)) for each in fitting)
    return next(
        ((each, schedule) for each, schedule in opened if each.sm == sm or shared_bytes_of(schedule) <= shared_bytes), None
    )


def device_bytes_of(schedule: Mapping[str, Any]) -> int:
    """Device memory that a program takes at most: weights, activations, and the workspaces of cuBLASLt."""
    arena: int = schedule["arena_bytes"]
    return end_of_weights(schedule["weights"]) + arena + STREAMS * WORKSPACE_BYTES


def end_of_weights(weights: Mapping[str, Sequence[int]]) -> int:
    """Bytes of the memory that holds a schedule's weights, {name: (offset, bytes)}."""
    return max(offset + size for offset, size in weights.values())


def has_kernels(sm: int) -> bool:
    """Whether duq compiles for this SM."""
    try:
        gpu_of(sm)
    except KernelError:
        return False
    return True


def sm_to_compile_for(sm: int, shared_bytes: int) -> int:
    """The --sm whose program a GPU runs best: its own; where there is none, the latest whose PTX fits it.

    shared_bytes: that a thread block can have on the GPU.
    """
    rows = [gpu for gpu in GPUS.values() if gpu.ptx_architecture and not gpu.is_tegra]
    fitting = [gpu.sm for gpu in rows if gpu.sm < sm and gpu.block_shared_bytes <= shared_bytes]
    return sm if has_kernels(sm) else max(fitting, default=sm)
