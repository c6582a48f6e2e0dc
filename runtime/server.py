"""A drop-in for openpi's policy server: websocket, one binary frame of msgpack an observation and one for its actions.

client                                  server
  | -- GET /  (Authorization: Api-Key) -> |
  | <------------------------- metadata - |     the policy's, once
  | -- observation ---------------------> |     -> worker thread: decode, infer, encode
  | <--- actions, timing, or text: error - |
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hmac
import logging
import socket
import threading
import time
import traceback
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, cast

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from websockets.asyncio.server import Request, Response, Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from duq.plugins.errors import DuqError
from duq.runtime.connections import Guard, GuardedConnection
from duq.runtime.errors import MessageError, ObservationError
from duq.runtime.messages import pack, unpack
from duq.runtime.metrics import Metrics
from duq.runtime.recording import Recorder
from duq.runtime.server_limits import Limits, RateLimit, one_line

# Why the websocket layer itself ends a connection, as the metrics name it.
_REFUSALS: dict[int, str] = {
    CloseCode.MESSAGE_TOO_BIG: "oversized",
    CloseCode.PROTOCOL_ERROR: "malformed",
    CloseCode.INVALID_DATA: "malformed",
}
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # why a connection cannot be accepted
_TRACEBACK = 4000  # characters of an internal error that are sent, of each of its ends
_RECORDER_SECONDS = 2.0  # for the recorder to write what waits, at the end
log = logging.getLogger(__name__)
log.addFilter(RateLimit())
_websockets_log = logging.getLogger(f"{__name__}.websockets")


class ServedPolicy(Protocol):
    """What a server asks of a policy: `duq.Policy`, or whatever stands in for it."""

    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def outside_limits(self) -> Mapping[str, int]: ...
    def check(self) -> None: ...
    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]: ...
    def reload(self) -> None: ...


class PolicyServer:
    """Serves one policy to any number of clients.

    Calls run in one worker thread, so that the event loop answers pings, /healthz and /metrics meanwhile. The worker
    takes requests in the order of their arrival, and of each client one at a time (the next ones wait in its
    connection): clients that keep sending are served in turn.

    api_key: what clients must send as `Authorization: Api-Key ...`; None: nothing is asked of them.
    limits: what clients may cost, and how long they are waited for.
    recorder: is offered every observation that was answered with actions; started and closed by `run`.
    watch: its file is loaded again, by `policy.reload()`, when it is another.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        api_key: str | None = None,
        limits: Limits | None = None,
        recorder: Recorder | None = None,
        watch: PlanWatch | None = None,
    ):
        self.metrics = Metrics()
        self.abandoned = False  # after `run`: a thread is still at work, whose end was not waited for
        self._policy = policy
        self._metadata = pack(policy.metadata)
        self._authorization = None if api_key is None else f"Api-Key {api_key}".encode()
        self._limits = limits or Limits()
        self._guard = Guard(self._limits, self.metrics)
        self._recorder = recorder
        self._watch = watch
        self._worker = ThreadPoolExecutor(1, "duq-infer")
        self._loader = ThreadPoolExecutor(1, "duq-reload")
        self._busy: set[ServerConnection] = set()
        self._stop, self._outdated = asyncio.Event(), asyncio.Event()
        self.metrics.plan(policy.fingerprint)
        self.metrics.outside_limits(lambda: policy.outside_limits)

    async def run(self, listener: socket.socket) -> None:
        """Serves on a bound TCP socket until `stop` is called; then answers the requests it has, and returns.

        It returns at most `limits.stop_seconds` and a few seconds after `stop`, whatever clients and engine do.
        """
        asyncio.get_running_loop().set_exception_handler(self._loop_error)
        if self._recorder is not None:
            self._recorder.start(self.metrics.recording)
        server = await serve(
            self._converse,
            sock=listener,
            process_request=self._http,
            process_response=self._http_response,
            origins=[None],  # no web page that someone on this machine looks at: a browser always sends an Origin
            compression=None,  # images hardly shrink
            max_size=self._limits.message_bytes,
            max_queue=1,  # a client's further messages stay in its socket, not in our memory
            open_timeout=None,  # the guard's
            ping_interval=self._limits.ping_seconds,
            ping_timeout=self._limits.ping_seconds,
            close_timeout=self._limits.close_seconds,
            logger=_websockets_log,
            create_connection=cast(type[ServerConnection], functools.partial(GuardedConnection, guard=self._guard)),
        )
        log.info("serving on %s:%d", *listener.getsockname()[:2])
        enforcing, *loading = [asyncio.ensure_future(f()) for f in (self._guard.enforce, self._reloads, self._watches)]
        await self._stop.wait()
        for task in loading:
            task.cancel()
        await self._drain(server)
        enforcing.cancel()

    def stop(self) -> None:
        """Begins the end of `run`. To be called in its event loop."""
        self._stop.set()

    def reload(self) -> None:
        """Loads the plan again, beside the running one, and goes on with it between two calls. A plan that cannot be used
        is logged and counted, and the running one goes on. To be called in the event loop of `run`."""
        self._outdated.set()

    # --- the end --------------------------------------------------------------------------------------------------------

    async def _drain(self, server: Server) -> None:
        """Lets running requests end, within the limit; then nothing is waited for any more."""
        end = time.monotonic() + self._limits.stop_seconds
        server.close(close_connections=False)
        self._guard.cut_opening()
        idle = server.connections - self._busy
        log.info("stopping: %d clients are idle, %d get their reply", len(idle), len(self._busy))
        closings = [asyncio.ensure_future(_close_stopped(connection)) for connection in idle]
        if not await _within(end, server.wait_closed(), *closings):
            log.warning("stopping: %d clients are cut, they have not closed in time", len(self._guard.connections))
            self._guard.cut_all()
            await _within(time.monotonic() + 1, server.wait_closed())
        for pool, what in ((self._worker, "a call"), (self._loader, "loading the plan")):
            if not await _within(max(end, time.monotonic() + 0.5), asyncio.wrap_future(pool.submit(lambda: None))):
                log.warning("stopping: %s still runs and is given up", what)
                self.abandoned = True
            pool.shutdown(wait=False, cancel_futures=True)
        if self._recorder is not None:
            closing = threading.Thread(target=self._recorder.close, daemon=True)
            closing.start()
            closing.join(_RECORDER_SECONDS)
            if closing.is_alive():
                log.warning("stopping: the last recordings are not all written, the disk does not keep up")

    def _loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_FILES:
            self.metrics.refusal("files")
            log.warning("no connection can be accepted: %s; raise ulimit -n, or lower --max-clients", error.strerror)
        else:
            loop.default_exception_handler(context)

    # --- the plan -------------------------------------------------------------------------------------------------------

    async def _watches(self) -> None:
        """Has the plan loaded again when its file is another, for ever."""
        loop = asyncio.get_running_loop()
        while self._watch is not None:
            await asyncio.sleep(self._watch.seconds)
            if await loop.run_in_executor(self._loader, self._watch.changed):
                log.info("%s was replaced", self._watch.path)
                self.reload()

    async def _reloads(self) -> None:
        """Loads the plan whenever that is asked for, for ever."""
        while True:
            await self._outdated.wait()
            self._outdated.clear()
            try:
                await asyncio.get_running_loop().run_in_executor(self._loader, self._policy.reload)
                self._metadata = pack(self._policy.metadata)
            except Exception as error:
                log.error(
                    "the plan was not loaded again, the running one goes on: %s",
                    one_line(str(error) or type(error).__name__, 1000),
                    exc_info=None if isinstance(error, DuqError) else error,
                )
                self.metrics.reload("failed")
            else:
                self.metrics.plan(self._policy.fingerprint)
                self.metrics.reload("ok")
                log.info("the plan was loaded again: %s", self._policy.fingerprint)

    # --- HTTP -----------------------------------------------------------------------------------------------------------

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP; None lets the websocket's handshake go on."""
        assert isinstance(connection, GuardedConnection)
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return self._health(connection)
        if not self._authorized(request):
            self.metrics.error("unauthorized")
            log.warning("%s: wrong or no API key", connection.name)
            return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong or no API key: send Authorization: Api-Key KEY\n")
        if path == "/metrics":
            response = connection.respond(HTTPStatus.OK, generate_latest(self.metrics.registry).decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE_LATEST
            return response
        if connection.plain_http or "Upgrade" not in request.headers:
            self.metrics.refusal("http")
            text = "this is a policy server: connect with a websocket (openpi-client), or GET /healthz or /metrics\n"
            response = connection.respond(HTTPStatus.UPGRADE_REQUIRED, text)
            response.headers["Upgrade"] = "websocket"
            return response
        if refusal := self._guard.admit(connection):
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{refusal}\n")
        return None

    def _health(self, connection: ServerConnection) -> Response:
        """Whether calls can succeed: after some faults of a GPU they cannot, until the process is started again."""
        try:
            self._policy.check()
        except DuqError as error:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{one_line(str(error), 1000)}\n")
        return connection.respond(HTTPStatus.OK, "OK\n")

    def _http_response(self, connection: ServerConnection, request: Request, response: Response) -> None:
        assert isinstance(connection, GuardedConnection)
        if connection.protocol.handshake_exc is not None:  # websockets does not accept what `_http` let through
            self.metrics.refusal("handshake")
            log.info("%s: refused (%s)", connection.name, one_line(str(connection.protocol.handshake_exc)))
        if connection.head_only:
            response.body = b""

    def _authorized(self, request: Request) -> bool:
        if self._authorization is None:
            return True
        given = request.headers.get_all("Authorization")
        return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), self._authorization)

    # --- a client -------------------------------------------------------------------------------------------------------

    async def _converse(self, connection: ServerConnection) -> None:
        """One client from the metadata to its end."""
        assert isinstance(connection, GuardedConnection)
        gone = asyncio.ensure_future(connection.wait_closed())
        log.info("%s: connected", connection.name)
        with self.metrics.clients.track_inprogress():
            try:
                await connection.send(self._metadata)
                previous: dict[str, float] = {}
                while not self._stop.is_set():
                    start = time.perf_counter()
                    await self._answer_next(connection, gone, previous)
                    previous = {"prev_total_ms": (time.perf_counter() - start) * 1e3}  # as openpi has it: with the wait
                await _close_stopped(connection)
            except ConnectionClosed as closed:
                code = closed.sent.code if closed.sent and not closed.rcvd_then_sent else None
                if code in _REFUSALS:
                    self.metrics.error(_REFUSALS[code])
                if closed.sent and closed.sent.reason == "keepalive ping timeout":
                    self.metrics.refusal("ping_seconds")
                log.info("%s: left (%s)", connection.name, one_line(str(closed)))
            finally:
                gone.cancel()

    async def _answer_next(
        self, connection: GuardedConnection, gone: asyncio.Future[Any], previous: dict[str, float]
    ) -> None:
        """Waits for a request, and sends the actions, or the error that belongs to this client alone."""
        try:
            job = self._worker.submit(self._call, await connection.receive(), time.perf_counter(), previous)
        except MessageError as misfit:
            await self._report(connection, misfit)
            await connection.wait_closed()
            raise connection.protocol.close_exc from None  # websockets reads nothing behind a message that was given up
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

    def _call(self, request: bytes, received: float, previous: dict[str, float]) -> bytes:
        """A request's work, in the worker thread: the reply, encoded. received: the time at which it came."""
        start = time.perf_counter()
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

    async def _report(self, connection: GuardedConnection, error: BaseException) -> None:
        """An error goes out as text, which openpi's client raises. Only a misfit observation leaves the connection open."""
        if isinstance(error, ObservationError):
            self.metrics.error("observation")
            await connection.send(one_line(f"ObservationError: {error}"))
        elif isinstance(error, MessageError):
            self.metrics.error("malformed")
            await connection.send(one_line(f"MessageError: {error}"))
            await connection.close(CloseCode.UNSUPPORTED_DATA, "Not a request of openpi-client: see the previous frame.")
        elif isinstance(error, DuqError):  # of the engine or the plan: it says what to do
            self.metrics.error("internal")
            log.error("%s: the call failed: %s", connection.name, one_line(str(error), 1000))
            await connection.send(one_line(f"{type(error).__name__}: {error}", 1000))
            await connection.close(CloseCode.INTERNAL_ERROR, "The policy failed: see the previous frame.")
        else:
            self.metrics.error("internal")
            text = "".join(traceback.format_exception(error))
            if len(text) > 2 * _TRACEBACK:
                text = f"{text[:_TRACEBACK]}\n...\n{text[-_TRACEBACK:]}"
            log.error("%s: the call failed\n%s", connection.name, text)
            await connection.send(text)
            await connection.close(CloseCode.INTERNAL_ERROR, "Internal server error: see the previous frame.")


class PlanWatch:
    """Tells when a file is another than before: replaced by a rename, or the link to it, or written to.

    seconds: between two looks. To be made before the file is opened, so that no change is missed.
    """

    def __init__(self, path: Path, seconds: float = 1.0):
        self.path, self.seconds = path, seconds
        self._seen = self._identity()

    def changed(self) -> bool:
        """Whether it is there and another than at the last call, or than at first."""
        now = self._identity()
        if now is None or now == self._seen:
            return False
        self._seen = now
        return True

    def _identity(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:  # between being removed and put there anew
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


async def _close_stopped(connection: ServerConnection) -> None:
    await connection.close(CloseCode.GOING_AWAY, "the server shuts down")


async def _within(end: float, *awaitables: Awaitable[Any]) -> bool:
    """Whether all are done before `end`, of time.monotonic()."""
    futures = [asyncio.ensure_future(each) for each in awaitables]
    _, pending = await asyncio.wait(futures, timeout=max(0.0, end - time.monotonic()))
    return not pending


def _without_failed_handshakes(record: logging.LogRecord) -> bool:
    """They fail for every port scan and TCP probe, and `_http_response` logs those that have asked for something."""
    return record.msg != "opening handshake failed"


_websockets_log.setLevel(logging.WARNING)
_websockets_log.addFilter(_without_failed_handshakes)
_websockets_log.addFilter(RateLimit())
