"""For benchmarks: processes that take turns, each with its own memory and compiled code; and a stop watch."""

import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from nanochat.common import UserError


class Worker:
    """
    A process of its own that runs work(connection, *arguments), where connection.recv() gives what it was asked and
    connection.send(…) answers. UserError when it ends without an answer.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any):
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as runs/setup.sh does, for whoever measures without it
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        context.Process(target=work, args=(other, *arguments), daemon=True).start()
        other.close()  # else nobody would notice that the process has ended

    def answer(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise UserError(
                "a process ended early, for the reason above; was it memory? Measure fewer at a time"
            ) from None

    def ask(self, question: Any) -> Any:
        self.connection.send(question)
        return self.answer()


class Laps:
    """A stop watch that waits for the device: laps("forward") ends a part; `seconds` sums up each."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, Counter[str](), time.perf_counter()

    def __call__(self, part: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.last  # type: ignore[assignment]
        self.last = now


def time_passes(loss: Callable[[], torch.Tensor], device: torch.device) -> dict[str, float]:
    """Seconds of a loss' "forward" and "backward" pass: medians of three, after one to warm up."""
    runs = []
    for _ in range(4):
        laps = Laps(device)
        value = loss()
        laps("forward")
        value.backward()
        laps("backward")
        runs.append(laps.seconds)
    return {part: statistics.median(run[part] for run in runs[1:]) for part in ("forward", "backward")}
