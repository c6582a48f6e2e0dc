"""pi0 (arXiv 2410.24164) and pi0.5 (arXiv 2504.16054): the PyTorch reference everything else is compared with.

A SigLIP tower turns up to three camera images into prefix tokens, a Gemma over image and prompt tokens turns the
prefix into keys and values, and a second, smaller Gemma (the action expert) denoises an action chunk while looking
at them: ten Euler steps of a flow from noise (t = 1) to actions (t = 0), or those of another solver.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duq.compiler.model.gemma import Gemma, KeyValue
from duq.compiler.model.layers import Linear
from duq.compiler.model.siglip import SigLIP
from duq.runtime.config import ModelConfig
from duq.runtime.solver import Solver


def time_embedding(time: Tensor, width: int) -> Tensor:
    """sin and cos of 2 pi time / period, time [B], for width / 2 periods from 4e-3 to 4 in geometric steps.

    Returns [B, width] float32. Angles reach 1600 rad, so they are formed in float64. The ONNX exporter rounds Python
    floats to float32: 2 pi is therefore split in two (Cody-Waite), of which the first is exact.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    cycles = time.to(torch.float64)[:, None] * (250.0 / 1000.0**fraction)
    angle = cycles * 6.28125 + cycles * 0.0019353071795864769
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(torch.float32)


def timesteps(num_steps: int) -> list[float]:
    """The float32 times at which the flow is evaluated: 1, 1 - 1/n, ... accumulated in float32 as openpi does."""
    dt = torch.tensor(-1.0 / num_steps, dtype=torch.float32)
    time, times = torch.tensor(1.0, dtype=torch.float32), []
    while time >= -dt / 2:
        times.append(time.item())
        time = time + dt
    return times


def integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, solver: Solver) -> tuple[Tensor, list[Tensor]]:
    """Follows the flow from x at t = 1; returns the state at t = 0, and the velocities of the steps."""
    velocities: list[Tensor] = []
    for time, row in zip(timesteps(solver.num_steps), solver.coefficients().tolist(), strict=True):
        velocities.append(velocity(x, time))
        combined = row[0] * velocities[-1]
        for factor, earlier in zip(row[1:], reversed(velocities[:-1]), strict=False):
            combined = combined + factor * earlier
        x = x - combined / solver.num_steps
    return x, velocities


class Pi0(nn.Module):
    """Shapes: B batch, C cameras, T prompt slots, P = 256 C + T prefix slots, H action horizon, A action dims."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.expert.width
        self.vision = SigLIP(config.vision)
        self.projector = Linear(config.vision.width, config.llm.width)
        self.llm = Gemma(config.llm, vocab_size=config.vocab_size, rotary=config.rotary)
        self.expert = Gemma(config.expert, adaptive=config.pi05, rotary=config.rotary)
        self.action_in_proj = Linear(config.action_dim, width)
        self.action_out_proj = Linear(width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = Linear(width, width)
            self.time_mlp_out = Linear(width, width)
        else:
            self.state_proj = Linear(config.state_width, width)
            self.action_time_mlp_in = Linear(2 * width, width)
            self.action_time_mlp_out = Linear(width, width)

    def embed_images(self, images: Tensor) -> Tensor:
        """images [B, C, 3, 224, 224] in [-1, 1] -> image tokens [B, 256 C, llm width]."""
        features = self.projector(self.vision(images.flatten(0, 1)))
        return features.view(images.shape[0], -1, features.shape[-1])

    def prefix(self, image_tokens: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Image tokens and prompt tokens [B, T], valid where mask [B, P] -> (hidden state, keys and values).

        Only keys are masked: a padded query computes something nobody reads, instead of a softmax over nothing.
        """
        x = torch.cat((image_tokens, self.llm.embed(tokens).to(image_tokens.dtype)), dim=1)
        valid_keys = mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1)
        return self.llm(x, positions=mask.cumsum(dim=1) - 1, mask=valid_keys)

    def embed_suffix(self, state: Tensor, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """state [B, A], x_t [B, H, A], time [B] -> (suffix tokens, adaRMS condition or None).

        pi0: a state token and H action tokens that carry the time. pi0.5: H action tokens; time goes into the norms.
        """
        embedded_time = time_embedding(time, self.action_in_proj.out_features).to(x_t.dtype)
        actions = self.action_in_proj(x_t)
        if self.config.pi05:
            return actions, F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded_time))))
        actions = torch.cat((actions, embedded_time[:, None].expand_as(actions)), dim=-1)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(actions)))
        return torch.cat((self.state_proj(state)[:, None], actions), dim=1), None

    def velocity(self, state: Tensor, x_t: Tensor, time: Tensor, prefix_mask: Tensor, past: list[KeyValue]) -> Tensor:
        """The flow's velocity v(x_t, t | observation) [B, H, A]: one pass of the action expert."""
        x, condition = self.embed_suffix(state, x_t, time)
        # Every row sees the valid prefix and the suffix, but pi0's state row (row 0) does not see the actions.
        row = torch.arange(x.shape[1], device=x.device)
        sees = (row[None, :] == 0) | (row[:, None] > 0) if not self.config.pi05 else row[None, :] >= 0
        sees = sees.expand(x.shape[1], -1)
        mask = torch.cat((prefix_mask[:, None].expand(-1, x.shape[1], -1), sees[None].expand(len(x), -1, -1)), dim=-1)
        positions = prefix_mask.sum(dim=1, keepdim=True) + row
        hidden, _ = self.expert(x, positions, mask[:, None], past, condition)
        return self.action_out_proj(hidden[:, -x_t.shape[1] :])

    @torch.no_grad()
    def sample_actions(
        self,
        images: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor,
        noise: Tensor,
        num_steps: int = 10,
        solver: str = "euler",
    ) -> Tensor:
        """An action chunk [B, H, A] (normalized) from images [B, C, 3, 224, 224] float32 in [-1, 1], image_mask [B, C],
        tokens and token_mask [B, T], state [B, A] (normalized, padded) and noise [B, H, A], by a method of SOLVERS."""
        mask = torch.cat((image_mask.repeat_interleave(self.config.vision.tokens, dim=1), token_mask), dim=1)
        _, past = self.prefix(self.embed_images(images), tokens, mask)

        def velocity(x_t: Tensor, time: float) -> Tensor:
            return self.velocity(state, x_t, torch.full((len(x_t),), time, device=x_t.device), mask, past)

        return integrate(velocity, noise, Solver(solver, num_steps))[0]
