"""A plan as a LeRobot policy. The plan takes raw observations and gives the robot's actions.

Normalization, tokenization and relative actions are the plan's: `predict_action_chunk` returns actions in the robot's
units, absolute, and LeRobot's pipelines around it change no number. Tensors are converted here, at the boundary.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from duq import Policy
from duq.runtime.guidance import Prefix, blended, prefix_weights
from duq.runtime.lerobot_folder import CARD, POSTPROCESSOR, PREPROCESSOR, lerobot_config
from duq.runtime.plan import Plan

from .configuration_duq import CANNOT_TRAIN, DuqConfig


class DuqPolicy(PreTrainedPolicy):
    """Args: config; path: of the plan. Raises PlanError, or ValueError where config and plan do not agree."""

    config_class = DuqConfig
    name = "duq"

    def __init__(self, config: DuqConfig, path: str | os.PathLike[str] | None = None, **_: Any):
        super().__init__(config)
        if path is None:
            raise ValueError("a duq policy is a compiled plan: give --policy.path=FOLDER (duq-export-lerobot writes one)")
        if config.compile_model:
            raise ValueError("use_torch_compile, compile_model: a plan is compiled already; leave it out")
        manifest = Plan(path, verify=False).manifest
        _check_agreement(config, manifest, path)
        config.validate_features()
        self._bytes = manifest["transforms"]["resize"] == "openpi"  # the policy was trained on images of bytes
        self._cameras = [key for part in manifest["robot_description"]["cameras"] for key in _keys(part)]
        self._states = [key for part in manifest["robot_description"]["state"] for key in _keys(part)]
        self._noise_shape = config.chunk_size, manifest["model"]["action_dim"]
        self._path, self._target = Path(path), manifest["target"]
        self._engine = Policy(path, threads=config.threads, verify=config.verify)
        self._engine.warmup()
        self.init_rtc_processor()
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> DuqPolicy:
        """From an exported folder, or from one that was uploaded to the Hugging Face hub."""
        hub = dict(
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
        )
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, **hub, **kwargs)
        if not isinstance(config, DuqConfig):
            raise ValueError(f"{pretrained_name_or_path}: is a policy of type {config.type!r}, not an exported duq plan")
        folder = Path(pretrained_name_or_path)
        if folder.is_dir():
            path = folder / config.plan
        else:
            path = Path(hf_hub_download(repo_id=str(pretrained_name_or_path), filename=config.plan, **hub))
        return cls(config, path).eval()

    def predict_action_chunk(
        self,
        batch: Mapping[str, Any],
        *,
        noise: Tensor | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """A chunk for each observation of the batch: float32 [B, chunk_size, robot dims], in the robot's units.

        batch: as the preprocessor gives it: images [B, 3, H, W] in 0..1, observation.state [B, dims], task: text or texts.
        noise: float32 [B, chunk_size, model dims]; None: drawn from PyTorch's generator of the CPU, as LeRobot's own
        policies draw it there, so that equal seeds give equal actions.
        inference_delay, prev_chunk_left_over ([n, dims] or [B, n, dims], as returned here), execution_horizon: real-time
        chunking, see `DuqConfig.rtc`; without effect unless config.rtc_config is enabled, as in LeRobot's own policies.
        """
        observations = self._observations(batch)
        if noise is None:
            noise = torch.normal(0.0, 1.0, (len(observations), *self._noise_shape), dtype=torch.float32)
        starts = noise.numpy(force=True).astype(np.float32, copy=False)
        if starts.shape != (len(observations), *self._noise_shape):
            expected = [len(observations), *self._noise_shape]
            raise ValueError(f"noise: has shape {list(starts.shape)}, expected {expected}")
        if prev_chunk_left_over is not None and self._rtc_enabled():
            rest = prev_chunk_left_over.numpy(force=True)
            prefixes = self._prefixes(rest, len(observations), inference_delay or 0, execution_horizon)
            chunks = [self._joined(*each) for each in zip(observations, starts, prefixes, strict=True)]
        else:
            chunks = infer_all(self._engine, observations, starts)
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        return torch.from_numpy(np.stack(chunks)).to(device)

    def select_action(self, batch: Mapping[str, Any], *, noise: Tensor | None = None) -> Tensor:
        """The next action of each environment, float32 [B, robot dims]; infers when a chunk's n_action_steps are used up."""
        if self._rtc_enabled():
            raise ValueError("real-time chunking joins whole chunks: call predict_action_chunk instead of select_action")
        if not self._actions:
            chunk = self.predict_action_chunk(batch, noise=noise)[:, : self.config.n_action_steps]
            self._actions.extend(chunk.transpose(0, 1))
        return self._actions.popleft()

    def reset(self) -> None:
        """Forgets the rest of the chunk; to be called when environments are reset."""
        self._actions: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    # --- real-time chunking

    def supports_rtc(self) -> bool:
        return True

    def init_rtc_processor(self) -> None:
        """Checks config.rtc_config, which lerobot-rollout sets just before. Raises ValueError for what cannot be applied."""
        rtc = self.config.rtc_config
        if rtc is None or not rtc.enabled:
            return
        if rtc.debug:
            raise ValueError("rtc.debug: the denoising steps are not recorded; leave it out")
        if self.config.rtc == "guide" and not self._engine.guided:
            raise ValueError(
                f"real-time chunking: a plan for {self._target} runs all denoising steps as one unit, which cannot be "
                "guided. Give --policy.rtc=blend, which mixes the chunks by the same weights, or compile for --target cpu"
            )
        if self.config.rtc == "blend" and rtc.max_guidance_weight != type(rtc)().max_guidance_weight:
            raise ValueError("rtc.max_guidance_weight: has no effect with --policy.rtc=blend; leave it out")

    def _rtc_enabled(self) -> bool:
        return self.config.rtc_config is not None and self.config.rtc_config.enabled

    def _prefixes(self, rest: np.ndarray, batch: int, delay: int, horizon: int | None) -> list[Prefix | None]:
        rests = rest if rest.ndim == 3 else np.broadcast_to(rest, (batch, *rest.shape))
        if rests.ndim != 3 or len(rests) != batch:
            raise ValueError(
                f"prev_chunk_left_over: has shape {list(rest.shape)}, expected [n, dims] or [{batch}, n, dims]"
            )
        return [self._prefix(each, delay, horizon) for each in rests]

    def _prefix(self, rest: np.ndarray, delay: int, horizon: int | None) -> Prefix | None:
        """What is left of the previous chunk; None if nothing is."""
        rtc, size = self.config.rtc_config, self.config.chunk_size
        rest = without_padding(rest[:size])
        if not len(rest):
            return None
        horizon = min(rtc.execution_horizon if horizon is None else horizon, len(rest))
        weights = prefix_weights(rtc.prefix_attention_schedule.name.lower(), delay, horizon, size)
        return Prefix(rest, weights, rtc.max_guidance_weight)

    def _joined(self, observation: Mapping[str, Any], noise: np.ndarray, prefix: Prefix | None) -> np.ndarray:
        """The chunk [H, dims] of one observation, joined to the previous one."""
        if prefix is not None and self.config.rtc == "guide":
            return self._engine.infer(observation, noise, prefix=prefix)["actions"]
        actions = self._engine.infer(observation, noise)["actions"]
        return actions if prefix is None else blended(actions, prefix)

    # --- observations

    def _observations(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The batch as the dicts that the plan takes."""
        arrays = {key: self._image(batch[key]) for key in self._cameras if key in batch}
        arrays |= {key: batch[key].numpy(force=True) for key in self._states if key in batch}
        sizes = {key: len(value) for key, value in arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the batch's observations differ in number, or there is none: {sizes}")
        count = next(iter(sizes.values()))
        tasks = _tasks(batch.get("task"), count)
        return [{key: value[index] for key, value in arrays.items()} | tasks[index] for index in range(count)]

    def _image(self, images: Tensor) -> np.ndarray:
        """Cameras' images; the bytes that they were, for a policy that was trained on bytes."""
        found = images.numpy(force=True)
        if self._bytes and found.dtype.kind == "f":
            if found.size and not (found.min() >= 0 and found.max() <= 1):
                raise ValueError("images of floating-point numbers must lie in [0, 1]")
            found = np.rint(found * np.float32(255)).astype(np.uint8)
        return found

    # --- training and saving

    def get_optim_params(self) -> NoReturn:
        raise NotImplementedError(CANNOT_TRAIN)

    def forward(self, batch: Mapping[str, Any]) -> NoReturn:
        raise NotImplementedError(CANNOT_TRAIN)

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """The exported folder again, with the configuration as it is now."""
        self.config._save_pretrained(save_directory)
        for name in (self._path.name, PREPROCESSOR, POSTPROCESSOR, CARD):
            source = self._path.parent / name
            if source.exists():
                shutil.copyfile(source, Path(save_directory) / name)


def infer_all(policy: Policy, observations: Sequence[Mapping[str, Any]], noise: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The actions [H, dims] of each observation, in one call."""
    return [reply["actions"] for reply in policy.infer_batch(observations, noise)]


def without_padding(rest: np.ndarray) -> np.ndarray:
    """[n, dims] without the rows of zeros with which lerobot-rollout fills it up to its execution horizon."""
    filled = np.flatnonzero(rest.any(axis=1))
    return rest[: filled[-1] + 1] if filled.size else rest[:0]


def _keys(part: Mapping[str, Any]) -> list[str]:
    """The names that a camera or a state may have in an observation."""
    return [key[0] for key in (part["key"], *part.get("also", ()))]


def _tasks(task: Any, count: int) -> list[dict[str, Any]]:
    """{"task": text} for each observation; {} where there is none, for which the plan may have a default."""
    if task is None:
        return [{}] * count
    texts = [task] * count if isinstance(task, str) else list(task)
    if len(texts) != count:
        raise ValueError(f"task: there are {len(texts)} texts for {count} observations")
    return [{"task": text} for text in texts]


def _check_agreement(config: DuqConfig, manifest: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raises ValueError if config.json, or an option, says something else than the plan; PlanError if it is no LeRobot plan."""
    shapes = {key: tuple(feature.shape[1:]) for key, feature in config.image_features.items()}
    cameras = [camera["key"][0] for camera in (manifest.get("robot_description") or {}).get("cameras", ())]
    known = {key: (int(size[0]), int(size[1])) for key, size in shapes.items() if key in cameras}
    own = lerobot_config(manifest, str(path), config.n_action_steps, known)
    said = {
        "chunk_size": (config.chunk_size, own["chunk_size"]),
        "checkpoint": (config.checkpoint or own["checkpoint"], own["checkpoint"]),
        "cameras": (sorted(shapes), sorted(cameras)),
        OBS_STATE: (_size(config.robot_state_feature), own["input_features"][OBS_STATE]["shape"][0]),
        ACTION: (_size(config.action_feature), own["output_features"][ACTION]["shape"][0]),
    }
    for name, (here, there) in said.items():
        if here != there:
            raise ValueError(
                f"{path}: {name} is {here} in the policy's configuration, but {there} in the plan; export it again"
            )


def _size(feature: Any) -> int | None:
    return None if feature is None else int(feature.shape[0])
