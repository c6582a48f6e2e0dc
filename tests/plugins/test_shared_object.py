"""Libraries that exist only as a name: in a process of its own, since what is loaded stays loaded."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


IMPORTS = "import ctypes\nfrom plugins.shared_object import load_alias, load_lazily\n"


def test_a_name_is_found_after_its_alias_is_loaded():
    code = (
        IMPORTS
        + """
names = ["libduq_first.so.1", "libduq_second.so.12"]
for name in names:
    load_alias(name)
for name in names:
    ctypes.CDLL(name)
print("found")
"""
    )
    assert run(code) == "found"
    with pytest.raises(subprocess.CalledProcessError):
        run(IMPORTS + 'ctypes.CDLL("libduq_first.so.1")')


def test_an_alias_leads_to_what_it_needs():
    """A symbol looked up in the alias is found in the library behind it."""
    assert (
        run(IMPORTS + 'load_alias("libduq_math.so", ["libm.so.6"])\nprint(hasattr(ctypes.CDLL("libduq_math.so"), "cbrt"))')
        == "True"
    )


def test_what_is_needed_must_exist():
    with pytest.raises(subprocess.CalledProcessError):
        run(IMPORTS + 'load_alias("libduq_broken.so", ["libduq_nowhere.so"])')


def test_a_library_that_cannot_be_loaded_is_an_error():
    code = (
        IMPORTS
        + """
try:
    load_lazily("/nowhere/lib.so")
except OSError as error:
    print(error)
"""
    )
    assert "/nowhere/lib.so" in run(code)
