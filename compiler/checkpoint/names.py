"""Weight names: openpi's long ones and the short canonical ones the rest of the compiler uses.

The two differ in a prefix only, and the mapping is one to one, so a plan's linear can always be traced back to
the tensor of the checkpoint it came from::

    paligemma_with_expert.paligemma.model.language_model.layers.3.mlp.down_proj.weight  <->
    llm.layers.3.mlp.down_proj.weight
"""

from __future__ import annotations

import re

PREFIXES = {
    "vision.": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    "projector.": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.",
    "llm.": "paligemma_with_expert.paligemma.model.language_model.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}

# openpi's module has this head beside what the policy uses. It shares its storage with the token embedding, and savers keep
# only one of the two.
TIED_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"

# Older and newer names of the same modules: transformers moved them in 4.52, and left vision_model out in 5.x.
_PALIGEMMA = "paligemma_with_expert.paligemma."
MOVED = {
    f"{_PALIGEMMA}language_model.lm_head.": f"{_PALIGEMMA}lm_head.",
    f"{_PALIGEMMA}language_model.model.": f"{_PALIGEMMA}model.language_model.",
    f"{_PALIGEMMA}vision_tower.": f"{_PALIGEMMA}model.vision_tower.",
    f"{_PALIGEMMA}multi_modal_projector.": f"{_PALIGEMMA}model.multi_modal_projector.",
}
_VISION = f"{_PALIGEMMA}model.vision_tower."

# What wrappers of training put between the names: DistributedDataParallel, torch.compile, FSDP, activation checkpoints.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Canonical names (patterns) of tensors that savers keep and the policy does not use -> why it does not.
UNUSED = {
    r"paligemma_with_expert\.gemma_expert\.lm_head\.weight": "the action expert makes no words",
    r"expert\.embed_tokens\.weight": "the action expert reads no words",
    r"(llm|expert)\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq)": "computed from the head's size",
    r"vision\.embeddings\.position_ids": "0, 1, 2, ...",
    r"vision\.head\..*": "SigLIP's pooling, of which PaliGemma takes the input",
}


def canonical_name(openpi: str) -> str:
    """openpi's name of a tensor -> its canonical name. Names without a known prefix stay as they are."""
    return _swap_prefix(openpi, {long: short for short, long in PREFIXES.items()})


def current_name(stored: str) -> str:
    """A stored name of any generation, behind any training wrappers -> openpi's. LeRobot's "model." stays."""
    prefix = "model." if (name := _unwrapped(stored)).startswith("model.") else ""
    name = _swap_prefix(name.removeprefix("model."), MOVED)
    if name.startswith(_VISION) and not name.startswith(_VISION + "vision_model."):
        name = f"{_VISION}vision_model.{name.removeprefix(_VISION)}"
    return prefix + name


def is_unused(canonical: str) -> bool:
    """Whether the policy computes without this tensor (see UNUSED)."""
    return any(re.fullmatch(pattern, canonical) for pattern in UNUSED)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def openpi_name(canonical: str) -> str:
    """The inverse of :func:`canonical_name`."""
    return _swap_prefix(canonical, PREFIXES)


def _swap_prefix(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name
