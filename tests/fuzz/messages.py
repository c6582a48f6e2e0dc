"""Hostile messages at a running server, with a good client beside them whose replies have to stay right."""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np

from duq.runtime import Policy
from duq.runtime.messages import pack, unpack
from duq.runtime.server_limits import Limits
from duq.tools.hostile import _UPGRADE, frame
from tests.fuzz.judge import FOREIGN, HANG, MEMORY, SECONDS, WRONG, Failure, judged, peak
from tests.fuzz.mutate import damage
from tests.fuzz.plans import Attempt, check_actions, noise_of
from tests.support.observations import libero
from tests.support.serving import Served

# Short waits, and more connections than one peer may make: each try is a new one.
LIMITS = Limits(
    message_bytes=4 << 20, buffered_bytes=16 << 20, open_seconds=2, message_seconds=2, send_seconds=2, close_seconds=1,
    small_frames_per_second=10_000,
)  # fmt: skip
PATIENCE_S = 0.1  # for a reply that may never come
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
FIN = 0x80


@contextmanager
def ready(folder: Path) -> Iterator[Attempt]:
    with Policy(folder / "cpu.plan", threads=1) as policy, _errors_logged() as errors:
        good, noise = libero(), noise_of(policy)
        fixed = _WithNoise(policy, noise)
        expected = fixed.infer(good)["actions"]
        served = Served(fixed, limits=LIMITS)
        try:
            client, before = served.client(), peak()

            def beside() -> None:
                start = time.perf_counter()
                reply = client.infer(good)
                if not np.array_equal(reply["actions"], expected):
                    raise Failure(WRONG, f"the good client got {reply['actions'].ravel()[:3]}, not {expected.ravel()[:3]}")
                if time.perf_counter() - start > 4 * SECONDS:
                    raise Failure(HANG, "the good client waited long")

            def attempt(seed: int) -> str:
                name, data = hostile(good, Random(f"messages {seed}"))
                where, ended = f"messages, seed {seed}, {name}", []
                judged(where, lambda: ended.append(_exchange(served.port, data, beside, policy)), ())
                if errors or peak() - before > MEMORY:
                    found = errors.pop(0) if errors else f"the server took {peak() / 1e9:.1f} GB"
                    errors.clear()
                    raise Failure(FOREIGN, f"{where}: {found}")
                return str(ended[0])

            yield attempt
            if not served.thread.is_alive():
                raise Failure(FOREIGN, "messages: the server ended")
            if served.metric('duq_errors_total{kind="internal"}'):
                raise Failure(FOREIGN, "messages: the server counted internal errors")
        finally:
            served.stop()
            served.thread.join(20)
        if served.thread.is_alive():
            raise Failure(HANG, "messages: the server did not stop")


class _WithNoise:
    """A policy whose replies depend on nothing but the observation."""

    def __init__(self, policy: Policy, noise: np.ndarray):
        self._policy, self._noise = policy, noise
        self.metadata, self.fingerprint, self.outside_limits = policy.metadata, policy.fingerprint, policy.outside_limits
        self.check, self.reload = policy.check, policy.reload

    def infer(self, obs: Any) -> dict[str, Any]:
        return self._policy.infer(obs, self._noise)


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.found.append(f"{text} {record.exc_info[1]!r}" if record.exc_info else text)


@contextmanager
def _errors_logged() -> Iterator[list[str]]:
    """What is logged as an error: of the server, of websockets and of asyncio."""
    handler = _Errors()
    logging.getLogger().addHandler(handler)
    try:
        yield handler.found
    finally:
        logging.getLogger().removeHandler(handler)


def _exchange(port: int, data: bytes, beside: Callable[[], None], policy: Policy) -> str:
    """Sends the bytes, behind the metadata if they begin as a client does, has the good client ask, and reads: what was said."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as peer:
        received, is_client = bytearray(), data.startswith(_UPGRADE)
        with suppress(ConnectionError):  # the server may have closed before it had read everything
            if is_client:
                peer.sendall(_UPGRADE)
                while not any(_frames(bytes(received).partition(b"\r\n\r\n")[2])):
                    received += peer.recv(1 << 16)
            peer.sendall(data[len(_UPGRADE) :] if is_client else data)
        beside()
        peer.settimeout(PATIENCE_S)
        with suppress(ConnectionError, TimeoutError):
            while piece := peer.recv(1 << 16):
                received += piece
    return _said(bytes(received), policy)


def _said(received: bytes, policy: Policy) -> str:
    """The kind of the last thing that the server said; Failure for a traceback or actions that cannot be."""
    if b"Traceback (most recent" in received:
        raise Failure(FOREIGN, received[received.find(b"Traceback") :].decode(errors="replace")[-800:])
    head, _, rest = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 101"):
        return f"HTTP {head[9:12].decode()}" if head.startswith(b"HTTP") else "nothing"
    said = "silence"
    for opcode, payload in list(_frames(rest))[1:]:  # the first is the metadata
        if opcode == BINARY:
            check_actions(np.array(unpack(payload)["actions"]), policy)
        said = {TEXT: payload.split(b":")[0].decode(errors="replace"), BINARY: "actions"}.get(opcode, said)
        if opcode == CLOSE and said == "silence":
            said = f"closed {struct.unpack('!H', payload[:2])[0] if payload else ''}"
    return said


def _frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The whole frames of what a server sent: opcode, payload."""
    at = 0
    while at + 2 <= len(data):
        opcode, size, start = data[at] & 15, data[at + 1], at + 2
        if size > 125:
            width = 2 if size == 126 else 8
            size, start = int.from_bytes(data[start : start + width], "big"), start + width
        if start + size > len(data):
            return
        yield opcode, data[start : start + size]
        at = start + size


# --- what is sent -----------------------------------------------------------------------------------------------------


def hostile(good: dict[str, Any], random: Random) -> tuple[str, bytes]:
    """The name of a kind of message, and all bytes that a connection sends."""
    kinds: tuple[Callable[[dict[str, Any], Random], bytes], ...] = (
        damaged, damaged, edited, edited, edited, claims, claims, claims, collections, text, fragments, compressed, sizes, heads,
        controls, requests, noise, several,
    )  # fmt: skip
    kind = random.choice(kinds)
    return kind.__name__, kind(good, random)


def damaged(good: dict[str, Any], random: Random) -> bytes:
    """The bytes of an observation, damaged."""
    return _UPGRADE + frame(damage(pack(good), random))


def edited(good: dict[str, Any], random: Random) -> bytes:
    """An observation with another value, or another field of an array."""
    message = msgpack.unpackb(pack(good))
    holder = message
    key = random.choice(list(holder))
    while isinstance(holder[key], dict) and random.random() < 0.8:
        holder = holder[key]
        key = random.choice(list(holder))
    match random.randrange(4):
        case 0:
            del holder[key]
        case 1:
            holder[random.choice(("x", b"x", b"__ndarray__", b"__npgeneric__", "state", "\0" * 100))] = holder.pop(key)
        case _:
            holder[key] = random.choice(VALUES)
    return _UPGRADE + frame(msgpack.packb(message))


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, -(2**63), 1e308, float("nan"), "", "x", "x" * 70_000, b"", b"x", b"\xff" * 100, [], [[]], {},
    {b"a": 1}, [1] * 2000, [[0] * 100] * 100, {str(i): i for i in range(2000)}, "<f4", "|O", "|V8", "<U1000000", "<M8[s]", "<c16",
    ">f8", "|b1", [3], [0], [1 << 40], [-1], [1.5], ["3"], [1] * 40, [1 << 32, 1 << 32], msgpack.ExtType(5, b"x"),
    msgpack.Timestamp(1),
)  # fmt: skip


def claims(good: dict[str, Any], random: Random) -> bytes:
    """Arrays that say what they are not."""
    array = {
        random.choice((b"__ndarray__", b"__ndarray__", b"__npgeneric__")): random.choice((True, True, False, None)),
        b"data": random.choice(
            (b"", bytes(32), bytes(28), b"\xff" * 32, b"\x7f" * 32, "x", 5, None, [1], random.randbytes(64))
        ),
        b"dtype": random.choice(
            ("<f4", "<f8", "|u1", "<i8", "|b1", "<U4", "|O", "x", "f4,f4", "<f4" * 1000, 5, b"<f4", None)
        ),
        b"shape": random.choice(
            ([8], [2, 4], [0], [], [-8], [1 << 62], [1 << 31] * 3, [1] * 33, 8, None, ["8"], [8.0], [True])
        ),
    }
    if random.random() < 0.3:
        array.pop(random.choice(list(array)))
    message = msgpack.unpackb(pack(good))
    message[random.choice(list(message))] = random.choice((array, array, [array, array], {"x": array}))
    return _UPGRADE + frame(msgpack.packb(message))


def collections(good: dict[str, Any], random: Random) -> bytes:
    """Few bytes that claim much: lists, maps, texts, extensions."""
    heads = (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\1",
    )
    bodies = (
        random.choice(heads) + random.choice((b"", b"\x90" * 100, random.randbytes(1000))),
        b"\x91" * random.choice((100, 10_000, 1_000_000)) + b"\x90", b"\x81\x90" * 5000, b"\x81" * 10_000,
        b"\xdc\x04\x00" + b"\x90" * 1024, b"\x90" * 100_000, b"\xc1", b"\xd6\xff" + bytes(4), b"\x80" * 2,
        msgpack.packb({"\0" * (1 << 20): 1}), msgpack.packb({"prompt": "x" * 60_000}), msgpack.packb([good.keys().__len__()]),
    )  # fmt: skip
    return _UPGRADE + frame(random.choice(bodies))


def text(good: dict[str, Any], random: Random) -> bytes:
    """Text where bytes are expected."""
    payload = random.choice((b"", b"{}", b"hello", b"\xff\xfe", b"\xed\xa0\x80", pack(good), b"x" * 100_000, b"\0" * 1000))
    return _UPGRADE + frame(payload, TEXT)


def fragments(good: dict[str, Any], random: Random) -> bytes:
    """A message in pieces: whole, without an end, mixed with other frames, or of nothing."""
    data, size = pack(good), random.choice((1000, 5000, 100_000))
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    if random.random() < 0.3:
        pieces = [b""] * random.choice((10, 3000)) + pieces
    frames = [frame(piece, CONTINUATION if at else BINARY, at == len(pieces) - 1) for at, piece in enumerate(pieces)]
    extra = random.choice(
        (b"", frame(b"x", PING), frame(b"x", BINARY), frame(b"", CONTINUATION), frame(b"x", BINARY, False))
    )
    frames.insert(random.randrange(len(frames) + 1), extra)
    return _UPGRADE + b"".join(frames[: random.choice((len(frames), len(frames), len(frames) // 2))])


def compressed(good: dict[str, Any], random: Random) -> bytes:
    """Frames with the bits of an extension that was not agreed upon, or was asked for."""
    asked = _UPGRADE.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
    payload = bytearray(frame(random.choice((pack(good), bytes(1000), random.randbytes(100)))))
    payload[0] |= random.choice((0x40, 0x20, 0x10, 0x70))
    return random.choice((_UPGRADE, asked)) + bytes(payload)


def sizes(good: dict[str, Any], random: Random) -> bytes:
    """Frames whose heads claim other sizes than they have."""
    payload, real = random.choice((b"", pack(good))), len(pack(good))
    claimed = random.choice(
        (real - 1, real + 1, 1 << 20, 4 << 20, (4 << 20) + 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
    )
    return _UPGRADE + frame(payload, size=claimed) + random.choice((b"", frame(b"x")))


def heads(good: dict[str, Any], random: Random) -> bytes:
    """Frames of no kind, without a mask, or with random heads."""
    kind = random.randrange(3)
    if kind == 0:
        return _UPGRADE + frame(b"x", random.choice((3, 5, 7, 11, 15)))
    if kind == 1:
        return _UPGRADE + b"\x82\x05hello"
    return _UPGRADE + random.randbytes(14) + pack(good)[: random.randrange(2000)]


def controls(good: dict[str, Any], random: Random) -> bytes:
    """Pings, pongs and closings that break the rules, or come in heaps."""
    opcode = random.choice((PING, PONG, CLOSE))
    payloads = (
        b"",
        b"\0",
        bytes(125),
        b"\x03\xe8",
        b"\xff\xff",
        b"\0\1x",
        b"\x03\xe8\xff\xfe",
        struct.pack("!H", random.randrange(5000)),
    )
    found = frame(random.choice(payloads), opcode, random.random() < 0.8) * random.choice((1, 1, 200))
    long = bytes([FIN | opcode, 0xFE]) + struct.pack("!H", 1000) + bytes(1004)
    return _UPGRADE + random.choice((found, found, long)) + random.choice((b"", frame(pack(good))))


def requests(good: dict[str, Any], random: Random) -> bytes:
    """Heads of HTTP that are no good ones."""
    if random.random() < 0.5:
        return damage(_UPGRADE, random) + frame(pack(good))
    methods = (
        b"GET / HTTP/1.1",
        b"HEAD /healthz HTTP/1.1",
        b"POST / HTTP/1.1",
        b"GET / HTTP/1.0",
        b"GET http://x/ HTTP/1.1",
        b"G",
        b"",
    )
    lines = (
        b"Host: x",
        b"Host: x" * 5000,
        b"X: \xff\0",
        b"Content-Length: 99999999999",
        b"Origin: http://evil",
        b"Upgrade: h2c",
        b": x",
    )
    return random.choice(methods) + b"\r\n" + random.choice(lines) + random.choice((b"\r\n\r\n", b"\r\n", b"\n\n"))


def noise(good: dict[str, Any], random: Random) -> bytes:
    return random.choice((b"", _UPGRADE)) + random.randbytes(random.choice((1, 100, 5000, 100_000)))


def several(good: dict[str, Any], random: Random) -> bytes:
    """A few good and bad messages, one behind the other."""
    bad = frame(random.choice((b"", b"\xc1", msgpack.packb({"a": 1}), msgpack.packb(5))))
    return _UPGRADE + b"".join(random.choice((frame(pack(good)), bad, frame(b"x", PING))) for _ in range(6))
