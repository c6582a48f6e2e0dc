"""Random weights with the statistics that make trained transformers hard to quantize.

A network of independent N(0, 1/K) weights is the easiest thing to quantize: every activation channel is alike. In
trained ones a few residual channels are 20 to 60 times larger than the rest, norm gains only partly undo that, a few
MLP channels dominate the input of `down_proj`, and the weights that read a large channel are small. All of this is
put in here as per-channel factors around a well-behaved network, so that activations stay O(1) over depth:

    W[n, k] = row[n] * column[k] * N(0, 1),   column[k] = c * input_std[k] ** -READ_EXPONENT,
    c such that the output has the standard deviation asked for when inputs have `input_std`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from duq.compiler.checkpoint.shapes import expected_shapes
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig

READ_EXPONENT = 0.8  # how far the weights that read a channel make up for its size (1: fully)
NORM_EXPONENT = 0.6  # how much of a residual outlier is left after the norm's gain (1: all)
OUTLIER_NOISE = 0.1  # an outlier channel is nearly constant over tokens; this share of it varies
# Prompt and state tokens have these shares of the constant part only: their norms then leave larger keys and values,
# so that some dozen tokens and one count beside hundreds of image tokens.
PROMPT_CONSTANT, STATE_CONSTANT = 0.7, 0.4
BLOCK_UPDATE = 0.3  # standard deviation that attention and MLP each add to a residual of about 1
GELU_RMS, SILU_RMS = 0.65, 0.6  # of N(0, 1)
CONTRACTION = 1.5  # v = CONTRACTION * x_t + f(x_t, observation): the noise decays along the flow, as when trained
BLOCK_VALUES = 1 << 22  # drawn at a time


@dataclass(frozen=True)
class Distribution:
    """A tensor [N, ...] of independent normals, seen as N rows of K columns."""

    shape: tuple[int, ...]
    row: np.ndarray | float = 1.0  # [N]; the standard deviation is row * column
    column: np.ndarray | float = 1.0  # [K]
    mean: np.ndarray | float = 0.0  # [N, 1], [K] or [N, K]

    def blocks(self, seed: int, name: str) -> Iterator[np.ndarray]:
        """The tensor from top to bottom, float32 [rows, K] a block; equal for equal (seed, name)."""
        random = generator(seed, name)
        rows, columns = self.shape[0], int(np.prod(self.shape[1:], dtype=np.int64))
        row = np.broadcast_to(np.float32(self.row), rows)[:, None]
        column = np.float32(self.column)
        mean = np.broadcast_to(np.float32(self.mean), (rows, columns))
        step = max(1, BLOCK_VALUES // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            block = random.standard_normal((part.stop - start, columns), dtype=np.float32)
            block *= row[part]
            block *= column
            block += mean[part]
            yield block


@dataclass(frozen=True)
class Channels:
    """The channels of a residual stream: constant part and standard deviation over tokens, [width] each."""

    mean: np.ndarray
    std: np.ndarray

    def rms(self, updates: int) -> np.ndarray:
        """After so many attention and MLP updates, each independent of the rest."""
        return np.hypot(self.mean, self.std * np.sqrt(1 + updates * BLOCK_UPDATE**2))


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
        # One profile for all layers of a stack, as in trained models.
        self.residual = {stack: self.residual_channels(stack, width) for stack, width in widths.items()}

    def build(self) -> dict[str, Distribution]:
        self.siglip(self.config.vision)
        self.embedding()
        self.gemma("llm", self.config.llm)
        self.norm("llm.norm", "llm", 2 * self.config.llm.depth)
        self.gemma("expert", self.config.expert)
        self.action_head()
        return {name: self.found[name] for name in self.shapes}

    def residual_channels(self, stack: str, width: int) -> Channels:
        random = generator(self.seed, f"{stack}.residual")
        std, mean = np.exp(0.3 * random.standard_normal(width)), np.zeros(width)
        outliers = random.choice(width, max(2, width // 256), replace=False)
        mean[outliers] = random.uniform(20, 60, len(outliers)) * random.choice([-1, 1], len(outliers))
        std[outliers] = OUTLIER_NOISE * np.abs(mean[outliers])
        return Channels(mean, std)

    def sizes(self, name: str, count: int, spread: float, outliers: int, largest: float) -> np.ndarray:
        """Log-normal channel sizes around 1, with some outliers between a third of the largest and the largest."""
        random = generator(self.seed, name)
        sizes = np.exp(spread * random.standard_normal(count))
        sizes[random.choice(count, outliers, replace=False)] = random.uniform(largest / 3, largest, outliers)
        return sizes

    def vector(self, name: str, mean: np.ndarray | float = 0.0, std: np.ndarray | float = 0.0) -> None:
        self.found[name] = Distribution(self.shapes[name], row=std, mean=np.reshape(mean, (-1, 1)))

    def linear(self, name: str, inputs: np.ndarray | float, std: float, row: np.ndarray | float = 1.0) -> None:
        """Weight (and small bias) whose outputs have standard deviation std * row when the inputs have theirs."""
        shape = self.shapes[f"{name}.weight"]
        inputs = np.broadcast_to(inputs, int(np.prod(shape[1:])))
        column = inputs**-READ_EXPONENT
        column = column * std / np.linalg.norm(column * inputs)
        self.found[f"{name}.weight"] = Distribution(shape, row=row, column=column)
        if f"{name}.bias" in self.shapes:
            self.vector(f"{name}.bias", std=0.1 * std * row)

    def source(self, name: str, inputs: np.ndarray | float, stack: str) -> None:
        """A linear that starts a residual stream: its bias holds the constant part of the outlier channels."""
        self.linear(name, inputs, 1.0, row=self.residual[stack].std)
        self.vector(f"{name}.bias", mean=self.residual[stack].mean)

    def norm(self, name: str, stack: str, updates: int) -> np.ndarray:
        """A norm's gain; returns the size of each channel after it. `updates` went into the residual before."""
        residual = self.residual[stack].rms(updates)
        after = self.sizes(name, len(residual), 0.3, 0, 1) * residual**NORM_EXPONENT
        gain = after * np.sqrt(np.mean(residual**2)) / residual  # x / rms(x) * gain
        if stack == "vision":  # LayerNorm
            self.vector(f"{name}.weight", mean=gain)
            self.vector(f"{name}.bias", std=0.1 * after)
        elif f"{name}.weight" in self.shapes:  # RMSNorm: 1 + w
            self.vector(f"{name}.weight", mean=gain - 1)
        else:  # adaRMS: rows are scale, shift, gate; the time embedding moves each a little
            width = len(gain)
            moves = np.concatenate([0.2 * gain, 0.1 * after, np.full(width, 0.3)])
            self.linear(f"{name}.dense", SILU_RMS, 1.0, row=moves)
            self.vector(f"{name}.dense.bias", mean=np.concatenate([gain - 1, np.zeros(width), np.ones(width)]))
        return after

    def attention(self, name: str, stack: str, after: np.ndarray, heads: int, kv_heads: int, head_dim: int) -> None:
        """q, k, v and output projection; heads that share a value head share its channels' sizes."""
        values = self.sizes(f"{name}.values", kv_heads * head_dim, 0.3, 2 * kv_heads, 6)
        self.linear(f"{name}.q_proj", after, 1.0)
        self.linear(f"{name}.k_proj", after, 1.0)
        self.linear(f"{name}.v_proj", after, 1.0, row=values)
        shared = np.repeat(values.reshape(kv_heads, head_dim), heads // kv_heads, axis=0).ravel()
        out = "out_proj" if stack == "vision" else "o_proj"
        self.linear(f"{name}.{out}", shared, BLOCK_UPDATE, row=self.residual[stack].std)

    def siglip(self, vision: VisionConfig) -> None:
        residual = self.residual["vision"]
        self.source("vision.embeddings.patch_embedding", 0.7, "vision")  # of pixels, which patches share
        name = "vision.embeddings.position_embedding.weight"
        self.found[name] = Distribution(self.shapes[name], column=BLOCK_UPDATE * residual.std)
        for i in range(vision.depth):
            layer = f"vision.encoder.layers.{i}"
            after = self.norm(f"{layer}.layer_norm1", "vision", 2 * i)
            head_dim = vision.width // vision.heads
            self.attention(f"{layer}.self_attn", "vision", after, vision.heads, vision.heads, head_dim)
            after = self.norm(f"{layer}.layer_norm2", "vision", 2 * i + 1)
            hidden = self.sizes(f"{layer}.hidden", vision.mlp_width, 0.3, 4, 8)
            self.linear(f"{layer}.mlp.fc1", after, 1.0, row=hidden)
            self.linear(f"{layer}.mlp.fc2", GELU_RMS * hidden, BLOCK_UPDATE, row=residual.std)
        after = self.norm("vision.post_layernorm", "vision", 2 * vision.depth)
        self.source("projector", after, "llm")

    def gemma(self, stack: str, gemma: GemmaConfig) -> None:
        residual = self.residual[stack]
        for i in range(gemma.depth):
            layer = f"{stack}.layers.{i}"
            after = self.norm(f"{layer}.input_layernorm", stack, 2 * i)
            self.attention(f"{layer}.self_attn", stack, after, gemma.heads, gemma.kv_heads, gemma.head_dim)
            after = self.norm(f"{layer}.post_attention_layernorm", stack, 2 * i + 1)
            hidden = self.sizes(f"{layer}.hidden", gemma.mlp_width, 0.4, max(4, gemma.mlp_width // 512), 30)
            self.linear(f"{layer}.mlp.gate_proj", after, 1.0)
            self.linear(f"{layer}.mlp.up_proj", after, 1.0, row=hidden)
            self.linear(f"{layer}.mlp.down_proj", GELU_RMS * hidden, BLOCK_UPDATE, row=residual.std)

    def embedding(self) -> None:
        """Token embeddings, which the model multiplies by sqrt(width)."""
        name, scale, residual = "llm.embed_tokens.weight", self.config.llm.width**-0.5, self.residual["llm"]
        constant = PROMPT_CONSTANT * residual.mean
        self.found[name] = Distribution(self.shapes[name], column=scale * residual.std, mean=scale * constant)

    def action_head(self) -> None:
        width, residual = self.config.expert.width, self.residual["expert"]
        if self.config.pi05:
            self.source("action_in_proj", 1.0, "expert")
            self.linear("time_mlp_in", np.sqrt(0.5), 1.0)  # sines and cosines
            self.linear("time_mlp_out", SILU_RMS, 1.0)
        else:
            self.linear("action_in_proj", 1.0, 1.0)
            self.linear("state_proj", 0.5, 1.0, row=residual.std)
            self.vector("state_proj.bias", mean=STATE_CONSTANT * residual.mean)
            self.linear("action_time_mlp_in", np.repeat([1.0, np.sqrt(0.5)], width), 1.0)
            self.source("action_time_mlp_out", SILU_RMS, "expert")
        updates = 2 * self.config.expert.depth
        after = self.norm("expert.norm", "expert", updates)
        self.linear("action_out_proj", after, 1.0)
        # The way of x_t through the residual stream to the output, with silu(z) ~ z / 2.
        way = self.draw("action_in_proj.weight")
        if not self.config.pi05:
            mlp_in, mlp_out = self.draw("action_time_mlp_in.weight"), self.draw("action_time_mlp_out.weight")
            way = mlp_out @ (mlp_in[:, :width] @ way / 2)
        way *= np.where(residual.mean == 0, after / residual.rms(updates), 0)[:, None]
        out = self.found["action_out_proj.weight"]
        self.found["action_out_proj.weight"] = replace(out, mean=CONTRACTION * np.linalg.pinv(way))

    def draw(self, name: str) -> np.ndarray:
        return np.concatenate(list(self.found[name].blocks(self.seed, name)))
