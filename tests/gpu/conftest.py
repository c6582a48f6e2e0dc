"""Skips the tests of this folder, one by one so that they are counted, where there is no NVIDIA GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where a module's policies and plans are."""
    return tmp_path_factory.mktemp("policies")
