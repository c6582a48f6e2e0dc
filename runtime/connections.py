"""The connections of a server, each held to the server's limits.

websockets parses, answers pings and closes. Added here, for peers that mean ill or are gone: a status line for whatever is no
request of a websocket, an account of what each peer makes us hold, and a deadline for all that we wait for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections import deque
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Request, ServerConnection
from websockets.frames import DATA_OPCODES, CloseCode, Frame
from websockets.protocol import State
from websockets.streams import StreamReader

from duq.runtime.errors import MessageError
from duq.runtime.metrics import Metrics
from duq.runtime.server_limits import Limits, RateLimit, one_line

FRAGMENT_BYTES = 1024  # what a fragment is charged beside its bytes: an empty one is not free to hold and to parse
MAX_HEAD = 16 << 10  # bytes of an HTTP request
_SMALL = 4096  # bytes of a frame below which it counts as small
_SLICE = 32 << 10  # bytes that are parsed at a time
_GRACE = 1.0  # seconds in which a refused peer may read why
_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) (\S+) HTTP/(\d)\.(\d)")
_LINE_END = re.compile(rb"\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
log = logging.getLogger(__name__)
log.addFilter(RateLimit())


class GuardedConnection(ServerConnection):
    """A client's connection, from the first byte of its HTTP request."""

    def __init__(self, *arguments: Any, guard: Guard, **options: Any):
        super().__init__(*arguments, **options)
        self.plain_http = False  # the request is a HEAD, or of HTTP/1.0: no websocket may come of it
        self.head_only = False
        self.name = "a client that has left"
        self.network = ""  # what counts as one address
        self.counted = 0  # bytes that the guard has on its account
        self._guard = guard
        self._made = self.loop.time()
        self._head = bytearray()  # of the HTTP request, until it is whole
        self._opened = False  # the head is whole, and websockets has it
        self.dropped = False  # what still comes is not read
        self._backlog = b""  # what has come and is not parsed yet, while the peer is slowed down
        self._small = 0  # small frames since the last look at the allowance
        self._allowance, self._allowed = float(guard.limits.small_frames_per_second), self._made
        self._slowed = False
        self._frames = 0  # cost of the frames that have come, until their message is answered
        self._taken = 0  # of these, cost of the message that `receive` returned last
        self._unread: deque[Frame] = deque()  # websockets' parser keeps the last one, whose data would stay with it
        self._fragmented = False
        self._began: float | None = None  # the time at which an unfinished message began
        self._waiting: float | None = None  # the time since which `receive` waits
        self._stalled: float | None = None  # the time since which the peer does not take what is sent
        self._closing: float | None = None

    async def receive(self) -> bytes:
        """The next message, by which the last one counts as answered.

        Raises MessageError if it is text, ConnectionClosed if there is none to come.
        """
        self._frames -= self._taken
        self._taken, self._waiting = 0, self.loop.time()
        self._guard.count(self)
        parts = []
        async for part in self.recv_streaming():
            if not self._unread:  # it has ended, and what still waited was dropped
                await self.wait_closed()
                raise self.protocol.close_exc
            self._unread.popleft().data = b""
            if isinstance(part, str):
                raise MessageError("message: is a text frame, expected a binary one as openpi-client sends it")
            self._taken += len(part) + FRAGMENT_BYTES
            if part:
                parts.append(part)
            if self._taken - FRAGMENT_BYTES > self._guard.limits.message_bytes:
                limit = self._guard.limits.message_bytes
                self.refuse(
                    "message_bytes", CloseCode.MESSAGE_TOO_BIG, f"over the limit of {limit} bytes with its fragments"
                )
        self._waiting = None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def refuse(self, kind: str, code: CloseCode, reason: str) -> None:
        """Ends the connection with a close frame, and reads nothing more. kind: of metrics.REFUSAL_KINDS."""
        if self.dropped:
            return
        self._refused(kind, reason)
        if self.state is State.OPEN:
            self.protocol.fail(code, reason)
            self.send_data()

    def cut(self, kind: str, reason: str) -> None:
        """Ends the connection without a word, for a peer that would not hear it."""
        self._refused(kind, reason)
        self.transport.abort()

    @property
    def held(self) -> int:
        """Bytes that this peer makes us hold: unfinished frames, and messages until they are answered."""
        return len(self.protocol.reader.buffer) + len(self._backlog) + self._frames

    def overdue(self, now: float) -> tuple[str, str] | None:
        """The kind and the reason for which the peer is to be cut, if its time is up. now: of the event loop."""
        limits = self._guard.limits
        if self.state is State.CONNECTING:
            if now - self._made > limits.open_seconds:
                return "open_seconds", f"no HTTP request in {limits.open_seconds:g} s"
        elif self._stalled is not None and now - self._stalled > limits.send_seconds:
            return "send_seconds", f"has not taken what was sent in {limits.send_seconds:g} s"
        elif self.state is State.CLOSING:
            self._closing = self._closing or now
            if now - self._closing > limits.close_seconds:
                return "close_seconds", f"has not closed in {limits.close_seconds:g} s"
        elif self._began and self._waiting and now - max(self._began, self._waiting) > limits.message_seconds:
            return "message_seconds", f"has not finished a message in {limits.message_seconds:g} s"
        return None

    # --- what asyncio and websockets call -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if peer := transport.get_extra_info("peername"):  # None if it has left already
            self.name, self.network = f"{peer[0]}:{peer[1]}", _network(peer[0])
        super().connection_made(transport)
        self.recv_messages.resume = self._read_on  # there are more reasons to pause than a full queue
        self._guard.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._backlog = b""
        while self._unread:
            self._unread.popleft().data = b""
        self._guard.remove(self)

    def data_received(self, data: bytes) -> None:
        if self.dropped:
            return
        if not self._opened:
            data = self._whole_request(data)
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        """Hands data on, a slice at a time, as long as the peer's small frames are within its allowance."""
        for start in range(0, len(data), _SLICE):
            if self.dropped or self.transport.is_closing():
                break
            if self._slowed:
                self._backlog += data[start:]
                break
            super().data_received(data[start : start + _SLICE])
            self._spend_allowance()
        if not (self.protocol.reader.buffer or self._fragmented):
            self._began = None
        elif self._began is None:
            self._began = self.loop.time()
        if self._slowed or self._stalled is not None:  # it takes no pongs, so it need not send pings
            self.transport.pause_reading()
        self._guard.count(self)

    def _spend_allowance(self) -> None:
        """Each frame costs time, whatever is in it: whoever sends many small ones is read more slowly."""
        rate, now = self._guard.limits.small_frames_per_second, self.loop.time()
        self._allowance = min(rate, self._allowance + (now - self._allowed) * rate) - self._small
        self._allowed, self._small = now, 0
        if self._allowance < 0:
            self._slowed = True
            self._guard.metrics.refusal("small_frames_per_second")
            self.loop.call_later(-self._allowance / rate, self._speed_up)

    def _speed_up(self) -> None:
        self._slowed = False
        backlog, self._backlog = self._backlog, b""
        if self.state is State.CLOSED:
            return
        self._parse(backlog)
        self._read_on()

    def _read_on(self) -> None:
        """Reads what the peer sends, unless there is a reason not to."""
        if not (self._slowed or self._stalled is not None or self.recv_messages.paused):
            self.transport.resume_reading()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A peer that only asks may close its half at once, and is answered all the same."""
        if self.dropped or self.state is not State.CONNECTING:
            return super().eof_received()
        if self._opened:
            self.loop.call_later(_GRACE, self.transport.abort)
        elif self._head:
            self._answer(HTTPStatus.BAD_REQUEST, "an incomplete request")
        return self._opened

    def process_event(self, event: Any) -> None:
        if isinstance(event, Frame):
            self._small += len(event.data) < _SMALL
        if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
            self._frames += len(event.data) + FRAGMENT_BYTES
            self._unread.append(event)
            self._fragmented = not event.fin
            if event.fin:
                self._began = None
        super().process_event(event)

    def send_data(self) -> None:
        """Sends in one write what there is to send: hundreds of pongs, where a peer that has left sent as many pings."""
        writes = self.protocol.data_to_send()
        if data := b"".join(writes):
            self.transport.write(data)
        if writes and not writes[-1]:  # websockets' sign for the end
            self.transport.write_eof()

    def pause_writing(self) -> None:
        self._stalled = self.loop.time()
        self.transport.pause_reading()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled = None
        self._read_on()
        super().resume_writing()

    # --- the HTTP request -----------------------------------------------------------------------------------------------

    def _whole_request(self, data: bytes) -> bytes:
        """All that has come, once the request's head is whole and fit for websockets; until then nothing."""
        self._head += data
        if not self._head[:1].isupper():  # a client of TLS does not wait for a line's end
            return self._answer(HTTPStatus.BAD_REQUEST, "not HTTP (and no TLS is spoken here)")
        end = _HEAD_END.search(self._head)
        if (end.end() if end else len(self._head)) > MAX_HEAD:
            return self._answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has at most {MAX_HEAD} bytes")
        first = _LINE_END.search(self._head)
        if first is None:
            return b""
        line = _REQUEST_LINE.fullmatch(self._head[: first.start()])
        if line is None:
            return self._answer(HTTPStatus.BAD_REQUEST, "not a request line of HTTP/1.1")
        method, target, *version = map(bytes, line.groups())
        if version not in ([b"1", b"0"], [b"1", b"1"]):
            return self._answer(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this is HTTP/1.1")
        if method not in (b"GET", b"HEAD"):
            return self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "send GET or HEAD", Allow="GET, HEAD")
        if end is None:
            return b""
        self.head_only = method == b"HEAD"
        self.plain_http = self.head_only or version == [b"1", b"0"]
        head = (
            b"GET " + target + b" HTTP/1.1" + self._head[first.start() : end.end()]
        )  # the only form that websockets reads
        if error := _unreadable(head):
            return self._answer(HTTPStatus.BAD_REQUEST, error)
        self._opened, rest = True, bytes(self._head[end.end() :])
        self._head.clear()
        return head + rest

    def _answer(self, status: HTTPStatus, text: str, **headers: str) -> bytes:
        """Answers what websockets would pass over in silence, and reads nothing more."""
        response = self.protocol.reject(status, f"{one_line(text)}\n")
        for name, value in headers.items():
            response.headers[name] = value
        self._refused("http", f"{status.value}: {text}")
        self.transport.write(response.serialize())
        self.transport.write_eof()
        return b""

    def _refused(self, kind: str, reason: str) -> None:
        self.dropped = True
        self._head.clear()
        self._guard.metrics.refusal(kind)
        log.info("%s: refused (%s)", self.name, one_line(reason))
        self.loop.call_later(_GRACE, self.transport.abort)


class Guard:
    """All connections of one server, with the account of what they cost."""

    def __init__(self, limits: Limits, metrics: Metrics):
        self.limits, self.metrics = limits, metrics
        self.connections: dict[GuardedConnection, None] = {}  # in the order in which they came
        self._opening: dict[GuardedConnection, None] = {}  # those of them that are no websockets yet
        self._buffered = 0
        self._stopping = False
        metrics.limits(limits)
        metrics.buffered.set_function(lambda: self._buffered)

    def add(self, connection: GuardedConnection) -> None:
        """A connection that was just accepted: nothing is known of its peer."""
        self.connections[connection] = self._opening[connection] = None
        if self._stopping:
            connection.transport.abort()
        if len(self._opening) > self.limits.handshakes:
            oldest = next(iter(self._opening))
            del self._opening[oldest]
            oldest.cut("handshakes", f"the oldest of more than {self.limits.handshakes} that are no websockets yet")

    def remove(self, connection: GuardedConnection) -> None:
        """A connection that has ended."""
        self._opening.pop(connection, None)
        self.connections.pop(connection, None)
        self._buffered -= connection.counted
        connection.counted = 0

    def admit(self, connection: GuardedConnection) -> str | None:
        """Lets a connection become a websocket, or says why not."""
        open_ones = self.connections.keys() - self._opening.keys()
        kind, limit = "clients", self.limits.clients
        if len(open_ones) < limit:
            kind, limit = "clients_per_address", self.limits.clients_per_address
            if sum(each.network == connection.network for each in open_ones) < limit:
                self._opening.pop(connection, None)
                return None
        self.metrics.refusal(kind)
        log.warning("%s: refused (%d clients are connected, the limit %s)", connection.name, limit, kind)
        return f"{limit} clients are connected, which is the server's limit ({kind}); try again later"

    def count(self, connection: GuardedConnection) -> None:
        """Brings a connection's account up to date. Whoever holds most has to go when all hold too much."""
        if connection not in self.connections:  # it has ended, and its account is closed
            return
        self._buffered += connection.held - connection.counted
        connection.counted = connection.held
        if self._buffered > self.limits.buffered_bytes:
            for each in self.connections:
                if each.dropped:  # and still holds what it held; no time to read why
                    each.transport.abort()
            largest = max(self.connections, key=lambda each: 0 if each.dropped else each.counted)
            reason = f"all clients' unanswered messages exceed {self.limits.buffered_bytes} bytes, and yours most"
            largest.refuse("buffered_bytes", CloseCode.TRY_AGAIN_LATER, reason)

    async def enforce(self) -> None:
        """Cuts every connection whose time is up, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(0.5, self.limits.shortest / 4))
            for connection in list(self.connections):
                try:
                    if overdue := connection.overdue(loop.time()):
                        connection.cut(*overdue)
                except Exception:  # one connection's trouble must not end the watch over the others
                    log.exception("%s: cannot be watched", connection.name)
                    connection.transport.abort()

    def cut_opening(self) -> None:
        """Cuts those that have asked for nothing yet, and from now on all that come: the server stops."""
        self._stopping = True
        for connection in list(self._opening):
            connection.transport.abort()

    def cut_all(self) -> None:
        """Cuts every connection, at the end of the server's patience."""
        for connection in list(self.connections):
            connection.cut("stop_seconds", "the server shuts down")


def _network(host: str) -> str:
    """What counts as one address: whoever has an IPv6 address has all of its /64."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def _unreadable(head: bytes) -> str:
    """Why websockets cannot read a request, or nothing."""
    reader = StreamReader()
    reader.feed_data(head)
    reader.feed_eof()
    try:
        deque(Request.parse(reader.read_line), maxlen=0)
    except Exception as error:  # whatever its parser raises is about the request
        return str(error) or type(error).__name__
    return ""
