"""
Pretraining text: a folder of parquet shards with a `text` column of documents.

The last shard by name is the validation split, the others are the training split. --data-dir or $NANOCHAT_DATA_DIR
selects any such folder, or several with weights (mixture.py). The default is a public dataset, which this module
downloads:

    python -m nanochat.dataset -n 170    # 170 training shards of about 100 MB (enough for the speedrun), 1 validation
    python -m nanochat.dataset -n -1     # all 6,542
"""

import bisect
import functools
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.cli import COUNT_OR_DEFAULT, command, flag
from nanochat.common import UserError, base_dir
from nanochat.progress import track

PUBLIC_REPO = "karpathy/climbmix-400b-shuffle"  # https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle
PUBLIC_PREFIX = "base_data_"  # folders of public datasets, see KNOWN in mixture.py
PUBLIC_FOLDER = f"{PUBLIC_PREFIX}climbmix"
NUM_PUBLIC_TRAIN = 6542  # shard_00000 … shard_06541; shard_06542, the last one, is for validation
PUBLIC_SHARD_BYTES = 100_000_000  # approximate size of a shard, for the check of free disk space
SMALL_ROW_GROUP = 1 << 16  # bytes: smaller ones are read to see whether they have text, others are taken to have some
DOWNLOAD_ATTEMPTS = 3  # per shard, on top of the retries of huggingface_hub; heuristic, not tuned


def resolve_data_dir(data_dir: str = "") -> Path:
    """
    Returns the folder of shards: data_dir, else $NANOCHAT_DATA_DIR, else that of the public dataset. Raises UserError
    if that is a mixture of several (mixture.py).
    """
    text = data_dir or os.environ.get("NANOCHAT_DATA_DIR", "")
    if is_mixture(text):
        raise UserError(f"{text} is a mixture, and this command takes one folder: pass one with --data-dir")
    return Path(text).expanduser() if text else base_dir() / PUBLIC_FOLDER


def is_mixture(data_dir: str) -> bool:
    """Whether data_dir lists sources with weights instead of naming a folder."""
    return ("=" in data_dir or "," in data_dir) and not Path(data_dir).expanduser().exists()


def split_shards(directory: Path) -> tuple[list[Path], list[Path]]:
    """
    Returns the training shards and the validation shard, sorted by name.

    Raises UserError if a shard is incomplete, empty or without a text column. Reads only the footers of the shards and
    small row groups, so that such problems are reported before any expensive work.
    """
    shards = sorted(directory.glob("*.parquet"))
    if not shards:
        problem = "has no parquet shards" if directory.is_dir() else "does not exist"
        if directory.is_file():
            problem = "is a file, not a folder"
        raise UserError(
            f"{directory} {problem}: download some with `python -m nanochat.dataset -n 8`, convert your own text with "
            "scripts.make_shards, or pass --data-dir"
        )
    public_validation = _public_name(NUM_PUBLIC_TRAIN)
    if directory.name == PUBLIC_FOLDER and shards[-1].name != public_validation:
        # Otherwise the last downloaded training shard would silently become the validation split.
        raise UserError(
            f"{directory} lacks the validation shard of the public dataset, {public_validation}: "
            "download it with `python -m nanochat.dataset -n 1`, or keep other shards in another folder (--data-dir)"
        )
    if len(shards) == 1:
        raise UserError(f"{directory} has only one shard: at least two are needed, the last by name is for validation")
    for shard in shards:
        _check_shard(shard)
    return shards[:-1], shards[-1:]


def iterate_texts(shards: Sequence[Path]) -> Iterator[str]:
    """Yields all documents in order."""
    row_groups = RowGroups(shards)
    for index in range(len(row_groups)):
        yield from row_groups.texts(index)


class RowGroups:
    """
    The row groups of several shards, numbered consecutively. Parquet is read, and documents are distributed over ranks,
    by row group (about a thousand documents).

    Keeps the most recently read shard open. Not thread-safe.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        counts = [pq.read_metadata(shard).num_row_groups for shard in self.shards]
        self._ends = list(itertools.accumulate(counts))  # per shard, the number of its last row group plus 1
        self._open = functools.lru_cache(maxsize=1)(partial(pq.ParquetFile, page_checksum_verification=True))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Returns (shard, row group within the shard)."""
        assert 0 <= index < len(self), f"row group {index} of {len(self)}"
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard > 0 else 0
        return shard, index - start

    def texts(self, index: int) -> list[str]:
        """Returns the documents of a row group, without null and empty ones. Raises UserError if it is damaged."""
        shard, row_group = self.locate(index)
        try:
            file = self._open(self.shards[shard])
            texts = file.read_row_group(row_group, columns=["text"]).column("text").to_pylist()
            num_rows = file.metadata.row_group(row_group).num_rows
            if len(texts) != num_rows:
                raise pa.ArrowException(f"{len(texts)} of {num_rows} rows")
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            where = f"{self.shards[shard]}, row group {row_group}"
            reason = " ".join(str(error).split())
            raise UserError(f"{where} is damaged ({reason}): download or write the shard again") from error
        return [text for text in texts if text]


def download_public(num_train: int, directory: Path, workers: int = 4) -> None:
    """
    Downloads the first num_train training shards of the public dataset (-1 = all) and its validation shard from
    $HF_ENDPOINT or huggingface.co, `workers` at a time. Shards that exist are skipped.

    Raises UserError if the disk is too small (checked before the first byte is downloaded), if the server cannot be
    reached, and if a shard could not be downloaded.
    """
    if not -1 <= num_train <= NUM_PUBLIC_TRAIN or num_train == 0:
        raise UserError(f"{num_train} training shards: ask for 1 to {NUM_PUBLIC_TRAIN}, or -1 for all")
    validation = _public_name(NUM_PUBLIC_TRAIN)
    if directory.name != PUBLIC_FOLDER and not (directory / validation).exists() and any(directory.glob("*.parquet")):
        raise UserError(f"{directory} holds shards of another dataset: choose another folder with --data-dir")
    train = [_public_name(i) for i in range(NUM_PUBLIC_TRAIN if num_train == -1 else num_train)]
    missing = [name for name in [validation, *train] if not (directory / name).exists()]
    if not missing:
        return

    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    needed = len(missing) * PUBLIC_SHARD_BYTES
    if free < needed:
        raise UserError(
            f"{directory} has {free / 1e9:.1f} GB free, {len(missing)} shards need about {needed / 1e9:.1f} GB: "
            "free some space or ask for fewer shards"
        )
    # The validation shard comes first: if the download is interrupted, no training shard is mistaken for it.
    if missing[0] == validation:
        _download_shards(missing[:1], directory, workers=1)
        missing = missing[1:]
    _download_shards(missing, directory, workers)
    # huggingface_hub keeps metadata and interrupted downloads here, and does not delete them itself.
    shutil.rmtree(directory / ".cache" / "huggingface", ignore_errors=True)


def _download_shards(names: Sequence[str], directory: Path, workers: int) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one per file; the bar below counts files
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    again = "run the same command again, shards that have arrived are kept"

    def download(name: str) -> tuple[str, str]:
        """Downloads a shard (huggingface_hub renames a temporary file); returns (name, error message or "")."""
        message = ""
        for _ in range(DOWNLOAD_ATTEMPTS):
            try:
                hf_hub_download(PUBLIC_REPO, name, repo_type="dataset", local_dir=directory, endpoint=endpoint)
                url = hf_hub_url(PUBLIC_REPO, name, repo_type="dataset", endpoint=endpoint)
                if _has_checksum(directory / name, get_hf_file_metadata(url).etag):
                    return name, ""
                message = "its content does not match its checksum"
                (directory / name).unlink()  # hf_hub_download compares only the size
            except LocalEntryNotFoundError as error:  # after retries; the other shards would fail in the same way
                raise UserError(f"{endpoint} cannot be reached: check the network; {again}") from error
            except EntryNotFoundError:
                return name, "not found"
            except (HTTPError, OSError) as error:
                message = " ".join(str(error).split())
        (directory / name).unlink(missing_ok=True)  # it may be there without having been checked
        return name, message

    # The threads of a ThreadPool are daemons, so that Ctrl-C ends the program without waiting for them.
    with ThreadPool(workers) as pool:
        results = pool.imap_unordered(download, names)
        arrived = track(results, "downloading shards", len(names), "shards")
        errors = sorted((name, message) for name, message in arrived if message)
    if errors:
        listed = ", ".join(f"{name} ({message})" for name, message in errors[:5])
        if len(errors) > 5:
            listed += f" and {len(errors) - 5} more"
        raise UserError(
            f"{len(errors)} of {len(names)} shards from {endpoint} are missing in {directory}: {listed}; {again}"
        )


def _has_checksum(file: Path, etag: str | None) -> bool:
    """Whether a file has the SHA-256 that the hub gives as the ETag of large files; True if the ETag is none."""
    if not etag or not re.fullmatch("[0-9a-f]{64}", etag):
        return True
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == etag


def _public_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def _check_shard(shard: Path) -> None:
    try:
        footer = pq.read_metadata(shard)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shard} is not a complete parquet file: delete it and download it again") from error
    schema = footer.schema.to_arrow_schema()
    columns = {field.name: field.type for field in schema}
    if columns.get("text") not in (pa.string(), pa.large_string()):
        found = ", ".join(f"{name}: {kind}" for name, kind in columns.items())
        raise UserError(f"{shard} needs a column `text` of strings, it has: {found}")
    sizes = [footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)]
    row_groups = RowGroups([shard])
    # The statistics in the footer would tell, too, but pyarrow aborts the process if they are damaged.
    if not any(size >= SMALL_ROW_GROUP or row_groups.texts(i) for i, size in enumerate(sizes)):
        raise UserError(f"{shard} has no text: delete it")


@dataclass(frozen=True)
class Flags:
    num_files: int = flag(
        170, "training shards of about 100 MB, -1 = all; plus the validation shard", COUNT_OR_DEFAULT, short="-n"
    )
    num_workers: int = flag(4, "parallel downloads", short="-w", choices=(1, 2, 4, 8, 16, 32))
    data_dir: str = flag("", "folder to download to; default $NANOCHAT_DATA_DIR, else under $NANOCHAT_BASE_DIR")


@command
def main(flags: Flags) -> None:
    directory = resolve_data_dir(flags.data_dir)
    download_public(flags.num_files, directory, flags.num_workers)
    train, validation = split_shards(directory)
    print(f"{directory}: {len(train)} training shards, {len(validation)} for validation")


if __name__ == "__main__":
    main()
