"""
Saving a checkpoint: how long training stalls, compared with a plain copy of the same state in memory.

    python -m scripts.bench checkpoint
    python -m scripts.bench checkpoint --depth 20 --head-dim 128 --vocab-size 32768 --folder ~/disk     # a GPU

A save copies weights, optimizer state and data position to host memory, and a thread writes the copy to the disk. Only
the copy stalls training. `ratios`: time of the plain copy / stall, so 0.5 means that a save stalls twice as long.
"""

import os
import statistics
import tempfile
from dataclasses import dataclass

import torch

from nanochat import checkpoint_manager, hardware, recipe
from nanochat.checkpoint_manager import CheckpointWriter
from nanochat.cli import COUNT, DEPTH, Range, command, flag
from nanochat.distributed import Dist
from nanochat.gpt import GPT
from nanochat.muon import MuonAdamW, build_optimizer
from nanochat.train import TrainState
from scripts.bench.harness import alternate, print_table, report, timed


@dataclass(frozen=True)
class Flags:
    depth: int = flag(8, "layers", DEPTH)
    head_dim: int = flag(64, "channels per attention head", Range(16))
    vocab_size: int = flag(8192, "tokens", COUNT)
    rounds: int = flag(5, "saves and copies to measure, in turn", COUNT)
    device: str = flag("auto", "cuda | mps | cpu | auto")
    folder: str = flag("", "folder on the disk to write to; default: a temporary one")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratio."""
    device = hardware.pick_device(flags.device)
    hardware.tune_process(device, "highest")
    model, optimizer = build(flags, device)
    state = TrainState(0, data_state={"waiting": torch.zeros(500_000, dtype=torch.int32)})  # a packing buffer
    with tempfile.TemporaryDirectory(dir=flags.folder or None) as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        writer = CheckpointWriter("base", "bench", Dist(device), keep_last=1)
        writes: list[float] = []

        def save() -> float:
            state.step += 1
            stall = timed(lambda: writer.save(model, optimizer, state, {}))
            writes.append(timed(writer.wait))
            return stall

        def copy() -> float:
            return timed(lambda: copy_state(model, optimizer, state))

        seconds = alternate({"copy": copy, "save": save}, flags.rounds)
        step = checkpoint_manager.step_dir(writer.path, state.step)
        num_bytes = sum(file.stat().st_size for file in step.iterdir())
    stall, copied, written = (statistics.median(times) for times in (seconds["save"], seconds["copy"], writes[1:]))
    rows = {
        "plain copy in memory": {"seconds": f"{copied:.3f}", "GB/s": f"{num_bytes / copied / 1e9:.2f}"},
        "stall of training": {"seconds": f"{stall:.3f}", "x copy": f"{stall / copied:.2f}"},
        "writing, in a thread": {"seconds": f"{written:.3f}", "GB/s": f"{num_bytes / written / 1e9:.2f}"},
    }
    print_table(f"a checkpoint of {num_bytes / 1e6:,.0f} MB, depth {flags.depth}, {hardware.describe(device)}", rows)
    return report("checkpoint", {"stall": copied / stall}, bytes=num_bytes, seconds=[stall, copied, written])


def build(flags: Flags, device: torch.device) -> tuple[GPT, MuonAdamW]:
    """A model with initial weights, and its optimizer after a step with random gradients."""
    recipe_flags = recipe.RecipeFlags(depth=flags.depth, head_dim=flags.head_dim, num_iterations=1)
    plan = recipe.derive(recipe_flags, flags.vocab_size)
    model = GPT.create(plan.model, device)
    optimizer = build_optimizer(model, plan.groups)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def copy_state(model: GPT, optimizer: MuonAdamW, state: TrainState) -> list[torch.Tensor]:
    """Copies of all tensors that a checkpoint holds, in host memory."""
    tensors = [parameter.detach() for parameter in model.parameters()]
    for values in optimizer.state.values():
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    tensors += state.data_state.values()
    return [tensor.to("cpu", copy=True) for tensor in tensors]


if __name__ == "__main__":
    main()
