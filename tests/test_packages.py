"""The layout: folders of the checkout are subpackages of duq, under their short names the same modules, and commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from duq import commands

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = sorted(PROJECT["tool"]["setuptools"]["package-dir"].values())
SHORT = ("compiler", "examples", "plugins", "runtime", "tools")


def python(code: str) -> str:
    """What a program prints that starts in the checkout, as `python -c` does."""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_every_folder_with_modules_is_installed():
    packages = {
        f"duq.{'.'.join(path.relative_to(ROOT).parent.parts)}" for name in FOLDERS for path in ROOT.glob(f"{name}/**/*.py")
    }
    data = {name for name in PROJECT["tool"]["setuptools"]["package-data"] if name not in packages}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | data | {"duq"}


def test_every_data_file_is_installed():
    declared = set()
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / "/".join(package.split(".")[1:] or ["duq"])
        declared |= {path for pattern in patterns for path in folder.glob(pattern)}
    kinds = (".cu", ".cuh", ".html", ".json", ".toml", ".typed")
    there = {path for name in ("compiler", "plugins", "runtime", "tools", "duq") for path in (ROOT / name).rglob("*")}
    assert {path for path in there if path.suffix in kinds or path.name == "py.typed"} == declared


def test_scripts_are_the_commands():
    for name, entry in PROJECT["project"]["scripts"].items():
        module, function = entry.split(":")
        assert module == "duq.commands" and callable(getattr(commands, function))
        assert name == f"duq-{function.replace('_', '-')}"


def test_a_missing_module_of_ours_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="duq.tools.absent"):
        commands.command("duq-absent", "duq.tools.absent:main", "compile")()


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("order", ["{0}, duq.{0}", "duq.{0}, {0}"])
def test_a_short_name_is_the_same_module(name, order):
    assert python(f"import {order.format(name)}; print({name} is duq.{name}, {name}.__name__)") == f"True duq.{name}\n"


def test_submodules_by_either_name_are_the_same():
    code = """
import runtime.policy
from runtime import Policy
from runtime.executors.cpu import CpuExecutor
import runtime.robots as robots
import plugins.errors
import duq.runtime.policy, duq.runtime.executors.cpu, duq.runtime.robots, duq.plugins.errors
assert runtime.policy is duq.runtime.policy and Policy is duq.Policy is duq.runtime.Policy
assert CpuExecutor is duq.runtime.executors.cpu.CpuExecutor and robots is duq.runtime.robots
assert plugins.errors.DuqError is duq.plugins.errors.DuqError
"""
    python(code)


def test_an_error_pickled_under_one_name_is_caught_under_the_other():
    code = """
import pickle
from runtime.errors import ObservationError
import duq.runtime.errors
again = pickle.loads(pickle.dumps(ObservationError("state: is absent")))
assert type(again) is duq.runtime.errors.ObservationError and str(again) == "state: is absent"
try:
    raise again
except ObservationError:
    pass
"""
    python(code)


def test_a_submodule_that_is_absent_is_no_module():
    assert "No module named 'duq.runtime.absent'" in python(
        "try:\n    import runtime.absent\nexcept ModuleNotFoundError as error:\n    print(error)"
    )


def test_a_policy_runs_by_the_short_name(tiny_plans):
    plan = str(tiny_plans("pi0", "none").plan)
    code = f"""
import numpy as np
import runtime
observation = {{
    "observation/image": np.zeros((64, 64, 3), np.uint8),
    "observation/wrist_image": np.zeros((64, 64, 3), np.uint8),
    "observation/state": np.zeros(8, np.float32),
    "prompt": "pick up the cup",
}}
print(runtime.Policy({plan!r}).infer(observation)["actions"].shape)
"""
    assert python(code) == "(8, 7)\n"
