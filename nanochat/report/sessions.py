"""
Sessions: each start of a stage and how it ended, as files with which the report can tell what has really happened.

    <base>/report/sessions.jsonl    two lines per session: one when it starts, one when it ends (written by record.py)

A killed process writes no second line; then its process no longer exists. The time of all sessions together is what a
run has really taken, failed attempts included.
"""

import os
import platform
import shlex
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanochat.cli import to_argv
from nanochat.hardware import available_memory


def sessions_file(base: Path) -> Path:
    return base / "report" / "sessions.jsonl"


def describe_start(stage: str, flags: Any) -> dict[str, Any]:
    """What is known of a session at its start."""
    return {
        "stage": stage,
        "command": command_line(stage, flags),
        "flags": asdict(flags),
        "commit": commit(),
        "environment": environment(),
        "gpus": num_gpus(flags),
        "host": socket.gethostname(),
        "process": [os.getpid(), start_time(os.getpid())],
    }


def command_line(stage: str, flags: Any) -> str:
    """The shortest command that starts a stage with these flags: those that differ from the defaults."""
    launcher = "python"
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if num_ranks > 1:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        launcher = f"torchrun --nproc_per_node={per_node}"
        if num_ranks > per_node:
            launcher += f" --nnodes={num_ranks // per_node}"
    return f"{launcher} -m scripts.{stage} {shlex.join(to_argv(flags, changed_only=True))}".strip()


def commit() -> str:
    """The commit of this code, with "-dirty" if files were changed since; empty if it is not in a git repository."""
    folder = Path(__file__).parent
    is_tracked = git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    return git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if is_tracked else ""


def git(folder: Path, *arguments: str) -> str:
    """The output of git; empty if it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment() -> dict[str, str]:
    """The machine and the versions that results may depend on. It does not start CUDA, which would take memory."""
    found = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores",
        "memory": f"{available_memory() / 2**30:.0f} GiB available",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
    }
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def cpu_name() -> str:
    """The CPU's name as its vendor writes it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def num_gpus(flags: Any) -> int:
    """
    The GPUs that are reserved for a session: all that it could use on its nodes. A stage such as the tokenizer's leaves
    them idle, but they are paid for.
    """
    if getattr(flags, "device", "auto") in ("cpu", "mps"):
        return 0
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    num_nodes = max(1, num_ranks // int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))
    return torch.cuda.device_count() * num_nodes


def gpu_name() -> dict[str, str]:
    """The GPU's name, if the process has used it: asking for it would start CUDA."""
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}


def start_time(number: int) -> str:
    """When a process started, in the kernel's units; empty if it has ended or there never was one, or without /proc."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]  # Z: killed, but its parent has not noticed yet


def is_running(start: dict[str, Any]) -> bool:
    """
    Whether the process of a session still exists. Its number is not enough, as numbers are used again; without /proc it
    has to do. False for a session of another machine.
    """
    process = start.get("process", [])
    if start.get("host") != socket.gethostname() or len(process) != 2 or not isinstance(process[0], int):
        return False
    number, started = process
    if started:
        return start_time(number) == started
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):  # there is none, or there cannot be one with this number
        return False
    except PermissionError:  # it exists and belongs to another user
        return True
    return True
