"""
Rollouts of reinforcement learning: all questions of a batch at once, as chat_rl samples them, compared with one
question at a time and one completion at a time.

    python -m scripts.bench rollout                             # the SFT model
    python -m scripts.bench rollout --fresh-depth 4             # random weights: completions of maximum length
    NANOCHAT_DTYPE=bfloat16 python -m scripts.bench rollout

The sides named plain work as the engine of Karpathy's nanochat does (plain.py): a prompt is read once for all its
completions, and every row is decoded until the last one has ended. `ratios`: rollouts/s of all questions at once,
divided by those of each other side.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nanochat import checkpoint_manager, hardware, planner, rollout
from nanochat.cli import COUNT, DEPTH, NOT_NEGATIVE, Range, command, flag
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.recipe import RecipeFlags, model_config
from nanochat.request import Request
from nanochat.rollout import Question, RolloutConfig
from nanochat.tokenizer import Tokenizer, default_dir
from scripts.bench.harness import alternate, medians, print_table, report
from scripts.bench.plain import generate_like_nanochat
from tasks.quiz import HardSums

ALL_AT_ONCE = "all at once"
SHARED = "all at once, shared prompts"  # chat_rl does this where shared_prompts.pays_to_share


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "tag of its checkpoint; default the one written last", short="-g")
    fresh_depth: int = flag(
        0, "layers of a model with initial weights to use instead; 0 = the checkpoint", Range(0, DEPTH.high)
    )
    examples_per_step: int = flag(16, "questions of a batch", COUNT)
    num_samples: int = flag(16, "completions per question", COUNT)
    max_new_tokens: int = flag(64, "maximum tokens of a completion", COUNT)
    temperature: float = flag(1.0, "sampling temperature", NOT_NEGATIVE)
    top_k: int = flag(50, "sample among the k most likely tokens; 0 = all tokens", NOT_NEGATIVE)
    rollout_batch_size: int = flag(256, "completions sampled at a time", COUNT)
    rounds: int = flag(5, "runs of each side, in turn; the medians count", COUNT)
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    device = hardware.pick_device(flags.device)
    model, tokenizer = load(flags, device)
    hardware.tune_process(device)
    max_prompt_tokens = model.config.sequence_len - flags.max_new_tokens
    questions, _ = rollout.load_questions(HardSums("train"), tokenizer, max_prompt_tokens, flags.examples_per_step)

    sides = make_sides(flags, model, tokenizer, questions)
    runs = {name: partial(measure, sample) for name, sample in sides.items()}
    results = {name: medians(turns) for name, turns in alternate(runs, flags.rounds).items()}
    speeds = {name: result["rollouts/s"] for name, result in results.items()}
    ratios = {f"over {name}": speeds[ALL_AT_ONCE] / speed for name, speed in speeds.items() if name != ALL_AT_ONCE}

    rows = {}
    for name, result in results.items():
        rows[name] = {"rollouts/s": f"{result['rollouts/s']:.1f}", "tokens each": f"{result['tokens']:.1f}"}
        if name != ALL_AT_ONCE:
            rows[name]["all at once is"] = f"{ratios[f'over {name}']:.2f} x"
    title = f"{len(questions)} questions x {flags.num_samples} completions, {hardware.describe(device)}, {model.dtype}"
    print_table(title, rows)
    return report("rollout", ratios, rollouts_per_second=speeds)


def load(flags: Flags, device: torch.device) -> tuple[GPT, Tokenizer]:
    dtype = hardware.pick_dtype(device)
    if flags.fresh_depth:
        tokenizer = Tokenizer.load(default_dir())
        shape = RecipeFlags(depth=flags.fresh_depth, head_dim=64, max_seq_len=512)
        config = model_config(shape, tokenizer.vocab_size)
        target = planner.find_target("", flags.device)
        planner.check_generation_fits(config, flags.rollout_batch_size, config.sequence_len, target)
        return GPT.create(config, device, dtype), tokenizer
    checkpoint = checkpoint_manager.find(flags.source, flags.model_tag)
    return checkpoint.build_model(device, dtype), checkpoint.load_tokenizer()


def measure(sample: Callable[[], list[int]]) -> dict[str, float]:
    """Rollouts per second of one call, and the mean tokens of its completions."""
    start = time.perf_counter()
    lengths = sample()
    seconds = time.perf_counter() - start
    return {"rollouts/s": len(lengths) / seconds, "tokens": sum(lengths) / len(lengths)}


def make_sides(
    flags: Flags, model: GPT, tokenizer: Tokenizer, questions: list[Question]
) -> dict[str, Callable[[], list[int]]]:
    """The functions to compare; each samples completions and returns their lengths in tokens."""
    config = RolloutConfig(flags.num_samples, flags.max_new_tokens, flags.temperature, flags.top_k)
    batch_engine, sharing_engine = (
        Engine(model, tokenizer, flags.rollout_batch_size, compile=True, share_prompts=share) for share in (False, True)
    )
    group_engine = Engine(model, tokenizer, flags.num_samples)

    def sample(engine: Engine, batch: list[Question]) -> list[int]:
        rollouts = rollout.sample_rollouts(engine, batch, range(len(batch)), config, Dist(model.device))
        return [len(r.completion) for r in rollouts]

    def sample_plain(group_size: int) -> list[int]:
        lengths = []
        for question in questions:
            request = Request(question.prompt, config.max_tokens, config.temperature, config.top_k)
            lengths += [len(tokens) for tokens in generate_like_nanochat(model, tokenizer, request, group_size)]
        return lengths

    return {
        ALL_AT_ONCE: lambda: sample(batch_engine, questions),
        SHARED: lambda: sample(sharing_engine, questions),
        "one question at a time": lambda: [n for question in questions for n in sample(group_engine, [question])],
        "one question at a time, plain": lambda: sample_plain(flags.num_samples),
        "one completion at a time, plain": lambda: sample_plain(1),  # one per question is enough to measure
    }


if __name__ == "__main__":
    main()
