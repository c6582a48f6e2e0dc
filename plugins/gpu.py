"""What the compiler knows of GPUs: limits that kernels must keep, features they may use, rates to estimate by.

A row a card. Limits and features are those of its compute capability (SM); tactics are chosen for a card, since they depend
on its multiprocessors. The first card of an SM is its typical one, which stands for all where none is named. Adding a card is
adding a row (and candidates of its own, where it has instructions of its own).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from duq.plugins.errors import KernelError

KB, MB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A GPU as its kernels see it. A number that is not public is None: read it with `known`.

    name: the card. architecture: NVRTC's name of its machine code; one that ends with "a" has instructions that other GPUs
    lack, and what is compiled for it runs on that SM alone. block_shared_bytes: dynamic shared memory that one thread
    block can have; shared_bytes: of a multiprocessor. threads: resident on a multiprocessor, at most. clock: boost, in Hz;
    memory_bandwidth in bytes a second. Rates are dense multiply-adds of one multiprocessor in a cycle. int8_rate: INT8 by
    mma.sync; bf16_rate: bf16 accumulated in float32, by the GPU's fastest instruction. also: other names of the card.
    """

    name: str
    sm: int
    architecture: str
    multiprocessors: int
    block_shared_bytes: int
    shared_bytes: int
    threads: int
    clock: float
    memory_bandwidth: float
    l2_bytes: int | None
    int8_rate: int | None
    bf16_rate: int | None
    has_wgmma: bool = False
    has_clusters: bool = False
    has_pdl: bool = False  # programmatic dependent launch: a kernel starts while the one ahead of it still runs
    is_tegra: bool = False  # integrated (Jetson): shares no machine code with the other GPUs of its major version
    also: tuple[str, ...] = ()

    @property
    def ptx_architecture(self) -> str | None:
        """NVRTC's name of the PTX that this and every later GPU runs; None where it would run on this SM alone."""
        return None if self.architecture.endswith("a") else self.architecture.replace("sm_", "compute_")

    def known(self, field: str) -> float:
        """The number of this name. Raises KernelError where it is not public."""
        value: float | None = getattr(self, field)
        if value is None:
            raise KernelError(f"{self.name}: its {field} is not public; put a measured one into plugins/gpu.py")
        return value


# Shared memory and threads: CUDA Programming Guide 13.1, tables 30 and 31. SM 11.0's threads, which the table leaves open
# between its neighbors: deviceQuery on a Thor. The comment of a row has the source of its other numbers; rates are its peaks
# over 2 x multiprocessors x clock.
CARDS = (
    # A100 whitepaper, table 4 (40 GB): 624 TOPS INT8, 312 TFLOPS bf16, 1410 MHz, 1555 GB/s, 40960 KB.
    Gpu("A100", 80, "sm_80", 108, 163 * KB, 164 * KB, 2048, 1.41e9, 1.555e12, 40 * MB, 2048, 1024),
    # A40 data sheet: 299.3 TOPS, 149.7 TFLOPS, 696 GB/s. L2 of a whole GA102: GA102 whitepaper.
    Gpu("A40", 86, "sm_86", 84, 99 * KB, 100 * KB, 1536, 1.74e9, 696e9, 6 * MB, 1024, 512),
    # GA102 whitepaper, table 3: 309.7 TOPS, 154.8 TFLOPS, 768 GB/s, 6144 KB.
    Gpu("RTX A6000", 86, "sm_86", 84, 99 * KB, 100 * KB, 1536, 1.80e9, 768e9, 6 * MB, 1024, 512),
    # GA102 whitepaper, table 9: 284 TOPS, 71 TFLOPS: with float32 sums, GeForce cards run at half rate.
    Gpu("RTX 3090", 86, "sm_86", 82, 99 * KB, 100 * KB, 1536, 1.695e9, 936e9, 6 * MB, 1024, 256),
    # Jetson AGX Orin technical brief v1.2: 170 sparse TOPS of the GPU at 1.3 GHz, half as many in 16 bits, 4 MB.
    Gpu("Jetson AGX Orin 64 GB", 87, "sm_87", 16, 163 * KB, 164 * KB, 1536, 1.30e9, 204.8e9, 4 * MB, 2048, 1024, is_tegra=True),
    # The same: 108 sparse TOPS at 930 MHz.
    Gpu("Jetson AGX Orin 32 GB", 87, "sm_87", 14, 163 * KB, 164 * KB, 1536, 0.93e9, 204.8e9, None, 2048, 1024, is_tegra=True),
    # Jetson Orin NX data sheet: 60 sparse TOPS of the GPU at 918 MHz. L2: deviceQuery.
    Gpu("Jetson Orin NX 16 GB", 87, "sm_87", 8, 163 * KB, 164 * KB, 1536, 0.918e9, 102.4e9, 2 * MB, 2048, 1024, is_tegra=True),
    # L40S data sheet: 733 TOPS, 362 TFLOPS, 864 GB/s. L2 of AD102 in RTX 6000 and L40: Ada whitepaper.
    Gpu("L40S", 89, "sm_89", 142, 99 * KB, 100 * KB, 1536, 2.52e9, 864e9, 96 * MB, 1024, 512),
    # Ada whitepaper, appendix A: 660.6 TOPS, 165.2 TFLOPS, 1008 GB/s, 73728 KB.
    Gpu("RTX 4090", 89, "sm_89", 128, 99 * KB, 100 * KB, 1536, 2.52e9, 1.008e12, 72 * MB, 1024, 256),
    # H100 data sheet (SXM): 989 TFLOPS, 3.35 TB/s; H100 whitepaper: 50 MB. mma.sync runs at half of wgmma's INT8 rate, and
    # 1.76 GHz is what the card that bitblas.estimate was fitted on ran at. "a": wgmma is not part of plain sm_90.
    Gpu("H100", 90, "sm_90a", 132, 227 * KB, 228 * KB, 2048, 1.76e9, 3.35e12, 50 * MB, 2048, 2048,
        has_wgmma=True, has_clusters=True, has_pdl=True),
    # H200 data sheet: an H100 with 4.8 TB/s.
    Gpu("H200", 90, "sm_90a", 132, 227 * KB, 228 * KB, 2048, 1.76e9, 4.8e12, 50 * MB, 2048, 2048,
        has_wgmma=True, has_clusters=True, has_pdl=True),
    # The rows below have clusters and programmatic launch, but none was ever run: off, for the portable path. Their INT8 by
    # mma.sync, where the data sheet's is by tcgen05, is not public.
    # DGX B200 data sheet: 2250 TFLOPS bf16, 8 TB/s a GPU. Multiprocessors, 1965 MHz and L2: of a device.
    Gpu("B200", 100, "sm_100", 148, 227 * KB, 228 * KB, 2048, 1.965e9, 8e12, 132644864, None, 4096),
    # HGX B300 data sheet: 2250 TFLOPS bf16, 8 TB/s a GPU. Multiprocessors and 2032 MHz: of a device.
    Gpu("B300", 103, "sm_103", 148, 227 * KB, 228 * KB, 2048, 2.032e9, 8e12, None, None, 4096),
    # Jetson Thor data sheet (T5000): 20 multiprocessors, 1.57 GHz, 273 GB/s; it has no peak of bf16. L2: deviceQuery.
    Gpu("Jetson Thor", 110, "sm_110", 20, 227 * KB, 228 * KB, 1536, 1.57e9, 273e9, 32 * MB, None, None,
        is_tegra=True, also=("AGX Thor", "Thor T5000")),
    # RTX Blackwell whitepaper, table 3: 838 TOPS, 209.5 TFLOPS, 2407 MHz, 1792 GB/s, 98304 KB.
    Gpu("RTX 5090", 120, "sm_120", 170, 99 * KB, 100 * KB, 1536, 2.407e9, 1.792e12, 96 * MB, 1024, 256),
    # RTX PRO Blackwell whitepaper, table 4 (Workstation Edition): 503.8 TFLOPS, 1792 GB/s, 128 MB.
    Gpu("RTX PRO 6000 Blackwell", 120, "sm_120", 188, 99 * KB, 100 * KB, 1536, 2.617e9, 1.792e12, 128 * MB, 1024, 512,
        also=("RTX PRO 6000",)),
    # DGX Spark data sheet: 273 GB/s, and no dense peak but FP4's. The rest: deviceQuery.
    Gpu("GB10", 121, "sm_121", 48, 99 * KB, 100 * KB, 1536, 2.418e9, 273e9, 24 * MB, None, None, also=("DGX Spark",)),
)  # fmt: skip

GPUS = {sm: next(card for card in CARDS if card.sm == sm) for sm in sorted({card.sm for card in CARDS})}


def gpu_of(sm: int) -> Gpu:
    """The typical card of a compute capability, e.g. 86. Raises KernelError where there is none."""
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


def runs_ptx_of(sm: int, made_for: int) -> bool:
    """Whether the driver of a GPU of compute capability `sm` compiles PTX made for `made_for`, an earlier one."""
    return sm > made_for and gpu_of(made_for).ptx_architecture is not None


def stand_in(gpu: Gpu, sm: int) -> Gpu:
    """`gpu` as a GPU of compute capability `sm` can run it: the limits and rates of `gpu`, hence its schedule and tiles, in
    machine code for `sm` that uses the features of `gpu` alone.

    It tries out what a GPU that is not at hand would be given; its times are no measure of that GPU. Raises KernelError
    where a GPU of `sm` has less than `gpu`.
    """
    here = gpu_of(sm)
    features = {"has_wgmma": "wgmma", "has_clusters": "clusters", "has_pdl": "programmatic launch"}
    lacking = [word for field, word in features.items() if getattr(gpu, field) > getattr(here, field)]
    if gpu.block_shared_bytes > here.block_shared_bytes:
        lacking.append(f"{gpu.block_shared_bytes // KB} KB of shared memory a thread block")
    if lacking:
        raise KernelError(f"SM {sm} cannot stand in for {gpu.name} (SM {gpu.sm}): it lacks {', '.join(lacking)}")
    architecture = here.architecture if gpu.has_wgmma else f"sm_{sm}"
    return replace(gpu, name=f"SM {sm} in place of {gpu.name}", sm=sm, architecture=architecture)


def gpu_named(name: str) -> Gpu:
    """The card of a name, e.g. "rtx4090" or "NVIDIA GeForce RTX 4090". Raises KernelError where there is none."""
    for card in CARDS:
        if _key(name) in map(_key, (card.name, *card.also)):
            return card
    raise KernelError(f"--gpu {name}: unknown; known are {', '.join(card.name for card in CARDS)}")


def cards_by_sm(names: Iterable[str]) -> dict[int, Gpu]:
    """The cards of these names by their compute capability. Raises KernelError for an unknown one and for two of one SM."""
    cards: dict[int, Gpu] = {}
    for card in map(gpu_named, names):
        if (other := cards.setdefault(card.sm, card)) != card:
            raise KernelError(
                f"--gpu {other.name} and {card.name}: both are SM {card.sm}, and a plan has one schedule an SM; "
                "compile two plans"
            )
    return cards


def _key(name: str) -> str:
    """Case, spaces and dashes do not matter, nor the words that NVIDIA puts in front."""
    return re.sub(r"[^a-z0-9]|nvidia|geforce|jetson", "", name.lower())
