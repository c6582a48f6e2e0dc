"""What the compiler knows of a GPU: limits that kernels must keep, features they may use, rates to estimate by.

One row a compute capability; adding one is adding a row (and candidates of its own, where it has instructions of its own).
"""

from __future__ import annotations

from dataclasses import dataclass

from duq.plugins.errors import KernelError


@dataclass(frozen=True)
class Gpu:
    """A GPU as its kernels see it. Rates are a typical card's, from NVIDIA's data sheets.

    name: the card whose numbers these are. architecture: NVRTC's name of its machine code; one that ends with "a" has
    instructions that other GPUs lack, and what is compiled for it runs on that SM alone. block_shared_bytes: dynamic
    shared memory that one thread block can have; shared_bytes: of a multiprocessor. clock in Hz, memory_bandwidth in bytes
    a second; int8_rate: INT8 multiply-adds by mma.sync of one multiprocessor in a cycle.
    """

    name: str
    sm: int
    architecture: str
    multiprocessors: int
    block_shared_bytes: int
    shared_bytes: int
    threads: int  # resident on a multiprocessor, at most
    clock: float
    memory_bandwidth: float
    int8_rate: int
    has_wgmma: bool = False
    has_clusters: bool = False
    has_pdl: bool = False  # programmatic dependent launch: a kernel starts while the one ahead of it still runs
    is_tegra: bool = False  # integrated (Jetson): shares no machine code with the other GPUs of its major version

    @property
    def ptx_architecture(self) -> str | None:
        """NVRTC's name of the PTX that this and every later GPU runs; None where it would run on this SM alone."""
        return None if self.architecture.endswith("a") else self.architecture.replace("sm_", "compute_")


GPUS = {
    gpu.sm: gpu
    for gpu in (
        Gpu("A100", 80, "sm_80", 108, 163 << 10, 164 << 10, 2048, 1.41e9, 1.55e12, 2048),
        Gpu("A40", 86, "sm_86", 84, 99 << 10, 100 << 10, 1536, 1.74e9, 696e9, 1024),
        Gpu("Jetson AGX Orin 64 GB", 87, "sm_87", 16, 163 << 10, 164 << 10, 1536, 1.30e9, 204.8e9, 2048, is_tegra=True),
        Gpu("L40S", 89, "sm_89", 142, 99 << 10, 100 << 10, 1536, 2.52e9, 864e9, 1024),
        # "a": wgmma is not part of plain sm_90. Its mma.sync runs at half of its INT8 rate.
        Gpu("H100", 90, "sm_90a", 132, 227 << 10, 228 << 10, 2048, 1.76e9, 3.35e12, 2048,
            has_wgmma=True, has_clusters=True, has_pdl=True),
    )
}  # fmt: skip


MULTIPROCESSORS = 132  # that tactics spread thread blocks over, an H100's; more or fewer are slower but right


def gpu_of(sm: int) -> Gpu:
    """The row of a compute capability, e.g. 86. Raises KernelError where there is none."""
    if sm not in GPUS:
        raise KernelError(f"no kernels for SM {sm}; known are {', '.join(map(str, GPUS))}")
    return GPUS[sm]


def runs_code_of(sm: int, made_for: int) -> bool:
    """Whether a GPU of compute capability `sm` runs machine code made for `made_for`.

    It does for the same one and for a lower minor version of the same major version, except where one of them is
    integrated or the code is for one architecture alone ("a"). False for a GPU without a row: nothing is known of it.
    """
    if sm == made_for:
        return True
    try:
        gpu, other = gpu_of(sm), gpu_of(made_for)
    except KernelError:
        return False
    same_major = sm // 10 == made_for // 10 and sm > made_for
    return same_major and not (gpu.is_tegra or other.is_tegra) and other.ptx_architecture is not None
