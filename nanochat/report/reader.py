"""
Reads what the stages have logged into one plain data structure, the input of the page and of report.md.

    run = read_run(base)                       # what led to the newest model in this base folder
    run = read_run(base, "d12")                # to the models of this tag

Absent files and fields are left out; whatever cannot be read is named in run["warnings"]. The files are described in
nanochat/logging.py (metrics, final numbers) and sessions.py. The keys of the result are listed at read_run.
"""

import functools
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.cards import find_card
from nanochat.checkpoint_manager import STAGES
from nanochat.common import UserError, atomic_path, parse_json
from nanochat.eval.core_tasks import BUNDLE_NAME
from nanochat.report.sessions import is_running, sessions_file

TRAINING = {script: stage for stage, (_, script) in STAGES.items()}  # script → stage, in the order of the pipeline
TITLES = {  # of all stages, in the order of the pipeline
    "tok_train": "Tokenizer",
    "base_train": "Pretraining",
    "base_eval": "Evaluation of the base model",
    "mid_train": "Midtraining",
    "chat_sft": "Supervised fine-tuning",
    "chat_rl": "Reinforcement learning",
    "chat_eval": "Evaluation of the chat model",
}
TYPES = {  # of fields of lines of JSON: a line with another type counts as damaged
    "command": str,
    "commit": str,
    "config": dict,
    "environment": dict,
    "flags": dict,
    "gpus": int,
    "limits": list,
    "numbers": dict,
    "process": list,
    "samples": list,
    "scores": dict,
    "session": str,
    "stage": str,
}
MAX_LEVELS = 8  # of nesting in a line of JSON; ours have five
AXES = ("seconds", "elapsed", "tokens", "flops")  # fields of a line that other fields are drawn against, besides step
MAX_POINTS = 600  # of a curve, and a fifth of that for learning rates: what a screen can show
MAX_KNOTS = 200  # of the axes, which are all but straight lines
NUM_CHATS = 3
MAX_SAMPLES = 12  # of the sets of samples, from first to last
# Centered accuracies of GPT-2 XL in CORE. The bundle of tasks comes with a table of all 22. If it is not here, these
# six remain, published in dev/estimate_gpt3_core.ipynb of nanochat (January 2026) as accuracies with three digits.
GPT2_FILE = "openai-community-gpt2-xl.csv"
GPT2_NAME = "GPT-2 XL (1.5B)"
GPT2_CORE = 0.256525
GPT2_TASKS = {  # task → accuracy, accuracy of guessing
    "hellaswag_zeroshot": (0.502, 0.25),
    "lambada_openai": (0.523, 0.0),
    "hellaswag": (0.512, 0.25),
    "piqa": (0.725, 0.5),
    "arc_easy": (0.595, 0.25),
    "arc_challenge": (0.299, 0.25),
}


# ---- files of JSON lines ----


@dataclass(frozen=True)
class Lines:
    """The lines of a file with JSON objects; those that are damaged are counted and left out."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)  # line numbers from 1
    modified: float = 0.0


def read_lines(path: Path) -> Lines:
    """A file with one JSON object per line; empty if there is no such file. A file that did not change is kept."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return Lines()
    return _read_lines(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)  # the server reads the files of a run every few seconds, and most do not change
def _read_lines(path: Path, modified_ns: int, size: int) -> Lines:
    found = Lines(modified=modified_ns / 1e9)
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and is_valid(value):
            found.lines.append(value)
        elif number < text.count("\n") + 1 or text.endswith("\n"):  # a last line without its end is being written
            found.damaged.append(number)
    return found


def is_valid(line: dict[str, Any]) -> bool:
    """Whether the fields that this module knows have their types, and others are not nested deeply."""
    has_types = all(isinstance(line[name], kind) for name, kind in TYPES.items() if name in line)
    return has_types and all(is_shallow(value) for value in line.values() if isinstance(value, dict | list))


def is_shallow(value: Any, levels: int = MAX_LEVELS) -> bool:
    """Whether lists and objects are nested at most this deeply."""
    if not isinstance(value, dict | list):
        return True
    return levels > 0 and all(is_shallow(inner, levels - 1) for inner in as_list(value))


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is an object of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The values of a list or of an object of JSON; of anything else none."""
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return type(value) in (int, float) and -1e300 < value < 1e300  # bool is an int too; NaN compares false


def round_value(value: float) -> float:
    """Six significant digits: more cannot be seen, and they would double the size of the page."""
    return float(f"{value:.6g}")


# ---- one training stage ----


@dataclass(frozen=True)
class TrainingLog:
    """The metrics file of one training stage of one tag."""

    script: str
    tag: str
    path: Path

    @property
    def lines(self) -> Lines:
        return read_lines(self.path)

    @property
    def head(self) -> dict[str, Any]:
        """The first line, which describes the run; empty if it is damaged."""
        return next((line for line in self.lines.lines if isinstance(line.get("config"), dict)), {})

    @property
    def parent(self) -> tuple[str, str] | None:
        """(script, tag) of the run whose model this one started from; None for pretraining."""
        base = self.head.get("config", {}).get("base")
        if not isinstance(base, str) or not base:
            return None
        folders = {folder: script for folder, script in STAGES.values()}
        path = Path(base)
        script = folders.get(path.parent.parent.name)
        return (script, path.parent.name) if script else None


def find_logs(base: Path) -> dict[tuple[str, str], TrainingLog]:
    """
    The metrics files of all training stages by (script, tag). A run that has not saved a checkpoint yet, while an
    earlier run of its tag still holds the name, has the tag "<tag> (new)".
    """
    logs = {}
    for path in sorted((base / "report" / "metrics").glob("*")):
        name = path.name
        match = re.fullmatch(r"(\.?)(\w+?)-(.+)\.jsonl(\.new)?", name)
        if not match or match[2] not in TRAINING or bool(match[1]) != bool(match[4]):
            continue
        tag = f"{match[3]} (new)" if match[4] else match[3]
        logs[match[2], tag] = TrainingLog(match[2], tag, path)
    return logs


def lineage(logs: dict[tuple[str, str], TrainingLog], tag: str) -> dict[str, TrainingLog]:
    """The stages of a tag by script, in the order of the pipeline, with the earlier stages that they started from."""
    found = {script: log for (script, name), log in logs.items() if name == tag}
    if tag.endswith(" (new)"):  # its other stages have the tag itself
        found = {script: log for (script, name), log in logs.items() if name == tag.removesuffix(" (new)")} | found
    for script in reversed(TRAINING):
        if script in found:
            parent = found[script].parent
            if parent and parent in logs and parent[0] not in found:
                found[parent[0]] = logs[parent]
    return {script: found[script] for script in TRAINING if script in found}


def decimate(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """
    At most `limit` of the points, in order: the lowest and the highest of each of limit / 2 equal parts, so that no
    spike is lost; always the first and the last one.
    """
    if len(points) <= limit:
        return list(points)
    num_parts = max(1, (limit - 2) // 2)
    kept = {0, len(points) - 1}
    for part in range(num_parts):
        start, stop = part * len(points) // num_parts, (part + 1) * len(points) // num_parts
        kept.add(min(range(start, stop), key=lambda i: points[i][1]))
        kept.add(max(range(start, stop), key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def read_curves(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Every number that was logged per step: name → {"step": [...], "value": [...]}, at most MAX_POINTS of them."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        step = line.get("step")
        if not is_number(step):
            continue
        for name, value in line.items():
            if name != "step" and name not in AXES and is_number(value):
                points.setdefault(name, []).append((float(step), value))  # type: ignore[arg-type]
    curves = {}
    for name, pairs in points.items():
        pairs.sort(key=lambda pair: pair[0])  # out of order if two processes have written to the file
        kept = decimate(pairs, MAX_POINTS // 5 if name.startswith("lr/") else MAX_POINTS)
        curves[name] = {"step": [step for step, _ in kept], "value": [round_value(value) for _, value in kept]}
    return curves


def read_axes(lines: Iterable[dict[str, Any]], tokens_per_step: float) -> dict[str, list[float]]:
    """
    What each step is in tokens, FLOPs and hours, at up to MAX_KNOTS steps: {"step": [...], "tokens": [...], …}. An axis
    that is not logged is absent. tokens_per_step: for logs without tokens; 0 = not known.
    """
    logged = sorted((line for line in lines if is_number(line.get("step"))), key=lambda line: line["step"])
    stride = max(1, math.ceil(len(logged) / MAX_KNOTS))
    knots = logged[::stride]
    if logged and knots[-1] is not logged[-1]:
        knots.append(logged[-1])
    axes = {"step": [knot["step"] for knot in knots]}
    for name, source in (("tokens", "tokens"), ("flops", "flops"), ("hours", "elapsed"), ("hours", "seconds")):
        if name not in axes and knots and all(is_number(knot.get(source)) for knot in knots):
            scale = 3600 if name == "hours" else 1
            axes[name] = [round_value(knot[source] / scale) for knot in knots]
    if "tokens" not in axes and tokens_per_step:
        axes["tokens"] = [step * tokens_per_step for step in axes["step"]]
    return axes


def read_samples(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sets of samples over training, at most MAX_SAMPLES: {"step": …, "samples": [{"prompt", "parts"}, …]}."""
    sets = []
    for line in lines:
        samples = line.get("samples")
        if isinstance(samples, list) and samples:
            read = [read_sample(sample) for sample in samples if isinstance(sample, dict)]
            sets.append({"step": line.get("step", 0), "samples": read})
    if len(sets) > MAX_SAMPLES:
        sets = [sets[round(i * (len(sets) - 1) / (MAX_SAMPLES - 1))] for i in range(MAX_SAMPLES)]
    return sets


def read_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A prompt without special tokens and its completion as parts, of the kinds text, python and python_output."""
    prompt = re.sub(r"<\|\w+\|>", " ", str(sample.get("prompt", ""))).strip()
    return {"prompt": prompt, "parts": split_parts(str(sample.get("completion", sample.get("answer", ""))))}


def split_parts(text: str) -> list[dict[str, str]]:
    """
    The parts of a completion that was decoded with its special tokens.

    >>> split_parts("<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>It is 2.<|assistant_end|>")
    [{'type': 'python', 'text': '1+1'}, {'type': 'python_output', 'text': '2'}, {'type': 'text', 'text': 'It is 2.'}]
    """
    kinds = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
    parts = []
    kind = "text"
    for piece in re.split(r"(<\|\w+\|>)", text):
        if re.fullmatch(r"<\|\w+\|>", piece):
            kind = kinds.get(piece, "text")
        elif piece:
            parts.append({"type": kind, "text": piece})
    return parts


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("recipe.model.n_embd", 256) and so on, for the leaves of nested objects."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            name = item.get("name", i) if isinstance(item, dict) else i
            yield from flatten(item, f"{prefix}.{name}")
    else:
        yield prefix, value


def read_training(log: TrainingLog, base: Path) -> dict[str, Any]:
    """What a training stage has logged."""
    head, lines = log.head, log.lines.lines
    config = head.get("config", {})
    batch = as_dict(config.get("settings")).get("total_batch_size", 0) if log.script != "chat_rl" else 0
    steps = [line["step"] for line in lines if is_number(line.get("step"))]
    num_steps = head.get("num_steps") or as_dict(config.get("recipe")).get("num_iterations", 0)
    curves = read_curves(lines)
    return {
        "tag": log.tag,
        "step": max(steps, default=0),
        "num_steps": num_steps if is_number(num_steps) else 0,
        "device": device_name(head),
        "curves": curves,
        "axes": read_axes(lines, batch if is_number(batch) else 0),
        "samples": read_samples(lines),
        "settings": {name: value for name, value in flatten(config) if not name.startswith("recipe.groups.")},
        "groups": read_groups(config),
        "numbers": final_numbers(base, log.script, log.tag) or last_values(curves, max(steps, default=0)),
        "modified": log.lines.modified,
    }


def last_values(curves: dict[str, Any], step: int) -> dict[str, Any]:
    """In place of final numbers, whose file holds the newest run only: the last loss, gradient norm and so on."""
    values = {name: curve["value"][-1] for name, curve in curves.items() if curve["value"]}
    return {name: value for name, value in values.items() if not name.startswith("lr/")} | {"steps": step}


def device_name(head: dict[str, Any]) -> str:
    count = head.get("world_size", 1)
    device = head.get("device", "")
    return f"{count} x {device}" if device and count != 1 else str(device)


def read_groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups of the recipe with their learning rates."""
    groups = as_list(as_dict(config.get("recipe")).get("groups"))
    return [group for group in groups if isinstance(group, dict) and "name" in group]


def final_numbers(base: Path, script: str, tag: str) -> dict[str, Any]:
    """The final numbers of a stage, if they are those of this tag."""
    numbers = read_json(base / "report" / f"{script}.json")
    model = numbers.get("model")
    if isinstance(model, str) and Path(model).parent.name != tag:
        return {}
    return {name: value for name, value in numbers.items() if name != "time"}


def all_final_numbers(base: Path) -> dict[str, dict[str, Any]]:
    """The final numbers of every stage that has run in a base folder, of whichever tag it was run last."""
    scripts = [name for name in TITLES if name != "chat_eval"] + [f"chat_eval_{stage}" for stage in STAGES]
    found = {script: read_json(base / "report" / f"{script}.json") for script in scripts if script != "tok_eval"}
    return {script: numbers for script, numbers in found.items() if numbers}


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object; empty if it is absent or damaged."""
    try:
        value = as_dict(parse_json(path.read_bytes()))
    except (OSError, ValueError):
        return {}
    return value if is_shallow(value) else {}


# ---- evaluations ----


def read_evaluations(base: Path, script: str, tag: str) -> list[dict[str, Any]]:
    """The evaluations of a tag's models, in the order of time."""
    lines = read_lines(base / "report" / "metrics" / f"{script}-{tag}.jsonl").lines
    found = []
    for line in lines:
        scores = {label: as_dict(score) for label, score in as_dict(line.get("scores")).items()}
        found.append(line | {"scores": scores, "limits": line.get("limits", []), "numbers": line.get("numbers", {})})
    return found


def read_core(base: Path, tag: str) -> dict[str, Any]:
    """The last evaluation of CORE, beside GPT-2's published scores; empty if there is none."""
    evaluations = [line for line in read_evaluations(base, "base_eval", tag) if line.get("scores")]
    if evaluations:
        last = evaluations[-1]
        core, margin, scores = last["numbers"].get("CORE"), last["numbers"].get("CORE ±"), last["scores"]
        details = ", ".join(map(str, last["limits"]))
    else:  # written before evaluations had a history
        files = sorted((base / "base_eval").glob(f"base-{tag}-*.json"), key=lambda path: path.stat().st_mtime)
        saved = read_json(files[-1]) if files else {}
        if not isinstance(saved.get("tasks"), dict):
            return {}
        core, margin, details = saved.get("CORE"), saved.get("margin"), ""
        scores = {label: as_dict(score) for label, score in saved["tasks"].items()}
        for score in scores.values():
            score["low"], score["high"] = (as_list(score.get("interval")) + [None, None])[:2]
    if not (is_number(core) and is_number(margin)):
        return {}
    tasks = []
    for label, score in scores.items():
        known = {name: value for name, value in score.items() if is_number(value)}
        interval = [center(known.get(name), known.get("baseline", 0.0)) for name in ("low", "high")]
        tasks.append(known | {"label": label, "centered": known.get("centered"), "interval": interval})
    return {"core": core, "margin": margin, "limits": details, "tasks": tasks, "gpt2": read_gpt2(base)}


def center(accuracy: Any, baseline: float) -> float | None:
    """The accuracy rescaled so that guessing is 0 and all correct is 1; None if it is not known."""
    return (accuracy - baseline) / (1 - baseline) if is_number(accuracy) and baseline != 1 else None


def read_gpt2(base: Path) -> dict[str, Any]:
    """GPT-2's scores: {"name", "core", "centered": {task: score}, "source"}."""
    for folder in (os.environ.get("NANOCHAT_EVAL_BUNDLE", ""), str(base / BUNDLE_NAME)):
        path = Path(folder).expanduser() / GPT2_FILE
        if folder and path.is_file():
            return {"name": GPT2_NAME, "core": GPT2_CORE, "centered": read_gpt2_table(path), "source": GPT2_FILE}
    centered = {label: center(*pair) for label, pair in GPT2_TASKS.items()}
    source = "nanochat, dev/estimate_gpt3_core.ipynb: six of the 22 tasks"
    return {"name": GPT2_NAME, "core": GPT2_CORE, "centered": centered, "source": source}


def read_gpt2_table(path: Path) -> dict[str, float]:
    """The third column, centered accuracy, of a table with the columns Task, Accuracy, Centered."""
    centered = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        try:
            centered[cells[0]] = float(cells[2])
        except (IndexError, ValueError):  # the head, an empty line
            continue
    return centered


def read_chat(base: Path, logs: dict[str, TrainingLog]) -> list[dict[str, Any]]:
    """The last full evaluation of the model of each stage: {"stage", "step", "limits", "numbers", "scores"}."""
    found: dict[str, dict[str, Any]] = {}
    tags = {TRAINING[script]: log.tag for script, log in logs.items()}
    for tag in dict.fromkeys(tags.values()):
        for line in read_evaluations(base, "chat_eval", tag):
            stage = str(line.get("stage"))
            if tags.get(stage) == tag and line["scores"]:
                known = found.get(stage, {"scores": {}, "numbers": {}})
                is_same = known.get("model") == line.get("model") and known.get("limits") == line.get("limits")
                scores = known["scores"] | line["scores"] if is_same else line["scores"]  # evaluated task by task
                numbers = known["numbers"] | line["numbers"] if is_same else line["numbers"]
                found[stage] = line | {"scores": scores, "numbers": numbers}
    for script, log in logs.items():
        stage = TRAINING[script]
        if stage not in found:
            scores = earlier_scores(final_numbers(base, f"chat_eval_{stage}", log.tag))
            if scores:
                found[stage] = {"stage": stage, "step": None, "limits": [], "numbers": {}, "scores": scores}
    keys = ("stage", "step", "limits", "numbers", "scores")
    return [{key: found[stage].get(key) for key in keys} for stage in STAGES if stage in found]


def earlier_scores(numbers: dict[str, Any]) -> dict[str, Any]:
    """The scores by task of evaluations that have no history, from their final numbers."""
    scores = {}
    for name, interval in numbers.items():
        task = name.removesuffix(", interval")
        bounds = re.fullmatch(r"(\d\.\d+) to (\d\.\d+)", str(interval))
        if bounds and is_number(numbers.get(task)):
            scores[task] = {"accuracy": numbers[task], "low": float(bounds[1]), "high": float(bounds[2])}
    return scores


def read_chats(base: Path, stages: Sequence[dict[str, Any]], logs: dict[str, TrainingLog]) -> dict[str, Any]:
    """
    A few exchanges with the last chat model: {"title", "step", "samples"}. They are its last samples or, if it has
    none, the first question of each task that it was evaluated on. Empty if there is neither.
    """
    for stage in reversed(stages):
        if stage["name"] in TRAINING and stage["name"] != "base_train" and stage.get("samples"):
            last = stage["samples"][-1]
            return {"title": stage["title"], "step": last["step"], "samples": last["samples"][:NUM_CHATS]}
    for script, log in reversed(logs.items()):
        folders = (base / "report" / "chat_eval").glob(f"{TRAINING[script]}-{log.tag}-*")
        for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
            first = [read_lines(file).lines[:1] for file in sorted(folder.glob("*.jsonl"))]
            samples = [read_sample(line) for lines in first for line in lines if line.get("answer")]
            if samples:
                return {"title": TITLES[script], "step": None, "samples": samples[:NUM_CHATS]}
    return {}


# ---- sessions ----


def read_sessions(base: Path) -> list[dict[str, Any]]:
    """The sessions in the order of their starts, each with its "status", "seconds" and "tag" ("" = not known)."""
    sessions: dict[str, dict[str, Any]] = {}
    for line in read_lines(sessions_file(base)).lines:
        name = str(line.get("session"))
        if "stage" in line and is_number(line.get("time")):
            sessions[name] = dict(line)
        elif name in sessions and is_number(line.get("time")):
            ended = {"ended": line["time"], "status": line.get("end"), "message": line.get("message", "")}
            sessions[name] |= ended | {key: line[key] for key in ("gpu",) if key in line}
    for started in sessions.values():
        started["tag"] = tag_of(started)
        if "ended" in started:
            started["seconds"] = max(0.0, started["ended"] - started["time"])
        elif is_running(started):
            started |= {"status": "running", "message": "", "seconds": time.time() - started["time"]}
        else:
            message = "the process no longer exists and has recorded no end: it was killed, or the machine went down"
            started |= {"status": "killed", "message": message, "seconds": last_sign(base, started) - started["time"]}
    return list(sessions.values())


def tag_of(session: dict[str, Any]) -> str:
    """The tag that a session works on, as far as its flags tell; else empty."""
    flags = session.get("flags", {})
    tag = flags.get("model_tag") or flags.get("base_tag") or ""
    if not tag and session["stage"] == "base_train":
        tag = f"d{flags.get('depth')}"
    return str(tag)


def last_sign(base: Path, session: dict[str, Any]) -> float:
    """The last time at which a killed session is known to have run: the last line of a metrics file of its stage."""
    folder = base / "report" / "metrics"
    files = [
        *folder.glob(f"{session['stage']}-{session['tag'] or '*'}.jsonl"),
        *folder.glob(f".{session['stage']}-*.new"),
    ]
    times = [path.stat().st_mtime for path in files]
    return max([session["time"], *[modified for modified in times if modified >= session["time"]]])


def total_time(sessions: Sequence[dict[str, Any]], price: float) -> dict[str, Any]:
    """
    Hours, GPU-hours and cost of all sessions together. price: dollars per GPU-hour, on a machine without GPUs per hour;
    0 = the typical one of the card, from nanochat/cards.py.
    """
    seconds = sum(session["seconds"] for session in sessions)
    gpu_seconds = sum(session["seconds"] * session.get("gpus", 0) for session in sessions)
    totals: dict[str, Any] = {"hours": seconds / 3600, "gpu_hours": gpu_seconds / 3600}
    card = next((find_card(str(session["gpu"])) for session in reversed(sessions) if session.get("gpu")), None)
    if price:
        totals["price"], totals["price_source"] = price, "--price"
    elif card and gpu_seconds:
        totals["price"], totals["price_source"] = card.dollars_per_hour, f"typical for {card.name}, November 2026"
    if "price" in totals:
        totals["cost"] = totals["price"] * (gpu_seconds or seconds) / 3600
    return totals


def save_price(base: Path, price: float) -> None:
    """Keeps a price, as in total_time, for all later reports of a base folder."""
    with atomic_path(price_file(base)) as temporary:
        temporary.write_text(f"{price}\n", encoding="utf-8")


def saved_price(base: Path) -> float:
    """The price that was saved last; 0 if there is none."""
    try:
        price = float(price_file(base).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0
    return price if 0 < price < math.inf else 0.0


def price_file(base: Path) -> Path:
    return base / "report" / "price"


# ---- a run ----


def has_runs(base: Path) -> bool:
    """Whether a stage has run, or was started, in this base folder."""
    report = base / "report"
    return bool(find_logs(base)) or sessions_file(base).exists() or any(report.glob("*.json"))


def read_run(base: Path, tag: str = "", price: float = 0.0) -> dict[str, Any]:
    """
    Everything that is known about a run. price: as in total_time, but 0 = the saved one. UserError if there is none.

    name, base           tag, and the name of the base folder
    written              when this was read, in seconds since 1970
    commit, environment  of the last session; also "device", of the last training stage
    totals               hours, gpu_hours, price, cost
    stages               in the order of the pipeline: name, title, status, message, started, seconds, command,
                         sessions, numbers, and for a training stage what read_training returns
    core, chat           evaluations of the base model and of the chat models
    chats                a few exchanges with the last chat model
    tokenizer            vocabulary, bytes per token of several kinds of text and tokenizers
    warnings             what could not be read, each one line
    """
    if not has_runs(base):
        remedy = "train a model first (bash speedrun.sh), or set NANOCHAT_BASE_DIR to the folder of one"
        raise UserError(f"{base} has no runs: {remedy}")
    logs = find_logs(base)
    if tag and not any(name == tag for _, name in logs):
        known = ", ".join(sorted({name for _, name in logs})) or "none"
        raise UserError(f"{base} has no run with the tag {tag!r}: its tags are {known}")
    if not tag and logs:
        tag = max(logs.values(), key=lambda log: log.lines.modified).tag
    chain = lineage(logs, tag)
    sessions = sessions_of(read_sessions(base), chain)
    base_tag = chain["base_train"].tag if "base_train" in chain else tag
    stages = [read_stage(base, name, chain, sessions) for name in TITLES]
    known_stages = [stage for stage in stages if stage]
    last = sessions[-1] if sessions else {}
    devices = [stage["device"] for stage in known_stages if stage.get("device")]
    run = {
        "name": tag or base.name,
        "base": base.name,
        "written": time.time(),
        "commit": last.get("commit", ""),
        "environment": last.get("environment", {}) | ({"device": devices[-1]} if devices else {}),
        "totals": total_time(sessions, price or saved_price(base)),
        "stages": known_stages,
        "core": read_core(base, base_tag),
        "chat": read_chat(base, chain),
        "chats": read_chats(base, known_stages, chain),
        "tokenizer": read_tokenizer(base),
        "warnings": find_damage(base, chain),
    }
    return without_folder(run, f"{base}{os.sep}")


def without_folder(value: Any, folder: str) -> Any:
    """The value with paths relative to the base folder: where it is does not concern the readers of a report."""
    if isinstance(value, dict):
        return {name: without_folder(inner, folder) for name, inner in value.items()}
    if isinstance(value, list) and not (value and is_number(value[0])):
        return [without_folder(inner, folder) for inner in value]
    return value.replace(folder, "") if isinstance(value, str) else value


def sessions_of(sessions: list[dict[str, Any]], chain: dict[str, TrainingLog]) -> list[dict[str, Any]]:
    """The sessions that belong to a run: those with a tag of its stages, or without a known one."""
    tags = {log.tag.removesuffix(" (new)") for log in chain.values()}
    found = []
    for session in sessions:
        own = {chain[session["stage"]].tag.removesuffix(" (new)")} if session["stage"] in chain else tags
        if not session["tag"] or not chain or session["tag"] in own:
            found.append(session)
    return found


def read_stage(
    base: Path, name: str, chain: dict[str, TrainingLog], sessions: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What is known about one stage; empty if it has not been started."""
    own = [session for session in sessions if session["stage"] == name]
    stage: dict[str, Any] = {}
    if name in chain:
        stage = read_training(chain[name], base)
    elif name not in TRAINING:
        stage = {"numbers": evaluation_numbers(base, name, chain)}
        if name == "base_eval" and "base_train" in chain:
            stage["samples"] = read_samples(read_evaluations(base, name, chain["base_train"].tag)[-1:])
    if not own and not stage.get("numbers") and not stage.get("curves"):
        return {}
    stage |= {"name": name, "title": TITLES[name], "status": "unknown", "message": "", "sessions": []}
    keys = ("time", "seconds", "status", "message", "command", "commit", "gpus")
    stage["sessions"] = [{key: session.get(key) for key in keys} for session in own]
    if own:
        last = own[-1]
        stage |= {key: last.get(key) for key in ("status", "message", "command")}
        stage["started"] = last["time"]
        stage["seconds"] = sum(session["seconds"] for session in own)
        if name not in chain:
            stage["settings"] = dict(last.get("flags", {}))
    elif stage["numbers"] and stage.get("step", 0) == stage["numbers"].get("steps", stage.get("step", 0)):
        stage["status"] = "complete"
    return stage


def evaluation_numbers(base: Path, name: str, chain: dict[str, TrainingLog]) -> dict[str, Any]:
    """The final numbers of an evaluation or of the tokenizer."""
    if name != "chat_eval":
        tag = chain["base_train"].tag if "base_train" in chain else ""
        return final_numbers(base, name, tag)
    numbers: dict[str, Any] = {}
    for script, log in chain.items():
        found = final_numbers(base, f"chat_eval_{TRAINING[script]}", log.tag)
        numbers |= {f"{TRAINING[script]}: {key}": value for key, value in found.items() if key != "model"}
    return numbers


def read_tokenizer(base: Path) -> dict[str, Any]:
    """The compression that tok_train and tok_eval have measured."""
    trained = read_json(base / "report" / "tok_train.json")
    compared = read_json(base / "report" / "tok_eval.json")
    found = {"vocabulary": trained.get("vocabulary"), "bytes_per_token": trained.get("bytes per token")}
    if compared:
        results = {kind: as_dict(ratios) for kind, ratios in as_dict(compared.get("results")).items()}
        found |= {"results": results, "sizes": as_dict(compared.get("sizes"))}
    return {name: value for name, value in found.items() if value is not None}


def find_damage(base: Path, chain: dict[str, TrainingLog]) -> list[str]:
    """One line for each file of JSON lines that has damaged ones, with the remedy."""
    folder = base / "report" / "metrics"
    tags = dict.fromkeys(log.tag for log in chain.values())
    paths = [log.path for log in chain.values()]
    paths += [folder / f"{script}-{tag}.jsonl" for tag in tags for script in ("base_eval", "chat_eval")]
    warnings = []
    for path in [*paths, sessions_file(base)]:
        damaged = read_lines(path).damaged
        if damaged:
            count = "1 damaged line" if len(damaged) == 1 else f"{len(damaged)} damaged lines"
            name = path.relative_to(base)
            warnings.append(
                f"{name}: {count} left out, the first is line {damaged[0]}: delete it, or continue the run with "
                "--resume, which writes the file again"
            )
    return warnings


# ---- comparison ----


def labels(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each run: its tag, with its base folder where tags are equal."""
    names = [run["name"] for run in runs]
    return [f"{run['base']}/{run['name']}" if names.count(run["name"]) > 1 else run["name"] for run in runs]


def differences(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings in which runs differ: {"stage", "name", "values": one per run, None = not set}."""
    rows = []
    for stage in TITLES:
        by_run = [settings_of(run, stage) for run in runs]
        present = [settings for settings in by_run if settings is not None]
        if len(present) < 2:
            continue
        for name in dict.fromkeys(name for settings in present for name in settings):
            values = [None if settings is None else settings.get(name) for settings in by_run]
            compared = [settings.get(name) for settings in present]
            if any(value != compared[0] for value in compared):
                rows.append({"stage": stage, "name": name, "values": values})
    for name in ("commit", *dict.fromkeys(name for run in runs for name in run["environment"])):
        values = [run["commit"] if name == "commit" else run["environment"].get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append({"stage": "environment", "name": name, "values": values})
    return rows


IGNORED = re.compile(r"(flags\.)?(model_tag|base_tag|resume|run|plan|for_)|base|recipe\.hyperparameters\..*")


def settings_of(run: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The settings of a stage, without names and paths; None if it has not been started."""
    stage = next((stage for stage in run["stages"] if stage["name"] == name), None)
    if stage is None:
        return None
    return {key: value for key, value in stage.get("settings", {}).items() if not IGNORED.fullmatch(key)}
