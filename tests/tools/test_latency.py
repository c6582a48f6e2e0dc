"""tools/latency.py against launches measured on an H200 (benchmarks/data), and how it moves from GPU to GPU."""

import dataclasses

import pytest

from benchmarks import fit_latency
from duq.plugins.errors import KernelError
from duq.plugins.gpu import CARDS, gpu_named
from duq.plugins.kernels import KERNELS
from duq.tools import latency
from duq.tools.latency import Launch, constants, terms, time_of

H200 = gpu_named("H200")
MEASURED = fit_latency.load()
LAUNCHES = [kind.launch for call in MEASURED for kind in call.kinds]
PUBLIC = [card for card in CARDS if None not in (card.int8_rate, card.bf16_rate, card.l2_bytes)]
GEMM = Launch("gemm_large<4, 2, 13, 2, 2, 3, NONE, Bf16>", 2.0 * 816 * 2560 * 2048, 8.5e6, (4, 40, 1), 128, 92160,
              {"tokens": 816, "rows": 2560, "depth": 2048})  # fmt: skip


def test_programs_of_four_sms_were_measured():
    assert {(call.program, call.cameras) for call in MEASURED} == {(sm, n) for sm in (80, 86, 90, 120) for n in (1, 3)}


def test_every_kernel_is_predicted_within_20_percent_and_every_sum_within_10():
    kernels, sums = fit_latency.kernel_errors(MEASURED, constants()), fit_latency.sum_errors(MEASURED, constants())
    assert len(kernels) > 60 and len(sums) == 5 * len(MEASURED)
    assert [row for row in kernels if abs(row.error) > 0.20] == []
    assert [row for row in sums if abs(row.error) > 0.10] == []


def test_what_is_said_of_its_errors_is_so():
    kernels, sums = fit_latency.kernel_errors(MEASURED, constants()), fit_latency.sum_errors(MEASURED, constants())
    assert constants().kernel_error == pytest.approx(fit_latency.worst(kernels), abs=2e-3)
    assert constants().sum_error == pytest.approx(fit_latency.worst(sums), abs=2e-3)


def test_the_constants_are_what_the_command_finds():
    found = fit_latency.fit(MEASURED)
    assert found.families.keys() == constants().families.keys()
    for family, values in found.families.items():
        assert values == pytest.approx(constants().families[family], rel=0.02), family
    assert (found.overlap, found.beside, found.event) == pytest.approx(
        (constants().overlap, constants().beside, constants().event), rel=2e-3
    )


@pytest.mark.parametrize(("fitted", "held_out"), [(1, 3), (3, 1)])
def test_calls_that_it_was_not_fitted_to_are_predicted(fitted, held_out):
    """With other numbers of tokens, which have other tiles: 95 of 100 kernels within 20 %, each sum within 10 %."""
    found = fit_latency.fit(call for call in MEASURED if call.cameras == fitted)
    others = [call for call in MEASURED if call.cameras == held_out]
    kernels, sums = fit_latency.kernel_errors(others, found), fit_latency.sum_errors(others, found)
    assert len(sums) == 5 * len(others)
    assert sum(abs(row.error) <= 0.20 for row in kernels) >= 0.95 * len(kernels)
    assert fit_latency.worst(sums) <= 0.10


def test_programs_that_it_was_not_fitted_to_are_predicted():
    """9 of 10 kernels within 20 %, each sum within 10 %."""
    found = fit_latency.fit(call for call in MEASURED if call.program in (86, 90))
    others = [call for call in MEASURED if call.program in (80, 120)]
    kernels, sums = fit_latency.kernel_errors(others, found), fit_latency.sum_errors(others, found)
    assert len(sums) == 5 * len(others)
    assert sum(abs(row.error) <= 0.20 for row in kernels) >= 0.9 * len(kernels)
    assert fit_latency.worst(sums) <= 0.10


@pytest.mark.parametrize("changed", [{"multiprocessors": 66}, {"clock": 1.2e9}, {"int8_rate": 1024, "bf16_rate": 1024}])
def test_a_gpu_with_other_data_would_not_have_taken_these_times(changed, monkeypatch):
    monkeypatch.setattr(fit_latency, "GPU", dataclasses.replace(H200, **changed))
    assert fit_latency.worst(fit_latency.kernel_errors(MEASURED, constants())) > 0.20


@pytest.mark.parametrize("card", PUBLIC, ids=lambda card: card.name)
def test_nothing_is_faster_than_the_gpu(card):
    for launch in LAUNCHES:
        if "wgmma" in launch.kernel and not card.has_wgmma:
            continue
        of_floats = launch.kernel.startswith(("cublaslt", "attention", "gemm_float", "linear", "flow"))
        # wgmma multiplies INT8 at twice the rate of mma.sync, in which the table has it
        rate = card.bf16_rate if of_floats else card.int8_rate * (2 if card.has_wgmma else 1)
        peak = 2 * rate * card.multiprocessors * card.clock
        weights = terms(launch, card).weights
        took = time_of(launch, card).seconds
        assert took >= launch.work / peak and took >= weights / card.memory_bandwidth, launch


@pytest.mark.parametrize("slower", [{"memory_bandwidth": 1e11}, {"clock": 1e9}, {"multiprocessors": 60}])
def test_a_smaller_gpu_is_not_faster(slower):
    smaller = dataclasses.replace(H200, **slower)
    times = [(time_of(launch, smaller).seconds, time_of(launch, H200).seconds) for launch in LAUNCHES]
    assert all(a >= 0.999 * b for a, b in times) and sum(a for a, _ in times) > 1.01 * sum(b for _, b in times)


def test_what_l2_does_not_hold_comes_from_memory():
    rows = next(launch for launch in LAUNCHES if launch.kernel.startswith("normalize"))
    small, large = (dataclasses.replace(gpu_named("A40"), l2_bytes=count << 20) for count in (1, 64))
    assert time_of(rows, large).memory == 0
    assert time_of(rows, small).seconds > time_of(rows, small).memory >= rows.moved / small.memory_bandwidth
    assert time_of(rows, small).seconds > time_of(rows, large).seconds


def test_blocks_run_in_turns():
    """A GPU with as many multiprocessors as there are blocks takes half as long as one with fewer than half."""
    few, many = (dataclasses.replace(H200, multiprocessors=count) for count in (40, 160))
    assert 2 < time_of(GEMM, few).seconds / time_of(GEMM, many).seconds < 4


@pytest.mark.parametrize("kernel", ["attention<256", "attention_tile"])
def test_twice_the_keys_take_longer(kernel):
    attention = next(launch for launch in LAUNCHES if launch.kernel.startswith(kernel))
    twice = dataclasses.replace(attention, work=2 * attention.work)
    assert 1.5 < time_of(twice, H200).seconds / time_of(attention, H200).seconds < 2


def test_the_busiest_tensor_core_counts():
    """Three blocks of two warps on four tensor cores take as long as four, and twice as long as two."""
    two_warps = dataclasses.replace(GEMM, kernel="gemm_large<4, 4, 6, 2, 1, 2, NONE, Bf16>", threads=64)
    two, three, four = (
        terms(dataclasses.replace(two_warps, grid=(each * H200.multiprocessors, 1, 1)), H200).operations
        for each in (2, 3, 4)
    )
    assert three == four == 2 * two


def test_blocks_that_share_keys_have_a_multiprocessor_each():
    """Measured: 143 blocks on 132 multiprocessors take longer than one each would."""
    (split,) = {fit_latency.equality(each): each for each in LAUNCHES if each.grid == (143, 1, 1)}.values()
    assert split.kernel == "attention_split<8, 2, 48, 11>"
    enough = dataclasses.replace(H200, multiprocessors=143)
    assert time_of(split, H200).seconds > 1.3 * time_of(split, enough).seconds


def test_more_parts_take_longer_to_merge():
    split = next(each for each in LAUNCHES if each.kernel == "attention_split<8, 2, 112, 8>")
    alone = dataclasses.replace(split, kernel="attention_split<8, 2, 112, 1>", template=None)
    assert terms(split, H200).counts["merged"] > 0 == terms(alone, H200).counts["merged"]


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_each_kernel_has_a_model_or_is_refused_by_name(name):
    known = name in latency._TERMS or KERNELS[name].source in latency._TERMS
    if not known:
        with pytest.raises(KernelError, match=f"{name}: duq-estimate has no model"):
            time_of(dataclasses.replace(GEMM, kernel=name), H200)
        assert name in ("general_dequant_matmul_kernel", "compensate")  # BitBLAS's, and the quantizer's, which no plan has


def test_template_parameters_of_another_duq_are_refused():
    with pytest.raises(KernelError, match=r"gemm_large<4, 2>: this duq's kernel gemm_large has other parameters; compile"):
        time_of(dataclasses.replace(GEMM, kernel="gemm_large<4, 2>"), H200)


def test_a_kernel_without_measurements_is_refused_by_name():
    without = latency.constants()._replace(families={})
    with pytest.raises(KernelError, match="gemm_large: no launch of this kernel was measured"):
        time_of(GEMM, H200, without)


def test_a_profile_of_another_policy_is_refused():
    other = {"program": "prefix", "name": "other", "work": 5.0, "moved": 1.0, "grid": [1, 1, 1], "threads": 32, "shared": 0}
    with pytest.raises(
        ValueError, match="prefix: other of 5 operations: the compiler makes no such launch of full-size pi0"
    ):
        fit_latency.kinds_of([other], [])


@pytest.mark.parametrize(("cameras", "milliseconds"), [(1, 7.46), (3, 10.30)])
def test_an_h100_is_predicted_that_it_was_not_fitted_to(cameras, milliseconds, monkeypatch):
    """Replays of W4A8 pi0, docs/performance.md."""
    monkeypatch.setattr(fit_latency, "GPU", gpu_named("H100"))
    (call,) = (each for each in MEASURED if each.program == 90 and each.cameras == cameras)
    assert 1e3 * fit_latency.predicted_sum(call, constants()).call == pytest.approx(milliseconds, rel=0.10)
