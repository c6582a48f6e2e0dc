"""The CPU executor and its plan's file: what was verified is what runs, whatever becomes of the file, or it is a PlanError."""

import mmap
import os
import shutil

import numpy as np
import onnxruntime
import pytest

from duq.runtime import Policy
from duq.runtime.errors import PlanError
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan, PlanWriter
from tests.support.plans import write_plan

NOISE = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)


def observation():
    image = np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
    tokens = {"tokenized_prompt": np.arange(1, 9), "tokenized_prompt_mask": np.ones(8, bool)}
    return {"image": {"base_0_rgb": image}, "state": np.zeros(32, np.float32), **tokens}


def infer(policy):
    return policy.infer(observation(), NOISE)["actions"]


@pytest.fixture(scope="module")
def original(tiny_plans):
    return tiny_plans("pi0", "none").plan


@pytest.fixture(scope="module")
def expected(original):
    return infer(Policy(original))


@pytest.fixture(scope="module")
def other(original, expected, tmp_path_factory):
    """A plan of the same graphs and size with other weights, as another training run gives."""
    plan, path = Plan(original), tmp_path_factory.mktemp("other") / "other.plan"
    with PlanWriter(path) as writer:
        for name in plan.names:
            data = np.frombuffer(plan.read(name), np.uint8)
            is_float = name.startswith("weights/") and data.size % 4 == 0 and "embed" not in name
            writer.write(name, data.view(np.float32) * np.float32(1.25) if is_float else data)
        writer.finish({key: value for key, value in plan.manifest.items() if key not in ("entries", "format_version")})
    assert path.stat().st_size == original.stat().st_size and not np.allclose(infer(Policy(path)), expected, atol=1e-3)
    return path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copy(original, tmp_path / "engine.plan")


@pytest.fixture(params=["not called yet", "called"])
def policy(path, request, expected):
    policy = Policy(path)
    if request.param == "called":
        assert np.array_equal(infer(policy), expected)
    return policy


def replaced(path, other):
    shutil.copy(other, path.with_name("new"))
    os.replace(path.with_name("new"), path)


def moved_and_replaced(path, other):
    path.rename(path.with_name("elsewhere"))
    shutil.copy(other, path)


def removed(path, other):
    path.unlink()


def folder_removed(path, other):
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("change", [replaced, moved_and_replaced, removed, folder_removed])
def test_the_verified_file_runs_whatever_is_at_its_path(policy, path, other, expected, change):
    change(path, other)
    for _ in range(2):
        assert np.array_equal(infer(policy), expected)


def copied_over(path, other):
    with open(other, "rb") as source, open(path, "r+b") as file:  # as `cp`, or rsync --inplace
        shutil.copyfileobj(source, file)


def truncated_to_nothing(path, other):
    os.truncate(path, 0)


def truncated(path, other):
    os.truncate(path, path.stat().st_size // 2)


def appended(path, other):
    with open(path, "ab") as file:
        file.write(b"x")


def mapped_and_written(path, other):
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[len(mapping) // 2] ^= 1


def touched(path, other):
    os.utime(path)


@pytest.mark.parametrize("change", [copied_over, truncated_to_nothing, truncated, appended, mapped_and_written, touched])
def test_a_plan_written_in_place_is_an_error_in_every_later_call(policy, path, other, change):
    change(path, other)
    for call in (infer, infer, Policy.warmup):
        with pytest.raises(PlanError, match=r"engine.plan: was written to while in use.*replace a plan by rename"):
            call(policy)


@pytest.mark.parametrize("change", [copied_over, appended, touched])
def test_a_change_while_sessions_are_made_is_found(path, other, monkeypatch, change):
    make = onnxruntime.InferenceSession

    def make_and_change(*arguments, **options):
        session = make(*arguments, **options)
        change(path, other)
        return session

    policy = Policy(path)
    monkeypatch.setattr(onnxruntime, "InferenceSession", make_and_change)
    for _ in range(2):
        with pytest.raises(PlanError, match="was written to while in use"):
            infer(policy)


@pytest.mark.parametrize("change", [truncated_to_nothing, truncated])
@pytest.mark.parametrize("stage", ["sendfile", "memfd_create", "InferenceSession", "prefix runs"])
def test_a_file_cut_short_while_sessions_are_made_is_an_error(path, other, expected, monkeypatch, change, stage):
    """Before and in the middle of what reads from it. A process that touched a mapping of the file would end here."""
    policy = Policy(path)
    where, name = {
        "InferenceSession": (onnxruntime, stage), "prefix runs": (policy._opened.engine.executor, "_run"),
    }.get(stage, (os, stage))  # fmt: skip
    original = getattr(where, name)

    def change_first(*arguments, **options):
        change(path, other)
        return original(*arguments, **options)

    monkeypatch.setattr(where, name, change_first)
    if stage == "prefix runs":  # everything was read
        assert np.array_equal(infer(policy), expected)
    for _ in range(2):
        with pytest.raises(PlanError, match="was written to while in use"):
            infer(policy)


def test_weights_that_are_nowhere_in_the_plan_are_refused(tmp_path):
    graph = b"\x0a\x06offset\x12\x0212345"  # the offset 12
    write_plan(tmp_path / "engine.plan", {"graph/prefix.onnx": graph, "graph/step.onnx": graph})
    with pytest.raises(PlanError, match="its prefix graph has weights at 12, where no entry is; compile it again"):
        Policy(tmp_path / "engine.plan").warmup()


@pytest.mark.skipif(
    not hasattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory"),
    reason="this ONNX Runtime maps the file itself",
)
def test_weights_are_in_memory_of_their_own(path, other, expected):
    """Below Policy's check: after the first call, nothing is read from the file any more."""
    plan = Plan(path)
    executor, policy = CpuExecutor(plan), Policy(path)
    inputs = policy._opened.preprocessor.model_inputs(observation())
    before, _ = executor.run(inputs, NOISE)
    copied_over(path, other)
    os.truncate(path, 0)
    after, _ = executor.run(inputs, NOISE)
    assert np.array_equal(before, expected) and np.array_equal(after, expected)


def test_paths_that_are_no_text(original, expected, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xfe@.plan"
    shutil.copy(original, path)
    assert np.array_equal(infer(Policy(os.fsdecode(path))), expected)


def edited(original, path, **changes):
    """The same plan with another manifest."""
    plan = Plan(original)
    with PlanWriter(path) as writer:
        for name in plan.names:
            writer.write(name, plan.read(name))
        own = {key: value for key, value in plan.manifest.items() if key not in ("entries", "format_version")}
        writer.finish(own | changes)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("action_horizon", 9, r"its step graph takes x \[8, 32\], its manifest describes \[9, 32\]"),
        ("action_dim", 31, r"takes state \[32\], its manifest describes \[31\]"),
        ("state_dim", 16, r"takes state \[32\], its manifest describes \[16\]"),
    ],
)
def test_a_manifest_that_is_not_the_graphs(original, tmp_path, field, value, says):
    edited(original, tmp_path / "engine.plan", model=Plan(original).manifest["model"] | {field: value})
    with pytest.raises(PlanError, match=says):
        Policy(tmp_path / "engine.plan").warmup()


def test_a_plan_without_graphs_is_refused_when_it_is_opened(tmp_path):
    write_plan(tmp_path / "engine.plan", {"graph/prefix.onnx": b"onnx"})
    with pytest.raises(PlanError, match="has no entry graph/step.onnx"):
        Policy(tmp_path / "engine.plan")


@pytest.mark.parametrize(
    "graph", [b"", b"onnx", b"\x08\x0a", bytes(range(256))], ids=["empty", "text", "two bytes", "all bytes"]
)
def test_a_graph_that_is_none(tmp_path, graph):
    write_plan(tmp_path / "engine.plan", {"graph/prefix.onnx": graph, "graph/step.onnx": graph})
    with pytest.raises(PlanError, match="engine.plan: "):
        Policy(tmp_path / "engine.plan").warmup()
