"""examples/libero/arms.py, on a tiny policy of train.py's form."""

import numpy as np
import pytest
import torch

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.quant.linears import select_linears
from duq.compiler.quant.store import load_quantization
from duq.examples.libero import arms, evaluate, naive, train
from duq.examples.libero.arms import ARMS
from duq.examples.libero.scene import CAMERAS
from duq.examples.libero.starts import Start
from duq.examples.libero.train import Learner, Recorded
from duq.plugins.errors import DuqError
from duq.runtime import Policy
from tests.support.metaworld import HORIZON, SIZE, TINY


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    torch.manual_seed(0)
    random, learner = np.random.default_rng(0), Learner(TINY, objects=3)
    learner.policy.action_out_proj.weight.data.normal_()
    values = random.normal(size=(50, 8))
    stats = {"state": train.statistics(values), "actions": train.statistics(values[:, :7])}
    observations = [
        {key: random.integers(0, 255, (SIZE, SIZE, 3), np.uint8) for key in CAMERAS}
        | {"observation/state": random.normal(size=8).astype(np.float32), "prompt": "pick up the milk"}
        for _ in range(4)
    ]
    out = tmp_path_factory.mktemp("checkpoint") / "policy"
    train.save_checkpoint(out, learner.policy, Recorded(None, None, stats, train.train_tokenizer(), observations, ""), {})
    return out, observations


def answer(arm, observation):
    noise = np.random.default_rng(1).standard_normal((1, *arm.noise_shape), np.float32)
    return arm.answer([Start(0, 0)], [0], [observation], noise)[0]


@pytest.fixture(scope="module")
def made(policy, tmp_path_factory):
    out = tmp_path_factory.mktemp("arms")
    return {name: arms.make(name, policy[0], out, None) for name in ("none", "bare", "reference")}


def test_arms_differ_from_fp32_as_their_schemes_say(policy, made):
    checkpoint, observations = policy
    fp32 = answer(evaluate.TorchArm(checkpoint, "", made["none"]), observations[0])
    assert fp32.shape == (HORIZON, 7)

    def error(arm):
        return float(np.sqrt(np.square(answer(arm, observations[0]) - fp32).mean()))

    assert error(evaluate.PlanArm(made["none"])) < 1e-4
    quantized = [error(evaluate.TorchArm(checkpoint, str(made[name]), made["none"])) for name in ("bare", "reference")]
    assert all(1e-3 < each < 3 for each in quantized)


def test_naive_rounding_by_its_bits(policy, made):
    checkpoint, observations = policy
    fp32 = answer(evaluate.TorchArm(checkpoint, "", made["none"]), observations[0])
    arms_ = [evaluate.TorchArm(checkpoint, bits, made["none"]) for bits in ("W8A8", "W4A8", "W4A4")]
    errors = [float(np.square(answer(arm, observations[0]) - fp32).mean()) for arm in arms_]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert len({arm.identity for arm in arms_}) == 3 and arms_[1].identity.endswith("-W4A8")
    assert naive.bits_of("W4A9") is None and naive.bits_of("build/W4A8") is None


def test_rounding_keeps_the_largest_and_signs():
    values = torch.tensor([-0.7, 0.24, 0.26, 0.0])
    torch.testing.assert_close(naive.rounded(values, 4), torch.tensor([-0.7, 0.2, 0.3, 0.0]))
    assert naive.rounded(torch.zeros(2), 4).tolist() == [0.0, 0.0]


def test_chunks_too_short_to_carry_out_are_refused(made):
    arm = evaluate.PlanArm(made["none"])
    evaluate.check_chunks("none", arm, HORIZON)
    with pytest.raises(DuqError, match=f"--execute {HORIZON + 1}: a chunk of none has {HORIZON} actions"):
        evaluate.check_chunks("none", arm, HORIZON + 1)


def test_bare_has_no_transform_at_all(policy, made):
    checkpoint = load_checkpoint(policy[0])
    packs = load_quantization(made["bare"], checkpoint).packs
    assert set(packs) == set(select_linears(load_recipe("all", {}, environment={}), checkpoint.config))
    for pack in packs.values():
        assert pack.rotation is None and pack.permutation is None and pack.input_scale is None and pack.weight_bits == 4


@pytest.mark.parametrize("name", ARMS)
def test_each_recipe_selects_what_its_title_says(name):
    recipe = load_recipe(ARMS[name].preset, ARMS[name].settings, environment={})
    parts = {linear.split(".")[0] for linear in select_linears(recipe, TINY)}
    expected = {
        "none": set(), "w4a8-llm": {"llm"}, "w4a8-expert": {"expert"}, "w8a8-vision": {"vision"},
        "w4a8-all": {"vision", "projector", "llm", "expert"}, "bare": {"vision", "projector", "llm", "expert"},
        "w8a8": {"vision", "projector", "llm", "expert"}, "w4a16": {"vision", "projector", "llm", "expert"},
    }.get(name, {"llm", "expert"})  # fmt: skip
    assert parts == expected
    if name == "w4a8-llm-expert":
        assert any("expert" in linear and "self_attn" in linear for linear in select_linears(recipe, TINY))


def test_plans_are_for_libero_with_absolute_actions(made):
    metadata = Policy(made["none"]).metadata
    assert metadata["robot"] == "libero" and metadata["cameras"] == 2 and metadata["action_horizon"] == HORIZON


def test_solvers_other_than_ten_euler_steps(policy, made):
    plan = Policy(arms.make("w4a8-ab2-5", policy[0], made["none"].parent, None))
    assert (plan.metadata["solver"], plan.metadata["num_steps"]) == ("ab2", 5)


def test_the_command_keeps_what_is_there(command_line, policy, made):
    out, before = made["none"].parent, made["none"].stat().st_mtime_ns
    done = command_line(arms.main, policy[0], "--out", out, "--arm", "none", "--arm", "reference", "--jobs", 1)
    assert done.code == 0 and made["none"].stat().st_mtime_ns == before, done
    assert f"--plan {made['none']}" in done.out and f"--torch reference={policy[0]}@{made['reference']}" in done.out
    done = command_line(arms.main, policy[0], "--out", out, "--arm", "w3a3")
    assert done.code == 2 and "--arm w3a3: unknown" in done.err
