"""
Evaluate a base model: bits per byte on both splits, samples, and CORE, the mean over 22 tasks of knowledge, language,
reading and reasoning (0 = guessing, 1 = all right).

    python -m scripts.base_eval                                     # the checkpoint written last: bpb and samples
    python -m scripts.base_eval -g d12 --eval core,bpb,sample
    python -m scripts.base_eval --eval core --max-per-task 500      # a part of each task: faster, and a wider interval
"""

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nanochat import checkpoint_manager, dataset, distributed, hardware
from nanochat.checkpoint_manager import Checkpoint
from nanochat.cli import command, flag
from nanochat.common import UserError, base_dir, duration
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import RowGroups
from nanochat.distributed import Dist
from nanochat.engine import Engine, Request, sample_prompts
from nanochat.eval.bpb import evaluate_bpb
from nanochat.eval.core import REFERENCES, core_metric, evaluate_core, save_scores
from nanochat.eval.core_tasks import CoreTask, load_tasks, resolve_bundle
from nanochat.gpt import GPT
from nanochat.logging import progress, save_numbers
from nanochat.recipe import load_hyperparameters
from nanochat.tokenizer import Tokenizer, default_dir

EVALUATIONS = ("core", "bpb", "sample")


@dataclass(frozen=True)
class Flags:
    eval: str = flag("bpb,sample", "what to do, with commas between: core, bpb = bits per byte, sample = samples")
    source: str = flag("base", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", short="-s")
    device_batch_size: int = flag(-1, "rows per forward pass and rank, for bits per byte; -1 = as in training")
    split_tokens: int = flag(40 * 524288, "tokens per split for bits per byte, over all ranks")
    max_per_task: int = flag(-1, "items of each CORE task, always the same ones; -1 = all")
    eval_bundle: str = flag(
        "", "folder of CORE's tasks; default $NANOCHAT_EVAL_BUNDLE, else the public bundle, fetched"
    )
    data_dir: str = flag("", "folder of parquet shards; default $NANOCHAT_DATA_DIR, else the public shards")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    wanted = flags.eval.split(",")
    if unknown := set(wanted) - set(EVALUATIONS):
        raise UserError(f"--eval {unknown.pop()}: there are {', '.join(EVALUATIONS)}")
    for name in ("device_batch_size", "max_per_task"):
        if (value := getattr(flags, name)) < 1 and value != -1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1, or -1")
    if flags.split_tokens < 1:
        raise UserError(f"--split-tokens {flags.split_tokens}: must be at least 1")
    with distributed.init(flags.device) as dist:
        tokenizer = Tokenizer.load(default_dir())
        dtype = hardware.pick_dtype(dist.device)
        shards = dataset.split_shards(dataset.resolve_data_dir(flags.data_dir)) if "bpb" in wanted else ([], [])
        tasks = find_tasks(flags, dist) if "core" in wanted else []
        model, checkpoint = checkpoint_manager.load_model(
            flags.source, flags.model_tag, flags.step, tokenizer, dist.device, dtype
        )
        hardware.tune_process(dist.device)
        dist.print0(f"{checkpoint.path}, {hardware.describe(dist.device)}, {dtype}")
        numbers = {}
        if tasks:
            numbers |= core(flags, model, checkpoint, tokenizer, tasks, dist)
        if "bpb" in wanted:
            numbers |= bits_per_byte(flags, model, checkpoint, tokenizer, shards, dist)
        if "sample" in wanted and dist.is_main:
            engine = Engine(model, tokenizer)
            sample_prompts(engine)
            print("Without a prompt, at temperature 1:")
            for completion in engine.generate([Request([tokenizer.bos], 128, seed=seed) for seed in range(4)]):
                print(f"  {tokenizer.decode(completion.tokens)!r}")
        if dist.is_main:
            save_numbers("base_eval", {"model": str(checkpoint.path)} | numbers)
    return numbers


def find_tasks(flags: Flags, dist: Dist) -> list[CoreTask]:
    if dist.is_main:
        resolve_bundle(flags.eval_bundle)  # one rank fetches it
    dist.barrier()
    return load_tasks(resolve_bundle(flags.eval_bundle), flags.max_per_task)


def core(
    flags: Flags, model: GPT, checkpoint: Checkpoint, tokenizer: Tokenizer, tasks: list[CoreTask], dist: Dist
) -> dict[str, float]:
    """CORE and its margin; the scores of the tasks go to the console and to <base>/base_eval/."""
    start, total = time.monotonic(), sum(map(len, tasks))
    scores = evaluate_core(model, tokenizer, tasks, dist, progress=progress(total // dist.world_size, dist))
    result, margin = core_metric(scores)
    for score in scores:
        low, high = score.interval
        sure = f"{score.correct}/{score.total}, 95 % sure: {low:.1%} to {high:.1%}"
        dist.print0(f"{score.label:32s} {score.accuracy:7.2%}  centered {score.centered:7.4f}  ({sure})")
    for name, value in REFERENCES.items():
        dist.print0(f"{name:32s} CORE {value:.4f}, all items, as published")
    dist.print0(f"{'this model':32s} CORE {result:.4f} ± {margin:.4f}, 95 % sure")
    seconds, peak = time.monotonic() - start, hardware.peak_memory(dist.device) / 2**30
    dist.print0(f"{total} items in {duration(seconds)}: {total / seconds:.1f} a second, peak memory {peak:.2f} GiB")
    if dist.is_main:
        name = f"{flags.source}-{checkpoint_name(checkpoint.path)}"
        path = base_dir() / "base_eval" / (name if flags.max_per_task < 0 else f"{name}-{flags.max_per_task}")
        save_scores(path, scores, str(checkpoint.path))
        print(f"written to {path}.csv and .json")
    return {"CORE": result, "CORE ±": margin}


def checkpoint_name(path: Path) -> str:
    """…/d12/step_000100 or …/d12/model_000100.pt → d12-000100."""
    return f"{path.parent.name}-{path.stem.split('_')[-1]}"


def bits_per_byte(
    flags: Flags,
    model: GPT,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    shards: tuple[list[Path], list[Path]],
    dist: Dist,
) -> dict[str, float]:
    B, T = flags.device_batch_size, model.config.sequence_len
    if B == -1:
        B = load_hyperparameters(checkpoint.meta).device_batch_size
    num_batches = max(1, flags.split_tokens // (B * T * dist.world_size))
    numbers = {}
    for split, files in zip(("train", "val"), shards, strict=True):
        loader = PretrainLoader(tokenizer, RowGroups(files), batch_size=B, sequence_len=T, dist=dist)
        batches = islice(loader.batches(), num_batches)
        numbers[f"{split} bpb"] = evaluate_bpb(model, batches, tokenizer.token_bytes(), dist)
        dist.print0(f"{split} bits per byte: {numbers[f'{split} bpb']:.4f}")
    return numbers


if __name__ == "__main__":
    main()
