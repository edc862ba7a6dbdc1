"""
Convert documents to pretraining shards: shuffled, without duplicates, with a validation shard, in little memory.

One idea does most of the work: documents are sorted by a 128-bit hash of their text, with the seed as its key. This
order is a shuffle: it depends only on the texts and the seed, not on the order of the sources. Equal documents get
equal hashes, so that duplicates are found and dropped. The documents are sorted on the disk, in two passes:

1. Append each document to one of NUM_BUCKETS files (buckets), by the first bits of its hash. Documents are collected in
   memory and appended to one file after another, which bounds both memory and the number of open files.
2. Read one bucket at a time, drop duplicates, sort, and write shards. 100 GB of text make buckets of 100 MB.

The documents with the lowest hashes become the validation shard, which is the last one by name (nanochat/dataset.py).
Long documents are split before all this, so pieces of one document may be in both splits. The folder gets its final
name only when it is complete.
"""

import errno
import itertools
import json
import math
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_path, base_dir, exclusive_lock, parse_json, remove_leftovers
from nanochat.progress import Bar
from nanochat.sources import Source

MB = 1_000_000
BUCKET_BITS = 10
NUM_BUCKETS = 1 << BUCKET_BITS
BUFFER_BYTES = 64 << 20  # of documents in memory, before they are appended: 64 KB to each bucket
RECORD = struct.Struct("<16sI")  # hash, number of bytes of the text that follows

SHARD_BYTES = 250 * MB  # of text, about 100 MB compressed, as in the public dataset
ROWS_PER_GROUP = 1024
ROW_GROUP_BYTES = 64 << 20  # of text: ends a row group of long documents earlier
VAL_SHARE = 0.02  # of the text; but at least one document and at most one shard (heuristic, not tuned)
NUM_PREVIEW = 10
MARKER = "shards.json"  # lists the shards and their sizes, so that only folders written by this module are replaced

NO_TEXT = "without text"
TOO_SHORT = "too short"
NOT_UTF8 = "not UTF-8"
DUPLICATE = "duplicates"


@dataclass(frozen=True)
class Options:
    min_chars: int
    max_chars: int
    seed: int
    max_bytes: float = math.inf  # of text to read


@dataclass
class Summary:
    """What a conversion read, skipped and wrote."""

    num_documents: int = 0  # read
    num_bytes: int = 0  # of their text
    num_split: int = 0  # documents longer than max_chars
    num_pieces: int = 0  # the pieces of those documents
    skipped: Counter[str] = field(default_factory=Counter)  # by cause
    first_skipped: dict[str, str] = field(default_factory=dict)  # cause → source of the first document
    num_train: int = 0  # documents written
    num_val: int = 0
    shards: dict[str, int] = field(default_factory=dict)  # name → size of the file, in bytes
    preview: list[str] = field(default_factory=list)  # the first in the order of hashes, so a random sample

    def skip(self, cause: str, source: str) -> None:
        self.skipped[cause] += 1
        self.first_skipped.setdefault(cause, source)


def make_shards(sources: Sequence[Source], out: Path, options: Options) -> Summary:
    """
    Writes the documents of all sources to shards in the folder `out`, replacing those of an earlier conversion.

    Raises UserError if another process writes to the folder, if it holds other files, if the disk is too small, if a
    source cannot be read, and if there are fewer than two distinct documents.
    """
    lock = base_dir() / "locks" / f"shards-{blake2b(str(out).encode(), digest_size=8).hexdigest()}"
    with exclusive_lock(lock, f"another process writes {out}: wait for it, or choose another folder with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        require_own_folder(out)
        remove_leftovers(out)
        sizes = [source.estimate_bytes() for source in sources]
        require_space(out, sum(sizes))
        summary = Summary()
        try:
            with atomic_path(out) as temporary:
                temporary.mkdir()
                buckets = Buckets(temporary / "buckets", options.seed)
                _fill_buckets(buckets, list(zip(sources, sizes, strict=True)), options, summary)
                _write_shards(temporary, buckets, summary)
                marker = {"seed": options.seed, "sizes": summary.shards}
                (temporary / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"no space left in {out.parent}: sorting needs as much as the text; free some space or choose another "
                "disk with --out"
            ) from error
    return summary


# ---- pass 1: sources → buckets ----


class Buckets:
    """Documents in files by the first bits of their hash."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.num_bytes = 0  # of all documents, duplicates included
        self._hash_key = str(seed).encode()
        self._buffers = [bytearray() for _ in range(NUM_BUCKETS)]
        self._buffered = 0

    def add(self, data: bytes) -> None:
        key = blake2b(data, digest_size=16, key=self._hash_key).digest()
        buffer = self._buffers[int.from_bytes(key[:2], "big") >> (16 - BUCKET_BITS)]
        buffer += RECORD.pack(key, len(data))
        buffer += data
        self.num_bytes += len(data)
        self._buffered += RECORD.size + len(data)
        if self._buffered >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        for number, buffer in enumerate(self._buffers):
            if buffer:
                with self._path(number).open("ab") as file:
                    file.write(buffer)
                buffer.clear()
        self._buffered = 0

    def documents(self, summary: Summary) -> Iterator[bytes]:
        """Yields distinct documents in the order of their hashes; deletes each bucket once it is read."""
        self.flush()
        for number in range(NUM_BUCKETS):
            path = self._path(number)
            if not path.exists():
                continue
            texts: dict[bytes, bytes] = {}
            for key, data in _records(path):
                if key in texts:
                    summary.skipped[DUPLICATE] += 1
                else:
                    texts[key] = data
            path.unlink()
            for key in sorted(texts):
                yield texts.pop(key)
        self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}"


def _records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    with path.open("rb") as file:
        while header := file.read(RECORD.size):
            key, size = RECORD.unpack(header)
            yield key, file.read(size)


def _fill_buckets(
    buckets: Buckets, sized_sources: Sequence[tuple[Source, int]], options: Options, summary: Summary
) -> None:
    is_known = all(source.kind != "hub" for source, _ in sized_sources)
    total = sum(size for _, size in sized_sources) if is_known else 0
    if options.max_bytes < math.inf:
        total = min(total, int(options.max_bytes)) if total else int(options.max_bytes)
    finished = 0  # estimated bytes of the sources that were read to their end
    with Bar("reading text", total // MB, unit="MB read", lines=True) as bar:
        for source, size in sized_sources:
            name = source.name
            start = summary.num_bytes
            for text in source.documents():
                summary.num_documents += 1
                for piece in _usable_pieces(text, name, options, summary):
                    buckets.add(piece)
                if summary.num_bytes >= options.max_bytes:
                    return
                position = finished + min(summary.num_bytes - start, size) if total else summary.num_bytes
                bar.update(position // MB)
            finished += size


def _usable_pieces(text: str | None, source: str, options: Options, summary: Summary) -> Iterator[bytes]:
    """Yields the document as UTF-8 bytes, in several pieces if it is long; counts what is skipped."""
    if not isinstance(text, str):
        return summary.skip(NO_TEXT, source)
    try:
        summary.num_bytes += len(text.encode())
    except UnicodeEncodeError:  # a lone surrogate stands for a byte that is not UTF-8
        return summary.skip(NOT_UTF8, source)
    pieces = list(split_text(text, options.max_chars))
    if len(pieces) > 1:
        summary.num_split += 1
        summary.num_pieces += len(pieces)
    for piece in pieces:
        if len(piece.strip()) < options.min_chars:
            summary.skip(TOO_SHORT, source)
        else:
            yield piece.encode()


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """
    Yields consecutive pieces of at most max_chars characters. A piece ends in the second half of max_chars: after
    the last paragraph there, else the last line, else the last word, else at max_chars.

    >>> list(split_text("one two\\nthree four", 10))
    ['one two\\n', 'three four']
    """
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        for separator in ("\n\n", "\n", " "):
            found = text.rfind(separator, start + max_chars // 2, end)
            if found >= 0:
                end = found + len(separator)
                break
        yield text[start:end]
        start = end
    yield text[start:]


# ---- pass 2: documents in order → shards ----


def _write_shards(folder: Path, buckets: Buckets, summary: Summary) -> None:
    """Writes the documents with the lowest hashes to the validation shard and the others to training shards."""
    documents = buckets.documents(summary)
    preview = list(itertools.islice(documents, NUM_PREVIEW))
    summary.preview = [data.decode() for data in preview]
    documents = itertools.chain(preview, documents)

    validation = folder / "validation"
    max_bytes = min(VAL_SHARE * buckets.num_bytes, SHARD_BYTES)
    summary.num_val, num_bytes = _write_shard(validation, documents, max_bytes)
    paths: list[Path] = []
    with Bar("writing shards", buckets.num_bytes // MB, unit="MB sorted", lines=True) as bar:
        for document in documents:  # the first of a shard; _write_shard takes the others from the same iterator
            paths.append(folder / f"shard_{len(paths):05d}.parquet")
            count, size = _write_shard(paths[-1], itertools.chain([document], documents), SHARD_BYTES)
            summary.num_train += count
            num_bytes += size
            bar.update(num_bytes // MB)
    if not paths:
        counts = ", ".join(f"{count:,} {cause}" for cause, count in summary.skipped.items())
        raise UserError(
            f"usable documents: {summary.num_val} of {summary.num_documents:,}{counts and f' ({counts})'}, at least "
            "two are needed, one for training and one for validation: add text, or lower --min-chars or --max-chars"
        )
    paths.append(folder / f"shard_{len(paths):05d}.parquet")
    validation.rename(paths[-1])
    summary.shards = {path.name: path.stat().st_size for path in paths}


def _write_shard(path: Path, documents: Iterable[bytes], max_bytes: float) -> tuple[int, int]:
    """Writes documents until the shard has max_bytes of text; returns the number of documents and of bytes."""
    rows: list[bytes] = []
    count = size = group_start = 0
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for data in documents:
            rows.append(data)
            count += 1
            size += len(data)
            is_last = size >= max_bytes
            if is_last or len(rows) == ROWS_PER_GROUP or size - group_start >= ROW_GROUP_BYTES:
                _write_row_group(writer, rows)
                rows = []
                group_start = size
            if is_last:
                break
        if rows:
            _write_row_group(writer, rows)
    return count, size


def _write_row_group(writer: pq.ParquetWriter, rows: list[bytes]) -> None:
    writer.write_table(pa.table({"text": pa.array(rows, pa.string())}))


# ---- the folder ----


def require_own_folder(out: Path) -> None:
    """Raises UserError if the folder holds anything that was not written by an earlier conversion."""
    if out.is_file() or out.is_mount():
        raise UserError(f"{out} is a file or a mounted disk: choose a folder, which may be on that disk, with --out")
    if not out.exists():
        return
    sizes = _read_marker(out / MARKER)
    for path in sorted(out.iterdir()):
        is_marker = path.name == MARKER and sizes
        if not is_marker and sizes.get(path.name) != path.stat().st_size:
            raise UserError(
                f"{out} holds {path.name}, which make_shards did not write and would delete: "
                "choose an empty or new folder with --out"
            )


def _read_marker(path: Path) -> dict[str, int]:
    """The size of each shard by name; empty if there is no marker file, or if it is not from this module."""
    try:
        return dict(parse_json(path.read_bytes())["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def require_space(out: Path, num_bytes: int) -> None:
    """Raises UserError if the text does not fit on the disk. Shards replace the buckets one by one."""
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise UserError(
            f"{out.parent} has {free / 1e9:.3g} GB free, sorting needs about {num_bytes / 1e9:.3g} GB: "
            "free some space or choose another disk with --out"
        )
