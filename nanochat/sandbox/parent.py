"""
Runs code that a model wrote and judges it with tests that the code never sees.

    result = run("def double(x): return 2 * x", "def check(f): assert f(3) == 6", "double")
    result.passed         # True
    result.protections    # ("cpu limit", "memory limit", …, "namespaces", …, "landlock", "seccomp")

The program and its check run in two fresh processes (sandbox.py), apart from this one: no standard input, an empty
environment, a temporary directory, a process group of their own. The check calls the function over a pipe and gets
plain data back. So there is nothing to forge: the program's process holds neither the tests nor the pipe on which the
verdict is reported, whatever it exits with or prints, and a result that claims to equal everything arrives as data.

What is closed off depends on the machine; `protections` names what was:
- "… limit", "no core dumps"  processor time, memory, size and number of open files (rlimits)
- "no processes"              neither processes nor threads (an rlimit too, which does not bind root)
- "namespaces"                no network but sockets that are files, no way to other processes, its own die with it
- "read-only files"           nothing can be written,
- "own folder"                but for a small file system in memory in place of the temporary directory
- "landlock"                  reads only the libraries of Python and the system, writes only to the temporary directory
- "seccomp"                   no new threads and processes, other programs, signals, sockets, others' memory
On Linux all of them usually are on, for root too except "no processes"; in a container, those without a namespace.

Not protected: without landlock, whatever files the user may read (and write, if they are not read-only); without
namespaces and seccomp, the network and the user's other processes, and root's processes that leave the group live on.
macOS has only the limits, the one on memory perhaps not, and the process group. A fault of the kernel is a way out
everywhere. This keeps a model's clumsy or cheating code from doing harm; to run the code of an attacker who is after
the machine, use a virtual machine.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INSIDE = Path(__file__).with_name("child.py")
OUTPUT_BYTES = 1 << 16  # of what was printed, kept for a person to look at; arbitrary


@dataclass(frozen=True)
class Result:
    outcome: str  # "passed", "failed" or "timed out"
    output: str  # what program and check printed, tracebacks included: the first OUTPUT_BYTES, bad bytes replaced
    protections: tuple[str, ...]  # those that were on

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run(program: str, check: str, function: str, timeout: float = 5.0, memory_mb: int = 512) -> Result:
    """
    Whether the `function` that the untrusted source `program` defines satisfies the trusted source `check`, which
    defines `check(candidate)` and raises if it is not satisfied. It may also call the function by its name.

    Arguments and results are plain data: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and
    dict; other iterables arrive as an iterator. Arguments are copies. An exception that leaves the function, or a
    result that is no such data, ends the sample, so a check cannot expect one.
    The program sees Python's standard library only. timeout: seconds from start to verdict; memory_mb: MiB of address
    space of each of the two processes. RuntimeError if Python cannot be started. May be called from several threads.
    """
    job = {"program": program, "check": check, "function": function}
    limits = {"seconds": timeout, "memory_bytes": memory_mb << 20}
    deadline = time.monotonic() + timeout
    # Files, so that nobody has to keep writing and reading; their size has a limit.
    with tempfile.TemporaryFile() as job_file, tempfile.TemporaryFile() as output, _scratch_folder() as folder:
        job_file.write(json.dumps(job).encode())
        job_file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-u", str(INSIDE), json.dumps(limits)],
            stdin=job_file, stdout=subprocess.PIPE, stderr=output, cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        with process:
            assert process.stdout
            try:
                report, in_time = _read_until(process.stdout.fileno(), deadline)
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # before it is waited for, so that the id is still its own
        output.seek(0)
        printed = output.read(OUTPUT_BYTES).decode("utf-8", errors="replace")
    protections, _, verdict = report.decode().partition("\n")
    if in_time and not protections:
        raise RuntimeError(f"the sandbox did not start: {printed.strip() or f'exit code {process.returncode}'}")
    outcome = "timed out" if not in_time else "passed" if verdict == "passed\n" else "failed"
    return Result(outcome, printed, tuple(json.loads(protections or "[]")))


def _read_until(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """What comes out of the pipe, and whether it was closed before the deadline."""
    data = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(pipe, 4096)
            if not chunk:
                return data, True
            data += chunk
    return data, False


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """An empty folder, removed afterwards with whatever was put there."""
    folder = tempfile.mkdtemp(prefix="nanochat-")
    try:
        yield folder
    finally:
        with suppress(RecursionError):  # nested deeper than Python can follow, which only landlock prevents
            shutil.rmtree(folder, ignore_errors=True)
