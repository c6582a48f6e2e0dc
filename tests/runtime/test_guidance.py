"""Chunks that fit the previous one: weights, the correction of a step, and a policy that is guided."""

import numpy as np
import pytest

from duq.runtime import Policy
from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.guidance import Guidance, Prefix, blended, prefix_weights
from duq.runtime.preprocess import Preprocessor
from duq.runtime.realtime import ChunkStream
from tests.support.observations import CONFIG

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("zeros", [1, 1, 0, 0, 0, 0]),
        ("ones", [1, 1, 1, 1, 1, 0]),
        ("linear", [1, 1, 3 / 4, 2 / 4, 1 / 4, 0]),
        ("exp", [1, 1, *(w * (np.exp(w) - 1) / (np.e - 1) for w in (3 / 4, 2 / 4, 1 / 4)), 0]),
    ],
)
def test_weights_of_a_chunk_of_six(schedule, expected):
    found = prefix_weights(schedule, 2, 5, 6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("delay", "horizon", "ones"), [(0, 0, 0), (9, 3, 3), (9, 9, 4), (-1, 0, 0)])
def test_weights_at_the_ends(delay, horizon, ones):
    assert prefix_weights("linear", delay, horizon, 4).tolist() == [1] * ones + [0] * (4 - ones)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="cubic.*linear"):
        prefix_weights("cubic", 0, 1, 2)


def test_a_step_is_corrected_as_the_formula_says():
    """In float64, from v instead of the states."""
    x, v, target = RNG.standard_normal((3, 5, 4))
    weights = np.array([1, 1, 0.5, 0, 0])[:, None]
    guidance = Guidance(target.astype(np.float32), weights.astype(np.float32), 5.0)
    for step in range(10):
        time = 1 - step / 10
        gain = 5.0 if step == 0 else min(5.0, time / (1 - time) * ((1 - time) ** 2 + time**2) / time**2)
        guided = v - gain * weights * (target - (x - time * v))
        found = guidance.correction(x.astype(np.float32), (-v / 10).astype(np.float32), step, 10)
        np.testing.assert_allclose(found, (v - guided) / 10, rtol=0, atol=1e-5)


def test_blending_is_that_of_the_real_time_loop():
    """A chunk blended behind 2 frozen actions over 3 is what ChunkStream executes with freeze 2, blend 3."""
    old, new = RNG.standard_normal((2, 12, 3)).astype(np.float32)
    chunks = iter([old, new])

    class Now:
        def __init__(self, value):
            self.value = value

        def result(self):
            return self.value

        def done(self):
            return True

    stream = ChunkStream(lambda _: {"actions": next(chunks)}, freeze=2, blend=3, every=6, submit=lambda f, *a: Now(f(*a)))
    stream.begin({})
    executed = np.array([stream.action(period, dict) for period in range(12)])[6:]  # the inference starts in period 6
    found = blended(new, Prefix(old[6:], prefix_weights("linear", 2, 5, 12)))
    np.testing.assert_allclose(found[:6], executed, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def policy(tiny_plans):
    return Policy(tiny_plans("pi0", "none").plan, threads=1)


def observation() -> dict:
    rng = np.random.default_rng(1)
    return {
        "observation/image": rng.integers(0, 256, (224, 224, 3), np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (224, 224, 3), np.uint8),
        "observation/state": rng.normal(0, 0.3, 8).astype(np.float32),
        "prompt": "pick up the cup",
    }


def noise() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((8, 32), np.float32)


def test_a_policy_is_drawn_towards_the_prefix_and_only_there(policy):
    free = policy.infer(observation(), noise())["actions"]
    wanted = free[:4] + np.float32(0.2)
    errors = []
    for strength in (1e-9, 1.0, 10.0):
        prefix = Prefix(wanted, prefix_weights("zeros", 4, 4, 8), strength)
        actions = policy.infer(observation(), noise(), prefix=prefix)["actions"]
        errors.append(np.abs(actions[:4] - wanted).mean())
    assert policy.guided and errors[0] > 2 * errors[1] and errors[1] > errors[2]
    assert errors[0] == pytest.approx(0.2, rel=1e-3)
    np.testing.assert_array_equal(policy.infer(observation(), noise())["actions"], free)


@pytest.mark.parametrize(
    ("actions", "weights", "strength", "message"),
    [
        (np.zeros((3, 6)), np.zeros(8), 1, r"\[3, 6\], expected \[1 to 8, 7\]"),
        (np.zeros((0, 7)), np.zeros(8), 1, "expected"),
        (np.zeros((9, 7)), np.zeros(8), 1, "expected"),
        (np.full((3, 7), np.nan), np.zeros(8), 1, "not finite"),
        (np.zeros((3, 7)), np.zeros(3), 1, r"weights are \[3\]"),
        (np.zeros((3, 7)), np.full(8, 2.0), 1, "from 0 to 1"),
        (np.zeros((3, 7)), np.full(8, np.nan), 1, "from 0 to 1"),
        (np.zeros((3, 7)), np.ones(8), 1, "beyond its 3 actions"),
        (np.zeros((3, 7)), np.zeros(8), 0, "strength"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(policy, actions, weights, strength, message):
    with pytest.raises(ObservationError, match=message):
        policy.infer(observation(), noise(), prefix=Prefix(actions, weights, strength))


def test_an_engine_that_cannot_stop_between_steps_says_so(policy, monkeypatch):
    monkeypatch.setattr(type(policy._opened.engine.executor), "guided", False)
    with pytest.raises(PlanError, match="--target cpu"):
        policy.infer(observation(), noise(), prefix=Prefix(np.zeros((1, 7)), np.zeros(8)))


def test_actions_go_back_to_the_model_as_they_came(policy):
    """model_actions inverts robot_actions: deltas, statistics, the robot's conversions."""
    modeled = RNG.standard_normal((8, 32)).astype(np.float32)
    preprocessor = policy._opened.preprocessor
    state = preprocessor.read(observation()).robot_state
    back = preprocessor.model_actions(preprocessor.actions_at(modeled, state), state)
    np.testing.assert_allclose(back[:, :7], modeled[:, :7], atol=1e-4)
    assert not back[:, 7:].any()


@pytest.mark.parametrize("adapt", [False, True])
def test_conversions_are_inverted(adapt):
    preprocessor = Preprocessor(CONFIG, robot="aloha", transforms={"adapt_to_pi": adapt})
    state, modeled = RNG.uniform(0, 1, 14), RNG.standard_normal((8, 32)).astype(np.float32)
    back = preprocessor.model_actions(preprocessor.actions_at(modeled, state), state)
    np.testing.assert_allclose(back[:, :14], modeled[:, :14], atol=1e-5)
