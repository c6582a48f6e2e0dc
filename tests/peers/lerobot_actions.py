"""Runs LeRobot's own pi0 and pi0.5 on policy_cases.py and writes what they answer to tests/data/lerobot_actions.npz.

This is the oracle of tests/compiler/model/test_model_lerobot.py. `make test-peers` installs LeRobot (Python 3.12) into an
environment of its own and runs this file there. LeRobot's code runs as published; only its hard-coded sizes are replaced.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.pi0 import PI0Config, modeling_pi0
from lerobot.policies.pi05 import PI05Config, modeling_pi05
from policy_cases import ACTION_DIM, ACTION_HORIZON, EXPERT, LLM, NUM_STEPS, VISION, VOCAB_SIZE, observations, weight
from transformers import PaliGemmaConfig

OUTPUT = Path(__file__).parents[1] / "data" / "lerobot_actions.npz"


def small_gemma(module, variant: str):
    size = LLM if variant == "gemma_2b" else EXPERT
    return module.GemmaConfig(
        size["width"], size["depth"], size["mlp_width"], size["heads"], size["kv_heads"], size["head_dim"]
    )


def small_paligemma() -> PaliGemmaConfig:
    """SigLIP's MLP width is missing here: LeRobot sets it to 4304 whatever the config says."""
    config = PaliGemmaConfig()
    config.vision_config.hidden_size = VISION["width"]
    config.vision_config.num_hidden_layers = VISION["depth"]
    config.vision_config.num_attention_heads = VISION["heads"]
    return config


def build(module, policy_class, config_class) -> torch.nn.Module:
    module.get_gemma_config = lambda variant: small_gemma(module, variant)
    module.CONFIG_MAPPING = {"paligemma": small_paligemma, "gemma": module.CONFIG_MAPPING["gemma"]}
    config = config_class(
        chunk_size=ACTION_HORIZON,
        n_action_steps=ACTION_HORIZON,
        max_state_dim=ACTION_DIM,
        max_action_dim=ACTION_DIM,
        dtype="float32",
        device="cpu",
    )
    model = policy_class(config).eval()
    paligemma = model.paligemma_with_expert.paligemma.model
    paligemma.multi_modal_projector.linear = torch.nn.Linear(VISION["width"], LLM["width"])
    embedding = paligemma.language_model.embed_tokens
    embedding.weight = torch.nn.Parameter(embedding.weight[:VOCAB_SIZE].detach())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" not in name:
                parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def answer(model: torch.nn.Module, variant: str) -> np.ndarray:
    batch = {name: torch.from_numpy(value) for name, value in observations(variant).items()}
    state = {"state": batch["state"]} if variant == "pi0" else {}
    actions = model.sample_actions(
        list(batch["images"].unbind(1)),
        list(batch["image_mask"].unbind(1)),
        batch["tokens"],
        batch["token_mask"],
        **state,
        noise=batch["noise"],
        num_steps=NUM_STEPS,
    )
    return actions.numpy()


def main() -> None:
    models = {
        "pi0": build(modeling_pi0, modeling_pi0.PI0Pytorch, PI0Config),
        "pi05": build(modeling_pi05, modeling_pi05.PI05Pytorch, PI05Config),
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        OUTPUT,
        made_by=[f"{package} {version(package)}" for package in ("lerobot", "transformers", "torch")],
        **{variant: answer(model, variant) for variant, model in models.items()},
    )
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
