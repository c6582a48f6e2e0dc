"""What duq-serve --record writes: through the real server, and the recorder alone."""

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duq.compiler.data import load_calibration
from duq.plugins.errors import DuqError
from duq.runtime import recording, serve_cli
from duq.runtime.observations import load_observations, save_observations
from duq.runtime.recording import Recorder
from tests.support.serving import FakePolicy, serving, wait_until


def observation(value: int) -> dict:
    rng = np.random.default_rng(value)
    return {
        "value": value,
        "images": {"cam_high": rng.integers(0, 256, (3, 8, 6), np.uint8)} if value % 2 else {},
        "left": {"camera": {"front": np.full((2, 2, 3), value, np.uint8)}},
        "observation/state": rng.standard_normal(4).astype(np.float32),
        "gripper": 0.25,
        "open": value % 2 == 0,
        "prompt": "öffne die Tür" if value else "",
    }


class Outcomes(list):
    """Counts as the server's metrics do."""

    def of(self, outcome: str) -> int:
        return sum(each == outcome for each in self)


def recorded(directory, observations, *, every=1, limit_bytes=1 << 30) -> Outcomes:
    """Offers them one by one, slowly enough for the queue."""
    recorder, outcomes = Recorder(directory, every=every, limit_bytes=limit_bytes), Outcomes()
    recorder.start(outcomes.append)
    for each in observations:
        wait_until(lambda: not recorder._waiting.full())
        recorder.offer(each)
    recorder.close()
    return outcomes


def without_empty(value):
    if not isinstance(value, dict):
        return value
    return {key: without_empty(inner) for key, inner in value.items() if not isinstance(inner, dict) or inner}


def test_through_the_server(tmp_path):
    """What clients sent and were answered comes back, of every second call; nothing else."""
    policy = FakePolicy()
    with serving(policy, recorder=Recorder(tmp_path / "new" / "record", every=2, limit_bytes=1 << 30)) as served:
        client = served.client()
        for value in range(6):
            client.infer(observation(value))
            with pytest.raises(RuntimeError):
                client.infer({"prompt": "no value"})  # refused by the policy: not recorded, not counted
        wait_until(lambda: served.metric('duq_recordings_total{outcome="written"}') == 3)
        assert served.metric('duq_recordings_total{outcome="failed"}') == 0
    found = load_observations(tmp_path / "new" / "record")
    np.testing.assert_equal(found, [without_empty(observation(value)) for value in (0, 2, 4)])
    assert [type(found[0][key]) for key in ("prompt", "open", "gripper")] == [str, np.bool_, np.float64]
    assert sorted(os.listdir(tmp_path / "new" / "record")) == [f"observation-{i:08}.npz" for i in range(3)]
    assert [row["value"] for row in load_calibration(tmp_path / "new" / "record", 2).observations] == [0, 4]


def test_it_goes_on_where_it_ended(tmp_path):
    assert recorded(tmp_path, map(observation, range(3))) == ["written"] * 3
    (tmp_path / ".observation-00000003.npz.1.tmp").write_bytes(b"of a server that was killed")
    save_observations(tmp_path / "mine.npz", [observation(100)])
    assert recorded(tmp_path, map(observation, range(3, 5))) == ["written"] * 2
    assert [row["value"] for row in load_observations(tmp_path)] == [100, 0, 1, 2, 3, 4]


def test_the_disk_limit_counts_what_is_there(tmp_path):
    recorded(tmp_path, [observation(1)])
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    outcomes = recorded(tmp_path, map(observation, range(3, 19, 2)), limit_bytes=int(4.5 * size))
    assert outcomes.of("written") == 3 and outcomes.of("disk_limit") == 5
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4.5 * size and len(load_observations(tmp_path)) == 4
    assert recorded(tmp_path, [observation(9)], limit_bytes=size) == ["disk_limit"] and len(os.listdir(tmp_path)) == 4


def test_a_slow_disk_never_holds_a_call_up(tmp_path, monkeypatch, caplog):
    gate = threading.Event()
    monkeypatch.setattr(
        recording, "save_observations", lambda *args, **more: (gate.wait(10), save_observations(*args, **more))
    )
    recorder, outcomes = Recorder(tmp_path, every=1, limit_bytes=1 << 30), Outcomes()
    recorder.start(outcomes.append)
    start = time.perf_counter()
    for value in range(50):
        recorder.offer(observation(value))
    assert time.perf_counter() - start < 1
    dropped = outcomes.of("queue_full")
    assert dropped in (50 - 8, 50 - 9)  # one may be with the writer already
    gate.set()
    recorder.close()
    assert outcomes.of("written") == 50 - dropped == len(load_observations(tmp_path))
    assert caplog.text.count("not recorded: the disk does not keep up") == 1


@pytest.mark.parametrize("bad", [{"x": None}, {"file": 1}, {"a//b": 1}, {"x": [[1], [1, 2]]}, {1: 2}, {"x": object()}])
def test_what_cannot_be_written_is_counted_and_told_once(tmp_path, caplog, bad):
    outcomes = recorded(tmp_path, [observation(0), bad, bad, observation(1)])
    assert outcomes == ["written", "failed", "failed", "written"] and len(load_observations(tmp_path)) == 2
    assert caplog.text.count("not recorded") == 1 and len(os.listdir(tmp_path)) == 2


def test_a_full_disk_and_a_bug_do_not_end_the_recording(tmp_path, monkeypatch, caplog):
    errors = iter([OSError(28, "No space left on device"), ZeroDivisionError()])

    def save(*args, **more):
        if error := next(errors, None):
            raise error
        save_observations(*args, **more)

    monkeypatch.setattr(recording, "save_observations", save)
    assert recorded(tmp_path, map(observation, range(3))) == ["failed", "failed", "written"]
    assert "No space left" in caplog.text and "ZeroDivisionError" in caplog.text


def test_two_servers_do_not_share_a_folder(tmp_path):
    first = Recorder(tmp_path, every=1, limit_bytes=1)
    with pytest.raises(DuqError, match="another server records into it"):
        Recorder(tmp_path, every=1, limit_bytes=1)
    first.close()
    Recorder(tmp_path, every=1, limit_bytes=1).close()


def test_the_folder_is_checked_at_the_start(command_line, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, message in ((tmp_path / "file", "is a file; name a directory"), ("/proc/none", "nothing can be written")):
        ran = command_line(serve_cli.main, tmp_path / "none.plan", "--port", 0, "--record", folder)
        assert ran.code == 2 and "--record" in ran.err and message in ran.err and "Traceback" not in ran.err


KEYS = st.sampled_from(["image", "images", "image_mask", "observation/image", "state", "left", "a/b"])
LEAVES = st.one_of(
    st.builds(np.ones, st.tuples(st.integers(0, 3)), st.sampled_from([np.uint8, np.float32, np.float64, bool])),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
    st.booleans(),
    st.integers(-9, 9),
    st.floats(allow_nan=False),
)
NAMES = st.sampled_from(["a", "b", "top", "images"])
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, min_size=1), max_leaves=5)


@settings(max_examples=60, deadline=None)
@given(tree=st.dictionaries(KEYS, TREES, min_size=1))
def test_any_observation_survives(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("any") / "o.npz"
    save_observations(path, [tree])
    np.testing.assert_equal(load_observations(path), [tree])
