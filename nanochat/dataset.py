"""
Pretraining text: a folder of parquet shards with a `text` column, the last by name for validation, the others for
training. Any such folder serves (--data-dir or $NANOCHAT_DATA_DIR); by default it is the public dataset, fetched by

    python -m nanochat.dataset -n 170    # 170 training shards of about 100 MB, enough for the speedrun, and validation
    python -m nanochat.dataset -n -1     # all 6,542
"""

import bisect
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.cli import command, flag
from nanochat.common import UserError, base_dir
from nanochat.download import fetch_all

PUBLIC_REPO = "karpathy/climbmix-400b-shuffle"  # https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle
PUBLIC_FOLDER = "base_data_climbmix"
NUM_PUBLIC_TRAIN = 6542  # shard_00000 … shard_06541; the next and last one is for validation


def resolve_data_dir(data_dir: str = "") -> Path:
    """The folder of the shards: the argument, else $NANOCHAT_DATA_DIR, else the public dataset's."""
    return Path(data_dir or os.environ.get("NANOCHAT_DATA_DIR") or base_dir() / PUBLIC_FOLDER).expanduser()


def split_shards(directory: Path) -> tuple[list[Path], list[Path]]:
    """
    The training shards and the validation shard, sorted by name. Reads footers only, so all that can be wrong with a
    folder is a UserError before any expensive work.
    """
    shards = sorted(directory.glob("*.parquet"))
    if not shards:
        what = "has no parquet shards" if directory.is_dir() else "does not exist"
        raise UserError(f"{directory} {what}: fetch some with `python -m nanochat.dataset -n 8`, or pass --data-dir")
    if directory.name == PUBLIC_FOLDER and shards[-1].name != _public_name(NUM_PUBLIC_TRAIN):
        raise UserError(
            f"{directory} lacks the public dataset's validation shard, {_public_name(NUM_PUBLIC_TRAIN)}: "
            "fetch it with `python -m nanochat.dataset -n 1`, or keep shards of your own in another folder (--data-dir)"
        )
    if len(shards) == 1:
        raise UserError(f"{directory} has one shard only: at least two are needed, the last by name is for validation")
    for shard in shards:
        _check(shard)
    return shards[:-1], shards[-1:]


def iterate_texts(shards: Sequence[Path]) -> Iterator[str]:
    """All documents, in order."""
    row_groups = RowGroups(shards)
    for unit in range(len(row_groups)):
        yield from row_groups.texts(unit)


class RowGroups:
    """
    The row groups of several shards under one numbering, 0 <= unit < len: the unit of work that is dealt out to ranks.
    The shard read last stays open. Not for several threads.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        counts = [pq.read_metadata(shard).num_row_groups for shard in self.shards]
        self._ends = list(itertools.accumulate(counts))  # per shard, the first unit after it
        self._open: tuple[int, pq.ParquetFile] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def position(self, unit: int) -> tuple[int, int]:
        """(shard, row group in it)."""
        assert 0 <= unit < len(self), f"unit {unit} of {len(self)}"
        shard = bisect.bisect_right(self._ends, unit)
        return shard, unit - (self._ends[shard - 1] if shard else 0)

    def texts(self, unit: int) -> list[str]:
        """The unit's documents, without null and empty ones: they hold nothing to learn from. UserError if damaged."""
        shard, row_group = self.position(unit)
        try:
            if self._open is None or self._open[0] != shard:
                if self._open is not None:
                    self._open[1].close()
                self._open = (shard, pq.ParquetFile(self.shards[shard]))
            column = self._open[1].read_row_group(row_group, columns=["text"]).column("text")
        except (OSError, pa.ArrowException) as error:
            where = f"{self.shards[shard]}, row group {row_group}"
            raise UserError(f"{where} is damaged ({error}): fetch or write the shard again") from error
        return [text for text in column.to_pylist() if text]


def download_public(num_shards: int, directory: Path, workers: int = 4) -> None:
    """
    Fetches the first num_shards training shards of the public dataset (-1 = all), from $HF_ENDPOINT if set, and the
    validation shard, which comes first: however a download ends, a training shard never stands in its place.
    """
    if not -1 <= num_shards <= NUM_PUBLIC_TRAIN or num_shards == 0:
        raise UserError(f"{num_shards} training shards: ask for 1 to {NUM_PUBLIC_TRAIN}, or -1 for all")
    validation = directory / _public_name(NUM_PUBLIC_TRAIN)
    if directory.name != PUBLIC_FOLDER and not validation.exists() and any(directory.glob("*.parquet")):
        raise UserError(f"{directory} holds shards of something else: choose another folder with --data-dir")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    source = f"{endpoint.rstrip('/')}/datasets/{PUBLIC_REPO}/resolve/main"
    train = [directory / _public_name(i) for i in range(NUM_PUBLIC_TRAIN if num_shards == -1 else num_shards)]
    for paths in ([validation], train):
        fetch_all([(f"{source}/{path.name}", path) for path in paths], workers)


def _public_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def _check(shard: Path) -> None:
    try:
        footer = pq.read_metadata(shard)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shard} is not a whole parquet file: delete it and fetch it again") from error
    schema = footer.schema.to_arrow_schema()
    columns = {field.name: field.type for field in schema}
    if columns.get("text") not in (pa.string(), pa.large_string()):
        found = ", ".join(f"{name}: {kind}" for name, kind in columns.items())
        raise UserError(f"{shard} needs a column `text` of strings, it has: {found}")
    index = footer.schema.names.index("text")
    if not any(_has_text(footer.row_group(i), index) for i in range(footer.num_row_groups)):
        raise UserError(f"{shard} holds no text: delete it")


def _has_text(row_group: pq.RowGroupMetaData, column: int) -> bool:
    """Whether there is a text that is not null and not empty, or no statistics to deny it."""
    statistics = row_group.column(column).statistics
    if row_group.num_rows == 0 or statistics is None:
        return row_group.num_rows > 0
    all_null = statistics.has_null_count and statistics.null_count == row_group.num_rows
    return not all_null and not (statistics.has_min_max and not statistics.max)


@dataclass(frozen=True)
class Flags:
    num_files: int = flag(170, "training shards of 100 MB, -1 = all; the validation shard comes on top", short="-n")
    num_workers: int = flag(4, "downloads at a time", short="-w", choices=(1, 2, 4, 8, 16, 32))
    data_dir: str = flag("", "folder to fetch into; default $NANOCHAT_DATA_DIR, else below $NANOCHAT_BASE_DIR")


@command
def main(flags: Flags) -> None:
    directory = resolve_data_dir(flags.data_dir)
    download_public(flags.num_files, directory, flags.num_workers)
    train, validation = split_shards(directory)
    print(f"{directory}: {len(train)} training shards, {len(validation)} for validation")


if __name__ == "__main__":
    main()
