"""
Fault injection: trainings that are killed at random moments, damaged checkpoints, full and read-only disks.

    python tests/faults.py base --count 200     # kill -9 of a short pretraining, resumed each time: minutes
    python tests/faults.py sft --count 30
    python tests/faults.py rl --count 30
    python tests/faults.py speedrun --count 10  # the whole speedrun.sh at toy size: half an hour or more
    python tests/faults.py damage --count 300   # files of checkpoints cut off, or with a flipped bit
    python tests/faults.py disk                 # a full disk, a read-only one, a file in the way of a folder (root)

A run that was killed starts again with --resume, until it ends. After each kill every complete checkpoint must equal
that of the same step of an uninterrupted run, and at the end the losses in the metrics file must, too: bit for bit.
A third of the kills hit at any time, start-up included, a third between two checkpoints, and a third while one is being
written. --seed repeats the choice of moments; where exactly they hit differs from run to run.

To start runs in milliseconds, this process imports torch once, and every run is a fork of it.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch._inductor  # noqa: F401  # torch.use_deterministic_algorithms imports it, which takes two seconds
from factories import conversation, random_text, write_shard

from nanochat.checkpoint_manager import STAGES, CheckpointReader, stage_dir, step_dir
from nanochat.cli import command, flag
from nanochat.common import UserError
from nanochat.logging import report_dir
from nanochat.tokenizer import Tokenizer, default_dir
from scripts import base_train, chat_rl, chat_sft
from tasks.common import Conversation
from tasks.quiz import HardSums

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("base", "sft", "rl", "speedrun", "damage", "disk")
COMMON = ["--device", "cpu", "--save-every", "2", "--eval-every", "-1", "--model-tag"]
SOURCES = ("smoltalk", "mmlu", "gsm8k", "simplespelling", "spellingbee", "primer")
WITHOUT = " ".join(f"--{name}-epochs=0" for name in SOURCES)
RUNS: dict[str, tuple[ModuleType, str]] = {  # stage → its script, and flags for a run of about a second
    "base": (
        base_train,
        "--depth 1 --aspect-ratio 32 --head-dim 32 --max-seq-len 64 --device-batch-size 2 --total-batch-size 256 "
        "--num-iterations 24 --sample-every -1 --no-compile",
    ),
    "sft": (chat_sft, f"{WITHOUT} --identity-file {{base}}/conversations.jsonl --identity-epochs 4 --no-compile"),
    "rl": (
        chat_rl,
        "--task hardsums --num-iterations 8 --examples-per-step 2 --num-samples 2 --max-new-tokens 8 "
        "--device-batch-size 4",
    ),
}
LAST_STEP = "step_000024"  # of pretraining
REFERENCE, KILLED = "reference", "killed"  # tags
TIMED = ("seconds", "elapsed", "train/tokens_per_second", "peak_memory")  # metrics that depend on the clock


class RandomRewards(HardSums):
    """Questions with rewards that an untrained model gets, too: otherwise it would never be updated."""

    def reward(self, conversation: Conversation, completion: str) -> float:
        return float(zlib.crc32(completion.encode()) % 2)


class Failed(Exception):
    """A result differs from that of the uninterrupted run."""


# ---- runs ----


@dataclass
class Process:
    """A run in a fork of this process."""

    pid: int
    log: Path
    status: int | None = None  # exit status, negative = signal; None = it is running

    def poll(self) -> bool:
        """Whether the run has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, seconds: float = 600) -> None:
        """Waits for the end; Failed if it takes longer."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                raise Failed(f"the run did not end within {seconds} s: see {self.log}")
            time.sleep(0.001)

    def kill(self) -> None:
        if not self.poll():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def start(function: Callable[[], object], log: Path) -> Process:
    """Calls the function in a fork of this process. Its output goes to the log."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Process(pid, log)
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        function()
        status = 0
    except SystemExit as end:
        print(end.code, flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def train(stage: str, tag: str, *flags: str) -> Process:
    base = os.environ["NANOCHAT_BASE_DIR"]
    script, own_flags = RUNS[stage]
    argv = [*own_flags.format(base=base).split(), *COMMON, tag, *flags]
    return start(lambda: script.main(argv), Path(base) / f"{stage}-{tag}.log")


def finish(process: Process) -> None:
    process.wait()
    if process.status:
        lines = process.log.read_text().splitlines()
        raise Failed(f"the run ended with status {process.status}: {lines[-1] if lines else ''} ({process.log})")


def prepare() -> None:
    """Writes text, a tokenizer and conversations to the base folder."""
    base = Path(os.environ["NANOCHAT_BASE_DIR"])
    rng = random.Random(0)
    for name in ("a", "b", "c"):
        texts = [random_text(rng, 20, 60) for _ in range(300)]
        write_shard(base / f"text/{name}.parquet", texts, rows_per_group=50)
    Tokenizer.train([random_text(rng, 2000, 2000)], vocab_size=300).save(default_dir())
    lines = []
    for _ in range(60):
        messages = conversation(random_text(rng, 3, 6), random_text(rng, 4, 12))["messages"]
        lines.append(json.dumps(messages) + "\n")
    (base / "conversations.jsonl").write_text("".join(lines))


# ---- comparison with the uninterrupted run ----


def tensors_of(step: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in step.glob("*.safetensors")}


def compare_checkpoints(stage: str) -> int:
    """Compares all complete checkpoints of the killed run with those of the reference; returns the newest step."""
    reader = CheckpointReader(stage, KILLED)
    steps = reader.steps()
    for step in steps:
        killed = step_dir(stage_dir(stage) / KILLED, step)
        reference = step_dir(stage_dir(stage) / REFERENCE, step)
        if tensors_of(killed) != tensors_of(reference):
            raise Failed(f"{killed} differs from {reference}")
    if steps and (newest := reader.load().step) != steps[-1]:
        raise Failed(f"the newest intact checkpoint of {reader.path} is {newest}, but {steps[-1]} has a manifest")
    return steps[-1] if steps else 0


def losses_of(stage: str, tag: str) -> list[dict[str, object]]:
    file = report_dir() / "metrics" / f"{STAGES[stage][1]}-{tag}.jsonl"
    _, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


# ---- kills ----


@dataclass
class Tally:
    kills: int = 0
    before_first: int = 0  # kills before the first checkpoint was complete
    while_saving: int = 0  # kills while a checkpoint was being written
    runs: int = 0  # that ended as the reference, after kills or other faults
    refused: int = 0  # cases in which no checkpoint was intact, and an error said so


def is_saving(stage: str) -> bool:
    return any(stage_dir(stage).glob(f"{KILLED}/.step_*.tmp"))


def count_saved(stage: str) -> int:
    return len(list(stage_dir(stage).glob(f"{KILLED}/step_*")))


def wait_for(condition: Callable[[], bool], process: Process, seconds: float = 600) -> None:
    """Returns when the condition holds, the run has ended or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and not process.poll() and time.monotonic() < deadline:
        time.sleep(0.0002)


def kill_at_random(process: Process, stage: str, seconds: float, rng: random.Random) -> bool:
    """Kills the run at a random moment, unless it ends before. Returns whether a checkpoint was being written."""
    kind = rng.choice(["any time", "between checkpoints", "while saving"])
    if kind == "any time":
        wait_for(lambda: False, process, rng.uniform(0, seconds))
    else:
        num_saved = count_saved(stage) + rng.randrange(4)
        wait_for(lambda: count_saved(stage) >= num_saved, process)
        if kind == "while saving":
            wait_for(lambda: is_saving(stage), process)
        wait_for(lambda: False, process, rng.uniform(0, 0.02))
    if not process.poll():
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return is_saving(stage)


def kill_runs(stage: str, count: int, rng: random.Random) -> Tally:
    """Kills runs of a stage `count` times; each is resumed until it ends. Failed if a result differs."""
    began = time.monotonic()
    finish(train(stage, REFERENCE))
    seconds = time.monotonic() - began
    tally = Tally()
    while tally.kills < count:
        shutil.rmtree(stage_dir(stage) / KILLED, ignore_errors=True)
        while tally.kills < count:
            process = train(stage, KILLED, "--resume")
            was_saving = kill_at_random(process, stage, seconds, rng)
            if process.status == 0:
                break
            if process.status != -signal.SIGKILL:
                finish(process)
            tally.kills += 1
            tally.while_saving += was_saving
            tally.before_first += compare_checkpoints(stage) == 0
        else:
            finish(train(stage, KILLED, "--resume"))
        compare_checkpoints(stage)
        last = CheckpointReader(stage, REFERENCE).steps()[-1]
        if CheckpointReader(stage, KILLED).steps()[-1] != last:
            raise Failed(f"the run ended before step {last}")
        if losses_of(stage, KILLED) != losses_of(stage, REFERENCE):
            raise Failed(f"the losses of {stage} differ from those of the uninterrupted run")
        tally.runs += 1
        print(f"{stage}: {tally.kills} of {count} kills, {tally.runs} runs ended as the reference", flush=True)
    return tally


# ---- the whole speedrun ----


def kill_speedruns(count: int, rng: random.Random) -> Tally:
    """Kills speedrun.sh and all of its processes `count` times, each time another run."""
    base = Path(os.environ["NANOCHAT_BASE_DIR"])
    environment = os.environ | {"NANOCHAT_SPEEDRUN": "tiny", "NANOCHAT_VENV": sys.prefix, "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()

    def run(tag: str, seconds: float | None = None) -> int | None:
        """Runs speedrun.sh in a base folder, for some seconds at most; returns its exit status, None if killed."""
        environment["NANOCHAT_BASE_DIR"] = str(base / tag)
        with (base / f"{tag}.log").open("ab") as log:
            command = ["bash", str(ROOT / "speedrun.sh")]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None

    if run(REFERENCE):
        raise Failed(f"the speedrun failed: see {base / f'{REFERENCE}.log'}")
    seconds = time.monotonic() - began
    tally = Tally()
    while tally.kills < count:
        # A new folder, but with the reference's measurements of the machine: they decide the last bits of products.
        shutil.rmtree(base / KILLED, ignore_errors=True)
        shutil.copytree(base / REFERENCE / "measurements", base / KILLED / "measurements")
        tally.kills += run(KILLED, rng.uniform(0, seconds)) is None
        if run(KILLED) != 0:
            raise Failed(f"the speedrun did not end after a kill: see {base / f'{KILLED}.log'}")
        for stage in ("base", "sft"):
            folders = [base / tag / STAGES[stage][0] / "speedrun" for tag in (REFERENCE, KILLED)]
            reference, killed = (tensors_of(sorted(folder.glob("step_*"))[-1]) for folder in folders)
            if killed != reference:
                raise Failed(f"the {stage} model of {folders[1]} differs from that of {folders[0]}")
        tally.runs += 1
        print(f"speedrun: {tally.kills} of {count} kills, {tally.runs} runs ended as the reference", flush=True)
    return tally


# ---- damaged checkpoints ----


def damage_checkpoints(count: int, rng: random.Random) -> Tally:
    """Damages one file of the newest checkpoint `count` times, in one of ten cases of all of them."""
    finish(train("base", REFERENCE))
    reference = stage_dir("base") / REFERENCE
    damaged = stage_dir("base") / KILLED
    tally = Tally()
    for _ in range(count):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(reference, damaged)
        steps = sorted(damaged.iterdir())
        for step in steps if rng.random() < 0.1 else steps[-1:]:
            damage(rng.choice(sorted(step.iterdir())), rng)
        try:
            with redirect_stderr(io.StringIO()):  # a warning for each damaged checkpoint
                loaded = CheckpointReader("base", KILLED).load()
        except UserError as error:
            if "\n" in str(error):
                raise Failed(f"an error of several lines: {error}") from error
            tally.refused += 1
        else:
            if tensors_of(loaded.path) != tensors_of(reference / loaded.path.name):
                raise Failed(f"{loaded.path} was loaded although it is damaged")
            tally.runs += 1
    finish(train("base", KILLED, "--resume"))  # also from the last damaged ones
    compare_checkpoints("base")
    return tally


def damage(file: Path, rng: random.Random) -> None:
    """Cuts the file off or flips a bit, at a random offset."""
    content = bytearray(file.read_bytes())
    offset = rng.randrange(len(content))
    if rng.random() < 0.5:
        del content[offset:]
    else:
        content[offset] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


# ---- disks ----


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mounts a disk of this size at the folder. PermissionError where that is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        folder.rmdir()
        raise PermissionError("mounting a small disk is not permitted: run this part as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fail_on_disks(count: int, rng: random.Random) -> Tally:
    """Trains on a disk that is full after a random number of bytes and then read-only, `count` times."""
    finish(train("base", REFERENCE))
    one_step = sum(file.stat().st_size for file in (stage_dir("base") / REFERENCE / LAST_STEP).iterdir())
    tally = Tally()
    disk = stage_dir("base") / KILLED
    disk.write_text("a file in place of the folder")
    expect_error(train("base", KILLED, "--resume"))
    disk.unlink()
    with small_disk(disk, megabytes=64):
        for _ in range(count):
            filler = disk / "filler"
            free = shutil.disk_usage(disk).free
            filler.write_bytes(bytes(max(0, free - int(one_step * rng.uniform(0, 6)))))
            process = train("base", KILLED, "--resume")
            expect_error(process)
            tally.kills += 1
            compare_checkpoints("base")
            filler.unlink()
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            expect_error(train("base", KILLED, "--resume"))
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            finish(train("base", KILLED, "--resume"))
            compare_checkpoints("base")
            if losses_of("base", KILLED) != losses_of("base", REFERENCE):
                raise Failed("the losses differ from those of the uninterrupted run")
            tally.runs += 1
            for step in disk.glob("step_*"):
                shutil.rmtree(step)
    return tally


def expect_error(process: Process) -> None:
    """Failed unless the run ends with one line of an error, and without a traceback."""
    process.wait()
    text = process.log.read_text()
    last_line = text.splitlines()[-1]
    if process.status == 0 or "Traceback" in text or not last_line.startswith("error: "):
        raise Failed(f"expected an error of one line, got status {process.status}: {last_line}")
    process.log.unlink()


# ---- command line ----


@dataclass(frozen=True)
class Flags:
    parts: list[str] = flag((), f"what to do: {', '.join(PARTS)}")
    count: int = flag(20, "kills, damaged checkpoints or full disks, of each part")
    seed: int = flag(0, "seed of the random moments, files and offsets")
    folder: str = flag("", "empty folder for all files, which is kept; default: a temporary one")


@command
def main(flags: Flags) -> None:
    for part in flags.parts:
        if part not in PARTS:
            raise UserError(f"unknown part {part}: choose from {', '.join(PARTS)}")
    folder = Path(flags.folder or tempfile.mkdtemp(prefix="faults-")).resolve()
    if flags.folder and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another --folder")
    os.environ["NANOCHAT_DTYPE"] = "float32"
    chat_rl.TASKS["hardsums"] = RandomRewards
    results: dict[str, Tally] = {}
    try:
        for part in flags.parts:
            results[part] = run_part(part, folder / part, flags.count, random.Random(flags.seed))
    except PermissionError as error:
        print(f"left out: {error}")
    except Failed as failure:
        raise SystemExit(f"FAILED: {failure}; all files are in {folder}") from failure
    if not flags.folder:
        shutil.rmtree(folder)
    print(json.dumps({part: vars(tally) for part, tally in results.items()}))


def run_part(part: str, base: Path, count: int, rng: random.Random) -> Tally:
    base.mkdir(parents=True)
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    os.environ["NANOCHAT_DATA_DIR"] = str(base / "text")
    if part == "speedrun":
        del os.environ["NANOCHAT_DATA_DIR"]
        return kill_speedruns(count, rng)
    finish(start(prepare, base / "prepare.log"))
    for stage in {"sft": ("base",), "rl": ("base", "sft")}.get(part, ()):
        finish(train(stage, REFERENCE))
    if part == "damage":
        return damage_checkpoints(count, rng)
    if part == "disk":
        return fail_on_disks(count, rng)
    return kill_runs(part, count, rng)


if __name__ == "__main__":
    main()
