"""`metadata.pt` of openpi's PyTorch trainer, read without running anything that is in it.

torch.save writes a zip with a pickle in it. A pickle is a program that names functions to call; here every name becomes an
inert stand-in, so that neither openpi nor anything else is imported, and a hostile file can do nothing.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from duq.compiler.errors import CheckpointError
from duq.runtime.reading import reading

LARGEST = 16 << 20  # bytes of a config
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
    with reading(file, CheckpointError, "copy it again, or remove it to go on without"):
        with zipfile.ZipFile(file) as archive:
            entry = next((info for info in archive.infolist() if info.filename.endswith("data.pkl")), None)
            if entry is None:
                raise CheckpointError(f"{file} was not written by torch.save: it has no data.pkl")
            if entry.file_size > LARGEST:
                raise CheckpointError(f"{file}: its data.pkl has {entry.file_size:,} bytes, a config has a few thousand")
            data = _InertUnpickler(io.BytesIO(archive.read(entry))).load()
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a dictionary, not a {type(data).__name__}")
    return data


class _InertUnpickler(pickle._Unpickler):
    """In Python, whose memo is a dict: C's is a table that grows to the largest number that the file says.

    Without the one operation that makes room for as many bytes as the file says, which is newer than torch.save's protocol.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

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
