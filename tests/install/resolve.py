"""Checks that what users install resolves: `make test-resolve`. Needs uv and an index; installs nothing.

Each case is resolved for each Python that it is meant for; those of this repository's own environments also with
constraints.txt, whose exact versions have to go together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ONLY = ("duq-vla", "tensorrt-rtx-cu13")  # everything else comes as wheels: robots have no compilers
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@dataclass(frozen=True)
class Case:
    """Requirements that go into one environment. `pinned`: with constraints.txt as well."""

    requirements: tuple[str, ...]
    pythons: tuple[str, ...] = PYTHONS
    pinned: bool = True


CASES = (
    Case((".",)),
    Case((".[server]",)),
    Case((".[cuda-runtime]",)),
    Case((".[compile,cuda,cuda-runtime]",)),
    Case((".[cuda12]",), pinned=False),  # constraints.txt has CUDA 13, and so has PyPI's PyTorch
    Case((".[compile,data,demo,hub,jax,server]",)),
    Case((".[compile,tensorrt-rtx]",)),
    Case((".[compile,study]",)),
    Case((".[dev]",)),
    Case((".[examples]",), ("3.10", "3.11", "3.12")),  # mujoco 3.3.0, which metaworld pins, has no wheel for 3.13
    # Beside what runs on the same robot. The client wants numpy 1, which has no wheels for 3.13.
    Case((".", "lerobot==0.6.1"), ("3.12", "3.13"), pinned=False),
    Case((".", "openpi-client==0.1.2"), ("3.10", "3.11", "3.12"), pinned=False),
    Case((".[client]",), ("3.10", "3.11", "3.12"), pinned=False),
    Case((".", "numpy==1.26.*"), ("3.10", "3.11", "3.12"), pinned=False),
)


def resolve(requirements: tuple[str, ...], python: str, constraints: bool) -> str | None:
    """uv's explanation where `requirements` do not go together on `python`, None where they do."""
    command = ["uv", "pip", "compile", "--quiet", "--only-binary", ":all:"]
    command += [f"--no-binary={name}" for name in SOURCE_ONLY]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "-"]
    if constraints:
        command += ["--constraints", "constraints.txt"]
    ran = subprocess.run(command, cwd=ROOT, input="\n".join(requirements), text=True, capture_output=True, check=False)
    return ran.stderr.strip() if ran.returncode else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", choices=PYTHONS, help="Repeatable; by default all.")
    pythons = parser.parse_args().python or PYTHONS
    failed = count = 0
    for case in CASES:
        for python in (each for each in case.pythons if each in pythons):
            for constraints in (False, True) if case.pinned else (False,):
                problem = resolve(case.requirements, python, constraints)
                what = f"Python {python}: {' '.join(case.requirements)}{' -c constraints.txt' if constraints else ''}"
                print(f"FAILED {what}\n{problem}" if problem else f"ok     {what}", flush=True)
                failed, count = failed + bool(problem), count + 1
    print(f"{count - failed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
