"""
The plan of a run before it starts: whether it fits into memory, how long it takes and what it costs, on this machine or
on a named one. The stage scripts print it for --plan, and every run checks at its start whether it fits.

    target = find_target(flags.for_, flags.device, flags.fp8)
    check_fits(config, setup, target)                 # UserError with the remedy
    print_table("Plan", training_rows(config, setup, target, …))

The arithmetic is in costs.py, the GPUs' data in cards.py.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nanochat import attention, hardware
from nanochat.cards import find_machine
from nanochat.common import UserError, duration, human
from nanochat.costs import (
    GIB,
    Memory,
    TrainingSetup,
    expected_mfu,
    flops_per_token,
    generation_memory,
    largest_batch,
    param_counts,
    recomputed_share,
    training_memory,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.recipe import RecipeFlags, derive, model_config
from nanochat.tokenizer import Tokenizer, default_dir

CUDA_CONTEXT = 0.6 * GIB  # what the driver and the libraries' workspaces take on a GPU
FRAGMENTATION = 0.03  # share of a GPU's memory that the allocator cannot use
# Most tokens per pass on a CPU: larger passes take more memory and are no faster. Depth 4, eager, two cores of an AMD
# EPYC: 204, 215 and 203 GFLOP/s with 2,048, 4,096 and 8,192 tokens.
CPU_TOKENS = 2**13
TRIAL_TOKENS = 2048  # tokens per micro-batch of a trial (see measured_rate)
TRIAL_SECONDS = 20.0  # a trial that would take longer is replaced by an assumption
# Where no trial is made: training speed as a share of the speed of matrix products. Measured on a CPU at depth 4,
# without torch.compile.
ASSUMED_SHARE = 0.5
MAX_DEPTH = 200
LARGEST_BATCH = TrainingSetup(rows=-1)  # see training_setup


# ---- the machine of a plan ----


@dataclass(frozen=True)
class Target:
    """The machine that a plan is for: this one or a named one, with `count` ranks."""

    name: str
    device: str  # cuda | mps | cpu
    count: int
    memory: float  # bytes that a rank may use
    dtype: torch.dtype  # that training computes in
    rate_of: Callable[[GPTConfig], float]  # FLOP/s of a rank while it trains this model and recomputes nothing
    rate_source: str  # where rate_of comes from, for the table
    peak: float = 0.0  # FLOP/s of a rank by its data sheet; 0 = unknown
    dollars_per_hour: float = 0.0  # of all ranks together; 0 = unknown

    def seconds(self, config: GPTConfig, flops: float, activation_checkpointing: bool = False) -> float:
        """Training time of a run of that many FLOPs, not counting those that activation checkpointing adds."""
        if activation_checkpointing:
            flops *= 1 + recomputed_share(config)
        return flops / (self.count * self.rate_of(config))

    def seconds_for(self, dollars: float) -> float:
        """How long the machine can be rented for that many dollars. UserError if its price is not known."""
        if not self.dollars_per_hour:
            raise UserError(f"no price is known for {self.name}: use --hours, or name a machine with --for")
        return 3600 * dollars / self.dollars_per_hour


def named_target(name: str, fp8: bool) -> Target:
    """The target of --for, such as "8xH100". UserError if the card is unknown, or lacks FP8 units that fp8 needs."""
    card, count = find_machine(name)
    if fp8 and not card.has_fp8:
        raise UserError(f"--for {name} --fp8: this card has no FP8 units; leave out --fp8")
    return Target(
        name=f"{count}x{card.name}",
        device="cuda",
        count=count,
        memory=usable_gpu_memory(card.gib * GIB),
        dtype=card.dtype,
        rate_of=lambda config: expected_mfu(config, fp8) * card.flops,
        rate_source=f"{card.flops / 1e12:g} TFLOP/s x the share that public runs on 8xH100 reached (2025, 2026)",
        peak=card.flops,
        dollars_per_hour=count * card.dollars_per_hour,
    )


def local_target(device: torch.device, world_size: int, dtype: torch.dtype, fp8: bool = False) -> Target:
    """This machine with `world_size` ranks. If cards.py does not list its card, rate_of measures the speed."""
    card = hardware.gpu_card(device)
    if card:
        known = named_target(f"{world_size}x{card.name}", fp8)
        return replace(known, memory=local_memory(device, world_size), dtype=dtype)
    sharing = world_size if device.type == "cpu" else 1  # ranks that share the CPU
    return Target(
        name=hardware.describe(device),
        device=device.type,
        count=world_size,
        memory=local_memory(device, world_size),
        dtype=dtype,
        rate_of=functools.cache(lambda config: measured_rate(config, device, dtype) / sharing),
        rate_source="trial passes without torch.compile, or half the speed of matrix products for large models",
    )


def find_target(for_: str, device_name: str, fp8: bool = False) -> Target:
    """The target of the flags --for and --device: a named machine, all GPUs of this one, or its CPU."""
    if for_:
        return named_target(for_, fp8)
    device = hardware.pick_device(device_name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    return local_target(device, count, hardware.pick_training_dtype(device), fp8)


def local_memory(device: torch.device, world_size: int) -> float:
    """Bytes that each rank on this machine may take. Without CUDA the ranks share the machine's memory."""
    if device.type == "cuda":
        return usable_gpu_memory(torch.cuda.get_device_properties(device).total_memory)
    return hardware.available_memory() / world_size


def usable_gpu_memory(total: float) -> float:
    return total * (1 - FRAGMENTATION) - CUDA_CONTEXT


def measured_rate(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> float:
    """
    FLOP/s of training on this device without torch.compile: the fastest of three passes with random weights. For a
    model that is too large or too slow for such a trial: ASSUMED_SHARE of the speed of matrix products.
    """
    peak = hardware.matmul_rate(device, dtype)
    rows = max(1, TRIAL_TOKENS // config.sequence_len)
    flops = flops_per_token(config) * rows * config.sequence_len
    setup = TrainingSetup(rows=rows, dtype=dtype, compiled=False, device=device.type)
    too_slow = 3 * flops > ASSUMED_SHARE * peak * TRIAL_SECONDS
    if too_slow or training_memory(config, setup).peak > local_memory(device, 1):
        return ASSUMED_SHARE * peak
    hardware.tune_process(device)
    model = GPT.create(config, device, dtype)
    _, kernel = attention.choose("auto", config.attention_shape, device, dtype)
    model.use_attention(kernel)
    tokens = torch.randint(config.vocab_size, (rows, config.sequence_len), device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model(tokens, tokens).backward()
        hardware.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds)  # the fastest: other programs can only slow a pass down


# ---- what fits ----


def training_setup(config: GPTConfig, target: Target, total_batch_size: int, wanted: TrainingSetup) -> TrainingSetup:
    """
    How a run on the target is set up. `wanted` gives rows and what flags decide; the rest follows from the target.
    -1 rows are as many as fit, at least 1. Without CUDA a run starts uncompiled, and -1 rows give at most CPU_TOKENS.
    """
    is_gpu = target.device == "cuda"
    setup = replace(
        wanted,
        world_size=target.count,
        dtype=target.dtype,
        compiled=wanted.compiled and is_gpu,
        attention="flash" if target.dtype == torch.bfloat16 else "banded",  # FlashAttention needs 16 bits
        device=target.device,
    )
    rows = wanted.rows
    if rows == -1:
        rows = largest_batch(config, setup, total_batch_size, target.memory)
        if not is_gpu:
            rows = min(rows, max(1, CPU_TOKENS // config.sequence_len))
    rows = max(rows, 1)
    accumulation = max(1, total_batch_size // (rows * config.sequence_len * target.count))
    return replace(setup, rows=rows, accumulation=accumulation)


def check_fits(config: GPTConfig, setup: TrainingSetup, target: Target, flags: RecipeFlags | None = None) -> None:
    """
    UserError if the run does not fit into memory. The message names a number of rows that would fit; if even one row
    does not, activation checkpointing, where that helps; with the flags of pretraining also sharding, or a depth.
    """

    def fits(config: GPTConfig, setup: TrainingSetup) -> bool:
        return training_memory(config, setup).peak <= target.memory

    if fits(config, setup):
        return
    need = gib(training_memory(config, setup).peak)
    problem = (
        f"training with {count_rows(setup.rows)} per pass takes {need} per rank, {target.name} has {gib(target.memory)}"
    )
    if setup.rows > 1:  # with fewer rows a step has several micro-batches
        setup = replace(setup, accumulation=2)
    for rows in (2**i for i in reversed(range(setup.rows.bit_length()))):
        if rows < setup.rows and fits(config, replace(setup, rows=rows)):
            raise UserError(f"{problem}: use --device-batch-size {rows}")
    if fits(config, replace(setup, rows=1, activation_checkpointing=True)):
        raise UserError(f"{problem}: use --activation-checkpointing --device-batch-size 1")
    if flags and target.count > 1 and fits(config, replace(setup, rows=1, activation_checkpointing=True, sharded=True)):
        raise UserError(f"{problem}: use --shard --activation-checkpointing --device-batch-size 1")
    remedy = "use a machine with more memory"
    if flags:
        smaller = [model_config(replace(flags, depth=depth), config.vocab_size) for depth in range(1, flags.depth)]
        depth = sum(fits(model, replace(setup, rows=1)) for model in smaller)  # memory grows with the depth
        remedy = f"use --depth {depth} or less" if depth else "use a shorter --max-seq-len"
    raise UserError(f"{problem}: {remedy}")


def check_memory(memory: Memory, target: Target, remedy: str) -> None:
    """UserError with this remedy if the target has less memory."""
    if memory.peak > target.memory:
        raise UserError(
            f"this needs about {gib(memory.peak)} per rank, {target.name} has {gib(target.memory)}: {remedy}"
        )


def check_generation_fits(config: GPTConfig, slots: int, length: int, target: Target) -> None:
    """UserError if a model does not fit into memory that generates in `slots` rows of `length` tokens."""
    memory = generation_memory(config, slots, length, target.dtype, target.device)
    check_memory(memory, target, "use a smaller --depth or fewer rows")


def depth_for(
    flags: RecipeFlags, vocab_size: int, target: Target, seconds: float, wanted: TrainingSetup = LARGEST_BATCH
) -> int:
    """
    The largest depth that fits into the target's memory and trains in this time; `wanted` as in training_setup.
    UserError if there is none.
    """
    best = 0
    for depth in range(1, MAX_DEPTH + 1):
        recipe = derive(replace(flags, depth=depth), vocab_size)
        setup = training_setup(recipe.model, target, recipe.total_batch_size, wanted)
        fits = training_memory(recipe.model, setup).peak <= target.memory
        if not fits or target.seconds(recipe.model, recipe.flops, wanted.activation_checkpointing) > seconds:
            break
        best = depth
    if not best:
        raise UserError(f"{duration(seconds)} on {target.name} is too short even for --depth 1: allow more")
    return best


# ---- the plan as a table ----


def training_rows(
    config: GPTConfig, setup: TrainingSetup, target: Target, *, num_steps: int, flops: float
) -> list[tuple[str, str, str]]:
    """Rows (what, value, explanation) of the plan of a training run; num_steps and flops are 0 if unknown."""
    memory = training_memory(config, setup)
    tokens_per_step = setup.rows * config.sequence_len * setup.world_size * setup.accumulation
    batch = f"{setup.world_size} GPUs x " if target.device == "cuda" else ""
    batch += f"{count_rows(setup.rows)} x {config.sequence_len} tokens, {setup.accumulation} times"
    counts = param_counts(config)
    groups = ", ".join(f"{name} {human(count)}" for name, count in counts.items() if name != "total" and count)
    rows = [
        ("machine", target.name, f"{gib(target.memory)} to use per rank, computing in {dtype_name(target.dtype)}"),
        ("parameters", human(counts["total"]), groups),
        ("batch", f"{tokens_per_step:,} tokens", batch),
    ]
    if num_steps:
        seconds = target.seconds(config, flops, setup.activation_checkpointing)
        model_rate = flops / seconds / target.count  # without what is computed twice, as in MFU
        rate = f"{human(model_rate)} FLOP/s per rank"
        if target.peak:
            rate += f", {model_rate / target.peak:.0%} MFU"
        rate += f": {target.rate_source}"
        rows += [
            ("training", f"{human(num_steps * tokens_per_step)} tokens", f"{num_steps:,} optimizer steps"),
            ("FLOPs", f"{flops:.2e}", f"{human(flops_per_token(config))} per token"),
            ("time", duration(seconds), rate),
            ("cost", *_cost(target, seconds)),
        ]
    return rows + memory_rows(memory, target)


def memory_rows(memory: Memory, target: Target) -> list[tuple[str, str, str]]:
    """Table rows: whether the memory suffices, and what it is needed for at its peak."""
    verdict = "fits" if memory.peak <= target.memory else "does NOT fit"
    parts = memory.phases[memory.peak_phase]
    shown = sorted((part for part in parts if memory.parts[part]), key=lambda part: -memory.parts[part])
    rows = [("memory per rank", gib(memory.peak), f"{verdict}; the peak is in the {memory.peak_phase}")]
    return rows + [(f"  {part}", gib(memory.parts[part]), "") for part in shown]


def _cost(target: Target, seconds: float) -> tuple[str, str]:
    if not target.dollars_per_hour:
        return "unknown", "no price is known for this machine"
    dollars = target.dollars_per_hour * seconds / 3600
    return f"${dollars:,.2f}", f"at ${target.dollars_per_hour:g} an hour (November 2026)"


def planned_vocab_size() -> int:
    """The tokenizer's vocabulary size, or the default size if no tokenizer has been trained yet."""
    folder = default_dir()
    return Tokenizer.load(folder).vocab_size if folder.exists() else GPTConfig.vocab_size


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def count_rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB"
