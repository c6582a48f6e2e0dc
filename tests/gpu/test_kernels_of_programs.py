"""The kernels as the program of each SM launches them, with its tiles and limits, by the tests of the GPU's own.

Programs of SM 80 to 89 run from PTX, those of later GPUs by a stand-in: their tiles in code without clusters and programmatic
launch. For a GEMM or an attention, what such a GPU runs is what its program chooses.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from duq.plugins.kernel import Instance
from duq.plugins.kernels import TileAttention
from duq.plugins.tactics import SPLIT_KEYS, Small, best, best_attention, fits
from tests.gpu import test_attention as attention
from tests.gpu import test_gemm_float as gemm_float
from tests.gpu import test_kernels as kernels
from tests.gpu import test_pointwise as pointwise
from tests.support import launch

BF16, FLOAT = torch.bfloat16, torch.float32
SMALL_SIZES = [(51, n, k) for n, k in kernels.EXPERT]
LARGE_SIZES = [(816, n, k) for n, k in kernels.PREFIX]


def gemms_at_full_size(sizes: list[tuple[int, int, int]]) -> None:
    for m, n, k in sizes:
        kernels.test_best_tactic_is_exact_at_full_size(m, n, k, 4)
    kernels.test_best_tactic_is_exact_at_full_size(*sizes[0], 8)


def epilogues(m: int, n: int, k: int) -> None:
    """Of the tactic for [m, n, k], on the small operands of the tests."""
    tactic = best(m, n, k, 4, launch.gpu())
    assert fits(tactic, 51, 256, 1024, 4, launch.gpu())
    kernels.test_epilogue_is_the_definition_in_float32(tactic, "bias residual", BF16)
    kernels.test_geglu_epilogue(tactic, 50, BF16)
    kernels.test_gelu_epilogue(tactic, BF16, True)
    kernels.test_what_is_left_for_a_norm(tactic, True)


def split_k(split: int = 4) -> None:
    for bits in (4, 8):
        kernels.test_integer_sums_are_exact(Small(2, 7, 4, 2, split), 50, bits)


def float_gemms() -> None:
    gemm_float.test_product_is_the_definition(50, BF16, "norm scale bias residual")
    gemm_float.test_int4_weight(7, FLOAT, "norm scale")
    gemm_float.test_activations(50, "GEGLU", BF16)
    gemm_float.test_rotary(50, 5, True)


def float_gemms_that_split_k() -> None:
    for split in gemm_float.SPLITS:
        gemm_float.test_residual_in_place_and_the_same_again(split)


def float_gemms_at_full_size() -> None:
    for n, k in kernels.EXPERT:
        gemm_float.test_best_tactic_at_full_size(n, k, 50)


def prefix_attention() -> None:
    for tokens in (306, 817):
        attention.test_prefix(best_attention(256, tokens, 1, launch.gpu()), tokens)


def suffix_attention(tokens: int) -> None:
    attention.test_suffix(best_attention(256, tokens, 1, launch.gpu(), 817, tokens), tokens, 817)


def vision_attention() -> None:
    for images in (1, 3):
        attention.test_vision(best_attention(72, 256, images, launch.gpu()), images, 256)


def split_attention() -> None:
    """Blocks that meet in memory, in programs that choose it and in those that do not."""
    tactic = next(each for each in SPLIT_KEYS if each.fits(launch.gpu()))
    attention.test_split_keys_meet_in_memory(tactic, 50)


def rotations() -> None:
    for source, rotate, features in (
        ("RMS_NORM", 64, "gain"), ("GEGLU", 64, "input_scale"), ("LAYER_NORM", "dense", "gain shift"), ("PLAIN", 0, "static")
    ):  # fmt: skip
        kernels.test_rotate_quantize(BF16, source, rotate, features)


CHECKS: dict[str, list[Callable[[], None]]] = {  # by kernel
    "gemm_small": [lambda: gemms_at_full_size(SMALL_SIZES), lambda: epilogues(*SMALL_SIZES[0]), split_k],
    "gemm_large": [lambda: gemms_at_full_size(LARGE_SIZES), lambda: epilogues(*LARGE_SIZES[0])],
    "gemm_float": [float_gemms, float_gemms_at_full_size, float_gemms_that_split_k],
    "attention": [prefix_attention, vision_attention, lambda: suffix_attention(50), lambda: suffix_attention(1)],
    "attention_split": [split_attention],
    "attention_tile": [lambda: attention.test_prefix(TileAttention(8), 306)],
    "rotate_quantize": [rotations, lambda: kernels.test_rotation_for_products_of_floats("RMS_NORM", 64)],
    "residual_quantize": [lambda: kernels.test_residual_quantize(50, 1024, 8, 64, "gate gain shift")],
    "hadamard_quantize": [lambda: kernels.test_hadamard_quantize(16384, 816)],
    "rotary": [lambda: attention.test_rotary(818, 0, None, True)],
    "normalize": [lambda: pointwise.test_normalize(True, (FLOAT, BF16), 257, 1152, "gain shift")],
    "patches": [lambda: pointwise.test_patches(3, 224, 14, 592)],
    "float_patches": [lambda: pointwise.test_patches_of_floats(3, 224, 14, 640)],
    "tokens": [lambda: pointwise.test_tokens(48, 2048)],
    "linear_narrow": [lambda: pointwise.test_linear_narrow(FLOAT, 50, 32, 1024, True, "SILU")],
    "flow_step": [lambda: pointwise.test_flow_step(50, 1024, 32, "gain")],
    "geglu": [lambda: pointwise.test_geglu(51, 4096)],
    "epilogue": [lambda: pointwise.test_epilogue(BF16, 51, 2560, 64, "GEGLU", "bias residual")],
    "dequantize_weight": [lambda: gemm_float.test_dequantize_weight(2560, 2048)],
}
CASES = [
    pytest.param(kernel, each, id=f"{kernel}-{index}")
    for kernel, checks in CHECKS.items()
    for index, each in enumerate(checks)
]


@pytest.mark.parametrize(("kernel", "check"), CASES)
def test_a_kernel_of_a_program(kernel, check, program, monkeypatch):
    every_tile, run, launched = gemm_float.tactics_for, launch.run, []

    def noted(instance: Instance, *arguments, **settings) -> None:
        launched.append(instance)
        run(instance, *arguments, **settings)

    monkeypatch.setattr(gemm_float, "tactics_for", lambda m: [every_tile(m)[1], every_tile(m)[-1]])  # of five
    monkeypatch.setattr(launch, "run", noted)
    with launch.program(program) as image:
        check()
    assert any(each.kernel.name.startswith(kernel) for each in launched)
    assert all("wgmma" not in each.source for each in launched)
    assert all(each.shape.shared_bytes <= image.gpu.block_shared_bytes for each in launched)
