"""Fixtures of the compiler's tests."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.quant_policy import observation, tiny_checkpoint


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def calibrated_policy(request):
    """A checkpoint of a few thousand weights, calibration inputs, and one input without padding."""
    checkpoint = tiny_checkpoint(request.param, depth=2)
    checkpoint = SimpleNamespace(**vars(checkpoint), layout="openpi", norm_stats=None, tokenizer=None, finite=True)
    config = checkpoint.config
    full = observation(config, 5)
    prompt = np.arange(1, config.max_prompt_tokens + 1)
    full = replace(full, tokens=prompt, token_mask=np.ones_like(prompt, bool))
    return checkpoint, [observation(config, seed, cameras=3 - seed % 2) for seed in range(3)], full
