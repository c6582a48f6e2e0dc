"""Properties of the reference model that the compiler's rewrites rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duq.compiler.model import Pi0, timesteps
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig

VISION = VisionConfig(width=16, depth=1, mlp_width=24, heads=2, image_size=28)  # 4 tokens a camera
GEMMA = GemmaConfig(width=32, depth=2, mlp_width=48, heads=8, kv_heads=1, head_dim=16)
PROMPT_SLOTS, HORIZON, ACTION_DIM, VOCAB_SIZE = 6, 5, 8, 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Operations this small spend their time waiting for the other threads, on a busy machine ten times over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_policy(pi05: bool) -> Pi0:
    model = Pi0(ModelConfig(pi05, VISION, GEMMA, GEMMA, VOCAB_SIZE, ACTION_DIM, HORIZON, max_prompt_tokens=PROMPT_SLOTS))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval().requires_grad_(False)


POLICIES = {"pi0": make_policy(pi05=False), "pi05": make_policy(pi05=True)}
both_policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def make_inputs(seed: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Three cameras and a full prompt."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.rand((batch, 3, 3, 28, 28), generator=generator) * 2 - 1,
        "image_mask": torch.ones(batch, 3, dtype=torch.bool),
        "tokens": torch.randint(0, VOCAB_SIZE, (batch, PROMPT_SLOTS), generator=generator),
        "token_mask": torch.ones(batch, PROMPT_SLOTS, dtype=torch.bool),
        "state": torch.randn((batch, ACTION_DIM), generator=generator),
        "noise": torch.randn((batch, HORIZON, ACTION_DIM), generator=generator),
    }


cameras = st.tuples(st.booleans(), st.booleans(), st.booleans())
prompt_lengths = st.integers(1, PROMPT_SLOTS)


def with_absences(inputs, present, prompt_length):
    return inputs | {
        "image_mask": torch.tensor([present]),
        "token_mask": (torch.arange(PROMPT_SLOTS) < prompt_length)[None],
    }


@both_policies
@settings(max_examples=20, deadline=None)
@given(present=cameras, prompt_length=prompt_lengths)
def test_masked_cameras_and_padding_do_not_matter(policy, present, prompt_length):
    inputs, garbage = with_absences(make_inputs(1), present, prompt_length), make_inputs(2)
    image_mask, token_mask = inputs["image_mask"], inputs["token_mask"]
    changed = inputs | {
        "images": torch.where(image_mask[..., None, None, None], inputs["images"], 100 * garbage["images"]),
        "tokens": torch.where(token_mask, inputs["tokens"], garbage["tokens"]),
    }
    assert torch.equal(policy.sample_actions(**inputs), policy.sample_actions(**changed))


@both_policies
@settings(max_examples=20, deadline=None)
@given(present=cameras, prompt_length=prompt_lengths)
def test_leaving_out_what_is_masked_changes_nothing(policy, present, prompt_length):
    """The runtime never computes absent cameras or padding; the reference does, and masks them."""
    inputs = with_absences(make_inputs(1), present, prompt_length)
    compact = inputs | {
        "tokens": inputs["tokens"][:, :prompt_length],
        "token_mask": inputs["token_mask"][:, :prompt_length],
    }
    if any(present):
        compact |= {"images": inputs["images"][:, present], "image_mask": inputs["image_mask"][:, present]}
    torch.testing.assert_close(policy.sample_actions(**compact), policy.sample_actions(**inputs), rtol=0, atol=1e-5)


@both_policies
@pytest.mark.parametrize("name", ["images", "tokens", "noise"])
def test_every_valid_input_matters(policy, name):
    inputs = make_inputs(1)
    actions = policy.sample_actions(**inputs | {name: make_inputs(2)[name]})
    assert (actions - policy.sample_actions(**inputs)).abs().max() > 1e-3


def test_the_state_enters_pi0_directly_and_pi05_through_its_prompt_alone():
    inputs, other = make_inputs(1), {"state": make_inputs(2)["state"]}
    pi0, pi05 = (
        (policy.sample_actions(**inputs | other) - policy.sample_actions(**inputs)).abs().max()
        for policy in POLICIES.values()
    )
    assert pi0 > 1e-3 and pi05 == 0


@both_policies
def test_a_batch_equals_its_elements(policy):
    batch = make_inputs(3, batch=2)
    batch["image_mask"][0, 1] = batch["token_mask"][1, 4:] = False
    singles = [policy.sample_actions(**{name: x[i : i + 1] for name, x in batch.items()}) for i in range(2)]
    torch.testing.assert_close(policy.sample_actions(**batch), torch.cat(singles), rtol=0, atol=1e-5)


def suffix_keys_and_values(policy: Pi0, inputs, actions, time):
    """Keys and values [B, heads, 1 + H, head_dim] that one denoising step writes for the suffix, in every layer."""
    mask = torch.cat((inputs["image_mask"].repeat_interleave(VISION.tokens, 1), inputs["token_mask"]), dim=1)
    _, past = policy.prefix(policy.embed_images(inputs["images"]), inputs["tokens"], mask)
    written = []
    hook = policy.expert.register_forward_hook(lambda module, args, output: written.extend(output[1]))
    policy.velocity(inputs["state"], actions, torch.tensor([time]), mask, past)
    hook.remove()
    return [tensor[:, :, -1 - HORIZON :] for key_value in written for tensor in key_value]


def test_pi0s_state_row_depends_on_neither_actions_nor_time():
    inputs = with_absences(make_inputs(1), (True, False, True), 3)
    first = suffix_keys_and_values(POLICIES["pi0"], inputs, inputs["noise"], time=1.0)
    second = suffix_keys_and_values(POLICIES["pi0"], inputs, make_inputs(2)["noise"], time=0.3)
    assert len(first) == 2 * GEMMA.depth
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a[:, :, 0], b[:, :, 0], rtol=0, atol=1e-6)
        assert (a[:, :, 1:] - b[:, :, 1:]).abs().amax(dim=(0, 1, 3)).min() > 1e-3  # every action row does


@both_policies
def test_weights_stay_in_their_dtype_and_compute_in_float32(policy):
    stored = make_policy(policy.config.pi05).to(torch.bfloat16)
    upcast = make_policy(policy.config.pi05).to(torch.bfloat16).to(torch.float32)
    inputs = make_inputs(4)
    assert torch.equal(stored.sample_actions(**inputs), upcast.sample_actions(**inputs))
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("num_steps", range(1, 21))
def test_timesteps_are_openpis_float32_accumulation(num_steps):
    expected, time, dt = [], np.float32(1.0), np.float32(-1.0 / num_steps)
    while time >= -dt / 2:
        expected.append(float(time))
        time = time + dt
    assert timesteps(num_steps) == expected
    assert len(expected) == num_steps
