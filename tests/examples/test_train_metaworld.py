"""examples/train_metaworld.py and its data, on demonstrations made up here: no simulator is needed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

from duq.compiler.accuracy.reference import tensors
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic.files import train_tokenizer
from duq.compiler.model import Pi0, build_model
from duq.compiler.pipeline import compile_policy
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.targets import Options
from duq.runtime import Policy
from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.observations import load_observations, save_observations
from duq.runtime.preprocess import Preprocessor
from examples import metaworld_data, train_metaworld
from examples.metaworld_data import Demonstrations
from examples.train_metaworld import Batches, Schedule, flow_matching_loss
from tests.support.metaworld import GEMMA, HORIZON, SIZE, TINY


def image(brightness, rng):
    """Of one color, with a gradient and some noise on it."""
    ramp = np.linspace(0, 40, SIZE)[:, None, None] + np.linspace(0, 20, SIZE)[:, None]
    return (brightness + ramp + rng.integers(0, 8, (SIZE, SIZE, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def demonstrations():
    """To the light one goes up, to the dark one down; twice as far if told to open."""
    rng = np.random.default_rng(0)
    light, far = rng.random(80) < 0.5, rng.random(80) < 0.5
    direction = np.where(light, 1.0, -1.0) * np.where(far, 1.0, 0.5)
    return Demonstrations(
        images=[[metaworld_data.encode(image(180 if up else 20, rng)) for _ in range(2)] for up in light],
        states=rng.uniform(-1, 1, (80, 4)).astype(np.float32),
        actions=np.broadcast_to(direction[:, None, None], (80, HORIZON, 2)).astype(np.float16),
        prompts=np.where(far, "open the window", "press"),
        episodes=np.arange(80, dtype=np.int32) // 4,
    )


@pytest.fixture(scope="module")
def batches(demonstrations):
    return Batches.of(demonstrations, TINY, train_tokenizer(), "cpu")


# --- the data --------------------------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it(demonstrations, tmp_path):
    file = tmp_path / "d.npz"
    metaworld_data.save(file, demonstrations)
    assert [path.name for path in tmp_path.iterdir()] == ["d.npz"]
    found = metaworld_data.load(file)
    assert found.images == demonstrations.images
    for name in ("states", "actions", "prompts", "episodes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(demonstrations, name))
    twice = Demonstrations.join([found, found])
    assert len(twice) == 160 and twice.images[80:] == found.images


def test_another_file_is_refused(tmp_path, command_line):
    text, other = tmp_path / "text.npz", tmp_path / "other.npz"
    text.write_text("no archive")
    np.savez(other, states=np.zeros(3))
    for file in (text, other):
        done = command_line(train_metaworld.main, file, "--out", tmp_path / "policy", "--device", "cpu")
        assert done.code == 2 and f"{file}: is no file of demonstrations" in done.err
    done = command_line(train_metaworld.main, tmp_path / "absent.npz", "--out", tmp_path / "policy", "--device", "cpu")
    assert done.code == 2 and "absent.npz" in done.err and not (tmp_path / "policy").exists()


def test_an_image_survives_its_compression():
    source = image(100, np.random.default_rng(1))
    found = metaworld_data.decode([[metaworld_data.encode(source)]])
    assert found.shape == (1, 1, SIZE, SIZE, 3) and found.dtype == np.uint8
    assert np.abs(found[0, 0].astype(int) - source).mean() < 5


def test_some_moments_become_observations(demonstrations, tmp_path):
    save_observations(tmp_path / "o.npz", metaworld_data.observations(demonstrations, 5))
    found = load_observations(tmp_path / "o.npz")
    preprocessor = Preprocessor(TINY, tokenizer=train_tokenizer(), cameras=2)
    assert len(found) == 5
    for observation, i in zip(found, (0, 20, 40, 59, 79), strict=True):  # rounded to even
        inputs = preprocessor.model_inputs(observation)
        np.testing.assert_array_equal(inputs.images[:2], metaworld_data.decode(demonstrations.images[i : i + 1])[0])
        np.testing.assert_array_equal(inputs.state[:4], demonstrations.states[i])
        assert observation["prompt"] == demonstrations.prompts[i]


# --- batches and the loss --------------------------------------------------------------------------------------------


def test_moments_are_padded_as_the_runtime_pads_them(demonstrations, batches):
    preprocessor = Preprocessor(TINY, tokenizer=train_tokenizer(), cameras=2)
    batch = batches.take(torch.arange(12))
    pixels = metaworld_data.decode(demonstrations.images[:12])
    for i in range(12):
        observation = {
            "image": dict(zip(("base_0_rgb", "left_wrist_0_rgb"), pixels[i], strict=True)),
            "state": demonstrations.states[i],
            "prompt": str(demonstrations.prompts[i]),
        }
        images, _, tokens, mask, state = tensors(preprocessor.model_inputs(observation))
        torch.testing.assert_close(batch.images[i], images[0, :2])
        assert batch.tokens[i][batch.token_mask[i]].tolist() == tokens[mask].tolist()
        torch.testing.assert_close(batch.states[i], state[0])


def test_a_shift_moves_the_image_and_repeats_its_border(batches):
    torch.manual_seed(0)
    index = torch.arange(16)
    still = batches.take(index).images
    moved = batches.take(index, shift=2).images
    padded = torch.nn.functional.pad(still.flatten(0, 1), (2, 2, 2, 2), mode="replicate")
    windows = [padded[:, :, y : y + SIZE, x : x + SIZE] for y in range(5) for x in range(5)]
    images = moved.flatten(0, 1)
    which = [[n for n, window in enumerate(windows) if torch.equal(window[i], images[i])] for i in range(len(images))]
    assert all(which) and len({n for each in which for n in each}) > 8  # cameras, too, are shifted each by itself
    assert not torch.equal(batches.take(index, jitter=0.1).images, still)


def test_the_loss_is_that_of_one_moment_and_draw_at_a_time(batches):
    torch.manual_seed(0)
    model = Pi0(TINY)
    batch = batches.take(torch.arange(6))
    noise, times = torch.randn(6, 3, HORIZON, 8), torch.rand(6, 3)
    expected = []
    for i in range(6):
        tokens = batch.tokens[i][batch.token_mask[i]][None]  # no padding
        mask = torch.ones(1, 2 * TINY.vision.tokens + tokens.shape[1], dtype=torch.bool)
        _, past = model.prefix(model.embed_images(batch.images[i : i + 1]), tokens, mask)
        for e, t in zip(noise[i], times[i], strict=True):
            x_t = e * t + batch.actions[i] * (1 - t)
            v = model.velocity(batch.states[i : i + 1], x_t[None], t[None], mask, past)
            expected.append((v[0] - (e - batch.actions[i])).square().mean())
    torch.testing.assert_close(flow_matching_loss(model, batch, noise, times), torch.stack(expected).mean())


def test_times_are_those_of_pi0(batches):
    torch.manual_seed(0)
    batch = batches.take(torch.zeros(1000, dtype=torch.int64))
    noise, times = train_metaworld.draw_noise(batch, 40)
    assert noise.shape == (1000, 40, HORIZON, 8) and abs(noise.std() - 1) < 0.01
    assert 0.001 <= times.min() and times.max() <= 1
    for t in (0.1, 0.5, 0.9):  # P(Beta(1.5, 1) < t) = t^1.5
        assert abs((times < 0.001 + 0.999 * t).float().mean() - t**1.5) < 0.01


def test_the_learning_rate_rises_falls_and_ends_at_zero():
    schedule = Schedule(learning_rate=0.1, warmup=10)
    assert schedule.rate(0, 0.0) == pytest.approx(0.01)
    assert schedule.rate(10, 0.0) == pytest.approx(0.1)
    assert schedule.rate(500, 0.5) == pytest.approx(0.05)
    assert schedule.rate(999, 1.0) == schedule.rate(999, 1.2) == 0


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(batches):
    reports = []
    schedule = Schedule(steps=150, batch=16, learning_rate=4e-3, warmup=10)
    model = train_metaworld.train(TINY, batches, batches, schedule, 0, lambda *report: reports.append(report))
    return model, reports


def test_it_learns_to_look_and_to_listen(trained, demonstrations, batches, tmp_path):
    model, reports = trained
    assert reports[-1][0] == 1 and reports[-1][1]["held_out"] < 0.5  # velocities of zero have a loss above 1
    train_metaworld.save_checkpoint(tmp_path / "policy", model, train_tokenizer(), [])
    checkpoint = load_checkpoint(tmp_path / "policy")
    assert checkpoint.config == TINY and checkpoint.norm_stats is None
    policy = build_model(checkpoint)
    batch = batches.take(torch.arange(32))
    torch.manual_seed(1)
    mask = torch.ones(32, 2, dtype=torch.bool)
    actions = policy.sample_actions(
        batch.images, mask, batch.tokens, batch.token_mask, batch.states, torch.randn(32, HORIZON, 8)
    )
    found, wanted = actions[..., :2].mean((1, 2)), batch.actions[:, 0, 0]
    assert (found.sign() == wanted.sign()).float().mean() > 0.95
    far, near = wanted.abs() > 0.7, wanted.abs() < 0.7
    assert found[far].abs().mean() > found[near].abs().mean() + 0.2


def test_an_untrained_policy_runs_in_the_engine(tmp_path):
    """Its norms and some biases are all zeros: equal tensors, of which the exporter keeps one."""
    torch.manual_seed(0)
    shallow = replace(TINY, llm=replace(GEMMA, depth=1), expert=replace(GEMMA, depth=1))
    train_metaworld.save_checkpoint(tmp_path / "policy", Pi0(shallow), train_tokenizer(), [])
    checkpoint = load_checkpoint(tmp_path / "policy")
    float_recipe = Quantization(load_recipe("none", environment={}))
    compile_policy(checkpoint, float_recipe, tmp_path / "engine.plan", Options(cameras=2), Progress(disable=True))
    rng = np.random.default_rng(0)
    observation = {
        "image": {slot: rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8) for slot in IMAGE_SLOTS[:2]},
        "state": rng.uniform(-1, 1, 4).astype(np.float32),
        "prompt": "press",
    }
    noise = rng.standard_normal((HORIZON, 8), np.float32)
    found = Policy(tmp_path / "engine.plan", threads=1).infer(observation, noise)["actions"]
    inputs = Preprocessor(TINY, tokenizer=train_tokenizer()).model_inputs(observation)
    expected = build_model(checkpoint).sample_actions(*tensors(inputs), torch.from_numpy(noise)[None])[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_seed_determines_the_weights(batches, tmp_path):
    schedule = Schedule(steps=3, batch=4)
    weights = []
    for seed in (0, 0, 1):
        model = train_metaworld.train(TINY, batches, batches, schedule, seed, lambda progress, losses: None)
        train_metaworld.save_checkpoint(tmp_path / f"{len(weights)}", model, b"", [])
        weights.append(load_file(tmp_path / f"{len(weights)}" / "model.safetensors"))
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_stops_when_the_time_is_over(batches):
    reports = []
    train_metaworld.train(
        TINY,
        batches,
        batches,
        Schedule(steps=10**9, minutes=0.01, batch=2),
        0,
        lambda p, line: reports.append((p, line["step"])),
    )
    assert reports[-1][0] == 1 and reports[-1][1] < 10_000


def test_the_command_line(demonstrations, tmp_path, monkeypatch, command_line):
    monkeypatch.setattr(train_metaworld, "POLICY", TINY)
    metaworld_data.save(tmp_path / "d.npz", demonstrations)
    options = "--steps", "2", "--batch", "2", "--device", "cpu"
    done = command_line(train_metaworld.main, tmp_path / "d.npz", "--out", tmp_path / "policy", *options)
    assert done.code == 0, done
    assert load_checkpoint(tmp_path / "policy").config == TINY
    assert len(json.loads((tmp_path / "policy" / "training.json").read_text())["losses"]) == 1
    done = command_line(train_metaworld.main, tmp_path / "d.npz", "--out", tmp_path / "policy", *options)
    assert done.code == 2 and "already exists" in done.err
