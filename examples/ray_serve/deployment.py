"""The policy on Ray Serve: any number of replicas behind one HTTP address, for more robots than one machine serves.

    serve run examples.ray_serve.deployment:app plan=engine.plan

POST an observation, get its actions; or a list of them, as of a simulator's environments, get a list. All are the messages of the
websocket server (runtime/messages.py), so nothing that a stranger sends is unpickled. What is wrong with a request is
answered in words: 400 no such message, 422 an observation that does not fit the policy.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from duq.runtime import Policy
from duq.runtime.errors import MessageError, ObservationError
from duq.runtime.messages import pack, unpack


@serve.deployment(
    autoscaling_config={"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 1},
    max_ongoing_requests=2,  # one on the engine and one decoded behind it; the rest waits where any replica can take it
    health_check_period_s=2,
    health_check_timeout_s=10,
)
class PolicyReplica:
    """One engine. It counts as ready once it is warm, so no robot meets a cold one.

    patience: seconds after which a call that is still running means that the engine hangs.
    """

    def __init__(self, plan: str, threads: int | None, patience: float):
        self._policy = Policy(plan, threads=threads)
        self._policy.warmup()
        self._worker = ThreadPoolExecutor(1, "duq-infer")  # the event loop stays free for health checks
        self._patience = patience
        self._call_since: float | None = None

    async def __call__(self, request: Request) -> Response:
        """HTTP: a packed observation to a packed reply, or lists of both."""
        body = await request.body()
        try:
            reply = await self._in_worker(lambda: pack(self._answer(unpack(body))))
        except (MessageError, ObservationError) as error:
            status = 400 if isinstance(error, MessageError) else 422
            return PlainTextResponse(f"{type(error).__name__}: {error}", status)
        return Response(reply, media_type="application/msgpack")

    async def infer(self, obs: dict) -> dict:
        """For other deployments, through a handle: as Policy.infer."""
        return await self._in_worker(lambda: self._policy.infer(obs))

    async def infer_batch(self, obs: list[dict]) -> list[dict]:
        """For other deployments, through a handle: as Policy.infer_batch."""
        return await self._in_worker(lambda: self._policy.infer_batch(obs))

    def _answer(self, message: dict | list) -> dict | list[dict]:
        return self._policy.infer_batch(message) if isinstance(message, list) else self._policy.infer(message)

    def check_health(self) -> None:
        """Ray calls this every few seconds, and replaces the replica if it raises."""
        since = self._call_since
        if since is not None and time.monotonic() - since > self._patience:
            raise RuntimeError(f"a call has been running for more than {self._patience:.0f} s: the engine hangs")

    async def _in_worker(self, call: Callable):
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._timed, call)

    def _timed(self, call: Callable):
        self._call_since = time.monotonic()
        try:
            return call()
        finally:
            self._call_since = None


class Arguments(BaseModel):  # Ray makes one for `app`, whose annotation must hence be a class, not postponed to a str
    """Of `app`. plan: a path that exists on every node; threads: of each replica's engine."""

    plan: str
    threads: int | None = None
    patience: float = 30.0


def app(arguments: Arguments) -> serve.Application:
    return PolicyReplica.bind(arguments.plan, arguments.threads, arguments.patience)  # type: ignore[attr-defined]
