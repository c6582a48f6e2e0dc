"""Checkpoints: an openpi or LeRobot directory -> canonical weights, dimensions, norm stats and tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from duq.compiler.checkpoint import lerobot, openpi
from duq.compiler.checkpoint.claims import check_claims, section, whole_number
from duq.compiler.checkpoint.forms import open_stored
from duq.compiler.checkpoint.metadata import read_metadata
from duq.compiler.checkpoint.norm_stats import read_openpi_stats
from duq.compiler.checkpoint.settings import Settings
from duq.compiler.checkpoint.shapes import ACTION_HORIZON, check_shapes, expected_shapes, infer_config, listing
from duq.compiler.checkpoint.storage import is_there, optional_json, weight_files
from duq.compiler.errors import CheckpointError
from duq.compiler.parallel import thread_pool
from duq.runtime.config import ModelConfig
from duq.runtime.reading import reading

EMBEDDING = "llm.embed_tokens.weight"
METADATA = "metadata.pt"
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Checkpoint:
    """A policy as it was saved."""

    path: Path
    config: ModelConfig
    weights: dict[str, torch.Tensor]  # canonical name -> memory-mapped tensor in its stored dtype
    norm_stats: dict | None  # see compiler.checkpoint.norm_stats
    tokenizer: Path | None  # a SentencePiece model
    layout: str  # "openpi" | "lerobot"
    settings: Settings = field(default_factory=Settings)  # what the files say about the policy around its weights
    form: str = ""  # for people: "openpi JAX (Orbax), float32, LoRA merged (rank 16, 32)"
    origin: str = "torch"  # "jax" | "torch": what the policy was trained with
    notes: list[str] = field(default_factory=list)  # what was chosen or assumed, worth saying when a plan is made
    files: list[Path] = field(default_factory=list)  # that define the weights, in a fixed order; `path`'s when empty
    finite: bool = False  # every weight is known to be finite

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the weight files. Reads them all, so it is computed when first asked for."""
        digest = hashlib.sha256()
        for file in self.files or weight_files(self.path):
            with open(file, "rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()


def load_checkpoint(
    path: str | Path,
    asset_id: str | None = None,
    *,
    base: str | Path | None = None,
    preferred_asset: str | None = None,
    statistics: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """Opens a pi0 or pi0.5 checkpoint; weights stay on disk until they are used.

    `path` is a folder of openpi's JAX or PyTorch trainer (a run's folder: its newest complete step is taken, and said in
    the notes), of LeRobot, of a PEFT adapter, or hf://owner/name[@revision][/subfolder]. `base`: the policy that an adapter
    is for, if not the one that it names. `asset_id` chooses among the statistics of several robots in an openpi directory;
    `preferred_asset` does too, but need not be there. Without `statistics`, none are read, and none have to be chosen.
    JAX weights and merged LoRA are written to a temporary file (in TMPDIR) in the policy's layout, after everything else
    was checked; `progress(done, total)` is called with bytes as that goes on.
    Raises CheckpointError: not a checkpoint (naming what is there), damaged or incomplete files, tensors missing, extra or
    mis-shaped (all listed), config.json contradicting the tensors, norm stats unusable or ambiguous.
    """
    stored = open_stored(path, base)
    path = stored.folder
    settings_file = stored.file("config.json")
    settings = optional_json(settings_file)
    try:
        layout = lerobot if stored.layout == "lerobot" else openpi
        with reading("config.json and the tensors", CheckpointError):
            config = _checked_config(stored.tensors, settings, layout, stored.vision_heads)
            stored.check(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if stored.layout == "lerobot":
        if asset_id is not None:
            raise CheckpointError(f'asset id "{asset_id}" given, but {path} is a LeRobot directory, which has none')
        with reading(settings_file, CheckpointError):
            said, norm_stats, notes = lerobot.read_policy(
                stored.file(lerobot.PREPROCESSOR).parent, settings, config.pi05, stored.buffers, bool(stored.beside)
            )
    else:
        trainer = _training_config(path / METADATA)
        with reading(f"{settings_file} or {METADATA}", CheckpointError):
            openpi.check_precision(settings, stored.tensors)
            said, notes = openpi.read_policy(settings, config, trainer), []
        norm_stats = read_openpi_stats(path, asset_id, preferred_asset or said.asset_id) if statistics else None
    tokenizer = next(filter(None, map(_tokenizer, (path, *stored.beside))), None)
    config = replace(config, rotary=said.rotary or _rotary(stored.origin, stored.tensors[EMBEDDING].dtype))
    weights = stored.read(progress)
    return Checkpoint(
        path, config, weights, norm_stats, tokenizer, stored.layout, said, stored.form, stored.origin,
        [*stored.notes, *notes], stored.files, stored.finite,
    )  # fmt: skip


def check_finite(weights: dict[str, torch.Tensor], progress: Callable[[int, int], None] | None = None) -> None:
    """Reads every weight once and raises CheckpointError that names the tensors with NaN or Inf in them.

    `progress(done, total)` is called with bytes after each tensor.
    """

    def fault(name: str) -> str | None:
        low, high = torch.aminmax(weights[name])  # one pass, no temporary; NaN propagates
        if torch.isfinite(low) and torch.isfinite(high):
            return None
        return f"{name}: {int((~torch.isfinite(weights[name])).sum())} of {weights[name].numel()} values"

    total, done, faults = sum(tensor.nbytes for tensor in weights.values()), 0, []
    with thread_pool() as pool:
        for tensor, found in zip(weights.values(), pool.map(fault, weights), strict=True):
            faults += [found] if found else []
            done += tensor.nbytes
            if progress:
                progress(done, total)
    if faults:
        raise CheckpointError(f"{len(faults)} tensors hold NaN or Inf:\n{listing(faults)}")


def _checked_config(weights: dict[str, torch.Tensor], settings: dict, layout, vision_heads: int | None) -> ModelConfig:
    wrong = [f"{name} is {tensor.dtype}" for name, tensor in weights.items() if tensor.dtype not in WEIGHT_DTYPES]
    if wrong:
        stored = ", ".join(map(str, WEIGHT_DTYPES))
        raise CheckpointError(f"{len(wrong)} tensors are in none of the supported types ({stored}):\n{listing(wrong)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    config = infer_config(
        shapes,
        vision_heads=whole_number(section(settings, "vision"), "heads", "heads", vision_heads),
        action_horizon=layout.action_horizon(settings) or ACTION_HORIZON,  # until somebody says it (compiler.settings)
        max_prompt_tokens=layout.max_prompt_tokens(settings),
    )
    check_shapes(shapes, expected_shapes(config))
    check_claims(config, layout.claims(settings))
    return config


def _rotary(origin: str, dtype: torch.dtype) -> str:
    """A policy that PyTorch held in bfloat16 was trained with rotary frequencies rounded likewise; JAX keeps them."""
    return "bfloat16" if origin == "torch" and dtype == torch.bfloat16 else "exact"


def _training_config(file: Path) -> dict | None:
    """The training config in openpi's metadata.pt; None when there is no such file, or no config in it."""
    config = read_metadata(file).get("config") if is_there(file) else None
    return config if isinstance(config, dict) else None


def _tokenizer(path: Path) -> Path | None:
    """The SentencePiece model in the directory, if there is exactly one."""
    models = [model for model in sorted(path.glob("*.model")) if is_there(model)]
    if len(models) > 1:
        raise CheckpointError(f"{path} has several tokenizers: {', '.join(model.name for model in models)}; keep one")
    return models[0] if models else None
