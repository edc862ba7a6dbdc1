"""
The web chat under load: the real server in a process of its own, spoken to over loopback, every answer compared.

    python -m scripts.bench serve                          # a fresh model; = python -m scripts.bench.serve …
    python -m scripts.bench serve -i sft --minutes 30      # a trained one; then a mix of all for half an hour

alone: one user after another, greedily; what they are told is what everybody is to be told. together: so many at once.
crowd: more than the queue holds. vanish: clients that leave. What goes wrong is printed, and the exit code is then 1.
`ratios`: throughput, tokens/s together over alone; first token, seconds from the first token of an answer to its last
(a turn in the queue) over those in which 99% of `together` have their first; fairness, of equally long answers the
quickest's seconds over the slowest's.
"""

import asyncio
import itertools
import json
import os
import random
import resource
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nanochat.checkpoint_manager import STAGES, CheckpointDir
from nanochat.cli import command, flag
from nanochat.common import UserError, base_dir, human
from nanochat.gpt import GPT
from nanochat.muon import LearningRates, build_optimizer
from nanochat.primer.documents import quiz
from nanochat.recipe import model_config
from nanochat.tokenizer import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, default_dir
from nanochat.train import TrainState
from scripts.bench.load_client import HOST, OUTCOMES, Answer, Crowd, get, summary

DEPTH, VOCAB_SIZE = 4, 8192  # of a fresh model, which has 256 channels; arbitrary
START_SECONDS = 300  # until the server must be ready; arbitrary
SETTLE_SECONDS = 5  # until the places of all who left must be free: far more than a step of the engine takes
MAX_GROWTH = 2**27  # bytes of the server, from its first round of a kind to the last; what malloc keeps varies by half


@dataclass(frozen=True)
class Flags:
    source: str = flag("", "stage of a trained model: base, mid, sft or rl; default a fresh one", short="-i")
    model_tag: str = flag("", "name of its checkpoints; default the one written last", short="-g")
    num_rows: int = flag(64, "answers that the server generates at a time")
    queue: int = flag(128, "requests that may wait for that")
    users: int = flag(64, "at once in `together`")
    crowd: int = flag(500, "users at once in `crowd`")
    vanish: int = flag(300, "clients that leave, `users` at a time")
    max_tokens: int = flag(64, "new tokens of each answer")
    rounds: int = flag(3, "of each; medians count")
    minutes: float = flag(0.0, "of crowds and leaving clients mixed, after that")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    if min(flags.users, flags.crowd, flags.vanish, flags.max_tokens, flags.rounds) < 1:
        raise UserError("--users, --crowd, --vanish, --max-tokens and --rounds must be at least 1")
    if flags.users > flags.num_rows + flags.queue:
        raise UserError(f"--users {flags.users}: the server has room for --num-rows + --queue of them")
    with tempfile.TemporaryDirectory() as folder:
        if not flags.source:
            save_fresh_model(Path(folder))
        with running_server(flags, base_dir() if flags.source else Path(folder)) as (port, pid):
            load = Load(port, pid, flags)
            asyncio.run(load.run())
    medians = {kind: median(results) for kind, results in load.results.items()}
    table = Table("", *medians)
    for name in medians["alone"]:
        table.add_row(name, *(human(result[name]) for result in medians.values()))
    Console().print(table)
    problems, alone, together = load.crowd.problems, medians["alone"], medians["together"]
    for problem, times in problems.items():
        print(f"{times} x {problem}")
    if not alone["answered"] * together["answered"]:
        raise UserError("the server answers nobody: see above")
    ratios = {
        "throughput": round(together["tokens/s"] / alone["tokens/s"], 2),
        "first token": round(together["first to last"] / together["first of 99%"], 2),
        "fairness": round(together["fairness"], 2),
    }
    print(json.dumps({"benchmark": "serve", "results": medians, "problems": problems, "ratios": ratios}))
    if problems:
        raise SystemExit(1)
    return ratios


def median(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


class Load:
    """The course of the benchmark: kinds of load in turns, and what is measured of each."""

    def __init__(self, port: int, pid: int, flags: Flags):
        texts, rng = [item["question"] for item in quiz()], random.Random(0)
        questions = [" ".join(rng.sample(texts, 1 + i % 8)) for i in range(flags.users)]
        self.crowd, self.pid, self.flags = Crowd(port, questions, flags.max_tokens), pid, flags
        self.results: dict[str, list[dict[str, float]]] = {}  # by kind of load, one per round

    async def run(self) -> None:
        crowd, flags = self.crowd, self.flags
        for _ in range(flags.rounds):
            await self.measure("alone", crowd.one_by_one())
            await self.measure("together", crowd.together(flags.users))
            await self.measure("crowd", crowd.together(flags.crowd), may_refuse=True)
            await self.measure("vanish", crowd.leaving(flags.vanish), may_refuse=True)
        start, told = time.monotonic(), 0  # rounds
        while (minutes := (time.monotonic() - start) / 60) < flags.minutes:
            await self.measure("mix", crowd.mixed(flags.crowd, flags.vanish), may_refuse=True)
            recent = self.results["mix"][told:]
            if (time.monotonic() - start) // 60 > minutes // 1:
                total = {name: sum(result[name] for result in recent) for name in OUTCOMES}
                told += len(recent)
                numbers = (f"{name} {value:.4g}," for name, value in (median(recent) | total).items())
                print(f"after {minutes:.1f} minutes:", *numbers, flush=True)
        await self.measure("alone", crowd.one_by_one())
        for kind in ("vanish", "mix"):
            memory = [result["memory"] for result in self.results.get(kind, [])]
            if memory and memory[-1] > memory[0] + MAX_GROWTH:
                crowd.problems[f"over {len(memory)} x {kind} the server grew by {human(memory[-1] - memory[0])}B"] += 1
        seen = {name: sum(r[name] for results in self.results.values() for r in results) for name in OUTCOMES}
        counted = get(crowd.port, "/stats")["answers"]["refused"]
        if not seen["refused"] <= counted <= seen["refused"] + seen["left"]:  # some left before they were told
            crowd.problems[f"the server says that it refused {counted} clients, of {seen}"] += 1

    async def measure(self, kind: str, asking: Awaitable[list[Answer]], may_refuse: bool = False) -> None:
        start = time.perf_counter()
        answers = await asking
        result = self.crowd.judge(answers, may_refuse) | summary(answers, time.perf_counter() - start)
        self.results.setdefault(kind, []).append(result | {"memory": await self.settle(kind)})

    async def settle(self, kind: str) -> int:
        """Waits until nobody is served any more; returns the server's resident bytes."""
        for _ in range(10 * SETTLE_SECONDS):
            await asyncio.sleep(0.1)
            stats = get(self.crowd.port, "/stats")
            if not stats["running"] + stats["waiting"]:
                break
        else:
            self.crowd.problems[f"after {kind}: {stats['running']} running, {stats['waiting']} waiting"] += 1
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def save_fresh_model(folder: Path) -> None:
    """A model that talks nonsense, which yet depends on every token before it; its tokens are whole characters."""
    words = ("".join(letters) for n in (2, 3) for letters in itertools.product(string.ascii_lowercase, repeat=n))
    tokens = [bytes([byte]) for byte in range(NUM_BYTES)] + [word.encode() for word in words]
    tokenizer = Tokenizer(SPLIT_PATTERN, zip(tokens, range(VOCAB_SIZE - len(SPECIAL_TOKENS)), strict=False))
    tokenizer.save(folder / default_dir().name)
    torch.manual_seed(0)
    model = GPT.create(model_config(DEPTH, VOCAB_SIZE, head_dim=64))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=model.config.n_embd**-0.5)
    checkpoints = CheckpointDir("sft", "fresh")
    checkpoints.path = folder / STAGES["sft"][0] / "fresh"
    checkpoints.save(model, build_optimizer(model, LearningRates()), TrainState(), {"tokenizer": tokenizer.fingerprint})
    checkpoints.wait()


@contextmanager
def running_server(flags: Flags, folder: Path) -> Iterator[tuple[int, int]]:
    """Starts the server on a free port; yields that and its process id. UserError if it does not start."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    options = {"source": flags.source or "sft", "model-tag": flags.model_tag, "device": flags.device, "port": port}
    options |= {"num-rows": flags.num_rows, "queue": flags.queue}
    argv = [sys.executable, "-m", "scripts.chat_web", *(f"--{name}={value}" for name, value in options.items())]
    process = subprocess.Popen(argv, env=os.environ | {"NANOCHAT_BASE_DIR": str(folder)}, stdout=subprocess.DEVNULL)
    try:
        is_ready, deadline = False, time.monotonic() + START_SECONDS
        while not is_ready:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the server did not start: {' '.join(argv)}")
            time.sleep(0.2)
            with suppress(OSError):  # nobody listens yet, or 503
                is_ready = get(port, "/health")["ready"]
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
