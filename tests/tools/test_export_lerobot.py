"""A plan as a folder for LeRobot: its files, what is refused, and what is left when writing fails.

What LeRobot itself does with it: tests/peers/lerobot_plugin.py.
"""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.commands import compile_main
from duq.runtime import Policy
from duq.runtime.errors import PlanError
from duq.runtime.lerobot_folder import FILES, LeRobotFolder, lerobot_config, pipelines
from duq.runtime.plan import Plan
from duq.tools.export_lerobot import main as export_main

IMAGE, WRIST = "observation.images.image", "observation.images.wrist_image"
SIZES = dict(depth=1, vision_depth=1, action_horizon=8)
TOML = """
name = "my_arm"
prompt_keys = ["task", "prompt"]
[[cameras]]
key = "observation.images.image"
[[state]]
key = "observation.state"
names = ["x", "y", "z", "roll", "pitch", "yaw", "left", "right"]
[actions]
names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
[defaults]
delta_actions = false
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A LeRobot checkpoint whose loop executes three of eight actions. Read only."""
    path = make_checkpoint(tmp_path_factory.mktemp("lerobot") / "pi0", layout="lerobot", robot="libero", **SIZES)
    config = json.loads((path / "config.json").read_text())
    config |= {"n_action_steps": 3}
    config["input_features"][IMAGE]["shape"] = [3, 240, 320]
    config["input_features"][WRIST]["shape"] = [128, 160, 3]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def compiled(checkpoint, tmp_path_factory, trace_once) -> Path:
    """What `duq-compile --lerobot` writes. Read only."""
    out = tmp_path_factory.mktemp("exports") / "my_arm"
    arguments = [str(checkpoint), "--quant", "none", "--out", str(out), "--lerobot"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["duq-compile", *arguments])
        with pytest.raises(SystemExit) as end:
            compile_main()
    assert not end.value.code
    return out


@pytest.fixture(scope="module")
def manifest(compiled) -> dict:
    return Plan(compiled / "engine.plan").manifest


def test_the_folder_has_all_files_and_no_other(compiled):
    assert sorted(file.name for file in compiled.iterdir()) == sorted(FILES)
    assert [file.name for file in compiled.parent.iterdir()] == ["my_arm"]


def test_the_configuration_is_the_checkpoints(compiled):
    config = json.loads((compiled / "config.json").read_text())
    assert config["type"] == "duq" and config["chunk_size"] == 8 and config["n_action_steps"] == 3
    assert config["input_features"] == {
        IMAGE: {"type": "VISUAL", "shape": [3, 240, 320]},
        WRIST: {"type": "VISUAL", "shape": [3, 128, 160]},
        "observation.state": {"type": "STATE", "shape": [8]},
    }
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [7]}}


def test_no_step_of_the_pipelines_changes_a_number(compiled):
    """So that the plan alone normalizes; LeRobot's commands ask for the first and the third of these by name."""
    steps = {
        name: [step["registry_name"] for step in json.loads((compiled / name).read_text())["steps"]]
        for name in ("policy_preprocessor.json", "policy_postprocessor.json")
    }
    assert steps == {
        "policy_preprocessor.json": ["rename_observations_processor", "to_batch_processor", "device_processor"],
        "policy_postprocessor.json": ["device_processor"],
    }


def test_the_model_card_says_what_it_is(compiled):
    text = (compiled / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: lerobot\n") and "8, 3" in text and IMAGE in text
    assert "none (floating point)" in text and "{" not in text


def test_a_plan_is_exported_as_compiled_and_runs(compiled, command_line, tmp_path):
    ran = command_line(export_main, compiled / "engine.plan", tmp_path / "again")
    assert ran.code == 0 and "executes 3 of 8 actions" in ran.out, ran.err
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (compiled / name).read_bytes(), name
    image = np.random.default_rng(0).random((3, 240, 320), np.float32)
    observation = {IMAGE: image, WRIST: image, "observation.state": np.zeros(8, np.float32), "task": "wave"}
    noise = np.zeros((8, 32), np.float32)
    found = [
        Policy(folder / "engine.plan").infer(observation, noise)["actions"] for folder in (compiled, tmp_path / "again")
    ]
    assert found[0].shape == (8, 7) and np.array_equal(*found)


def test_options_override_the_checkpoint(compiled, command_line, tmp_path):
    arguments = ("--n-action-steps", "5", "--image-shape", f"{IMAGE}=480x640")
    assert command_line(export_main, compiled / "engine.plan", tmp_path / "out", *arguments).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_action_steps"] == 5 and config["input_features"][IMAGE]["shape"] == [3, 480, 640]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n-action-steps", "9"), "n_action_steps is 9, but a chunk has 8 actions"),
        (("--image-shape", "observation.images.top=4x4"), f"observation.images.top: .* has the cameras {IMAGE}, {WRIST}"),
        (("--image-shape", f"{IMAGE}=4"), "expected CAMERA=HEIGHTxWIDTH"),
        (("--image-shape", f"{IMAGE}=0x4"), "expected CAMERA=HEIGHTxWIDTH"),
    ],
)
def test_options_that_do_not_fit_are_refused(compiled, command_line, tmp_path, arguments, message):
    ran = command_line(export_main, compiled / "engine.plan", tmp_path / "out", *arguments)
    assert ran.code == 2 and re.search(message, ran.err) and not list(tmp_path.iterdir())


ROBOT_FAULTS = {
    "camera 'observation/image'": lambda robot: robot["cameras"][0].update(key=["observation/image"]),
    "camera 'images.top'": lambda robot: robot["cameras"][1].update(key=["images", "top"]),
    "camera 'observation.imagesx'": lambda robot: robot["cameras"][1].update(key=["observation.imagesx"]),
    "camera 'observation.images.top'": lambda robot: robot["cameras"][0].update(key=["observation", "images.top"]),
    "state of 'state'": lambda robot: robot["state"][0].update(key=["state"]),
    "state of 'observation.state', 'observation.state'": lambda robot: robot["state"].append(robot["state"][0]),
    "prompt from 'prompt'": lambda robot: robot.update(prompt_keys=["prompt"]),
}


@pytest.mark.parametrize("message", ROBOT_FAULTS)
def test_a_robot_in_other_terms_is_refused_by_name(manifest, message):
    changed = copy.deepcopy(manifest)
    ROBOT_FAULTS[message](changed["robot_description"])
    with pytest.raises(PlanError, match=message):
        lerobot_config(changed, "engine.plan")


def test_a_plan_of_bare_inputs_is_refused(manifest):
    with pytest.raises(PlanError, match="engine.plan.*--robot none"):
        lerobot_config(manifest | {"robot_description": None}, "engine.plan")


@pytest.mark.parametrize("shape", [None, [240, 320], [3, 240, 0], [4, 240, 320], ["3", 240, 320], "3x240x320"])
def test_images_of_unknown_size_are_asked_for(manifest, shape):
    """LeRobot's policy server resizes images to the size in config.json: a guess would change them."""
    shapes = {IMAGE: shape, WRIST: [3, 128, 160]}
    changed = manifest | {"lerobot_loop": manifest["lerobot_loop"] | {"image_shapes": shapes}}
    with pytest.raises(PlanError, match=f"--image-shape {IMAGE}=HEIGHTxWIDTH"):
        lerobot_config(changed, "engine.plan")
    assert lerobot_config(changed, "engine.plan", None, {IMAGE: (4, 5)})["input_features"][IMAGE]["shape"] == [3, 4, 5]


def test_other_names_of_a_feature_are_renamed_as_in_the_checkpoint(manifest):
    changed = copy.deepcopy(manifest)
    changed["robot_description"]["cameras"][1]["also"] = [["observation.images.hand"]]
    assert pipelines(changed)[0]["steps"][0]["config"] == {"rename_map": {"observation.images.hand": WRIST}}


def test_an_openpi_checkpoint_with_lerobots_keys(tiny_plans, command_line, tmp_path):
    """Its robot is described by a file; its images' size is not known, and asked for before compiling and exporting."""
    (tmp_path / "arm.toml").write_text(TOML)
    checkpoint = tiny_plans("pi0", "none").checkpoint
    common = (checkpoint, "--robot", tmp_path / "arm.toml", "--action-horizon", "8", "--quant", "none", "--out")
    ran = command_line(compile_main, *common, tmp_path / "arm", "--lerobot")
    assert ran.code == 2 and "duq-export-lerobot --image-shape" in ran.err and not (tmp_path / "arm").exists()
    assert command_line(compile_main, *common, tmp_path / "arm.plan").code == 0
    shape = ("--image-shape", f"{IMAGE}=256x256")
    assert command_line(export_main, tmp_path / "arm.plan", tmp_path / "arm", *shape).code == 0
    assert json.loads((tmp_path / "arm" / "config.json").read_text())["n_action_steps"] == 8


def test_a_robot_of_openpi_is_refused_before_compiling(tiny_plans, command_line, tmp_path):
    checkpoint = tiny_plans("pi0", "none").checkpoint
    arguments = ("--robot", "libero", "--action-horizon", "8", "--quant", "none", "--out", tmp_path / "out", "--lerobot")
    ran = command_line(compile_main, checkpoint, *arguments)
    assert ran.code == 2 and "observation/image" in ran.err and not list(tmp_path.iterdir())


# --- writing


def test_an_earlier_export_is_replaced(compiled, command_line, tmp_path):
    out = shutil.copytree(compiled, tmp_path / "out")
    (out / "README.md").unlink()
    assert command_line(export_main, compiled / "engine.plan", out, "--n-action-steps", "1").code == 0
    assert json.loads((out / "config.json").read_text())["n_action_steps"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out"] and (out / "README.md").exists()


@pytest.mark.parametrize("held", ["notes.txt", "model.safetensors", "config.json", "engine.plan", "README.md"])
def test_a_folder_with_other_files_is_left_alone(compiled, command_line, tmp_path, held):
    out = tmp_path / "out"
    out.mkdir()
    (out / held).write_text('{"type": "pi0"}')
    ran = command_line(export_main, compiled / "engine.plan", out)
    assert ran.code == 2 and "name another folder" in ran.err
    assert [file.read_text() for file in out.iterdir()] == ['{"type": "pi0"}']


def test_an_empty_folder_is_filled(compiled, command_line, tmp_path):
    (tmp_path / "out").mkdir()
    assert command_line(export_main, compiled / "engine.plan", tmp_path / "out").code == 0
    assert len(list((tmp_path / "out").iterdir())) == len(FILES)


@pytest.mark.parametrize("name", ["missing.plan", "README.md"])
def test_what_is_no_plan_is_refused(compiled, command_line, tmp_path, name):
    ran = command_line(export_main, compiled / name, tmp_path / "out")
    assert ran.code == 2 and name in ran.err and not list(tmp_path.iterdir())


def test_nothing_is_left_when_writing_fails(compiled, tmp_path):
    for exists in (False, True):
        if exists:
            shutil.copytree(compiled, tmp_path / "out")
        with pytest.raises(RuntimeError), LeRobotFolder(tmp_path / "out") as folder:
            folder.plan.write_bytes(b"half")
            raise RuntimeError
        assert [file.name for file in tmp_path.iterdir()] == ["out"] * exists
    assert (tmp_path / "out" / "engine.plan").read_bytes() == (compiled / "engine.plan").read_bytes()
