"""
The minutes in which 8xH100 should reach GPT-2's CORE score (0.2565): the tables of docs/time_to_gpt2.md.

    python dev/time_to_gpt2.py       # needs no GPU

A step consists of the passes over its micro-batches (estimates.py), the optimizer's update, and the exchange of
gradients and weights. FLOPs, memory and bytes are those of our code. The same calculation is made for runs of
Karpathy's nanochat whose settings and times are public: it is trusted as far as it predicts those.

What counts is the time of the training steps: no compilation, validation, evaluation or checkpoint, as on nanochat's
leaderboard.
"""

from dataclasses import dataclass

import estimates
from estimates import BANDWIDTH, product_rate, table_row

from nanochat import planner
from nanochat.costs import GIB, TrainingSetup, bytes_communicated, param_counts, training_memory
from nanochat.gpt import GPTConfig
from nanochat.muon import POLAR_COEFFICIENTS
from nanochat.recipe import Recipe, RecipeFlags, derive

NUM_GPUS = 8
NVLINK = 360e9  # bytes/s that a GPU sends in a collective operation: 80 % of 450e9 on the data sheet (docs/scaling.md)
# Bytes that the update reads and writes per parameter. AdamW: weight, two moments (read and written), gradient. Stack:
# gradients to a stack, weights to a stack and back; the first and the last on every rank.
ADAMW_BYTES, STACK_BYTES, NORM_BYTES = 28, 24, 4
# Muon, per weight, besides its products and stacks, and a time that does not depend on the size: fitted to the
# optimizer on one H100, 12.65 ms at depth 12 and 69 ms at depth 22 (docs/gpus.md).
MUON_BYTES, UPDATE_MS = 139, 3.4
FP8_CAST_BYTES = 12  # per matrix weight: largest value, 8-bit copies in two layouts; after each step
CALIBRATION = "nanochat, 14 March 2026"  # the run that the overhead is fitted to
# What a mixture with 20 % Cosmopedia and a narrower MLP save, from public times: 81.84 → 73.92 → 72.24 minutes. The
# settings of these runs are not public.
MIXTURE_SHARE = 73.92 / 81.84
OUR_VOCAB_SIZE = 49152


@dataclass(frozen=True)
class Run:
    """A pretraining run on 8xH100, and what is known of it."""

    name: str
    depth: int
    ratio: float  # tokens per parameter
    batch: int  # tokens per step
    rows: int  # per micro-batch
    vocab_size: int = 32768
    fp8: bool = True
    minutes: float = 0.0  # public; 0 = unknown
    source: str = ""

    @property
    def recipe(self) -> Recipe:
        flags = RecipeFlags(depth=self.depth, target_param_data_ratio=self.ratio, total_batch_size=self.batch)
        return derive(flags, self.vocab_size)

    @property
    def setup(self) -> TrainingSetup:
        accumulation = self.batch // (self.rows * self.recipe.model.sequence_len * NUM_GPUS)
        return TrainingSetup(self.rows, accumulation, NUM_GPUS, fp8=self.fp8, attention="flash")


# karpathy/nanochat: dev/LEADERBOARD.md, runs 1 and 4 to 6, and pull requests. All with FlashAttention 3 and rows of
# 2,048 tokens. The models of January to 9 March have neither smear nor backout, which are less than 1 % of a step.
PUBLIC_RUNS = (
    Run("nanochat, January 2026", 24, 12, 2**19, 16, fp8=False, minutes=182.5, source="run 1: 10,949 s"),
    Run("nanochat, ClimbMix", 24, 9.5, 2**20, 16, minutes=121.2, source="run 4: 2.02 h"),
    Run("nanochat, 9 March 2026", 24, 8.7, 2**20, 16, minutes=108.0, source="run 5: 1.80 h"),
    Run(CALIBRATION, 24, 8, 2**20, 16, minutes=98.9, source="run 6: 5,934 s"),
    Run("nanochat, #733", 22, 11.05, 2**20, 16, minutes=88.2, source="#733: 5,294 s"),
    Run("nanochat, #830", 22, 9.4, 2**19, 32, OUR_VOCAB_SIZE, minutes=81.84, source="#830: mean of 6"),
)
OURS = Run("ours", 22, 9.4, 2**19, 32, OUR_VOCAB_SIZE)


def main() -> None:
    for table in (validation_table(), step_table(), result_table(), lever_table()):
        print(*table, "", sep="\n")


# ---- a step ----


def step_ms(run: Run) -> dict[str, float]:
    """Milliseconds of an optimizer step by part."""
    config, setup = run.recipe.model, run.setup
    passes = estimates.training_ms(config, run.rows, attention="fa4", fp8=run.fp8)
    parts = {part: setup.accumulation * ms for part, ms in passes.items()}
    parts["tables, casts, sums"] -= estimates.sum_ms(config)  # the first micro-batch has nothing to add to
    sent = sum(bytes_communicated(config, setup).values())
    return parts | {"optimizer": optimizer_ms(config, NUM_GPUS, run.fp8), "NVLink": 1e3 * sent / NVLINK}


def optimizer_ms(config: GPTConfig, world_size: int, fp8: bool = False) -> float:
    """
    Milliseconds of the update on each of several ranks, which share it. No transfer is counted here, and none of those
    in bytes_communicated is taken to be hidden behind the update.
    """
    counts = param_counts(config)
    matrices = counts["transformer_matrices"]
    others = counts["total"] - matrices
    shared = ADAMW_BYTES * others + (MUON_BYTES + STACK_BYTES / 3) * matrices + NORM_BYTES * counts["total"]
    repeated = (2 * STACK_BYTES / 3 + FP8_CAST_BYTES * fp8) * matrices
    seconds = (shared / world_size + repeated) / BANDWIDTH
    seconds += muon_flops(config) / world_size / product_rate(config.n_embd)
    return 1e3 * seconds + UPDATE_MS


def muon_flops(config: GPTConfig) -> float:
    """
    Orthogonalization: each polynomial takes X Xᵀ, its square and a product with X, of matrices with r <= c sides:
    4 r² c + 2 r³. A layer has four with r = c = C, and two with r = C, c = 4 C.
    """
    cube = config.n_embd**3
    return len(POLAR_COEFFICIENTS) * config.n_layer * (4 * (4 + 2) + 2 * (16 + 2)) * cube


def minutes(run: Run) -> float:
    return run.recipe.num_iterations * sum(step_ms(run).values()) / 60e3


def overhead() -> float:
    """Public time over calculated time of the run that it is fitted to."""
    run = next(run for run in PUBLIC_RUNS if run.name == CALIBRATION)
    return run.minutes / minutes(run)


# ---- the tables ----


def validation_table() -> list[str]:
    factor = overhead()
    lines = [
        table_row("run", "depth, ratio, batch, rows", "steps", "source", "minutes", "calculated", "with overhead"),
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for run in PUBLIC_RUNS:
        settings = f"{run.depth}, {run.ratio:g}, {run.batch:,}, {run.rows}" + ("" if run.fp8 else ", bfloat16")
        calculated = minutes(run)
        cells = [run.name, settings, f"{run.recipe.num_iterations:,}", run.source, f"{run.minutes:.1f}"]
        for value in (calculated, factor * calculated):
            cells.append(f"{value:.1f} ({100 * (value / run.minutes - 1):+.1f} %)")
        lines.append(table_row(*cells))
    return lines


def step_table() -> list[str]:
    """Ours, step by step."""
    parts = step_ms(OURS)
    config, setup, counts = OURS.recipe.model, OURS.setup, param_counts(OURS.recipe.model)
    total = sum(parts.values())
    memory = training_memory(config, setup).peak / GIB
    limit = planner.named_target(f"{NUM_GPUS}xH100", fp8=True).memory / GIB
    sent = sum(bytes_communicated(config, setup).values())
    num_fp8 = counts["transformer_matrices"] / 1e6
    how = {
        "matrix products": f"{num_fp8:.0f} M weights in FP8, lm_head {head_ms(config):.0f} ms",
        "attention": f"{estimates.attention_flops(config, OURS.rows):.2e} FLOPs in whole tiles",
        "norms, rotary, relu²": f"{estimates.MOVED[True]['layer']:g} bytes per token, channel and layer, with casts",
        "loss": "logits in 16 bits, written once and read twice",
        "tables, casts, sums": "embeddings and their gradients",
        "between kernels": "measured on one GPU",
        "optimizer": "an eighth of the matrices and tables on each GPU",
        "NVLink": f"{sent / 1e9:.1f} GB sent by each GPU, nothing hidden",
    }
    lines = [table_row("part of a step", "ms", "share", "from"), "|---|---:|---:|---|"]
    lines += [table_row(part, f"{ms:.1f}", f"{ms / total:.0%}", how[part]) for part, ms in parts.items()]
    tokens_per_second = OURS.batch / total * 1e3
    lines.append(table_row("**step**", f"**{total:.0f}**", "", f"{tokens_per_second / 1e6:.2f} M tokens/s"))
    lines.append(table_row("memory", "", "", f"{memory:.0f} of {limit:.0f} GiB with {OURS.rows} rows, no accumulation"))
    return lines


def head_ms(config: GPTConfig) -> float:
    """Of the products of lm_head in our step, in bfloat16."""
    tokens = OURS.batch / NUM_GPUS
    return 1e3 * 6 * tokens * param_counts(config)["lm_head"] / product_rate(config.n_embd)


def result_table() -> list[str]:
    recipe, calculated = OURS.recipe, minutes(OURS)
    factor = overhead()
    rows = [
        (f"{recipe.num_iterations:,} steps of {OURS.batch:,} tokens, as calculated", calculated),
        (f"with the overhead of nanochat's run ({factor:.3f})", factor * calculated),
        (f"as calculated, with 20 % Cosmopedia ({MIXTURE_SHARE:.3f}, as in public runs)", MIXTURE_SHARE * calculated),
        ("the same with the overhead", factor * MIXTURE_SHARE * calculated),
    ]
    lines = [table_row("ours, 8xH100", "minutes"), "|---|---:|"]
    return lines + [table_row(what, f"{value:.1f}") for what, value in rows]


def lever_table() -> list[str]:
    """What a step could still lose; none of it is in the code."""
    parts, config = step_ms(OURS), OURS.recipe.model
    layers, share = parts["norms, rotary, relu²"], estimates.BANDWIDTH_SHARE[True]
    savings = {
        "all transfers hidden behind the passes": parts["NVLink"],
        "lm_head in FP8, without its casts": head_ms(config) * (1 - 1 / estimates.FP8_SPEEDUP),
        "the layers' kernels at the bandwidth of a copy, as in bfloat16": (1 - share) * layers,
    }
    per_ms = OURS.recipe.num_iterations / 60e3
    lines = [table_row("not done", "ms per step", "minutes"), "|---|---:|---:|"]
    lines += [table_row(what, f"{ms:.0f}", f"{per_ms * ms:.1f}") for what, ms in savings.items()]
    left = sum(parts.values()) - sum(savings.values())
    return [*lines, table_row("**what would remain**", f"**{left:.0f}**", f"**{per_ms * left:.1f}**")]


if __name__ == "__main__":
    main()
