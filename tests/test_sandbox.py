"""
The sandbox: correct programs pass, wrong programs and attacks fail, and no process or file is left behind.

    python -m pytest tests/test_sandbox.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from factories import wait_until

from nanochat.sandbox import parent
from nanochat.sandbox.child import BLOCKED_CALLS, MACHINES, MAX_FILE_BYTES, from_json, to_json
from nanochat.sandbox.parent import DISK_EXCEEDED, OUTPUT_BYTES, run

CHECK = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 6\n"
SECRET = "a secret in the environment"
NOBODY = 65534  # the user id that owns nothing


@pytest.fixture(scope="module")
def protections():
    """What this machine can enforce."""
    return set(run(RIGHT, CHECK, "add", timeout=30).protections)


@pytest.fixture(autouse=True)
def temporary_folders(tmp_path_factory, monkeypatch):
    """The folder of temporary folders; after each test it is empty and no process of a sandbox is left."""
    folder = tmp_path_factory.mktemp("folders")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    wait_until(lambda: not sandbox_processes())
    assert not list(folder.iterdir())


def sandbox_processes():
    """The command lines in /proc of this checkout's sandboxes."""
    commands = [path / "cmdline" for path in Path("/proc").glob("[0-9]*")] if sys.platform == "linux" else []
    found = []
    for path in commands:
        try:
            found += [path] if str(parent.CHILD).encode() in path.read_bytes() else []
        except OSError:
            continue  # the process has just ended
    return found


def outcome(program, check=CHECK, **options):
    return run(program, check, "add", **({"timeout": 20.0} | options)).outcome


# ---- honest programs ----


def test_run_correct_and_wrong_program_pass_and_fail():
    right = run(RIGHT, CHECK, "add", timeout=20)
    assert right.passed and right.outcome == "passed" and right.output == ""
    wrong = run(WRONG, CHECK, "add", timeout=20)
    assert not wrong.passed and wrong.outcome == "failed" and "AssertionError" in wrong.output
    assert right.protections == wrong.protections and "cpu limit" in right.protections


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b): return a +", "def other(a, b): return a + b", "add = 5", "1 / 0", "\0", "'\ud800'", "",
        "def add(a): return a", "def add(a, b): raise ValueError('no')", "def add(a, b): return object()",
        "def add(a, b): return add", "assert False", "raise KeyboardInterrupt", "import numpy\n" + RIGHT,
    ],
)  # fmt: skip
def test_run_broken_program_fails_with_output(program):
    result = run(program, CHECK, "add", timeout=20)
    assert result.outcome == "failed" and result.output


def test_run_honest_program_may_use_files_and_standard_library():
    program = """
import asyncio, collections, dataclasses, decimal, functools, hashlib, itertools, json, math, os, random, re, string
import tempfile, typing

@dataclasses.dataclass
class Pair:
    a: "int"
    b: int

def add(a, b):
    print("adding", a, "and", b)
    with open("numbers.txt", "w") as file:
        file.write(f"{a} {b}")
    with tempfile.NamedTemporaryFile("w+") as other:
        print(other.name)
    pair = Pair(*map(int, open("numbers.txt").read().split()))
    assert os.listdir() == ["numbers.txt"] and not os.environ.get("HOME")
    return pair.a + pair.b + len(hashlib.md5(b"").hexdigest()) - 32
"""
    result = run(program, CHECK, "add", timeout=20)
    assert result.passed and result.output.startswith("adding 2 and 3\n"), result.output


def test_check_may_call_function_by_name():
    assert outcome(RIGHT, "def add(a, b): 'To do.'\n\ndef check(f):\n    assert add(1, f(1, 1)) == 3") == "passed"


def test_calls_keep_state_and_exceptions_end_the_sample():
    counts = "n = 0\ndef add(a, b):\n    global n\n    n += 1\n    return n"
    assert outcome(counts, "def check(f):\n    assert [f(1, 1), f(1, b=1)] == [1, 2]") == "passed"
    raises = "def add(a, b): raise ValueError"
    assert outcome(raises, "def check(f):\n    try: f(1, 2)\n    except BaseException: pass") == "failed"


VALUES = [
    None, True, False, 0, -1, 10**6000, 1.5, -0.0, float("inf"), 1e-320, 3 + 4j, "", "naïve 水 \ud800\n", b"\x00\xff",
    [], [1, [2.0, "3"]], (), (1,), ((),), set(), {1, (2, 3)}, frozenset({"a"}), {}, {1: "one", (2, "b"): [None]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_json_conversion_of_plain_data_round_trips(value):
    received = from_json(json.loads(json.dumps(to_json(value))))
    assert received == value and type(received) is type(value)


def test_json_conversion_keeps_types_and_turns_iterables_into_iterators():
    assert (
        type(from_json(to_json(True))) is bool
        and type(from_json(to_json(1))) is int
        and type(from_json(to_json(1.0))) is float
    )
    received = from_json(to_json(map(str, range(3))))
    assert received != ["0", "1", "2"] and tuple(received) == ("0", "1", "2")
    with pytest.raises(TypeError):
        to_json(object())


def test_run_program_of_a_megabyte_works():
    table = "table = [\n" + "    'some text, and more of it',\n" * 32_000 + "]\n"
    assert len(table) > 1_000_000
    assert outcome(table + RIGHT) == "passed" and outcome(table + WRONG) == "failed"


def test_calls_with_large_values_work():
    echo = "def add(a): return a"
    assert outcome(echo, "def check(f):\n    x = list(range(100_000))\n    assert f(x) == x") == "passed"


def test_output_beyond_limit_is_cut():
    program = "import sys\ndef add(a, b):\n    sys.stdout.buffer.write(b'caf\\xe9' * 50_000)\n    return a + b"
    result = run(program, CHECK, "add", timeout=20)
    assert result.passed and result.output == ("caf\ufffd" * 50_000)[:OUTPUT_BYTES]


def test_output_of_check_is_not_the_verdict():
    result = run("def f(x): return x", "def check(f):\n    print('hello')\n    assert f(1) == 1", "f")
    assert result.passed and result.output == "hello\n"


@pytest.mark.slow
def test_run_beyond_deadline_times_out():
    for program in ("import time; time.sleep(1000)", "while True: pass", "def add(a, b):\n    while True: pass"):
        assert outcome(program, timeout=1.0) == "timed out"
    assert outcome(RIGHT, "while True: pass", timeout=1.0) == "timed out"


def test_run_in_threads_keeps_samples_apart():
    programs = [f"{RIGHT if i % 3 else WRONG}\nopen('mine', 'x').write('{i}')" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, programs)) == ["passed" if i % 3 else "failed" for i in range(24)]


def test_run_without_child_script_raises(monkeypatch, tmp_path):
    monkeypatch.setattr(parent, "CHILD", tmp_path / "missing.py")
    with pytest.raises(RuntimeError, match="did not start.*missing.py"):
        run(RIGHT, CHECK, "add")


# ---- attacks ----

# In each program `add` returns the right sum only if the attack succeeds. All are harmless wherever they run.
FORGERIES = {
    "sys.exit": "import sys; sys.exit(0)",
    "sys.exit in the function": "import sys\ndef add(a, b): sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "os._exit in the function": "import os\ndef add(a, b): os._exit(0)",
    "quit": "raise SystemExit",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\natexit.register(print, 'passed')\ndef add(a, b): exit",
    "print the verdict": "import os\ndef add(a, b):\n    for _ in range(3): print('passed')\n    os._exit(0)",
    "write the verdict to every file": """
import os
for fd in range(64):
    try: os.write(fd, b'passed\\n')
    except OSError: pass
os._exit(0)""",
    "reopen the report": """
import os
for pid in ("self", os.getppid(), os.getpid() - 1):
    for fd in range(10):
        try: open(f"/proc/{pid}/fd/{fd}", "w").write("passed\\n")
        except OSError: pass
os._exit(0)""",
    "nonsense on the pipe": """
import os
def add(a, b):
    for fd in range(3, 64):
        try: os.write(fd, b'\\xff}{\\n[1]\\n')
        except OSError: pass
    os._exit(0)""",
    "a message of an odd kind": """
import sys
def add(a, b):
    main = sys.modules['__main__']
    main.to_json = lambda value: {"eval": "5"}""",
    "nested without end": """
import sys
def add(a, b):
    sys.modules['__main__'].json.dumps = lambda message: '[' * 10**6""",
    "equal to everything": "class All:\n    def __eq__(self, other): return True\ndef add(a, b): return All()",
    "an int equal to everything": "class All(int):\n    __eq__ = lambda *_: True\ndef add(a, b): return All()",
    "a list equal to everything": "class All(list):\n    __eq__ = lambda *_: True\ndef add(a, b): return All()",
    "patched builtins": """
import builtins, sys
builtins.AssertionError = builtins.Exception
for module in list(sys.modules.values()): vars(module)['check'] = lambda candidate: None
sys.excepthook = sys.settrace = lambda *_: None
""" + WRONG,
    # [a] keeps the pattern from matching this source code.
    "search frames and objects for the tests": """
import gc, re, sys
def add(a, b):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [frame.f_globals, frame.f_locals]
        frame = frame.f_back
    texts = repr(seen) + repr([o for o in gc.get_objects() if isinstance(o, (dict, list, tuple, str))])
    return 5 if re.search('assert c[a]ndidate', texts) else 6""",
    "search memory for the tests": """
import re
def add(a, b):
    for line in open('/proc/self/maps'):
        start, end = (int(x, 16) for x in line.split()[0].split('-'))
        try:
            with open('/proc/self/mem', 'rb') as memory:
                memory.seek(start)
                if re.search(b'assert c[a]ndidate', memory.read(end - start)): return 5
        except (OSError, ValueError): pass
    return 6""",
    "recursion": "def add(a, b): return add(a, b)",
    "crash": "import ctypes\ndef add(a, b): ctypes.string_at(0)",
    "abort": "import os\ndef add(a, b): os.abort()",
    "deep result": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "deep source": "x = " + "(" * 100_000,
    "deeper source": "x = " + "-" * 1_000_000 + "1",
    "large result": "def add(a, b): return 'x' * (1 << 25)",
    "memory bomb": "x = 'x' * 10**12",
    "slow memory bomb": "x = []\nwhile True: x.append(bytearray(10**6))",
    "not UTF-8": "import sys\ndef add(a, b): sys.stdout.buffer.write(bytes(range(256)) * 100)",
    "not UTF-8 name": "def add(a, b): raise ValueError('\\ud800')",
    "large file": "open('x', 'wb').write(bytes(10**8))",
    "many open files": "import os\nwhile True: os.dup(1)",
    "no input": "def add(a, b): return 5 if input() else 6",
    "closed pipe": "import os\ndef add(a, b):\n    os.closerange(0, 64)",
}  # fmt: skip

# These run until the deadline, or a limit.
ENDLESS = {
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "endless result": "import itertools\ndef add(a, b): return itertools.count()",
    "result bomb": "def add(a, b): return [[[0] * 1000] * 1000] * 1000",
    "endless output": "while True:\n    try: print('x' * 10**5)\n    except OSError: pass",
    "endless output in the function": "def add(a, b):\n    while True: print(1, flush=True) if not a else None",
    "signal handlers": """
import signal
for number in signal.valid_signals():
    try: signal.signal(number, lambda *_: None)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
def add(a, b):
    while True: pass""",
    "many small files": """
import itertools
for i in itertools.count():
    try: open(str(i), 'wb').write(bytes(1000))
    except OSError: pass""",
}

# These are blocked by seccomp only; `add` returns the right sum if the attack worked.
NEED_SECCOMP = {
    "fork": "import os\ndef add(a, b):\n    if os.fork() == 0: os._exit(0)\n    return 5",
    "fork bomb": "import os\nwhile True: os.fork()",
    "stubborn fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "double fork out of the group": """
import os
if os.fork() == 0:
    os.setsid()
    os.fork()
    while True: pass
def add(a, b): return 5""",
    "new session": "import os\ndef add(a, b):\n    os.setsid()\n    return 5",
    "thread that outlives": """
import threading
def forever():
    while True: pass
def add(a, b):
    threading.Thread(target=forever).start()
    return 5""",
    "subprocess": "import subprocess\ndef add(a, b): return 5 + subprocess.run(['/bin/true']).returncode",
    "os.system": "import os\ndef add(a, b): return 5 + os.system('true')",
    "posix_spawn": "import os\ndef add(a, b): return 5 if os.posix_spawn('/bin/true', ['true'], {}) else 6",
    "exec": "import os\nos.execv('/bin/echo', ['echo', 'passed'])",
    "multiprocessing": "import multiprocessing\ndef add(a, b): return multiprocessing.Pool(1).apply(sum, [(a, b)])",
    "ctypes fork": "import ctypes\ndef add(a, b): return 5 if ctypes.CDLL(None).fork() > 0 else 6",
    "ctypes system": "import ctypes\ndef add(a, b): return 5 + ctypes.CDLL(None).system(b'true')",
    "ctypes system call": "import ctypes\ndef add(a, b): return 5 if ctypes.CDLL(None).syscall(39 + 18, 0) > 0 else 6",
    "kill the checker": "import os, signal\ndef add(a, b):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return 5",
    "kill the group": "import os, signal\ndef add(a, b):\n    os.killpg(0, signal.SIGKILL)\n    return 5",
    "kill everything": "import os, signal\ndef add(a, b):\n    os.kill(-1, signal.SIGKILL)\n    return 5",
    "kill the parent": f"import os, signal\ndef add(a, b):\n    os.kill({os.getpid()}, signal.SIGTERM)\n    return 5",
    "signals by way of a pipe": """
import fcntl, os
def add(a, b): return 5 + fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getpid())""",
    "change limits": "import resource as r\ndef add(a, b):\n    r.setrlimit(r.RLIMIT_CPU, (9, 9))\n    return 5",
    "lower priority of others": "import os\ndef add(a, b):\n    os.setpriority(os.PRIO_USER, 0, 19)\n    return 5",
    "new namespaces": "import ctypes\ndef add(a, b): return 5 if ctypes.CDLL(None).unshare(0x10000000) == 0 else 6",
    "trace the parent": f"""
import ctypes
def add(a, b): return 5 + abs(ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0))""",
    "outlive the checker": "import ctypes\ndef add(a, b): return 5 if ctypes.CDLL(None).prctl(1, 0) == 0 else 6",
}


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("name", FORGERIES)
def test_forged_verdict_fails(name):
    assert outcome(FORGERIES[name]) == "failed"


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_program_is_killed(name):
    assert outcome(ENDLESS[name], timeout=1.0) in ("failed", "timed out")


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("name", NEED_SECCOMP)
def test_process_and_signal_attacks_fail(protections, name):
    if "seccomp" not in protections:
        pytest.skip("no seccomp here")
    assert outcome(NEED_SECCOMP[name], timeout=1.0 if name == "stubborn fork bomb" else 20.0) in ("failed", "timed out")


def test_files_outside_the_folder_stay_unchanged(protections, tmp_path):
    if "landlock" not in protections and "read-only files" not in protections:
        pytest.skip("neither landlock nor a mount namespace here")
    target = tmp_path / "target"
    target.write_text("as it was")
    target.chmod(0o640)
    folder = str(tmp_path)
    attempts = [
        f"open({folder + '/new'!r}, 'w').write('x')", f"open({str(target)!r}, 'w').write('x')",
        f"open({str(target)!r}, 'a').write('x')", f"open({str(target)!r}, 'r+').truncate(0)",
        f"os.truncate({str(target)!r}, 0)", f"os.unlink({str(target)!r})", f"os.rename({str(target)!r}, 'mine')",
        f"os.mkdir({folder + '/folder'!r})", f"os.symlink('x', {folder + '/link'!r})",
        f"os.chmod({str(target)!r}, 511)",
        f"os.link({str(target)!r}, {folder + '/hard'!r})", f"os.chown({str(target)!r}, 1, 1)", "os.mkfifo('fifo')",
        f"os.utime({str(target)!r}, (0, 0))", f"os.setxattr({str(target)!r}, 'user.x', b'x')", "os.mkdir('mine')",
        f"shutil.rmtree({folder!r})", "os.chroot('.')", "open('/dev/shm/nanochat', 'w')", "os.symlink('/', 'root')",
    ]  # fmt: skip
    before = target.stat()
    lines = "\n".join(f"    try:\n        {attempt}; done += 1\n    except OSError: pass" for attempt in attempts)
    program = f"import os, shutil\ndef add(a, b):\n    done = 0\n{lines}\n    return done"
    result = run(program, "def check(f):\n    done = f(2, 3)\n    assert done == 0, done", "add", timeout=20)
    assert target.stat() == before  # before it is read, which is an access
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "as it was"
    assert result.passed or "landlock" not in protections, result.output


def test_environment_and_files_of_user_cannot_be_read(protections, tmp_path, monkeypatch):
    if "landlock" not in protections:
        pytest.skip("no landlock here")
    monkeypatch.setenv("NANOCHAT_SECRET", SECRET)
    (tmp_path / "secret").write_text(SECRET)
    program = f"""
import glob, os
def add(a, b):
    found = str(os.environ)
    for path in [*glob.glob("/proc/*/environ"), "/proc/{os.getpid()}/environ", "/proc/self/environ",
                 f"/proc/{{os.getppid()}}/environ", {str(tmp_path / "secret")!r}, "/etc/passwd"]:
        try: found += open(path).read()
        except OSError: pass
    return found"""
    check = f"def check(f):\n    found = f(2, 3)\n    assert {SECRET!r} not in found and 'root:' not in found"
    assert outcome(program, check) == "passed"


def test_network_cannot_be_reached(protections, tmp_path):
    if "namespaces" not in protections and "seccomp" not in protections:
        pytest.skip("neither namespaces nor seccomp here")
    listeners = [socket.socket(), socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)]
    for listener, address in zip(listeners, [("127.0.0.1", 0), ("127.0.0.1", 0), str(tmp_path / "s")], strict=True):
        listener.bind(address)
        listener.settimeout(0.2)
    listeners[0].listen()
    listeners[2].listen()
    names = [listener.getsockname() for listener in listeners]
    program = f"""
import socket
tcp, udp, unix = {names!r}
def add(a, b):
    attempts = [
        lambda: socket.create_connection(tcp, timeout=1),
        lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", udp),
        lambda: socket.socket(socket.AF_UNIX).connect(unix),
        lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].connect(unix),
    ]
    for attempt in attempts[:{4 if "seccomp" in protections else 2}]:
        try:
            attempt()
            return 5
        except OSError: pass"""
    assert outcome(program) == "failed"
    for listener in listeners:
        with listener, pytest.raises(TimeoutError):
            listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()


def test_killed_evaluator_leaves_no_process(tmp_path):
    if sys.platform != "linux":
        pytest.skip("no /proc here")
    code = "from nanochat.sandbox.parent import run\nrun('import time; time.sleep(1000)', '', 'add', timeout=1)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=parent.CHILD.parent.parent.parent, env=environment
    ) as evaluator:
        wait_until(sandbox_processes)
        evaluator.kill()
    wait_until(lambda: not sandbox_processes())


# ---- disk space and inotify, as root and as an ordinary user, with and without namespaces ----

# `add` returns the right sum if the program was not stopped.
DISK_ATTACKS = {
    "large files": "import os\nfor i in range(200): open(str(i), 'wb').write(bytes(1 << 22))\n" + RIGHT,
    "many files": "import time\nfor i in range(2000): open(str(i), 'wb').close()\ntime.sleep(1)\n" + RIGHT,
}
FALLOCATE = """
import os
descriptor = os.open("x", os.O_CREAT | os.O_WRONLY)
def add(a, b):
    os.posix_fallocate(descriptor, 0, 1 << 20)
    return a + b"""
INOTIFY = "import ctypes\ndef add(a, b): return 5 if ctypes.CDLL(None).inotify_init1(0) >= 0 else 6"
FANOTIFY = "import ctypes\ndef add(a, b): return 5 if ctypes.CDLL(None).fanotify_init(0, 0) >= 0 else 6"
RUN_PROGRAMS = """
import json, sys
from nanochat.sandbox.parent import run
check, programs = json.load(sys.stdin)
results = {name: vars(run(program, check, "add", timeout=20)) for name, program in programs.items()}
print(json.dumps(results))
"""
NO_NAMESPACES = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


def run_elsewhere(programs, *, ordinary_user, namespaces):
    """Runs programs in a sandbox that another process starts; returns the fields of each result."""
    python, options = sys.executable, {}
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        code = Path(folder, "code")
        shutil.copytree(Path(parent.__file__).parent, code / "nanochat/sandbox")
        (code / "nanochat/__init__.py").touch()
        Path(folder).chmod(0o755)
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        scratch.chmod(0o777)
        if ordinary_user and os.geteuid() == 0:
            python, options = "/usr/bin/python3", {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        elif not ordinary_user and os.geteuid() != 0:
            pytest.skip("these tests do not run as root")
        command = [python, "-c", RUN_PROGRAMS]
        if not namespaces:
            unshare = ["unshare", "--user", "--map-current-user", "--keep-caps"]
            command = [*unshare, "sh", "-c", NO_NAMESPACES, "sh", *command]
        environment = {"PYTHONPATH": str(code), "TMPDIR": str(scratch), "PATH": os.environ["PATH"]}
        job = json.dumps([CHECK, programs])
        done = subprocess.run(command, input=job, capture_output=True, text=True, env=environment, cwd="/", **options)
        if done.returncode:
            pytest.skip(f"this machine cannot set up the environment: {done.stderr[-300:]}")
        assert not list(scratch.iterdir())
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="namespaces and seccomp are Linux's")
@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "no-namespaces"])
@pytest.mark.parametrize("ordinary_user", [False, True], ids=["root", "user"])
def test_disk_use_is_bounded_and_reported(ordinary_user, namespaces):
    programs = {"right": RIGHT, "fallocate": FALLOCATE, "inotify": INOTIFY, "fanotify": FANOTIFY} | DISK_ATTACKS
    results = run_elsewhere(programs, ordinary_user=ordinary_user, namespaces=namespaces)
    assert results["right"]["outcome"] == "passed"
    protections = set(results["right"]["protections"])
    assert ("no processes" in protections) == ordinary_user
    if not namespaces:
        assert not {"namespaces", "own folder"} & protections
        assert ("disk watch" in protections) == ({"landlock", "seccomp"} <= protections)
    elif "own folder" in protections:
        assert "disk watch" not in protections  # the file system itself has a limit
    if "seccomp" in protections:
        for name in ("fallocate", "inotify", "fanotify"):
            assert results[name]["outcome"] == "failed"
    if {"own folder", "disk watch"} & protections:
        for name in DISK_ATTACKS:
            assert results[name]["outcome"] == "failed"
            reason = DISK_EXCEEDED if "disk watch" in protections else "No space left on device"
            assert reason in results[name]["output"]


# ---- a machine that allows less ----


def without_linux(monkeypatch, tmp_path):
    source = parent.CHILD.read_text()
    assert source.count('sys.platform == "linux"') == 2
    monkeypatch.setattr(parent, "CHILD", tmp_path / "sandbox.py")
    parent.CHILD.write_text(source.replace('sys.platform == "linux"', "False"))


@pytest.mark.slow
def test_without_linux_only_limits_are_reported(monkeypatch, tmp_path):
    without_linux(monkeypatch, tmp_path)
    result = run(RIGHT, CHECK, "add", timeout=20)
    assert result.passed and "cpu limit" in result.protections
    assert not {"namespaces", "own folder", "landlock", "seccomp"} & set(result.protections)
    for name in ("os._exit", "write the verdict to every file", "equal to everything", "search memory for the tests"):
        assert outcome(FORGERIES[name]) == "failed"
    assert outcome(WRONG) == "failed" and outcome(ENDLESS["signal handlers"], timeout=1.0) == "timed out"


def test_folders_too_deep_to_remove_do_not_raise(monkeypatch, tmp_path, temporary_folders):
    without_linux(monkeypatch, tmp_path)
    deep = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n"
    assert outcome(deep + WRONG) == "failed"
    subprocess.run(["rm", "-rf", *temporary_folders.iterdir()], check=True)


def test_blocked_calls_fit_the_filter():
    assert {column for column, _ in MACHINES.values()} == {0, 1}
    for column in (0, 1):
        numbers = [call[column] for call in BLOCKED_CALLS.values() if call[column] is not None]
        assert len(set(numbers)) == len(numbers) < 250  # a jump of the filter reaches 255 instructions
    assert MAX_FILE_BYTES > OUTPUT_BYTES
