"""The duq operators as TensorRT plugins (IPluginV3): a thin shell around plugins/nodes.py.

Works with `tensorrt` where it is installed, else with `tensorrt_rtx`, whose Python API is the same. `register` gives
TensorRT a creator for each operator, in namespace "duq"; the ONNX parser then finds them for nodes of that domain that
have the attribute plugin_namespace="duq", and the runtime finds them for the plugins of a stored engine.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import astuple
from types import ModuleType
from typing import Any

import numpy as np

from duq.plugins.bitblas import Tile
from duq.plugins.errors import KernelError
from duq.plugins.nodes import NODES, Kernels, Node, Tensor, W4A8Linear
from duq.plugins.shared_object import load_alias

NAMESPACE = "duq"
VERSION = "1"  # of the fields below; an engine with plugins of another version is refused
FLAVORS = ("tensorrt", "tensorrt_rtx")


@functools.cache
def library() -> ModuleType:
    """TensorRT's module. Raises KernelError, naming the extras, where none is installed."""
    for name in FLAVORS:
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            if name == "tensorrt_rtx":
                # Its parser opens the library by its unversioned name when it meets a plugin, and aborts without.
                load_alias("libtensorrt_rtx.so", [f"libtensorrt_rtx.so.{module.__version__.split('.')[0]}"])
            return module
    if importlib.util.find_spec("torch") is None:  # a robot, which does not compile
        raise KernelError("running a tensorrt plan needs TensorRT: pip install 'duq-vla[tensorrt-runtime]'")
    raise KernelError(
        "the tensorrt target needs TensorRT: pip install 'duq-vla[tensorrt]', or 'duq-vla[tensorrt-rtx]' where NVIDIA's own "
        "package index cannot be reached"
    )


def flavor() -> str:
    """Which TensorRT it is: "tensorrt" or "tensorrt_rtx"; an engine of one does not run in the other."""
    return library().__name__


def register(kernels: Kernels | None = None) -> None:
    """Makes the operators known to TensorRT. kernels: what their plugins launch; not needed to build an engine."""
    registry = library().get_plugin_registry()
    for name in NODES:
        known = registry.get_creator(name, VERSION, NAMESPACE)
        if known is not None:
            registry.deregister_creator(known)
        creator = _classes()[1](name, kernels)
        if not registry.register_creator(creator, NAMESPACE):
            raise KernelError(f"TensorRT refuses the plugin {name}")
        _registered[name] = creator  # TensorRT keeps no reference of its own


_registered: dict[str, Any] = {}


def attributes(node: Node) -> dict[str, str | list[int]]:
    """The ONNX attributes that a node's plugin is made from."""
    fields: dict[str, str | list[int]] = {name: _plain(getattr(node, name)) for name in node.fields}
    return fields | {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}


def _plain(value: str | Tile) -> str | list[int]:
    return list(map(int, astuple(value))) if isinstance(value, Tile) else value


@functools.cache
def _classes() -> tuple[type, type]:
    """The plugin and its creator, which derive from classes that only the library has."""
    trt: Any = library()
    type_names = {trt.float32: "float", trt.float16: "Half", trt.bfloat16: "Bf16", trt.int32: "int32", trt.int8: "int8"}
    types = {name: each for each, name in type_names.items()}

    def tensors(descriptions: Sequence[Any], addresses: Sequence[int]) -> list[Tensor]:
        return [
            Tensor(tuple(each.dims), type_names[each.type], at) for each, at in zip(descriptions, addresses, strict=True)
        ]

    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, name: str, node: Node, kernels: Kernels | None):
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = name, VERSION, NAMESPACE
            self.num_outputs = node.outputs
            self.node, self.kernels = node, kernels

        def get_capability_interface(self, kind: Any) -> Plugin:
            return self

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [types[name] for name in self.node.output_types([type_names[each] for each in input_types])]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], expressions: Any) -> list[Any]:
            def halve(size: Any) -> Any:
                return expressions.operation(trt.DimensionOperation.FLOOR_DIV, size, expressions.constant(2))

            found = self.node.output_shapes([[shape[i] for i in range(len(shape))] for shape in inputs], halve)
            results = []
            for dimensions in found:
                result = trt.DimsExprs(len(dimensions))
                for index, value in enumerate(dimensions):
                    result[index] = expressions.constant(value) if isinstance(value, int) else value
                results.append(result)
            return results

        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            names = [type_names.get(each.desc.type, "") for each in tensors[: position + 1]]
            return tensors[position].desc.format == trt.TensorFormat.LINEAR and self.node.accepts(position, names)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return self.node.workspace_bytes([tuple(each.max) for each in inputs])

        def get_valid_tactics(self) -> list[int]:
            return []  # the kernel is chosen by the compiler: an engine built without a GPU has nothing to time

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([_to_field(trt, name, getattr(self.node, name)) for name in self.node.fields])

        def attach_to_context(self, context: Any) -> Plugin:
            return self.clone()

        def clone(self) -> Plugin:
            return Plugin(self.plugin_name, self.node, self.kernels)

        def enqueue(
            self,
            input_descriptions: Sequence[Any],
            output_descriptions: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            assert self.kernels is not None, "registered without kernels, to build engines"
            operands = tensors(input_descriptions, inputs), tensors(output_descriptions, outputs)
            self.node.enqueue(*operands, workspace, stream, self.kernels)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self, name: str, kernels: Kernels | None):
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, VERSION, NAMESPACE
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(field, np.array([]), trt.PluginFieldType.UNKNOWN) for field in NODES[name].fields]
            )
            self.kernels = kernels

        def create_plugin(self, name: str, fields: Sequence[Any], phase: Any) -> Plugin:
            return Plugin(self.name, from_fields(self.name, fields), self.kernels)

    return Plugin, Creator


def _to_field(trt: Any, name: str, stored: str | Tile) -> Any:
    value = _plain(stored)
    if isinstance(value, str):
        return trt.PluginField(name, value.encode(), trt.PluginFieldType.CHAR)
    return trt.PluginField(name, np.array(value, np.int32), trt.PluginFieldType.INT32)


def from_fields(op: str, fields: Sequence[Any]) -> Node:
    """The node of an ONNX node's attributes, or of what an engine stored."""
    values = {each.name: each.data for each in fields}
    kind = NODES[op]
    missing = [name for name in kind.fields if name not in values]
    if missing:
        raise KernelError(f"plugin {op}: fields {', '.join(missing)} are missing; compile the plan with this duq")
    found: dict[str, Any] = {}
    for name in kind.fields:
        if kind is W4A8Linear and name == "tile":
            found[name] = _tile(values[name])
        else:
            found[name] = bytes(values[name]).decode().rstrip("\0")
    return kind(**found)


def _tile(stored: Any) -> Tile:
    """The tile of its sizes as integers, as `_plain` stores it."""
    warps_m, warps_n, warp_m, warp_n, stages, panels = map(int, np.asarray(stored).reshape(-1))
    return Tile(warps_m, warps_n, warp_m, warp_n, stages, bool(panels))
