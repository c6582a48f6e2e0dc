"""The engine plan: one uncompressed zip whose entries are aligned, hashed and memory-mapped.

local header | padding | weights/...    each entry's data starts on its alignment (the padding is a standard
local header | padding | graph/...      extra field of the local header), so a reader maps the file once and
...                                     takes tensors out of it without a copy
local header | manifest.json            last: it holds the offset, size and SHA-256 of every other entry
central directory                       the zip's own table of contents: ``unzip -l`` lists a plan
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from duq.runtime.errors import PlanError
from duq.runtime.files import Draft

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
Bytes = bytes | bytearray | memoryview
Data = Bytes | np.ndarray | Iterable[Bytes]

_CHUNK = 1 << 20  # bytes hashed and written, or read and hashed, at a time
_PAGE = 4096  # alignment of large entries: whole pages, so that touching one faults in nothing else
_CACHE_LINE = 64
_ALIGNMENT_FIELD = 0xD935  # the extra-field id that zipalign uses for padding
_LOCAL_HEADER = 30  # fixed part of a zip local header; the name and the extra fields follow
_ZIP64_FIELD = 20  # the extra field with 64-bit sizes, in every header so that a stream may pass 4 GB


class PlanWriter:
    """Writes a plan beside `path` and renames it into place, so that `path` is never half-written.

        with PlanWriter("engine.plan") as plan:
            offset = plan.write("weights/x", array)
            plan.finish({"model": ...})

    Leaving the block without `finish`, by an exception or otherwise, removes what was written. PlanError names the file where
    it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._draft = Draft(self.path, PlanError)
        self._file = self._draft.file
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._entries: dict[str, dict[str, Any]] = {}
        self._hasher = ThreadPoolExecutor(1)  # hashes a piece while it is written

    def __enter__(self) -> PlanWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._hasher.shutdown()
        try:
            if not self._file.closed:
                self._zip.close()
        except PlanError:
            if not any(exception):  # else it is the same once more: the disk is full
                raise
        finally:
            self._draft.discard()

    def write(self, name: str, data: Data, alignment: int | None = None) -> int:
        """Appends an entry and returns the absolute file offset of its data.

        `data` is bytes-like, an array (its raw bytes in C order) or an iterable of bytes-like pieces; it is hashed and
        written in small chunks. `alignment` (bytes) defaults to a page for large or streamed data, else a cache line.
        """
        if name in self._entries or name == MANIFEST:
            raise PlanError(f"{self.path}: entry {name} is written twice")
        pieces, size = _pieces(data)
        if alignment is None:
            alignment = _PAGE if size is None or size >= _CHUNK else _CACHE_LINE
        info = self._padded_header(name, alignment)
        digest, written = hashlib.sha256(), 0
        with self._zip.open(info, "w", force_zip64=True) as entry:
            offset = self._file.tell()
            for piece in pieces:
                hashed = self._hasher.submit(digest.update, piece)
                written += entry.write(piece)
                hashed.result()
        info.extra = b""  # the padding belongs to the local header; the central directory does without
        self._entries[name] = {"offset": offset, "bytes": written, "sha256": digest.hexdigest()}
        return offset

    def finish(self, manifest: dict[str, Any]) -> None:
        """Adds the manifest (with `format_version` and `entries`), flushes to disk and renames over `path`."""
        manifest = {**manifest, "format_version": FORMAT_VERSION, "entries": self._entries}
        self._zip.writestr(zipfile.ZipInfo(MANIFEST), json.dumps(manifest, indent=1))
        self._zip.close()
        self._draft.publish()

    def _padded_header(self, name: str, alignment: int) -> zipfile.ZipInfo:
        """The entry's header, its extra fields sized so that header + position is a multiple of `alignment`."""
        info = zipfile.ZipInfo(name)  # dated 1980: equal input gives equal bytes
        info.external_attr = 0o644 << 16  # what unzip gives the extracted file
        end = self._file.tell() + _LOCAL_HEADER + len(name.encode()) + _ZIP64_FIELD + 6  # 6: this field, no padding
        padding = -end % alignment
        info.extra = struct.pack("<HHH", _ALIGNMENT_FIELD, 2 + padding, alignment) + bytes(padding)
        return info


def _pieces(data: Data) -> tuple[Iterator[memoryview], int | None]:
    """`data` as an iterator of byte pieces of at most a chunk, and its size where it is known."""
    if isinstance(data, np.ndarray):  # viewing as uint8 also serves types with no buffer protocol (bfloat16)
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    if isinstance(data, (bytes, bytearray, memoryview)):
        view = memoryview(data).cast("B")
        return _chunks([view]), view.nbytes
    return _chunks(data), None


def _chunks(pieces: Iterable[Bytes]) -> Iterator[memoryview]:
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, view.nbytes, _CHUNK):
            yield view[start : start + _CHUNK]


class Plan:
    """An open plan: its manifest, and its entries as views into the memory-mapped file.

    `verify` also compares the SHA-256 of every entry. Raises PlanError if the file is missing, not a plan, cut short,
    damaged, of another format version, or lacks an entry.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise _damaged(self.path, "is empty")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                directory = _read_directory(self.path, file)
                self.manifest = _read_manifest(self.path, self._map, directory)
                self._entries: dict[str, dict[str, Any]] = self.manifest["entries"]
                _check_entries(self.path, self._map, directory, self._entries)
                if verify:
                    _check_hashes(self.path, file.fileno(), self._entries)
        except OSError as error:
            raise PlanError(f"{self.path}: cannot be read: {error.strerror}") from error

    @property
    def names(self) -> list[str]:
        """The entries in file order, without the manifest."""
        return list(self._entries)

    def read(self, name: str) -> memoryview:
        """The bytes of an entry: a read-only view into the mapped file, nothing is copied."""
        if name not in self._entries:
            raise PlanError(f"{self.path}: has no entry {name}; compile the plan again")
        entry = self._entries[name]
        return memoryview(self._map)[entry["offset"] : entry["offset"] + entry["bytes"]]


def _damaged(path: Path, what: str) -> PlanError:
    return PlanError(f"{path}: {what}; copy or compile the plan again")


def _read_directory(path: Path, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    try:
        return {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            raise _damaged(path, f"cut short or damaged: its table of contents is unreadable ({error})") from error
        raise PlanError(f"{path}: not an engine plan (which is a zip file)") from error


def _data_offset(path: Path, data: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where the zip itself says the entry's data starts: after its local header, name and extra field."""
    header = data[info.header_offset : info.header_offset + _LOCAL_HEADER]
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise _damaged(path, f"entry {info.filename} has no header at offset {info.header_offset}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes


def _read_manifest(path: Path, data: mmap.mmap, directory: dict[str, zipfile.ZipInfo]) -> dict[str, Any]:
    if MANIFEST not in directory:
        raise PlanError(f"{path}: not an engine plan: it is a zip file without {MANIFEST}")
    info = directory[MANIFEST]
    start = _data_offset(path, data, info)
    text = data[start : start + info.file_size]
    if len(text) != info.file_size or zlib.crc32(text) != info.CRC:
        raise _damaged(path, f"{MANIFEST} is damaged (its checksum does not match)")
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise _damaged(path, f"{MANIFEST} is not JSON ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or not isinstance(manifest.get("entries"), dict):
        raise PlanError(f"{path}: not an engine plan: {MANIFEST} names no format version and entries")
    if version > FORMAT_VERSION:
        raise PlanError(f"{path}: has format version {version}, this runtime reads {FORMAT_VERSION}; upgrade duq")
    if version < FORMAT_VERSION:
        raise PlanError(f"{path}: has the old format version {version}; compile it again with this duq")
    return manifest


def _check_entries(path: Path, data: mmap.mmap, directory: dict[str, zipfile.ZipInfo], entries: dict[str, Any]) -> None:
    """Every entry of the manifest is in the zip, stored, of the size and at the offset that the graphs refer to."""
    for name, entry in entries.items():
        if name not in directory:
            raise _damaged(path, f"entry {name} is missing")
        info = directory[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != entry["bytes"]:
            raise _damaged(path, f"entry {name} has {info.file_size} stored bytes, not {entry['bytes']}")
        if _data_offset(path, data, info) != entry["offset"] or entry["offset"] + entry["bytes"] > len(data):
            raise _damaged(path, f"entry {name} is not at offset {entry['offset']}: packed again by another tool?")


def _check_hashes(path: Path, fd: int, entries: dict[str, Any]) -> None:
    """Hashes all entries in parallel (hashlib lets other threads run), the largest first."""
    by_size = sorted(entries, key=lambda name: -entries[name]["bytes"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda name: _sha256(fd, entries[name]["offset"], entries[name]["bytes"]), by_size)
        for name, digest in zip(by_size, digests, strict=True):
            if digest != entries[name]["sha256"]:
                raise _damaged(path, f"entry {name} is damaged (its SHA-256 does not match)")


def _sha256(fd: int, offset: int, size: int) -> str:
    """Reads instead of mapping: the pages hashed do not count as this process's memory."""
    digest, buffer = hashlib.sha256(), bytearray(min(size, _CHUNK))
    while size:
        got = os.preadv(fd, [memoryview(buffer)[:size]], offset)
        if not got:
            break  # the file shrank while it was read: the digest will not match
        digest.update(memoryview(buffer)[:got])
        offset, size = offset + got, size - got
    return digest.hexdigest()
