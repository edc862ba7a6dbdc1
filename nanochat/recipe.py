"""
Derives every hyperparameter of a run: `--depth` goes in; width, batch size, learning rates, weight decay and number of
optimizer steps come out. Pure arithmetic, in the order in which one value follows from another:

1. Model. The width C is depth * aspect ratio, rounded up to a whole number of attention heads.
2. Horizon: the number of training tokens D = ratio * N. N is the number of parameters in lm_head and the matrices of
   the blocks, the count that scaling laws fit best.
3. Batch: tokens per optimizer step, B = 2^19 * (D / D_12)^0.383, rounded to a power of two (arXiv 2505.13738), at most
   2^20. The reference is the model of depth 12: D_12 is its horizon, and 2^19 tokens were found to be its best batch.
4. Learning rates. They were tuned for the reference and are multiplied by sqrt(B / 2^19): the gradient noise of
   Adam-like optimizers falls with the square root of the batch (arXiv 2205.10287). The rates of
   the embedding tables and lm_head are also multiplied by sqrt(768 / C). The rate of smear and backout is reduced
   for smaller batches only.
5. Weight decay = 0.28 * sqrt(B / 2^19) * D_12 / D. The weights are an average of the updates in the last
   1 / (learning rate * weight decay) steps. With this formula these steps are the same share of every run
   (arXiv 2405.13698).
6. Short runs. The best learning rate falls with the number of training tokens as D^-0.32 (arXiv 2409.19913). Where
   --num-iterations or --target-flops ask for fewer tokens than the ratio gives, the learning rates of tables, lm_head
   and matrices are multiplied by (ratio * N / D)^0.32, at most 4, weight decay is divided by it, and the warm-up takes
   at most a 20th of the run. The scalars keep their rate: at 0.2 a step, x0_lambdas can rise to 2 in the warm-up and
   stay there, which costs 0.05 bits per byte (docs/lab_notes.md). `--recipe nanochat` leaves this step out.

The values and the reference point are those of Karpathy's nanochat. `explain` gives the derivation of a run as a table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from nanochat.cli import (
    COUNT,
    COUNT_OR_AUTO,
    COUNT_OR_DEFAULT,
    DEPTH,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Range,
    flag,
)
from nanochat.common import UserError, human
from nanochat.costs import flops_per_token, param_counts
from nanochat.gpt import PORTABLE, GPTConfig
from nanochat.muon import ParamGroup, StepSchedule

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens: the best batch of the depth-12 model
REFERENCE_WIDTH = 768  # channels: the learning rates of tables and lm_head were tuned at depth 12
BATCH_EXPONENT = 0.383  # arXiv 2505.13738
SHORT_RUN_EXPONENT = 0.32  # arXiv 2409.19913
MAX_SHORT_RUN_FACTOR = 4.0  # larger ones were not tried
# The largest batch that was compared with smaller ones (depth 26). From depth 32 on the formula gives 2^21. A nanochat
# of depth 34 trained with it took 34 B tokens to the loss that depth 24 reached after 5.8 B (karpathy/nanochat #850).
MAX_BATCH = 2**20


@dataclass(frozen=True)
class Hyperparameters:
    """
    Batch sizes and learning rates of pretraining. They are saved in each checkpoint, and later stages start from them.
    The learning rates are those of the reference (batch 2^19, width 768), before any scaling.
    """

    device_batch_size: int = 32  # rows per forward pass and rank
    total_batch_size: int = REFERENCE_BATCH  # tokens per optimizer step over all ranks
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5

    @property
    def batch_lr_scale(self) -> float:
        """The factor on the learning rates that follows from the batch size (step 4 above)."""
        return math.sqrt(self.total_batch_size / REFERENCE_BATCH)


@dataclass(frozen=True)
class RecipeFlags:
    """The flags of pretraining that decide the recipe. Their defaults stand here and nowhere else."""

    recipe: str = flag(
        "default",
        "nanochat = without higher learning rates and a shorter warm-up in short runs",
        choices=("default", "nanochat"),
    )
    depth: int = flag(
        20, "transformer layers; width, batch, steps and learning rates follow (nanochat/recipe.py)", DEPTH
    )
    aspect_ratio: int = flag(64, "channels of width per layer", COUNT)
    head_dim: int = flag(128, "channels per attention head", Range(16))
    max_seq_len: int = flag(2048, "tokens of context", COUNT)
    window_pattern: str = flag("SSSL", "a letter per layer, repeated: S sees 1/4 of the context, L all; last layer: L")
    norm_gains: bool = flag(False, "learned factors (RMSNorm gains) on the inputs of the MLPs and on the final norm")
    portable: bool = flag(False, "only standard parts, which other programs support; see also tok_train --portable")
    num_iterations: int = flag(
        -1, "optimizer steps; -1 = from --target-flops, else from --target-param-data-ratio", COUNT_OR_DEFAULT
    )
    target_flops: float = flag(
        -1.0, "training FLOPs to spend; -1 = from --target-param-data-ratio", Range(0, above=True, default=True)
    )
    target_param_data_ratio: float = flag(
        12.0, "training tokens / parameters (of block matrices and lm_head)", POSITIVE
    )
    device_batch_size: int = flag(-1, "sequences per GPU and pass; auto = as many as fit into memory", COUNT_OR_AUTO)
    total_batch_size: int = flag(
        -1, "tokens per optimizer step over all GPUs; -1 = from the training tokens", COUNT_OR_DEFAULT
    )
    embedding_lr: float = flag(
        Hyperparameters.embedding_lr, "learning rate of the embeddings at batch 2^19, width 768", NOT_NEGATIVE
    )
    unembedding_lr: float = flag(
        Hyperparameters.unembedding_lr, "learning rate of lm_head at batch 2^19, width 768", NOT_NEGATIVE
    )
    matrix_lr: float = flag(
        Hyperparameters.matrix_lr, "learning rate of the block matrices (Muon), at batch 2^19", NOT_NEGATIVE
    )
    scalar_lr: float = flag(
        Hyperparameters.scalar_lr,
        "learning rate of x0_lambdas at batch 2^19; resid_lambdas use 1/100 of it",
        NOT_NEGATIVE,
    )
    weight_decay: float = flag(
        0.28, "Muon's weight decay at depth 12; scaled with batch and number of training tokens", NOT_NEGATIVE
    )
    warmup_steps: int = flag(
        -1, "steps of linear learning-rate warm-up; -1 = 40, at most a 20th of the run", Range(0, default=True)
    )
    warmdown_ratio: float = flag(0.65, "share of the run, at its end, in which the learning rate falls linearly", SHARE)
    final_lr_frac: float = flag(0.05, "learning rate at the end, as a share of the full one", SHARE)


@dataclass(frozen=True)
class Recipe:
    """The recipe of one pretraining run. `groups` and `weight_decay` are final; `hyperparameters` are unscaled."""

    model: GPTConfig
    num_iterations: int  # optimizer steps
    horizon: int  # tokens that batch size and weight decay were chosen for
    weight_decay: float  # Muon's
    hyperparameters: Hyperparameters
    groups: tuple[ParamGroup, ...]

    @property
    def total_batch_size(self) -> int:
        """Tokens per optimizer step over all ranks."""
        return self.hyperparameters.total_batch_size

    @property
    def flops(self) -> float:
        return float(flops_per_token(self.model)) * (self.num_iterations * self.total_batch_size)


def derive(flags: RecipeFlags, vocab_size: int) -> Recipe:
    """
    Returns the recipe that the flags ask for. A given number of steps or FLOPs determines the horizon; batch size and
    weight decay follow from the horizon. UserError names the flag that makes the recipe impossible.
    """
    config = model_config(flags, vocab_size)
    flops = flops_per_token(config)
    reference_horizon = reference_horizon_of(flags, vocab_size)
    given_batch = flags.total_batch_size if flags.total_batch_size > 0 else None

    if flags.num_iterations > 0:
        num_iterations = flags.num_iterations
        batch = given_batch or batch_for_steps(num_iterations, reference_horizon)
        horizon = num_iterations * batch
    elif flags.target_flops > 0:
        horizon = max(1, int(flags.target_flops / flops))
        batch = given_batch or batch_for_horizon(horizon, reference_horizon)
        num_iterations = round(flags.target_flops / (flops * batch))
    else:
        horizon = max(1, horizon_of_ratio(flags, vocab_size))
        batch = given_batch or batch_for_horizon(horizon, reference_horizon)
        num_iterations = horizon // batch
    if num_iterations < 1:
        raise UserError(f"{horizon} tokens are less than one batch of {batch}: use a smaller --total-batch-size")

    given = {field.name: getattr(flags, field.name) for field in fields(Hyperparameters)}
    factor = short_run_factor(flags, vocab_size, horizon)
    rates = {name: factor * given[name] for name in ("embedding_lr", "unembedding_lr", "matrix_lr")}
    hyperparameters = Hyperparameters(**(given | rates | {"total_batch_size": batch}))
    weight_decay = flags.weight_decay * hyperparameters.batch_lr_scale * reference_horizon / horizon / factor
    groups = param_groups(config, hyperparameters, weight_decay=weight_decay)
    return Recipe(config, num_iterations, horizon, weight_decay, hyperparameters, groups)


# ---- 1. model ----


def model_config(flags: RecipeFlags, vocab_size: int) -> GPTConfig:
    """
    The model that the flags ask for. A portable one has only parts that other programs implement (gpt.PORTABLE), and
    full windows whatever the pattern.
    """
    if flags.head_dim % 2:
        raise UserError(f"--head-dim {flags.head_dim}: must be even, as rotary embeddings rotate pairs")
    n_head = math.ceil(flags.depth * flags.aspect_ratio / flags.head_dim)
    config = GPTConfig(
        sequence_len=flags.max_seq_len,
        vocab_size=vocab_size,
        n_layer=flags.depth,
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_head * flags.head_dim,
        window_pattern=flags.window_pattern,
        norm_gains=flags.norm_gains,
    )
    return replace(config, **PORTABLE) if flags.portable else config


# ---- 2. horizon ----


def scaling_params(config: GPTConfig) -> int:
    """N: the block matrices and lm_head. Embedding tables are left out: they are looked up, not multiplied."""
    counts = param_counts(config)
    return counts["transformer_matrices"] + counts["lm_head"]


def horizon_of_ratio(flags: RecipeFlags, vocab_size: int) -> int:
    """Training tokens that --target-param-data-ratio gives for the depth of the flags."""
    return int(flags.target_param_data_ratio * scaling_params(model_config(flags, vocab_size)))


def reference_horizon_of(flags: RecipeFlags, vocab_size: int) -> int:
    """Training tokens that --target-param-data-ratio gives for depth 12, with all other flags unchanged."""
    return horizon_of_ratio(replace(flags, depth=REFERENCE_DEPTH), vocab_size)


# ---- 3. batch ----


def batch_for_horizon(horizon: float, reference_horizon: float) -> int:
    """Tokens per optimizer step: a power of two, at most MAX_BATCH."""
    batch = REFERENCE_BATCH * (horizon / reference_horizon) ** BATCH_EXPONENT
    return min(MAX_BATCH, 2 ** round(math.log2(batch)))


def batch_for_steps(num_iterations: int, reference_horizon: float) -> int:
    """Solves B = batch_for_horizon(num_iterations * B): B is on both sides, hence the exponent 1 / (1 - 0.383)."""
    coefficient = REFERENCE_BATCH * (num_iterations / reference_horizon) ** BATCH_EXPONENT
    return min(MAX_BATCH, 2 ** max(0, round(math.log2(coefficient) / (1 - BATCH_EXPONENT))))


def accumulation_steps(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """
    Micro-batches per rank and optimizer step. UserError when that is not a whole number; it names the nearest batch
    sizes that work.
    """
    tokens_per_pass = device_batch_size * sequence_len * world_size
    if total_batch_size % tokens_per_pass == 0:
        return total_batch_size // tokens_per_pass

    below = total_batch_size // tokens_per_pass * tokens_per_pass
    nearest = [total for total in (below, below + tokens_per_pass) if total > 0]
    remedy = f"use --total-batch-size {' or '.join(map(str, nearest))}"
    rows, rest = divmod(total_batch_size, sequence_len * world_size)
    divisors = [size for size in range(1, min(rows, device_batch_size) + 1) if rows % size == 0]
    if rest == 0 and divisors:
        remedy += f" or --device-batch-size {divisors[-1]}"
    raise UserError(
        f"a total batch of {total_batch_size} tokens is no multiple of {tokens_per_pass} ({device_batch_size} rows x "
        f"{sequence_len} tokens x {world_size} ranks): {remedy}"
    )


# ---- 4. and 5. learning rates and weight decay ----


def param_groups(
    config: GPTConfig,
    hyperparameters: Hyperparameters | None = None,
    *,
    weight_decay: float = RecipeFlags.weight_decay,  # Muon's, final
    lr_frac: float = 1.0,  # share of pretraining's learning rates, below 1 in fine-tuning
) -> tuple[ParamGroup, ...]:
    """The optimizer's parameter groups with their final learning rates."""
    base = hyperparameters or Hyperparameters()
    by_batch = lr_frac * base.batch_lr_scale
    # Adam's steps do not shrink with the gradient, so wider tables and a wider head need smaller ones: each logit is a
    # sum over C channels. C^-0.5 is the public recipe's choice; muP would scale with 1 / C (arXiv 2203.03466).
    by_width = by_batch * (config.n_embd / REFERENCE_WIDTH) ** -0.5
    groups = (
        ParamGroup("lm_head", ("lm_head.",), base.unembedding_lr * by_width, 0.01, (0.8, 0.96)),
        # A row of a table gets a gradient only when its token occurs, so the second moment averages over 200 steps.
        ParamGroup("wte", ("transformer.wte.",), base.embedding_lr * by_width, 0.001, (0.8, 0.995)),
        ParamGroup("value_embeds", ("value_embeds.",), base.embedding_lr / 2 * by_width, 0.01, (0.8, 0.995)),
        # A hundredth: these multiply the whole residual stream in every layer, so their changes compound with depth.
        ParamGroup(
            "resid", ("resid_lambdas",), 0.01 * base.scalar_lr * by_batch, 0.05, (0.8, 0.95), skips_first_step=True
        ),
        # As resid_lambdas: they scale what every token passes through.
        ParamGroup(
            "gains",
            ("mlp_gains", "final_gain"),
            0.01 * base.scalar_lr * by_batch,
            0.05,
            (0.8, 0.95),
            skips_first_step=True,
        ),
        ParamGroup("x0", ("x0_lambdas",), base.scalar_lr * by_batch, 0.0, (0.96, 0.95), skips_first_step=True),
        # Scaled down for small batches: with 0.2 at depth 4 and 8,192 tokens a step, backout_lambda rises to 0.8 or 1,
        # and the loss of 3 of 5 seeds jumps by 0.5 to 1.1 (docs/lab_notes.md). Not scaled up: 0.2 is the value at 2^19.
        ParamGroup(
            "smear_backout",
            ("smear_", "backout_"),
            0.2 * lr_frac * min(1.0, base.batch_lr_scale),
            0.0,
            (0.8, 0.95),
            skips_first_step=True,
        ),
        ParamGroup("muon", ("transformer.h.",), base.matrix_lr * by_batch, weight_decay),
    )
    is_present = {
        "value_embeds": config.value_embeds,
        "resid": config.residual_scalars,
        "gains": config.norm_gains,
        "x0": config.residual_scalars,
        "smear_backout": config.smear or config.backout,
    }
    return tuple(group for group in groups if is_present.get(group.name, True))


def lora_groups(hyperparameters: Hyperparameters, lora_lr: float) -> tuple[ParamGroup, ...]:
    """
    The only parameter group of fine-tuning with LoRA. lora_lr: learning rate at batch 2^19.

    The default, 0.01, was measured: depth 2, width 128, rank 16, 100 steps of 2,048 tokens of primer conversations.
    Bits per byte are 1.50, 1.41, 1.35, 1.31, 1.29 and 1.61 with rates of 0.001, 0.002, 0.004, 0.008, 0.016 and 0.05.
    Fine-tuning of all parameters, the tables included, reaches 0.81.
    """
    lr = lora_lr * hyperparameters.batch_lr_scale
    return (ParamGroup("lora", ("transformer.h.", "lm_head."), lr, 0.0, (0.9, 0.95)),)


def load_hyperparameters(meta: dict[str, Any]) -> Hyperparameters:
    """
    The hyperparameters of the run that saved a checkpoint with this meta data; the defaults where it lacks them.

    They are in the section "settings". Older checkpoints have them in other sections, and flags may be -1 there, which
    stands for a derived value that is in another section.
    """
    known: dict[str, Any] = {}  # later sections override earlier ones
    for section in (meta.get("user_config"), meta.get("flags"), meta, meta.get("recipe"), meta.get("settings")):
        if isinstance(section, dict):
            known |= {name: value for name, value in section.items() if value not in (None, -1)}
    chosen = {field.name: known[field.name] for field in fields(Hyperparameters) if field.name in known}
    for name, value in chosen.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise UserError(f"the checkpoint's {name} is {value!r:.40}, not a number: restore it, or use another")
    return Hyperparameters(**chosen)


# ---- 6. short runs ----


def short_run_factor(flags: RecipeFlags, vocab_size: int, horizon: int) -> float:
    """
    The factor on the learning rates of tables, lm_head and matrices in a run with fewer tokens than
    --target-param-data-ratio gives, else 1.

    Measured at depth 4, width 256, 227 steps of 8,192 tokens of text, where it is 3: docs/lab_notes.md.
    """
    if flags.recipe == "nanochat":
        return 1.0
    share = horizon / horizon_of_ratio(flags, vocab_size)
    return min(MAX_SHORT_RUN_FACTOR, max(1.0, share**-SHORT_RUN_EXPONENT))


def warmup_steps(flags: RecipeFlags, num_iterations: int) -> int:
    if flags.warmup_steps >= 0:
        return flags.warmup_steps
    return 40 if flags.recipe == "nanochat" else min(40, math.ceil(num_iterations / 20))


# ---- schedules: pure functions of the step ----


# (optimizer steps before this one, share of the run before this step, in [0, 1)) → what to set for this step
Schedule = Callable[[int, float], StepSchedule]


def lr_multiplier(flags: RecipeFlags, num_iterations: int, step: int) -> float:
    """Linear warm-up, constant, then linear to final_lr_frac over the last warmdown_ratio of the run (a trapezoid)."""
    warmdown_steps = round(flags.warmdown_ratio * num_iterations)
    warmup = warmup_steps(flags, num_iterations)
    if step < warmup:
        return (step + 1) / warmup
    if step <= num_iterations - warmdown_steps:
        return 1.0
    remaining = (num_iterations - step) / warmdown_steps
    return remaining + (1 - remaining) * flags.final_lr_frac


def muon_momentum(flags: RecipeFlags, num_iterations: int, step: int) -> float:
    """
    From 0.85 to 0.97 over 400 steps, and down to 0.90 over the warm-down: a shorter memory as the steps get smaller.
    In runs of fewer than 1,143 steps the warm-down starts before step 400. The momentum then still rises until step 400
    and jumps to the value of the warm-down there. In runs of at most 400 steps it only rises.
    """
    warmdown_steps = round(flags.warmdown_ratio * num_iterations)
    warmdown_start = num_iterations - warmdown_steps
    if step < 400:
        return 0.85 + 0.12 * step / 400
    if step < warmdown_start:
        return 0.97
    return 0.97 - 0.07 * (step - warmdown_start) / warmdown_steps


def decay_multiplier(num_iterations: int, step: int) -> float:
    """Cosine to 0, for Muon's weight decay."""
    return 0.5 * (1 + math.cos(math.pi * step / num_iterations))


def pretrain_schedule(flags: RecipeFlags, num_iterations: int, step: int, progress: float) -> StepSchedule:
    """The schedule of pretraining; bind the first two arguments with functools.partial to get a Schedule."""
    lr = lr_multiplier(flags, num_iterations, step)
    momentum = muon_momentum(flags, num_iterations, step)
    # Residual scalars, smear and backout are not updated in the first step. All blocks are the identity then, and a
    # norm follows, so these gradients are rounding errors near 1e-11, which Adam would turn into steps of full length.
    # Without this rule two kernels that agree to 1e-7 differ by 5.7 % in the loss within 50 steps (depth 4, 8,192
    # tokens a step); with it, by 0.07 %.
    return StepSchedule(lr, momentum, decay_multiplier(num_iterations, step), is_first_step=step == 0)


def finetune_schedule(step: int, progress: float) -> StepSchedule:
    """SFT: constant, then linear to 0 over the last half of the run; momentum 0.85 → 0.95 over 300 steps."""
    return StepSchedule(min(1.0, 2 * (1 - progress)), _finetune_momentum(step))


def rl_schedule(step: int, progress: float) -> StepSchedule:
    """Reinforcement learning: linear to 0 over the whole run; momentum as in SFT."""
    return StepSchedule(1 - progress, _finetune_momentum(step))


def _finetune_momentum(step: int) -> float:
    return 0.85 + 0.10 * min(step / 300, 1)


# ---- the derivation as a table ----


def explain(flags: RecipeFlags, recipe: Recipe) -> list[tuple[str, str, str]]:
    """Rows (what, value, how it was derived) for people who want to check a run against the papers."""
    model, base = recipe.model, recipe.hyperparameters
    reference_horizon = reference_horizon_of(flags, model.vocab_size)
    width = f"depth {flags.depth} x {flags.aspect_ratio} (--aspect-ratio), rounded up to heads of {flags.head_dim}"
    counted = "matrices of the blocks + lm_head: the count that scaling laws fit best"
    if flags.num_iterations > 0:
        horizon, steps = "steps x batch", "--num-iterations"
    elif flags.target_flops > 0:
        horizon, steps = "--target-flops / FLOPs per token", "--target-flops / (FLOPs per token x batch)"
    else:
        horizon, steps = f"{flags.target_param_data_ratio:g} x N (--target-param-data-ratio)", "D / B"
    batch = "2^19 (D / D_12)^0.383, to a power of two, at most 2^20 (arXiv 2505.13738)"
    if flags.total_batch_size > 0:
        batch = "--total-batch-size"
    factor = short_run_factor(flags, model.vocab_size, recipe.horizon)
    decay = f"{flags.weight_decay:g} sqrt(B / 2^19) D_12 / D (arXiv 2405.13698)"
    if factor > 1:
        decay += " / the factor for short runs"
    rows = [
        ("width C", f"{model.n_embd}", width),
        ("parameters N", human(scaling_params(model)), counted),
        ("horizon D", f"{human(recipe.horizon)} tokens", horizon),
        ("reference horizon D_12", f"{human(reference_horizon)} tokens", "the same ratio at depth 12, where B = 2^19"),
        ("batch B", f"{base.total_batch_size:,} tokens", batch),
        ("optimizer steps", f"{recipe.num_iterations:,}", steps),
        ("factor on learning rates", f"{base.batch_lr_scale:.4f}", "sqrt(B / 2^19) (arXiv 2205.10287)"),
        (
            "factor for short runs",
            f"{factor:.4f}",
            f"({flags.target_param_data_ratio:g} N / D)^0.32, 1 to 4, not on scalars (arXiv 2409.19913)",
        ),
        ("Muon's weight decay", f"{recipe.weight_decay:.4f}", decay),
    ]
    return rows + explain_groups(recipe.groups, base, model.n_embd)


def explain_groups(
    groups: tuple[ParamGroup, ...], base: Hyperparameters, width: int, lr_frac: float = 1.0
) -> list[tuple[str, str, str]]:
    """Rows (what, value, how it was derived) for the learning rate of each parameter group."""
    share = "" if lr_frac == 1 else f"{lr_frac:g} x "
    by_batch = f"{share}sqrt(B / 2^19)"
    by_width = f"{by_batch} x ({width} / {REFERENCE_WIDTH})^-0.5"
    how = {
        "lm_head": f"unembedding_lr {base.unembedding_lr:g} x {by_width}",
        "wte": f"embedding_lr {base.embedding_lr:g} x {by_width}",
        "value_embeds": "half of wte's",
        "resid": f"scalar_lr {base.scalar_lr:g} x 0.01 x {by_batch}",
        "gains": "as resid",
        "x0": f"scalar_lr {base.scalar_lr:g} x {by_batch}",
        "smear_backout": f"{share}0.2 x min(1, sqrt(B / 2^19))",
        "muon": f"matrix_lr {base.matrix_lr:g} x {by_batch}",
        "lora": "lora_lr x sqrt(B / 2^19)",
    }
    return [(f"lr of {group.name}", f"{group.lr:.4g}", how[group.name]) for group in groups]
