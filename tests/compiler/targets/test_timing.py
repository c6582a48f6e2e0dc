"""Choosing by timing, on a GPU that is not there: kernels in numpy, and a timer that is told what to say."""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.progress import Progress

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.pipeline import TARGETS, compile_policy, quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.compiler.targets import cuda
from duq.compiler.targets.cuda import cubins, timing, timing_inputs
from duq.compiler.targets.cuda.gemm import FloatGemm, Gemm
from duq.plugins import bitblas as generator
from duq.plugins import timing as clock
from duq.plugins.errors import KernelError
from duq.plugins.gpu import gpu_of
from duq.plugins.kernels import bitblas
from duq.plugins.kernels.reference import Launched, Memory, Pointer
from duq.plugins.layout import unpack_bitblas
from duq.plugins.nvrtc import Cubin
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from tests.support import emulate
from tests.support.inputs import make_inputs, make_noise
from tests.support.quant_policy import observation

SILENT = Progress(disable=True)
SPACE = 1 << 40  # of addresses, for each piece of memory
FEW = Gemm(50, 256, 512, 4, "Bf16", "NONE")
MANY = Gemm(560, 256, 256, 4, "float", "NONE")
PROBLEMS = [
    FEW,
    Gemm(50, 256, 512, 4, "Bf16", "GEGLU"),
    Gemm(7, 128, 1024, 8, "float", "NONE"),
    MANY,
    Gemm(130, 256, 128, 8, "int", "NONE"),
    Gemm(130, 48, 64, 4, "Bf16", "GELU"),
    Gemm(130, 1024, 256, 4, "Bf16", "ROTARY"),
    FloatGemm(50, 768, 128, 16, "Bf16", True, "ROTARY"),
    FloatGemm(50, 128, 256, 4, "Bf16", True, "GEGLU"),
    FloatGemm(1, 64, 128, 16, "Bf16", False, "SILU"),
    FloatGemm(50, 64, 256, 16, "float", False, "NONE"),
    FloatGemm(50, 64, 80, 4, "float", False, "NONE"),
]


class Gpu:
    """Device memory, streams and kernels in place of the driver's; `milliseconds` of an instance, 1 unless set."""

    def __init__(self, sm: int):
        self.sm, self.memories, self.milliseconds, self.launched, self.spoiled = sm, [], {}, [], ""

    def allocate(self, size: int) -> SimpleNamespace:
        self.memories.append(Memory(np.full(size, 0xFF, np.uint8)))
        return SimpleNamespace(address=len(self.memories) * SPACE)

    def bytes(self, address: int, size: int) -> np.ndarray:
        start = address % SPACE
        found = self.memories[address // SPACE - 1].data[start : start + size]
        assert len(found) == size
        return found

    def stream(self) -> SimpleNamespace:
        host = lambda address, size: np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))  # noqa: E731

        def upload(to: int, source: int, size: int) -> None:
            self.bytes(to, size)[:] = host(source, size)

        def download(to: int, source: int, size: int) -> None:
            host(to, size)[:] = self.bytes(source, size)

        def clear(to: int, size: int) -> None:
            self.bytes(to, size)[:] = 0

        return SimpleNamespace(handle=0, upload=upload, download=download, clear=clear, synchronize=lambda: None)

    def load(self, cubin: Cubin) -> dict:
        def kernel(expression: str) -> SimpleNamespace:
            return SimpleNamespace(launch=lambda *how, **settings: self.launch(expression, *how, **settings))

        return {expression: kernel(expression) for expression in cubin.symbols}

    def launch(self, expression: str, shape, arguments: list, stream: int, overlap: bool) -> None:
        self.launched.append(expression)
        assert overlap == (self.sm >= 90) and (self.sm >= 90 or shape.cluster == (1, 1, 1))
        emulate.launch(expression, shape, list(map(self._argument, arguments)))
        if expression == self.spoiled:
            self.memories[0].data[0] ^= 1  # y is what is allocated first

    def _argument(self, value) -> Pointer | float | int | None:
        if not isinstance(value, ctypes.c_void_p):
            return value.value
        return Pointer(self.memories[value.value // SPACE - 1], value.value % SPACE) if value.value else None

    def time(self, works: list) -> list[float]:
        return [self._time(work) for work in works]

    def _time(self, work) -> float:
        before = len(self.launched)
        work(self.stream())
        return self.milliseconds.get(self.launched[before], 1.0)


@pytest.fixture
def gpu(monkeypatch):
    """sm -> a machine with that GPU, where launches are not repeated."""

    def machine(sm: int) -> Gpu:
        device = Gpu(sm)
        monkeypatch.setattr(timing, "open_device", lambda: sm)
        monkeypatch.setattr(timing, "device_properties", lambda: (f"card of SM {sm}", gpu_of(sm).multiprocessors))
        monkeypatch.setattr(timing, "load", device.load)
        monkeypatch.setattr(timing, "milliseconds", device.time)
        monkeypatch.setattr(timing_inputs, "Memory", device.allocate)
        monkeypatch.setattr(timing_inputs, "Stream", device.stream)
        monkeypatch.setattr(timing, "Stream", device.stream)
        monkeypatch.setattr(timing_inputs, "copies_of", lambda weight_bytes: 2)
        return device

    for name in ("compile_cubin", "compile_ptx"):
        monkeypatch.setattr(
            cubins, name, lambda source, sm, kernels, headers: Cubin(b"image", {each: each for each in kernels})
        )
    monkeypatch.setattr(generator, "_installed", lambda: False)
    monkeypatch.setattr(generator, "read_cached", lambda path: None)
    return machine


@pytest.fixture
def installed_bitblas(gpu, monkeypatch):
    """BitBLAS, and its kernel in numpy for weights of so many bytes: a table to fill."""
    shapes: dict[int, tuple[int, int]] = {}

    def reference(launch: Launched, x_q: Pointer, weight: Pointer, y: Pointer, tokens: int) -> None:
        n, k = shapes[len(weight.memory.data)]
        w = unpack_bitblas(weight.read("unsigned char", n * k // 2), (n, k))
        y.write("int", x_q.read("signed char", tokens, k).astype(np.int32) @ w.T.astype(np.int32))

    monkeypatch.setattr(bitblas.BITBLAS, "reference", reference)
    monkeypatch.setattr(generator, "_installed", lambda: True)
    monkeypatch.setattr(bitblas, "sources", lambda problems, sm: [f"{problem} for {sm}" for problem in problems])
    return shapes


def expression(problem, tactic) -> str:
    return problem.instance(tactic).expression


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # SiLU of large integers
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("sm", [86, 90])
def test_all_candidates_compute_the_same_and_the_fastest_wins(sm, problem, gpu):
    machine = gpu(sm)
    last = problem.candidates(gpu_of(sm))[-1]
    machine.milliseconds[expression(problem, last)] = 0.7
    choose = timing.by_timing([problem], gpu_of(sm), SILENT)
    assert expression(problem, choose(problem)) == expression(problem, last)
    tactics = [problem.best(gpu_of(sm)), *problem.candidates(gpu_of(sm))]
    launches = {each.expression for tactic in tactics for each in problem.instances(tactic)}
    assert set(machine.launched) == launches and len(machine.launched) >= 3 * len(launches)
    y = np.concatenate([memory.data for memory in machine.memories[:1]])
    assert len(np.unique(y)) > 8  # not all zeros, or saturated


@pytest.mark.parametrize(("problem", "sm", "ratio"), [(MANY, 90, 1.05), (MANY, 86, 1.05), (FEW, 90, 1.25), (FEW, 86, 1.05)])
def test_the_tables_tactic_stays_unless_another_is_clearly_faster(problem, sm, ratio, gpu):
    table = problem.best(gpu_of(sm))
    other = next(each for each in problem.candidates(gpu_of(sm)) if each != table)
    machine = gpu(sm)
    for milliseconds, winner in ((1.01 / ratio, table), (0.99 / ratio, other)):
        machine.milliseconds[expression(problem, other)] = milliseconds
        assert timing.by_timing([problem], gpu_of(sm), SILENT)(problem) == winner


def test_a_product_that_shares_activations_takes_their_layout(gpu):
    slabs = {each.slab_tokens for each in MANY.candidates(gpu_of(90))}
    gpu(90)
    choose = timing.by_timing([MANY], gpu_of(90), SILENT)
    assert len(slabs) > 2 and all(choose(MANY, each).slab_tokens == each for each in slabs)
    with pytest.raises(KernelError, match="in slabs of 40 tokens"):
        choose(MANY, 40)


def test_a_tactic_that_computes_something_else_is_named(gpu):
    machine = gpu(90)
    wrong = FEW.candidates(gpu_of(90))[3]
    machine.spoiled = expression(FEW, wrong)
    with pytest.raises(KernelError) as error:
        timing.by_timing([FEW], gpu_of(90), SILENT)
    assert repr(wrong) in str(error.value) and str(FEW) in str(error.value)


@pytest.mark.parametrize(
    ("out", "finish"), [("float", "NONE"), ("Bf16", "GELU"), ("Bf16", "GEGLU"), ("Bf16", "ROTARY"), ("int", "NONE")]
)
def test_bitblas_kernels_compete_where_there_is_no_wgmma(out, finish, gpu, installed_bitblas):
    problem, eight_bits, few = (Gemm(m, 768, 512, bits, out, finish) for m, bits in ((300, 4), (300, 8), (50, 4)))
    generated = [each for each in problem.candidates(gpu_of(86)) if isinstance(each, bitblas.Generated)]
    assert (
        len(generated) == bitblas.OFFERED
        and problem.instance(generated[0]).headers != problem.instance(generated[1]).headers
    )
    for other, sm in ((problem, 90), (eight_bits, 86), (few, 86)):
        assert not any(isinstance(each, bitblas.Generated) for each in other.candidates(gpu_of(sm)))
    machine = gpu(86)
    machine.milliseconds[bitblas.SYMBOL] = 0.5
    installed_bitblas[768 * 512] = 768, 512  # in two copies
    assert timing.by_timing([problem], gpu_of(86), SILENT)(problem) in generated


def test_graphs_take_turns_and_the_least_time_counts(monkeypatch):
    times = iter([5, 1, 3, 2, 9, 4, 9, 9, 9, 9])
    order, event = [], SimpleNamespace(record=lambda stream: None, milliseconds_since=lambda start: next(times))

    def capture(work):
        work()
        return SimpleNamespace(launch=lambda stream: order.append(enqueued[len(order) % 2]))

    enqueued = []
    monkeypatch.setattr(clock, "Event", lambda: event)
    monkeypatch.setattr(clock, "Stream", lambda: SimpleNamespace(capture=capture, synchronize=lambda: None))
    works = [lambda stream, name=name: enqueued.append(name) for name in "ab"]
    assert clock.milliseconds(works) == [3, 1] and enqueued == ["a", "b"] and order == ["a", "b"] * clock.ROUNDS


def test_a_graph_walks_through_more_than_the_cache():
    assert clock.copies_of(1 << 20) * (1 << 20) >= clock.COLD_BYTES
    assert clock.copies_of(1 << 30) == clock.LAUNCHES[0] and clock.copies_of(1) == clock.LAUNCHES[1]


# Whole plans


@pytest.fixture
def plan(tiny_plans, tmp_path, gpu, monkeypatch):
    """Options -> the plan that is compiled with them, cuBLASLt's algorithms left alone."""
    checkpoint = load_checkpoint(tiny_plans("pi0", "none").checkpoint)
    inputs = [observation(checkpoint.config, 0, cameras=2)]
    quantization = quantize_checkpoint(checkpoint, load_recipe(DEFAULT_PRESET, environment={}), inputs, SILENT)
    monkeypatch.setattr(timing, "with_timed_algorithms", lambda programs, progress: programs)

    def compile(target: str = "cuda", **settings) -> Plan:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.plan"
        options = TARGETS[target].options(num_steps=4, cameras=1, **settings)
        compile_policy(checkpoint, quantization, path, options, SILENT)
        return Plan(path)

    return compile


def schedule(plan: Plan, sm: int) -> dict:
    return json.loads(bytes(plan.read(f"schedule/sm{sm}.json")))


@pytest.mark.parametrize("sm", [90, 86])
def test_a_plan_follows_the_timing(sm, plan, gpu, installed_bitblas, monkeypatch):
    """Whatever wins, here the candidates that come last, on SM 86 BitBLAS's: weights, activations and launches fit together."""
    on_cpu = plan("cpu")
    wanted = set()

    def last_wins(problem, tactics, kernels, gpu):
        wanted.add(expression(problem, tactics[-1]))
        if isinstance(tactics[-1], bitblas.Generated):
            installed_bitblas[problem.n * problem.k // 2] = problem.n, problem.k
        return [1.0] * (len(tactics) - 1) + [0.5]

    monkeypatch.setattr(timing, "time_each", last_wins)
    gpu(sm)
    timed = plan(sm=(sm,))
    used = {
        each["expression"]
        for each in schedule(timed, sm)["kernels"]
        if re.match(f"gemm_|{bitblas.SYMBOL}", each["expression"])
    }
    assert used == wanted and (bitblas.SYMBOL in used) == (sm == 86)
    for launch in schedule(timed, sm)["variants"][0][
        "prefix"
    ]:  # BitBLAS's kernels do not wait for the one ahead themselves
        kernel = schedule(timed, sm)["kernels"][launch["kernel"]]["expression"] if "kernel" in launch else ""
        assert kernel != bitblas.SYMBOL or "overlap" not in launch
    section = timed.manifest["graphs"][f"sm{sm}"]
    assert section["tactics"] == "timed on a GPU" and section["gpu"].startswith(f"card of SM {sm}, ")

    config = load_checkpoint(timed.manifest["checkpoint"]["path"]).config
    inputs, noise, expected, traced = make_inputs(config, (True, False, False), 5), make_noise(config), {}, {}
    CpuExecutor(on_cpu, threads=1).run(inputs, noise, expected)
    emulate.run(timed, sm, inputs, noise, traced)
    for stage, value in traced.items():
        assert np.linalg.norm(value - expected[stage]) < 0.02 * np.linalg.norm(expected[stage]), stage


def test_without_its_gpu_a_plan_follows_the_table(plan, gpu, monkeypatch):
    def no_gpu():
        raise KernelError("no device")

    monkeypatch.setattr(timing, "time_each", lambda *arguments: pytest.fail("something was timed"))
    monkeypatch.setattr(timing, "open_device", no_gpu)
    table = plan(sm=(86, 90))
    assert "table" in table.manifest["graphs"]["sm90"]["tactics"]
    gpu(86)
    other = plan(sm=(90,))
    gpu(90)
    without = plan(sm=(90,), timing=False)
    assert schedule(other, 90) == schedule(without, 90)
    assert schedule(other, 90)["variants"] == schedule(table, 90)["variants"]
    assert table.manifest["graphs"]["sm90"]["gpu"] == "H100, 132 multiprocessors"


def test_the_gpu_at_hand_counts_its_own_multiprocessors(gpu, monkeypatch):
    gpu(90)
    monkeypatch.setattr(timing, "device_properties", lambda: ("H100 PCIe", 114))
    assert timing.gpu_at_hand(90) == replace(gpu_of(90), name="H100 PCIe", multiprocessors=114)
    assert timing.gpu_at_hand(86) is None
    h100 = cuda.CudaOptions(sm=(90,), gpu=("H100",))
    assert cuda._gpu_for(90, replace(h100, gpu=())) == (timing.gpu_at_hand(90), True)
    assert cuda._gpu_for(90, h100) == (gpu_of(90), False), "timed on a card that is not the named one"
    assert cuda._gpu_for(90, replace(h100, gpu=(), timing=False)) == (gpu_of(90), False)
    monkeypatch.setattr(timing, "device_properties", lambda: ("H100 80GB HBM3", 132))
    assert cuda._gpu_for(90, h100) == (timing.gpu_at_hand(90), True)


def test_a_gpu_without_the_library_is_an_error(monkeypatch):
    def missing():
        raise KernelError("cuBLASLt needs a wheel")

    monkeypatch.setattr(timing, "CublasLt", missing)
    with pytest.raises(KernelError, match="needs a wheel"):
        timing.with_timed_algorithms([], SILENT)
