"""Checkpoints made from a seed: the true pi0 / pi0.5 architecture at any size, to try everything without a download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from duq.compiler.checkpoint import lerobot
from duq.compiler.checkpoint.names import TIED_HEAD, openpi_name
from duq.compiler.checkpoint.shapes import expected_shapes
from duq.compiler.checkpoint.synthetic import files
from duq.compiler.checkpoint.synthetic.orbax import write_orbax
from duq.compiler.checkpoint.synthetic.statistics import distributions
from duq.compiler.errors import CheckpointError
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.files import replacing_folder

SO400M = VisionConfig(width=1152, depth=27, mlp_width=4304, heads=16)

# Vision, LLM, action expert, vocabulary. Heads of 256 and one key/value head throughout (but for openpi's own dummy), and
# the proportions of the full size: as many query channels as the LLM is wide, half that width for the expert, MLPs of 8
# and 4 widths. Tiny's vision MLP, like So400m's, is divisible by no power of two beyond 16.
VARIANTS = {
    "tiny": (
        VisionConfig(width=144, depth=2, mlp_width=528, heads=2),
        GemmaConfig(width=512, depth=3, mlp_width=4096, heads=2, kv_heads=1, head_dim=256),
        GemmaConfig(width=256, depth=3, mlp_width=1024, heads=2, kv_heads=1, head_dim=256),
        512,
    ),
    "small": (
        VisionConfig(width=288, depth=6, mlp_width=1072, heads=4),
        GemmaConfig(width=1024, depth=5, mlp_width=8192, heads=4, kv_heads=1, head_dim=256),
        GemmaConfig(width=512, depth=5, mlp_width=2048, heads=4, kv_heads=1, head_dim=256),
        2048,
    ),
    "dummy": (
        SO400M,
        GemmaConfig(width=64, depth=4, mlp_width=128, heads=8, kv_heads=1, head_dim=16),
        GemmaConfig(width=64, depth=4, mlp_width=128, heads=8, kv_heads=1, head_dim=16),
        257152,
    ),
    "full": (
        SO400M,
        GemmaConfig(width=2048, depth=18, mlp_width=16384, heads=8, kv_heads=1, head_dim=256),
        GemmaConfig(width=1024, depth=18, mlp_width=4096, heads=8, kv_heads=1, head_dim=256),
        257152,
    ),
}
# The names that openpi's own config.json gives these sizes.
OPENPI_VARIANTS = {"dummy": ("dummy", "dummy"), "full": ("gemma_2b", "gemma_300m")}


def make_config(
    variant: str,
    pi05: bool = False,
    action_horizon: int = 50,
    depth: int | None = None,
    vision_depth: int | None = None,
    vocab_size: int | None = None,
) -> ModelConfig:
    """The dimensions of a variant, optionally cut in depth (LLM and expert alike), vision depth or vocabulary."""
    vision, llm, expert, vocab = VARIANTS[variant]
    depth = depth or llm.depth
    return ModelConfig(
        pi05=pi05,
        vision=replace(vision, depth=vision_depth or vision.depth),
        llm=replace(llm, depth=depth),
        expert=replace(expert, depth=depth),
        vocab_size=vocab_size or vocab,
        action_horizon=action_horizon,
        max_prompt_tokens=200 if pi05 else 48,
    )


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the weights of a policy stored in `dtype`."""
    values = sum(int(np.prod(shape, dtype=np.int64)) for shape in expected_shapes(config).values())
    return values * files.DTYPES[dtype][0].itemsize


def make_checkpoint(
    out: str | Path,
    variant: str = "tiny",
    pi05: bool = False,
    layout: str = "openpi",
    seed: int = 0,
    dtype: str = "bfloat16",
    robot: str = "aloha",
    action_horizon: int = 50,
    depth: int | None = None,
    vision_depth: int | None = None,
    vocab_size: int | None = None,
    advance: Callable[[int], None] = lambda written: None,
) -> Path:
    """Writes a checkpoint directory and returns it; equal arguments give equal bytes (with layout "jax": equal arrays).

    `layout`: "openpi" (its PyTorch trainer's), "jax" (its JAX trainer's; needs tensorstore) or "lerobot".
    `out` must not exist (or be an empty directory): it appears when everything is written. `robot` "none" leaves the
    norm stats out. `advance(bytes)` is called as weights are written.
    Raises CheckpointError when `out` is taken or the vocabulary is smaller than the tokenizer's.
    """
    out = Path(out)
    config = make_config(variant, pi05, action_horizon, depth, vision_depth, vocab_size)
    if config.vocab_size < files.TOKENIZER_SIZE:
        raise CheckpointError(f"a vocabulary of {config.vocab_size} cannot hold the tokenizer's {files.TOKENIZER_SIZE}")
    with replacing_folder(out, CheckpointError) as draft:
        sizes = _named_sizes(variant, config)
        if layout != "lerobot":
            settings, prefix = files.openpi_settings(config, dtype, sizes), ""
        else:
            settings, prefix = files.lerobot_settings(config, dtype, sizes, robot), lerobot.PREFIX
        files.write_json(draft / "config.json", settings)
        (draft / "tokenizer.model").write_bytes(files.train_tokenizer())
        if robot != "none" and layout != "lerobot":
            files.write_openpi_stats(draft, robot, seed)
        elif robot != "none":
            files.write_lerobot_stats(draft, robot, seed, settings)
        if layout == "jax":
            write_orbax(draft / "params", distributions(config, seed), config, seed, files.DTYPES[dtype][0], advance)
        else:
            _write_weights(draft / "model.safetensors", config, seed, dtype, prefix, advance)
    return out


def _named_sizes(variant: str, config: ModelConfig) -> dict:
    if variant not in OPENPI_VARIANTS:
        return files.dimensions(config)
    llm, expert = OPENPI_VARIANTS[variant]
    return {"paligemma_variant": llm, "action_expert_variant": expert}


def _write_weights(
    file: Path, config: ModelConfig, seed: int, dtype: str, prefix: str, advance: Callable[[int], None]
) -> None:
    described = distributions(config, seed)
    # Of the tied embedding and head, safetensors' save_model (which openpi and LeRobot use) keeps the head.
    stored = {name: prefix + openpi_name(name) for name in described}
    stored["llm.embed_tokens.weight"] = prefix + TIED_HEAD
    canonical = {long: short for short, long in stored.items()}
    shapes = {stored[name]: distribution.shape for name, distribution in described.items()}

    def blocks(name: str):
        return described[canonical[name]].blocks(seed, canonical[name])

    files.write_safetensors(file, shapes, blocks, dtype, advance)
