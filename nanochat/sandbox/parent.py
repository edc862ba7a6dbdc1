"""
Runs code that a model wrote and grades it with tests that the code never sees (HumanEval).

    result = run("def double(x): return 2 * x", "def check(f): assert f(3) == 6", "double")
    result.passed         # True
    result.protections    # ("cpu limit", "memory limit", …, "namespaces", …, "landlock", "seccomp")

The program and its check run in two new processes (child.py), with no standard input, an empty environment, a temporary
directory and their own process group. The check calls the function over a pipe and gets plain data back. The
program cannot forge a verdict: its process holds neither the tests nor the pipe on which the verdict is reported. An
object whose __eq__ always returns True does not help it either, because only plain data passes the pipe.

What can be enforced depends on the machine; `protections` lists what was:
- "… limit", "no core dumps"  processor time, memory, size and number of open files (resource limits)
- "no processes"              no processes or threads (a resource limit too, from which root is exempt)
- "namespaces"                no network except Unix sockets (files), no access to other processes
- "read-only files"           nothing can be written outside the temporary directory
- "own folder"                a file system in memory that replaces the temporary directory, of at most 64 MiB and
                              1,000 files
- "disk watch"                only without "own folder": the program is killed when the temporary directory holds more
                              than 64 MiB or 1,000 files; listed only with "landlock" and "seccomp", without which
                              the program can evade it
- "landlock"                  reads only libraries of Python and the system, writes only to the temporary directory
- "seccomp"                   no threads, processes, other programs, signals, sockets, other processes' memory, inotify
On Linux usually all are on, except "disk watch" and, for root, "no processes". In a container, "namespaces", "read-only
files" and "own folder" are usually off, and "disk watch" is on. macOS has only the limits, perhaps without the one on
memory.

What the program can do where a protection is off:
- Without "landlock" it can read all files of the user. Unless "read-only files" is on, it can also write them and fill
  the disk.
- Without both "namespaces" and "seccomp" it can use the network and access the user's other processes.
- Without all of "namespaces", "seccomp" and "no processes" it can start a process that outlives it.
- The disk watch looks every 10 ms, so the program can exceed the limit in between. The watch cannot see files that were
  deleted but are still open or mapped: they take space until the program ends.

A bug in the kernel can let a program out of the sandbox everywhere. The sandbox keeps careless or cheating code of a
model from doing harm. To run an attacker's code, use a virtual machine.
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

CHILD = Path(__file__).with_name("child.py")
OUTPUT_BYTES = 1 << 16  # of the printed output that are kept; heuristic, not tuned

# The disk watch. The limits are those of the file system in child.FOLDER_OPTIONS.
WATCH_SECONDS = 0.01  # between two looks at the temporary directory; a look takes about 1 ms at MAX_FILES
MAX_DISK_BYTES = 64 << 20
MAX_FILES = 1000
DISK_EXCEEDED = "\nkilled: the temporary directory held more than 64 MiB or 1,000 files\n"


@dataclass(frozen=True)
class Result:
    outcome: str  # "passed", "failed" or "timed out"
    output: str  # what program and check printed, tracebacks included: the first OUTPUT_BYTES, invalid bytes replaced
    protections: tuple[str, ...]  # those that were on

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run(program: str, check: str, function: str, timeout: float = 5.0, memory_mb: int = 512) -> Result:
    """
    Tests whether the `function` that the untrusted source code `program` defines satisfies the trusted source code
    `check`, which defines `check(candidate)` and raises if it is not satisfied. The check may also call the function
    by its name.

    Arguments and results are plain data: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and
    dict. Iterables of other types become iterators. Arguments are copies. If the function raises an exception or
    returns anything else, the run ends as "failed", so a check cannot test for an exception.
    The program can import only Python's standard library. `timeout`: seconds from start to verdict; `memory_mb`: MiB of
    address space of each of the two processes. Raises RuntimeError if Python cannot be started. Thread-safe.
    """
    job = {"program": program, "check": check, "function": function}
    limits = {"seconds": timeout, "memory_bytes": memory_mb << 20}
    deadline = time.monotonic() + timeout
    # Files rather than pipes, so that no thread has to keep writing and reading; the file limit bounds their size.
    with tempfile.TemporaryFile() as job_file, tempfile.TemporaryFile() as output, _temporary_folder() as folder:
        job_file.write(json.dumps(job).encode())
        job_file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-u", str(CHILD), json.dumps(limits)],
            stdin=job_file, stdout=subprocess.PIPE, stderr=output, cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        with process:
            assert process.stdout
            report = _Report(process.stdout.fileno(), Path(folder))
            try:
                outcome = report.wait(deadline)
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # before wait(), after which the id may belong to another group
        output.seek(0)
        printed = output.read(OUTPUT_BYTES).decode("utf-8", errors="replace")
    if outcome == "did not start":
        raise RuntimeError(f"the sandbox did not start: {printed.strip() or f'exit code {process.returncode}'}")
    if report.disk_exceeded:
        printed += DISK_EXCEEDED
    return Result(outcome, printed, tuple(report.protections))


class _Report:
    """Reads what the checker reports: a line with the protections, then "passed" or nothing."""

    def __init__(self, pipe: int, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.data = b""
        self.protections: list[str] = []
        self.watch_disk = False
        self.disk_exceeded = False

    def wait(self, deadline: float) -> str:
        """Returns the outcome as soon as the pipe is closed, the deadline passes or the disk limit is exceeded."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.pipe, selectors.EVENT_READ)
            while (remaining := deadline - time.monotonic()) > 0:
                if selector.select(min(remaining, WATCH_SECONDS) if self.watch_disk else remaining):
                    chunk = os.read(self.pipe, 4096)
                    if not chunk:
                        return self._outcome()
                    self.data += chunk
                    self._read_protections()
                elif self.watch_disk and _exceeds_disk_limit(self.folder):
                    self.disk_exceeded = True
                    return "failed"
        return "timed out"

    def _outcome(self) -> str:
        protections, _, verdict = self.data.partition(b"\n")
        if not protections:
            return "did not start"
        return "passed" if verdict == b"passed\n" else "failed"

    def _read_protections(self) -> None:
        """Parses the first line once it is complete; it arrives before the program starts."""
        if self.protections or b"\n" not in self.data:
            return
        self.protections = json.loads(self.data.partition(b"\n")[0])
        self.watch_disk = "own folder" not in self.protections
        # The disk watch counts as a protection only together with landlock and seccomp. Without landlock the program
        # could write to other folders, without seccomp it could reserve space faster than the watch looks.
        if self.watch_disk and {"landlock", "seccomp"} <= set(self.protections):
            self.protections.append("disk watch")


def _exceeds_disk_limit(folder: Path) -> bool:
    num_bytes = 0
    try:
        with os.scandir(folder) as entries:
            for num_files, entry in enumerate(entries, 1):
                with suppress(FileNotFoundError):  # deleted in the meantime
                    num_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
                if num_files > MAX_FILES or num_bytes > MAX_DISK_BYTES:
                    return True
    except OSError:  # the program renamed the folder or made it unreadable, which landlock and seccomp prevent
        return False
    return False


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """An empty folder, removed afterwards with everything that was written to it."""
    folder = tempfile.mkdtemp(prefix="nanochat-")
    try:
        yield folder
    finally:
        with suppress(RecursionError):  # nested deeper than Python can follow, which only landlock prevents
            shutil.rmtree(folder, ignore_errors=True)
