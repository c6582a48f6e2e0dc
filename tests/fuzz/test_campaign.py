"""A tenth of the campaign, and that it counts and names what must not happen."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from functools import partial
from random import Random

import numpy as np
import pytest
from typer.testing import CliRunner

from duq.runtime.errors import PlanError
from tests.fuzz import campaign, kinds, messages, observations, plans
from tests.fuzz.__main__ import app
from tests.fuzz.campaign import TRIALS, Trial, tries
from tests.fuzz.judge import Failure, judged

SHARE = 0.1
OF_POLICIES = [name for name in TRIALS if name not in kinds.KINDS]


@pytest.fixture(scope="session")
def made():
    with campaign.files() as files:
        yield files


@pytest.mark.parametrize("name", OF_POLICIES)
def test_a_tenth_of_the_campaign(name, made):
    """That of the files which compilers read is in test_readers.py."""
    trial = TRIALS[name]
    row = tries(name, trial, made(trial), range(round(SHARE * trial.count)))
    assert not row.failures, "\n".join(f"{each['text']}\n{each['reproduce']}" for each in row.failures)
    assert row.tries == round(SHARE * trial.count)
    assert row.ends["accepted"] + row.ends["actions"] and len(row.ends) > 1  # of both some


def test_the_campaign_is_as_large_as_it_says():
    def count(prefix):
        return sum(trial.count for name, trial in TRIALS.items() if name.startswith(prefix))

    assert count("cpu plan, flips") + count("cuda plan, flips") >= 10_000
    assert all(
        TRIALS[f"{target} plan, {edit}"].count >= 1000 for target in plans.TARGETS for edit in ("container", "rewritten")
    )
    assert count("manifest") >= 1000 and count("observations, ") >= 2000 and count("messages") >= 500
    assert all(TRIALS[kind].count >= 1000 for kind in kinds.KINDS)


# --- what must not happen is counted and named ------------------------------------------------------------------------


@contextmanager
def faulty(folder):
    def attempt(seed: int) -> str:
        if seed == 2:
            os.abort()
        if seed == 4:
            time.sleep(600)
        if seed == 7:
            os._exit(0)
        work = {5: partial(int, "x"), 6: partial(plans.check_same, (np.zeros(1), ""), (np.ones(1), ""))}.get(
            seed, lambda: None
        )
        return plans.how(judged(f"faulty, seed {seed}", work))

    yield attempt


@contextmanager
def unready(folder):
    raise ZeroDivisionError("nothing is ready")
    yield


def test_crashes_hangs_wrong_actions_and_foreign_exceptions_cost_one_try_each(tmp_path):
    (tmp_path / "files").mkdir()
    row = tries("faulty", Trial(10, lambda folder: None, faulty), tmp_path / "files", range(9), patience=3)
    assert row.tries == 9 and row.ends == {"accepted": 4, "crash": 2, "hang": 1, "foreign": 1, "wrong": 1}
    assert [failure["seed"] for failure in row.failures] == [2, 4, 5, 6, 7]
    says = [
        "SIGABRT: Fatal Python error: Aborted",
        "nothing was heard of it",
        "ValueError",
        "answers otherwise",
        "exit code 0",
    ]
    for failure, text in zip(row.failures, says, strict=True):
        assert text in failure["text"] and failure["reproduce"] == f"python -m tests.fuzz 'faulty' --seed {failure['seed']}"
    assert 10e6 < row.peak_bytes < 4e9


def test_a_kind_that_cannot_be_made_ready_fails(tmp_path):
    (tmp_path / "files").mkdir()
    row = tries("unready", Trial(10, lambda folder: None, unready), tmp_path / "files", range(5))
    assert row.ends == {"crash": 1} and "ZeroDivisionError: nothing is ready" in row.failures[0]["text"]


@contextmanager
def fails_at_one(folder):
    def attempt(seed: int) -> str:
        if seed == 1:
            raise Failure("wrong", "[red]text")
        return "PlanError"

    yield attempt


def test_the_command_prints_a_table_and_fails_where_a_try_does(tmp_path, monkeypatch):
    for name, ready in (("good", contextmanager(good)), ("bad", fails_at_one)):
        monkeypatch.setitem(TRIALS, name, Trial(30, lambda folder: None, ready))
    monkeypatch.setattr(campaign, "tries", here)
    run = partial(CliRunner().invoke, app)
    ran = run(["good", "bad", "--share", "0.1", "--json", str(tmp_path / "x.json")])
    assert ran.exit_code == 1 and "wrong: [red]text\n    python -m tests.fuzz 'bad' --seed 1\n" in ran.output
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["kinds"]["bad"]["ends"] == {"PlanError": 2, "wrong": 1} and found["kinds"]["good"]["tries"] == 3
    assert [each["seed"] for each in found["failures"]] == [1]
    assert run(["good"]).exit_code == 0
    assert (one := run(["bad", "--seed", "1"])).exit_code == 1 and "wrong: [red]text" in one.output
    assert (one := run(["bad", "--seed", "2"])).exit_code == 0 and one.output == "PlanError\n"
    assert run(["--seed", "2"]).exit_code == run(["x"]).exit_code == 2


def good(folder):
    yield lambda seed: "accepted"


def here(name, trial, folder, seeds):
    """In this process: what the test has put into TRIALS is in no other."""
    row = campaign.Row(name)
    with trial.ready(folder) as attempt:
        for seed in seeds:
            row.add(seed, *campaign.once(attempt, seed))
    return row


@pytest.mark.parametrize(("kind", "seed"), [("orbax", 572), ("packs' recipe", 746)])
def test_a_name_of_5000_characters_is_not_repeated_whole(kind, seed, made):
    """What the first full campaign found in the readers."""
    assert len(kinds.check(kind, made(TRIALS[kind]), seed)) < 400


# --- the edits --------------------------------------------------------------------------------------------------------


def test_equal_seeds_make_equal_edits_of_plans_and_messages(made):
    data, sample = (made(TRIALS["manifest"]) / "cpu.plan").read_bytes(), observations.ROBOTS["libero"]()
    for edit in (
        plans.flip, plans.edit_container, lambda data, random: messages.hostile(sample, random),
        lambda data, random: sorted(plans._rewrite({"a": b"12", "b": b"34"}, b'{"x": [1, 2]}', random)[0].items()),
    ):  # fmt: skip
        first, again = ([edit(data, Random(seed)) for seed in range(40)] for _ in range(2))
        assert first == again and len(set(map(repr, first))) > 10


def test_a_plan_of_other_weights_is_noticed(made):
    """The hashes are right, so nothing but the actions can tell; of a GPU what it was given."""
    folder = made(TRIALS["manifest"])
    for target, entry in (("cpu", "weights/"), ("cuda", "weights/")):
        entries, manifest = plans._contents(folder / f"{target}.plan")
        expected = plans.answer(folder / f"{target}.plan", target)
        plans.check_same(plans.answer(folder / f"{target}.plan", target), expected)
        name = max((each for each in entries if each.startswith(entry)), key=lambda each: len(entries[each]))
        entries[name] = bytes([entries[name][0] ^ 0x41]) + entries[name][1:]
        other = plans.write_rewritten(folder / "other.plan", entries, manifest)
        with pytest.raises(Failure, match="answers otherwise"):
            plans.check_same(plans.answer(other, target), expected)


def test_an_address_outside_of_the_gpu_s_memory_is_noticed(made, monkeypatch):
    from duq.runtime.executors.cuda import CudaExecutor

    resolve = CudaExecutor._resolve
    monkeypatch.setattr(
        CudaExecutor, "_resolve", lambda self, *a: (v := resolve(self, *a)) and v + (1 << 40 if v > 1 << 40 else 0)
    )
    with pytest.raises(Failure, match="outside of the GPU's memory"):
        plans.answer(made(TRIALS["manifest"]) / "cuda.plan", "cuda")


def test_a_flip_may_be_refused_by_nothing_but_a_plan_error():
    with pytest.raises(Failure, match="KernelError"):
        from duq.plugins.errors import KernelError

        def refuse():
            raise KernelError("no")

        judged("x", refuse, (PlanError,))
