"""
Writes the report's files.

    <base>/report/report.html    everything on one page, which needs no other file
    <base>/report/report.md      the same as text; with plots if plots.py has drawn them

Names, settings and generated text come from files and models. In the page they are data, which its script turns into
text only; in report.md everything that Markdown or HTML could interpret is escaped.
"""

import html
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanochat.common import atomic_path, duration
from nanochat.logging import shown
from nanochat.report.reader import GPT2_NAME, differences, has_runs, labels, read_run

PAGE = Path(__file__).parent / "page.html"
DATA_ELEMENT = '<script type="application/json" id="data">'


def write_report(base: Path) -> None:
    """Writes report.html and report.md of what led to the newest model in a base folder; nothing if there is none."""
    if has_runs(base):
        write_files(base / "report", "report", [read_run(base)])


def write_files(folder: Path, name: str, runs: Sequence[dict[str, Any]], plots: Sequence[str] = ()) -> None:
    """Writes <name>.html and <name>.md about these runs. plots: names of images in the folder."""
    with atomic_path(folder / f"{name}.html") as temporary:
        temporary.write_text(page(data_of(runs)), encoding="utf-8")
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text(markdown(runs, plots), encoding="utf-8", errors="replace")  # lone surrogates


def data_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page draws."""
    return {"runs": runs, "differences": differences(runs) if len(runs) > 1 else []}


def page(data: dict[str, Any] | None) -> str:
    """The page with its data; None: the page that fetches them."""
    text = PAGE.read_text(encoding="utf-8")
    if data is None:
        return text
    return text.replace(DATA_ELEMENT, DATA_ELEMENT + to_json(data).replace("<", "\\u003c"), 1)


def to_json(data: Any) -> str:
    """JSON for a browser, which has no NaN and no infinity: they become null."""
    return json.dumps(finite(data), allow_nan=False, separators=(",", ":"))


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not -1e308 <= value <= 1e308:
        return None
    return value


# ---- report.md ----


def markdown(runs: Sequence[dict[str, Any]], plots: Sequence[str] = ()) -> str:
    """The report as text."""
    lines = [f"# {escape('Report: ' + ', '.join(labels(runs)))}", ""]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(runs[0]["written"]))
    lines += [f"As of {written}. The page report.html beside this file shows the same with charts.", ""]
    lines += [f"![{Path(plot).stem}]({plot})\n" for plot in plots]
    if len(runs) > 1:
        lines += comparison(runs)
    for label, run in zip(labels(runs), runs, strict=True):
        if len(runs) > 1:
            lines += [f"# {escape(label)}", ""]
        lines += describe_run(run)
    return "\n".join(lines).rstrip() + "\n"


def comparison(runs: Sequence[dict[str, Any]]) -> list[str]:
    names = labels(runs)
    rows = [[row["stage"], row["name"], *row["values"]] for row in differences(runs)]
    return ["## What differs in the settings", "", *table(["stage", "setting", *names], rows)]


def describe_run(run: dict[str, Any]) -> list[str]:
    lines = [f"> {escape(warning)}\n" for warning in run["warnings"]]
    rows = []
    for stage in run["stages"]:
        seconds = duration(stage["seconds"]) if "seconds" in stage else stage.get("numbers", {}).get("training time")
        rows.append([stage["title"], stage["status"], stage["message"], stage.get("step") or None, seconds])
    lines += ["## Stages", "", *table(["stage", "status", "message", "step", "time"], rows)]
    totals = run["totals"]
    if totals["hours"]:
        text = f"All sessions together: {duration(3600 * totals['hours'])}"
        if totals["gpu_hours"]:
            text += f", {totals['gpu_hours']:.2f} GPU-hours"
        if "cost" in totals:
            unit = "GPU-hour" if totals["gpu_hours"] else "hour"
            text += f", ${totals['cost']:.2f} at ${totals['price']:g} per {unit} ({totals['price_source']})"
        lines += [f"{text}.", ""]
    rows = [[stage["name"], *pair] for stage in run["stages"] for pair in stage.get("numbers", {}).items()]
    lines += ["## Results", "", *table(["stage", "result", "value"], rows)]
    lines += describe_core(run["core"]) + describe_chat(run["chat"]) + describe_tokenizer(run["tokenizer"])
    lines += describe_samples(run["stages"])
    return lines + describe_settings(run)


def describe_core(core: dict[str, Any]) -> list[str]:
    if not core:
        return []
    gpt2 = core["gpt2"]
    rows = [["CORE", core["core"], core["margin"], gpt2["core"]]]
    for task in core["tasks"]:
        low, high = task["interval"]
        margin = None if low is None or high is None else (high - low) / 2
        rows.append([task["label"], task["centered"], margin, gpt2["centered"].get(task["label"])])
    head = ["task (0 = guessing, 1 = all correct)", "this model", "± (95 %)", GPT2_NAME]
    return ["## CORE", "", *table(head, rows), f"{GPT2_NAME}: {escape(gpt2['source'])}.", ""]


def describe_chat(models: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for model in models:
        for label, score in model["scores"].items():
            rows.append([model["stage"], label, score.get("accuracy"), score.get("low"), score.get("high")])
    head = ["stage", "task", "accuracy", "low (95 %)", "high (95 %)"]
    return ["## Chat tasks", "", *table(head, rows)] if rows else []


def describe_tokenizer(tokenizer: dict[str, Any]) -> list[str]:
    results = tokenizer.get("results", {})
    names = list(dict.fromkeys(name for ratios in results.values() for name in ratios))
    rows = [[kind, *[ratios.get(name) for name in names]] for kind, ratios in results.items()]
    return ["## Tokenizer, bytes per token", "", *table(["text", *names], rows)] if rows else []


def describe_samples(stages: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for stage in stages:
        for samples in stage.get("samples", [])[-1:]:
            lines += [f"## Samples of {stage['name']} at step {samples['step']}", ""]
            for sample in samples["samples"]:
                completion = "".join(
                    part["text"] if part["type"] == "text" else f"[{part['text']}]" for part in sample["parts"]
                )
                lines += fenced(f"> {sample['prompt']}\n{completion}")
    return lines


def describe_settings(run: dict[str, Any]) -> list[str]:
    environment = {"commit": run["commit"] or None} | run["environment"]
    lines = ["## Environment", "", *table(["", ""], [list(pair) for pair in environment.items()])]
    lines += ["## Commands and settings", ""]
    for stage in run["stages"]:
        lines += [f"### {stage['title']}", ""]
        if stage.get("command"):
            lines += fenced(stage["command"])
        if stage.get("settings"):
            lines += table(["setting", "value"], [list(pair) for pair in stage["settings"].items()])
    return lines


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table, with an empty one at the end."""
    lines = [f"| {' | '.join(map(escape, head))} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join('' if cell is None else escape(shown(cell)) for cell in row)} |" for row in rows]
    return [*lines, ""]


def escape(text: str) -> str:
    """One line of text that Markdown and HTML show as it is."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*{}\[\]|#!~]|\b_|_\b)", r"\\\1", text)  # an underscore within a word means nothing


def fenced(text: str) -> list[str]:
    """A block of code with any text: its fence is longer than every row of backticks in it."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence, ""]
