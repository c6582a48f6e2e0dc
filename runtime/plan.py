"""The engine plan: one uncompressed zip whose entries are aligned and hashed.

local header | padding | weights/...    each entry's data starts on its alignment (the padding is a standard
local header | padding | graph/...      extra field of the local header), so that a builder may map the file and
...                                     take tensors out of it without a copy
local header | manifest.json            it holds the offset, size and SHA-256 of every entry before it
local header | manifest.sig             perhaps: a signature of the manifest, and so of everything (runtime/signing.py)
central directory                       the zip's own table of contents: ``unzip -l`` lists a plan
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import time
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from duq.runtime import schema, signing
from duq.runtime.errors import PlanError
from duq.runtime.files import Draft

FORMAT_VERSION = 2
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
Bytes = bytes | bytearray | memoryview
Buffer = bytearray | memoryview | np.ndarray[Any, Any]  # writable
Data = Bytes | np.ndarray | Iterable[Bytes]

_CHUNK = 1 << 20  # bytes hashed and written, or read and hashed, at a time
_PAGE = 4096  # alignment of large entries: whole pages, so that touching one faults in nothing else
_CACHE_LINE = 64
_ALIGNMENT_FIELD = 0xD935  # the extra-field id that zipalign uses for padding
_LOCAL_HEADER = 30  # fixed part of a zip local header; the name and the extra fields follow
_ZIP64_FIELD = 20  # the extra field with 64-bit sizes, in every header so that a stream may pass 4 GB
_TICK_NS = 12_000_000  # Linux stamps files at least 100 times a second: two writes within a tick look like one
_MAX_MANIFEST = 256 << 20  # bytes


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

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of every entry so far."""
        return {name: entry["bytes"] for name, entry in self._entries.items()}

    def write(self, name: str, data: Data, alignment: int | None = None) -> int:
        """Appends an entry and returns the absolute file offset of its data.

        `data` is bytes-like, an array (its raw bytes in C order) or an iterable of bytes-like pieces; it is hashed and
        written in small chunks. `alignment` (bytes) defaults to a page for large or streamed data, else a cache line.
        """
        if name in self._entries or name in (MANIFEST, SIGNATURE):
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

    def finish(self, manifest: dict[str, Any], signer: signing.Signer | None = None) -> None:
        """Adds the manifest (with `format_version` and `entries`), and where there is a `signer` its signature, flushes to
        disk and renames over `path`. PlanError if the manifest is none that a reader takes."""
        text = json.dumps({**manifest, "format_version": FORMAT_VERSION, "entries": self._entries}, indent=1).encode()
        try:
            schema.parse_manifest(text)
        except PlanError as error:
            raise PlanError(f"{self.path}: cannot be written: {MANIFEST}: {error}") from error
        self._zip.writestr(zipfile.ZipInfo(MANIFEST), text)
        if signer is not None:
            self._zip.writestr(zipfile.ZipInfo(SIGNATURE), signer.sign(text).to_json())
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
    """An open plan: its manifest, checked, and its entries, read from the file when they are asked for.

    What was verified is what is read: a plan keeps the file that it opened, whatever comes to be at its path, and reading
    raises PlanError once that file has been written to or cut short. It never maps the file: to touch a mapping of a file that
    was cut short ends the process. Replace a plan by renaming another one over it.

    `verify` also compares the SHA-256 of every entry. `verify_key`, a file with an Ed25519 public key (PEM), asks for a plan
    that is signed with it. Raises PlanError if the file is missing, not a plan, cut short, damaged, of another format version,
    lacks an entry, describes what no policy can be, is not signed so, or changes while it is opened.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True, verify_key: str | os.PathLike[str] | None = None):
        self.path = Path(path)
        if verify_key is not None and not verify:
            raise PlanError(f"{self.path}: a signature holds for compared hashes; leave verify=False out, or the key")
        key = None if verify_key is None else signing.read_public_key(verify_key)
        try:
            self._fd = _open(self.path)
            self._release = weakref.finalize(self, os.close, self._fd)
            found = _settled(self.path, self._fd)
            self.size, self._identity, self._is_altered = found.st_size, _identity(found), False
            directory = _read_directory(self.path, self._fd)
            text = self._text = self._contained(directory, MANIFEST)
            self.signature = self._signature(directory)
            if key is not None:
                signing.check(self.path, key, self.signature, text)
            self.manifest = _read_manifest(self.path, text)
            self._entries: dict[str, dict[str, Any]] = self.manifest["entries"]
            _check_entries(self.path, self._fd, self.size, directory, self._entries)
            self._verified = dict.fromkeys(self._entries, _history(found)) if verify else {}
            if verify:
                _check_hashes(self.path, self._fd, self._entries)
            self.check_unchanged()
        except OSError as error:
            raise PlanError(f"{self.path}: cannot be read: {error.strerror}") from error

    @property
    def names(self) -> list[str]:
        """The entries in file order, without the manifest."""
        return list(self._entries)

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of every entry."""
        return {name: entry["bytes"] for name, entry in self._entries.items()}

    def read(self, name: str) -> bytes:
        """The bytes of an entry."""
        with self._reading(name) as (offset, size):
            data = _pread(self._fd, offset, size)
        self._check_entry(name, len(data) == size)
        return data

    def read_into(self, name: str, into: Buffer, start: int = 0) -> None:
        """Fills `into`, contiguous, with the bytes of an entry from `start` on. PlanError where it has fewer."""
        view = (into.data if isinstance(into, np.ndarray) else memoryview(into)).cast("B")
        with self._reading(name) as (offset, size):
            if not 0 <= start <= size - len(view):
                raise _damaged(self.path, f"entry {name} has {size} bytes, not {start + len(view)}")
            done = 0
            while done < len(view) and (got := os.preadv(self._fd, [view[done:]], offset + start + done)):
                done += got
        self._check_entry(name, done == len(view))

    def copy_into(self, descriptor: int, name: str) -> None:
        """Copies an entry into another open file, to the offset that it has in this one."""
        with self._reading(name) as (offset, size):
            os.lseek(descriptor, offset, os.SEEK_SET)
            done = 0
            while done < size and (got := os.sendfile(descriptor, self._fd, offset + done, size - done)):
                done += got
        self._check_entry(name, done == size)

    def check_unchanged(self) -> None:
        """Raises PlanError if the open file was written to or cut short since it was opened, or is closed. Takes microseconds.

        A file that another one was renamed over is not changed, only out of sight.
        """
        self._look()

    def _look(self) -> os.stat_result:
        """What the system says of the open file; raises as `check_unchanged`."""
        if not self._release.alive:
            raise PlanError(f"{self.path}: is closed; open it again")
        try:
            found = os.fstat(self._fd)
        except OSError as error:  # a network file system has lost the file
            raise PlanError(f"{self.path}: cannot be read any more ({error.strerror}); open it again") from error
        if _identity(found) != self._identity or self._is_altered:
            raise PlanError(
                f"{self.path}: was written to while in use, so it is no longer what was opened; replace a plan by rename "
                "(mv new.plan engine.plan), and open it again"
            )
        return found

    @contextmanager
    def _reading(self, name: str) -> Iterator[tuple[int, int]]:
        """Around reading of an entry: where it lies, offset and bytes."""
        if name not in self._entries:
            raise PlanError(f"{self.path}: has no entry {name}; compile the plan again")
        self.check_unchanged()
        try:
            yield self._entries[name]["offset"], self._entries[name]["bytes"]
        except OSError as error:
            raise PlanError(f"{self.path}: entry {name} cannot be read: {error.strerror}") from error

    def _check_entry(self, name: str, whole: bool) -> None:
        """After reading of an entry: raises PlanError unless it is what was verified, and all of it was read.

        Who writes to the file and sets its time of modification back leaves a trace: the time of the file's last change of
        any kind. A new name or mode leaves it, too. So the entry is hashed once more, except where the file has lost a name:
        another one was renamed over it, as it should be.
        """
        verified, now = self._verified.get(name), _history(self._look())
        if verified is not None and verified != now:
            entry, has_lost_a_name = self._entries[name], now[1] < verified[1]
            if not has_lost_a_name and _sha256(self._fd, entry["offset"], entry["bytes"]) != entry["sha256"]:
                self._is_altered = True
            self._verified[name] = now
            self.check_unchanged()
        if not whole:
            raise _damaged(self.path, f"entry {name} is cut short")

    def is_signed(self) -> bool | None:
        """Whether it has a signature that matches, by whatever key; None where `cryptography` is not installed to tell.

        Raises PlanError where it has one that does not match.
        """
        if self.signature is None:
            return False
        if not signing.is_available():
            return None
        signing.check(self.path, self.signature.key, self.signature, self._text)
        return True

    def close(self) -> None:
        """Gives the file back."""
        self._release()

    def _contained(self, directory: dict[str, zipfile.ZipInfo], name: str) -> bytes:
        """What the zip holds under a name that is no entry of the manifest: the manifest itself."""
        if name not in directory:
            raise PlanError(f"{self.path}: not an engine plan: it is a zip file without {name}")
        info = directory[name]
        start = _data_offset(self.path, self._fd, info)
        if info.file_size > min(_MAX_MANIFEST, self.size - start):
            raise _damaged(self.path, f"{name} reaches beyond its end")
        text = _pread(self._fd, start, info.file_size)
        if zlib.crc32(text) != info.CRC:
            raise _damaged(self.path, f"{name} is damaged (its checksum does not match)")
        return text

    def _signature(self, directory: dict[str, zipfile.ZipInfo]) -> signing.Signature | None:
        if SIGNATURE not in directory:
            return None
        try:
            return signing.Signature.from_json(self._contained(directory, SIGNATURE))
        except signing.SignatureFormatError as error:
            raise _damaged(self.path, f"{SIGNATURE}: {error}") from error


def _damaged(path: Path, what: str) -> PlanError:
    return PlanError(f"{path}: {what}; copy or compile the plan again")


def _open(path: Path) -> int:
    """A descriptor of the file. Opening a pipe does not wait for a writer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL in the name
        raise PlanError(f"{path!s:.80}: cannot be read: {error}") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise PlanError(f"{path}: cannot be read: {'Is a directory' if stat.S_ISDIR(mode) else 'is no regular file'}")
    return fd


def _settled(path: Path, fd: int) -> os.stat_result:
    """What tells the file from what a later write would make of it."""
    found = os.fstat(fd)
    if not found.st_size:
        raise _damaged(path, "is empty")
    age = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns)
    if 0 <= age < _TICK_NS:  # just written: let the clock go on, so that another write bears another time
        time.sleep((_TICK_NS - age) / 1e9)
        found = os.fstat(fd)
    return found


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _history(found: os.stat_result) -> tuple[int, int]:
    """Of the file's last change of any kind: its time, and the names that the file has since."""
    return found.st_ctime_ns, found.st_nlink


def _pread(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes from there on, fewer where the file has shrunk."""
    pieces = []
    while size and (piece := os.pread(fd, size, offset)):  # the system reads up to 2 GB at a time
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_directory(path: Path, fd: int) -> dict[str, zipfile.ZipInfo]:
    with open(fd, "rb", closefd=False) as file:
        try:
            return {info.filename: info for info in zipfile.ZipFile(file).infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
            if os.pread(fd, 4, 0) == b"PK\x03\x04":
                raise _damaged(path, f"cut short or damaged: its table of contents is unreadable ({error})") from error
            raise PlanError(f"{path}: not an engine plan (which is a zip file)") from error


def _data_offset(path: Path, fd: int, info: zipfile.ZipInfo) -> int:
    """Where the zip itself says the entry's data starts: after its local header, name and extra field."""
    header = os.pread(fd, _LOCAL_HEADER, info.header_offset) if 0 <= info.header_offset < 1 << 62 else b""
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise _damaged(path, f"entry {info.filename} has no header at offset {info.header_offset}")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return info.header_offset + _LOCAL_HEADER + int(name_bytes) + int(extra_bytes)


def _read_manifest(path: Path, text: bytes) -> dict[str, Any]:
    try:
        manifest = schema.parse_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {MANIFEST}: {error}; copy or compile the plan again") from error
    version = manifest.get("format_version")
    if type(version) is not int or not isinstance(manifest.get("entries"), dict):
        raise PlanError(f"{path}: not an engine plan: {MANIFEST} names no format version and entries")
    if version > FORMAT_VERSION:
        raise PlanError(f"{path}: has format version {version}, this runtime reads {FORMAT_VERSION}; upgrade duq")
    if version < FORMAT_VERSION:
        raise PlanError(f"{path}: has the old format version {version}; compile it again with this duq")
    try:
        schema.check(schema.Manifest, manifest)
    except PlanError as error:
        raise PlanError(f"{path}: {MANIFEST}: {error}; compile the plan again") from error
    return manifest


def _check_entries(path: Path, fd: int, size: int, directory: dict[str, zipfile.ZipInfo], entries: dict[str, Any]) -> None:
    """Every entry of the manifest is in the zip, stored, of the size and at the offset that the graphs refer to."""
    for name, entry in entries.items():
        if name not in directory:
            raise _damaged(path, f"entry {name} is missing")
        info = directory[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != entry["bytes"]:
            raise _damaged(path, f"entry {name} has {info.file_size} stored bytes, not {entry['bytes']}")
        if _data_offset(path, fd, info) != entry["offset"] or entry["offset"] + entry["bytes"] > size:
            raise _damaged(path, f"entry {name} is not at offset {entry['offset']}: packed again by another tool?")
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda each: (each[1]["offset"], each[1]["bytes"])):
        if entry["bytes"] and entry["offset"] < end:
            raise _damaged(path, f"entries {before} and {name} overlap")
        end, before = max(end, entry["offset"] + entry["bytes"]), name


def _check_hashes(path: Path, fd: int, entries: dict[str, Any]) -> None:
    """Hashes all entries in parallel (hashlib lets other threads run), the largest first."""
    by_size = sorted(entries, key=lambda name: -entries[name]["bytes"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda name: _sha256(fd, entries[name]["offset"], entries[name]["bytes"]), by_size)
        for name, digest in zip(by_size, digests, strict=True):
            if digest != entries[name]["sha256"]:
                raise _damaged(path, f"entry {name} is damaged (its SHA-256 does not match)")


def _sha256(fd: int, offset: int, size: int) -> str:
    digest, buffer = hashlib.sha256(), bytearray(min(size, _CHUNK))
    while size:
        got = os.preadv(fd, [memoryview(buffer)[:size]], offset)
        if not got:
            break  # the file shrank while it was read: the digest will not match
        digest.update(memoryview(buffer)[:got])
        offset, size = offset + got, size - got
    return digest.hexdigest()
