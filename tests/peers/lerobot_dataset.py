"""Writes a small dataset with the LeRobot that is installed, reads it with LeRobot's own reader and with duq's, and
compares every frame bit for bit. LeRobot 0.4 and later write v3.0, LeRobot 0.3 writes v2.1.

`make test-peers` installs LeRobot (Python 3.12) into an environment of its own and runs this file there.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from lerobot.datasets.lerobot_dataset import LeRobotDataset

from duq.compiler.data import open_dataset

FPS, HEIGHT, WIDTH = 30, 96, 128
EPISODES = [(12, "pick up the cup"), (1, "öffne die Tür"), (40, "pick up the cup"), (25, "close the drawer")]
IMAGE = {"shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
FEATURES = {
    "observation.images.top": IMAGE | {"dtype": "video"},
    "observation.images.wrist": IMAGE | {"dtype": "video"},
    "observation.images.still": IMAGE | {"dtype": "image"},
    "observation.state": {"dtype": "float32", "shape": (6,), "names": None},
    "observation.gripper": {"dtype": "float32", "shape": (1,), "names": None},
    "action": {"dtype": "float32", "shape": (6,), "names": None},
}


def write(folder: Path) -> None:
    """Random smooth images, which move, and random states."""
    dataset = LeRobotDataset.create("duq/test", fps=FPS, features=FEATURES, root=folder, use_videos=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for length, task in EPISODES:
        phase = rng.uniform(0, 6, (3, 3))
        for frame in range(length):
            images = [
                np.stack([127 + 99 * np.sin(x / 9 + p + frame / 5) * np.cos(y / 7 + p) for p in phases], -1).astype(
                    np.uint8
                )
                for phases in phase
            ]
            row = dict(zip(list(FEATURES)[:3], images, strict=True))
            row["observation.state"], row["action"] = rng.standard_normal((2, 6)).astype(np.float32)
            row["observation.gripper"] = rng.standard_normal(1).astype(np.float32)
            if "task" in inspect.signature(dataset.add_frame).parameters:  # LeRobot 0.3
                dataset.add_frame(row, task)
            else:
                dataset.add_frame(row | {"task": task})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


def same(name: str, theirs, ours) -> bool:
    if isinstance(theirs, str):
        return theirs == ours
    theirs = theirs.numpy()
    if "images" in name:  # LeRobot: float32 [3, H, W] in 0..1
        theirs = np.rint(theirs.transpose(1, 2, 0) * 255).astype(np.uint8)
    return theirs.dtype == ours.dtype and np.array_equal(theirs.reshape(ours.shape), ours)


def compare(folder: Path) -> int:
    """How many values differ."""
    theirs, ours = LeRobotDataset("duq/test", root=folder, video_backend="pyav"), open_dataset(folder)
    total = sum(length for length, _ in EPISODES)
    assert len(theirs) == len(ours) == total, (len(theirs), len(ours))
    observations, differing = ours.read(range(total)), 0
    for index, observation in enumerate(observations):
        row = theirs[index]
        for name in (*ours.keys, "task"):
            if not same(name, row[name], observation[name]):
                differing += 1
                print(f"frame {index}: {name} differs")
    print(f"{ours.codebase_version}: {total} frames of {', '.join(ours.keys)}: {differing} values differ")
    return differing


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "dataset"
        write(folder)
        raise SystemExit(bool(compare(folder)))


if __name__ == "__main__":
    main()
