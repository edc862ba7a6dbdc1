"""Shared by the tests: where the golden cases lie, and the small tokenizer that they were made with."""

import os
from pathlib import Path

import pytest
import torch

from nanochat.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"


def golden(path: str) -> Path:
    """A golden file of the repository, else one of the full set in $NANOCHAT_GOLDEN_DIR; skips the test without it."""
    full = os.environ.get("NANOCHAT_GOLDEN_DIR")
    for folder in [GOLDEN, *([Path(full)] if full else [])]:
        if (folder / path).exists():
            return folder / path
    pytest.skip(f"{path} is not in the repository: set NANOCHAT_GOLDEN_DIR to a folder with the full golden set")


@pytest.fixture(scope="session")
def golden_tokenizer() -> Tokenizer:
    """1,015 tokens and 9 special ones."""
    return Tokenizer.load(GOLDEN / "tokenizer")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tests' matrices are tiny: two threads that wait for each other took 25 times as long on a busy machine."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture: what a stage chose for its process (hardware.tune_process) does not reach the next test."""
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
