"""openpi-client's own brokers, agents and runtime around a Policy, unchanged."""

from __future__ import annotations

import logging
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.runtime.subscriber import Subscriber

from duq.runtime import Policy
from duq.runtime.limits import LimitCheck
from duq.runtime.robots import load_robot
from tests.support.observations import OBSERVATIONS

HORIZON = 8


@pytest.fixture(scope="module")
def policy(tiny_plans):
    with Policy(tiny_plans("pi0", "none").plan, threads=1, seed=0) as opened:
        yield opened


class Arm(Environment):
    """Five steps long; keeps the actions it is given."""

    def __init__(self):
        self.actions, self.resets = [], 0

    def reset(self):
        self.resets, self.steps = self.resets + 1, 0

    def is_episode_complete(self):
        return self.steps == 5

    def get_observation(self):
        return OBSERVATIONS["libero"]()

    def apply_action(self, action):
        self.steps += 1
        self.actions.append(action["actions"])


class Log(Subscriber):
    def __init__(self):
        self.steps = 0

    def on_episode_start(self):
        pass

    def on_step(self, observation, action):
        self.steps += 1

    def on_episode_end(self):
        pass


def test_the_runtime_runs_episodes_through_a_broker(policy, caplog):
    caplog.set_level(logging.WARNING)
    arm, log, chunks = Arm(), Log(), []
    infer = policy.infer

    class Counted:
        """The policy; chunks that were asked for."""

        def infer(self, obs):
            chunks.append(infer(obs))
            return chunks[-1]

        reset = staticmethod(policy.reset)

    agent = PolicyAgent(ActionChunkBroker(Counted(), action_horizon=3))
    Runtime(arm, agent, [log], num_episodes=2).run()
    assert len(arm.actions) == log.steps == 10 and arm.resets == 3
    assert len(chunks) == 4  # a reset between episodes drops what is left of a chunk
    expected = [chunk["actions"][step] for chunk, steps in zip(chunks, (3, 2, 3, 2), strict=True) for step in range(steps)]
    np.testing.assert_array_equal(arm.actions, expected)


def test_the_broker_takes_the_policy_itself(policy):
    broker = ActionChunkBroker(policy, action_horizon=HORIZON)
    actions = [broker.infer(OBSERVATIONS["libero"]()) for _ in range(HORIZON + 1)]
    assert actions[0]["actions"].shape == (7,) and actions[0]["policy_timing"] == actions[1]["policy_timing"]
    assert actions[-1]["policy_timing"] != actions[0]["policy_timing"]
    broker.reset()


def test_a_reply_with_limits_goes_through_the_broker():
    check = LimitCheck(replace(load_robot("libero"), limits={"x": (-0.5, 0.5)}))

    class Limited:
        def infer(self, obs):
            actions = np.ones((HORIZON, 7), np.float32)
            return {"actions": actions, "limits": check.outside(actions)}

    reply = ActionChunkBroker(Limited(), action_horizon=HORIZON).infer({})
    assert reply["limits"][0]["action"] == "x" and reply["limits"][0]["worst"] == 1.0 and reply["actions"].shape == (7,)


def test_what_a_recorder_saves_comes_back(policy):
    """openpi's PolicyRecorder pickles a flat dict of inputs and outputs."""
    reply = policy.infer(OBSERVATIONS["libero"]())
    found = pickle.loads(pickle.dumps(reply))
    np.testing.assert_array_equal(found["actions"], reply["actions"])
    assert found["policy_timing"] == reply["policy_timing"]


def test_the_rest_of_the_interface(policy):
    assert policy.reset() is None
    assert policy.metadata["action_horizon"] == HORIZON
    reply = policy.infer(OBSERVATIONS["libero"](), noise=np.zeros((HORIZON, 32), np.float32))
    assert reply["actions"].shape == (HORIZON, 7)


def test_the_example_of_the_docs_runs(tiny_plans, tmp_path, monkeypatch, capsys):
    (tmp_path / "engine.plan").symlink_to(tiny_plans("pi0", "none").plan)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/policy.md", "exec"), {})
    assert capsys.readouterr().out.startswith("libero (8, 7) {'infer_ms': ")
