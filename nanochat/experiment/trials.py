"""
Runs the trials of an experiment, one process each, and keeps their results in a file with JSON lines.

A trial is one training run with a separate tag. On a machine without GPUs the trials run one after the other in the
given order; with GPUs each gets the next one that is free. Trials with a result are skipped, and each run is started
with --resume: an experiment that was killed continues where it was.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.checkpoint_manager import STAGES, CheckpointReader
from nanochat.common import UserError, duration
from nanochat.logging import read_lines, report_dir

POLL_SECONDS = 0.2  # between two looks at the running processes

FIELDS = {  # of a result, with their types
    "tag": str,
    "variant": str,
    "cell": str,
    "depth": int,
    "budget": int | float,  # FLOPs of the cell
    "role": str,
    "seed": int,
    "parameters": int,
    "commit": str,
    "flags": list,
    "bpb": int | float,
    "loss": int | float,  # what is compared: bits per byte; after chat_sft the error (read_scores)
    "flops": int | float,
    "tokens": int,
    "seconds": int | float,  # of training
    "device": str,
}

Slot = dict[str, str]  # environment variables of a process: the GPUs that it may use


@dataclass(frozen=True)
class Trial:
    """One run of base_train, or one of chat_sft with chat_eval after it."""

    tag: str
    stage: str  # base | sft
    variant: str
    cell: str  # name of the depth with its budget, or of the base model, in which it is compared
    depth: int
    budget: float  # FLOPs of the cell that it belongs to; 1 for chat_sft, whose budget is that of the mixture
    role: str  # compared | ladder | timing
    seed: int
    flops: float  # to train with; 0 = unknown, for chat_sft
    argv: tuple[str, ...]  # flags of base_train or chat_sft, all but --model-tag
    evaluation: tuple[str, ...]  # flags of chat_eval, all but the model
    parameters: int  # N of the baseline's model at this depth (recipe.scaling_params)
    code: Path  # the folder whose code trains
    commit: str


class Results:
    """The results of an experiment: a line of <folder>/results.jsonl for each trial that was trained to its end."""

    def __init__(self, folder: Path):
        self.path = folder / "results.jsonl"
        self.by_tag = {line["tag"]: line for line in read_lines(self.path) if is_result(line)}

    def find(self, trial: Trial) -> dict[str, Any] | None:
        """The result of a trial; None if it has none. UserError if its result is that of other flags."""
        found = self.by_tag.get(trial.tag)
        flags = [*trial.argv, *trial.evaluation]
        if found and found["flags"] != flags:
            before = [word for word in found["flags"] if word not in flags]
            now = [word for word in flags if word not in found["flags"]]
            changes = f"then {' '.join(before)}, now {' '.join(now)}"
            raise UserError(f"{self.path} has a result of {trial.tag} with other flags ({changes}): use another --name")
        return found

    def add(self, trial: Trial, wall_seconds: float) -> dict[str, Any]:
        """Reads the result of a finished trial from its metrics file, and keeps it."""
        result = {
            "tag": trial.tag,
            "variant": trial.variant,
            "cell": trial.cell,
            "depth": trial.depth,
            "budget": trial.budget,
            "role": trial.role,
            "seed": trial.seed,
            "parameters": trial.parameters,
            "commit": trial.commit,
            "flags": [*trial.argv, *trial.evaluation],
            **read_metrics(metrics_file(STAGES[trial.stage][1], trial.tag)),
            "wall_seconds": round(wall_seconds, 3),
            "time": round(time.time(), 3),
        }
        result["loss"] = result["bpb"]
        if trial.stage == "sft":
            result |= read_scores(metrics_file("chat_eval", trial.tag))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        self.by_tag[trial.tag] = result
        return result


def is_result(line: dict[str, Any]) -> bool:
    """Whether a line of the file is complete. Others are left out, and the runs that they belong to are repeated."""
    numbers = ("depth", "budget", "parameters", "bpb", "flops", "tokens", "seconds")
    has_fields = all(isinstance(line.get(name), kind) for name, kind in FIELDS.items())
    return has_fields and line["loss"] >= 0 and all(is_positive(line[name]) for name in numbers)


def read_metrics(path: Path) -> dict[str, Any]:
    """
    Bits per byte, FLOPs, tokens, steps, seconds and device of a finished run, from its metrics file (logging.py).
    UserError if the file is damaged.

    The seconds are those of all steps at the speed that a tenth of them exceed: compiling, a pause and other processes
    make steps slower, never faster. On a busy machine the median differed by up to 40 % between runs of equal code.
    """
    lines = read_lines(path)
    bits = [line["val/bpb"] for line in lines if "val/bpb" in line]
    speeds = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    last = lines[-1] if lines else {}
    numbers = [last.get(name) for name in ("flops", "tokens", "step")]
    if not bits or not speeds or not all(map(is_positive, [bits[-1], *speeds, *numbers])):
        raise UserError(f"{path} lacks a validation or is damaged: remove it, and run this training again")
    return {
        "bpb": bits[-1],
        "flops": last["flops"],
        "tokens": last["tokens"],
        "steps": last["step"],
        "seconds": round(last["tokens"] / float(np.quantile(speeds, 0.9)), 3),
        "device": str(lines[0].get("device", "")),
    }


def read_scores(path: Path) -> dict[str, Any]:
    """
    The accuracy of each task in the last evaluation of a chat model, and its error as the loss: 1 - ChatCORE, or 1 -
    mean accuracy of the tasks if they are not those of ChatCORE. UserError if the file is damaged.
    """
    last = (read_lines(path) or [{}])[-1]
    try:
        scores = {task: float(score["accuracy"]) for task, score in last["scores"].items()}
        score = last["numbers"].get("ChatCORE", sum(scores.values()) / len(scores))
        return {"scores": scores, "loss": 1 - float(score)}
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} lacks the scores or is damaged: remove it, and evaluate again") from error


def metrics_file(script: str, tag: str) -> Path:
    return report_dir() / "metrics" / f"{script}-{tag}.jsonl"


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, int | float) and 0 < value < 1e300


# ---- running ----


def find_slots(device: str, gpus_per_run: int) -> list[Slot]:
    """One slot per group of GPUs; a single one on a machine without GPUs, and for other devices."""
    num_gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus_per_run > max(1, num_gpus):
        raise UserError(f"--gpus-per-run {gpus_per_run}: this machine has {num_gpus} GPUs, use at most that many")
    if num_gpus == 0:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
    groups = [names[start : start + gpus_per_run] for start in range(0, num_gpus, gpus_per_run)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups if len(group) == gpus_per_run]


class Running:
    """A trial in a slot."""

    process: subprocess.Popen[bytes]  # of the command that runs now; set by Runner

    def __init__(self, trial: Trial):
        self.trial = trial
        self.started = time.monotonic()
        self.commands = [[f"scripts.{STAGES[trial.stage][1]}", *trial.argv, "--model-tag", trial.tag]]  # to start
        if trial.stage == "sft":
            self.commands.append(["scripts.chat_eval", "-i", "sft", "-g", trial.tag, *trial.evaluation])


class Runner:
    """Runs trials in the slots of this machine; keeps their results, and a line about each that failed."""

    def __init__(self, folder: Path, results: Results, slots: Sequence[Slot], *, keep_checkpoints: bool):
        self.folder = folder  # of the trials' output, <tag>.log
        self.results = results
        self.slots = slots
        self.keep_checkpoints = keep_checkpoints
        self.running: dict[int, Running] = {}  # by number of the slot
        self.failures: list[str] = []

    def run(self, trials: Sequence[Trial]) -> None:
        """
        Runs the trials that have no result yet. UserError if one of the baseline fails: without it there is nothing to
        compare. If this process is stopped, the running trials save a checkpoint and stop too.
        """
        waiting = [trial for trial in trials if self.results.find(trial) is None]
        self.folder.mkdir(parents=True, exist_ok=True)
        with stops_on_signals():
            try:
                while waiting or self.running:
                    for number in range(len(self.slots)):
                        if waiting and number not in self.running:
                            self._start(number, Running(waiting.pop(0)))
                    for number in list(self.running):
                        if self.running[number].process.poll() is not None:
                            self._collect(number, len(waiting))
                    time.sleep(POLL_SECONDS)
            finally:
                stop([running.process for running in self.running.values()])
                self.running.clear()

    def _start(self, number: int, running: Running) -> None:
        """Starts the next command of a trial."""
        log_file = self.folder / f"{running.trial.tag}.log"
        running.process = start(running.commands.pop(0), running.trial.code, self.slots[number], log_file)
        self.running[number] = running

    def _collect(self, number: int, num_waiting: int) -> None:
        """Keeps the result of the trial that has ended in this slot."""
        running = self.running.pop(number)
        trial = running.trial
        if running.process.returncode:
            self.failures.append(failure(trial, self.folder))
            print(self.failures[-1], flush=True)
            return
        if running.commands:
            self._start(number, running)
            return
        result = self.results.add(trial, time.monotonic() - running.started)
        left = num_waiting + len(self.running)
        shown = f"{result['bpb']:.4f} bits per byte"
        if "scores" in result:
            shown += "".join(f", {task} {accuracy:.1%}" for task, accuracy in result["scores"].items())
        print(f"{trial.tag}: {shown}, {duration(result['wall_seconds'])}; {left} runs are left", flush=True)
        if not self.keep_checkpoints:
            shutil.rmtree(CheckpointReader(trial.stage, trial.tag).path, ignore_errors=True)


def start(words: Sequence[str], code: Path, slot: Slot, log_file: Path) -> subprocess.Popen[bytes]:
    """Starts a module with its flags; the output is appended to the file."""
    num_gpus = len(slot.get("CUDA_VISIBLE_DEVICES", "").split(","))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}"] if num_gpus > 1 else []
    command = [sys.executable, *launcher, "-m", *words]
    with log_file.open("ab") as log:
        # In a session of its own: Ctrl-C reaches this process only, which then stops the trial with one signal. A
        # second one would end it before it has saved.
        return subprocess.Popen(
            command, cwd=code, env=os.environ | slot, stdout=log, stderr=log, start_new_session=True
        )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Lets the training stages save and end."""
    if processes:
        print("stopping: the running trials save a checkpoint; start again to continue", flush=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def failure(trial: Trial, log_folder: Path) -> str:
    """Why a trial failed, as one line. UserError instead for the baseline: without it there is nothing to compare."""
    path = log_folder / f"{trial.tag}.log"
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")] or lines or ["no output"]
    message = f"{trial.tag} failed: {errors[-1].removeprefix('error: ')} (its output: {path})"
    if trial.variant == "baseline":
        raise UserError(message)
    return message


@contextmanager
def stops_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt in the block, as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    previous: dict[int, Any] = {}
    try:
        for name in names:
            number = getattr(signal, name)
            previous[number] = signal.signal(number, interrupt)
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


# ---- code of other commits ----


def checkout(repository: Path, ref: str, folder: Path) -> tuple[Path, str]:
    """Checks a branch or commit out under `folder`, if it is not there yet. Returns the folder and the commit."""
    found = git(repository, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if found.returncode:
        raise UserError(f"git knows no branch or commit {ref!r} in {repository}: check the name")
    commit = found.stdout.strip()[:12]
    path = folder / commit
    if not path.exists():
        made = git(repository, "worktree", "add", "--detach", str(path), commit)
        if made.returncode:
            raise UserError(f"git worktree add {path} failed: {made.stderr.strip().splitlines()[-1]}")
    return path, commit


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
