"""The commands that duq-vla installs. A program is imported when its command runs, so that a missing extra is one line.

Each is called without arguments, reads sys.argv, and ends the process: exit code 2 and a line on stderr for bad input. What a
program imports at its head is what its --help needs; the rest, and the packages of its extra, it imports when it works.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

COMMANDS: dict[str, str] = {}  # name -> the extra that it needs


def command(name: str, program: str, extra: str) -> Callable[[], NoReturn]:
    """The entry point of a program, "module:function". extra: of duq-vla, with the packages that the program imports."""
    module, _, function = program.partition(":")

    def run() -> NoReturn:
        sys.argv[0] = name  # shown by --help, also where a file of the checkout is run
        try:
            sys.exit(getattr(importlib.import_module(module), function)())
        except ModuleNotFoundError as missing:
            if missing.name is None or missing.name.partition(".")[0] == "duq":
                raise
            from duq.runtime.extras import missing_package

            print(f"error: {missing_package(name, missing.name, extra)}", file=sys.stderr)
            raise SystemExit(2) from None

    return run


def _installed(name: str, program: str, extra: str) -> Callable[[], NoReturn]:
    COMMANDS[name] = extra
    return command(name, program, extra)


compile = _installed("duq-compile", "duq.compiler.commands:compile_main", "compile")
quantize = _installed("duq-quantize", "duq.compiler.commands:quantize_main", "compile")
inspect = _installed("duq-inspect", "duq.runtime.inspect:main", "")
serve = _installed("duq-serve", "duq.runtime.serve_cli:main", "server")
compare = _installed("duq-compare", "duq.tools.compare:main", "compile")
bench = _installed("duq-bench", "duq.tools.bench:main", "compile")
bench_server = _installed("duq-bench-server", "duq.tools.bench_server:main", "client")
profile = _installed("duq-profile", "duq.tools.profile:main", "cuda-runtime")
estimate = _installed("duq-estimate", "duq.tools.estimate:main", "")
evaluate = _installed("duq-evaluate", "duq.tools.evaluate:main", "compile,examples")
demo = _installed("duq-demo", "duq.tools.demo:main", "demo")
export_lerobot = _installed("duq-export-lerobot", "duq.tools.export_lerobot:main", "")
make_checkpoint = _installed("duq-make-checkpoint", "duq.tools.make_checkpoint:main", "compile")
study_schemes = _installed("duq-study-schemes", "duq.tools.study_schemes:main", "study")
doctor = _installed("duq-doctor", "duq.tools.doctor:main", "")
completion = _installed("duq-completion", "duq.tools.completion:main", "")
