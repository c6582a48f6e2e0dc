"""A control loop that never waits for its policy: the next chunk is inferred while the current one is executed.

An inference that starts in period k plans the periods k, k+1, ... The actions of its first `freeze` periods are executed
from the chunk before it, which is fixed by then; the new chunk takes over behind them, at once or gradually:

    period     k              k+freeze        k+freeze+blend
    old chunk  |==== executed ====|~~~ fades out ~~~|
    new chunk  |     inferred     |~~~ fades in  ~~~|==== executed ====
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from duq.runtime.errors import RealtimeError


class Chunk(NamedTuple):
    start: int  # the period that its first action is for
    actions: np.ndarray  # [H, A]

    @property
    def end(self) -> int:
        return self.start + len(self.actions)

    def action(self, period: int) -> np.ndarray:
        """The action for a period; beyond the end the last one."""
        return self.actions[min(period, self.end - 1) - self.start]


@dataclass
class Report:
    """What a loop went through."""

    actions: int = 0  # sent
    missed: int = 0  # periods that ended before their action was sent, because observe, act or the machine took too long
    starved: int = 0  # periods in which the last action was repeated: the chunk had run out, the next was not there
    late: int = 0  # inferences that took more than `freeze` periods
    latencies: Counter[int] = field(default_factory=Counter)  # periods until a chunk was there -> how often


class ChunkStream:
    """Gives one action a period, and has the next chunk inferred in the background in time.

    infer: Policy.infer, or that of openpi's WebsocketClientPolicy.
    freeze: periods from the start of an inference until its chunk takes over. At least the engine's latency.
    blend: periods in which old and new actions are then mixed, with weights that change linearly.
    every: periods between the starts of two inferences; the least is `freeze`, the default.
    submit: as of a concurrent.futures.Executor; a thread of its own by default.

    A chunk is in use from `freeze` to `every + freeze + blend`; what it has beyond that makes up for a late successor.
    Raises RealtimeError if the periods do not fit each other, and `begin` does if they exceed the chunks.
    """

    def __init__(
        self,
        infer: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        freeze: int,
        blend: int = 0,
        every: int | None = None,
        submit: Callable[..., Future[Any]] | None = None,
    ):
        every = freeze if every is None else every
        if not (1 <= freeze <= every and 0 <= blend <= every):
            raise RealtimeError(f"freeze {freeze}, blend {blend}, every {every}: 1 <= freeze <= every, 0 <= blend <= every")
        self.report = Report()
        self._infer, self._freeze, self._blend, self._every = infer, freeze, blend, every
        self._submit = submit or ThreadPoolExecutor(1, "duq-realtime").submit
        self._started = self._takeover = 0
        self._call: Future[Any] | None = None  # an inference under way,
        self._next: Chunk | None = None  # then its chunk until it takes over

    def begin(self, observation: Mapping[str, Any]) -> None:
        """Waits for the first chunk, whose first action is that of period 0."""
        actions = self._submit(self._infer, observation).result()["actions"]
        needed = self._every + self._freeze + self._blend
        if needed > len(actions):
            raise RealtimeError(
                f"every {self._every} + freeze {self._freeze} + blend {self._blend} = {needed} periods, but the policy's "
                f"chunks have {len(actions)} actions: lower one of them, or the control rate"
            )
        self._old = self._new = Chunk(0, actions)

    def action(self, period: int, observe: Callable[[], Mapping[str, Any]]) -> np.ndarray:
        """The action [A] of a period. Never waits for an inference; raises what an inference raised.

        Periods only increase; some may be left out. observe: called in the periods in which an inference starts. The
        inference reads what it returns while the loop goes on, so it must not be written to afterwards.
        """
        if self._call and self._call.done():
            self._receive(self._call, period)
        if self._next and period >= self._next.start + self._freeze:
            self._old, self._new, self._next, self._takeover = self._new, self._next, None, period
        if not self._call and not self._next and period >= self._started + self._every:
            self._call, self._started = self._submit(self._infer, observe()), period
        self.report.starved += period >= self._new.end
        return self._mixed(period)

    def _receive(self, call: Future[Any], period: int) -> None:
        self._next, self._call = Chunk(self._started, call.result()["actions"]), None
        latency = period - self._started
        self.report.latencies[latency] += 1
        self.report.late += latency > self._freeze

    def _mixed(self, period: int) -> np.ndarray:
        """w old + (1 - w) new; with b = blend, w = b / (b + 1) at the takeover, ..., 1 / (b + 1), and 0 from then on."""
        weight = 1 - (period - self._takeover + 1) / (self._blend + 1)
        if weight <= 0 or period >= self._old.end:
            return self._new.action(period)
        return weight * self._old.action(period) + (1 - weight) * self._new.action(period)


class Clock(Protocol):
    def now(self) -> float: ...  # seconds

    def sleep_until(self, moment: float) -> None: ...


class MonotonicClock:
    """The machine's own."""

    now = staticmethod(time.monotonic)

    def sleep_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))


def control_loop(
    stream: ChunkStream,
    observe: Callable[[], Mapping[str, Any]],
    act: Callable[[np.ndarray], None],
    *,
    rate: float,
    periods: float = math.inf,
    clock: Clock | None = None,
) -> Report:
    """Calls act(action) in each period of 1 / rate seconds, until `periods` have passed or a call raises.

    Each action is that of the time at which it is sent: after a hold-up the loop leaves out what it missed, and keeps its
    phase.
    """
    clock = clock or MonotonicClock()
    stream.begin(observe())
    start, period = clock.now(), 0
    while period < periods:
        act(stream.action(period, observe))
        stream.report.actions += 1
        overdue = max(0, int((clock.now() - start) * rate) - period)
        stream.report.missed += overdue
        period += max(1, overdue)
        clock.sleep_until(start + period / rate)
    return stream.report
