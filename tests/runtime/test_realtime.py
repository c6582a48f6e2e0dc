"""The real-time loop under a simulated clock and engine: time passes only where the simulation says so."""

import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duq.runtime.errors import RealtimeError
from duq.runtime.realtime import ChunkStream, control_loop

RATE, HORIZON = 50, 50
PERIOD = 1 / RATE


class Simulation:
    """A robot, its clock, and an engine that takes latency(call) periods. Action i of a chunk is the period it is for."""

    def __init__(self, latency, horizon=HORIZON, plan=None):
        self.time, self.calls, self.sent = 0.0, [], []
        self._latency, self._horizon = latency, horizon
        self._plan = plan or (lambda call, period: np.arange(period, period + horizon, dtype=np.float32)[:, None])

    def now(self):
        return self.time

    def sleep_until(self, moment):
        self.time = max(self.time, moment)

    def submit(self, infer, observation):
        call = len(self.calls)
        self.calls.append(observation["period"])
        ready = self.time + self._latency(call) * PERIOD - 1e-9

        def result():
            self.sleep_until(ready)
            return infer(observation | {"call": call})

        return SimpleNamespace(done=lambda: self.time >= ready, result=result)

    def infer(self, observation):
        return {"actions": self._plan(observation["call"], observation["period"])}

    def observe(self):
        return {"period": self.period if self.calls else 0}

    def act(self, action):
        self.sent.append((self.period, *action.tolist()))

    @property
    def period(self):
        return int((self.time - self.begin) * RATE + 1e-6)

    @property
    def begin(self):
        """The loop's start, after the first inference."""
        return self._latency(0) * PERIOD - 1e-9

    def run(self, periods, **options):
        stream = ChunkStream(self.infer, submit=self.submit, **options)
        return control_loop(stream, self.observe, self.act, rate=RATE, periods=periods, clock=self)


@pytest.mark.parametrize("blend", [0, 5])
def test_fifty_hertz_for_five_minutes_with_an_engine_of_five_periods(blend):
    simulation = Simulation(latency=lambda call: 5)
    report = simulation.run(periods=5 * 60 * RATE, freeze=5, blend=blend)
    assert (report.actions, report.missed, report.starved, report.late) == (15_000, 0, 0, 0)
    assert simulation.sent == [(period, pytest.approx(period)) for period in range(15_000)]  # each action in its period
    assert simulation.calls[1:] == list(range(5, 15_000, 5)) and set(report.latencies) == {5}
    assert simulation.time - simulation.begin == pytest.approx(300)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1), st.integers(1, 8), st.integers(0, 8), st.integers(0, 8), st.integers(0, 2))
def test_any_latency_keeps_the_rate_and_the_alignment(latencies, freeze, more, blend, spare):
    every = freeze + more
    blend = min(blend, every)
    horizon = every + freeze + blend + spare
    simulation = Simulation(lambda call: latencies[call % len(latencies)], horizon)
    report = simulation.run(periods=300, freeze=freeze, blend=blend, every=every)
    assert report.actions == 300 and report.missed == 0
    assert report.late == sum(count for latency, count in report.latencies.items() if latency > freeze)
    starved = [sent for period, sent in simulation.sent if sent != pytest.approx(period)]
    assert len(starved) == report.starved <= 300
    if max(latencies) <= freeze:
        assert report.starved == report.late == 0
    assert all(later - earlier >= every for earlier, later in zip(simulation.calls[1:], simulation.calls[2:], strict=False))


def test_the_new_chunk_takes_over_behind_the_frozen_part():
    simulation = Simulation(lambda call: 3, plan=lambda call, period: np.full((HORIZON, 1), call))
    simulation.run(periods=20, freeze=4, every=8)
    assert simulation.calls == [0, 8, 16]
    assert [action for _, action in simulation.sent] == [0] * 12 + [1] * 8


def test_blending_changes_linearly():
    simulation = Simulation(lambda call: 1, plan=lambda call, period: np.full((HORIZON, 1), 8.0 * call))
    simulation.run(periods=10, freeze=2, blend=3, every=5)
    assert [action for _, action in simulation.sent] == [0] * 7 + [2, 4, 6]


def test_a_late_chunk_is_used_where_it_is_when_it_comes():
    simulation = Simulation(lambda call: 9 if call == 1 else 2, horizon=12)
    report = simulation.run(periods=60, freeze=3, every=4)
    # The first chunk ends after period 11; the second, asked for in period 4, comes in period 13.
    assert [sent for sent in simulation.sent if sent[0] != sent[1]] == [(12, 11.0)]
    assert (report.starved, report.late, report.missed) == (1, 1, 0) and report.latencies.keys() == {9, 2}


def test_missed_periods_are_counted_left_out_and_the_phase_kept():
    simulation = Simulation(lambda call: 2)
    quick = simulation.act

    def act(action):
        if action[0] == 7:
            simulation.time += 2.5 * PERIOD  # periods 7, 8 end without an action; period 9 is half over
        quick(action)

    simulation.act = act
    report = simulation.run(periods=20, freeze=2)
    assert [action for _, action in simulation.sent] == [*range(8), *range(9, 20)]
    assert (report.actions, report.missed) == (19, 2)
    assert simulation.time - simulation.begin == pytest.approx(20 * PERIOD)


def test_an_inference_s_error_reaches_the_loop():
    def plan(call, period):
        if call == 1:
            raise RuntimeError("the server is gone")
        return np.zeros((HORIZON, 1))

    simulation = Simulation(lambda call: 3, plan=plan)
    with pytest.raises(RuntimeError, match="the server is gone"):
        simulation.run(periods=100, freeze=5)
    assert len(simulation.sent) == 8  # started in period 5, known in period 8


@pytest.mark.parametrize("options", [
    {"freeze": 0}, {"freeze": 5, "every": 4}, {"freeze": 5, "blend": 6}, {"freeze": 5, "blend": -1},
])  # fmt: skip
def test_periods_that_do_not_fit_each_other(options):
    with pytest.raises(RealtimeError, match="1 <= freeze <= every, 0 <= blend <= every"):
        ChunkStream(None, **options)


def test_periods_that_do_not_fit_the_chunks():
    simulation = Simulation(lambda call: 1, horizon=20)
    with pytest.raises(
        RealtimeError, match="every 9 [+] freeze 9 [+] blend 3 = 21 periods, but the policy's chunks have 20 actions"
    ):
        simulation.run(periods=1, freeze=9, blend=3)
    assert Simulation(lambda call: 1, horizon=21).run(periods=100, freeze=9, blend=3).starved == 0


def test_with_a_thread_and_the_machine_s_clock():
    """Without bounds on times, as the machine may be busy: the loop goes on while the engine works."""
    sent, calls, go = [], itertools.count(), threading.Event()

    def infer(observation):
        assert observation["call"] == 0 or go.wait(10)
        return {"actions": np.full((500, 2), observation["call"])}

    def act(action):
        sent.append(action[0])
        if len(sent) == 30:
            go.set()

    report = control_loop(ChunkStream(infer, freeze=2), lambda: {"call": next(calls)}, act, rate=500, periods=150)
    assert sent[:30] == [0] * 30 and sent[-1] >= 1 and sent == sorted(sent)
    assert len(sent) == report.actions <= 150 <= report.actions + report.missed and report.starved == 0
    assert report.late >= 1 and max(report.latencies) >= 27
