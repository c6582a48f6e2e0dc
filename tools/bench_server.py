"""What the server adds to a policy's own time, and whether it endures: `duq-bench-server --help`."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.bench_server()

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import command_app
from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.errors import ObservationError

if TYPE_CHECKING:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

WARM_UP = 20  # calls that are not counted
TASKS = 3  # observations that a client sends in turn
TOLERANCE = 1e-5  # of actions, against another process' same calls
THREADS = 2  # that a server may start when it is first used
app = command_app("Measure what duq-serve adds to a policy's own time, and whether it endures, with openpi-client.")
PlanOption = Annotated[Path | None, typer.Option("--plan", help="Serve this engine.plan, not a stand-in.")]
InferOption = Annotated[float, typer.Option("--infer-ms", min=0, help="Time that the stand-in takes for a call.")]


class Served:
    """What a server asks of a policy, beside its calls."""

    outside_limits: Mapping[str, int] = {}

    def check(self) -> None:
        pass

    def reload(self) -> None:
        pass


class StandIn(Served):
    """A policy that takes `infer_ms` without using a core, and answers with the observation's first state value."""

    metadata = {"action_horizon": 50}
    fingerprint = "stand-in"

    def __init__(self, infer_ms: float):
        self._seconds = infer_ms / 1e3

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        if "state" not in obs:
            raise ObservationError("observation lacks 'state'")
        if self._seconds:
            time.sleep(self._seconds)
        return {
            "actions": np.full((50, 32), obs["state"][0], np.float32),
            "policy_timing": {"infer_ms": self._seconds * 1e3},
        }


class Repeatable(Served):
    """A plan's policy whose actions depend on the observation alone: the noise is drawn by its seed, "noise_seed"."""

    def __init__(self, plan: Path):
        with one_line_errors():
            from duq.runtime.policy import Policy

            self._policy = Policy(plan)
            self._policy.warmup()
        self.metadata, self.fingerprint = self._policy.metadata, self._policy.fingerprint

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        if "noise_seed" not in obs:
            raise ObservationError("observation lacks 'noise_seed'")
        shape = self.metadata["action_horizon"], self.metadata["model_action_dim"]
        noise = np.random.default_rng(int(obs["noise_seed"])).standard_normal(shape, np.float32)
        return self._policy.infer({key: value for key, value in obs.items() if key != "noise_seed"}, noise)


@app.command()
def overhead(
    plan: PlanOption = None,
    infer_ms: InferOption = 0.0,
    calls: Annotated[int, typer.Option(min=1)] = 2000,
    cameras: Annotated[int, typer.Option(min=1, max=3, help="Of 224 x 224.")] = 3,
) -> None:
    """Print how much longer a call takes through the server, on loopback, than the policy's infer in it."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    with _serving(plan, infer_ms) as (port, _):
        client, times = WebsocketClientPolicy("127.0.0.1", port), []
        observation = _observation(0.0, cameras) | {"noise_seed": 0}
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
    hostile: Annotated[
        bool, typer.Option("--hostile", help="Beside peers that mean ill: see duq/tools/hostile.py.")
    ] = False,
) -> None:
    """Let clients call without pause; print latencies and what the server has grown by. Exits with 1 after an error.

    An error is also a reply to another request, growth of memory, open files or threads, and a server that SIGTERM does not
    end in 15 s, with its hostile peers connected.
    """
    import openpi_client.websocket_client_policy  # noqa: F401  # where it is missing, before there are threads to say so

    from duq.tools.hostile import hostile_peers

    tasks = _tasks(plan, infer_ms, clients)
    with _serving(plan, infer_ms) as (port, process), ExitStack() as peers:
        before = _usage(process)
        if hostile:
            peers.enter_context(hostile_peers(port))
        end = time.monotonic() + seconds
        robots = [Robot(port, number, end, task) for number, task in enumerate(tasks)]
        memory = [before.megabytes]
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 20))
            memory.append(_usage(process).megabytes)
        for robot in robots:
            robot.join()
        peers.close()
        after = _settled(process, before)
        refused = _refusals(port)
        with hostile_peers(port) if hostile else nullcontext():
            time.sleep(2.0 if hostile else 0.0)
            stopped = _stop_seconds(process)
    errors = [robot.error for robot in robots if robot.error]
    fifth = max(1, len(memory) // 5)  # every client has connected and called by then
    growth = float(np.median(memory[-fifth:]) - np.median(memory[fifth : 2 * fifth]))
    files, threads = after.files - before.files, after.threads - before.threads
    errors += [
        text
        for text, wrong in {
            f"the server's memory grew by {growth:.0f} MB": growth > 20 + 0.1 * memory[fifth],
            f"the server kept {files} more files open": files > 0,
            f"the server kept {threads} more threads": threads > THREADS,
            f"SIGTERM ended the server in {stopped:.1f} s with exit code {process.exitcode}": stopped > 15
            or process.exitcode,
        }.items()
        if wrong
    ]
    times = np.concatenate([robot.milliseconds for robot in robots])
    p50, p99 = np.percentile(times, [50, 99]) if times.size else (np.nan, np.nan)
    table = Table(
        title=f"{clients} clients for {seconds:.0f} s" + " beside hostile peers" * hostile,
        title_justify="left",
        show_header=False,
    )
    for name, value in {
        "calls": len(times), "errors": len(errors), "fewest": min(len(robot.milliseconds) for robot in robots),
        "p50 ms": p50, "p99 ms": p99, "max ms": times.max(initial=0.0),
        "server MB": memory[-1], "peak MB": max(memory), "growth MB": growth, "files": files, "threads": threads,
        "refused": refused, "stop s": stopped,
    }.items():  # fmt: skip
        table.add_row(name, _shown(value))
    Console().print(table)
    for error in errors:
        typer.echo(error, err=True)
    if errors:
        raise typer.Exit(1)


class Task(NamedTuple):
    """An observation, and the actions that it alone determines: float32 [H, A]."""

    observation: dict[str, Any]
    actions: np.ndarray


def _tasks(plan: Path | None, infer_ms: float, clients: int) -> list[list[Task]]:
    """Each client's tasks. No two have the same actions, so that a reply to another request is found out."""
    policy = StandIn(infer_ms) if plan is None else Repeatable(plan)
    tasks = []
    for number in range(clients * TASKS):
        observation = _observation(number / 1024) | {"noise_seed": number}
        tasks.append(Task(observation, policy.infer(observation)["actions"]))
    flat = np.array([task.actions.ravel() for task in tasks])
    nearest = min(np.abs(flat[i] - flat[:i]).max(1).min() for i in range(1, len(flat)))
    if nearest < 10 * TOLERANCE:
        raise DuqError(f"{plan}: two observations have the same actions to {nearest:.1g}; mixed replies would not be seen")
    return [tasks[start : start + TASKS] for start in range(0, len(tasks), TASKS)]


class Robot(threading.Thread):
    """A client that calls until `end`, and stops at its first error."""

    def __init__(self, port: int, number: int, end: float, tasks: list[Task]):
        super().__init__()
        self.milliseconds: list[float] = []
        self.error = ""
        self._port, self._number, self._end, self._tasks = port, number, end, tasks
        self.start()

    def run(self) -> None:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy
        from websockets.exceptions import ConnectionClosed

        try:
            client = WebsocketClientPolicy("127.0.0.1", self._port)
            with client._ws:  # which it never closes
                while time.monotonic() < self._end and not self.error:
                    self._call(client, self._tasks[len(self.milliseconds) % len(self._tasks)])
        except (RuntimeError, OSError, ConnectionClosed) as error:
            self.error = f"client {self._number}: {error}"

    def _call(self, client: WebsocketClientPolicy, task: Task) -> None:
        start = time.perf_counter()
        reply = client.infer(task.observation)
        self.milliseconds.append((time.perf_counter() - start) * 1e3)
        if not np.allclose(reply["actions"], task.actions, rtol=0, atol=TOLERANCE):
            self.error = f"client {self._number}: got the reply to another request"


class Usage(NamedTuple):
    """What a process uses, as Linux counts it."""

    megabytes: float
    threads: int
    files: int


def _usage(process: BaseProcess) -> Usage:
    folder = Path(f"/proc/{process.pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Usage(int(status["VmRSS"].split()[0]) / 1e3, int(status["Threads"]), len(list((folder / "fd").iterdir())))


def _settled(process: BaseProcess, before: Usage) -> Usage:
    """What it uses once the connections of clients that have left are gone, which takes some seconds."""
    end = time.monotonic() + 15
    while (usage := _usage(process)).files > before.files and time.monotonic() < end:
        time.sleep(0.1)
    return usage


def _stop_seconds(process: BaseProcess) -> float:
    """How long it takes to end after SIGTERM; it is killed after a minute."""
    start = time.monotonic()
    process.terminate()
    process.join(60)
    return time.monotonic() - start


def _refusals(port: int) -> int:
    return int(sum(map(float, re.findall(r"^duq_refusals_total\S* (\S+)", _get(port, "/metrics"), re.MULTILINE))))


@contextmanager
def _serving(plan: Path | None, infer_ms: float) -> Iterator[tuple[int, BaseProcess]]:
    """The port and the process of a server, as it is in use."""
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
        yield port, process
    finally:
        process.terminate()
        process.join(20)
        process.kill()


def _serve(listener: socket.socket, plan: Path | None, infer_ms: float) -> None:
    from duq.runtime.serve_cli import run_until_signal
    from duq.runtime.server import PolicyServer

    server = PolicyServer(StandIn(infer_ms) if plan is None else Repeatable(plan))
    asyncio.run(run_until_signal(server, listener))
    if server.abandoned:
        os._exit(0)


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


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
        return response.read().decode()


def _print_table(title: str, row: dict[str, float]) -> None:
    table = Table(*row, title=title, title_justify="left")
    table.add_row(*map(_shown, row.values()))
    Console().print(table)


def _shown(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    with one_line_errors():
        app()
