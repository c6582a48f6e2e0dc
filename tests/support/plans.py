"""Plans made by hand: the least that a manifest says, and what becomes of a plan's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.plan import PlanWriter

CONFIG = ModelConfig(
    pi05=False,
    vision=VisionConfig(32, 1, 64, 2),
    llm=GemmaConfig(64, 2, 128, 2, 1, 32),
    expert=GemmaConfig(32, 2, 64, 2, 1, 32),
    vocab_size=512,
)


def manifest(**changes: Any) -> dict[str, Any]:
    """That of a `cpu` plan without a robot."""
    return {
        "target": "cpu", "robot": "none", "num_steps": 10, "cameras": 3, "model": CONFIG.to_json(), "norm_stats": None,
        "checkpoint": {"path": "/x", "layout": "openpi", "fingerprint": "ab"},
    } | changes  # fmt: skip


def write_plan(path: Path, entries: dict[str, Any], signer: Any = None, **changes: Any) -> dict[str, int]:
    """Writes a plan of these entries; returns their offsets."""
    with PlanWriter(path) as plan:
        offsets = {name: plan.write(name, data) for name, data in entries.items()}
        plan.finish(manifest(**changes), signer)
    return offsets
