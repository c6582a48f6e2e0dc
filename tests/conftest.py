"""Fixtures shared by the tests: small checkpoints of the true architecture, made once a session."""
from __future__ import annotations

import functools

import pytest
import torch

from compiler.checkpoint.synthetic import make_checkpoint
from compiler.graph import export


torch.set_num_threads(1)  # the policies here are tiny: threads cost more than they save


@pytest.fixture(scope="session")
def tiny_pi0(tmp_path_factory):
    """Directory of a tiny pi0 in openpi's layout. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "pi0", variant="tiny")


@pytest.fixture(scope="session")
def tiny_pi05(tmp_path_factory):
    """Directory of a tiny pi0.5 in openpi's layout. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "pi05", variant="tiny", pi05=True)


@pytest.fixture(scope="session", autouse=True)
def trace_once():
    """Tracing a policy takes seconds whatever its size, and depends on nothing but its dimensions."""
    original = export.trace
    cached = functools.cache(original)

    def trace(config, num_steps):
        graphs = cached(config, num_steps)
        return export.Graphs(graphs.prefix.clone(), graphs.step.clone(), config, num_steps)

    export.trace = trace
    yield
    export.trace = original
