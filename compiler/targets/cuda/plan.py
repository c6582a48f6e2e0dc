"""Plan: what launches wait for on other streams, and where buffers lie. Functions over launches, which stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from duq.compiler.targets.cuda.launches import ALIGNMENT, Buffer, Launch, Memory, Program, Streams
from duq.plugins.gpu import Gpu


def plan_streams(program: Program, gpu: Gpu) -> Streams:
    """What launches wait for, and which may start before the one ahead of them on their stream has ended.

    The prefix has a stream and its branch another. The first denoising step has a third: it only needs each prefix layer's keys
    and values, so it runs concurrently with the prefix, a layer behind. Launches wait until the other streams have written the
    buffers they read, and also those they write: where a prompt is shorter than its buffer, the state token's keys and values
    replace those of a token of padding.

    Overlap is programmatic dependent launch: both kernels have to know of it, and the GPU has to have it.
    """
    prefix, step = program.prefix, program.step
    waits: dict[Launch, list[int]] = {}
    main: dict[Buffer, int] = {}  # of each stream of the prefix: the launch that writes a buffer last
    branch: dict[Buffer, int] = {}
    seen_by_branch, seen_by_step = [-1], [-1, -1]  # of each of the other streams: the latest launch waited for
    for index, launch in enumerate(prefix):
        if launch.branch:
            waits[launch] = _waits(launch, [main], seen_by_branch)
        (branch if launch.branch else main).update(dict.fromkeys(launch.writes, index))
    for launch in step:
        waits[launch] = _waits(launch, [main, branch], seen_by_step)
    if not gpu.has_pdl:
        return Streams(waits)
    streams = [each for each in prefix if not each.branch], [each for each in prefix if each.branch]
    orders = [*(zip(stream, stream[1:], strict=False) for stream in streams)]
    following = chain(*orders, zip([step[-1], *step], step, strict=False))  # a step follows a step
    kernels = ((ahead.instance.kernel, launch) for ahead, launch in following)
    return Streams(waits, frozenset(launch for ahead, launch in kernels if ahead.waits and launch.instance.kernel.waits))


def _waits(launch: Launch, others: Sequence[Mapping[Buffer, int]], seen: list[int]) -> list[int]:
    """The launches of other streams that have to be done, unless a launch ahead of this one has waited for them."""
    found = []
    for stream, written in enumerate(others):
        latest = max((written[buffer] for buffer in [*launch.reads, *launch.writes] if buffer in written), default=-1)
        if latest > seen[stream]:
            found.append(latest)
            seen[stream] = latest
    return found


def plan_memory(program: Program) -> Memory:
    """The offset of every buffer in one arena, in which buffers that are never alive together share memory.

    The inputs come first, side by side, so that one copy brings them; then what else is persistent; then the others of prefix
    and step, which may run concurrently: the largest first, each at the lowest offset that is free while it lives.
    """
    offsets: dict[Buffer, int] = {}
    end = 0
    used = _buffers(program.launches)
    for buffer in dict.fromkeys([*(each for each in program.inputs if each in used), *used, *program.zeroed]):
        if buffer.persistent:
            offsets[buffer], end = end, end + _aligned(buffer.bytes)
    for launches in (program.prefix, program.step):
        base = end
        lives = _lives(launches)
        placed: list[Buffer] = []
        for buffer in sorted(lives, key=lambda each: -each.bytes):
            others = sorted((o for o in placed if _overlap(lives[o], lives[buffer])), key=lambda o: offsets[o])
            offset = base
            for other in others:
                if offset + buffer.bytes <= offsets[other]:
                    break
                offset = max(offset, offsets[other] + _aligned(other.bytes))
            offsets[buffer] = offset
            placed.append(buffer)
            end = max(end, offset + _aligned(buffer.bytes))
    return Memory(offsets, end)


def _buffers(launches: Sequence[Launch]) -> dict[Buffer, None]:
    return {buffer: None for each in launches for buffer in [*each.reads, *each.writes]}


def _lives(launches: Sequence[Launch]) -> dict[Buffer, tuple[int, int]]:
    """From the first launch that touches a buffer to the last. A branch runs at no fixed time: what it writes lives throughout."""
    of_branch = {buffer for launch in launches if launch.branch for buffer in launch.writes}
    lives: dict[Buffer, tuple[int, int]] = {}
    for index, launch in enumerate(launches):
        for buffer in [*launch.reads, *launch.writes]:
            if not buffer.persistent:
                first = lives.get(buffer, (index, index))[0]
                lives[buffer] = (0, len(launches)) if buffer in of_branch else (first, index)
    return lives


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
