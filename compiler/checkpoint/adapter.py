"""PEFT adapters (LoRA): a folder with the changes of a policy, merged into the policy they were trained on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duq.compiler.checkpoint import lerobot
from duq.compiler.checkpoint.locate import HubLocation, parse_location
from duq.compiler.checkpoint.names import TIED_HEAD, canonical_name, current_name, is_unused, openpi_name
from duq.compiler.checkpoint.ranges import checked
from duq.compiler.checkpoint.scratch import Scratch
from duq.compiler.checkpoint.shapes import listing
from duq.compiler.checkpoint.storage import WEIGHTS, is_there, open_tensors, optional_json, read_json
from duq.compiler.checkpoint.stored import Progress, Stored
from duq.compiler.errors import CheckpointError
from duq.compiler.patterns import Pattern
from duq.runtime.reading import brief, reading

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LONGEST_PATH = 4096  # of Linux
PEFT_PREFIX = "base_model.model."

# adapter_config.json: what merging goes by, what means nothing once the adapter is trained, and what changes the numbers in
# ways that are not merged here -> the values that leave them alone. Any other key has to be empty.
APPLIED = {"r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "modules_to_save", "bias", "target_modules",
           "base_model_name_or_path", "revision", "exclude_modules", "layers_to_transform", "layers_pattern"}  # fmt: skip
WITHOUT_EFFECT = {
    "auto_mapping", "inference_mode", "task_type", "peft_version", "lora_dropout", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "ensure_weight_tying", "fan_in_fan_out",  # the last: for layers other than nn.Linear
}  # fmt: skip
REFUSED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base
}


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor: base + scale * b @ a, or `whole` in its place."""

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    whole: Tensor | None = None

    def apply(self, base: Tensor) -> Tensor:
        """float32, of the base's shape; a whole tensor keeps its dtype."""
        if self.whole is not None:
            return self.whole
        assert self.a is not None and self.b is not None
        delta = self.scale * (self.b.float().flatten(1) @ self.a.float().flatten(1))
        return base.float() + delta.view(base.shape)


def is_adapter(folder: Path, base: str | Path | None) -> bool:
    """Whether the folder holds an adapter. Raises CheckpointError when that is not clear, or parts are missing."""
    config, tensors, whole = (is_there(folder / name) for name in (CONFIG, TENSORS, WEIGHTS))
    if not config and not tensors:
        return False
    if not config:
        raise CheckpointError(f"{folder} has {TENSORS} but no {CONFIG}, which says how to merge it: copy it as well")
    if not tensors:
        pickled = (
            " (adapter_model.bin is pickled: save it as safetensors)" if (folder / "adapter_model.bin").is_file() else ""
        )
        beside = f"; if {WEIGHTS} has it merged, remove {CONFIG}" if whole else ""
        raise CheckpointError(f"{folder} has {CONFIG} but no {TENSORS}{pickled}: copy the adapter as well{beside}")
    settings = optional_json(folder / "config.json")
    if whole and base is None and not settings.get("use_peft"):
        raise CheckpointError(
            f"{folder} holds a whole policy ({WEIGHTS}) and an adapter ({TENSORS}), and it is not clear which is meant: "
            "move one of them away, or name the adapter's base"
        )
    return True


def base_location(folder: Path) -> str | Path:
    """The policy that the adapter says it was trained on. Raises CheckpointError unless it is a folder or a Hub id."""
    config = read_json(folder / CONFIG)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f'{folder / CONFIG}: "base_model_name_or_path" names no base; give it (base, --base)')
    for place in (Path(name), folder / name):
        if len(name) < LONGEST_PATH and place.is_dir() and place.resolve() != folder.resolve():
            return place
    revision = config.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise CheckpointError(f'{folder / CONFIG}: "revision" is {brief(revision)}, expected text')
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return str(HubLocation(name, revision))
    if "://" in name:
        parse_location(name)
        return name
    raise CheckpointError(f"{folder / CONFIG}: its base {name} is not on this machine; give its folder (base, --base)")


def open_adapter(folder: Path, open_base: Callable[[], Stored]) -> Stored:
    """Opens the adapter and its base. Raises CheckpointError: settings that cannot be merged, tensors that do not fit."""
    config = read_json(folder / CONFIG)
    try:
        with reading(CONFIG, CheckpointError):
            _check_config(config)
        tensors = open_tensors(folder / TENSORS)
        base = open_base()
        with reading(f"{CONFIG} and {TENSORS}", CheckpointError):
            changes = _changes(config, tensors, base.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    layout = {name: _result(change, base.tensors[name]) for name, change in changes.items()}
    ranks = sorted({change.a.shape[0] for change in changes.values() if change.a is not None})
    return Stored(
        folder=folder,
        form=f"LoRA adapter (PEFT, rank {', '.join(map(str, ranks))}) merged into {base.form}",
        layout=base.layout,
        origin=base.origin,
        files=[*base.files, folder / CONFIG, folder / TENSORS],
        tensors=base.tensors | layout,
        make=lambda progress: _merge(base, changes, layout, progress),
        notes=[*base.notes, f"{len(changes)} tensors of {base.folder} were changed by the adapter {folder}"],
        buffers=base.buffers,
        beside=[base.folder, *base.beside],
        vision_heads=base.vision_heads,
    )


def _check_config(config: dict) -> None:
    wrong = [
        f"{key} {brief(config[key])}" for key, allowed in REFUSED.items() if key in config and config[key] not in allowed
    ]
    if "peft_type" not in config:
        wrong.append("no peft_type")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        wrong.append(f"bias {brief(config['bias'])}")
    known = APPLIED | WITHOUT_EFFECT | REFUSED.keys()
    wrong += [
        f"{key} {brief(value)}"
        for key, value in config.items()
        if key not in known and value not in (None, False, [], {}, "")
    ]
    checked(config.get("r"), "rank", f"{CONFIG}: r")
    checked(config.get("lora_alpha", 8), "alpha", f"{CONFIG}: lora_alpha")
    if not isinstance(config.get("use_rslora", False), bool):
        wrong.append(f"use_rslora {brief(config['use_rslora'])}")
    for key, name in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        for pattern, value in _table(config, key).items():
            checked(value, name, f"{CONFIG}: {key} of {pattern}")
    for key in ("modules_to_save", "target_modules", "exclude_modules"):
        found = config.get(key)
        if not isinstance(found, (str, type(None))) and not _are_texts(found):
            raise CheckpointError(f"{CONFIG}: {key} is {brief(found)}, expected names of modules")
    if wrong:
        raise CheckpointError(
            f"{CONFIG} has {', '.join(wrong)}, which cannot be merged here: merge it with PEFT (merge_and_unload), and "
            "pass the result"
        )


def _table(config: dict, key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{CONFIG}: {key} is {brief(found)}, expected patterns and their numbers")
    return found


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, str) for each in values)


def _changes(config: dict, tensors: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Change]:
    """Canonical name -> change, for every tensor of the adapter."""
    modules: dict[str, dict[str, Tensor]] = {}
    changes, faults = {}, []
    for stored, tensor in tensors.items():
        name = stored.removeprefix(PEFT_PREFIX)
        if pair := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
            modules.setdefault(pair[1], {})[pair[2]] = tensor
        elif _is_saved(config, name):
            target = _canonical(re.sub(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)", "", name))
            if target == TIED_HEAD or is_unused(target):
                continue
            changes[target] = Change(whole=tensor)
            if target not in base or base[target].shape != tensor.shape:
                faults.append(f"{stored} {list(tensor.shape)} takes the place of no tensor of the base")
        else:
            what = "DoRA" if "lora_magnitude_vector" in name else "of no kind that can be merged"
            faults.append(f"{stored} {list(tensor.shape)} is {what}")
    for module, halves in modules.items():
        target = _canonical(f"{module}.weight")
        if target == TIED_HEAD or is_unused(target):
            continue
        fault = _misfit(config, module, halves, base.get(target))
        if fault or target in changes:
            faults.append(f"LoRA of {module}: {fault or 'the tensor is replaced as well'}")
        else:
            changes[target] = Change(halves["A"], halves["B"], _scale(config, module))
    faults += _unmatched(config, set(modules), base)
    if faults:
        raise CheckpointError(f"{len(faults)} faults between {CONFIG}, {TENSORS} and the base:\n{listing(faults)}")
    return changes


def _canonical(name: str) -> str:
    return canonical_name(current_name(name).removeprefix(lerobot.PREFIX))


def _is_saved(config: dict, name: str) -> bool:
    """Whether the adapter's settings say that this tensor is one of the base's, saved whole."""
    if name.endswith(".bias") and (config.get("bias", "none") != "none"):
        return True
    module = re.sub(r"\.modules_to_save(\.default)?", "", name)
    saved = config.get("modules_to_save") or []
    return any(f".{each}." in f".{module}" for each in ([saved] if isinstance(saved, str) else saved))


def _misfit(config: dict, module: str, pair: dict[str, Tensor], base: Tensor | None) -> str | None:
    if base is None:
        return "the base has no such tensor"
    if pair.keys() != {"A", "B"}:
        return f"lora_{'B' if 'A' in pair else 'A'} is missing"
    a, b = pair["A"], pair["B"]
    rank = _pattern(config, "rank_pattern", module, config.get("r"))
    columns = math.prod(base.shape[1:])
    if a.shape[0] != rank or b.shape[1] != rank:
        return f"A {list(a.shape)} and B {list(b.shape)} are not of rank {rank}"
    if b.shape[0] != base.shape[0] or math.prod(a.shape[1:]) != columns or b[0].numel() != rank:
        return f"A {list(a.shape)} and B {list(b.shape)} do not fit the base's {list(base.shape)}"
    return None


def _scale(config: dict, module: str) -> float:
    rank = _pattern(config, "rank_pattern", module, config["r"])
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(config: dict, key: str, module: str, default: Any) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, as a regular expression."""
    found = (
        value for pattern, value in _table(config, key).items()
        if Pattern(rf"(.*\.)?({pattern})$", f"{CONFIG}: {key}", CheckpointError).starts(module)
    )  # fmt: skip
    return next(found, default)


def _unmatched(config: dict, modules: set[str], base: dict[str, Tensor]) -> list[str]:
    """Linears that the settings name as targets and that have no tensors."""
    targets, changed = config.get("target_modules"), {_canonical(f"{module}.weight") for module in modules}
    if not targets or targets == "all-linear" or config.get("layers_to_transform") is not None:
        return []
    absent = []
    linears = [
        name for name, tensor in base.items() if name.endswith(".weight") and tensor.ndim == 2 and "embed" not in name
    ]
    for name in linears:
        module = lerobot.PREFIX + openpi_name(name).removesuffix(".weight")
        if _is_target(targets, module) and not _is_target(config.get("exclude_modules"), module) and name not in changed:
            absent.append(f"{module} is a target in {CONFIG}, but has no tensors")
    return absent


def _is_target(targets: str | list[str] | None, module: str) -> bool:
    if isinstance(targets, str):
        return Pattern(targets, CONFIG, CheckpointError).is_all_of(module)
    return any(module == target or module.endswith(f".{target}") for target in targets or [])


def _result(change: Change, base: Tensor) -> Tensor:
    dtype = torch.float32 if change.whole is None else change.whole.dtype
    return torch.empty(base.shape, dtype=dtype, device="meta")


def _merge(
    base: Stored, changes: dict[str, Change], layout: dict[str, Tensor], progress: Progress | None
) -> tuple[dict[str, Tensor], bool]:
    made, scratch = base.read(progress), Scratch(layout)
    for name, change in changes.items():
        scratch.write(name, change.apply(made[name]))
    return made | scratch.tensors(), base.finite and scratch.finite
