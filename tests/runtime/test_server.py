"""The server as openpi's own client sees it, over loopback. (The Makefile installs openpi-client.)"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import typer.main
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from prometheus_client import generate_latest
from websockets.exceptions import ConnectionClosed, InvalidStatus

import duq.runtime
from duq.compiler.quant.recipe import DEFAULT_PRESET
from duq.runtime import serve_cli
from duq.runtime.command_line import PANEL
from duq.runtime.errors import EngineError, PlanError
from duq.runtime.messages import pack, unpack
from duq.runtime.metrics import ERROR_KINDS, REFUSAL_KINDS, Metrics
from duq.runtime.server import PlanWatch
from duq.runtime.server_limits import Limits
from duq.tools import bench_server
from tests.support.observations import libero
from tests.support.serving import FakePolicy, serving, wait_until


@pytest.fixture
def policy():
    return FakePolicy()


@pytest.fixture
def served(policy):
    with serving(policy) as served:
        yield served
        policy.gate.set()


class Background(threading.Thread):
    """Runs `function` in a thread; `result()` joins it and gives its value or raises its error."""

    def __init__(self, function, *arguments):
        super().__init__(daemon=True)
        self._job, self._value, self._error = (function, arguments), None, None
        self.start()

    def run(self):
        function, arguments = self._job
        try:
            self._value = function(*arguments)
        except (RuntimeError, ConnectionClosed) as error:
            self._error = error

    def result(self):
        self.join(10)
        assert not self.is_alive()
        if self._error:
            raise self._error
        return self._value


def in_turn(served, value):
    """Another client still gets its own actions."""
    assert served.client().infer({"value": value})["actions"][0, 0] == value


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_the_same_actions_as_a_bare_infer(tiny_plans):
    plan = tiny_plans("pi0", DEFAULT_PRESET).plan
    bare, policy = duq.runtime.Policy(plan, threads=1, seed=3), duq.runtime.Policy(plan, threads=1, seed=3)
    observations = [libero() | {"observation/state": np.full(8, value, np.float32)} for value in (-0.5, 0.1, 0.9)]
    with serving(policy) as served:
        client = served.client()
        assert client.get_server_metadata() == bare.metadata
        for index, observation in enumerate(observations):
            expected, reply = bare.infer(observation), client.infer(observation)
            assert np.array_equal(reply["actions"], expected["actions"]) and reply["actions"].dtype == np.float32
            assert reply["policy_timing"].keys() == expected["policy_timing"].keys()
            timing = reply["server_timing"]
            assert timing["infer_ms"] >= reply["policy_timing"]["infer_ms"] > 0 and timing["queue_ms"] >= 0
            assert ("prev_total_ms" in timing) == (index > 0)


def test_action_chunk_broker(served, policy):
    broker = ActionChunkBroker(served.client(), action_horizon=3)
    steps = [broker.infer({"value": value})["actions"] for value in range(6)]
    assert policy.calls == [0, 3]
    assert [step.tolist() for step in steps] == [[v, v] for v in (0, 1, 2, 3, 4, 5)]
    broker.reset()
    assert broker.infer({"value": 9})["actions"].tolist() == [9, 9]


def test_clients_are_not_mixed(served, policy):
    def converse(number):
        client = served.client()
        return [client.infer({"value": 100 * number + i})["actions"][0, 0] for i in range(20)]

    clients = [Background(converse, number) for number in range(6)]
    for number, client in enumerate(clients):
        assert client.result() == [100 * number + i for i in range(20)]
    assert len(policy.calls) == 120 and served.metric("duq_requests_total") == 120


def test_a_greedy_client_does_not_keep_others_waiting(served, policy):
    policy.gate.clear()
    greedy = served.raw()
    for value in range(8):
        greedy.send(pack({"value": value}))
    wait_until(lambda: policy.calls == [0])
    polite = [Background(served.client().infer, {"value": 100 + i}) for i in range(2)]
    wait_until(lambda: served.metric("duq_queue_depth") == 3)
    policy.gate.set()
    for i, client in enumerate(polite):
        assert client.result()["actions"][0, 0] == 100 + i
    assert [unpack(greedy.recv())["actions"][0, 0] for _ in range(8)] == list(range(8))
    assert sorted(policy.calls[1:3]) == [100, 101] and policy.calls[3:] == list(range(1, 8))
    assert served.metric("duq_queue_depth") == 0
    greedy.close()


def test_pings_health_and_metrics_are_answered_while_a_call_runs(served, policy):
    policy.gate.clear()
    connection = served.raw()
    connection.send(pack({"value": 1}))
    wait_until(lambda: policy.calls)
    assert connection.ping().wait(5)
    assert served.get("/healthz") == "OK\n" and served.metric("duq_queue_depth") == 1
    policy.gate.set()
    assert unpack(connection.recv())["actions"][0, 0] == 1
    connection.close()


def test_metrics(served):
    client = served.client()
    for _ in range(3):
        client.infer({"value": 1})
    with pytest.raises(RuntimeError):
        client.infer({})
    assert served.metric("duq_requests_total") == 3 and served.metric("duq_clients") == 1
    for stage, seconds in (("prefix", 0.01), ("denoise", 0.02), ("infer", 0.03)):
        assert served.metric(f'duq_stage_seconds_sum{{stage="{stage}"}}') == pytest.approx(3 * seconds)
    for stage in ("queue", "decode"):
        assert served.metric(f'duq_stage_seconds_count{{stage="{stage}"}}') == 3
    assert (
        served.metric('duq_errors_total{kind="observation"}') == 1
        and served.metric('duq_errors_total{kind="internal"}') == 0
    )
    assert served.metric("process_resident_memory_bytes") > 0


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_bad_observation_is_that_client_s_error_and_its_connection_lives(served):
    client = served.client()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Error in inference server:\nObservationError: observation lacks 'value'$"):
            client.infer({"other": 1})
    assert client.infer({"value": 5})["actions"][0, 0] == 5


@pytest.mark.parametrize("message, error", [
    (b"\xc1 garbage", "is not msgpack"),
    ("text", "is a text frame"),
    (pack({"value": 1})[:-1], "incomplete input"),
    (pack({"value": np.zeros(2, "<i8")}).replace(b"<i8", b"|O8"), r"dtype '\|O8'"),
    (pack({"value": np.zeros(2, "<i8")}).replace(b"<i8", b"<i4"), r"has 16 bytes, but int32 \[2\] takes 8"),
], ids=["garbage", "text", "cut", "object", "size"])  # fmt: skip
def test_a_malformed_message_ends_its_connection_only(served, caplog, message, error):
    other, connection = served.client(), served.raw()
    connection.send(message)
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(connection.recv(5))
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(5)
    assert closed.value.rcvd.code == 1003
    assert other.infer({"value": 2})["actions"][0, 0] == 2
    assert served.metric('duq_errors_total{kind="malformed"}') == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_breach_of_the_websocket_protocol(served):
    connection = served.raw()
    connection.socket.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(5)
    assert closed.value.rcvd.code == 1002
    wait_until(lambda: served.metric('duq_errors_total{kind="malformed"}') == 1)
    in_turn(served, 1)


def test_an_error_of_the_engine_is_told_with_its_traceback(served, policy):
    client, other = served.client(), served.client()
    with pytest.raises(RuntimeError, match="(?s)Traceback.*in infer.*ZeroDivisionError: inside the engine"):
        client.infer({"value": "bug"})
    with pytest.raises(ConnectionClosed) as closed:
        client.infer({"value": 1})
    assert closed.value.rcvd.code == 1011
    assert other.infer({"value": 2})["actions"][0, 0] == 2
    assert served.metric('duq_errors_total{kind="internal"}') == 1


@pytest.mark.parametrize(
    "error", [EngineError("engine.plan: must be opened again"), PlanError("engine.plan: was written to")]
)
def test_a_policy_that_can_answer_no_more_says_so_in_a_line_and_is_not_healthy(served, policy, error):
    def fail(*arguments):
        raise error

    assert served.get("/healthz") == "OK\n"
    policy.infer = policy.check = fail
    client = served.client()
    with pytest.raises(RuntimeError, match=f"{type(error).__name__}: {error}$") as told:
        client.infer({"value": 1})
    assert "Traceback" not in str(told.value)
    with pytest.raises(ConnectionClosed, match="1011"):
        client.infer({"value": 1})
    with pytest.raises(urllib.error.HTTPError, match="503") as unhealthy:
        served.get("/healthz")
    assert unhealthy.value.read().decode() == f"{error}\n"
    del policy.infer, policy.check
    assert served.get("/healthz") == "OK\n"
    in_turn(served, 1)


def test_actions_outside_of_the_limits_are_counted(served, policy):
    policy.outside_limits = {"gripper": 3, "shoulder": 1}
    assert served.metric('duq_outside_limits_total{action="gripper"}') == 3


@pytest.mark.parametrize("size", [100_001, 30_000_000])
def test_an_oversized_message(policy, size):
    with serving(policy, limits=Limits(message_bytes=100_000)) as served:
        client, other = served.client(), served.client()
        with pytest.raises(ConnectionClosed, match=r"1009 \(message too big\).*limit of 100000 bytes"):
            client.infer({"value": 1, "image": np.zeros(size, np.uint8)})
        assert other.infer({"value": 2, "image": np.zeros(99_000, np.uint8)})["actions"][0, 0] == 2
        wait_until(lambda: served.metric('duq_errors_total{kind="oversized"}') == 1)
        assert policy.calls == [2]


def test_clients_that_die_in_mid_call(served, policy):
    policy.gate.clear()
    dying = [served.raw() for _ in range(3)]
    for number, connection in enumerate(dying):
        connection.send(pack({"value": number}))
        wait_until(lambda depth=number + 1: served.metric("duq_queue_depth") == depth)
    survivor = Background(served.client().infer, {"value": 7})
    wait_until(lambda: served.metric("duq_queue_depth") == 4)
    dying[0].socket.shutdown(socket.SHUT_RDWR)
    dying[1].socket.shutdown(socket.SHUT_RDWR)
    dying[2].close()
    wait_until(lambda: served.metric('duq_errors_total{kind="disconnected"}') == 3)
    policy.gate.set()
    assert survivor.result()["actions"][0, 0] == 7
    assert policy.calls == [0, 7]  # what waited for the engine was dropped
    assert served.metric("duq_clients") == 1 and served.metric("duq_queue_depth") == 0


def test_api_key(policy):
    with serving(policy, api_key="sesame-ö") as served:
        in_turn_key = {"Authorization": "Api-Key sesame-ö".encode().decode("latin1")}
        assert served.client(api_key="sesame-ö").infer({"value": 1})["actions"][0, 0] == 1
        for key in (None, "wrong", "sesame-ö ö", "sesame-"):
            with pytest.raises(InvalidStatus, match="HTTP 401") as refused:
                served.client(api_key=key)
            assert b"wrong or no API key" in refused.value.response.body
        assert served.get("/healthz") == "OK\n"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            served.get("/metrics")
        assert 'duq_errors_total{kind="unauthorized"} 5.0' in served.get("/metrics", **in_turn_key)


def test_web_pages_are_refused(served):
    with pytest.raises(InvalidStatus, match="HTTP 403"):
        served.raw(origin="http://127.0.0.1:8000")
    in_turn(served, 1)


# --- another plan ----------------------------------------------------------------------------------------------------


def replace(path, text):
    """As duq-compile does it: by a rename."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def reloads(served, outcome) -> float:
    return served.metric(f'duq_reloads_total{{outcome="{outcome}"}}')


def test_a_replaced_plan_is_taken_without_a_gap(policy, tmp_path, caplog):
    caplog.set_level("INFO")
    plan = tmp_path / "engine.plan"
    replace(plan, "one")
    watch = PlanWatch(plan, seconds=0.05)
    replace(plan, "another")  # before the server runs, after the watch was made
    with serving(policy, watch=watch) as served:
        client = served.client()
        wait_until(lambda: reloads(served, "ok") == 1)
        for number in range(2, 5):
            assert client.infer({"value": number})["actions"][0, 0] == number
            replace(plan, "x" * number)
            wait_until(lambda number=number: reloads(served, "ok") == number)
        assert client.infer({"value": 9})["actions"][0, 0] == 9
        assert served.metric(f'duq_plan_info{{fingerprint="{4:016x}"}}') == 1
        assert "0123456789abcdef" not in served.get("/metrics")
        assert served.client().get_server_metadata()["checkpoint"] == f"{4:016x}"
        plan.unlink()
        time.sleep(0.2)
        assert policy.reloads == 4 and f"{plan} was replaced" in caplog.text


@pytest.mark.parametrize("error", [PlanError("engine.plan: is cut short"), MemoryError(), ZeroDivisionError("a bug")])
def test_a_plan_that_cannot_be_used_leaves_the_running_one(policy, tmp_path, caplog, error):
    def fail():
        raise error

    policy.reload = fail
    plan = tmp_path / "engine.plan"
    replace(plan, "one")
    with serving(policy, watch=PlanWatch(plan, seconds=0.05)) as served:
        client = served.client()
        replace(plan, "bad")
        wait_until(lambda: reloads(served, "failed") == 1)
        time.sleep(0.2)
        assert reloads(served, "failed") == 1  # once for each file
        assert client.infer({"value": 1})["actions"][0, 0] == 1
        assert served.metric('duq_plan_info{fingerprint="0123456789abcdef"}') == 1
        del policy.reload
        replace(plan, "good again")
        wait_until(lambda: reloads(served, "ok") == 1)
    said = [record for record in caplog.records if "the plan was not loaded again, the running one goes on" in record.msg]
    assert len(said) == 1 and (str(error) or "MemoryError") in said[0].getMessage()
    assert bool(said[0].exc_info) == (not isinstance(error, PlanError))


def test_calls_go_on_while_a_plan_is_loaded(policy):
    loading = threading.Event()
    policy.reload = lambda: loading.wait(10)
    with serving(policy) as served:
        client = served.client()
        served.loop.call_soon_threadsafe(served.server.reload)
        for number in range(5):
            assert client.infer({"value": number})["actions"][0, 0] == number
        assert reloads(served, "ok") == 0
        loading.set()
        wait_until(lambda: reloads(served, "ok") == 1)


def test_the_server_ends_while_a_plan_is_loaded(policy, caplog):
    loading = threading.Event()
    policy.reload = lambda: loading.wait(10)
    with serving(policy, limits=Limits(stop_seconds=0.3)) as served:
        served.loop.call_soon_threadsafe(served.server.reload)
        served.client()
        start = time.monotonic()
        served.stop()
        served.thread.join(10)
        assert not served.thread.is_alive() and time.monotonic() - start < 3
        assert served.server.abandoned and "loading the plan still runs and is given up" in caplog.text
        loading.set()


# --- the end ---------------------------------------------------------------------------------------------------------


def test_stopping_answers_what_was_asked(policy):
    with serving(policy) as served:
        policy.gate.clear()
        idle, busy = served.raw(), [served.client() for _ in range(3)]
        calls = [Background(client.infer, {"value": value}) for value, client in enumerate(busy)]
        wait_until(lambda: served.metric("duq_queue_depth") == 3)
        served.stop()
        with pytest.raises(ConnectionClosed, match="1001.*the server shuts down"):
            idle.recv(5)
        with pytest.raises(OSError):
            served.raw()
        policy.gate.set()
        assert [call.result()["actions"][0, 0] for call in calls] == [0, 1, 2]
        served.thread.join(10)
        assert not served.thread.is_alive()
        with pytest.raises(ConnectionClosed, match="1001"):
            busy[0].infer({"value": 1})


SLOW = """
import socket, sys, time
import numpy as np
from duq.runtime import serve_cli

class Policy:
    metadata = {"robot": "none"}
    fingerprint = "0"
    outside_limits = {}
    def __init__(self, plan, **options): self.port = int(sys.argv[-1])
    def warmup(self): self.refused = bool(socket.socket().connect_ex(("127.0.0.1", self.port)))
    def infer(self, obs):
        time.sleep(obs.get("seconds", 0.5))
        return {"actions": np.array([self.refused, self.reloaded]), "policy_timing": {}}
    reloaded = False
    def reload(self): self.reloaded = True

serve_cli.Policy = Policy
serve_cli.main()
"""


@contextmanager
def duq_serve(*options):
    """(process, port) of duq-serve with the slow policy, once it listens; killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"DUQ_API_KEY": "k"}
    command = [sys.executable, "-c", SLOW, "engine.plan", *options, "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield process, port
    finally:
        process.kill()


def test_sighup_loads_the_plan_again_and_sigterm_drains_and_exits_with_0():
    with duq_serve() as (process, port):
        client = WebsocketClientPolicy("127.0.0.1", port, api_key="k")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        call = Background(client.infer, {})
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        # the port was closed while it warmed up; it has loaded the plan again
        assert call.result()["actions"].tolist() == [True, True]
        _, log = process.communicate(timeout=10)
    assert process.returncode == 0 and "Traceback" not in log and f"serving on 127.0.0.1:{port}" in log


def test_one_sigterm_ends_it_while_the_engine_hangs():
    """The interpreter would wait for the thread, which is in the engine."""
    with duq_serve("--stop-timeout", "0.5") as (process, port):
        client = WebsocketClientPolicy("127.0.0.1", port, api_key="k")
        call = Background(client.infer, {"seconds": 60})
        time.sleep(0.3)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=15)
        with pytest.raises(ConnectionClosed):
            call.result()
    assert process.returncode == 0 and time.monotonic() - start < 5 and "a call still runs and is given up" in log


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, environment, message", [
    (["--api-key", "a", "--api-key-file", "FILE"], None, "--api-key and --api-key-file: give the API key in one way"),
    (["--api-key", "a"], "b", r"--api-key and \$DUQ_API_KEY: give"),
    ([], "", r"\$DUQ_API_KEY: the API key is empty"),
    (["--api-key", "ö"], None, "--api-key: the API key must be one line of ASCII"),
    (["--api-key-file", "/nowhere"], None, "No such file or directory: '/nowhere'"),
    (["--port", "PORT"], None, r"--host 127.0.0.1 --port \d+: cannot be listened on \(Address already in use\)"),
    (["--port", "0"], None, "No such file"),
    (["--host", "no.such.host.invalid"], None, r"--host no.such.host.invalid --port 8000: cannot be listened on \(.*\)"),
    (["--port", "70000"], None, "--port"),
    (["--port", "-1"], None, "--port"),
    (["--host", "a..b"], None, r"--host a..b --port 8000: cannot be listened on \(.*\)"),
    (["--host", "x" * 300], None, r"cannot be listened on \(.*\)"),
    (["--host", " "], None, "--host: is empty; name an address"),
    (["--seed", "-1"], None, "--seed"),
    (["--record-limit", "nan"], None, "--record-limit"),
    (["--send-timeout", "inf"], None, "--send-timeout"),
    (["--stop-timeout", "0"], None, "--stop-timeout"),
    (["--max-clients", "0"], None, "--max-clients"),
    (["--max-clients", "99999999"], None, "take 100000095 open files, this process may open"),
])  # fmt: skip
def test_bad_options(command_line, tmp_path, monkeypatch, arguments, environment, message):
    monkeypatch.delenv("DUQ_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("DUQ_API_KEY", environment)
    (tmp_path / "key").write_text("key\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        replaced = {"FILE": str(tmp_path / "key"), "PORT": str(taken.getsockname()[1])}
        ran = command_line(serve_cli.main, tmp_path / "none.plan", *(replaced.get(each, each) for each in arguments))
    assert ran.code == 2 and "Traceback" not in ran.err
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(ran.err)


def test_a_missing_extra_is_named(command_line, monkeypatch):
    for module in ("duq.runtime.server", "duq.runtime.metrics"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    ran = command_line(serve_cli.main, "none.plan")
    assert (ran.code, ran.err) == (2, "error: duq-serve needs prometheus_client: pip install 'duq-vla[server]'\n")


@pytest.mark.parametrize("host, key, warns", [("0.0.0.0", None, True), ("0.0.0.0", "k", False), ("localhost", None, False)])
def test_a_server_open_to_everyone_is_warned_about(command_line, tmp_path, monkeypatch, caplog, host, key, warns):
    monkeypatch.delenv("DUQ_API_KEY", raising=False)
    options = ["--host", host, "--port", 0, *(["--api-key", key] if key else [])]
    assert command_line(serve_cli.main, tmp_path / "none.plan", *options).code == 2
    assert ("anyone who reaches 0.0.0.0 can use this policy: set $DUQ_API_KEY" in caplog.text) == warns


def test_api_key_sources(tmp_path, monkeypatch):
    monkeypatch.delenv("DUQ_API_KEY", raising=False)
    (tmp_path / "key").write_text(" from-file\n")
    assert serve_cli._api_key(None, None) is None
    assert serve_cli._api_key("given", None) == "given" and serve_cli._api_key(None, tmp_path / "key") == "from-file"
    monkeypatch.setenv("DUQ_API_KEY", "from-environment")
    assert serve_cli._api_key(None, None) == "from-environment"


# --- the bench -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, calls", [
    (["overhead", "--calls", 3, "--infer-ms", 50], r"Overhead of 3 calls"),
    (["soak", "--clients", 2, "--seconds", 1, "--infer-ms", 1], "2 clients for 1 s"),
])  # fmt: skip
def test_bench(command_line, arguments, calls):
    ran = command_line(bench_server.main, *arguments)
    assert ran.code == 0 and re.search(calls, ran.out)
    if "overhead" in arguments:
        assert float(re.search(r"│ ([0-9.]+) ", ran.out)[1]) < 50  # the policy's own time is not in it


def test_soak_beside_hostile_peers(command_line, tiny_plans):
    """The real engine: no reply is lost or mixed, nothing grows, and SIGTERM ends the server with its peers connected."""
    plan = tiny_plans("pi0", DEFAULT_PRESET).plan
    ran = command_line(bench_server.main, "soak", "--plan", plan, "--clients", 3, "--seconds", 5, "--hostile")
    assert ran.code == 0, ran.err
    values = {
        name: float(value) for name, value in re.findall(r"│ ([a-z0-9 ]+?) +│ (-?[0-9.]+) +│", ran.out, re.IGNORECASE)
    }
    assert values["errors"] == 0 and values["fewest"] >= 1 and values["refused"] > 20 and values["stop s"] < 15


def test_bench_tells_mixed_replies(command_line, monkeypatch):
    infer = WebsocketClientPolicy.infer
    monkeypatch.setattr(WebsocketClientPolicy, "infer", lambda self, obs: infer(self, obs | {"state": obs["state"] + 1}))
    ran = command_line(bench_server.main, "soak", "--clients", 1, "--seconds", 1)
    assert ran.code == 1 and "client 0: got the reply to another request" in ran.err


def test_bench_tells_what_the_server_keeps(command_line, monkeypatch):
    def grown(process):
        calls.append(process)
        return bench_server.Usage(100.0 * len(calls), len(calls), len(calls))

    calls = []
    monkeypatch.setattr(bench_server, "_usage", grown)
    monkeypatch.setattr(bench_server, "_settled", lambda process, before: grown(process))
    ran = command_line(bench_server.main, "soak", "--clients", 1, "--seconds", 1)
    assert ran.code == 1
    for what in (r"memory grew by \d+ MB", r"kept \d+ more files open", r"kept \d+ more threads"):
        assert re.search(what, ran.err)


def test_two_observations_with_the_same_actions_test_nothing(command_line, monkeypatch):
    monkeypatch.setattr(bench_server, "_observation", lambda value, cameras=3: {"state": np.zeros(8, np.float32)})
    ran = command_line(bench_server.main, "soak", "--clients", 1, "--seconds", 1)
    assert ran.code == 2 and "two observations have the same actions" in ran.err


# --- docs/serving.md -------------------------------------------------------------------------------------------------

DOCS, RELIABILITY = ((Path(__file__).parents[2] / "docs" / f"{name}.md").read_text() for name in ("serving", "reliability"))


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL), ids=["client", "real time"])
def test_examples_run(policy, monkeypatch, capsys, example):
    def infer(obs):
        assert set(libero()) - {"tokenized_prompt", "tokenized_prompt_mask"} | {"prompt"} == set(obs)
        return {"actions": np.zeros((50, 7), np.float32), "policy_timing": {"infer_ms": 1.0}}

    monkeypatch.setattr(policy, "infer", infer)
    with serving(policy) as served:
        exec(compile(example.replace("8000", str(served.port)), "example", "exec"), {})
    assert "(50, 7)" in capsys.readouterr().out or "control_loop" in example


def test_every_option_metric_and_limit_is_documented():
    documented = dict(re.findall(r"^\| `(--\S+)` \| (.*?) \|", DOCS, re.MULTILINE))
    options = [each for each in typer.main.get_command(serve_cli.app).params if each.param_type_name == "option"]
    options = [each for each in options if each.rich_help_panel != PANEL]  # every command has those
    assert list(documented) == [each.opts[0] for each in options]
    for each in options:
        shown = "off" if each.default is False else f"`{each.default}`"
        assert each.default is None or documented[each.opts[0]] == shown
    metrics = re.findall(r"^# TYPE (duq_\w+) ", generate_latest(Metrics().registry).decode(), re.MULTILINE)
    for name in (
        *metrics,
        *ERROR_KINDS,
        *REFUSAL_KINDS,
        serve_cli.API_KEY_VARIABLE,
        "/healthz",
        "code 1001",
        "1003",
        "1009",
        "1011",
    ):
        assert name in DOCS + RELIABILITY or name.endswith("_created"), name


def test_the_table_of_limits_has_their_options_and_defaults():
    rows = re.findall(r"^\| `(\w+)` \| `(--\S+)` \| (\d+)(.*?) \|", RELIABILITY, re.MULTILINE)
    defaults = {each.opts[0]: each.default for each in typer.main.get_command(serve_cli.app).params}
    scale = {" MiB": 1 << 20, "": 1, " s": 1}
    assert {name: int(number) * scale[unit] for name, _, number, unit in rows} == dataclasses.asdict(Limits())
    assert all(defaults[option] == int(number) for _, option, number, _ in rows)


def series(registry) -> dict[str, list[dict[str, str]]]:
    """Name of a series -> the labels of each of its samples."""
    found = {}
    for metric in registry.collect():
        for sample in metric.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_every_query_of_the_dashboard_finds_its_metrics_and_every_metric_is_on_it(served):
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    served.client().infer({"value": 1})
    there, shown = series(served.server.metrics.registry), set()
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for query in queries:
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        selectors = re.findall(r"\b((?:duq|process)_\w+)\{(.*?)\}", query)
        assert selectors
        shown |= {name for name, _ in selectors}
        for name, matchers in selectors:
            assert name in there, name
            labels = dict(re.findall(r'(\w+)="(.*?)"', matchers))
            assert any(labels.items() <= each.items() for each in there[name]), (name, labels)
            grouped = re.findall(r"by \((.*?)\)", query)
            for label in {each.strip() for group in grouped for each in group.split(",")} - {"instance"}:
                assert all(label in each for each in there[name]), (query, label)
    own = {re.sub("_(bucket|sum|count)$", "", name) for name in there if re.fullmatch("duq_(?!.*_created).*", name)}
    assert own == {re.sub("_(bucket|sum|count)$", "", name) for name in shown if name.startswith("duq_")}
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and all(x + w <= 24 for _, w, x, _ in places)


def test_the_runtime_needs_neither_torch_nor_the_compiler():
    code = "import duq.runtime.serve_cli, duq.runtime.server, duq.runtime.realtime, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "duq.runtime.server" in loaded and not {"torch", "onnx", "duq.compiler", "duq.tools", "openpi_client"} & set(
        loaded
    )
