"""What a plan says of itself: what made it, with which settings, and what became of each quantized linear."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import fields

import numpy as np
import onnx
import onnxruntime
import torch

import duq
from duq.compiler.checkpoint import Checkpoint
from duq.compiler.checkpoint.storage import read_tokenizer
from duq.compiler.quant import Quantization
from duq.compiler.quant.transforms import LinearTransform
from duq.compiler.settings import settings_of
from duq.compiler.targets import Options
from duq.runtime import schema
from duq.runtime.config import GemmaConfig
from duq.runtime.errors import PlanError
from duq.runtime.plan import PlanWriter


def manifest(checkpoint: Checkpoint, quantization: Quantization, options: Options) -> dict:
    """The manifest but for its section `graphs`, which the target makes. `options` has the settings in it."""
    assert options.settings is not None
    linears = {
        name: {
            "op": f"duq::W{pack.weight_bits}A{pack.activation_bits or 16}Linear",
            "weight_bits": pack.weight_bits,
            "activation_bits": pack.activation_bits,
            "shape": list(pack.shape),
            "bytes": pack.weight_q.nbytes + pack.weight_scale.nbytes,
            "sqnr_db": round(float(pack.sqnr_db), 2) if math.isfinite(pack.sqnr_db) else None,  # packs need not say
        }
        for name, pack in quantization.packs.items()
    }
    policy = settings_of(checkpoint, options.settings)
    return {
        "created_by": {
            "duq": duq.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "target": options.target,
        "sm": (),  # of a target without a GPU
        **{field.name: getattr(options, field.name) for field in fields(options) if field.name != "settings"},
        **policy,
        "quantization": {"recipe": quantization.recipe.to_json(), "linears": linears},
        "checkpoint": policy["checkpoint"] | {"fingerprint": checkpoint.fingerprint},
    }


def check_policy(checkpoint: Checkpoint, options: Options) -> None:
    """Raises PlanError, before the work, for a policy that no plan can hold: of dimensions or statistics out of bounds."""
    assert options.settings is not None
    try:
        schema.check(schema.PolicySettings, json.loads(json.dumps(settings_of(checkpoint, options.settings))))
    except PlanError as error:
        raise PlanError(f"{checkpoint.path}: cannot become a plan: {error}") from error


def value_basis_entry(layer: int) -> str:
    """The plan's entry with the basis M, float32 [channels, channels], that a layer's cached values are in: v = v' M.

    Only there where the quantizer chose one; nothing but a comparison of the engine's values with the model's needs it.
    """
    return f"value_basis/{layer}"


def write_extras(checkpoint: Checkpoint, quantization: Quantization, writer: PlanWriter) -> None:
    """Writes the entries beside graphs and weights: the tokenizer, and the basis of each layer's cached values."""
    if checkpoint.tokenizer is not None:
        writer.write("tokenizer.model", read_tokenizer(checkpoint.tokenizer))
    for layer, transform in quantization.value_transforms.items():
        writer.write(value_basis_entry(layer), _value_basis(transform, checkpoint.config.llm))


def _value_basis(transform: LinearTransform, config: GemmaConfig) -> np.ndarray:
    return transform.restore_input(torch.eye(config.kv_heads * config.head_dim)).numpy()
