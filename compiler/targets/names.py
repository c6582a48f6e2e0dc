"""What weights are called in plans: by their modules, merged ones once for the common part."""

from __future__ import annotations

import re


def title_of(name: str) -> str:
    """`llm.layers.0.mlp.gate_proj.weight_q+llm.layers.0.mlp.up_proj.weight_q` -> `llm.layers.0.mlp.gate_proj+up_proj`.

    For a merged weight the module names, the common part once; for all others the name without its kind.
    """
    parts = [part.removesuffix(".weight_kn").removesuffix(".weight_q") for part in name.split("+")]
    parent = parts[0].rpartition(".")[0]
    return "+".join([parts[0], *(part.removeprefix(f"{parent}.") for part in parts[1:])])


def label_of(name: str) -> str:
    """What a weight's linear is called in the schedule: its modules, without the gains that were folded in."""
    return re.sub(r"[\w.]+\.gain\*", "", title_of(name))
