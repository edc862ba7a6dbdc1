"""
Reinforcement learning's rollouts: all questions of a batch at once, as chat_rl draws them, beside one question at a
time and one answer at a time. The plain ways are straightforward code on the trained model itself: a prompt is read
once for all its answers, and rows go on until the last one has ended.

    python -m scripts.bench rollout                             # = python -m scripts.bench.rollout; the SFT model
    python -m scripts.bench rollout --fresh-depth 4             # random weights: answers as long as they may be
    NANOCHAT_DTYPE=bfloat16 python -m scripts.bench rollout

`ratios`: rollouts/s of all at once over each of the others.
"""

import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from nanochat import checkpoint_manager, hardware, rollout
from nanochat.attention import attend
from nanochat.cli import command, flag
from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.recipe import RecipeFlags, model_config
from nanochat.rollout import Question, RolloutConfig
from nanochat.tokenizer import Tokenizer, default_dir
from nanochat.tools import ToolUse
from tasks.quiz import HardSums

ALL, QUESTION = "all at once", "one question at a time"
PLAIN_QUESTION, PLAIN_ANSWER = "one question at a time, plain", "one answer at a time, plain"


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default the one written last", short="-g")
    fresh_depth: int = flag(0, "layers of a model with initial weights, to take instead; 0 = the checkpoint")
    examples_per_step: int = flag(16, "questions of a batch")
    num_samples: int = flag(16, "answers per question")
    max_new_tokens: int = flag(64, "tokens of an answer at most")
    temperature: float = flag(1.0, "of sampling")
    top_k: int = flag(50, "sample among the k likeliest tokens; 0 = among all")
    rollout_batch_size: int = flag(256, "answers sampled at a time")
    rounds: int = flag(5, "runs of each, in turns; medians count")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    if min(flags.examples_per_step, flags.num_samples, flags.rollout_batch_size, flags.rounds) < 1:
        raise UserError("--examples-per-step, --num-samples, --rollout-batch-size and --rounds must be at least 1")
    device = hardware.pick_device(flags.device)
    dtype, tokenizer = hardware.pick_dtype(device), Tokenizer.load(default_dir())
    if flags.fresh_depth:
        config = model_config(RecipeFlags(depth=flags.fresh_depth, head_dim=64, max_seq_len=512), tokenizer.vocab_size)
        model = GPT.create(config, device, dtype)
    else:
        model = checkpoint_manager.find(flags.source, flags.model_tag).build_model(device, dtype)
    hardware.tune_process(device)
    room = model.config.sequence_len - flags.max_new_tokens
    questions = rollout.load_questions(HardSums("train"), tokenizer, room)[0][: flags.examples_per_step]
    sampling = RolloutConfig(flags.num_samples, flags.max_new_tokens, flags.temperature, flags.top_k)
    engines = [Engine(model, tokenizer, rows) for rows in (flags.rollout_batch_size, flags.num_samples)]

    def draw(engine: Engine, some: list[Question]) -> list[int]:
        return [
            len(r.completion) for r in rollout.sample_rollouts(engine, some, range(len(some)), sampling, Dist(device))
        ]

    one = replace(sampling, num_samples=1)
    ways: dict[str, Callable[[], list[int]]] = {  # → tokens of each answer
        ALL: lambda: draw(engines[0], questions),
        QUESTION: lambda: [n for question in questions for n in draw(engines[1], [question])],
        PLAIN_QUESTION: lambda: [n for q in questions for n in plain_rollouts(model, q.prompt, sampling, tokenizer)],
        PLAIN_ANSWER: lambda: [n for q in questions for n in plain_rollouts(model, q.prompt, one, tokenizer)],
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    lengths: dict[str, float] = {}
    for _ in range(flags.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            answers = way()
            speeds[name].append(len(answers) / (time.perf_counter() - start))
            lengths[name] = sum(answers) / len(answers)
    medians = {name: statistics.median(runs[1:]) for name, runs in speeds.items()}  # the first one warms up
    ratios = {f"over {name}": round(medians[ALL] / medians[name], 2) for name in ways if name != ALL}

    table = Table(
        "", title=f"{len(questions)} questions x {flags.num_samples} answers, {hardware.describe(device)}, {dtype}"
    )
    for title in ("rollouts/s", "tokens each", "all at once is"):
        table.add_column(title, justify="right")
    for name, speed in medians.items():
        factor = f"{ratios[f'over {name}']:.2f} x" if name != ALL else ""
        table.add_row(name, f"{speed:.1f}", f"{lengths[name]:.1f}", factor)
    Console().print(table)
    print(json.dumps({"benchmark": "rollout", "rollouts_per_second": medians, "ratios": ratios}))
    return ratios


class PlainCache:
    """Keys and values of rows that all have the same length."""

    def __init__(self, model: GPT, prompt: list[int]):
        self.keys: dict[int, torch.Tensor] = {}  # by layer, (B, S, K, D)
        self.values: dict[int, torch.Tensor] = {}
        self.previous_B1C = torch.zeros(1, 1, model.config.n_embd, device=model.device, dtype=model.dtype)
        self.positions_BT = torch.arange(len(prompt), device=model.device)[None]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if layer not in self.keys:
            self.keys[layer], self.values[layer] = k, v
            return attend(q, k, v, window)
        self.keys[layer] = torch.cat([self.keys[layer][:, -window:], k], dim=1)
        self.values[layer] = torch.cat([self.values[layer][:, -window:], v], dim=1)
        q, k, v = (x.transpose(1, 2) for x in (q, self.keys[layer], self.values[layer]))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

    def repeat(self, num_rows: int) -> None:
        """The one row that was read becomes many; then one token at a time."""
        for cache in (self.keys, self.values):
            cache.update({layer: x.repeat(num_rows, 1, 1, 1) for layer, x in cache.items()})
        self.previous_B1C = self.previous_B1C.repeat(num_rows, 1, 1)
        self.positions_BT = self.positions_BT[:, -1:]


@torch.inference_mode()
def plain_rollouts(model: GPT, prompt: list[int], sampling: RolloutConfig, tokenizer: Tokenizer) -> list[int]:
    """Answers to one prompt, as one writes it first; returns the tokens of each."""
    B, cache = sampling.num_samples, PlainCache(model, prompt)
    ends = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}
    tools, forced = [ToolUse(tokenizer) for _ in range(B)], [deque[int]() for _ in range(B)]
    lengths, ended = [0] * B, [False] * B
    hidden = model.hidden(torch.tensor([prompt], device=model.device), cache)[:, -1].repeat(B, 1)
    cache.repeat(B)
    for _ in range(sampling.max_tokens):
        logits = model.logits(hidden) / sampling.temperature
        if sampling.top_k:
            threshold = logits.topk(min(sampling.top_k, logits.size(1))).values[:, -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        tokens = torch.multinomial(logits.softmax(dim=-1), 1).flatten().tolist()
        for row in range(B):
            if forced[row]:
                tokens[row] = forced[row].popleft()
            else:
                ended[row] = ended[row] or tokens[row] in ends
                forced[row].extend(tools[row].observe(tokens[row]))
            lengths[row] += not ended[row]
        if all(ended):
            break
        cache.positions_BT = cache.positions_BT + 1
        hidden = model.hidden(torch.tensor(tokens, device=model.device)[:, None], cache)[:, -1]
    return [length + has_ended for length, has_ended in zip(lengths, ended, strict=True)]


if __name__ == "__main__":
    main()
