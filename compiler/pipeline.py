"""The whole compiler: checkpoint -> quantize -> export -> phases of passes -> target -> plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from duq.compiler.checkpoint import Checkpoint
from duq.compiler.checks import check_weights
from duq.compiler.graph import counts
from duq.compiler.graph.export import export
from duq.compiler.graph.keep import keep_graphs
from duq.compiler.graph.passes.fold import fold_linear_chains, fold_norm_gains, fold_output_scales
from duq.compiler.graph.passes.layout import keep_embedding_dtype, weights_as_matmul_reads_them
from duq.compiler.graph.passes.merge import merge_float_linears
from duq.compiler.graph.passes.quantize import lower_quantized_linears
from duq.compiler.graph.passes.rotary import tabulate_rotary_embeddings
from duq.compiler.graph.passes.solver import extend_step_by_history
from duq.compiler.graph.passes.time import split_time_from_actions, tabulate_time
from duq.compiler.graph.passes.tokens import (
    compact_tokens,
    count_instead_of_summing,
    drop_true_masks,
    eliminate_dead_prefix_tail,
    hoist_state_token,
)
from duq.compiler.manifest import check_policy, manifest, write_extras
from duq.compiler.model import build_model
from duq.compiler.parallel import in_background
from duq.compiler.phases import Pass, Phase, check_order, passes_of
from duq.compiler.quant import Quantization, Recipe, quantize
from duq.compiler.quant.transforms import LinearTransform
from duq.compiler.targets import Options, Target, cpu, cuda, tensorrt
from duq.runtime.errors import PlanError
from duq.runtime.files import check_output_file
from duq.runtime.plan import PlanWriter
from duq.runtime.preprocess import ModelInputs
from duq.runtime.signing import Signer

TARGETS: dict[str, Target[Any]] = {target.name: target for target in (cpu.TARGET, cuda.TARGET, tensorrt.TARGET)}

# The rewrites that every target wants, in order. Each is exact (quantization and the solver aside), and most make the next one
# possible.
PHASES = (
    Phase("canonicalize", (
        Pass(weights_as_matmul_reads_them, "linears are MatMuls of [K, N] weights, gains are weights",
             counts.linears_and_gains),
        Pass(keep_embedding_dtype, "a bfloat16 token table stays bfloat16: half the memory",
             counts.bfloat16_embeddings),
    )),
    Phase("specialize", (
        Pass(compact_tokens, "absent cameras and prompt padding are left out, not masked",
             counts.masked_inputs),
        Pass(count_instead_of_summing, "then a position is an index",
             counts.sums_over_masks, needs=(compact_tokens,)),
        Pass(drop_true_masks, "and attention over the prefix needs no mask",
             counts.masks_always_true, needs=(compact_tokens,)),
        Pass(tabulate_rotary_embeddings, "cosines and sines of all positions are tables",
             counts.rotary_tables, needs=(count_instead_of_summing,)),
        Pass(hoist_state_token, "pi0's state token sees only the prefix: once a call, not in each denoising step",
             counts.state_tokens, needs=(weights_as_matmul_reads_them, drop_true_masks)),
    )),
    Phase("quantize", (
        Pass(lower_quantized_linears, "packed linears become duq nodes: a quantizer and an integer GEMM",
             counts.quantized_linears, needs=(weights_as_matmul_reads_them, hoist_state_token)),
    )),
    Phase("fold", (
        Pass(eliminate_dead_prefix_tail, "the last prefix layer ends at its keys and values, all that is read of it",
             counts.once),
        Pass(split_time_from_actions, "the time half of pi0's action_time_mlp_in leaves the loop",
             counts.time_and_action_linears, needs=(weights_as_matmul_reads_them,)),
        Pass(fold_linear_chains, "pi0's first two linears of the actions are one",
             counts.linear_chains, needs=(split_time_from_actions,)),
        Pass(tabulate_time, "the timesteps are constants: what depends on them alone is a table",
             counts.time_tables, needs=(fold_linear_chains, hoist_state_token)),
        Pass(fold_output_scales, "the Euler step's dt goes into action_out_proj",
             counts.once, needs=(weights_as_matmul_reads_them,)),
        Pass(extend_step_by_history, "a multistep solver adds what earlier steps found",
             counts.steps_with_history, needs=(tabulate_time, fold_output_scales)),
        Pass(fold_norm_gains, "gains and balance factors go into the weights behind or the norms before",
             counts.norms_with_folds, needs=(lower_quantized_linears, tabulate_time, eliminate_dead_prefix_tail)),
    )),
    Phase("merge", (
        Pass(merge_float_linears, "float linears that read one tensor are one GEMM: q, k, v; gate, up",
             counts.float_groups, needs=(lower_quantized_linears, fold_norm_gains)),
    )),
)  # fmt: skip

for _target in TARGETS.values():
    check_order((*PHASES, *_target.phases))


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


def compile_policy(
    checkpoint: Checkpoint,
    quantization: Quantization,
    out: Path,
    options: Options,
    progress: Progress,
    keep: Path | None = None,
    signer: Signer | None = None,
) -> None:
    """Writes the plan `out` for the target whose options are given. Nothing of it is left if anything fails.

    keep: a directory for what each phase leaves: the graphs after each pass, and the target's own phases. signer: of the plan.
    Raises CheckpointError for weights that are not finite, GraphError for a graph that a pass does not know, PlanError for
    settings that a plan cannot hold.
    """
    check_output_file("", out, PlanError)
    target, options = TARGETS[options.target], options.settled(checkpoint)
    check_policy(checkpoint, options)
    check_weights(checkpoint, progress)
    fingerprint = in_background(lambda: checkpoint.fingerprint)  # reads all weight files, and is needed last
    weights = checkpoint.weights | quantization.float_weights
    task = progress.add_task("Exporting", total=None)
    graphs = export(checkpoint.config, weights, options.steps, quantization.packs, options.solver_name)
    progress.update(task, total=1, completed=1)
    keep_graphs(graphs, keep, 0, "export")
    passes = list(passes_of((*PHASES, *target.phases)))
    for index, each in enumerate(progress.track(passes, description="Rewriting the graphs"), start=1):
        each.run(graphs)
        keep_graphs(graphs, keep, index, each.name)
    with PlanWriter(out) as writer:
        write_extras(checkpoint, quantization, writer)
        sections = target.emit(graphs, writer, progress, options, keep)
        fingerprint.result()
        writer.finish(manifest(checkpoint, quantization, options) | {"graphs": sections}, signer)
