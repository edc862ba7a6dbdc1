"""
Examinations: how many of a task's questions a model answers rightly.

    score = evaluate(engine, "GSM8K", GSM8K("test"), dist, record=Path("GSM8K.jsonl"))
    chat_core, margin = core_metric([scores[name] for name in CHATCORE])

The answer to a categorical question is the likeliest of its letters. Questions of about the same length are a batch;
the model's last block and its head compute the one column and the few letters that count. A generative question is
answered in writing, many at a time: as soon as one is finished the next one takes its place. Questions pass by in
windows, so memory does not grow with the task.

Shapes: B questions in a batch, T tokens, C width, L letters.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from nanochat.attention import attend, attend_cached, band_mask
from nanochat.common import atomic_path
from nanochat.conversation import completion_text, render_for_completion
from nanochat.distributed import Dist
from nanochat.engine import Completion, Engine, Request
from nanochat.eval.core import BATCH_COLUMNS
from nanochat.eval.metrics import TaskScore
from nanochat.gpt import GPT
from nanochat.loss import softcap
from nanochat.rollout import pass_at_k

# The tasks of ChatCORE and what guessing gets there.
CHATCORE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0, "SpellingBee": 0.0}
WINDOW = 4096  # answers held at a time, per rank: under 100 MB of prompts and texts (estimate); the record has the rest
JUDGES = 4  # answers judged at the same time, which for HumanEval are two processes each; arbitrary
GREEDY = Request([], temperature=0.0)

Progress = Callable[[int], object]  # is told how many answers of a task this rank has


class Task(Protocol):
    """What an evaluation needs of a task (tasks/common.py has the base class that datasets implement)."""

    kind: str  # "categorical" or "generative"

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def grade(self, conversation: Mapping[str, Any], completion: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Answer:
    """One answer to one question, for a person to look at: a line of the record."""

    problem: int
    sample: int  # 0 … num_samples - 1
    correct: bool
    cut: bool  # the prompt did not fit the context and lost its beginning
    prompt: str  # as the model read it
    answer: str  # what it said, calls of tools included
    reference: Any  # the content of the message that the task calls right
    details: dict[str, Any]  # of the verdict


@dataclass(frozen=True)
class Score(TaskScore):
    """`correct` counts the right ones of num_samples * total answers, of which pass_at tells pass@k, by k."""

    num_samples: int = 1
    cut: int = 0  # prompts that did not fit the context and lost their beginning
    pass_at: dict[int, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Of a single answer; its interval is that of `total` questions, for answers to the same one are alike."""
        return self.correct / (self.total * self.num_samples)


def evaluate(
    engine: Engine,
    label: str,
    task: Task,
    dist: Dist,
    settings: Request = GREEDY,
    num_samples: int = 1,
    pass_k: Sequence[int] = (),
    record: Path | None = None,
    progress: Progress = lambda answered: None,
) -> Score:
    """
    The score of a task; ranks share the questions. `settings` without a prompt, num_samples answers to each question,
    and pass@k for each k <= num_samples of pass_k are for generative tasks. All answers are written to `record`.
    """
    num_samples = num_samples if task.kind == "generative" else 1
    right, cut = [0] * len(task), 0
    with ExitStack() as stack:
        file = None
        if record and dist.is_main:
            file = stack.enter_context(stack.enter_context(atomic_path(record)).open("w", encoding="utf-8"))
        for answer in answers(engine, task, dist, settings, num_samples, progress):
            right[answer.problem] += answer.correct
            cut += answer.cut and not answer.sample
            if file:
                fields = asdict(answer)
                file.write(json.dumps(fields | fields.pop("details"), ensure_ascii=False) + "\n")
    pass_at = {}
    if task.kind == "generative":
        pass_at = {k: sum(pass_at_k(num_samples, c, k) for c in right) / len(right) for k in pass_k}
    return Score(label, sum(right), len(task), CHATCORE.get(label, 0.0), num_samples, cut, pass_at)


def answers(
    engine: Engine, task: Task, dist: Dist, settings: Request, num_samples: int, progress: Progress
) -> Iterator[Answer]:
    """The answers of all ranks, on every rank, in order."""
    answered, window = 0, max(1, WINDOW // num_samples) * dist.world_size
    for first in range(0, len(task), window):
        mine = range(first + dist.rank, min(first + window, len(task)), dist.world_size)
        say = partial(_say, progress, answered)
        if task.kind == "categorical":
            own = choose(engine, task, mine, progress=say)
        else:
            own = write(engine, task, mine, settings, num_samples, say)
        answered += len(own)
        yield from sorted(chain(*dist.gather(own)), key=lambda answer: (answer.problem, answer.sample))


def _say(progress: Progress, before: int, new: int) -> None:
    progress(before + new)


# ---- categorical: the likeliest letter ----


@torch.inference_mode()
def choose(
    engine: Engine,
    task: Task,
    problems: range,
    max_columns: int = 0,
    progress: Progress = lambda answered: None,
) -> list[Answer]:
    """Answers to multiple choice. max_columns is that of a forward pass, 0 = what suits the device."""
    model, tokenizer, context = engine.model, engine.tokenizer, engine.model.config.sequence_len
    conversations = [task[i] for i in problems]
    whole = [render_for_completion(conversation, tokenizer) for conversation in conversations]
    prompts = [fit(prompt, context) for prompt in whole]
    ids = {letter: tokenizer.encode(letter)[0] for each in conversations for letter in each["letters"]}
    letters_LC = model.lm_head.weight[list(ids.values())].to(model.dtype)
    found = []
    for batch in batches(prompts, max_columns or BATCH_COLUMNS[model.device.type]):
        states_BC = last_states(model, [prompts[i] for i in batch])
        capped_BL = softcap(F.linear(states_BC, letters_LC).float(), model.config.logit_softcap)
        for i, of_letters in zip(batch, capped_BL.tolist(), strict=True):
            conversation = conversations[i]
            logits = dict(zip(ids, of_letters, strict=True))
            offered = {letter: logits[letter] for letter in conversation["letters"]}
            answer, reference = max(offered, key=offered.__getitem__), conversation["messages"][-1]["content"]
            probs = torch.tensor(list(offered.values())).softmax(dim=0).tolist()
            details = {"probabilities": {letter: round(p, 4) for letter, p in zip(offered, probs, strict=True)}}
            cut, prompt = len(whole[i]) > context, tokenizer.decode(prompts[i])
            found.append(Answer(problems[i], 0, answer == reference, cut, prompt, answer, reference, details))
        progress(len(found))
    return found


def batches(prompts: Sequence[Sequence[int]], max_columns: int) -> Iterator[list[int]]:
    """Indices of prompts of about one length, the longest first; together at most max_columns, padding included."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True):
        if batch and (len(batch) + 1) * len(prompts[batch[0]]) > max_columns:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class LastColumns:
    """What the model asks of a cache (gpt.Cache) where one column of each row is wanted. It keeps no keys."""

    def __init__(self, last_B1: torch.Tensor, num_tokens: int, model: GPT):
        self.last_B1, self.last_layer = last_B1, model.config.n_layer - 1
        self.positions_BT = torch.arange(num_tokens, device=model.device)[None]
        self.previous_B1C = torch.zeros((len(last_B1), 1, model.config.n_embd), device=model.device, dtype=model.dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if layer < self.last_layer:
            return attend(q, k, v, window)
        return attend_cached(q, k, v, band_mask(self.last_B1, 0, k.size(1), window).unsqueeze(1))


def last_states(model: GPT, rows: Sequence[list[int]]) -> torch.Tensor:
    """The final states at the last tokens of the rows, (B, C). Padding comes after them: nobody sees it."""
    T = max(map(len, rows))
    idx_BT = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=model.device)
    last_B1 = torch.tensor([[len(row) - 1] for row in rows], device=model.device)
    return model.hidden(idx_BT, LastColumns(last_B1, T, model), last_B1).squeeze(1)


# ---- generative: the model writes, with tools, and the task judges ----


def write(
    engine: Engine,
    task: Task,
    problems: range,
    settings: Request,
    num_samples: int = 1,
    progress: Progress = lambda answered: None,
) -> list[Answer]:
    """num_samples answers to each problem. What is sampled follows from the problem, not from its neighbours."""
    tokenizer, context = engine.tokenizer, engine.model.config.sequence_len
    conversations = {i: task[i] for i in problems}
    whole = {i: render_for_completion(conversation, tokenizer) for i, conversation in conversations.items()}
    room = context - min(settings.max_tokens, context // 2)  # as in a chat: answers take half of the context at most
    prompts = {i: fit(prompt, room) for i, prompt in whole.items()}
    # Prompts of about one length are read together, and once for all samples; the longest need the largest slots.
    order = [(i, j) for i in sorted(problems, key=lambda i: len(prompts[i]), reverse=True) for j in range(num_samples)]
    completions = generate(
        engine, [replace(settings, prompt=prompts[i], seed=i * num_samples + j) for i, j in order], progress
    )
    texts = [completion_text(completion.tokens, tokenizer) for completion in completions]
    with ThreadPoolExecutor(JUDGES) as pool:
        verdicts = list(pool.map(task.grade, [conversations[i] for i, _ in order], texts))
    found = []
    for (i, j), completion, verdict in zip(order, completions, verdicts, strict=True):
        cut, prompt, answer = len(whole[i]) > room, tokenizer.decode(prompts[i]), tokenizer.decode(completion.tokens)
        details = {"finish": completion.finish} | verdict
        reference = conversations[i]["messages"][-1]["content"]
        found.append(Answer(i, j, details.pop("correct"), cut, prompt, answer, reference, details))
    return found


def generate(engine: Engine, requests: Sequence[Request], progress: Progress) -> list[Completion]:
    """Engine.generate, which says how far it is."""
    completions: dict[int, Completion] = {}
    for index, token, completion in engine.stream(requests):
        if token is None:
            completions[index] = completion
            progress(len(completions))
    return [completions[index] for index in range(len(requests))]


def fit(prompt: list[int], room: int) -> list[int]:
    """A prompt of at most `room` tokens: the first, which begins every text, and the end."""
    return prompt if len(prompt) <= room else [prompt[0], *prompt[len(prompt) - room + 1 :]]
