"""
Examine a chat model.

    python -m scripts.chat_eval -i sft                                  # all tasks
    python -m scripts.chat_eval -i sft -a QuizFree,Sums                 # some
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -i sft -a MMLU,GSM8K
"""

from collections.abc import Callable
from dataclasses import dataclass

from nanochat import checkpoint_manager, distributed, hardware
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.flags import command, flag
from nanochat.report import save_numbers
from nanochat.tokenizer import Tokenizer, default_dir
from tasks.arc import ARC
from tasks.common import Task, limited
from tasks.evaluate import Score, evaluate
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.quiz import HardSums, QuizChoice, QuizFree, Sums

TASKS: dict[str, Callable[[], Task]] = {
    "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
    "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
    "MMLU": lambda: MMLU("test"),
    "GSM8K": lambda: GSM8K("test"),
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
    batch_size: int = flag(32, "questions at a time", short="-b")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, Score]:
    names = flags.task_name.split(",") if flags.task_name else list(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"unknown task {unknown[0]!r}: there are {', '.join(TASKS)}")
    if flags.max_problems == 0 or flags.batch_size < 1 or flags.max_new_tokens < 1 or flags.temperature < 0:
        raise UserError(
            "--max-problems, --batch-size and --max-new-tokens must be at least 1, --temperature at least 0"
        )
    with distributed.init(flags.device) as dist:
        tokenizer = Tokenizer.load(default_dir())
        dtype = hardware.pick_dtype(dist.device)
        model, checkpoint = checkpoint_manager.load_model(
            flags.source, flags.model_tag, flags.step, tokenizer, dist.device, dtype
        )
        tasks = {name: limited(TASKS[name](), flags.max_problems) for name in names}
        hardware.tune_process(dist.device)
        engine = Engine(model, tokenizer, flags.batch_size)
        dist.print0(f"{checkpoint.path}, {hardware.describe(dist.device)}, {dtype}")
        scores = {}
        for name, task in tasks.items():
            scores[name] = score = evaluate(
                engine, task, dist, flags.batch_size, flags.max_new_tokens, flags.temperature
            )
            low, high = score.interval
            cut = f", {score.cut} questions cut to fit the context" if score.cut else ""
            sure = f"{score.correct}/{score.total}, 95 % sure: {low:.1%} to {high:.1%}"
            dist.print0(f"{name:14s} {score.accuracy:7.2%}  ({sure}{cut})")
        if dist.is_main:
            accuracies = {name: score.accuracy for name, score in scores.items()}
            save_numbers(f"chat_eval_{flags.source}", {"model": str(checkpoint.path)} | accuracies)
    return scores


if __name__ == "__main__":
    main()
