"""Random weights with the statistics that make trained transformers hard to quantise.

A network of independent N(0, 1/K) weights is the easiest thing to quantise: every activation channel is alike. In
trained ones a few residual channels are 20 to 60 times larger than the rest, norm gains only partly undo that, a few
MLP channels dominate the input of `down_proj`, and the weights that read a large channel are small. All of this is
put in here as per-channel factors around a well-behaved network, so that activations stay O(1) over depth:

    W[n, k] = row[n] * column[k] * N(0, 1),   column[k] = c * input_std[k] ** -READ_EXPONENT,
    c such that the output has the standard deviation asked for when inputs have `input_std`.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from compiler.checkpoint.shapes import expected_shapes
from runtime.config import GemmaConfig, ModelConfig, VisionConfig

READ_EXPONENT = 0.8  # how far the weights that read a channel make up for its size (1: fully)
NORM_EXPONENT = 0.7  # how much of a residual outlier is left after the norm's gain (1: all)
BLOCK_UPDATE = 0.5  # standard deviation that attention and MLP each add to a residual of about 1
GELU_RMS, SILU_RMS = 0.65, 0.6  # of N(0, 1)
ATTENTION_LOGITS = 2.0  # standard deviation: some 15 of 800 tokens share the weight, so the prefix matters
ATTENTION_SHRINK = 0.3  # of the values' standard deviation, by averaging over them
BLOCK_VALUES = 1 << 22  # drawn at a time


@dataclass(frozen=True)
class Distribution:
    """A tensor of independent normals: rows x columns of standard deviations, or a vector with a mean."""

    shape: tuple[int, ...]
    row: np.ndarray | float = 1.0  # [shape[0]]
    column: np.ndarray | float = 1.0  # [product of the rest]
    mean: np.ndarray | float = 0.0  # [shape[0]], added to each row

    def blocks(self, seed: int, name: str) -> Iterator[np.ndarray]:
        """The tensor from top to bottom, float32 [rows, columns] a block; equal for equal (seed, name)."""
        random = generator(seed, name)
        rows, columns = self.shape[0], int(np.prod(self.shape[1:], dtype=np.int64))
        row, mean = np.broadcast_to(self.row, rows), np.broadcast_to(self.mean, rows)
        step = max(1, BLOCK_VALUES // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            block = random.standard_normal((part.stop - start, columns), dtype=np.float32)
            block *= np.asarray(self.column, np.float32)
            block *= row[part, None].astype(np.float32)
            yield block + mean[part, None].astype(np.float32)


def generator(seed: int, name: str) -> np.random.Generator:
    """An independent stream for each (seed, name), so that the order in which tensors are written does not matter."""
    return np.random.Generator(np.random.SFC64(list(hashlib.sha256(f"{seed}/{name}".encode()).digest())))


def distributions(config: ModelConfig, seed: int) -> dict[str, Distribution]:
    """Canonical name -> distribution, for every tensor of the policy."""
    return _Policy(config, seed).build()


class _Policy:
    def __init__(self, config: ModelConfig, seed: int):
        self.config, self.seed = config, seed
        self.shapes = expected_shapes(config)
        self.found: dict[str, Distribution] = {}
        widths = {"vision": config.vision.width, "llm": config.llm.width, "expert": config.expert.width}
        # How large each residual channel is; one profile for all layers of a stack, as in trained models.
        self.residual = {
            stack: self.channels(f"{stack}.residual", width, 0.3, max(2, width // 256), 20, 60)
            for stack, width in widths.items()
        }

    def build(self) -> dict[str, Distribution]:
        self.siglip(self.config.vision)
        self.gemma("llm", self.config.llm)
        self.gemma("expert", self.config.expert)
        self.action_head()
        return {name: self.found[name] for name in self.shapes}

    def channels(self, name: str, count: int, spread: float, outliers: int, low: float, high: float) -> np.ndarray:
        """Log-normal channel sizes around 1, `outliers` of them times low..high."""
        random = generator(self.seed, name)
        sizes = np.exp(spread * random.standard_normal(count))
        sizes[random.choice(count, outliers, replace=False)] *= random.uniform(low, high, outliers)
        return sizes

    def vector(self, name: str, mean: np.ndarray | float = 0.0, std: np.ndarray | float = 0.0) -> None:
        self.found[name] = Distribution(self.shapes[name], row=std, mean=mean)

    def linear(self, name: str, inputs: np.ndarray | float, std: float, row: np.ndarray | float = 1.0) -> None:
        """Weight (and small bias) whose outputs have standard deviation std * row for inputs of that many channels."""
        shape = self.shapes[f"{name}.weight"]
        inputs = np.broadcast_to(inputs, int(np.prod(shape[1:])))
        column = inputs**-READ_EXPONENT
        column = column * std / np.linalg.norm(column * inputs)
        self.found[f"{name}.weight"] = Distribution(shape, row=row, column=column)
        if f"{name}.bias" in self.shapes:
            self.vector(f"{name}.bias", std=0.1 * std * row)

    def norm(self, name: str, stack: str) -> np.ndarray:
        """A norm's gain; returns the standard deviation of each channel after it."""
        residual = self.residual[stack]
        after = self.channels(name, len(residual), 0.3, 0, 1, 1) * residual**NORM_EXPONENT
        gain = after * np.sqrt(np.mean(residual**2)) / residual  # the residual, divided by its rms, times gain
        if stack == "vision":  # LayerNorm
            self.vector(f"{name}.weight", mean=gain)
            self.vector(f"{name}.bias", std=0.1 * after)
        elif f"{name}.weight" in self.shapes:  # RMSNorm: 1 + w
            self.vector(f"{name}.weight", mean=gain - 1)
        else:  # adaRMS: rows are scale, shift, gate; the time embedding moves each a little
            width = len(gain)
            moves = np.concatenate([0.2 * gain, 0.1 * after, np.full(width, 0.3)])
            rest = np.concatenate([gain - 1, np.zeros(width), np.ones(width)])
            self.linear(f"{name}.dense", SILU_RMS, 1.0, row=moves)
            self.vector(f"{name}.dense.bias", mean=rest)
        return after

    def siglip(self, vision: VisionConfig) -> None:
        residual = self.residual["vision"]
        self.linear("vision.embeddings.patch_embedding", 0.5, 1.0, row=residual)
        name = "vision.embeddings.position_embedding.weight"
        self.found[name] = Distribution(self.shapes[name], column=0.3 * residual)
        for i in range(vision.depth):
            layer = f"vision.encoder.layers.{i}"
            after = self.norm(f"{layer}.layer_norm1", "vision")
            self.linear(f"{layer}.self_attn.q_proj", after, ATTENTION_LOGITS)
            self.linear(f"{layer}.self_attn.k_proj", after, 1.0)
            values = self.channels(f"{layer}.values", vision.width, 0.4, 2, 4, 8)
            self.linear(f"{layer}.self_attn.v_proj", after, 2.0, row=values)
            self.linear(f"{layer}.self_attn.out_proj", 2 * ATTENTION_SHRINK * values, BLOCK_UPDATE, row=residual)
            after = self.norm(f"{layer}.layer_norm2", "vision")
            hidden = self.channels(f"{layer}.hidden", vision.mlp_width, 0.3, 4, 5, 15)
            self.linear(f"{layer}.mlp.fc1", after, 1.0, row=hidden)
            self.linear(f"{layer}.mlp.fc2", GELU_RMS * hidden, BLOCK_UPDATE, row=residual)
        after = self.norm("vision.post_layernorm", "vision")
        self.linear("projector", after, 1.0, row=self.residual["llm"])

    def gemma(self, stack: str, gemma: GemmaConfig) -> None:
        residual = self.residual[stack]
        for i in range(gemma.depth):
            layer = f"{stack}.layers.{i}"
            after = self.norm(f"{layer}.input_layernorm", stack)
            self.linear(f"{layer}.self_attn.q_proj", after, ATTENTION_LOGITS)
            self.linear(f"{layer}.self_attn.k_proj", after, 1.0)
            values = self.channels(f"{layer}.values", gemma.kv_heads * gemma.head_dim, 0.4, 2, 4, 8)
            self.linear(f"{layer}.self_attn.v_proj", after, 2.0, row=values)
            heads = np.repeat(values.reshape(gemma.kv_heads, -1), gemma.heads // gemma.kv_heads, axis=0).ravel()
            self.linear(f"{layer}.self_attn.o_proj", 2 * ATTENTION_SHRINK * heads, BLOCK_UPDATE, row=residual)
            after = self.norm(f"{layer}.post_attention_layernorm", stack)
            hidden = self.channels(f"{layer}.hidden", gemma.mlp_width, 0.5, max(4, gemma.mlp_width // 512), 10, 40)
            self.linear(f"{layer}.mlp.gate_proj", after, 1.0)
            self.linear(f"{layer}.mlp.up_proj", after, 1.0, row=hidden)
            self.linear(f"{layer}.mlp.down_proj", GELU_RMS * hidden, BLOCK_UPDATE, row=residual)
        after = self.norm(f"{stack}.norm", stack)
        if stack == "expert":
            self.linear("action_out_proj", after, 1.0)
        else:  # the model multiplies embeddings by sqrt(width)
            name = "llm.embed_tokens.weight"
            self.found[name] = Distribution(self.shapes[name], column=residual / np.sqrt(gemma.width))

    def action_head(self) -> None:
        residual, width = self.residual["expert"], self.config.expert.width
        if self.config.pi05:
            self.linear("action_in_proj", 1.0, 1.0, row=residual)
            self.linear("time_mlp_in", np.sqrt(0.5), 1.0)  # sines and cosines
            self.linear("time_mlp_out", SILU_RMS, 1.0)
        else:
            self.linear("action_in_proj", 1.0, 1.0)
            self.linear("state_proj", 1.0, 1.5, row=residual)  # a robot fills 7 to 14 of the 32
            self.linear("action_time_mlp_in", np.repeat([1.0, np.sqrt(0.5)], width), 1.0)
            self.linear("action_time_mlp_out", SILU_RMS, 1.0, row=residual)
