"""Episodes of a policy in Meta-World, in worker processes of duq-evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from duq.compiler.accuracy.reference import tensors
from duq.compiler.checkpoint import Checkpoint, load_checkpoint
from duq.compiler.errors import CheckpointError
from duq.compiler.model import build_model
from duq.compiler.quant import Quantization, fake_quantize
from duq.examples.collect_metaworld import disturbances
from duq.examples.metaworld_env import ACTION_DIM, MetaworldEnv
from duq.runtime import Policy
from duq.runtime.preprocess import Preprocessor

CAMERAS = 2
Infer = Callable[[dict, np.ndarray], np.ndarray]  # (observation, noise [H, A]) -> actions [H, ACTION_DIM]


def preprocessor(checkpoint: Checkpoint) -> Preprocessor:
    """Of the policy's observations. CheckpointError if it has no tokenizer."""
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"{checkpoint.path}: holds no tokenizer.model; train it with examples/train_metaworld.py")
    return Preprocessor(checkpoint.config, tokenizer=checkpoint.tokenizer.read_bytes(), cameras=CAMERAS)


@dataclass
class Source:
    """What a policy is made of: a plan; or, if there is none, the checkpoint in PyTorch, quantized in float arithmetic."""

    checkpoint: Path
    quantization: Quantization
    plan: Path | None = None

    def infer(self) -> Infer:
        """On one thread: the processes share the machine."""
        if self.plan is not None:
            policy = Policy(self.plan, threads=1)
            policy.warmup()
            return lambda observation, noise: policy.infer(observation, noise)["actions"][:, :ACTION_DIM]
        torch.set_num_threads(1)
        checkpoint = load_checkpoint(self.checkpoint)
        model = fake_quantize(build_model(checkpoint).float(), self.quantization)
        inputs_of, sample = preprocessor(checkpoint).model_inputs, cast(Callable[..., Tensor], model.sample_actions)

        def infer(observation: dict, noise: np.ndarray) -> np.ndarray:
            images, mask, *others = tensors(inputs_of(observation))
            inputs = images[:, :CAMERAS], mask[:, :CAMERAS], *others
            return sample(*inputs, torch.from_numpy(noise)[None])[0, :, :ACTION_DIM].numpy()

        return infer


def record(task: str, first_seed: int, count: int) -> list[dict]:
    """Observations of the scripted expert at work, each of a start of its own, at moments all over the episode."""
    env = environment(task)
    observations = []
    for seed in range(first_seed, first_seed + count):
        env.reset(seed)
        for _ in range(int(np.random.default_rng(seed).integers(0, 60))):
            if env.step(env.expert_action()):
                break
        observations.append(env.observation())
    return observations


@dataclass(frozen=True)
class Conditions:
    """Of an episode: actions of each chunk to carry out, steps to success at most, and how hard the arm is pushed."""

    execute: int = 8
    steps: int = 200
    push: float = 0.0


def episode(
    infer: Infer, env: MetaworldEnv, start: int, noise_shape: tuple[int, int], conditions: Conditions
) -> int | None:
    """Steps to success, or None. The start, the noise and the pushes are the same for every policy."""
    env.reset(start)
    noise, limit = np.random.default_rng(start), conditions.steps
    pushes = disturbances(np.random.default_rng((start, 1)), limit, horizon=1, strength=conditions.push)
    for step in range(0, limit, conditions.execute):
        actions = infer(env.observation(), noise.standard_normal(noise_shape, np.float32))
        for index, (action, push) in enumerate(zip(actions[: conditions.execute], pushes[step:], strict=False)):
            if env.step(action + push):
                return step + index + 1
    return None


# --- in a worker process -----------------------------------------------------------------------------------------------

_sources: dict[str, Source] = {}


def start_worker(sources: dict[str, Source]) -> None:
    _sources.update(sources)


@cache
def environment(task: str) -> MetaworldEnv:
    return MetaworldEnv(task)


@cache
def policy(scheme: str) -> Infer:
    return _sources[scheme].infer()


def run_episode(job: tuple[str, str, int], noise_shape: tuple[int, int], conditions: Conditions) -> int | None:
    """`job`: scheme, task, start."""
    scheme, task, start = job
    return episode(policy(scheme), environment(task), start, noise_shape, conditions)


def run_chunks(scheme: str, observations: list[dict], noise: np.ndarray) -> np.ndarray:
    """What a scheme answers: actions [N, H, ACTION_DIM] for N observations and noise [N, H, A]."""
    return np.stack([policy(scheme)(observation, each) for observation, each in zip(observations, noise, strict=True)])
