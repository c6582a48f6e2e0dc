"""What is suspicious about a set of observations: integer ranges that are fitted to it would be wrong for the robot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_NOISE = 0.2  # correlation of neighboring pixels: photographs and renderings have 0.8 to 0.99, noise has 0
_PROMPTS = ("prompt", "task")


def concerns(observations: Sequence[Mapping], count: int | None) -> list[str]:
    """One line each: few observations, images of one color or of noise, equal states, no prompts. count: as asked for."""
    flat = [dict(_leaves(observation)) for observation in observations]
    lines = [*_few(len(flat), count), *_images(flat)]
    if len(flat) > 1 and _equal_states(flat):
        lines.append(f"all {len(flat)} observations have the same state: the robot did not move")
    prompts = [str(row[key]) for row in flat for key in _PROMPTS if key in row]
    if prompts and not any(prompt.strip() for prompt in prompts):
        lines.append("all prompts are empty: the policy is calibrated without the words it will read")
    return lines


def _few(found: int, count: int | None) -> list[str]:
    if found == 1:
        return ["there is only one observation to measure on; 32 are usual"]
    return [f"there are {found} observations, fewer than the {count} asked for"] if count and found < count else []


def _images(flat: Sequence[Mapping]) -> Iterator[str]:
    for key in dict.fromkeys(key for row in flat for key in row):
        images = [row[key] for row in flat if key in row and _is_image(row[key])]
        constant = sum(image.min() == image.max() for image in images)
        noise = sum(image.min() != image.max() and _neighbor_correlation(image) < _NOISE for image in images)
        if constant:
            yield f"{key}: {constant} of {len(images)} images are of a single color; is the camera connected?"
        if noise:
            yield f"{key}: {noise} of {len(images)} images look like noise; give what the robot's camera sees"
        if len(images) > 1 and not constant and all(np.array_equal(images[0], image) for image in images[1:]):
            yield f"{key}: all {len(images)} images are the same"


def _equal_states(flat: Sequence[Mapping]) -> bool:
    """Whether all vectors of numbers, of which there is at least one, are the same in all observations."""
    states = [{key: value for key, value in row.items() if _is_state(value)} for row in flat]
    first = states[0]
    return bool(first) and all(
        row.keys() == first.keys() and all(np.array_equal(row[key], first[key]) for key in row) for row in states[1:]
    )


def _leaves(observation: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in observation.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _is_image(value) -> bool:
    is_array = isinstance(value, np.ndarray) and value.ndim == 3 and value.size > 0 and value.dtype.kind in "biuf"
    return is_array and 3 in (value.shape[0], value.shape[2])


def _is_state(value) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and np.issubdtype(value.dtype, np.floating)


def _neighbor_correlation(image: np.ndarray) -> float:
    """Correlation of pixels with their neighbors, along the better of both axes of the image; 1 if it has none."""
    gray = image.mean(0 if image.shape[0] == 3 and image.shape[2] != 3 else 2)
    pairs = [(gray[:, :-1], gray[:, 1:]), (gray[:-1], gray[1:])]
    found = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs if a.size > 1 and a.std() > 0 and b.std() > 0]
    return max(found, default=1.0)
