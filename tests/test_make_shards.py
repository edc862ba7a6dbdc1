"""
Conversion of text files to shards: every kind of file, duplicates, determinism, bounded memory, bad input.

    python -m pytest tests/test_make_shards.py
"""

import csv
import errno
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import random_text, write_shard
from file_server import running

from nanochat import shards
from nanochat.dataset import RowGroups, iterate_texts, split_shards
from nanochat.shards import Buckets, Summary, split_text
from nanochat.sources import find_sources
from scripts import make_shards

ROOT = Path(__file__).resolve().parent.parent


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def write_csv(path, texts, field="text"):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", field], *([1, text] for text in texts)])
    return path


def compress(path, kind):
    target = path.with_name(f"{path.name}.{'gz' if kind == 'gzip' else 'zst'}")
    with pa.CompressedOutputStream(str(target), kind) as file:
        file.write(path.read_bytes())
    path.unlink()
    return target


def numbered(count, first=0):
    return [f"The document with the number {i}." for i in range(first, first + count)]


def convert(*sources, out, **flags):
    """Runs the script and returns the training texts and the validation texts."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    make_shards.main([*map(str, sources), "--out", str(out), *options])
    train, validation = split_shards(out)
    return list(iterate_texts(train)), list(iterate_texts(validation))


def error_of(*sources, out, **flags):
    with pytest.raises(SystemExit) as caught:
        convert(*sources, out=out, **flags)
    message = str(caught.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(base_dir, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "shards"


# ---- kinds of files ----

TEXTS = ['Quotes "like these", and commas.\nAnd a second line.', "Straße, naïve, 東京 🙂 and more", *numbered(5)]


def make_text_folder(folder):
    for i, text in enumerate(TEXTS):
        (folder / f"part{i % 2}").mkdir(exist_ok=True)
        (folder / f"part{i % 2}" / f"{i}.{'txt' if i % 3 else 'MD'}").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        make_text_folder,
        lambda folder: write_jsonl(folder / "a.jsonl", TEXTS),
        lambda folder: write_csv(folder / "a.csv", TEXTS),
        lambda folder: write_shard(folder / "a.parquet", TEXTS, rows_per_group=2),
        lambda folder: compress(write_jsonl(folder / "a.jsonl", TEXTS), "gzip"),
        lambda folder: compress(write_jsonl(folder / "a.jsonl", TEXTS), "zstd"),
        lambda folder: compress(write_csv(folder / "a.csv", TEXTS), "zstd"),
    ],
    ids=["folder", "jsonl", "csv", "parquet", "jsonl.gz", "jsonl.zst", "csv.zst"],
)
def test_every_kind_of_source_gives_the_same_texts(source, out, make):
    train, validation = convert(make(source), out=out)
    assert sorted(train + validation) == sorted(TEXTS)
    assert len(validation) == 1


def test_sources_of_all_kinds_are_combined(source, out):
    (source / "a.txt").write_text("A text about the sea.")
    write_jsonl(source / "b.jsonl", numbered(10))
    write_csv(source / "c.csv", numbered(10, 10))
    write_shard(source / "d.parquet", numbered(10, 20))
    single = source.parent / "single.md"
    single.write_text("A single file with a line.\n")
    train, validation = convert(source, single, out=out)
    assert sorted(train + validation) == sorted(
        ["A text about the sea.", "A single file with a line.\n", *numbered(30)]
    )


def test_text_field_chooses_the_column(source, out):
    files = [
        write_jsonl(source / "a.jsonl", numbered(3), "content"),
        write_csv(source / "b.csv", numbered(3, 3), "content"),
        write_shard(source / "c.parquet", numbered(3, 6), column="content"),
    ]
    train, validation = convert(*files, out=out, text_field="content")
    assert sorted(train + validation) == numbered(9)


def test_gzip_of_several_members_is_read_completely(source, out):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in numbered(4)]
    (source / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(line) for line in lines))
    train, validation = convert(source, out=out)
    assert sorted(train + validation) == numbered(4)


def test_byte_order_mark_and_windows_line_ends_are_removed(source, out):
    (source / "a.txt").write_bytes(b"\xef\xbb\xbfThe first line.\r\nThe second line.\r\n")
    write_csv(source / "b.csv", numbered(2))
    (source / "b.csv").write_bytes(b"\xef\xbb\xbf" + (source / "b.csv").read_bytes().replace(b"id,text", b"text,id"))
    (source / "b.csv").write_bytes(b"\xef\xbb\xbftext\r\nThe document of a spreadsheet.\r\n")
    train, validation = convert(source, out=out)
    assert sorted(train + validation) == ["The document of a spreadsheet.", "The first line.\nThe second line.\n"]


def test_hidden_and_unknown_files_of_a_folder_are_ignored(source, out, capsys):
    write_jsonl(source / "a.jsonl", numbered(3))
    (source / ".git").mkdir()
    (source / ".git" / "b.txt").write_text("hidden, but long enough")
    (source / "image.png").write_bytes(b"\x89PNG")
    train, validation = convert(source, out=out)
    assert sorted(train + validation) == numbered(3)
    assert "ignored  1 files with .png" in capsys.readouterr().out


def test_out_below_the_source_is_not_read_again(source):
    write_jsonl(source / "a.jsonl", numbered(3))
    for _ in range(2):
        train, validation = convert(source, out=source / "shards")
        assert sorted(train + validation) == numbered(3)


@pytest.mark.slow
def test_dataset_of_the_hub_is_streamed(base_dir, tmp_path):
    """In separate processes, because huggingface_hub reads its environment when it is imported."""
    for split in ("train", "test"):
        write_shard(
            tmp_path / "hub" / f"data/{split}-00000-of-00001.parquet",
            [f"{split} document number {i}" for i in range(9)],
        )

    def run(*arguments):
        command = [sys.executable, "-m", "scripts.make_shards", *arguments, "--out", str(tmp_path / "shards")]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    with running() as server:
        server.add_dataset("some/texts", tmp_path / "hub")
        done = run("hub:some/texts::test")
        assert done.returncode == 0, done.stderr
        train, validation = split_shards(tmp_path / "shards")
        assert sorted(iterate_texts(train + validation)) == [f"test document number {i}" for i in range(9)]
        assert "hub:some/texts has no field 'content'" in run("hub:some/texts", "--text-field", "content").stderr
        assert "hub:some/texts::dev cannot be read" in run("hub:some/texts::dev").stderr
        missing = run("hub:some/nothing").stderr
        assert missing.count("\n") == 1 and "hub:some/nothing cannot be read" in missing


# ---- order, duplicates, validation ----


def test_shards_depend_on_texts_and_seed_only(source, tmp_path):
    texts = numbered(500)
    first = write_jsonl(source / "a.jsonl", texts[:250])
    second = write_jsonl(source / "b.jsonl", texts[250:])
    reverse = write_csv(source / "c.csv", texts[::-1])
    convert(first, second, out=tmp_path / "1")
    convert(second, first, out=tmp_path / "2")
    convert(reverse, out=tmp_path / "3")
    convert(reverse, out=tmp_path / "4", seed=1)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert contents(tmp_path / "1") != contents(tmp_path / "4")


def test_order_is_shuffled(source, out):
    texts = numbered(2000)
    train, validation = convert(write_jsonl(source / "a.jsonl", texts), out=out)
    positions = [texts.index(text) for text in validation + train]
    assert sorted(positions) == list(range(2000))
    mean_distance = sum(abs(a - b) for a, b in zip(positions, positions[1:], strict=False)) / 1999
    assert 600 < mean_distance < 730  # a third of the length, if neighbours are independent


def test_reading_stops_after_max_gigabytes(source, out):
    texts = numbered(1000)
    write_jsonl(source / "a.jsonl", texts)
    train, val = convert(source, out=out, max_gigabytes=5e-6)
    read = [i for i, size in enumerate(itertools.accumulate(map(len, texts))) if size >= 5000][0] + 1
    assert sorted(train + val) == sorted(texts[:read])


def test_duplicates_within_and_across_sources_are_dropped(source, out, capsys):
    rng = random.Random(0)
    texts = list({random_text(rng, 10, 50) for _ in range(300)})
    write_jsonl(source / "a.jsonl", texts + rng.sample(texts, 40))
    write_csv(source / "b.csv", rng.sample(texts, 30))
    (source / "c.txt").write_text(texts[0])
    train, validation = convert(source, out=out)
    assert Counter(train + validation) == Counter(texts)
    assert "skipped  71 duplicates" in capsys.readouterr().out


def test_validation_shard_is_last_and_holds_two_percent(source, out):
    convert(write_jsonl(source / "a.jsonl", numbered(5000)), out=out)
    train, validation = split_shards(out)
    assert [path.name for path in train + validation] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert 95 <= len(list(iterate_texts(validation))) <= 105
    assert len(RowGroups(train)) == 5  # of 1,024 documents
    assert pq.read_schema(train[0]).names == ["text"]


def test_large_text_becomes_several_shards_and_row_groups(source, out, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 5_000)
    texts = numbered(3000)
    train, validation = convert(write_jsonl(source / "a.jsonl", texts), out=out)
    assert sorted(train + validation) == sorted(texts)
    paths = split_shards(out)[0]
    assert len(paths) == 5  # and 2 % of the text for validation
    assert len(RowGroups(paths[:1])) == 4


def test_buckets_hold_similar_shares_of_the_text(tmp_path):
    buckets = Buckets(tmp_path / "buckets", seed=0)
    for text in numbered(50_000):
        buckets.add(text.encode())
    buckets.flush()
    sizes = [path.stat().st_size for path in buckets.folder.iterdir()]
    assert len(sizes) == shards.NUM_BUCKETS and max(sizes) < 2 * sum(sizes) / len(sizes)
    assert len(list(buckets.documents(Summary()))) == 50_000
    assert not buckets.folder.exists()


def test_buffer_of_the_buckets_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BUFFER_BYTES", 10_000)
    buckets = Buckets(tmp_path / "buckets", seed=0)
    for text in numbered(2000):
        buckets.add(text.encode())
        assert sum(map(len, buckets._buffers)) < 10_000
    assert sorted(buckets.documents(Summary())) == sorted(text.encode() for text in numbered(2000))


# ---- lengths ----


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("short", ["short"]),
        ("aaaaaa\n\nbb\nccc dddd", ["aaaaaa\n\n", "bb\nccc ", "dddd"]),
        ("aaaaaaa\nbbb ccc", ["aaaaaaa\n", "bbb ccc"]),
        ("a" * 25, ["a" * 10, "a" * 10, "a" * 5]),
    ],
)
def test_split_text_prefers_paragraphs_then_lines_then_words(text, pieces):
    assert list(split_text(text, 10)) == pieces


def test_long_documents_are_split_and_short_ones_skipped(source, out, capsys):
    book = "\n\n".join(numbered(1000))
    (source / "book.txt").write_text(book)
    write_jsonl(source / "a.jsonl", ["too short", " " * 100, "This one is long enough."])
    train, validation = convert(source, out=out, max_chars=2000)
    texts = train + validation
    assert max(map(len, texts)) <= 2000 and len(texts) == 19
    assert sum(map(len, texts)) == len(book) + len("This one is long enough.")
    shown = capsys.readouterr().out
    assert "split    1 documents longer than --max-chars into 18" in shown
    assert "skipped  2 too short, the first in" in shown


def test_large_text_file_is_read_in_blocks(source, out, monkeypatch):
    monkeypatch.setattr("nanochat.sources.MAX_TEXT_CHARS", 1000)
    text = "\n".join(numbered(500))
    (source / "book.txt").write_text(text)
    train, validation = convert(source, out=out, max_chars=100_000)
    assert sorted(line for part in train + validation for line in part.splitlines()) == sorted(text.splitlines())
    assert len(train) > 10


# ---- bad input ----


def test_documents_that_are_not_utf8_are_skipped_and_reported(source, out, capsys):
    write_jsonl(source / "good.jsonl", numbered(5))
    (source / "latin.txt").write_bytes("Größe und Länge des Textes".encode("latin-1"))
    (source / "wide.md").write_bytes("Größe und Länge des Textes".encode("utf-16"))
    (source / "lines.jsonl").write_bytes(b'{"text": "good enough text"}\n{"text": "bad \xff text, long enough"}\n')
    (source / "surrogate.jsonl").write_bytes(b'{"text": "a lone surrogate: \\ud800 in JSON"}\n')
    (source / "table.csv").write_bytes(b"text\nbad \xff text long enough\n")
    binary = pa.array([b"bad \xff text, long enough", b"good text in parquet"])
    bad_strings = pa.Array.from_buffers(pa.string(), 2, binary.buffers())
    pq.write_table(pa.table({"text": bad_strings}), source / "strings.parquet")
    train, validation = convert(source, out=out)
    assert sorted(train + validation) == [*numbered(5), "good enough text", "good text in parquet"]
    assert f"skipped  6 not UTF-8, the first in {source / 'latin.txt'}" in capsys.readouterr().out


def test_rows_without_text_are_counted(source, out, capsys):
    lines = [json.dumps({"text": text}) for text in (*numbered(3), None, 5)]
    (source / "a.jsonl").write_text("\n".join(["", *lines, "{}", "no JSON", '["text"]', "[" * 100_000, "", ""]))
    (source / "b.csv").write_text("id,text\n1\n2,The text of a row\n")
    write_shard(source / "c.parquet", [None, "The text of another row"])
    train, validation = convert(source, out=out)
    assert len(train + validation) == 5
    assert "skipped  8 without text" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pdf", b"%PDF", "a.pdf is not a known kind of file: use .txt, .md, .jsonl, .csv, .parquet"),
        ("a.tar.gz", b"", "a.tar.gz is not a known kind of file"),
        (
            "a.jsonl",
            b'{"content": "x", "url": "y"}\n',
            "has no field 'text', choose one with --text-field: 'content', 'url'",
        ),
        ("a.jsonl", b'[\n{"text": "x"}]', "a.jsonl: the first line is not a JSON object; write one object per line"),
        ("a.csv", b"content,url\nx,y\n", "has no field 'text', choose one with --text-field: 'content', 'url'"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be read (zlib inflate failed"),
        ("a.jsonl.zst", b"not zstandard", "a.jsonl.zst cannot be read (ZSTD decompress failed"),
        ("a.parquet", b"PAR1 not parquet", "a.parquet cannot be read ("),
        ("a.txt", b"", "usable documents: 0 of 0, at least two are needed"),
        ("a.txt", b"A single document.", "usable documents: 1 of 1, at least two are needed"),
        ("a.txt", b"short", "usable documents: 0 of 1 (1 too short), at least two are needed"),
        ("a.jsonl", b'{"text": "same text in both"}\n' * 2, "usable documents: 1 of 2 (1 duplicates), at least two"),
    ],
)
def test_unusable_file_is_one_line(source, out, name, content, message):
    (source / name).write_bytes(content)
    assert message in error_of(source / name, out=out)
    assert not list(out.parent.glob("*shards*"))  # neither the folder nor a temporary one


def test_unusable_parquet_columns_are_one_line(source, out):
    write_shard(source / "a.parquet", ["x"], column="content")
    assert "has no field 'text', choose one with --text-field: 'content'" in error_of(source, out=out)
    write_shard(source / "a.parquet", pa.table({"text": [1, 2]}))
    assert "column text holds int64, not strings; choose --text-field" in error_of(source, out=out)


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_truncated_compressed_file_is_one_line(source, out, kind):
    rng = random.Random(0)
    path = compress(write_jsonl(source / "a.jsonl", [random_text(rng, 10, 50) for _ in range(5000)]), kind)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be read (Truncated compressed stream): replace the file or leave it out" in error_of(source, out=out)
    assert not list(out.parent.glob("*shards*"))


def test_missing_and_empty_sources_are_one_line(source, out):
    assert "nowhere does not exist: check the path" in error_of("nowhere", out=out)
    assert "no file to read; known are .txt, .md" in error_of(source, out=out)
    (source / "image.png").write_bytes(b"\x89PNG")
    assert "no file to read" in error_of(source, out=out)


def test_unreachable_hub_is_one_line(source, out, monkeypatch):
    import datasets

    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "hub:some/texts cannot be reached: check the network" in error_of("hub:some/texts", out=out)


# ---- the folder ----


def test_folder_of_an_earlier_conversion_is_replaced(source, out):
    convert(write_jsonl(source / "a.jsonl", numbered(50)), out=out)
    train, validation = convert(write_jsonl(source / "a.jsonl", numbered(9)), out=out)
    assert sorted(train + validation) == numbered(9)
    assert sorted(contents(out)) == ["shard_00000.parquet", "shard_00001.parquet", "shards.json"]


@pytest.mark.parametrize("name", ["shard_00000.parquet", "shards.json", "zebra.parquet", ".hidden"])
@pytest.mark.parametrize("has_shards", [False, True])
def test_folder_with_other_files_is_refused(source, out, name, has_shards):
    write_jsonl(source / "a.jsonl", numbered(50))
    if has_shards:
        convert(source, out=out)
    write_shard(out / name, ["precious"])
    before = contents(out)
    message = error_of(source, out=out)
    assert "which make_shards did not write" in message and "choose an empty or new folder with --out" in message
    assert contents(out) == before


def test_out_that_is_a_file_is_refused(source):
    file = write_jsonl(source / "a.jsonl", numbered(50))
    assert "is a file or a mounted disk" in error_of(file, out=file)


def test_second_process_on_the_same_folder_is_refused(source, out, monkeypatch):
    write_jsonl(source / "a.jsonl", numbered(5))
    locked = []
    monkeypatch.setattr(
        shards, "require_space", lambda *args: locked.append(error_of(source, out=out)) if not locked else None
    )
    convert(source, out=out)
    assert f"another process writes {out}: wait for it" in locked[0]


def test_small_disk_is_refused_before_reading(source, out, monkeypatch):
    write_jsonl(source / "a.jsonl", numbered(100))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1000))
    assert "1e-06 GB free, sorting needs about 5.39e-06 GB: free some space" in error_of(source, out=out)


def test_full_disk_is_one_line_and_keeps_the_earlier_shards(source, out, monkeypatch):
    convert(write_jsonl(source / "a.jsonl", numbered(50)), out=out)
    before = contents(out)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_write_row_group", fail)
    assert f"no space left in {out.parent}: sorting needs as much as the text" in error_of(source, out=out)
    assert contents(out) == before and not list(out.parent.glob(".shards*"))


@pytest.mark.slow
def test_killed_process_leaves_no_shards_and_can_be_repeated(source, out):
    """It is killed while it reads from a named pipe, after the first documents have reached the buckets."""
    write_jsonl(source / "a.jsonl", numbered(500))
    os.mkfifo(source.parent / "pipe.txt")
    command = [
        sys.executable,
        "-m",
        "scripts.make_shards",
        str(source),
        str(source.parent / "pipe.txt"),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(".shards.*.tmp/buckets")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not out.exists() and list(out.parent.glob(".shards.*.tmp"))
    train, validation = convert(source, out=out)
    assert len(train + validation) == 500
    assert not list(out.parent.glob(".shards.*.tmp"))


# ---- what the user sees ----


def test_summary_shows_counts_speed_and_ten_documents(source, out, capsys):
    texts = [f"{text}\n{'x' * 200}" for text in numbered(100)]
    train, validation = convert(write_jsonl(source / "a.jsonl", texts), out=out)
    shown = capsys.readouterr().out
    assert "read     100 documents, 0.0 MB, from 1 sources" in shown and "MB/s" in shown
    assert f"wrote    {len(train)} documents for training, {len(validation)} for validation" in shown
    samples = [line for line in shown.splitlines() if line.startswith("  | ")]
    assert len(samples) == 10 and all(len(line) == 4 + 80 for line in samples)


def test_sample_does_not_control_the_terminal(source, out, capsys):
    convert(write_jsonl(source / "a.jsonl", [f"\x1b[2J{text}\x07" for text in numbered(3)]), out=out)
    shown = capsys.readouterr().out
    assert "?[2JThe document with the number 1.?" in shown and "\x1b" not in shown and "\x07" not in shown


def test_broken_file_name_is_shown(source, out, capsys):
    write_jsonl(source / "a.jsonl", numbered(3))
    (source / os.fsdecode(b"gr\xf6sse.txt")).write_bytes(b"gr\xf6sse in a text of some length")
    convert(source, out=out)
    assert "1 not UTF-8, the first in" in capsys.readouterr().out


def test_find_sources_lists_each_file_once_in_order(source):
    for name in ("b.txt", "a.txt", "c.md"):
        (source / name).write_text("text")
    sources, ignored = find_sources([str(source / "c.md"), str(source)], "text", exclude=source / "out")
    assert [found.path.name for found in sources] == ["a.txt", "b.txt", "c.md"] and not ignored
