"""
Training beside the straightforward way to write it: the same model and data, but float32 (on a GPU bfloat16), SDPA with
boolean masks for windows, all logits at once, an update per tensor, batches made when they are needed; compiled too.
Each has a process of its own, and they take turns.

    python -m scripts.bench train                                             # = python -m scripts.bench.train
    python -m scripts.bench train --depth 24 --head-dim 128 --max-seq-len 2048 --total-batch-size 524288 --no-plain

Utilization (MFU) is of the GPU's data sheet, or of what this machine was measured to multiply in that dtype. `ratios`:
tokens/s over the plain code's, and likewise the time to the end of the first step and the peak of memory.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from nanochat import attention, dataset, hardware, recipe
from nanochat.checkpoint_manager import CheckpointDir
from nanochat.cli import command, flag
from nanochat.common import UserError, human
from nanochat.dataloader import PretrainLoader, on_device, prefetch, pretrain_steps
from nanochat.distributed import Dist
from nanochat.gpt import GPT, LOGIT_CAP, GPTConfig, flops_per_token
from nanochat.loss import cross_entropy
from nanochat.muon import MuonAdamW, adamw_update, build_optimizer
from nanochat.primer import documents as primer
from nanochat.run import Settings, Start
from nanochat.tokenizer import Tokenizer
from nanochat.train import Step, token_loss
from scripts.bench.harness import Laps, Worker, time_passes

PARTS = ("data", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Flags:
    depth: int = flag(4, "transformer layers")
    head_dim: int = flag(64, "channels per attention head")
    vocab_size: int = flag(8192, "tokens")
    max_seq_len: int = flag(512, "tokens of context")
    window_pattern: str = flag("SSSL", "windows of attention, tiled over the layers")
    device_batch_size: int = flag(16, "rows per forward pass")
    total_batch_size: int = flag(8192, "tokens per update")
    attention: str = flag("auto", f"attention kernel: auto | {' | '.join(attention.LOADERS)}")
    dtype: str = flag("auto", "of the computation: auto, as base_train chooses", choices=("auto", *hardware.DTYPES))
    compile: bool = flag(True, "torch.compile both")
    plain: bool = flag(True, "measure the plain code too; both have to fit into memory at once")
    rounds: int = flag(5, "turns of each; medians count")
    steps: int = flag(3, "updates per turn")
    data_dir: str = flag("", "folder of parquet shards; empty = the primer")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    if min(flags.rounds, flags.steps) < 1:
        raise UserError("--rounds and --steps must be at least 1")
    hardware.pick_device(flags.device)
    recipe.accumulation_steps(flags.total_batch_size, flags.device_batch_size, flags.max_seq_len, 1)
    shape = (flags.depth, flags.vocab_size, 64, flags.head_dim, flags.max_seq_len, flags.window_pattern)
    config, sides = recipe.model_config(*shape), {"nanochat": ours} | ({"plain": plain} if flags.plain else {})
    with tempfile.TemporaryDirectory() as folder:
        if not flags.data_dir:
            primer.write_shards(Path(folder))
        shards = dataset.split_shards(Path(flags.data_dir or folder))[0]
        Tokenizer.train(islice(dataset.iterate_texts(shards), 3000), flags.vocab_size).save(Path(folder))
        workers: dict[str, Worker] = {}
        for name, side in sides.items():
            workers[name] = Worker(work, time.time(), side, flags, config, Path(folder), shards)
            workers[name].answer()  # when its first step is done
        turns = [{name: worker.ask(flags.steps) for name, worker in workers.items()} for _ in range(flags.rounds + 1)]
        results = {name: worker.ask(0) for name, worker in workers.items()}
    for name, result in results.items():
        seconds = {part: statistics.median(turn[name][part] for turn in turns[1:]) for part in (*PARTS, "all")}
        for part in ("forward", "backward"):  # the loss is in them: it was measured alone
            loss = min(result.pop(part), seconds[part])
            seconds |= {part: seconds[part] - loss, "loss": seconds["loss"] + loss}
        result["tokens/s"] = flags.total_batch_size / seconds["all"]
        result["MFU"] = result["tokens/s"] * flops_per_token(config) / result.pop("FLOP/s")
        result |= {f"share of {part}": seconds[part] / sum(seconds[p] for p in PARTS) for part in PARTS}
    table = Table("", *results)
    for key in results["nanochat"]:
        show = "{:.1%}".format if key.startswith("share") or key == "MFU" else human
        table.add_row(key, *(show(result[key]) for result in results.values()))
    Console().print(table)
    fast, slow = results["nanochat"], results.get("plain", results["nanochat"])
    ratios = {key: round(slow[key] / fast[key], 3) for key in ("seconds to first step", "bytes of memory")}
    ratios = {"tokens/s": round(fast["tokens/s"] / slow["tokens/s"], 3)} | ratios if flags.plain else {}
    print(json.dumps({"benchmark": "train", "results": results, "ratios": ratios}))
    return ratios


@dataclass
class Side:
    """One of the two ways to train."""

    model: GPT
    steps: Iterator[Step]
    optimizer: MuonAdamW
    loss: Callable[[Any], torch.Tensor]  # of a micro-batch
    loss_alone: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of hidden states (B, T, C) and targets (B, T)


def ours(flags: Flags, config: GPTConfig, device: torch.device, tokenizer: Tokenizer, steps: Iterator[Step]) -> Side:
    dist, settings = Dist(device), Settings(total_batch_size=flags.total_batch_size)
    dtype = hardware.DTYPES.get(flags.dtype) or hardware.pick_training_dtype(device)
    start = Start("base", config, tokenizer, dist, dtype, CheckpointDir("base", "bench", dist), None)
    run = start.build(settings.rates(), settings.batch_factor, {}, 0.28, flags.compile, attention=flags.attention)

    def loss_alone(hidden_BTC: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
        rows = (hidden_BTC.flatten(0, 1), run.model.lm_head.weight, y_BT.flatten())
        return cross_entropy(*rows, config.vocab_size, LOGIT_CAP, "sum")

    return Side(run.model, prefetch(steps), run.optimizer, lambda batch: token_loss(run.fast_model, batch), loss_alone)


def plain(flags: Flags, config: GPTConfig, device: torch.device, tokenizer: Tokenizer, steps: Iterator[Step]) -> Side:
    torch.manual_seed(42)
    model = GPT.create(config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.use_attention(attention.attend_masked)
    settings = Settings(total_batch_size=flags.total_batch_size)
    groups = []
    for group in build_optimizer(model, settings.rates(), settings.batch_factor).param_groups:
        groups += [group | {"names": [n], "params": [p]} for n, p in zip(group["names"], group["params"], strict=True)]
    optimizer = MuonAdamW(groups, 0, 1, False, model.dtype)
    optimizer.adamw_update = adamw_update

    def loss_alone(hidden_BTC: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.logits(hidden_BTC).flatten(0, 1), y_BT.flatten(), reduction="sum")

    def loss(x_BT: torch.Tensor, y_BT: torch.Tensor, num_targets: int) -> torch.Tensor:
        return loss_alone(model.hidden(x_BT), y_BT) / num_targets

    fast = torch.compile(loss, dynamic=False) if flags.compile else loss
    return Side(model, steps, optimizer, lambda batch: fast(*batch), loss_alone)


def work(
    connection: Any, started: float, make_side: Callable[..., Side], flags: Flags, config: GPTConfig, folder: Path,
    shards: Sequence[Path],
) -> None:  # fmt: skip
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)  # for the lock of the run
    device, tokenizer = hardware.pick_device(flags.device), Tokenizer.load(folder)
    B, T = flags.device_batch_size, flags.max_seq_len
    loader = PretrainLoader(tokenizer, dataset.RowGroups(shards), B, T)
    data_steps = pretrain_steps(loader, flags.total_batch_size // (B * T), 10**9)
    side = make_side(flags, config, device, tokenizer, on_device(data_steps, device))
    train(side, 1, Laps(device))
    report = {"seconds to first step": time.time() - started}
    connection.send("ready")
    while num_steps := connection.recv():
        whole = Laps(device)
        train(side, num_steps, lambda part: None)
        whole("all")
        laps = Laps(device)
        train(side, 1, laps)  # with a wait after each part
        laps.seconds["all"] = whole.seconds["all"] / num_steps
        connection.send(laps.seconds)
    peaks = hardware.gpu_peaks(device) or (hardware.matmul_rate(device, side.model.dtype),)
    report |= {"bytes of memory": hardware.peak_memory(device), "FLOP/s": peaks[0]}
    connection.send(report | measure_loss(side, flags.compile))


def train(side: Side, num_steps: int, lap: Callable[[str], None]) -> None:
    for step in islice(side.steps, num_steps):
        lap("data")
        for batch in step.micro_batches:
            loss = side.loss(batch)
            lap("forward")
            loss.backward()
            lap("backward")
        side.optimizer.step()
        side.optimizer.zero_grad()
        lap("optimizer")


def measure_loss(side: Side, compile: bool) -> dict[str, float]:
    """Seconds of an update that forward and backward pass spend from the hidden states on."""
    loss_alone = torch.compile(side.loss_alone, dynamic=False) if compile else side.loss_alone
    batches = next(side.steps).micro_batches
    y_BT, shape = batches[0][1], (*batches[0][1].shape, side.model.config.n_embd)
    hidden_BTC = torch.randn(shape, device=y_BT.device, dtype=side.model.dtype, requires_grad=True)
    passes = time_passes(lambda: loss_alone(hidden_BTC, y_BT), y_BT.device)
    return {part: seconds * len(batches) for part, seconds in passes.items()}


if __name__ == "__main__":
    main()
