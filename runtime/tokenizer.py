"""Prompts to tokens, as openpi does it with the PaliGemma SentencePiece model."""

from __future__ import annotations

import numpy as np
import sentencepiece

from duq.runtime.errors import PlanError
from duq.runtime.reading import reading

GIVE = "give PaliGemma's SentencePiece model with --tokenizer FILE"

# Left edges of the 256 equal bins of [-1, 1] into which pi0.5 writes the normalized state.
_STATE_BINS = np.linspace(-1, 1, 256 + 1)[:-1]


class Tokenizer:
    """A SentencePiece model, given as the bytes of its file. Safe to share between threads."""

    def __init__(self, model: bytes):
        if not len(model):
            raise PlanError(f"tokenizer.model: is empty; {GIVE}")
        with reading("tokenizer.model", PlanError, GIVE):
            try:
                self._model = sentencepiece.SentencePieceProcessor(model_proto=bytes(model))
            except RuntimeError as error:
                raise PlanError(f"tokenizer.model: is not a SentencePiece model; {GIVE}") from error
            self._check()

    def _check(self) -> None:
        """Raises PlanError for a model that has no beginning of a sentence, or cannot encode what every prompt has."""
        pieces = self._model.get_piece_size()
        encoded = self._model.encode("Task: pick up the cup, State: 0 127 255;\nAction: ", add_bos=True)
        if self._model.bos_id() < 0 or not encoded or not all(0 <= each < pieces for each in encoded):
            raise PlanError(f"tokenizer.model: encodes no prompt, or has no <bos>; {GIVE}")

    def encode(self, prompt: str, state: np.ndarray | None = None) -> list[int]:
        """Token ids of an instruction.

        Without `state` (pi0): <bos> text, then a newline token of its own, which starts the answer.
        With `state`, normalized (pi0.5): <bos>"Task: text, State: bins;\\nAction: ".
        """
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return self._model.encode(text, add_bos=True) + self._model.encode("\n")
        bins = " ".join(map(str, np.digitize(state, _STATE_BINS) - 1))
        return self._model.encode(f"Task: {text}, State: {bins};\nAction: ", add_bos=True)

    def encode_task(self, task: str) -> list[int]:
        """Token ids of an instruction as LeRobot's pi0 takes it: <bos>, the text, and a newline if it ends in none."""
        return self._model.encode(task if task.endswith("\n") else f"{task}\n", add_bos=True)
