"""The commands that duq-vla installs. A program is imported when its command runs, so that a missing extra is one line.

Each is called without arguments, reads sys.argv, and ends the process: exit code 2 and a line on stderr for bad input.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import NoReturn


def command(name: str, program: str, extra: str) -> Callable[[], NoReturn]:
    """The entry point of a program, "module:function". extra: of duq-vla, with the packages that the program imports."""
    module, _, function = program.partition(":")

    def run() -> NoReturn:
        sys.argv[0] = name  # shown by --help, also where a file of the checkout is run
        try:
            main = getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as missing:
            if missing.name is None or missing.name.startswith("duq."):
                raise
            requirement = f"duq-vla[{extra}]" if extra else "duq-vla"
            print(f"error: {name} needs {missing.name}: pip install '{requirement}'", file=sys.stderr)
            raise SystemExit(2) from None
        sys.exit(main())

    return run


compile = command("duq-compile", "duq.compiler.cli:compile_main", "compile")
quantize = command("duq-quantize", "duq.compiler.quantize_cli:quantize_main", "compile")
inspect = command("duq-inspect", "duq.runtime.inspect:main", "")
serve = command("duq-serve", "duq.runtime.serve_cli:main", "server")
compare = command("duq-compare", "duq.tools.compare:main", "compile")
bench = command("duq-bench", "duq.tools.bench:main", "compile")
bench_server = command("duq-bench-server", "duq.tools.bench_server:main", "client")
profile = command("duq-profile", "duq.tools.profile:main", "cuda-runtime")
evaluate = command("duq-evaluate", "duq.tools.evaluate:main", "compile,examples")
demo = command("duq-demo", "duq.tools.demo:main", "demo")
export_lerobot = command("duq-export-lerobot", "duq.tools.export_lerobot:main", "")
make_checkpoint = command("duq-make-checkpoint", "duq.tools.make_checkpoint:main", "compile")
study_schemes = command("duq-study-schemes", "duq.tools.study_schemes:main", "study")
