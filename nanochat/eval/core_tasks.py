"""
The 22 tasks of CORE (DCLM, https://arxiv.org/abs/2406.11794) as the evaluation bundle has them, and their prompts.

    tasks = load_tasks(resolve_bundle(), max_per_task=500)
    print(render(tasks[0], index=0)[0])

Three kinds of items: a context with several continuations (multiple_choice), several contexts with one continuation
(schema), and a context with its only continuation (language_modeling). Which prompts these become, and which of their
tokens count, is that of the public implementation, so that scores can be compared.
"""

import csv
import json
import os
import random
import shutil
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_path, base_dir
from nanochat.tokenizer import Tokenizer

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_NAME = "eval_bundle"
DOWNLOAD_ATTEMPTS = 3
DOWNLOAD_TIMEOUT = 30  # seconds without data
FIELDS = {  # what a row of each kind must have
    "multiple_choice": {"query", "choices", "gold"},
    "schema": {"context_options", "continuation", "gold"},
    "language_modeling": {"context", "continuation"},
}
SHUFFLE_SEED, FEWSHOT_SEED = 1337, 1234  # of the public implementation: others would give other prompts


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str  # a key of FIELDS
    num_fewshot: int
    delimiter: str  # between a context and what follows it
    baseline: float  # accuracy of guessing, 0 … 1
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Row:
    """A prompt in tokens, of which start … stop - 1 are scored."""

    tokens: list[int]
    start: int
    stop: int


# ---- the bundle ----


def resolve_bundle(directory: str = "", url: str = BUNDLE_URL) -> Path:
    """
    The bundle's folder: the argument, else $NANOCHAT_EVAL_BUNDLE, else the public one, fetched when it is first needed.
    UserError if it cannot be fetched or is none.
    """
    named = directory or os.environ.get("NANOCHAT_EVAL_BUNDLE")
    path = Path(named).expanduser() if named else base_dir() / BUNDLE_NAME
    if not named and not path.exists():
        download_bundle(url, path)
    if not (path / "core.yaml").exists():
        raise UserError(f"{path} has no core.yaml: name the folder of the evaluation bundle with --eval-bundle")
    return path


def download_bundle(url: str, path: Path) -> None:
    """Fetches and unpacks the bundle. The archive is removed also where it is no good: the next run fetches it anew."""
    archive, top = path.with_suffix(".zip"), f"{BUNDLE_NAME}/"
    _download(url, archive)
    try:
        with atomic_path(path) as folder, zipfile.ZipFile(archive) as contents:
            for member in contents.infolist():
                if member.filename.startswith(top) and member.filename != top:
                    member.filename = member.filename.removeprefix(top)
                    contents.extract(member, folder)
            (folder / "core.yaml").stat()
    except (zipfile.BadZipFile, zlib.error, EOFError, FileNotFoundError) as error:
        raise UserError(f"{url} gave no whole evaluation bundle ({error}): run the same command again") from error
    finally:
        archive.unlink()


def _download(url: str, path: Path) -> None:
    """Download a file under a temporary name and rename it. Raises UserError if every attempt fails."""
    message = ""
    for _ in range(DOWNLOAD_ATTEMPTS):
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response, atomic_path(path) as temporary:
                with temporary.open("wb") as file:
                    shutil.copyfileobj(response, file)
                if response.length:  # bytes of Content-Length still to come
                    raise ConnectionError("the connection broke off")
            return
        except OSError as error:  # HTTP errors and timeouts too
            message = str(error)
    raise UserError(f"{url} cannot be downloaded ({message}): check the network and run the same command again")


def load_tasks(bundle: Path, max_per_task: int = -1) -> list[CoreTask]:
    """
    The tasks of core.yaml, their rows shuffled and cut to max_per_task (-1 = all). UserError if a file cannot be read,
    a field is missing, or a task has too few rows for its few-shot examples; OSError if a file is missing.
    """
    import yaml

    try:
        with (bundle / "eval_meta_data.csv").open(encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        described = [(e["label"], e["icl_task_type"], e["num_fewshot"][0], e["dataset_uri"], e) for e in entries]
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{bundle}: core.yaml or eval_meta_data.csv is damaged ({error}): fetch the bundle anew"
        ) from error
    tasks = []
    for label, kind, num_fewshot, file_name, entry in described:
        if kind not in FIELDS or label not in baselines:
            raise UserError(f"{bundle}: {label} is of an unknown kind or has no baseline: fetch the bundle anew")
        rows = read_rows(bundle / "eval_data" / file_name, FIELDS[kind])
        random.Random(SHUFFLE_SEED).shuffle(rows)
        rows = rows if max_per_task < 0 else rows[:max_per_task]
        if len(rows) <= num_fewshot:
            remedy = "raise --max-per-task" if len(rows) == max_per_task else "fetch the bundle anew"
            raise UserError(
                f"{label} shows {num_fewshot} other items before each, so it needs {num_fewshot + 1} items "
                f"and has {len(rows)}: {remedy}"
            )
        delimiter = entry.get("continuation_delimiter", " ")
        tasks.append(CoreTask(label, kind, num_fewshot, delimiter, baselines[label], rows))
    return tasks


def read_rows(path: Path, fields: set[str]) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            rows = [dict(json.loads(line)) for line in file if line.strip()]
    except (ValueError, TypeError) as error:  # no UTF-8, no JSON, no object
        raise UserError(f"{path} is damaged ({error}): fetch the bundle anew") from error
    if missing := next((fields - row.keys() for row in rows if fields - row.keys()), None):
        raise UserError(f"{path}: a row lacks {', '.join(sorted(missing))}: fetch the bundle anew")
    return rows


# ---- from an item to its prompts, and what of them is scored ----


def render(task: CoreTask, index: int) -> list[str]:
    """
    The prompts of an item: one per choice or context, or for language modeling without and with the continuation.
    The few-shot examples are drawn from the task's other items, for each item anew.
    """
    others = range(len(task) - 1)  # sampled by position, so no list of the others need be made
    sampled = random.Random(FEWSHOT_SEED + index).sample(others, task.num_fewshot) if task.num_fewshot else []
    shots = "".join(solved(task, task.rows[i + (i >= index)]) + "\n\n" for i in sampled)
    row, delimiter = task.rows[index], task.delimiter
    if task.kind == "multiple_choice":
        return [f"{shots}{row['query']}{delimiter}{choice}" for choice in row["choices"]]
    if task.kind == "schema":
        return [f"{shots}{context}{delimiter}{row['continuation']}" for context in row["context_options"]]
    context = f"{shots}{row['context'].strip()}{delimiter}"
    # Without its last blanks, which with the continuation belong to the continuation's first token.
    return [context.strip(), context + row["continuation"]]


def solved(task: CoreTask, row: dict[str, Any]) -> str:
    """A row with its right answer."""
    if task.kind == "multiple_choice":
        return f"{row['query']}{task.delimiter}{row['choices'][row['gold']]}"
    if task.kind == "schema":
        return f"{row['context_options'][row['gold']]}{task.delimiter}{row['continuation']}"
    return f"{row['context'].strip()}{task.delimiter}{row['continuation']}"


def locate(kind: str, prompts: Sequence[list[int]]) -> list[Row]:
    """
    What is scored of an item's prompts, tokens with bos first: after the beginning that the choices share, the end that
    the contexts share, what the continuation adds. At least one token each: a choice with which another one begins
    would have none, and its last shared token counts then for all.
    """
    shortest = min(map(len, prompts))
    if kind == "multiple_choice":
        start = min(common_prefix(prompts), shortest - 1)
        return [Row(tokens, start, len(tokens)) for tokens in prompts]
    if kind == "schema":
        shared = min(max(common_prefix([tokens[::-1] for tokens in prompts]), 1), shortest - 1)
        return [Row(tokens, len(tokens) - shared, len(tokens)) for tokens in prompts]
    without, whole = prompts
    return [Row(whole, min(common_prefix(prompts), len(whole) - 1), len(whole))]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens at the beginning are the same in all."""
    first, last = min(sequences), max(sequences)  # in lexical order those between agree where these two do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def cut(row: Row, context: int) -> Row:
    """A row longer than the model's context loses its beginning. The first token that is left cannot be scored."""
    surplus = len(row.tokens) - context
    return row if surplus <= 0 else Row(row.tokens[surplus:], max(row.start - surplus, 1), context)


def tokenize(tokenizer: Tokenizer, items: Sequence[tuple[CoreTask, int]], context: int) -> Iterator[dict[int, Row]]:
    """The rows of each item by choice. A choice that repeats an earlier one is left out: it cannot win."""
    prompts = [render(task, index) for task, index in items]
    encoded = iter(tokenizer.encode_batch([prompt for of_item in prompts for prompt in of_item]))
    for (task, _), of_item in zip(items, prompts, strict=True):
        rows = locate(task.kind, [[tokenizer.bos, *next(encoded)] for _ in of_item])
        yield {i: cut(row, context) for i, row in enumerate(rows) if row not in rows[:i]}
