"""
Logging of training runs and evaluations: console lines, a metrics file to plot, a tracker on request (tracking.py), and
the final numbers of all stages (nanochat/report/ reads them).

    <base>/report/metrics/<script>-<tag>.jsonl    the history of a run, or of the evaluations of a tag's models
    <base>/report/<script>.json                   the final numbers

The metrics file has one JSON object per line. While an earlier run still holds the tag, a new run writes to the hidden
file .<script>-<tag>.jsonl.new, which gets its name with the first checkpoint. A crash may truncate the last line.

base_train, mid_train, chat_sft and chat_rl write three kinds of lines, in the order of time. The first line of the file
describes the run, as of its last start:

    config             the metadata of its checkpoints: flags, recipe, settings (hyperparameters), dtype …
    num_steps          optimizer steps of the whole run; 0 = unknown
    flops_per_token    of training: forward and backward pass, as if all weights were trained
    device             description of the device of rank 0
    world_size         number of ranks

Each other line has these keys:

    step               optimizer steps so far; an evaluation before the first step has 0
    seconds            of training without its first 4 steps, evaluations, samples and checkpoints
    elapsed            seconds since training started, those included; not the time between a stop and its --resume
    tokens             trained on so far, over all ranks; padding included, except in reinforcement learning
    flops              of training on these tokens: tokens x flops_per_token
    peak_memory        bytes on rank 0 so far, read once a second: of torch on a GPU, of the process on other devices

After each optimizer step:

    train/loss                 moving average over the steps
    train/grad_norm            norm of the gradient of the loss over all ranks, before the update; nothing clips it
    train/skipped_steps        so far, instead of the two above: this step's were not finite (--skip-bad-steps)
    train/tokens_per_second    of this step, over all ranks; waiting for data, and sampling rollouts, included
    train/mfu                  model FLOPs utilization, on GPUs whose peak cards.py knows
    lr/<group>                 learning rate of each parameter group in this step
    rl/reward, rl/length …     of the rollouts (rollout.summarize)
    epochs/<source>            passes over each source of a mixture

After an evaluation: val/bpb, with a mixture also val/bpb/<source>; in reinforcement learning eval/pass@1, eval/pass@2 …
After sampling:      samples, a list of {"prompt": text, "completion": text}; greedy, the same prompts each time

base_eval and chat_eval append one line per evaluation; the last one of a model and kind is its current result:

    time, model        when (seconds since 1970) and which checkpoint (its folder)
    stage, step        of the checkpoint
    limits             how it differs from the full greedy evaluation, a list of texts
    numbers            by name: CORE, CORE ±, train bpb, val bpb, ChatCORE, ChatCORE ±
    scores             by task: accuracy, low and high (95 % interval), centered, correct, total, baseline, pass@<k>
    samples            as above
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nanochat.common import atomic_path, base_dir, duration, parse_json
from nanochat.distributed import Dist, warn0
from nanochat.hardware import describe, gpu_card, peak_memory
from nanochat.progress import RunBlock, is_live
from nanochat.tracking import Tracker
from nanochat.train import UNTIMED_STEPS, TrainState

MEMORY_SECONDS = 1.0  # between two readings of the peak memory: torch takes about 0.1 ms for one on a GPU (estimated)
CONSOLE_SECONDS = 5.0  # between two console lines about the loss (heuristic, not tuned)


def report_dir() -> Path:
    return base_dir() / "report"


class Logger:
    """Logs one run. Rank 0 writes; on the other ranks all methods do nothing."""

    def __init__(
        self,
        path: Path,  # of the metrics file
        dist: Dist,
        *,
        config: dict[str, Any],
        tracker: Tracker | None = None,  # gets the metrics too, on rank 0
        num_steps: int = 0,  # of the whole run, for the time left; 0 = unknown
        flops_per_token: float = 0.0,  # for the utilization (MFU) on GPUs whose peak is known
        first_step: int = 0,  # of a resumed run: lines after it are removed from the file
    ):
        self.dist = dist
        self.num_steps = num_steps
        self.flops_per_token = flops_per_token
        self.card = gpu_card(dist.device)
        self.last_line = 0.0  # time of the last console line about the loss
        self.last_memory = -math.inf  # time of the last reading of `memory`
        self.memory = 0  # peak, in bytes
        self.latest: dict[str, float] = {}
        self.tracker = tracker
        self.block: RunBlock | None = None  # while it is shown
        self.title = path.name.lstrip(".").partition(".jsonl")[0]
        self.file: Any = None
        if dist.is_main:
            head = {
                "config": config,
                "num_steps": num_steps,
                "flops_per_token": flops_per_token,
                "device": describe(dist.device),
                "world_size": dist.world_size,
            }
            self.file = append_after(first_step, path, head)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Shows a live block about the run while this context lasts, if there is a terminal for it (progress.py)."""
        if not self.dist.is_main or not is_live():
            yield
            return
        with RunBlock(self.title, num_steps=self.num_steps, device=self.dist.device) as self.block:
            try:
                yield
            finally:
                self.block = None

    def log(self, state: TrainState, metrics: dict[str, float]) -> None:
        """
        Writes the metrics of a step. The console shows evaluations always, and the loss in the live block or, without
        one, every few seconds.
        """
        if not self.dist.is_main:
            return
        if self.card and self.flops_per_token and "train/tokens_per_second" in metrics:
            # In reinforcement learning this counts only the sampled tokens, but the time of sampling too.
            flops = metrics["train/tokens_per_second"] * self.flops_per_token
            metrics = metrics | {"train/mfu": flops / (self.card.flops * self.dist.world_size)}
        self.latest |= metrics
        self._write(state, metrics)
        if self.tracker:
            self.tracker.log(state.step, metrics)
        is_loss = "train/loss" in metrics
        if self.block:
            self.block.update(state, metrics)
            if is_loss:
                return
        now = time.monotonic()
        if not is_loss or now - self.last_line > CONSOLE_SECONDS or state.step in (1, self.num_steps):
            self.last_line = now if is_loss else self.last_line
            shown = [_format(name, value) for name, value in metrics.items() if not name.startswith("lr/")]
            print(f"{self._progress(state)} | {' | '.join(shown)}", flush=True)

    def log_samples(self, state: TrainState, samples: list[dict[str, str]]) -> None:
        """Writes completions as text to the metrics file. They have been printed before."""
        if self.dist.is_main:
            self._write(state, {"samples": samples})

    def _write(self, state: TrainState, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self.last_memory > MEMORY_SECONDS:
            self.last_memory = now
            self.memory = peak_memory(self.dist.device)
        line = {
            "step": state.step,
            "seconds": round(state.seconds, 3),
            "elapsed": round(state.elapsed, 3),
            "tokens": state.total_tokens,
            "flops": state.total_tokens * self.flops_per_token,
            "peak_memory": self.memory,
        }
        self.file.write(json.dumps(line | values) + "\n")
        self.file.flush()

    def finish(self, stage: str, state: TrainState, **numbers: Any) -> None:
        """Ends the run: adds its final numbers to the report, the last evaluations among them."""
        if not self.dist.is_main:
            return
        skipped = ("train/tok", "lr/")
        final: dict[str, Any] = {name: value for name, value in self.latest.items() if not name.startswith(skipped)}
        final |= {"steps": state.step, "training time": duration(state.seconds)}
        if state.seconds:
            final["tokens/s"] = round(state.tokens / state.seconds)
        final["peak memory"] = f"{peak_memory(self.dist.device) / 2**30:.2f} GiB"
        save_numbers(stage, final | numbers)
        self.file.close()
        if self.tracker:
            self.tracker.finish(final | numbers)

    def _progress(self, state: TrainState) -> str:
        if not self.num_steps:
            return f"step {state.step}"
        left = ""
        if state.seconds and state.tokens:
            seconds_per_step = state.seconds / max(1, state.step - UNTIMED_STEPS)
            left = f", {duration(seconds_per_step * (self.num_steps - state.step))} left"
        return f"step {state.step}/{self.num_steps}{left}"


def _format(name: str, value: float) -> str:
    name = name.removeprefix("train/").replace("_", " ")
    if name == "tokens per second":
        return f"{value:,.0f} tokens/s"
    return f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"


def shown(value: Any) -> str:
    """A number of the report: four decimals, or four significant digits for very small and very large ones."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def append_after(step: int, path: Path, *head: dict[str, Any]) -> TextIO:
    """
    Rewrites a JSON-lines file and opens it for appending. It then has the lines `head` and, for a run that is resumed
    after `step`, its old lines up to this step. A new run (step 0) keeps no old lines.
    """
    kept = [line for line in read_lines(path) if type(line.get("step")) is int and line["step"] <= step] if step else []
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*head, *kept]))
    return path.open("a")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line. Damaged lines, such as the last one after a crash, are left out."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def print_table(title: str, rows: list[tuple[str, ...]]) -> None:
    """Prints aligned columns, which also read well in a log file."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    print(title)
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  " + "  ".join(cells).rstrip(), flush=True)


def save_numbers(stage: str, numbers: dict[str, Any]) -> None:
    """Saves a stage's final numbers for the report, next to those saved earlier for the same "model"."""
    earlier = _saved_numbers(stage)
    if earlier.get("model") == numbers.get("model"):
        numbers = earlier | numbers
    with atomic_path(report_dir() / f"{stage}.json") as temporary:
        temporary.write_text(json.dumps(numbers | {"time": time.time()}, indent=1))


def append_evaluation(script: str, tag: str, result: dict[str, Any]) -> None:
    """Appends a line to the metrics file of base_eval or chat_eval; the keys are listed at the top of this file."""
    path = report_dir() / "metrics" / f"{script}-{tag}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 3)} | result) + "\n")


def _saved_numbers(stage: str) -> dict[str, Any]:
    """The numbers that a stage saved; empty if there are none or the file is damaged."""
    path = report_dir() / f"{stage}.json"
    if not path.exists():
        return {}
    try:
        return dict(parse_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        warn0(f"{path} is damaged ({error}): it is left out, run {stage} again to replace it")
        return {}
