"""``duq-serve engine.plan``: a policy behind openpi's websocket protocol."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import command_app
from duq.runtime.policy import Policy
from duq.runtime.recording import Recorder

if TYPE_CHECKING:
    from duq.runtime.server import PolicyServer

API_KEY_VARIABLE = "DUQ_API_KEY"
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
    seed: Annotated[int | None, typer.Option(help="Of the noise that actions start from; by default random.")] = None,
    verify_key: Annotated[
        Path | None, typer.Option(help="A public key (PEM): serve no plan that is not signed with it.")
    ] = None,
    max_message_mb: Annotated[int, typer.Option(min=1, help="Largest observation accepted, in MiB.")] = 64,
    record: Annotated[
        Path | None, typer.Option(help="Folder to write observations to, for duq-compile --calibration.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="With --record: write one of so many observations.")] = 10,
    record_limit: Annotated[float, typer.Option(min=0, help="With --record: the most the folder may hold, in GB.")] = 1.0,
) -> None:
    """Answer the unmodified openpi-client with a plan's actions.

    GET /healthz answers OK, GET /metrics in Prometheus' format. SIGTERM lets running requests finish, then exits with 0.

    [bold]Examples[/bold]

      duq-serve engine.plan

      DUQ_API_KEY=$(cat key) duq-serve engine.plan --host 0.0.0.0

      duq-serve engine.plan --record observations/
    """
    try:
        from duq.runtime.server import PolicyServer
    except ModuleNotFoundError as error:
        raise DuqError(f"duq-serve needs {error.name}: pip install 'duq-vla[server]'") from error
    key = _api_key(api_key, api_key_file)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("websockets.server").setLevel(logging.WARNING)
    logging.getLogger("websockets.server").addFilter(_without_traceback)
    with _bound_socket(host, port) as listener:  # a port in use is found before the plan is opened
        if key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            log.warning("anyone who reaches %s can use this policy: set $%s", host, API_KEY_VARIABLE)
        recorder = None if record is None else Recorder(record, every=every, limit_bytes=int(record_limit * 1e9))
        policy = Policy(plan, threads=threads, seed=seed, verify_key=verify_key)
        policy.warmup()
        server = PolicyServer(policy, api_key=key, max_message_bytes=max_message_mb << 20, recorder=recorder)
        asyncio.run(_run(server, listener))


async def _run(server: PolicyServer, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop() -> None:
        server.stop()
        for each in signals:
            loop.remove_signal_handler(each)  # a second one ends the process at once

    for each in signals:
        loop.add_signal_handler(each, stop)
    await server.run(listener)


def _without_traceback(record: logging.LogRecord) -> bool:
    """A handshake fails for every port scan and TCP probe: worth a line, no more."""
    if record.msg == "opening handshake failed":
        record.exc_info = None
    return True


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
