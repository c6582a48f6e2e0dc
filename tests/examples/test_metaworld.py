"""The closed loop of examples/metaworld_loop.py, in the simulator itself."""

import importlib.util
import sys
from concurrent.futures import Future
from functools import partial

import numpy as np
import pytest
from PIL import Image

if importlib.util.find_spec("metaworld") is None:  # importing it here would be before MUJOCO_GL is set
    pytest.skip("metaworld is not installed: pip install 'duq-vla[examples]'", allow_module_level=True)

from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.realtime import control_loop
from examples import metaworld_loop
from examples.metaworld_env import PROMPTS, MetaworldEnv
from tests.support.serving import FakePolicy, serving

pytestmark = pytest.mark.filterwarnings("ignore:Constant.s. may be too high")  # of the experts, which are clipped
SIZE = 32


@pytest.fixture(scope="module")
def env():
    env = MetaworldEnv("button-press-topdown", SIZE)
    yield env
    env.close()


def expert_run(env, seed, steps=200):
    """(states, steps to success or None) of the scripted expert."""
    env.reset(seed)
    states = []
    for step in range(1, steps + 1):
        states.append(env.observation()["state"])
        if env.step(env.expert_action()):
            return np.array(states), step
    return np.array(states), None


# --- the environment -------------------------------------------------------------------------------------------------


def test_an_observation(env):
    env.reset(0)
    observation = env.observation()
    assert observation["prompt"] == "press the button from above"
    assert observation["state"].shape == (4,) and observation["state"].dtype == np.float32
    base, wrist = (observation["image"][slot] for slot in IMAGE_SLOTS[:2])
    for image in (base, wrist):
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 and image.std() > 10
    red = (base[..., 0] > 2.0 * base[..., 1]) & (base[..., 0] > 60)  # the arm hangs from above, from the right
    rows, columns = np.nonzero(red)
    assert rows.mean() < SIZE / 2 < columns.mean()


def test_images_are_kept_when_the_robot_moves_on(env):
    env.reset(0)
    before = env.observation()["image"]
    copies = {slot: image.copy() for slot, image in before.items()}
    for _ in range(10):
        env.step(np.array([0.0, 1.0, 0.0, 0.0]))
    for slot, image in env.observation()["image"].items():
        np.testing.assert_array_equal(before[slot], copies[slot])
        assert not np.array_equal(before[slot], image)


def test_a_seed_is_a_start_whatever_was_before(env):
    env.reset(7)
    first = env.observation()
    states, _ = expert_run(env, 8, steps=20)
    again = MetaworldEnv("button-press-topdown", SIZE)
    for start in (env, again):
        start.reset(7)
        np.testing.assert_equal(start.observation(), first)
    np.testing.assert_array_equal(expert_run(again, 8, steps=20)[0], states)
    again.close()
    env.reset(9)
    assert not np.array_equal(env.observation()["image"]["base_0_rgb"], first["image"]["base_0_rgb"])


@pytest.mark.parametrize("axis", range(3))
def test_an_action_moves_the_hand_and_the_state_says_so(env, axis):
    env.reset(0)
    before = env.observation()["state"]
    for _ in range(10):
        env.step(np.where(np.arange(4) == axis, 50.0, 0.0))  # as far as 1 would
    moved = env.observation()["state"][:3] - before[:3]
    assert np.argmax(moved) == axis and 0.05 < moved[axis] < 0.5


@pytest.mark.parametrize("task", PROMPTS)
def test_the_expert_solves_each_task_and_states_are_in_range(task):
    env = MetaworldEnv(task, 8)
    env._render = lambda camera: None  # the cameras are not needed here
    for seed in range(2):
        states, steps = expert_run(env, 100 + seed)
        assert steps and steps > 10 and np.abs(states).max() <= 1.05
    env.close()


# --- the loop --------------------------------------------------------------------------------------------------------


def run(command_line, *arguments):
    return command_line(metaworld_loop.main, *arguments)


@pytest.fixture
def small_images(monkeypatch):
    monkeypatch.setattr(metaworld_loop, "MetaworldEnv", partial(MetaworldEnv, image_size=SIZE))


class InstantEngine:
    """In place of the background thread: what is submitted is done at once."""

    def __init__(self, threads):
        assert threads == 1  # openpi's client takes one call at a time

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class SimulatedClock:
    """Does not care how long the machine takes to render."""

    time = 0.0

    def now(self):
        return self.time

    def sleep_until(self, moment):
        self.time = moment


@pytest.fixture
def simulated_time(monkeypatch):
    monkeypatch.setattr(metaworld_loop, "ThreadPoolExecutor", InstantEngine)
    monkeypatch.setattr(metaworld_loop, "control_loop", partial(control_loop, clock=SimulatedClock()))


def test_the_scripted_expert_closes_the_loop(command_line, small_images, tmp_path):
    sheet = tmp_path / "sheet.png"
    ran = run(command_line, "--scripted", "--task", "handle-press", "--episodes", 2, "--seed", 5, "--sheet", sheet)
    assert ran.code == 0 and ran.err == ""
    lines = ran.out.splitlines()
    assert lines[0].startswith("handle-press, start 5: success after ") and lines[2] == "2 of 2 episodes succeeded"
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (4 * 112, 10 * 112, 3)
    assert (pixels[:, -1] == [0, 255, 0]).all()  # both framed
    assert not np.array_equal(pixels[:112, :112], pixels[:112, -112:])  # something happened


def test_no_frame_is_on_a_contact_sheet_twice():
    """Of an episode that was seen at fewer moments than there are columns, and of one seen twice at its last step."""
    episodes = []
    for looks in ((0, 10, 13), tuple(range(25)) + (24,)):
        episode = object.__new__(metaworld_loop.Episode)
        frames = [np.full((8, 8, 3), 10 * index, np.uint8) for index in range(len(looks))]
        episode.seen, episode.success = [(step, [frame]) for step, frame in zip(looks, frames, strict=True)], False
        episodes.append(episode)
    pixels = np.asarray(metaworld_loop.contact_sheet(episodes))
    assert pixels.shape == (2 * 112, 10 * 112, 3)
    short, long = (pixels[row * 112 + 100, 56::112, 0].tolist() for row in range(2))  # a pixel of each cell
    assert short == [0, 10, 20] + 7 * [0]  # three moments, and nothing behind them
    assert len(set(long)) == 10 and long[-1] == 250


@pytest.mark.parametrize("execute, asked", [(8, 3), (5, 4)])
def test_a_plan_in_this_process(command_line, small_images, tiny_plans, monkeypatch, execute, asked):
    replies = []
    infer = metaworld_loop.Policy.infer
    monkeypatch.setattr(metaworld_loop.Policy, "infer", lambda *arguments: replies.append(infer(*arguments)) or replies[-1])
    plan = tiny_plans("pi0", "none").plan
    ran = run(command_line, "--plan", plan, "--episodes", 1, "--steps", 20, "--execute", execute)
    assert ran.code == 0 and len(replies) == asked
    assert "button-press-topdown, start 0: no success in 20 steps\n0 of 1 episodes succeeded\n" == ran.out


class ServedExpert(FakePolicy):
    """What a trained policy would be: sees images, state and prompt only, and yet opens the drawer. (It looks up the
    steps of the expert on this start.)"""

    metadata = {"robot": "none", "action_horizon": 50}

    def __init__(self, task, seed):
        super().__init__()
        env = MetaworldEnv(task, 8)
        env.reset(seed)
        self.actions, self.states = [], []
        for _ in range(130):
            self.actions.append(env.expert_action())
            self.states.append(env._state())
            env.step(self.actions[-1])
        env.close()

    def infer(self, obs):
        assert set(obs) == {"image", "state", "prompt"} and obs["prompt"] == "open the drawer"
        self.calls.append(obs)
        nearest = np.linalg.norm(np.array(self.states) - obs["state"], axis=1).argmin()
        return {"actions": np.array(self.actions[nearest : nearest + 20]), "policy_timing": {"infer_ms": 0.0}}


def through_the_server(command_line, *options, **serve):
    policy = ServedExpert("drawer-open", 3)
    with serving(policy, **serve) as served:
        uri = f"ws://127.0.0.1:{served.port}"
        ran = run(command_line, "--server", uri, "--task", "drawer-open", "--seed", 3, "--episodes", 1, *options)
    assert ran.code == 0 and "drawer-open, start 3: success after " in ran.out
    return ran.out, policy.calls


def test_through_the_server(command_line, small_images):
    out, calls = through_the_server(command_line, "--execute", 5)
    steps = int(out.split()[5])
    assert 80 < steps < 130 and len(calls) == -(-steps // 5)


def test_a_server_that_asks_for_a_key(command_line, small_images, monkeypatch):
    monkeypatch.setenv("DUQ_API_KEY", "open sesame")
    through_the_server(command_line, "--execute", 20, api_key="open sesame")
    monkeypatch.setenv("DUQ_API_KEY", "open barley")
    with serving(ServedExpert("drawer-open", 3), api_key="open sesame") as served:
        ran = run(command_line, "--server", f"ws://127.0.0.1:{served.port}", "--task", "drawer-open")
    assert ran.code == 2 and "401" in ran.err and "Traceback" not in ran.err


def test_asynchronously_through_the_server(command_line, small_images, simulated_time):
    out, calls = through_the_server(command_line, "--asynchronous", "--freeze", 4, "--blend", 2)
    assert out.splitlines()[0].endswith("; periods missed 0, starved 0; late inferences 0")
    assert len(calls) == 1 + (int(out.split()[5]) - 1) // 4


def test_asynchronously_with_a_plan(command_line, small_images, tiny_plans):
    """With the thread and the machine's clock."""
    plan = tiny_plans("pi0", "none").plan
    ran = run(command_line, "--plan", plan, "--asynchronous", "--freeze", 3, "--rate", 50, "--episodes", 2, "--steps", 20)
    assert ran.code == 0 and ran.out.count(": no success in 20 steps; periods missed ") == 2


@pytest.mark.parametrize("arguments, message", [
    ([], "who drives? give one of --plan, --server and --scripted"),
    (["--scripted", "--plan", "x"], "who drives?"),
    (["--scripted", "--asynchronous"], "--asynchronous: the scripted expert decides step by step"),
    (["--scripted", "--sheet", "/nowhere/sheet.png"], "--sheet /nowhere/sheet.png: must be a file in an existing"),
    (["--plan", "/nowhere/engine.plan"], "/nowhere/engine.plan"),
    (["--server", "ws://127.0.0.1:9"], "Connection refused"),
    (["--task", "juggle", "--scripted"], "juggle"),
])  # fmt: skip
def test_bad_options(command_line, arguments, message):
    ran = run(command_line, *arguments)
    assert ran.code == 2 and message in ran.err and "Traceback" not in ran.err


def test_a_missing_client_is_named(command_line, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpi_client.websocket_client_policy", None)
    ran = run(command_line, "--server", "ws://127.0.0.1:9")
    assert ran.code == 2 and ran.err.endswith("pip install --no-deps openpi-client\n")
