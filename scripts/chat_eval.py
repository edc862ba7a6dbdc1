"""
Examine a chat model.

    python -m scripts.chat_eval -i sft                                  # all tasks, and ChatCORE
    python -m scripts.chat_eval -i sft -a QuizFree,Sums                 # some
    python -m scripts.chat_eval -i rl -a GSM8K -t 0.8 --num-samples 16 --pass-k 1,8    # pass@k
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -i sft -a MMLU,GSM8K

Each question, answer and verdict is kept in <base>/report/chat_eval/<model>/<task>.jsonl.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat import checkpoint_manager, distributed, hardware
from nanochat.cli import command, flag
from nanochat.common import UserError, duration
from nanochat.engine import Engine, Request
from nanochat.eval.chat import CHATCORE, Score, evaluate
from nanochat.eval.metrics import core_metric
from nanochat.logging import progress, report_dir, save_numbers
from nanochat.tokenizer import Tokenizer, default_dir
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
    model_tag: str = flag("", "name of the checkpoints; default the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", short="-s")
    task_name: str = flag("", f"tasks with commas between them; default all: {', '.join(TASKS)}", short="-a")
    max_problems: int = flag(-1, "questions per task; -1 = all", short="-x")
    max_new_tokens: int = flag(256, "tokens of a written answer", short="-m")
    temperature: float = flag(0.0, "of written answers; 0 = greedy", short="-t")
    top_k: int = flag(50, "sample among the k likeliest tokens; 0 = among all", short="-k")
    num_samples: int = flag(1, "answers written to each question", short="-n")
    pass_k: str = flag("", "k of pass@k, with commas between them; at most --num-samples")
    batch_size: int = flag(32, "answers written at a time", short="-b")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, Score]:
    names, pass_k = check(flags)
    with distributed.init(flags.device) as dist:
        tokenizer = Tokenizer.load(default_dir())
        dtype = hardware.pick_dtype(dist.device)
        model, checkpoint = checkpoint_manager.load_model(
            flags.source, flags.model_tag, flags.step, tokenizer, dist.device, dtype
        )
        tasks = {name: limited(TASKS[name](), flags.max_problems) for name in names}
        hardware.tune_process(dist.device)
        engine = Engine(model, tokenizer, flags.batch_size)
        settings = Request([], flags.max_new_tokens, flags.temperature, flags.top_k)
        model_name = f"{flags.source}-{checkpoint.tag}-{checkpoint.step:06d}"
        limits = [f"first {flags.max_problems}"] if flags.max_problems > 0 else []
        limits += [f"temperature {flags.temperature}"] if flags.temperature else []
        part = f" ({', '.join(limits)})" if limits else ""  # so that full, greedy scores keep their place
        folder = report_dir() / "chat_eval" / "-".join([model_name, *limits]).replace(" ", "-")
        dist.print0(f"{checkpoint.path}, {hardware.describe(dist.device)}, {dtype}")
        scores, numbers = {}, dict[str, Any](model=str(checkpoint.path))
        for name, task in tasks.items():
            num_answers = len(task) * (flags.num_samples if task.kind == "generative" else 1)
            start, say = time.monotonic(), progress(num_answers // dist.world_size, dist)
            record = folder / f"{name}.jsonl"
            score = evaluate(engine, name, task, dist, settings, flags.num_samples, pass_k, record, say)
            dist.print0(f"{describe(score)} in {duration(time.monotonic() - start)}")
            scores[name] = score
            numbers[f"{name}{part}"] = score.accuracy
            numbers |= {f"{name}{part}, pass@{k}": value for k, value in score.pass_at.items()}
        if scores.keys() >= CHATCORE.keys():
            core, margin = core_metric([scores[name] for name in CHATCORE])
            dist.print0(f"{'ChatCORE':14s} {core:7.4f}  (± {margin:.4f}, 95 % sure)")
            numbers |= {f"ChatCORE{part}": core, f"ChatCORE{part} ±": margin}
        dist.print0(f"answers in {folder}; peak memory {hardware.peak_memory(dist.device) / 2**30:.2f} GiB")
        if dist.is_main:
            save_numbers(f"chat_eval_{flags.source}", numbers)
    return scores


def check(flags: Flags) -> tuple[list[str], list[int]]:
    """The names of the tasks, and the k of pass@k. UserError for what makes no sense."""
    names = flags.task_name.split(",") if flags.task_name else list(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"unknown task {unknown[0]!r}: there are {', '.join(TASKS)}")
    if min(flags.batch_size, flags.max_new_tokens, flags.num_samples) < 1:
        raise UserError("--batch-size, --max-new-tokens and --num-samples must be at least 1")
    if flags.max_problems < 1 and flags.max_problems != -1:
        raise UserError(f"--max-problems {flags.max_problems}: must be at least 1, or -1 for all")
    if not 0 <= flags.temperature < math.inf or flags.top_k < 0:
        raise UserError("--temperature and --top-k must be numbers of at least 0")
    if flags.num_samples > 1 and flags.temperature == 0:
        raise UserError(f"--num-samples {flags.num_samples}: greedy answers are all the same, add --temperature 0.8")
    pass_k = [int(k) if k.isdecimal() else 0 for k in flags.pass_k.split(",")] if flags.pass_k else []
    if any(not 1 <= k <= flags.num_samples for k in pass_k):
        raise UserError(f"--pass-k {flags.pass_k}: give numbers from 1 to --num-samples, which is {flags.num_samples}")
    return names, pass_k


def describe(score: Score) -> str:
    """A line of the table."""
    low, high = score.interval
    answers = f"{score.correct}/{score.total * score.num_samples}"
    passes = "".join(f", pass@{k} {value:.2%}" for k, value in score.pass_at.items())
    cut = f", {score.cut} questions cut to fit the context" if score.cut else ""
    return f"{score.label:14s} {score.accuracy:7.2%}  ({answers}, 95 % sure: {low:.1%} to {high:.1%}{passes}{cut})"


if __name__ == "__main__":
    main()
