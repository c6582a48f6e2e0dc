"""`metadata.pt` of openpi's PyTorch trainer, read without running anything that is in it.

torch.save writes a zip with a pickle in it. A pickle is a program that names functions to call; here every name becomes an
inert stand-in, so that neither openpi nor anything else is imported, and a hostile file can do nothing.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from duq.compiler.errors import CheckpointError

CONTAINERS = {"dict": dict, "list": list, "set": set, "frozenset": frozenset, "tuple": tuple}


class Stub:
    """What stands for an object of a class (or the result of a function) that is not imported.

    `qualified_name` is the name in the file, `arguments` those it was made from; state and items are dropped.
    """

    qualified_name = "?"

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append

    def __repr__(self) -> str:
        return f"<{self.qualified_name}{getattr(self, 'arguments', ())!r}>"


def read_metadata(file: Path) -> dict:
    """The dictionary in a file of torch.save: plain containers, numbers and text as they are, paths as text.

    Objects of any other class are `Stub`s. Raises CheckpointError when the file is damaged or holds something else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entry = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if entry is None:
                raise CheckpointError(f"{file} was not written by torch.save: it has no data.pkl")
            with archive.open(entry) as stream:
                data = _InertUnpickler(stream).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{file} is damaged: {error!r}; copy it again, or remove it to go on without") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a dictionary, not a {type(data).__name__}")
    return data


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in CONTAINERS:
            return CONTAINERS[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if name.endswith("Path") and module.split(".")[0] in ("pathlib", "upath", "etils"):
            return _path_text
        return type("Stub", (Stub,), {"qualified_name": f"{module}.{name}", "__slots__": ("arguments",)})

    def persistent_load(self, pid: Any) -> Stub:  # a tensor's storage
        return Stub(*pid) if isinstance(pid, tuple) else Stub(pid)


def _path_text(*parts: Any) -> str:
    text = "/".join(map(str, parts))
    return "/" + text.lstrip("/") if text.startswith("//") else text
