"""
The sandbox: right programs pass, wrong ones fail, and a table of attacks fails too, with nothing left behind.

    python -m pytest tests/test_sandbox.py
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.sandbox import parent as execution
from nanochat.sandbox.child import MACHINES, MAX_FILE, REFUSED, pack, unpack
from nanochat.sandbox.parent import OUTPUT_BYTES, run

CHECK = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 6\n"
SECRET = "a secret in the environment"


@pytest.fixture(scope="module")
def on():
    """The protections that this machine allows."""
    return set(run(RIGHT, CHECK, "add", timeout=30).protections)


@pytest.fixture(autouse=True)
def folders(tmp_path_factory, monkeypatch):
    """Where temporary folders are made; after each test neither one of them nor a process is left."""
    place = tmp_path_factory.mktemp("folders")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    wait_for(lambda: not insiders())
    assert not list(place.iterdir())


def wait_for(condition):
    """A killed process takes a moment to be gone."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def insiders():
    """Processes of this module's sandboxes."""
    commands = [path / "cmdline" for path in Path("/proc").glob("[0-9]*")] if sys.platform == "linux" else []
    found = []
    for path in commands:
        try:
            found += [path] if str(execution.INSIDE).encode() in path.read_bytes() else []
        except OSError:
            continue  # it has just ended
    return found


def outcome(program, check=CHECK, **options):
    return run(program, check, "add", **({"timeout": 20.0} | options)).outcome


# ---- honest programs ----


def test_right_and_wrong():
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
def test_programs_that_do_not_work(program):
    result = run(program, CHECK, "add", timeout=20)
    assert result.outcome == "failed" and result.output


def test_what_an_honest_program_may_do():
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


def test_a_check_may_call_the_function_by_its_name():
    assert outcome(RIGHT, "def add(a, b): 'To do.'\n\ndef check(f):\n    assert add(1, f(1, 1)) == 3") == "passed"


def test_state_is_kept_between_calls_and_exceptions_end_the_sample():
    counts = "n = 0\ndef add(a, b):\n    global n\n    n += 1\n    return n"
    assert outcome(counts, "def check(f):\n    assert [f(1, 1), f(1, b=1)] == [1, 2]") == "passed"
    raises = "def add(a, b): raise ValueError"
    assert outcome(raises, "def check(f):\n    try: f(1, 2)\n    except BaseException: pass") == "failed"


VALUES = [
    None, True, False, 0, -1, 10**6000, 1.5, -0.0, float("inf"), 1e-320, 3 + 4j, "", "naïve 水 \ud800\n", b"\x00\xff",
    [], [1, [2.0, "3"]], (), (1,), ((),), set(), {1, (2, 3)}, frozenset({"a"}), {}, {1: "one", (2, "b"): [None]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_data_survives_the_pipe(value):
    received = unpack(json.loads(json.dumps(pack(value))))
    assert received == value and type(received) is type(value)


def test_types_stay_apart_and_other_iterables_become_iterators():
    assert type(unpack(pack(True))) is bool and type(unpack(pack(1))) is int and type(unpack(pack(1.0))) is float
    received = unpack(pack(map(str, range(3))))
    assert received != ["0", "1", "2"] and tuple(received) == ("0", "1", "2")
    with pytest.raises(TypeError):
        pack(object())


def test_a_program_of_a_megabyte():
    table = "table = [\n" + "    'some text, and more of it',\n" * 32_000 + "]\n"
    assert len(table) > 1_000_000
    assert outcome(table + RIGHT) == "passed" and outcome(table + WRONG) == "failed"


def test_large_values():
    echo = "def add(a): return a"
    assert outcome(echo, "def check(f):\n    x = list(range(100_000))\n    assert f(x) == x") == "passed"


def test_output_is_kept_as_far_as_it_goes():
    program = "import sys\ndef add(a, b):\n    sys.stdout.buffer.write(b'caf\\xe9' * 50_000)\n    return a + b"
    result = run(program, CHECK, "add", timeout=20)
    assert result.passed and result.output == ("caf\ufffd" * 50_000)[:OUTPUT_BYTES]


def test_what_the_check_prints_is_output_and_no_verdict():
    result = run("def f(x): return x", "def check(f):\n    print('hello')\n    assert f(1) == 1", "f")
    assert result.passed and result.output == "hello\n"


def test_the_deadline():
    for program in ("import time; time.sleep(1000)", "while True: pass", "def add(a, b):\n    while True: pass"):
        assert outcome(program, timeout=1.0) == "timed out"
    assert outcome(RIGHT, "while True: pass", timeout=1.0) == "timed out"


def test_samples_side_by_side():
    programs = [f"{RIGHT if i % 3 else WRONG}\nopen('mine', 'x').write('{i}')" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, programs)) == ["passed" if i % 3 else "failed" for i in range(24)]


def test_a_sandbox_that_does_not_start_is_no_failed_sample(monkeypatch, tmp_path):
    monkeypatch.setattr(execution, "INSIDE", tmp_path / "missing.py")
    with pytest.raises(RuntimeError, match="did not start.*missing.py"):
        run(RIGHT, CHECK, "add")


# ---- attacks ----

# Each name a program whose `add` is never right unless the attack succeeds. Harmless wherever they run.
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
    main.pack = lambda value: {"eval": "5"}""",
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
    # The pattern does not find itself.
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

# These need something that not every machine has; the right answer is given if the attack worked.
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


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_fail(name):
    assert outcome(FORGERIES[name]) == "failed"


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_ended(name):
    assert outcome(ENDLESS[name], timeout=1.0) in ("failed", "timed out")


@pytest.mark.parametrize("name", NEED_SECCOMP)
def test_processes_and_signals(on, name):
    if "seccomp" not in on:
        pytest.skip("no seccomp here")
    assert outcome(NEED_SECCOMP[name], timeout=1.0 if name == "stubborn fork bomb" else 20.0) in ("failed", "timed out")


def test_files_outside(on, tmp_path):
    """Nothing is written, removed, renamed, linked or changed outside of the folder."""
    if "landlock" not in on and "read-only files" not in on:
        pytest.skip("neither landlock nor a mount namespace here")
    target = tmp_path / "target"
    target.write_text("as it was")
    target.chmod(0o640)
    place = str(tmp_path)
    attempts = [
        f"open({place + '/new'!r}, 'w').write('x')", f"open({str(target)!r}, 'w').write('x')",
        f"open({str(target)!r}, 'a').write('x')", f"open({str(target)!r}, 'r+').truncate(0)",
        f"os.truncate({str(target)!r}, 0)", f"os.unlink({str(target)!r})", f"os.rename({str(target)!r}, 'mine')",
        f"os.mkdir({place + '/folder'!r})", f"os.symlink('x', {place + '/link'!r})", f"os.chmod({str(target)!r}, 511)",
        f"os.link({str(target)!r}, {place + '/hard'!r})", f"os.chown({str(target)!r}, 1, 1)", "os.mkfifo('fifo')",
        f"os.utime({str(target)!r}, (0, 0))", f"os.setxattr({str(target)!r}, 'user.x', b'x')", "os.mkdir('mine')",
        f"shutil.rmtree({place!r})", "os.chroot('.')", "open('/dev/shm/nanochat', 'w')", "os.symlink('/', 'root')",
    ]  # fmt: skip
    before = target.stat()
    lines = "\n".join(f"    try:\n        {attempt}; done += 1\n    except OSError: pass" for attempt in attempts)
    program = f"import os, shutil\ndef add(a, b):\n    done = 0\n{lines}\n    return done"
    result = run(program, "def check(f):\n    done = f(2, 3)\n    assert done == 0, done", "add", timeout=20)
    assert target.stat() == before  # before it is read, which is an access
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "as it was"
    assert result.passed or "landlock" not in on, result.output


def test_secrets(on, tmp_path, monkeypatch):
    """Neither the environment of the processes above nor files of the user can be read."""
    if "landlock" not in on:
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


def test_network(on, tmp_path):
    if "namespaces" not in on and "seccomp" not in on:
        pytest.skip("neither namespaces nor seccomp here")
    listeners = [socket.socket(), socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)]
    for listener, place in zip(listeners, [("127.0.0.1", 0), ("127.0.0.1", 0), str(tmp_path / "s")], strict=True):
        listener.bind(place)
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
    for attempt in attempts[:{4 if "seccomp" in on else 2}]:
        try:
            attempt()
            return 5
        except OSError: pass"""
    assert outcome(program) == "failed"
    for listener in listeners:
        with listener, pytest.raises(TimeoutError):
            listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()


def test_a_killed_evaluator_leaves_no_process(tmp_path):
    if sys.platform != "linux":
        pytest.skip("no /proc here")
    code = "from nanochat.sandbox.parent import run\nrun('import time; time.sleep(1000)', '', 'add', timeout=1)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=execution.INSIDE.parent.parent.parent, env=environment
    ) as evaluator:
        wait_for(insiders)
        evaluator.kill()
    wait_for(lambda: not insiders())


# ---- a machine that allows less ----


def without_linux(monkeypatch, tmp_path):
    source = execution.INSIDE.read_text()
    assert source.count('sys.platform == "linux"') == 2
    monkeypatch.setattr(execution, "INSIDE", tmp_path / "sandbox.py")
    execution.INSIDE.write_text(source.replace('sys.platform == "linux"', "False"))


def test_without_linux_the_limits_remain_and_the_result_says_so(monkeypatch, tmp_path):
    without_linux(monkeypatch, tmp_path)
    result = run(RIGHT, CHECK, "add", timeout=20)
    assert result.passed and "cpu limit" in result.protections
    assert not {"namespaces", "own folder", "landlock", "seccomp"} & set(result.protections)
    for name in ("os._exit", "write the verdict to every file", "equal to everything", "search memory for the tests"):
        assert outcome(FORGERIES[name]) == "failed"
    assert outcome(WRONG) == "failed" and outcome(ENDLESS["signal handlers"], timeout=1.0) == "timed out"


def test_folders_too_deep_to_remove_do_not_stop_the_evaluator(monkeypatch, tmp_path, folders):
    without_linux(monkeypatch, tmp_path)
    deep = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n"
    assert outcome(deep + WRONG) == "failed"
    subprocess.run(["rm", "-rf", *folders.iterdir()], check=True)


def test_the_table_of_system_calls():
    assert {column for column, _ in MACHINES.values()} == {0, 1}
    for column in (0, 1):
        numbers = [both[column] for both in REFUSED.values() if both[column] is not None]
        assert len(set(numbers)) == len(numbers) < 250  # a filter's jumps reach 255 steps
    assert MAX_FILE > OUTPUT_BYTES
