"""Targets: what executes a plan, the passes that only it wants, and what writes the graphs into the plan for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from rich.progress import Progress

from duq.compiler.checkpoint import Checkpoint
from duq.compiler.graph.export import Graphs
from duq.compiler.phases import Phase
from duq.compiler.settings import PolicySettings, default_settings
from duq.plugins.gpu import Gpu, cards_by_sm
from duq.runtime.plan import PlanWriter

OptionsT = TypeVar("OptionsT", bound="Options")
G = TypeVar("G", bound="GpuOptions")
OptionsT_contra = TypeVar("OptionsT_contra", bound="Options", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a plan is made for; the policy itself comes from the checkpoint. `Options` are those of the `cpu` target.

    Attributes:
        robot: of the default settings.
        num_steps: likewise; None: the checkpoint's.
        solver: likewise, of runtime/solver.py; None: Euler's.
        cameras: the most that an observation will have.
        settings: around the policy; by default those of the checkpoint and `robot`.
        float_images: the policy's images are resized in floating point (runtime/images.py, FLOAT_RULES).
    """

    target: ClassVar[str] = "cpu"
    robot: str = "none"
    num_steps: int | None = None
    solver: str | None = None
    cameras: int = 3
    settings: PolicySettings | None = None
    float_images: bool = False

    @property
    def coverage(self) -> str:
        """The GPUs that the plan runs on, for people; nothing to say where that is what was asked for."""
        return ""

    @property
    def steps(self) -> int:
        """Denoising steps, of settled options."""
        assert self.num_steps is not None, "settled() fills it in"
        return self.num_steps

    @property
    def solver_name(self) -> str:
        """Of settled options."""
        assert self.solver is not None, "settled() fills it in"
        return self.solver

    def settled(self: OptionsT, checkpoint: Checkpoint) -> OptionsT:
        """The same with the settings around the policy, and what follows from them, filled in."""
        settings = self.settings or default_settings(checkpoint, self.robot, self.num_steps, self.solver)
        return replace(
            self, settings=settings, robot=settings.robot_name, num_steps=settings.num_steps,
            solver=settings.solver, float_images=self.float_images or settings.transforms["resize"] != "openpi",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GpuOptions(Options):
    """What GPUs the plan runs on.

    Attributes:
        sm: their compute capabilities, e.g. (86, 90).
        gpu: cards (plugins/gpu.py), at most one of an SM, whose SMs belong to `sm` as well. The others are typical ones.
    """

    sm: tuple[int, ...] = ()
    gpu: tuple[str, ...] = ()

    @property
    def cards(self) -> dict[int, Gpu]:
        """The named cards by SM. Raises KernelError for an unknown one and for two of one SM."""
        return cards_by_sm(self.gpu)

    def settled(self: G, checkpoint: Checkpoint) -> G:
        settled = super().settled(checkpoint)
        return replace(settled, sm=tuple(sorted({*settled.sm, *settled.cards})))


class Emit(Protocol[OptionsT_contra]):
    def __call__(
        self, graphs: Graphs, writer: PlanWriter, progress: Progress, options: OptionsT_contra, keep: Path | None
    ) -> dict:
        """Writes everything the target's executor wants into the plan; returns the manifest's section about the graphs.

        keep: an existing directory for the target's own phases, printed (`--keep-phases`), or None.
        Raises GraphError for a graph that the target does not know, and KernelError where a kernel cannot be made.
        """
        ...


def _no_check(options: Options) -> None:
    """Nothing to refuse."""


@dataclass(frozen=True)
class Target(Generic[OptionsT]):
    """`name` is the key of `--target` and of the manifest.

    Attributes:
        options: the type of its options; an option that is no field of it is refused.
        phases: rewrites on top of the common ones.
        architectures: the compute capabilities to choose from; none for a target without a GPU.
        check: raises DuqError for options that are unknown and for extras that are missing, before any long work.
    """

    name: str
    options: type[OptionsT]
    emit: Emit[OptionsT]
    phases: tuple[Phase, ...] = ()
    architectures: tuple[int, ...] = ()
    check: Callable[[OptionsT], None] = _no_check
