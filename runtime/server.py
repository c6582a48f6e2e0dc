"""A drop-in for openpi's policy server: websocket, one binary frame of msgpack an observation and one for its actions.

client                                  server
  | -- GET /  (Authorization: Api-Key) -> |
  | <------------------------- metadata - |     the policy's, once
  | -- observation ---------------------> |     -> worker thread: decode, infer, encode
  | <--- actions, timing, or text: error - |
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from duq.runtime.errors import MessageError, ObservationError
from duq.runtime.messages import pack, unpack
from duq.runtime.metrics import Metrics
from duq.runtime.policy import Policy
from duq.runtime.recording import Recorder

# Why the websocket layer itself ends a connection, as the metrics name it.
_REFUSALS: dict[int, str] = {
    CloseCode.MESSAGE_TOO_BIG: "oversized",
    CloseCode.PROTOCOL_ERROR: "malformed",
    CloseCode.INVALID_DATA: "malformed",
}
log = logging.getLogger(__name__)


class PolicyServer:
    """Serves one policy to any number of clients.

    Calls run in one worker thread, so that the event loop answers pings, /healthz and /metrics meanwhile. The worker
    takes requests in the order of their arrival, and of each client one at a time (the next ones wait in its
    connection): clients that keep sending are served in turn.

    api_key: what clients must send as `Authorization: Api-Key ...`; None: nothing is asked of them.
    max_message_bytes: a larger message ends its connection with close code 1009.
    recorder: is offered every observation that was answered with actions; started and closed by `run`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        api_key: str | None = None,
        max_message_bytes: int = 64 << 20,
        recorder: Recorder | None = None,
    ):
        self.metrics = Metrics()
        self._policy = policy
        self._metadata = pack(policy.metadata)
        self._authorization = None if api_key is None else f"Api-Key {api_key}".encode()
        self._max_message_bytes = max_message_bytes
        self._recorder = recorder
        self._worker = ThreadPoolExecutor(1, "duq-infer")
        self._busy: set[ServerConnection] = set()
        self._stop = asyncio.Event()

    async def run(self, listener: socket.socket) -> None:
        """Serves on a bound TCP socket until `stop` is called; then answers the requests it has, and returns."""
        if self._recorder is not None:
            self._recorder.start(self.metrics.recording)
        async with serve(
            self._converse,
            sock=listener,
            process_request=self._http,
            origins=[None],  # no web page that someone on this machine looks at: a browser always sends an Origin
            compression=None,  # images hardly shrink
            max_size=self._max_message_bytes,
            max_queue=1,  # a client's further messages stay in its socket, not in our memory
        ) as server:
            log.info("serving on %s:%d", *listener.getsockname()[:2])
            await self._stop.wait()
            server.close(close_connections=False)
            idle = server.connections - self._busy
            log.info("stopping: %d clients are idle, %d get their reply", len(idle), len(self._busy))
            await asyncio.gather(*(_close_stopped(connection) for connection in idle))
        self._worker.shutdown()
        if self._recorder is not None:
            self._recorder.close()

    def stop(self) -> None:
        """Begins the end of `run`. To be called in its event loop."""
        self._stop.set()

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP; None lets the websocket's handshake go on."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if not self._authorized(request):
            self.metrics.error("unauthorized")
            log.warning("%s: wrong or no API key", _name(connection))
            return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong or no API key: send Authorization: Api-Key KEY\n")
        if path == "/metrics":
            response = connection.respond(HTTPStatus.OK, generate_latest(self.metrics.registry).decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE_LATEST
            return response
        return None

    def _authorized(self, request: Request) -> bool:
        if self._authorization is None:
            return True
        given = request.headers.get_all("Authorization")
        return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), self._authorization)

    async def _converse(self, connection: ServerConnection) -> None:
        """One client from the metadata to its end."""
        gone = asyncio.ensure_future(connection.wait_closed())
        log.info("%s: connected", _name(connection))
        with self.metrics.clients.track_inprogress():
            try:
                await connection.send(self._metadata)
                previous: dict[str, float] = {}
                while not self._stop.is_set():
                    start = time.perf_counter()
                    request = await connection.recv()
                    await self._answer(connection, gone, request, previous)
                    previous = {"prev_total_ms": (time.perf_counter() - start) * 1e3}  # as openpi has it: with the wait
                await _close_stopped(connection)
            except ConnectionClosed as closed:
                code = closed.sent.code if closed.sent and not closed.rcvd_then_sent else None
                if code in _REFUSALS:
                    self.metrics.error(_REFUSALS[code])
                log.info("%s: left (%s)", _name(connection), closed)
            finally:
                gone.cancel()

    async def _answer(
        self, connection: ServerConnection, gone: asyncio.Future[Any], request: bytes | str, previous: dict[str, Any]
    ) -> None:
        """Sends the actions, or the error that belongs to this client alone."""
        job = self._worker.submit(self._call, request, time.perf_counter(), previous)
        call = asyncio.wrap_future(job)
        self._busy.add(connection)
        try:
            with self.metrics.queue_depth.track_inprogress():
                await asyncio.wait({call, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():  # nobody waits for it any more
                job.cancel()  # at once, where call.cancel() alone would do it in the loop's next turn
                call.cancel()
                self.metrics.error("disconnected")
                raise connection.protocol.close_exc
            if error := call.exception():
                await self._report(connection, error)
            else:
                await connection.send(call.result())
        finally:
            self._busy.discard(connection)

    def _call(self, request: bytes | str, received: float, previous: dict[str, Any]) -> bytes:
        """A request's work, in the worker thread: the reply, encoded. received: the time at which it came."""
        start = time.perf_counter()
        if isinstance(request, str):
            raise MessageError("message: is a text frame, expected a binary one as openpi-client sends it")
        observation = unpack(request)
        ready = time.perf_counter()
        reply = self._policy.infer(observation)
        end = time.perf_counter()
        queue_ms, infer_ms = (start - received) * 1e3, (end - ready) * 1e3
        self.metrics.times({"queue_ms": queue_ms, "decode_ms": (ready - start) * 1e3, **reply["policy_timing"]})
        self.metrics.requests.inc()
        if self._recorder is not None:
            self._recorder.offer(observation)
        return pack(reply | {"server_timing": {"infer_ms": infer_ms, "queue_ms": queue_ms, **previous}})

    async def _report(self, connection: ServerConnection, error: BaseException) -> None:
        """An error goes out as text, which openpi's client raises. Only a misfit observation leaves the connection open."""
        if isinstance(error, ObservationError):
            self.metrics.error("observation")
            await connection.send(f"ObservationError: {error}")
        elif isinstance(error, MessageError):
            self.metrics.error("malformed")
            await connection.send(f"MessageError: {error}")
            await connection.close(CloseCode.UNSUPPORTED_DATA, "Not a request of openpi-client: see the previous frame.")
        else:
            self.metrics.error("internal")
            log.error("%s: the call failed", _name(connection), exc_info=error)
            await connection.send("".join(traceback.format_exception(error)))
            await connection.close(CloseCode.INTERNAL_ERROR, "Internal server error: see the previous frame.")


async def _close_stopped(connection: ServerConnection) -> None:
    await connection.close(CloseCode.GOING_AWAY, "the server shuts down")


def _name(connection: ServerConnection) -> str:
    host, port = connection.remote_address[:2]
    return f"{host}:{port}"
