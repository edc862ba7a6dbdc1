"""
Compare the compression of the tokenizer with that of GPT-2's and GPT-4's, in bytes per token (more is better).

    python -m scripts.tok_eval
    TIKTOKEN_CACHE_DIR=~/.cache/tiktoken python -m scripts.tok_eval     # where tiktoken keeps the other two
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tiktoken
from rich.console import Console
from rich.table import Table

from nanochat import dataset, mixture
from nanochat.cli import command, flag
from nanochat.common import UserError
from nanochat.logging import save_numbers
from nanochat.tokenizer import Tokenizer, bytes_per_token, default_dir

OTHERS = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # shown name → tiktoken's name
SAMPLES = ("news", "code", "Korean", "maths")  # files in samples/, written for this comparison
NUM_DOCS = 100  # documents of each split (heuristic, not tuned)


@dataclass(frozen=True)
class Flags:
    data_dir: str = flag("", "folder of parquet shards or mixture; empty = $NANOCHAT_DATA_DIR or the default")
    tokenizer_dir: str = flag("", "folder of the tokenizer; empty = tokenizer/ in $NANOCHAT_BASE_DIR")


@command
def main(flags: Flags) -> dict[str, dict[str, float]]:
    """Prints a table and returns bytes per token by kind of text and tokenizer."""
    ours = Tokenizer.load(Path(flags.tokenizer_dir or default_dir()))
    encoders = {"ours": ours.encode}
    sizes = {"ours": ours.vocab_size}
    for name, tiktoken_name in OTHERS.items():
        encoding = local_encoding(tiktoken_name)
        if encoding is None:
            print(f"{name}: skipped, tiktoken has no local copy of {tiktoken_name} (see $TIKTOKEN_CACHE_DIR)")
        else:
            encoders[name] = encoding.encode_ordinary
            sizes[name] = encoding.n_vocab

    folder = Path(__file__).with_name("samples")
    samples = {kind: [(folder / f"{kind}.txt").read_text(encoding="utf-8")] for kind in SAMPLES}
    samples |= split_samples(flags.data_dir)
    results = {}
    for kind, texts in samples.items():
        results[kind] = {name: bytes_per_token(encode, texts) for name, encode in encoders.items()}
    print_table(results, sizes)
    save_numbers("tok_eval", {"results": results, "sizes": sizes})
    return results


def local_encoding(name: str) -> tiktoken.Encoding | None:
    """Returns tiktoken's encoding of that name, or None if its files are not on this machine: nothing is downloaded."""
    with mock.patch("tiktoken.load.read_file", side_effect=FileNotFoundError):
        try:
            return tiktoken.get_encoding(name)
        except FileNotFoundError:
            return None


def split_samples(data_dir: str) -> dict[str, list[str]]:
    """Returns the first documents of both splits of each source; empty if there are no shards."""
    try:
        sources = mixture.find_sources(data_dir)
    except UserError as error:
        if data_dir:
            raise  # the user asked for this folder
        print(f"train and val split: skipped, {error}")
        return {}
    samples = {}
    for source in sources:
        of_source = f" of {source.name}" if len(sources) > 1 else ""
        for split, shards in (("train", source.train_shards), ("val", source.val_shards)):
            samples[f"{split} split{of_source}"] = list(itertools.islice(dataset.iterate_texts(shards), NUM_DOCS))
    return samples


def print_table(results: dict[str, dict[str, float]], sizes: dict[str, int]) -> None:
    table = Table("text", title="bytes per token")
    for name, size in sizes.items():
        table.add_column(f"{name}\n{size:,} tokens", justify="right")
    for kind, ratios in results.items():
        best = max(ratios.values())
        cells = [f"[bold]{ratio:.2f}[/bold]" if ratio == best else f"{ratio:.2f}" for ratio in ratios.values()]
        table.add_row(kind, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
