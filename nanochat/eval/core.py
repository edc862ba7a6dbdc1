"""
CORE, the score of base models: accuracy on 22 tasks (core_tasks.py) whose answers are ranked by likelihood.

    scores = evaluate_core(model, tokenizer, load_tasks(resolve_bundle(), max_per_task=500), dist)
    core, margin = core_metric(scores)

The model chooses the prompt whose scored tokens have the lowest mean loss. Where there is only one continuation, the
model is correct if each of its tokens is the most likely one.

**Prefix sharing.** The prompts of an item start with the same tokens, the few-shot examples and the question, and
differ only at the end. In a causal model the state of a token depends only on the tokens before it, so the states of
the common prefix are the same in all prompts. They are computed once, and the suffixes of all prompts follow in the
same sequence:

    column     0 … P-1               P … T-1
    content    prefix, padding       suffix 1, suffix 2, …, padding

A mask lets a suffix attend to the prefix and to itself but not to other suffixes. The tokens of a suffix have the
positions that they have in their own prompt. Each token therefore attends to the same keys as if the prompts were
computed one at a time, and the result is the same up to rounding.

**Batches.** Items of similar length form a batch, even if they are of different tasks. Logits are computed for scored
tokens only, so the number of columns of a batch bounds its memory. On a CPU, with depth 4 and a context of 2,048
tokens, the whole process needs 0.4 GiB. After hardware.tune_process, which keeps freed memory for reuse, it needs 1.0
to 1.1 GiB and is a fifth faster.

Shapes: B trees in a batch, T columns, P of them for prefixes, Q scored columns, S keys, C width, N scored tokens,
V vocabulary.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.attention import attend, attend_cached
from nanochat.common import atomic_path
from nanochat.distributed import Dist
from nanochat.eval.core_tasks import CoreTask, ScoredPrompt, common_prefix_length, tokenize_items
from nanochat.eval.metrics import TaskScore, core_metric
from nanochat.gpt import GPT, select_columns
from nanochat.tokenizer import Tokenizer

REFERENCES = {"GPT-2 XL (1.5B)": 0.2565}  # CORE as published with nanochat
# Prompts are computed together if their common prefix is at least this share of the longest; heuristic, not tuned.
MIN_SHARED = 0.25
ITEMS_AT_A_TIME = 512  # are tokenized and sorted by length: under 100 MB of prompts (measured)
# Scored tokens whose logits exist at the same time: 34 MB in float32 with a vocabulary of 32,768, and a few copies.
LOGIT_ROWS = 256
# Columns of a batch, padding included. On a CPU, the speeds with 1,024 to 4,096 columns differ by less than 10 %
# (depth 4). The numbers for GPUs are heuristic, not tuned.
BATCH_COLUMNS = {"cpu": 2048, "cuda": 65536, "mps": 16384}
PREFIX, UNUSED = 0, -1  # segments; the suffixes are segments 1, 2, …


# ---- prefix trees ----


@dataclass(frozen=True)
class PrefixTree:
    """Prompts of an item that are computed together: a common prefix and a suffix for each prompt."""

    item: int
    prompts: dict[int, ScoredPrompt]  # by choice
    prefix: list[int]
    # A suffix per prompt. It starts with a copy of the prefix's last token (PrefixSharingCache explains why). It is
    # empty if the prefix alone predicts all scored tokens of the prompt.
    suffixes: list[list[int]]

    @property
    def num_suffix_columns(self) -> int:
        return sum(len(suffix) for suffix in self.suffixes)


def build_prefix_trees(item: int, prompts: Mapping[int, ScoredPrompt]) -> list[PrefixTree]:
    """
    Builds one tree, or one per prompt if the prompts share too little.

    The last token of a prompt is only a target, never an input. So a choice of one token needs no suffix: the last
    token of the prefix predicts it.
    """
    num_shared = 0
    if len(prompts) > 1:
        num_shared = common_prefix_length([prompt.tokens for prompt in prompts.values()])
        first_scored = min(prompt.start for prompt in prompts.values())
        num_shared = min(num_shared, first_scored)  # the smaller one if a choice starts with another choice
    longest = max(len(prompt.tokens) for prompt in prompts.values())
    if num_shared < longest * MIN_SHARED:
        return [PrefixTree(item, {choice: prompt}, prompt.tokens[:-1], [[]]) for choice, prompt in prompts.items()]
    suffixes = []
    for prompt in prompts.values():
        has_more = len(prompt.tokens) > num_shared + 1
        suffixes.append(prompt.tokens[num_shared - 1 : -1] if has_more else [])
    prefix = next(iter(prompts.values())).tokens[:num_shared]
    return [PrefixTree(item, dict(prompts), prefix, suffixes)]


def batch_trees(trees: Sequence[PrefixTree], max_columns: int) -> Iterator[list[PrefixTree]]:
    """
    Yields batches of trees of similar length. A batch has at most max_columns columns, padding included, unless a
    single tree is larger.
    """

    def shape(tree: PrefixTree) -> tuple[bool, int, int]:
        return tree.num_suffix_columns > 0, len(tree.prefix), tree.num_suffix_columns

    batch: list[PrefixTree] = []
    prefix_columns = suffix_columns = 0
    for tree in sorted(trees, key=shape, reverse=True):
        prefix_columns = max(prefix_columns, len(tree.prefix))
        suffix_columns = max(suffix_columns, tree.num_suffix_columns)
        if batch and (len(batch) + 1) * (prefix_columns + suffix_columns) > max_columns:
            yield batch
            batch = []
            prefix_columns, suffix_columns = len(tree.prefix), tree.num_suffix_columns
        batch.append(tree)
    if batch:
        yield batch


# ---- scoring a batch ----


class TreeBatch:
    """
    A batch of trees laid out in columns. Each column belongs to a segment: to the prefix, to one of the suffixes, or,
    as a copy or padding, to none (UNUSED).
    """

    def __init__(self, trees: Sequence[PrefixTree]):
        self.trees = trees
        self.num_prefix_columns = max(len(tree.prefix) for tree in trees)
        self.num_columns = self.num_prefix_columns + max(tree.num_suffix_columns for tree in trees)
        self.tokens: list[list[int]] = []  # (B, T)
        self.positions: list[list[int]] = []  # (B, T), in the token's own prompt
        self.segments: list[list[int]] = []  # (B, T)
        self.scored_columns: list[list[int]] = []  # by tree: the columns that predict scored tokens
        self.scored_at: list[tuple[int, int]] = []  # (N,): number of the tree, index in its scored_columns
        self.targets: list[int] = []  # (N,)
        self.num_targets: list[int] = []  # by prompt
        for tree in trees:
            self._add(tree)

    def _add(self, tree: PrefixTree) -> None:
        num_shared = len(tree.prefix)
        prefix_padding = [0] * (self.num_prefix_columns - num_shared)
        tokens = tree.prefix + prefix_padding
        positions = [*range(num_shared), *prefix_padding]
        segments = [PREFIX] * num_shared + [UNUSED] * len(prefix_padding)
        index_of_column: dict[int, int] = {}
        for number, (prompt, suffix) in enumerate(zip(tree.prompts.values(), tree.suffixes, strict=True), 1):
            # The suffix starts with a copy of the prefix's last token. With a prefix of 10 tokens the copy has position
            # 9, and the token at position 12 is three columns after it.
            column_of_copy = len(tokens)
            for position in range(prompt.start - 1, prompt.stop - 1):  # each predicts the next token of the prompt
                column = position if position < num_shared else column_of_copy + position - (num_shared - 1)
                index = index_of_column.setdefault(column, len(index_of_column))
                self.scored_at.append((len(self.tokens), index))
            self.targets += prompt.tokens[prompt.start : prompt.stop]
            self.num_targets.append(prompt.stop - prompt.start)
            if suffix:
                tokens += suffix
                positions += range(num_shared - 1, num_shared - 1 + len(suffix))
                segments += [UNUSED] + [number] * (len(suffix) - 1)
        padding = [0] * (self.num_columns - len(tokens))
        self.tokens.append(tokens + padding)
        self.positions.append(positions + padding)
        self.segments.append(segments + [UNUSED] * len(padding))
        self.scored_columns.append(list(index_of_column))


class PrefixSharingCache:
    """
    The attention of a batch of trees. It has the interface of a KV cache (gpt.Cache) but keeps no keys.

    The model adds to the embedding of each token a part of the embedding in the column before it (smear). Before the
    first new token of a suffix this must be the last token of the prefix, so each suffix starts with a copy of it. The
    copy is masked out and not scored.
    """

    def __init__(self, batch: TreeBatch, model: GPT):
        device = model.device
        num_trees = len(batch.trees)
        self.num_prefix_columns = batch.num_prefix_columns
        self.last_layer = model.config.n_layer - 1
        self.positions_BT = to_tensor(batch.positions, device)
        self.segments_BT = to_tensor(batch.segments, device)
        most = max(len(columns) for columns in batch.scored_columns)
        # Column 0 as padding: scored_states does not read its result.
        padded = [columns + [0] * (most - len(columns)) for columns in batch.scored_columns]
        self.scored_columns_BQ = torch.tensor(padded, device=device)
        suffix_columns = torch.arange(batch.num_prefix_columns, batch.num_columns, device=device)
        self.suffix_columns_BQ = suffix_columns.expand(num_trees, -1)
        self.shortest_prefix = min(len(tree.prefix) for tree in batch.trees)
        self.previous_B1 = torch.zeros((num_trees, 1), device=device, dtype=torch.long)
        self.suffix_masks: dict[int, torch.Tensor] = {}  # by window

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if layer == self.last_layer:  # its queries are those of the scored columns only
            return attend_cached(q, k, v, self._mask(self.scored_columns_BQ, 0, window))
        P = self.num_prefix_columns
        prefixes = attend(q[:, :P], k[:, :P], v[:, :P], window)
        if q.size(1) == P:
            return prefixes
        first_key = max(0, self.shortest_prefix - window)  # earlier keys are outside the window of all suffixes
        if window not in self.suffix_masks:
            self.suffix_masks[window] = self._mask(self.suffix_columns_BQ, first_key, window)
        suffixes = attend_cached(q[:, P:], k[:, first_key:], v[:, first_key:], self.suffix_masks[window])
        return torch.cat([prefixes, suffixes], dim=1)

    def _mask(self, columns_BQ: torch.Tensor, first_key: int, window: int) -> torch.Tensor:
        """(B, 1, Q, S): true where a query attends to a key. The queries are at columns_BQ, the keys from first_key."""
        positions_BQ1 = select_columns(self.positions_BT, columns_BQ).unsqueeze(-1)
        segments_BQ1 = select_columns(self.segments_BT, columns_BQ).unsqueeze(-1)
        key_positions_B1S = self.positions_BT[:, None, first_key:]
        key_segments_B1S = self.segments_BT[:, None, first_key:]
        distance_BQS = positions_BQ1 - key_positions_B1S
        # Unused columns attend to one another: a softmax over no key would be NaN.
        is_visible_BQS = (key_segments_B1S == PREFIX) | (key_segments_B1S == segments_BQ1)
        mask_BQS = is_visible_BQS & (distance_BQS >= 0) & (distance_BQS <= window)
        return mask_BQS.unsqueeze(1)


def to_tensor(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """Like torch.tensor, but through numpy, which is faster: 65,500 numbers take 2 ms instead of 20 (measured)."""
    return torch.from_numpy(np.array(rows)).to(device)


@dataclass(frozen=True)
class PromptScore:
    loss: float  # mean over the scored tokens, in nats
    all_most_likely: bool  # each scored token is the arg max


def scored_states(model: GPT, batch: TreeBatch) -> torch.Tensor:
    """
    Returns the final states that predict the scored tokens, (N, C), prompt after prompt. The last layer is computed for
    these columns only.
    """
    cache = PrefixSharingCache(batch, model)
    idx_BT = to_tensor(batch.tokens, model.device)
    states_BQC = model.hidden(idx_BT, cache, cache.scored_columns_BQ)
    tree_N, index_N = torch.tensor(batch.scored_at).T
    return states_BQC[tree_N, index_N]


def score_trees(model: GPT, trees: Sequence[PrefixTree]) -> Iterator[tuple[int, int, PromptScore]]:
    """Yields (item, choice, score) for each prompt of a batch."""
    batch = TreeBatch(trees)
    states_NC = scored_states(model, batch)
    targets_N = torch.tensor(batch.targets, device=model.device)
    losses, hits = [], []
    for some_states_NC, some_targets_N in zip(states_NC.split(LOGIT_ROWS), targets_N.split(LOGIT_ROWS), strict=True):
        logits_NV = model.logits(some_states_NC)
        losses.append(F.cross_entropy(logits_NV, some_targets_N, reduction="none"))
        hits.append(logits_NV.argmax(dim=-1) == some_targets_N)
    losses_of_prompts = torch.cat(losses).cpu().split(batch.num_targets)
    hits_of_prompts = torch.cat(hits).cpu().split(batch.num_targets)
    prompts = [(tree.item, choice) for tree in trees for choice in tree.prompts]
    for (item, choice), loss, hit in zip(prompts, losses_of_prompts, hits_of_prompts, strict=True):
        yield item, choice, PromptScore(loss.double().mean().item(), bool(hit.all()))


def score_items(
    model: GPT, items: Sequence[Mapping[int, ScoredPrompt]], max_columns: int = 0
) -> list[dict[int, PromptScore]]:
    """Scores the prompts of several items; returns one dict by choice per item. max_columns 0: see BATCH_COLUMNS."""
    trees = []
    for item, prompts in enumerate(items):
        trees += build_prefix_trees(item, prompts)
    scores: list[dict[int, PromptScore]] = [{} for _ in items]
    for batch in batch_trees(trees, max_columns or BATCH_COLUMNS[model.device.type]):
        for item, choice, score in score_trees(model, batch):
            scores[item][choice] = score
    return scores


# ---- accuracies ----


@torch.inference_mode()
def grade_items(
    model: GPT,
    tokenizer: Tokenizer,
    items: Sequence[tuple[CoreTask, int]],
    *,
    max_columns: int = 0,
    progress: Callable[[int], object] = lambda num_graded: None,
) -> list[bool]:
    """
    Returns whether the model is correct on each item (a task and an index). `progress` is called with the number of
    items graded so far.
    """
    verdicts: list[bool] = []
    for first in range(0, len(items), ITEMS_AT_A_TIME):
        some_items = items[first : first + ITEMS_AT_A_TIME]
        prompts = list(tokenize_items(tokenizer, some_items, model.config.sequence_len))
        scores = score_items(model, prompts, max_columns)
        for (task, index), item_scores in zip(some_items, scores, strict=True):
            verdicts.append(is_correct(task, index, item_scores))
        progress(len(verdicts))
    return verdicts


def is_correct(task: CoreTask, index: int, scores: Mapping[int, PromptScore]) -> bool:
    """Whether the choice with the lowest loss (on a tie, the first) is right; without choices, see all_most_likely."""
    if task.kind == "language_modeling":
        return scores[0].all_most_likely
    best = min(sorted(scores), key=lambda choice: scores[choice].loss)
    return best == task.items[index]["gold"]


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[CoreTask],
    dist: Dist,
    *,
    progress: Callable[[int], object] = lambda num_graded: None,
) -> list[TaskScore]:
    """Returns the score of each task; the ranks share the items. `progress` gets the number graded by this rank."""
    items = [(task, index) for task in tasks for index in range(len(task))]
    own_items = slice(dist.rank, None, dist.world_size)
    own_verdicts = grade_items(model, tokenizer, items[own_items], progress=progress)
    verdicts = torch.zeros(len(items), device=dist.device)
    verdicts[own_items] = torch.tensor(own_verdicts, dtype=verdicts.dtype, device=dist.device)
    verdicts_by_task = dist.sum(verdicts).cpu().split([len(task) for task in tasks])
    scores = []
    for task, task_verdicts in zip(tasks, verdicts_by_task, strict=True):
        scores.append(TaskScore(task.label, int(task_verdicts.sum()), len(task), task.baseline))
    return scores


def save_scores(path: str, scores: Sequence[TaskScore], model: str) -> None:
    """Writes <path>.csv and <path>.json."""
    core, margin = core_metric(scores)
    rows: list[list[Any]] = [["task", "correct", "total", "accuracy", "low", "high", "centered"]]
    tasks = {}
    for score in scores:
        rows.append([score.label, score.correct, score.total, score.accuracy, *score.interval, score.centered])
        derived = {"interval": score.interval, "centered": score.centered, "accuracy": score.accuracy}
        tasks[score.label] = derived | asdict(score)
    rows.append(["CORE", "", "", "", core - margin, core + margin, core])
    with atomic_path(Path(f"{path}.csv")) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    summary = {"model": model, "CORE": core, "margin": margin, "references": REFERENCES, "tasks": tasks}
    with atomic_path(Path(f"{path}.json")) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
