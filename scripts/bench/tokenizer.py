"""
Tokenizers: training and encoding with nanochat's rustbpe, the published rustbpe wheel, Hugging Face's tokenizers and
tiktoken, on the same text. Each runs in a separate process, and they take turns. Those that are not installed are
skipped.

    pip install --no-deps --target /tmp/published rustbpe==0.1.0
    python -m scripts.bench tokenizer --published-dir /tmp/published

`ratios`: speed of training and of encoding, and peak memory, of nanochat's rustbpe compared with each of the others.
"""

import importlib.util
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import dataset
from nanochat.cli import COUNT, command, flag
from nanochat.tokenizer import SPLIT_PATTERN
from scripts.bench.harness import alternate, medians, print_table, report, run_in_process

BATCH = 128  # documents per call, as in the data loader
ENCODE_CHARS = 10_000_000  # about a second of the slowest encoder
OURS = "rustbpe (ours)"
PUBLISHED = "rustbpe 0.1.0"
HUGGING_FACE = "tokenizers"
TIKTOKEN = "tiktoken"
Encode = Callable[[list[str]], Any]


@dataclass(frozen=True)
class Flags:
    vocab_size: int = flag(32_768, "tokens", COUNT)
    data_dir: str = flag("", "folder of parquet shards; empty = $NANOCHAT_DATA_DIR or the default")
    max_chars: int = flag(100_000_000, "characters to train on", COUNT)
    published_dir: str = flag("", "folder of the published rustbpe, see above (pip install --target); empty = skip it")
    rounds: int = flag(3, "runs of each tokenizer; the medians count", COUNT)


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    names = available(flags)
    runs = {name: lambda name=name: run_in_process(measure, name, flags) for name in names}
    results = {name: medians(measured) for name, measured in alternate(runs, flags.rounds, warmup=0).items()}
    print_results(results, flags.rounds)
    return report("tokenizer", compare(results), medians=results)


def available(flags: Flags) -> list[str]:
    """Returns the tokenizers that can be measured; prints why the others are skipped."""
    reasons = {
        OURS: "" if has_ours() else "the published wheel is installed instead: pip install ./rustbpe",
        PUBLISHED: "" if flags.published_dir else "pass its folder with --published-dir",
        HUGGING_FACE: "" if importlib.util.find_spec("tokenizers") else "not installed: pip install tokenizers",
        TIKTOKEN: "" if has_ours() else "needs the tokens that nanochat's rustbpe learns",
    }
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: skipped, {reason}")
    return [name for name, reason in reasons.items() if not reason]


def has_ours() -> bool:
    """Whether the installed rustbpe is nanochat's: the published wheel has no from_tokens."""
    import rustbpe

    return hasattr(rustbpe.Tokenizer, "from_tokens")


def measure(name: str, flags: Flags) -> dict[str, float]:
    """
    Measures one tokenizer: the speeds of training and encoding in MB/s, and `memory`, the peak in training minus the
    memory before it, in MB.
    """
    if name == PUBLISHED:
        sys.path.insert(0, flags.published_dir)
    train_shards, val_shards = dataset.split_shards(dataset.resolve_data_dir(flags.data_dir))
    texts = first_texts(dataset.iterate_texts([*train_shards, *val_shards]), flags.max_chars)
    num_bytes = sum(len(text.encode()) for text in texts)
    result = {}
    before = memory("VmRSS")
    start = time.perf_counter()
    encode = TRAINERS[name](texts, flags.vocab_size)
    seconds = time.perf_counter() - start
    if name != TIKTOKEN:  # it cannot train
        result = {"train": num_bytes / seconds / 1e6, "seconds": seconds, "memory": memory("VmHWM") - before}

    sample = first_texts(texts, ENCODE_CHARS)
    encode(sample[:BATCH])  # warm-up
    start = time.perf_counter()
    for first in range(0, len(sample), BATCH):
        encode(sample[first : first + BATCH])
    seconds = time.perf_counter() - start
    result["encode"] = sum(len(text.encode()) for text in sample) / seconds / 1e6
    return result


def first_texts(texts: Iterable[str], max_chars: int) -> list[str]:
    """Returns as many of the first texts as have at most max_chars characters in total."""
    chosen = []
    for text in texts:
        max_chars -= len(text)
        if max_chars < 0:
            break
        chosen.append(text)
    return chosen


def memory(field: str) -> float:
    """Returns the memory of this process in MB: now (VmRSS) or the peak (VmHWM). Without /proc, always the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return int(re.findall(rf"{field}:\s*(\d+) kB", status.read_text())[0]) * 1024 / 1e6


def train_rustbpe(texts: list[str], vocab_size: int) -> Encode:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=SPLIT_PATTERN)
    return tokenizer.batch_encode


def train_hugging_face(texts: list[str], vocab_size: int) -> Encode:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    return lambda batch: [encoding.ids for encoding in tokenizer.encode_batch(batch)]


def make_tiktoken(texts: list[str], vocab_size: int) -> Encode:
    import tiktoken

    import rustbpe

    learned = rustbpe.Tokenizer()
    learned.train_from_iterator(iter(texts), vocab_size, pattern=SPLIT_PATTERN)
    ranks = dict(learned.get_mergeable_ranks())
    encoding = tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda batch: encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1)


TRAINERS: dict[str, Callable[[list[str], int], Encode]] = {
    OURS: train_rustbpe,
    PUBLISHED: train_rustbpe,
    HUGGING_FACE: train_hugging_face,
    TIKTOKEN: make_tiktoken,
}


def print_results(results: dict[str, dict[str, float]], rounds: int) -> None:
    units = {"seconds": "training\ns", "train": "training\nMB/s", "memory": "memory\nMB", "encode": "encoding\nMB/s"}
    rows = {}
    for name, result in results.items():
        rows[name] = {units[key]: f"{value:.2f}" for key, value in result.items()}
    print_table(f"medians of {rounds} runs, {os.cpu_count()} cores", rows)


def compare(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns how many times better nanochat's rustbpe is than the others: faster, or with less memory."""
    ratios: dict[str, float] = {}
    ours = results.get(OURS, {})
    for other, theirs in results.items():
        for key in ("train", "memory", "encode"):
            if other != OURS and key in ours and key in theirs:
                ratio = ours[key] / theirs[key]
                ratios[f"{key} over {other}"] = 1 / ratio if key == "memory" else ratio
    return ratios


if __name__ == "__main__":
    main()
