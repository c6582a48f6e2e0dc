"""In a checkout, `import runtime` means duq.runtime: one module under two names, never two copies of it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def hand_over(package: str) -> None:
    """Called by the folder `package` when it is imported by that name: what is imported is duq's package of the name."""
    sys.meta_path.insert(0, _Submodules(package))
    sys.modules[package] = importlib.import_module(f"duq.{package}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `package.x` as duq.package.x."""

    def __init__(self, package: str):
        self._prefix = f"{package}."

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name.startswith(self._prefix) else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(f"duq.{module.__name__}")
