"""What the server counts and times, in Prometheus' terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from duq.runtime.recording import OUTCOMES
from duq.runtime.server_limits import Limits

ERROR_KINDS = ("observation", "malformed", "oversized", "unauthorized", "disconnected", "internal")
# What is refused without being a request: by the limit that it exceeds, "http" (no request of a websocket), "handshake"
# (one that websockets does not accept, such as a web page's), "files" (no file descriptor is left to accept it with).
REFUSAL_KINDS = (*(field.name for field in dataclasses.fields(Limits)), "http", "handshake", "files")
RELOADS = ("ok", "failed")
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class _OutsideLimits(Collector):
    def __init__(self, counts: Callable[[], Mapping[str, int]]):
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        found = CounterMetricFamily(
            "duq_outside_limits", "Replies with actions outside of the robot's limits", labels=["action"]
        )
        for action, count in self._counts().items():
            found.add_metric([action], count)
        yield found


class Metrics:
    """One server's metrics, in a registry of their own together with the process' memory, CPU time and open files."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.clients = Gauge("duq_clients", "Connected clients", registry=self.registry)
        self.queue_depth = Gauge(
            "duq_queue_depth", "Requests that wait for the engine or run on it", registry=self.registry
        )
        self.requests = Counter("duq_requests", "Requests answered with actions", registry=self.registry)
        self._errors = Counter("duq_errors", "Requests and connections that failed", ["kind"], registry=self.registry)
        self._stages = Histogram(
            "duq_stage_seconds", "Time of a request by stage", ["stage"], registry=self.registry, buckets=_SECONDS
        )
        self._recordings = Counter(
            "duq_recordings", "Observations that --record was to write", ["outcome"], registry=self.registry
        )
        self.buffered = Gauge(
            "duq_buffered_bytes", "Bytes received from clients and not yet answered", registry=self.registry
        )
        self._limits = Gauge(
            "duq_limit", "The server's limits, in bytes, seconds or a number", ["limit"], registry=self.registry
        )
        self._refusals = Counter("duq_refusals", "Connections refused or cut", ["kind"], registry=self.registry)
        self._reloads = Counter("duq_reloads", "Attempts to load the plan again", ["outcome"], registry=self.registry)
        self._plan = Gauge("duq_plan_info", "1 for the plan that runs", ["fingerprint"], registry=self.registry)
        for kind in REFUSAL_KINDS:
            self._refusals.labels(kind)
        for outcome in RELOADS:
            self._reloads.labels(outcome)
        for outcome in OUTCOMES:
            self._recordings.labels(outcome)
        for kind in ERROR_KINDS:  # so that each is there, as zero, before it first happens
            self._errors.labels(kind)

    def error(self, kind: str) -> None:
        """Counts a failure of one of ERROR_KINDS."""
        self._errors.labels(kind).inc()

    def refusal(self, kind: str) -> None:
        """Counts a connection that was refused or cut, by one of REFUSAL_KINDS."""
        self._refusals.labels(kind).inc()

    def limits(self, limits: Limits) -> None:
        """Publishes the limits themselves."""
        for name, value in dataclasses.asdict(limits).items():
            self._limits.labels(name).set(value)

    def outside_limits(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Publishes how many chunks had actions outside of the robot's limits, by action, as `counts` says each time."""
        self.registry.register(_OutsideLimits(counts))

    def plan(self, fingerprint: str) -> None:
        """Says which plan runs from now on."""
        self._plan.clear()
        self._plan.labels(fingerprint).set(1)

    def reload(self, outcome: str) -> None:
        """Counts an attempt to load the plan again, by one of RELOADS."""
        self._reloads.labels(outcome).inc()

    def recording(self, outcome: str) -> None:
        """Counts an observation that was to be recorded, by one of recording.OUTCOMES."""
        self._recordings.labels(outcome).inc()

    def times(self, milliseconds: Mapping[str, float]) -> None:
        """Adds the stages of a call: {"prefix_ms": ..} counts as stage "prefix"."""
        for name, value in milliseconds.items():
            self._stages.labels(name.removesuffix("_ms")).observe(value / 1e3)
