"""A policy server in a thread of the test, and a policy for it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.sync.client import connect

from duq.runtime.errors import ObservationError
from duq.runtime.server import PolicyServer


class FakePolicy:
    """Answers with the observation's "value". `gate` holds calls back while it is cleared."""

    metadata = {"robot": "none", "action_horizon": 4}
    fingerprint = "0123456789abcdef"
    outside_limits = {"gripper": 0}

    def __init__(self):
        self.gate, self.calls, self.reloads = threading.Event(), [], 0
        self.gate.set()

    def infer(self, obs):
        if "value" not in obs:
            raise ObservationError("observation lacks 'value'")
        self.calls.append(obs["value"])
        assert self.gate.wait(10)
        if obs["value"] == "bug":
            raise ZeroDivisionError("inside the engine")
        actions = np.full((4, 2), obs["value"], np.float32) + np.arange(4, dtype=np.float32)[:, None]
        return {"actions": actions, "policy_timing": {"infer_ms": 30.0, "prefix_ms": 10.0, "denoise_ms": 20.0}}

    def check(self):
        pass

    def reload(self):
        self.reloads += 1
        self.fingerprint = f"{self.reloads:016x}"
        self.metadata = {**self.metadata, "checkpoint": self.fingerprint}


class Served:
    """A server in a thread, with its own event loop."""

    def __init__(self, policy, **options):
        self.server = PolicyServer(policy, **options)
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=asyncio.run, args=(self._run(),))
        self.thread.start()
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", self.port)) == 0)

    async def _run(self):
        self.loop = asyncio.get_running_loop()
        await self.server.run(self.listener)

    def stop(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.stop)

    def client(self, **options) -> WebsocketClientPolicy:
        return WebsocketClientPolicy("127.0.0.1", self.port, **options)

    def raw(self, **options):
        """A connection below the openpi client's, to misbehave on; the metadata is read."""
        connection = connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, **options)
        connection.recv()
        return connection

    def get(self, path, **headers) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.read().decode()

    def metric(self, name) -> float:
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        return float(lines[name])


@contextmanager
def serving(policy, **options):
    served = Served(policy, **options)
    try:
        yield served
    finally:
        served.stop()
        served.thread.join(20)
        assert not served.thread.is_alive()


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
