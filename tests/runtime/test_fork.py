"""Forks beside a policy at work: the child says what to do, may open its own, and ends."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from tests.support.observations import OBSERVATIONS

PROGRAM = '''
import gc, os, signal, sys, threading
import numpy as np
from duq import EngineError, Policy
from tests.support.observations import OBSERVATIONS

path, out = sys.argv[1:]
policy, observation, noise = Policy(path, threads=2), OBSERVATIONS["libero"](), np.zeros((8, 32), np.float32)
started, stop = threading.Event(), threading.Event()


def infer():
    started.set()  # creates ONNX Runtime's sessions next
    while not stop.is_set():
        policy.infer(observation)


def child(work):
    """Its exit status."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        work()
        sys.exit(7)  # through all of Python's and C's exit handlers
    return os.waitpid(pid, 0)[1]


def refused():
    for call in (lambda: policy.infer(observation), policy.warmup, policy.reload, lambda: policy.infer_batch([observation])):
        try:
            call()
            os._exit(1)
        except EngineError as error:
            assert "was opened by process" in str(error) and "open it in the child" in str(error), error
    policy.close()
    globals().pop("policy")
    gc.collect()


def opens_its_own():
    np.save(out, Policy(path, threads=2).infer(observation, noise)["actions"])


thread = threading.Thread(target=infer)
thread.start()
started.wait()
statuses = [child(opens_its_own), child(refused), child(lambda: None)]
stop.set()
thread.join()
np.testing.assert_array_equal(np.load(out), policy.infer(observation, noise)["actions"])
print(*(os.waitstatus_to_exitcode(status) for status in statuses))
'''


def test_children_of_a_process_whose_policy_is_at_work(tiny_plans, tmp_path):
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PROGRAM,
        str(tiny_plans("pi0", "none").plan),
        str(tmp_path / "a.npy"),
    ]
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert (ran.stdout, ran.stderr) == ("7 7 7\n", "")
    assert np.load(tmp_path / "a.npy").shape == (8, len(OBSERVATIONS["libero"]()["observation/state"]) - 1)
