"""
The Python interface for notebooks.

    python -m pytest tests/test_notebook.py
"""

import pytest
import torch
from factories import save_checkpoint, tiny_gpt

from nanochat import load
from nanochat.common import UserError


@pytest.fixture
def model(base_dir, golden_tokenizer):
    save_checkpoint(tiny_gpt(), "sft", tokenizer=golden_tokenizer)
    return load("sft", device="cpu")


def test_chat_returns_a_reply_and_keeps_the_conversation(model):
    first = model.chat("Hi", max_tokens=3, temperature=0)
    model.chat("And now?", max_tokens=3, temperature=0)
    assert [message["role"] for message in model.messages] == ["user", "assistant"] * 2
    assert "".join(part["text"] for part in model.messages[1]["content"] if part["type"] == "text") == first
    model.clear()
    assert model.chat("Hi", max_tokens=3, temperature=0) == first


def test_generate_continues_a_text(model):
    prompt = [model.tokenizer.bos, *model.tokenizer.encode("The cat")]
    with torch.no_grad():
        most_likely = model.model(torch.tensor([prompt]))[0, -1].argmax().item()
    assert model.generate("The cat", max_tokens=1, temperature=0) == model.tokenizer.decode([most_likely])


def test_load_without_checkpoints_is_a_user_error(base_dir):
    with pytest.raises(UserError, match="no checkpoint"):
        load()
