"""config.json of an exported plan, as LeRobot's parser reads it and `--policy.NAME=` overrides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from lerobot.configs import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

RTC_MODES = ("guide", "blend")
CANNOT_TRAIN = "a duq plan cannot be trained: train the checkpoint that it was compiled from, and compile it again"


@PreTrainedConfig.register_subclass("duq")
@dataclass
class DuqConfig(PreTrainedConfig):
    """chunk_size, the features and `checkpoint` describe the plan, and must agree with it.

    n_action_steps: actions of a chunk that select_action gives before it infers again.
    plan: the file in the folder. threads: of a CPU plan's engine (None: all cores). verify: compare the plan's hashes.
    rtc: how real-time chunking joins chunks. "guide": in every denoising step, as LeRobot's own policies (CPU plans).
    "blend": the frozen prefix, then a mix of both chunks, by the same weights (all plans).
    """

    chunk_size: int = 50
    n_action_steps: int = 50
    action_feature_names: list[str] | None = None
    plan: str = "engine.plan"
    checkpoint: str | None = None
    threads: int | None = None
    verify: bool = True
    rtc: str = "guide"
    rtc_config: RTCConfig | None = None
    compile_model: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps is {self.n_action_steps}, expected 1 to chunk_size, {self.chunk_size}")
        if self.rtc not in RTC_MODES:
            raise ValueError(f"rtc is {self.rtc!r}, expected one of {', '.join(RTC_MODES)}")
        self._refuse_without_effect()

    def _refuse_without_effect(self) -> None:
        """Settings of other policies that would change nothing here."""
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps is {self.n_obs_steps}: pi0 and pi0.5 take one observation")
        if self.use_amp:
            raise ValueError("use_amp: a plan's arithmetic was settled when it was compiled; leave it out")
        if self.use_peft:
            raise ValueError("use_peft: duq-compile merges an adapter into the plan; compile the adapter's folder")

    def validate_features(self) -> None:
        if not self.image_features or self.robot_state_feature is None or self.action_feature is None:
            raise ValueError("config.json lacks images, observation.state or action; export the plan again")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> NoReturn:
        raise NotImplementedError(CANNOT_TRAIN)

    def get_scheduler_preset(self) -> NoReturn:
        raise NotImplementedError(CANNOT_TRAIN)
