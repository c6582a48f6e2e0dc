"""Compiles the policies that lerobot_policies.py saved, and compares raw observation -> robot actions with LeRobot's.

In float, on the CPU: within 1e-4 of the actions' size. A policy that LeRobot computes in bfloat16 differs by what bfloat16
rounds, so that only its direction is compared.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from rich.progress import Progress

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.pipeline import compile_policy
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.settings import Choices, settle
from duq.compiler.targets import Options
from duq.runtime import Policy

TOLERANCE, BFLOAT16_COSINE = 1e-4, 0.999


def check(folder: Path, directory: Path) -> str | None:
    """What is wrong with a case; None if nothing is."""
    checkpoint, settings = settle(load_checkpoint(folder / "pretrained_model"), Choices())
    plan = directory / f"{folder.name}.plan"
    with Progress(disable=True) as progress:
        quantization = Quantization(load_recipe("none", environment={}))
        compile_policy(checkpoint, quantization, plan, Options(settings=settings), progress)
    policy, calls = Policy(plan), np.load(folder / "calls.npz")
    found = []
    for index, task in enumerate(calls["tasks"]):
        observation = dict(np.load(folder / f"observation_{index}.npz")) | {"task": str(task)}
        found.append(policy.infer(observation, calls["noise"][index])["actions"])
    found, expected = np.stack(found).astype(np.float64), calls["actions"].astype(np.float64)
    if found.shape != expected.shape:
        return f"actions {found.shape}, LeRobot's {expected.shape}"
    size = np.abs(expected).max()
    error = np.abs(found - expected).max() / size
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    print(f"{folder.name}: error {error:.1e} of {size:.3g}, cosine {cosine:.7f}")
    if "bfloat16" in folder.name:
        return None if cosine > BFLOAT16_COSINE else f"cosine {cosine}"
    return None if error <= TOLERANCE else f"error {error:.2e} of the actions' size"


def main() -> None:
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    if not folders:
        raise SystemExit(f"{sys.argv[1]}: holds no cases; run lerobot_policies.py first")
    with tempfile.TemporaryDirectory() as directory:
        faults = {folder.name: fault for folder in folders if (fault := check(folder, Path(directory)))}
    for name, fault in faults.items():
        print(f"FAILED {name}: {fault}", file=sys.stderr)
    print(f"{len(folders) - len(faults)} of {len(folders)} policies act as LeRobot's")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
