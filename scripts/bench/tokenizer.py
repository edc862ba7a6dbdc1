"""
Training and encoding with our rustbpe, the published wheel, Hugging Face's tokenizers and tiktoken, on the same text.
Each runs in a process of its own, in turns; what is not installed is left out with a word.

    pip install --no-deps --target /tmp/published rustbpe==0.1.0
    python -m scripts.bench tokenizer --published-dir /tmp/published        # = python -m scripts.bench.tokenizer …
"""

import importlib.util
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nanochat import dataset
from nanochat.cli import command, flag
from nanochat.tokenizer import SPLIT_PATTERN

BATCH = 128  # documents, as in the data loader
ENCODE_CHARS = 10_000_000  # enough for a second of the slowest (arbitrary)
OURS, PUBLISHED, HUGGING_FACE, TIKTOKEN = "rustbpe (ours)", "rustbpe 0.1.0", "tokenizers", "tiktoken"
Encode = Callable[[list[str]], Any]


@dataclass(frozen=True)
class Flags:
    vocab_size: int = flag(32_768, "tokens")
    data_dir: str = flag("", "folder of parquet shards; empty = $NANOCHAT_DATA_DIR or the default")
    max_chars: int = flag(100_000_000, "characters to train on")
    published_dir: str = flag("", "folder into which pip put the published rustbpe (--target); empty leaves it out")
    rounds: int = flag(3, "runs of each; medians count")
    worker: str = flag("", "used by the benchmark itself: the one to run in this process")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    if flags.worker:
        print(json.dumps(work(flags)))
        return {}
    reasons = {
        OURS: "" if has_ours() else "the published wheel is installed, not ours: pip install ./rustbpe",
        PUBLISHED: "" if flags.published_dir else "name its folder with --published-dir",
        HUGGING_FACE: "" if importlib.util.find_spec("tokenizers") else "not installed: pip install tokenizers",
        TIKTOKEN: "" if has_ours() else "needs the tokens that ours learns",
    }
    for name, reason in reasons.items():
        if reason:
            print(f"{name}: left out, {reason}")
    names = [name for name, reason in reasons.items() if not reason]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(flags.rounds):
        for name in names:
            runs[name].append(run_worker(name, flags))
    medians = {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    print_table(medians, flags.rounds)
    ratios = compare(medians)
    print(json.dumps({"benchmark": "tokenizer", "medians": medians, "ratios": ratios}))
    return ratios


def has_ours() -> bool:
    import rustbpe

    return hasattr(rustbpe.Tokenizer, "from_tokens")


def run_worker(name: str, flags: Flags) -> dict[str, float]:
    environment = dict(os.environ)
    if name == PUBLISHED:
        environment["PYTHONPATH"] = os.pathsep.join([flags.published_dir, environment.get("PYTHONPATH", "")])
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in (vars(flags) | {"worker": name}).items()]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench.tokenizer", *argv], env=environment, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def work(flags: Flags) -> dict[str, float]:
    """
    MB/s and MB, of one implementation in this process. `memory`: the peak while training, over what the process had
    with the text loaded.
    """
    train_shards, val_shards = dataset.split_shards(dataset.resolve_data_dir(flags.data_dir))
    texts = first_texts(dataset.iterate_texts([*train_shards, *val_shards]), flags.max_chars)
    num_bytes = sum(len(text.encode()) for text in texts)
    result, before, start = {}, memory("VmRSS"), time.perf_counter()
    encode = TRAINERS[flags.worker](texts, flags.vocab_size)
    if flags.worker != TIKTOKEN:
        seconds = time.perf_counter() - start
        result = {"train": num_bytes / seconds / 1e6, "seconds": seconds, "memory": memory("VmHWM") - before}

    sample = first_texts(texts, ENCODE_CHARS)
    encode(sample[:BATCH])  # what is made once
    start = time.perf_counter()
    for first in range(0, len(sample), BATCH):
        encode(sample[first : first + BATCH])
    seconds = time.perf_counter() - start
    return result | {"encode": sum(len(text.encode()) for text in sample) / seconds / 1e6}


def first_texts(texts: Iterable[str], max_chars: int) -> list[str]:
    """As many of the texts as have no more characters than that together."""
    texts, counted = itertools.tee(texts)
    sizes = itertools.accumulate(map(len, counted))
    return [text for text, _ in zip(texts, itertools.takewhile(lambda size: size <= max_chars, sizes), strict=False)]


def memory(field: str) -> float:
    """MB that this process holds (VmRSS) or held at most (VmHWM). Where there is no /proc: the most, in both cases."""
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


def print_table(medians: dict[str, dict[str, float]], rounds: int) -> None:
    table = Table("", title=f"medians of {rounds} runs, {os.cpu_count()} cores")
    for title in ("training\ns", "training\nMB/s", "memory over\nthe text, MB", "encoding\nMB/s"):
        table.add_column(title, justify="right")
    for name, row in medians.items():
        cells = [f"{row[key]:.2f}" if key in row else "" for key in ("seconds", "train", "memory", "encode")]
        table.add_row(name, *cells)
    Console().print(table)


def compare(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times better ours is."""
    ours, ratios = medians.get(OURS, {}), {}
    for key, others, inverse in (
        ("train", (PUBLISHED, HUGGING_FACE), False),
        ("memory", (PUBLISHED, HUGGING_FACE), True),
        ("encode", (TIKTOKEN, PUBLISHED, HUGGING_FACE), False),
    ):
        for other in others:
            if key in ours and other in medians:
                ratio = ours[key] / medians[other][key]
                ratios[f"{key} over {other}"] = round(1 / ratio if inverse else ratio, 2)
    return ratios


if __name__ == "__main__":
    main()
