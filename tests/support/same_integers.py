"""The CPU engine on another engine's INT8 activations: what then differs is the other engine's arithmetic alone.

Left to themselves, two correct engines drift apart: a float that differs in its last bit turns the odd rounding to INT8
the other way, and that is a difference of a whole step from which the next layers start. Here the CPU engine's
quantizers still run, and how far the given integers are from theirs is counted, but its products read the given ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from duq.plugins import ops
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

Activations = tuple[np.ndarray, np.ndarray]  # x_q int8 [tokens, K], scale float32 [tokens or 1, 1]
Run = list[tuple[str, Activations]]  # of one graph: what each quantizer made, named after a linear that reads it, in order


class Given(Plan):
    """A plan whose products take INT8 activations and scales from inputs of the graph; `quantizers`: of each graph, in its
    order, the name of a linear and those of the two inputs. What the quantizers make is put out as "own.<input>"."""

    quantizers: dict[str, list[tuple[str, str, str]]] = {}

    def read(self, name: str) -> bytes:
        data = super().read(name)
        if not name.startswith("graph/"):
            return data
        model, found = onnx.load_from_string(data), []
        weight_of = {
            node.input[0]: node.input[2] for node in model.graph.node if node.op_type.split(".")[0].endswith("A8Linear")
        }
        for node in model.graph.node:
            if node.domain == ops.DOMAIN and node.op_type.startswith("RotateQuantize"):
                x_q, scale = node.output
                found.append((weight_of[x_q], x_q, scale))
                for index, kind in enumerate((onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT)):
                    given = node.output[index]
                    node.output[index] = f"own.{given}"
                    model.graph.input.append(onnx.helper.make_tensor_value_info(given, kind, None))
                    model.graph.output.append(onnx.helper.make_tensor_value_info(f"own.{given}", kind, None))
        self.quantizers = {**self.quantizers, name: found}
        return bytes(model.SerializeToString())


@dataclass
class Roundings:
    """How given integers compare with the CPU engine's own at the same point."""

    count: int = 0
    different: int = 0
    farthest: int = 0  # in steps

    def add(self, given: np.ndarray, own: np.ndarray) -> None:
        distance = np.abs(given.astype(np.int16) - own)
        self.count += distance.size
        self.different += int(np.count_nonzero(distance))
        self.farthest = max(self.farthest, int(distance.max()))


def run_given(path, prefix: Run, steps: Sequence[Run], inputs: ModelInputs, noise: np.ndarray) -> tuple[dict, Roundings]:
    """The stages of a call, as CpuExecutor.run traces them, and what its quantizers say of the integers."""
    plan, roundings = Given(path), Roundings()
    executor = CpuExecutor(plan)

    def run(session, graph: str, feeds: dict, given: Run) -> dict[str, np.ndarray]:
        names = [output.name for output in session.get_outputs()]
        wanted, pairs = (
            {item.name for item in session.get_inputs()},
            _pairs(plan.quantizers[executor._entries[graph]], given),
        )
        for linear, x_q, scale, (integers, scales) in pairs:
            batch = int(inputs.image_mask.sum()) if linear.startswith(("vision", "projector")) else 1
            shifted = (integers.astype(np.int16) + 128).astype(np.uint8)  # the CPU's bodies carry x_q + 128
            feeds = feeds | {x_q: shifted.reshape(batch, -1, shifted.shape[-1])}
            feeds = feeds | {scale: scales if len(scales) == 1 < len(integers) else scales.reshape(batch, -1, 1)}
        values = dict(
            zip(names, session.run(names, {name: feed for name, feed in feeds.items() if name in wanted}), strict=True)
        )
        for _, x_q, _, (integers, _) in pairs:
            roundings.add(integers, values[f"own.{x_q}"].reshape(integers.shape).astype(np.int16) - 128)
        return {name: value for name, value in values.items() if not name.startswith("own.")}

    images, tokens = inputs.pixels()[inputs.image_mask], inputs.tokens[inputs.token_mask]
    stages = run(executor._prefix, "prefix", {"images": images, "tokens": tokens, "state": inputs.state}, prefix)
    x = [noise]
    for index, given in enumerate(steps):
        feeds = stages | {"x": x[-1], "step": np.array(index)}
        x.append(run(executor._step, "step", feeds, given)["x_next"])
    return stages | {"x": np.stack(x)}, roundings


def _pairs(quantizers: list[tuple[str, str, str]], given: Run) -> list[tuple[str, str, str, Activations]]:
    """A linear, the inputs of a graph, and what to give them: the quantizers of each transformer, in their order."""
    pairs = []
    for part in dict.fromkeys(linear.split(".")[0] for linear, *_ in quantizers):  # vision, projector, llm, expert
        ours = [names for names in quantizers if names[0].startswith(part)]
        values = [activations for linear, activations in given if linear.startswith(part)]
        assert len(ours) == len(values), f"{part}: {len(ours)} quantizers and {len(values)} given results"
        pairs += [(*names, activations) for names, activations in zip(ours, values, strict=True)]
    return pairs
