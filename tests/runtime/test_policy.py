"""The policy's contract around an executor: a fake one records what it gets."""

import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

import duq.runtime
import duq.runtime.executors
from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.plan import PlanWriter
from tests.support.observations import ACTION_DIMS, CONFIG, OBSERVATIONS, bare_observation


class FakeExecutor:
    """Returns the noise plus the mean of the state: enough to see what went in."""

    def __init__(self, plan, threads):
        self.threads, self.warm, self.inside = threads, False, 0
        self.largest_inside, self.calls = 0, []

    def warmup(self):
        self.warm = True

    def run(self, inputs, noise):
        self.inside += 1
        self.largest_inside = max(self.inside, self.largest_inside)
        threading.Event().wait(0.001)
        self.calls.append((inputs, noise))
        self.inside -= 1
        return noise + inputs.state.mean(), {"prefix_ms": 1.0, "denoise_ms": 2.0}

    def is_usable(self):
        return True

    def close(self):
        self.closed = True


def executor_of(policy) -> FakeExecutor:
    return policy._opened.engine.executor


@pytest.fixture
def make_policy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fake_executor", type(sys)("fake_executor"))
    sys.modules["fake_executor"].FakeExecutor = FakeExecutor
    monkeypatch.setitem(duq.runtime.executors.EXECUTORS, "cpu", ("fake_executor", "FakeExecutor"))

    def make(robot="none", config=CONFIG, tokenizer=None, drop=None, **options):
        manifest = {
            "model": config.to_json(), "robot": robot, "num_steps": 10, "cameras": 3, "target": "cpu",
            "norm_stats": None, "checkpoint": {"path": "/x", "layout": "openpi", "fingerprint": "ab"},
        }  # fmt: skip
        manifest |= {key: options.pop(key) for key in list(options) if key in manifest}
        manifest.pop(drop, None)
        with PlanWriter(tmp_path / "engine.plan") as plan:
            if tokenizer:
                plan.write("tokenizer.model", tokenizer)
            plan.finish(manifest)
        return duq.runtime.Policy(tmp_path / "engine.plan", **options)

    return make


@pytest.mark.parametrize("robot", OBSERVATIONS)
def test_a_robot_s_observation_gives_its_actions(make_policy, robot):
    result = make_policy(robot).infer(OBSERVATIONS[robot]())
    assert result["actions"].shape == (50, ACTION_DIMS[robot]) and result["actions"].dtype == np.float32
    timing = result["policy_timing"]
    assert set(timing) == {"infer_ms", "preprocess_ms", "prefix_ms", "denoise_ms"}
    assert timing["infer_ms"] > timing["preprocess_ms"] > 0 and all(type(value) is float for value in timing.values())


@pytest.mark.parametrize("robot", ["none", *OBSERVATIONS])
def test_every_plan_takes_bare_inputs(make_policy, robot):
    policy, noise = make_policy(robot), np.zeros((50, 32), np.float32)
    observation = bare_observation()
    actions = policy.infer(observation, noise=noise)["actions"]
    assert actions.shape == (50, 32) and np.allclose(actions, observation["state"].mean(), atol=1e-6)


def test_noise_is_given_or_drawn_from_the_seed(make_policy):
    observation, noise = bare_observation(), np.random.default_rng(1).standard_normal((50, 32), np.float32)
    first, second = make_policy(seed=7), make_policy(seed=7)
    assert np.array_equal(first.infer(observation, noise)["actions"], second.infer(observation, noise=noise)["actions"])
    drawn = [first.infer(observation)["actions"] for _ in range(2)]
    assert np.array_equal(drawn[0], second.infer(observation)["actions"]) and not np.array_equal(*drawn)
    assert executor_of(first).calls[-1][1].dtype == np.float32
    assert not np.array_equal(make_policy().infer(observation)["actions"], make_policy().infer(observation)["actions"])


@pytest.mark.parametrize("noise", [
    np.zeros((50, 32)), np.zeros((1, 50, 32), np.float32), np.zeros((49, 32), np.float32),
    np.full((50, 32), np.nan, np.float32), [[0.0]], "noise",
])  # fmt: skip
def test_bad_noise(make_policy, noise):
    with pytest.raises(ObservationError, match=r"noise: is .*, expected finite float32 \[50, 32\]"):
        make_policy().infer(bare_observation(), noise=noise)


def test_bad_observation_reaches_no_executor_and_the_policy_goes_on(make_policy):
    policy = make_policy()
    for _ in range(2):
        with pytest.raises(ObservationError):
            policy.infer(bare_observation(state=None))
    assert not executor_of(policy).calls
    assert policy.infer(bare_observation())["actions"].shape == (50, 32)


def test_usable_after_the_executor_failed(make_policy, monkeypatch):
    policy = make_policy()
    with monkeypatch.context() as patch:
        patch.setattr(executor_of(policy), "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy.infer(bare_observation())
    assert policy.infer(bare_observation())["actions"].shape == (50, 32)


def test_threads_take_turns(make_policy):
    policy = make_policy()
    threads = [threading.Thread(target=policy.infer, args=(bare_observation(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(executor_of(policy).calls) == 8 and executor_of(policy).largest_inside == 1


def test_prompt_uses_the_plan_s_tokenizer(make_policy, tokenizer_bytes):
    policy = make_policy(tokenizer=tokenizer_bytes)
    prompts = bare_observation(prompt="red cup", tokenized_prompt=None, tokenized_prompt_mask=None)
    policy.infer(prompts)
    policy.infer(prompts | {"prompt": "open the drawer, then close it"})
    lengths = [inputs.token_mask.sum() for inputs, _ in executor_of(policy).calls]
    assert 0 < lengths[0] < lengths[1]


def test_warm_calls_open_no_file(make_policy, tokenizer_bytes):
    policy = make_policy("aloha", tokenizer=tokenizer_bytes, threads=2)
    policy.warmup()
    assert executor_of(policy).warm and executor_of(policy).threads == 2
    opened, watching = [], [True]
    sys.addaudithook(lambda event, args: opened.append(args) if watching[0] and event == "open" else None)
    observation = OBSERVATIONS["aloha"]() | {"prompt": "cup"}
    policy.infer({key: value for key, value in observation.items() if "tokenized" not in key})
    watching[0] = False  # an audit hook cannot be removed
    assert not opened


def test_metadata_is_plain(make_policy):
    metadata = make_policy("droid", config=replace(CONFIG, action_horizon=15)).metadata
    assert metadata["robot"] == "droid" and metadata["model"] == "pi0" and metadata["checkpoint"] == "ab"
    assert (metadata["action_horizon"], metadata["action_dim"], metadata["model_action_dim"]) == (15, 8, 32)
    assert all(type(value) in (str, int) for value in metadata.values())


def test_plans_that_cannot_be_run(make_policy, tmp_path):
    with pytest.raises(PlanError, match="target 'tpu', this runtime has cpu, cuda, tensorrt"):
        make_policy(target="tpu")
    with pytest.raises(PlanError, match="robot 'kuka' is unknown"):
        make_policy("kuka")
    for key in ("model", "robot", "target", "checkpoint", "cameras"):
        with pytest.raises(PlanError, match=f"manifest is incomplete .'{key}'"):
            make_policy(drop=key)
    with pytest.raises(PlanError, match="No such file"):
        duq.runtime.Policy(tmp_path / "none.plan")


def test_runtime_imports_neither_torch_nor_the_compiler():
    code = "import duq.runtime, duq.runtime.inspect, duq.runtime.observations, sys; print([m for m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'duq.runtime.policy'" in loaded
    assert not [name for name in ("torch", "onnx", "duq.compiler", "duq.tools") if f"'{name}'" in loaded]
