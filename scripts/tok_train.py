"""
Train the tokenizer on the training shards. This is the first stage: every later one uses its vocabulary.

    python -m scripts.tok_train                                             # 32,768 tokens from 2 billion characters
    python -m scripts.tok_train --vocab-size 4096 --max-chars 20000000      # a small one, in seconds
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat import mixture
from nanochat.cli import COUNT, command, flag
from nanochat.common import duration, human
from nanochat.logging import save_numbers
from nanochat.progress import Bar, track
from nanochat.report.record import recorded
from nanochat.tokenizer import PORTABLE_SPLIT_PATTERN, SPLIT_PATTERN, Tokenizer, bytes_per_token, default_dir

NUM_SAMPLES = 200  # validation documents for the check at the end (heuristic, not tuned)


@dataclass(frozen=True)
class Flags:
    vocab_size: int = flag(32_768, "tokens, special ones included", COUNT)
    max_chars: int = flag(2_000_000_000, "characters to train on", COUNT)
    doc_cap: int = flag(10_000, "characters used of each document, so that long ones do not dominate", COUNT)
    portable: bool = flag(False, "split numbers into single digits, for models trained with base_train --portable")
    data_dir: str = flag("", "folder of parquet shards or mixture; empty = $NANOCHAT_DATA_DIR or the default")
    tokenizer_dir: str = flag("", "folder to write to; empty = tokenizer/ in $NANOCHAT_BASE_DIR")


@command
@recorded("tok_train")
def main(flags: Flags) -> Tokenizer:
    directory = Path(flags.tokenizer_dir or default_dir())
    sources = mixture.find_sources(flags.data_dir)
    weights = [source.weight for source in sources]
    train_shards = [source.train_shards for source in sources]
    val_shards = [source.val_shards for source in sources]

    directory.mkdir(parents=True, exist_ok=True)  # an unwritable folder is reported before training

    texts = CappedTexts(mixture.iterate_texts(weights, train_shards, flags.doc_cap), flags.max_chars, flags.doc_cap)
    start = time.perf_counter()
    with Bar("merging", unit="merges") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        tokenizer = Tokenizer.train(
            track(texts, "reading text", unit="documents"),
            flags.vocab_size,
            pattern=PORTABLE_SPLIT_PATTERN if flags.portable else SPLIT_PATTERN,
            progress=report,
        )
    seconds = time.perf_counter() - start
    tokenizer.save(directory)

    print(f"read        {human(texts.num_docs)} documents, {human(texts.num_bytes)} bytes")
    print(f"trained in  {duration(seconds)} ({texts.num_bytes / seconds / 1e6:.1f} MB/s)")
    print(f"vocabulary  {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}")
    sample = list(itertools.islice(mixture.iterate_texts(weights, val_shards), NUM_SAMPLES))
    for text in sample:
        assert tokenizer.decode(tokenizer.encode(text)) == text, "decoding does not restore the text"
    ratio = bytes_per_token(tokenizer.encode, sample)
    print(f"validation  {ratio:.2f} bytes per token; decoding restores {len(sample)} documents")
    print(f"saved       {directory}")
    numbers = {"vocabulary": tokenizer.vocab_size, "bytes per token": ratio, "MB/s": texts.num_bytes / seconds / 1e6}
    save_numbers("tok_train", numbers)
    return tokenizer


class CappedTexts:
    """Yields the first doc_cap characters of each text, up to max_chars in total, and counts documents and bytes."""

    def __init__(self, texts: Iterable[str], max_chars: int, doc_cap: int) -> None:
        self.texts = texts
        self.max_chars = max_chars
        self.doc_cap = doc_cap
        self.num_docs = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        chars_left = self.max_chars
        for text in self.texts:
            text = text[: min(self.doc_cap, chars_left)]
            self.num_docs += 1
            self.num_bytes += len(text.encode())
            yield text
            chars_left -= len(text)
            if chars_left == 0:
                return


if __name__ == "__main__":
    main()
