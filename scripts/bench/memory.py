"""
Memory: what nanochat/costs.py predicts for training against the peak of a few steps on this machine.

    python -m scripts.bench memory
    python -m scripts.bench memory --depths 12,20 --head-dim 128 --max-seq-len 2048 --vocab-size 32768    # a GPU

Each measurement has its own process. `ratios`: predicted over measured peak, for each depth, dtype and kind of code.
"""

from dataclasses import dataclass

import torch

from nanochat import attention, costs, hardware, recipe
from nanochat.cli import command, flag
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.muon import build_optimizer
from scripts.bench.harness import print_table, report, run_in_process

ACCUMULATION = 2  # the second micro-batch has the gradients of the first one in memory


@dataclass(frozen=True)
class Flags:
    depths: str = flag("4,6,8", "depths to measure")
    head_dim: int = flag(64, "channels per attention head")
    max_seq_len: int = flag(512, "tokens of context")
    vocab_size: int = flag(2048, "tokens")
    device_batch_size: int = flag(16, "rows per forward pass")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    if not all(depth.isdigit() and int(depth) for depth in flags.depths.split(",")):
        raise UserError(f"--depths {flags.depths}: write numbers separated by commas, as in 4,6,8")
    device = hardware.pick_device(flags.device)
    ratios, table = {}, {}
    for depth in map(int, flags.depths.split(",")):
        for dtype in (torch.float32, torch.bfloat16):
            for compiled in (False, True):
                measured, predicted = run_in_process(measure, flags, depth, dtype, compiled, device)
                name = f"d{depth} {str(dtype).removeprefix('torch.')} {'compiled' if compiled else 'eager'}"
                ratios[name] = predicted / measured
                table[name] = {
                    "measured": f"{measured / costs.GIB:.2f} GiB",
                    "predicted": f"{predicted / costs.GIB:.2f} GiB",
                    "difference": f"{predicted / measured - 1:+.1%}",
                }
    print_table(f"peak memory of training on {hardware.describe(device)}", table)
    return report("memory", ratios)


def measure(flags: Flags, depth: int, dtype: torch.dtype, compiled: bool, device: torch.device) -> tuple[float, float]:
    """Trains two steps on random tokens; returns the measured and the predicted peak in bytes."""
    hardware.tune_process(device)
    shape = recipe.RecipeFlags(depth=depth, head_dim=flags.head_dim, max_seq_len=flags.max_seq_len)
    config = recipe.model_config(shape, flags.vocab_size)
    model = GPT.create(config, device, dtype)
    name, kernel = attention.choose("auto", config.attention_shape, device, dtype)
    model.use_attention(kernel)
    optimizer = build_optimizer(model, recipe.param_groups(config), compile=compiled)
    train_model = torch.compile(model, dynamic=False) if compiled else model
    tokens_BT = torch.randint(flags.vocab_size, (flags.device_batch_size, flags.max_seq_len), device=device)
    for _ in range(2):
        for _ in range(ACCUMULATION):
            train_model(tokens_BT, tokens_BT).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    setup = costs.TrainingSetup(
        rows=flags.device_batch_size, dtype=dtype, compiled=compiled, attention=name, device=device.type
    )
    return hardware.peak_memory(device), costs.training_memory(config, setup).peak


if __name__ == "__main__":
    main()
