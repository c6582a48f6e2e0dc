"""Skips the tests of this folder, one by one so that they are counted, where there is no NVIDIA GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from duq.compiler.targets.cuda import options_of_program
from duq.plugins.driver import open_device
from duq.plugins.errors import KernelError

HERE = Path(__file__).parent
# The SMs whose programs a GPU of SM 90 runs beside its own: from PTX, and by a stand-in where that does not go back to it.
PROGRAMS = (80, 86, 87, 89, 100, 110, 120)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """Where policies and plans are, those of pytest-xdist's other processes included."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "policies"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(params=PROGRAMS)
def program(request) -> int:
    """An SM whose program this machine's GPU runs, perhaps by a stand-in. One with less of everything skips those of others."""
    try:
        options_of_program(request.param, open_device())
    except KernelError as error:
        pytest.skip(str(error))
    return request.param
