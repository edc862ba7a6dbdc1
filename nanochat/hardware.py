"""What this machine is, and what follows from it: device, compute dtype, peak rates, process-wide settings."""

import ctypes
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch

from nanochat.common import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Dense bfloat16 FLOP/s and memory bytes/s, from the vendors' data sheets; matched in order against the device's name.
GPU_PEAKS = (
    ("GB200", 2.5e15, 8.0e12),
    ("B200", 2.25e15, 8.0e12),
    ("H200", 989e12, 4.8e12),
    ("H100 PCIe", 756e12, 2.0e12),
    ("H100 NVL", 835e12, 3.9e12),
    ("H100", 989e12, 3.35e12),
    ("H800", 989e12, 3.35e12),
    ("A100", 312e12, 2.0e12),
    ("A800", 312e12, 2.0e12),
    ("L40S", 362e12, 0.864e12),
    ("L4", 121e12, 0.3e12),
    ("RTX 5090", 209e12, 1.79e12),
    ("RTX 4090", 165e12, 1.01e12),
    ("RTX 3090", 71e12, 0.936e12),
)


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """
    "auto" takes CUDA, else MPS, else the CPU. On CUDA each local rank gets a GPU of its own.
    UserError if the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: no usable CUDA GPU here; use --device cpu, or check nvidia-smi")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU here; use --device cpu")
    if name not in ("mps", "cpu"):
        raise UserError(f"--device {name}: unknown, use auto, cuda, mps or cpu")
    return torch.device(name)


def pick_dtype(device: torch.device) -> torch.dtype:
    """The compute dtype: $NANOCHAT_DTYPE, else bfloat16 on CUDA GPUs of compute capability 8.0, else float32."""
    name = os.environ.get("NANOCHAT_DTYPE")
    if name:
        if name not in DTYPES:
            raise UserError(f"NANOCHAT_DTYPE={name}: unknown, use {', '.join(DTYPES)}")
        return DTYPES[name]
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def pick_training_dtype(device: torch.device, begun: str = "") -> torch.dtype:
    """
    The same, but a CPU that multiplies bfloat16 much faster trains in it: weights, optimizer, softmax and loss are in
    float32 all the same. That is measured, so a run goes on in the dtype in which it was `begun` ("torch.bfloat16").
    """
    dtype = pick_dtype(device)
    if device.type != "cpu" or os.environ.get("NANOCHAT_DTYPE"):
        return dtype
    if begun:
        return DTYPES[begun.removeprefix("torch.")]
    return torch.bfloat16 if cpu_likes_bfloat16() else dtype


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can work: it needs a C++ compiler on the CPU and Triton's hardware (7.0) on CUDA."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type == "cpu" and any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def ready_compiler(device: torch.device) -> None:
    """
    Begins in the background what torch.compile does first on a CPU: to try which vector instructions the C++ compiler
    knows. That takes 4 of the 42 s until the first step of a machine's first run, depth 4 on two cores.
    """
    if device.type == "cpu":
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        threading.Thread(target=pick_vec_isa, daemon=True).start()


def compiling_pays(device: torch.device, dtype: torch.dtype, flops: float, num_layers: int) -> bool:
    """
    Whether a training run of so many FLOPs takes longer than compiling saves. On a GPU it always does. On a CPU, at
    depth 4 and width 256: eager code reaches about half the rate of the matrix products, compiled code 1.5 times that,
    and compiling takes 8 s a layer on two cores.
    """
    if device.type != "cpu":
        return True
    return flops / matmul_rate(device, dtype) * 2 * (1 - 1 / 1.5) > 8 * num_layers


def gpu_peaks(device: torch.device) -> tuple[float, float] | None:
    """(dense bfloat16 FLOP/s, memory bytes/s) of a known GPU; None for the CPU and for GPUs not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(((flops, bandwidth) for key, flops, bandwidth in GPU_PEAKS if key in name), None)


def describe(device: torch.device) -> str:
    """One line about the device, for logs."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads, {platform.machine()}"


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on the GPU where there is one, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tune_process(device: torch.device, matmul_precision: str = "") -> str:
    """
    Process-wide settings for training. On CUDA: TF32 for what is left in float32. On the CPU: the faster of two float32
    matrix products, a malloc that keeps the pages it has, sums in a fixed order. Returns the precision chosen; a
    resumed run passes it in again, for two measurements may differ and with them the last bits of every loss.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        keep_freed_pages()
        # Else compiled code adds up the gradients of embedding tables in whatever order two threads come by, so that no
        # run could be repeated or resumed to the bit. It is no slower: those additions wait for each other.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if matmul_precision:
            torch.set_float32_matmul_precision(matmul_precision)
        else:
            choose_cpu_matmul()
    return torch.get_float32_matmul_precision()


def keep_freed_pages() -> None:
    """
    glibc returns big tensors' pages to the system and faults them in again at every step. Keeping them took page faults
    of a depth-4 training step from 1.4 M to 0.1 M and gave 1.6x in float32.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 512 * 2**20)


def choose_cpu_matmul() -> None:
    """
    "medium" sends float32 products to oneDNN: up to twice as fast as MKL on AMD chips and still exact to 7e-7 there. On
    chips with AMX it means bfloat16 products (1,650 against 430 GFLOP/s, but an error of 2e-3), which nobody asked for
    who computes in float32. So: measure speed and error.
    """
    a, b = _probe_matrices()
    exact = a.double() @ b.double()

    def multiply(precision: str) -> torch.Tensor:
        torch.set_float32_matmul_precision(precision)
        return a @ b

    plain_seconds, seconds = _quickest((lambda: multiply("highest"), lambda: multiply("medium")), a.device)
    error = (multiply("medium").double() - exact).abs().max() / exact.abs().max()
    if error > 1e-5 or seconds > plain_seconds:
        torch.set_float32_matmul_precision("highest")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written ones together, of the quickest of some copies far larger than caches."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _quickest([lambda: target.copy_(source)], device)[0]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the quickest of some products of large square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _quickest([lambda: a @ a], device)[0]


def cpu_likes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones (AVX-512 BF16, AMX)."""
    a, b = _probe_matrices()
    a16, b16 = a.bfloat16(), b.bfloat16()
    seconds16, seconds32 = _quickest((lambda: a16 @ b16, lambda: a @ b), a.device)
    return seconds16 * 1.5 < seconds32


def _probe_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1024, 512, generator=generator), torch.randn(512, 512, generator=generator)


def _quickest(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The least seconds of each: they take turns, for 0.2 s at least, so that what else the machine does hits all."""
    best, num_turns, started = [float("inf")] * len(runs), 0, time.perf_counter()
    while num_turns < 3 or time.perf_counter() - started < 0.2:
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - start)
        num_turns += 1
    return best


if __name__ == "__main__":  # what speedrun.sh asks: device, number of GPUs, and whether the CPU should take bfloat16
    found = pick_device()
    print(found.type, torch.cuda.device_count(), "bfloat16" if found.type == "cpu" and cpu_likes_bfloat16() else "-")
