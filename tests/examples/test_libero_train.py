"""examples/libero/train.py, on demonstrations made up here: no simulator is needed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic.files import train_tokenizer
from duq.compiler.model import Pi0
from duq.compiler.settings import Choices, settle
from duq.examples.libero import demonstrations, train
from duq.examples.libero.demonstrations import Demonstration, Seen, path_of
from duq.examples.libero.scene import CAMERAS
from duq.examples.libero.train import Learner, Schedule, Training, augmented, chunks
from duq.plugins.errors import DuqError
from duq.runtime.observations import load_observations
from tests.support.metaworld import HORIZON, SIZE, TINY

PROMPTS = "pick up the milk and place it in the basket", "pick up the butter and place it in the basket"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Four demonstrations of each of two tasks: in the light the hand goes up, in the dark down."""
    random, made = np.random.default_rng(0), tmp_path_factory.mktemp("demonstrations")
    for task, prompt in enumerate(PROMPTS):
        for seed in range(4):
            light, steps = seed % 2 == 0, 20
            actions = np.zeros((steps, 7), np.float32)
            actions[:, 2], actions[:, 6] = (0.8 if light else -0.8), np.where(np.arange(steps) < 10, -1, 1)
            file = path_of(made, task, seed)
            demonstrations.save(file, Demonstration(random.random((steps, 5)), actions, np.arange(steps) == 12))
            pictures = random.integers(0, 20, (steps, 2, SIZE, SIZE, 3)) + (200 if light else 30)
            robot = random.normal((0.1, 0, 0.3, 3.1, 0, 0, 0.04, -0.04), 0.05, (steps, 8)).astype(np.float32)
            where = np.full((steps, 3), 0.1 * task, np.float32)
            objects, names = np.stack((where, where + 0.2), axis=1), np.array([f"object_{task}", "basket"])
            seen = Seen(np.arange(steps), pictures.astype(np.uint8), robot, where, objects, names, prompt)
            demonstrations.save_seen(file, seen)
    return made


@pytest.fixture(scope="module")
def recorded(directory):
    return train.read(directory, TINY)


# --- data --------------------------------------------------------------------------------------------------------------


def test_chunks_end_before_a_push_and_at_the_end():
    actions = np.arange(6, dtype=np.float32)[:, None]
    found, valid = chunks(actions, np.arange(6) == 3, 3)
    np.testing.assert_array_equal(found[1, :, 0], [1, 2, 3])
    assert [row.tolist() for row in valid.astype(int)] == [
        [1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0],
    ]  # fmt: skip


def test_some_of_each_task_are_held_out():
    jobs = [(task, seed) for task in range(3) for seed in range(45)]
    held = train.held_out(jobs)
    assert [sum(held[np.array([t for t, _ in jobs]) == task]) for task in range(3)] == [2, 2, 2]
    assert train.held_out(jobs[:5]).tolist() == [False] * 4 + [True]


def test_moments_are_what_the_runtime_makes_of_observations(directory, recorded, tmp_path):
    """Normalized, padded and tokenized as the compiled policy will do it, and actions back again."""
    train.save_checkpoint(tmp_path / "policy", Learner(TINY, 3).policy, recorded, {})
    checkpoint, settings = settle(load_checkpoint(tmp_path / "policy"), Choices(robot="libero", delta_actions=False))
    preprocessor = settings.preprocessor(checkpoint, cameras=2)
    observations = load_observations(tmp_path / "policy" / "calibration.npz")
    assert len(observations) == train.CALIBRATION
    kept = recorded.kept
    chosen = np.linspace(0, len(kept) - 1, train.CALIBRATION).round().astype(int)
    for observation, i in list(zip(observations, chosen, strict=True))[::9]:
        inputs, moment = preprocessor.model_inputs(observation), kept.take(torch.tensor([i]))
        np.testing.assert_array_equal(inputs.images[:2], moment.pictures[0])
        np.testing.assert_allclose(inputs.state, moment.states[0], atol=2e-5)
        tokens = inputs.tokens[inputs.token_mask]
        np.testing.assert_array_equal(tokens, moment.tokens[0][moment.token_mask[0]])
        robot = preprocessor.robot_actions(moment.actions[0].numpy(), observation)
        assert robot.shape == (HORIZON, 7)
        assert np.abs(np.abs(robot[:, 2]) - 0.8).max() < 1e-4 and np.abs(np.abs(robot[:, 6]) - 1).max() < 1e-4


def test_moments_before_a_push_are_left_out_and_prompts_kept(recorded):
    # 20 steps, a push at step 12, chunks of 4: a moment needs 4 undisturbed actions.
    assert len(recorded.kept) == 7 * (9 + 4) and len(recorded.held_out) == 9 + 4
    assert recorded.kept.valid.all()
    lengths = recorded.kept.token_mask.sum(dim=1)
    assert len(set(lengths.tolist())) == 2 and lengths.max() <= TINY.max_prompt_tokens


def test_a_prompt_longer_than_the_policy_takes():
    with pytest.raises(DuqError, match=r"'pick .*' has \d+ tokens, and the policy takes 3"):
        train.tokenized(list(PROMPTS), train_tokenizer(), replace(TINY, max_prompt_tokens=3))


def test_too_few_demonstrations(directory, tmp_path):
    one = demonstrations.load(path_of(directory, 0, 0))
    demonstrations.save(path_of(tmp_path, 0, 0), one)
    with pytest.raises(DuqError, match="1 demonstrations are too few"):
        train.read(tmp_path, TINY)
    demonstrations.save(path_of(tmp_path, 0, 1), one)
    with pytest.raises(DuqError, match="holds no pictures"):
        train.read(tmp_path, TINY)
    for seed in range(2):
        demonstrations.save(path_of(tmp_path, 0, seed), replace(one, pushed=np.ones(20, bool)))
        demonstrations.save_seen(path_of(tmp_path, 0, seed), demonstrations.load_seen(path_of(directory, 0, 0), SIZE))
    with pytest.raises(DuqError, match="undisturbed actions"):
        train.read(tmp_path, TINY)


def test_images_are_moved_and_tinted_each_by_itself():
    torch.manual_seed(0)
    pictures = torch.arange(12, dtype=torch.uint8)[:, None, None].expand(2, 2, 12, 12, 3) * 20
    plain = augmented(pictures)
    assert plain.shape == (2, 2, 3, 12, 12)
    torch.testing.assert_close(plain[0, 0, 0, :, 0], torch.arange(12) * 20 / 127.5 - 1)
    moved = torch.stack([augmented(pictures, shift=2) for _ in range(40)])[:, :, :, 0, :, 0]
    first = ((moved[..., 6] + 1) * 127.5 / 20).round() - 6
    assert set(first.flatten().tolist()) == {-2, -1, 0, 1, 2} and (first[:, 0, 0] != first[:, 0, 1]).any()
    tinted = augmented(pictures, color=0.1)
    assert not torch.equal(tinted[0, 0, 0], tinted[0, 0, 1])


# --- learning ----------------------------------------------------------------------------------------------------------


def test_draws_are_velocities_each_by_itself(recorded):
    torch.manual_seed(0)
    policy, batch = Learner(TINY, 3).policy, recorded.kept.take(torch.tensor([0, len(recorded.kept) - 1]))
    policy.action_out_proj.weight.data.normal_()
    x_t, times = torch.randn(2, 3, *batch.actions.shape[1:]), torch.rand(2, 3)
    mask = torch.cat((torch.ones(2, 2 * TINY.vision.tokens, dtype=torch.bool), batch.token_mask), dim=1)
    with torch.no_grad():
        _, past = policy.prefix(policy.embed_images(augmented(batch.pictures)), batch.tokens, mask)
        found = train.velocities(policy, batch.states, x_t, times, mask, past)
        for draw in range(3):
            alone = policy.velocity(batch.states, x_t[:, draw], times[:, draw], mask, past)
            torch.testing.assert_close(found[:, draw], alone, atol=1e-5, rtol=1e-4)


def test_patches_by_a_matrix_product_are_the_policys_own():
    learner, images = Learner(TINY, 3), torch.randn(2, 3, SIZE, SIZE)
    policy = Pi0(TINY)
    policy.load_state_dict(learner.policy.state_dict())
    torch.testing.assert_close(
        learner.policy.vision.embeddings(images), policy.vision.embeddings(images), rtol=1e-5, atol=1e-5
    )


def test_objects_that_are_not_there_are_not_looked_for(recorded):
    objects = recorded.kept.objects
    assert objects.shape[1] == 3 and objects.isnan().any(dim=2).sum(dim=1).unique().tolist() == [1]
    torch.manual_seed(0)
    learner, tokens = Learner(TINY, 3), torch.randn(len(objects), 5, TINY.llm.width)
    error = learner._everywhere(tokens, objects)
    there = objects.clone()
    there[:, 0] = 5.0  # where a third of them is counted only if it is there
    assert error.isfinite() and learner._everywhere(tokens, there) > error
    error.backward()
    assert all(parameter.grad.isfinite().all() for parameter in (learner.attend.weight, learner.place.weight))


def test_what_is_not_valid_has_no_part_in_the_loss(recorded, monkeypatch):
    torch.manual_seed(0)
    learner, batch = Learner(TINY, 3), recorded.kept.take(torch.arange(4))
    learner.policy.action_out_proj.weight.data.normal_()
    noise, times = train.draw_noise(batch, 2)
    images = augmented(batch.pictures)
    valid = torch.ones_like(batch.valid)
    valid[:, -1] = False
    spoilt = batch.actions.clone()
    spoilt[:, -1] += 100
    whole = learner(images, batch, noise, times)[0]
    masked = learner(images, replace(batch, valid=valid), noise, times)[0]
    assert not torch.isclose(whole, masked)
    # which see the spoilt action otherwise
    monkeypatch.setattr(train, "velocities", lambda policy, state, x_t, *_: torch.zeros_like(x_t))
    first = learner(images, replace(batch, valid=valid), noise, times)[0]
    torch.testing.assert_close(first, learner(images, replace(batch, valid=valid, actions=spoilt), noise, times)[0])


def test_the_place_of_the_object_is_read_off_the_prompts_last_token(recorded):
    learner = Learner(TINY, 3)
    batch = recorded.kept.take(torch.tensor([0, len(recorded.kept) - 1]))
    assert batch.token_mask.sum(dim=1).unique().numel() == 2
    seen = []
    learner.locate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    noise, times = train.draw_noise(batch, 1)
    learner(augmented(batch.pictures), batch, noise, times)
    for row in range(2):  # each alone, without the padding
        alone = batch.take(torch.tensor([row]))
        length = int(alone.token_mask.sum())
        alone = replace(alone, tokens=alone.tokens[:, :length], token_mask=alone.token_mask[:, :length])
        learner(augmented(alone.pictures), alone, noise[row : row + 1], times[row : row + 1])
        torch.testing.assert_close(seen[-1][0], seen[0][row], atol=1e-5, rtol=1e-4)


def trained(recorded, monkeypatch, steps, stop=None, state=None):
    monkeypatch.setattr(train, "REPORT_STEPS", 5)
    training = Training(TINY, 3, Schedule(steps=steps, batch=16, learning_rate=3e-3, warmup=5), seed=1, device="cpu")
    if state is not None:
        training.restore(state)
    states = []

    def keep():
        states.append({key: value for key, value in training.state().items()})
        if stop is not None and training.step >= stop:
            raise KeyboardInterrupt

    try:
        training.run(recorded, lambda losses: None, keep)
    except KeyboardInterrupt:
        pass
    return training


def test_a_run_that_was_stopped_goes_on_bit_for_bit(recorded, monkeypatch, tmp_path):
    whole = trained(recorded, monkeypatch, 20)
    part = trained(recorded, monkeypatch, 20, stop=10)
    assert part.step == 10
    torch.save(part.state(), tmp_path / "state.pt")
    rest = trained(recorded, monkeypatch, 20, state=torch.load(tmp_path / "state.pt", weights_only=True))
    for name, tensor in whole.best.state_dict().items():
        assert torch.equal(tensor, rest.best.state_dict()[name]), name
    assert [losses["held_out"] for losses in rest.history] == [losses["held_out"] for losses in whole.history]


def test_it_learns_and_keeps_the_best(recorded, monkeypatch):
    training = trained(recorded, monkeypatch, 60)
    held = [losses["held_out"] for losses in training.history]
    assert held[-1] < 0.7 * held[0] and training.lowest == min(held)
    assert training.history[-1]["target_cm"] < training.history[0]["target_cm"]
    assert train.held_out_loss(replace_policy(training), recorded.held_out)[0] == pytest.approx(min(held), rel=1e-4)


def replace_policy(training):
    learner = training.average
    learner.policy.load_state_dict(training.best.state_dict())
    return learner


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(train, "POLICY", TINY)
    monkeypatch.setattr(train, "REPORT_STEPS", 2)


def run(command_line, directory, out, *options):
    return command_line(train.main, directory, "--out", out, "--device", "cpu", "--batch", 2, *options)


def test_the_command_writes_a_checkpoint_for_duq_compile(tiny, command_line, directory, tmp_path):
    done = run(command_line, directory, tmp_path / "policy", "--steps", 4)
    assert done.code == 0, done
    checkpoint = load_checkpoint(tmp_path / "policy")
    assert checkpoint.config == TINY and checkpoint.tokenizer is not None
    assert {"state", "actions"} <= set(checkpoint.norm_stats)
    weights = load_file(tmp_path / "policy" / "model.safetensors")
    assert not any(part in name for name in weights for part in ("locate", "attend", "place."))
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    notes = json.loads((tmp_path / "policy" / "training.json").read_text())
    assert [losses["step"] for losses in notes["losses"]] == [2, 4] and notes["best"] in notes["losses"]
    assert set(load_observations(tmp_path / "policy" / "calibration.npz")[0]) == {*CAMERAS, "observation/state", "prompt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]
    done = run(command_line, directory, tmp_path / "policy", "--steps", 4)
    assert done.code == 2 and "already exists" in done.err


def test_a_run_goes_on_only_with_its_own_settings(tiny, command_line, directory, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(train, "save_checkpoint", stopped)
        done = run(command_line, directory, tmp_path / "policy", "--steps", 2)
    assert done.code == 2 and [path.name for path in tmp_path.iterdir()] == ["policy.state"]
    done = run(command_line, directory, tmp_path / "policy", "--steps", 3)
    assert done.code == 2 and "policy.state: is of a run with another steps" in done.err
    (tmp_path / "policy.state").write_bytes(b"nonsense")
    done = run(command_line, directory, tmp_path / "policy", "--steps", 2)
    assert done.code == 2 and "policy.state: is no state of a run" in done.err


@pytest.mark.parametrize("options, message", [
    (["--deterministic", "--minutes", 1], "the clock does not give the same steps again"),
    (["--image-size", 100, "--device", "cpu"], "--image-size 100: is no multiple of 14"),
    (["--device", "cuda"], "--device cuda: PyTorch finds no GPU"),
    (["--out", "/dev/null/policy"], "--out /dev/null/policy"),
])  # fmt: skip
def test_bad_options(tiny, command_line, directory, tmp_path, options, message):
    done = command_line(train.main, directory, "--out", tmp_path / "policy", *options)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
