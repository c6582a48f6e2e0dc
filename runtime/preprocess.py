"""Around the model: an observation becomes the model's inputs, its output becomes the robot's actions.

    robot observation -> cameras, state -> normalise -> resize images -> tokenise -> pad state     (the order of openpi)
    bare model inputs ----------------------------> resize images -> tokenise -> pad state
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from runtime import checks
from runtime.config import IMAGE_SLOTS, ModelConfig
from runtime.errors import ObservationError, PlanError
from runtime.robots import default_transforms, make_robot
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelInputs:
    """What the model reads, padded and masked (S = image size, L = max_prompt_tokens, A = action_dim)."""

    images: np.ndarray  # uint8 [3, S, S, 3]: slot (in the order of IMAGE_SLOTS), H, W, RGB; absent: zeros
    image_mask: np.ndarray  # bool [3]
    tokens: np.ndarray  # int64 [L]
    token_mask: np.ndarray  # bool [L]
    state: np.ndarray  # float32 [A], normalised, zero-padded

    def pixels(self) -> np.ndarray:
        """The images as the model's vision tower takes them: float32 [3, 3, S, S] (slot, RGB, H, W) in [-1, 1].

        byte / 127.5 - 1, each step rounded to float32; bit for bit byte / 255 * 2 - 1, as doubling is exact. Absent
        slots are zeros.
        """
        planes = np.zeros((len(self.images), 3, *self.images.shape[1:3]), np.float32)
        for slot in np.flatnonzero(self.image_mask):
            planes[slot] = self.images[slot].transpose(2, 0, 1)
            planes[slot] /= np.float32(127.5)
            planes[slot] -= np.float32(1)
        return planes


class Normalizer:
    """pi0: x' = (x - mean) / (std + eps).   pi0.5: x' = (x - q01) / (q99 - q01 + eps) * 2 - 1.   In float64.

    `stats` are the lists "mean" and "std", or "q01" and "q99", of one key of norm_stats.json; they may be wider than
    the values, whose first dims they then describe. PlanError if they are absent, not finite, or narrower than `size`.
    """

    def __init__(self, stats: Mapping, key: str, size: int, *, quantiles: bool, epsilon: float):
        names = ("q01", "q99") if quantiles else ("mean", "std")
        low, high = (np.asarray(stats.get(name), np.float64) for name in names)
        if low.ndim != 1 or low.shape != high.shape or low.size < size or not np.isfinite([low, high]).all():
            raise PlanError(f"norm stats of {key!r}: {' and '.join(names)} must be {size} or more finite numbers each")
        self.low = low
        self.span = (high - low if quantiles else high) + epsilon
        self.gain, self.shift = (2.0, -1.0) if quantiles else (1.0, 0.0)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        dims = values.shape[-1]
        return (values - self.low[:dims]) / self.span[:dims] * self.gain + self.shift

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        dims = values.shape[-1]
        return (values - self.shift) / self.gain * self.span[:dims] + self.low[:dims]


class Preprocessor:
    """Converts observations for one policy; stateless once built, so safe to share between threads.

    Two forms of observation are understood. The form of the `robot` ("aloha", "droid", "libero"), in the robot's units.
    And, by every policy, bare model inputs, known by their key "image": {"image": {slot: uint8 HWC}, "image_mask":
    {slot: bool} (optional), "state": float32 [<= A]}: the state is already what the model sees, and so are the actions
    that come back. Both hold "prompt", which takes a tokenizer, or "tokenized_prompt" and "tokenized_prompt_mask".

    `norm_stats`: {"state": {...}, "actions": {...}, "epsilon": optional}, or None for a policy trained without;
    `tokenizer`: the bytes of a SentencePiece model; `transforms` overrides `robots.default_transforms`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        robot: str = "none",
        layout: str = "openpi",
        norm_stats: Mapping | None = None,
        tokenizer: bytes | None = None,
        cameras: int = len(IMAGE_SLOTS),
        transforms: Mapping | None = None,
    ):
        self.config = config
        self.cameras = cameras
        self.transforms = default_transforms(robot, pi05=config.pi05, layout=layout) | dict(transforms or {})
        self.robot = make_robot(
            robot, delta_actions=self.transforms["delta_actions"], adapt_to_pi=self.transforms["adapt_to_pi"]
        )
        self.tokenizer = None if tokenizer is None else Tokenizer(tokenizer)
        self._state_norm = self._action_norm = None
        if self.robot and norm_stats:
            how = {"quantiles": config.pi05, "epsilon": norm_stats.get("epsilon", 1e-6)}
            self._state_norm = Normalizer(norm_stats.get("state", {}), "state", self.robot.state_dim, **how)
            self._action_norm = Normalizer(norm_stats.get("actions", {}), "actions", self.robot.action_dim, **how)

    @property
    def action_dim(self) -> int:
        """Dims of an action that the robot takes (of the model, without a robot)."""
        return self.robot.action_dim if self.robot else self.config.action_dim

    def model_inputs(self, observation: Mapping) -> ModelInputs:
        """Checks and converts an observation. ObservationError names the key, what it holds and what is expected."""
        if not isinstance(observation, Mapping):
            raise ObservationError(f"an observation is a dict, got {type(observation).__name__}")
        if self.is_bare(observation):
            cameras, state = _bare_cameras(observation), self._bare_state(observation)
        else:
            cameras, state = self.robot.images(observation), self.robot.state(observation)
            if self._state_norm:
                state = self._state_norm.normalize(state)
        images, image_mask = self._stack(cameras)
        tokens, token_mask = self._prompt(observation, state)
        return ModelInputs(images, image_mask, tokens, token_mask, self._pad(state).astype(np.float32))

    def robot_actions(self, actions: np.ndarray, observation: Mapping) -> np.ndarray:
        """The model's actions, float32 [H, A], as the robot takes them: float32 [H, action_dim].

        Un-normalised, made absolute with the observation's state and converted; unchanged if the inputs were bare.
        """
        if self.is_bare(observation):
            return actions
        actions = actions[:, : self.robot.action_dim].astype(np.float64)
        if self._action_norm:
            actions = self._action_norm.unnormalize(actions)
        return self.robot.actions(actions, self.robot.state(observation)).astype(np.float32)

    def is_bare(self, observation: Mapping) -> bool:
        """Whether these are bare model inputs and not an observation of the robot."""
        return self.robot is None or "image" in observation

    def _bare_state(self, observation: Mapping) -> np.ndarray:
        dims = checks.array(checks.required(observation, "state"), "state").shape
        fits = len(dims) == 1 and dims[0] <= self.config.action_dim
        return checks.vector(observation, "state", dims[0] if fits else self.config.action_dim)

    def _pad(self, state: np.ndarray) -> np.ndarray:
        return _padded(state, self.config.action_dim)

    def _stack(self, cameras: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Resizes and stacks the cameras in slot order; what is absent stays zero and masked off."""
        if not 1 <= len(cameras) <= self.cameras:
            raise ObservationError(f"observation has {len(cameras)} cameras, the plan takes 1 to {self.cameras}")
        size = self.config.vision.image_size
        images = np.empty((len(IMAGE_SLOTS), size, size, 3), np.uint8)
        for slot, image in zip(IMAGE_SLOTS, images):
            if slot in cameras:
                _copy(resize_with_pad(cameras[slot], size, size), image)
            else:
                image[:] = 0
        return images, np.array([slot in cameras for slot in IMAGE_SLOTS])

    def _prompt(self, observation: Mapping, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [L] and their mask bool [L]."""
        if "tokenized_prompt" in observation or "tokenized_prompt_mask" in observation:
            ids, mask = _given_tokens(observation)
        else:
            ids = np.asarray(self._tokenize(_text(observation), state), np.int64)
            mask = np.ones(ids.size, bool)
        if ids.size > (limit := self.config.max_prompt_tokens):
            raise ObservationError(f"prompt: has {ids.size} tokens, the policy takes at most {limit}; shorten it")
        unknown = ids[mask & ((ids < 0) | (ids >= self.config.vocab_size))]
        if unknown.size:
            raise ObservationError(f"prompt: token {unknown[0]} is not in the vocabulary of {self.config.vocab_size}")
        return _padded(np.where(mask, ids, 0), limit), _padded(mask, limit)

    def _tokenize(self, prompt: str, state: np.ndarray) -> list[int]:
        if self.tokenizer is None:
            raise ObservationError(
                "prompt: the plan holds no tokenizer; compile it with --tokenizer FILE, "
                "or pass tokenized_prompt and tokenized_prompt_mask"
            )
        if not self.transforms["state_in_prompt"]:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(prompt, self._pad(state) if self.transforms["pad_state_in_prompt"] else state)


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """[N] -> [size], zeros behind the values."""
    padded = np.zeros(size, values.dtype)
    padded[: values.size] = values
    return padded


def resize_with_pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to [height, width, 3] without distortion: bilinear, centred on black.

    Bit for bit what openpi's client does to an image before sending it.
    """
    if image.shape[:2] == (height, width):
        return image
    ratio = max(image.shape[1] / width, image.shape[0] / height)
    new_height, new_width = max(1, int(image.shape[0] / ratio)), max(1, int(image.shape[1] / ratio))
    resized = Image.fromarray(_contiguous(image)).resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas


def _contiguous(image: np.ndarray) -> np.ndarray:
    if image.flags.c_contiguous:
        return image
    copy = np.empty(image.shape, np.uint8)
    _copy(image, copy)
    return copy


def _copy(image: np.ndarray, to: np.ndarray) -> None:
    """Copies uint8 [H, W, 3]; a view of [3, H, W] plane by plane, in a sixth of the time numpy takes for pixel by pixel."""
    if image.strides[2] == 1:
        to[:] = image
    else:
        for channel in range(3):
            to[..., channel] = image[..., channel]


def _bare_cameras(observation: Mapping) -> dict[str, np.ndarray]:
    """The unmasked images by slot. A slot with an image counts as there unless image_mask says otherwise."""
    images = checks.mapping(observation, "image")
    masks = checks.mapping(observation, "image_mask") if "image_mask" in observation else {}
    for slot in (*images, *masks):
        if slot not in IMAGE_SLOTS:
            raise ObservationError(f"image: unknown slot {slot!r}; there are {', '.join(IMAGE_SLOTS)}")
    present = [slot for slot in IMAGE_SLOTS if _flag(masks.get(slot, slot in images), slot)]
    return {slot: _bare_image(checks.required(images, slot), f"image/{slot}") for slot in present}


def _bare_image(value, key: str) -> np.ndarray:
    dtype = np.dtype(np.uint8) if hasattr(value, "getbands") else checks.array(value, key).dtype
    if dtype.kind == "f":  # openpi takes floats here as -1..1, robots' cameras as 0..1
        raise ObservationError(f"{key}: has dtype {dtype}, expected uint8")
    return checks.image(value, key, "HWC")


def _flag(value, slot: str) -> bool:
    value = checks.array(value, f"image_mask/{slot}", "one bool")
    if value.dtype != bool or value.size != 1:
        raise ObservationError(f"image_mask/{slot}: is {value.dtype} of shape {list(value.shape)}, expected one bool")
    return bool(value.item())


def _given_tokens(observation: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """tokenized_prompt and its mask, of equal length, at least one token of it valid."""
    keys = {"tokenized_prompt": "integers [tokens]", "tokenized_prompt_mask": "bools [tokens]"}
    ids, mask = (checks.array(checks.required(observation, key), key, expected) for key, expected in keys.items())
    if not np.issubdtype(ids.dtype, np.integer) or mask.dtype != bool:
        raise ObservationError(f"tokenized_prompt: is {ids.dtype}, its mask {mask.dtype}; expected integer and bool")
    if ids.ndim != 1 or ids.shape != mask.shape or not mask.any():
        shapes = f"{list(ids.shape)}, mask {list(mask.shape)}"
        raise ObservationError(f"tokenized_prompt: has shape {shapes}, expected two of [tokens], one or more valid")
    return ids.astype(np.int64), mask


def _text(observation: Mapping) -> str:
    """The prompt: a str, UTF-8 bytes, or one of either in a numpy array, list or tuple, as robot clients send it."""
    return checks.text(checks.required(observation, "prompt"), "prompt")
