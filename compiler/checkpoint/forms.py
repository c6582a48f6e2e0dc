"""Which form of checkpoint a folder holds; and what else it is, where it holds none."""

from __future__ import annotations

from pathlib import Path

from duq.compiler.checkpoint import adapter, lerobot, orbax
from duq.compiler.checkpoint.jax import open_jax
from duq.compiler.checkpoint.locate import fetch, parse_location
from duq.compiler.checkpoint.storage import WEIGHTS, WEIGHTS_INDEX, is_lfs_pointer, is_there, optional_json
from duq.compiler.checkpoint.stored import Stored
from duq.compiler.checkpoint.torch_files import open_torch
from duq.compiler.errors import CheckpointError
from duq.runtime.reading import brief

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = "save the policy as model.safetensors (safetensors.torch.save_model, or the trainer's own save_pretrained)"


def open_stored(path: str | Path, base: str | Path | None = None) -> Stored:
    """Opens the checkpoint at `path`: a folder, a run's folder, or a place on the Hub (see locate.parse_location).

    `base`: the policy that an adapter is for, if not the one that it names. Raises CheckpointError that says what is
    there and what to pass instead.
    """
    folder = fetch(parse_location(path))
    if not folder.is_dir():
        raise CheckpointError(_not_a_folder(folder))
    _check_settings(folder)
    if adapter.is_adapter(folder, base):
        location = base or adapter.base_location(folder)
        stored = adapter.open_adapter(folder, lambda: open_stored(location))
    elif base is not None:
        raise CheckpointError(f"{folder} is no adapter, so it takes no base; it has no {adapter.CONFIG}")
    elif _is_whole(folder):
        stored = open_torch(folder)
    elif (params := _params(folder)) is not None:
        stored = open_jax(params, params.parent if params == folder and params.name == "params" else folder)
    elif steps := _steps(folder):
        stored = _newest(folder, steps)
    else:
        raise CheckpointError(_what_it_is(folder))
    return stored


def _is_whole(folder: Path) -> bool:
    return any(is_there(folder / name) for name in (WEIGHTS, WEIGHTS_INDEX))


def _params(folder: Path) -> Path | None:
    """The folder of openpi's Orbax arrays: `folder` itself, or its params/."""
    if any(is_there(folder / name) for name in (orbax.METADATA, orbax.MANIFEST)):
        return folder
    params = folder / "params"
    return params if params.is_dir() else None


def _steps(folder: Path) -> list[Path]:
    """A run's folders of openpi's trainers, newest first."""
    steps = [step for step in folder.iterdir() if step.name.isdigit() and step.is_dir()]
    steps = [step for step in steps if _is_whole(step) or any((step / name).is_dir() for name in ("params", "train_state"))]
    return sorted(steps, key=lambda step: -int(step.name))


def _newest(folder: Path, steps: list[Path]) -> Stored:
    complete = [step for step in steps if _is_whole(step) or (step / "params" / orbax.METADATA).is_file()]
    if not complete:
        raise CheckpointError(
            f"{folder} is a run's folder, and no step in it is complete (none has weights or params/_METADATA)"
        )
    stored = open_stored(complete[0])
    skipped = [step.name for step in steps if int(step.name) > int(complete[0].name)]
    incomplete = f"; {', '.join(skipped)} is not complete" if skipped else ""
    stored.notes.append(f"{folder} is a run's folder: its newest step {complete[0].name} was taken{incomplete}")
    return stored


def _check_settings(folder: Path) -> None:
    """Raises CheckpointError when config.json says that this is some other model."""
    file = folder / "config.json"
    settings = optional_json(file)
    if "type" in settings and settings["type"] not in list(lerobot.POLICY_TYPES):
        known = " and ".join(lerobot.POLICY_TYPES)
        raise CheckpointError(f'{file}: policy "type" is {brief(settings["type"])}; only {known} can be compiled')
    if "type" not in settings and "model_type" in settings and "action_dim" not in settings:
        raise CheckpointError(f"{file}: this is a {brief(settings['model_type'])} model; only pi0 and pi05 can be compiled")


def _not_a_folder(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which does not exist"
    if not path.exists():
        return f"{path} does not exist: expected the directory that holds {WEIGHTS} (or params/)"
    if is_lfs_pointer(path):
        return f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, and pass its directory {path.parent}"
    if path.suffix in PICKLED:
        return f"{path} is a file of pickled tensors: expected a directory; {CONVERT}"
    if path.suffix == ".gguf":
        return f"{path} is a file for llama.cpp (GGUF): expected the directory of the policy it was made from"
    if path.name.startswith(("model", "adapter_model", "config.json")):
        return f"{path} is a file: pass its directory {path.parent}"
    return f"{path} is a file: expected the directory that holds {WEIGHTS} (or params/)"


def _what_it_is(folder: Path) -> str:
    """Why this folder is no checkpoint, and what to pass instead."""
    for known in (_pickled, _cache, _one_level_off, _training, _unfinished):
        if message := known(folder):
            return f"{folder} {message}"
    if not any(folder.iterdir()):
        return f"{folder} is empty, so not a checkpoint: it has no {WEIGHTS} (nor {WEIGHTS_INDEX}, nor params/)"
    return f"{folder} is not a checkpoint: it has no {WEIGHTS} (nor {WEIGHTS_INDEX}, nor openpi's params/)"


def _pickled(folder: Path) -> str | None:
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    if pickled := [name for name in files if name.endswith(PICKLED) and not name.startswith(("optimizer", "metadata"))]:
        return f"has only pickled weights ({', '.join(pickled[:3])}), which can run any code when loaded: {CONVERT}"
    if others := [name for name in files if name.endswith((".npz", ".msgpack", ".h5", ".onnx", ".tflite"))]:
        return f"has weights in a form that duq does not read ({others[0]}): {CONVERT}"
    if gguf := [name for name in files if name.endswith(".gguf")]:
        return f"holds a model for llama.cpp ({gguf[0]}); pass the directory of the policy it was made from"
    if shards := [name for name in files if name.startswith("model-0") and name.endswith(".safetensors")]:
        return f"has shards ({shards[0]}, ...) but no {WEIGHTS_INDEX}, which says what belongs to them: copy it as well"
    return None


def _one_level_off(folder: Path) -> str | None:
    candidates = [
        folder / "pretrained_model",
        folder / "last" / "pretrained_model",
        folder / "checkpoints/last/pretrained_model",
    ]
    for steps in (folder, folder / "checkpoints"):
        if steps.is_dir():
            numbered = [step / "pretrained_model" for step in steps.iterdir() if step.name.isdigit()]
            candidates += sorted(numbered, key=lambda path: -int(path.parent.name))
    for pattern in ("*", "*/*"):
        candidates += sorted(folder.glob(pattern), key=_number, reverse=True)
    for candidate in candidates:
        if candidate.is_dir() and _is_checkpoint(candidate):
            return f"is a directory above a checkpoint; pass {candidate}"
    for parent in list(folder.resolve().parents)[:3]:
        inside = folder.resolve().relative_to(parent).parts[0]
        if _is_checkpoint(parent) and inside in ("assets", "params", "train_state", "training_state"):
            return f"is inside a checkpoint; pass {parent}"
    return None


def _number(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else -1), path.name


def _is_checkpoint(folder: Path) -> bool:
    names = (WEIGHTS, WEIGHTS_INDEX, adapter.CONFIG, f"params/{orbax.METADATA}")
    return any((folder / name).is_file() for name in names)


def _training(folder: Path) -> str | None:
    names = {entry.name for entry in folder.iterdir()}
    if names & {"optimizer_state.safetensors", "training_step.json", "rng_state.safetensors"}:
        return f"is LeRobot's state of a training; pass {folder.resolve().parent / 'pretrained_model'}"
    if "training_state" in names:
        return "has only the state of a training (training_state/), no policy: its pretrained_model/ is missing"
    if "train_state" in names:
        return "has only the state of a training (train_state/), no weights: its params/ is missing"
    if names & {"optimizer.pt", "metadata.pt"}:
        return f"has what openpi's trainer writes beside the weights, but no {WEIGHTS}: copy it as well"
    if "train_config.json" in names or "config.json" in names:
        return f"is not a checkpoint: it has no {WEIGHTS}, only settings; copy the weights as well"
    if "norm_stats.json" in names or "assets" in names:
        return f"has only normalization statistics, no weights (no {WEIGHTS}, no params/)"
    return None


def _cache(folder: Path) -> str | None:
    """A folder of the Hub's cache: models--owner--name/snapshots/<revision>/."""
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if not snapshots.is_dir():
        return None
    revisions = sorted(path for path in snapshots.iterdir() if path.is_dir())
    main = snapshots.parent / "refs" / "main"
    if main.is_file() and (current := snapshots / main.read_text().strip()).is_dir():
        revisions = [current]
    return "is a folder of the Hub's cache" + (f"; pass {revisions[-1]}" if revisions else " with nothing in it")


def _unfinished(folder: Path) -> str | None:
    names = sorted(entry.name for entry in folder.iterdir())
    drafts = [name for name in names if "orbax-checkpoint-tmp" in name or name.startswith("tmp_")]
    return f"has only checkpoints whose saving did not finish ({', '.join(drafts[:3])})" if drafts else None
