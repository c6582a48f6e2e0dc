"""The whole compiler: checkpoint -> model -> quantize -> export -> passes -> target -> plan."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from rich.progress import Progress

import duq
from duq.compiler.checkpoint import Checkpoint, check_finite
from duq.compiler.errors import CheckpointError
from duq.compiler.graph.export import Graphs, export
from duq.compiler.graph.passes.fold import fold_linear_chains, fold_norm_gains, fold_output_scales
from duq.compiler.graph.passes.layout import keep_embedding_dtype, weights_as_matmul_reads_them
from duq.compiler.graph.passes.merge import merge_float_linears, merge_quantized_linears
from duq.compiler.graph.passes.quantize import lower_quantized_linears
from duq.compiler.graph.passes.rotary import fuse_rotary_embeddings, tabulate_rotary_embeddings
from duq.compiler.graph.passes.time import split_time_from_actions, tabulate_time
from duq.compiler.graph.passes.tokens import compact_tokens, eliminate_dead_prefix_tail, hoist_state_token
from duq.compiler.model import build_model
from duq.compiler.quant import Quantization, Recipe, quantize
from duq.compiler.quant.transforms import LinearTransform
from duq.compiler.settings import PolicySettings, default_settings, settings_of
from duq.compiler.targets import cpu, cuda, tensorrt
from duq.plugins import ops
from duq.runtime.config import GemmaConfig
from duq.runtime.plan import PlanWriter
from duq.runtime.preprocess import ModelInputs

Pass = Callable[[Graphs], Graphs]


class Target(NamedTuple):
    """Rewrites on top of the common ones, and what writes the graphs into the plan as the target's executor wants them."""

    passes: list[Pass]
    emit: Callable[..., dict]  # (graphs, plan writer, progress, options) -> the manifest's section about the graphs
    architectures: tuple[int, ...] = ()  # the SMs to choose from


TARGETS = {
    "cpu": Target([], cpu.emit),
    "cuda": Target([merge_quantized_linears, fuse_rotary_embeddings], cuda.emit, cuda.ARCHITECTURES),
    "tensorrt": Target([merge_quantized_linears, fuse_rotary_embeddings], tensorrt.emit, tensorrt.ARCHITECTURES),
}


@dataclass(frozen=True)
class Options:
    """What a plan is made for; the policy itself comes from the checkpoint."""

    target: str = "cpu"
    sm: tuple[int, ...] = ()  # compute capabilities of the GPUs, e.g. (86, 90)
    robot: str = "none"  # of the default settings
    num_steps: int | None = None  # likewise; None: the checkpoint's
    cameras: int = 3
    timing: bool = True  # cuda: beside a GPU of an architecture in `sm`, choose kernels by timing
    loop: str = "graph"  # tensorrt: "unrolled" into one network, or "graph": the executor repeats the step's engine
    float_type: str = "bf16"  # tensorrt: of what is not quantized, "bf16" or "fp16"
    settings: PolicySettings | None = None  # around the policy; by default those of the checkpoint and `robot`
    float_images: bool = False  # the policy's images are resized in floating point (runtime/images.py, FLOAT_RULES)


def compile_policy(
    checkpoint: Checkpoint,
    quantization: Quantization,
    out: Path,
    options: Options,
    progress: Progress,
    keep_onnx: Path | None = None,
) -> None:
    """Writes the plan `out`. Nothing of it is left if anything fails. keep_onnx: directory for the graphs between passes."""
    check_weights(checkpoint, progress)
    settings = options.settings or default_settings(checkpoint, options.robot, options.num_steps)
    options = replace(
        options, settings=settings, robot=settings.robot_name, num_steps=settings.num_steps,
        float_images=options.float_images or settings.transforms["resize"] != "openpi",
    )  # fmt: skip
    weights = checkpoint.weights | quantization.float_weights
    task = progress.add_task("Exporting", total=None)
    hashing = ThreadPoolExecutor(1)
    fingerprint = hashing.submit(getattr, checkpoint, "fingerprint")  # reads all weight files, and is needed last
    hashing.shutdown(wait=False)
    graphs = export(checkpoint.config, weights, options.num_steps)
    progress.update(task, total=1, completed=1)
    _keep(graphs, keep_onnx, 0, "export")
    phases = [*passes(quantization, weights), *TARGETS[options.target].passes]
    for index, rewrite in enumerate(progress.track(phases, description="Rewriting the graphs"), start=1):
        graphs = rewrite(graphs)
        _keep(graphs, keep_onnx, index, getattr(rewrite, "func", rewrite).__name__)
    with PlanWriter(out) as writer:
        if checkpoint.tokenizer is not None:
            writer.write("tokenizer.model", checkpoint.tokenizer.read_bytes())
        for layer, transform in quantization.value_transforms.items():
            writer.write(value_basis_entry(layer), _value_basis(transform, checkpoint.config.llm))
        sections = TARGETS[options.target].emit(graphs, writer, progress, options)
        fingerprint.result()
        writer.finish(_manifest(checkpoint, quantization, options) | {"graphs": sections})


def value_basis_entry(layer: int) -> str:
    """The plan's entry with the basis M, float32 [channels, channels], that a layer's cached values are in: v = v' M.

    Only there where the quantizer chose one; nothing but a comparison of the engine's values with the model's needs it.
    """
    return f"value_basis/{layer}"


def passes(quantization: Quantization, weights: dict[str, torch.Tensor]) -> list[Pass]:
    """The rewrites in order. Each is exact (quantization aside), and most make the next one possible."""
    return [
        weights_as_matmul_reads_them,
        partial(keep_embedding_dtype, weights=weights),
        compact_tokens,
        tabulate_rotary_embeddings,
        hoist_state_token,
        partial(lower_quantized_linears, packs=quantization.packs),
        eliminate_dead_prefix_tail,
        split_time_from_actions,
        fold_linear_chains,
        tabulate_time,
        fold_output_scales,
        fold_norm_gains,
        merge_float_linears,
    ]


def quantize_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    inputs: Sequence[ModelInputs],
    progress: Progress,
    transforms: dict[str, LinearTransform] | None = None,
    device: str = "cpu",
) -> Quantization:
    """Calibrates on `inputs` and quantizes what the recipe selects, computing on PyTorch's `device`."""
    check_weights(checkpoint, progress)
    return quantize(build_model(checkpoint).to(device), checkpoint, recipe, inputs, progress, transforms)


def check_weights(checkpoint: Checkpoint, progress: Progress) -> None:
    """Raises CheckpointError if a weight is NaN or infinite. Done once for a checkpoint, before any other work."""
    if checkpoint.finite:
        return
    task = progress.add_task("Checking the weights", total=None)
    try:
        check_finite(checkpoint.weights, lambda done, total: progress.update(task, completed=done, total=total))
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    checkpoint.finite = True


def _value_basis(transform: LinearTransform, config: GemmaConfig) -> np.ndarray:
    return transform.restore_input(torch.eye(config.kv_heads * config.head_dim)).numpy()


def _manifest(checkpoint: Checkpoint, quantization: Quantization, options: Options) -> dict:
    linears = {
        name: {
            "op": f"duq::W{pack.weight_bits}A{pack.activation_bits or 16}Linear",
            "weight_bits": pack.weight_bits,
            "activation_bits": pack.activation_bits,
            "shape": list(pack.shape),
            "bytes": pack.weight_q.nbytes + pack.weight_scale.nbytes,
            "sqnr_db": round(float(pack.sqnr_db), 2),
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
        **{name: value for name, value in vars(options).items() if name != "settings"},
        **policy,
        "quantization": {"recipe": quantization.recipe.to_json(), "linears": linears},
        "checkpoint": policy["checkpoint"] | {"fingerprint": checkpoint.fingerprint},
    }


def _keep(graphs: Graphs, directory: Path | None, index: int, phase: str) -> None:
    """Saves both graphs as they are after a phase; they pass onnx.checker and run in ONNX Runtime."""
    if directory is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name, model in graphs.items():
        ops.add_functions(model)
        stem = f"{index:02d}-{phase}-{name}"
        ir.save(model, directory / f"{stem}.onnx", external_data=f"{stem}.weights", size_threshold_bytes=1 << 20)
