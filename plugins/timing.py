"""How long launches take on this machine's GPU: many of them in a CUDA graph, each on a weight that is not in its cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from duq.plugins.driver import Event, Stream

COLD_BYTES = 128 << 20  # more than L2 holds
LAUNCHES = 4, 128  # in a graph, at least and at most
ROUNDS = 5


def copies_of(weight_bytes: int) -> int:
    """The copies of a weight that a graph of launches, one for each, walks through."""
    least, most = LAUNCHES
    return min(max(least, -(-COLD_BYTES // weight_bytes)), most)


def milliseconds(works: Sequence[Callable[[Stream], None]]) -> list[float]:
    """The least time of each piece of work (which it enqueues when it is called) as a CUDA graph.

    They take turns, so that no piece has the slow clocks for itself.
    """
    stream, start, end = Stream(), Event(), Event()
    graphs = [stream.capture(partial(work, stream)) for work in works]
    least = [math.inf] * len(graphs)
    for _ in range(ROUNDS):
        for index, graph in enumerate(graphs):
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            stream.synchronize()
            least[index] = min(least[index], end.milliseconds_since(start))
    return least
