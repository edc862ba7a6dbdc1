"""
The 22 tasks of CORE (DCLM, https://arxiv.org/abs/2406.11794): the evaluation bundle, and the prompts of its items.

    tasks = load_tasks(resolve_bundle(), max_per_task=500)
    print(render_prompts(tasks[0], index=0)[0])

An item becomes one prompt per choice. Some tokens of each prompt are scored, which depends on the kind of the task:

    kind                an item has                            scored tokens
    multiple_choice     one context, several continuations     the continuation
    schema              several contexts, one continuation     the end that all prompts have in common
    language_modeling   one context, one continuation          the continuation

Prompts and scored tokens are exactly those of the public implementation, so that scores can be compared.
"""

import csv
import os
import random
import shutil
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir, parse_json
from nanochat.progress import Bar
from nanochat.tokenizer import Tokenizer

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_NAME = "eval_bundle"
DOWNLOAD_AGAIN = "download the bundle again"
DOWNLOAD_TIMEOUT = 30  # seconds without data
DOWNLOAD_ATTEMPTS = 3
MAX_RETRY_AFTER = 60.0  # seconds; servers ask for less
FIELDS = {  # an item of each kind must have these
    "multiple_choice": {"query", "choices", "gold"},
    "schema": {"context_options", "continuation", "gold"},
    "language_modeling": {"context", "continuation"},
}
SHUFFLE_SEED, FEWSHOT_SEED = 1337, 1234  # as in the public implementation, so that the prompts are the same


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str  # a key of FIELDS
    num_fewshot: int  # solved examples before each item
    delimiter: str  # between a context and its continuation
    baseline: float  # accuracy of guessing, 0 … 1
    items: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class ScoredPrompt:
    """The tokens of a prompt. Those from start to stop - 1 are scored."""

    tokens: list[int]
    start: int
    stop: int


# ---- the bundle ----


def resolve_bundle(directory: str = "", url: str = BUNDLE_URL) -> Path:
    """
    Returns the folder of the bundle: the argument, else $NANOCHAT_EVAL_BUNDLE, else the public bundle, which is
    downloaded on first use. Raises UserError if it cannot be downloaded or the folder is not a bundle.
    """
    chosen = directory or os.environ.get("NANOCHAT_EVAL_BUNDLE")
    path = Path(chosen).expanduser() if chosen else base_dir() / BUNDLE_NAME
    if not chosen and not path.exists():
        download_bundle(url, path)
    if not (path / "core.yaml").exists():
        raise UserError(f"{path} has no core.yaml: pass the folder of the evaluation bundle with --eval-bundle")
    return path


def download_bundle(url: str, path: Path) -> None:
    """
    Downloads and unpacks the bundle, in up to DOWNLOAD_ATTEMPTS attempts. Raises UserError if it cannot be downloaded
    or the archive is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
        try:
            _download_once(url, path)
            return
        except (OSError, HTTPException, ValueError) as error:  # HTTP errors and timeouts are OSErrors
            problem, seconds = f"cannot be downloaded ({error})", _seconds_to_wait(error)
        except (shutil.ReadError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            problem, seconds = f"is not a complete bundle ({error})", 0.0
        if seconds is None or attempt == DOWNLOAD_ATTEMPTS:
            raise UserError(f"{url} {problem}: check the network and run the same command again")
        time.sleep(seconds)


def _download_once(url: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        archive = Path(folder) / "bundle.zip"
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response, archive.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0))
            with Bar("downloading the tasks of CORE", size / 1e6, unit="MB") as bar:
                while block := response.read(2**18):
                    file.write(block)
                    bar.update(file.tell() / 1e6)
        shutil.unpack_archive(archive, folder)  # compares the checksum of each file
        if not (Path(folder) / BUNDLE_NAME / "core.yaml").exists():
            raise EOFError("it has no core.yaml")
        os.replace(Path(folder) / BUNDLE_NAME, path)


def _seconds_to_wait(error: Exception) -> float | None:
    """How long to wait before the next attempt; None if another one would fail too."""
    if not isinstance(error, urllib.error.HTTPError):
        return 1.0
    if error.code < 500 and error.code not in (408, 429):  # such as 404, not found
        return None
    retry_after = error.headers.get("Retry-After", "")
    return min(float(retry_after), MAX_RETRY_AFTER) if retry_after.isdecimal() else 1.0


def load_tasks(bundle: Path, max_per_task: int = -1) -> list[CoreTask]:
    """
    Loads the tasks of core.yaml. The items of each task are shuffled and limited to max_per_task (-1 = all). Raises
    UserError if a file is missing or damaged, or a task has too few items for its few-shot examples.
    """
    import yaml

    try:
        with (bundle / "eval_meta_data.csv").open(encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: _baseline(row["Random baseline"]) for row in csv.DictReader(file)}
        entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        tasks = [_load_task(bundle, entry, baselines, max_per_task) for entry in entries]
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError, csv.Error, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # messages of yaml have several lines
        raise UserError(f"{bundle}: core.yaml or eval_meta_data.csv is damaged ({reason}): {DOWNLOAD_AGAIN}") from error
    return tasks


def _baseline(percent: str) -> float:
    baseline = float(percent) / 100
    if not 0 <= baseline < 1:
        raise ValueError(f"a baseline of {percent} %")
    return baseline


def _load_task(bundle: Path, entry: dict[str, Any], baselines: dict[str, float], max_per_task: int) -> CoreTask:
    label = entry["label"]
    kind = entry["icl_task_type"]
    num_fewshot = entry["num_fewshot"][0]
    delimiter = entry.get("continuation_delimiter", " ")
    if kind not in FIELDS or label not in baselines:
        raise UserError(f"{bundle}: {label} has an unknown kind or no baseline: {DOWNLOAD_AGAIN}")
    if type(num_fewshot) is not int or num_fewshot < 0 or not isinstance(delimiter, str):
        raise UserError(f"{bundle}: num_fewshot or continuation_delimiter of {label} is not usable: {DOWNLOAD_AGAIN}")
    items = read_items(bundle / "eval_data" / entry["dataset_uri"], kind)
    random.Random(SHUFFLE_SEED).shuffle(items)
    if max_per_task >= 0:
        items = items[:max_per_task]
    if len(items) <= num_fewshot:
        remedy = "raise --max-per-task" if len(items) == max_per_task else DOWNLOAD_AGAIN
        raise UserError(
            f"{label} needs {num_fewshot + 1} items, because each prompt starts with {num_fewshot} other items, "
            f"but it has {len(items)}: {remedy}"
        )
    return CoreTask(label, kind, num_fewshot, delimiter, baselines[label], items)


def read_items(path: Path, kind: str) -> list[dict[str, Any]]:
    """Reads a file of items, one JSON object per line. Raises UserError if it is missing or one of them is damaged."""
    try:
        with path.open(encoding="utf-8") as file:
            items = [dict(parse_json(line)) for line in file if line.strip()]
    except (OSError, ValueError, TypeError) as error:  # not there, not UTF-8, not JSON, not an object
        raise UserError(f"{path} is missing or damaged ({error}): {DOWNLOAD_AGAIN}") from error
    for item in items:
        if problem := _problem(item, kind):
            raise UserError(f"{path}: {problem}: {DOWNLOAD_AGAIN}")
    return items


def _problem(item: dict[str, Any], kind: str) -> str:
    """What is wrong with an item; "" if nothing."""
    missing = FIELDS[kind] - item.keys()
    if missing:
        return f"an item lacks {', '.join(sorted(missing))}"
    texts = [item[name] for name in ("query", "context", "continuation") if name in FIELDS[kind]]
    if kind != "language_modeling":
        options = item["choices" if kind == "multiple_choice" else "context_options"]
        if not isinstance(options, list) or type(item["gold"]) is not int or not 0 <= item["gold"] < len(options):
            return f"{item['gold']!r:.50} is not the number of a choice"
        texts += options
    if not all(isinstance(text, str) for text in texts):
        return "a text of an item is not a string"
    return ""


# ---- from an item to its prompts and their scored tokens ----


def render_prompts(task: CoreTask, index: int) -> list[str]:
    """
    Renders the prompts of an item: one per continuation or context; for language modeling one without and one with the
    continuation. The few-shot examples are sampled from the task's other items.
    """
    examples = ""
    num_others = len(task) - 1
    for number in random.Random(FEWSHOT_SEED + index).sample(range(num_others), task.num_fewshot):
        other = number if number < index else number + 1  # the number counts the other items, without this one
        examples += render_solved(task, task.items[other]) + "\n\n"
    item, delimiter = task.items[index], task.delimiter
    if task.kind == "multiple_choice":
        return [f"{examples}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{examples}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    context = f"{examples}{item['context'].strip()}{delimiter}"
    # Spaces at the end are stripped: with the continuation, they become part of the continuation's first token.
    return [context.strip(), context + item["continuation"]]


def render_solved(task: CoreTask, item: dict[str, Any]) -> str:
    """Renders an item with its correct continuation, as a few-shot example."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"


def locate_scored_tokens(kind: str, prompts: Sequence[list[int]]) -> list[ScoredPrompt]:
    """
    Finds the scored tokens of an item's prompts (tokens, BOS first).

    Multiple choice: everything after the longest common prefix. Schema: the longest common suffix. Language modeling:
    what the second prompt adds to the first.

    At least one token of each prompt is scored. If one choice is the beginning of another, it has no tokens after the
    common prefix; then the last token of the prefix is scored too, in all prompts.
    """
    shortest = min(len(tokens) for tokens in prompts)
    if kind == "multiple_choice":
        start = min(common_prefix_length(prompts), shortest - 1)
        return [ScoredPrompt(tokens, start, len(tokens)) for tokens in prompts]
    if kind == "schema":
        num_common = common_prefix_length([tokens[::-1] for tokens in prompts])
        num_scored = min(max(num_common, 1), shortest - 1)
        return [ScoredPrompt(tokens, len(tokens) - num_scored, len(tokens)) for tokens in prompts]
    _, whole = prompts
    start = min(common_prefix_length(prompts), len(whole) - 1)
    return [ScoredPrompt(whole, start, len(whole))]


def common_prefix_length(sequences: Sequence[list[int]]) -> int:
    """Returns how many tokens at the beginning are the same in all sequences."""
    return len(os.path.commonprefix(sequences))  # works for lists too, not only for paths


def truncate_left(prompt: ScoredPrompt, max_tokens: int) -> ScoredPrompt:
    """Drops the beginning of a prompt that is too long. The first token that remains cannot be scored."""
    surplus = len(prompt.tokens) - max_tokens
    if surplus <= 0:
        return prompt
    return ScoredPrompt(prompt.tokens[surplus:], max(prompt.start - surplus, 1), max_tokens)


def tokenize_items(
    tokenizer: Tokenizer, items: Sequence[tuple[CoreTask, int]], max_tokens: int
) -> Iterator[dict[int, ScoredPrompt]]:
    """
    Yields the prompts of each item (a task and an index), by choice. Prompts of more than max_tokens are cut at the
    beginning. A choice that repeats an earlier one is left out, because on a tie the earlier one wins.
    """
    texts = [render_prompts(task, index) for task, index in items]
    encoded = iter(tokenizer.encode_batch([text for item_texts in texts for text in item_texts]))
    for (task, _), item_texts in zip(items, texts, strict=True):
        tokens = [[tokenizer.bos, *next(encoded)] for _ in item_texts]
        prompts = locate_scored_tokens(task.kind, tokens)
        yield {
            choice: truncate_left(prompt, max_tokens)
            for choice, prompt in enumerate(prompts)
            if prompt not in prompts[:choice]
        }
