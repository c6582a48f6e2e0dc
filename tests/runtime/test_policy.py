"""The policy's contract around an executor: a fake one records what it gets."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import timeit
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import duq.runtime
import duq.runtime.executors
from duq.plugins.errors import KernelError
from duq.runtime import checks
from duq.runtime.engine import finite
from duq.runtime.errors import EngineError, ObservationError, PlanError
from duq.runtime.plan import PlanWriter
from duq.runtime.robots import load_robot
from duq.runtime.transforms import default_transforms
from tests.support.observations import ACTION_DIMS, CONFIG, OBSERVATIONS, bare_observation, image
from tests.support.plans import manifest
from tests.support.serving import wait_until


class FakeExecutor:
    """Returns the noise plus the mean of the state: enough to see what went in."""

    def __init__(self, plan, threads):
        self.threads, self.warm, self.inside = threads, False, 0
        self.largest_inside, self.calls, self.closed = 0, [], 0

    def warmup(self):
        self.warm = True

    def run(self, inputs, noise):
        assert not self.closed
        self.inside += 1
        self.largest_inside = max(self.inside, self.largest_inside)
        threading.Event().wait(0.001)
        self.calls.append((inputs, noise))
        self.inside -= 1
        return noise + inputs.state.mean(), {"prefix_ms": 1.0, "denoise_ms": 2.0}

    def is_usable(self):
        return True

    def close(self):
        self.closed += 1


def executor_of(policy) -> FakeExecutor:
    return policy._opened.engine.executor


@pytest.fixture
def make_policy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fake_executor", type(sys)("fake_executor"))
    sys.modules["fake_executor"].FakeExecutor = FakeExecutor
    monkeypatch.setitem(duq.runtime.executors.EXECUTORS, "cpu", ("fake_executor", "FakeExecutor"))

    def make(robot="none", config=CONFIG, tokenizer=None, drop=None, **options):
        made = manifest(robot=robot, model=config.to_json(), robot_description=None, transforms=None)
        made |= {key: options.pop(key) for key in list(options) if key in made}
        made.pop(drop, None)
        monkeypatch.setattr(duq.runtime.plan.schema, "parse_manifest", lambda text: None)  # what is wrong is for the reader
        with PlanWriter(tmp_path / "engine.plan") as plan:
            if tokenizer:
                plan.write("tokenizer.model", tokenizer)
            plan.finish(made)
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
    with pytest.raises(PlanError, match="target is 'tpu'; it should be 'cpu', 'cuda' or 'tensorrt'"):
        make_policy(target="tpu")
    with pytest.raises(PlanError, match="robot 'kuka' is unknown, and the plan does not describe it"):
        make_policy("kuka")
    for key in ("model", "robot", "target", "checkpoint", "cameras"):
        with pytest.raises(PlanError, match=f"manifest.json: {key} is missing"):
            make_policy(drop=key)
    with pytest.raises(PlanError, match="No such file"):
        duq.runtime.Policy(tmp_path / "none.plan")


def test_runtime_imports_neither_torch_nor_the_compiler():
    code = "import duq.runtime.policy, duq.runtime.inspect, duq.runtime.observations, sys; print([m for m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'duq.runtime.policy'" in loaded
    assert not [name for name in ("torch", "onnx", "duq.compiler", "duq.tools") if f"'{name}'" in loaded]


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"state": np.full(32, 1e38, np.float32)}, r"^state: is 1e\+38 at index 0; the model takes finite numbers of at most"),
    ({"state": np.full(32, 1e300)}, r"^state: is 1e\+300 at index 0"),
    ({"state": [0.0] * 5 + [-1e20]}, r"^state: is -1e\+20 at index 5"),
    ({"state": np.zeros(0)}, r"^state: has shape \[0\], expected 1 to 32 numbers"),
    ({"state": np.array([0, np.nan])}, "^state: is not finite at index 1"),
])  # fmt: skip
def test_a_state_that_the_model_cannot_take_reaches_no_executor(make_policy, changes, message):
    policy = make_policy()
    with pytest.raises(ObservationError, match=message):
        policy.infer(bare_observation(**changes))
    assert not executor_of(policy).calls


def stats(size: int, **scales) -> dict:
    """Norm stats of mean 0 and the given standard deviations."""
    return {key: {"mean": [0.0] * size, "std": [scale] * size} for key, scale in scales.items()}


def test_a_state_is_checked_as_the_model_gets_it(make_policy):
    """1e30 is finite in float32, and 1e30 / 1e-10 is not."""
    policy = make_policy("libero", norm_stats=stats(8, state=1e-10, actions=1.0) | {"epsilon": 0.0})
    observation = OBSERVATIONS["libero"]()
    assert np.isfinite(policy.infer(observation)["actions"]).all()
    for value in (1e30, 1e6):
        with pytest.raises(ObservationError, match=r"^state, normalized: is 1e\+"):
            policy.infer(observation | {"observation/state": np.full(8, value)})


def test_noise_is_checked_like_a_state(make_policy):
    noise = np.zeros((50, 32), np.float32)
    noise[3, 4] = 3.4e38
    with pytest.raises(ObservationError, match=r"^noise: is 3.4e\+38 at index 3, 4; the model takes"):
        make_policy().infer(bare_observation(), noise)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_never_leave(make_policy, monkeypatch, value):
    policy = make_policy()

    def run(inputs, noise):
        actions = np.zeros((50, 32), np.float32)
        actions[7, 31] = value
        return actions, {}

    with monkeypatch.context() as patch:
        patch.setattr(executor_of(policy), "run", run)
        with pytest.raises(
            EngineError, match=rf"the engine gave actions that are not finite \({value} at step 7, dim 31\)"
        ):
            policy.infer(bare_observation())
    assert policy.infer(bare_observation())["actions"].shape == (50, 32)


def test_nor_do_those_that_overflow_in_the_robot_s_units(make_policy):
    policy = make_policy("libero", norm_stats=stats(8, state=1.0, actions=1e300))
    with pytest.raises(EngineError, match="in the robot's units there are actions that are not finite .*: its norm stats"):
        policy.infer(OBSERVATIONS["libero"]())


def test_the_checks_take_no_time(make_policy):
    state, noise, actions = np.zeros(32), np.zeros((50, 32), np.float32), np.zeros((50, 32), np.float32)

    def all_of_a_call():
        checks.moderate(state, "state")
        checks.moderate(noise, "noise")
        finite(actions, "", "")
        finite(actions, "", "")

    assert min(timeit.repeat(all_of_a_call, number=200, repeat=5)) / 200 < 200e-6  # 15 to 25 us on a quiet core


def test_actions_are_relative_to_the_state_that_the_model_saw(make_policy, monkeypatch):
    """Though the robot's driver writes the next one into the same array meanwhile."""
    policy = make_policy("libero", transforms=default_transforms(load_robot("libero"), pi05=False, layout="openpi"))
    observation, noise = OBSERVATIONS["libero"](), np.zeros((50, 32), np.float32)
    expected = policy.infer(observation, noise)["actions"]
    run = executor_of(policy).run

    def meanwhile(*arguments):
        observation["observation/state"][:] = 7
        return run(*arguments)

    monkeypatch.setattr(executor_of(policy), "run", meanwhile)
    assert np.array_equal(policy.infer(observation, noise)["actions"], expected) and np.ptp(expected[0, :6]) > 0.1


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_reply_names_the_actions_outside_of_the_robot_s_limits(make_policy):
    robot = replace(load_robot("libero"), limits={"x": (-10.0, 10.0), "gripper": (99.0, 100.0)})
    policy = make_policy("libero", robot_description=robot.to_json())
    assert policy.outside_limits == {"x": 0, "gripper": 0}
    reply = policy.infer(OBSERVATIONS["libero"](), np.zeros((50, 32), np.float32))
    assert [each["action"] for each in reply["limits"]] == ["gripper"] and reply["limits"][0]["steps"] == 50
    assert json.loads(json.dumps(reply["limits"])) == reply["limits"]
    assert policy.outside_limits == {"x": 0, "gripper": 1}
    assert "limits" not in policy.infer(bare_observation())  # the model's actions, in no units
    assert "limits" not in make_policy("libero").infer(OBSERVATIONS["libero"]()) and make_policy().outside_limits == {}


# --- a policy's life --------------------------------------------------------------------------------------------------


def test_close_frees_the_executor_once(make_policy):
    with make_policy() as policy:
        executor = executor_of(policy)
        policy.infer(bare_observation())
    assert executor.closed == 1
    policy.close()
    assert executor.closed == 1
    for call in (
        lambda: policy.infer(bare_observation()),
        policy.warmup,
        policy.check,
        policy.reload,
        lambda: policy.infer_batch([]),
    ):
        with pytest.raises(EngineError, match="engine.plan: the policy is closed; open it again"):
            call()
    assert policy.metadata["robot"] == "none"


def test_close_lets_calls_end(make_policy, monkeypatch):
    policy = make_policy()
    executor = executor_of(policy)
    inside, go, run = threading.Event(), threading.Event(), executor.run

    def slow(*arguments):
        inside.set()
        assert go.wait(10) and not executor.closed
        return run(*arguments)

    monkeypatch.setattr(executor, "run", slow)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(policy.infer, bare_observation()) for _ in range(2)]  # one inside, one waiting for its turn
        assert inside.wait(10)
        wait_until(lambda: policy._opened.engine._calls == 2)
        policy.close()
        assert not executor.closed
        go.set()
        assert all(call.result()["actions"].shape == (50, 32) for call in calls)
    assert executor.closed == 1


def test_what_raises_gpu_errors_decides_whether_it_can_be_used(make_policy, monkeypatch):
    """The states, with an executor that says so itself; tests of the GPU's are in executors/test_gpu_faults.py."""
    policy = make_policy()

    def run(*_):
        raise KernelError("TensorRT could not run")

    with monkeypatch.context() as patch:
        patch.setattr(executor_of(policy), "run", run)
        with pytest.raises(EngineError, match="the call failed: TensorRT could not run; the policy can still be used"):
            policy.infer(bare_observation())
    assert policy.infer(bare_observation())["actions"].shape == (50, 32)
    with monkeypatch.context() as patch:
        patch.setattr(executor_of(policy), "run", run)
        patch.setattr(executor_of(policy), "is_usable", lambda: False)
        with pytest.raises(EngineError, match="must be opened again, in a new process"):
            policy.infer(bare_observation())
    with pytest.raises(EngineError, match="must be opened again, in a new process"):
        policy.infer(bare_observation())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_with_what_to_do_instead(make_policy, copied):
    with pytest.raises(
        TypeError, match="a Policy cannot be pickled or copied.* pass the path .*engine.plan.* open it where"
    ):
        copied(make_policy())


# --- reload -----------------------------------------------------------------------------------------------------------


def test_reload_takes_the_new_plan_warm_and_frees_the_old(make_policy):
    policy = make_policy()
    old = executor_of(policy)
    make_policy(checkpoint={"path": "/y", "layout": "openpi", "fingerprint": "cd"}, num_steps=5)  # writes the same file
    assert policy.metadata["checkpoint"] == "ab"
    policy.reload()
    new = executor_of(policy)
    assert new is not old and new.warm and old.closed == 1 and not new.closed
    assert policy.metadata["checkpoint"] == "cd" and policy.metadata["num_steps"] == 5
    assert policy.infer(bare_observation())["actions"].shape == (50, 32) and len(new.calls) == 1


def test_reload_ends_the_refusals_of_a_plan_that_was_written_to(make_policy, tmp_path):
    policy, path = make_policy(), tmp_path / "engine.plan"
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(b"PK")
    for call in (
        lambda: policy.infer(bare_observation()), policy.warmup, policy.check,
        lambda: policy.infer_batch([bare_observation()]),
    ):  # fmt: skip
        with pytest.raises(PlanError, match="was written to while in use"):
            call()
    assert not executor_of(policy).calls
    (tmp_path / "new").write_bytes(whole)
    os.replace(tmp_path / "new", path)
    policy.reload()
    policy.check()
    assert policy.infer(bare_observation())["actions"].shape == (50, 32)


def test_the_fingerprint_is_the_running_plan_s(make_policy):
    policy = make_policy()
    first = policy.fingerprint
    assert len(first) == 16 and make_policy().fingerprint == first
    policy.reload()
    assert policy.fingerprint == first
    make_policy(num_steps=5)
    assert policy.fingerprint == first
    policy.reload()
    assert policy.fingerprint != first


def test_reload_of_another_path_is_remembered(make_policy, tmp_path):
    policy = make_policy()
    make_policy(num_steps=7)
    os.rename(tmp_path / "engine.plan", tmp_path / "other.plan")
    policy.reload(tmp_path / "other.plan")
    policy.reload()
    assert policy.metadata["num_steps"] == 7
    with pytest.raises(PlanError, match="engine.plan: .*No such file"):
        policy.reload(tmp_path / "engine.plan")
    assert policy.infer(bare_observation())["actions"].shape == (50, 32)


@pytest.mark.parametrize("changes, name", [
    ({"config": replace(CONFIG, action_horizon=10)}, "action_horizon: it has 10, not 50"),
    ({"config": replace(CONFIG, action_dim=16)}, "action_dim: it has 16, not 32"),
    ({"config": replace(CONFIG, max_prompt_tokens=20)}, "max_prompt_tokens: it has 20, not 48"),
    ({"cameras": 1}, "cameras: it has 1, not 3"),
    ({"robot": "libero"}, "robot: it has 'libero', not 'none'"),
    ({"config": replace(CONFIG, pi05=True)}, "model: it has 'pi0.5', not 'pi0'"),
])  # fmt: skip
def test_reload_refuses_what_clients_do_not_expect(make_policy, changes, name):
    policy = make_policy()
    executor = executor_of(policy)
    make_policy(**changes)
    with pytest.raises(PlanError, match=f"cannot take the place of .*, whose clients rely on its {name}; open it as"):
        policy.reload()
    assert executor_of(policy) is executor and not executor.closed
    assert policy.infer(bare_observation())["actions"].shape == (50, 32)


def test_reload_compares_the_robot_not_only_its_name(make_policy):
    robot = load_robot("libero")
    policy = make_policy("libero", robot_description=robot.to_json())
    make_policy("libero", robot_description=replace(robot, limits={"x": (-1.0, 1.0)}, default_prompt="go").to_json())
    policy.reload()
    other = replace(robot, action_names=tuple(reversed(robot.action_names)))
    make_policy("libero", robot_description=other.to_json())
    with pytest.raises(PlanError, match="rely on its robot's action_names"):
        policy.reload()


def test_reload_that_cannot_be_warmed_up_leaves_the_old(make_policy, monkeypatch):
    policy = make_policy()
    executor, opened = executor_of(policy), []

    def warmup(self):
        opened.append(self)
        raise EngineError("no memory")

    monkeypatch.setattr(FakeExecutor, "warmup", warmup)
    with pytest.raises(EngineError, match="no memory"):
        policy.reload()
    assert executor_of(policy) is executor and not executor.closed and opened[0].closed == 1


def test_reload_under_load_loses_and_mixes_nothing(make_policy):
    """Threads that infer while plans come and go: every call is answered, by an executor that is open."""
    policy, stop, done, reloads = make_policy(seed=0), threading.Event(), [], 0

    def infer():
        while not stop.is_set():
            done.append(policy.infer(bare_observation())["actions"].shape)

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(infer) for _ in range(4)]
        while reloads < 20 or (len(done) < 20 and not any(call.done() for call in calls)):
            policy.reload()
            reloads += 1
        stop.set()
        for call in calls:
            call.result()
    assert len(done) >= 20 and not executor_of(policy).closed


# --- batches ----------------------------------------------------------------------------------------------------------


def varied(index: int, size=28) -> dict:
    return bare_observation(
        image={"base_0_rgb": image(index, (size + index, 40, 3))}, image_mask=None, state=np.full(3, index, np.float32)
    )


def test_a_batch_equals_single_calls_bit_for_bit(make_policy):
    batch = [varied(index) for index in range(7)]
    noise = np.random.default_rng(1).standard_normal((7, 50, 32), np.float32)
    together, single = make_policy(seed=3), make_policy(seed=3)
    for given in (None, noise, [None, *noise[1:]], list(noise)):
        replies = together.infer_batch(batch, given)
        singles = [single.infer(each, None if given is None else given[index]) for index, each in enumerate(batch)]
        for reply, expected in zip(replies, singles, strict=True):
            assert np.array_equal(reply["actions"], expected["actions"])
            assert set(reply) == set(expected) and set(reply["policy_timing"]) == set(expected["policy_timing"])
    for (first, _), (second, _) in zip(executor_of(together).calls, executor_of(single).calls, strict=True):
        assert np.array_equal(first.images, second.images) and np.array_equal(first.state, second.state)
    assert together.infer_batch([]) == []


@pytest.mark.parametrize("batch, noise, message", [
    ([varied(0), varied(1) | {"state": "x"}], None, "^item 1 of the batch: state: is a str"),
    ([varied(0), None], None, "^item 1 of the batch: an observation is a dict, got NoneType"),
    ([varied(0), varied(1)], [np.zeros((50, 32), np.float32), np.zeros(3, np.float32)], "^item 1 of the batch: noise: is"),
    ([varied(0), varied(1)], np.zeros((1, 50, 32), np.float32), "^noise: there are 1 for 2 observations"),
    ([varied(0)], "noise", "^a batch is noise: a list, got str"), ([varied(0)], 3, "^a batch is noise: a list, got int"),
    (varied(0), None, "^a batch is a list of dicts, got dict"), (None, None, "^a batch is .* got NoneType"),
    (iter([varied(0)]), None, "^a batch is a list of dicts, got list_iterator"),
])  # fmt: skip
def test_a_batch_that_does_not_fit_reaches_no_executor(make_policy, batch, noise, message):
    policy = make_policy()
    with pytest.raises(ObservationError, match=message):
        policy.infer_batch(batch, noise)
    assert not executor_of(policy).calls


def test_a_batch_s_images_are_resized_while_the_engine_runs(make_policy, monkeypatch):
    """The third item's wait for the first call to begin, and that call waits for them."""
    policy, running, resizing, resized = make_policy(), threading.Event(), threading.Event(), []
    finish, run = policy._opened.preprocessor.finish, executor_of(policy).run

    def watched(_, checked):
        resized.append(checked)
        if len(resized) == 3:
            resizing.set()
            assert running.wait(10)
        return finish(checked)

    def watching(*arguments):
        running.set()
        assert resizing.wait(10)
        return run(*arguments)

    monkeypatch.setattr(type(policy._opened.preprocessor), "finish", watched)
    monkeypatch.setattr(executor_of(policy), "run", watching)
    assert len(policy.infer_batch([varied(index) for index in range(6)])) == len(resized) == 6


def test_more_calls_at_once_than_a_target_runs_are_refused(make_policy):
    assert make_policy().in_flight == make_policy(in_flight=1).in_flight == 1
    with pytest.raises(PlanError, match="in_flight=2: a plan for cpu runs one call at a time; leave it out"):
        make_policy(in_flight=2)


def test_a_failure_in_a_batch_ends_it(make_policy, monkeypatch):
    policy = make_policy()
    monkeypatch.setattr(executor_of(policy), "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.infer_batch([varied(index) for index in range(4)])
    assert policy._opened.engine._calls == 0
