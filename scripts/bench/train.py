"""
Training: nanochat compared with straightforward PyTorch code for the same model and data.

The straightforward code ("plain") computes in float32 (in bfloat16 on a GPU), calls SDPA with boolean masks for the
windows, computes all logits at once, updates one tensor at a time, and builds each batch when it is needed. Both sides
are compiled. Each runs in a separate process, and they take turns.

    python -m scripts.bench train
    python -m scripts.bench train --depth 24 --head-dim 128 --max-seq-len 2048 --total-batch-size 524288 --no-plain

Model FLOPs utilization (MFU) is relative to the GPU's data sheet. On a CPU it is relative to the speed of matrix
products in the same dtype, which is measured too. `ratios`: tokens/s, the time to the end of the first step, and peak
memory, each compared with the plain side.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanochat import attention, dataset, hardware, planner, primer, recipe
from nanochat.cli import COUNT, COUNT_OR_DEFAULT, DEPTH, Range, command, flag
from nanochat.common import human
from nanochat.costs import TrainingSetup, flops_per_token
from nanochat.dataloader import PretrainLoader, prefetch, to_device
from nanochat.distributed import Dist
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import MuonAdamW, adamw_update, build_optimizer
from nanochat.run import Run, RunFlags
from nanochat.tokenizer import Tokenizer
from nanochat.train import Step, token_loss
from scripts.bench.harness import Stopwatch, Worker, alternate, medians, print_table, report

PARTS = ("data", "forward", "backward", "optimizer")
TOKENIZER_DOCUMENTS = 3000  # enough to learn a vocabulary for a benchmark (heuristic, not tuned)


@dataclass(frozen=True)
class Flags:
    depth: int = flag(4, "transformer layers", DEPTH)
    head_dim: int = flag(64, "channels per attention head", Range(16))
    vocab_size: int = flag(
        -1, "tokens; -1 = 8192, or 4096 with the primer, which has too little text for more", COUNT_OR_DEFAULT
    )
    max_seq_len: int = flag(512, "tokens of context", COUNT)
    window_pattern: str = flag("SSSL", "attention windows, tiled over the layers: S short, L full")
    device_batch_size: int = flag(16, "sequences per forward pass", COUNT)
    total_batch_size: int = flag(8192, "tokens per optimizer step", COUNT)
    attention: str = flag("auto", f"attention kernel of nanochat: auto | {' | '.join(attention.LOADERS)}")
    dtype: str = flag("auto", "compute dtype of nanochat; auto as in base_train", choices=("auto", *hardware.DTYPES))
    compile: bool = flag(True, "compile both sides with torch.compile")
    plain: bool = flag(True, "measure the plain side too; both sides must fit into memory at once")
    rounds: int = flag(5, "turns per side; the medians count", COUNT)
    steps: int = flag(3, "optimizer steps per turn", COUNT)
    data_dir: str = flag("", "folder of parquet shards; empty = the primer")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    hardware.pick_device(flags.device)
    recipe.accumulation_steps(flags.total_batch_size, flags.device_batch_size, flags.max_seq_len, 1)
    shape = recipe.RecipeFlags(
        depth=flags.depth,
        head_dim=flags.head_dim,
        max_seq_len=flags.max_seq_len,
        window_pattern=flags.window_pattern,
    )
    vocab_size = flags.vocab_size
    if vocab_size == -1:
        vocab_size = 8192 if flags.data_dir else 4096
    config = recipe.model_config(shape, vocab_size)
    target = planner.find_target("", flags.device)
    wanted = TrainingSetup(flags.device_batch_size, compiled=flags.compile)
    planner.check_fits(config, planner.training_setup(config, target, flags.total_batch_size, wanted), target, shape)
    sides = {"nanochat": nanochat_side}
    if flags.plain:
        sides["plain"] = plain_side
    results = {}
    for name, measured in measure_sides(sides, flags, config).items():
        results[name] = summarize(measured, flags.total_batch_size, flops_per_token(config))
    print_results(results)
    ratios = {}
    if flags.plain:
        ours, plain = results["nanochat"], results["plain"]
        ratios["tokens/s"] = ours["tokens/s"] / plain["tokens/s"]
        for key in ("seconds to first step", "bytes of memory"):
            ratios[key] = plain[key] / ours[key]
    return report("train", ratios, results=results)


def measure_sides(
    sides: Mapping[str, Callable[..., "Side"]], flags: Flags, config: GPTConfig
) -> dict[str, dict[str, float]]:
    """Runs the sides in turn, each in its process. Returns the measurements of each, with the medians of its turns."""
    with tempfile.TemporaryDirectory() as folder:
        if not flags.data_dir:
            primer.write_shards(Path(folder))
        shards = dataset.split_shards(Path(flags.data_dir or folder))[0]
        documents = islice(dataset.iterate_texts(shards), TOKENIZER_DOCUMENTS)
        Tokenizer.train(documents, config.vocab_size).save(Path(folder))
        workers: dict[str, Worker] = {}
        for name, make_side in sides.items():
            workers[name] = Worker(work, time.time(), make_side, flags, config, Path(folder), shards)
            workers[name].receive()  # "ready", after its first step
        runs = {name: lambda worker=worker: worker.request(flags.steps) for name, worker in workers.items()}
        turns = alternate(runs, flags.rounds)
        return {name: medians(turns[name]) | worker.request(0) for name, worker in workers.items()}


def summarize(measured: dict[str, float], tokens_per_step: int, flops_per_token: int) -> dict[str, float]:
    """Returns speed, utilization and the share of each part in the time of a step."""
    tokens_per_second = tokens_per_step / measured["step"]
    summary = {
        "tokens/s": tokens_per_second,
        "MFU": tokens_per_second * flops_per_token / measured["FLOP/s"],
        "seconds to first step": measured["seconds to first step"],
        "bytes of memory": measured["bytes of memory"],
    }
    total = sum(measured[part] for part in PARTS)
    return summary | {f"share of {part}": measured[part] / total for part in PARTS}


def print_results(results: dict[str, dict[str, float]]) -> None:
    rows: dict[str, dict[str, str]] = {}
    for side, result in results.items():
        for key, value in result.items():
            is_share = key == "MFU" or key.startswith("share")
            rows.setdefault(key, {})[side] = f"{value:.1%}" if is_share else human(value)
    print_table("medians", rows)


# ---- the two sides ----


@dataclass
class Side:
    """A way to train: nanochat's or the plain one."""

    model: GPT
    steps: Iterator[Step]
    optimizer: MuonAdamW
    loss: Callable[[Any], torch.Tensor]  # of a micro-batch


def nanochat_side(
    flags: Flags, config: GPTConfig, device: torch.device, tokenizer: Tokenizer, steps: Iterator[Step]
) -> Side:
    """Trains as scripts/base_train.py does."""
    run = Run("base", "bench", config, RunFlags(), tokenizer=tokenizer, dist=Dist(device))
    if flags.dtype != "auto":
        run.dtype = hardware.DTYPES[flags.dtype]
    groups = recipe.param_groups(config, recipe.Hyperparameters(total_batch_size=flags.total_batch_size))
    run.build(groups, {}, compile=flags.compile, attention=flags.attention)
    model = run.train_model
    if flags.compile and not run.compiled and hardware.can_compile(device):  # a run on a CPU decides only after steps
        model = torch.compile(run.model, dynamic=False)

    return Side(run.model, prefetch(steps, device), run.optimizer, partial(token_loss, model))


def plain_side(
    flags: Flags, config: GPTConfig, device: torch.device, tokenizer: Tokenizer, steps: Iterator[Step]
) -> Side:
    """Trains with straightforward code."""
    torch.manual_seed(42)
    model = GPT.create(config, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.use_attention(attention.attend_masked)
    optimizer = one_tensor_at_a_time(model, recipe.Hyperparameters(total_batch_size=flags.total_batch_size))

    def loss(x_BT: torch.Tensor, y_BT: torch.Tensor, num_targets: int) -> torch.Tensor:
        logits_NV = model.logits(model.hidden(x_BT)).flatten(0, 1)
        return F.cross_entropy(logits_NV, y_BT.flatten(), reduction="sum") / num_targets

    fast_loss = torch.compile(loss, dynamic=False) if flags.compile else loss
    steps = (to_device(step, device) for step in steps)
    return Side(model, steps, optimizer, lambda batch: fast_loss(*batch))


def one_tensor_at_a_time(model: GPT, base: recipe.Hyperparameters) -> MuonAdamW:
    """Builds the optimizer of the training stages, but with one parameter group and one update per tensor."""
    groups = []
    for group in build_optimizer(model, recipe.param_groups(model.config, base)).param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            groups.append(group | {"names": [name], "params": [parameter]})
    optimizer = MuonAdamW(groups, rank=0, world_size=1, compile=False, dtype=model.dtype)
    optimizer.adamw_kernel = adamw_update
    return optimizer


# ---- measuring, in the process of one side ----


def work(
    connection: Any,
    started: float,
    make_side: Callable[..., Side],
    flags: Flags,
    config: GPTConfig,
    folder: Path,
    shards: Sequence[Path],
) -> None:
    """
    Sends "ready" after the first step. Then receives numbers of steps: trains that many and sends the seconds of a
    "step" and of its parts. On receiving 0, sends the other measurements and ends.
    """
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)  # the run writes its lock file there
    device, tokenizer = hardware.pick_device(flags.device), Tokenizer.load(folder)
    loader = PretrainLoader(
        tokenizer,
        dataset.RowGroups(shards),
        batch_size=flags.device_batch_size,
        sequence_len=flags.max_seq_len,
        dist=Dist(device),
    )
    micro_batches = flags.total_batch_size // (flags.device_batch_size * flags.max_seq_len)
    steps = loader.steps(micro_batches, num_steps=10**9)
    side = make_side(flags, config, device, tokenizer, steps)
    train(side, 1, Stopwatch(device))
    to_first_step = time.time() - started
    connection.send("ready")
    while num_steps := connection.recv():
        whole = Stopwatch(device)
        train(side, num_steps, lambda part: None)
        whole("steps")
        parts = Stopwatch(device)
        train(side, 1, parts)  # a separate step, because waiting for the device after each part takes time
        connection.send(dict(parts.seconds) | {"step": whole.seconds["steps"] / num_steps})
    card = hardware.gpu_card(device)
    peak = card.flops if card else hardware.matmul_rate(device, side.model.dtype)
    memory = hardware.peak_memory(device)
    connection.send({"seconds to first step": to_first_step, "bytes of memory": memory, "FLOP/s": peak})


def train(side: Side, num_steps: int, end_part: Callable[[str], None]) -> None:
    for step in islice(side.steps, num_steps):
        end_part("data")
        for batch in step.micro_batches:
            loss = side.loss(batch)
            end_part("forward")
            loss.backward()
            end_part("backward")
        side.optimizer.step()
        side.optimizer.zero_grad()
        end_part("optimizer")


if __name__ == "__main__":
    main()
