"""The token table of a plan for a GPU: a gigabyte at full size, of which a call needs the rows of its prompt."""

from __future__ import annotations

import threading

import numpy as np

from duq.runtime.errors import PlanError
from duq.runtime.plan import Plan

ENTRY = "embedding"
KEPT_ROWS = 4096  # 16 MB at full size: the prompts of a robot have a few hundred different tokens


class Embeddings:
    """Rows of the table, read from the plan's file when a prompt first needs them. May be shared by threads.

    Raises PlanError if the plan lacks the table, or has one of another size.
    """

    def __init__(self, plan: Plan):
        config = plan.manifest["model"]
        self._plan, self._vocabulary = plan, config["vocab_size"]
        width = config["llm"]["width"]
        if (size := plan.sizes.get(ENTRY)) != 2 * self._vocabulary * width:
            raise PlanError(
                f"{plan.path}: entry {ENTRY} has {size} bytes, not {2 * self._vocabulary * width}; compile it again"
            )
        self._rows = np.empty((max(KEPT_ROWS, config["max_prompt_tokens"]), width), np.uint16)
        self._places: dict[int, int] = {}  # token -> where its row is kept
        self._lock = threading.Lock()

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Of `tokens`, integers [n], at most max_prompt_tokens: 16-bit floats viewed as uint16 [n, width].

        Raises PlanError where the file was written to or cut short since it was opened.
        """
        wanted: list[int] = np.clip(tokens, 0, self._vocabulary - 1).tolist()
        with self._lock:
            missing = [token for token in dict.fromkeys(wanted) if token not in self._places]
            if len(self._places) + len(missing) > len(self._rows):
                self._places, missing = {}, list(dict.fromkeys(wanted))
            for token in missing:
                row = self._rows[len(self._places)]
                self._plan.read_into(ENTRY, row, token * row.nbytes)
                self._places[token] = len(self._places)
            return self._rows[[self._places[token] for token in wanted]]
