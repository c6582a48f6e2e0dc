"""examples/libero/everything.sh, with a python3 that only says what it was asked to do."""

import os
import subprocess
from pathlib import Path

import pytest

from duq.examples.libero.arms import ARMS

SCRIPT = Path(__file__).parents[2] / "examples/libero/everything.sh"
PYTHON = """#!/usr/bin/env bash
echo "${1##*/} ${@:2}" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 1 ;; esac
"""


@pytest.fixture
def everything(tmp_path):
    """Runs it with stages; whatever holds `fails` fails. (exit code, what it called)."""
    programs, calls, work = tmp_path / "bin", tmp_path / "calls", tmp_path / "run"
    programs.mkdir()
    (programs / "python3").write_text(PYTHON)
    (programs / "python3").chmod(0o755)
    for name, arm in ARMS.items():
        if not arm.engine:
            (work / "arms" / f"{name}.packs").mkdir(parents=True)

    def run(*stages, fails="nothing"):
        calls.write_text("")
        variables = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": fails}
        ran = subprocess.run(["bash", SCRIPT, work, *stages], env=variables, capture_output=True, check=False)
        return ran.returncode, calls.read_text().replace(f"{work}/", "").splitlines()

    return run


def test_its_stages_follow_each_other(everything):
    code, calls = everything()
    assert code == 0
    order = [call.partition(".")[0] for call in calls]
    assert [name for name in dict.fromkeys(order)] == ["collect", "render", "train", "arms", "evaluate", "report"]
    assert sum("--strength 0" in call for call in calls) == 2


def test_every_arm_is_evaluated_beside_fp32(everything):
    _, calls = everything("evaluate")
    at_rest = [call for call in calls if "--places permuted --noise 0" in call]
    for name, arm in ARMS.items():
        option = f"--plan arms/{name}.plan" if arm.engine else f"--torch {name}=policy@arms/{name}.packs"
        assert sum(f"{option} " in call for call in at_rest) == 1, name
    assert sum("--torch fp32=policy " in call for call in at_rest) == 1
    assert sum("--torch naive-W4A4=policy@W4A4 " in call for call in at_rest) == 1
    assert all("--plan" in call for call in calls)  # whose settings PyTorch takes
    assert len({call.partition("--out ")[2] for call in calls}) == len(calls)


def test_an_evaluation_that_fails_leaves_the_others_running(everything):
    code, calls = everything("evaluate", "report", fails="--places official")
    assert code == 1 and len(calls) == 5 and not any("report" in call for call in calls)


@pytest.mark.parametrize("which", ["--places permuted --episodes 1", "demonstrations"])
def test_a_collection_that_fails_ends_it(everything, which):
    code, calls = everything("collect", "render", fails=which)
    assert code == 1 and len(calls) == 3


def test_unknown_stages_are_refused(everything):
    assert everything("cook") == (2, [])
