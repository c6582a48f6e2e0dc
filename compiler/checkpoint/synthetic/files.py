"""The files around the weights of a made checkpoint: safetensors writer, config.json, norm stats, tokenizer."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file

from duq.compiler.checkpoint import lerobot
from duq.compiler.checkpoint.synthetic.statistics import generator
from duq.compiler.parallel import thread_pool
from duq.runtime.config import ModelConfig

DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}

# State and action dimensions, and the openpi asset id, of each robot.
ROBOTS = {
    "aloha": (14, 14, "trossen"),
    "droid": (8, 8, "droid"),
    "libero": (8, 7, "physical-intelligence/libero"),
}

VERBS = ("pick up", "put down", "push", "open", "close", "reach for", "stack", "hand over", "wipe", "turn")
OBJECTS = ("the red block", "the blue bowl", "the drawer", "the door", "the coffee mug", "the button", "a towel")
PLACES = ("", " on the table", " in the basket", " with the left arm", " with the right arm", " next to the window")
TOKENIZER_SIZE = 448  # 4 control tokens, 256 bytes, the newline, and what the instructions above suggest


def write_safetensors(
    file: Path,
    shapes: dict[str, tuple[int, ...]],
    blocks: Callable[[str], Iterator[np.ndarray]],
    dtype: str,
    advance: Callable[[int], None],
) -> None:
    """Writes tensors into one safetensors file, a tensor a thread, of which each holds one block of its own.

    `blocks(name)` yields float32 [rows, columns] from top to bottom; `advance(bytes)` is called after each block, from
    any thread but by one at a time.
    """
    torch_dtype, safetensors_dtype = DTYPES[dtype]
    sizes = {name: int(np.prod(shape, dtype=np.int64)) * torch_dtype.itemsize for name, shape in shapes.items()}
    ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
    header = {
        name: {"dtype": safetensors_dtype, "shape": list(shape), "data_offsets": [ends[name] - sizes[name], ends[name]]}
        for name, shape in shapes.items()
    }
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    start, turn = file.stat().st_size, Lock()

    def write(name: str) -> None:
        with open(file, "r+b") as stream:
            stream.seek(start + ends[name] - sizes[name])
            for block in blocks(name):
                written = stream.write(torch.from_numpy(block).to(torch_dtype).view(torch.uint8).numpy().data)
                with turn:
                    advance(written)

    with thread_pool() as pool:  # the largest first: the embedding alone is a sixth of all weights
        for _ in pool.map(write, sorted(sizes, key=lambda name: -sizes[name])):
            pass


def write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def dimensions(config: ModelConfig) -> dict:
    """What config.json says of sizes that no openpi variant has, for the reader to check the tensors against."""
    return {stack: dict(vars(getattr(config, stack))) for stack in ("vision", "llm", "expert")}


def openpi_settings(config: ModelConfig, dtype: str, sizes: dict) -> dict:
    return {"action_dim": config.action_dim, "action_horizon": config.action_horizon, **sizes, "precision": dtype}


def lerobot_settings(config: ModelConfig, dtype: str, sizes: dict, robot: str = "none") -> dict:
    """config.json as LeRobot 0.5.1 and later write it; the features are those of `robot`."""
    state_dims, action_dims = ROBOTS[robot][:2] if robot in ROBOTS else (config.action_dim, config.action_dim)
    image = {"type": "VISUAL", "shape": [3, config.vision.image_size, config.vision.image_size]}
    mode = "QUANTILES" if config.pi05 else "MEAN_STD"
    return {
        "type": "pi05" if config.pi05 else "pi0",
        **sizes,
        "dtype": dtype,
        "n_obs_steps": 1,
        "input_features": {
            "observation.images.image": image,
            "observation.images.wrist_image": image,
            "observation.state": {"type": "STATE", "shape": [state_dims]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [action_dims]}},
        "use_relative_actions": False,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": 10,
        "image_resolution": [config.vision.image_size, config.vision.image_size],
        "tokenizer_max_length": config.max_prompt_tokens,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
    }


def norm_stats(robot: str, seed: int) -> dict:
    """Plausible statistics: joints in radians around a rest pose, actions as small offsets, last a gripper."""
    state_dims, action_dims, _ = ROBOTS[robot]
    random = generator(seed, f"norm_stats/{robot}")

    def entry(dims: int, mean_range: float, std_low: float, std_high: float) -> dict:
        mean = np.append(random.uniform(-mean_range, mean_range, dims - 1), 0.5)
        std = np.append(random.uniform(std_low, std_high, dims - 1), 0.3)
        values = {"mean": mean, "std": std, "q01": mean - 2.3 * std, "q99": mean + 2.3 * std}
        return {key: np.round(value, 6).tolist() for key, value in values.items()}

    return {"state": entry(state_dims, 0.8, 0.1, 0.5), "actions": entry(action_dims, 0.02, 0.03, 0.2)}


def write_openpi_stats(directory: Path, robot: str, seed: int) -> None:
    assets = directory / "assets" / ROBOTS[robot][2]
    assets.mkdir(parents=True)
    write_json(assets / "norm_stats.json", {"norm_stats": norm_stats(robot, seed)})


def write_lerobot_stats(directory: Path, robot: str, seed: int, settings: dict) -> None:
    """policy_preprocessor.json, policy_postprocessor.json and the state files of their (un)normalizers."""
    stats = norm_stats(robot, seed)
    tensors = {
        f"{feature}.{key}": torch.tensor(values)
        for feature, entry in ((lerobot.STATE, stats["state"]), (lerobot.ACTION, stats["actions"]))
        for key, values in entry.items()
    }
    for pipeline, step in (
        ("policy_preprocessor", "normalizer_processor"),
        ("policy_postprocessor", "unnormalizer_processor"),
    ):
        state_file = f"{pipeline}_step_0_{step}.safetensors"
        config = {"eps": 1e-8, "norm_map": settings["normalization_mapping"]}
        save_file(tensors, directory / state_file)
        steps = [{"registry_name": step, "config": config, "state_file": state_file}]
        write_json(directory / f"{pipeline}.json", {"name": pipeline, "steps": steps})


def train_tokenizer() -> bytes:
    """A small SentencePiece model built like PaliGemma's: BPE, byte fallback, single digits, pad eos bos unk = 0..3."""
    commands = [f"{verb} {thing}{place}" for verb, thing, place in itertools.product(VERBS, OBJECTS, PLACES)]
    sentences = commands + [f"Task: {command}, State: 12 127 200;\nAction: " for command in commands]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=TOKENIZER_SIZE,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
