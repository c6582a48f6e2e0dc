"""The Gemma, SigLIP and projector of the reference against transformers' modules, with the same weights, in float32."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from duq.compiler.model import Pi0
from duq.compiler.model.gemma import Gemma, rotary_embedding
from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig

if TYPE_CHECKING:  # it takes seconds to import, which every process of pytest-xdist would do to collect
    import transformers
    from transformers.models.gemma.modeling_gemma import GemmaModel
    from transformers.models.paligemma.modeling_paligemma import PaliGemmaModel

TOLERANCE = 2e-5  # max abs, on values of order 1 to 10
VOCAB_SIZE = 64
# The real head sizes (72; 256, eight query heads to one key/value head), everything else small.
VISION = VisionConfig(width=144, depth=2, mlp_width=200, heads=2)
LLM = GemmaConfig(width=96, depth=3, mlp_width=128, heads=8, kv_heads=1, head_dim=256)
EXPERT = dataclasses.replace(LLM, width=64, mlp_width=96)


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Unit-gain matrices, and gains and biases that cannot be mistaken for 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def peer_config(config: GemmaConfig) -> transformers.GemmaConfig:
    import transformers

    return transformers.GemmaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        intermediate_size=config.mlp_width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        attn_implementation="eager",
    )


def peer_gemma(ours: Gemma, config: GemmaConfig) -> GemmaModel:
    from transformers.models.gemma.modeling_gemma import GemmaModel

    peer = GemmaModel(peer_config(config)).eval().requires_grad_(False)
    peer.load_state_dict({"embed_tokens.weight": peer.embed_tokens.weight, **ours.state_dict()}, strict=True)
    return peer


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask [B, T, S] as openpi hands it to transformers: [B, 1, T, S], 0 or -2.3819763e38."""
    return torch.where(mask[:, None], 0.0, -2.3819763e38)


def assert_close(ours: torch.Tensor, peer: torch.Tensor) -> None:
    torch.testing.assert_close(ours, peer, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def policy() -> Pi0:
    model = Pi0(ModelConfig(pi05=False, vision=VISION, llm=LLM, expert=EXPERT, vocab_size=VOCAB_SIZE))
    randomize(model, seed=1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def paligemma(policy) -> PaliGemmaModel:
    import transformers
    from transformers.models.paligemma.modeling_paligemma import PaliGemmaModel

    config = transformers.PaliGemmaConfig(
        text_config=peer_config(LLM).to_dict(),
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=VISION.width,
            num_hidden_layers=VISION.depth,
            intermediate_size=VISION.mlp_width,
            num_attention_heads=VISION.heads,
            image_size=VISION.image_size,
            patch_size=VISION.patch_size,
            vision_use_head=False,
        ),
        projection_dim=LLM.width,
    )
    peer = PaliGemmaModel(config).eval().requires_grad_(False)
    peer.vision_tower.load_state_dict(policy.vision.state_dict(), strict=True)
    peer.multi_modal_projector.linear.load_state_dict(policy.projector.state_dict(), strict=True)
    peer.language_model.load_state_dict(policy.llm.state_dict(), strict=True)
    return peer


def test_siglip_layer_by_layer(policy, paligemma):
    images = random(2, 3, 224, 224).clamp(-1, 1)
    peer = paligemma.vision_tower(images, output_hidden_states=True)
    ours = policy.vision.embeddings(images)
    assert_close(ours, peer.hidden_states[0])
    for layer, expected in zip(policy.vision.encoder.layers, peer.hidden_states[1:], strict=True):
        ours = layer(ours)
        assert_close(ours, expected)
    assert_close(policy.vision(images), peer.last_hidden_state)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 the epsilons weigh as much as the variance
def test_norms_of_small_activations(policy, paligemma, scale):
    x = scale * random(4, VISION.width)
    assert_close(policy.vision.post_layernorm(x), paligemma.vision_tower.post_layernorm(x))
    x = scale * random(4, LLM.width)
    assert_close(policy.llm.norm(x)[0], paligemma.language_model.norm(x))


def test_image_and_prompt_tokens_enter_the_language_model_at_paligemmas_scale(policy, paligemma):
    images = random(1, 3, 3, 224, 224).clamp(-1, 1)
    features = paligemma.get_image_features(images[0]).pooler_output
    assert_close(policy.embed_images(images), features.reshape(1, 3 * VISION.tokens, LLM.width))
    tokens = torch.arange(VOCAB_SIZE)[None]
    assert_close(policy.llm.embed(tokens), paligemma.language_model.embed_tokens(tokens))


def prefix_mask() -> torch.Tensor:
    """Two observations of 40 slots: a hole and a padded tail; a padded head and a padded tail."""
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 10:20] = mask[0, 33:] = mask[1, :8] = mask[1, 39:] = False
    return mask


def test_gemma_layer_by_layer_with_padding(policy):
    mask, x = prefix_mask(), random(2, 40, LLM.width)
    positions = mask.cumsum(dim=1) - 1
    peer = peer_gemma(policy.llm, LLM)(
        inputs_embeds=x,
        attention_mask=additive(mask[:, None, :] & mask[:, :, None]),
        position_ids=positions,
        use_cache=True,
        output_hidden_states=True,
    )
    hidden, key_values = policy.llm(x, positions, mask[:, None, None])
    # Rows of padded tokens are undefined (openpi lets them attend to nothing) and nobody reads them.
    assert_close(hidden[mask], peer.last_hidden_state[mask])
    for (keys, values), expected in zip(key_values, peer.past_key_values.layers, strict=True):
        assert_close(keys.transpose(1, 2)[mask], expected.keys.transpose(1, 2)[mask])
        assert_close(values.transpose(1, 2)[mask], expected.values.transpose(1, 2)[mask])


@pytest.mark.parametrize("layer", range(LLM.depth))
def test_gemma_decoder_layer(policy, layer):
    """One layer alone, so that errors cannot hide behind the final norm."""
    peer, x, positions = peer_gemma(policy.llm, LLM), 3 * random(2, 12, LLM.width), torch.arange(5, 17).expand(2, -1)
    mask = torch.ones(2, 12, 12, dtype=torch.bool).tril()
    expected = peer.layers[layer](
        x, attention_mask=additive(mask), position_ids=positions, position_embeddings=peer.rotary_emb(x, positions)
    )
    rotary = rotary_embedding(positions, LLM.head_dim)
    ours, _ = policy.llm.layers[layer](x, rotary, mask[:, None], past=None, condition=None)
    assert_close(ours, expected)


def test_expert_attends_to_the_language_models_keys_and_values(policy):
    """A suffix of another width over a padded prefix's cache: positions continue, row 0 does not see the others."""
    mask, x = prefix_mask(), random(2, 40, LLM.width)
    prefix = dict(attention_mask=additive(mask[:, None, :] & mask[:, :, None]), position_ids=mask.cumsum(dim=1) - 1)
    cache = peer_gemma(policy.llm, LLM)(inputs_embeds=x, use_cache=True, **prefix).past_key_values
    _, past = policy.llm(x, prefix["position_ids"], mask[:, None, None])

    suffix = random(2, 7, EXPERT.width, seed=2)
    positions = mask.sum(dim=1, keepdim=True) + torch.arange(7)
    among_suffix = torch.ones(2, 7, 7, dtype=torch.bool)
    among_suffix[:, 0, 1:] = False
    full_mask = torch.cat((mask[:, None].expand(-1, 7, -1), among_suffix), dim=-1)
    expected = peer_gemma(policy.expert, EXPERT)(
        inputs_embeds=suffix, attention_mask=additive(full_mask), position_ids=positions, past_key_values=cache
    ).last_hidden_state
    ours, _ = policy.expert(suffix, positions, full_mask[:, None], past)
    assert_close(ours, expected)
