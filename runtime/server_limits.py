"""What one client, and all of them together, may cost a server, and how long it waits for a peer."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import resource
import time

from duq.plugins.errors import DuqError

_RESERVED_FILES = 64  # what a process opens beside its clients: libraries, the plan, a log, recordings


@dataclasses.dataclass(frozen=True)
class Limits:
    """A server's bounds. Whoever exceeds one is refused by name, and counted in `duq_refusals_total`.

    Sizes are in bytes, times in seconds.
    """

    message_bytes: int = 64 << 20  # of one message, with 1 KiB for each of its fragments
    buffered_bytes: int = 256 << 20  # received and not yet answered, of all clients; above, the largest holder has to go
    clients: int = 128  # open websockets
    clients_per_address: int = 64  # of one IPv4 address, or one /64 of IPv6
    small_frames_per_second: int = 500  # frames below 4 KiB of a client; above, it is read more slowly
    handshakes: int = 32  # connections that are no websocket yet; above, the oldest has to go
    open_seconds: float = 10.0  # from the connection to the end of its HTTP request
    message_seconds: float = 30.0  # from a message's first byte to its last
    send_seconds: float = 10.0  # until a peer has taken what was sent to it
    ping_seconds: float = 20.0  # between two pings, and until the answer to one
    close_seconds: float = 5.0  # until a peer has closed, after it was told to
    stop_seconds: float = 10.0  # from SIGTERM until every connection is cut

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < float("inf"):
                raise DuqError(f"limit {name}: is {value}, expected a number above 0")

    @property
    def shortest(self) -> float:
        """The least of the times that are watched, in seconds."""
        return min(self.open_seconds, self.message_seconds, self.send_seconds, self.close_seconds)


def reserve_files(limits: Limits) -> None:
    """Raises the process' limit of open files to what the connections may need; DuqError if the system does not let it."""
    needed = limits.clients + limits.handshakes + _RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise DuqError(
                f"{limits.clients} clients and {limits.handshakes} handshakes take {needed} open files, this process may "
                f"open {hard}; lower --max-clients, or raise ulimit -n"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def keep_freed_memory() -> None:
    """Has glibc keep up to 64 MiB of freed memory, and give larger blocks than 1 MiB back at once.

    By default it gives back what each message took, and takes it again for the next: 0.7 ms of page faults for one of
    450 KB. And blocks of some MiB, once they are freed, become part of a heap that they leave full of holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


class RateLimit(logging.Filter):
    """Lets `count` records with the same template through in every `seconds`; the next one says how many were held back.

    For logs whose lines strangers can cause. The templates are the program's own, so that they are few.
    """

    def __init__(self, count: int = 20, seconds: float = 10.0):
        super().__init__()
        self._count, self._seconds = count, seconds
        self._seen: dict[str, tuple[float, int]] = {}  # template -> start of its period, records in it

    def filter(self, record: logging.LogRecord) -> bool:
        template, now = str(record.msg), time.monotonic()
        start, seen = self._seen.get(template, (now, 0))
        if now - start >= self._seconds:
            if seen > self._count:
                record.msg = f"{template} (and {seen - self._count} more like it)"
            start, seen = now, 0
        self._seen[template] = start, seen + 1
        return seen < self._count


def one_line(text: str, limit: int = 300) -> str:
    """`text` as one printable line of at most `limit` characters, to be sent or logged."""
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[: limit + 1])
    if len(shown) > limit:
        rest = f"... ({len(text)} characters)"
        shown = shown[: max(0, limit - len(rest))] + rest
    return shown
