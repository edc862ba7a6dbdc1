"""
What the benchmarks share: alternating runs, processes to run them in, medians, the table and the last line.

A benchmark compares nanochat with a baseline. Both run in turn several times, so that whatever else the machine does
slows both of them, and the medians are compared. Where memory, start-up time or compiled code matter, each side has
its own process.

    runs = alternate({"nanochat": lambda: timed(ours), "baseline": lambda: timed(plain)}, rounds=5)
    seconds = {name: statistics.median(results) for name, results in runs.items()}
    print_table("matrix products", {name: {"seconds": f"{value:.2f}"} for name, value in seconds.items()})
    return report("matmul", {"speed": seconds["baseline"] / seconds["nanochat"]}, seconds=seconds)
"""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from nanochat.common import UserError

T = TypeVar("T")


# ---- runs ----


def alternate(runs: Mapping[str, Callable[[], T]], rounds: int, *, warmup: int = 1) -> dict[str, list[T]]:
    """Calls every run once per round, in turn, and returns their results without those of the warm-up rounds."""
    results: dict[str, list[T]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            result = run()
            if i >= warmup:
                results[name].append(result)
    return results


def medians(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each entry over several results that have the same entries."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call; the call must wait for the device itself."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Stopwatch:
    """
    Adds up the seconds of the parts of a loop. stopwatch("forward") ends the part "forward" and starts the next one; it
    waits for the device first.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = Counter()  # type: ignore[assignment]  # by part
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


def time_passes(loss: Callable[[], torch.Tensor], device: torch.device) -> dict[str, float]:
    """Seconds of a loss' "forward" and "backward" pass: medians of three, after one to warm up."""
    runs = []
    for _ in range(4):
        stopwatch = Stopwatch(device)
        value = loss()
        stopwatch("forward")
        value.backward()
        stopwatch("backward")
        runs.append(stopwatch.seconds)
    return medians(runs[1:])


# ---- processes ----


class Worker:
    """
    A new process that runs work(connection, *arguments), where `connection` is a pipe to this object. Used where a side
    keeps its model and compiled code from one turn to the next. The process ends with this one at the latest.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        context.Process(target=work, args=(other_end, *arguments), daemon=True).start()
        other_end.close()  # otherwise the end of the process would not close the pipe

    def receive(self) -> Any:
        """The next message of the process. UserError if it ended instead."""
        try:
            return self.connection.recv()
        except EOFError:
            raise UserError(
                "a benchmark process ended early, see above; if it ran out of memory, measure fewer sides at a time"
            ) from None

    def request(self, message: Any) -> Any:
        """Sends a message and returns the reply."""
        self.connection.send(message)
        return self.receive()


def run_in_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls the function in a new process and returns its result. UserError if the process ends without one."""
    return Worker(_send_result, function, *arguments).receive()


def _send_result(connection: Any, function: Callable[..., Any], *arguments: Any) -> None:
    connection.send(function(*arguments))


# ---- results ----


def print_table(title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Prints one row per name; the columns are the keys of all rows, and a cell that a row lacks stays empty."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(row.get(column, "") for column in columns))
    Console().print(table)


def report(name: str, ratios: Mapping[str, float], **details: Any) -> dict[str, float]:
    """
    Prints the last line of a benchmark, an object of JSON: its name, the processor, the details and `ratios`, how many
    times better nanochat is than the baseline. Returns the ratios, rounded to three digits after the point.
    """
    rounded = {key: round(ratio, 3) for key, ratio in ratios.items()}
    machine = {"cpu": cpu_model(), "cores": os.cpu_count()}
    print(json.dumps({"benchmark": name, "machine": machine, **details, "ratios": rounded}))
    return rounded


def cpu_model() -> str:
    """The processor's name, such as "AMD EPYC 9B14"; where the system does not tell, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
