"""
Causal attention with an optional window, and the choice of the fastest kernel that this machine can run.

The query at position t sees the keys at t - window … t. A model asks for its kernel once, when it is built:

    name, kernel = choose("auto", config.attention_shape, device, dtype)
    y_BTHD = kernel(q_BTHD, k_BTKD, v_BTKD, window)

A kernel is chosen by trying it: it must run forward and backward, in the dtype and shape of the model, and give the
result of attend(), the reference. Kernels of other packages are in kernels/; nothing is ever downloaded.

Shapes: B sequences, T query tokens, S key tokens, H query heads, K key/value heads (K divides H), D head size.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.kernels import Kernel, band_mask, cpu, flash, flex

# Packages of FlashAttention by the GPU's major compute capability: Hopper, data-center Blackwell. "auto" does not even
# try them on other GPUs, as a kernel that crashes leaves CUDA unusable for the rest of the process. The RTX 50 series
# (12) is Blackwell too, but lacks the instructions that version 4 is written for.
FLASH_PACKAGES = {9: ("fa3", "fa4"), 10: ("fa4",)}
MAX_ERROR = 0.02  # of a kernel, relative in the norm; bfloat16 kernels differ from float32 by 0.002 to 0.006


# ---- attention by torch's scaled_dot_product_attention ----


def attend(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """
    The kernel "banded", which runs on any device and in any dtype. Returns (B, T, H, D).

    With a window shorter than the sequence, each block of queries attends to its own keys only, which are views:
    1.9 to 2.7 times as fast on a CPU as one T x T mask, forward and backward, at T 512 to 2048.
    """
    return _attend_in_blocks(q_BTHD, k_BTKD, v_BTKD, window, block=max(window // 2, 1))


def attend_masked(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """The kernel "sdpa": the window as one mask of T x T. The baseline of the benchmarks; never chosen by "auto"."""
    return _attend_in_blocks(q_BTHD, k_BTKD, v_BTKD, window, block=q_BTHD.size(1))


def _attend_in_blocks(q_BTHD, k_BTKD, v_BTKD, window: int, *, block: int) -> torch.Tensor:
    q, k, v = q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
    num_tokens = q.size(2)
    if window >= num_tokens - 1:
        return _sdpa(q, k, v, is_causal=True).transpose(1, 2)
    outputs = []
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        first_key = max(start - window, 0)
        mask = band_mask(torch.arange(start, stop, device=q.device), first_key, stop, window)
        keys = slice(first_key, stop)
        outputs.append(_sdpa(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend_cached(
    q_BTHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, mask_B1TS: torch.Tensor
) -> torch.Tensor:
    """
    Attention of new tokens to a KV cache, which already holds their own keys and values too. The mask is true where a
    query sees a key. Returns (B, T, H, D).
    """
    q, k, v = q_BTHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    return _sdpa(q, k, v, mask=mask_B1TS).transpose(1, 2)


def _sdpa(q, k, v, mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _plain_sdpa(q, k, v, mask, is_causal)
    with small_products():
        return _plain_sdpa(q, k, v, mask, is_causal)


def _plain_sdpa(q, k, v, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1)
    )


@contextmanager
def small_products() -> Iterator[None]:
    """
    For inference: within the block, float32 products on a CPU use MKL, whatever hardware.pick_matmul_precision chose
    for large ones. For attention over a few hundred keys, oneDNN ("medium") takes longer: a decode step of 8 / 32 / 256
    rows and 128 keys 295 / 736 / 29,458 µs against 42 / 137 / 4,619, a prompt of 64 tokens 1,156 µs against 346.
    """
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


# ---- the choice ----


# Name for --attention → a function that returns the kernel, or raises ImportError if its package is not installed. A
# name of a torch operator can be registered only once, hence the caches.
LOADERS: dict[str, Callable[[], Kernel]] = {
    "fa3": functools.cache(flash.load_flash3),  # FlashAttention-3 (a package), for Hopper GPUs
    "fa4": functools.cache(flash.load_flash4),  # FlashAttention-4 (a package), for Hopper and Blackwell GPUs
    "flash": lambda: flash.attend_flash2,  # FlashAttention-2, part of torch
    "flex": flex.load_flex,  # FlexAttention, compiled by Triton
    "blocks": cpu.load_blocks,  # matrix products over blocks, for CPUs
    "banded": lambda: attend,  # SDPA on blocks of queries: runs everywhere
    "sdpa": lambda: attend_masked,  # SDPA with one mask: the baseline of the benchmarks
}


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a model that matter to its attention kernel."""

    num_tokens: int  # T
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    windows: tuple[int, ...]  # of all layers


def choose(
    name: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype, log: Callable[[str], None] = print
) -> tuple[str, Kernel]:
    """
    The name and function of a kernel: the one of that name, or for "auto" the fastest one that works here. Kernels that
    are installed but do not work are logged. UserError if the kernel of that name does not work.
    """
    is_auto = name == "auto"
    if not is_auto and name not in LOADERS:
        raise UserError(f"--attention {name}: unknown, use auto, {', '.join(LOADERS)}")
    for candidate in _candidates(device, dtype) if is_auto else (name,):
        try:
            kernel = LOADERS[candidate]()
        except ImportError as error:
            if is_auto:
                continue
            raise UserError(f"--attention {name}: its package is not installed ({error}); use auto") from error
        failure = _failure(kernel, shape, device, dtype)
        if not failure:
            return candidate, kernel
        if not is_auto:
            raise UserError(f"--attention {name} does not work here ({failure}); use auto")
        log(f"attention: {candidate} does not work here ({failure}), trying the next kernel")
    raise AssertionError("the last candidate works on every device")


def _candidates(device: torch.device, dtype: torch.dtype) -> Sequence[str]:
    """The kernels for a device, fastest first."""
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        return *FLASH_PACKAGES.get(generation, ()), "flash", "flex", "banded"
    # "blocks" is fast if oneDNN does the products: in bfloat16, and in float32 if hardware.pick_matmul_precision found
    # oneDNN to be faster.
    fast_dtypes = [torch.bfloat16]
    if torch.get_float32_matmul_precision() == "medium":
        fast_dtypes.append(torch.float32)
    if device.type == "cpu" and dtype in fast_dtypes:
        return "blocks", "banded"
    return ("banded",)


def _failure(kernel: Kernel, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str:
    """What went wrong when the kernel was tried, in one line; empty if it works."""
    try:
        probe(kernel, shape, device, dtype)
    except Exception as error:  # noqa: BLE001  foreign code may raise anything; all of it means: not this kernel
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ""


def probe(kernel: Kernel, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> None:
    """
    Runs a kernel forward and backward on one random sequence of the model's shape. ValueError if it differs from the
    reference in float32; errors of the kernel are passed on.
    """
    generator = torch.Generator().manual_seed(0)
    T, H, K, D = shape.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim
    q, k, v, grad = (torch.randn(1, T, heads, D, generator=generator).to(device, dtype) for heads in (H, K, K, H))
    inputs = (F.rms_norm(q, (D,)), F.rms_norm(k, (D,)), v)
    for window in sorted(set(shape.windows)):
        results = _output_and_gradients(kernel, inputs, grad, window)
        reference = _output_and_gradients(attend, [x.float() for x in inputs], grad, window)
        for what, result in results.items():
            error = ((result.float() - reference[what]).norm() / reference[what].norm()).item()
            if not error < MAX_ERROR:  # true for NaN as well
                raise ValueError(f"window {window} of {T} tokens: the {what} is wrong by {error:.2g} in the norm")


def _output_and_gradients(
    kernel: Kernel, inputs: Sequence[torch.Tensor], grad: torch.Tensor, window: int
) -> dict[str, torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    output = kernel(q, k, v, window)
    dq, dk, dv = torch.autograd.grad(output, (q, k, v), grad.to(output.dtype))
    return {"output": output, "gradient of q": dq, "gradient of k": dk, "gradient of v": dv}
