"""
Depth is the one dial: width, batch, learning rates, weight decay and number of steps follow from it. Everything here
is pure arithmetic.

1. Shape. Width = depth * aspect ratio, rounded up to whole heads.
2. Horizon. D = ratio * N tokens, N being the parameters that follow scaling laws best: block matrices and lm_head.
3. Batch. Grows with the horizon, B = 2^19 * (D / D_ref)^0.383 (arXiv 2505.13738), rounded to a power of two; the
   reference is the depth-12 model of the same family, for which 2^19 tokens were found best.
4. Learning rates * sqrt(B / 2^19): the noise of Adam-like updates falls with the root of the batch.
5. Weight decay * sqrt(B / 2^19) * D_ref / D: keeps the time scale of the weights' average a fixed part of the run
   (arXiv 2405.13698).
"""

import math
from dataclasses import dataclass, replace

from nanochat.common import UserError
from nanochat.gpt import PORTABLE, GPTConfig, flops_per_token, param_counts
from nanochat.muon import MuonAdamW

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens
BATCH_EXPONENT = 0.383
REFERENCE_WEIGHT_DECAY = 0.28


@dataclass(frozen=True)
class Recipe:
    """What a pretraining run is made of."""

    model: GPTConfig
    total_batch_size: int  # tokens per optimizer update, over all ranks
    num_iterations: int  # optimizer updates
    batch_factor: float  # on the learning rates
    weight_decay: float  # Muon's
    horizon: int  # tokens that batch and weight decay were chosen for

    @property
    def num_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def flops(self) -> float:
        return float(flops_per_token(self.model)) * self.num_tokens


def model_config(
    depth: int,
    vocab_size: int,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    sequence_len: int = 2048,
    window_pattern: str = "SSSL",
    portable: bool = False,  # gpt.PORTABLE: only parts that other programs implement too
) -> GPTConfig:
    """The model of a depth: aspect_ratio channels per layer, rounded up to whole heads."""
    for name, value in (("depth", depth), ("aspect-ratio", aspect_ratio), ("max-seq-len", sequence_len)):
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if head_dim < 16 or head_dim % 2:  # the value gates look at 12 channels, smear at 24; rotary needs pairs
        raise UserError(f"--head-dim {head_dim}: must be even and at least 16")
    n_head = math.ceil(depth * aspect_ratio / head_dim)
    config = GPTConfig(sequence_len, vocab_size, depth, n_head, n_head, n_head * head_dim, window_pattern)
    return replace(config, **PORTABLE) if portable else config


def derive(
    depth: int,
    vocab_size: int,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    sequence_len: int = 2048,
    window_pattern: str = "SSSL",
    data_ratio: float = 12.0,  # tokens per scaling parameter
    total_batch_size: int = -1,  # -1: from the horizon
    num_iterations: int = -1,  # -1: from target_flops or the ratio
    target_flops: float = -1.0,  # -1: from the ratio
    weight_decay: float = REFERENCE_WEIGHT_DECAY,
) -> Recipe:
    """The recipe of a depth. An explicit number of steps or FLOPs sets the horizon that batch and decay follow."""
    if data_ratio <= 0:
        raise UserError(f"--target-param-data-ratio {data_ratio}: must be above 0")
    for name, value in (("num-iterations", num_iterations), ("total-batch-size", total_batch_size)):
        if value < 1 and value != -1:
            raise UserError(f"--{name} {value}: must be at least 1, or -1 to follow from the depth")
    config = model_config(depth, vocab_size, aspect_ratio, head_dim, sequence_len, window_pattern)
    reference = model_config(REFERENCE_DEPTH, vocab_size, aspect_ratio, head_dim, sequence_len, window_pattern)
    reference_horizon = int(data_ratio * scaling_params(reference))
    given_batch = total_batch_size if total_batch_size > 0 else None

    if num_iterations > 0:
        batch = given_batch or batch_for_steps(num_iterations, reference_horizon)
        horizon = num_iterations * batch
    else:
        flops = flops_per_token(config)
        horizon = max(1, int(target_flops / flops if target_flops > 0 else data_ratio * scaling_params(config)))
        batch = given_batch or batch_for_horizon(horizon, reference_horizon)
        num_iterations = round(target_flops / (flops * batch)) if target_flops > 0 else horizon // batch
        if num_iterations < 1:
            raise UserError(f"{horizon} tokens are less than one batch of {batch}: lower --total-batch-size")
    batch_factor = math.sqrt(batch / REFERENCE_BATCH)
    decay = weight_decay * batch_factor * reference_horizon / horizon
    return Recipe(config, batch, num_iterations, batch_factor, decay, horizon)


def scaling_params(config: GPTConfig) -> int:
    counts = param_counts(config)
    return counts["transformer_matrices"] + counts["lm_head"]


def batch_for_horizon(horizon: float, reference_horizon: float) -> int:
    return 2 ** round(math.log2(REFERENCE_BATCH * (horizon / reference_horizon) ** BATCH_EXPONENT))


def batch_for_steps(num_iterations: int, reference_horizon: float) -> int:
    """The batch B that suits the horizon num_iterations * B: the fixed point of batch_for_horizon."""
    coefficient = REFERENCE_BATCH * (num_iterations / reference_horizon) ** BATCH_EXPONENT
    return 2 ** max(0, round(math.log2(coefficient) / (1 - BATCH_EXPONENT)))


def accumulation_steps(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches per rank and update. UserError if that is not whole, with the nearest batch sizes that work."""
    if device_batch_size < 1:
        raise UserError(f"--device-batch-size {device_batch_size}: must be at least 1")
    if total_batch_size < 1:
        raise UserError(f"--total-batch-size {total_batch_size}: must be at least 1 token")
    per_pass = device_batch_size * sequence_len * world_size
    if total_batch_size % per_pass == 0:
        return total_batch_size // per_pass
    below, above = total_batch_size // per_pass * per_pass, math.ceil(total_batch_size / per_pass) * per_pass
    totals = " or ".join(str(b) for b in (below, above) if b)
    rows, rest = divmod(total_batch_size, sequence_len * world_size)
    fitting = 0 if rest else max((b for b in range(1, min(rows, device_batch_size) + 1) if rows % b == 0), default=0)
    remedy = f" or --device-batch-size {fitting}" if fitting else ""
    raise UserError(
        f"a total batch of {total_batch_size} tokens is no multiple of {per_pass} ({device_batch_size} rows x "
        f"{sequence_len} tokens x {world_size} ranks): use --total-batch-size {totals}{remedy}"
    )


# ---- schedules: pure functions of the step ----


def lr_multiplier(
    step: int, num_iterations: int, warmup_steps: int = 40, warmdown_ratio: float = 0.65, final_frac: float = 0.05
) -> float:
    """Linear warm-up, constant, linear to final_frac over the last warmdown_ratio of the run."""
    warmdown_steps = round(warmdown_ratio * num_iterations)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= num_iterations - warmdown_steps:
        return 1.0
    left = (num_iterations - step) / warmdown_steps
    return left + (1 - left) * final_frac


def muon_momentum(step: int, num_iterations: int, warmdown_ratio: float = 0.65) -> float:
    """0.85 → 0.97 over 400 steps, then → 0.90 over the warm-down."""
    warmdown_steps = round(warmdown_ratio * num_iterations)
    warmdown_start = num_iterations - warmdown_steps
    if step < 400:
        return 0.85 + 0.12 * step / 400
    if step < warmdown_start:
        return 0.97
    return 0.97 - 0.07 * (step - warmdown_start) / warmdown_steps


def decay_multiplier(step: int, num_iterations: int) -> float:
    """Cosine to 0, for Muon's weight decay."""
    return 0.5 * (1 + math.cos(math.pi * step / num_iterations))


def pretrain_schedule(
    optimizer: MuonAdamW, step: int, num_iterations: int, warmup_steps: int, warmdown_ratio: float, final_frac: float
) -> None:
    """Sets the optimizer's rates for one step of pretraining."""
    lr = lr_multiplier(step, num_iterations, warmup_steps, warmdown_ratio, final_frac)
    momentum = muon_momentum(step, num_iterations, warmdown_ratio)
    optimizer.set_schedule(lr, momentum, decay_multiplier(step, num_iterations))
    for group in optimizer.param_groups if step == 0 else ():
        # At first every block is the identity, and a norm follows: the scalars of the residual stream have no gradient
        # but rounding errors near 1e-11, of which Adam would make steps of full length. Without this, two kernels that
        # agree to 1e-7 part by 5.7 % in the loss within 50 steps (depth 4, 8,192 tokens a step); with it, by 0.07 %.
        if group["name"] in ("resid", "x0", "smear_backout"):
            group["lr"] = 0.0


def finetune_schedule(optimizer: MuonAdamW, step: int, progress: float) -> None:
    """SFT: constant, then linear to 0 over the last half; momentum 0.85 → 0.95 over 300 steps. progress in [0, 1]."""
    optimizer.set_schedule(min(1.0, 2 * (1 - progress)), 0.85 + 0.10 * min(step / 300, 1), 1.0)


def rl_schedule(optimizer: MuonAdamW, step: int, progress: float) -> None:
    """Reinforcement learning: linear to 0; momentum 0.85 → 0.95 over 300 steps, as in SFT. progress in [0, 1]."""
    optimizer.set_schedule(1 - progress, 0.85 + 0.10 * min(step / 300, 1), 1.0)
