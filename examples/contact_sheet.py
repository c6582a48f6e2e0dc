"""What a robot's cameras saw in some episodes, on one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

THUMBNAIL, COLUMNS = 112, 10  # pixels; moments of an episode


class Seen(Protocol):
    """An episode: at each step that was looked at, the cameras' images, uint8 [H, W, 3]; and whether it succeeded."""

    seen: list[tuple[int, list[np.ndarray]]]
    success: bool


def contact_sheet(episodes: Sequence[Seen]) -> Image.Image:
    """Moments of each episode from left to right, its cameras one below the other; framed in green where it succeeded.

    An episode with fewer moments than there are columns is shorter: none is shown twice.
    """
    strips = [_strip(episode) for episode in episodes]
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)))
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(episode: Seen) -> Image.Image:
    seen = list(dict(episode.seen).items())  # the last look at a step, where there are two: an episode's end is a look more
    moments = [seen[i] for i in np.linspace(0, len(seen) - 1, min(COLUMNS, len(seen))).round().astype(int)]
    rows = len(moments[0][1])
    strip = Image.new("RGB", (len(moments) * THUMBNAIL, rows * THUMBNAIL))
    draw = ImageDraw.Draw(strip)
    for column, (step, images) in enumerate(moments):
        left = column * THUMBNAIL
        for row, image in enumerate(images):
            strip.paste(Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL)), (left, row * THUMBNAIL))
        draw.text((left + 4, 4), f"step {step}", "white")
    if episode.success:
        draw.rectangle((left, 0, left + THUMBNAIL - 1, strip.height - 1), outline="lime", width=3)
    return strip
