"""Demonstrations on disk: moments of episodes, each with what the robot saw and what the expert then did.

Images are stored as WebP, which takes 1 KB for one of 112 x 112 pixels: 20,000 moments with two cameras are 45 MB.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image

from duq.plugins.errors import DuqError
from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.files import replacing

QUALITY = 75  # of the WebP images


@dataclass(frozen=True)
class Demonstrations:
    """N moments, C cameras, chunks of H actions of A numbers."""

    images: list[list[bytes]]  # [N][C] WebP
    states: np.ndarray  # float32 [N, state dims]
    actions: np.ndarray  # float16 [N, H, A]: the action at the moment and those after it, without disturbance
    prompts: np.ndarray  # str [N]
    episodes: np.ndarray  # int32 [N]: equal within an episode

    def __len__(self) -> int:
        return len(self.states)

    @classmethod
    def join(cls, parts: Sequence[Demonstrations]) -> Demonstrations:
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return cls([cameras for part in parts for cameras in part.images], **arrays)


_ARRAYS = [field.name for field in fields(Demonstrations) if field.name != "images"]


def encode(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> WebP."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", quality=QUALITY)
    return file.getvalue()


def decode(images: list[list[bytes]]) -> np.ndarray:
    """[N][C] WebP of one size -> uint8 [N, C, H, W, 3], on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(
            list(pool.map(lambda cameras: [np.asarray(Image.open(io.BytesIO(file))) for file in cameras], images))
        )


def observations(demonstrations: Demonstrations, count: int) -> list[dict]:
    """`count` moments from all over the demonstrations as the robot's observations, to calibrate a quantizer on."""
    chosen = np.linspace(0, len(demonstrations) - 1, count).round().astype(int)
    cameras = decode([demonstrations.images[i] for i in chosen])
    return [
        {
            "image": dict(zip(IMAGE_SLOTS, images, strict=False)),
            "state": demonstrations.states[i],
            "prompt": str(demonstrations.prompts[i]),
        }
        for i, images in zip(chosen, cameras, strict=True)
    ]


def save(path: Path, demonstrations: Demonstrations) -> None:
    """Writes one compressed .npz file. It appears when everything is written."""
    cameras = [image for moment in demonstrations.images for image in moment]
    sizes = np.array([len(image) for image in cameras]).reshape(len(demonstrations), -1)
    arrays = {name: getattr(demonstrations, name) for name in _ARRAYS}
    with replacing(path) as file:
        np.savez_compressed(file, webp=np.frombuffer(b"".join(cameras), np.uint8), sizes=sizes, **arrays)


def load(path: Path) -> Demonstrations:
    """Raises DuqError unless `save` wrote the file."""
    try:
        with np.lib.npyio.NpzFile(path) as file:  # type: ignore[arg-type]
            webp, sizes = file["webp"].tobytes(), file["sizes"]
            arrays = {name: file[name] for name in _ARRAYS}
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DuqError(f"{path}: is no file of demonstrations ({error}); collect_metaworld.py records one") from error
    ends = sizes.cumsum().reshape(sizes.shape)
    images = [
        [webp[end - size : end] for end, size in zip(*moment, strict=True)] for moment in zip(ends, sizes, strict=True)
    ]
    return Demonstrations(images, **arrays)
