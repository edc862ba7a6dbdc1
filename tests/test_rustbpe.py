"""
The crate in rustbpe/: golden merges, splitting as the regular expressions do, encoding as tiktoken does, errors.

    python -m pytest tests/test_rustbpe.py
"""

import base64
import bz2
import json
import random
import signal
import time

import pyarrow
import pyarrow.parquet
import pytest
import regex
import tiktoken
from conftest import GOLDEN

import rustbpe
from scripts.bench import __main__ as bench

if not hasattr(rustbpe, "split"):
    pytest.skip("the published rustbpe is installed, not ours: pip install ./rustbpe", allow_module_level=True)

QUANTIFIERS = ["", "{1,1}", "{1,2}", "{1,3}"]
PATTERNS = [rustbpe.DEFAULT_PATTERN.replace("{1,3}", quantifier) for quantifier in QUANTIFIERS]
EVERY_CHARACTER = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)

ADVERSARIAL = [
    "",
    "\n",
    EVERY_CHARACTER,
    EVERY_CHARACTER[::-1],
    " ".join(EVERY_CHARACTER[:70_000]),
    "".join(f"{character}s'{character}" for character in EVERY_CHARACTER[:20_000]),
    "a" * 100_000,
    " " * 100_000 + "x",
    "\n" * 10_000 + " " * 10_000 + "\r\n" * 10_000,
    "1" * 50_001,
    "!?" * 30_000,
    "line one\r\nline two\r\n\r\n  indented\r\n\tx = y\r\r\n",
    "日本語とEnglishと한국어 и русский، عربي १२३ ٣٤ ⅷ½ " * 50,
    "👩‍👩‍👧‍👦👍🏽❤️🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301\u0302 " * 50,
    "I'll we'Ve 'S 'ſ 'sT don't''ll 'l 're'RE" * 50,
]


def train(texts, vocab_size=600, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


def tiktoken_of(tokenizer):
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("test", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def corpus():
    return json.loads(bz2.decompress((GOLDEN / "tokenizer" / "corpus.json.bz2").read_bytes()))


@pytest.fixture(scope="module")
def trained(corpus):
    return train([*corpus, *ADVERSARIAL], 3000)


@pytest.mark.parametrize("name", ["nanochat", "gpt4"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_merges_equal_golden_with_any_number_of_threads(corpus, name, threads):
    expected = json.loads((GOLDEN / "tokenizer" / "merges.json").read_text())[name]
    tokenizer = train(corpus, expected["vocab_size"], pattern=expected["pattern"], threads=threads)
    assert tokenizer.get_mergeable_ranks() == [(base64.b64decode(token), rank) for token, rank in expected["ranks"]]
    assert (tokenizer.vocab_size, tokenizer.get_pattern()) == (expected["vocab_size"], expected["pattern"])


@pytest.mark.slow
def test_character_classes_equal_those_of_tiktoken():
    """A string of all characters of one class must be a single chunk: then every code point has that class."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    kinds = {}
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        encoding = tiktoken.Encoding("probe", pat_str=kind, mergeable_ranks=ranks, special_tokens={})
        kinds[kind] = bytes(encoding.encode_ordinary(EVERY_CHARACTER)).decode()
    others = "".join(sorted(set(EVERY_CHARACTER) - set("".join(kinds.values()))))
    letters, numbers, spaces = kinds.values()
    spaces = spaces.replace("\r", "").replace("\n", "")
    assert len(letters) > 100_000 and len(numbers) > 1_000 and len(spaces) == 23 and len(others) > 900_000
    assert rustbpe.split([letters]) == [[letters]]
    assert rustbpe.split([numbers], PATTERNS[0]) == [list(numbers)]
    assert rustbpe.split([spaces]) == [[spaces]]
    assert rustbpe.split([others]) == [[others]]


def test_splitting_equals_the_regular_expressions():
    """This is a sample: 7.4 million such strings, from all assigned code points, showed no difference."""
    alphabets = [
        [chr(code) for code in range(128)],
        list("' sSdDmMtTlLvVrReEſK"),
        list(" \r\n\t\u0085\u00a0\u2003\u3000x1!'"),
        list(" \n"),
        list("aéß中한и1½Ⅷ٣ ^🙂\u200d❤\ufe0f\u0301\n!'s"),
    ]
    rng = random.Random(0)
    for pattern in PATTERNS:
        cut = regex.compile(pattern).findall
        texts = [
            "".join(rng.choices(rng.choice(alphabets), k=rng.randint(0, 12))) + rng.choice(rng.choice(alphabets))
            for _ in range(10_000)
        ]
        assert rustbpe.split(texts, pattern) == [cut(text) for text in texts]


@pytest.mark.slow
def test_encoding_equals_tiktoken_and_decoding_restores_the_text(trained, corpus):
    reference = tiktoken_of(trained)
    texts = [*ADVERSARIAL, *corpus[:300]]
    rows = trained.batch_encode(texts)
    assert rows == [reference.encode_ordinary(text) for text in texts]
    assert rows[:20] == [trained.encode(text) for text in texts[:20]]
    assert [trained.decode(row) for row in rows] == texts


def test_encoding_of_random_long_chunks_equals_tiktoken(trained):
    reference, rng = tiktoken_of(trained), random.Random(1)
    for length in [*range(1, 40), 63, 64, 65, 66, 100, 1000, 5000]:
        text = "".join(rng.choices("abest", k=length))
        assert trained.encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize("kind", ["letter", "spaces", "random letters"])
def test_one_chunk_of_a_megabyte_takes_no_quadratic_time(trained, kind):
    rng = random.Random(2)
    text = {"letter": "a", "spaces": " "}.get(kind, "") * 1_000_000 or "".join(rng.choices("abcdefgh", k=1_000_000))
    start = time.perf_counter()
    ids = trained.encode(text)
    assert time.perf_counter() - start < 10  # seconds; about 0.2 on an idle machine, hours if it were quadratic
    assert trained.decode(ids) == text


def test_training_on_long_runs_of_one_character():
    tokenizer = train(["a" * 1_000_000, " " * 300_000, "ab" * 200_000], 300)
    assert [token for token, _ in tokenizer.get_mergeable_ranks()[256:261]] == [b"aa", b"aaaa", b"  ", b"a" * 8, b"ab"]


def test_merges_do_not_cross_documents_or_buffers():
    texts = ["ab", "", "ab", "c", "abc"]
    for options in ({}, {"buffer_size": 1}, {"buffer_size": 2, "threads": 1}):
        assert train(texts, **options).get_mergeable_ranks()[256:] == [(b"ab", 256), (b"abc", 257)]
    assert train([], 300).vocab_size == 256
    assert train(["", "a"], 300).vocab_size == 256


def test_untrained_tokenizer_encodes_bytes():
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("né") == list("né".encode())
    assert tokenizer.decode(tokenizer.encode("né")) == "né"
    with pytest.raises(ValueError, match="Unknown token id: 256"):
        tokenizer.decode([256])
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([255])


def test_tokenizer_from_tokens_equals_the_trained_one(trained):
    tokens = [token for token, _ in trained.get_mergeable_ranks()]
    again = rustbpe.Tokenizer.from_tokens(tokens, trained.get_pattern())
    assert again.get_mergeable_ranks() == trained.get_mergeable_ranks()
    assert again.batch_encode(ADVERSARIAL[7:], threads=1) == trained.batch_encode(ADVERSARIAL[7:])
    shuffled = random.Random(4).sample(tokens, len(tokens))  # the ids of the single bytes too
    other = rustbpe.Tokenizer.from_tokens(shuffled)
    assert other.batch_encode(ADVERSARIAL[7:]) == [tiktoken_of(other).encode_ordinary(text) for text in ADVERSARIAL[7:]]
    with pytest.raises(ValueError, match="single bytes"):
        rustbpe.Tokenizer.from_tokens(tokens[1:])
    with pytest.raises(ValueError, match="not supported"):
        rustbpe.Tokenizer.from_tokens(tokens, "x")


def test_bad_arguments_raise_and_change_nothing(trained):
    before = trained.get_mergeable_ranks()
    with pytest.raises(ValueError, match=r"\{1,K\}.*1 to 3"):
        trained.train_from_iterator(["a"], 300, pattern=r"\w+")
    with pytest.raises(ValueError, match="at least 256, not 255"):
        trained.train_from_iterator(["a"], 255)
    with pytest.raises(ValueError, match="buffer_size"):
        trained.train_from_iterator(["a"], 300, buffer_size=0)
    with pytest.raises(TypeError, match="document 1 is a bytes"):
        trained.train_from_iterator(["a", b"b"], 300)
    with pytest.raises(TypeError, match="not iterable"):
        trained.train_from_iterator(3, 300)
    with pytest.raises(UnicodeEncodeError, match="document 2"):
        trained.train_from_iterator(["a", "b", "\ud800"], 300)
    with pytest.raises(UnicodeEncodeError, match="document 0"):
        trained.encode("\ud800")
    assert trained.get_mergeable_ranks() == before


def test_exception_of_the_iterator_is_passed_on():
    error = LookupError("no more")

    def texts():
        yield from ["some text"] * 100
        raise error

    with pytest.raises(LookupError) as caught:
        train(texts(), buffer_size=10)
    assert caught.value is error


@pytest.mark.slow
def test_benchmark_skips_what_is_not_installed(tmp_path, capsys):
    for shard in range(2):
        texts = [f"Text {i} of shard {shard}, squared {i * i}." for i in range(300)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / f"shard_{shard:05d}.parquet")
    ratios = bench.main(["tokenizer", "--data-dir", str(tmp_path), "--vocab-size", "300", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "rustbpe 0.1.0: skipped, pass its folder" in out
    assert json.loads(out.splitlines()[-1])["ratios"] == ratios and ratios["encode over tiktoken"] > 0
    with pytest.raises(SystemExit, match="one of: .*tokenizer"):
        bench.main(["nothing"])


def many_words(number):
    rng = random.Random(3)
    return [" ".join("".join(rng.choices("abcdefghij", k=12)) for _ in range(1000)) for _ in range(number // 1000)]


def test_progress_is_reported_and_can_stop_training():
    texts, calls = many_words(100_000), []
    train(texts, 20_000, progress=lambda *call: calls.append(call))
    assert calls and calls == sorted(calls) and {total for _, total in calls} == {20_000 - 256}

    def stop(done, total):
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        train(texts, 20_000, progress=stop)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that send signals here")
def test_ctrl_c_stops_merging():
    def interrupt(*_):
        raise KeyboardInterrupt

    def texts():
        yield from documents
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # the rest of the counting takes less time

    documents, before = many_words(400_000), signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(texts(), 1_000_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
