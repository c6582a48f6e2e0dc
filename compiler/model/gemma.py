"""Gemma decoder (arXiv 2403.08295), used twice: as the language model over the prefix and as the action expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duq.compiler.model.layers import AdaptiveRMSNorm, Linear, RMSNorm
from duq.runtime.config import GemmaConfig

KeyValue = tuple[Tensor, Tensor]


def rotary_embedding(positions: Tensor, head_dim: int, precision: str = "exact") -> KeyValue:
    """cos and sin [B, 1, T, head_dim / 2] of position * 10000^(-2i / head_dim), for positions [B, T] (RoFormer).

    precision: "exact", or "bfloat16" for frequencies rounded to it (see runtime/config.py); all else is float32.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequency = torch.pow(10000.0, -exponent)
    if precision == "bfloat16":
        frequency = frequency.to(torch.bfloat16).to(torch.float32)
    angle = positions[:, None, :, None].to(torch.float32) * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: KeyValue) -> Tensor:
    """Rotates the pairs (x[i], x[i + head_dim / 2]) of x [B, heads, T, head_dim]."""
    cos, sin = rotary
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = Linear(config.heads * config.head_dim, config.width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * head_dim] -> [B, heads, T, head_dim]."""
        return x.view(x.shape[0], -1, x.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, rotary: KeyValue, mask: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        q = rotate(self.heads(self.q_proj(x)), rotary)
        k = rotate(self.heads(self.k_proj(x)), rotary)
        v = self.heads(self.v_proj(x))
        if past is not None:
            k = torch.cat((past[0], k), dim=2)
            v = torch.cat((past[1], v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out = out.transpose(1, 2).contiguous().view(x.shape[0], -1, q.shape[1] * self.head_dim)
        return self.o_proj(out), (k, v)


class MLP(nn.Module):
    """GeGLU."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else x + y * gate


class Layer(nn.Module):
    def __init__(self, config: GemmaConfig, norm: type[nn.Module]):
        super().__init__()
        self.input_layernorm = norm(config.width)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = norm(config.width)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask, past, condition) -> tuple[Tensor, KeyValue]:
        normalized, gate = self.input_layernorm(x, condition)
        attention, key_value = self.self_attn(normalized, rotary, mask, past)
        x = gated_residual(x, attention, gate)
        normalized, gate = self.post_attention_layernorm(x, condition)
        return gated_residual(x, self.mlp(normalized), gate), key_value


class Gemma(nn.Module):
    """x [B, T, width] -> (normalized hidden state [B, T, width], keys and values of every layer).

    Args of forward:
        positions: [B, T] integers for the rotary embedding.
        mask: bool, broadcastable to [B, heads, T, S]; True where a query may look at a key.
        past: keys and values [B, kv_heads, P, head_dim] of every layer to attend to as well (S = P + T).
        condition: [B, width] for adaptive norms, else None.
    """

    def __init__(self, config: GemmaConfig, vocab_size: int | None = None, adaptive: bool = False, rotary: str = "exact"):
        super().__init__()
        self.head_dim, self.rotary = config.head_dim, rotary
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config, norm) for _ in range(config.depth))
        self.norm = norm(config.width)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, width] float32, scaled by sqrt(width)."""
        return F.embedding(tokens, self.embed_tokens.weight).to(torch.float32) * self.embed_tokens.embedding_dim**0.5

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        past: list[KeyValue] | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        rotary = rotary_embedding(positions, self.head_dim, self.rotary)
        key_values = []
        for index, layer in enumerate(self.layers):
            x, key_value = layer(x, rotary, mask, past[index] if past else None, condition)
            key_values.append(key_value)
        return self.norm(x, condition)[0], key_values
