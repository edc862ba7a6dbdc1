"""
What the benchmarks share: alternating runs, medians, separate processes, the table and the last line.

A benchmark compares nanochat with a baseline. Both run several times in turn, so that other work on the machine slows
both of them, and the medians are compared. Where memory, start-up time or compiled code matter, each side runs in a
separate process.

    runs = alternate({"nanochat": lambda: timed(ours), "baseline": lambda: timed(plain)}, rounds=5)
    seconds = {name: statistics.median(results) for name, results in runs.items()}
    print_table("matrix products", {name: {"seconds": f"{value:.2f}"} for name, value in seconds.items()})
    return report("matmul", {"speed": seconds["baseline"] / seconds["nanochat"]}, seconds=seconds)
"""

import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from nanochat import hardware
from nanochat.common import UserError

T = TypeVar("T")


# ---- runs ----


def alternate(runs: Mapping[str, Callable[[], T]], rounds: int, *, warmup: int = 1) -> dict[str, list[T]]:
    """Calls every run once per round. Returns the results of each run, without those of the warm-up rounds."""
    results: dict[str, list[T]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, run in runs.items():
            result = run()
            if i >= warmup:
                results[name].append(result)
    return results


def medians(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the median of each key over several results with the same keys."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def timed(run: Callable[[], object]) -> float:
    """Returns the seconds of one call. On a GPU the call must end with a synchronization."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Stopwatch:
    """
    Adds up the seconds of the parts of a loop. Calling stopwatch("forward") ends the part "forward" and starts the next
    one, after waiting for the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = Counter()  # type: ignore[assignment]  # by part
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        hardware.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


# ---- processes ----


class Worker:
    """
    A new process that runs work(connection, *arguments), where `connection` is a pipe to this object. The work can keep
    its model and compiled code between requests. The process ends with this one at the latest.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        context.Process(target=_work, args=(work, other_end, *arguments), daemon=True).start()
        other_end.close()  # otherwise the end of the process would not close the pipe

    def receive(self) -> Any:
        """Waits for the next message of the process. Raises the UserError of the process, or one if it ends instead."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            raise UserError(
                "a benchmark process ended early, see above; if it ran out of memory, measure fewer sides at a time"
            ) from None
        if isinstance(message, UserError):
            raise message
        return message

    def request(self, message: Any) -> Any:
        """Sends a message and returns the reply. Raises UserError as `receive` does."""
        with suppress(ConnectionError):  # the process has ended, perhaps with an error to receive
            self.connection.send(message)
        return self.receive()


def _work(work: Callable[..., None], connection: Any, *arguments: Any) -> None:
    """Runs the work. A UserError is sent to the other end, as the process would print it with a traceback."""
    try:
        work(connection, *arguments)
    except UserError as error:
        connection.send(error)


def run_in_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls the function in a new process and returns its result. Raises UserError if the process fails."""
    return Worker(_send_result, function, *arguments).receive()


def _send_result(connection: Any, function: Callable[..., Any], *arguments: Any) -> None:
    connection.send(function(*arguments))


# ---- results ----


def print_table(title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Prints one row per name. The columns are the keys of all rows; a missing cell stays empty."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(row.get(column, "") for column in columns))
    Console().print(table)


def report(name: str, ratios: Mapping[str, float], **details: Any) -> dict[str, float]:
    """
    Prints the last line of a benchmark, a JSON object with its name, the processor, the details and `ratios`: how many
    times better nanochat is than each baseline. Returns the ratios, rounded to three decimals.
    """
    rounded = {key: round(ratio, 3) for key, ratio in ratios.items()}
    machine = {"cpu": cpu_model(), "cores": os.cpu_count()}
    print(json.dumps({"benchmark": name, "machine": machine, **details, "ratios": rounded}))
    return rounded


def cpu_model() -> str:
    """Returns the processor's name, such as "AMD EPYC 9B14"; without /proc, its architecture."""
    info = Path("/proc/cpuinfo")
    name = re.search("model name\\s*: (.*)", info.read_text()) if info.exists() else None
    return name[1] if name else platform.machine()
