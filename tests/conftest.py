"""Fixtures shared by the tests: small checkpoints of the true architecture, made once a session."""
from __future__ import annotations

import pytest
import torch

from compiler.checkpoint.synthetic import make_checkpoint


torch.set_num_threads(1)  # the policies here are tiny: threads cost more than they save


@pytest.fixture(scope="session")
def tiny_pi0(tmp_path_factory):
    """Directory of a tiny pi0 in openpi's layout. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "pi0", variant="tiny")


@pytest.fixture(scope="session")
def tiny_pi05(tmp_path_factory):
    """Directory of a tiny pi0.5 in openpi's layout. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "pi05", variant="tiny", pi05=True)
