"""The robots' conversions, against values computed with openpi's own policies."""

import numpy as np
import pytest

from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.preprocess import Preprocessor
from duq.runtime.robots import load_robot
from duq.runtime.transforms import default_transforms
from tests.support.observations import ACTION_DIMS, CONFIG, OBSERVATIONS, PI05, aloha, droid, image, libero

MODEL_ACTIONS = np.linspace(-1, 1, 2 * 32).reshape(2, 32).astype(np.float32)


# --- ALOHA -----------------------------------------------------------------------------------------------------------

# openpi's AlohaInputs(adapt_to_pi=True) on aloha()["state"], and its AbsoluteActions and AlohaOutputs on MODEL_ACTIONS.
ALOHA_STATE = [-0.6, 0.5, 0.4, -0.3, -0.2, -0.1, -0.5130776069, 0.1, -0.2, -0.3, 0.4, 0.5, 0.6, 0.5016401573]
ALOHA_ACTIONS = [
    [-1.6, 0.46825397, 0.53650794, -1.2047619, -1.07301587, -0.94126984, 0.17013501,
     -0.67777778, 0.94603175, 1.01428571, -0.28253968, -0.15079365, -0.01904762, 0.27533893],
    [-0.58412698, -0.54761905, -0.47936508, -0.18888889, -0.05714286, 0.07460317, 0.65106718,
     0.33809524, -0.06984127, -0.0015873, 0.73333333, 0.86507937, 0.9968254, 0.75627109],
]  # fmt: skip


def test_aloha_as_openpi():
    policy = Preprocessor(CONFIG, robot="aloha")
    inputs = policy.model_inputs(aloha())
    assert np.allclose(inputs.state[:14], ALOHA_STATE, atol=1e-7) and not inputs.state[14:].any()
    actions = policy.robot_actions(MODEL_ACTIONS, aloha())
    assert actions.shape == (2, 14) and actions.dtype == np.float32
    assert np.allclose(actions, ALOHA_ACTIONS, atol=1e-6)


def test_aloha_cameras_are_channels_first():
    observation = aloha()
    inputs = Preprocessor(CONFIG, robot="aloha").model_inputs(observation)
    for slot, camera in enumerate(("cam_high", "cam_left_wrist", "cam_right_wrist")):
        assert np.array_equal(inputs.images[slot], observation["images"][camera].transpose(1, 2, 0))


def test_aloha_without_adaptation_or_deltas():
    policy = Preprocessor(CONFIG, robot="aloha", transforms={"adapt_to_pi": False, "delta_actions": False})
    assert np.allclose(policy.model_inputs(aloha()).state[:14], aloha()["state"])
    assert np.array_equal(policy.robot_actions(MODEL_ACTIONS, aloha()), MODEL_ACTIONS[:, :14])


def test_aloha_refuses_unknown_cameras_and_channels_last():
    policy, observation = Preprocessor(CONFIG, robot="aloha"), aloha()
    observation["images"]["cam_top"] = image(0)
    with pytest.raises(ObservationError, match="unknown camera 'cam_top'"):
        policy.model_inputs(observation)
    observation = aloha()
    observation["images"]["cam_high"] = image(0)
    with pytest.raises(ObservationError, match=r"cam_high: has shape \[28, 28, 3\], expected \[3, H, W\]"):
        policy.model_inputs(observation)


# --- DROID and LIBERO ------------------------------------------------------------------------------------------------


def test_droid_state_and_actions():
    policy, observation = Preprocessor(CONFIG, robot="droid"), droid()
    assert np.allclose(policy.model_inputs(observation).state[:8], [*np.linspace(-1, 1, 7), 0.5])
    assert np.array_equal(policy.robot_actions(MODEL_ACTIONS, observation), MODEL_ACTIONS[:, :8])
    observation["observation/gripper_position"] = 0.5  # a scalar is as good
    assert policy.model_inputs(observation).state[7] == 0.5


def test_droid_joint_positions_are_deltas_when_asked():
    policy = Preprocessor(CONFIG, robot="droid", transforms={"delta_actions": True})
    expected = MODEL_ACTIONS[:, :8] + np.array([*np.linspace(-1, 1, 7), 0])
    assert np.allclose(policy.robot_actions(MODEL_ACTIONS, droid()), expected, atol=1e-6)


@pytest.mark.parametrize("robot, base, wrist", [
    ("droid", "observation/exterior_image_1_left", "observation/wrist_image_left"),
    ("libero", "observation/image", "observation/wrist_image"),
])  # fmt: skip
def test_flat_cameras_in_any_form(robot, base, wrist):
    policy, observation = Preprocessor(CONFIG, robot=robot), OBSERVATIONS[robot]()
    expected = policy.model_inputs(observation)
    assert np.array_equal(expected.images[0], observation[base])
    assert expected.image_mask.tolist() == [True, True, False]
    observation[base] = observation[base].transpose(2, 0, 1)
    observation[wrist] = (observation[wrist] + 0.5) / 256  # floats in 0..1 are scaled by 255 and cut
    inputs = policy.model_inputs(observation)
    assert np.array_equal(inputs.images[0], expected.images[0])
    assert np.abs(inputs.images[1].astype(int) - expected.images[1]).max() <= 1
    observation[wrist] = np.full((28, 28, 3), 128.0)
    with pytest.raises(ObservationError, match="must lie in"):
        policy.model_inputs(observation)


def test_libero_pi0_adds_the_state_and_pi05_does_not():
    expected = MODEL_ACTIONS[:, :7] + np.array([*np.linspace(-1, 1, 8)[:6], 0])
    assert np.allclose(Preprocessor(CONFIG, robot="libero").robot_actions(MODEL_ACTIONS, libero()), expected, atol=1e-6)
    absolute = Preprocessor(PI05, robot="libero").robot_actions(MODEL_ACTIONS, libero())
    assert np.array_equal(absolute, MODEL_ACTIONS[:, :7])


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("robot", OBSERVATIONS)
@pytest.mark.parametrize("config", [CONFIG, PI05], ids=["pi0", "pi05"])
def test_normalization_uses_the_stats_of_each_kind(robot, config):
    """Wider stats than the robot's dims, as published checkpoints have, are cut."""
    state = {"mean": [1.0] * 32, "std": [2.0] * 32, "q01": [-1.0] * 32, "q99": [3.0] * 32}
    actions = {"mean": [0.5] * 32, "std": [4.0] * 32, "q01": [-2.0] * 32, "q99": [2.0] * 32}
    plain = {"delta_actions": False, "adapt_to_pi": False}
    raw = Preprocessor(config, robot=robot, transforms=plain)
    policy = Preprocessor(config, robot=robot, transforms=plain, norm_stats={"state": state, "actions": actions})
    observation, dims = OBSERVATIONS[robot](), ACTION_DIMS[robot]
    x, size = raw.model_inputs(observation).state, policy.robot.state_dim
    normalized = (x + 1) / 4.000001 * 2 - 1 if config.pi05 else (x - 1) / 2.000001
    assert np.allclose(policy.model_inputs(observation).state[:size], normalized[:size], atol=1e-6)
    assert not policy.model_inputs(observation).state[size:].any()
    restored = (MODEL_ACTIONS + 1) / 2 * 4.000001 - 2 if config.pi05 else MODEL_ACTIONS * 4.000001 + 0.5
    assert np.allclose(policy.robot_actions(MODEL_ACTIONS, observation), restored[:, :dims], atol=1e-5)


@pytest.mark.parametrize("robot", OBSERVATIONS)
def test_wrist_cameras_may_be_absent(robot):
    observation = OBSERVATIONS[robot]()
    cameras = observation["images"] if robot == "aloha" else observation
    for key in [key for key in cameras if "wrist" in key]:
        del cameras[key]
    inputs = Preprocessor(CONFIG, robot=robot).model_inputs(observation)
    assert inputs.image_mask.tolist() == [True, False, False] and not inputs.images[1:].any()


@pytest.mark.parametrize("robot, key", [(r, k) for r in OBSERVATIONS for k in OBSERVATIONS[r]() if "wrist" not in k])
def test_each_missing_key_is_named(robot, key):
    observation = OBSERVATIONS[robot]()
    del observation[key]
    with pytest.raises(ObservationError, match=f"lacks '{key}'"):
        Preprocessor(CONFIG, robot=robot).model_inputs(observation)


@pytest.mark.parametrize("robot", OBSERVATIONS)
def test_bad_states_are_refused(robot):
    key = {"aloha": "state", "droid": "observation/joint_position", "libero": "observation/state"}[robot]
    policy, observation = Preprocessor(CONFIG, robot=robot), OBSERVATIONS[robot]()
    good = observation[key]
    for value, message in (
        (good * np.nan, "not finite"),
        (good[:-1], f"expected \\[{good.size}\\]"),
        (good.astype(complex), "has dtype complex128"),
        (None, "is a NoneType"),
    ):
        observation[key] = value
        with pytest.raises(ObservationError, match=f"{key}: .*{message}"):
            policy.model_inputs(observation)


@pytest.mark.parametrize("robot", OBSERVATIONS)
def test_observations_are_not_modified(robot):
    observation, untouched = OBSERVATIONS[robot](), OBSERVATIONS[robot]()
    policy = Preprocessor(CONFIG, robot=robot)
    policy.model_inputs(observation)
    policy.robot_actions(MODEL_ACTIONS.copy(), observation)
    np.testing.assert_equal(observation, untouched)


def test_default_transforms_follow_the_public_checkpoints():
    def on(name, **kind):
        return {key for key, value in default_transforms(load_robot(name), **kind).items() if value is True}

    assert on("aloha", pi05=False, layout="openpi") == {"delta_actions", "adapt_to_pi"}
    assert on("aloha", pi05=True, layout="openpi") == {"delta_actions", "adapt_to_pi", "state_in_prompt"}
    assert on("droid", pi05=True, layout="openpi") == {"state_in_prompt"}
    assert on("libero", pi05=True, layout="openpi") == set()
    assert on("libero", pi05=False, layout="openpi") == {"delta_actions"}
    assert on("libero", pi05=True, layout="lerobot") == {"state_in_prompt"}


def test_robot_names():
    assert load_robot("none") is None
    with pytest.raises(PlanError, match="'kuka' is unknown; there are aloha, droid, libero, none, or give your own TOML"):
        Preprocessor(CONFIG, robot="kuka")


def test_a_delta_mask_of_more_actions_than_there_are_is_refused():
    """Else it would be a ValueError of the first call's actions."""
    for mask in ([True] * 8, [False] * 7 + [True]):
        with pytest.raises(
            PlanError, match="robot libero: delta_mask says of 8 actions whether they are relative, .* are 7"
        ):
            Preprocessor(CONFIG, robot="libero", transforms={"delta_actions": True, "delta_mask": mask})
    Preprocessor(CONFIG, robot="libero", transforms={"delta_actions": True, "delta_mask": [True] * 7})
