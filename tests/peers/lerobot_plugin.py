"""lerobot_policy_duq in LeRobot's own commands, against LeRobot's own policies: equal actions from equal noise.

`make test-peers` compiles policies that lerobot_policies.py saved, in float, with `duq-compile --lerobot` into
build/peer_cases/exports, and runs this file with pytest where LeRobot is installed. LeRobot makes logs/ in the folder in
which it runs.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import lerobot_policies
from fakes import JOINTS, TASK, FakeRobot, FakeRobotConfig
from lerobot.async_inference import policy_server as lerobot_policy_server
from lerobot.async_inference.configs import RobotClientConfig
from lerobot.async_inference.robot_client import RobotClient
from lerobot.configs import PreTrainedConfig, RTCAttentionSchedule
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.scripts import lerobot_eval, lerobot_rollout
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors.torch import load_model

TOLERANCE = 1e-4  # of the actions' size
CASES = Path(__file__).absolute().parents[2] / "build" / "peer_cases"
TOKENIZER = CASES / "tiny" / "tokenizer.model"
RELATIVE = "pi05 mean and std, relative"
HORIZON = lerobot_policies.HORIZON

register_third_party_plugins()
torch.set_num_threads(1)  # the policies are tiny: threads cost more than they save
logging.getLogger("draccus").setLevel(logging.WARNING)


@functools.cache
def theirs(name: str) -> tuple:
    """LeRobot's policy with the weights that were compiled, its two pipelines, and three raw observations."""
    case = lerobot_policies.CASES[name]
    policy, before, after, stats, random = lerobot_policies.build(name, case, TOKENIZER)
    load_model(policy, CASES / "policies" / lerobot_policies.folder_name(name) / "pretrained_model" / "model.safetensors")
    return policy, before, after, lerobot_policies.observations(case, stats["observation.state"], random)


def folder(name: str) -> Path:
    return CASES / "exports" / lerobot_policies.folder_name(name)


def opened(path: Path, **changes):
    """The policy and its pipelines, by the functions that LeRobot's commands open them with."""
    config = PreTrainedConfig.from_pretrained(path, cli_overrides=[f"--{key}={value}" for key, value in changes.items()])
    config.pretrained_path = path
    policy = get_policy_class(config.type).from_pretrained(path, config=config)
    return policy, *make_pre_post_processors(config, pretrained_path=str(path))


def batch_of(raw: list[dict]) -> dict:
    """Raw observations as lerobot-eval hands them to the preprocessor: batched, with a list of tasks."""
    rows = [prepare_observation_for_inference({k: v for k, v in each.items() if k != "task"}, torch.device("cpu"))
            for each in raw]  # fmt: skip
    batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0] if key.startswith("observation")}
    return batch | {"task": [each["task"] for each in raw]}


def noise_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, HORIZON, 32), generator=torch.Generator().manual_seed(seed))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float32
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"error {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", ["pi0", "pi05", RELATIVE])
def test_chunks_are_lerobots(name, count):
    policy, before, after, raw = theirs(name)
    raw = [raw[index % 3] for index in range(count)]
    expected = after(policy.predict_action_chunk(before(batch_of(raw)), noise=noise_of(count)))
    ours, pre, post = opened(folder(name))
    assert_equal(post(ours.predict_action_chunk(pre(batch_of(raw)), noise=noise_of(count))), expected)


def test_noise_is_drawn_as_lerobot_draws_it():
    policy, before, after, raw = theirs("pi0")
    ours, pre, post = opened(folder("pi0"))
    torch.manual_seed(3)
    expected = after(policy.predict_action_chunk(before(batch_of(raw))))
    torch.manual_seed(3)
    assert_equal(post(ours.predict_action_chunk(pre(batch_of(raw)))), expected)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_select_action_executes_n_action_steps_and_forgets_at_reset(name):
    policy, before, after, raw = theirs(name)
    ours, pre, post = opened(folder(name), n_action_steps=3)
    policy.config.n_action_steps = 3

    def actions(each, before, after) -> torch.Tensor:
        torch.manual_seed(5)
        each.reset()
        found = []
        for step in range(6):
            if step == 4:
                each.reset()
            found.append(after(each.select_action(before(batch_of(raw[step % 3 :][:1] * 2)))))
        return torch.stack(found)

    try:
        assert_equal(actions(ours, pre, post), actions(policy, before, after))
    finally:
        policy.config.n_action_steps = HORIZON
        policy.reset()


def test_a_single_task_is_every_environments():
    ours, pre, _ = opened(folder("pi0"))
    raw = theirs("pi0")[3]
    batch = pre(batch_of([raw[0], raw[0] | {"observation.state": raw[1]["observation.state"]}]))
    listed = ours.predict_action_chunk(batch, noise=noise_of(2))
    assert torch.equal(ours.predict_action_chunk(batch | {"task": raw[0]["task"]}, noise=noise_of(2)), listed)


# --- real-time chunking


@pytest.mark.parametrize("schedule", list(RTCAttentionSchedule), ids=lambda schedule: schedule.name)
@pytest.mark.parametrize(("name", "delay", "horizon", "left"), [("pi0", 2, 5, 6), ("pi05", 1, 6, 4), ("pi0", 3, 3, 3)])
def test_guided_chunks_are_lerobots(name, delay, horizon, left, schedule):
    policy, before, after, raw = theirs(name)
    ours, pre, post = opened(folder(name))
    rtc = RTCConfig(prefix_attention_schedule=schedule, execution_horizon=horizon, max_guidance_weight=5.0)
    first = policy.predict_action_chunk(before(batch_of(raw[:1])), noise=noise_of(1))
    rest, second = first[0, HORIZON - left :], {"noise": noise_of(1, seed=1), "inference_delay": delay}
    try:
        policy.config.rtc_config = ours.config.rtc_config = rtc
        policy.init_rtc_processor()
        ours.init_rtc_processor()
        expected = after(policy.predict_action_chunk(before(batch_of(raw[1:2])), prev_chunk_left_over=rest, **second))
    finally:
        policy.config.rtc_config = None
        policy.init_rtc_processor()
    executed = after(first)[0, HORIZON - left :]
    batch = pre(batch_of(raw[1:2]))
    found = post(ours.predict_action_chunk(batch, prev_chunk_left_over=executed, **second))
    assert_equal(found, expected)
    padded = torch.nn.functional.pad(executed, (0, 0, 0, 2))  # as lerobot-rollout does
    assert torch.equal(post(ours.predict_action_chunk(batch, prev_chunk_left_over=padded, **second)), found)
    free = post(ours.predict_action_chunk(batch, noise=second["noise"]))
    assert (found - free).abs().max() > 10 * TOLERANCE * expected.abs().max()


def test_blended_chunks_keep_the_frozen_prefix():
    ours, pre, post = opened(folder("pi0"), rtc="blend")
    batch = pre(batch_of(theirs("pi0")[3][:1]))
    free = ours.predict_action_chunk(batch, noise=noise_of(1))
    rest = free[0, 3:] + 1
    ours.config.rtc_config = RTCConfig(execution_horizon=4)
    ours.init_rtc_processor()
    found = ours.predict_action_chunk(batch, noise=noise_of(1), inference_delay=2, prev_chunk_left_over=rest)
    weights = torch.tensor([1, 1, 2 / 3, 1 / 3, 0, 0, 0, 0])[:, None]
    torch.testing.assert_close(found[0], weights * torch.nn.functional.pad(rest, (0, 0, 0, 3)) + (1 - weights) * free[0])


@pytest.mark.parametrize(
    ("changes", "rtc", "message"),
    [
        ({}, RTCConfig(debug=True), "debug"),
        ({"rtc": "blend"}, RTCConfig(max_guidance_weight=3.0), "max_guidance_weight"),
    ],
)
def test_what_cannot_be_applied_is_refused_before_a_robot_moves(changes, rtc, message):
    ours, *_ = opened(folder("pi0"), **changes)
    ours.config.rtc_config = rtc
    with pytest.raises(ValueError, match=message):
        ours.init_rtc_processor()


def test_a_plan_that_cannot_stop_between_steps_is_not_guided(monkeypatch):
    ours, *_ = opened(folder("pi0"))
    monkeypatch.setattr(type(ours._engine._opened.engine.executor), "guided", False)
    ours.config.rtc_config = RTCConfig()
    with pytest.raises(ValueError, match="policy.rtc=blend"):
        ours.init_rtc_processor()


def test_actions_come_from_the_queue_or_from_real_time_chunking():
    ours, pre, _ = opened(folder("pi0"))
    ours.config.rtc_config = RTCConfig()
    with pytest.raises(ValueError, match="predict_action_chunk"):
        ours.select_action(pre(batch_of(theirs("pi0")[3][:1])))


# --- settings


def messages(error: BaseException | None) -> str:
    """Of an error and its causes: LeRobot's parser wraps them."""
    return "" if error is None else f"{error} {messages(error.__cause__ or error.__context__)}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 9}, "chunk_size is 9.*8 in the plan"),
        ({"n_action_steps": 9}, "n_action_steps is 9"),
        ({"rtc": "inpaint"}, "guide, blend"),
        ({"checkpoint": "other"}, "checkpoint is other"),
        ({"compile_model": "true"}, "compiled already"),
        ({"use_peft": "true"}, "merges an adapter"),
        ({"n_obs_steps": 2}, "one observation"),
        ({"plan": "other.plan"}, "other.plan"),
    ],
)
def test_settings_that_the_plan_does_not_have_are_refused(changes, message):
    with pytest.raises(Exception) as caught:
        opened(folder("pi0"), **changes)
    assert re.search(message, messages(caught.value))


def test_training_is_refused():
    ours, *_ = opened(folder("pi0"))
    for call in (ours.get_optim_params, lambda: ours.forward({}), ours.config.get_optimizer_preset):
        with pytest.raises(NotImplementedError, match="cannot be trained"):
            call()


def test_a_saved_policy_is_the_same(tmp_path):
    ours, pre, _ = opened(folder("pi0"), n_action_steps=2)
    ours.save_pretrained(tmp_path / "copy")
    again, *_ = opened(tmp_path / "copy")
    batch = pre(batch_of(theirs("pi0")[3]))
    assert again.config.n_action_steps == 2
    assert torch.equal(*(each.predict_action_chunk(batch, noise=noise_of(3)) for each in (ours, again)))


def test_lerobots_steps_are_those_of_the_export():
    """policy_preprocessor.json is written without LeRobot; LeRobot's own writing of the same steps has the same in it."""
    ours, pre, post = opened(folder("pi0"))
    for made, loaded in zip(make_pre_post_processors(ours.config), (pre, post), strict=True):
        assert [type(step) for step in made.steps] == [type(step) for step in loaded.steps]
        assert [step.get_config() for step in made.steps] == [step.get_config() for step in loaded.steps]
        assert made.name == loaded.name


# --- LeRobot's commands


def run(monkeypatch, main, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    main()


def test_lerobot_eval(monkeypatch, tmp_path):
    """End to end, four episodes in two environments at a time; then with LeRobot's policy in its place."""
    arguments = (
        f"--policy.path={folder('pi0')}", "--policy.n_action_steps=3", "--env.type=duq_fake", "--eval.n_episodes=4",
        "--eval.batch_size=2", "--eval.use_async_envs=false", "--seed=1",
    )  # fmt: skip
    run(monkeypatch, lerobot_eval.main, *arguments, f"--output_dir={tmp_path / 'ours'}")
    policy, before, after, _ = theirs("pi0")
    monkeypatch.setattr(policy.config, "n_action_steps", 3)
    monkeypatch.setattr(lerobot_eval, "make_policy", lambda **_: policy)
    monkeypatch.setattr(lerobot_eval, "make_pre_post_processors", lambda **_: (before, after))
    run(monkeypatch, lerobot_eval.main, *arguments, f"--output_dir={tmp_path / 'theirs'}")
    found, expected = (json.loads((tmp_path / each / "eval_info.json").read_text()) for each in ("ours", "theirs"))
    assert found["overall"]["n_episodes"] == 4 and found["overall"]["pc_success"] == 100
    rewards = [np.array(info["per_task"][0]["metrics"]["sum_rewards"]) for info in (found, expected)]
    assert len(set(rewards[0])) == 4
    np.testing.assert_allclose(*rewards, rtol=1e-3, atol=1e-3)


def first_chunk(seed: int, **changes) -> np.ndarray:
    """What LeRobot's policy answers to the fake robot, from the first noise after a seed."""
    policy, before, after, _ = theirs("pi0")
    observation = FakeRobot(FakeRobotConfig()).get_observation()
    state = np.array([observation[name] for name in JOINTS], np.float32)
    raw = {f"observation.images.{name}": observation[name] for name in ("front", "wrist")} | {"observation.state": state}
    batch = before(prepare_observation_for_inference(raw, torch.device("cpu"), TASK))
    torch.manual_seed(seed)
    return after(policy.predict_action_chunk(batch))[0].numpy()


def rollout(monkeypatch, *arguments: str) -> np.ndarray:
    FakeRobot.sent.clear()
    torch.manual_seed(11)
    run(
        monkeypatch, lerobot_rollout.main, f"--policy.path={folder('pi0')}", "--robot.type=duq_fake", f"--task={TASK}",
        "--return_to_initial_position=false", *arguments,
    )  # fmt: skip
    return np.stack(FakeRobot.sent)


def test_lerobot_rollout(monkeypatch):
    sent = rollout(monkeypatch, "--duration=3", "--fps=10")
    count = min(len(sent), HORIZON)
    assert count > 2
    np.testing.assert_allclose(sent[:count], first_chunk(11)[:count], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["guide", "blend"])
def test_lerobot_rollout_with_real_time_chunking(monkeypatch, mode):
    joined, modeling = [], sys.modules[get_policy_class("duq").__module__]
    original = modeling.DuqPolicy._joined

    def spied(self, observation, noise, prefix):
        joined.append((prefix, original(self, observation, noise, prefix)))
        return joined[-1][1]

    monkeypatch.setattr(modeling.DuqPolicy, "_joined", spied)
    sent = rollout(
        monkeypatch, "--duration=8", "--fps=4", "--inference.type=rtc", "--inference.queue_threshold=6",
        "--inference.rtc.execution_horizon=6", f"--policy.rtc={mode}",
    )  # fmt: skip
    assert len(sent) > 4 and np.isfinite(sent).all()
    assert len(joined) > 1 and all(prefix is not None and len(prefix.actions) >= 1 for prefix, _ in joined)
    np.testing.assert_allclose(sent[0], first_chunk(11)[:HORIZON][np.abs(first_chunk(11) - sent[0]).sum(1).argmin()],
                               rtol=1e-3, atol=1e-3)  # fmt: skip


def test_policy_server_and_client(monkeypatch):
    """LeRobot's client and robot over gRPC, with the launcher's server; the stock server refuses the type."""
    from lerobot_policy_duq import policy_server

    assert "duq" not in lerobot_policy_server.SUPPORTED_POLICIES
    port, chunks = 50917, []
    predict = lerobot_policy_server.PolicyServer._predict_action_chunk

    def seeded(self, observation):
        torch.manual_seed(21)
        chunks.append(predict(self, observation))
        return chunks[-1]

    monkeypatch.setattr(lerobot_policy_server.PolicyServer, "_predict_action_chunk", seeded)
    monkeypatch.setattr(sys, "argv", ["duq-lerobot-server", "--host=127.0.0.1", f"--port={port}"])
    threading.Thread(target=policy_server.main, daemon=True).start()
    FakeRobot.sent.clear()
    client = RobotClient(
        RobotClientConfig(
            policy_type="duq", pretrained_name_or_path=str(folder("pi0")), robot=FakeRobotConfig(), task=TASK,
            actions_per_chunk=5, server_address=f"127.0.0.1:{port}", fps=10, aggregate_fn_name="latest_only",
        )
    )  # fmt: skip
    time.sleep(2)
    assert client.start()
    threads = [threading.Thread(target=client.receive_actions, daemon=True),
               threading.Thread(target=client.control_loop, args=(TASK,), daemon=True)]  # fmt: skip
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(FakeRobot.sent) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    client.stop()
    assert len(FakeRobot.sent) >= 5 and len(chunks[0]) == 5
    np.testing.assert_allclose(np.stack(FakeRobot.sent[:5]), first_chunk(21)[:5], rtol=1e-3, atol=1e-3)


def test_a_folder_that_is_half_there_is_an_error(tmp_path):
    shutil.copytree(folder("pi0"), tmp_path / "half")
    (tmp_path / "half" / "engine.plan").unlink()
    with pytest.raises(Exception, match="engine.plan"):
        opened(tmp_path / "half")
