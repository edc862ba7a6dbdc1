"""
The inside of execution.py: a script that is started afresh for every sample and splits in two.

    python -I -S -u sandbox.py '{"seconds": 5, "memory_bytes": 536870912}' < job.json > report 2> output

The checker has the tests, the program has the code of the model. They split before either is read, so that the
program's memory never held the tests; then the program gives up its rights, one layer after another, and the checker
calls its function over two pipes, in lines of JSON, which is safe to read whatever was sent. Only the checker writes
the report: a line of JSON, the protections that are on; and when the check has returned, the line "passed". All else
that can end a sample, an exception, a signal, a closed pipe, is a failure.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

# Arbitrary, far above what an honest program needs.
MAX_MESSAGE = 1 << 24  # characters of one result
MAX_FILE = 1 << 22  # bytes of one file, the output too
FOLDER_OPTIONS = b"size=64m,nr_inodes=1000,mode=700"  # of the temporary directory's own file system
MAX_OPEN = 32  # files

# ---- Linux's numbers: include/uapi/linux/{sched,prctl,capability,landlock,seccomp,audit}.h ----
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CAPABILITY_VERSION_3 = 0x20080522
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, alike on all processors
LANDLOCK_VERSION_FLAG, LANDLOCK_PATH_BENEATH = 1, 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
WRITE = 1 << 1 | 1 << 5 | 1 << 8  # write to, remove, make plain files; no folders, links, devices, sockets
TRUNCATE = 1 << 14
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # rights that a version of landlock knows; 16 from version 5 on
NETWORK_RIGHTS, SCOPES = 0b11, 0b11  # TCP bind and connect (version 4); signals and abstract sockets (version 6)
BPF_LOAD, BPF_EQUAL, BPF_AT_LEAST, BPF_RETURN = 0x20, 0x15, 0x35, 0x06
SECCOMP_MODE_FILTER, SECCOMP_ALLOW, SECCOMP_EPERM = 2, 0x7FFF0000, 0x00050001
X32 = 0x40000000  # x86-64's second set of system calls begins here
TO_THE_LAST = -1  # a jump of ours

# What the program is refused, as the numbers of (x86-64, arm64); Linux's arch/x86/entry/syscalls/syscall_64.tbl and
# include/uapi/asm-generic/unistd.h. A list of what to refuse and not of what to allow, because what an interpreter
# needs differs between versions of Python and of the C library.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
REFUSED = {
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None),
    "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154),
    "unshare": (272, 97), "setns": (308, 268), "prctl": (157, 167), "prlimit64": (302, 261),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "socket": (41, 198), "socketpair": (53, 199),
    "io_uring_setup": (425, 425), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    # What landlock does not cover: files' modes, owners, times and attributes.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
FCNTL, SET_OWNER = (72, 25), (8, 15)  # fcntl may not have another process signalled: F_SETOWN, F_SETOWN_EX


def main() -> None:
    options = json.loads(sys.argv[1])
    signal.alarm(int(options["seconds"]) + 1)  # ends the checker should the evaluator be gone by then
    protections = set_limits(options["seconds"], options["memory_bytes"])
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        protections += enter_namespaces(libc)
        libc.prctl(PR_SET_DUMPABLE, *longs(0, 0, 0, 0))  # so that the program may not look into the checker
    from_checker, to_program = os.pipe()
    from_program, to_checker = os.pipe()
    program = os.fork()
    if program == 0:
        os.close(to_program)
        os.close(from_program)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # over the job
        os.dup2(2, 1)  # over the report
        be_program(open(from_checker), open(to_checker, "w"))
    else:
        os.close(from_checker)
        os.close(to_checker)
        receiver, sender = open(from_program), open(to_program, "w")
        be_checker(receiver, sender, protections)
        os.kill(program, signal.SIGKILL)
        os.waitpid(program, 0)
        print("passed", file=sys.__stdout__)


def be_checker(receiver: TextIO, sender: TextIO, protections: list[str]) -> None:
    """Reads the job and returns if the check does."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            send(sender, [pack(args), pack(kwargs)])
            return unpack(receive(receiver))
        except Exception as error:  # noqa: BLE001  what was sent may be anything, and no `except` of the check sees it
            print(f"the program sent no result: {error}", file=sys.stderr)
            os._exit(1)

    print(json.dumps(protections + receive(receiver)))
    sys.stdout = sys.stderr  # what the check prints is no part of the report
    job = json.load(sys.stdin)
    send(sender, [job["program"], job["function"]])
    tests: dict[str, Any] = {"__name__": "check"}
    exec(compile(job["check"], "<check>", "exec"), tests)
    tests[job["function"]] = call
    tests["check"](call)


def be_program(receiver: TextIO, sender: TextIO) -> None:
    """Gives up its rights, then runs the source it is sent and answers calls until it is killed."""
    send(sender, give_up_rights())
    source, name = json.loads(next(receiver))
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses and the like look their module up
    exec(compile(source, "<program>", "exec"), module.__dict__)
    function: Callable[..., Any] = getattr(module, name)
    for line in receiver:
        args, kwargs = map(unpack, json.loads(line))
        send(sender, pack(function(*args, **kwargs)))


# ---- messages ----


def send(file: TextIO, message: Any) -> None:
    file.write(json.dumps(message) + "\n")
    file.flush()


def receive(file: TextIO) -> Any:
    line = file.readline(MAX_MESSAGE)
    if not line.endswith("\n"):
        raise ValueError("it is too large" if line else "it ended before the check did")
    return json.loads(line)


def pack(value: Any) -> Any:
    """Plain data as JSON that keeps types apart: (1, "a") -> {"tuple": [{"int": "0x1"}, "a"]}."""
    match value:
        case None | bool() | str() | float():
            return value
        case int():
            return {"int": hex(value)}  # unlike decimal without a limit on digits
        case complex():
            return {"complex": [value.real, value.imag]}
        case bytes():
            return {"bytes": value.hex()}
        case dict():
            return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
        case list() | tuple() | set() | frozenset():
            name = next(kind.__name__ for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
            return {name: [pack(item) for item in value]}
        case _:
            return {"iter": [pack(item) for item in value]}


def unpack(message: Any) -> Any:
    """What was packed; an exception for anything else."""
    if not isinstance(message, dict):
        return message
    [(name, content)] = message.items()
    match name:
        case "int":
            return int(content, 16)
        case "complex":
            return complex(*content)
        case "bytes":
            return bytes.fromhex(content)
        case "dict":
            return {unpack(key): unpack(item) for key, item in content}
    kinds: dict[str, Callable[..., Any]]
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iter": iter}
    return kinds[name]([unpack(item) for item in content])


# ---- protections ----


def set_limits(seconds: float, memory_bytes: int) -> list[str]:
    """Limits this process and those to come; returns the ones that took effect."""
    limits = {
        "cpu limit": (resource.RLIMIT_CPU, int(seconds) + 1),
        "memory limit": (resource.RLIMIT_AS, memory_bytes),
        "file limit": (resource.RLIMIT_FSIZE, MAX_FILE),
        "open files limit": (resource.RLIMIT_NOFILE, MAX_OPEN),
        "no core dumps": (resource.RLIMIT_CORE, 0),
    }
    return [name for name, (kind, value) in limits.items() if set_limit(kind, value)]


def set_limit(kind: int, value: int) -> bool:
    _, highest = resource.getrlimit(kind)
    value = value if highest == resource.RLIM_INFINITY else min(value, highest)
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):  # macOS, for memory
        return False
    return True


def longs(*numbers: int) -> list[ctypes.c_ulong]:
    """Arguments as the C library's functions of many arguments read them."""
    return [ctypes.c_ulong(number) for number in numbers]


def enter_namespaces(libc: ctypes.CDLL) -> list[str]:
    """
    Away from the network and, for children, from all other processes. If possible, all files become read-only, but
    for a small file system mounted on the working directory, which goes away with the last process in here.
    """
    user, group, folder = os.geteuid(), os.getegid(), os.getcwd()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS) != 0:
        return []
    with suppress(OSError):  # then there are no users in here and nothing can be mounted
        settings = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, content in settings.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    read_only = struct.pack("4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    if libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, len(read_only)) != 0:
        return ["namespaces"]
    if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", *longs(MS_NOSUID_NODEV_NOEXEC), FOLDER_OPTIONS) != 0:
        return ["namespaces", "read-only files"]
    os.chdir(folder)
    return ["namespaces", "read-only files", "own folder"]


def give_up_rights() -> list[str]:
    """No processes, privileges, files, network, signals from here on, as far as the system can; returns what it can."""
    on = []
    if set_limit(resource.RLIMIT_NPROC, 0) and os.geteuid() != 0:  # root is not bound by it
        on.append("no processes")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        nothing = struct.pack("6I", *[0] * 6)  # effective, permitted, inheritable, of capabilities 0-31 and 32-63
        libc.capset(struct.pack("Ii", CAPABILITY_VERSION_3, 0), nothing)
        libc.prctl(PR_SET_NO_NEW_PRIVS, *longs(1, 0, 0, 0))
        libc.prctl(PR_SET_PDEATHSIG, *longs(signal.SIGKILL, 0, 0, 0))
        on += ["landlock"] if restrict_files(libc, os.getcwd()) else []
        on += ["seccomp"] if refuse_system_calls(libc) else []
    return on


def restrict_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Landlock (https://docs.kernel.org/userspace-api/landlock.html): libraries to read, the folder to write."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION_FLAG)
    if version < 1:
        return False
    known = (1 << FILE_RIGHTS.get(version, 16)) - 1
    rules = struct.pack("3Q", known, NETWORK_RIGHTS if version >= 4 else 0, SCOPES if version >= 6 else 0)
    ruleset = libc.syscall(LANDLOCK_CREATE, rules, len(rules), 0)
    libraries = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    allowed = dict.fromkeys(libraries, READ_FILE | READ_DIR)
    allowed |= {"/etc/ld.so.cache": READ_FILE, folder: READ_FILE | READ_DIR | WRITE | TRUNCATE}
    for path, rights in allowed.items():
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH)
            libc.syscall(LANDLOCK_ADD, ruleset, LANDLOCK_PATH_BENEATH, struct.pack("=Qi", rights & known, opened), 0)
            os.close(opened)
    restricted = libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


def refuse_system_calls(libc: ctypes.CDLL) -> bool:
    """Seccomp (https://docs.kernel.org/userspace-api/seccomp_filter.html): the REFUSED answer "not permitted"."""
    if os.uname().machine not in MACHINES:
        return False
    column, architecture = MACHINES[os.uname().machine]
    numbers = [both[column] for both in REFUSED.values() if both[column] is not None]
    steps = [  # operation, steps to skip if it holds and if not, operand; offsets are those of struct seccomp_data
        (BPF_LOAD, 0, 0, 4),  # the architecture
        (BPF_EQUAL, 0, TO_THE_LAST, architecture),
        (BPF_LOAD, 0, 0, 0),  # the system call's number
        (BPF_AT_LEAST, TO_THE_LAST, 0, X32),
        *((BPF_EQUAL, TO_THE_LAST, 0, number) for number in numbers),
        (BPF_EQUAL, 0, 3, FCNTL[column]),
        (BPF_LOAD, 0, 0, 24),  # its second argument
        *((BPF_EQUAL, TO_THE_LAST, 0, request) for request in SET_OWNER),
        (BPF_RETURN, 0, 0, SECCOMP_ALLOW),
        (BPF_RETURN, 0, 0, SECCOMP_EPERM),
    ]
    code = b""
    for i, (operation, *skips, operand) in enumerate(steps):
        yes, no = (len(steps) - i - 2 if skip == TO_THE_LAST else skip for skip in skips)
        code += struct.pack("HBBI", operation, yes, no, operand)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(steps), ctypes.addressof(buffer))
    return libc.prctl(PR_SET_SECCOMP, *longs(SECCOMP_MODE_FILTER), program) == 0


if __name__ == "__main__":
    main()
