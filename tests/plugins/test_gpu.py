"""The cards: what each promises, and that a row is all that another GPU needs."""

from __future__ import annotations

import numpy as np
import pytest
from rich.progress import Progress

from duq.compiler.pipeline import compile_policy
from duq.compiler.targets import Options, cuda
from duq.compiler.targets.cuda import CudaOptions
from duq.plugins.errors import KernelError
from duq.plugins.gpu import CARDS, GPUS, gpu_named, gpu_of
from duq.plugins.nvrtc import compile_text
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from tests.support import emulate
from tests.support.inputs import make_inputs, make_noise

SILENT = Progress(disable=True)
SETTINGS = {"num_steps": 4, "cameras": 1}


EACH_CARD = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
TYPICAL = {80: "A100", 86: "A40", 87: "Jetson AGX Orin 64 GB", 89: "L40S", 90: "H100", 100: "B200", 103: "B300",
           110: "Jetson Thor", 120: "RTX 5090", 121: "GB10"}  # fmt: skip
LIMITS = ("architecture", "block_shared_bytes", "shared_bytes", "threads", "has_wgmma", "has_clusters", "has_pdl")


@EACH_CARD
def test_a_row_is_of_one_piece(card):
    assert card.architecture.removesuffix("a") == f"sm_{card.sm}"
    assert card.block_shared_bytes == card.shared_bytes - 1024 and card.threads % 32 == 0
    assert card.has_clusters or not card.has_wgmma
    assert all(getattr(card, limit) == getattr(gpu_of(card.sm), limit) for limit in LIMITS)


def test_an_sm_has_a_typical_card():
    assert {sm: gpu.name for sm, gpu in GPUS.items()} == TYPICAL and list(GPUS) == sorted(GPUS)
    assert all(gpu_of(sm) is gpu and gpu.sm == sm for sm, gpu in GPUS.items())


# Dense peaks of the data sheets: INT8 TOPS and bf16 TFLOPS with float32 sums.
@pytest.mark.parametrize(
    ("name", "int8", "bf16"),
    [
        ("A100", 624, 312), ("A40", 299.3, 149.7), ("RTX A6000", 309.7, 154.8), ("RTX 3090", 284, 71),
        ("Jetson AGX Orin 64 GB", 85, None), ("Jetson AGX Orin 32 GB", 54, None), ("Jetson Orin NX 16 GB", 30, None),
        ("L40S", 733, 362), ("RTX 4090", 660.6, 165.2), ("RTX 5090", 838, 209.5), ("RTX PRO 6000", None, 503.8),
    ],
)  # fmt: skip
def test_rates_make_the_peaks_of_the_data_sheets(name, int8, bf16):
    card = gpu_named(name)
    for rate, peak in ((card.int8_rate, int8), (card.bf16_rate, bf16)):
        assert peak is None or 2e-12 * rate * card.multiprocessors * card.clock == pytest.approx(peak, rel=0.02)


def test_a_number_that_is_not_public_is_refused():
    assert gpu_named("L40S").known("int8_rate") == 1024
    with pytest.raises(KernelError, match="GB10: its int8_rate is not public"):
        gpu_named("GB10").known("int8_rate")


@EACH_CARD
def test_a_card_has_its_names(card):
    for name in (card.name, *card.also):
        assert gpu_named(name) is card and gpu_named(name.lower().replace(" ", "-")) is card
        assert gpu_named(f"NVIDIA {name.replace(' ', '')}") is card


def test_an_unknown_one_is_refused():
    with pytest.raises(KernelError, match="no kernels for SM 75; known are 80, 86, 87, 89, 90, 100, 103, 110, 120, 121"):
        gpu_of(75)
    with pytest.raises(KernelError, match="--gpu RTX 9090: unknown; known are A100, A40, .*, GB10$"):
        gpu_named("RTX 9090")
    with pytest.raises(KernelError, match="--gpu : unknown"):
        gpu_named("")


def test_the_cuda_target_offers_every_row():
    assert list(cuda.ARCHITECTURES) == sorted(GPUS)


@pytest.mark.parametrize("sm", GPUS)
def test_code_uses_the_features_of_the_row_alone(sm, tmp_path):
    """A GPU without clusters in its row has code without, even where its architecture has them."""

    def holds(condition: str) -> bool:
        text = f'#include "common.cuh"\n#if !({condition})\n#error does not hold\n#endif\n__global__ void nothing() {{}}'
        try:
            return bool(compile_text("probe.cu", text, sm, ["nothing"], cache=tmp_path).image)
        except KernelError as error:
            assert "does not hold" in str(error)
            return False

    assert holds("CLUSTER") == gpu_of(sm).has_clusters and holds("!defined(NO_PDL)") == gpu_of(sm).has_pdl


@pytest.fixture(scope="module")
def expected(quantized_pi0, tmp_path_factory):
    """Inputs, noise, and the CPU engine's actions for them."""
    path = tmp_path_factory.mktemp("cpu") / "engine.plan"
    compile_policy(*quantized_pi0, path, Options(**SETTINGS), SILENT)
    config = quantized_pi0[0].config
    inputs, noise = make_inputs(config, (True, False, False), 5), make_noise(config)
    return inputs, noise, CpuExecutor(Plan(path), threads=1).run(inputs, noise)[0]


# One of each generation that never ran; test_kernels.py compiles every kernel, with its slow variants for every SM.
SLOW = [pytest.param(card, marks=pytest.mark.slow) for card in ("agxorin64gb", "thor")]


@pytest.mark.parametrize("card", [*SLOW, "rtx5090"])
def test_all_kernels_of_a_policy_compile(card, quantized_pi0, expected, tmp_path):
    """A row is all that a GPU needs: its plan has machine code, and its schedule computes the policy."""
    gpu, path = gpu_named(card), tmp_path / "engine.plan"
    compile_policy(*quantized_pi0, path, CudaOptions(gpu=(card,), timing=False, **SETTINGS), SILENT)
    plan = Plan(path)
    cubins = [entry for entry in plan.names if entry.startswith(f"cubin/sm{gpu.sm}/")]
    assert len(cubins) > 10 and all(bytes(plan.read(each)[:4]) == b"\x7fELF" for each in cubins)
    assert plan.manifest["sm"] == [gpu.sm] and plan.manifest["gpu"] == [card]
    assert plan.manifest["graphs"][f"sm{gpu.sm}"]["gpu"] == f"{gpu.name}, {gpu.multiprocessors} multiprocessors"
    inputs, noise, actions = expected
    found = emulate.run(plan, gpu.sm, inputs, noise)
    assert np.linalg.norm(found - actions) < 0.02 * np.linalg.norm(actions)
