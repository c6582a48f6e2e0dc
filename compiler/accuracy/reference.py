"""The reference's side: `python -m compiler.accuracy.reference DIRECTORY COUNT THREADS CHECKPOINT STEPS ROTARY [BASE]`.

PyTorch, eager, float32, from the checkpoint's weights.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duq.compiler.accuracy.worker import Arrays, errors_to_parent, read_arrays, resident_bytes, work
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.model import Pi0, build_model, integrate, timesteps
from duq.runtime.preprocess import ModelInputs
from duq.runtime.solver import Solver


@torch.no_grad()
def trace_reference(
    model: Pi0, inputs: ModelInputs, noise: np.ndarray, solver: Solver, engine_x: np.ndarray | None = None
) -> Arrays:
    """What the stages produce, for the tokens that the engine computes: present cameras, prompt without padding.

    Returns "image_features" [256 C, width]; "key.<layer>", "value.<layer>" [1, kv_heads, P, head_dim], where pi0's
    state token is the last of the P; "v", the velocities [num_steps, H, A], each at the x that those before led to, and
    "actions_same_solver" [H, A], where they all lead; and "v_at_engine_x", likewise but at the states `engine_x`
    [num_steps + 1, H, A] through which the engine went. solver: the engine's.
    """
    images, image_mask, tokens, token_mask, state = tensors(inputs)
    cameras = image_mask.repeat_interleave(model.config.vision.tokens, dim=1)
    mask = torch.cat((cameras, token_mask), dim=1)
    features = model.embed_images(images)
    _, past = model.prefix(features, tokens, mask)
    key_values, valid = past, mask[0]
    if not model.config.pi05:
        key_values, valid = _with_state_token(model, state, mask, past), torch.cat((mask[0], torch.tensor([True])))
    stages = {"image_features": features[0, cameras[0]].numpy()}
    for layer, (key, value) in enumerate(key_values):
        stages[f"key.{layer}"], stages[f"value.{layer}"] = key[:, :, valid].numpy(), value[:, :, valid].numpy()

    def velocity(x: Tensor, time: float) -> Tensor:
        return model.velocity(state, x, torch.tensor([time]), mask, past)

    actions, velocities = integrate(velocity, torch.from_numpy(noise)[None], solver)
    stages["v"], stages["actions_same_solver"] = torch.cat(velocities).numpy(), actions[0].numpy()
    if engine_x is not None:
        states = torch.from_numpy(engine_x)[:, None]
        forced = [velocity(state_x, time) for state_x, time in zip(states, timesteps(solver.num_steps), strict=False)]
        stages["v_at_engine_x"] = torch.cat(forced).numpy()
    return stages


def reference_solver(engine: Solver) -> Solver:
    """Whose actions an engine's are compared with: of an engine by Euler's method, of as many steps; of any other, of openpi's
    ten, so that what its solver costs is part of the error."""
    return engine if engine.name == "euler" else Solver()


def tensors(inputs: ModelInputs) -> list[Tensor]:
    """A batch of one, in the order of Pi0.sample_actions."""
    arrays = vars(inputs) | {"images": inputs.pixels()}
    return [torch.from_numpy(array)[None] for array in arrays.values()]


def _with_state_token(model: Pi0, state: Tensor, mask: Tensor, past: list) -> list:
    """Keys and values of the prefix and, behind them, of the state token: it sees the prefix and itself."""
    no_actions, any_time = state.new_zeros(1, 1, model.config.action_dim), state.new_ones(1)
    token = model.embed_suffix(state, no_actions, any_time)[0][:, :1]
    sees = torch.cat((mask, torch.tensor([[True]])), dim=1)[:, None, None]
    return model.expert(token, mask.sum(dim=1, keepdim=True), sees, past)[1]


def main(
    directory: str, count: str, threads: str, checkpoint: str, solver: str, steps: str, rotary: str, base: str | None = None
) -> None:
    """solver, steps: the plan's."""
    opened = resident_bytes()
    torch.set_num_threads(int(threads))
    engine = Solver(solver, int(steps))
    own = reference_solver(engine)
    policy = load_checkpoint(checkpoint, base=base, statistics=False)
    model = build_model(replace(policy, config=replace(policy.config, rotary=rotary)))

    def run(inputs, noise):
        return model.sample_actions(*tensors(inputs), torch.from_numpy(noise)[None], own.num_steps, own.name)[0].numpy()

    def trace(index, inputs, noise):
        engine_x = read_arrays(Path(directory) / f"engine.{index}.npz")["x"]
        return trace_reference(model, inputs, noise, engine, engine_x)

    work(Path(directory), int(count), opened, run, trace, "reference")


if __name__ == "__main__":
    with errors_to_parent():
        main(*sys.argv[1:])
