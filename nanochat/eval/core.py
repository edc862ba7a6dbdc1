"""
CORE, the score of base models: 22 tasks (core_tasks.py), each text to go on with, answered by likelihood.

    scores = evaluate_core(model, tokenizer, load_tasks(resolve_bundle(), max_per_task=500), dist)
    core, margin = core_metric(scores)

The answer of an item is the continuation, or the context, with which the scored tokens have the lowest mean loss; a
single continuation is right when each of its tokens is the likeliest.

The prompts of an item begin alike, with examples and a question. It is therefore laid out as a tree: the trunk, what
its prompts share, is computed once, and after it come the branches, which see the trunk and themselves. Trees of about
the same length, of whatever task, are a batch. Its memory is bounded by the number of columns, for no logits exist but
those of scored tokens: on a CPU, depth 4 at 2,048 tokens of context, the whole process stays at 0.4 GiB, or at 1.1 GiB
with the pages kept that hardware.tune_process keeps (and is a fifth faster).

    columns    0 … P-1  trunk, padding        P … T-1  branch 1, branch 2, …, padding

Shapes: B trees in a batch, T columns, P of them for trunks, S keys, C width, N scored tokens, V vocabulary.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat.attention import attend, attend_cached
from nanochat.common import atomic_path
from nanochat.distributed import Dist
from nanochat.eval.core_tasks import CoreTask, Row, common_prefix, tokenize
from nanochat.eval.metrics import TaskScore, core_metric
from nanochat.gpt import GPT, select_columns
from nanochat.tokenizer import Tokenizer

REFERENCES = {"GPT-2 XL (1.5B)": 0.2565}  # CORE as published with nanochat
MIN_SHARED = 0.25  # of the longest row, to make a tree of an item; arbitrary
WINDOW = 512  # items tokenized and sorted by length at a time: under 100 MB of prompts (measured)
LOGIT_ROWS = 256  # scored tokens whose logits exist at the same time: 34 MB at 32,768 tokens, and a few copies
# Columns of a forward pass, padding included: 1,024 … 4,096 are within 10 % on a CPU (depth 4); on GPUs arbitrary.
BATCH_COLUMNS = {"cpu": 2048, "cuda": 65536, "mps": 16384}


# ---- items as trees ----


@dataclass(frozen=True)
class Tree:
    """Rows computed together. A branch begins with the trunk's last token, once more: see Branches."""

    item: int
    rows: dict[int, Row]  # by choice
    trunk: list[int]
    branches: list[list[int]]  # of each row; empty where the trunk is all that need be computed

    @property
    def branch_columns(self) -> int:
        return sum(map(len, self.branches))


def grow(item: int, rows: dict[int, Row]) -> list[Tree]:
    """
    One tree, or one per row where the rows share too little. No row needs its last token computed, which is only
    predicted; so choices of one token each are all scored at the trunk's end and need no branches.
    """
    shared = min(common_prefix([row.tokens for row in rows.values()]), *(row.start for row in rows.values()))
    longest = max(len(row.tokens) for row in rows.values())
    if len(rows) == 1 or shared < longest * MIN_SHARED:
        return [Tree(item, {i: row}, row.tokens[:-1], [[]]) for i, row in rows.items()]
    branches = [row.tokens[shared - 1 : -1] if len(row.tokens) > shared + 1 else [] for row in rows.values()]
    return [Tree(item, rows, next(iter(rows.values())).tokens[:shared], branches)]


def batches(trees: Sequence[Tree], max_columns: int) -> Iterator[list[Tree]]:
    """Trees of similar shape, together at most max_columns with the padding (a tree that has more comes alone)."""
    batch: list[Tree] = []
    trunk = branch = 0
    for tree in sorted(trees, key=lambda t: (t.branch_columns > 0, len(t.trunk), t.branch_columns), reverse=True):
        new_trunk, new_branch = max(trunk, len(tree.trunk)), max(branch, tree.branch_columns)
        if batch and (len(batch) + 1) * (new_trunk + new_branch) > max_columns:
            yield batch
            batch, new_trunk, new_branch = [], len(tree.trunk), tree.branch_columns
        batch.append(tree)
        trunk, branch = new_trunk, new_branch
    if batch:
        yield batch


class Branches:
    """
    What the model asks of a cache (gpt.Cache), for a batch of trees: positions, and who sees whom. It keeps no keys.

    The model mixes into each column something of the one before it (smear), which for the first token of a branch must
    be the trunk's last. So that stands there again; nobody sees this copy, and nothing is scored at it.
    """

    def __init__(self, trees: Sequence[Tree], P: int, T: int, columns_BQ: torch.Tensor, model: GPT):
        positions: list[int] = []
        owners: list[int] = []  # 0 the trunk, 1 … the branches, -1 copies and padding
        for tree in trees:
            shared, begin = len(tree.trunk), len(positions)
            positions.extend([*range(shared), *[0] * (P - shared)])
            owners.extend([0] * shared + [-1] * (P - shared))
            for i, branch in enumerate(tree.branches):
                positions.extend(range(shared - 1, shared - 1 + len(branch)))
                owners.extend([-1, *[i + 1] * (len(branch) - 1)] if branch else [])
            padding = begin + T - len(positions)
            positions.extend([0] * padding)
            owners.extend([-1] * padding)
        self.P, self.columns_BQ, self.last_layer = P, columns_BQ, model.config.n_layer - 1
        self.positions_BT = torch.tensor(positions, device=model.device).view(-1, T)
        self.owners_BT = torch.tensor(owners, device=model.device).view(-1, T)
        self.branches_BQ = torch.arange(P, T, device=model.device).expand(len(trees), -1)
        self.shortest = min(len(tree.trunk) for tree in trees)
        self.previous_B1C = torch.zeros((len(trees), 1, model.config.n_embd), device=model.device, dtype=model.dtype)
        self.masks: dict[int, torch.Tensor] = {}  # of the branches, by window

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        P, T = self.P, k.size(1)
        if layer == self.last_layer:  # only columns_BQ are wanted of it
            return attend_cached(q, k, v, self.mask(self.columns_BQ, 0, window))
        trunks = attend(q[:, :P], k[:, :P], v[:, :P], window)
        if P == T:
            return trunks
        first_key = max(0, self.shortest - window)  # no branch sees what is before it
        if window not in self.masks:
            self.masks[window] = self.mask(self.branches_BQ, first_key, window)
        branches = attend_cached(q[:, P:], k[:, first_key:], v[:, first_key:], self.masks[window])
        return torch.cat([trunks, branches], dim=1)

    def mask(self, columns_BQ: torch.Tensor, first_key: int, window: int) -> torch.Tensor:
        """True where one of these columns sees a key: (B, 1, Q, S), S the columns from first_key on."""
        positions_BQ, owners_BQ = (
            select_columns(self.positions_BT, columns_BQ),
            select_columns(self.owners_BT, columns_BQ),
        )
        distance = positions_BQ[..., None] - self.positions_BT[:, None, first_key:]
        keys_B1S = self.owners_BT[:, None, first_key:]
        # Copies and padding see one another: nobody looks at them, but a softmax over no key would be NaN.
        mask = ((keys_B1S == 0) | (keys_B1S == owners_BQ[..., None])) & (distance >= 0) & (distance <= window)
        return mask.unsqueeze(1)


@dataclass(frozen=True)
class RowScore:
    loss: float  # mean nats over the scored tokens
    all_likeliest: bool


def score(model: GPT, trees: Sequence[Tree]) -> Iterator[tuple[int, int, RowScore]]:
    """(item, choice, its score) of all rows of a batch. The last block and the logits compute nothing but these."""
    P = max(len(tree.trunk) for tree in trees)
    T = P + max(tree.branch_columns for tree in trees)
    tokens, columns, places, targets, counts = [], [], [], [], []
    for b, tree in enumerate(trees):
        shared, row_tokens = len(tree.trunk), tree.trunk + [0] * (P - len(tree.trunk))
        order: dict[int, int] = {}  # column that predicts a scored token → its place among them
        for row, branch in zip(tree.rows.values(), tree.branches, strict=True):
            offset = len(row_tokens) + 1 - shared  # after the copy of the trunk's last token
            for i in range(row.start - 1, row.stop - 1):
                places.append((b, order.setdefault(i if i < shared else i + offset, len(order))))
            targets.extend(row.tokens[row.start : row.stop])
            counts.append(row.stop - row.start)
            row_tokens.extend(branch)
        tokens.append(row_tokens + [0] * (T - len(row_tokens)))
        columns.append(list(order))
    Q = max(map(len, columns))
    columns_BQ = torch.tensor([row + [0] * (Q - len(row)) for row in columns], device=model.device)
    idx_BT = torch.tensor(tokens, device=model.device)
    states_BQC = model.hidden(idx_BT, Branches(trees, P, T, columns_BQ, model), columns_BQ)
    states_NC, targets_N = states_BQC[tuple(torch.tensor(places).T)], torch.tensor(targets, device=model.device)
    losses, hits = [], []
    for some_NC, their_N in zip(states_NC.split(LOGIT_ROWS), targets_N.split(LOGIT_ROWS), strict=True):
        logits_NV = model.logits(some_NC)
        losses.append(F.cross_entropy(logits_NV, their_N, reduction="none"))
        hits.append(logits_NV.argmax(dim=-1) == their_N)
    names = [(tree.item, choice) for tree in trees for choice in tree.rows]
    of_rows = zip(torch.cat(losses).cpu().split(counts), torch.cat(hits).cpu().split(counts), strict=True)
    for (item, choice), (loss, hit) in zip(names, of_rows, strict=True):
        yield item, choice, RowScore(loss.double().mean().item(), bool(hit.all()))


# ---- the scores ----


@torch.inference_mode()
def judge(
    model: GPT,
    tokenizer: Tokenizer,
    items: Sequence[tuple[CoreTask, int]],
    max_columns: int = 0,
    progress: Callable[[int], object] = lambda judged: None,
) -> list[bool]:
    """
    Whether the model is right, for each item (a task and the index of a row in it). max_columns is that of a forward
    pass, 0 = what suits the device. `progress` is told how many have been judged.
    """
    max_columns = max_columns or BATCH_COLUMNS[model.device.type]
    verdicts: list[bool] = []
    for first in range(0, len(items), WINDOW):
        window = items[first : first + WINDOW]
        rows = tokenize(tokenizer, window, model.config.sequence_len)
        trees = [tree for item, of_item in enumerate(rows) for tree in grow(item, of_item)]
        scores: list[dict[int, RowScore]] = [{} for _ in window]
        for batch in batches(trees, max_columns):
            for item, choice, row_score in score(model, batch):
                scores[item][choice] = row_score
        verdicts.extend(is_right(task, index, scores[i]) for i, (task, index) in enumerate(window))
        progress(len(verdicts))
    return verdicts


def is_right(task: CoreTask, index: int, scores: dict[int, RowScore]) -> bool:
    if task.kind == "language_modeling":
        return scores[0].all_likeliest
    return min(sorted(scores), key=lambda choice: scores[choice].loss) == task.rows[index]["gold"]


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[CoreTask],
    dist: Dist,
    max_columns: int = 0,
    progress: Callable[[int], object] = lambda judged: None,
) -> list[TaskScore]:
    """The score of each task; ranks share the items. `progress` is told how many this rank has judged."""
    items = [(task, index) for task in tasks for index in range(len(task))]
    verdicts = torch.zeros(len(items), device=dist.device)
    mine = judge(model, tokenizer, items[dist.rank :: dist.world_size], max_columns, progress)
    verdicts[dist.rank :: dist.world_size] = torch.tensor(mine, dtype=verdicts.dtype, device=dist.device)
    per_task = dist.sum(verdicts).cpu().split([len(task) for task in tasks])
    return [
        TaskScore(task.label, int(right.sum()), len(task), task.baseline)
        for task, right in zip(tasks, per_task, strict=True)
    ]


def save_scores(path: Path, scores: Sequence[TaskScore], model: str) -> None:
    """Writes <path>.csv and <path>.json."""
    core, margin = core_metric(scores)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["task", "correct", "total", "accuracy", "low", "high", "centered"])
    rows = [[s.label, s.correct, s.total, s.accuracy, *s.interval, s.centered] for s in scores]
    rows.append(["CORE", "", "", "", core - margin, core + margin, core])
    writer.writerows([[round(cell, 6) if isinstance(cell, float) else cell for cell in row] for row in rows])
    tasks = {
        s.label: {"interval": s.interval, "centered": s.centered, "accuracy": s.accuracy} | asdict(s) for s in scores
    }
    summary = {"model": model, "CORE": core, "margin": margin, "references": REFERENCES, "tasks": tasks}
    for suffix, text in ((".csv", table.getvalue()), (".json", json.dumps(summary, indent=1) + "\n")):
        with atomic_path(path.with_suffix(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")
