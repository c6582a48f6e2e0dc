"""Where buffers lie: one arena, in which buffers that are never alive together share memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from duq.compiler.targets.cuda.program import ALIGNMENT, Buffer, Launch


def schedule(prefix: Sequence[Launch], step: Sequence[Launch]) -> None:
    """What launches wait for on other streams, and which may overlap with the one ahead of them on their own.

    The prefix has a stream and its branch another. The first denoising step has a third: of the prefix it needs nothing
    but each layer's keys and values, so it runs beside it, a layer behind. They wait for the other streams to have written
    what they read, and also what they write: where a prompt is shorter than its buffer, the state token's keys and
    values replace those of a token of padding.
    """
    main, branch = {}, {}  # the two streams of the prefix: which launch writes a buffer last
    seen_by_branch, seen_by_step = [-1], [-1, -1]  # of each of the other streams: the latest launch waited for
    for index, launch in enumerate(prefix):
        if launch.branch:
            _wait(launch, [main], seen_by_branch)
        (branch if launch.branch else main).update(dict.fromkeys(launch.writes, index))
    for launch in step:
        _wait(launch, [main, branch], seen_by_step)
    streams = [each for each in prefix if not each.branch], [each for each in prefix if each.branch]
    orders = [*(zip(stream, stream[1:]) for stream in streams), zip([step[-1], *step], step)]  # a step follows a step
    for ahead, launch in chain(*orders):
        launch.overlap = ahead.waits_itself and launch.waits_itself


def _wait(launch: Launch, others: Sequence[dict[Buffer, int]], seen: list[int]) -> None:
    """Makes the launch wait for the others to have written its buffers, unless a launch ahead of it has waited for that."""
    for stream, written in enumerate(others):
        latest = max((written[buffer] for buffer in [*launch.reads, *launch.writes] if buffer in written), default=-1)
        if latest > seen[stream]:
            launch.wait_for.append(latest)
            seen[stream] = latest


def place(inputs: Sequence[Buffer], programs: Sequence[Sequence[Launch]]) -> int:
    """Gives every buffer its offset; returns the arena's bytes.

    The inputs come first, side by side, so that one copy brings them; then what else is persistent; then the others of each
    program, which may run beside each other: the largest first, each at the lowest offset that is free while it lives. A
    branch runs at no fixed time, so its buffers live throughout.
    """
    end = 0
    used = _buffers(programs)
    for buffer in dict.fromkeys([*(each for each in inputs if each in used), *used]):
        if buffer.persistent:
            buffer.offset, end = end, end + _aligned(buffer.bytes)
    for launches in programs:
        base = end
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
