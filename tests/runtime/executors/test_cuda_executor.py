"""The CUDA executor without a GPU: its driver is host memory, its kernels their references in plugins/kernels."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.plugins.errors import KernelError
from duq.plugins.kernel import Shape
from duq.plugins.kernels.library import MATMUL
from duq.plugins.kernels.reference import Launched, Memory, Pointer
from duq.plugins.libraries import Version
from duq.plugins.nvrtc import nvrtc_version
from duq.runtime import Policy
from duq.runtime.config import ModelConfig
from duq.runtime.errors import PlanError
from duq.runtime.executors import cuda as executor
from duq.runtime.executors import schedule
from duq.runtime.executors.programs import Program, has_kernels
from duq.runtime.plan import Plan
from tests.support import emulate, recording
from tests.support.inputs import cosine, make_inputs, make_noise, with_float_images
from tests.support.plans import CONFIG, write_cuda_plan
from tests.support.same_integers import run_given
from tests.support.stand_ins import Event, Resource, Stream

CALLS = [((True, False, True), 37), ((False, True, False), 1)]  # the second finds the first one's rows as padding


class Block(Resource):
    """Memory that is NaN, and remembered for whoever has but an address."""

    all: list[Block] = []

    def __init__(self, size: int):
        self.array = np.full(size, 0xFF, np.uint8)
        self.address, self.memory = self.array.ctypes.data, Memory(self.array)
        Block.all.append(self)


class OneStream(Stream):
    def clear(self, to: int, size: int) -> None:
        ctypes.memset(to, 0, size)


class Ordered(Event):
    def wait(self, stream) -> None:
        pass


def pointer(address: int | None) -> Pointer | None:
    if not address:
        return None
    (block,) = [each for each in Block.all if each.address <= address < each.address + each.array.size]
    return Pointer(block.memory, address - block.address)


class Kernel:
    chains: ClassVar[dict] = {}  # of the plan: what emulate.parts_of_chains says of it
    chain_launches: ClassVar[int] = 0

    def __init__(self, expression: str, image: bytes):
        self.expression, self.image, self.module = expression, image, Resource()

    def launch(self, shape: Shape, arguments, stream: int, overlap: bool = False) -> None:
        values = [pointer(each.value) if isinstance(each, ctypes.c_void_p) else each.value for each in arguments]
        if self.expression == "chain":
            parts = Kernel.chains[bytes(self.image)]
            assert shape.grid == (sum(math.prod(each.grid) for _, each in parts), 1, 1)
            emulate.launch_chain(parts, values)
            Kernel.chain_launches += 1
        else:
            emulate.launch(self.expression, shape, values)


class Library(Resource):
    def prepare(self, problem, algorithm: int) -> None:
        pass

    def matmul(self, problem, algorithm: int, *, workspace: int, stream: int, **addresses: int) -> None:
        operands = {name: pointer(address) for name, address in addresses.items()}
        sizes = {name.replace("y_bytes", "y_type"): value for name, value in asdict(problem).items()}
        arguments = {name: value for name, value in sizes.items() if not name.startswith("has_")}
        emulate.run_reference(MATMUL, Launched(MATMUL.name), {**operands, "algorithm": algorithm, **arguments})


@pytest.fixture
def on_the_host(monkeypatch):
    driver = SimpleNamespace(
        open_device=lambda: 90, block_shared_bytes=lambda: 227 << 10, free_memory=lambda: (1 << 40, 1 << 40), Shape=Shape,
        cuda_version=lambda: Version(13, 0), Memory=Block, PinnedArray=Block,
        Stream=OneStream, Event=Ordered, load=lambda cubin: {each: Kernel(each, cubin.image) for each in cubin.symbols},
    )  # fmt: skip
    monkeypatch.setattr(executor, "driver", driver)
    monkeypatch.setattr(executor, "CublasLt", Library)
    monkeypatch.setattr(Block, "all", [])


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_follows_the_schedule(name, on_the_host, tiny_plans):
    """Call after call of any size, the same bits as from the schedule in a memory of its own."""
    plan = Plan(tiny_plans(name, DEFAULT_PRESET, "cuda").plan)
    config = ModelConfig.from_json(plan.manifest["model"])
    policy, noise = executor.CudaExecutor(plan), make_noise(config)
    for seed, (cameras, prompt) in enumerate(CALLS):
        inputs = make_inputs(config, cameras, prompt, seed)
        actions, timing = policy.run(inputs, noise)
        np.testing.assert_array_equal(actions, emulate.run(plan, 90, inputs, noise))
        assert timing.keys() == {"stage_ms", "launch_ms", "wait_ms", "prefix_ms", "denoise_ms"}
        assert all(type(value) is float for value in timing.values())


def test_takes_float_images(on_the_host, tiny_plans):
    """Where the plan is for them; there also bytes, as what they stand for."""
    plan = Plan(tiny_plans("pi0", "none", "cuda", float_images=True).plan)
    config = ModelConfig.from_json(plan.manifest["model"])
    policy, noise = executor.CudaExecutor(plan), make_noise(config)
    for seed, (cameras, prompt) in enumerate(CALLS):
        inputs = make_inputs(config, cameras, prompt, seed)
        floats = with_float_images(inputs, seed)
        np.testing.assert_array_equal(policy.run(floats, noise)[0], emulate.run(plan, 90, floats, noise))
        bytes_as_floats = replace(inputs, images=inputs.pixels().transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(policy.run(inputs, noise)[0], policy.run(bytes_as_floats, noise)[0])


def test_refuses_float_images_where_the_plan_takes_bytes(on_the_host, tiny_plans):
    plan = Plan(tiny_plans("pi0", "none", "cuda").plan)
    config = ModelConfig.from_json(plan.manifest["model"])
    inputs = with_float_images(make_inputs(config, *CALLS[0]))
    with pytest.raises(PlanError, match="takes images of uint8, got float32; compile it again"):
        executor.CudaExecutor(plan).run(inputs, make_noise(config))


def test_traces_what_the_stages_produce(on_the_host, tiny_plans):
    plan = Plan(tiny_plans("pi0", DEFAULT_PRESET, "cuda").plan)
    config, found, expected = ModelConfig.from_json(plan.manifest["model"]), {}, {}
    inputs, noise = make_inputs(config, *CALLS[1]), make_noise(config)
    executor.CudaExecutor(plan).run(inputs, noise, found)
    emulate.run(plan, 90, inputs, noise, expected)
    assert found.keys() == expected.keys()
    for stage, value in found.items():
        np.testing.assert_array_equal(value, expected[stage], err_msg=stage)


def test_times_every_launch_of_the_prefix_and_a_step(on_the_host, tiny_plans):
    plan = Plan(tiny_plans("pi0", DEFAULT_PRESET, "cuda").plan)
    policy, config = executor.CudaExecutor(plan), ModelConfig.from_json(plan.manifest["model"])
    inputs, noise = make_inputs(config, *CALLS[1]), make_noise(config)
    actions, _ = policy.run(inputs, noise)
    size = policy.stage(inputs, noise)
    times = policy.launch_times(size, calls=1)
    wanted = [("prefix", each) for each in policy._variants[size]["prefix"]]
    wanted += [("step", each) for each in policy._variants[size]["step"]]
    assert [(program, launch) for program, launch, _ in times] == wanted
    assert {us for *_, us in times} == {1e3}  # what the driver here says of any two events
    policy._download.array[:] = 0
    assert policy.milliseconds_in_turn(size, calls=1) == (1.0, 1.0)
    np.testing.assert_array_equal(policy._download.array.view(np.float32), actions.ravel())  # a whole call


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_records_the_integers_of_a_call(name, on_the_host, tiny_plans, monkeypatch):
    """What tests/gpu compares stage by stage: with the same INT8 activations the CPU engine comes to the same stages."""
    monkeypatch.setattr(recording, "PinnedArray", Block)
    plan = Plan(tiny_plans(name, DEFAULT_PRESET, "cuda").plan)
    config = ModelConfig.from_json(plan.manifest["model"])
    inputs, noise = make_inputs(config, *CALLS[0]), make_noise(config)
    found, runs = recording.Recording(plan).record(inputs, noise)
    expected, roundings = run_given(tiny_plans(name, DEFAULT_PRESET).plan, *runs, inputs, noise)
    for stage, value in expected.items():
        assert cosine(found[stage], value) > 0.9999, stage
    assert 0 < roundings.count and roundings.farthest <= 2 and roundings.different < 0.1 * roundings.count


def test_what_the_plan_is_not_for(on_the_host, tiny_plans, monkeypatch):
    plan = Plan(tiny_plans("pi0", DEFAULT_PRESET, "cuda").plan)
    policy, config = executor.CudaExecutor(plan), ModelConfig.from_json(plan.manifest["model"])
    with pytest.raises(PlanError, match="is not for 0 cameras and 1 prompt tokens; compile again"):
        policy.run(make_inputs(config, (False, False, False), 1), make_noise(config))
    monkeypatch.setattr(executor.driver, "free_memory", lambda: (1 << 20, 80 << 30))
    with pytest.raises(PlanError, match="needs .* GB of GPU memory, 0.00 of .* are free"):
        executor.CudaExecutor(plan)
    monkeypatch.setattr(schedule, "SCHEDULE_VERSION", 99)
    with pytest.raises(
        PlanError, match=r"schedule/sm90.json is of version \d+, this runtime follows version 99; compile it"
    ):
        executor.CudaExecutor(plan)


@pytest.fixture
def on_a_gpu(on_the_host, monkeypatch):
    """(SM, bytes of shared memory a block) -> the images that are loaded from then on, on a pretended GPU."""

    def pretend(sm: int, shared: int = 227 << 10) -> list[bytes]:
        loaded: list[bytes] = []
        load = executor.driver.load
        monkeypatch.setattr(executor.driver, "open_device", lambda: sm)
        monkeypatch.setattr(executor.driver, "block_shared_bytes", lambda: shared)
        monkeypatch.setattr(executor.driver, "load", lambda cubin: loaded.append(cubin.image) or load(cubin))
        return loaded

    return pretend


@pytest.mark.parametrize(
    ("gpu", "program", "image"),
    [(86, 86, "cubin"), (89, 86, "cubin"), (87, 86, "ptx"), (90, 90, "cubin"), (120, 86, "ptx"), (999, 86, "ptx")],
)
def test_runs_the_program_that_suits_the_gpu(gpu, program, image, on_a_gpu, tiny_plans, caplog, monkeypatch):
    """With chains where it has some, each of which does what its launches do."""
    caplog.set_level(logging.INFO, "duq")
    loaded, plan = on_a_gpu(gpu), Plan(tiny_plans("pi0", DEFAULT_PRESET, "cuda").plan)
    monkeypatch.setattr(Kernel, "chains", emulate.parts_of_chains(plan, program))
    monkeypatch.setattr(Kernel, "chain_launches", 0)
    config = ModelConfig.from_json(plan.manifest["model"])
    policy, inputs, noise = executor.CudaExecutor(plan), make_inputs(config, *CALLS[1]), make_noise(config)
    by = nvrtc_version()
    assert policy.program.to_json() == {
        "sm": program,
        "image": image,
        "driver": f"{by.major}.0" if image == "cubin" else str(by),
    }
    assert loaded and all(each.startswith(b"\x7fELF" if image == "cubin" else b"//") for each in loaded)
    assert image == "cubin" or all(each.endswith(b"\0") for each in loaded)
    np.testing.assert_array_equal(policy.run(inputs, noise)[0], emulate.run(plan, program, inputs, noise))
    layers = config.llm.depth * plan.manifest["num_steps"]
    assert Kernel.chain_launches == (layers if program == 86 else 0)
    (record,) = caplog.records
    assert f"program for SM {program} on a GPU of SM {gpu}" in record.message
    assert record.levelname == ("INFO" if image == "cubin" else "WARNING")
    if image == "ptx":
        better = f"--sm {gpu} for kernels of its own" if has_kernels(gpu) else "no kernels of its own"
        assert better in record.message


def test_runs_the_program_that_is_asked_for(on_a_gpu, tiny_plans):
    on_a_gpu(90)
    plan = Plan(tiny_plans("pi0", "none", "cuda").plan)
    assert executor.CudaExecutor(plan, program=86).program.to_json() == {
        "sm": 86,
        "image": "ptx",
        "driver": str(nvrtc_version()),
    }
    with pytest.raises(
        PlanError, match=r"no program for SM 89 that a GPU of SM 90 runs; it has SM 86 \(cubin\), SM 86 \(ptx\)"
    ):
        executor.CudaExecutor(plan, program=89)


def test_a_policy_says_which_program_runs(on_a_gpu, tiny_plans):
    on_a_gpu(120)
    metadata = Policy(tiny_plans("pi0", "none", "cuda").plan).metadata
    assert (
        metadata["program"] == {"sm": 86, "image": "ptx", "driver": "13.0"} and json.loads(json.dumps(metadata)) == metadata
    )


@pytest.mark.parametrize(
    ("gpu", "shared", "says"),
    [
        (80, 163 << 10, r"is made for SM 86, 90, this machine's GPU is SM 80; compile it with --sm 80$"),
        (75, 64 << 10, r"is made for SM 86, 90, this machine's GPU is SM 75; compile it with --sm 75$"),
        (
            120,
            1 << 10,
            r"is made for SM 86, 90 \(the program for SM 86 takes \d+ KB of shared memory a thread block, this GPU has 1 KB\)",
        ),
    ],
)
def test_refuses_a_gpu_that_runs_none_of_its_programs(gpu, shared, says, on_a_gpu, tiny_plans):
    on_a_gpu(gpu, shared)
    with pytest.raises(PlanError, match=says):
        executor.CudaExecutor(Plan(tiny_plans("pi0", "none", "cuda").plan))


def test_refuses_a_later_gpu_without_ptx(on_a_gpu, tiny_plans):
    """A plan for SM 90 alone, on SM 100."""
    on_a_gpu(100)
    plan = Plan(tiny_plans("pi0", "none", "cuda").plan)
    plan.manifest |= {"sm": [90], "graphs": {"ptx": []}}
    with pytest.raises(PlanError, match=r"is made for SM 90, this machine's GPU is SM 100; compile it with --sm \d+"):
        executor.CudaExecutor(plan)


def test_a_driver_older_than_what_made_the_plan(on_a_gpu, tiny_plans, monkeypatch):
    """Machine code loads on every driver of a major version; PTX on none older than the NVRTC that wrote it."""
    on_a_gpu(89)
    plan = Plan(tiny_plans("pi0", "none", "cuda").plan)
    plan.manifest["graphs"]["nvrtc"] = "13.0"
    monkeypatch.setattr(executor.driver, "cuda_version", lambda: Version(12, 6))
    with pytest.raises(PlanError, match=r"needs a driver for CUDA 13\.0, this machine's is for CUDA 12\.6; update it"):
        executor.CudaExecutor(plan)
    plan.manifest["graphs"]["nvrtc"] = "12.9"
    assert executor.CudaExecutor(plan).program.to_json() == {"sm": 86, "image": "cubin", "driver": "12.0"}
    on_a_gpu(120)
    with pytest.raises(PlanError, match=r"needs a driver for CUDA 12\.9, this machine's is for CUDA 12\.6"):
        executor.CudaExecutor(plan)
    monkeypatch.setattr(executor.driver, "cuda_version", lambda: Version(13, 0))
    assert executor.CudaExecutor(plan).program.to_json() == {"sm": 86, "image": "ptx", "driver": "12.9"}


def test_a_driver_that_does_not_compile_the_ptx_is_named(on_a_gpu, tiny_plans, monkeypatch):
    on_a_gpu(120)

    def load(cubin):
        raise KernelError("cuModuleLoadData: unsupported toolchain")

    monkeypatch.setattr(executor.driver, "load", load)
    with pytest.raises(PlanError, match="does not compile its PTX .*unsupported toolchain.*; update the driver"):
        executor.CudaExecutor(Plan(tiny_plans("pi0", "none", "cuda").plan))


def test_a_program_that_takes_too_much_shared_memory_is_passed_over(on_a_gpu, tiny_plans, monkeypatch):
    """That of an Orin on a GPU with 99 KB a thread block."""
    on_a_gpu(120, 99 << 10)
    plan = Plan(tiny_plans("pi0", "none", "cuda").plan)
    plan.manifest |= {"sm": [86, 87], "graphs": {"ptx": [86, 87]}}
    needed = {"schedule/sm86.json": 90 << 10, "schedule/sm87.json": 136 << 10}

    def schedule(plan, name):
        return {"variants": [{"prefix": [{"shared": needed[name]}], "step": []}]}

    monkeypatch.setattr(executor, "read_schedule", schedule)
    assert executor._choose(plan, 120, None)[0] == Program(86, "ptx")
    with pytest.raises(
        PlanError, match="the program for SM 87 takes 136 KB of shared memory a thread block, this GPU has 99 KB"
    ):
        executor._choose(plan, 120, 87)


@pytest.mark.parametrize("when", ["kernels are loaded", "weights are uploaded"])
def test_a_plan_that_changes_while_it_goes_to_the_gpu(when, on_the_host, tmp_path, monkeypatch):
    path = tmp_path / "engine.plan"
    write_cuda_plan(path)
    plan = Plan(path)

    def change(*_):
        with open(path, "r+b") as file:
            file.write(b"PK")

    if when == "kernels are loaded":
        monkeypatch.setattr(
            executor.driver, "load", lambda cubin: change() or {each: Kernel(each, cubin.image) for each in cubin.symbols}
        )
    else:
        monkeypatch.setattr(OneStream, "upload", change)
    with pytest.raises(PlanError, match="engine.plan: was written to while in use"):
        executor.CudaExecutor(plan)


@pytest.mark.parametrize("cut_to", [0, 4096])
@pytest.mark.parametrize("stage", ["Stream", "Memory", "PinnedArray", "upload", "load"])
def test_a_plan_cut_short_while_it_goes_to_the_gpu_is_an_error(stage, cut_to, on_the_host, tmp_path, monkeypatch):
    """Whatever is read of it next. A process that touched a mapping of the file would end here."""
    path = tmp_path / "engine.plan"
    write_cuda_plan(path)
    plan = Plan(path)
    where, name = (OneStream, stage) if stage == "upload" else (executor.driver, stage)
    original = getattr(where, name)

    def cut_first(*arguments):
        os.truncate(path, cut_to)
        return original(*arguments)

    monkeypatch.setattr(where, name, cut_first)
    with pytest.raises(PlanError, match="engine.plan: was written to while in use"):
        executor.CudaExecutor(plan)


def test_another_shares_the_weights_and_gives_the_same_bits(on_the_host, tiny_plans):
    plan = Plan(tiny_plans("pi0", DEFAULT_PRESET, "cuda").plan)
    config = ModelConfig.from_json(plan.manifest["model"])
    first, noise = executor.CudaExecutor(plan), make_noise(config)
    blocks = len(Block.all)
    second = first.another()
    own = [first._arena, *first._workspaces.values(), first._upload, first._download]
    assert [each.array.size for each in Block.all[blocks:]] == [each.array.size for each in own]
    assert second._weights is first._weights
    assert second._arena is not first._arena and second._upload is not first._upload
    cases = [make_inputs(config, *case, seed) for seed, case in enumerate(CALLS)]
    sizes = [
        each.stage(inputs, noise) for each, inputs in zip((first, second), cases, strict=True)
    ]  # both before either runs
    assert sizes[0] != sizes[1]
    for each, inputs in zip((second, first, second), (cases[0], *cases), strict=True):
        np.testing.assert_array_equal(each.run(inputs, noise)[0], emulate.run(plan, 90, inputs, noise))
    second.close()
    assert not hasattr(first._arena, "closed") and not hasattr(first._weights, "closed")
    np.testing.assert_array_equal(first.run(cases[0], noise)[0], emulate.run(plan, 90, cases[0], noise))


def test_another_that_does_not_fit_is_refused(on_the_host, tmp_path, monkeypatch):
    write_cuda_plan(tmp_path / "engine.plan")
    first = executor.CudaExecutor(Plan(tmp_path / "engine.plan"))
    monkeypatch.setattr(executor.driver, "free_memory", lambda: (1 << 19, 1 << 30))
    with pytest.raises(PlanError, match="for one more call at a time, needs .*; pass in_flight=1, or end what else uses"):
        first.another()


def test_what_a_gpu_plan_uploaded_stays_and_embeddings_are_checked(on_the_host, tmp_path):
    """Its token table is read from the file for tokens that no call had before."""
    path = tmp_path / "engine.plan"
    write_cuda_plan(path)
    policy = executor.CudaExecutor(Plan(path))
    inputs, noise = make_inputs(CONFIG, (True, False, False), 3), make_noise(CONFIG)
    path.rename(tmp_path / "elsewhere")
    assert policy.stage(inputs, noise) == (1, 48)
    os.utime(tmp_path / "elsewhere")
    assert policy.stage(inputs, noise) == (1, 48)
    with pytest.raises(PlanError, match="engine.plan: was written to while in use"):
        policy.stage(make_inputs(CONFIG, (True, False, False), 4, seed=1), noise)
