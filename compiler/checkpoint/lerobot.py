"""LeRobot's `pretrained_model/` directory: openpi's tensors behind "model.", and the processors' own files.

Everything that its files say is applied, known to have no effect on inference, or refused by name. Three tables say which:
CONFIG_KEYS for config.json, PREPROCESSOR_STEPS and POSTPROCESSOR_STEPS for the steps of the two pipelines.

    0.3          statistics are buffers among the weights (`normalize_inputs.buffer_observation_state.mean`)
    0.4, 0.5.0   statistics in the pipelines' state files; the two differ in how images and the state are padded
    0.5.1        config.json has `use_relative_actions`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duq.compiler.checkpoint.claims import Claim, explicit_claims, variant_claims, whole_number
from duq.compiler.checkpoint.norm_stats import LEROBOT_EPSILON, checked_modes
from duq.compiler.checkpoint.ranges import expected, in_range
from duq.compiler.checkpoint.settings import Settings
from duq.compiler.checkpoint.storage import file_beside, is_there, open_tensors, read_json
from duq.compiler.errors import CheckpointError
from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.preprocess import MODES
from duq.runtime.reading import brief, listed, plain, reading
from duq.runtime.robots import Camera, Robot, StatePart

PREFIX = "model."
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
POLICY_TYPES = {"pi0": False, "pi05": True}  # config.json "type" -> is it pi0.5
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
DEFAULT_MODE = {False: "MEAN_STD", True: "QUANTILES"}  # by "is it pi0.5"
VERSIONS = ("0.3", "0.4", "0.5")  # as --lerobot-version tells them apart; 0.5 is also every later one
MARK = "use_relative_actions"  # in config.json since 0.5.1

# --- config.json ------------------------------------------------------------------------------------------------------

APPLIED, HARMLESS = "applied", "harmless"

# Key -> APPLIED (by the functions below), HARMLESS for inference, or the values with which it is harmless.
CONFIG_KEYS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "type",
            "chunk_size",
            "max_state_dim",
            "max_action_dim",
            "num_inference_steps",
            "num_steps",
            "tokenizer_max_length",
            "normalization_mapping",
            "image_resolution",
            "resize_imgs_with_padding",
            "empty_cameras",
            "input_features",
            "output_features",
            "use_relative_actions",
            "relative_exclude_joints",
            "action_feature_names",
            "paligemma_variant",
            "action_expert_variant",
            "dtype",
            "use_peft",
            "proj_width",
            "vision",
            "llm",
            "expert",
        ),
        APPLIED,
    ),  # fmt: skip
    # training, and where and by whom the policy is kept
    **dict.fromkeys(
        (
            "device",
            "use_amp",
            "push_to_hub",
            "repo_id",
            "private",
            "tags",
            "license",
            "pretrained_path",
            "pretrained_revision",
            "gradient_checkpointing",
            "compile_model",
            "compile_mode",
            "freeze_vision_encoder",
            "train_expert_only",
            "train_state_proj",
            "use_cache",
            "attention_implementation",
            "time_sampling_beta_alpha",
            "time_sampling_beta_beta",
            "time_sampling_scale",
            "time_sampling_offset",
        ),
        HARMLESS,
    ),  # fmt: skip
    # the loop around the policy: how many actions of a chunk are executed, and how chunks are joined
    **dict.fromkeys(("n_action_steps", "rtc_config"), HARMLESS),
    # settings that would change the network or its inputs, with the value at which they do not
    "n_obs_steps": (1,),
    "min_period": (4e-3,),
    "max_period": (4.0,),
    "adapt_to_pi_aloha": (False, None),
    "use_delta_joint_actions_aloha": (False, None),
    "use_visual_memory": (False, None),
    "use_proprioceptive_memory": (False, None),
}
HARMLESS_PREFIXES = ("optimizer_", "scheduler_")


def check_config(settings: dict) -> tuple[str, ...]:
    """Raises CheckpointError that names every key whose value changes the numbers in a way that is not compiled.

    Returns the keys that are not known, as "key: value".
    """
    unknown, refused = [], []
    for key, value in settings.items():
        meaning = HARMLESS if key.startswith(HARMLESS_PREFIXES) else CONFIG_KEYS.get(key)
        if meaning is None:
            unknown.append(f"{key}: {brief(value)}")
        elif isinstance(meaning, tuple) and value not in meaning:
            refused.append(f'"{key}" is {brief(value)} (only {meaning[0]!r} can be compiled)')
    if refused:
        raise CheckpointError(f"config.json: {'; '.join(refused)}")
    return tuple(unknown)


def action_horizon(settings: dict) -> int | None:
    return whole_number(settings, "chunk_size", "action_horizon")


def max_prompt_tokens(settings: dict) -> int | None:
    return whole_number(settings, "tokenizer_max_length", "max_prompt_tokens")


def claims(settings: dict) -> list[Claim]:
    """What config.json says about dimensions that the tensors have too. Raises CheckpointError for another policy."""
    policy = settings.get("type")
    if policy not in list(POLICY_TYPES):
        known = " and ".join(POLICY_TYPES)
        raise CheckpointError(f'config.json: policy "type" is {brief(policy)}; only {known} can be compiled')
    found = [Claim(f"type {policy}", "pi05", POLICY_TYPES[policy])]
    if "max_action_dim" in settings:
        found.append(Claim("max_action_dim", "action_dim", settings["max_action_dim"]))
    if "max_state_dim" in settings and not POLICY_TYPES[policy]:  # pi0.5 has no linear for the state
        found.append(Claim("max_state_dim", "state_width", settings["max_state_dim"]))
    if "proj_width" in settings:
        found.append(Claim("proj_width", "expert.width", settings["proj_width"]))
    for key in ("image_resolution", "resize_imgs_with_padding"):
        sides = settings.get(key, [])
        if not isinstance(sides, list) or len(sides) not in (0, 2):
            raise CheckpointError(f'config.json: "{key}" is {brief(sides)}, expected [height, width]')
        found += [Claim(key, "vision.image_size", side) for side in dict.fromkeys(sides)]
    return (
        found
        + variant_claims("paligemma_variant", "llm", settings)
        + variant_claims("action_expert_variant", "expert", settings)
        + explicit_claims(settings)
    )


def _num_steps(settings: dict) -> int | None:
    found = {key: whole_number(settings, key, "num_steps") for key in ("num_inference_steps", "num_steps")}
    said = {value for value in found.values() if value is not None}
    if len(said) > 1:
        raise CheckpointError(f"config.json: num_inference_steps and num_steps differ ({found})")
    return said.pop() if said else None


# --- the pipelines ----------------------------------------------------------------------------------------------------


@dataclass
class Pipelines:
    """What both pipelines say, gathered step by step."""

    directory: Path
    pi05: bool
    settings: dict
    rename: dict[str, str] = field(default_factory=dict)  # observation key -> feature
    max_prompt_tokens: int | None = None
    relative: tuple[bool, list | None, list] | None = None  # enabled, action names, joints to exclude
    absolute: bool | None = None
    prepared_dims: int | None = None  # of the state in the prompt
    stats: dict[str, dict] = field(default_factory=dict)  # "state", "actions" -> statistics with their mode
    spare: dict = field(default_factory=dict)  # the preprocessor's statistics of the actions
    notes: list[str] = field(default_factory=list)


Handler = Callable[[Pipelines, dict, "Path | None"], None]


def _nothing(found: Pipelines, config: dict, state: Path | None) -> None:
    """Batching and moving tensors to a device."""


def _rename(found: Pipelines, config: dict, state: Path | None) -> None:
    names = config.get("rename_map") or {}
    if not isinstance(names, dict) or not all(isinstance(new, str) for new in names.values()):
        raise CheckpointError(f"rename_map is {brief(names)}, expected observation keys and their features")
    found.rename |= names


def _device(found: Pipelines, config: dict, state: Path | None) -> None:
    if config.get("float_dtype") not in (None, "float32", "float"):
        raise CheckpointError(
            f"float_dtype {plain(config['float_dtype'])} would round the policy's inputs, which is not compiled"
        )


def _tokenizer(found: Pipelines, config: dict, state: Path | None) -> None:
    if config.get("padding_side", "right") != "right":
        raise CheckpointError(f"padding_side is {config['padding_side']!r}; only right can be compiled")
    if config.get("task_key", "task") != "task":
        raise CheckpointError(f"task_key is {config['task_key']!r}; only task can be compiled")
    found.max_prompt_tokens = whole_number(config, "max_length", "max_prompt_tokens")
    name = config.get("tokenizer_name")
    if name is not None and "paligemma" not in str(name).lower():
        found.notes.append(f"prompts are tokenized with {name}: give its SentencePiece model with --tokenizer")


def _prepare_state(found: Pipelines, config: dict, state: Path | None) -> None:
    if config.get("task_key", "task") != "task":
        raise CheckpointError(f"task_key is {config['task_key']!r}; only task can be compiled")
    found.prepared_dims = whole_number(config, "max_state_dim", "dims")


def _relative(found: Pipelines, config: dict, state: Path | None) -> None:
    found.relative = (_flag(config, "enabled"), _texts(config, "action_names"), _texts(config, "exclude_joints"))


def _absolute(found: Pipelines, config: dict, state: Path | None) -> None:
    found.absolute = _flag(config, "enabled")


def _flag(config: dict, key: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise CheckpointError(f'"{key}" is {brief(value)}, expected true or false')
    return value


def _texts(config: dict, key: str) -> list[str]:
    values = config.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f'"{key}" is {brief(values)}, expected a list of names')
    return values


def _normalizer(found: Pipelines, config: dict, state: Path | None) -> None:
    stored = _stored(found, state)
    features, modes = _features_of(config, "features"), _modes(found, config)
    _check_images(features, modes, stored)
    keys = config.get("normalize_observation_keys")
    untouched = (features and STATE not in features) or (keys is not None and STATE not in keys)
    kind = features.get(STATE, {}).get("type", "STATE")
    mode = "IDENTITY" if untouched else modes.get(kind, "IDENTITY")
    found.stats["state"] = _statistics(stored, STATE, mode, config, state)
    found.spare = {"stored": stored, "file": state}


def _unnormalizer(found: Pipelines, config: dict, state: Path | None) -> None:
    mode = _modes(found, config).get("ACTION", "IDENTITY")
    stored, needed = _stored(found, state), MODES.get(mode, ())
    if any(f"{ACTION}.{name}" not in stored for name in needed) and found.spare:
        spare = found.spare["stored"]
        if all(f"{ACTION}.{name}" in spare for name in needed):  # LeRobot saves the same statistics with both
            found.notes.append(
                f"{mode} statistics of {ACTION} are only in {found.spare['file'].name}, and taken from there"
            )
            stored, state = spare, found.spare["file"]
    found.stats["actions"] = _statistics(stored, ACTION, mode, config, state)


# Registered name of a step -> (what it does, the keys that its config may have).
_DEVICE_KEYS, _NORM_KEYS = {"device", "float_dtype"}, {"eps", "features", "norm_map", "normalize_observation_keys"}
PREPROCESSOR_STEPS: dict[str, tuple[Handler, set[str]]] = {
    "rename_observations_processor": (_rename, {"rename_map"}),
    "to_batch_processor": (_nothing, set()),
    "device_processor": (_device, _DEVICE_KEYS),
    "pi0_new_line_processor": (_nothing, set()),
    "tokenizer_processor": (
        _tokenizer, {"max_length", "task_key", "padding_side", "padding", "truncation", "tokenizer_name"}
    ),
    "pi05_prepare_state_tokenizer_processor_step": (_prepare_state, {"max_state_dim", "task_key"}),
    "relative_actions_processor": (_relative, {"enabled", "exclude_joints", "action_names"}),
    "normalizer_processor": (_normalizer, _NORM_KEYS),
}  # fmt: skip
POSTPROCESSOR_STEPS: dict[str, tuple[Handler, set[str]]] = {
    "unnormalizer_processor": (_unnormalizer, _NORM_KEYS),
    "absolute_actions_processor": (_absolute, {"enabled"}),
    "device_processor": (_device, _DEVICE_KEYS),
    "to_batch_processor": (_nothing, set()),
}
# Pairs of steps of which the first comes first in every policy of LeRobot's; the other way round means other numbers.
ORDER = (
    ("relative_actions_processor", "normalizer_processor"),
    ("normalizer_processor", "pi05_prepare_state_tokenizer_processor_step"),
    ("pi0_new_line_processor", "tokenizer_processor"),
    ("pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor"),
    ("unnormalizer_processor", "absolute_actions_processor"),
)


def read_pipelines(directory: Path, settings: dict, pi05: bool) -> Pipelines:
    """Both pipelines, step by step. Raises CheckpointError that names file and step if one is unknown or not compiled."""
    found = Pipelines(directory, pi05, settings)
    for name, steps in ((PREPROCESSOR, PREPROCESSOR_STEPS), (POSTPROCESSOR, POSTPROCESSOR_STEPS)):
        file = directory / name
        if is_there(file):
            _read_pipeline(file, steps, found)
    if "state" in found.stats and "actions" not in found.stats and found.spare:
        _only_preprocessor(found)
    return found


def _read_pipeline(file: Path, known: dict[str, tuple[Handler, set[str]]], found: Pipelines) -> None:
    data = read_json(file)
    with reading(file, CheckpointError):
        _read_steps(file, data.get("steps"), known, found)


def _read_steps(file: Path, steps: Any, known: dict[str, tuple[Handler, set[str]]], found: Pipelines) -> None:
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f'{file}: "steps" must be a list of objects')
    names = [step.get("registry_name") or step.get("class") for step in steps]
    for index, (name, step) in enumerate(zip(names, steps, strict=True)):
        where, config = f"{file}: step {index}, {plain(name)}", step.get("config") or {}
        if not isinstance(config, dict):
            raise CheckpointError(f"{where}: its config is {brief(config)}, expected an object")
        if name not in list(known):
            raise CheckpointError(f"{where}: this step is unknown, and what it does to the numbers would be left out")
        handler, keys = known[name]
        if names.count(name) > 1 and name not in ("device_processor", "to_batch_processor"):
            raise CheckpointError(f"{where}: stands twice in the pipeline, which cannot be compiled")
        unknown = sorted(set(config) - keys)
        if unknown:
            raise CheckpointError(f"{where}: its setting {unknown[0]!r} ({brief(config[unknown[0]])}) is unknown")
        state = file_beside(file, step["state_file"]) if step.get("state_file") else None
        try:
            handler(found, config, state)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
    _check_order(file, names, found)


def _check_order(file: Path, names: list[str], found: Pipelines) -> None:
    for first, second in ORDER:
        relative = "relative" in first or "absolute" in second
        if relative and not (found.relative and found.relative[0]):
            continue  # switched off
        if first in names and second in names and names.index(first) > names.index(second):
            raise CheckpointError(f"{file}: {second} comes before {first}; only the other order can be compiled")
    if "tokenizer_processor" in names:
        needed = "pi05_prepare_state_tokenizer_processor_step" if found.pi05 else "pi0_new_line_processor"
        if needed not in names:
            raise CheckpointError(f"{file}: has no {needed}; prompts without it cannot be compiled")
    other = "pi0_new_line_processor" if found.pi05 else "pi05_prepare_state_tokenizer_processor_step"
    if other in names:
        raise CheckpointError(f"{file}: has {other}, which belongs to the other policy type")


def _modes(found: Pipelines, config: dict) -> dict[str, str]:
    """Feature type -> normalization mode."""
    return _checked_modes(config.get("norm_map") or found.settings.get("normalization_mapping"), found.pi05)


def _checked_modes(modes: Any, pi05: bool) -> dict[str, str]:
    """Feature type -> normalization mode, by default the policy's."""
    if modes and not (isinstance(modes, dict) and all(isinstance(mode, str) for mode in modes.values())):
        raise CheckpointError(
            f"the normalization map is {brief(modes)}, expected types of features and of {', '.join(MODES)}"
        )
    return modes or {"STATE": DEFAULT_MODE[pi05], "ACTION": DEFAULT_MODE[pi05]}


def _stored(found: Pipelines, file: Path | None) -> dict[str, list[float]]:
    return {} if file is None else {name: tensor.float().flatten().tolist() for name, tensor in open_tensors(file).items()}


def _check_images(features: dict, modes: Mapping[str, str], stored: dict) -> None:
    """LeRobot's pi0 policies take pixels as they are; statistics would change them."""
    mode = modes.get("VISUAL", "IDENTITY")
    changed = [
        key for key, feature in features.items()
        if feature.get("type") == "VISUAL" and any(name.startswith(f"{key}.") for name in stored)
    ]  # fmt: skip
    if mode != "IDENTITY" and changed:
        raise CheckpointError(f"normalizes the pixels of {changed[0]} ({mode}); only VISUAL: IDENTITY can be compiled")


def _statistics(stored: dict, feature: str, mode: str, config: dict, file: Path | None) -> dict:
    prefix, name = f"{feature}.", str(file or "the pipeline")
    own = {key.removeprefix(prefix): values for key, values in stored.items() if key.startswith(prefix)}
    return checked_modes(name, feature, mode, own, config.get("eps", LEROBOT_EPSILON))


def _only_preprocessor(found: Pipelines) -> None:
    """Without a postprocessor's file, the actions' statistics that LeRobot saves with the preprocessor as well."""
    found.notes.append(f"there is no {POSTPROCESSOR}: actions are un-normalized with the statistics of {PREPROCESSOR}")
    mode = _modes(found, {}).get("ACTION", "IDENTITY")
    found.stats["actions"] = _statistics(found.spare["stored"], ACTION, mode, {}, found.spare["file"])


def _buffer_statistics(settings: dict, buffers: dict[str, list[float]], pi05: bool) -> dict | None:
    """LeRobot 0.3's statistics, which are buffers of its modules `normalize_inputs` and `unnormalize_outputs`."""
    if not buffers:
        return None
    modes = _checked_modes(settings.get("normalization_mapping"), pi05)
    images = [name for name in buffers if "buffer_observation_image" in name]
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY" and images:
        raise CheckpointError(f"normalizes pixels ({images[0]}); only VISUAL: IDENTITY can be compiled")
    stats: dict[str, Any] = {"rule": "lerobot-0.3"}
    for key, feature, mode, module in (
        ("state", STATE, modes.get("STATE", "IDENTITY"), "normalize_inputs.buffer_observation_state"),
        ("actions", ACTION, modes.get("ACTION", "IDENTITY"), "unnormalize_outputs.buffer_action"),
    ):
        own = {name.rpartition(".")[2]: values for name, values in buffers.items() if name.startswith(f"{module}.")}
        stats[key] = checked_modes("model.safetensors", feature, mode, own, 1e-8)
    return stats


# --- the policy around the network --------------------------------------------------------------------------------------


def read_policy(
    directory: Path, settings: dict, pi05: bool, buffers: dict[str, list[float]] | None = None, adapted: bool = False
) -> tuple[Settings, dict | None, list[str]]:
    """What the directory says about the policy around its weights, its statistics (None: it has none), and notes.

    buffers: LeRobot 0.3's statistics among the weights. adapted: an adapter has been merged into them.

    Raises CheckpointError: a setting, step or statistic that changes the numbers in a way that is not compiled.
    """
    unknown = check_config(settings)
    if _flag(settings, "use_peft") and not adapted:
        raise CheckpointError(
            'config.json: "use_peft" is true, but there is no adapter (adapter_config.json, adapter_model.safetensors): '
            'give the adapter\'s folder, or, if these weights have it merged, set "use_peft" to false'
        )
    found = read_pipelines(directory, settings, pi05)
    stats = _buffer_statistics(settings, buffers or {}, pi05)
    if found.stats.get("state") and found.stats.get("actions"):
        if stats is not None:
            raise CheckpointError(
                f"{directory}: has statistics among its weights, as LeRobot 0.3, and in {PREPROCESSOR}, as later versions: "
                "remove the file, or the buffers (LeRobot's migrate_policy_normalization.py does)"
            )
        stats = {"rule": "lerobot", **found.stats}
    version = "0.3" if stats and stats["rule"] == "lerobot-0.3" else "0.5" if MARK in settings or found.relative else None
    robot, relative = _robot(settings, found), _relative_mask(settings, found)
    transforms: dict[str, Any] = {
        "delta_actions": relative is not None,
        "delta_mask": relative,
        "adapt_to_pi": False,
        "state_in_prompt": pi05,
        "prompt_text": "lerobot",
    }
    if version:
        transforms |= version_transforms(version, _padded_dims(settings, found))
    said = Settings(
        num_steps=_num_steps(settings),
        action_horizon=action_horizon(settings),
        max_prompt_tokens=found.max_prompt_tokens or max_prompt_tokens(settings),
        transforms=transforms,
        robot=robot,
        ignored=unknown,
        rotary="bfloat16" if settings.get("dtype") == "bfloat16" and version != "0.3" else "exact",
        lerobot_version=version,
        padded_state_dims=_padded_dims(settings, found),
        square_images=_square(settings),
        loop=loop_settings(settings),
    )
    return said, stats, found.notes


def loop_settings(settings: dict) -> dict[str, Any]:
    """What changes no chunk, but the loop around it, kept in the plan for `duq-export-lerobot`; None where it is not said.

    n_action_steps: actions of a chunk that are executed. image_shapes: camera -> [3, height, width], to which LeRobot's
    policy server resizes images. action_feature_names: the joints, by which LeRobot orders what it sends to a robot.
    """
    shapes = {name: _features(settings, "input_features")[name].get("shape") for name in _cameras(settings)}
    return {
        "n_action_steps": whole_number(settings, "n_action_steps", "action_horizon"),
        "image_shapes": {name: shape for name, shape in shapes.items() if shape is not None},
        "action_feature_names": settings.get("action_feature_names") or None,
    }


def version_transforms(version: str, padded_dims: int) -> dict[str, Any]:
    """How the versions of LeRobot (one of VERSIONS) differ: in resizing, and in pi0.5's state in the prompt."""
    return {
        "resize": {"0.3": "lerobot-0.3", "0.4": "lerobot-0.4"}.get(version, "lerobot"),
        "pad_state_in_prompt": padded_dims if version == "0.4" else 0,
    }


def _padded_dims(settings: dict, found: Pipelines) -> int:
    return found.prepared_dims or whole_number(settings, "max_state_dim", "dims") or 32


def _features(settings: dict, key: str) -> dict[str, dict]:
    try:
        return _features_of(settings, key)
    except CheckpointError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _features_of(settings: dict, key: str) -> dict[str, dict]:
    features = settings.get(key) or {}
    if not isinstance(features, dict) or not all(isinstance(each, dict) for each in features.values()):
        raise CheckpointError(f'"{key}" must hold an object for each feature')
    return features


def _cameras(settings: dict) -> list[str]:
    """The image features in their order, without those that are never there."""
    features = _features(settings, "input_features")
    names = [name for name, each in features.items() if each.get("type") == "VISUAL"]
    return [name for name in names if not re.fullmatch(r"observation\.images\.empty_camera_\d+", name)]


def _square(settings: dict) -> bool:
    """Whether all images are known to be square, so that nothing is padded."""
    shapes = [_features(settings, "input_features")[name].get("shape") for name in _cameras(settings)]
    return bool(shapes) and all(isinstance(shape, list) and len(shape) == 3 and shape[1] == shape[2] for shape in shapes)


def _robot(settings: dict, found: Pipelines) -> Robot | None:
    """The robot that the policy's own features describe; None if config.json lacks them."""
    cameras = _cameras(settings)
    if len(cameras) > len(IMAGE_SLOTS):
        raise CheckpointError(
            f"config.json: input_features has {len(cameras)} cameras ({listed(cameras)}), but at most "
            f"{len(IMAGE_SLOTS)} can be compiled; train without the others"
        )
    state = _dims(settings, "input_features", STATE)
    actions = _dims(settings, "output_features", ACTION)
    if not cameras or state is None or actions is None:
        return None
    names = _texts(settings, "action_feature_names")
    if len(names) != actions or len(set(names)) != actions:
        names = [f"action_{index}" for index in range(actions)]
    same = len(names) == state and settings.get("action_feature_names")
    return Robot(
        name="lerobot",
        cameras=tuple(Camera((name,), "any", False, _also(found, name)) for name in cameras),
        state=(
            StatePart(
                (STATE,),
                tuple(names) if same else tuple(f"state_{index}" for index in range(state)),
                (),
                _also(found, STATE),
            ),
        ),
        action_names=tuple(map(str, names)),
        prompt_keys=("task", "prompt"),
    )


def _also(found: Pipelines, feature: str) -> tuple[tuple[str, ...], ...]:
    return tuple((old,) for old, new in found.rename.items() if new == feature and old != feature)


def _dims(settings: dict, key: str, feature: str) -> int | None:
    shape = _features(settings, key).get(feature, {}).get("shape")
    if shape is None:
        return None
    if not (isinstance(shape, list) and len(shape) == 1 and in_range(shape[0], "dims")):
        raise CheckpointError(f'config.json: "{key}": {feature} has shape {brief(shape)}, expected [{expected("dims")}]')
    return shape[0]


def _relative_mask(settings: dict, found: Pipelines) -> list[bool] | None:
    """Which actions are relative to the state; None where none is.

    All but those whose name contains one of the excluded joints' names, whatever their case; without names, all.
    """
    configured, step = _flag(settings, MARK), found.relative
    if step is not None and (configured or step[0]) and MARK in settings and configured != step[0]:
        raise CheckpointError(
            f'config.json: "{MARK}" is {configured}, but {PREPROCESSOR} has relative_actions_processor '
            f"{'on' if step[0] else 'off'}; make them agree"
        )
    if step is not None and found.absolute is not None and step[0] != found.absolute:
        raise CheckpointError(
            f"{POSTPROCESSOR}: absolute_actions_processor is {'on' if found.absolute else 'off'}, but "
            f"relative_actions_processor of {PREPROCESSOR} is {'on' if step[0] else 'off'}; make them agree"
        )
    if not configured and not (step and step[0]):
        return None
    names, excluded = (step[1], step[2]) if step and step[0] else (
        _texts(settings, "action_feature_names"),
        _texts(settings, "relative_exclude_joints") if "relative_exclude_joints" in settings else ["gripper"],
    )  # fmt: skip
    dims = (
        _dims(settings, "output_features", ACTION)
        or len(found.stats.get("actions", {}).get("mean", ()))
        or len(names or ())
    )
    if not dims:
        raise CheckpointError(f'config.json: "{MARK}" is on, but "output_features" does not say how many actions there are')
    if not names or not excluded:
        return [True] * dims
    tokens = [str(each).lower() for each in excluded if each]
    mask = [not any(token in str(name).lower() for token in tokens) for name in names[:dims]]
    return mask + [True] * (dims - len(mask))
