"""The reference model, and how a checkpoint's weights get into it."""

from __future__ import annotations

import torch

from duq.compiler.model.pi0 import Pi0, integrate, timesteps

__all__ = ["Pi0", "build_model", "integrate", "timesteps"]


def build_model(checkpoint) -> Pi0:
    """A Pi0 over the checkpoint's memory-mapped weights: nothing is copied, each layer upcasts what it uses."""
    with torch.device("meta"):
        model = Pi0(checkpoint.config)
    model.load_state_dict(checkpoint.weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)
