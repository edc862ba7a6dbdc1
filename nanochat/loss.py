"""
Cross entropy computed from the final hidden states in chunks, so that the logits of a whole batch never exist at once:
for 65,536 tokens and a vocabulary of 32,768 they would take 8.6 GB in float32, and their gradient as much again.

The trick: the gradient of a sum of losses does not depend on anything computed later. So it is computed in the forward
pass, while the logits of a chunk exist, and the backward pass only multiplies it by a number. That takes no more matrix
products than usual. Only separate losses (reduction "none") have to compute the logits again in the backward pass.

Shapes: N rows (tokens), n rows of a chunk, C channels, V vocabulary, V' vocabulary with padding.
"""

import math

import torch
import torch.nn.functional as F

# A chunk has 2^25 logits (128 MiB in float32). In compiled code there are at most 8 chunks: torch.compile unrolls the
# loop, and on a CPU each chunk adds seconds of compiling. Compared with plain cross entropy on all logits (forward and
# backward, 8,192 rows, C 256, bfloat16; medians on one thread of an AMD EPYC; memory of eager code on the null GPU):
#                         times as fast        peak memory, GiB: chunks / all logits
#   V 8,192    eager      1.3                  0.36 / 1.00
#              compiled   1.2                  0.57 / 0.55      1 to 8 chunks are within 3 %
#   V 32,768   eager      1.7 or more          0.36 / 4.02
#              compiled   1.3 with 4 chunks    0.7  / 2.5       the memory with 8 chunks
CHUNK_LOGITS = 2**25
MAX_CHUNKS = 8


def softcap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(logits / cap), which stays within ±cap (Gemma 2, arXiv 2408.00118); a cap of 0 changes nothing."""
    if not cap:
        return logits
    return cap * torch.tanh(logits / cap)


def chunk_rows(num_rows: int, vocab_size: int, *, compiled: bool) -> int:
    """Rows whose logits exist at a time."""
    rows = CHUNK_LOGITS / vocab_size
    return math.ceil(max(rows, num_rows / MAX_CHUNKS) if compiled else rows)


def cross_entropy(
    hidden_NC: torch.Tensor,
    head_VC: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    vocab_size: int,
    cap: float,
    reduction: str = "mean",
) -> torch.Tensor:
    """
    Cross entropy in nats of softcap(logits, cap), where logits = (hidden_NC @ head_VC.T)[:, :vocab_size] in float32.
    Targets of -1 are ignored. Returns a scalar for reduction "mean" or "sum", (N,) for "none".

    head_VC is (V', C) and is cast to the dtype of hidden_NC; its gradient is accumulated in its own dtype. The cap is
    at most 80, or 0. Can be differentiated once.
    """
    is_sum = reduction != "none"
    losses = _CrossEntropy.apply(hidden_NC, head_VC, targets_N, vocab_size, cap, is_sum)
    if reduction == "mean":
        return losses / (targets_N >= 0).sum()
    return losses


class _CrossEntropy(torch.autograd.Function):
    """The losses (N,), or their sum, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_NC, head_VC, targets_N, vocab_size, cap, is_sum):
        ctx.vocab_size, ctx.cap, ctx.is_sum = vocab_size, cap, is_sum
        weights_N = None
        if is_sum and any(ctx.needs_input_grad):
            weights_N = torch.ones_like(targets_N, dtype=torch.float32)
        losses_N, d_hidden_NC, d_head_VC = _in_chunks(hidden_NC, head_VC, targets_N, vocab_size, cap, weights_N)
        if not is_sum:
            ctx.save_for_backward(hidden_NC, head_VC, targets_N)
            return losses_N
        if weights_N is not None:
            ctx.save_for_backward(d_hidden_NC, d_head_VC)
        return losses_N.sum()

    @staticmethod
    def backward(ctx, grad):
        if ctx.is_sum:
            d_hidden_NC, d_head_VC = (gradient * grad.to(gradient.dtype) for gradient in ctx.saved_tensors)
        else:
            hidden_NC, head_VC, targets_N = ctx.saved_tensors
            _, d_hidden_NC, d_head_VC = _in_chunks(hidden_NC, head_VC, targets_N, ctx.vocab_size, ctx.cap, grad)
        return d_hidden_NC, d_head_VC, None, None, None, None


def _in_chunks(hidden_NC, head_VC, targets_N, vocab_size, cap, weights_N):
    """The losses (N,); with weights, also the gradients of their weighted sum by hidden_NC and head_VC, else None."""
    N, dtype = hidden_NC.size(0), hidden_NC.dtype
    cast_VC = head_VC.to(dtype)
    rows = chunk_rows(N, head_VC.size(0), compiled=torch.compiler.is_compiling())
    losses, d_hidden = [], []
    d_head_VC = torch.zeros_like(head_VC if weights_N is not None else head_VC[:0])  # empty if not asked for
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        h_nC, y_n1 = hidden_NC[chunk], targets_N[chunk, None]
        weights_n1 = None if weights_N is None else weights_N[chunk, None]
        logits_nV = F.linear(h_nC, cast_VC)[:, :vocab_size].float()
        losses_n, d_logits_nV = _losses_and_gradient(logits_nV, y_n1, weights_n1, cap)
        losses.append(losses_n)
        if d_logits_nV is not None:
            d_logits_nV = d_logits_nV.to(dtype)
            d_hidden.append(d_logits_nV @ cast_VC[:vocab_size])
            d_head_VC[:vocab_size] += d_logits_nV.T @ h_nC
        del logits_nV, d_logits_nV  # before the next chunk needs memory
    if weights_N is None:
        return torch.cat(losses), None, None
    return torch.cat(losses), torch.cat(d_hidden), d_head_VC


def _losses_and_gradient(logits_nV, y_n1, weights_n1, cap):
    """
    The losses (n,) of a chunk and the gradient of their weighted sum by the logits, None without weights. Overwrites
    the logits. At most two tensors of their size exist at a time.
    """
    counts_n1 = y_n1 >= 0
    y_n1 = y_n1.clamp_min(0)
    target_n1, exp_nV, tanh_nV = _softmax_parts(logits_nV, y_n1, cap)
    sum_n1 = exp_nV.sum(dim=1, keepdim=True)
    losses_n = ((sum_n1.log() - target_n1) * counts_n1).squeeze(1)
    if weights_n1 is None:
        return losses_n, None
    p_nV = exp_nV.mul_(1 / sum_n1)
    if torch.compiler.is_compiling():  # for scatter_add_, the compiler would copy the whole chunk
        ids_V = torch.arange(p_nV.size(1), device=p_nV.device)
        error_nV = torch.where(ids_V == y_n1, p_nV - 1, p_nV)
    else:
        error_nV = p_nV.scatter_add_(1, y_n1, -torch.ones_like(sum_n1))
    error_nV.mul_(weights_n1 * counts_n1)
    if tanh_nV is not None:
        error_nV.mul_(tanh_nV.square_().neg_().add_(1))  # the derivative of the softcap is 1 - tanh²
    return losses_n, error_nV


def _softmax_parts(logits_nV, y_n1, cap):
    """
    The logit of the target (n, 1), exp(logits) (n, V), and the tanh of the softcap (n, V) or None. Overwrites the
    logits. Without a softcap logits are unbounded, and the largest one of the row is subtracted from all of them before
    the exp.
    """
    if cap:
        tanh_nV = _tanh_(logits_nV.div_(cap))
        return cap * tanh_nV.gather(1, y_n1), (cap * tanh_nV).exp_(), tanh_nV
    largest_n1 = logits_nV.amax(dim=1, keepdim=True)
    target_n1 = logits_nV.gather(1, y_n1) - largest_n1
    return target_n1, logits_nV.sub_(largest_n1).exp_(), None


def _tanh_(x: torch.Tensor) -> torch.Tensor:
    """
    tanh(x) = 1 - 2 / (exp(2x) + 1), in place: a single exp, exact to 1e-7. Compiled for a CPU, torch.tanh takes 6 ms
    instead of 1.4 for 2^23 numbers.
    """
    return x.mul_(2).exp_().add_(1).reciprocal_().mul_(-2).add_(1)
