"""Peers that a server must endure, for a soak test: none of them listens, finishes or makes sense."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgpack

_UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: server\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
_BINARY, _CONTINUATION, _PING = 2, 0, 9
_PAUSE = 0.5  # seconds between two of a peer's attempts


def frame(payload: bytes = b"", opcode: int = _BINARY, fin: bool = True, size: int | None = None) -> bytes:
    """A client's websocket frame, masked with zeros. size: what its head claims, if that is not the payload's."""
    size = len(payload) if size is None else size
    head = struct.pack("!BB", opcode | 0x80 * fin, 0x80 | size) if size < 126 else b""
    return (head or struct.pack("!BBQ", opcode | 0x80 * fin, 0xFF, size)) + bytes(4) + payload


def _connect(port: int) -> socket.socket:
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that few replies fill it
    peer.settimeout(2)
    peer.connect(("127.0.0.1", port))
    return peer


def _websocket(port: int) -> socket.socket:
    peer = _connect(port)
    peer.sendall(_UPGRADE)
    return peer


def never_reads(port: int) -> None:
    """Asks for errors without pause, and reads none of them."""
    with _websocket(port) as peer:
        request = frame(msgpack.packb({f"key {number}": number for number in range(50)}))
        for _ in range(1000):
            peer.sendall(request * 20)


def reads_no_pongs(port: int) -> None:
    """Pings without pause."""
    with _websocket(port) as peer:
        for _ in range(1000):
            peer.sendall(frame(bytes(100), _PING) * 100)


def garbage(port: int) -> None:
    """Random bytes: as a request, as frames, as messages."""
    noise = random.Random().randbytes(random.randrange(1, 5000))
    for data in (noise, _UPGRADE + noise, _UPGRADE + frame(noise), _UPGRADE + frame(noise, opcode=1)):
        with suppress(OSError), _connect(port) as peer:
            peer.sendall(data)
            peer.recv(4096)


def slow_loris(port: int) -> None:
    """Twenty requests that never end, a byte at a time."""
    peers = [_connect(port) for _ in range(20)]
    try:
        for position in range(40):
            for peer in peers:
                peer.sendall(_UPGRADE[position : position + 1])
            time.sleep(0.5)
    finally:
        for peer in peers:
            peer.close()


def huge_key(port: int) -> None:
    """A message that is one long key of NULs."""
    with _websocket(port) as peer:
        peer.sendall(frame(msgpack.packb({"\0" * (8 << 20): 1})))
        while peer.recv(4096):
            pass


def unfinished(port: int) -> None:
    """Most of a large message, and then nothing."""
    with _websocket(port) as peer:
        peer.sendall(frame(bytes(16 << 20), size=60 << 20))
        peer.settimeout(60)
        while peer.recv(4096):
            pass


def empty_fragments(port: int) -> None:
    """A message of fragments without content, without end."""
    with _websocket(port) as peer:
        peer.sendall(frame(fin=False))
        while True:
            peer.sendall(frame(opcode=_CONTINUATION, fin=False) * 1000)
            time.sleep(0.01)


def half_open(port: int) -> None:
    """Connects, and is silent."""
    with _connect(port) as peer:
        peer.settimeout(60)
        peer.recv(1)


KINDS: tuple[Callable[[int], None], ...] = (
    never_reads, reads_no_pongs, garbage, slow_loris, huge_key, unfinished, empty_fragments, half_open,
)  # fmt: skip


@contextmanager
def hostile_peers(port: int) -> Iterator[None]:
    """One of each kind, in a process of their own, at work until the block ends."""
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(port,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _work(port: int) -> None:
    for kind in KINDS:
        threading.Thread(target=_repeat, args=(kind, port), daemon=True).start()
    while os.getppid() != 1:
        time.sleep(1)


def _repeat(kind: Callable[[int], None], port: int) -> None:
    while True:
        with suppress(OSError):  # that the server ends the connection is what is hoped for
            kind(port)
        time.sleep(_PAUSE)
