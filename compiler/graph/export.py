"""PyTorch model -> two plain ONNX graphs, `prefix` and `step`.

Exported as they are, with masks, the whole last layer and time as an input: what can be simplified is left to the
passes, where each simplification is a small rewrite with its own test. Weights are not touched here. The model is
traced with fake tensors, and each initializer is bound lazily to its tensor in the memory-mapped checkpoint, so a
13 GB policy exports in the memory of a small one.

    prefix: images [C, 3, 224, 224], image_mask [C], tokens [T], token_mask [T]
            -> image_features [256 C, width], hidden [P, width], key.0, value.0, ... [1, kv_heads, P, head_dim]
    step:   x [H, A], time [], (pi0: state [A],) prefix_mask [P], key.0, value.0, ...
            -> x_next [H, A] = x - v(x, time) / num_steps

C (cameras), T (prompt tokens) and P = 256 C + T are dynamic; float32 throughout.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from duq.compiler.graph.weights import Weight, mark, of_module
from duq.compiler.model.pi0 import Pi0
from duq.compiler.quant.pack import LinearPack
from duq.runtime.config import ModelConfig

OPSET = 23  # the first with Attention and RMSNormalization, and the newest that ONNX Runtime for Python 3.10 loads


@dataclass
class Graphs:
    """The policy between two passes.

    Attributes:
        weights: the tensors that the initializers are bound to, by canonical name.
        packs: the quantized form of linears, by canonical module name; their passes put it into the graphs.
        solver: of runtime/solver.py. What is exported is a step of Euler's method, for a pass to extend.
    """

    prefix: ir.Model
    step: ir.Model
    config: ModelConfig
    num_steps: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    packs: Mapping[str, LinearPack] = field(default_factory=dict)
    solver: str = "euler"

    def items(self) -> Iterator[tuple[str, ir.Model]]:
        yield "prefix", self.prefix
        yield "step", self.step


def key_value_names(depth: int) -> list[str]:
    return [f"{kind}.{layer}" for layer in range(depth) for kind in ("key", "value")]


class Prefix(nn.Module):
    def __init__(self, model: Pi0):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor):
        image_features = self.model.embed_images(images[None])
        mask = torch.cat((image_mask.repeat_interleave(self.model.config.vision.tokens), token_mask))
        hidden, key_values = self.model.prefix(image_features, tokens[None], mask[None])
        return image_features[0], hidden[0], *(tensor for pair in key_values for tensor in pair)


class Step(nn.Module):
    def __init__(self, model: Pi0, num_steps: int):
        super().__init__()
        self.model = model
        self.num_steps = num_steps

    def forward(self, x: Tensor, time: Tensor, state: Tensor | None, prefix_mask: Tensor, *key_values: Tensor):
        past = list(zip(key_values[0::2], key_values[1::2], strict=True))
        state = None if state is None else state[None]
        velocity = self.model.velocity(state, x[None], time[None], prefix_mask[None], past)
        return x + (velocity * (-1.0 / self.num_steps))[0]


def export(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    num_steps: int,
    packs: Mapping[str, LinearPack] | None = None,
    solver: str = "euler",
) -> Graphs:
    """Traces the model and binds `weights` (canonical names, any float dtype, on disk) to the graphs' initializers."""
    graphs = replace(trace(config, num_steps), weights=weights, packs=packs or {}, solver=solver)
    records = _records(config)
    for _, model in graphs.items():
        for name, value in model.graph.initializers.items():
            value.const_value = _lazy_float32(name, weights[name])
            mark(value, records[name])
    return graphs


def trace(config: ModelConfig, num_steps: int) -> Graphs:
    """The graphs of a model of these dimensions, their initializers without values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Pi0(config).eval().requires_grad_(False)
        return Graphs(_export_prefix(model), _export_step(model, num_steps), config, num_steps)


def _export_prefix(model: Pi0) -> ir.Model:
    config, cameras, prompt = model.config, 2, 7  # example sizes of the dynamic dimensions
    inputs = {
        "images": torch.zeros(cameras, 3, config.vision.image_size, config.vision.image_size),
        "image_mask": torch.ones(cameras, dtype=torch.bool),
        "tokens": torch.zeros(prompt, dtype=torch.int64),
        "token_mask": torch.ones(prompt, dtype=torch.bool),
    }
    outputs = ["image_features", "hidden", *key_value_names(config.llm.depth)]
    dynamic = ({0: "cameras"}, {0: "cameras"}, {0: "prompt"}, {0: "prompt"})
    return _to_onnx(Prefix(model), inputs, outputs, dynamic)


def _export_step(model: Pi0, num_steps: int) -> ir.Model:
    config, prefix = model.config, 11
    key_values = [torch.zeros(1, config.llm.kv_heads, prefix, config.llm.head_dim) for _ in range(2 * config.llm.depth)]
    inputs = {
        "x": torch.zeros(config.action_horizon, config.action_dim),
        "time": torch.ones(()),
        "state": None if config.pi05 else torch.zeros(config.state_width),
        "prefix_mask": torch.ones(prefix, dtype=torch.bool),
        **dict(zip(key_value_names(config.llm.depth), key_values, strict=True)),
    }
    past = tuple({2: "prefix"} for _ in key_values)
    dynamic: tuple[Any, ...] = ({}, {}, None if config.pi05 else {}, {0: "prefix"}, past)
    return _to_onnx(Step(model, num_steps), inputs, ["x_next"], dynamic)


def _to_onnx(module: nn.Module, inputs: dict, outputs: list[str], dynamic: tuple) -> ir.Model:
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=[name for name, value in inputs.items() if value is not None],
            output_names=outputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # the optimizer would rename the weights of bias-less linears
            verbose=False,
        )
    model = program.model
    for name, value in list(model.graph.initializers.items()):
        value.name = name.removeprefix("model.")
        value.const_value = None
    model.graph.name = type(module).__name__.lower()
    return model


def _records(config: ModelConfig) -> dict[str, Weight]:
    """By the canonical name of each parameter of the model, what it is."""
    with torch.device("meta"):
        model = Pi0(config)
    return {
        f"{name}.{attribute}": of_module(name, "embedding" if isinstance(module, nn.Embedding) else attribute)
        for name, module in model.named_modules()
        for attribute, _ in module.named_parameters(recurse=False)
    }


def _lazy_float32(name: str, weight: Tensor) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(weight.to(torch.float32).numpy(), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(weight.shape),
        name=name,
    )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns about packages it does not need (torchvision) and about its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
