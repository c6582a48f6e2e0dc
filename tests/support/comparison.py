"""A comparison's workers in the test's own process, and observations to compare on."""

from __future__ import annotations

import contextlib
import importlib
import io
import json

import numpy as np

from duq.compiler.accuracy.compare import Comparison, RobotActions
from duq.compiler.accuracy.joints import along_the_chunk, joints_json, working_range
from duq.compiler.accuracy.metrics import difference, jerk
from duq.compiler.accuracy.stages import Stages
from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.accuracy.thresholds import CRITERIA, judge
from duq.runtime.solver import Solver


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


UNITS = ("rad", "m", "deg", "-1..1", "0..100", "")


def made_up_comparison(
    joints: int = 7,
    observations: int = 4,
    horizon: int = 16,
    error: float = 0.05,
    quantized: bool = True,
    not_finite: bool = False,
) -> Comparison:
    """A comparison as `compare` returns and duq-compare completes it, of smooth random chunks; no policy runs.

    error: of the engine, standard deviation of the normalized actions; 0 is a float plan's. not_finite: it
    gives a NaN. Names are as long as robots' are.
    """
    random, steps, layers = np.random.default_rng(joints), 4, 3
    names = [f"left_arm_joint_{index}.position" for index in range(joints)]
    units = [UNITS[index % len(UNITS)] for index in range(joints)]
    stages, time = Stages(Solver("euler", steps), True, [None] * layers, joints), np.linspace(0, 3, horizon)[:, None]
    for _ in range(observations):
        actions = np.sin(time * random.uniform(0.5, 2, joints) + random.uniform(0, 6, joints)).astype(np.float32)
        off = (error * random.normal(size=actions.shape)).astype(np.float32)
        if not_finite:
            off[3, 1], not_finite = np.nan, False  # of the first observation
        features = random.normal(size=(8, 4)).astype(np.float32)
        kept = {f"{kind}.{layer}": random.normal(size=(1, 1, 6, 4)) for layer in range(layers) for kind in ("key", "value")}
        x = np.linspace(1, 0, steps + 1)[:, None, None] * (1 - actions) + actions
        v = (x[:-1] - x[1:]) * steps
        reference = kept | {"image_features": features, "actions": actions, "v": v, "v_at_engine_x": v}
        noisy = {key: value + error * random.normal(size=value.shape) for key, value in kept.items()}
        far = x + np.linspace(0, 1, steps + 1)[:, None, None] * off
        stages.add(reference, noisy | {"image_features": features * (1 + 1e-7), "actions": actions + off, "x": far})
    reference, engine = np.stack(stages.reference_actions), np.stack(stages.engine_actions)
    scale = np.geomspace(1e-5, 3000, joints).astype(np.float32)
    robot = RobotActions(*({i: scale * side[i] for i in range(observations)} for side in (reference, engine)))
    ranges, basis = working_range({"actions": {"mode": "MEAN_STD"}}, joints, pi05=False)
    per_observation = [
        {"cameras": 2, "prompt_tokens": 9, "actions": difference(reference[i], engine[i]).to_json(),
         "robot_actions": robot.measures(i, names)}
        for i in range(observations)
    ]  # fmt: skip
    linears = {f"llm.layers.{i}.mlp.down_proj": 20 + i for i in range(20)} | {"expert.layers.0.mlp.up_proj": 61.5}
    side = {"median_ms": 12.5, "milliseconds": [12.5], "peak_bytes": 300_000_000, "libraries_bytes": 40_000_000}
    summary = {
        "source": "from observations.npz",
        "command": "duq-compare checkpoint engine.plan --report report.html",
        "thresholds": {},
        "checkpoint": {"path": "/checkpoints/" + "a_long_folder_name" * 5, "layout": "openpi", "fingerprint": "5e" * 32},
        "plan": {
            "path": "/plans/" + "a_long_folder_name" * 5 + "/engine.plan", "bytes": 20_000_000, "target": "cpu",
            "robot": "arm", "num_steps": steps, "solver": "euler", "rotary": "bfloat16",
            "compiled_by": {"duq": "0.2", "python": "3.11"},
            "recipe": {"scheme": "balanced", "include": "^llm\\.|^expert\\..*\\.mlp\\." * 2, "weight_bits": 4},
        },
        "reference": {"solver": "euler", "num_steps": steps},
        "threads": 2,
        "seed": 0,
        "date": "2026-01-02T03:04:05Z",
        "machine": {"system": "Linux 6", "cpu": "A CPU", "cores": 2, "memory_bytes": 24_000_000_000, "gpu": None},
        "versions": {"duq": "0.2", "python": "3.11", "torch": "2.13"},
        **stages.to_json(),
        "observations": per_observation,
        "dimensions": joints_json(names, units, ranges, (reference, engine), robot.stacked()),
        "range": basis,
        "chunk": along_the_chunk(reference, engine, ranges),
        "linears": {
            "measured": "by the quantizer",
            "sqnr": {
                name: {"weight_bits": 4, "activation_bits": 8, "shape": [64, 64], "sqnr_db": sqnr}
                for name, sqnr in linears.items()
            } if quantized else {},
        },
        "jerk": {"model": {"reference": jerk(reference), "engine": jerk(engine)}, "robot": robot.jerk()},
        "cost": {"reference": side, "engine": side, "speedup": 1.0},
    }  # fmt: skip
    summary["stages"]["robot_actions"] = difference(*robot.stacked()).to_json()
    return judged(Comparison(summary, reference, engine, robot))


def judged(comparison: Comparison, failures: tuple[str, ...] = (), made_up: bool = False) -> Comparison:
    """With its verdict."""
    comparison.summary["verdict"] = judge(comparison.summary, CRITERIA, failures, made_up)
    return comparison
