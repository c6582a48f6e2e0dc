"""Edits of files, by a seeded random generator: bytes, JSON, lines of text, .npz archives, headers of safetensors."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

Mutation = Callable[[bytes, Random], bytes]

# JSON, as text, that a field may hold by mistake or malice.
_JSON_VALUES = (
    "null", "true", "false", "0", "1", "-1", "2", "4096", "1000000000", "99999999999999999999", "1" + "0" * 400, "-0.0", "0.5",
    "1e308", "1e400", "-1e38", "NaN", "Infinity", "-Infinity", '""', '"x"', '"0"', '"../x"', '"/dev/zero"', '"a\\u0000b"',
    '"\\ud800"', '"' + "x" * 5000 + '"', "[]", "[0]", "[null]", '["x", 1]', "[[]]", "{}", '{"x": 1}', '{"": {}}', "[1, NaN]",
    "[" * 100_000 + "]" * 100_000, '{"a":' * 20_000 + "1" + "}" * 20_000, "[" + "1e308, " * 40 + "1e308]",
)  # fmt: skip
_TEXT_VALUES = (
    "", "x", "''", "[a]", "{a: b}", "null", "~", "true", "-1", "0", "1000000000", ".inf", ".nan", "nan", "inf", "1e308", "1e400",
    "1" + "0" * 400, "'a{4294967296}'", "'(a+)+$'", "'(?i)x'", "'['", "'('", "['(?i)x:8']", "{'(?i)x': 8}", "['x:nan']", "!!int x",
    "!!python/object:os.system x", "&a [*a]", "&a [x, x]", "*a", "2001-99-99", "[" * 5000, "\x00", "\udcff", '"\\x"', '""', '["a"]',
    "[1000000000]", "[[]]", "{}", "'" + "(x" * 3000 + "'", "'((a*)*)*b'", "1_000", "0x10", "1:30",
)  # fmt: skip


def damage(data: bytes, random: Random) -> bytes:
    """Flips, cuts, repeats, inserts or overwrites some bytes."""
    if not data:
        return random.randbytes(10)
    edited = bytearray(data)
    at = random.randrange(len(edited))
    kind = random.randrange(8)
    if kind < 3:
        for _ in range(random.choice((1, 1, 2, 10))):
            edited[random.randrange(len(edited))] ^= 1 << random.randrange(8)
    elif kind == 3:
        del edited[at:]
    elif kind == 4:
        del edited[at : at + random.choice((1, 4, 100))]
    elif kind == 5:
        edited[at:at] = random.choice((random.randbytes(random.choice((1, 8, 100))), edited[at : at + 50], bytes(64)))
    elif kind == 6:
        edited[at : at + 8] = random.choice((b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, b"\x00" * 7 + b"\x7f"))
    else:
        return random.choice((b"", b"\x00", b"{}", b"[]", b"PK\x03\x04", random.randbytes(200), b"\xff\xfe" + data))
    return bytes(edited)


def edit_json(data: bytes, random: Random) -> bytes:
    """Replaces, removes, renames or adds a value somewhere in a JSON document; sometimes damages its bytes."""
    if random.random() < 0.1:
        return damage(data, random)
    document = json.loads(data)
    places = list(_places(document))
    if not places:
        return random.choice(_JSON_VALUES).encode()
    holder, key = random.choice(places)
    kind = random.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.append(holder[key])
    elif kind == 2:
        holder[random.choice(("type", "x", "shape", "eps", "llm", "steps"))] = _MARK
    elif kind == 3:
        holder[key] = _other_type(holder[key], random)
    else:
        holder[key] = _MARK
    text = json.dumps(document).replace(json.dumps(_MARK), random.choice(_JSON_VALUES))
    return text.encode("utf-8", "surrogatepass")


_MARK = "duq: a value goes here"


def _places(value: Any) -> Any:
    """(container, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _other_type(value: Any, random: Random) -> Any:
    choices: list[Any] = [str(value), [value], {"x": value}, None, bool(value)]
    if isinstance(value, (int, float)):
        choices += [-value, value * 10**12, value + 0.5, -value - 1]
    if isinstance(value, list):
        choices += [value * 1000, value[::-1], {str(i): each for i, each in enumerate(value)}, value[0] if value else 0]
    if isinstance(value, dict):
        choices += [list(value), list(value.values())]
    return random.choice(choices)


def edit_lines(data: bytes, random: Random) -> bytes:
    """Edits a line `key: value` or `key = value` of a YAML or TOML file, or its bytes."""
    if random.random() < 0.1:
        return damage(data, random)
    lines = data.decode().splitlines()
    at = random.randrange(len(lines))
    kind = random.randrange(5)
    separator = " =" if " =" in lines[at] else ":"
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[random.randrange(len(lines))])
    elif kind == 2:
        lines[at] = lines[at].replace(separator, f"x{separator}", 1)
    else:
        lines[at] = f"{lines[at].partition(separator)[0]}{separator} {random.choice(_TEXT_VALUES)}"
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def edit_npz(data: bytes, random: Random) -> bytes:
    """Edits an array, its header or its entry of a .npz file, or the bytes of the file."""
    kind = random.randrange(6)
    if kind < 2:
        return damage(data, random)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(list(entries))
    if kind == 2:
        entries[name] = _other_array(entries[name], random)
    elif kind == 3:
        entries[name] = damage(entries[name], random)
    elif kind == 4:
        entries.pop(name)
    else:
        entries[random.choice(("x.npy", "x", "image.npy", "state//x.npy", f"{name}.npy"))] = entries[name]
    compression = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))
    return _zipped(entries, compression, random)


def edit_zip(data: bytes, random: Random) -> bytes:
    """Damages an entry of a zip file, whose checksum is then that of the damage; or the bytes of the file."""
    if random.random() < 0.2:
        return damage(data, random)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = max(entries, key=lambda each: len(entries[each])) if random.random() < 0.8 else random.choice(list(entries))
    entries[name] = damage(entries[name], random)
    return _zipped(entries, zipfile.ZIP_STORED, random)


def _zipped(entries: dict[str, bytes], compression: int, random: Random) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)  # of no date: equal seeds, equal bytes
    data = bytearray(file.getvalue())
    if random.random() < 0.3:  # inside an entry, as a disk damages it
        data[random.randrange(30, len(data))] ^= 1 << random.randrange(8)
    if random.random() < 0.2:
        data[6] |= 1  # "encrypted"
        directory = data.rfind(b"PK\x01\x02")
        data[directory + 8] |= 1
    return bytes(data)


def _other_array(data: bytes, random: Random) -> bytes:
    array = np.load(io.BytesIO(data))
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    kind = random.randrange(5)
    if kind == 0:
        header["shape"] = random.choice(
            ((10**12,), (1 << 62,), (1 << 62, 4), (-1,), (), (0,), (10**9, 0), array.shape * 40)
        )
    elif kind == 1:
        header["descr"] = random.choice(
            ("<f8", "|O", "<U1000000000", "|V8", "<M8[s]", "<c16", ">f4", "|b1", "|S3", "x", "<f2")
        )
    elif kind == 2 and array.dtype.kind == "f" and array.size:
        array = array.copy()
        array.flat[random.randrange(array.size)] = random.choice((np.nan, np.inf, -1e38, 0, -1))
    elif kind == 3 and array.dtype.kind in "iuf":
        array = array.astype(random.choice(("f8", "i8", "u1", "f2", "c8", "U5")))
        header["descr"] = array.dtype.str
    else:
        array = random.choice((array[..., None], array.reshape(-1), array[:0], array[:1]) if array.ndim else (array[None],))
        header["shape"] = array.shape
    text = repr(header).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + np.ascontiguousarray(array).tobytes()


def edit_safetensors(data: bytes, random: Random) -> bytes:
    """Edits the JSON header of a safetensors file, its length, or the file's first bytes."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = random.randrange(6)
    if kind == 0:
        return damage(data[: 8 + size], random) + rest
    if kind == 1:
        return data[: random.randrange(len(data))]
    if kind == 2:
        return random.choice((0, 1, size - 1, size + 1, 1 << 40, (1 << 64) - 1)).to_bytes(8, "little") + header + rest
    if kind == 3 and rest:
        return data[: 8 + size] + damage(rest, random)
    header = edit_json(header, random)
    return len(header).to_bytes(8, "little") + header + rest
