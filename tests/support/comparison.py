"""A comparison's workers in the test's own process, and observations to compare on."""

from __future__ import annotations

import contextlib
import importlib
import io
import json

import numpy as np

from duq.compiler.accuracy.synthetic import synthetic_observations


def run_here(module, arguments, advance) -> dict:
    """A worker in this process: a second saved, and nothing of what it costs means anything."""
    with contextlib.redirect_stdout(io.StringIO()) as messages:
        importlib.import_module(module).main(*map(str, arguments))
    return json.loads(messages.getvalue().splitlines()[-1])["cost"]


def two_observations(config) -> list[dict]:
    """Bare inputs with one camera and a full prompt; a robot's, with two and words."""
    random = np.random.default_rng(3)
    images = {f"observation/{name}": random.integers(0, 256, (40, 60, 3), np.uint8) for name in ("image", "wrist_image")}
    state = random.normal(0, 0.3, 8).astype(np.float32)
    bare = synthetic_observations(config, cameras=1, count=1)[0]
    return [bare, images | {"observation/state": state, "prompt": "open the drawer"}]
