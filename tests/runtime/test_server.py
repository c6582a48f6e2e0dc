"""The server as openpi's own client sees it, over loopback. (The Makefile installs openpi-client.)"""

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
from duq.runtime.messages import pack, unpack
from duq.runtime.metrics import ERROR_KINDS, Metrics
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
def test_a_malformed_message_ends_its_connection_only(served, message, error):
    other, connection = served.client(), served.raw()
    connection.send(message)
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(connection.recv(5))
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(5)
    assert closed.value.rcvd.code == 1003
    assert other.infer({"value": 2})["actions"][0, 0] == 2
    assert served.metric('duq_errors_total{kind="malformed"}') == 1


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


@pytest.mark.parametrize("size", [100_001, 30_000_000])
def test_an_oversized_message(policy, size):
    with serving(policy, max_message_bytes=100_000) as served:
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
    def __init__(self, plan, **options): self.port = int(sys.argv[-1])
    def warmup(self): self.refused = bool(socket.socket().connect_ex(("127.0.0.1", self.port)))
    def infer(self, obs): time.sleep(0.5); return {"actions": np.array([self.refused]), "policy_timing": {}}

serve_cli.Policy = Policy
serve_cli.main()
"""


def test_sigterm_drains_and_exits_with_0():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"DUQ_API_KEY": "k"}
    command = [sys.executable, "-c", SLOW, "engine.plan", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        client = WebsocketClientPolicy("127.0.0.1", port, api_key="k")
        call = Background(client.infer, {})
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert call.result()["actions"].tolist() == [True]  # and the port was closed while it warmed up
        _, log = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in log and f"serving on 127.0.0.1:{port}" in log


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


def test_bench_tells_mixed_replies(command_line, monkeypatch):
    infer = WebsocketClientPolicy.infer
    monkeypatch.setattr(WebsocketClientPolicy, "infer", lambda self, obs: infer(self, obs | {"state": obs["state"] + 1}))
    ran = command_line(bench_server.main, "soak", "--clients", 1, "--seconds", 1)
    assert ran.code == 1 and "client 0: got the reply to another request" in ran.err


# --- docs/serving.md -------------------------------------------------------------------------------------------------

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


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
    assert list(documented) == [each.opts[0] for each in options]
    for each in options:
        assert each.default is None or documented[each.opts[0]] == f"`{each.default}`"
    metrics = re.findall(r"^# TYPE (duq_\w+) ", generate_latest(Metrics().registry).decode(), re.MULTILINE)
    for name in (*metrics, *ERROR_KINDS, serve_cli.API_KEY_VARIABLE, "/healthz", "code 1001", "1003", "1009", "1011"):
        assert name in DOCS or name.endswith("_created"), name


def test_the_runtime_needs_neither_torch_nor_the_compiler():
    code = "import duq.runtime.serve_cli, duq.runtime.server, duq.runtime.realtime, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "duq.runtime.server" in loaded and not {"torch", "onnx", "duq.compiler", "duq.tools", "openpi_client"} & set(
        loaded
    )
