"""SigLIP vision tower: a pre-norm ViT over 14-pixel patches, no class token (arXiv 2303.15343)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from duq.compiler.model.layers import LayerNorm, Linear
from duq.runtime.config import VisionConfig


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, images: Tensor) -> Tensor:
        weight, bias = self.patch_embedding.weight.to(images.dtype), self.patch_embedding.bias
        bias = None if bias is None else bias.to(images.dtype)
        patches = F.conv2d(images, weight, bias, stride=self.patch_embedding.stride)
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight.to(images.dtype)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.tokens = config.tokens
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, config.width)
        self.v_proj = Linear(config.width, config.width)
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        q, k, v = (
            projection(x).view(-1, self.tokens, self.heads, width // self.heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(-1, self.tokens, width))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, eps=1e-6)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))


class SigLIP(nn.Module):
    """images [N, 3, 224, 224] in [-1, 1] -> patch features [N, 256, width]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embeddings(images)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)
