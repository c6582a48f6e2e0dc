"""The settings around a policy, decided once: by the command line, a training config, the checkpoint, or the robot.

Each has a source, in this order: what the user says with an option; a published training config (`--config`); what the
checkpoint's own files say; what all published policies of the robot have in common. Where none of them says a thing that
changes the actions, the user is asked; nothing is guessed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from duq.compiler.checkpoint import Checkpoint
from duq.compiler.checkpoint.lerobot import POSTPROCESSOR, PREPROCESSOR, VERSIONS, version_transforms
from duq.compiler.checkpoint.storage import read_tokenizer
from duq.compiler.checkpoint.training import TrainingConfig, training_config
from duq.compiler.errors import CheckpointError, DuqError
from duq.runtime.config import IMAGE_SLOTS, ROTARY
from duq.runtime.preprocess import Preprocessor
from duq.runtime.robots import ROBOT_NAMES, Robot, load_robot
from duq.runtime.solver import SOLVERS, Solver
from duq.runtime.transforms import default_transforms

DEFAULT_STEPS, DEFAULT_SOLVER = 10, "euler"  # of openpi and of LeRobot


@dataclass(frozen=True)
class Choices:
    """What the user said; None: nothing."""

    robot: str | None = None
    config: str | None = None
    num_steps: int | None = None
    solver: str | None = None
    action_horizon: int | None = None
    max_prompt_tokens: int | None = None
    delta_actions: bool | None = None
    adapt_to_pi: bool | None = None
    state_in_prompt: bool | None = None
    default_prompt: str | None = None
    lerobot_version: str | None = None
    rotary: str | None = None


@dataclass(frozen=True)
class PolicySettings:
    """The settings of one plan. sources: setting -> who said it; ignored: the checkpoint's keys of unknown meaning."""

    robot: Robot | None
    transforms: dict[str, Any]
    num_steps: int = DEFAULT_STEPS
    sources: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    solver: str = DEFAULT_SOLVER

    @property
    def robot_name(self) -> str:
        return self.robot.name if self.robot else "none"

    def preprocessor(self, checkpoint: Checkpoint, cameras: int = len(IMAGE_SLOTS)) -> Preprocessor:
        """What converts observations for this policy. Raises PlanError if robot, statistics and policy do not fit."""
        return Preprocessor(
            checkpoint.config,
            robot=self.robot or "none",
            layout=checkpoint.layout,
            norm_stats=checkpoint.norm_stats,
            tokenizer=None if checkpoint.tokenizer is None else read_tokenizer(checkpoint.tokenizer),
            cameras=cameras,
            transforms=self.transforms,
        )

    def to_json(self) -> dict:
        """What a plan's manifest says of them."""
        return {
            "robot": self.robot_name,
            "robot_description": self.robot.to_json() if self.robot else None,
            "transforms": self.transforms,
            "num_steps": self.num_steps,
            "solver": self.solver,
            "training_config": self.config,
            "settings_from": self.sources,
            "ignored_settings": list(self.ignored),
            "notes": list(self.notes),
        }


def settings_of(checkpoint: Checkpoint, settings: PolicySettings) -> dict:
    """The part of a plan's manifest that is about the policy, not about the engine."""
    return {
        "model": checkpoint.config.to_json(),
        **settings.to_json(),
        "norm_stats": checkpoint.norm_stats,
        "lerobot_loop": checkpoint.settings.loop if settings.robot == checkpoint.settings.robot else None,
        "checkpoint": {"path": _printable(checkpoint.path), "layout": checkpoint.layout, "form": checkpoint.form},
    }


def _printable(path: Path) -> str:
    """A path as text; names on disk need not be."""
    return os.fsencode(path).decode(errors="backslashreplace")


def default_settings(
    checkpoint: Checkpoint, robot: str | Robot = "none", num_steps: int | None = None, solver: str | None = None
) -> PolicySettings:
    """The settings of a checkpoint whose user is not there to be asked: its own, then the robot's and its layout's."""
    said, known = checkpoint.settings, load_robot(robot) if isinstance(robot, str) else robot
    transforms = default_transforms(known, pi05=checkpoint.config.pi05, layout=checkpoint.layout) | said.transforms
    steps = num_steps or said.num_steps or DEFAULT_STEPS
    notes = tuple(getattr(checkpoint, "notes", ()))
    return PolicySettings(known, transforms, steps, ignored=said.ignored, notes=notes, solver=solver or DEFAULT_SOLVER)


def settle(checkpoint: Checkpoint, choices: Choices) -> tuple[Checkpoint, PolicySettings]:
    """The settings, and the checkpoint with those that are dimensions of its model.

    Raises DuqError or CheckpointError: a setting that nobody said, two that contradict, a robot that does not fit.
    """
    return _Decision(checkpoint, choices).settled()


class _Decision:
    """One checkpoint's settings, each looked up in its sources in turn."""

    def __init__(self, checkpoint: Checkpoint, choices: Choices):
        self.checkpoint, self.choices, self.said = checkpoint, choices, checkpoint.settings
        self.openpi, self.pi05 = checkpoint.layout == "openpi", checkpoint.config.pi05
        self.training = None if choices.config is None else self._training(choices.config)
        self.sources: dict[str, str] = {}
        self.notes: list[str] = []
        self.robot = self._robot()

    def settled(self) -> tuple[Checkpoint, PolicySettings]:
        _check_fit(self.checkpoint, self.robot)
        self._refuse_options_without_effect()
        config = replace(
            self.checkpoint.config,
            action_horizon=self._action_horizon(),
            max_prompt_tokens=self._max_prompt_tokens(),
            rotary=self._rotary(),
        )
        num_steps = self._choose("num_steps", DEFAULT_STEPS)
        settings = PolicySettings(
            self.robot,
            self._transforms(),
            num_steps,
            self.sources,
            self.training.name if self.training else self.said.config,
            self.said.ignored,
            (*self.checkpoint.notes, *self.notes),
            self._solver(num_steps),
        )
        return replace(self.checkpoint, config=config), settings

    def _training(self, name: str) -> TrainingConfig:
        found, config = training_config(name), self.checkpoint.config
        if not self.openpi:
            raise DuqError(f"--config {name}: is openpi's, but {self.checkpoint.path} is LeRobot's, whose files say it all")
        if found.pi05 != config.pi05:
            wanted, there = ("pi0.5", "pi0") if found.pi05 else ("pi0", "pi0.5")
            raise DuqError(f"--config {name}: is of a {wanted} policy, but {self.checkpoint.path} is {there}")
        if found.action_dim not in (None, config.action_dim):
            raise DuqError(
                f"--config {name}: predicts {found.action_dim} actions, but {self.checkpoint.path} {config.action_dim}"
            )
        return found

    def _refuse_options_without_effect(self) -> None:
        """An option that changes nothing here is a misunderstanding, and the user should know."""
        choices, robot = self.choices, self.robot
        if choices.lerobot_version is not None and self.openpi:
            raise DuqError(
                f"--lerobot-version {choices.lerobot_version}: {self.checkpoint.path} is openpi's, not LeRobot's"
            )
        if choices.state_in_prompt and not self.pi05:
            raise DuqError("--state-in-prompt: pi0 takes the state as numbers; only pi0.5 reads it from the prompt")
        if choices.delta_actions and robot is None:
            raise DuqError("--delta-actions: --robot none takes and gives what the model does; name a robot with --robot")
        if choices.adapt_to_pi and not any(each.when == "adapt_to_pi" for each in (robot.conversions if robot else ())):
            name = robot.name if robot else "none"
            raise DuqError(f"--adapt-to-pi: robot {name} has no conversion to Physical Intelligence's joint space")

    # --- looking up

    def _choose(self, name: str, otherwise: Any = None) -> Any:
        """The setting's value from the first source that says it. A note tells where --config and the checkpoint differ."""
        chosen = getattr(self.choices, name)
        if chosen is not None:
            return self._from("--" + name.replace("_", "-"), name, chosen)
        trained = self._value(self.training.settings, name) if self.training else None
        stored = self._value(self.said, name)
        if trained is not None and stored is not None and trained != stored:
            self.notes.append(
                f"{name}: the checkpoint says {stored!r}, but {self._config} {trained!r}, which is used; "
                "is it the config that it was trained with?"
            )
        if trained is not None:
            return self._from(self._config, name, trained)
        if stored is not None:
            return self._from("the checkpoint", name, stored)
        return otherwise if otherwise is None else self._from("the default", name, otherwise)

    @staticmethod
    def _value(settings: Any, name: str) -> Any:
        return getattr(settings, name) if hasattr(settings, name) else settings.transforms.get(name)

    @property
    def _config(self) -> str:
        return f"--config {self.training.name}" if self.training else ""

    def _from(self, source: str, name: str, value: Any) -> Any:
        self.sources[name] = source
        return value

    # --- each setting

    def _robot(self) -> Robot | None:
        name, trained = self.choices.robot, self.training.settings.robot if self.training else None
        if name == "lerobot":
            if self.openpi:
                raise DuqError(f"--robot lerobot: {self.checkpoint.path} is openpi's; give one of {', '.join(ROBOT_NAMES)}")
            return self._lerobot()
        if name is not None:
            self.sources["robot"] = "--robot"
            return load_robot(name)
        if trained is not None:
            self.sources["robot"] = self._config
            return trained
        if self.said.robot is not None:
            self.sources["robot"] = "the checkpoint"
            return self.said.robot
        return None if self.openpi else self._lerobot()

    def _lerobot(self) -> Robot:
        if self.said.robot is None:
            raise CheckpointError(
                f'{self.checkpoint.path}: config.json does not describe its robot ("input_features" with cameras and '
                f'observation.state, "output_features" with action); say --robot {", ".join(ROBOT_NAMES)} or a TOML file'
            )
        self.sources["robot"] = "the checkpoint"
        return self.said.robot

    def _action_horizon(self) -> int:
        found = self._choose("action_horizon")
        if found is None:
            raise DuqError(
                f"{self.checkpoint.path} does not say how many actions a chunk has, and the actions of a chunk attend to "
                "each other: say --config NAME for a published openpi config, or --action-horizon N as in training "
                "(and --max-prompt-tokens N unless it is "
                f"{self.checkpoint.config.max_prompt_tokens})"
            )
        return found

    def _max_prompt_tokens(self) -> int:
        return self._choose("max_prompt_tokens", self.checkpoint.config.max_prompt_tokens)

    def _solver(self, num_steps: int) -> str:
        """Nobody's but the user's: no policy is trained for one."""
        chosen = self.choices.solver or DEFAULT_SOLVER
        if chosen not in SOLVERS:
            raise DuqError(f"--solver {chosen}: unknown, one of {', '.join(SOLVERS)}")
        if Solver(chosen, num_steps).history >= num_steps:
            raise DuqError(
                f"--solver {chosen}: its first steps are those of lower orders, and so would be all {num_steps} "
                f"(--num-steps); give it more, or say --solver euler"
            )
        return self._from("--solver" if self.choices.solver else "the default", "solver", chosen)

    def _rotary(self) -> str:
        """As the checkpoint was read: by what it says of its training, else by the type and origin of its weights."""
        chosen = self.choices.rotary
        if chosen in ROTARY:
            return self._from("--rotary", "rotary", chosen)
        if chosen not in (None, "auto"):
            raise DuqError(f"--rotary {chosen}: unknown, one of {', '.join(ROTARY)}, auto")
        source = "the weights' origin" if self.said.rotary is None else "the checkpoint"
        return self._from(source, "rotary", self.checkpoint.config.rotary)

    def _transforms(self) -> dict[str, Any]:
        transforms = default_transforms(self.robot, pi05=self.pi05, layout=self.checkpoint.layout)
        if not self.openpi:
            transforms |= self.said.transforms | self._lerobot_version()
        transforms |= {name: self._switch(name, transforms[name]) for name in ("delta_actions", "adapt_to_pi")}
        transforms["state_in_prompt"] = self.pi05 and self._switch("state_in_prompt", transforms["state_in_prompt"])
        transforms["default_prompt"] = self._choose("default_prompt")
        if transforms["default_prompt"] is None and self.robot and self.robot.default_prompt is not None:
            transforms["default_prompt"] = self._from(
                f"robot {self.robot.name}", "default_prompt", self.robot.default_prompt
            )
        if transforms["delta_actions"] and self.robot and not (transforms["delta_mask"] or any(self.robot.delta)):
            raise DuqError(
                f"--delta-actions: robot {self.robot.name} does not say which actions are deltas ([actions] delta)"
            )
        return transforms

    def _switch(self, name: str, default: bool) -> bool:
        """A setting that changes actions: somebody has to say it, or all published policies of the robot agree."""
        found = self._choose(name)
        if found is not None:
            return found
        if self.robot is None or not self.openpi:
            return default
        silent = name == "state_in_prompt" and self.pi05 and name not in self.robot.defaults
        if name in self.robot.ask or silent:
            flag = name.replace("_", "-")
            raise DuqError(
                f"{self.checkpoint.path} does not say whether the policy was trained with {name.replace('_', ' ')}, and "
                f"policies of {self.robot.name} differ: say --config NAME for a published openpi config, or --{flag} or "
                f"--no-{flag}"
            )
        return self._from(f"robot {self.robot.name}", name, default)

    def _lerobot_version(self) -> dict[str, Any]:
        """The settings in which LeRobot's versions differ, where config.json does not show which it was."""
        chosen, marked = self.choices.lerobot_version, self.said.lerobot_version
        if chosen is not None:
            version = _version(chosen)
            if marked is not None and version != marked:
                raise DuqError(f"--lerobot-version {chosen}: {self.checkpoint.path} was written by {marked} or later")
            self.sources["lerobot_version"] = "--lerobot-version"
            return version_transforms(version, self.said.padded_state_dims)
        if marked is not None:
            self.sources["lerobot_version"] = "the checkpoint"
            return {}
        if self.robot is not None and (self.pi05 or not self.said.square_images):
            what = "the state is padded in the prompt" if self.pi05 else "images that are not square are padded"
            raise DuqError(
                f"{self.checkpoint.path} was written by LeRobot 0.4 or 0.5.0, which differ in how {what}: "
                "say --lerobot-version 0.4 or 0.5"
            )
        return {}


def _version(text: str) -> str:
    """A version of LeRobot as one of VERSIONS."""
    parts = text.split(".")
    if len(parts) < 2 or not all(part.isdigit() for part in parts[:2]):
        raise DuqError(f"--lerobot-version {text}: expected a version such as 0.4 or 0.6.1")
    release = f"{parts[0]}.{parts[1]}"
    if release in VERSIONS:
        return release
    if (int(parts[0]), int(parts[1])) < (0, 3):
        raise DuqError(f"--lerobot-version {text}: policies before 0.3 cannot be compiled")
    return VERSIONS[-1]


def _check_fit(checkpoint: Checkpoint, robot: Robot | None) -> None:
    """A robot whose numbers are not the statistics' is another policy's; Preprocessor compares them with the model."""
    stats = checkpoint.norm_stats
    if robot is None or stats is None:
        return
    widths = [_width(stats.get(key)) for key in ("state", "actions")]
    full = checkpoint.config.action_dim
    own = robot.state_dim, robot.action_dim
    if all(width in (None, dims) or width >= full for width, dims in zip(widths, own, strict=True)):
        return
    fitting = [name for name in ROBOT_NAMES if (known := load_robot(name)) and _dims(known) == widths]
    fitting = ["lerobot (the default)"] if checkpoint.layout == "lerobot" and checkpoint.settings.robot else fitting
    hint = f"--robot {' or '.join(fitting)} fits" if fitting else "describe yours in a TOML file (--robot my_arm.toml)"
    raise DuqError(
        f"--robot {robot.name}: has a state of {robot.state_dim} and {robot.action_dim} actions, but the norm stats of "
        f"{checkpoint.path} are of {_said(widths[0])} and {_said(widths[1])}; {hint}"
    )


def _dims(robot: Robot) -> list[int]:
    return [robot.state_dim, robot.action_dim]


def _width(stats: Mapping | None) -> int | None:
    """How many numbers statistics are about; None where they are about any (IDENTITY)."""
    return next((len(values) for values in (stats or {}).values() if isinstance(values, list)), None)


def _said(width: int | None) -> str:
    return "any number" if width is None else str(width)


def missing_statistics(checkpoint: Checkpoint, robot: str) -> CheckpointError:
    """The error about a checkpoint without statistics."""
    where = "assets/<asset_id>/norm_stats.json" if checkpoint.layout == "openpi" else f"{PREPROCESSOR} and {POSTPROCESSOR}"
    return CheckpointError(
        f"{checkpoint.path} has no normalization statistics ({where}): a plan for {robot} would move it wrongly. "
        "Copy them from the training run, or say --without-norm-stats"
    )
