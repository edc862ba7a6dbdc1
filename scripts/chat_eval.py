"""
Evaluate a chat model on tasks, and compute ChatCORE, the mean over six of them (0 = guessing, 1 = all correct).

    python -m scripts.chat_eval -i sft                                  # all tasks, and ChatCORE
    python -m scripts.chat_eval -i sft -a QuizFree,Sums                 # some tasks
    python -m scripts.chat_eval -i rl -a GSM8K -t 0.8 --num-samples 16 --pass-k 1,8    # pass@k
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -i sft -a MMLU,GSM8K

All questions, completions and grades are written to <base>/report/chat_eval/<model>/<task>.jsonl.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import checkpoint_manager, distributed, hardware
from nanochat.checkpoint_manager import Checkpoint
from nanochat.cli import COUNT, COUNT_OR_DEFAULT, NOT_NEGATIVE, STEP, command, flag
from nanochat.common import UserError, duration
from nanochat.engine import Engine, pays_to_compile
from nanochat.eval.chat import CHATCORE, ChatScore, Sampling, evaluate_task
from nanochat.eval.metrics import core_metric
from nanochat.logging import append_evaluation, report_dir, save_numbers
from nanochat.report.record import recorded
from nanochat.request import Request
from nanochat.shared_prompts import pays_to_share
from tasks.arc import ARC
from tasks.common import Task, limited
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.quiz import HardSums, QuizChoice, QuizFree, Sums
from tasks.spelling import SpellingBee

TASKS: dict[str, Callable[[], Task]] = {
    "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
    "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
    "MMLU": lambda: MMLU("test"),
    "GSM8K": lambda: GSM8K("test"),
    "HumanEval": HumanEval,
    "SpellingBee": lambda: SpellingBee("test"),
    "QuizChoice": QuizChoice,
    "QuizFree": QuizFree,
    "Sums": lambda: Sums("test"),
    "HardSums": lambda: HardSums("test"),
}


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default: the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", STEP, short="-s")
    task_name: str = flag("", f"comma-separated tasks; default: all of {', '.join(TASKS)}", short="-a")
    max_problems: int = flag(-1, "questions per task; -1 = all", COUNT_OR_DEFAULT, short="-x")
    max_new_tokens: int = flag(256, "tokens per completion", COUNT, short="-m")
    temperature: float = flag(0.0, "sampling temperature of completions; 0 = greedy", NOT_NEGATIVE, short="-t")
    top_k: int = flag(50, "sample among the k most likely tokens; 0 = among all", NOT_NEGATIVE, short="-k")
    num_samples: int = flag(1, "completions per question", COUNT, short="-n")
    pass_k: tuple[int, ...] = flag((), "comma-separated k of pass@k; at most --num-samples", COUNT)
    batch_size: int = flag(32, "completions generated at a time", COUNT, short="-b")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
@recorded("chat_eval")
def main(flags: Flags) -> dict[str, ChatScore]:
    """Evaluates; returns the scores by task."""
    check(flags)
    names = flags.task_name.split(",") if flags.task_name else list(TASKS)
    with distributed.init(flags.device) as dist:
        trained = checkpoint_manager.find(flags.source, flags.model_tag, flags.step)
        dtype = hardware.pick_evaluation_dtype(dist.device, trained.meta.get("dtype", ""))
        model, tokenizer, checkpoint = checkpoint_manager.load_model(
            flags.source, flags.model_tag, flags.step, dist.device, dtype
        )
        tasks = {name: limited(TASKS[name](), flags.max_problems) for name in names}
        hardware.tune_process(dist.device)
        dist.print0(f"{checkpoint.path}, {hardware.describe(dist.device)}, {dtype}")

        num_questions = sum(len(task) for task in tasks.values() if task.kind == "generative")
        num_completions = num_questions * flags.num_samples // dist.world_size
        compile = pays_to_compile(num_completions, flags.max_new_tokens)
        share_prompts = pays_to_share(flags.num_samples, flags.batch_size, dist.device)
        engine = Engine(model, tokenizer, flags.batch_size, compile=compile, share_prompts=share_prompts)
        template = Request([], flags.max_new_tokens, flags.temperature, flags.top_k)
        sampling = Sampling(template, flags.num_samples, flags.pass_k)
        folder = record_folder(flags, checkpoint)
        scores = {}
        for name, task in tasks.items():
            start = time.monotonic()
            record = folder / f"{name}.jsonl"
            score = evaluate_task(engine, name, task, dist, sampling=sampling, record=record)
            dist.print0(f"{describe_score(score)} in {duration(time.monotonic() - start)}")
            scores[name] = score
        if scores.keys() >= CHATCORE.keys():
            core, margin = core_metric([scores[name] for name in CHATCORE])
            dist.print0(f"{'ChatCORE':14s} {core:7.4f}  (± {margin:.4f}, 95 % interval)")
        peak = hardware.peak_memory(dist.device) / 2**30
        dist.print0(f"completions in {folder}; peak memory {peak:.2f} GiB")
        if dist.is_main:
            save_numbers(f"chat_eval_{flags.source}", summary(flags, checkpoint, scores))
            append_evaluation("chat_eval", checkpoint.tag, metrics_line(flags, checkpoint, scores))
    return scores


def check(flags: Flags) -> None:
    """Raises UserError for invalid flags."""
    for name in flags.task_name.split(",") if flags.task_name else []:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}: choose among {', '.join(TASKS)}")
    if flags.num_samples > 1 and flags.temperature == 0:
        raise UserError(
            f"--num-samples {flags.num_samples}: greedy completions are all the same, add --temperature 0.8"
        )
    for k in flags.pass_k:
        if k > flags.num_samples:
            raise UserError(f"--pass-k {k}: must be at most --num-samples, which is {flags.num_samples}")


def limits(flags: Flags) -> list[str]:
    """Returns how this evaluation differs from the full, greedy one. Such results are stored under other names."""
    found = []
    if flags.max_problems > 0:
        found.append(f"first {flags.max_problems}")
    if flags.temperature:
        found.append(f"temperature {flags.temperature}")
    return found


def record_folder(flags: Flags, checkpoint: Checkpoint) -> Path:
    model_name = f"{flags.source}-{checkpoint.tag}-{checkpoint.step:06d}"
    return report_dir() / "chat_eval" / "-".join([model_name, *limits(flags)]).replace(" ", "-")


def summary(flags: Flags, checkpoint: Checkpoint, scores: dict[str, ChatScore]) -> dict[str, Any]:
    """Returns the results for the report, by name."""
    suffix = f" ({', '.join(limits(flags))})" if limits(flags) else ""
    numbers: dict[str, Any] = {"model": str(checkpoint.path)}
    for name, score in scores.items():
        numbers[f"{name}{suffix}"] = score.accuracy
        numbers[f"{name}{suffix}, interval"] = "{:.4f} to {:.4f}".format(*score.interval)
        for k, value in score.pass_at.items():
            numbers[f"{name}{suffix}, pass@{k}"] = value
    if scores.keys() >= CHATCORE.keys():
        core, margin = core_metric([scores[name] for name in CHATCORE])
        numbers[f"ChatCORE{suffix}"] = core
        numbers[f"ChatCORE{suffix} ±"] = margin
    return numbers


def metrics_line(flags: Flags, checkpoint: Checkpoint, scores: dict[str, ChatScore]) -> dict[str, Any]:
    """Returns the results for the metrics file, whose keys logging.py lists."""
    numbers = {}
    if scores.keys() >= CHATCORE.keys():
        numbers["ChatCORE"], numbers["ChatCORE ±"] = core_metric([scores[name] for name in CHATCORE])
    return {
        "model": str(checkpoint.path),
        "stage": flags.source,
        "step": checkpoint.step,
        "limits": limits(flags),
        "numbers": numbers,
        "scores": {name: score.to_dict() for name, score in scores.items()},
    }


def describe_score(score: ChatScore) -> str:
    """Returns a line for the console."""
    low, high = score.interval
    details = f"{score.correct}/{score.total * score.num_samples}, 95 % interval {low:.1%} to {high:.1%}"
    for k, value in score.pass_at.items():
        details += f", pass@{k} {value:.2%}"
    if score.cut:
        details += f", {score.cut} questions cut to fit the context"
    return f"{score.label:14s} {score.accuracy:7.2%}  ({details})"


if __name__ == "__main__":
    main()
