"""Executes the schedule of a `cuda` plan on the CPU, launch by launch, in one arena of bytes as the device has it.

A run needs no GPU to show that lowering, packed weights, layouts, places in memory and positions are right. Whether the
kernels do what their comments say, as their references in plugins/kernels do, is another question: tests/gpu.

The arena starts as NaN (all bits set), so what is read before it was written shows in the result; so would rows that only
pad the prompt, which stay NaN. Nothing can be read or written beyond the arena or beyond a weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from duq.plugins.gpu import gpu_of
from duq.plugins.kernel import Kernel, Shape
from duq.plugins.kernels import KERNELS
from duq.plugins.kernels.library import MATMUL
from duq.plugins.kernels.reference import TYPES, Launched, Memory, Pointer
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

Value = Pointer | float | int | None  # of an argument


def launch(expression: str, shape: Shape, arguments: Mapping[str, Value] | Sequence[Value]) -> None:
    """Runs the reference of an instance's kernel. arguments: by name, or in the kernel's order."""
    name, _, template = expression.removesuffix(">").partition("<")
    kernel = KERNELS[name]
    spelled = template.split(", ") if template else []
    by_name = dict(zip(kernel.template, spelled, strict=True))
    run_reference(kernel, Launched(name, by_name, shape.grid, shape.threads, shape.cluster), arguments)


def parts_of_chains(plan: Plan, sm: int) -> dict[bytes, list[tuple[str, Shape]]]:
    """The launches that each chain of a schedule makes, as expression and shape, by its images, cubin and PTX."""
    schedule, found = json.loads(bytes(plan.read(f"schedule/sm{sm}.json"))), {}
    for variant in schedule["variants"]:
        for chain in variant.get("chains", ()):
            launches = variant["step"][chain["first"] : chain["last"] + 1]
            shapes = [Shape(tuple(each["grid"]), each["threads"], each["shared"]) for each in launches]
            expressions = [schedule["kernels"][each["kernel"]]["expression"] for each in launches]
            images = (schedule["kernels"][chain["kernel"]].get(kind) for kind in ("cubin", "ptx"))
            found |= {bytes(plan.read(each)): list(zip(expressions, shapes, strict=True)) for each in images if each}
    return found


def launch_chain(parts: Sequence[tuple[str, Shape]], arguments: Sequence[Value]) -> None:
    """Runs the references of its parts on the arguments of all of them, and counts as the chain does."""
    *given, links, stale_links = arguments
    assert isinstance(links, Pointer) and isinstance(stale_links, Pointer)
    assert not links.read("int", len(parts)).any(), "the counters are zero ahead of a launch"
    for expression, shape in parts:
        count = len(KERNELS[expression.partition("<")[0]].parameters)
        launch(expression, shape, given[:count])
        given = given[count:]
    assert not given
    links.write("int", np.array([math.prod(shape.grid) for _, shape in parts], np.int32))
    stale_links.write("int", np.zeros(len(parts), np.int32))


def run_reference(kernel: Kernel, launched: Launched, arguments: Mapping[str, Value] | Sequence[Value]) -> None:
    if not isinstance(arguments, Mapping):
        arguments = dict(zip(kernel.parameters, arguments, strict=True))
    kernel.reference(launched, **arguments)


class Device:
    """An arena, all NaN, the weights, and the variant of the schedule that is followed on them."""

    def __init__(self, plan: Plan, sm: int, cameras: int, prompt: int):
        schedule = json.loads(bytes(plan.read(f"schedule/sm{sm}.json")))
        fitting = [each for each in schedule["variants"] if each["cameras"] == cameras and each["prompt"] >= prompt]
        self.variant = min(fitting, key=lambda each: each["prompt"])
        self.gpu, self.kernels, self.pixel = gpu_of(sm), schedule["kernels"], schedule["pixel"]
        self.arena = Memory(np.full(schedule["arena_bytes"], 0xFF, np.uint8))
        self.weights = {name: Memory(np.frombuffer(plan.read(f"weights/{name}"), np.uint8)) for name in schedule["weights"]}
        for offset, size in self.variant["zeroed"]:
            self.arena.data[offset : offset + size] = 0

    def put(self, name: str, values: np.ndarray) -> None:
        offset, size = self.variant["inputs"][name]
        assert values.nbytes <= size
        self.arena.data[offset : offset + values.nbytes] = values.reshape(-1).view(np.uint8)

    def get(self, offset: int, rows: int, columns: int, stride: int, type: str = "float", **_) -> np.ndarray:
        return Pointer(Memory(self.arena.data), offset).read(type, rows, columns, stride=stride)

    def launch(self, data: dict, step: int = 0) -> None:
        arguments: Mapping[str, Value] | Sequence[Value]
        if isinstance(data["args"], dict):
            arguments = {name: self._argument(each, step) for name, each in data["args"].items()}
        else:
            arguments = [self._argument(each, step) for each in data["args"]]
        if "call" in data:
            assert data["call"] == MATMUL.source
            run_reference(MATMUL, Launched(MATMUL.name), arguments)
        else:
            shape = Shape(tuple(data["grid"]), data["threads"], data["shared"], tuple(data.get("cluster", (1, 1, 1))))
            assert shape.cluster == (1, 1, 1) or self.gpu.has_clusters, "this GPU has no clusters"
            assert self.gpu.has_pdl or "overlap" not in data, "this GPU starts no kernel early"
            assert shape.shared_bytes <= self.gpu.block_shared_bytes, "more shared memory than a thread block can have"
            kernel = self.kernels[data["kernel"]]
            assert self.gpu.has_wgmma or "wgmma" not in kernel["expression"], "this GPU has no wgmma"
            declared = KERNELS[kernel["expression"].partition("<")[0]].parameters
            assert [name for name, _ in kernel.get("parameters", ())] in ([], list(declared))
            launch(kernel["expression"], shape, arguments)
        self.arena.end_launch()

    def _argument(self, value: Any, step: int) -> Value:
        match value:
            case ["a", offset]:
                return Pointer(self.arena, offset)
            case ["w", name, step_bytes, offset]:
                return Pointer(self.weights[name], offset + step * step_bytes)
            case ["f", number]:
                return number
        return value


def _streams(prefix: list[dict], step: list[dict]) -> tuple[list[int], list[int], list[int]]:
    """The launches of the prefix, of its branch, and of the first step, by their places in [*prefix, *step]."""
    main, branch = ([i for i, each in enumerate(prefix) if each.get("branch", False) == side] for side in (False, True))
    return main, branch, list(range(len(prefix), len(prefix) + len(step)))


def others_last(prefix: list[dict], step: list[dict]) -> list[int]:
    """One stream after the other."""
    return sum(_streams(prefix, step), [])


def others_first(prefix: list[dict], step: list[dict]) -> list[int]:
    """The first step, and the branch, as early as what they wait for permits."""
    main, branch, first_step = _streams(prefix, step)
    launches = [*prefix, *step]
    done: set[int] = set()

    def is_free(stream: list[int]) -> bool:
        return bool(stream) and set(launches[stream[0]].get("wait_for", ())) <= done

    order = []
    while main or branch or first_step:
        stream = next(each for each in (first_step, branch, main) if is_free(each))
        order.append(stream.pop(0))
        done.add(order[-1])
    return order


def run(
    plan: Plan,
    sm: int,
    inputs: ModelInputs,
    noise: np.ndarray,
    trace: dict | None = None,
    *,
    prompt: int | None = None,
    order: Callable[[list[dict], list[dict]], list[int]] = others_last,
) -> np.ndarray:
    """Denoises `noise` [H, A] into normalized actions, as the schedule for an SM says.

    trace: receives what CpuExecutor.run puts into its own. prompt: the size of the variant, by default the smallest that
    holds the prompt. order: of the launches of the prefix and the first step.
    """
    present, cameras = inputs.tokens[inputs.token_mask], int(inputs.image_mask.sum())
    device = Device(plan, sm, cameras, prompt or len(present))
    _put_inputs(device, plan, inputs, noise)
    x = {"offset": device.variant["inputs"]["x"][0], "rows": len(noise), "columns": noise.shape[1], "stride": 0}
    flow = [device.get(**x)]
    found = _run_prefix_and_first_step(device, order)
    flow.append(device.get(**x))
    for step in range(1, plan.manifest["num_steps"]):
        for launch in device.variant["step"]:
            device.launch(launch, step)
        flow.append(device.get(**x))
    if trace is not None:
        padding = device.variant["prompt"] - len(present)
        caches = {name for name in found if name.startswith(("key.", "value."))}  # without the rows of padding
        trace |= {name: each[None, None, : len(each) - padding] if name in caches else each for name, each in found.items()}
        trace["x"] = np.stack(flow)
    return flow[-1]


def _put_inputs(device: Device, plan: Plan, inputs: ModelInputs, noise: np.ndarray) -> None:
    config, present = plan.manifest["model"], inputs.tokens[inputs.token_mask]
    table = np.frombuffer(plan.read("embedding"), np.uint16).reshape(config["vocab_size"], config["llm"]["width"])
    image_tokens = (config["vision"]["image_size"] // config["vision"]["patch_size"]) ** 2
    device.put("images", inputs.images[inputs.image_mask].astype(TYPES[device.pixel], casting="no"))
    device.put("embeddings", table[present])
    device.put("past", np.array(inputs.image_mask.sum() * image_tokens + len(present), np.int32))
    device.put("x", noise)
    if "state" in device.variant["inputs"]:
        device.put("state", inputs.state)


def _run_prefix_and_first_step(device: Device, order: Callable) -> dict[str, np.ndarray]:
    """Returns the prefix's outputs, each from the moment when it is said to be there."""
    prefix, step, outputs = (device.variant[key] for key in ("prefix", "step", "outputs"))
    launches, found = [*prefix, *step], {}
    left = set(range(len(launches)))
    for index in order(prefix, step):
        device.launch(launches[index])
        left.remove(index)
        for name, output in outputs.items():
            if name not in found and min(left, default=len(launches)) > output["after"]:
                found[name] = device.get(**output)
    assert not left and found.keys() == outputs.keys()
    return found
