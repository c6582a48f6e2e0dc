"""Frames of a video at given times, decoded exactly: seek to a keyframe, then decode forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np

from duq.compiler.data.files import check_file, needs
from duq.compiler.errors import CalibrationError
from duq.runtime.reading import reason

MOST_PIXELS = 1 << 26  # of a frame
PATIENCE_S = 600.0  # to decode on to a frame: a damaged file may repeat itself without an end
TOLERANCE_S = 1e-4  # LeRobot's: how far a frame may lie from the time asked for
_READ_ON_S = 1.0  # a frame at most so far ahead is reached by decoding on, a later one by seeking
_BACK_S = (0.0, 1.0, 10.0, float("inf"))  # how far before the time to seek: keyframes of some codecs are found too late


def decode_frames(
    file: Path, times: Sequence[float], first: float = 0.0, note: Callable[[str], None] = lambda line: None
) -> list[np.ndarray]:
    """The frames at ``times`` (seconds), in their order: uint8 RGB [H, W, 3] each.

    Times are those that the file itself gives its frames (presentation timestamps), as in LeRobot's decoder. But where
    its first frame comes later than ``first``, the time at which the file's first episode begins, the whole file is
    taken to be shifted by the difference, and ``note`` is called with a line that says so: otherwise every frame would
    be a neighbor of the right one.

    Raises CalibrationError if the file is missing or damaged, or has no frame within TOLERANCE_S of a time.
    """
    check_file(file)
    frames: dict[float, np.ndarray] = {}
    with _opened(file) as container:
        video = _Video(file, container)
        shift = max(0.0, video.start - first)
        if shift > TOLERANCE_S:
            note(f"{file}: begins {shift:.4f} s late; its frames are counted from its first one")
        else:
            shift = 0.0
        for time in sorted(set(times)):
            frames[time] = video.frame_at(time + shift).to_ndarray(format="rgb24")
    return [frames[time] for time in times]


@contextmanager
def _opened(file: Path) -> Iterator:
    av = needs("av")
    try:
        with av.open(str(file)) as container:
            yield container
    except CalibrationError:
        raise
    except Exception as error:  # FFmpeg's, and what PyAV and we make of times and sizes that make no sense
        words = reason(error).partition(chr(10))[0]
        raise CalibrationError(f"{file}: cannot be decoded ({words}); download or record it again") from error


class _Video:
    """One open video. Frames are asked for in the order of their times."""

    def __init__(self, file: Path, container):
        if not container.streams.video:
            raise CalibrationError(f"{file}: holds no video; download or record it again")
        self._file, self._container = file, container
        self._stream = container.streams.video[0]
        self._decoded: Iterator = iter(())
        self._current = None  # the last frame that was decoded
        width, height = self._stream.width or 0, self._stream.height or 0
        if not 0 < width * height <= MOST_PIXELS or not self._stream.time_base:
            raise CalibrationError(f"{file}: says that it shows {width} x {height} pixels; download or record it again")

    @property
    def start(self) -> float:
        """Time of the first frame, in seconds."""
        return float((self._stream.start_time or 0) * self._stream.time_base)

    def frame_at(self, time: float):
        """The frame within TOLERANCE_S of ``time``."""
        if self._current is not None and 0 <= time - self._time(self._current) + TOLERANCE_S <= _READ_ON_S:
            found = self._read_to(time)
            if self._matches(found, time):
                return found
        for back in _BACK_S:
            self._seek(time - back)
            begin = self._read_to(float("-inf"))
            found = self._read_to(time) if begin is not None else None
            if self._matches(found, time):
                return found
            if begin is not None and self._time(begin) <= time and not (found and found.is_corrupt):
                break  # all frames from there on were seen
        near = "it ends before" if found is None else f"the next one is at {self._time(found):.6f} s"
        raise CalibrationError(
            f"{self._file}: has no frame at {time:.6f} s ({near}); it is cut, or belongs to another version of the dataset"
        )

    def _seek(self, time: float) -> None:
        """To the keyframe at or before ``time``, or to the start."""
        target = max(self._stream.start_time or 0, int(max(time, -1e6) / self._stream.time_base) - 1)
        self._container.seek(target, stream=self._stream, backward=True, any_frame=False)
        self._decoded = (frame for frame in self._container.decode(self._stream) if frame.pts is not None)
        self._current = None

    def _read_to(self, time: float):
        """Decodes on to the first frame that is not before ``time``; None at the end."""
        end = perf_counter() + PATIENCE_S
        while self._current is None or self._time(self._current) < time - TOLERANCE_S:
            if perf_counter() > end:
                raise CalibrationError(f"{self._file}: has no frame at {time:.6f} s within {PATIENCE_S:.0f} s of decoding")
            self._current = next(self._decoded, None)
            if self._current is None:
                return None
        return self._current

    def _matches(self, frame, time: float) -> bool:
        return frame is not None and not frame.is_corrupt and abs(self._time(frame) - time) <= TOLERANCE_S

    def _time(self, frame) -> float:
        return float(frame.pts * self._stream.time_base)
