"""Empty shared libraries that stand in for a name: what a loader asks for is then found, without a file on the system.

Two programs need this. TVM links against CUDA's libraries, of which generating source calls nothing. TensorRT-RTX opens
the unversioned name of a library that is already loaded under its versioned one.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

_HEADER, _SEGMENT, _SYMBOL = 64, 56, 24  # bytes of ELF64's header, of a program header, of a symbol
_MACHINES = {"x86_64": 62, "aarch64": 183}  # of the header; nothing else in an empty library differs
_PAGE = 1 << 16  # the largest page that Linux has on either
_NEEDED, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 1, 5, 6, 10, 11, 14  # tags of the dynamic section


def load_alias(name: str, needed: Sequence[str] = ()) -> None:
    """Loads a library called `name` that holds no symbol of its own but depends on the libraries `needed`. Raises
    OSError on a processor that is neither x86-64 nor 64-bit Arm, or where a needed library cannot be loaded."""
    handle = os.memfd_create(name)  # stays open: the loader takes another file under the same path for this one
    os.write(handle, _image([name, *needed], platform.machine()))
    ctypes.CDLL(f"/proc/self/fd/{handle}", mode=os.RTLD_GLOBAL)


def load_lazily(path: str) -> None:
    """Loads a library whose functions are looked up at their first call (ctypes itself looks all of them up)."""
    loader = ctypes.CDLL(None)
    loader.dlopen.restype, loader.dlopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
    loader.dlerror.restype = ctypes.c_char_p
    if not loader.dlopen(path.encode(), os.RTLD_LAZY | os.RTLD_GLOBAL):
        raise OSError(loader.dlerror().decode())


def _image(names: Sequence[str], machine: str) -> bytes:
    """header | segments: all of the file, the dynamic section | one null symbol | strings | dynamic section"""
    if machine not in _MACHINES:
        raise OSError(f"{names[0]}: there is no form of it for a processor of {machine}")
    symbols = _HEADER + 2 * _SEGMENT
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    offsets = [1 + sum(len(name) + 1 for name in names[:index]) for index in range(len(names))]
    dynamic = symbols + _SYMBOL + -(-len(strings) // 8) * 8
    entries = [
        (_SONAME, offsets[0]),
        *((_NEEDED, offset) for offset in offsets[1:]),
        (_STRTAB, symbols + _SYMBOL),
        (_STRSZ, len(strings)),
        (_SYMTAB, symbols),
        (_SYMENT, _SYMBOL),
        (0, 0),
    ]
    section = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    size = dynamic + len(section)
    magic = b"\x7fELF\2\1\1"  # 64 bits, little-endian
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", magic, 3, _MACHINES[machine], 1, 0, _HEADER, 0, 0, _HEADER, _SEGMENT, 2, 0, 0, 0
    )
    load = struct.pack("<IIQQQQQQ", 1, 6, 0, 0, 0, size, size, _PAGE)
    pointer = struct.pack("<IIQQQQQQ", 2, 6, dynamic, dynamic, dynamic, len(section), len(section), 8)
    return (header + load + pointer + bytes(_SYMBOL) + strings).ljust(dynamic, b"\0") + section
