"""Shared by the tests: where the golden cases lie, and the small tokenizer that they were made with."""

from pathlib import Path

import pytest

from nanochat.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_tokenizer() -> Tokenizer:
    """1,015 tokens and 9 special ones."""
    return Tokenizer.load(GOLDEN / "tokenizer")
