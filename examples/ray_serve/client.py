"""The robot's side of deployment.py: `infer`, as openpi's client has it, and `infer_batch`, which outlive replicas."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from duq.runtime.messages import pack, unpack


class RayServeClient:
    """Safe to share between threads.

    timeout: seconds to wait for an answer. attempts: how often a request is sent before `infer` gives up. A replica that
    dies takes its request with it; a repetition harms nothing, for an inference leaves no trace.
    """

    def __init__(self, url: str, *, timeout: float = 10.0, attempts: int = 6):
        self._url, self._timeout, self._attempts = url, timeout, attempts

    def infer(self, obs: Mapping) -> dict:
        """Policy.infer, from afar. RuntimeError if the policy refuses the observation, ConnectionError if none answers."""
        return self._ask(obs)

    def infer_batch(self, obs: Sequence[Mapping]) -> list[dict]:
        """Policy.infer_batch, from afar: one request, which one replica answers. Raises as `infer`. A message has at most 256
        lists, maps and arrays' shapes, those of some 20 observations."""
        return self._ask(list(obs))

    def _ask(self, message: Mapping | list[Mapping]) -> Any:
        request = urllib.request.Request(self._url, pack(message), {"Content-Type": "application/msgpack"})
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(0.05 * 2**attempt)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return unpack(response.read())
            except urllib.error.HTTPError as error:
                reason = error.read().decode(errors="replace")
                if error.code < 500:
                    raise RuntimeError(f"Error in inference server:\n{reason}") from error
            except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
                reason = str(error)
        raise ConnectionError(f"{self._url}: no answer in {self._attempts} attempts; the last one failed with: {reason}")
