"""What a LeRobot checkpoint says around its weights is applied, known to be harmless, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.lerobot import CONFIG_KEYS, check_config
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.errors import CheckpointError
from duq.runtime.preprocess import LeRobotNormalizer, Preprocessor

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE_FILES = {
    PREPROCESSOR: "policy_preprocessor_step_0_normalizer_processor.safetensors",
    POSTPROCESSOR: "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
}
VISUAL = {"type": "VISUAL", "shape": [3, 224, 224]}
STATE = {"type": "STATE", "shape": [8]}
OBSERVATION = {
    "observation/image": np.zeros((224, 224, 3), np.uint8),
    "observation/state": np.linspace(-0.5, 0.5, 8).astype(np.float32),
    "prompt": "pick up",
}


@pytest.fixture(scope="session")
def policies(tmp_path_factory) -> dict[str, Path]:
    """LIBERO policies in LeRobot's layout, by type. Read only."""
    directory, sizes = tmp_path_factory.mktemp("lerobot"), {"depth": 1, "vision_depth": 1}
    return {
        kind: make_checkpoint(directory / kind, pi05=kind == "pi05", layout="lerobot", robot="libero", **sizes)
        for kind in ("pi0", "pi05")
    }


@pytest.fixture
def copy(policies, tmp_path):
    """copy(kind, **changes of config.json): a policy of one's own to edit."""

    def run(kind: str = "pi0", **changes) -> Path:
        path = shutil.copytree(policies[kind], tmp_path / "policy", dirs_exist_ok=True)
        write(path / "config.json", **changes)
        return path

    return run


def write(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def steps(path: Path, pipeline: str, change) -> None:
    """Edits the steps of a pipeline in place: change(list of steps)."""
    listed = json.loads((path / pipeline).read_text())["steps"]
    change(listed)
    write(path / pipeline, steps=listed)


def statistics(path: Path, pipeline: str, change) -> None:
    stored = load_file(path / STATE_FILES[pipeline])
    change(stored)
    save_file(stored, path / STATE_FILES[pipeline])


def preprocessor(path: Path, robot="libero") -> Preprocessor:
    found = load_checkpoint(path)
    return Preprocessor(
        found.config, robot=found.settings.robot if robot == "lerobot" else robot, layout=found.layout,
        norm_stats=found.norm_stats, tokenizer=(path / "tokenizer.model").read_bytes(),
        transforms=found.settings.transforms,
    )  # fmt: skip


def words(path: Path, observation=OBSERVATION, robot="libero") -> str:
    policy = preprocessor(path, robot)
    inputs = policy.model_inputs(observation)
    return policy.tokenizer._model.decode(inputs.tokens[inputs.token_mask].tolist())


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) or "contradicts the tensors:" in str(error.value)


# --- config.json


def test_denoising_steps_horizon_and_prompt_slots_are_the_checkpoints(copy):
    said = load_checkpoint(copy(num_inference_steps=3, chunk_size=17, tokenizer_max_length=64)).settings
    assert (said.num_steps, said.action_horizon, said.max_prompt_tokens) == (3, 17, 64)
    path = copy()
    settings = json.loads((path / "config.json").read_text())
    for key in ("num_inference_steps", "chunk_size", "tokenizer_max_length"):
        del settings[key]
    (path / "config.json").write_text(json.dumps(settings | {"num_steps": 7}))  # LeRobot 0.3's name
    said = load_checkpoint(path).settings
    assert (said.num_steps, said.action_horizon, said.max_prompt_tokens) == (7, None, None)


@pytest.mark.parametrize("change, message", [
    ({"num_steps": 4}, "num_inference_steps and num_steps differ"),
    ({"num_inference_steps": 0}, '"num_inference_steps" is 0, expected a whole number from 1 to'),
    ({"n_obs_steps": 2}, '"n_obs_steps" is 2'),
    ({"min_period": 1e-2}, '"min_period" is 0.01'),
    ({"max_period": 2.0}, '"max_period" is 2.0'),
    ({"adapt_to_pi_aloha": True}, '"adapt_to_pi_aloha" is True'),
    (
        {"use_visual_memory": True, "use_delta_joint_actions_aloha": True},
        "use_visual_memory.*; .*use_delta_joint_actions_aloha",
    ),
    ({"resize_imgs_with_padding": [256, 256]}, "vision.image_size 256"),
    ({"image_resolution": 224}, r'"image_resolution" is 224, expected \[height, width\]'),
    ({"input_features": ["top"]}, '"input_features" must hold an object'),
])  # fmt: skip
def test_settings_that_change_the_numbers_are_refused_by_name(copy, change, message):
    refused(copy(**change), message)


@given(
    st.sampled_from(sorted(key for key, meaning in CONFIG_KEYS.items() if meaning == "harmless")), st.integers() | st.text()
)
def test_harmless_settings_may_have_any_value(key, value):
    assert check_config({key: value, "optimizer_anything": value, "scheduler_anything": value}) == ()


def test_unknown_settings_are_listed(copy):
    assert load_checkpoint(copy(color="red", depth=3)).settings.ignored == ("color: 'red'", "depth: 3")


def test_cameras_come_in_the_order_of_the_features(copy):
    features = {"observation.images.wrist": VISUAL, "observation.images.top": VISUAL, "observation.state": STATE}
    robot = load_checkpoint(copy(input_features=features)).settings.robot
    assert [camera.name for camera in robot.cameras] == ["observation.images.wrist", "observation.images.top"]
    first, second = (np.full((224, 224, 3), value, np.uint8) for value in (50, 200))
    observation = {
        "observation.images.top": second,
        "observation.images.wrist": first,
        "observation.state": np.zeros(8),
        "task": "go",
    }
    inputs = preprocessor(copy(input_features=features), "lerobot").model_inputs(observation)
    assert inputs.image_mask.tolist() == [True, True, False]
    pixels = inputs.pixels()
    assert np.allclose(pixels[0], 50 / 127.5 - 1, atol=1e-6) and np.allclose(pixels[1], 200 / 127.5 - 1, atol=1e-6)


def test_images_of_the_models_size_are_the_same_pixels_by_every_rule(copy):
    """As bytes, which is faster; beside an image that is resized, as floats."""
    policy = preprocessor(copy(), "lerobot")
    every = np.resize(np.arange(256, dtype=np.uint8), (224, 224, 3))
    observation = {"observation.images.image": every, "observation.state": np.zeros(8), "task": "go"}
    alone = policy.model_inputs(observation)
    beside = policy.model_inputs(observation | {"observation.images.wrist_image": np.zeros((100, 80, 3), np.uint8)})
    floats = policy.model_inputs(observation | {"observation.images.image": every / np.float32(255)})
    assert alone.images.dtype == np.uint8 and beside.images.dtype == floats.images.dtype == np.float32
    assert np.array_equal(alone.pixels()[0], beside.pixels()[0]) and np.array_equal(alone.pixels()[0], floats.pixels()[0])


def test_four_cameras_are_refused_and_empty_ones_do_not_count(copy):
    features = {f"observation.images.{name}": VISUAL for name in ("a", "b", "c", "d")} | {"observation.state": STATE}
    refused(copy(input_features=features), r"4 cameras \(observation.images.a, .*d\), but at most 3")
    features["observation.images.empty_camera_0"] = features.pop("observation.images.d")
    robot = load_checkpoint(copy(input_features=features, empty_cameras=1)).settings.robot
    assert [camera.name[-1] for camera in robot.cameras] == ["a", "b", "c"]


def test_state_wider_than_the_actions(copy):
    """pi0's state_proj has max_state_dim columns, action_in_proj max_action_dim; pi0.5 has no linear for the state."""
    path = copy(max_state_dim=40)
    weights = load_file(path / "model.safetensors")
    wide = torch.zeros(256, 40, dtype=torch.bfloat16)
    wide[:, :32] = weights["model.state_proj.weight"]
    save_file(weights | {"model.state_proj.weight": wide}, path / "model.safetensors")
    config = load_checkpoint(path).config
    assert (config.state_width, config.action_dim) == (40, 32)
    assert preprocessor(path).model_inputs(OBSERVATION).state.shape == (40,)
    refused(copy(max_state_dim=16), "max_state_dim: state_width 16")
    assert load_checkpoint(copy("pi05", max_state_dim=14)).config.state_width == 32


def test_adapter_without_its_weights_is_no_base(copy):
    path = copy()
    (path / "adapter_config.json").write_text("{}")
    refused(path, "adapter_config.json")


def test_a_policy_trained_with_an_adapter_is_not_compiled_without_it(copy):
    refused(copy(use_peft=True), '"use_peft" is true, but there is no adapter .*give the adapter')
    load_checkpoint(copy(use_peft=False))


# --- the prompt


def test_only_the_robots_numbers_are_in_the_prompt(copy):
    text = words(copy("pi05"))
    assert text.startswith("Task: pick up, State: ") and len(text.partition("State: ")[2].partition(";")[0].split()) == 8


@pytest.mark.parametrize("text", ["pick_up the cup", " pick up ", "pick up\n", "pick\nup"])
def test_pi0s_task_is_not_cleaned(copy, text):
    assert words(copy(), OBSERVATION | {"prompt": text}) == (text if text.endswith("\n") else f"{text}\n")
    assert words(copy("pi05"), OBSERVATION | {"prompt": text}).startswith(
        f"Task: {text.strip().replace('_', ' ').replace(chr(10), ' ')},"
    )


def test_tokenizer_step_is_applied(copy):
    path = copy(tokenizer_max_length=48)
    newline = {"registry_name": "pi0_new_line_processor", "config": {}}
    tokenizer = {
        "registry_name": "tokenizer_processor",
        "config": {"max_length": 20, "tokenizer_name": "google/paligemma-3b-pt-224"},
    }
    steps(path, PREPROCESSOR, lambda listed: listed.extend([newline, tokenizer]))
    assert load_checkpoint(path).settings.max_prompt_tokens == 20
    tokenizer["config"]["padding_side"] = "left"
    steps(path, PREPROCESSOR, lambda listed: listed.__setitem__(2, tokenizer))
    refused(path, "step 2, tokenizer_processor: padding_side is 'left'")
    steps(path, PREPROCESSOR, lambda listed: listed.pop(1))
    tokenizer["config"]["padding_side"] = "right"
    steps(path, PREPROCESSOR, lambda listed: listed.__setitem__(1, tokenizer))
    refused(path, "has no pi0_new_line_processor")


# --- the pipelines


@pytest.mark.parametrize("pipeline, step, message", [
    (
        PREPROCESSOR, {"registry_name": "image_crop_resize_processor", "config": {}},
        "step 1, image_crop_resize_processor: .*unknown",
    ),
    (PREPROCESSOR, {"class": "my.module.Step", "config": {}}, "step 1, my.module.Step: this step is unknown"),
    (POSTPROCESSOR, {"registry_name": "map_delta_action_to_robot_action"}, "map_delta_action_to_robot_action"),
    (PREPROCESSOR, {"registry_name": "device_processor", "config": {"float_dtype": "bfloat16"}}, "float_dtype bfloat16"),
    (PREPROCESSOR, {"registry_name": "rename_observations_processor", "config": {"rename_map": [1]}}, "rename_map is .1."),
    (
        PREPROCESSOR, {"registry_name": "to_batch_processor", "config": {"twice": True}},
        "its setting 'twice' .True. is unknown",
    ),
    (PREPROCESSOR, {"registry_name": "pi05_prepare_state_tokenizer_processor_step"}, "belongs to the other policy type"),
    (POSTPROCESSOR, {"registry_name": "absolute_actions_processor", "config": {"enabled": True}}, None),
])  # fmt: skip
def test_steps_are_applied_or_refused_by_name(copy, pipeline, step, message):
    path = copy()
    steps(path, pipeline, lambda listed: listed.append(step))
    if message:
        refused(path, message)
    else:
        load_checkpoint(path)


def test_harmless_steps(copy):
    path = copy()
    for pipeline in (PREPROCESSOR, POSTPROCESSOR):
        steps(path, pipeline, lambda listed: listed.extend([
            {"registry_name": "to_batch_processor", "config": {}},
            {"registry_name": "device_processor", "config": {"device": "cuda", "float_dtype": None}},
        ]))  # fmt: skip
    assert load_checkpoint(path).norm_stats == load_checkpoint(copy()).norm_stats


def test_a_state_binned_before_it_is_normalized_is_refused(copy):
    path = copy("pi05")
    step = {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {"max_state_dim": 32}}
    steps(path, PREPROCESSOR, lambda listed: listed.append(step))
    assert load_checkpoint(path).settings.transforms["pad_state_in_prompt"] == 0
    steps(path, PREPROCESSOR, lambda listed: listed.reverse())
    refused(path, "pi05_prepare_state_tokenizer_processor_step comes before normalizer_processor")


def test_renamed_observations_are_taken_under_both_names(copy):
    path = copy()
    names = {"observation.images.front": "observation.images.image", "joints": "observation.state"}
    steps(
        path,
        PREPROCESSOR,
        lambda listed: listed.insert(
            0, {"registry_name": "rename_observations_processor", "config": {"rename_map": names}}
        ),
    )
    policy = preprocessor(path, "lerobot")
    image, state = np.full((224, 224, 3), 9, np.uint8), np.linspace(0, 1, 8)
    old = policy.model_inputs({"observation.images.front": image, "joints": state, "task": "go"})
    new = policy.model_inputs({"observation.images.image": image, "observation.state": state, "task": "go"})
    assert np.array_equal(old.images, new.images) and np.array_equal(old.state, new.state)


# --- normalization


def modes(path: Path, state: str, action: str, visual: str = "IDENTITY") -> None:
    for pipeline in (PREPROCESSOR, POSTPROCESSOR):
        norm_map = {"VISUAL": visual, "STATE": state, "ACTION": action}
        steps(path, pipeline, lambda listed, norm_map=norm_map: listed[0]["config"].update(norm_map=norm_map))


PAIRS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MEAN_STD": ("mean", "std")}


def lerobot_normalize(x: torch.Tensor, mode: str, low: torch.Tensor, high: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """What LeRobot 0.6 documents: a span of zero becomes eps, so that a value that never changed is -1."""
    if mode == "MEAN_STD":
        return (x - low) / (high + eps)
    span = torch.where(high == low, torch.tensor(eps), high - low)
    return 2 * (x - low) / span - 1


def lerobot_unnormalize(
    y: torch.Tensor, mode: str, low: torch.Tensor, high: torch.Tensor, eps: float = 1e-8
) -> torch.Tensor:
    if mode == "MEAN_STD":
        return y * high + low
    return (y + 1) / 2 * torch.where(high == low, torch.tensor(eps), high - low) + low


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("mode", PAIRS)
def test_every_mode_as_lerobot_with_joints_that_never_move(copy, kind, mode):
    path, (first, second) = copy(kind), PAIRS[mode]
    modes(path, mode, mode)

    def constant(stored):
        for feature, dims in (("observation.state", 8), ("action", 7)):
            generator = torch.Generator().manual_seed(dims)
            low, high = torch.randn(dims, generator=generator), 3 + torch.rand(dims, generator=generator)
            high[3] = 0.0 if mode == "MEAN_STD" else low[3]
            stored[f"{feature}.{first}"], stored[f"{feature}.{second}"] = low, high

    for pipeline in (PREPROCESSOR, POSTPROCESSOR):
        statistics(path, pipeline, constant)
    stored = load_file(path / STATE_FILES[PREPROCESSOR])
    state = torch.linspace(-2, 2, 8)
    state[3] = stored[f"observation.state.{first}"][3]
    policy = preprocessor(path)
    found = policy.model_inputs(OBSERVATION | {"observation/state": state.numpy()}).state[:8]
    low, high = stored[f"observation.state.{first}"], stored[f"observation.state.{second}"]
    assert np.array_equal(found, lerobot_normalize(state, mode, low, high).numpy())
    assert found[3] == (0 if mode == "MEAN_STD" else -1)
    actions = torch.linspace(-1, 1, 3 * 32).reshape(3, 32)
    low, high = stored[f"action.{first}"], stored[f"action.{second}"]
    np.testing.assert_allclose(
        policy.robot_actions(actions.numpy(), OBSERVATION),
        lerobot_unnormalize(actions[:, :7], mode, low, high),
        rtol=1e-6,
        atol=1e-6,
    )


@given(
    st.sampled_from(sorted(PAIRS)),
    st.sampled_from(["lerobot", "lerobot-0.3"]),
    st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3),
)
def test_unnormalize_inverts_normalize(mode, rule, values):
    stats = {
        "mode": mode,
        "epsilon": 1e-8,
        **{name: [1.0 + index, 3.0 + index, 9.0] for index, name in enumerate(PAIRS[mode])},
    }
    normalizer = LeRobotNormalizer(stats, "state", 2, rule)
    found = normalizer.unnormalize(normalizer.normalize(np.array(values[:2])))
    np.testing.assert_allclose(found, values[:2], rtol=1e-5, atol=1e-4)


def test_identity_needs_no_statistics(copy):
    path = copy()
    modes(path, "IDENTITY", "IDENTITY")
    for pipeline in (PREPROCESSOR, POSTPROCESSOR):
        statistics(path, pipeline, lambda stored: (stored.clear(), stored.update(unused=torch.zeros(1))))
    policy = preprocessor(path)
    assert np.array_equal(policy.model_inputs(OBSERVATION).state[:8], OBSERVATION["observation/state"])
    actions = np.ones((2, 32), np.float32)
    assert np.array_equal(policy.robot_actions(actions, OBSERVATION), actions[:, :7])


def test_a_mode_needs_only_its_own_statistics(copy):
    path = copy("pi05")
    for pipeline in (PREPROCESSOR, POSTPROCESSOR):
        statistics(
            path,
            pipeline,
            lambda stored: [stored.pop(f"{f}.{s}") for f in ("observation.state", "action") for s in ("mean", "std")],
        )
    assert load_checkpoint(path).norm_stats["state"]["mode"] == "QUANTILES"
    for pipeline, feature in ((PREPROCESSOR, "observation.state"), (POSTPROCESSOR, "action")):
        statistics(path, pipeline, lambda stored, feature=feature: stored.pop(f"{feature}.q99"))
    refused(path, "QUANTILES normalization of observation.state needs q01 and q99|needs q99")


def test_state_and_actions_may_differ_in_mode_and_actions_come_from_the_postprocessor(copy):
    path = copy()
    modes(path, "QUANTILES", "MEAN_STD")
    statistics(path, POSTPROCESSOR, lambda stored: stored.update({"action.mean": torch.full((7,), 5.0)}))
    stats = load_checkpoint(path).norm_stats
    assert stats["state"]["mode"] == "QUANTILES" and stats["actions"]["mean"] == [5.0] * 7
    (path / POSTPROCESSOR).unlink()
    found = load_checkpoint(path)
    assert found.norm_stats["actions"]["mean"] != [5.0] * 7 and "no policy_postprocessor.json" in found.notes[0]


def test_normalized_pixels_are_refused(copy):
    path = copy()
    features = {"observation.images.image": VISUAL, "observation.state": STATE}
    for pipeline in (PREPROCESSOR, POSTPROCESSOR):
        steps(path, pipeline, lambda listed: listed[0]["config"].update(features=features))
    modes(path, "MEAN_STD", "MEAN_STD", visual="MEAN_STD")
    load_checkpoint(path)  # LeRobot leaves a feature without statistics as it is
    statistics(path, PREPROCESSOR, lambda stored: stored.update({"observation.images.image.mean": torch.zeros(3, 1, 1)}))
    refused(path, "normalizes the pixels of observation.images.image .MEAN_STD.")


def test_a_state_that_the_normalizer_does_not_list_is_left_alone(copy):
    path = copy()
    steps(
        path,
        PREPROCESSOR,
        lambda listed: listed[0]["config"].update(normalize_observation_keys=["observation.images.image"]),
    )
    assert load_checkpoint(path).norm_stats["state"] == {"mode": "IDENTITY", "epsilon": 1e-8}


@pytest.mark.parametrize(
    "mode, message", [("Z_SCORE", "'Z_SCORE' of observation.state is unknown"), ("MIN_MAX", "needs min and max; there is")]
)
def test_modes_that_cannot_be_applied(copy, mode, message):
    path = copy()
    modes(path, mode, mode)
    refused(path, message)


# --- relative actions


def relative(path: Path) -> np.ndarray:
    """What is added to the actions of an observation whose state is 1, 2, ... 8."""
    policy = load_checkpoint(path)
    plain = Preprocessor(policy.config, robot="libero", layout="lerobot", norm_stats=policy.norm_stats,
                         tokenizer=(path / "tokenizer.model").read_bytes())  # fmt: skip
    observation = OBSERVATION | {"observation/state": np.arange(1, 9, dtype=np.float32)}
    actions = np.zeros((1, 32), np.float32)
    return (preprocessor(path).robot_actions(actions, observation) - plain.robot_actions(actions, observation))[0]


NAMES = ["shoulder.pos", "elbow.pos", "wrist.pos", "roll.pos", "pitch.pos", "yaw.pos", "Gripper.pos"]


@pytest.mark.parametrize("changes, expected", [
    ({"action_feature_names": NAMES}, [1, 2, 3, 4, 5, 6, 0]),  # "gripper" is excluded by default, whatever its case
    ({"action_feature_names": NAMES, "relative_exclude_joints": ["elbow", "roll.pos"]}, [1, 0, 3, 0, 5, 6, 7]),
    ({"action_feature_names": NAMES, "relative_exclude_joints": []}, [1, 2, 3, 4, 5, 6, 7]),
    ({}, [1, 2, 3, 4, 5, 6, 7]),  # without names nothing can be excluded
])  # fmt: skip
def test_relative_actions_add_the_raw_state(copy, changes, expected):
    path = copy(use_relative_actions=True, **changes)
    np.testing.assert_allclose(relative(path), expected, rtol=1e-6)


def test_relative_actions_as_a_step(copy):
    path = copy()
    settings = json.loads((path / "config.json").read_text())
    settings.pop("use_relative_actions")
    (path / "config.json").write_text(json.dumps(settings))
    step = {
        "registry_name": "relative_actions_processor",
        "config": {"enabled": True, "exclude_joints": ["gripper"], "action_names": NAMES},
    }
    steps(path, PREPROCESSOR, lambda listed: listed.insert(0, step))
    np.testing.assert_allclose(relative(path), [1, 2, 3, 4, 5, 6, 0], rtol=1e-6)
    write(path / "config.json", use_relative_actions=False)
    refused(path, "is False, but policy_preprocessor.json has relative_actions_processor on")
    write(path / "config.json", use_relative_actions=True)
    steps(path, PREPROCESSOR, lambda listed: listed.reverse())
    refused(path, "normalizer_processor comes before relative_actions_processor")


# --- LeRobot 0.3


def test_statistics_among_the_weights(copy):
    path = copy()
    for file in (PREPROCESSOR, POSTPROCESSOR, *STATE_FILES.values()):
        (path / file).unlink()
    weights = load_file(path / "model.safetensors")
    low, high = torch.linspace(-1, 0, 8), torch.linspace(1, 2, 8)
    high[2] = low[2]
    weights |= {"normalize_inputs.buffer_observation_state.min": low, "normalize_inputs.buffer_observation_state.max": high}
    weights |= {
        "unnormalize_outputs.buffer_action.mean": torch.full((7,), 2.0),
        "unnormalize_outputs.buffer_action.std": torch.full((7,), 3.0),
    }
    weights |= {
        "normalize_targets.buffer_action.mean": torch.zeros(7),
        "normalize_targets.buffer_action.std": torch.ones(7),
    }
    save_file(weights, path / "model.safetensors")
    write(path / "config.json", normalization_mapping={"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MEAN_STD"})
    found = load_checkpoint(path)
    assert found.norm_stats["rule"] == "lerobot-0.3" and found.settings.lerobot_version == "0.3"
    assert found.settings.transforms["resize"] == "lerobot-0.3"
    policy = preprocessor(path)
    state = torch.linspace(-0.5, 0.5, 8)
    expected = (state - low) / (high - low + 1e-8) * 2 - 1
    assert np.array_equal(
        policy.model_inputs(OBSERVATION | {"observation/state": state.numpy()}).state[:8], expected.numpy()
    )
    assert np.array_equal(policy.robot_actions(np.ones((1, 32), np.float32), OBSERVATION), np.full((1, 7), 5.0, np.float32))
