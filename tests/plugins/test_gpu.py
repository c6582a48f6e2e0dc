"""The rows of GPUs: what each promises, and that one row is all that another GPU needs."""

from __future__ import annotations

import numpy as np
import pytest
from rich.progress import Progress

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.compiler.targets import Options, cuda
from duq.plugins.errors import KernelError
from duq.plugins.gpu import GPUS, gpu_of
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from tests.support import emulate
from tests.support.inputs import make_inputs, make_noise
from tests.support.quant_policy import observation

SILENT = Progress(disable=True)
SETTINGS = {"num_steps": 2, "cameras": 1}


def test_rows_are_of_one_piece():
    for sm, gpu in GPUS.items():
        assert gpu.sm == sm and gpu.architecture.removesuffix("a") == f"sm_{sm}" and gpu_of(sm) is gpu
        assert gpu.block_shared_bytes < gpu.shared_bytes and gpu.threads % 32 == 0
        assert gpu.has_clusters or not gpu.has_wgmma


def test_an_unknown_one_is_refused():
    with pytest.raises(KernelError, match="no kernels for SM 75; known are 80, 86, 87, 89, 90"):
        gpu_of(75)


def test_the_cuda_target_offers_every_row():
    assert list(cuda.ARCHITECTURES) == sorted(GPUS)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_all_kernels_of_a_policy_compile_for_orin(name, tiny_plans, tmp_path):
    """SM 87 is a row and nothing else: its plan has machine code, and its schedule computes the policy."""
    checkpoint = load_checkpoint(tiny_plans(name, "none").checkpoint)
    recipe = load_recipe(DEFAULT_PRESET, environment={})
    quantization = quantize_checkpoint(checkpoint, recipe, [observation(checkpoint.config, 0, cameras=1)], SILENT)
    plans = {}
    for options in (cuda.CudaOptions(sm=(87,), timing=False, **SETTINGS), Options(**SETTINGS)):
        path = tmp_path / f"{options.target}.plan"
        compile_policy(checkpoint, quantization, path, options, SILENT)
        plans[options.target] = Plan(path)
    cubins = [entry for entry in plans["cuda"].names if entry.startswith("cubin/sm87/")]
    assert len(cubins) > 10 and all(bytes(plans["cuda"].read(each)[:4]) == b"\x7fELF" for each in cubins)
    inputs, noise = make_inputs(checkpoint.config, (True, False, False), 5), make_noise(checkpoint.config)
    expected, _ = CpuExecutor(plans["cpu"], threads=1).run(inputs, noise)
    actions = emulate.run(plans["cuda"], 87, inputs, noise)
    assert np.linalg.norm(actions - expected) < 0.02 * np.linalg.norm(expected)
