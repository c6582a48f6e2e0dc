"""Images, prompts, state and their checks, against values computed with openpi's own code."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.images import resize_with_pad
from duq.runtime.preprocess import MAX_PROMPT, ModelInputs, Normalizer, Preprocessor
from duq.runtime.tokenizer import Tokenizer
from tests.support.observations import CONFIG, PI05, bare_observation

# --- images ----------------------------------------------------------------------------------------------------------

# The first 16 hex digits of the SHA-256 of openpi_client 0.1.2's resize_with_pad(pattern(h, w), size, size).
OPENPI_RESIZED = {
    (480, 640, 224): "669111ba72f321f5",
    (480, 640, 28): "bc28240b5d07b430",
    (640, 480, 224): "4ea8b87b4e7c2c92",
    (640, 480, 28): "19ded4a3fc16520d",
    (100, 224, 224): "e5a1d44c453470d3",
    (100, 224, 28): "9205222eda5b9205",
    (224, 224, 224): "f92145d564742a5e",
    (224, 224, 28): "746c434218bcdf29",
    (223, 225, 224): "3e37175e7ff574da",
    (223, 225, 28): "b1c3ff7bcfe0bd39",
    (37, 51, 224): "8c0a944bc3ec4bd2",
    (37, 51, 28): "5f2d4c632d7ae3d1",
    (720, 1280, 224): "ed110ff5188c63ba",
    (720, 1280, 28): "d51a3e5ea04b9f82",
}


def pattern(height: int, width: int) -> np.ndarray:
    values = np.arange(height * width * 3, dtype=np.uint64) * 2654435761 >> 7
    return (values % 256).astype(np.uint8).reshape(height, width, 3)


@pytest.mark.parametrize("height, width, size", OPENPI_RESIZED)
def test_resize_is_openpi_s_bit_for_bit(height, width, size):
    resized = resize_with_pad(pattern(height, width), size, size)
    assert resized.shape == (size, size, 3) and resized.dtype == np.uint8
    assert hashlib.sha256(resized.tobytes()).hexdigest()[:16] == OPENPI_RESIZED[height, width, size]


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_resize_keeps_a_constant_image_and_pads_with_black(height, width, out_height, out_width):
    resized = resize_with_pad(np.full((height, width, 3), 200, np.uint8), out_height, out_width)
    inside = resized.any(-1)
    assert resized.shape == (out_height, out_width, 3) and set(np.unique(resized)) <= {0, 200}
    rows, columns = inside.any(1), inside.any(0)
    assert rows.sum() >= out_height - 1 or columns.sum() >= out_width - 1  # openpi rounds 6.999 down to 6
    assert abs(np.argmax(rows) - np.argmax(rows[::-1])) <= 1 and abs(np.argmax(columns) - np.argmax(columns[::-1])) <= 1


def test_images_in_slot_order_and_masked():
    observation = bare_observation()
    del observation["image"]["left_wrist_0_rgb"], observation["image_mask"]["left_wrist_0_rgb"]
    observation["image_mask"]["right_wrist_0_rgb"] = np.False_
    inputs = Preprocessor(CONFIG).model_inputs(observation)
    assert inputs.images.dtype == np.uint8 and inputs.images.shape == (3, 28, 28, 3)
    assert np.array_equal(inputs.images[0], observation["image"]["base_0_rgb"])
    assert not inputs.images[1:].any() and not inputs.pixels()[1:].any()
    assert inputs.image_mask.tolist() == [True, False, False]


def test_pixels_are_openpi_s_bit_for_bit():
    images = np.resize(np.arange(256, dtype=np.uint8), (3, 28, 28, 3))
    pixels = ModelInputs(images, np.array([True, False, True]), None, None, None).pixels()
    expected = images.astype(np.float32) / 255.0 * 2.0 - 1.0
    assert pixels.dtype == np.float32 and not pixels[1].any()
    assert np.array_equal(pixels[::2], expected[::2].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("size", [28, 40])
def test_layouts_in_memory_do_not_matter(size):
    """A view of channels first, rows upside down, every second pixel: the same images."""
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    expected = Preprocessor(CONFIG).model_inputs(bare_observation(image=dict.fromkeys(IMAGE_SLOTS, image)))
    views = [
        np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0),
        image[::-1].copy()[::-1],
        image.repeat(2, 1)[:, ::2],
    ]
    found = Preprocessor(CONFIG).model_inputs(bare_observation(image=dict(zip(IMAGE_SLOTS, views, strict=False))))
    assert np.array_equal(found.images, expected.images)


def test_images_are_there_unless_masked():
    observation = bare_observation(image_mask=None)
    assert Preprocessor(CONFIG).model_inputs(observation).image_mask.all()
    observation["image_mask"] = {"base_0_rgb": False}
    assert Preprocessor(CONFIG).model_inputs(observation).image_mask.tolist() == [False, True, True]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_pi0_prompt(tokenizer_bytes):
    peer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    tokens = Tokenizer(tokenizer_bytes).encode("  pick_up the\nred cup \n")
    assert tokens == [peer.bos_id(), *peer.encode("pick up the red cup"), *peer.encode("\n")]


def test_pi05_prompt_holds_the_state(tokenizer_bytes):
    peer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)
    state = np.array([-1.5, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 7.0])  # bins are 1/128 wide; below -1 is bin -1
    text = "Task: open, State: -1 0 0 128 192 255 255 255;\nAction: "
    assert Tokenizer(tokenizer_bytes).encode("open", state) == [peer.bos_id(), *peer.encode(text)]


@pytest.mark.parametrize("prompt", ["open", b"open", np.array("open"), np.str_("open"), np.array(b"open")])
def test_prompt_types_and_padding(tokenizer_bytes, prompt):
    observation = bare_observation(prompt=prompt, tokenized_prompt=None, tokenized_prompt_mask=None)
    inputs = Preprocessor(CONFIG, tokenizer=tokenizer_bytes).model_inputs(observation)
    expected = Tokenizer(tokenizer_bytes).encode("open")
    assert inputs.tokens.dtype == np.int64 and inputs.tokens.shape == inputs.token_mask.shape == (48,)
    assert inputs.tokens.tolist() == expected + [0] * (48 - len(expected))
    assert inputs.token_mask.sum() == len(expected) and inputs.token_mask[: len(expected)].all()


def test_pi05_tokens_of_a_bare_observation_use_its_state(tokenizer_bytes):
    state = np.linspace(-1, 1, 8, dtype=np.float32)
    observation = bare_observation(prompt="open", state=state, tokenized_prompt=None, tokenized_prompt_mask=None)
    for padded, expected in ((0, state), (32, np.pad(state, (0, 24)))):  # LeRobot 0.4 pads before binning
        transforms = {"pad_state_in_prompt": padded}
        inputs = Preprocessor(PI05, tokenizer=tokenizer_bytes, transforms=transforms).model_inputs(observation)
        assert inputs.tokens[inputs.token_mask].tolist() == Tokenizer(tokenizer_bytes).encode("open", expected)


def test_given_tokens_keep_their_mask():
    mask = np.array([True, False, True, True, False])
    observation = bare_observation(tokenized_prompt=np.array([7, 9999, 8, 9, -1]), tokenized_prompt_mask=mask)
    inputs = Preprocessor(CONFIG).model_inputs(observation)
    assert inputs.tokens[:5].tolist() == [7, 0, 8, 9, 0]
    assert inputs.token_mask[:5].tolist() == mask.tolist() and not inputs.token_mask[5:].any()


def test_a_full_prompt_fits():
    full = {"tokenized_prompt": np.arange(48), "tokenized_prompt_mask": np.ones(48, bool)}
    assert Preprocessor(CONFIG).model_inputs(bare_observation(**full)).token_mask.all()


def test_not_a_tokenizer():
    with pytest.raises(PlanError, match="not a SentencePiece model"):
        Tokenizer(b"nonsense" * 10)


# --- state and actions -----------------------------------------------------------------------------------------------


def test_bare_state_is_padded_and_nothing_else():
    state = np.linspace(-3, 3, 5, dtype=np.float32)
    inputs = Preprocessor(CONFIG).model_inputs(bare_observation(state=state))
    assert inputs.state.dtype == np.float32 and np.array_equal(inputs.state, np.pad(state, (0, 27)))


def test_bare_inputs_pass_a_robot_s_plan_unchanged():
    stats = {"mean": [5.0] * 14, "std": [3.0] * 14}
    policy = Preprocessor(CONFIG, robot="aloha", norm_stats={"state": stats, "actions": stats})
    observation, actions = bare_observation(), np.ones((50, 32), np.float32)
    assert np.array_equal(policy.model_inputs(observation).state, observation["state"])
    assert policy.robot_actions(actions, observation) is actions


STATS = {"mean": [1.0, -2.0, 0.5], "std": [2.0, 0.0, 1.0], "q01": [-1.0, 0.0, 2.0], "q99": [3.0, 0.0, 4.0]}


def test_z_score():
    normalizer = Normalizer(STATS, "state", 2, quantiles=False, epsilon=1e-6)
    x = np.array([4.0, -2.0])
    assert np.allclose(normalizer.normalize(x), [3 / 2.000001, 0], rtol=1e-12)
    assert np.allclose(normalizer.unnormalize(np.array([1.5, 1.0])), [1 + 1.5 * 2.000001, -2 + 1e-6], rtol=1e-12)


def test_quantiles():
    normalizer = Normalizer(STATS, "state", 2, quantiles=True, epsilon=1e-6)
    x = np.array([3.0, 0.0])
    assert np.allclose(normalizer.normalize(x), [4 / 4.000001 * 2 - 1, -1], rtol=1e-12)
    assert np.allclose(normalizer.unnormalize(np.array([1.0, -1.0])), [-1 + 4.000001, 0], rtol=1e-12)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=3), st.booleans())
def test_unnormalize_inverts_normalize(values, quantiles):
    normalizer = Normalizer(STATS, "state", 3, quantiles=quantiles, epsilon=1e-6)
    assert np.allclose(normalizer.unnormalize(normalizer.normalize(np.array(values))), values, atol=1e-6)


@pytest.mark.parametrize("change", [{"std": None}, {"std": [1.0]}, {"std": [1.0, np.nan, 1.0]}, {"mean": [0.0]}])
def test_unusable_stats(change):
    with pytest.raises(PlanError, match="norm stats of 'state'"):
        Normalizer(STATS | change, "state", 3, quantiles=False, epsilon=1e-6)


def test_stats_without_quantiles_do_not_make_a_pi05_policy():
    stats = {"mean": [0.0] * 8, "std": [1.0] * 8, "q01": None, "q99": None}
    with pytest.raises(PlanError, match="q01 and q99"):
        Preprocessor(PI05, robot="droid", norm_stats={"state": stats, "actions": stats})


# --- what is refused -------------------------------------------------------------------------------------------------


def with_image(value) -> dict:
    return bare_observation(image={"base_0_rgb": value}, image_mask=None)


REFUSED = {
    "no image": (bare_observation(image=None), "lacks 'image'"),
    "no state": (bare_observation(state=None), "lacks 'state'"),
    "no prompt": (bare_observation(tokenized_prompt=None, tokenized_prompt_mask=None), "lacks 'prompt'"),
    "no token mask": (bare_observation(tokenized_prompt_mask=None), "lacks 'tokenized_prompt_mask'"),
    "no tokens": (bare_observation(tokenized_prompt=None), "lacks 'tokenized_prompt'"),
    "image of floats": (with_image(np.zeros((28, 28, 3), np.float32)), "image/base_0_rgb: has dtype float32"),
    "image CHW": (with_image(np.zeros((3, 28, 28), np.uint8)), "has shape .3, 28, 28., expected .H, W, 3."),
    "image of nothing": (with_image(np.zeros((0, 28, 3), np.uint8)), "has shape .0, 28, 3."),
    "gray image": (with_image(np.zeros((28, 28), np.uint8)), "has shape .28, 28."),
    "images in a list": (bare_observation(image=[1]), "image: is a list"),
    "unknown slot": (bare_observation(image={"top": np.zeros((28, 28, 3), np.uint8)}), "unknown slot 'top'"),
    "mask without image": (
        bare_observation(image={"base_0_rgb": np.zeros((28, 28, 3), np.uint8)}), "lacks 'left_wrist_0_rgb'"
    ),
    "mask of ints": (bare_observation(image_mask={"base_0_rgb": 1}), "image_mask/base_0_rgb: is int64"),
    "no camera": (bare_observation(image_mask=dict.fromkeys(IMAGE_SLOTS, False)), "0 cameras"),
    "state of complex numbers": (bare_observation(state=np.zeros(32, complex)), "state: has dtype complex128"),
    "state of text": (bare_observation(state=np.array(["a"] * 32)), "state: has dtype <U1"),
    "state too wide": (bare_observation(state=np.zeros(33, np.float32)), "state: has shape .33., expected .32."),
    "batched state": (bare_observation(state=np.zeros((1, 32), np.float32)), "state: has shape .1, 32."),
    "NaN state": (bare_observation(state=np.array([0, np.nan], np.float32)), "state: is not finite at index 1"),
    "infinite state": (bare_observation(state=np.array([np.inf], np.float32)), "state: is not finite at index 0"),
    "tokens of floats": (bare_observation(tokenized_prompt=np.zeros(5)), "is float64, its mask bool"),
    "mask of floats": (bare_observation(tokenized_prompt_mask=np.ones(5)), "its mask float64"),
    "unequal tokens": (bare_observation(tokenized_prompt=np.arange(4)), "has shape .4., mask .5."),
    "no valid token": (bare_observation(tokenized_prompt_mask=np.zeros(5, bool)), "one or more valid"),
    "token too large": (bare_observation(tokenized_prompt=np.full(5, 300)), "token 300 is not in the vocabulary"),
    "negative token": (bare_observation(tokenized_prompt=np.full(5, -1)), "token -1 is not in the vocabulary"),
    "too many tokens": (
        bare_observation(tokenized_prompt=np.arange(49), tokenized_prompt_mask=np.ones(49, bool)),
        "has 49 tokens, the policy takes at most 48",
    ),
    "text without tokenizer": (
        bare_observation(prompt="open", tokenized_prompt=None, tokenized_prompt_mask=None), "--tokenizer"
    ),
    "not a dict": ([1, 2], "an observation is a dict, got list"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_clear_line(name):
    observation, message = REFUSED[name]
    with pytest.raises(ObservationError, match=message) as error:
        Preprocessor(CONFIG).model_inputs(observation)
    assert "\n" not in str(error.value)


def test_refuses_what_is_no_text(tokenizer_bytes):
    policy = Preprocessor(CONFIG, tokenizer=tokenizer_bytes)
    with pytest.raises(ObservationError, match="prompt: is a int"):
        policy.model_inputs(bare_observation(prompt=3, tokenized_prompt=None, tokenized_prompt_mask=None))


@pytest.mark.parametrize("slots", [48, 100])
def test_too_long_a_text_is_cut_off_with_a_warning(tokenizer_bytes, caplog, slots):
    """As openpi and LeRobot do: the first tokens stay."""
    text = "pick up the cup " * 40
    policy = Preprocessor(replace(CONFIG, max_prompt_tokens=slots), tokenizer=tokenizer_bytes)
    inputs = policy.model_inputs(bare_observation(prompt=text, tokenized_prompt=None, tokenized_prompt_mask=None))
    assert inputs.tokens.tolist() == Tokenizer(tokenizer_bytes).encode(text)[:slots] and inputs.token_mask.all()
    assert f"cut off at the policy's {slots}" in caplog.text
    caplog.clear()
    policy.model_inputs(bare_observation(prompt="pick up the cup", tokenized_prompt=None, tokenized_prompt_mask=None))
    assert not caplog.text


def test_refuses_more_cameras_than_compiled_for():
    with pytest.raises(ObservationError, match="3 cameras, the plan takes 1 to 2"):
        Preprocessor(CONFIG, cameras=2).model_inputs(bare_observation())


@pytest.mark.parametrize(
    "prompt", ["x" * (16 << 20), b"x" * (16 << 20), "x" * (MAX_PROMPT + 1)], ids=["str", "bytes", "one more"]
)
def test_a_huge_prompt_is_refused_before_its_tokens_are_sought(tokenizer_bytes, monkeypatch, prompt):
    policy = Preprocessor(CONFIG, tokenizer=tokenizer_bytes)
    monkeypatch.setattr(Tokenizer, "encode", lambda *arguments: pytest.fail("tokenized"))
    with pytest.raises(
        ObservationError, match=rf"prompt: has {len(prompt)} characters, expected at most 16384; shorten it$"
    ):
        policy.model_inputs(bare_observation(prompt=prompt, tokenized_prompt=None, tokenized_prompt_mask=None))
