"""Models of the tensorrt target with their weights, for ONNX's reference and ONNX Runtime."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from duq.compiler.targets.tensorrt.network import Network, is_external


def with_weights(network: Network) -> onnx.ModelProto:
    proto = network.proto()
    for tensor in proto.graph.initializer:
        if is_external(tensor):
            known = network.tensors[tensor.name]
            loaded = ir.Tensor(known.numpy(), dtype=known.dtype, name=tensor.name)
            tensor.CopyFrom(ir.serde.serialize_tensor(loaded))
    return proto
