"""Weight names: openpi's long ones and the short canonical ones the rest of the compiler uses.

The two differ in a prefix only, and the mapping is one to one, so a plan's linear can always be traced back to
the tensor of the checkpoint it came from::

    paligemma_with_expert.paligemma.model.language_model.layers.3.mlp.down_proj.weight  <->
    llm.layers.3.mlp.down_proj.weight
"""
from __future__ import annotations

PREFIXES = {
    "vision.": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    "projector.": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.",
    "llm.": "paligemma_with_expert.paligemma.model.language_model.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}

# openpi's module has these two heads beside what the policy uses. The first shares its storage with the token
# embedding and savers keep only one of the two; the second is never called.
TIED_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
UNUSED_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def canonical_name(openpi: str) -> str:
    """openpi's name of a tensor -> its canonical name. Names without a known prefix stay as they are."""
    return _swap_prefix(openpi, {long: short for short, long in PREFIXES.items()})


def openpi_name(canonical: str) -> str:
    """The inverse of :func:`canonical_name`."""
    return _swap_prefix(canonical, PREFIXES)


def _swap_prefix(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name
