"""The settings of a plan: who says each, what is asked for, and what contradicts; robots of one's own."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.metadata import read_metadata
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.checkpoint.training import published, settings_of_trainer, training_config
from duq.compiler.commands import compile_main
from duq.compiler.errors import CheckpointError
from duq.compiler.pipeline import compile_policy
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.settings import Choices, PolicySettings, settle
from duq.compiler.targets import Options
from duq.plugins.errors import DuqError
from duq.runtime import Policy
from duq.runtime.errors import PlanError
from duq.runtime.plan import Plan
from duq.runtime.preprocess import Preprocessor
from duq.runtime.robots import ROBOT_NAMES, Robot, load_robot, read_robot
from tests.support.observations import CONFIG, OBSERVATIONS, PI05

SIZES = {"depth": 1, "vision_depth": 1}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """openpi's and LeRobot's policies by robot and type. Read only."""
    directory = tmp_path_factory.mktemp("choices")
    made = {}
    for robot, kind in (("libero", "pi0"), ("libero", "pi05"), ("aloha", "pi0"), ("droid", "pi05"), ("droid", "pi0")):
        made[f"{robot} {kind}"] = make_checkpoint(directory / robot / kind, pi05=kind == "pi05", robot=robot, **SIZES)
    made["lerobot"] = make_checkpoint(directory / "lerobot", pi05=True, layout="lerobot", robot="libero", **SIZES)
    return made


@pytest.fixture
def trainers(checkpoints, tmp_path):
    """(name, metadata.pt's config or None) -> a copy without config.json, as openpi's trainer leaves it."""

    def run(name: str, config: dict | None = None) -> Path:
        path = shutil.copytree(checkpoints[name], tmp_path / "trained", dirs_exist_ok=True)
        (path / "config.json").unlink(missing_ok=True)
        if config is not None:
            torch.save({"global_step": 3, "config": config, "timestamp": 0.0}, path / "metadata.pt")
        return path

    return run


def settled(path: Path, **choices):
    return settle(load_checkpoint(path), Choices(**choices))


def refused(path: Path, message: str, **choices) -> None:
    with pytest.raises(DuqError, match=message) as error:
        settled(path, **choices)
    assert "\n" not in str(error.value)


# --- the action horizon and the prompt's length


def test_an_unknown_horizon_is_asked_for(trainers):
    path = trainers("libero pi0")
    refused(path, "does not say how many actions .* --config NAME .* --action-horizon N", robot="libero")
    checkpoint, settings = settled(path, robot="libero", action_horizon=10)
    assert checkpoint.config.action_horizon == 10 and settings.sources["action_horizon"] == "--action-horizon"
    assert checkpoint.config.max_prompt_tokens == 48 and settings.sources["max_prompt_tokens"] == "the default"
    checkpoint, settings = settled(path, config="pi0_libero", max_prompt_tokens=64)
    assert (checkpoint.config.action_horizon, checkpoint.config.max_prompt_tokens) == (50, 64)


def test_a_config_by_name(trainers):
    checkpoint, settings = settled(trainers("libero pi05"), config="pi05_libero")
    assert checkpoint.config.action_horizon == 10 and checkpoint.config.max_prompt_tokens == 200
    assert settings.robot.name == "libero" and settings.config == "pi05_libero"
    assert not settings.transforms["delta_actions"] and not settings.transforms["state_in_prompt"]
    assert set(settings.sources[key] for key in ("robot", "action_horizon", "delta_actions")) == {"--config pi05_libero"}


@pytest.mark.parametrize("name, checkpoint, horizon, slots, delta, prompt", [
    ("pi0_aloha_sim", "aloha pi0", 50, 48, False, "Transfer cube"),
    ("pi0_aloha_towel", "aloha pi0", 50, 48, True, "fold the towel"),
    ("pi05_full_droid_finetune", "droid pi05", 16, 200, True, None),
    ("pi05_droid", "droid pi05", 15, 200, False, None),
    ("pi0_droid_jointpos_polaris", "droid pi0", 10, 100, True, None),
])  # fmt: skip
def test_published_configs(trainers, name, checkpoint, horizon, slots, delta, prompt):
    found, settings = settled(trainers(checkpoint), config=name)
    assert (found.config.action_horizon, found.config.max_prompt_tokens) == (horizon, slots)
    assert settings.transforms["delta_actions"] is delta and settings.transforms["default_prompt"] == prompt
    assert settings.transforms["adapt_to_pi"] is (settings.robot.name == "aloha")
    policy = settings.preprocessor(found)
    assert policy.transforms == settings.transforms


def test_options_override_the_config(trainers):
    choices = dict(
        config="pi0_aloha_sim", delta_actions=True, adapt_to_pi=False, default_prompt="go", action_horizon=7, num_steps=4
    )
    checkpoint, settings = settled(trainers("aloha pi0"), **choices)
    assert settings.transforms["delta_actions"] and not settings.transforms["adapt_to_pi"]
    assert (
        settings.transforms["default_prompt"] == "go" and checkpoint.config.action_horizon == 7 and settings.num_steps == 4
    )
    assert settings.sources["delta_actions"] == "--delta-actions"


@pytest.mark.parametrize("checkpoint, choices, message", [
    ("libero pi0", {"config": "pi05_libero"}, "is of a pi0.5 policy, but .* is pi0"),
    ("libero pi0", {"config": "pi0_fast_libero"}, "is a pi0_fast policy"),
    ("libero pi0", {"config": "pi0_librero"}, "did you mean pi0_libero"),
    ("droid pi0", {"config": "paligemma_diffusion_droid"}, "predicts 8 actions, but .* 32"),
    ("lerobot", {"config": "pi05_libero"}, "is openpi's, but .* is LeRobot's"),
    ("libero pi0", {"state_in_prompt": True, "robot": "libero"}, "only pi0.5 reads it from the prompt"),
    ("libero pi0", {"lerobot_version": "0.5", "robot": "libero"}, "--lerobot-version 0.5: .* is openpi's, not LeRobot's"),
    ("libero pi0", {"adapt_to_pi": True, "robot": "libero"}, "--adapt-to-pi: robot libero has no conversion"),
    ("libero pi0", {"delta_actions": True, "robot": "none"}, "--delta-actions: --robot none takes and gives"),
    ("libero pi0", {"rotary": "float16"}, "--rotary float16: unknown, one of exact, bfloat16, auto"),
    ("lerobot", {"lerobot_version": "new"}, "expected a version such as 0.4"),
    ("lerobot", {"lerobot_version": "0.4"}, "was written by 0.5 or later"),
    ("libero pi0", {"robot": "lerobot"}, "is openpi's; give one of aloha, droid, libero"),
])  # fmt: skip
def test_contradictions_are_refused(checkpoints, checkpoint, choices, message):
    refused(checkpoints[checkpoint], message, **choices)


def test_a_config_that_the_checkpoint_contradicts_is_used_and_said(checkpoints, command_line, tmp_path):
    checkpoint, settings = settled(checkpoints["droid pi05"], config="pi05_droid")
    assert checkpoint.config.action_horizon == 15 and settings.sources["action_horizon"] == "--config pi05_droid"
    assert "action_horizon: the checkpoint says 50, but --config pi05_droid 15, which is used" in settings.notes[0]
    ran = command_line(compile_main, checkpoints["droid pi05"], "--config", "pi05_droid", "--out", tmp_path / "a.plan")
    assert ran.code == 2 and "note: action_horizon: the checkpoint says 50" in ran.err  # and --calibration is missing
    assert not settled(checkpoints["droid pi05"], config="pi05_droid", action_horizon=15)[1].notes


def test_settings_of_unknown_meaning_are_said(checkpoints, command_line, tmp_path):
    path = edited(checkpoints["libero pi0"], tmp_path, lambda data: data.update(color="red"))
    ran = command_line(compile_main, path, "--robot", "libero", "--out", tmp_path / "a.plan")  # which lacks --calibration
    assert (
        ran.code == 2 and "warning: " in ran.err and "config.json has color: 'red', whose meaning is not known" in ran.err
    )


# --- what is asked for


@pytest.mark.parametrize("checkpoint, robot", [("aloha pi0", "aloha"), ("droid pi05", "droid"), ("droid pi0", "droid")])
def test_deltas_are_asked_for_where_published_policies_differ(checkpoints, checkpoint, robot):
    path = checkpoints[checkpoint]
    refused(
        path,
        f"trained with delta actions, and policies of {robot} differ: .*--delta-actions or --no-delta-actions",
        robot=robot,
    )
    for delta in (True, False):
        assert settled(path, robot=robot, delta_actions=delta)[1].transforms["delta_actions"] is delta


def test_nothing_is_asked_where_they_agree(checkpoints):
    for kind, delta in (("pi0", True), ("pi05", False)):
        transforms = settled(checkpoints[f"libero {kind}"], robot="libero")[1].transforms
        assert transforms["delta_actions"] is delta and transforms["state_in_prompt"] is False


@pytest.mark.parametrize("checkpoint, robot, message", [
    ("libero pi0", "aloha", "state of 14 and 14 actions, but the norm stats of .* are of 8 and 7; --robot libero fits"),
    ("libero pi0", "droid", "--robot libero fits"),
    ("droid pi05", "libero", "are of 8 and 8; --robot droid fits"),
    ("aloha pi0", "libero", "are of 14 and 14; --robot aloha fits"),
    ("lerobot", "aloha", "--robot lerobot .the default. fits"),
])  # fmt: skip
def test_a_wrong_robot_is_told_which_fits(checkpoints, checkpoint, robot, message):
    refused(checkpoints[checkpoint], message, robot=robot)


def test_lerobot_needs_no_robot(checkpoints):
    checkpoint, settings = settled(checkpoints["lerobot"])
    assert settings.robot_name == "lerobot" and settings.sources["robot"] == "the checkpoint"
    observation = {
        "observation.images.image": np.zeros((40, 60, 3), np.uint8),
        "observation.state": np.zeros(8),
        "task": "go",
    }
    policy = settings.preprocessor(checkpoint)
    assert policy.model_inputs(observation).image_mask.tolist() == [True, False, False]
    assert policy.robot_actions(np.zeros((4, 32), np.float32), observation).shape == (4, 7)
    assert settled(checkpoints["lerobot"], robot="none")[1].robot is None


def edited(path: Path, tmp_path: Path, change) -> Path:
    copy = shutil.copytree(path, tmp_path / "edited", dirs_exist_ok=True)
    data = json.loads((copy / "config.json").read_text())
    change(data)
    (copy / "config.json").write_text(json.dumps(data))
    return copy


def test_the_version_of_lerobot_is_asked_for_where_it_matters(checkpoints, tmp_path):
    path = edited(checkpoints["lerobot"], tmp_path, lambda data: data.pop("use_relative_actions"))
    refused(
        path,
        "LeRobot 0.4 or 0.5.0, which differ in how the state is padded in the prompt: say --lerobot-version 0.4 or 0.5",
    )
    old, new = (settled(path, lerobot_version=version)[1].transforms for version in ("0.4.2", "0.6.1"))
    assert (old["resize"], old["pad_state_in_prompt"]) == ("lerobot-0.4", 32)
    assert (new["resize"], new["pad_state_in_prompt"]) == ("lerobot", 0)


def test_a_checkpoint_that_does_not_describe_its_robot(checkpoints, tmp_path):
    path = edited(checkpoints["lerobot"], tmp_path, lambda data: data.pop("input_features"))
    refused(path, "config.json does not describe its robot .*; say --robot aloha, droid, libero, none or a TOML file")
    assert settled(path, robot="libero")[1].robot_name == "libero"


# --- metadata.pt


TRAINER = {
    "name": "my_run",
    "model": {"action_horizon": 12, "max_token_len": 60, "pi05": False, "discrete_state_input": False},
}


def test_a_trainers_metadata_says_it_all(trainers):
    data = {"repo_id": "me/arms", "assets": {"asset_id": None}, "use_delta_joint_actions": False, "adapt_to_pi": True,
            "default_prompt": "Transfer cube"}  # fmt: skip
    checkpoint, settings = settled(trainers("aloha pi0", TRAINER | {"data": data}))
    assert (checkpoint.config.action_horizon, checkpoint.config.max_prompt_tokens) == (12, 60)
    assert settings.robot_name == "aloha" and settings.config == "my_run"
    assert settings.transforms["adapt_to_pi"] and not settings.transforms["delta_actions"]
    assert settings.transforms["default_prompt"] == "Transfer cube"


class DroidActionSpace(Enum):
    """openpi's."""

    JOINT_POSITION = 1
    JOINT_VELOCITY = 2


@pytest.mark.parametrize("data, robot, delta", [
    ({"extra_delta_transform": True}, "libero", True),
    ({"extra_delta_transform": False}, "libero", False),
    ({"rlds_data_dir": "x", "action_space": DroidActionSpace.JOINT_POSITION}, "droid", True),
    ({"rlds_data_dir": "x", "action_space": DroidActionSpace.JOINT_VELOCITY}, "droid", False),
    ({"rlds_data_dir": "x", "action_space": None}, "droid", False),
    ({"repo_id": "mine"}, None, None),
])  # fmt: skip
def test_the_data_config_is_known_by_its_fields(data, robot, delta, tmp_path):
    torch.save(TRAINER | {"data": data}, tmp_path / "metadata.pt")  # an enum is a call of its class in it
    found = settings_of_trainer(read_metadata(tmp_path / "metadata.pt"))
    assert (found.robot and found.robot.name) == robot and found.transforms.get("delta_actions") == delta


def test_a_published_configs_metadata_needs_no_fields():
    found = settings_of_trainer(TRAINER | {"name": "pi05_droid_finetune", "data": {"repo_id": "x"}})
    assert found.robot.name == "droid" and found.transforms["delta_actions"] is False


def test_fast_training_is_refused():
    with pytest.raises(CheckpointError, match="pi0-FAST"):
        settings_of_trainer(TRAINER | {"model": {"fast_model_tokenizer": None}})


def test_every_published_config_is_well_formed():
    for name, data in published().items():
        if data["model"] == "pi0_fast":
            with pytest.raises(CheckpointError, match=name):
                training_config(name)
        else:
            assert training_config(name).settings.robot.name in ROBOT_NAMES


# --- rotary frequencies


def test_rotary_frequencies_follow_the_origin(checkpoints, tmp_path):
    path = checkpoints["libero pi0"]
    single = make_checkpoint(tmp_path / "float", robot="libero", dtype="float32", **SIZES)
    assert settled(path, robot="libero")[0].config.rotary == "bfloat16"
    assert settled(single, robot="libero")[0].config.rotary == "exact"
    said = edited(path, tmp_path, lambda data: data.update(rotary="exact"))  # as our own trainer
    assert settled(said, robot="libero")[0].config.rotary == "exact"
    refused(edited(path, tmp_path, lambda data: data.update(rotary="half")), '"rotary" is .half.', robot="libero")
    assert settled(path, robot="libero", rotary="exact")[0].config.rotary == "exact"


def test_lerobot_says_in_which_type_it_trained(checkpoints, tmp_path):
    for dtype, expected in (("bfloat16", "bfloat16"), ("float32", "exact")):
        path = edited(checkpoints["lerobot"], tmp_path, lambda data, dtype=dtype: data.update(dtype=dtype))
        assert settled(path)[0].config.rotary == expected


# --- robots of one's own


ARM = """
name = "my_arm"
default_prompt = "pick up the cube"

[[cameras]]
key = ["images", "front"]
layout = "CHW"

[[cameras]]
key = "wrist"
also = ["wrist_camera"]

[[state]]
key = "joints"
names = ["shoulder", "elbow"]
units = ["deg", "deg"]

[[state]]
key = "gripper"
names = ["gripper"]
units = ["0..100"]

[actions]
names = ["shoulder", "elbow", "gripper"]
units = ["deg", "deg", "0..100"]
delta = [2, -1]

[[convert]]
kind = "linear"
dims = ["gripper"]
low = 0
high = 100

[[convert]]
kind = "negate"
dims = ["elbow"]

[defaults]
state_in_prompt = false
"""


@pytest.fixture
def arm(tmp_path):
    """(replacements in the text) -> the file of a robot."""

    def write(*changes: tuple[str, str]) -> Path:
        text = ARM
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "arm.toml").write_text(text)
        return tmp_path / "arm.toml"

    return write


def test_a_robot_of_ones_own(arm):
    policy = Preprocessor(CONFIG, robot=str(arm()))
    image = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    observation = {"images": {"front": image}, "wrist_camera": image.transpose(1, 2, 0), "joints": [10, 20], "gripper": 25,
                   "tokenized_prompt": np.arange(3), "tokenized_prompt_mask": np.ones(3, bool)}  # fmt: skip
    inputs = policy.model_inputs(observation)
    assert inputs.state[:4].tolist() == [10, -20, 0.25, 0] and inputs.image_mask.tolist() == [True, True, False]
    assert np.array_equal(inputs.images[0], image.transpose(1, 2, 0)) and np.array_equal(inputs.images[0], inputs.images[1])
    actions = policy.robot_actions(np.array([[1, 2, 0.5] + [9] * 29], np.float32), observation)
    assert actions.tolist() == [[11, 18, 50]]  # deltas in the model's units: -20 + 2, turned back
    assert policy.robot.action_names == ("shoulder", "elbow", "gripper") and policy.robot.action_units[2] == "0..100"


def test_its_default_prompt_and_settings(arm, checkpoints):
    stats = {
        key: {name: [0.0] * 3 if name != "std" else [1.0] * 3 for name in ("mean", "std", "q01", "q99")}
        for key in ("state", "actions")
    }
    checkpoint = replace(load_checkpoint(checkpoints["libero pi05"]), norm_stats={"epsilon": 1e-6, **stats})
    file = arm()
    found, settings = settle(checkpoint, Choices(robot=str(file)))
    assert settings.transforms["delta_actions"] and not settings.transforms["state_in_prompt"]
    assert (
        settings.transforms["default_prompt"] == "pick up the cube" and settings.sources["delta_actions"] == "robot my_arm"
    )
    arm(("state_in_prompt = false", ""))
    with pytest.raises(DuqError, match="whether the policy was trained with state in prompt"):
        settle(checkpoint, Choices(robot=str(file)))


@pytest.mark.parametrize("old, new, message", [
    ('name = "my_arm"', "", "the file: lacks 'name'"),
    ('name = "my_arm"', "name = 3", "the file: name is 3, expected text"),
    ('default_prompt = "pick', 'defualt_prompt = "pick', "the file: the key 'defualt_prompt' is unknown"),
    ('layout = "CHW"', 'layout = "BGR"', r"\[\[cameras\]\] 0: layout is 'BGR', one of HWC, CHW, any"),
    ('key = "wrist"', "key = []", r"\[\[cameras\]\] 1: \[\] is no key"),
    ('units = ["deg", "deg"]', 'units = ["deg"]', r"\[\[state\]\] 0: there are 1 units for 2 names"),
    ('names = ["gripper"]', 'names = ["elbow"]', "the state name 'elbow' stands twice"),
    ("delta = [2, -1]", "delta = [3, -1]", r"delta: is about 4 actions, there are 3"),
    ("delta = [2, -1]", "delta = [0]", "delta: is .0., expected"),
    ('dims = ["gripper"]', 'dims = ["hand"]', "'hand' is no name of the state or the actions"),
    ('kind = "linear"', 'kind = "log"', r"\[\[convert\]\] 0: kind is 'log', one of negate, linear, aloha_gripper"),
    ("high = 100", "high = 0", "a linear conversion needs low and high, two different numbers"),
    ("state_in_prompt = false", "state_in_promt = false", r"\[defaults\]: 'state_in_promt' is unknown"),
    ("state_in_prompt = false", 'state_in_prompt = "no"', "state_in_prompt: is 'no', expected true, false"),
    ("[actions]", "[actoins]", "the file: lacks 'actions'"),
    ("[actions]", "[actions", "is not TOML"),
])  # fmt: skip
def test_descriptions_that_are_wrong(arm, old, new, message):
    file = arm((old, new))
    with pytest.raises(PlanError, match=message) as error:
        read_robot(file)
    assert str(error.value).startswith(f"{file}: ")


def test_files_that_are_no_robots(tmp_path):
    with pytest.raises(PlanError, match="none.toml: cannot be read"):
        load_robot(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="bad.toml: is not TOML"):
        load_robot(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize("name", [name for name in ROBOT_NAMES if name != "none"])
def test_a_description_survives_a_plan(name):
    robot = load_robot(name)
    assert Robot.from_json(json.loads(json.dumps(robot.to_json()))) == robot
    with pytest.raises(PlanError, match="'wheels' is unknown to this duq"):
        Robot.from_json(robot.to_json() | {"wheels": 4})
    for config in (CONFIG, PI05):
        old, new = Preprocessor(config, robot=name), Preprocessor(config, robot=Robot.from_json(robot.to_json()))
        observation = OBSERVATIONS[name]()
        assert np.array_equal(old.model_inputs(observation).state, new.model_inputs(observation).state)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_masks_in_both_notations(mask):
    from duq.runtime.robots import _mask

    runs = []
    for delta in mask:
        sign = 1 if delta else -1
        if runs and (runs[-1] > 0) == delta:
            runs[-1] += sign
        else:
            runs.append(sign)
    expected = tuple(mask) if any(mask) else ()
    assert _mask(mask, len(mask)) == expected == _mask(runs, len(mask))


@pytest.mark.parametrize("action_dim, robot, message", [
    (7, "libero", "robot libero has a state of 8, but the policy takes 7"),
    (7, "aloha", "robot aloha has 14 actions, but the policy predicts 7"),
    (13, "aloha", "14 actions, but the policy predicts 13"),
])  # fmt: skip
def test_a_robot_that_does_not_fit_the_model(action_dim, robot, message):
    with pytest.raises(PlanError, match=message):
        Preprocessor(replace(CONFIG, action_dim=action_dim), robot=robot)
    Preprocessor(replace(PI05, action_dim=8), robot="libero")  # pi0.5 reads the state from the prompt


# --- from the command line into the plan


def test_a_plan_shows_and_runs_its_settings(command_line, checkpoints, tmp_path):
    out = tmp_path / "a.plan"
    ran = command_line(
        compile_main,
        checkpoints["aloha pi0"],
        "--config",
        "pi0_aloha_sim",
        "--quant",
        "none",
        "--num-steps",
        2,
        "--out",
        out,
    )
    assert ran.code == 0, ran.err
    shown = re.sub(r"\s+", " ", re.sub(r"[│─┌┐└┘├┤]", " ", ran.out))
    for text in (
        "pi0_aloha_sim",
        "aloha: state 14, actions 14",
        "'Transfer cube'",
        "resized as openpi",
        "denoising steps 2 --num-steps",
    ):
        assert text in shown, shown
    manifest = Plan(out).manifest
    assert manifest["training_config"] == "pi0_aloha_sim" and manifest["robot"] == "aloha" and manifest["num_steps"] == 2
    observation = OBSERVATIONS["aloha"]()
    del observation["tokenized_prompt"], observation["tokenized_prompt_mask"]
    policy = Policy(out)
    noise = np.zeros((50, 32), np.float32)
    said = policy.infer(observation | {"prompt": "Transfer cube"}, noise)["actions"]
    assert np.array_equal(policy.infer(observation, noise)["actions"], said)
    assert not np.array_equal(policy.infer(observation | {"prompt": "wave"}, noise)["actions"], said)


def test_settings_of_a_lerobot_plan_are_the_checkpoints(checkpoints, tmp_path):
    """Also for who compiles from Python and says nothing: steps, deltas and resizing come from the files."""
    path = edited(checkpoints["lerobot"], tmp_path, lambda data: data.update(num_inference_steps=3))
    with Progress(disable=True) as progress:
        compile_policy(
            load_checkpoint(path),
            Quantization(load_recipe("none", environment={})),
            tmp_path / "a.plan",
            Options(),
            progress,
        )
    manifest = Plan(tmp_path / "a.plan").manifest
    assert manifest["num_steps"] == 3 and manifest["transforms"]["resize"] == "lerobot" and manifest["float_images"]


def test_nothing_is_written_when_something_is_asked(command_line, checkpoints, tmp_path):
    ran = command_line(
        compile_main, checkpoints["aloha pi0"], "--robot", "aloha", "--quant", "none", "--out", tmp_path / "a.plan"
    )
    assert ran.code == 2 and ran.err.startswith("error: ") and not list(tmp_path.iterdir())


def test_settings_are_known_by_name():
    with pytest.raises(PlanError, match="setting 'speed' is unknown to this duq"):
        Preprocessor(CONFIG, transforms={"speed": 3})
    with pytest.raises(PlanError, match="resize is 'nearest', expected openpi or lerobot"):
        Preprocessor(CONFIG, transforms={"resize": "nearest"})
    with pytest.raises(PlanError, match="delta_actions is 'yes', expected bool"):
        Preprocessor(CONFIG, transforms={"delta_actions": "yes"})
    assert PolicySettings(None, {}).robot_name == "none"
