"""Around the model: an observation becomes the model's inputs, its output becomes the robot's actions.

robot observation -> cameras, state -> normalize -> resize images -> tokenize -> pad state     (the order of openpi)
bare model inputs ----------------------------> resize images -> tokenize -> pad state
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from duq.runtime import checks
from duq.runtime.config import IMAGE_SLOTS, ModelConfig
from duq.runtime.errors import ObservationError, PlanError
from duq.runtime.images import check_shape, resize_all
from duq.runtime.robots import Robot, load_robot
from duq.runtime.tokenizer import Tokenizer
from duq.runtime.transforms import checked, default_transforms

MAX_PROMPT = 16 << 10  # characters of a prompt that is looked at; a policy takes at most a few hundred tokens
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInputs:
    """What the model reads, padded and masked (S = image size, L = max_prompt_tokens, A = action_dim)."""

    images: np.ndarray  # [3, S, S, 3]: slot (in the order of IMAGE_SLOTS), H, W, RGB; uint8, or float32 as pixels()
    image_mask: np.ndarray  # bool [3]
    tokens: np.ndarray  # int64 [L]
    token_mask: np.ndarray  # bool [L]
    state: np.ndarray  # float32 [state_width], normalized, zero-padded

    def pixels(self) -> np.ndarray:
        """The images as the model's vision tower takes them: float32 [3, 3, S, S] (slot, RGB, H, W) in [-1, 1].

        Floats as they are. Of bytes byte / 127.5 - 1, each step rounded to float32; bit for bit byte / 255 * 2 - 1, as
        doubling is exact. Absent slots are zeros.
        """
        planes = np.zeros((len(self.images), 3, *self.images.shape[1:3]), np.float32)
        for slot in np.flatnonzero(self.image_mask):
            planes[slot] = self.images[slot].transpose(2, 0, 1)
            if self.images.dtype == np.uint8:
                planes[slot] /= np.float32(127.5)
                planes[slot] -= np.float32(1)
        return planes


@dataclass(frozen=True)
class Checked:
    """An observation that fits the policy, its images not resized yet."""

    cameras: dict[str, np.ndarray]  # slot -> [H, W, 3], uint8 or float32
    tokens: np.ndarray  # these as in ModelInputs
    token_mask: np.ndarray
    state: np.ndarray
    robot_state: np.ndarray | None  # float64 [state_dim], in the model's units; None: the inputs are bare


class Normalizer:
    """openpi's rule, in float64.

    pi0: x' = (x - mean) / (std + eps).   pi0.5: x' = (x - q01) / (q99 - q01 + eps) * 2 - 1.

    `stats` are the lists "mean" and "std", or "q01" and "q99", of one key of norm_stats.json; they may be wider than
    the values, whose first dims they then describe. PlanError if they are absent, not finite, or narrower than `size`.
    """

    dtype = np.float64

    def __init__(self, stats: Mapping[str, Any], key: str, size: int, *, quantiles: bool, epsilon: float):
        names = ("q01", "q99") if quantiles else ("mean", "std")
        low, high = _statistics(stats, key, size, names)
        self.low = low
        self.span = (high - low if quantiles else high) + epsilon
        self.gain, self.shift = (2.0, -1.0) if quantiles else (1.0, 0.0)

    def normalize(self, values: np.ndarray) -> np.ndarray:
        dims = values.shape[-1]
        return (values - self.low[:dims]) / self.span[:dims] * self.gain + self.shift

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        dims = values.shape[-1]
        return (values - self.shift) / self.gain * self.span[:dims] + self.low[:dims]


class LeRobotNormalizer:
    """LeRobot's rule, in float32 and in its order of operations, so that a state falls into the same bin of a prompt.

    MEAN_STD: x' = (x - mean) / (std + eps).   The others: x' = 2 (x - low) / span - 1, with span = high - low, or eps for a
    value that never changed, which is then -1. Un-normalizing a MEAN_STD value leaves eps out. `rule` "lerobot-0.3" adds
    eps to the span instead.

    `stats` is {"mode": ..., "epsilon": ..., and the two lists that the mode needs}.
    """

    dtype = np.float32

    def __init__(self, stats: Mapping[str, Any], key: str, size: int, rule: str):
        self.mode, self.old = stats["mode"], rule == "lerobot-0.3"
        if self.mode not in MODES:
            raise PlanError(f"norm stats of {key!r}: the mode {self.mode!r} is unknown, one of {', '.join(MODES)}")
        if self.mode == "IDENTITY":
            return
        epsilon = np.float32(stats["epsilon"])
        low, high = (each[:size].astype(np.float32) for each in _statistics(stats, key, size, MODES[self.mode]))
        self.low = low
        if self.mode == "MEAN_STD":
            self.span, self.scale = high + epsilon, high
        else:
            span = high - low
            self.span = span + epsilon if self.old else np.where(span == 0, epsilon, span)
            self.scale = span if self.old else self.span

    def normalize(self, values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        if self.mode == "IDENTITY":
            return values
        if self.mode == "MEAN_STD":
            return (values - self.low) / self.span
        if self.old:
            return (values - self.low) / self.span * np.float32(2) - np.float32(1)
        return np.float32(2) * (values - self.low) / self.span - np.float32(1)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        if self.mode == "IDENTITY":
            return values
        if self.mode == "MEAN_STD":
            return values * self.scale + self.low
        if self.mode == "MIN_MAX":
            return (values + np.float32(1)) / np.float32(2) * self.scale + self.low
        return (values + np.float32(1)) * self.scale / np.float32(2) + self.low


AnyNormalizer = Normalizer | LeRobotNormalizer

# LeRobot's normalization modes -> the statistics that each needs.
MODES = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    "IDENTITY": (),
}


def _statistics(stats: Mapping[str, Any], key: str, size: int, names: tuple[str, ...]) -> list[np.ndarray]:
    """The two lists as float64 arrays; PlanError unless both are there, finite, and `size` or more numbers long."""
    low, high = (np.asarray(stats.get(name), np.float64) for name in names)
    if low.ndim != 1 or low.shape != high.shape or low.size < size or not np.isfinite([low, high]).all():
        found = f"; they have {low.size}" if low.ndim == 1 else ""
        raise PlanError(f"norm stats of {key!r}: {' and '.join(names)} must be {size} or more finite numbers each{found}")
    return [low, high]


def normalizers(norm_stats: Mapping[str, Any], robot: Robot, pi05: bool) -> tuple[AnyNormalizer, AnyNormalizer]:
    """Of the robot's state and of its actions."""
    rule = norm_stats.get("rule", "openpi")

    def made(key: str, size: int) -> AnyNormalizer:
        stats = norm_stats.get(key) or {}
        if rule == "openpi":
            return Normalizer(stats, key, size, quantiles=pi05, epsilon=norm_stats.get("epsilon", 1e-6))
        if rule in ("lerobot", "lerobot-0.3"):
            return LeRobotNormalizer(stats, key, size, rule)
        raise PlanError(f"norm stats: the rule {rule!r} is unknown to this duq; upgrade it")

    return made("state", robot.state_dim), made("actions", robot.action_dim)


class Preprocessor:
    """Converts observations for one policy; stateless once built, so safe to share between threads.

    Two forms of observation are understood. The form of the `robot` (a name of `runtime.robots`, a TOML file's path, or a
    Robot), in the robot's units. And, by every policy, bare model inputs, known by their key "image": {"image": {slot:
    uint8 HWC}, "image_mask": {slot: bool} (optional), "state": float32 [<= A]}: the state is already what the model sees,
    and so are the actions that come back. Both hold a prompt, which takes a tokenizer, or "tokenized_prompt" and
    "tokenized_prompt_mask".

    `norm_stats`: {"state": {...}, "actions": {...}, "epsilon": optional, "rule": optional}, or None for a policy trained
    without; `tokenizer`: the bytes of a SentencePiece model; `transforms` overrides `default_transforms`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        robot: str | Robot = "none",
        layout: str = "openpi",
        norm_stats: Mapping[str, Any] | None = None,
        tokenizer: bytes | None = None,
        cameras: int = len(IMAGE_SLOTS),
        transforms: Mapping[str, Any] | None = None,
    ):
        self.config = config
        self.cameras = cameras
        self.robot = load_robot(robot) if isinstance(robot, str) else robot
        self.transforms = default_transforms(self.robot, pi05=config.pi05, layout=layout) | checked(transforms or {})
        self.tokenizer = None if tokenizer is None else Tokenizer(tokenizer)
        self._delta = self._delta_mask()
        self._state_norm: AnyNormalizer | None = None
        self._action_norm: AnyNormalizer | None = None
        if self.robot:
            self._check_widths(self.robot)
        if self.robot and norm_stats:
            self._state_norm, self._action_norm = normalizers(norm_stats, self.robot, config.pi05)

    @property
    def action_dim(self) -> int:
        """Dims of an action that the robot takes (of the model, without a robot)."""
        return self.robot.action_dim if self.robot else self.config.action_dim

    def model_inputs(self, observation: Mapping[str, Any]) -> ModelInputs:
        """Checks and converts an observation. ObservationError names the key, what it holds and what is expected."""
        return self.finish(self.read(observation))

    def read(self, observation: Mapping[str, Any]) -> Checked:
        """All of `model_inputs` that can fail, and not its longest part: the resizing, which `finish` does."""
        observation = checks.observation(observation)
        if self.is_bare(observation):
            cameras, state, robot_state = _bare_cameras(observation), self._bare_state(observation), None
            checked_state = checks.moderate(state, "state")
        else:
            cameras, robot_state = self._robot_cameras(observation), self._model_state(observation)
            state = self._normalized(robot_state)
            checked_state = checks.moderate(state, "state, normalized")
        self._check_cameras(cameras)
        tokens, token_mask = self._prompt(observation, state)
        return Checked(cameras, tokens, token_mask, self._pad(checked_state), robot_state)

    def finish(self, checked: Checked) -> ModelInputs:
        """The images resized and stacked in slot order; what is absent stays zero and masked off."""
        cameras, size, rule = checked.cameras, self.config.vision.image_size, self.transforms["resize"]
        if rule != "openpi" and all(
            image.dtype == np.uint8 and image.shape[:2] == (size, size) for image in cameras.values()
        ):
            rule = "openpi"  # nothing is resized: bytes are the same pixels, to the bit, by every rule (see pixels)
        images = resize_all([cameras.get(slot) for slot in IMAGE_SLOTS], size, size, rule)
        mask = np.array([slot in cameras for slot in IMAGE_SLOTS])
        return ModelInputs(images, mask, checked.tokens, checked.token_mask, checked.state)

    def robot_actions(self, actions: np.ndarray, observation: Mapping[str, Any]) -> np.ndarray:
        """The model's actions, float32 [H, A], as the robot takes them: float32 [H, action_dim].

        Un-normalized, made absolute with the observation's state and converted; unchanged if the inputs were bare.
        """
        return self.actions_at(actions, None if self.is_bare(observation) else self._model_state(observation))

    def actions_at(self, actions: np.ndarray, robot_state: np.ndarray | None) -> np.ndarray:
        """The same for `Checked.robot_state`: the state that the model saw, whatever became of the observation since."""
        if robot_state is None:
            return actions
        norm, actions = self._action_norm, actions[:, : self._described.action_dim]
        actions = actions.astype(norm.dtype if norm else np.float64)
        if norm:
            actions = norm.unnormalize(actions)
        if self._delta is not None:
            state = robot_state[: self._delta.size].astype(actions.dtype)
            actions = actions.copy()
            actions[:, : self._delta.size] += np.where(self._delta, state, 0).astype(actions.dtype)
        return self._described.actions_to_robot(actions, self.transforms["adapt_to_pi"]).astype(np.float32)

    def model_actions(self, actions: np.ndarray, robot_state: np.ndarray | None) -> np.ndarray:
        """The inverse of `actions_at`: [n, action_dim] as the robot takes them -> float32 [n, A], padded with zeros."""
        if robot_state is not None:
            norm = self._action_norm
            actions = self._described.actions_to_model(actions.astype(np.float64), self.transforms["adapt_to_pi"])
            actions = actions.astype(norm.dtype if norm else np.float64)
            if self._delta is not None:
                state = robot_state[: self._delta.size].astype(actions.dtype)
                actions = actions.copy()
                actions[:, : self._delta.size] -= np.where(self._delta, state, 0).astype(actions.dtype)
            if norm:
                actions = norm.normalize(actions)
        padded = np.zeros((len(actions), self.config.action_dim), np.float32)
        padded[:, : actions.shape[1]] = actions
        return padded

    @property
    def _described(self) -> Robot:
        """The robot, to be asked for observations in its form alone."""
        assert self.robot is not None
        return self.robot

    def is_bare(self, observation: Mapping[str, Any]) -> bool:
        """Whether these are bare model inputs and not an observation of the robot."""
        return self.robot is None or "image" in observation

    def _delta_mask(self) -> np.ndarray | None:
        """Which actions are relative to the state, bool [<= action_dim]; None where none is."""
        if self.robot is None or not self.transforms["delta_actions"]:
            return None
        mask = np.array(self.transforms["delta_mask"] or self.robot.delta, bool)
        if not mask.any():
            raise PlanError(f"robot {self.robot.name}: delta_actions is on, but nothing says which actions are relative")
        if mask.size > self.robot.action_dim:
            raise PlanError(
                f"robot {self.robot.name}: delta_mask says of {mask.size} actions whether they are relative, but there are "
                f"{self.robot.action_dim}"
            )
        return mask[: self.robot.state_dim]

    def _check_widths(self, robot: Robot) -> None:
        """A robot whose numbers do not fit into the policy's is another policy's robot."""
        config = self.config
        if robot.action_dim > config.action_dim:
            raise PlanError(
                f"robot {robot.name} has {robot.action_dim} actions, but the policy predicts {config.action_dim}"
            )
        if robot.state_dim > config.state_width and not config.pi05:  # pi0.5 reads the state from the prompt, if at all
            raise PlanError(
                f"robot {robot.name} has a state of {robot.state_dim}, but the policy takes {config.state_width}"
            )

    def _model_state(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The robot's state in the model's units, not normalized, float64 [state_dim]."""
        robot = self._described
        return robot.state_to_model(robot.read_state(observation), self.transforms["adapt_to_pi"])

    def _normalized(self, state: np.ndarray) -> np.ndarray:
        """The robot's state as the model sees it, float64 or float32 [state_dim]; not finite where it is out of all range."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._state_norm.normalize(state) if self._state_norm else state

    def _robot_cameras(self, observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The images that are there, by slot: uint8, or float32 in [0, 1] for a policy that resizes in float."""
        keep = self.transforms["resize"] != "openpi"
        found = self._described.images(observation)
        return {slot: checks.image(value, camera.key[-1], camera.layout, keep) for slot, (value, camera) in found.items()}

    def _bare_state(self, observation: Mapping[str, Any]) -> np.ndarray:
        width = self.config.state_width
        expected = f"1 to {width} {checks.EXPECTED}"
        dims = checks.array(checks.required(observation, "state"), "state", expected, checks.MAX_VECTOR).shape
        if dims == (0,):
            raise ObservationError(f"state: has shape [0], expected {expected}")
        fits = len(dims) == 1 and dims[0] <= width
        return checks.vector(observation, "state", dims[0] if fits else width)

    def _pad(self, state: np.ndarray) -> np.ndarray:
        return _padded(state[: self.config.state_width], self.config.state_width)

    def _check_cameras(self, cameras: dict[str, np.ndarray]) -> None:
        if not 1 <= len(cameras) <= self.cameras:
            raise ObservationError(f"observation has {len(cameras)} cameras, the plan takes 1 to {self.cameras}")
        size = self.config.vision.image_size
        for image in cameras.values():
            check_shape(image, size, size, self.transforms["resize"])

    def _prompt(self, observation: Mapping[str, Any], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [L] and their mask bool [L]. Too long a text is cut off, as by the policies' own code."""
        limit = self.config.max_prompt_tokens
        if "tokenized_prompt" in observation or "tokenized_prompt_mask" in observation:
            ids, mask = _given_tokens(observation)
            if ids.size > limit:
                raise ObservationError(f"prompt: has {ids.size} tokens, the policy takes at most {limit}; shorten it")
        else:
            text = self._text(observation)
            if len(text) > MAX_PROMPT:  # whose tokens would take long to find, to be cut off
                raise ObservationError(f"prompt: has {len(text)} characters, expected at most {MAX_PROMPT}; shorten it")
            ids = np.asarray(self._tokenize(text, state), np.int64)
            if ids.size > limit:
                log.warning("prompt: %d tokens, cut off at the policy's %d: %.80r", ids.size, limit, text)
            ids = ids[:limit]
            mask = np.ones(ids.size, bool)
        unknown = ids[mask & ((ids < 0) | (ids >= self.config.vocab_size))]
        if unknown.size:
            raise ObservationError(f"prompt: token {unknown[0]} is not in the vocabulary of {self.config.vocab_size}")
        return _padded(np.where(mask, ids, 0), limit), _padded(mask, limit)

    def _text(self, observation: Mapping[str, Any]) -> str:
        keys = ("prompt",) if self.robot is None else self.robot.prompt_keys
        for key in keys:
            if key in observation:
                return _text(observation, key)
        if self.transforms["default_prompt"] is not None:
            return self.transforms["default_prompt"]
        return _text(observation, keys[0])

    def _tokenize(self, prompt: str, state: np.ndarray) -> list[int]:
        if self.tokenizer is None:
            raise ObservationError(
                "prompt: the plan holds no tokenizer; compile it with --tokenizer FILE, "
                "or pass tokenized_prompt and tokenized_prompt_mask"
            )
        if self.transforms["state_in_prompt"]:
            padded = self.transforms["pad_state_in_prompt"]
            width = self.config.action_dim if padded is True else int(padded)
            return self.tokenizer.encode(prompt, _padded(state, max(width, state.size)))
        if self.transforms["prompt_text"] == "lerobot" and not self.config.pi05:
            return self.tokenizer.encode_task(prompt)
        return self.tokenizer.encode(prompt)


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """[N] -> [size], zeros behind the values."""
    padded = np.zeros(size, values.dtype)
    padded[: values.size] = values
    return padded


def _bare_cameras(observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The unmasked images by slot. A slot with an image counts as there unless image_mask says otherwise."""
    images = checks.mapping(observation, "image")
    masks = checks.mapping(observation, "image_mask") if "image_mask" in observation else {}
    for slot in (*images, *masks):
        if slot not in IMAGE_SLOTS:
            raise ObservationError(f"image: unknown slot {checks.shown(slot)}; there are {', '.join(IMAGE_SLOTS)}")
    present = [slot for slot in IMAGE_SLOTS if _flag(masks.get(slot, slot in images), slot)]
    return {slot: _bare_image(checks.required(images, slot), f"image/{slot}") for slot in present}


def _bare_image(value: Any, key: str) -> np.ndarray:
    dtype = np.dtype(np.uint8) if checks.pil_mode(value) else checks.array(value, key).dtype
    if dtype.kind == "f":  # openpi takes floats here as -1..1, robots' cameras as 0..1
        raise ObservationError(f"{key}: has dtype {dtype}, expected uint8")
    return checks.image(value, key, "HWC")


def _flag(value: Any, slot: str) -> bool:
    value = checks.array(value, f"image_mask/{slot}", "one bool", checks.MAX_VECTOR)
    if value.dtype != bool or value.size != 1:
        raise ObservationError(f"image_mask/{slot}: is {value.dtype} of shape {list(value.shape)}, expected one bool")
    return bool(value.item())


def _given_tokens(observation: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """tokenized_prompt and its mask, of equal length, at least one token of it valid."""
    keys = {"tokenized_prompt": "integers [tokens]", "tokenized_prompt_mask": "bools [tokens]"}
    ids, mask = (
        checks.array(checks.required(observation, key), key, expected, checks.MAX_VECTOR) for key, expected in keys.items()
    )
    if not np.issubdtype(ids.dtype, np.integer) or mask.dtype != bool:
        raise ObservationError(f"tokenized_prompt: is {ids.dtype}, its mask {mask.dtype}; expected integer and bool")
    if ids.ndim != 1 or ids.shape != mask.shape or not mask.any():
        shapes = f"{list(ids.shape)}, mask {list(mask.shape)}"
        raise ObservationError(f"tokenized_prompt: has shape {shapes}, expected two of [tokens], one or more valid")
    return ids.astype(np.int64), mask


def _text(observation: Mapping[str, Any], key: str) -> str:
    """The prompt: a str, UTF-8 bytes, or one of either in a numpy array, list or tuple, as robot clients send it."""
    return checks.text(checks.required(observation, key), key)
