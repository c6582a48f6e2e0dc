"""An engine's quantized arithmetic, replayed in PyTorch.

Two correct engines disagree by more than they err: a float difference of 1e-7 turns the odd rounding the other way, and
from there on the values are other values, as far apart as 8-bit activations are fine. So the oracle does not round for
itself. It takes the INT8 activations that the engine used, checks that each is a correct rounding of what the oracle
has at that point (up to a tie), and goes on from there: then all else must agree closely, to the last action.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from duq.compiler.quant import Quantization, fake_quantize
from duq.compiler.quant.fake import IntegerLinear, integer_matmul, quantize_activations
from duq.plugins import ops
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

TIE = 2e-3  # how far beyond a half a rounding may lie, in steps of the activation scale

Activations = tuple[np.ndarray, np.ndarray]  # x_q int8 [rows, K], scale float32 [rows or 1, 1]


class Recorded(Plan):
    """A plan whose graphs also put out what their quantizers make; `recorded`: graph -> linear -> two output names."""

    recorded: dict[str, dict[str, tuple[str, str]]] = {}

    def read(self, name: str) -> bytes:
        data = super().read(name)
        if not name.startswith("graph/"):
            return data
        model, found = onnx.load_from_string(data), {}
        for node in model.graph.node:
            if node.domain == ops.DOMAIN and node.op_type.split(".")[0].endswith("A8Linear"):
                for weight in node.input[2].split("+"):  # a merged linear's weight is named after all its parts
                    found[weight.removesuffix(".weight_q")] = (node.input[0], node.input[1])
        outputs = {output: kind for pair in found.values() for output, kind in zip(pair, ("x_q", "scale"), strict=True)}
        for output, kind in outputs.items():
            dtype = onnx.TensorProto.UINT8 if kind == "x_q" else onnx.TensorProto.FLOAT
            model.graph.output.append(onnx.helper.make_tensor_value_info(output, dtype, None))
        self.recorded = {**self.recorded, name: found}
        return bytes(model.SerializeToString())


def run_recorded(path, inputs: ModelInputs, noise: np.ndarray) -> tuple[np.ndarray, dict[str, list[Activations]]]:
    """The engine's actions, and for every quantized linear what it read in each of its runs.

    A linear of the expert runs once for pi0's state token (in the prefix graph) and once in every denoising step.
    """
    plan = Recorded(path)
    executor = CpuExecutor(plan, threads=1)
    calls = defaultdict(list)

    def run(session, graph: str, feeds: dict) -> dict[str, np.ndarray]:
        names = [output.name for output in session.get_outputs()]
        values = dict(
            zip(names, session.run(names, {item.name: feeds[item.name] for item in session.get_inputs()}), strict=True)
        )
        for linear, (x_q, scale) in plan.recorded[executor._entries[graph]].items():
            integers = values[x_q].astype(np.int16) - 128  # the CPU's bodies carry x_q + 128
            calls[linear].append((integers.reshape(-1, integers.shape[-1]).astype(np.int8), values[scale].reshape(-1, 1)))
        return values

    feeds = {"images": inputs.pixels(), "tokens": inputs.tokens, "state": inputs.state}
    feeds |= run(executor._prefix, "prefix", feeds)
    x = noise
    for step in range(plan.manifest["num_steps"]):
        x = run(executor._step, "step", feeds | {"x": x, "step": np.array(step)})["x_next"]
    return x, calls


class ReplayedLinear(IntegerLinear):
    """Computes with the integers of the engine, after checking them. Counts the roundings that went the other way."""

    def __init__(self, linear: IntegerLinear, calls: list[Activations]):
        super().__init__(linear.pack, linear.bias)
        self.calls, self.flipped = list(calls), 0

    def forward(self, x: Tensor) -> Tensor:
        name, transformed = self.pack.name, self.pack.transform_input(x).flatten(0, -2)
        static = None if self.pack.activation_scale is None else torch.from_numpy(self.pack.activation_scale)
        own, own_scale = quantize_activations(transformed, static)
        own_scale = own_scale.reshape(-1, 1)
        x_q, scale = (torch.from_numpy(array) for array in self.calls.pop(0))
        left_out = len(own) - len(x_q)
        if left_out and left_out == x.shape[-2] - len(x_q) == 1:
            # pi0's state token after its last keys and values: the engine does not compute what nobody reads.
            x_q = torch.cat((own[:1].to(torch.int8), x_q))
            scale = scale if static is not None else torch.cat((own_scale[:1], scale))
        assert x_q.shape == own.shape, f"{name}: the engine has rows {tuple(x_q.shape)}, the oracle {tuple(own.shape)}"
        torch.testing.assert_close(scale, own_scale, rtol=1e-4, atol=0, msg=lambda text: f"{name}: {text}")
        distance = float((x_q - (transformed / own_scale).clamp(-128, 127)).abs().max())
        assert distance <= 0.5 + TIE, f"{name}: rounded from {distance:.4f} steps away"
        self.flipped += int((x_q != own).sum())
        y = (integer_matmul(x_q.float(), self.weight_q) * torch.from_numpy(self.pack.weight_scale)) * scale
        y = self.pack.restore_output(y).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def replay(
    model: nn.Module, quantization: Quantization, calls: dict[str, list[Activations]], inputs: ModelInputs, noise, num_steps
) -> tuple[np.ndarray, int]:
    """The oracle's actions from the engine's integers, and how many of those it would have rounded otherwise."""
    fake, replayed = fake_quantize(model, quantization), []
    for name in quantization.packs:
        runs = calls[name]
        if name.startswith("expert.") and len(runs) == num_steps + 1:
            runs = _with_state_row(*runs)
        replayed.append(ReplayedLinear(fake.get_submodule(name), runs))
        parent, _, child = name.rpartition(".")
        setattr(fake.get_submodule(parent), child, replayed[-1])
    fields = (inputs.pixels(), inputs.image_mask, inputs.tokens, inputs.token_mask, inputs.state, noise)
    actions = fake.sample_actions(*(torch.from_numpy(field)[None] for field in fields), num_steps=num_steps)
    assert not any(linear.calls for linear in replayed), "the engine ran a linear more often than the oracle"
    return actions[0].numpy(), sum(linear.flipped for linear in replayed)


def _with_state_row(state: Activations, *steps: Activations) -> list[Activations]:
    """The engine's only run for the state token, in front of the action rows of every step, as the model has them."""
    static = all(len(scale) == 1 for _, scale in steps)
    return [
        (np.concatenate([state[0], x_q]), scale if static else np.concatenate([state[1], scale])) for x_q, scale in steps
    ]
