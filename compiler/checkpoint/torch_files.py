"""Safetensors of openpi's PyTorch trainer and of LeRobot -> canonical weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from duq.compiler.checkpoint import lerobot
from duq.compiler.checkpoint.names import TIED_HEAD, canonical_name, current_name, is_unused
from duq.compiler.checkpoint.shapes import listing
from duq.compiler.checkpoint.storage import open_tensors, optional_json, weight_files
from duq.compiler.checkpoint.stored import Stored
from duq.compiler.errors import CheckpointError

EMBEDDING = "llm.embed_tokens.weight"
BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")  # LeRobot 0.3's statistics

# Part of a tensor's name -> what the tensors are, where they belong to something else than a whole pi0 or pi0.5.
FOREIGN = {
    "lora_magnitude_vector": "DoRA, which cannot be merged here; merge it with PEFT (merge_and_unload) and save the result",
    ".lora_A.": "LoRA that is not merged: save it with PEFT (save_pretrained) and pass the adapter's folder, or merge it "
    "first (merge_and_unload)",
    "vlm_with_expert.": "SmolVLA",
    "eagle": "GR00T",
}


def open_torch(folder: Path) -> Stored:
    """Opens model.safetensors or its shards. Raises CheckpointError: damaged files, tensors of some other model."""
    files = weight_files(folder)
    try:
        tensors, behind_prefix = _named([open_tensors(file) for file in files])
        buffers = {name: tensors.pop(name).flatten().tolist() for name in list(tensors) if name.startswith(BUFFERS)}
        _check_policy(tensors)
        weights = _without_unused({canonical_name(name): tensor for name, tensor in tensors.items()})
    except CheckpointError as error:
        raise error if str(error).startswith(str(folder)) else CheckpointError(f"{folder}: {error}") from error
    settings = optional_json(folder / "config.json")
    layout = "lerobot" if "type" in settings or behind_prefix else "openpi"
    return Stored(
        folder=folder,
        form=f"{'LeRobot' if layout == 'lerobot' else 'openpi PyTorch'}{' 0.3' if buffers else ''}, {dtypes(weights)}",
        layout=layout,
        origin="torch",
        files=files,
        tensors=weights,
        buffers=buffers,
    )


def dtypes(tensors: dict[str, Tensor]) -> str:
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))


def _named(shards: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], bool]:
    """openpi's name -> tensor, and whether there was LeRobot's prefix before it."""
    tensors, behind_prefix, twice = {}, False, []
    for shard in shards:
        for stored, tensor in shard.items():
            name = current_name(stored)
            behind_prefix |= name.startswith(lerobot.PREFIX)
            name = name.removeprefix(lerobot.PREFIX)
            if name in tensors:
                twice.append(f"{stored} is a second {name}")
            tensors[name] = tensor
    if twice:
        raise CheckpointError(f"{len(twice)} tensors are stored twice, under names that mean the same:\n{listing(twice)}")
    return tensors, behind_prefix


def _check_policy(tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError that says which other model the tensors are."""
    for part, what in FOREIGN.items():
        if names := [name for name in tensors if part in name]:
            raise CheckpointError(f"these tensors are {what}:\n{listing(names)}")
    if any(name.startswith("paligemma_with_expert.") for name in tensors):
        if not any(".gemma_expert." in name or name.startswith("action_in_proj") for name in tensors):
            raise CheckpointError("these are the tensors of pi0-FAST: no action expert; only pi0 and pi0.5 can be compiled")
    elif any(
        name.startswith(("vision_tower.", "language_model.", "multi_modal_projector.", "paligemma.")) for name in tensors
    ):
        raise CheckpointError("this is PaliGemma itself, not a policy trained from it; only pi0 and pi0.5 can be compiled")


def _without_unused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops what the policy does not use; the tied head stands in for the embedding where a saver kept only the head."""
    weights = {name: tensor for name, tensor in weights.items() if not is_unused(name)}
    head = weights.pop(TIED_HEAD, None)
    if head is not None and weights.setdefault(EMBEDDING, head) is not head and not head.equal(weights[EMBEDDING]):
        raise CheckpointError(f"{TIED_HEAD} and {EMBEDDING} differ, but the policy has one tensor for both")
    return weights
