"""What the server adds to a policy's own time, and whether it endures: `duq-bench-server --help`."""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.bench_server()

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import command_app
from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.policy import Policy

WARM_UP = 20  # calls that are not counted
app = command_app("Measure what duq-serve adds to a policy's own time, and whether it endures, with openpi-client.")
PlanOption = Annotated[Path | None, typer.Option("--plan", help="Serve this engine.plan, not a stand-in.")]
InferOption = Annotated[float, typer.Option("--infer-ms", min=0, help="Time that the stand-in takes for a call.")]


class StandIn:
    """A policy that takes `infer_ms` without using a core, and answers with the observation's first state value."""

    metadata = {"action_horizon": 50}

    def __init__(self, infer_ms: float):
        self._seconds = infer_ms / 1e3

    def infer(self, obs: dict) -> dict:
        if self._seconds:
            time.sleep(self._seconds)
        return {
            "actions": np.full((50, 32), obs["state"][0], np.float32),
            "policy_timing": {"infer_ms": self._seconds * 1e3},
        }


@app.command()
def overhead(
    plan: PlanOption = None,
    infer_ms: InferOption = 0.0,
    calls: Annotated[int, typer.Option(min=1)] = 2000,
    cameras: Annotated[int, typer.Option(min=1, max=3, help="Of 224 x 224.")] = 3,
) -> None:
    """Print how much longer a call takes through the server, on loopback, than the policy's infer in it."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    with _serving(plan, infer_ms) as port:
        client, observation, times = WebsocketClientPolicy("127.0.0.1", port), _observation(0.0, cameras), []
        for _ in range(WARM_UP + calls):
            start = time.perf_counter()
            reply = client.infer(observation)
            times.append((time.perf_counter() - start) * 1e3 - reply["server_timing"]["infer_ms"])
    p50, p90, p99, longest = np.percentile(times[WARM_UP:], [50, 90, 99, 100])
    title = f"Overhead of {calls} calls, {cameras} cameras"
    _print_table(title, {"p50 ms": p50, "p90 ms": p90, "p99 ms": p99, "max ms": longest})


@app.command()
def soak(
    plan: PlanOption = None,
    infer_ms: InferOption = 20.0,
    clients: Annotated[int, typer.Option(min=1)] = 8,
    seconds: Annotated[float, typer.Option(min=1)] = 600.0,
) -> None:
    """Let clients call without pause; print errors, latencies and the server's memory. Exits with 1 after an error."""
    import openpi_client.websocket_client_policy  # noqa: F401  # where it is missing, before there are threads to say so

    with _serving(plan, infer_ms) as port:
        end = time.monotonic() + seconds
        robots = [Robot(port, number, end, checks_reply=plan is None) for number in range(clients)]
        memory = [_resident_mb(port)]
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 20))
            memory.append(_resident_mb(port))
        for robot in robots:
            robot.join()
        settled = memory[len(memory) // 5]  # every client has connected and called by then
    times = np.concatenate([robot.milliseconds for robot in robots])
    errors = [robot.error for robot in robots if robot.error]
    p50, p99 = np.percentile(times, [50, 99])
    _print_table(f"{clients} clients for {seconds:.0f} s", {
        "calls": len(times), "errors": len(errors), "fewest": min(len(robot.milliseconds) for robot in robots),
        "p50 ms": p50, "p99 ms": p99, "max ms": times.max(),
        "server MB": memory[-1], "growth MB": memory[-1] - settled,
    })  # fmt: skip
    for error in errors:
        typer.echo(error, err=True)
    if errors:
        raise typer.Exit(1)


class Robot(threading.Thread):
    """A client that calls until `end`, and stops at its first error."""

    def __init__(self, port: int, number: int, end: float, checks_reply: bool):
        super().__init__()
        self.milliseconds: list[float] = []
        self.error = ""
        self._port, self._number, self._end, self._checks_reply = port, number, end, checks_reply
        self.start()

    def run(self) -> None:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy

        client = WebsocketClientPolicy("127.0.0.1", self._port)
        while time.monotonic() < self._end and not self.error:
            value = self._number + len(self.milliseconds) / 2**20
            observation = _observation(value)
            start = time.perf_counter()
            try:
                reply = client.infer(observation)
            except (RuntimeError, OSError) as error:
                self.error = f"client {self._number}: {error}"
                return
            self.milliseconds.append((time.perf_counter() - start) * 1e3)
            if self._checks_reply and reply["actions"][0, 0] != np.float32(value):
                self.error = f"client {self._number}: got the reply to another request"


@contextmanager
def _serving(plan: Path | None, infer_ms: float) -> Iterator[int]:
    """The port of a server in a process of its own, as it is in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(listener, plan, infer_ms), daemon=True)
        process.start()
    try:
        while not _healthy(port):
            if not process.is_alive():
                raise typer.Exit(2)
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.join()


def _serve(listener: socket.socket, plan: Path | None, infer_ms: float) -> None:
    from duq.runtime.server import PolicyServer

    policy: Policy | StandIn = StandIn(infer_ms)
    if plan is not None:
        with one_line_errors():
            policy = opened = Policy(plan)
            opened.warmup()
    asyncio.run(PolicyServer(cast(Policy, policy)).run(listener))


def _observation(value: float, cameras: int = 3) -> dict:
    return {
        "image": {slot: np.zeros((224, 224, 3), np.uint8) for slot in IMAGE_SLOTS[:cameras]},
        "state": np.full(8, value, np.float32),
        "tokenized_prompt": np.arange(16),
        "tokenized_prompt_mask": np.ones(16, bool),
    }


def _healthy(port: int) -> bool:
    try:
        return _get(port, "/healthz") == "OK\n"
    except urllib.error.URLError:  # nobody listens yet
        return False


def _resident_mb(port: int) -> float:
    found = re.search(r"^process_resident_memory_bytes (\S+)", _get(port, "/metrics"), re.MULTILINE)
    assert found is not None  # the server publishes it
    return float(found[1]) / 1e6


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
        return response.read().decode()


def _print_table(title: str, row: dict[str, float]) -> None:
    table = Table(*row, title=title, title_justify="left")
    table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    with one_line_errors():
        app()
