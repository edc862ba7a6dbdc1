"""
Detects what this machine can do and sets it up: device, compute dtype, compiler, peak rates, process-wide settings.

Where data sheets do not decide, a short measurement does: whether a CPU multiplies faster in bfloat16, and which of two
float32 matrix products is faster and exact enough. Measured choices are saved in checkpoints, so that a resumed run
makes the same ones.
"""

import ctypes
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from nanochat.cards import Card, find_card
from nanochat.common import UserError, atomic_path, base_dir, parse_json

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """
    The device of that name; "auto" is CUDA, else MPS, else the CPU. On CUDA each local rank gets its own GPU, and the
    process gets the settings that every program needs there. UserError if the machine does not have the device.
    """
    _configure_cuda()
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_usable in usable.items() if is_usable)
    if name not in usable:
        raise UserError(f"--device {name}: unknown, use auto, cuda, mps or cpu")
    if not usable[name]:
        raise UserError(f"--device {name}: no usable GPU of this kind here; use --device cpu, or check the driver")
    if name != "cuda":
        return torch.device(name)
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(f"local rank {local_rank} has no GPU: start torchrun with --nproc_per_node={num_gpus}")
    return torch.device("cuda", local_rank)


def _configure_cuda() -> None:
    """
    Settings of CUDA that all programs need, training or not; without effect on other devices. pick_device applies them,
    as every program calls it before it uses a GPU: memory settings are read when CUDA starts.
    """
    # Freed memory of any sizes can be used again as one block: without this, blocks of many sizes waste several GiB.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ) and sys.platform == "linux":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # cuDNN's attention, the first choice of torch 2.11 on Hopper, builds a plan for each new shape: 23 to 440 ms of
    # host time. Prompts and evaluations have hundreds of shapes; FlashAttention needs no plans.
    torch.backends.cuda.enable_cudnn_sdp(False)


def pick_dtype(device: torch.device) -> torch.dtype:
    """
    The dtype to compute in: $NANOCHAT_DTYPE, else bfloat16 on CUDA GPUs of compute capability 8.0 (Ampere) or more,
    else float32.
    """
    name = os.environ.get("NANOCHAT_DTYPE")
    if name:
        if name not in DTYPES:
            raise UserError(f"NANOCHAT_DTYPE={name}: unknown, use {', '.join(DTYPES)}")
        return DTYPES[name]
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def chat_precisions() -> tuple[str, ...]:
    """What a chat's engine may use besides the model's dtype: bfloat16, unless $NANOCHAT_DTYPE asks for a dtype."""
    return () if os.environ.get("NANOCHAT_DTYPE") else ("bfloat16",)


def pick_training_dtype(device: torch.device, resumed_dtype: str = "") -> torch.dtype:
    """
    As pick_dtype, but a CPU that multiplies bfloat16 much faster trains in it; weights, optimizer, softmax and loss
    stay in float32. Because that is measured, a resumed run passes the dtype that it was started in ("torch.bfloat16").
    """
    dtype = pick_dtype(device)
    if device.type != "cpu" or os.environ.get("NANOCHAT_DTYPE"):
        return dtype
    if resumed_dtype:
        return DTYPES[resumed_dtype.removeprefix("torch.")]
    return torch.bfloat16 if bf16_faster_on_cpu() else dtype


def pick_evaluation_dtype(device: torch.device, trained_in: str) -> torch.dtype:
    """The dtype that training would compute in here, for a model that was trained in `trained_in` ("torch.float32")."""
    if trained_in == str(torch.float32):  # also on a CPU where a second measurement might decide otherwise
        return pick_dtype(device)
    return pick_training_dtype(device)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here."""
    return not compile_obstacle(device)


def compile_obstacle(device: torch.device) -> str:
    """
    What keeps torch.compile from working; empty if it works. It needs a C++ compiler on a CPU, and on CUDA compute
    capability 7.0, Triton, and a C compiler, which builds the code that launches Triton's kernels.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "the GPU is older than compute capability 7.0"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not os.environ.get("CC") and not any(shutil.which(name) for name in ("gcc", "clang", "cc")):
            return "there is no C compiler: install gcc"
        return ""
    if device.type != "cpu":
        return f"torch.compile is not used on {device.type}"
    return "" if any(shutil.which(name) for name in ("g++", "clang++", "c++")) else "there is no C++ compiler"


def seconds_compiled(eager_seconds: float, num_layers: int, *, cached: bool = False) -> float:
    """
    How long a CPU takes with torch.compile, compiling included, for what takes it eager_seconds without. cached: torch
    has compiled this model for another run on this machine, so that most of the code is in its cache.

    Measured on two cores at depth 4 and width 256: compiling takes 27 to 32 s, 8 s per layer, and 7 s with the cache.
    Compiled code is 1.3 to 1.5 times as fast (AMD EPYC), or 1.6 times (Xeon with AMX).
    """
    return (2 if cached else 8) * num_layers + eager_seconds / 1.5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed for want of memory: it has an exception of its own for CUDA only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    messages = ("can't allocate memory", "bad_alloc", "out of memory", "could not create a")  # the last one is oneDNN's
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def gpu_card(device: torch.device) -> Card | None:
    """The data sheet of a GPU; None for other devices and cards that are not in the table."""
    return find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def describe(device: torch.device) -> str:
    """One line about the device, for logs."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


# Reasons for a GPU to lower its clock, bits of NVML's nvmlClocksEventReasons. Idling is not among them.
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat",
    0x40: "heat (hardware limit)",
    0x80: "power brake",
}


def gpu_health(device: torch.device) -> str:
    """Clock, temperature and reasons to slow down of a GPU, by nvidia-smi; empty if it cannot be asked."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return ""
    fields = "clocks.sm,clocks.max.sm,temperature.gpu,clocks_event_reasons.active"
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        clock, max_clock, temperature, reasons = (field.strip() for field in answer.split(","))
        active = [name for bit, name in THROTTLE_REASONS.items() if int(reasons, 16) & bit]
    except (OSError, subprocess.SubprocessError, ValueError):  # an old driver does not know all fields
        return ""
    slowed = f", slowed down by {' and '.join(active)}" if active else ""
    return f"{clock} of {max_clock} MHz, {temperature} °C{slowed}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all work: a GPU only queues it, so clocks are read after this."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of torch on the GPU, or of the process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> float:
    """
    Bytes of host memory that this process may still take: what the system has free, the limits of its control groups
    (containers, Slurm) and that of `ulimit -v`. Infinite where none of them can be read.
    """
    limits = [math.inf]
    if hasattr(os, "sysconf"):  # all of the memory, for systems that do not tell how much is free (macOS)
        limits.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        limits.append(1024 * float(fields["MemAvailable"].split()[0]))
    limits += [limit - used for limit, used in _cgroup_memory()]
    if sys.platform == "linux":
        import resource  # not on Windows

        address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
        if address_space != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(address_space - pages * resource.getpagesize())
    return max(0.0, min(limits))


def _cgroup_memory() -> Iterator[tuple[float, float]]:
    """(limit, use) in bytes of this process's control groups and their parents, of both versions of the interface."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup") / controllers
        limit_file, use_file = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / limit_file).exists():
                limit = (folder / limit_file).read_text().strip()
                if limit != "max":
                    yield float(limit), float((folder / use_file).read_text())
            if folder == root:
                break


def tune_process(device: torch.device, matmul_precision: str = "") -> str:
    """
    Applies process-wide settings for training and evaluation: matmul precision, and on a CPU memory and determinism.
    Returns the precision that is in force; arguments as in pick_matmul_precision.
    """
    precision = pick_matmul_precision(device, matmul_precision)
    torch.set_float32_matmul_precision(precision)
    if device.type == "cpu":
        keep_freed_pages()
        # Without this, compiled code adds up the gradients of embedding tables in the order in which two threads
        # arrive, and no run can be repeated or resumed bitwise. It costs nothing: the threads wait for each other
        # anyway.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return precision


def keep_freed_pages() -> None:
    """
    Makes glibc keep the memory of freed tensors. By default it returns the pages of large ones to the system, and every
    step faults them in again: keeping them reduced the page faults of a training step at depth 4 from 1.4 M to 0.1 M,
    and made it 1.6 times as fast in float32.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 512 * 2**20)


def pick_matmul_precision(device: torch.device, resumed_precision: str = "") -> str:
    """
    The precision of float32 products: on GPUs "high" (TF32). On a CPU "medium" if that is faster and exact enough, else
    "highest". Another precision would change the last bits of every loss. So it is measured once per machine: a run can
    be repeated. A resumed run passes the precision that it was started with.

    On a CPU "medium" uses oneDNN for float32 products. On AMD chips oneDNN is up to twice as fast as MKL, with an error
    of 7e-7. On chips with AMX it rounds the factors to bfloat16: 1,650 instead of 430 GFLOP/s, but an error of 2e-3,
    which is too much for float32. So both speed and error are measured.
    """
    if device.type != "cpu":
        return "high"
    if resumed_precision:
        return resumed_precision
    return measured("precision of float32 products", _faster_precision)


def _faster_precision() -> str:
    a, b = _probe_matrices()
    exact = a.double() @ b.double()

    def multiply(precision: str) -> torch.Tensor:
        torch.set_float32_matmul_precision(precision)
        return a @ b

    highest_seconds, medium_seconds = best_seconds([lambda: multiply("highest"), lambda: multiply("medium")], a.device)
    error = (multiply("medium").double() - exact).abs().max() / exact.abs().max()
    return "medium" if error <= 1e-5 and medium_seconds <= highest_seconds else "highest"


def bf16_faster_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 at least 1.5 times as fast as float32 (with AVX-512 BF16 or AMX it does)."""
    a, b = _probe_matrices()
    a16, b16 = a.bfloat16(), b.bfloat16()
    bf16_seconds, float32_seconds = best_seconds([lambda: a16 @ b16, lambda: a @ b], a.device)
    return bf16_seconds * 1.5 < float32_seconds


def copy_bandwidth(device: torch.device) -> float:
    """Memory bandwidth in bytes/s, reads plus writes, of the fastest of several copies much larger than the caches."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    (seconds,) = best_seconds([lambda: target.copy_(source)], device)
    return 2 * source.nbytes / seconds


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several products of large square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    # Random numbers: a GPU computes equal ones with less power, so at a higher clock than real data allow.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    (seconds,) = best_seconds([lambda: a @ a], device)
    return 2 * size**3 / seconds


def _probe_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1024, 512, generator=generator), torch.randn(512, 512, generator=generator)


def best_seconds(
    functions: Sequence[Callable[[], object]], device: torch.device, total_seconds: float = 0.2
) -> list[float]:
    """
    The shortest time of each function. They alternate for at least total_seconds, so that other load on the machine
    slows down all of them.
    """
    best = [float("inf")] * len(functions)
    num_rounds = 0
    start = time.perf_counter()
    while num_rounds < 3 or time.perf_counter() - start < total_seconds:
        for i, function in enumerate(functions):
            function_start = time.perf_counter()
            function()
            synchronize(device)
            best[i] = min(best[i], time.perf_counter() - function_start)
        num_rounds += 1
    return best


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Sets the number of threads of torch's operations within the block."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def measured(question: str, measure: Callable[[], Any]) -> Any:
    """
    The result of `measure`, plain data; from the base folder if this machine has measured it before. Each machine has a
    file there. Its name is a hash of the chip, the number of threads and torch's version: a change measures again.
    """
    machine = "|".join([cpu_name(), str(torch.get_num_threads()), torch.__version__])
    path = base_dir() / "measurements" / f"{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
    results: dict[str, Any] = {}
    with suppress(OSError, ValueError, LookupError, TypeError):  # absent, damaged, not readable: measure again
        saved = parse_json(path.read_bytes())
        if saved["crc32"] == _checksum(saved["results"]):
            results = dict(saved["results"])
    if question not in results:
        results[question] = measure()
        content = {"machine": machine, "crc32": _checksum(results), "results": results}
        with suppress(OSError):  # a base folder that cannot be written: measure again next time
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1))
    return results[question]


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value).encode())


def cpu_name() -> str:
    """The name of the CPU; on Linux with model and stepping, which tell generations of one name apart."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    return " ".join(values.get(name, "") for name in ("vendor_id", "cpu family", "model", "model name"))


def power_of_two(count: int) -> int:
    """
    The largest power of two that is not above count, at least 1. Batch sizes are powers of two, so the number of ranks
    must be one too.

    >>> power_of_two(6), power_of_two(0)
    (4, 1)
    """
    return 1 << max(0, count.bit_length() - 1)


if __name__ == "__main__":  # for runs/setup.sh: the number of ranks that train on this machine
    print(power_of_two(torch.cuda.device_count()))
