"""examples/ray_serve on a Ray of its own: two replicas, one of which is killed while clients call."""

import http.server
import importlib
import socket
import threading
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own use of pydantic is deprecated, in a hundred lines
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'duq-vla[examples]'")
    from ray import serve
    from ray.serve.schema import ServeApplicationSchema

from duq.runtime.messages import pack
from examples.ray_serve import client as client_module
from examples.ray_serve.client import RayServeClient
from examples.ray_serve.deployment import Arguments, PolicyReplica, app
from tests.support.observations import libero

ROOT = Path(__file__).parents[2]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# --- with Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tiny_plans):
    """Of two replicas on a tiny policy. They and Ray end with the module."""
    plan = tiny_plans("pi0", "none").plan
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    workers = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": workers})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(Arguments(plan=str(plan), threads=1)), name="policy")
        yield f"http://127.0.0.1:{port}/"
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> set[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in actors if "PolicyReplica" in actor["name"]}


def test_actions(url):
    reply = RayServeClient(url).infer(libero())
    assert reply["actions"].shape == (8, 7) and np.isfinite(reply["actions"]).all()
    assert reply["policy_timing"]["infer_ms"] > 0


def test_a_batch_is_one_request(url):
    replies = RayServeClient(url).infer_batch([libero(), libero(), libero()])
    assert [reply["actions"].shape for reply in replies] == [(8, 7)] * 3
    with pytest.raises(RuntimeError, match=r"ObservationError: item 1 of the batch: .*observation/image"):
        RayServeClient(url).infer_batch([libero(), {"prompt": "no camera"}])
    handle = serve.get_app_handle("policy").infer_batch.remote([libero(), libero()])
    assert len(handle.result(timeout_s=30)) == 2


def test_a_handle_takes_plain_dicts(url):
    reply = serve.get_app_handle("policy").infer.remote(libero()).result(timeout_s=30)
    assert reply["actions"].shape == (8, 7)


def test_what_is_wrong_with_a_request_is_told(url):
    with pytest.raises(RuntimeError, match="ObservationError: .*observation/image"):
        RayServeClient(url).infer({"prompt": "no camera"})
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        urllib.request.urlopen(url, b"\xc1 garbage")
    assert b"MessageError: message: is not msgpack" in refused.value.read()


def test_no_request_is_lost_when_a_replica_is_killed(url):
    asked, answered, end = [0] * 6, [], threading.Event()

    def robot(number: int) -> None:
        client = RayServeClient(url)
        while not end.is_set():
            asked[number] += 1
            answered.append(client.infer(libero())["actions"].shape)

    robots = [threading.Thread(target=robot, args=(number,)) for number in range(len(asked))]
    for each in robots:
        each.start()
    try:
        wait_until(lambda: len(answered) > 30)
        victim = min(replicas())
        ray.kill(ray.get_actor(victim, namespace="serve"))
        killed_at = len(answered)
        wait_until(lambda: len(answered) > killed_at + 60)
        wait_until(lambda: len(replicas() - {victim}) >= 2)  # it has been replaced
    finally:
        end.set()
        for each in robots:
            each.join(30)
    assert len(answered) == sum(asked) and set(answered) == {(8, 7)}


# --- without -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """(url, statuses): a server that gives each request the next of these statuses, and without one its number."""
    statuses, requests = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            requests.append(None)
            status = statuses.pop(0) if statuses else 200
            if status:  # otherwise the connection ends without an answer
                self.send_response(status)
                self.end_headers()
                self.wfile.write(pack({"requests": len(requests)}) if status == 200 else b"why")

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(client_module.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/", statuses
        server.shutdown()


def test_the_client_repeats_what_a_dying_replica_took(answers):
    url, statuses = answers
    statuses[:] = [500, 503, None]
    assert RayServeClient(url).infer({}) == {"requests": 4}


def test_the_client_does_not_repeat_a_refused_observation(answers):
    url, statuses = answers
    statuses[:] = [422]
    with pytest.raises(RuntimeError, match="Error in inference server:\nwhy"):
        RayServeClient(url).infer({})
    assert RayServeClient(url).infer({}) == {"requests": 2}


def test_the_client_gives_up(answers):
    url, statuses = answers
    statuses[:] = [500] * 3
    with pytest.raises(ConnectionError, match="no answer in 3 attempts; the last one failed with: why"):
        RayServeClient(url, attempts=3).infer({})


def test_a_hanging_engine_is_unhealthy(tiny_plans):
    replica = PolicyReplica.func_or_class(str(tiny_plans("pi0", "none").plan), 1, patience=0.05)
    replica.check_health()
    go = threading.Event()
    call = replica._worker.submit(replica._timed, go.wait)
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match="the engine hangs"):
        replica.check_health()
    go.set()
    assert call.result(10)
    replica.check_health()


def test_the_configuration_deploys_what_is_there():
    application = yaml.safe_load((ROOT / "examples/ray_serve/config.yaml").read_text())["applications"][0]
    Arguments(**application["args"])
    module, name = application["import_path"].split(":")
    assert getattr(importlib.import_module(module), name) is app
    assert app.__annotations__["arguments"] is Arguments  # as Ray needs it to make one from the file's args
    assert [each["name"] for each in application["deployments"]] == [PolicyReplica.name]
    ServeApplicationSchema.model_validate(application)
