"""What a `cuda` plan's schedule may say: the form that compiler/targets/cuda/emit.py describes, and bounds on every number.

An executor follows a schedule to the letter, on memory of the GPU. So it is checked first: each launch has the arguments of its
kernel and of their types, addresses lie in the arena or in a weight, waits go back, grids are those of a GPU. What a kernel does
from an address on is its own affair: it is code that came with the plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from duq.plugins.kernels.library import MATMUL, matmul
from duq.runtime import schema
from duq.runtime.errors import PlanError
from duq.runtime.plan import Plan
from duq.runtime.schema import Count, Name, Section, Size, shown, shown_key

SCHEDULE_VERSION = 4  # of what a plan's schedule says and how; up to 3 arguments had no names
ITEM_BYTES = {"float": 4, "Bf16": 2, "unsigned char": 1}
ALIGNMENT = 4096  # no weight is padded by more
LIBRARY = {MATMUL.source: [[name, matmul().type_of(name)] for name in MATMUL.parameters]}  # what is called, no kernel
Data = dict[str, Any]

Index = Annotated[int, Field(ge=0, lt=1 << 31)]
Pair = Annotated[list[Name], Field(min_length=2, max_length=2)]
Span = Annotated[list[Size], Field(min_length=2, max_length=2)]  # offset, bytes
Blocks = Annotated[int, Field(ge=1, lt=1 << 31)]


class Kernel(Section):
    cubin: Name
    ptx: Name = ""
    symbol: Name
    expression: Name
    parameters: list[Pair]


class Launch(Section):
    """Of a kernel, or of a library. `work` and `moved` only inform."""

    name: str
    args: dict[str, Any]
    kernel: Index = 0
    call: Literal["cublaslt"] = "cublaslt"
    grid: Annotated[list[Blocks], Field(min_length=3, max_length=3)] = [1, 1, 1]
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    shared: Annotated[int, Field(ge=0, le=1 << 18)] = 0
    cluster: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=3, max_length=3)] = [1, 1, 1]
    branch: bool = False
    wait_for: list[Index] = []
    overlap: bool = False
    work: FiniteFloat = 0.0
    moved: FiniteFloat = 0.0


class Chain(Section):
    """Launches of a step that are made as one; `args` are those that it has beside theirs."""

    first: Index
    last: Index
    kernel: Index
    grid: Annotated[list[Blocks], Field(min_length=3, max_length=3)]
    threads: Annotated[int, Field(ge=1, le=1024)]
    shared: Annotated[int, Field(ge=0, le=1 << 18)]
    args: dict[str, Any]


class Output(Section):
    after: Index
    offset: Size
    rows: Count
    columns: Count
    stride: Count
    type: Literal["float", "Bf16", "unsigned char"]


class Variant(Section):
    """All launches for one number of cameras and one prompt size."""

    cameras: Annotated[int, Field(ge=1, le=3)]
    prompt: Annotated[int, Field(ge=1, le=schema.MAX_PROMPT)]
    inputs: dict[str, Span]
    zeroed: list[Span]
    outputs: dict[str, Output]
    prefix: Annotated[list[Launch], Field(min_length=1)]
    step: Annotated[list[Launch], Field(min_length=1)]
    chains: list[Chain] = []


class Schedule(Section):
    version: Literal[SCHEDULE_VERSION]  # type: ignore[valid-type]
    arena_bytes: Annotated[int, Field(ge=1, le=schema.MAX_BYTES)]
    pixel: Literal["float", "unsigned char"]
    kernels: list[Kernel]
    calls: dict[str, list[Pair]]
    variants: Annotated[list[Variant], Field(min_length=1)]
    weights: Annotated[dict[str, Span], Field(min_length=1)]


@dataclass(frozen=True)
class Context:
    """What else a plan says that its schedules have to agree with. model: the manifest's; sizes: entry -> bytes."""

    model: Mapping[str, Any]
    num_steps: int
    cameras: int
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, plan: Plan) -> Context:
        manifest = plan.manifest
        return cls(manifest["model"], manifest["num_steps"], manifest["cameras"], plan.sizes)


def read_schedule(plan: Plan, name: str) -> Data:
    """The schedule that is the plan's entry `name`, checked. PlanError names the entry, the field, and what is expected."""
    try:
        schedule = schema.parse_json(plan.read(name))
        version = schedule.get("version", 1)
        if version != SCHEDULE_VERSION:
            raise PlanError(f"is of version {shown(version)}, this runtime follows version {SCHEDULE_VERSION}")
        check_schedule(schedule, Context.of(plan))
    except PlanError as error:
        separator = " " if str(error).startswith(("is ", "gives ")) else ": "
        raise PlanError(f"{plan.path}: {name}{separator}{error}; compile it again") from error
    return schedule


def check_schedule(schedule: Data, context: Context) -> None:
    """Raises PlanError that begins with the field."""
    schema.check(Schedule, schedule)
    _check_weights(schedule["weights"], context.sizes)
    _check_kernels(schedule, context.sizes)
    sizes = [(variant["cameras"], variant["prompt"]) for variant in schedule["variants"]]
    largest = context.model["max_prompt_tokens"]
    for wanted in ((cameras, largest) for cameras in range(1, context.cameras + 1)):
        if sizes.count(wanted) != 1:
            raise PlanError(f"variants: {sizes.count(wanted)} are for {wanted[0]} cameras and {wanted[1]} prompt tokens")
    if len(set(sizes)) != len(sizes) or max(sizes) != (context.cameras, largest):
        raise PlanError(f"variants: expected each size once, up to {context.cameras} cameras and {largest} prompt tokens")
    for index, variant in enumerate(schedule["variants"]):
        _check_variant(f"variants.{index}", variant, schedule, context)


def _check_weights(weights: Mapping[str, list[int]], sizes: Mapping[str, int]) -> None:
    """Each is an entry of this size; side by side in the block of device memory."""
    end = 0
    for name, (offset, size) in sorted(weights.items(), key=lambda each: each[1]):
        if sizes.get(f"weights/{name}") != size:
            raise PlanError(f"weights.{shown_key(name)} has {size} bytes, its entry {sizes.get(f'weights/{name}')}")
        if not end <= offset <= end + ALIGNMENT:
            raise PlanError(f"weights.{shown_key(name)} is at offset {offset}, the one before ends at {end}")
        end = offset + size


def _check_kernels(schedule: Data, sizes: Mapping[str, int]) -> None:
    for index, kernel in enumerate(schedule["kernels"]):
        for image in ("cubin", "ptx"):
            if image in kernel and kernel[image] not in sizes:
                raise PlanError(f"kernels.{index}.{image} is {shown(kernel[image])}, which is no entry of the plan")
        names = [name for name, _ in kernel["parameters"]]
        if len(set(names)) != len(names):
            raise PlanError(f"kernels.{index}.parameters: one of {', '.join(names)} is there twice")
        for name, kind in kernel["parameters"]:
            if not kind.endswith("*") and kind not in ("int", "float"):
                raise PlanError(
                    f"kernels.{index}.parameters: {name} is of type {shown(kind)}, expected a pointer, int or float"
                )
    for call, parameters in schedule["calls"].items():
        if parameters != LIBRARY.get(call):
            raise PlanError(f"calls.{shown_key(call)} has parameters that this runtime does not call it with")


def _check_variant(place: str, variant: Data, schedule: Data, context: Context) -> None:
    arena, prefix = schedule["arena_bytes"], variant["prefix"]
    for name, size in _input_bytes(variant, schedule, context).items():
        found = variant["inputs"].get(name)
        if found is None or found[1] != size:
            held = "missing" if found is None else f"of {found[1]} bytes"
            raise PlanError(f"{place}.inputs.{name} is {held}, expected {size} bytes")
    spans = [*variant["inputs"].items(), *((f"zeroed {span[0]}", span) for span in variant["zeroed"])]
    for name, (offset, size) in spans:
        if offset + size > arena:
            raise PlanError(f"{place}: {shown_key(name)} ends at {offset + size}, beyond arena_bytes {arena}")
    for name, output in variant["outputs"].items():
        end = ITEM_BYTES[output["type"]] * ((output["rows"] - 1) * output["stride"] + output["columns"]) + output["offset"]
        if end > arena or output["after"] >= len(prefix) or output["columns"] > output["stride"]:
            raise PlanError(f"{place}.outputs.{shown_key(name)} lies beyond the arena, or after a launch that is not there")
    for program in ("prefix", "step"):
        for index, launch in enumerate(variant[program]):
            before = index if program == "prefix" else len(prefix)
            for problem in _problems(launch, before, schedule, context):
                raise PlanError(f"{place}.{program}.{index} ({shown_key(launch['name'])}): {problem}")
    behind = 0
    for index, chain in enumerate(variant.get("chains", ())):
        for problem in _problems_of_chain(chain, behind, variant["step"], schedule, context):
            raise PlanError(f"{place}.chains.{index}: {problem}")
        behind = chain["last"] + 1


def _input_bytes(variant: Data, schedule: Data, context: Context) -> dict[str, int]:
    """What the executor writes for a call, by name: bytes."""
    model = context.model
    size = model["vision"]["image_size"]
    sizes = {
        "images": variant["cameras"] * size * size * 3 * ITEM_BYTES[schedule["pixel"]],
        "embeddings": variant["prompt"] * model["llm"]["width"] * 2,
        "x": model["action_horizon"] * model["action_dim"] * 4,
        "past": 4,
    }
    return sizes if model["pi05"] else sizes | {"state": 4 * (model.get("state_dim") or model["action_dim"])}


def _problems(launch: Data, before: int, schedule: Data, context: Context) -> Iterator[str]:
    """What is wrong with a launch. before: the launches that it may wait for."""
    if ("call" in launch) == ("kernel" in launch):
        yield "has a kernel and a call, or neither"
        return
    if "kernel" in launch:
        if launch["kernel"] >= len(schedule["kernels"]):
            yield f"kernel is {launch['kernel']}, there are {len(schedule['kernels'])}"
            return
        if missing := [name for name in ("grid", "threads", "shared") if name not in launch]:
            yield f"{missing[0]} is missing"
            return
        if max(launch["grid"][1:]) > 65535 or math.prod(launch.get("cluster", [1])) > 16:
            yield f"grid {launch['grid']} in clusters {launch.get('cluster')} is more than a GPU takes"
        parameters = schedule["kernels"][launch["kernel"]]["parameters"]
    else:
        parameters = schedule["calls"].get(launch["call"], [])
    for index in launch.get("wait_for", ()):
        if index >= before:
            yield f"waits for launch {index}, which is not before it"
    names = [name for name, _ in parameters]
    if names != list(launch["args"]):
        given = ", ".join(map(shown_key, launch["args"]))
        yield f"is given the arguments {given}, its kernel takes {', '.join(map(shown_key, names)) or 'others'}"
        return
    for name, kind in parameters:
        if not _is_argument(launch["args"][name], kind, schedule, context):
            yield f"args.{shown_key(name)} is {_argument(launch['args'][name])}, which is no {kind} of this schedule"


def _problems_of_chain(chain: Data, behind: int, step: list[Data], schedule: Data, context: Context) -> Iterator[str]:
    """What is wrong with a chain. behind: the launches of the step that are made before it."""
    first, last = chain["first"], chain["last"]
    if not behind <= first < last < len(step):
        yield f"is of launches {first} to {last}, expected some from {behind} on, up to {len(step) - 1}"
        return
    launches = step[first : last + 1]
    if any("kernel" not in launch for launch in launches):
        yield f"is of launches {first} to {last}, of which one is a call"
        return
    if chain["kernel"] >= len(schedule["kernels"]):
        yield f"kernel is {chain['kernel']}, there are {len(schedule['kernels'])}"
        return
    parameters = schedule["kernels"][chain["kernel"]]["parameters"]
    expected = [kind for launch in launches for _, kind in schedule["kernels"][launch["kernel"]]["parameters"]]
    if [kind for _, kind in parameters] != [*expected, "int*", "int*"]:
        yield f"its kernel does not take the arguments of launches {first} to {last}"
    if list(chain["args"]) != [name for name, _ in parameters[-2:]]:
        yield f"is given the arguments {', '.join(map(shown_key, chain['args']))}"
    for name, value in chain["args"].items():
        if not _is_argument(value, "int*", schedule, context):
            yield f"args.{shown_key(name)} is {_argument(value)}, which is no int* of this schedule"


def _is_argument(value: Any, kind: str, schedule: Data, context: Context) -> bool:
    if kind == "int":
        return type(value) is int and -(1 << 31) <= value < 1 << 31
    match value:
        case ["f", int() | float() as number]:
            return kind == "float" and type(number) is not bool and abs(number) < 3.5e38
        case None:
            return kind.endswith("*")
        case ["a", int() as offset]:
            return kind.endswith("*") and 0 <= offset < schedule["arena_bytes"]
        case ["w", str() as name, int() as step_bytes, int() as offset] if name in schedule["weights"]:
            size = schedule["weights"][name][1]
            inside = offset + step_bytes * (context.num_steps - 1) < max(size, 1)
            return kind.endswith("*") and min(step_bytes, offset) >= 0 and inside
    return False


def _argument(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= schema.MAX_SHOWN else f"{text[: schema.MAX_SHOWN]}..."
