"""
The tables of docs/scaling.md: memory, communication, time and MFU of pretraining on 1 to 512 GPUs.

    python dev/scaling.py            # needs no GPU

Batch and model are the recipe's, rows and memory the planner's, bytes those of costs.bytes_communicated. The network is
a model: 8 GPUs per node, joined by NVLink; one link between a node and the others, which its GPUs share.
"""

from dataclasses import replace

from nanochat import planner, recipe
from nanochat.costs import (
    GIB,
    TrainingSetup,
    bytes_communicated,
    expected_mfu,
    flops_per_token,
    recomputed_share,
    training_memory,
)
from nanochat.gpt import GPTConfig

CARD = "H100"
DEPTHS = (12, 20, 24, 32, 40, 48)
COUNTS = (1, 8, 64, 512)
VOCAB_SIZE = 32768
GPUS_PER_NODE = 8
NVLINK = 360e9  # bytes/s of a GPU in one direction: 80 % of 450 GB/s, which collective operations reach
LINK = 50e9  # bytes/s of a node in one direction: 400 Gb/s


def main() -> None:
    for sharded in (False, True):
        print(*table(sharded), "", sep="\n")


def table(sharded: bool) -> list[str]:
    """The lines of the table of one mode: replicated weights, or those of --shard."""
    lines = [
        row(
            "depth", "GPUs", "rows x accumulation", "memory GiB", "sent GiB", "compute s", "network s", "step s", "MFU"
        ),
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for depth in DEPTHS:
        plan = recipe.derive(recipe.RecipeFlags(depth=depth), VOCAB_SIZE)
        for count in COUNTS:
            if not (sharded and count == 1):
                lines.append(row(str(depth), str(count), *cells(plan, count, sharded)))
    return lines


def cells(plan: recipe.Recipe, count: int, sharded: bool) -> list[str]:
    setup = find_setup(plan, count, sharded)
    if not setup:
        return ["batch too small" if too_few_rows(plan, count) else "does not fit", *["–"] * 6]
    rows = f"{setup.rows} x {setup.accumulation}" + (" *" if setup.activation_checkpointing else "")
    sent = bytes_communicated(plan.model, setup)
    compute = compute_seconds(plan, setup)
    network = network_seconds(sent, count)
    step = step_seconds(plan, setup)
    mfu = plan.total_batch_size * flops_per_token(plan.model) / (count * step * planner.named_target(CARD, False).peak)
    memory = training_memory(plan.model, setup).peak / GIB
    numbers = [f"{memory:.0f}", f"{sum(sent.values()) / GIB:.1f}", f"{compute:.2f}", f"{sum(network.values()):.2f}"]
    return [rows, *numbers, f"{step:.2f}", f"{mfu:.0%}"]


def find_setup(plan: recipe.Recipe, count: int, sharded: bool) -> TrainingSetup | None:
    """How the planner would train on that many GPUs; with activation checkpointing if nothing else fits."""
    if too_few_rows(plan, count):
        return None
    target = planner.named_target(f"{count}x{CARD}", False)
    for recomputes in (False, True):
        wanted = replace(TrainingSetup(rows=-1), sharded=sharded, activation_checkpointing=recomputes)
        setup = planner.training_setup(plan.model, target, plan.total_batch_size, wanted)
        if training_memory(plan.model, setup).peak <= target.memory:
            return setup
    return None


def too_few_rows(plan: recipe.Recipe, count: int) -> bool:
    return plan.total_batch_size % (plan.model.sequence_len * count) != 0


def compute_seconds(plan: recipe.Recipe, setup: TrainingSetup) -> float:
    """Of one step on each GPU, at the MFU of public runs, which had large passes."""
    model: GPTConfig = plan.model
    flops = plan.total_batch_size * flops_per_token(model) / setup.world_size
    if setup.activation_checkpointing:
        flops *= 1 + recomputed_share(model)
    return flops / (expected_mfu(model, False) * planner.named_target(CARD, False).peak)


def network_seconds(sent: dict[str, float], count: int) -> dict[str, float]:
    """
    By purpose. In a ring a node sends to the next one what each of its GPUs sends. In an all-to-all, by which Muon's
    matrices are exchanged, each GPU sends to all others, so most of what the 8 GPUs send leaves the node.
    """
    if count <= GPUS_PER_NODE:
        return {purpose: number / NVLINK for purpose, number in sent.items()}
    leaving = GPUS_PER_NODE * (count - GPUS_PER_NODE) / (count - 1)
    return {purpose: number * (leaving if purpose == "Muon" else 1) / LINK for purpose, number in sent.items()}


def step_seconds(plan: recipe.Recipe, setup: TrainingSetup) -> float:
    """
    With replicated weights nothing overlaps with the passes. With sharded ones, weights are gathered and gradients are
    reduced while blocks compute.
    """
    compute = compute_seconds(plan, setup)
    network = network_seconds(bytes_communicated(plan.model, setup), setup.world_size)
    if not setup.sharded:
        return compute + sum(network.values())
    hidden = network["gathered weights"] + network["gradients"]
    return max(compute, hidden) + network["Muon"] + network["weights"]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
