"""
Evaluation of chat models: the fraction of a task's questions that a model answers correctly.

    score = evaluate_task(engine, "GSM8K", GSM8K("test"), dist, record=Path("GSM8K.jsonl"))
    chat_core, margin = core_metric([scores[name] for name in CHATCORE])

There are two kinds of tasks (tasks/common.py):
- "categorical": the answer is the most likely letter of a multiple-choice question. Questions of similar length form a
  batch. The last layer is computed for the last token of each question only, the logits for the letters only.
- "generative": the model generates a completion, which the task grades. The engine generates many at a time. When one
  ends, the next one takes its slot.

A limited number of questions is evaluated at a time, so that memory does not grow with the task.

Shapes: B questions in a batch, C width, L letters.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import atomic_path
from nanochat.conversation import completion_text, render_for_completion
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.eval.core import BATCH_COLUMNS, TreeBatch, batch_trees, build_prefix_trees, scored_states
from nanochat.eval.core_tasks import ScoredPrompt
from nanochat.eval.metrics import TaskScore
from nanochat.loss import softcap
from nanochat.progress import Bar
from nanochat.request import Request
from nanochat.rollout import pass_at_k

# The tasks of ChatCORE and the accuracy of guessing.
CHATCORE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25, "GSM8K": 0.0, "HumanEval": 0.0, "SpellingBee": 0.0}
COMPLETIONS_AT_A_TIME = 4096  # in memory, per rank: under 100 MB (estimated)
GRADING_THREADS = 4  # completions graded at a time, two processes each for HumanEval; heuristic, not tuned

Task = Any  # tasks.common.Task, which nanochat must not import
Report = Callable[[int], object]  # called with the number of completions so far


@dataclass(frozen=True)
class Sampling:
    """How completions of generative tasks are generated; by default one greedy completion per question."""

    template: Request = Request([], temperature=0.0)  # prompt and seed differ between the requests
    num_samples: int = 1  # completions per question
    pass_k: Sequence[int] = ()  # report pass@k for these k <= num_samples


@dataclass(frozen=True)
class GradedCompletion:
    """A completion and its grade: one line of the record file."""

    problem: int  # index of the question
    sample: int  # 0 … num_samples - 1
    correct: bool
    cut: bool  # the prompt did not fit the context and was cut at the beginning
    prompt: str  # after cutting
    answer: str  # the completion, tool calls included
    reference: Any  # the content of the reference answer's message
    details: dict[str, Any]  # further keys of the line


@dataclass(frozen=True)
class ChatScore(TaskScore):
    """The score of `total` questions with num_samples completions each; `correct` counts completions."""

    num_samples: int = 1
    cut: int = 0  # prompts that did not fit the context and were cut at the beginning
    pass_at: dict[int, float] = field(default_factory=dict)  # k → pass@k

    @property
    def accuracy(self) -> float:
        """
        The fraction of completions that are correct. Completions for the same question are similar, so the confidence
        interval counts questions, not completions.
        """
        return self.correct / (self.total * self.num_samples)

    def to_dict(self) -> dict[str, float]:
        """For the metrics file (logging.py)."""
        pass_at = {f"pass@{k}": value for k, value in self.pass_at.items()}
        return super().to_dict() | {"num_samples": self.num_samples} | pass_at


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
    Returns the score of a task; the ranks share the questions. Rank 0 writes all completions and their grades to the
    file `record`, one JSON object per line. Categorical tasks ignore `sampling`.
    """
    if sampling is None or task.kind == "categorical":
        sampling = Sampling()
    num_samples = sampling.num_samples
    num_correct = [0] * len(task)  # by problem
    num_cut = 0
    with ExitStack() as stack:
        file = None
        if record and dist.is_main:
            temporary = stack.enter_context(atomic_path(record))
            file = stack.enter_context(temporary.open("w", encoding="utf-8"))
        for graded in grade_task(engine, task, dist, sampling=sampling, label=label):
            num_correct[graded.problem] += graded.correct
            if graded.sample == 0:
                num_cut += graded.cut
            if file:
                fields = asdict(graded)
                details = fields.pop("details")
                file.write(json.dumps(fields | details, ensure_ascii=False) + "\n")
    pass_at = {}
    for k in sampling.pass_k:
        pass_at[k] = sum(pass_at_k(num_samples, correct, k) for correct in num_correct) / len(num_correct)
    baseline = CHATCORE.get(label, 0.0)
    return ChatScore(label, sum(num_correct), len(task), baseline, num_samples, num_cut, pass_at)


def grade_task(engine: Engine, task: Task, dist: Dist, *, sampling: Sampling, label: str) -> Iterator[GradedCompletion]:
    """Yields the graded completions of all ranks, on every rank, in order of problems and samples."""
    num_samples = sampling.num_samples
    problems_at_a_time = max(1, COMPLETIONS_AT_A_TIME // num_samples) * dist.world_size
    num_done = 0  # by this rank

    def report(num_new: int) -> None:
        bar.update(num_done + num_new)

    with Bar(label, len(task) * num_samples // dist.world_size, lines=True) as bar:
        for first in range(0, len(task), problems_at_a_time):
            stop = min(first + problems_at_a_time, len(task))
            own_problems = range(first + dist.rank, stop, dist.world_size)
            if task.kind == "categorical":
                own = choose_letters(engine, task, own_problems, report=report)
            else:
                own = grade_completions(engine, task, own_problems, sampling, report=report)
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
    """Answers multiple-choice questions. max_columns 0: see BATCH_COLUMNS."""
    model, tokenizer = engine.model, engine.tokenizer
    context = model.config.sequence_len
    conversations = [task[i] for i in problems]
    full_prompts = [render_for_completion(conversation, tokenizer) for conversation in conversations]
    prompts = [truncate_prompt(prompt, context) for prompt in full_prompts]
    token_of = {letter: tokenizer.encode(letter)[0] for each in conversations for letter in each["letters"]}
    head_LC = model.lm_head.weight[list(token_of.values())].to(model.dtype)
    trees = []
    for i, prompt in enumerate(prompts):
        with_letter = [*prompt, 0]  # any token can stand for the letter: it is predicted but never read
        trees += build_prefix_trees(i, {0: ScoredPrompt(with_letter, len(prompt), len(with_letter))})
    graded = []
    for batch in batch_trees(trees, max_columns or BATCH_COLUMNS[model.device.type]):
        states_BC = scored_states(model, TreeBatch(batch))
        logits_BL = softcap(F.linear(states_BC, head_LC).float(), model.config.logit_softcap)
        for tree, logits in zip(batch, logits_BL.tolist(), strict=True):
            i = tree.item
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
    Generates and grades num_samples completions for each problem. The seed of a completion follows from its problem and
    sample, so it does not depend on which other problems are evaluated.
    """
    template, num_samples = sampling.template, sampling.num_samples
    tokenizer = engine.tokenizer
    context = engine.model.config.sequence_len
    max_prompt = context - min(template.max_tokens, context // 2)  # at most half of the context is for the completion
    conversations = {i: task[i] for i in problems}
    full_prompts = {i: render_for_completion(conversation, tokenizer) for i, conversation in conversations.items()}
    prompts = {i: truncate_prompt(prompt, max_prompt) for i, prompt in full_prompts.items()}
    # Sorted, so that prompts of similar length are prefilled together, and once for all samples. Longest first, so that
    # the decoder's slots never have to grow.
    by_length = sorted(problems, key=lambda i: len(prompts[i]), reverse=True)
    order = [(i, sample) for i in by_length for sample in range(num_samples)]
    requests = [replace(template, prompt=prompts[i], seed=i * num_samples + sample) for i, sample in order]
    completions = engine.generate(requests, report)
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


def truncate_prompt(prompt: list[int], max_tokens: int) -> list[int]:
    """Shortens a prompt to max_tokens. It keeps its first token, which is BOS, and its last ones."""
    if len(prompt) <= max_tokens:
        return prompt
    return [prompt[0], *prompt[len(prompt) - max_tokens + 1 :]]
