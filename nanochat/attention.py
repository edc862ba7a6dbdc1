"""
Causal attention with an optional window: query t sees keys t - window … t. One call, and the best kernel that this
machine can run:

    kernel = choose("auto", AttentionShape(…), device, dtype)    # once, when the model is built
    y_BTHD = kernel(q_BTHD, k_BTKD, v_BTKD, window)

A kernel is chosen because it ran: forward and backward, in the dtype and shape in question, with the right result.
Nothing is downloaded; a package that is not installed is not there.

Shapes: B rows, T query tokens, S key tokens, H query heads, K key/value heads (K divides H), D head size.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import UserError

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
# Forward (q, k, v, window) → output (B, T, H, D), and the softmax's sums or their logarithm (B, H, T) in float32;
# backward (grad, q, k, v, output, sums, window) → gradients of q, k, v.
ForwardBackward = tuple[Callable[..., tuple[torch.Tensor, ...]], Callable[..., tuple[torch.Tensor, ...]]]

BLOCK = 128  # queries at a time on the CPU; the windows are multiples of it
CACHED_SCORES = 2**21  # of a block, on the CPU: 4 MiB in bfloat16
KEPT_WEIGHTS = 2**24  # of a layer, on the CPU: 32 MiB in bfloat16; beyond that the backward pass computes them again
MAX_ERROR = 0.02  # of a kernel in the norm; bfloat16 kernels are 0.002 to 0.006 off float32


@dataclass(frozen=True)
class AttentionShape:
    """What a model will ask of its attention kernel."""

    num_tokens: int  # T
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    windows: tuple[int, ...]  # of all layers


def choose(
    name: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype, tell: Callable[[str], None] = print
) -> tuple[str, Kernel]:
    """
    The kernel of that name, or for "auto" the first that works here of those listed below, fastest first; and its name.
    Kernels that are installed but do not work are told about. UserError if the one named does not work.
    """
    if name != "auto" and name not in LOADERS:
        raise UserError(f"--attention {name}: unknown, use auto, {', '.join(LOADERS)}")
    for candidate in _candidates(device, dtype) if name == "auto" else (name,):
        try:
            kernel = LOADERS[candidate]()
        except ImportError as error:
            if name != "auto":
                raise UserError(f"--attention {name}: its package is not installed ({error}); use auto") from error
            continue
        try:
            probe(kernel, shape, device, dtype)
        except Exception as error:  # noqa: BLE001  foreign code raises what it likes; all of it means: not this kernel
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if name != "auto":
                raise UserError(f"--attention {name} does not work here ({reason}); use auto") from error
            tell(f"attention: {candidate} passed over, it does not work here ({reason})")
            continue
        return candidate, kernel
    raise AssertionError("the last candidate always works")


def _candidates(device: torch.device, dtype: torch.dtype) -> Sequence[str]:
    if device.type == "cuda":
        return "fa3", "fa4", "fa2", "flash", "flex", "banded", "sdpa"
    # Blocks live from the products of oneDNN: bfloat16, or float32 where hardware.choose_cpu_matmul found it fast.
    fast = dtype == torch.bfloat16 or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium")
    return ("blocks", "banded") if device.type == "cpu" and fast else ("banded",)


def probe(kernel: Kernel, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> None:
    """Runs a kernel forward and backward on one row of text. Raises what it raises; ValueError if a result is wrong."""
    generator = torch.Generator().manual_seed(0)
    T, H, K, D = shape.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim
    q, k, v, grad = (torch.randn(1, T, heads, D, generator=generator).to(device, dtype) for heads in (H, K, K, H))
    q, k = F.rms_norm(q, (D,)), F.rms_norm(k, (D,))
    for window in sorted(set(shape.windows)):
        results = []
        for attention, compute_dtype in ((kernel, dtype), (attend, torch.float32)):
            q_, k_, v_ = (x.detach().to(compute_dtype).requires_grad_() for x in (q, k, v))
            output = attention(q_, k_, v_, window)
            results.append((output, *torch.autograd.grad(output, (q_, k_, v_), grad.to(output.dtype))))
        for what, result, expected in zip(("output", "q's", "k's", "v's"), *results, strict=True):
            error = ((result.float() - expected).norm() / expected.norm()).item()
            if not error < MAX_ERROR:  # NaN included
                what = what if what == "output" else f"{what} gradient"
                raise ValueError(f"window {window} of {T} tokens: the {what} is wrong by {error:.2g} in the norm")


# ---- torch's own attention ----


def attend(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """A whole sequence to itself, on any device, in any dtype ("banded"). Returns (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    num_tokens = q.size(2)
    if window >= num_tokens - 1:
        return _sdpa(q, k, v, is_causal=True).transpose(1, 2)
    # Blocks of queries on views, each against its own keys only: 1.9-2.7 times as fast on a CPU as one T x T mask,
    # forward and backward, at T 512-2048.
    block = max(window // 2, 1)
    outputs = []
    for start in range(0, num_tokens, block):
        stop, first_key = min(start + block, num_tokens), max(start - window, 0)
        mask = band_mask(torch.arange(start, stop, device=q.device), first_key, stop, window)
        keys = slice(first_key, stop)
        outputs.append(_sdpa(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend_masked(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """The same the simple way ("sdpa"): windows as a mask of T x T. Returns (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    num_tokens = q.size(2)
    if window >= num_tokens - 1:
        return _sdpa(q, k, v, is_causal=True).transpose(1, 2)
    mask = band_mask(torch.arange(num_tokens, device=q.device), 0, num_tokens, window)
    return _sdpa(q, k, v, mask=mask).transpose(1, 2)


def attend_cached(
    q_BTHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, mask_B1TS: torch.Tensor
) -> torch.Tensor:
    """New tokens to a cache that already holds their own keys; the mask says who sees what. Returns (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSKD, v_BSKD))
    return _sdpa(q, k, v, mask=mask_B1TS).transpose(1, 2)


def band_mask(positions: torch.Tensor, first_key: int, stop_key: int, window: int) -> torch.Tensor:
    """True where a query at one of the positions (…, T) sees a key of first_key … stop_key - 1: (…, T, S)."""
    distance = positions.unsqueeze(-1) - torch.arange(first_key, stop_key, device=positions.device)
    return (distance >= 0) & (distance <= window)


def _sdpa(q, k, v, mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1)
    )


def attend_flash(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
    """
    The FlashAttention-2 in torch's wheel ("flash"), for CUDA GPUs of capability 8.0 and 16 bits. SDPA does not give it
    windows; the operator under SDPA takes them, has a backward and is known to torch.compile. Returns (B, T, H, D).
    """
    T, left = q_BTHD.size(1), window if window < q_BTHD.size(1) - 1 else -1
    return torch.ops.aten._flash_attention_forward(
        q_BTHD, k_BTKD, v_BTKD, None, None, T, T, 0.0, True, False, window_size_left=left, window_size_right=0
    )[0]


def load_flex() -> Kernel:
    """FlexAttention: windows at the cost of what they see, on GPUs that Triton knows. On a CPU it has no backward."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple[int, int], BlockMask] = {}  # by T and window; the probe makes those that training needs

    def attend(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
        T = q.size(2)
        if (T, window) not in masks:
            sees = lambda b, h, i, j: (i >= j) & (i - j <= window)  # noqa: E731  as create_block_mask wants it
            masks[T, window] = create_block_mask(sees, None, None, T, T, device=str(q.device))
        y = compiled(q, k, v, block_mask=masks[T, window], enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)

    return attend


# ---- the flash-attn packages: https://github.com/Dao-AILab/flash-attention ----


def load_fa2() -> Kernel:
    """flash-attn 2.7 and newer, whose operators torch.compile knows."""
    from flash_attn import flash_attn_func

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return flash_attn_func(q, k, v, causal=True, window_size=(window if window < q.size(1) - 1 else -1, 0))

    return attend


def _fa3_functions() -> ForwardBackward:
    import flash_attn_interface as fa3

    def forward(q, k, v, window):
        left = window if window < q.size(1) - 1 else -1
        return fa3.flash_attn_func(q, k, v, causal=True, window_size=(left, 0), return_attn_probs=True)[:2]

    def backward(grad, q, k, v, output, sums, window):
        left = window if window < q.size(1) - 1 else -1
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        scale, no_varlen = q.size(-1) ** -0.5, [None] * 6
        fa3._flash_attn_backward(grad, q, k, v, output, sums, *no_varlen, *grads, scale, True, left, 0)
        return grads

    return forward, backward


def _fa4_functions() -> ForwardBackward:
    from flash_attn.cute import interface as fa4

    def forward(q, k, v, window):
        left = window if window < q.size(1) - 1 else None
        return fa4.flash_attn_func(q, k, v, causal=True, window_size=(left, None), return_lse=True)[:2]

    def backward(grad, q, k, v, output, sums, window):
        left = window if window < q.size(1) - 1 else None
        return fa4._flash_attn_bwd(q, k, v, output, grad, sums, causal=True, window_size_left=left)

    return forward, backward


def as_operator(name: str, functions: ForwardBackward) -> Kernel:
    """
    A kernel into which torch.compile cannot look, or should not: as operators of torch, which a graph holds as they
    are. Inputs are made contiguous, outputs must be.
    """
    run_forward, run_backward = functions

    @torch.library.custom_op(f"nanochat::{name}", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        output, sums = run_forward(q, k, v, window)
        return output, sums

    @torch.library.custom_op(f"nanochat::{name}_backward", mutates_args=())
    def backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor,
        sums: torch.Tensor, window: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        dq, dk, dv = run_backward(grad, q, k, v, output, sums, window)
        return dq, dk, dv

    @forward.register_fake
    def _(q, k, v, window):
        B, T, H, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)

    @backward.register_fake
    def _(grad, q, k, v, output, sums, window):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        *qkv, ctx.window = inputs
        ctx.save_for_backward(*qkv, *output)

    def differentiate(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *backward(grad.contiguous(), *ctx.saved_tensors, ctx.window), None

    forward.register_autograd(differentiate, setup_context=save)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return forward(q.contiguous(), k.contiguous(), v.contiguous(), window)[0]

    return attend


# ---- the CPU's ----


def load_blocks() -> Kernel:
    """
    Plain matrix products: a block of queries against the blocks of keys that it sees, for as many heads at a time as
    the cache holds the scores of ("blocks"). The softmax takes no maximum off the scores, so these must stay below 80
    or exp overflows: normed queries and keys cannot reach gain² · sqrt(D), which is 16 for D = 128. Not for float16,
    whose range is too small.

    The loop stays an operator when the model is compiled: unrolled it would be more code than the rest (135 s of
    compiling for 4 layers instead of 58), which ran no faster. All that lies around it is left to the compiler.
    """

    @torch.library.custom_op("nanochat::blocks", mutates_args=())
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return blocks_forward(q, k, v, window, keep)

    @torch.library.custom_op("nanochat::blocks_backward", mutates_args=())
    def backward(
        dy: torch.Tensor, dsums: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        kept: torch.Tensor, window: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        return blocks_backward(dy, dsums, q, k, v, kept, window)

    @forward.register_fake
    def _(q, k, v, window, keep):
        sums = q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
        return torch.empty_like(q), sums, q.new_empty(_num_weights(q, window) if keep else 0)

    @backward.register_fake
    def _(dy, dsums, q, k, v, kept, window):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        *qkv, ctx.window, _ = inputs
        ctx.save_for_backward(*qkv, output[2])

    def differentiate(ctx: Any, dy: torch.Tensor, dsums: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        return *backward(dy.contiguous(), dsums.contiguous(), *ctx.saved_tensors, ctx.window), None, None

    forward.register_autograd(differentiate, setup_context=save)

    def attend(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, window: int) -> torch.Tensor:
        if q_BTHD.dtype == torch.float16:
            raise TypeError("float16 cannot hold exp(scores)")
        B, T, H, D = q_BTHD.shape
        q = _in_blocks(q_BTHD * D**-0.5, H)
        keep = torch.is_grad_enabled() and _num_weights(q, window) <= KEPT_WEIGHTS
        y, sums, _ = forward(q, _in_blocks(k_BTKD, H), _in_blocks(v_BTKD, H), window, keep)
        y_mBHtD = (y / sums).to(q_BTHD.dtype).unflatten(1, (B, H))
        return y_mBHtD.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]

    return attend


def blocks_forward(q, k, v, window: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Of m blocks with t tokens of N heads of all texts, (m, N, t, D), the queries scaled. Returns what has still to be
    divided, exp(scores) @ v (m, N, t, D), and by what, the sums of the weights exp(scores) (m, N, t, 1) in float32; and
    the weights one after the other, or none.
    """
    y, sums = torch.empty_like(q), q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
    kept = q.new_empty(_num_weights(q, window) if keep else 0)
    for i, keys, heads, sees, place in _blocks(q, window):
        weights = _weights(q[i, heads], _joined(k[keys, heads]), sees, kept[place] if keep else None)
        torch.sum(weights, dim=-1, keepdim=True, dtype=torch.float32, out=sums[i, heads])
        torch.bmm(weights, _joined(v[keys, heads]), out=y[i, heads])
    return y, sums, kept


def blocks_backward(dy, dsums, q, k, v, kept, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. Weights that were not kept are computed again."""
    dq, dsums = torch.empty_like(q), dsums.to(q.dtype)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for i, keys, heads, sees, place in _blocks(q, window):
        q_ntD, dy_ntD, k_nsD, v_nsD = q[i, heads], dy[i, heads], _joined(k[keys, heads]), _joined(v[keys, heads])
        if kept.numel():
            weights = kept[place].view(q_ntD.size(0), *sees.shape)
        else:
            weights = _weights(q_ntD, k_nsD, sees)
        dv[keys, heads] += _parted(torch.bmm(weights.mT, dy_ntD))
        dscores = torch.bmm(dy_ntD, v_nsD.mT).add_(dsums[i, heads]).mul_(weights)
        torch.bmm(dscores, k_nsD, out=dq[i, heads])
        dk[keys, heads] += _parted(torch.bmm(dscores.mT, q_ntD))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _weights(q_ntD: torch.Tensor, k_nsD: torch.Tensor, sees: torch.Tensor, place: torch.Tensor | None = None):
    out = None if place is None else place.view(q_ntD.size(0), *sees.shape)
    return torch.bmm(q_ntD, k_nsD.mT, out=out).exp_().mul_(sees)


def _in_blocks(x_BTKD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(m, B · H, t, D), filled up with zeros that nobody sees; key/value heads once for each of their query heads."""
    group = num_heads // x_BTKD.size(2)
    x_BTHD = x_BTKD.repeat_interleave(group, dim=2) if group > 1 else x_BTKD
    if missing := -x_BTHD.size(1) % BLOCK:
        x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, missing))
    return x_BTHD.unflatten(1, (-1, BLOCK)).permute(1, 0, 3, 2, 4).contiguous().flatten(1, 2)


def _joined(x_mntD: torch.Tensor) -> torch.Tensor:
    """Blocks side by side: (n, m · t, D)."""
    return x_mntD.transpose(0, 1).flatten(1, 2).contiguous()


def _parted(x_nsD: torch.Tensor) -> torch.Tensor:
    return x_nsD.unflatten(1, (-1, BLOCK)).transpose(0, 1)


def _blocks(q_mNtD: torch.Tensor, window: int) -> Iterator[tuple[int, slice, slice, torch.Tensor, slice]]:
    """
    A block of queries; the blocks of keys that any of these sees; some heads; 1 where a query sees a key, else 0; the
    place of their weights among all.
    """
    num_heads, place = q_mNtD.size(1), 0
    for i in range(q_mNtD.size(0)):
        first = max(i * BLOCK - window, 0) // BLOCK
        start, stop = i * BLOCK, (i + 1) * BLOCK
        sees = band_mask(torch.arange(start, stop), first * BLOCK, stop, window).to(q_mNtD.dtype)
        num_groups = math.ceil(num_heads * sees.numel() / CACHED_SCORES)
        step = math.ceil(num_heads / num_groups)
        for head in range(0, num_heads, step):
            heads = slice(head, min(head + step, num_heads))
            end = place + (heads.stop - head) * sees.numel()
            yield i, slice(first, i + 1), heads, sees, slice(place, end)
            place = end


def _num_weights(q_mNtD: torch.Tensor, window: int) -> int:
    m, N, t, _ = q_mNtD.shape
    return N * t * t * sum(i + 1 - max(i * t - window, 0) // t for i in range(m))


LOADERS: dict[str, Callable[[], Kernel]] = {  # an ImportError says that the package is not installed
    "fa3": functools.cache(lambda: as_operator("fa3", _fa3_functions())),
    "fa4": functools.cache(lambda: as_operator("fa4", _fa4_functions())),
    "fa2": load_fa2,
    "flash": lambda: attend_flash,
    "flex": load_flex,
    "blocks": functools.cache(load_blocks),
    "banded": lambda: attend,
    "sdpa": lambda: attend_masked,
}
