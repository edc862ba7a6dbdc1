"""Fixtures and hooks for all tests: the golden files, the golden tokenizer, a base folder, the markers."""

import os
from pathlib import Path

import pytest
import torch

from nanochat.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"


def golden(path: str) -> Path:
    """
    A file or folder of expected results: from $NANOCHAT_GOLDEN_DIR, which holds the full set, else from tests/golden.
    Skips the test if neither has it.
    """
    folders = [GOLDEN]
    if full_set := os.environ.get("NANOCHAT_GOLDEN_DIR"):
        folders.insert(0, Path(full_set))
    for folder in folders:
        if (folder / path).exists():
            return folder / path
    pytest.skip(f"{path} is not in the repository: set NANOCHAT_GOLDEN_DIR to a folder with the full golden set")


@pytest.fixture(scope="session")
def golden_tokenizer() -> Tokenizer:
    """The tokenizer of the golden files: 1,015 tokens and 9 special tokens."""
    return Tokenizer.load(GOLDEN / "tokenizer")


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $NANOCHAT_BASE_DIR; the other variables that change what the stages do are unset."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    for name in ("NANOCHAT_DATA_DIR", "NANOCHAT_DATASETS_DIR", "NANOCHAT_DTYPE", "NANOCHAT_EVAL_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Uses one thread: the matrices here are tiny, and on a busy machine two threads took 25 times as long."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips `gpu` tests without a GPU, and undoes what an earlier stage set for its process (hardware.tune_process)."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
