"""The engine's side: `python -m compiler.accuracy.engine DIRECTORY COUNT THREADS PLAN`. Imports what a robot would."""

from __future__ import annotations

import sys
from pathlib import Path

from duq.compiler.accuracy.worker import errors_to_parent, resident_bytes, work
from duq.runtime.executors import open_executor
from duq.runtime.plan import Plan


def main(directory: str, count: str, threads: str, plan: str) -> None:
    opened = resident_bytes()
    executor = open_executor(Plan(plan, verify=False), int(threads))  # the parent has verified it

    def run(inputs, noise):
        return executor.run(inputs, noise)[0]

    def trace(index, inputs, noise):
        stages: dict = {}
        executor.run(inputs, noise, stages)
        return stages

    work(Path(directory), int(count), opened, run, trace, "engine")


if __name__ == "__main__":
    with errors_to_parent():
        main(*sys.argv[1:])
