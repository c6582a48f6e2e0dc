"""A plan as a folder that LeRobot takes for `--policy.path`: `duq-export-lerobot`, and `duq-compile --lerobot`.

    config.json                 for LeRobot's parser: the policy type "duq", features, chunk_size, n_action_steps
    engine.plan                 the policy, with its statistics and tokenizer
    policy_preprocessor.json    what LeRobot does around it: rename, batch, move to a device;
    policy_postprocessor.json   no step changes a number, for the plan normalizes, and un-normalizes, itself
    README.md                   the model card

It is read by the distribution `lerobot_policy_duq` (integrations/), which LeRobot finds by its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duq.plugins.errors import DuqError
from duq.runtime.errors import PlanError
from duq.runtime.plan import Plan
from duq.runtime.solver import Solver

PLAN, CONFIG, CARD = "engine.plan", "config.json", "README.md"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
FILES = (CONFIG, PLAN, PREPROCESSOR, POSTPROCESSOR, CARD)
STATE, ACTION, IMAGE = "observation.state", "action", "observation.image"

Shapes = Mapping[str, tuple[int, int]]  # camera -> height, width


def lerobot_config(
    manifest: Mapping[str, Any], where: str, n_action_steps: int | None = None, image_shapes: Shapes | None = None
) -> dict[str, Any]:
    """LeRobot's config.json for a plan with this manifest. where: of errors, the plan or its checkpoint.

    n_action_steps: actions of a chunk that are executed (None: as the checkpoint says, else all of them). image_shapes: of
    cameras whose shape the checkpoint does not say, or to be used instead.
    Raises PlanError: the plan's robot is not described in LeRobot's terms, a camera's shape is not known, or an option does
    not fit the plan.
    """
    robot = _lerobot_robot(manifest, where)
    loop, horizon = manifest.get("lerobot_loop") or {}, manifest["model"]["action_horizon"]
    steps = n_action_steps or loop.get("n_action_steps") or horizon
    if not 1 <= steps <= horizon:
        raise PlanError(f"{where}: n_action_steps is {steps}, but a chunk has {horizon} actions")
    shapes = _shapes([camera["key"][0] for camera in robot["cameras"]], loop, image_shapes or {}, where)
    images = {key: {"type": "VISUAL", "shape": shape} for key, shape in shapes.items()}
    state = {STATE: {"type": "STATE", "shape": [sum(len(part["names"]) for part in robot["state"])]}}
    return {
        "type": "duq",
        "n_obs_steps": 1,
        "input_features": images | state,
        "output_features": {ACTION: {"type": "ACTION", "shape": [len(robot["action_names"])]}},
        "device": "cpu",  # where LeRobot puts tensors, whatever the plan runs on
        "chunk_size": horizon,
        "n_action_steps": steps,
        "action_feature_names": loop.get("action_feature_names"),
        "plan": PLAN,
        "checkpoint": manifest["checkpoint"].get("fingerprint"),
    }


def _lerobot_robot(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The plan's robot. Raises PlanError unless its observations are LeRobot's."""
    robot: dict[str, Any] = manifest.get("robot_description") or {}
    fault = _fault(robot) if robot else "it takes bare model inputs (--robot none)"
    if fault:
        raise PlanError(
            f"{where}: is not for LeRobot's observations: {fault}. Compile a LeRobot checkpoint without --robot, or describe "
            f"the robot in a TOML file with LeRobot's keys ({IMAGE}s.NAME, {STATE}, prompt_keys task): docs/lerobot.md"
        )
    return robot


def _fault(robot: Mapping[str, Any]) -> str | None:
    name, state = robot["name"], [".".join(part["key"]) for part in robot["state"]]
    for camera in robot["cameras"]:
        key = ".".join(camera["key"])
        if len(camera["key"]) != 1 or key != IMAGE and not key.startswith(f"{IMAGE}s."):
            return f"robot {name} has a camera {key!r}"
    if state != [STATE] or len(robot["state"][0]["key"]) != 1:
        return f"robot {name} has a state of {', '.join(map(repr, state))}"
    if "task" not in robot["prompt_keys"]:
        return f"robot {name} reads the prompt from {', '.join(map(repr, robot['prompt_keys']))}"
    return None


def _shapes(cameras: list[str], loop: Mapping[str, Any], given: Shapes, where: str) -> dict[str, list[int]]:
    """Camera -> [3, height, width]."""
    for key in given:
        if key not in cameras:
            raise PlanError(f"--image-shape {key}: {where} has the cameras {', '.join(cameras)}")
    known = loop.get("image_shapes") or {}
    shapes = {}
    for key in cameras:
        shape = [3, *given[key]] if key in given else _channels_first(known.get(key))
        if shape is None:
            raise PlanError(
                f"{where}: does not say how large the images of {key} are, to which LeRobot's policy server resizes them: give "
                f"duq-export-lerobot --image-shape {key}=HEIGHTxWIDTH, as in training"
            )
        shapes[key] = shape
    return shapes


def _channels_first(shape: Any) -> list[int] | None:
    """[3, height, width] of an image feature's shape in either order; None of anything else."""
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)):
        return None
    return shape if shape[0] == 3 else [3, *shape[:2]] if shape[2] == 3 else None


def pipelines(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """LeRobot's two pipelines: the steps that its commands ask for, of which none changes a number."""
    robot = manifest["robot_description"]
    rename = {also[0]: part["key"][0] for part in (*robot["cameras"], *robot["state"]) for also in part.get("also", ())}
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": rename}},
        {"registry_name": "to_batch_processor", "config": {}},
        device,
    ]
    return {"name": "policy_preprocessor", "steps": before}, {"name": "policy_postprocessor", "steps": [device]}


class LeRobotFolder:
    """Writes the folder beside `path` and renames it into place, so that `path` is never half-written.

        with LeRobotFolder("my_arm") as folder:
            write_a_plan_to(folder.plan)
            folder.finish()

    An earlier export there is replaced. Raises DuqError at once if `path` is anything else.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        _check_replaceable(self.path)
        self._temporary = self.path.absolute().with_name(f".{self.path.absolute().name}.{os.getpid()}.tmp")
        self.plan = self._temporary / PLAN

    def __enter__(self) -> LeRobotFolder:
        self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
        self._temporary.mkdir()
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def finish(self, n_action_steps: int | None = None, image_shapes: Shapes | None = None) -> dict[str, Any]:
        """Adds the other files and renames over `path`; returns config.json. Raises PlanError as `lerobot_config`."""
        manifest = Plan(self.plan, verify=False).manifest
        config = lerobot_config(manifest, str(self.path), n_action_steps, image_shapes)
        before, after = pipelines(manifest)
        for name, content in ((CONFIG, config), (PREPROCESSOR, before), (POSTPROCESSOR, after)):
            (self._temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        (self._temporary / CARD).write_text(_card(manifest, config), encoding="utf-8")
        if self.path.is_dir():
            replaced = self._temporary.with_suffix(".old")
            os.rename(self.path, replaced)
            os.rename(self._temporary, self.path)
            shutil.rmtree(replaced)
        else:
            os.rename(self._temporary, self.path)
        return config


def export(plan: Path, out: Path, n_action_steps: int | None = None, image_shapes: Shapes | None = None) -> dict[str, Any]:
    """Writes `out` for a copy of `plan`; returns config.json. Raises PlanError or DuqError before anything is written."""
    lerobot_config(Plan(plan).manifest, str(plan), n_action_steps, image_shapes)
    with LeRobotFolder(out) as folder:
        shutil.copyfile(plan, folder.plan)
        return folder.finish(n_action_steps, image_shapes)


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise DuqError(f"{path}: is a file; name a folder for LeRobot's files")
    others = sorted(file.name for file in path.iterdir() if file.name not in FILES)
    present = any(path.iterdir())
    if others or present and _policy_type(path / CONFIG) != "duq":
        what = others[0] if others else "another policy"
        raise DuqError(f"{path}: holds {what}, which an export would remove; name another folder")


def _policy_type(config: Path) -> str | None:
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data.get("type") if isinstance(data, dict) else None


_CARD = """---
library_name: lerobot
pipeline_tag: robotics
tags:
- robotics
- lerobot
- duq
---

# {policy}, compiled by duq

`engine.plan` is a {policy} policy for the target `{target}`, compiled from `{checkpoint}`. It holds the weights, the
statistics and the tokenizer, and runs without PyTorch. LeRobot 0.6 and later takes this folder once `lerobot_policy_duq` is
installed beside it:

    lerobot-eval --policy.path=. --env.type=...
    lerobot-rollout --policy.path=. --robot.type=... --task="..."

| | |
| --- | --- |
| quantized linears | {linears} |
| denoising steps | {steps} |
| actions in a chunk, executed | {horizon}, {executed} |
| cameras | {cameras} |
| state, actions | {state}, {actions} numbers |
| normalization | in the plan: the policy takes and gives the robot's units, so the pipelines have no step for it |
"""


def _card(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    inputs = config["input_features"]
    linears = (manifest.get("quantization") or {}).get("linears") or {}
    return _CARD.format(
        policy="pi0.5" if manifest["model"]["pi05"] else "pi0",
        target=manifest["target"],
        checkpoint=Path(str(manifest["checkpoint"].get("path", "a checkpoint"))).name,
        linears=len(linears) or "none (floating point)",
        steps=f"{manifest['num_steps']} ({Solver.of(manifest).name})",
        horizon=config["chunk_size"],
        executed=config["n_action_steps"],
        cameras=", ".join(f"`{key}`" for key, each in inputs.items() if each["type"] == "VISUAL"),
        state=inputs[STATE]["shape"][0],
        actions=config["output_features"][ACTION]["shape"][0],
    )
