"""
Evaluation of chat models: the share of a task's questions that a model answers correctly.

    score = evaluate_task(engine, "GSM8K", GSM8K("test"), dist, record=Path("GSM8K.jsonl"))
    chat_core, margin = core_metric([scores[name] for name in CHATCORE])

There are two kinds of tasks:
- "categorical": the answer is the most likely letter of a multiple-choice question. Questions of about the same length
  form a batch; the last layer and the logits are computed for one position and a few letters only.
- "generative": the model writes a completion, which the task grades. The engine generates many at a time, and each one
  that ends makes room for the next.

Questions are processed in windows, so that memory does not grow with the task.

Shapes: B questions in a batch, T tokens, C width, L letters.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
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
from nanochat.logging import progress
from nanochat.loss import softcap
from nanochat.rollout import pass_at_k

# The tasks of ChatCORE and the accuracy of guessing.
CHATCORE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0, "SpellingBee": 0.0}
WINDOW = 4096  # completions in memory at a time, per rank: under 100 MB (estimated); the record file has the others
GRADING_THREADS = 4  # completions graded at a time, two processes each for HumanEval; heuristic, not tuned

Conversation = Mapping[str, Any]
Report = Callable[[int], object]  # called with the number of completions of this window so far


class Task(Protocol):
    """What an evaluation needs of a task; tasks/common.py has the base class."""

    kind: str  # "categorical" or "generative"

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A conversation that ends with the reference answer; for categorical tasks with its "letters"."""
        ...

    def grade(self, conversation: Conversation, completion: str) -> dict[str, Any]:
        """{"correct": whether the completion is, and details for the record}. Thread-safe."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How completions of generative tasks are generated."""

    template: Request = Request([], temperature=0.0)  # its prompt and seed are replaced
    num_samples: int = 1  # completions per question
    pass_k: Sequence[int] = ()  # report pass@k for these k <= num_samples


@dataclass(frozen=True)
class GradedCompletion:
    """A line of the record, for people to read."""

    problem: int
    sample: int  # 0 … num_samples - 1
    correct: bool
    cut: bool  # the prompt did not fit the context and lost its beginning
    prompt: str  # as the model read it
    answer: str  # the completion, tool calls included
    reference: Any  # the content of the reference answer's message
    details: dict[str, Any]  # what the grading adds


@dataclass(frozen=True)
class ChatScore(TaskScore):
    """The score of num_samples completions for each of `total` questions, of which `correct` are correct."""

    num_samples: int = 1
    cut: int = 0  # prompts that did not fit the context and lost their beginning
    pass_at: dict[int, float] = field(default_factory=dict)  # k → pass@k

    @property
    def accuracy(self) -> float:
        """
        Of a single completion. Its confidence interval is that of `total` questions, because completions for the same
        question are alike.
        """
        return self.correct / (self.total * self.num_samples)


def evaluate_task(
    engine: Engine,
    label: str,
    task: Task,
    dist: Dist,
    *,
    sampling: Sampling | None = None,
    record: Path | None = None,
) -> ChatScore:
    """
    Returns the score of a task; the ranks share the questions. `sampling` matters to generative tasks, by default one
    greedy completion per question. All completions and verdicts are written to the file `record`.
    """
    sampling = sampling or Sampling()
    num_samples = sampling.num_samples if task.kind == "generative" else 1
    num_correct = [0] * len(task)  # by problem
    num_cut = 0
    with ExitStack() as stack:
        file = None
        if record and dist.is_main:
            temporary = stack.enter_context(atomic_path(record))
            file = stack.enter_context(temporary.open("w", encoding="utf-8"))
        for graded in grade_task(engine, task, dist, sampling):
            num_correct[graded.problem] += graded.correct
            if graded.sample == 0:
                num_cut += graded.cut
            if file:
                fields = asdict(graded)
                details = fields.pop("details")
                file.write(json.dumps(fields | details, ensure_ascii=False) + "\n")
    pass_at = {}
    if task.kind == "generative":
        for k in sampling.pass_k:
            pass_at[k] = sum(pass_at_k(num_samples, correct, k) for correct in num_correct) / len(num_correct)
    baseline = CHATCORE.get(label, 0.0)
    return ChatScore(label, sum(num_correct), len(task), baseline, num_samples, num_cut, pass_at)


def grade_task(engine: Engine, task: Task, dist: Dist, sampling: Sampling) -> Iterator[GradedCompletion]:
    """Yields the graded completions of all ranks, on every rank, in order of problems and samples."""
    num_samples = sampling.num_samples if task.kind == "generative" else 1
    problems_per_window = max(1, WINDOW // num_samples) * dist.world_size
    num_done = 0  # by this rank
    report_all = progress(len(task) * num_samples // dist.world_size, dist)
    for first in range(0, len(task), problems_per_window):
        stop = min(first + problems_per_window, len(task))
        own_problems = range(first + dist.rank, stop, dist.world_size)

        def report_window(num_new: int, num_before: int = num_done) -> None:
            report_all(num_before + num_new)

        if task.kind == "categorical":
            own = choose_letters(engine, task, own_problems, report=report_window)
        else:
            own = grade_completions(engine, task, own_problems, sampling, report=report_window)
        num_done += len(own)
        yield from sorted(chain(*dist.gather(own)), key=lambda graded: (graded.problem, graded.sample))


# ---- categorical tasks: the most likely letter ----


@torch.inference_mode()
def choose_letters(
    engine: Engine,
    task: Task,
    problems: range,
    *,
    max_columns: int = 0,
    report: Report = lambda num_done: None,
) -> list[GradedCompletion]:
    """Answers multiple-choice questions. max_columns: of a forward pass, with padding; 0 = what suits the device."""
    model, tokenizer = engine.model, engine.tokenizer
    context = model.config.sequence_len
    conversations = [task[i] for i in problems]
    full_prompts = [render_for_completion(conversation, tokenizer) for conversation in conversations]
    prompts = [truncate_prompt(prompt, context) for prompt in full_prompts]
    token_of = {letter: tokenizer.encode(letter)[0] for each in conversations for letter in each["letters"]}
    head_LC = model.lm_head.weight[list(token_of.values())].to(model.dtype)
    graded = []
    for batch in batch_by_length(prompts, max_columns or BATCH_COLUMNS[model.device.type]):
        states_BC = last_states(model, [prompts[i] for i in batch])
        logits_BL = softcap(F.linear(states_BC, head_LC).float(), model.config.logit_softcap)
        for i, logits in zip(batch, logits_BL.tolist(), strict=True):
            letters = conversations[i]["letters"]
            logit_of = dict(zip(token_of, logits, strict=True))
            answer = max(letters, key=lambda letter: logit_of[letter])
            reference = conversations[i]["messages"][-1]["content"]
            probabilities = torch.tensor([logit_of[letter] for letter in letters]).softmax(dim=0).tolist()
            rounded = {letter: round(p, 4) for letter, p in zip(letters, probabilities, strict=True)}
            graded.append(
                GradedCompletion(
                    problem=problems[i],
                    sample=0,
                    correct=answer == reference,
                    cut=len(full_prompts[i]) > context,
                    prompt=tokenizer.decode(prompts[i]),
                    answer=answer,
                    reference=reference,
                    details={"probabilities": rounded},
                )
            )
        report(len(graded))
    return graded


def batch_by_length(prompts: Sequence[Sequence[int]], max_columns: int) -> Iterator[list[int]]:
    """Yields indices of prompts of about the same length, longest first, of at most max_columns with the padding."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True):
        if batch and (len(batch) + 1) * len(prompts[batch[0]]) > max_columns:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class LastTokenCache:
    """A KV cache (gpt.Cache) that keeps no keys, for a forward pass that needs the state of each row's last token."""

    def __init__(self, last_B1: torch.Tensor, num_tokens: int, model: GPT):
        self.last_B1 = last_B1
        self.last_layer = model.config.n_layer - 1
        self.positions_BT = torch.arange(num_tokens, device=model.device)[None]
        self.previous_B1C = torch.zeros((len(last_B1), 1, model.config.n_embd), device=model.device, dtype=model.dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if layer < self.last_layer:
            return attend(q, k, v, window)
        mask_BTS = band_mask(self.last_B1, 0, k.size(1), window)
        return attend_cached(q, k, v, mask_BTS.unsqueeze(1))


def last_states(model: GPT, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Returns the final states of the prompts' last tokens, (B, C); they never attend to the padding after them."""
    T = max(len(prompt) for prompt in prompts)
    idx_BT = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts], device=model.device)
    last_B1 = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=model.device)
    return model.hidden(idx_BT, LastTokenCache(last_B1, T, model), last_B1).squeeze(1)


# ---- generative tasks: completions, graded by the task ----


def grade_completions(
    engine: Engine,
    task: Task,
    problems: range,
    sampling: Sampling,
    *,
    report: Report = lambda num_done: None,
) -> list[GradedCompletion]:
    """
    Generates and grades num_samples completions for each problem. The seed follows from problem and sample, so a
    completion does not depend on which other problems are evaluated.
    """
    template, num_samples = sampling.template, sampling.num_samples
    tokenizer = engine.tokenizer
    context = engine.model.config.sequence_len
    max_prompt = context - min(template.max_tokens, context // 2)  # as in a chat: at most half is for the completion
    conversations = {i: task[i] for i in problems}
    full_prompts = {i: render_for_completion(conversation, tokenizer) for i, conversation in conversations.items()}
    prompts = {i: truncate_prompt(prompt, max_prompt) for i, prompt in full_prompts.items()}
    # Longest first: prompts of about one length are prefilled together, once for all samples, and the longest
    # determine the size of the decoder's slots.
    by_length = sorted(problems, key=lambda i: len(prompts[i]), reverse=True)
    order = [(i, sample) for i in by_length for sample in range(num_samples)]
    requests = [replace(template, prompt=prompts[i], seed=i * num_samples + sample) for i, sample in order]
    completions = generate(engine, requests, report)
    texts = [completion_text(completion.tokens, tokenizer) for completion in completions]
    with ThreadPoolExecutor(GRADING_THREADS) as pool:
        verdicts = list(pool.map(task.grade, [conversations[i] for i, _ in order], texts))
    graded = []
    for (i, sample), completion, verdict in zip(order, completions, verdicts, strict=True):
        details = {"finish": completion.finish} | verdict
        graded.append(
            GradedCompletion(
                problem=i,
                sample=sample,
                correct=details.pop("correct"),
                cut=len(full_prompts[i]) > max_prompt,
                prompt=tokenizer.decode(prompts[i]),
                answer=tokenizer.decode(completion.tokens),
                reference=conversations[i]["messages"][-1]["content"],
                details=details,
            )
        )
    return graded


def generate(engine: Engine, requests: Sequence[Request], report: Report) -> list[Completion]:
    """Engine.generate with progress reports."""
    completions: dict[int, Completion] = {}
    for index, token, completion in engine.stream(requests):
        if token is None:
            completions[index] = completion
            report(len(completions))
    return [completions[index] for index in range(len(requests))]


def truncate_prompt(prompt: list[int], max_tokens: int) -> list[int]:
    """Shortens a prompt to max_tokens: its first token, BOS, and its end are kept."""
    if len(prompt) <= max_tokens:
        return prompt
    return [prompt[0], *prompt[len(prompt) - max_tokens + 1 :]]
