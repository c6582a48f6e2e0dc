"""The dimensions of a policy, shared by the compiler (which infers them) and the plan (which records them)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from duq.runtime.errors import PlanError

IMAGE_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
ROTARY = ("exact", "bfloat16")


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP. So400m/14 at 224 px is (1152, 27, 4304, 16)."""

    width: int
    depth: int
    mlp_width: int
    heads: int
    image_size: int = 224
    patch_size: int = 14

    @property
    def tokens(self) -> int:
        """Tokens of one camera image: (image_size / patch_size)^2 = 256."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma decoder. gemma_2b is (2048, 18, 16384, 8, 1, 256), gemma_300m (1024, 18, 4096, 8, 1, 256)."""

    width: int
    depth: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelConfig:
    """A whole pi0 or pi0.5 policy.

    rotary: the frequencies of both Gemmas' rotary embeddings. "exact", as JAX and PyTorch in float32 have them, or
    "bfloat16", rounded to it: PyTorch's `model.to(torch.bfloat16)` rounds the buffer they lie in with the weights, so
    policies that were trained so know no others. Angles, cosines and sines are float32 either way. PlanError if neither.
    """

    pi05: bool
    vision: VisionConfig
    llm: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    action_dim: int = 32
    action_horizon: int = 50
    max_prompt_tokens: int = 48  # pi0: 48, pi0.5: 200
    state_dim: int | None = None  # where it is not action_dim (LeRobot's max_state_dim of a pi0)
    rotary: str = "exact"

    def __post_init__(self) -> None:
        if self.rotary not in ROTARY:
            raise PlanError(f"rotary is {self.rotary!r}; expected {' or '.join(ROTARY)}")

    @property
    def state_width(self) -> int:
        """Numbers of the state that pi0 takes, padding included."""
        return self.state_dim or self.action_dim

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        nested = {"vision": VisionConfig, "llm": GemmaConfig, "expert": GemmaConfig}
        return cls(**{key: nested[key](**value) if key in nested else value for key, value in data.items()})
