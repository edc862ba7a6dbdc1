"""
Load test of the web chat that checks every response: the real server in its own process, over loopback connections.

    python -m scripts.bench serve                          # a fresh model; same as python -m scripts.bench.serve
    python -m scripts.bench serve -i sft --minutes 30      # a trained model; then a mix of all loads for half an hour

Kinds of load:

    alone      one request after another, greedy; the completions are the expected ones for all other loads
    together   --users requests at once
    crowd      --crowd requests at once, more than the queue holds
    vanish     --vanish clients that disconnect

Problems are printed, and the exit code is then 1. `ratios`:

    throughput    tokens/s of `together`, divided by those of `alone`
    first token   seconds from the first to the last token of a completion (median), divided by the seconds within which
                  99 % of the requests of `together` receive their first token
    fairness      among completions of equal length: seconds of the fastest, divided by those of the slowest
"""

import asyncio
import itertools
import os
import random
import resource
import socket
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

from nanochat.checkpoint_manager import STAGES, CheckpointWriter
from nanochat.cli import COUNT, NOT_NEGATIVE, command, flag
from nanochat.common import UserError, base_dir, human
from nanochat.distributed import Dist
from nanochat.gpt import GPT
from nanochat.muon import build_optimizer
from nanochat.primer import generate_quiz
from nanochat.recipe import RecipeFlags, model_config, param_groups
from nanochat.tokenizer import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, default_dir
from nanochat.train import TrainState
from scripts.bench.harness import medians, print_table, report
from scripts.bench.load_client import HOST, LoadClient, Response, get_json, summarize

DEPTH = 4  # of a fresh model, which has 256 channels; heuristic, not tuned
VOCAB_SIZE = 8192
START_SECONDS = 300  # time limit for the server's start; heuristic, not tuned
SETTLE_SECONDS = 5  # until the slots of clients that left must be free: far longer than a step of the engine
MAX_GROWTH = 2**27  # bytes the server may grow by over the rounds of one kind; malloc alone can account for half of it


@dataclass(frozen=True)
class Flags:
    source: str = flag("", "stage of a trained model: base, mid, sft or rl; default: a fresh model", short="-i")
    model_tag: str = flag("", "name of its checkpoints; default: the one saved last", short="-g")
    num_rows: int = flag(64, "completions that the server generates at a time", COUNT)
    queue: int = flag(128, "completions that may wait", NOT_NEGATIVE)
    users: int = flag(64, "concurrent requests of `together`", COUNT)
    crowd: int = flag(500, "concurrent requests of `crowd`", COUNT)
    vanish: int = flag(300, "disconnecting clients, `users` at a time", COUNT)
    max_tokens: int = flag(64, "maximum new tokens per completion", COUNT)
    rounds: int = flag(3, "rounds of all kinds of load; medians count", COUNT)
    minutes: float = flag(0.0, "minutes of `crowd` and `vanish` mixed, after the rounds", NOT_NEGATIVE)
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    if flags.users > flags.num_rows + flags.queue:
        raise UserError(f"--users {flags.users}: the server has room for only --num-rows + --queue of them")
    with tempfile.TemporaryDirectory() as folder:
        if not flags.source:
            save_fresh_model(Path(folder))
        with running_server(flags, base_dir() if flags.source else Path(folder)) as (port, pid):
            test = LoadTest(port, pid, flags)
            asyncio.run(test.run())
    results = {kind: medians(rounds) for kind, rounds in test.results.items()}
    names = list(results["alone"])
    print_table("", {name: {kind: human(result[name]) for kind, result in results.items()} for name in names})
    problems = test.client.problems
    for problem, count in problems.items():
        print(f"{count} x {problem}")
    alone, together = results["alone"], results["together"]
    if not alone["answered"] or not together["answered"]:
        raise UserError("the server completes no request: see the problems above")
    ratios = {
        "throughput": together["tokens/s"] / alone["tokens/s"],
        "first token": together["first to last"] / together["first of 99%"],
        "fairness": together["fairness"],
    }
    ratios = report("serve", ratios, results=results, problems=problems)
    if problems:
        raise SystemExit(1)
    return ratios


class LoadTest:
    """Runs all kinds of load in turn and keeps their measurements."""

    def __init__(self, port: int, pid: int, flags: Flags):
        rng = random.Random(0)
        texts = [item["question"] for item in generate_quiz()]
        questions = [" ".join(rng.sample(texts, 1 + i % 8)) for i in range(flags.users)]
        self.client = LoadClient(port, questions, flags.max_tokens)
        self.pid = pid
        self.flags = flags
        self.results: dict[str, list[dict[str, float]]] = {}  # by kind of load, one per round

    async def run(self) -> None:
        client, flags = self.client, self.flags
        for _ in range(flags.rounds):
            await self._measure("alone", client.sequential())
            await self._measure("together", client.concurrent(flags.users))
            await self._measure("crowd", client.concurrent(flags.crowd), may_refuse=True)
            await self._measure("vanish", client.disconnecting(flags.vanish), may_refuse=True)
        end = time.monotonic() + 60 * flags.minutes
        while time.monotonic() < end:
            await self._measure("mix", client.mixed(flags.crowd, flags.vanish), may_refuse=True)
        await self._measure("alone", client.sequential())
        self._check_memory()
        self._check_refusals()

    async def _measure(self, kind: str, load: Awaitable[list[Response]], may_refuse: bool = False) -> None:
        start = time.perf_counter()
        responses = await load
        seconds = time.perf_counter() - start
        result = {**self.client.check(responses, may_refuse), **summarize(responses, seconds)}
        result["memory"] = await self._settle(kind)
        self.results.setdefault(kind, []).append(result)
        print(f"{kind}:", ", ".join(f"{name} {human(value)}" for name, value in result.items()), flush=True)

    async def _settle(self, kind: str) -> int:
        """Waits until the server is idle; returns its resident memory in bytes."""
        for _ in range(10 * SETTLE_SECONDS):
            await asyncio.sleep(0.1)
            stats = get_json(self.client.port, "/stats")
            if not stats["running"] + stats["waiting"]:
                break
        else:
            self.client.problems[f"after {kind}: {stats['running']} running, {stats['waiting']} waiting"] += 1
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def _check_memory(self) -> None:
        for kind in ("vanish", "mix"):
            memory = [result["memory"] for result in self.results.get(kind, [])]
            if memory and memory[-1] > memory[0] + MAX_GROWTH:
                growth = human(memory[-1] - memory[0])
                self.client.problems[f"the server grew by {growth}B over {len(memory)} rounds of {kind}"] += 1

    def _check_refusals(self) -> None:
        """Compares with the server's count, which includes clients that disconnected before the refusal arrived."""
        results = [result for rounds in self.results.values() for result in rounds]
        num_refused = sum(result["refused"] for result in results)
        num_left = sum(result["left"] for result in results)
        num_counted = get_json(self.client.port, "/stats")["answers"]["refused"]
        if not num_refused <= num_counted <= num_refused + num_left:
            problem = f"the server counted {num_counted} refusals, the clients {num_refused} ({num_left} left)"
            self.client.problems[problem] += 1


def save_fresh_model(folder: Path) -> None:
    """
    Saves a model with random weights, whose output depends on every token before it, and a tokenizer whose tokens are
    whole characters.
    """
    words = ["".join(letters) for n in (2, 3) for letters in itertools.product(string.ascii_lowercase, repeat=n)]
    tokens = [bytes([byte]) for byte in range(NUM_BYTES)] + [word.encode() for word in words]
    tokenizer = Tokenizer(SPLIT_PATTERN, zip(tokens, range(VOCAB_SIZE - len(SPECIAL_TOKENS)), strict=False))
    tokenizer.save(folder / default_dir().name)
    torch.manual_seed(0)
    model = GPT.create(model_config(RecipeFlags(depth=DEPTH, head_dim=64), VOCAB_SIZE))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=model.config.n_embd**-0.5)
    writer = CheckpointWriter("sft", "fresh", Dist(model.device))
    writer.path = folder / STAGES["sft"][0] / "fresh"
    optimizer = build_optimizer(model, param_groups(model.config))
    writer.save(model, optimizer, TrainState(), {"tokenizer": tokenizer.fingerprint})
    writer.wait()


@contextmanager
def running_server(flags: Flags, folder: Path) -> Iterator[tuple[int, int]]:
    """Starts the server on a free port; yields the port and the process id. Raises UserError if it does not start."""
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    options = {name: getattr(flags, name) for name in ("model_tag", "device", "num_rows", "queue")}
    options |= {"source": flags.source or "sft", "port": port}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    argv = [sys.executable, "-m", "scripts.chat_web", *arguments]
    process = subprocess.Popen(argv, env=os.environ | {"NANOCHAT_BASE_DIR": str(folder)}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        is_ready = False
        while not is_ready:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"the server did not start: {' '.join(argv)}")
            time.sleep(0.2)
            with suppress(OSError):  # connection refused, or 503 while it loads
                is_ready = get_json(port, "/health")["ready"]
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
