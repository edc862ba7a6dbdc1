"""Examinations: how many of a task's questions a model answers rightly."""

import math
from dataclasses import dataclass

import torch

from nanochat.conversation import render_for_completion, spoken_text
from nanochat.distributed import Dist
from nanochat.engine import Engine, Request
from tasks.common import Task


@dataclass(frozen=True)
class Score:
    correct: int
    total: int
    cut: int = 0  # prompts that did not fit the context and lost their beginning

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence (Wilson's score interval)."""
        z, n, p = 1.96, self.total, self.accuracy
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def evaluate(
    engine: Engine, task: Task, dist: Dist, batch_size: int = 32, max_tokens: int = 256, temperature: float = 0.0
) -> Score:
    """The share of right answers; ranks share the work. max_tokens and temperature are for generative tasks."""
    mine = range(dist.rank, len(task), dist.world_size)
    if task.kind == "categorical":
        correct, cut = count_categorical(engine, task, mine, batch_size)
    else:
        correct, cut = count_generative(engine, task, mine, max_tokens, temperature)
    total, all_correct, all_cut = dist.sum(torch.tensor([len(mine), correct, cut], device=dist.device)).tolist()
    return Score(all_correct, total, all_cut)


@torch.inference_mode()
def count_categorical(engine: Engine, task: Task, indices: range, batch_size: int) -> tuple[int, int]:
    """Right answers and cut prompts. An answer is the likeliest of the letters that the question offers."""
    model, tokenizer, context = engine.model, engine.tokenizer, engine.model.config.sequence_len
    conversations = [task[i] for i in indices]
    prompts = [render_for_completion(conversation, tokenizer) for conversation in conversations]
    num_cut = sum(len(prompt) > context for prompt in prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of one batch are about as long
    correct = 0
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        rows = [fit(prompts[i], context) for i in batch]
        # Padding comes after the answer's position, which attention, being causal, never sees.
        padded = [row + [tokenizer.bos] * (len(rows[-1]) - len(row)) for row in rows]
        hidden = model.hidden(torch.tensor(padded, device=model.device))
        last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        logits = model.logits(hidden[torch.arange(len(rows), device=model.device), last]).cpu()
        for i, row_logits in zip(batch, logits, strict=True):
            letters = conversations[i]["letters"]
            ids = [tokenizer.encode(letter)[0] for letter in letters]
            answer = letters[int(row_logits[ids].argmax())]
            correct += answer == conversations[i]["messages"][-1]["content"]
    return correct, num_cut


def count_generative(
    engine: Engine, task: Task, indices: range, max_tokens: int, temperature: float
) -> tuple[int, int]:
    """Right answers and cut prompts. The model writes its answer, with tools, and the task judges it."""
    tokenizer, context = engine.tokenizer, engine.model.config.sequence_len
    conversations = [task[i] for i in indices]
    prompts = [render_for_completion(conversation, tokenizer) for conversation in conversations]
    room = context - min(max_tokens, context // 2)  # as in a chat: answers take half of the context at most
    requests = [Request(fit(p, room), max_tokens, temperature, seed=i) for i, p in zip(indices, prompts, strict=True)]
    completions = engine.generate(requests)
    texts = [spoken_text(completion.tokens, tokenizer) for completion in completions]
    correct = sum(task.is_correct(c, text) for c, text in zip(conversations, texts, strict=True))
    return correct, sum(len(prompt) > room for prompt in prompts)


def fit(prompt: list[int], room: int) -> list[int]:
    """A prompt of at most `room` tokens: the first, which begins every text, and the end."""
    return prompt if len(prompt) <= room else [prompt[0], *prompt[len(prompt) - room + 1 :]]
