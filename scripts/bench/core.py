"""
CORE as base_eval computes it beside the usual code: one item at a time, its prompts as the rows of one forward pass,
logits of every token, and a process as Python starts it. Each runs in a process of its own, on the same sample of all
22 tasks, and must come to the same verdicts.

    python -m scripts.bench core --eval-bundle ~/eval_bundle --data-dir ~/texts   # = python -m scripts.bench.core …
    python -m scripts.bench core --model-tag d12                                  # a model that was trained

Without a model tag the model is a new one (depth 4, width 256, 2,048 tokens of context) with a vocabulary of 8,192
learned from the data folder. NANOCHAT_DTYPE chooses the dtype, as everywhere.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from nanochat import checkpoint_manager, dataset, hardware
from nanochat.cli import command, flag
from nanochat.common import base_dir
from nanochat.eval.core import judge
from nanochat.eval.core_tasks import CoreTask, load_tasks, resolve_bundle, tokenize
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer, default_dir

TREES, ONE_AT_A_TIME = "batched trees", "one at a time"
CONFIG = GPTConfig(sequence_len=2048, vocab_size=8192, n_layer=4, n_head=4, n_kv_head=4, n_embd=256)


@dataclass(frozen=True)
class Flags:
    max_per_task: int = flag(12, "items of each task")
    eval_bundle: str = flag(
        "", "folder of CORE's tasks; default $NANOCHAT_EVAL_BUNDLE, else the public bundle, fetched"
    )
    data_dir: str = flag("", "folder of parquet shards to learn a vocabulary from; default $NANOCHAT_DATA_DIR")
    model_tag: str = flag("", "a base model; empty = a new one")
    device: str = flag("cpu", "cuda | mps | cpu | auto")
    worker: str = flag("", "used by the benchmark itself: the way to run in this process")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    if flags.worker:
        print(json.dumps(work(flags)))
        return {}
    flags = replace(flags, eval_bundle=str(resolve_bundle(flags.eval_bundle)))
    with base_folder(flags) as folder:
        # Ours before and after, for what else the machine does changes within the minutes that the usual code takes.
        runs = {name: run_worker(name, flags, folder) for name in (TREES, ONE_AT_A_TIME)}
        again = run_worker(TREES, flags, folder)
    ours, usual = runs[TREES], runs[ONE_AT_A_TIME]
    ours["seconds"] = (ours["seconds"] + again["seconds"]) / 2
    table = Table("", title=f"{len(ours['verdicts'])} items, {ours['machine']}")
    for title in ("s", "items/s", "peak memory, GiB", "right"):
        table.add_column(title, justify="right")
    for name, run in runs.items():
        speed, memory = len(run["verdicts"]) / run["seconds"], run["memory"] / 2**30
        table.add_row(name, f"{run['seconds']:.1f}", f"{speed:.2f}", f"{memory:.2f}", str(sum(run["verdicts"])))
    Console().print(table)
    different = sum(a != b for a, b in zip(ours["verdicts"], usual["verdicts"], strict=True))
    print(f"different verdicts: {different}")
    ratios = {"items/s": usual["seconds"] / ours["seconds"], "memory": usual["memory"] / ours["memory"]}
    ratios = {name: round(ratio, 2) for name, ratio in ratios.items()}
    seconds = {name: run["seconds"] for name, run in runs.items()}
    print(json.dumps({"benchmark": "core", "seconds": seconds, "different": different, "ratios": ratios}))
    return ratios


@contextmanager
def base_folder(flags: Flags) -> Iterator[Path]:
    """Where the workers find the tokenizer: the user's folder, or one that lasts as long as the benchmark."""
    if flags.model_tag:
        yield base_dir()
        return
    shards, _ = dataset.split_shards(dataset.resolve_data_dir(flags.data_dir))
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(dataset.iterate_texts(shards), CONFIG.vocab_size).save(Path(folder) / default_dir().name)
        yield Path(folder)


def run_worker(name: str, flags: Flags, folder: Path) -> dict[str, Any]:
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in (vars(flags) | {"worker": name}).items()]
    command_line = [sys.executable, "-m", "scripts.bench.core", *argv]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(folder)}
    done = subprocess.run(command_line, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(flags: Flags) -> dict[str, Any]:
    """Seconds from rows to verdicts, bytes held at most, verdicts."""
    device = hardware.pick_device(flags.device)
    tasks = load_tasks(resolve_bundle(flags.eval_bundle), flags.max_per_task)
    items = [(task, index) for task in tasks for index in range(len(task))]
    model, tokenizer = load(flags, device)
    machine = f"{hardware.describe(device)}, {model.dtype}"
    start = time.perf_counter()
    if flags.worker == TREES:
        hardware.tune_process(device)
        verdicts = judge(model, tokenizer, items)
    else:
        verdicts = [judge_alone(model, tokenizer, item) for item in items]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds, "memory": hardware.peak_memory(device), "verdicts": verdicts, "machine": machine,
    }  # fmt: skip


def load(flags: Flags, device: torch.device) -> tuple[GPT, Tokenizer]:
    tokenizer, dtype = Tokenizer.load(default_dir()), hardware.pick_dtype(device)
    if flags.model_tag:
        return checkpoint_manager.load_model("base", flags.model_tag, -1, tokenizer, device, dtype)[0], tokenizer
    torch.manual_seed(0)
    model = GPT(CONFIG, device, dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # the initial weights of training would make each block the identity
    model.cast_weights()
    return model.eval(), tokenizer


@torch.inference_mode()
def judge_alone(model: GPT, tokenizer: Tokenizer, item: tuple[CoreTask, int]) -> bool:
    """The baseline: the prompts of one item, padded to a rectangle, and the whole of their logits."""
    task, index = item
    [rows] = tokenize(tokenizer, [item], model.config.sequence_len)
    longest = max(len(row.tokens) for row in rows.values())
    padded = [row.tokens + [tokenizer.bos] * (longest - len(row.tokens)) for row in rows.values()]
    idx_BT = torch.tensor(padded, device=model.device)
    logits_BTV = model(idx_BT)
    losses_BT = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), idx_BT[:, 1:].flatten(), reduction="none")
    losses_BT, likeliest_BT = losses_BT.view(len(rows), -1), logits_BTV.argmax(dim=-1)
    if task.kind == "language_modeling":
        [row] = rows.values()
        return likeliest_BT[0, row.start - 1 : row.stop - 1].tolist() == row.tokens[row.start : row.stop]
    means = [
        losses[row.start - 1 : row.stop - 1].mean().item() for row, losses in zip(rows.values(), losses_BT, strict=True)
    ]
    return list(rows)[means.index(min(means))] == task.rows[index]["gold"]


if __name__ == "__main__":
    main()
