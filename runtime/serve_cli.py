"""``duq-serve engine.plan``: a policy behind openpi's websocket protocol."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import command_app
from duq.runtime.policy import Policy
from duq.runtime.recording import Recorder
from duq.runtime.server_limits import Limits, RateLimit, keep_freed_memory, reserve_files

if TYPE_CHECKING:
    from duq.runtime.server import PolicyServer

API_KEY_VARIABLE = "DUQ_API_KEY"
_DEFAULT = Limits()


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def _Seconds(what: str) -> Any:
    return typer.Option(min=0.1, callback=_finite, help=f"Seconds {what}")


app = command_app()
log = logging.getLogger(__name__)


@app.command()
def _serve(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="An engine.plan")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help=f"What clients must send. Others on this machine see it; prefer ${API_KEY_VARIABLE}.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file that holds the API key.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the engine; by default one a core.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the noise that actions start from; by default random.")
    ] = None,
    verify_key: Annotated[
        Path | None, typer.Option(help="A public key (PEM): serve no plan that is not signed with it.")
    ] = None,
    max_message_mb: Annotated[
        int, typer.Option(min=1, max=1024, help="Largest observation accepted, in MiB.")
    ] = _DEFAULT.message_bytes >> 20,
    max_buffered_mb: Annotated[
        int, typer.Option(min=1, help="Of all clients' unanswered messages, in MiB; above, the largest holder has to go.")
    ] = _DEFAULT.buffered_bytes >> 20,
    max_clients: Annotated[int, typer.Option(min=1, help="Clients connected at a time.")] = _DEFAULT.clients,
    max_clients_per_address: Annotated[
        int, typer.Option(min=1, help="Of them, from one IPv4 address or IPv6 /64.")
    ] = _DEFAULT.clients_per_address,
    max_handshakes: Annotated[
        int, typer.Option(min=1, help="Connections that are no client yet; above, the oldest has to go.")
    ] = _DEFAULT.handshakes,
    max_small_frames: Annotated[
        int, typer.Option(min=1, help="Frames below 4 KiB a second from a client; above, it is read more slowly.")
    ] = _DEFAULT.small_frames_per_second,
    open_timeout: Annotated[float, _Seconds("for a connection's HTTP request.")] = _DEFAULT.open_seconds,
    message_timeout: Annotated[float, _Seconds("from a message's first byte to its last.")] = _DEFAULT.message_seconds,
    send_timeout: Annotated[float, _Seconds("for a client to take what is sent to it.")] = _DEFAULT.send_seconds,
    ping_timeout: Annotated[
        float, _Seconds("between two pings of an idle client, and for the answer to one.")
    ] = _DEFAULT.ping_seconds,
    close_timeout: Annotated[float, _Seconds("for a client to close when it is told to.")] = _DEFAULT.close_seconds,
    stop_timeout: Annotated[float, _Seconds("after SIGTERM for running requests to end.")] = _DEFAULT.stop_seconds,
    watch: Annotated[
        bool, typer.Option("--watch", help="Load PLAN again when its file is replaced, as SIGHUP does.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Folder to write observations to, for duq-compile --calibration.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="With --record: write one of so many observations.")] = 10,
    record_limit: Annotated[
        float, typer.Option(min=0, callback=_finite, help="With --record: the most the folder may hold, in GB.")
    ] = 1.0,
) -> None:
    """Answer the unmodified openpi-client with a plan's actions.

    GET /healthz answers OK, GET /metrics in Prometheus' format. SIGTERM lets running requests finish, then exits with 0.
    SIGHUP loads the plan again, and goes on with it between two calls.

    [bold]Examples[/bold]

      duq-serve engine.plan

      DUQ_API_KEY=$(cat key) duq-serve engine.plan --host 0.0.0.0

      duq-serve engine.plan --record observations/
    """
    try:
        from duq.runtime.server import PlanWatch, PolicyServer
    except ModuleNotFoundError as error:
        raise DuqError(f"duq-serve needs {error.name}: pip install 'duq-vla[server]'") from error
    key = _api_key(api_key, api_key_file)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").addFilter(RateLimit())
    limits = Limits(
        message_bytes=max_message_mb << 20,
        buffered_bytes=max_buffered_mb << 20,
        clients=max_clients,
        clients_per_address=max_clients_per_address,
        handshakes=max_handshakes,
        small_frames_per_second=max_small_frames,
        open_seconds=open_timeout,
        message_seconds=message_timeout,
        send_seconds=send_timeout,
        ping_seconds=ping_timeout,
        close_seconds=close_timeout,
        stop_seconds=stop_timeout,
    )
    reserve_files(limits)
    with _bound_socket(host, port) as listener:  # a port in use is found before the plan is opened
        if key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            log.warning("anyone who reaches %s can use this policy: set $%s", host, API_KEY_VARIABLE)
        recorder = None if record is None else Recorder(record, every=every, limit_bytes=int(record_limit * 1e9))
        watched = PlanWatch(plan) if watch else None  # before the plan is opened: no replacement is missed
        policy = Policy(plan, threads=threads, seed=seed, verify_key=verify_key)
        policy.warmup()
        server = PolicyServer(policy, api_key=key, limits=limits, recorder=recorder, watch=watched)
        asyncio.run(run_until_signal(server, listener))
    if server.abandoned:  # a thread is in the engine; the interpreter would wait for it
        logging.shutdown()
        os._exit(0)


async def run_until_signal(server: PolicyServer, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT; SIGHUP has the plan loaded again."""
    keep_freed_memory()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop() -> None:
        server.stop()
        for each in signals:
            loop.remove_signal_handler(each)  # a second one ends the process at once

    for each in signals:
        loop.add_signal_handler(each, stop)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    await server.run(listener)


def _api_key(given: str | None, file: Path | None) -> str | None:
    """The one key that was given, in whichever way. DuqError if there are two, if it cannot be part of an HTTP header,
    or if it is empty (a variable unset by mistake must not open the server to everyone)."""
    keys = {
        "--api-key": given,
        "--api-key-file": None if file is None else file.read_text(errors="replace").strip(),
        f"${API_KEY_VARIABLE}": os.environ.get(API_KEY_VARIABLE),
    }
    keys = {source: key for source, key in keys.items() if key is not None}
    if len(keys) > 1:
        raise DuqError(f"{' and '.join(keys)}: give the API key in one way")
    for source, key in keys.items():
        if not key:
            raise DuqError(f"{source}: the API key is empty; leave it out to serve without one")
        if not (key.isascii() and key.isprintable()):
            raise DuqError(f"{source}: the API key must be one line of ASCII characters")
        return key
    return None


def _bound_socket(host: str, port: int) -> socket.socket:
    """A TCP socket that has its address but does not listen yet: nobody connects before the policy is warm."""
    if not host.strip():  # which the system takes for every address
        raise DuqError("--host: is empty; name an address, 0.0.0.0 for every one of this machine")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # no such host, or a name that no host can have
        reason = getattr(error, "strerror", None) or error
        raise DuqError(f"--host {host} --port {port}: cannot be listened on ({reason})") from error
    return listener


def main() -> None:
    with one_line_errors():
        app()


if __name__ == "__main__":
    main()
