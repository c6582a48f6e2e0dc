"""Made checkpoints: reproducible, complete or absent, hard to quantize, and policies that look at their inputs."""

from __future__ import annotations

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint, make_config, weight_bytes
from duq.compiler.errors import CheckpointError
from duq.compiler.model import build_model
from duq.tools.make_checkpoint import main

SMALLEST = {"depth": 1, "vision_depth": 1}


def test_equal_seeds_give_equal_bytes(tmp_path):
    first, again = (make_checkpoint(tmp_path / name, **SMALLEST) for name in ("first", "again"))
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert len(files) == 4
    assert all((first / file).read_bytes() == (again / file).read_bytes() for file in files)
    other = make_checkpoint(tmp_path / "other", seed=1, **SMALLEST)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_tensor_depends_on_seed_and_name_only(tiny_pi0, tmp_path):
    cut = make_checkpoint(tmp_path / "cut", dtype="float32", layout="lerobot", depth=2, vocab_size=1024)
    name = "paligemma_with_expert.paligemma.model.language_model.layers.1.mlp.up_proj.weight"
    stored = load_file(cut / "model.safetensors")[f"model.{name}"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored.bfloat16(), load_file(tiny_pi0 / "model.safetensors")[name])


def test_size_is_known_before(tiny_pi0):
    written = sum(tensor.nbytes for tensor in load_file(tiny_pi0 / "model.safetensors").values())
    assert weight_bytes(make_config("tiny"), "bfloat16") == written
    assert 6.2e9 < weight_bytes(make_config("full"), "bfloat16") < 6.6e9


def test_nothing_is_left_of_an_interrupted_one(tmp_path):
    def interrupt(written):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "policy", advance=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        make_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="vocabulary of 100 cannot hold"):
        make_checkpoint(tmp_path / "policy", vocab_size=100)
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_tokenizer_is_built_like_paligemmas(tiny_pi0):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(load_checkpoint(tiny_pi0).tokenizer))
    ids = (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id())
    assert ids == (0, 1, 2, 3) and len(tokenizer) <= 512
    for text in ("pick up the red block", "Task: é, State: 12 255;\nAction: ", "日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 3 not in tokenizer.encode(text)
    assert len(tokenizer.encode("\n")) == 1 and len(tokenizer.encode("pick up the red block")) <= 6


def test_command_line(tmp_path, command_line):
    out = tmp_path / "policy"
    arguments = [
        "--out",
        str(out),
        "--pi05",
        "--layout",
        "lerobot",
        "--robot",
        "none",
        "--depth",
        "1",
        "--vision-depth",
        "1",
    ]
    result = command_line(main, *arguments)
    assert result.code == 0 and "pi0.5 tiny" in result.out
    checkpoint = load_checkpoint(out)
    assert (checkpoint.layout, checkpoint.config.pi05, checkpoint.norm_stats) == ("lerobot", True, None)
    result = command_line(main, *arguments)
    assert result.code == 2 and "already exists" in result.err


@pytest.fixture(scope="module", params=["tiny_pi0", "tiny_pi05"])
def model(request):
    return build_model(load_checkpoint(request.getfixturevalue(request.param)))


def observation(config, seed=0):
    """One camera with large shapes in it, a prompt of nine tokens, a state of 14 dimensions, noise."""
    random = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 7, 7, generator=random) * 2 - 1, 224, mode="bilinear")
    tokens, mask = torch.zeros(1, 16, dtype=torch.long), torch.arange(16)[None] < 9
    tokens[mask] = torch.randint(4, 448, (9,), generator=random)
    state = torch.zeros(1, config.action_dim)
    state[0, :14] = torch.randn(14, generator=random)
    noise = torch.randn(1, config.action_horizon, config.action_dim, generator=random)
    image_mask = torch.ones(1, 1, dtype=torch.bool)
    return dict(images=image[None], image_mask=image_mask, tokens=tokens, token_mask=mask, state=state, noise=noise)


def test_actions_are_of_order_one_and_look_at_every_input(model):
    inputs, other = observation(model.config), observation(model.config, seed=1)

    def change(name):
        return model.sample_actions(**(inputs | {name: other[name]}), num_steps=4) - actions

    actions = model.sample_actions(**inputs, num_steps=4)
    assert actions.abs().max() < 10 and 0.2 < actions.square().mean().sqrt() < 3
    for name in ("images", "tokens") if model.config.pi05 else ("images", "tokens", "state"):
        assert change(name).abs().max() > 0.01, name
    # the flow contracts: new noise moves the actions, but less than the noise itself moved
    moved = change("noise").square().mean() / (other["noise"] - inputs["noise"]).square().mean()
    assert 0.01 < moved < 0.5


def test_activations_have_the_outliers_of_trained_models_and_keep_their_size(model):
    inputs, sizes = observation(model.config), {}

    def record(name):
        def hook(module, args):
            sizes[name] = args[0].float().flatten(0, -2).square().mean(dim=0).sqrt()

        return hook

    hooks = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "gate_proj", "down_proj")) and not name.startswith("vision")
    ]
    model.sample_actions(**inputs, num_steps=1)
    for hook in hooks:
        hook.remove()
    for name, channels in sizes.items():
        assert 0.1 < channels.median() < 4, name
        assert channels.max() > 4 * channels.median(), name
