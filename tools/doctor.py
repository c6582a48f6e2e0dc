"""What duq can do on this machine, what is missing and what brings it: `duq-doctor --help`. Needs the runtime alone."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.doctor()

import typer
from rich.console import Console
from rich.table import Table

from duq import __version__
from duq.compiler.choices import TARGETS
from duq.plugins import libraries, nvrtc
from duq.plugins.errors import DuqError, KernelError
from duq.plugins.gpu import GPUS
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import check_choice, choice, command_app
from duq.runtime.extras import (
    PACKAGES,
    extras_declared,
    install_command,
    is_importable,
    requirement,
    version_of,
)
from duq.runtime.machine import Gpus, available_bytes, cores, cpu_name, find_gpus, free_device_bytes

IMPOSSIBLE = 1  # exit code; 2 is bad input
PURPOSES = ("run", "compile")
DRIVER = "install NVIDIA's driver, 580 or newer: https://www.nvidia.com/drivers"
LIBRARIES = (
    "numpy", "onnxruntime", "torch", "onnx", "cuda-bindings", "nvidia-cublas", "nvidia-cublas-cu12",
    "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "tensorrt", "tensorrt-rtx-cu13", "bitblas",
)  # fmt: skip
TENSORRT = ("tensorrt", "tensorrt_rtx")

app = command_app()


@dataclass(frozen=True)
class Missing:
    """One thing that stands in the way, and the command or step that brings it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Ability:
    """Whether this machine can compile or run plans of a target."""

    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        return not self.missing

    def to_json(self) -> dict[str, Any]:
        return {"possible": self.possible, "missing": [asdict(each) for each in self.missing], "notes": list(self.notes)}


@dataclass(frozen=True)
class PlanAbility(Ability):
    """The same of one plan; facts: what would run it, and the memory that it takes."""

    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | self.facts


@app.command()
def _doctor(
    plan: Annotated[Path | None, typer.Argument(metavar="[PLAN]", help="Can this machine run this engine.plan?")] = None,
    target: Annotated[
        list[str] | None,
        choice(TARGETS, "--target", help="Exit with 1 unless this machine can --do it; may be given several times."),
    ] = None,
    purpose: Annotated[
        str, choice(PURPOSES, "--do", help="What is asked of --target: to run its plans, or to compile them.")
    ] = "run",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Print what this machine has, what each target can do on it, what is missing, and the command that brings it.

    Exit code 1: PLAN, or a --target that was asked for, is impossible here. 2: bad input.

    [bold]Examples[/bold]

      duq-doctor

      duq-doctor --target cuda --do compile

      duq-doctor engine.plan --json
    """
    for each in target or ():
        check_choice("--target", each, TARGETS)
    check_choice("--do", purpose, PURPOSES)
    gpus = find_gpus()
    found = {each: {"compile": can_compile(each), "run": can_run(each, gpus)} for each in TARGETS}
    asked: list[Ability] = [found[each][purpose] for each in target or ()]
    report: dict[str, Any] = {"machine": machine(gpus), "extras": extras()}
    report["targets"] = {name: {key: each.to_json() for key, each in pair.items()} for name, pair in found.items()}
    if plan is not None:
        ability = can_run_plan(plan, gpus, found)
        asked.append(ability)
        report["plan"] = {"path": str(plan), **ability.to_json()}
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print(report)
    if not all(each.possible for each in asked):
        raise typer.Exit(IMPOSSIBLE)


def machine(gpus: Gpus) -> dict[str, Any]:
    """What this machine has, in JSON types."""
    return {
        "duq": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "available_bytes": available_bytes(),
        "gpu": gpus.to_json(),
        "libraries": {name: version for name in LIBRARIES if (version := version_of(name))},
    }


def extras() -> dict[str, list[str]]:
    """Extra of duq-vla -> those of its packages that are not installed."""
    return {
        extra: [name for name in names if version_of(name) is None]
        for extra, names in extras_declared().items()
        if extra not in ("dev", "lint")
    }


def can_compile(target: str) -> Ability:
    """Whether plans of a target can be compiled here: with no GPU, but with the compiler's packages and the target's."""
    missing = _packages((module for module, (_, extra) in PACKAGES.items() if extra == "compile"), "compile")
    notes: tuple[str, ...] = ()
    if target == "cuda":
        missing += _packages(("cuda.bindings",), "cuda") or _loads(nvrtc.nvrtc_version)
    if target == "tensorrt":
        if not any(map(is_importable, TENSORRT)):
            missing += (Missing("TensorRT", f"{install_command('tensorrt')}, or {requirement('tensorrt-rtx')}"),)
        missing += _packages(("onnx_graphsurgeon", "bitblas"), "tensorrt") or _loads(nvrtc.nvrtc_version)
        notes = ("no engine of TensorRT was ever run by duq's tests: docs/tensorrt.md",)
    return Ability(_joined(missing), notes)


def can_run(target: str, gpus: Gpus) -> Ability:
    """Whether plans of a target can be run here, where they are for this machine's GPU."""
    if target == "cpu":
        return Ability(_packages(("onnxruntime",), ""))
    missing = (Missing(gpus.problem, DRIVER),) if gpus.problem else _old_driver(gpus)
    if target == "cuda":
        runtime = "cuda12-runtime" if _cuda_major(gpus) == 12 else "cuda-runtime"
        missing += _packages(("cuda.bindings",), runtime) or _loads(
            lambda: libraries.load("cublasLt", "running cuda plans")
        )
    else:
        missing += _packages(("cuda.bindings",), "tensorrt-runtime")
        if not any(map(is_importable, TENSORRT)):
            missing += (Missing("TensorRT", install_command("tensorrt-runtime")),)
    notes = tuple(
        f"{gpu.name} (SM {gpu.sm}): duq has no kernels of its own for it; a plan with PTX of an earlier SM may run"
        for gpu in gpus.devices
        if gpu.sm not in GPUS
    )
    return Ability(_joined(missing), notes)


def _cuda_major(gpus: Gpus) -> int:
    """The CUDA whose packages belong here: that of the installed ones; else that of the driver, of which 13 is the newest."""
    if bindings := version_of("cuda-bindings"):
        return int(bindings.partition(".")[0])
    return 12 if gpus.cuda is not None and gpus.cuda.major == 12 else 13


def _old_driver(gpus: Gpus) -> tuple[Missing, ...]:
    """A driver that is too old for the packages of NVIDIA's that are installed (plugins/driver.py refuses it)."""
    major = _cuda_major(gpus)
    if gpus.cuda is None or gpus.cuda.major >= major:
        return ()
    what = f"a driver for CUDA {major}: this one is for CUDA {gpus.cuda}, and cuda-bindings for CUDA {major}"
    return (Missing(what, f"{DRIVER}; or stay with it: {install_command('cuda12-runtime')}"),)


def can_run_plan(path: Path, gpus: Gpus, found: dict[str, dict[str, Ability]]) -> PlanAbility:
    """Whether this machine can run a plan, with which of its programs, and in how much memory. PlanError: no plan."""
    from duq.runtime.plan import Plan

    plan = Plan(path)
    target = str(plan.manifest.get("target"))
    if target not in found:
        raise DuqError(f"{path}: is for target {target!r}, which this duq does not know; upgrade it")
    ability = found[target]["run"]
    facts: dict[str, Any] = {"target": target}
    missing = ability.missing
    if target == "cpu":
        entries = plan.manifest["entries"]
        facts["memory_bytes"] = sum(entry["bytes"] for name, entry in entries.items() if name.startswith("weights/"))
        missing += _fits(facts["memory_bytes"], available_bytes(), "memory")
    elif gpus.devices:
        missing += _on_gpu(plan, gpus, facts)
    else:
        facts["made_for"] = [f"SM {sm}" for sm in plan.manifest["sm"]]
    return PlanAbility(missing, ability.notes, facts)


def _on_gpu(plan: Any, gpus: Gpus, facts: dict[str, Any]) -> tuple[Missing, ...]:
    """What keeps the first GPU from running the plan; `facts` receives its program and memory."""
    from duq.runtime.executors.programs import (
        best_first,
        device_bytes_of,
        program_for,
        programs_of,
        sm_to_compile_for,
    )
    from duq.runtime.executors.schedule import read_schedule

    gpu = gpus.devices[0]
    remedy, cuda = f"compile it again with --sm {sm_to_compile_for(gpu.sm, gpu.block_shared_bytes)}", gpus.cuda
    assert cuda is not None  # the driver that found the GPU said it
    if facts["target"] == "tensorrt":
        fits = gpu.sm in plan.manifest["sm"]
        return () if fits else (Missing(f"engines for SM {gpu.sm} in {plan.path}", remedy),)
    programs = programs_of(plan.manifest)
    chosen = program_for(
        best_first(programs, gpu.sm, cuda), gpu.sm, gpu.block_shared_bytes, lambda each: read_schedule(plan, each.schedule)
    )
    if chosen is None:
        if any(each.runs_on(gpu.sm) and each.driver > cuda for each in programs):
            remedy = f"update the driver, or compile the plan with {requirement('cuda12')}"
        held = ", ".join(f"SM {each.sm} ({each.image}, driver for CUDA {each.driver})" for each in programs)
        return (Missing(f"a program for {gpu.name} (SM {gpu.sm}) in {plan.path}, which has {held}", remedy),)
    program, schedule = chosen
    facts["program"], facts["memory_bytes"] = program.to_json(), device_bytes_of(schedule)
    return _fits(facts["memory_bytes"], free_device_bytes(), f"free memory of {gpu.name}")


def _fits(needed: int, free: int | None, what: str) -> tuple[Missing, ...]:
    if free is None or needed <= free:
        return ()
    return (Missing(f"{what}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free", "end what else uses it"),)


def _packages(modules: Iterable[str], extra: str) -> tuple[Missing, ...]:
    """Those that are not installed, as one thing to do."""
    absent = [PACKAGES[module][0] for module in modules if not is_importable(module)]
    return (Missing(", ".join(dict.fromkeys(absent)), install_command(extra)),) if absent else ()


def _loads(version: Any) -> tuple[Missing, ...]:
    """Whether a library that is installed can also be loaded."""
    try:
        version()
    except KernelError as error:
        what, _, remedy = str(error).partition(": pip install ")
        return (Missing(what, f"pip install {remedy}" if remedy else "install it again"),)
    return ()


def _joined(missing: Iterable[Missing]) -> tuple[Missing, ...]:
    """Each thing once; those that one command brings together."""
    by_remedy: dict[str, list[str]] = {}
    for each in missing:
        by_remedy.setdefault(each.remedy, []).append(each.what)
    return tuple(Missing(", ".join(dict.fromkeys(whats)), remedy) for remedy, whats in by_remedy.items())


def _print(report: dict[str, Any]) -> None:
    console, found = Console(highlight=False, markup=False), report["machine"]
    memory = "" if found["available_bytes"] is None else f", {found['available_bytes'] / 1e9:.1f} GB of memory available"
    rows = {
        "duq": f"{found['duq']}, Python {found['python']}, {found['system']}",
        "CPU": f"{found['cpu']}, {found['cores']} cores{memory}",
        "GPU": _gpu_text(found["gpu"]),
        "libraries": ", ".join(f"{name} {version}" for name, version in found["libraries"].items()),
        "extras": _extras_text(report["extras"]),
    }
    for name, text in rows.items():
        console.print(f"{name:<10} {text}", soft_wrap=True)
    table = Table("target", "compile", "run")
    for target, pair in report["targets"].items():
        table.add_row(target, *("yes" if pair[key]["possible"] else "no" for key in ("compile", "run")))
    console.print(table)
    for target, pair in report["targets"].items():
        for purpose, each in pair.items():
            _print_missing(console, f"to {purpose} {target} plans", each)
    if "plan" in report:
        _print_plan(console, report["plan"])


def _print_plan(console: Console, plan: dict[str, Any]) -> None:
    program = plan.get("program")
    how = f" with its program for SM {program['sm']} ({program['image']})" if program else ""
    memory = f", in {plan['memory_bytes'] / 1e9:.2f} GB of memory or more" if "memory_bytes" in plan else ""
    verdict = f"runs here, on {plan['target']}{how}{memory}" if plan["possible"] else f"does not run here{how}{memory}"
    console.print(f"{plan['path']}: {verdict}", soft_wrap=True)
    if not plan["possible"]:
        _print_missing(console, f"to run {plan['path']}", plan)


def _print_missing(console: Console, what: str, ability: dict[str, Any]) -> None:
    for each in ability["missing"]:
        console.print(f"{what}: {each['what']}\n    {each['remedy']}", soft_wrap=True)
    for note in ability["notes"]:
        console.print(f"{what}: note: {note}", soft_wrap=True)


def _gpu_text(gpu: dict[str, Any]) -> str:
    devices = "; ".join(
        f"{each['name']} (SM {each['sm']}), {each['multiprocessors']} multiprocessors, {each['memory_bytes'] / 1e9:.1f} GB"
        for each in gpu["devices"]
    )
    driver = f"driver {gpu['driver'] or 'of unknown version'} for CUDA {gpu['cuda']}" if gpu["cuda"] else ""
    return "; ".join(part for part in (devices, driver, gpu["problem"]) if part)


def _extras_text(extras: dict[str, list[str]]) -> str:
    if not extras:
        return "unknown: duq-vla is not installed, this is a checkout"
    there = [name for name, absent in extras.items() if not absent]
    parts = [f"{name} ({', '.join(absent)})" for name, absent in extras.items() if absent]
    return f"{', '.join(there) or 'none'}; not complete: {', '.join(parts) or 'none'}"


def main() -> None:
    with one_line_errors():
        app()
