"""Calibration: the reference model runs over observations while hooks watch the inputs of the linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from duq.compiler.data import load_calibration, robot_mapping
from duq.compiler.errors import CalibrationError
from duq.compiler.model import Pi0
from duq.compiler.quant.linears import input_group, linear
from duq.runtime.config import ModelConfig
from duq.runtime.errors import ObservationError
from duq.runtime.preprocess import ModelInputs, Preprocessor

RESERVOIR_ROWS = 1024


class InputStatistics:
    """Statistics of the K input channels of one linear, and a uniform sample of its input rows, kept on ``device``.

    Attributes:
        sum_of_squares: float64 [K] over all rows observed.
        absmax: float32 [K].
        count: rows observed.
    """

    def __init__(self, channels: int, seed: int, device: torch.device | str = "cpu"):
        self.sum_of_squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self.absmax = torch.zeros(channels, device=device)
        self.count = 0
        self._sample = torch.empty(0, channels, device=device)
        self._priority = torch.empty(0)  # the sample is the rows with the smallest random priorities
        self._generator = torch.Generator().manual_seed(seed)

    def observe(self, rows: Tensor) -> None:
        """Takes in rows [M, K] float32."""
        self.sum_of_squares += rows.square().sum(0, dtype=torch.float64)
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0)) if len(rows) else self.absmax
        self.count += len(rows)
        priority = torch.rand(len(rows), generator=self._generator)
        if len(self._sample) == RESERVOIR_ROWS:  # most rows come too late to be sampled: drop them before copying
            early = priority < self._priority.max()
            rows, priority = rows[early], priority[early]
        if not len(rows):
            return
        priority = torch.cat((self._priority, priority))
        kept = priority.argsort()[:RESERVOIR_ROWS]
        self._sample, self._priority = torch.cat((self._sample, rows))[kept], priority[kept]

    @property
    def rms(self) -> Tensor:
        """Root mean square per channel, float64 [K]."""
        return (self.sum_of_squares / max(self.count, 1)).sqrt()

    @property
    def fitting_rows(self) -> Tensor:
        """Three quarters of the sample, [<= 768, K], to fit scales and weights to."""
        return self._sample[len(self._sample) // 4 :]

    @property
    def held_out_rows(self) -> Tensor:
        """The rest of the sample, [<= 256, K], to measure on."""
        return self._sample[: len(self._sample) // 4]


def calibration_inputs(
    path: Path,
    preprocessor: Preprocessor,
    steps: int,
    *,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> list[ModelInputs]:
    """Up to ``steps`` observations of a LeRobotDataset or .npz files (see compiler/data), spread over all it holds.

    ``seed``: as `load_calibration` takes it. ``report`` is called with each line that the user should see: what was read,
    which observations of it, and what is suspicious about them. Raises CalibrationError when it cannot be read or an
    observation is not one that ``preprocessor`` takes.
    """
    found = load_calibration(path, steps, seed, robot_mapping(preprocessor.robot))
    for line in (found.source, *found.shown, *(f"warning: {each}" for each in found.warnings)):
        report(line)
    inputs = []
    for label, observation in zip(found.labels, found.observations, strict=True):
        try:
            inputs.append(preprocessor.model_inputs(observation))
        except ObservationError as error:
            raise CalibrationError(f"calibration data {path}, {label}: {error}") from error
    return inputs


def calibrate(
    model: Pi0,
    config: ModelConfig,
    linears: Iterable[str],
    inputs: Sequence[ModelInputs],
    steps: int,
    progress: Progress,
    num_steps: int = 10,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of ``linears``, by :func:`~compiler.quant.linears.input_group`, on the model's device.

    The first ``steps`` of ``inputs`` each run through the whole policy, denoising included, from seeded noise. Rows of
    padded prompt tokens and absent cameras are left out, as the engine leaves them out.

    Raises CalibrationError when there is no observation, one does not fit the policy, or something is not finite.
    """
    inputs = inputs[:steps]
    if not inputs:
        raise CalibrationError("no calibration observations; give at least one (32 is usual)")
    for index, observation in enumerate(inputs):
        _check(observation, index, config)
    statistics: dict[str, InputStatistics] = {}
    valid: dict[str, Tensor] = {}

    def observer(group: str):
        def observe(module: nn.Module, args: tuple[Tensor]) -> None:
            rows = args[0].detach().flatten(0, -2).to(torch.float32)
            mask = valid.get(linear(group).stack)
            if group not in statistics:
                statistics[group] = InputStatistics(rows.shape[1], seed=len(statistics), device=rows.device)
            statistics[group].observe(rows if mask is None else rows[mask])

        return observe

    first_of_group = {input_group(name): name for name in reversed(list(linears))}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(observer(group)) for group, name in first_of_group.items()
    ]
    task = progress.add_task("Calibrating", total=len(inputs))
    try:
        for index, observation in enumerate(inputs):
            valid.update(_valid_rows(observation, config))
            actions = _run(model, config, observation, index, num_steps)
            _check_finite(statistics, actions, index)
            progress.advance(task)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def _run(model: Pi0, config: ModelConfig, observation: ModelInputs, seed: int, num_steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, config.action_horizon, config.action_dim, generator=generator)
    arrays = (observation.pixels(), observation.image_mask, observation.tokens, observation.token_mask, observation.state)
    device = next(model.parameters()).device
    inputs = [torch.as_tensor(array)[None].to(device) for array in arrays]
    sample: Callable[..., Tensor] = model.sample_actions
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as for products by default: float32 is float32
        return sample(*inputs, noise.to(device), num_steps=num_steps)


def _valid_rows(observation: ModelInputs, config: ModelConfig) -> dict[str, Tensor]:
    """Per part of the policy, which of its rows carry something; the expert has no padding."""
    images = torch.as_tensor(observation.image_mask).repeat_interleave(config.vision.tokens)
    prefix = torch.cat((images, torch.as_tensor(observation.token_mask)))
    return {"vision": images, "projector": images, "llm": prefix}


def _check(observation: ModelInputs, index: int, config: ModelConfig) -> None:
    size, cameras = config.vision.image_size, len(observation.image_mask)
    expected = {
        "images": (cameras, size, size, 3),
        "tokens": (config.max_prompt_tokens,),
        "token_mask": (config.max_prompt_tokens,),
        "state": (config.state_width,),
    }
    for key, shape in expected.items():
        found = tuple(getattr(observation, key).shape)
        if found != shape:
            raise CalibrationError(f"calibration observation {index}: {key} has shape {found}, the policy takes {shape}")
    tokens = torch.as_tensor(observation.tokens)
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise CalibrationError(
            f"calibration observation {index}: token ids reach {int(tokens.max())}, the vocabulary has {config.vocab_size}"
        )
    if not torch.isfinite(torch.as_tensor(observation.state)).all():
        raise CalibrationError(f"calibration observation {index}: state holds NaN or infinity")


def _check_finite(statistics: dict[str, InputStatistics], actions: Tensor, index: int) -> None:
    for group, found in statistics.items():
        if not torch.isfinite(found.sum_of_squares).all():
            raise CalibrationError(f"calibration observation {index} makes the input of {group} NaN or infinite")
    if not torch.isfinite(actions).all():
        raise CalibrationError(f"calibration observation {index} makes the policy's actions NaN or infinite")
