"""Fixtures shared by the tests: small checkpoints of the true architecture, made once a session."""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# The policies here are tiny: threads cost more than they save. Numpy's are set before it is imported, and those of programs
# that tests start with them; OpenBLAS's threads wait in a loop, which costs the cores that pytest-xdist's processes share.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import onnx_ir as ir
import pytest
import torch
from rich.progress import Progress

from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.graph import export
from duq.compiler.pipeline import compile_policy, quantize_checkpoint
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.compiler.targets import Options
from duq.compiler.targets.cuda import CudaOptions
from duq.runtime.preprocess import Preprocessor
from tests.support.quant_policy import observation

torch.set_num_threads(1)
gc.disable()  # until all is imported, which is no garbage


def pytest_collection_finish():
    """A full collection would walk a million objects of the libraries, again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that pytest-xdist's processes share."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    directory.mkdir(exist_ok=True)
    return directory


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, a file or folder of `shared_folder`, which make(path to write) has made in this process or in another."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial") / path.name
            shutil.rmtree(partial.parent, ignore_errors=True)  # of one that failed
            partial.parent.mkdir()
            make(partial)
            partial.rename(path)
    return path


@pytest.fixture(scope="session")
def tiny_pi0(shared_folder):
    """Directory of a tiny pi0 in openpi's layout. Read only."""
    return once(shared_folder / "tiny_pi0", lambda path: make_checkpoint(path, variant="tiny"))


@pytest.fixture(scope="session")
def tiny_pi05(shared_folder):
    """Directory of a tiny pi0.5 in openpi's layout. Read only."""
    return once(shared_folder / "tiny_pi05", lambda path: make_checkpoint(path, variant="tiny", pi05=True))


@pytest.fixture(scope="session", autouse=True)
def trace_once(shared_folder):
    """Tracing a policy takes seconds whatever its size, and depends on nothing but its dimensions: each is traced once, and
    kept where pytest-xdist's other processes find it."""
    original = export.trace

    @functools.cache
    def cached(config, num_steps: int) -> tuple[ir.Model, ir.Model]:
        def make(folder: Path) -> None:
            graphs = original(config, num_steps)
            folder.mkdir()
            save_graph(graphs.prefix, folder / "prefix.onnx")
            save_graph(graphs.step, folder / "step.onnx")

        key = hashlib.sha256(json.dumps([config.to_json(), num_steps]).encode()).hexdigest()
        folder = once(shared_folder / f"trace-{key}", make)
        return load_graph(folder / "prefix.onnx"), load_graph(folder / "step.onnx")

    def trace(config, num_steps: int) -> export.Graphs:
        return export.Graphs(*(model.clone() for model in cached(config, num_steps)), config, num_steps)

    export.trace = trace
    yield
    export.trace = original


def save_graph(model: ir.Model, path: Path) -> None:
    """Its initializers, which have no values yet and without values are nothing to ONNX, become inputs."""
    model = model.clone()
    for name, value in list(model.graph.initializers.items()):
        del model.graph.initializers[name]
        value.metadata_props["initializer"] = "yes"
        model.graph.inputs.append(value)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def load_graph(path: Path) -> ir.Model:
    model = ir.load(path)
    for value in [each for each in model.graph.inputs if each.metadata_props.pop("initializer", None)]:
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    return model


class Compiled(NamedTuple):
    checkpoint: Path
    plan: Path


@pytest.fixture(scope="session")
def tiny_plans(shared_folder, trace_once):
    """("pi0" or "pi05", preset, target) -> Compiled: a LIBERO policy of two layers, 8 actions and 4 steps. Read only.

    Each is compiled once a run, when it is first asked for. A plan for the target "cuda" is for SM 86, also as PTX, and SM 90;
    `float_images`: it takes images as floats.
    """
    directory = shared_folder / "plans"
    directory.mkdir(exist_ok=True)

    @functools.cache
    def checkpoint(policy: str) -> Path:
        sizes = dict(depth=2, vision_depth=1, action_horizon=8)
        return once(directory / policy, lambda path: make_checkpoint(path, pi05=policy == "pi05", robot="libero", **sizes))

    @functools.cache
    def quantization(policy: str, quant: str) -> Quantization:
        source, recipe = load_checkpoint(checkpoint(policy)), load_recipe(quant, environment={})
        if quant == "none":
            return Quantization(recipe)
        observations = synthetic_observations(source.config, cameras=3, count=2)
        inputs = [Preprocessor(source.config).model_inputs(each) for each in observations]
        with Progress(disable=True) as progress:
            return quantize_checkpoint(source, recipe, inputs, progress)

    @functools.cache
    def plan(policy: str, quant: str, target: str, float_images: bool) -> Path:
        common = dict(robot="libero", num_steps=4, float_images=float_images)
        options = CudaOptions(sm=(86, 90), **common) if target == "cuda" else Options(**common)

        def make(path: Path) -> None:
            with Progress(disable=True) as progress:
                compile_policy(load_checkpoint(checkpoint(policy)), quantization(policy, quant), path, options, progress)

        return once(directory / f"{policy}.{quant}.{target}{'.float_images' * float_images}.plan", make)

    def compiled(policy: str, quant: str, target: str = "cpu", float_images: bool = False) -> Compiled:
        return Compiled(checkpoint(policy), plan(policy, quant, target, float_images))

    return compiled


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command_line(monkeypatch, capsys):
    """(main, *arguments) -> Ran: what a program does when it is called with these arguments."""

    def run(main, *arguments) -> Ran:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def quantized_pi0(tiny_plans):
    """The tiny pi0's checkpoint and its quantization by default."""
    checkpoint = load_checkpoint(tiny_plans("pi0", "none").checkpoint)
    recipe = load_recipe(DEFAULT_PRESET, environment={})
    inputs = [observation(checkpoint.config, 0, cameras=1)]
    return checkpoint, quantize_checkpoint(checkpoint, recipe, inputs, Progress(disable=True))
