"""LeRobot's `pretrained_model/` directory: openpi's tensors behind "model.", and the processors' own files."""
from __future__ import annotations

from pathlib import Path

from compiler.checkpoint.claims import Claim, explicit_claims, positive_int, variant_claims
from compiler.checkpoint.norm_stats import LEROBOT_EPSILON, checked_stats
from compiler.checkpoint.storage import open_tensors, read_json
from compiler.errors import CheckpointError

PREFIX = "model."
PREPROCESSOR = "policy_preprocessor.json"
POLICY_TYPES = {"pi0": False, "pi05": True}  # config.json "type" -> is it pi0.5
STATE, ACTION = "observation.state", "action"

# Settings that change what the network or its inputs mean, in ways the compiled policy does not have.
UNSUPPORTED = ("use_relative_actions", "use_visual_memory", "use_proprioceptive_memory")

# How a feature is normalised -> the statistics that define it.
MODES = {
    "MEAN_STD": ("mean", "std"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    "MIN_MAX": ("min", "max"),
}


def action_horizon(settings: dict) -> int:
    return positive_int(settings, "chunk_size", 50)


def max_prompt_tokens(settings: dict) -> int | None:
    return positive_int(settings, "tokenizer_max_length", None)


def claims(settings: dict) -> list[Claim]:
    """What config.json says about dimensions that the tensors have too. Raises CheckpointError for another policy."""
    policy = settings.get("type")
    if policy not in POLICY_TYPES:
        known = " and ".join(POLICY_TYPES)
        raise CheckpointError(f'config.json: policy "type" is {policy!r}; only {known} can be compiled')
    used = [key for key in UNSUPPORTED if settings.get(key)]
    if used:
        raise CheckpointError(f"config.json: a policy with {', '.join(used)} cannot be compiled")
    found = [Claim(f"type {policy}", "pi05", POLICY_TYPES[policy])]
    found += [Claim(key, "action_dim", settings[key]) for key in ("max_action_dim", "max_state_dim") if key in settings]
    sides = settings.get("image_resolution", [])
    found += [Claim("image_resolution", "vision.image_size", side) for side in dict.fromkeys(sides)]
    return (
        found
        + variant_claims("paligemma_variant", "llm", settings)
        + variant_claims("action_expert_variant", "expert", settings)
        + explicit_claims(settings)
    )


def read_stats(directory: Path, settings: dict) -> dict | None:
    """The statistics in the state file of the preprocessor's normaliser; None when there is none.

    LeRobot lets the user choose how to normalise; the policy knows one way for pi0 (mean, std) and one for pi0.5
    (quantiles). All of them are affine, so the statistics are rewritten for the one the policy applies.
    Raises CheckpointError when the file is damaged or lacks what its mode needs.
    """
    if not (directory / PREPROCESSOR).is_file():
        return None
    steps = read_json(directory / PREPROCESSOR).get("steps", [])
    step = next((step for step in steps if step.get("registry_name") == "normalizer_processor"), None)
    if step is None or "state_file" not in step:
        return None
    file = directory / step["state_file"]
    stored = {name: tensor.float().tolist() for name, tensor in open_tensors(file).items()}
    modes = step.get("config", {}).get("norm_map") or settings.get("normalization_mapping", {})
    pi05 = POLICY_TYPES[settings["type"]]
    default = "QUANTILES" if pi05 else "MEAN_STD"
    state = _policy_form(file, STATE, modes.get("STATE", default), stored, pi05)
    actions = _policy_form(file, ACTION, modes.get("ACTION", default), stored, pi05)
    return checked_stats(file, state, actions, step.get("config", {}).get("eps", LEROBOT_EPSILON))


def _policy_form(file: Path, feature: str, mode: str, stored: dict, pi05: bool) -> dict:
    """The feature's statistics; when its mode is not the policy's own, the policy's are replaced by equivalents.

    (x - mean) / std == (x - low) / (high - low) * 2 - 1   with low, high = mean -+ std
    """
    prefix = f"{feature}."
    own = {name.removeprefix(prefix): values for name, values in stored.items() if name.startswith(prefix)}
    if mode not in MODES:
        raise CheckpointError(f"{file}: normalisation {mode} of {feature} is unknown; known are {', '.join(MODES)}")
    absent = [name for name in MODES[mode] if name not in own]
    if absent:
        raise CheckpointError(f"{file}: {mode} normalisation of {feature} needs {' and '.join(absent)}")
    pairs = list(zip(*(own[name] for name in MODES[mode])))
    if pi05 and mode == "MEAN_STD":
        own |= {"q01": [mean - std for mean, std in pairs], "q99": [mean + std for mean, std in pairs]}
    elif pi05:
        own |= {"q01": [low for low, _ in pairs], "q99": [high for _, high in pairs]}
    elif mode != "MEAN_STD":
        own |= {"mean": [(low + high) / 2 for low, high in pairs], "std": [(high - low) / 2 for low, high in pairs]}
    return own
