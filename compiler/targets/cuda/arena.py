"""Where buffers lie: one arena, in which buffers that are never alive together share memory."""
from __future__ import annotations

from collections.abc import Sequence

from compiler.targets.cuda.program import ALIGNMENT, Buffer, Launch


def schedule(launches: Sequence[Launch]) -> None:
    """What the launches of the second stream wait for, and which launches may overlap with the one ahead of them.

    They wait for the first stream to have written what they read, and also what they write: where a prompt is shorter
    than its buffer, the state token's keys and values replace those of a token of padding.
    """
    written: dict[Buffer, int] = {}
    ahead: dict[bool, Launch] = {}  # by stream
    waited = -1
    for index, launch in enumerate(launches):
        if launch.branch:
            latest = max((written[buffer] for buffer in [*launch.reads, *launch.writes] if buffer in written), default=-1)
            if latest > waited:
                launch.wait_for = waited = latest
        else:
            written |= dict.fromkeys(launch.writes, index)
        previous = ahead.get(launch.branch)
        both_ours = previous is not None and previous.waits_itself and launch.waits_itself
        launch.overlap = both_ours and launch.wait_for is None
        ahead[launch.branch] = launch


def place(inputs: Sequence[Buffer], programs: Sequence[Sequence[Launch]]) -> int:
    """Gives every buffer its offset; returns the arena's bytes.

    The inputs come first, side by side, so that one copy brings them; then what else is persistent. The others of each
    program share what follows: the largest first, each at the lowest offset that is free while it lives. A branch runs at
    no fixed time, so its buffers live throughout.
    """
    end = 0
    used = _buffers(programs)
    for buffer in dict.fromkeys([*(each for each in inputs if each in used), *used]):
        if buffer.persistent:
            buffer.offset, end = end, end + _aligned(buffer.bytes)
    base = end
    for launches in programs:
        lives = _lives(launches)
        placed: list[Buffer] = []
        for buffer in sorted(lives, key=lambda each: -each.bytes):
            others = sorted((o for o in placed if _overlap(lives[o], lives[buffer])), key=lambda o: o.offset)
            offset = base
            for other in others:
                if offset + buffer.bytes <= other.offset:
                    break
                offset = max(offset, other.offset + _aligned(other.bytes))
            buffer.offset = offset
            placed.append(buffer)
            end = max(end, offset + _aligned(buffer.bytes))
    return end


def _buffers(programs: Sequence[Sequence[Launch]]) -> list[Buffer]:
    found = {buffer: None for launches in programs for each in launches for buffer in [*each.reads, *each.writes]}
    return list(found)


def _lives(launches: Sequence[Launch]) -> dict[Buffer, tuple[int, int]]:
    """From the first launch that touches a buffer to the last."""
    lives: dict[Buffer, tuple[int, int]] = {}
    for index, launch in enumerate(launches):
        for buffer in [*launch.reads, *launch.writes]:
            if not buffer.persistent:
                first = lives.get(buffer, (index, index))[0]
                lives[buffer] = (0, len(launches)) if buffer.branch else (first, index)
    return lives


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
