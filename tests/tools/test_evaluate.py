"""tools/evaluate.py: its intervals, its episodes, and the whole of it in the simulator."""

import importlib.util
import json
from math import comb

import numpy as np
import pytest

from duq.compiler.accuracy.rates import paired_difference, wilson

if simulated := importlib.util.find_spec("metaworld") is not None:
    from duq.tools import evaluate, rollout
    from examples.collect_metaworld import demonstrate, disturbances
    from examples.metaworld_env import MetaworldEnv

needs_simulator = pytest.mark.skipif(not simulated, reason="metaworld is not installed: pip install 'duq-vla[examples]'")


# --- intervals -------------------------------------------------------------------------------------------------------


def test_wilson_on_published_numbers():
    """Newcombe, Statistics in Medicine 17 (1998), table I."""
    table = (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)
    for successes, episodes, low, high in table:
        assert wilson(successes, episodes) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("rate", (0.5, 0.8, 0.95))
def test_wilson_covers_the_rate_as_often_as_it_says(rate):
    """Exactly: the binomial probabilities of the counts whose interval holds the rate."""
    n = 100
    inside = sum(
        comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= rate <= wilson(k, n)[1]
    )
    assert 0.92 < inside < 0.98
    assert wilson(80, n, 0.99)[0] < wilson(80, n)[0] < 0.8 < wilson(80, n)[1] < wilson(80, n, 0.99)[1]


def test_a_paired_difference_counts_the_episodes_that_differ():
    reference, found = [True] * 50 + [False] * 10, [True] * 45 + [False] * 5 + [True] * 2 + [False] * 8
    difference, (low, high) = paired_difference(reference, found)
    assert difference == pytest.approx(-3 / 60) and low < difference < high
    opposite, (lower, higher) = paired_difference(found, reference)
    assert (opposite, lower, higher) == pytest.approx((-difference, -high, -low))
    assert paired_difference(reference, reference)[0] == 0
    with pytest.raises(ValueError):
        paired_difference(reference, found[:-1])


def test_a_paired_difference_is_covered_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        reference = rng.random(60) < 0.9
        found = np.where(rng.random(60) < 0.15, rng.random(60) < 0.5, reference)  # differs by 0.15 * (0.5 - 0.9)
        low, high = paired_difference(reference.tolist(), found.tolist())[1]
        covered += low <= 0.15 * (0.5 - 0.9) <= high
    assert 0.91 < covered / 400 < 0.99


# --- episodes --------------------------------------------------------------------------------------------------------


class Corridor:
    """In place of the simulator: the task is done after `goal` actions above zero."""

    def __init__(self, goal):
        self.goal = goal

    def reset(self, seed):
        self.start, self.forward, self.actions = seed, 0, []

    def observation(self):
        return {"forward": self.forward}

    def step(self, action):
        self.actions.append(float(action[0]))
        self.forward += action[0] > 0
        return self.forward == self.goal


@needs_simulator
def test_an_episode_executes_the_first_actions_of_each_chunk():
    seen = []

    def infer(observation, noise):
        seen.append((observation["forward"], noise))
        return np.arange(1, 7, dtype=np.float32)[:, None] + 10 * len(seen)

    env = Corridor(goal=8)
    assert rollout.episode(infer, env, 5, (6, 32), rollout.Conditions(execute=3, steps=20)) == 8
    assert env.start == 5 and env.actions == [11, 12, 13, 21, 22, 23, 31, 32]
    assert [forward for forward, _ in seen] == [0, 3, 6]
    first = [noise for _, noise in seen]
    assert all(noise.shape == (6, 32) and noise.dtype == np.float32 for noise in first) and not np.array_equal(*first[:2])
    seen.clear()
    rollout.episode(infer, env, 5, (6, 32), rollout.Conditions(execute=3, steps=20))
    np.testing.assert_array_equal(first, [noise for _, noise in seen])
    assert rollout.episode(infer, Corridor(goal=8), 5, (6, 32), rollout.Conditions(execute=3, steps=7)) is None


@needs_simulator
def test_pushes_are_added_to_the_actions_and_the_same_for_every_policy():
    runs = []
    for action in (10.0, 20.0):  # larger than any push
        env = Corridor(goal=50)
        chunk = np.full((6, 4), action, np.float32)
        rollout.episode(
            lambda observation, noise, chunk=chunk: chunk, env, 3, (6, 32), rollout.Conditions(execute=6, push=2.0)
        )
        runs.append(np.array(env.actions) - action)
    np.testing.assert_allclose(*runs, atol=1e-6)
    assert 0.2 < (runs[0] != 0).mean() < 0.6 and np.abs(runs[0]).max() > 1


@needs_simulator
def test_a_moment_is_recorded_with_what_the_expert_does_next():
    """Replaying the chunk from the moment's state leads where the undisturbed expert goes."""
    env = MetaworldEnv("drawer-close", 8)
    found = demonstrate(env, 7, horizon=6, every=4)
    assert found.actions.shape[1:] == (6, 4) and len(found.images) == len(found.states) > 3
    assert set(found.episodes) == {7} and set(found.prompts) == {"close the drawer"}
    pushes = disturbances(np.random.default_rng(7), 256, 6)
    env.reset(7)
    states, actions = [], []
    for step in range(250):
        states.append(env._state())
        actions.append(env.expert_action())
        if env.step(actions[-1] + pushes[step]):
            break
    undisturbed = [s for s in range(0, len(states), 4) if not pushes[s : s + 6].any()]
    np.testing.assert_array_equal(found.states, np.array(states)[undisturbed])
    for row, step in enumerate(undisturbed):
        np.testing.assert_allclose(found.actions[row, : len(actions) - step], actions[step : step + 6], atol=1e-3)
    env.close()


@needs_simulator
def test_pushes_leave_whole_chunks_alone():
    pushes = disturbances(np.random.default_rng(0), 250, 16)
    disturbed = pushes.any(axis=1)
    edges = np.flatnonzero(np.diff(disturbed))
    assert 0.1 < disturbed.mean() < 0.4 and len(edges) > 8
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        if not disturbed[end]:
            assert end - start >= 20 or disturbed[start + 1]


# --- the whole -------------------------------------------------------------------------------------------------------


@needs_simulator
def test_the_command_line(tmp_path, command_line):
    import torch

    from duq.compiler.checkpoint.synthetic.files import train_tokenizer
    from duq.compiler.model import Pi0
    from examples.train_metaworld import save_checkpoint
    from tests.support.metaworld import TINY

    torch.manual_seed(0)
    save_checkpoint(tmp_path / "policy", Pi0(TINY), train_tokenizer(), [])
    output = {flag: tmp_path / file for flag, file in (("--plot", "p.svg"), ("--markdown", "m.md"))}
    done = command_line(
        evaluate.main, tmp_path / "policy", "--task", "drawer-close", "--scheme", "w4a8-all", "--episodes", "2",
        "--steps", "3", "--execute", "2", "--jobs", "1", "--json", *(part for pair in output.items() for part in pair),
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert list(found) == ["fp32", "w4a8-all"]  # what the scheme is compared with is always there
    fp32, w4a8 = found.values()
    assert fp32["success"] == w4a8["success"] == {"drawer-close": [False, False]}
    assert fp32["action_error"] == 0 < w4a8["action_error"] < 1
    assert fp32["sqnr_db"] is None and 10 < w4a8["sqnr_db"] < 40
    assert 0 < fp32["jerk"] != w4a8["jerk"]
    assert "<svg" in output["--plot"].read_text()
    assert "| `w4a8-all` | 0.0 (0.0 to 65.8) | +0.0 (" in output["--markdown"].read_text()


@needs_simulator
@pytest.mark.parametrize("option", ("--task", "--scheme"))
def test_unknown_names_are_refused_before_any_work(option, tmp_path, command_line):
    done = command_line(evaluate.main, tmp_path, option, "fly")
    assert done.code == 2 and f"{option} fly: unknown, one of" in done.err
