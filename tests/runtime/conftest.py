"""Fixtures of the runtime's tests."""

from __future__ import annotations

import io

import pytest
import sentencepiece


@pytest.fixture(scope="session")
def tokenizer_bytes() -> bytes:
    """A byte-fallback SentencePiece model with a newline token, as PaliGemma's, trained on a few sentences."""
    text = ["pick up the red cup", "Task: open the drawer, State: 128 127 0 255;\nAction: ", "0 1 2 3 4 5 6 7 8 9"] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=300, byte_fallback=True, model_type="bpe",
        user_defined_symbols=["\n"], hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
