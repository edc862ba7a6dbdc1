"""
Live progress on a terminal, for all scripts: a block about a training run, and bars for all else that takes long.

    with Bar("downloading", total=size, unit="MB") as bar:
        bar.update(40)                                    # 40 MB so far
    for name in track(names, "exporting"): ...
    with RunBlock("base_train d4", num_steps=640, device=device) as block:
        block.update(state, metrics)                      # after each step
        with Bar("validation") as bar: ...                # shown below the block

Blocks and bars are shown if stdout is a terminal, on rank 0. They are not shown, and all output is plain lines, in a
pipe or a file, if TERM is dumb, in CI ($CI), and under $NO_COLOR: https://no-color.org asks for text without colour
only, but who sets it usually wants text without any escape sequences.

While a block is shown, print(), warnings and Python's logging write above it. The display is drawn by the thread that
reports progress, at most four times per second, so there is no thread to stop. The cursor stays visible and rests on an
empty line below everything: even a process that is killed leaves a usable terminal.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import rich
import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nanochat.common import duration
from nanochat.hardware import peak_memory
from nanochat.train import UNTIMED_STEPS, TrainState

T = TypeVar("T")

REFRESH_SECONDS = 0.25  # drawing takes 0.6 ms of an EPYC core (median): 0.25 % of the time
LINE_SECONDS = 30.0  # between two lines of a Bar without a terminal (heuristic, not tuned)
SPARK_LEVELS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32  # characters
# Metrics in the block besides loss and speed: name → label and format.
SHOWN_METRICS = {
    "val/bpb": ("val bpb", "{:.4f}"),
    "rl/reward": ("reward", "{:.3f}"),
    "eval/pass@1": ("pass@1", "{:.3f}"),
    "train/grad_norm": ("gradient norm", "{:.3g}"),
    "train/tokens_per_second": ("tokens/s", "{:,.0f}"),
    "train/mfu": ("MFU", "{:.1%}"),
}


def is_main_process() -> bool:
    """Whether this is rank 0 or a process without ranks; for code that has no Dist."""
    return os.environ.get("RANK", "0") == "0"


def is_live() -> bool:
    """Whether blocks and bars are shown (see the top of this file)."""
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    if not is_main_process() or in_ci or os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return False
    console = rich.get_console()
    return console.is_terminal and console.is_interactive and not console.is_dumb_terminal


@contextmanager
def _shown(renderable: Any, *, transient: bool) -> Iterator[Live]:
    """Shows a renderable below what is printed. transient: it disappears at the end. Nested ones are shown together."""
    live = Live(
        renderable,
        console=rich.get_console(),  # the same for all, as rich combines the displays of one console
        auto_refresh=False,
        transient=transient,
        redirect_stderr=sys.stderr.isatty(),
    )
    with ExitStack() as stack:
        live.start()
        stack.callback(live.stop)
        live.console.show_cursor(True)  # rich hides it, and could not show it again if the process were killed
        stack.enter_context(_logging_to_current_stderr())
        yield live


@contextmanager
def _logging_to_current_stderr() -> Iterator[None]:
    """Handlers of Python's logging keep the sys.stderr of their creation; here they write to the present one."""
    changed = []
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
                changed.append((handler, handler.setStream(sys.stderr)))
    try:
        yield
    finally:
        for handler, stream in changed:
            if stream is not None:
                handler.setStream(stream)


class Bar:
    """
    A progress bar, removed at its end. Without a terminal it prints nothing or, if `lines` is set, a line about the
    progress every 30 seconds. total: 0 if unknown. unit: of `total`, in the plural.
    """

    def __init__(self, description: str, total: float = 0, *, unit: str = "items", lines: bool = False):
        self.description = description
        self.total = total
        self.unit = unit
        self.lines = lines
        self.stack = ExitStack()
        self.live: Live | None = None

    def __enter__(self) -> "Bar":
        self.start = time.monotonic()
        self.is_live = is_live()
        self.last = self.start  # time of the last line or drawing
        self.interval = REFRESH_SECONDS if self.is_live else LINE_SECONDS
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def update(self, done: float, description: str = "") -> None:
        """Reports that `done` of `total` are done, and what is being done if that has changed."""
        self.description = description or self.description
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        if self.is_live:
            self._draw(done)
        elif self.lines and is_main_process():
            print(self._line(done, now - self.start), flush=True)

    def _draw(self, done: float) -> None:
        if not self.live:  # the first time: what takes less than that shows no bar
            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[state]}", markup=False),
            ]
            self.progress = Progress(*columns, console=rich.get_console(), auto_refresh=False)
            self.task = self.progress.add_task(self.description, total=self.total or None, state="")
            self.live = self.stack.enter_context(_shown(Group(self.progress, Text()), transient=True))
        state = self._line(done, time.monotonic() - self.start)
        self.progress.update(self.task, completed=done, description=self.description, state=state)
        self.live.refresh()

    def _line(self, done: float, seconds: float) -> str:
        if self.total and done:
            left = (self.total - done) * seconds / done
            return f"{done:,.0f} of {self.total:,.0f} {self.unit}, about {duration(left)} left"
        return f"{done:,.0f} {self.unit}"


def track(items: Iterable[T], description: str, total: float = 0, unit: str = "items") -> Iterator[T]:
    """Yields the items and shows a bar that counts them. total: by default the length of `items`, if they have one."""
    if not total and isinstance(items, Sized):
        total = len(items)
    with Bar(description, total, unit=unit) as bar:
        for done, item in enumerate(items):
            bar.update(done)
            yield item


class Sparkline:
    """The course of a number as a line of block characters; a long one is averaged to at most SPARK_WIDTH of them."""

    def __init__(self) -> None:
        self.means: list[float] = []  # each of `stride` values
        self.stride = 1
        self.pending: list[float] = []

    def add(self, value: float) -> None:
        self.pending.append(value)
        if len(self.pending) < self.stride:
            return
        self.means.append(sum(self.pending) / self.stride)
        self.pending = []
        if len(self.means) == SPARK_WIDTH:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self.stride *= 2

    def __str__(self) -> str:
        if not self.means:
            return ""
        lowest = min(self.means)
        span = max(self.means) - lowest or 1.0
        top = len(SPARK_LEVELS) - 1
        return "".join(SPARK_LEVELS[round(top * (mean - lowest) / span)] for mean in self.means)


class RunBlock:
    """The live block of a training run. It stays on the screen when the run ends."""

    def __init__(self, title: str, *, num_steps: int, device: torch.device):
        """num_steps: optimizer steps of the whole run; 0 = unknown."""
        self.title = title
        self.num_steps = num_steps
        self.device = device
        self.state = TrainState()
        self.metrics: dict[str, float] = {}  # the latest value of each
        self.losses = Sparkline()
        self.progress = 0.0  # share of the run that is done
        self.position = ""  # in the data
        self.last_drawn = 0.0
        self.is_closed = False
        self.stack = ExitStack()

    def __enter__(self) -> "RunBlock":
        self.live = self.stack.enter_context(_shown(self, transient=False))
        return self

    def __exit__(self, *error: object) -> None:
        self.is_closed = True
        self.stack.close()

    def update(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Takes over the metrics of a step or an evaluation."""
        self.state = state
        self.metrics |= metrics
        if "train/loss" in metrics:
            self.losses.add(metrics["train/loss"])
        if self.num_steps:
            self.progress = state.step / self.num_steps
        now = time.monotonic()
        if now - self.last_drawn >= REFRESH_SECONDS:
            self.last_drawn = now
            self.live.refresh()

    def seek(self, progress: float, position: str) -> None:
        """Sets the position in the data as text, and the share of the run, in case the number of steps is unknown."""
        self.position = position
        if not self.num_steps:
            self.progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        steps = f"step {self.state.step:,}"
        if self.num_steps:
            steps += f" of {self.num_steps:,}"
        table = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, None, 1, None):
            table.add_column(ratio=ratio, no_wrap=True)
        table.add_row(Text(self.title, "bold"), steps, ProgressBar(1.0, self.progress), self._share())
        yield table
        loss = self.metrics.get("train/loss")
        spark = "" if options.ascii_only else str(self.losses)
        first = [] if loss is None else [f"loss {loss:.4f} {spark}"]
        quality = ("val/bpb", "rl/reward", "eval/pass@1", "train/grad_norm")
        yield self._text([*first, *self._labelled(quality)])
        yield self._text([*self._labelled(("train/tokens_per_second", "train/mfu")), self._memory()])
        if self.position:
            yield self._text([f"data: {self.position}"], "dim")
        if not self.is_closed:
            yield Text()

    def _share(self) -> str:
        state = self.state
        left = ""
        if state.seconds and state.tokens and self.progress:
            num_left = state.step / self.progress - state.step
            left = f"  {duration(num_left * state.seconds / max(1, state.step - UNTIMED_STEPS))} left"
        return f"{self.progress:.0%}{left}"

    def _labelled(self, names: Iterable[str]) -> list[str]:
        shown = []
        for name in names:
            if name in self.metrics:
                label, form = SHOWN_METRICS[name]
                value = form.format(self.metrics[name])
                shown.append(f"{value} {label}" if label == "tokens/s" else f"{label} {value}")
        return shown

    def _memory(self) -> str:
        memory = f"peak memory {peak_memory(self.device) / 2**30:.1f}"
        if self.device.type == "cuda":
            memory += f" of {torch.cuda.get_device_properties(self.device).total_memory / 2**30:.0f}"
        return f"{memory} GiB"

    @staticmethod
    def _text(parts: Iterable[str], style: str = "") -> Text:
        return Text("   ".join(parts), style, no_wrap=True, overflow="ellipsis")
