"""
The command lines of the tokenizer: training, comparing, showing a conversation.

    python -m pytest tests/test_tokenizer_scripts.py
"""

import json

import pyarrow
import pyarrow.parquet
import pytest

from nanochat.conversation import render
from nanochat.tokenizer import PORTABLE_SPLIT_PATTERN, Tokenizer
from scripts import show_conversation, tok_eval, tok_train


@pytest.fixture
def data_dir(tmp_path):
    """Two training shards and one for validation, of numbered sentences."""
    directory = tmp_path / "data"
    directory.mkdir()
    for shard in range(3):
        texts = [f"Sentence {i} of shard {shard} says naïve things, as {i * i} others do." for i in range(300)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / f"shard_{shard:05d}.parquet")
    return directory


def test_training_and_comparing(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    trained = tok_train.main(["--vocab-size", "300", "--data-dir", str(data_dir)])
    assert Tokenizer.load(tmp_path / "tokenizer").fingerprint == trained.fingerprint
    assert trained.vocab_size == 300
    out = capsys.readouterr().out
    assert "600 documents" in out and "MB/s" in out and "bytes per token" in out

    results = tok_eval.main(["--data-dir", str(data_dir)])
    assert list(results) == ["news", "code", "Korean", "maths", "train split", "val split"]
    assert all(ratios["ours"] >= 1 for ratios in results.values())
    assert results["val split"]["ours"] > results["maths"]["ours"]
    if "GPT-2" not in results["news"]:  # tiktoken may hold it in memory from elsewhere
        assert "GPT-2: skipped" in capsys.readouterr().out


def test_portable_tokenizer_keeps_digits_apart_after_loading(data_dir, tmp_path):
    argv = ["--vocab-size", "300", "--data-dir", str(data_dir), "--tokenizer-dir", str(tmp_path)]
    tok_train.main([*argv, "--portable"])
    portable = Tokenizer.load(tmp_path)
    assert portable.pattern == PORTABLE_SPLIT_PATTERN
    assert portable.decode(portable.encode("12345")) == "12345" and len(portable.encode("12345")) == 5
    assert not [token for token in portable.tokens if len(token) > 1 and any(byte in b"0123456789" for byte in token)]
    assert portable._fast is None or portable.encode("7 of 1²") == portable._encoding.encode_ordinary("7 of 1²")


def test_comparing_without_shards_skips_the_splits(golden_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "nowhere"))
    golden_tokenizer.save(tmp_path / "tokenizer")
    assert list(tok_eval.main([])) == ["news", "code", "Korean", "maths"]
    assert "train and val split: skipped" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error"):
        tok_eval.main(["--data-dir", str(tmp_path / "nowhere")])


def test_local_encodings_of_tiktoken_are_found(golden_tokenizer, monkeypatch):
    monkeypatch.setattr(tok_eval.tiktoken, "get_encoding", lambda name: golden_tokenizer._encoding)
    assert tok_eval.local_encoding("gpt2").n_vocab == golden_tokenizer.vocab_size


def test_missing_encodings_are_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("requests.get", lambda *args, **kwargs: pytest.fail("network access"))
    assert tok_eval.local_encoding("p50k_base") is None


@pytest.mark.parametrize(
    "max_chars, doc_cap, expected",
    [
        (100, 10, ["aaaa", "bbbbbb", "cc"]),
        (100, 3, ["aaa", "bbb", "cc"]),
        (5, 3, ["aaa", "bb"]),
        (6, 3, ["aaa", "bbb"]),
    ],
)
def test_texts_are_capped_per_document_and_in_total(max_chars, doc_cap, expected):
    texts = tok_train.CappedTexts(["aaaa", "bbbbbb", "cc"], max_chars, doc_cap)
    assert list(texts) == expected
    assert (texts.num_docs, texts.num_bytes) == (len(expected), sum(map(len, expected)))


def test_show_conversation(golden_tokenizer, tmp_path, capsys):
    golden_tokenizer.save(tmp_path)
    messages = [{"role": "user", "content": "hi [there]"}, {"role": "assistant", "content": "ho"}]
    ids, mask = render({"messages": messages}, golden_tokenizer)
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(messages)}\n\n{json.dumps(messages[:1])}\n")
    argv = ["--path", str(path), "--tokenizer-dir", str(tmp_path)]
    show_conversation.main(argv)
    out = capsys.readouterr().out
    assert f"0: {len(ids)} tokens, {sum(mask)} trained on" in out and "1:" in out
    assert "<|user_start|>hi [there]<|user_end|>" in out
    path.write_text(f"{json.dumps(messages)}\n{json.dumps(messages[1:])}\n")
    with pytest.raises(SystemExit, match="line 2: message 0"):
        show_conversation.main(argv)
