"""
The tokenizer against the golden cases and tiktoken, its properties on any text, its file, and reading old pickles
safely.

    python -m pytest tests/test_tokenizer.py
"""

import base64
import bz2
import json
import pickle
import random
import threading
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.tokenizer import MAX_BLOCK, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer


def golden(name):
    return json.loads((GOLDEN / "tokenizer" / name).read_text())


@pytest.mark.parametrize("name", ["nanochat", "gpt4"])
def test_training_gives_the_golden_merges(name):
    expected = golden("merges.json")[name]
    texts = json.loads(bz2.decompress((GOLDEN / "tokenizer" / "corpus.json.bz2").read_bytes()))
    tokenizer = Tokenizer.train(texts, expected["vocab_size"] + len(SPECIAL_TOKENS), expected["pattern"])
    assert tokenizer.tokens == [base64.b64decode(token) for token, _ in expected["ranks"]]
    assert (name == "nanochat") == (expected["pattern"] == SPLIT_PATTERN)


def test_tokenizer_from_pickle_encodes_the_golden_cases(golden_tokenizer):
    cases = golden("encodings.json")
    texts, ids = [case["text"] for case in cases], [case["ids"] for case in cases]
    assert [golden_tokenizer.encode(text) for text in texts] == ids
    assert golden_tokenizer.encode_batch(texts) == ids
    assert [golden_tokenizer.decode(row) for row in ids] == texts


def test_special_ids_and_token_bytes_equal_golden(golden_tokenizer):
    assert {name: golden_tokenizer.special(name) for name in SPECIAL_TOKENS} == golden("special_tokens.json")
    assert list(golden("special_tokens.json")) == list(SPECIAL_TOKENS)
    assert golden_tokenizer.vocab_size == 1024 and golden_tokenizer.bos == 1015
    expected = torch.load(GOLDEN / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert golden_tokenizer.token_bytes().dtype == torch.int32
    assert torch.equal(golden_tokenizer.token_bytes(), expected)
    with pytest.raises(KeyError):
        golden_tokenizer.special("<|other|>")


# Characters of all kinds, and pieces of text that matter to the split pattern or look like special tokens.
PIECES = st.sampled_from([*SPECIAL_TOKENS, "'ll", "12345", " \n", "<|", "|>", "  ", "naïve", "日本語", "👩‍👩‍👧"])
TEXTS = st.lists(st.text(max_size=20) | PIECES, max_size=8).map("".join)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_any_text_is_restored_by_decoding(text, golden_tokenizer):
    ids = golden_tokenizer.encode(text)
    assert golden_tokenizer.decode(ids) == text
    assert golden_tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_text_never_encodes_to_a_special_token(text, golden_tokenizer):
    assert max(golden_tokenizer.encode(text), default=0) < golden_tokenizer.bos


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_encode_batch_equals_tiktoken_on_any_texts(texts, golden_tokenizer):
    expected = [golden_tokenizer._encoding.encode_ordinary(text) for text in texts]
    assert golden_tokenizer.encode_batch(texts, num_threads=2) == expected


def test_names_of_special_tokens_in_text_are_ordinary_characters(golden_tokenizer):
    for name in SPECIAL_TOKENS:
        ids = golden_tokenizer.encode(f"say {name} twice: {name}")
        assert max(ids) < golden_tokenizer.bos
        assert golden_tokenizer.decode(ids) == f"say {name} twice: {name}"
    assert golden_tokenizer.decode([golden_tokenizer.bos]) == "<|bos|>"


def test_incomplete_characters_become_the_replacement_character(golden_tokenizer):
    first, *_ = golden_tokenizer.encode("\U0010ffff")
    assert golden_tokenizer.decode([first]) == "\ufffd"
    assert golden_tokenizer.decode(golden_tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("piece", [" ", "a", "\n"])
@pytest.mark.slow
def test_runs_too_long_for_the_regex_engine_are_encoded(golden_tokenizer, piece):
    text = piece * (2 * MAX_BLOCK + 400_000) + "b"
    assert golden_tokenizer.decode(golden_tokenizer.encode(text)) == text


def test_loaded_tokenizer_has_the_fingerprint_of_the_saved_one(golden_tokenizer, tmp_path):
    golden_tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    assert loaded.tokens == golden_tokenizer.tokens and loaded.pattern == golden_tokenizer.pattern
    assert loaded.fingerprint == golden_tokenizer.fingerprint
    assert len(loaded.fingerprint) == 16
    swapped = loaded.tokens[:-2] + loaded.tokens[:-3:-1]
    other = Tokenizer(loaded.pattern, {token: i for i, token in enumerate(swapped)})
    assert other.fingerprint != loaded.fingerprint


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda data: data.update(format="x"), "format"),
        (lambda data: data.update(version=2), "version 2"),
        (lambda data: data.pop("tokens"), "tokens"),
        (lambda data: data.update(tokens=3), "malformed"),
        (lambda data: data["tokens"].append("???"), "tok_train"),
        (lambda data: data["tokens"].append(data["tokens"][0]), "ids"),
        (lambda data: data["tokens"].pop(7), "bytes"),
        (lambda data: data.update(pattern="("), "tok_train"),
        (lambda data: data.update(pattern=None), "pattern"),
        (lambda data: data["special_tokens"].reverse(), "special tokens"),
    ],
)
def test_damaged_file_is_a_user_error_with_a_remedy(golden_tokenizer, tmp_path, change, complaint):
    golden_tokenizer.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=complaint) as error:
        Tokenizer.load(tmp_path)
    assert "scripts.tok_train" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_file_of_another_kind_is_a_user_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="scripts.tok_train"):
        Tokenizer.load(tmp_path)


def test_missing_tokenizer_is_a_user_error_with_the_command(tmp_path):
    with pytest.raises(UserError, match="python -m scripts.tok_train"):
        Tokenizer.load(tmp_path / "nowhere")


class Evil:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_malicious_pickle_executes_nothing(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("alive")
    for attack in (
        Evil(Path.unlink, victim),
        Evil(eval, f"__import__('os').remove({str(victim)!r})"),
        Evil(threading.Thread),
        {"pat_str": Evil(exec, "import os")},
    ):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(attack, protocol))
            with pytest.raises(UserError, match="which was not run"):
                Tokenizer.load(tmp_path)
    assert victim.read_text() == "alive"


def test_damaged_and_unrelated_pickles_are_user_errors(tmp_path):
    whole = (GOLDEN / "tokenizer" / "tokenizer.pkl").read_bytes()
    rng = random.Random(0)
    damaged = [whole[:cut] for cut in range(0, len(whole), 997)]
    damaged += [bytes([rng.randrange(256)]) + whole[1:], pickle.dumps([1, 2]), b"\x80\x04ctiktoken.core\nEncoding\n)R."]
    for content in damaged:
        (tmp_path / "tokenizer.pkl").write_bytes(content)
        with pytest.raises(UserError, match="scripts.tok_train"):
            Tokenizer.load(tmp_path)


def test_training_with_bad_input_is_a_user_error():
    with pytest.raises(UserError, match="265"):
        Tokenizer.train(["abc"], 264)
    assert Tokenizer.train(["abc"], 265).vocab_size == 265
    with pytest.raises(UserError, match="vocabulary of 268 only, not 300"):
        Tokenizer.train(["aaab"], 300)
    with pytest.raises(UserError, match="Unicode"):
        Tokenizer.train(["fine", "not \ud800 fine"], 300)
