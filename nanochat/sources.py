"""
Documents from text files and from datasets of the Hugging Face Hub, to be converted to shards (shards.py).

    .txt, .md    the file is one document (several, if it is longer than a million characters)
    .jsonl       one JSON object per line; its text field is the document
    .csv         the text column of each row; fields may contain quoted line breaks
    .parquet     the text column of each row
    folder       all such files in it and below, without hidden ones
    hub:owner/name[:config[:split]]    a dataset of the hub, streamed; the split is "train" by default, and the config
                                       may be empty, as in hub:owner/name::test

All files but .parquet may be compressed, as .gz or .zst. No source is read into memory as a whole.

A source yields a string per document, or None for a row without text (no such field, null, not a JSON object). Bytes
that are not UTF-8 become lone surrogates (Python's "surrogateescape"), so that the caller can recognise such documents.
"""

import csv
import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, parse_json
from nanochat.distributed import warn0

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KINDS = (".txt", ".md", ".jsonl", ".csv", ".parquet")
KNOWN = f"{', '.join(KINDS)}, the first four also as .gz or .zst"
COMPRESSION_RATIO = 3  # size of text / size of the compressed file; typical of English, not measured per file
MAX_TEXT_CHARS = 1 << 20  # longer text files become several documents, which bounds the memory
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileSource:
    path: Path
    text_field: str

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def kind(self) -> str:
        return split_suffix(self.path)[0]

    def estimate_bytes(self) -> int:
        """
        Estimate of the text's size, for the check of the disk and for the time left. Other fields of .jsonl and .csv
        are included.
        """
        if self.kind == ".parquet":
            footer = pq.read_metadata(self.path)
            column = footer.schema.names.index(self.text_field)
            row_groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
            return sum(row_group.column(column).total_uncompressed_size for row_group in row_groups)
        is_compressed = split_suffix(self.path)[1] in COMPRESSIONS
        return self.path.stat().st_size * (COMPRESSION_RATIO if is_compressed else 1)

    def documents(self) -> Iterator[str | None]:
        """Yields all documents. Raises UserError if the file is damaged or lacks the text field."""
        try:
            if self.kind == ".parquet":
                yield from self._read_parquet()
            elif self.kind == ".csv":
                yield from self._read_csv()
            elif self.kind == ".jsonl":
                yield from self._read_jsonl()
            else:
                yield from self._read_text()
        except (OSError, EOFError, pa.ArrowException, csv.Error) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path} cannot be read ({reason}): replace the file or leave it out") from error

    def _read_text(self) -> Iterator[str]:
        with self._open(newline=None) as file:
            while block := file.read(MAX_TEXT_CHARS):
                yield block + file.readline(MAX_TEXT_CHARS)

    def _read_jsonl(self) -> Iterator[str | None]:
        with self._open(newline="\n") as file:
            lines = (line for line in file if not line.isspace())
            for number, line in enumerate(lines):
                row = _parse_object(line)
                if number == 0:
                    if row is None:
                        raise UserError(f"{self.path}: the first line is not a JSON object; write one object per line")
                    self._require_field(row)
                yield row.get(self.text_field) if row else None

    def _read_csv(self) -> Iterator[str | None]:
        csv.field_size_limit(sys.maxsize)
        with self._open(newline="") as file:
            rows = csv.reader(file)
            header = next(rows, None)
            if header is None:
                return
            self._require_field(header)
            column = header.index(self.text_field)
            for row in rows:
                yield row[column] if column < len(row) else None

    def _read_parquet(self) -> Iterator[str | None]:
        with pq.ParquetFile(
            self.path, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True
        ) as file:
            schema = file.schema_arrow
            self._require_field(schema.names)
            kind = schema.field(self.text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{self.path}: column {self.text_field} holds {kind}, not strings; choose --text-field")
            for batch in file.iter_batches(batch_size=1024, columns=[self.text_field]):
                # As bytes, because a file may hold strings that are not UTF-8, which cannot be converted to Python's.
                for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                    yield None if data is None else data.decode("utf-8", "surrogateescape")

    def _require_field(self, names: Iterable[str]) -> None:
        if self.text_field not in names:
            raise UserError(_missing_field(self.name, self.text_field, names))

    def _open(self, newline: str | None) -> TextIO:
        """Open the file as text, decompressed and without its byte order mark."""
        compression = COMPRESSIONS.get(split_suffix(self.path)[1])
        binary: Any
        if compression:
            binary = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(self.path)), compression), READ_BYTES)
        else:
            binary = self.path.open("rb", READ_BYTES)
        return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


@dataclass(frozen=True)
class HubSource:
    name: str  # hub:owner/name[:config[:split]]
    text_field: str
    kind: str = "hub"

    def estimate_bytes(self) -> int:
        return 0  # unknown

    def documents(self) -> Iterator[str | None]:
        """Yields all documents. Raises UserError if the hub cannot be reached, and if there is no such dataset."""
        import datasets  # takes a second
        from huggingface_hub.errors import HTTPError

        repo, config, split = [*self.name.removeprefix("hub:").split(":"), "", ""][:3]
        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(repo, config or None, split=split or "train", streaming=True)
            columns = rows.column_names or list(next(iter(rows), {}))
            if columns and self.text_field not in columns:
                raise UserError(_missing_field(self.name, self.text_field, columns))
            for row in rows.select_columns([self.text_field]):
                yield row[self.text_field]
        except UserError:
            raise
        except ConnectionError as error:
            raise UserError(f"{self.name} cannot be reached: check the network, or pass downloaded files") from error
        except (OSError, HTTPError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.name} cannot be read, use hub:owner/name:config:split ({reason})") from error


Source = FileSource | HubSource


def find_sources(names: Sequence[str], text_field: str, exclude: Path) -> tuple[list[Source], Counter[str]]:
    """
    Returns the sources of these names (files, folders, hub:…), sorted, and by extension how many files in the folders
    are ignored because they hold no text. Files below the folder `exclude` are left out.

    Raises UserError if a name does not exist or is not a known kind of file, and if there is nothing to read. Reads the
    first document of each source with fields, so that a wrong --text-field is reported at once.
    """
    sources: set[Source] = set()
    ignored: Counter[str] = Counter()
    for name in names:
        if name.startswith("hub:"):
            sources.add(HubSource(name, text_field))
            continue
        path = Path(name).expanduser()
        if not path.exists():
            raise UserError(f"{name} does not exist: check the path; a dataset of the hub is written hub:owner/name")
        for file in _visible_files(path, exclude) if path.is_dir() else [path]:
            if is_known(file):
                sources.add(FileSource(file, text_field))
            elif path.is_dir():
                ignored[file.suffix or "no extension"] += 1
            else:
                raise UserError(f"{name} is not a known kind of file: use {KNOWN}")
    if not sources:
        raise UserError(f"{', '.join(names)}: no file to read; known are {KNOWN}")
    for source in sources:
        if source.kind not in (".txt", ".md"):
            next(source.documents(), None)
    return sorted(sources, key=lambda source: source.name), ignored


def is_known(path: Path) -> bool:
    kind, compression = split_suffix(path)
    return kind in KINDS and (kind != ".parquet" or not compression)


def split_suffix(path: Path) -> tuple[str, str]:
    """
    The extension of the file before compression and that of the compression, in lower case.

    >>> split_suffix(Path("a/Pile.jsonl.GZ")), split_suffix(Path("notes.txt"))
    (('.jsonl', '.gz'), ('.txt', ''))
    """
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return path.with_suffix("").suffix.lower(), suffix
    return suffix, ""


def _visible_files(root: Path, exclude: Path) -> Iterator[Path]:
    def warn(error: OSError) -> None:
        warn0(f"{error.filename} cannot be read ({error.strerror}) and is left out")

    for parent, subfolders, names in os.walk(root, onerror=warn):
        visible = [Path(parent, name) for name in sorted(subfolders) if not name.startswith(".")]
        subfolders[:] = [folder.name for folder in visible if folder.resolve() != exclude]  # for os.walk
        for name in sorted(names):
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _parse_object(line: str) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _missing_field(name: str, text_field: str, names: Iterable[str]) -> str:
    return f"{name} has no field {text_field!r}, choose one with --text-field: {', '.join(map(repr, names))}"
