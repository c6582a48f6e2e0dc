"""The rewrites that both GPU targets want: large GEMMs, and rotary embeddings as one operator."""

from __future__ import annotations

from duq.compiler.graph import counts
from duq.compiler.graph.passes.fold import fold_norm_gains
from duq.compiler.graph.passes.merge import merge_quantized_linears
from duq.compiler.graph.passes.quantize import lower_quantized_linears
from duq.compiler.graph.passes.rotary import fuse_rotary_embeddings, tabulate_rotary_embeddings
from duq.compiler.phases import Pass, Phase

GPU_PHASES = (
    Phase("gpu", (
        Pass(merge_quantized_linears, "quantized linears that read one tensor are one GEMM: q, k, v; gate, up",
             counts.quantized_groups, needs=(lower_quantized_linears, fold_norm_gains)),
        Pass(fuse_rotary_embeddings, "a rotary embedding is one node, for which there is a kernel",
             counts.rotary_embeddings, needs=(tabulate_rotary_embeddings,)),
    )),
)  # fmt: skip
