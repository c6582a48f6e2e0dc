"""What a plan makes a GPU do, without names: to see that a change of the compiler changes nothing for a GPU.

    python -m tests.support.fingerprint PLAN ... > before.json         (with the compiler before, then with the one after)
    python -m tests.support.fingerprint --compare before.json after.json

A `cuda` plan becomes, for each SM, its launches: the machine code of each kernel (a hash of its .text section), grid,
threads, shared memory, cluster, and the arguments in order, with a weight as the hash of its bytes; what they wait for, and
which overlap. A `tensorrt` plan becomes its kernels' machine code and what kernels its linears run. A `cpu` plan becomes
the hashes of its entries.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = Any  # what json.loads returns


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as plan:
        return {name: plan.read(name) for name in plan.namelist()}


def machine_code(cubin: bytes, symbol: str) -> str:
    """Hash of the section .text.<symbol> of an ELF file. Raises ValueError where there is none."""
    (section_offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, section_offset + index * size) for index in range(count)]
    names = sections[names_index]
    for name, _, _, _, offset, length, *_ in sections:
        start = names[4] + name
        if cubin[start : cubin.index(b"\0", start)].decode() == f".text.{symbol}":
            return _hash(cubin[offset : offset + length])
    raise ValueError(f"no kernel {symbol}")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class _Cuda:
    """The fingerprint of a `cuda` plan for one SM."""

    def __init__(self, entries: Mapping[str, bytes], sm: int):
        self._entries, self._schedule = entries, json.loads(entries[f"schedule/sm{sm}.json"])
        self._overlaps = sm >= 90  # kernels of older GPUs never wait, whatever the schedule says
        self._weights: dict[str, str] = {}
        kernels = self._schedule["kernels"]
        self._code = [machine_code(entries[each["cubin"]], each["symbol"]) for each in kernels]

    def __call__(self) -> dict[str, Json]:
        return {
            "arena_bytes": self._schedule["arena_bytes"],
            "pixel": self._schedule.get("pixel"),
            "variants": [self._variant(each) for each in self._schedule["variants"]],
            "weights": sorted(map(self._weight, self._schedule["weights"])),
        }

    def _variant(self, variant: Mapping[str, Json]) -> dict[str, Json]:
        programs = {name: [self._launch(each) for each in variant[name]] for name in ("prefix", "step")}
        chains = {"chains": [{**each, "kernel": self._code[each["kernel"]]} for each in variant.get("chains", ())]}
        return {**variant, **programs, **(chains if "chains" in variant else {})}

    def _launch(self, launch: Mapping[str, Json]) -> dict[str, Json]:
        kept = {key: value for key, value in launch.items() if key not in ("name", "args")}
        if not self._overlaps:
            kept.pop("overlap", None)
        if "kernel" in kept:
            kept["kernel"] = self._code[kept["kernel"]]
        arguments = launch["args"]  # by name in the kernel's order, or before a plan named them a list
        values = arguments.values() if isinstance(arguments, dict) else arguments
        return {**kept, "args": [self._argument(each) for each in values]}

    def _argument(self, value: Json) -> Json:
        if isinstance(value, list) and value[0] == "w":
            return ["w", self._weight(value[1]), *value[2:]]
        return value

    def _weight(self, name: str) -> str:
        if name not in self._weights:
            self._weights[name] = _hash(self._entries[f"weights/{name}"])
        return self._weights[name]


def cuda(entries: Mapping[str, bytes], sm: int) -> dict[str, Json]:
    return _Cuda(entries, sm)()


def tensorrt(entries: Mapping[str, bytes], sm: int) -> dict[str, Json]:
    data = json.loads(entries[f"engine/sm{sm}/kernels.json"])
    code = {each["expression"]: machine_code(entries[each["cubin"]], each["symbol"]) for each in data["kernels"]}
    return {"kernels": sorted(code.values()), "linears": {name: code[each] for name, each in data["linears"].items()}}


def fingerprint(path: Path) -> dict[str, Json]:
    entries = entries_of(path)
    manifest = json.loads(entries["manifest.json"])
    if manifest["target"] == "cpu":
        return {name: _hash(data) for name, data in entries.items() if name != "manifest.json"}
    of_target = {"cuda": cuda, "tensorrt": tensorrt}[manifest["target"]]
    return {
        "embedding": _hash(entries["embedding"]),
        **{f"sm{sm}": of_target(entries, sm) for sm in manifest["sm"]},
    }


def differences(before: Json, after: Json, at: str = "", limit: int = 20) -> list[str]:
    """Where two fingerprints differ, the first `limit` places."""
    if type(before) is not type(after) or not isinstance(before, (dict, list)):
        return [] if before == after and type(before) is type(after) else [f"{at}: {before!r:.80} -> {after!r:.80}"]
    found: list[str] = []
    for key in _keys(before, after):
        try:
            found += differences(before[key], after[key], f"{at}/{key}", limit)
        except (KeyError, IndexError):
            found.append(f"{at}/{key}: only on one side")
        if len(found) >= limit:
            break
    return found


def _keys(before: Json, after: Json) -> Sequence[Json]:
    if isinstance(before, dict):
        return list(dict.fromkeys([*before, *after]))
    return range(max(len(before), len(after)))


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--compare"]:
        before, after = (json.loads(Path(path).read_text()) for path in arguments[1:3])
        found = differences(before, after)
        print("\n".join(found) or f"the same: {', '.join(before)}")
        return int(bool(found))
    json.dump({Path(path).name: fingerprint(Path(path)) for path in arguments}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
