"""
What nanochat chooses by itself on the common GPUs: the two tables of docs/gpus.md.

    python dev/gpu_choices.py                                                # rows per pass; needs no GPU
    bash dev/null_gpu/run.sh -- python dev/gpu_choices.py --card RTX4090     # dtype, attention, compilation, FP8
    bash dev/null_gpu/run.sh -- python dev/gpu_choices.py --all

With --card the null GPU reports the name, the compute capability and the memory of that card, and everything else is
the code that runs on a real one: torch's checks, Triton's compiler for that architecture and its limit of shared
memory. Attention kernels of packages (fa3, fa4) are not installed there.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from nanochat import attention, fp8, hardware, planner, recipe
from nanochat.cards import Card, find_machine
from nanochat.common import UserError
from nanochat.costs import TrainingSetup, training_memory

CARDS = ("T4", "RTX3090", "RTX4090", "RTX5090", "A100-80", "H100", "H200")  # of cards.py, in the order of the page
DEPTHS = (4, 8, 12, 16, 20, 24, 28, 32)
VOCAB_SIZE = 32768


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--card", choices=CARDS)
    parser.add_argument("--all", action="store_true", help="the choices on every card")
    args = parser.parse_args()
    if args.card:
        print(choices_on(find_machine(args.card).card))
        return
    if args.all:
        print(table_row("card", "compute capability", "dtype", "attention", "torch.compile", "FP8"))
        for name in CARDS:
            print(choices_on(find_machine(name).card), flush=True)
        return
    print(*batch_table(), sep="\n")


# ---- dtype, attention, compilation, FP8 ----


def choices_on(card: Card) -> str:
    """The row of a card: what the choices are in a process in which the null GPU pretends to be that card."""
    major, minor = card.capability
    pretence = {"NULLGPU_CARD": f"NVIDIA {card.driver_name},{major}.{minor},{card.gib}"}
    process = subprocess.run(
        [sys.executable, "-c", "import gpu_choices; print(gpu_choices.choices_here())"],
        env=os.environ | pretence,
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()[-1]


def choices_here() -> str:
    """The row of the GPU of this process, which must be the null GPU: its attention kernels compute nothing."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "null_gpu"))
    import counts

    counts.ignore_numbers()
    device = hardware.pick_device("cuda")
    card = hardware.gpu_card(device)
    assert card, "cards.py does not know the card"
    dtype = hardware.pick_training_dtype(device)
    config = recipe.model_config(recipe.RecipeFlags(depth=12), VOCAB_SIZE)
    kernel, _ = attention.choose("auto", config.attention_shape, device, dtype)
    try:
        fp8.check_support(config, config.sequence_len, device, compile=True)
        has_fp8 = "with `--fp8`"
    except UserError:
        has_fp8 = "no"
    compiles = "yes" if hardware.can_compile(device) else "no"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return table_row(card.name, capability, planner.dtype_name(dtype), f"`{kernel}`", compiles, has_fp8)


# ---- rows per pass ----


def batch_table() -> list[str]:
    """The lines of the table of rows per pass that pretraining chooses on one card, by depth."""
    lines = [table_row("card", *(f"d{depth}" for depth in DEPTHS)), "|---|" + "---:|" * len(DEPTHS)]
    for name in CARDS:
        lines.append(table_row(name, *rows_by_depth(name, use_fp8=False)))
        if find_machine(name).card.has_fp8:
            lines.append(table_row(f"{name}, `--fp8`", *rows_by_depth(name, use_fp8=True)))
    return lines


def rows_by_depth(name: str, *, use_fp8: bool) -> list[str]:
    target = planner.named_target(name, use_fp8)
    cells = []
    for depth in DEPTHS:
        plan = recipe.derive(recipe.RecipeFlags(depth=depth), VOCAB_SIZE)
        setup = planner.training_setup(plan.model, target, plan.total_batch_size, TrainingSetup(rows=-1, fp8=use_fp8))
        fits = training_memory(plan.model, setup).peak <= target.memory
        cells.append(str(setup.rows) if fits else "–")
    return cells


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
