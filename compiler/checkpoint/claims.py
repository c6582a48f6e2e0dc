"""What config.json says about the policy, and whether the tensors agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

from duq.compiler.checkpoint.ranges import checked
from duq.compiler.checkpoint.shapes import listing
from duq.compiler.errors import CheckpointError
from duq.runtime.config import ModelConfig
from duq.runtime.reading import brief, plain

# openpi's Gemma variants: width, MLP width, query heads, key/value heads, head size. Depth is left out: a
# checkpoint cut in depth keeps its variant.
GEMMA_VARIANTS = {
    "dummy": (64, 128, 8, 1, 16),
    "gemma_300m": (1024, 4096, 8, 1, 256),
    "gemma_2b": (2048, 16384, 8, 1, 256),
}
_VARIANT_FIELDS = ("width", "mlp_width", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Claim:
    """config.json's `key` says that `field` of ModelConfig (dotted: "llm.width") is `value`."""

    key: str
    field: str
    value: Any


def variant_claims(key: str, stack: str, settings: dict) -> list[Claim]:
    """The dimensions that a Gemma variant's name stands for ("gemma_2b_lora" has those of gemma_2b)."""
    name = settings.get(key)
    if name is None:
        return []
    dimensions = GEMMA_VARIANTS.get(name.removesuffix("_lora")) if isinstance(name, str) else None
    if dimensions is None:
        raise CheckpointError(f'config.json: "{key}" is "{plain(name)}", known are {", ".join(sorted(GEMMA_VARIANTS))}')
    return [
        Claim(f"{key} {name}", f"{stack}.{field}", value) for field, value in zip(_VARIANT_FIELDS, dimensions, strict=True)
    ]


def explicit_claims(settings: dict) -> list[Claim]:
    """Dimensions written out: {"vision": {"heads": 2}, "llm": {...}, "expert": {...}}, as our own checkpoints do."""
    return [
        Claim(f"{stack}.{field}", f"{stack}.{field}", value)
        for stack in ("vision", "llm", "expert")
        for field, value in section(settings, stack).items()
    ]


def _field(config: ModelConfig, path: str) -> Any:
    """config.llm.width of "llm.width"; None where there is no such field."""
    return reduce(lambda node, name: getattr(node, name, None), path.split("."), cast(Any, config))


def check_claims(config: ModelConfig, claims: list[Claim]) -> None:
    """Raises CheckpointError that lists every claim of config.json which the tensors contradict."""
    faults = []
    for claim in claims:
        found = _field(config, claim.field)
        if found != claim.value:
            faults.append(f"{claim.key}: {claim.field} {brief(claim.value)}, but the tensors have {found!r}")
    if faults:
        raise CheckpointError(f"config.json contradicts the tensors:\n{listing(faults)}")


def section(settings: dict, key: str) -> dict:
    """settings[key], a JSON object; empty when absent."""
    value = settings.get(key, {})
    if not isinstance(value, dict):
        raise CheckpointError(f'config.json: "{key}" must be an object, found {brief(value)}')
    return value


def whole_number(settings: dict, key: str, name: str, default: int | None = None) -> int | None:
    """settings[key], or the default when absent. Raises CheckpointError unless it is in the range `name` (ranges.py)."""
    value = settings.get(key, default)
    return None if value is None else checked(value, name, f'config.json: "{key}"')
