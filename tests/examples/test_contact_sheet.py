"""The contact sheet of an episode: moments from its whole length, none of them twice."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from duq.examples.contact_sheet import COLUMNS, THUMBNAIL, contact_sheet


def episode(steps: list[int], success: bool = False, cameras: int = 2) -> SimpleNamespace:
    """Each look at a step is a gray of its own; the n-th look at camera c has 20 + 2 n + 100 c."""
    images = [[np.full((48, 64, 3), 20 + 2 * n + 100 * c, np.uint8) for c in range(cameras)] for n in range(len(steps))]
    return SimpleNamespace(seen=list(zip(steps, images, strict=True)), success=success)


def grays(sheet, row: int, columns: int = COLUMNS) -> list[int]:
    """Of the middles of a row's frames, where nothing is written."""
    pixels = np.asarray(sheet)[row * THUMBNAIL + THUMBNAIL // 2]
    return [int(pixels[column * THUMBNAIL + THUMBNAIL // 2, 0]) for column in range(columns)]


@pytest.mark.parametrize("looks", [1, 2, 7, 10, 11, 12, 19, 40])
def test_no_frame_is_shown_twice(looks):
    sheet = contact_sheet([episode([8 * n for n in range(looks)])])
    columns = min(looks, COLUMNS)
    assert sheet.size == (columns * THUMBNAIL, 2 * THUMBNAIL)
    shown = grays(sheet, 0, columns)
    assert shown == sorted(set(shown)) and len(shown) == columns
    assert (shown[0], shown[-1]) == (20, 20 + 2 * (looks - 1))  # from the first to the last
    assert grays(sheet, 1, columns) == [gray + 100 for gray in shown]


def test_a_step_that_was_looked_at_twice_is_shown_once():
    sheet = contact_sheet([episode([0, 8, 16, 16])])
    assert sheet.width == 3 * THUMBNAIL and grays(sheet, 0, 3) == [20, 22, 26]


def test_episodes_of_different_lengths_stand_below_each_other():
    sheet = contact_sheet([episode([0, 8, 16], success=True), episode(list(range(30)))])
    assert sheet.size == (COLUMNS * THUMBNAIL, 4 * THUMBNAIL)
    assert grays(sheet, 0, 3) == [20, 22, 24] and grays(sheet, 0)[3:] == [0] * (COLUMNS - 3)
    pixels = np.asarray(sheet)
    green = (pixels == (0, 255, 0)).all(-1)
    assert green[: 2 * THUMBNAIL, 2 * THUMBNAIL : 3 * THUMBNAIL].any()  # the frame around the success
    green[: 2 * THUMBNAIL, 2 * THUMBNAIL : 3 * THUMBNAIL] = False
    assert not green.any()
