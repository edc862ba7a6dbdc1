"""
Convert your own text to pretraining shards: shuffled, without exact duplicates, with a validation shard.

    python -m scripts.make_shards ~/notes ~/books/moby_dick.txt --out ~/shards
    python -m scripts.make_shards crawl.jsonl.gz table.csv --text-field content --out ~/shards
    python -m scripts.make_shards hub:roneneldan/TinyStories --out ~/stories
    NANOCHAT_DATA_DIR=~/shards python -m scripts.tok_train

A source is a file, a folder of files, or a dataset of the Hugging Face Hub (hub:owner/name:config:split). Files are
.parquet, .txt, .md, .jsonl or .csv; the last four may be compressed, as .gz or .zst. The same texts and seed give the
same shards.
"""

import math
import time
from dataclasses import MISSING, dataclass
from pathlib import Path

from nanochat.cli import COUNT, NOT_NEGATIVE, SEED, command, flag
from nanochat.common import duration
from nanochat.shards import Options, make_shards
from nanochat.sources import find_sources


@dataclass(frozen=True)
class Flags:
    sources: list[str] = flag(MISSING, "files, folders or datasets of the hub")
    out: str = flag(MISSING, "folder for the shards: new, empty, or written by an earlier run, which is replaced")
    text_field: str = flag("text", "name of the field or column that holds the text; without effect on .txt and .md")
    # Shorter documents are remnants of a few tokens, such as "404" or "n/a", and each would cost a BOS token.
    min_chars: int = flag(16, "shorter documents are skipped; spaces around the text do not count", COUNT)
    # Pretraining crops a document to the length of a row, 2,048 tokens by default, and discards its rest. 8,000
    # characters of English are about 1,700 tokens.
    max_chars: int = flag(8000, "longer documents are split, because training discards what exceeds a row", COUNT)
    max_gigabytes: float = flag(
        0.0, "read the sources in order and stop after this much text; 0 = read all", NOT_NEGATIVE
    )
    seed: int = flag(0, "seed of the shuffle", SEED)


@command
def main(flags: Flags) -> None:
    start = time.perf_counter()
    out = Path(flags.out).expanduser().resolve()
    sources, ignored = find_sources(flags.sources, flags.text_field, exclude=out)
    max_bytes = 1e9 * flags.max_gigabytes or math.inf
    summary = make_shards(sources, out, Options(flags.min_chars, flags.max_chars, flags.seed, max_bytes))
    seconds = time.perf_counter() - start

    size = summary.num_bytes / 1e6
    print(f"sample   {len(summary.preview)} documents, the first 80 characters of each:")
    for text in summary.preview:
        print(f"  | {printable(' '.join(text[:200].split())[:80])}")
    print(f"read     {summary.num_documents:,} documents, {size:,.1f} MB, from {len(sources):,} sources")
    for suffix, count in sorted(ignored.items()):
        print(f"ignored  {count:,} files with {suffix}")
    for cause, count in summary.skipped.most_common():
        first = summary.first_skipped.get(cause)
        print(f"skipped  {count:,} {cause}" + (f", the first in {printable(first)}" if first else ""))
    if summary.num_split:
        print(f"split    {summary.num_split:,} documents longer than --max-chars into {summary.num_pieces:,}")
    print(f"wrote    {summary.num_train:,} documents for training, {summary.num_val:,} for validation")
    print(f"took     {duration(seconds)}, {size / seconds:.1f} MB/s")
    print(f"saved    {out}: {len(summary.shards) - 1} training shards, 1 for validation")


def printable(text: str) -> str:
    """The text with "?" for control characters, which a terminal would obey, and for invalid bytes of a file name."""
    return "".join(character if character.isprintable() else "?" for character in text)


if __name__ == "__main__":
    main()
