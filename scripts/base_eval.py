"""
Evaluate a base model: bits per byte on both splits, samples, and CORE, the mean over 22 tasks of knowledge, language,
reading and reasoning (0 = guessing, 1 = all correct).

    python -m scripts.base_eval                                     # bits per byte and samples, the newest checkpoint
    python -m scripts.base_eval -g d12 --eval core,bpb,sample
    python -m scripts.base_eval --eval core --max-per-task 500      # fewer items: faster, but less precise
"""

import time
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from nanochat import checkpoint_manager, distributed, hardware, mixture
from nanochat.checkpoint_manager import Checkpoint
from nanochat.cli import COUNT, COUNT_OR_DEFAULT, STEP, command, flag
from nanochat.common import UserError, base_dir, duration
from nanochat.distributed import Dist
from nanochat.engine import Engine, sample_prompts
from nanochat.eval.bpb import evaluate_bpb_of_sources
from nanochat.eval.core import REFERENCES, evaluate_core, save_scores
from nanochat.eval.core_tasks import CoreTask, load_tasks, resolve_bundle
from nanochat.eval.metrics import TaskScore, core_metric
from nanochat.gpt import GPT
from nanochat.logging import append_evaluation, save_numbers
from nanochat.progress import Bar
from nanochat.recipe import load_hyperparameters
from nanochat.report.record import recorded
from nanochat.request import Request
from nanochat.tokenizer import Tokenizer

EVALUATIONS = ("core", "bpb", "sample")
NUM_SAMPLES, SAMPLE_TOKENS = 4, 128  # of the samples without a prompt


@dataclass(frozen=True)
class Flags:
    eval: str = flag("bpb,sample", "comma-separated evaluations: core, bpb = bits per byte, sample = samples")
    source: str = flag("base", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default: the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", STEP, short="-s")
    device_batch_size: int = flag(
        -1, "rows per forward pass and rank, for bits per byte; -1 = as in training", COUNT_OR_DEFAULT
    )
    split_tokens: int = flag(40 * 524288, "tokens per split for bits per byte, over all ranks", COUNT)
    max_per_task: int = flag(-1, "items of each CORE task, always the same ones; -1 = all", COUNT_OR_DEFAULT)
    eval_bundle: str = flag("", "folder of CORE's tasks; default: $NANOCHAT_EVAL_BUNDLE, else downloaded")
    data_dir: str = flag("", "folder of shards or mixture; default: $NANOCHAT_DATA_DIR, else the public shards")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
@recorded("base_eval")
def main(flags: Flags) -> dict[str, float]:
    """Evaluates; returns the results by name."""
    check(flags)
    evaluations = flags.eval.split(",")
    with distributed.init(flags.device) as dist:
        # Data comes first, so that a mistake in the flags is reported before the model is loaded.
        if "bpb" in evaluations:
            sources = mixture.find_sources(flags.data_dir)
        tasks = load_core_tasks(flags, dist) if "core" in evaluations else []
        trained = checkpoint_manager.find(flags.source, flags.model_tag, flags.step)
        dtype = hardware.pick_evaluation_dtype(dist.device, trained.meta.get("dtype", ""))
        model, tokenizer, checkpoint = checkpoint_manager.load_model(
            flags.source, flags.model_tag, flags.step, dist.device, dtype
        )
        hardware.tune_process(dist.device)
        dist.print0(f"{checkpoint.path}, {hardware.describe(dist.device)}, {dtype}")

        numbers = {}
        scores: list[TaskScore] = []
        samples: list[dict[str, str]] = []
        if "core" in evaluations:
            scores = run_core(model, tokenizer, tasks, dist)
            numbers["CORE"], numbers["CORE ±"] = core_metric(scores)
            if dist.is_main:
                path = core_path(flags, checkpoint)
                save_scores(path, scores, model=str(checkpoint.path))
                print(f"written to {path}.csv and .json")
        if "bpb" in evaluations:
            B = flags.device_batch_size
            if B == -1:
                B = load_hyperparameters(checkpoint.meta).device_batch_size
            train = [(source.name, source.weight, source.train_shards) for source in sources]
            val = [(source.name, source.weight, source.val_shards) for source in sources]
            for split, shards in (("train", train), ("val", val)):
                bpb = evaluate_bpb_of_sources(
                    model, tokenizer, shards, batch_size=B, num_tokens=flags.split_tokens, dist=dist
                )
                for name, value in bpb.items():
                    numbers[f"{split} {name}"] = value
                    _, _, source_name = name.partition("/")
                    of_source = f" of {source_name}" if source_name else ""
                    dist.print0(f"{split} bits per byte{of_source}: {value:.4f}")
        if "sample" in evaluations and dist.is_main:
            samples = print_samples(model, tokenizer)
        if dist.is_main:
            save_numbers("base_eval", {"model": str(checkpoint.path)} | numbers)
            result = {"numbers": numbers, "scores": {score.label: score.to_dict() for score in scores}}
            append_evaluation("base_eval", checkpoint.tag, describe(flags, checkpoint) | result | {"samples": samples})
    return numbers


def check(flags: Flags) -> None:
    """Raises UserError for invalid flags."""
    for name in flags.eval.split(","):
        if name not in EVALUATIONS:
            raise UserError(f"--eval {name}: choose among {', '.join(EVALUATIONS)}")


def describe(flags: Flags, checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns which model was evaluated and how, for the metrics file."""
    limits = [f"first {flags.max_per_task}"] if flags.max_per_task > 0 else []
    return {"model": str(checkpoint.path), "stage": flags.source, "step": checkpoint.step, "limits": limits}


# ---- CORE ----


def load_core_tasks(flags: Flags, dist: Dist) -> list[CoreTask]:
    """Loads the tasks of CORE. If the bundle must be downloaded, rank 0 does it while the others wait."""
    if dist.is_main:
        resolve_bundle(flags.eval_bundle)
    dist.barrier()
    return load_tasks(resolve_bundle(flags.eval_bundle), flags.max_per_task)


def run_core(model: GPT, tokenizer: Tokenizer, tasks: list[CoreTask], dist: Dist) -> list[TaskScore]:
    """Evaluates CORE and prints the scores."""
    start = time.monotonic()
    num_items = sum(len(task) for task in tasks)
    with Bar("CORE", num_items // dist.world_size, lines=True) as bar:
        ends = list(accumulate(len(task) for task in tasks))  # the number of items up to the end of each task

        def report(num_graded: int) -> None:
            i = min(bisect(ends, num_graded * dist.world_size), len(tasks) - 1)
            bar.update(num_graded, f"CORE: {tasks[i].label} ({i + 1} of {len(tasks)})")

        scores = evaluate_core(model, tokenizer, tasks, dist, progress=report)
    for score in scores:
        low, high = score.interval
        interval = f"{score.correct}/{score.total}, 95 % interval {low:.1%} to {high:.1%}"
        dist.print0(f"{score.label:32s} {score.accuracy:7.2%}  centered {score.centered:7.4f}  ({interval})")
    for name, value in REFERENCES.items():
        dist.print0(f"{name:32s} CORE {value:.4f}, all items, as published")
    core, margin = core_metric(scores)
    dist.print0(f"{'this model':32s} CORE {core:.4f} ± {margin:.4f} (95 % interval)")
    seconds = time.monotonic() - start
    peak = hardware.peak_memory(dist.device) / 2**30
    speed = f"{num_items / seconds:.1f} per second"
    dist.print0(f"{num_items} items in {duration(seconds)}: {speed}, peak memory {peak:.2f} GiB")
    return scores


def core_path(flags: Flags, checkpoint: Checkpoint) -> str:
    """Returns the path of the scores without suffix, such as <base>/base_eval/base-d12-000100."""
    limit = "" if flags.max_per_task < 0 else f"-{flags.max_per_task}"
    return f"{base_dir()}/base_eval/{flags.source}-{checkpoint.tag}-{checkpoint.step:06d}{limit}"


# ---- samples ----


def print_samples(model: GPT, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Returns what sample_prompts does."""
    engine = Engine(model, tokenizer)
    samples = sample_prompts(engine)
    print("Without a prompt, at temperature 1:")
    requests = [Request([tokenizer.bos], SAMPLE_TOKENS, seed=seed) for seed in range(NUM_SAMPLES)]
    for completion in engine.generate(requests):
        print(f"  {tokenizer.decode(completion.tokens)!r}")
    return samples


if __name__ == "__main__":
    main()
