"""
Memory: compare the peak that nanochat/costs.py predicts for training with the measured peak of a short base_train run.

    python -m scripts.bench memory
    python -m scripts.bench memory --activation-checkpointing
    python -m scripts.bench memory --depths 12,20 --head-dim 128 --max-seq-len 2048 --vocab-size 32768    # a GPU

Each run has its own process. `ratios`: predicted peak / measured peak, for each depth and dtype, and on GPUs with and
without torch.compile.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import costs, hardware, planner, primer, recipe
from nanochat.cli import COUNT, DEPTH, Range, command, flag
from nanochat.primer import generate_documents
from nanochat.tokenizer import Tokenizer
from scripts import base_train
from scripts.bench.harness import print_table, report, run_in_process

ACCUMULATION = 2  # so that a micro-batch also runs while the gradients of the first are in memory


@dataclass(frozen=True)
class Flags:
    depths: tuple[int, ...] = flag((4, 6, 8), "depths to measure, separated by commas", DEPTH)
    head_dim: int = flag(64, "channels per attention head", Range(16))
    max_seq_len: int = flag(512, "tokens of context", COUNT)
    vocab_size: int = flag(2048, "tokens", COUNT)
    device_batch_size: int = flag(16, "rows per forward pass", COUNT)
    device: str = flag("auto", "cuda | mps | cpu | auto")
    activation_checkpointing: bool = flag(False, "train with this flag of the training stages")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios by name of the run."""
    device = hardware.pick_device(flags.device)
    ratios, table = {}, {}
    for depth in flags.depths:
        for dtype in (torch.float32, torch.bfloat16):
            for compiled in (False, True) if device.type == "cuda" else (False,):  # CPUs: runs start without
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
    """Trains three steps; returns the measured and the predicted peak in bytes."""
    tokens_per_step = flags.device_batch_size * flags.max_seq_len * ACCUMULATION
    sizes = {
        "--depth": depth,
        "--head-dim": flags.head_dim,
        "--max-seq-len": flags.max_seq_len,
        "--device-batch-size": flags.device_batch_size,
        "--total-batch-size": tokens_per_step,
        "--num-iterations": 3,
        "--eval-every": -1,
        "--sample-every": -1,
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"NANOCHAT_BASE_DIR": folder, "NANOCHAT_DTYPE": planner.dtype_name(dtype)}
        primer.write_shards(Path(folder) / "primer")
        Tokenizer.train(generate_documents(), flags.vocab_size).save(Path(folder) / "tokenizer")
        argv = [str(word) for item in sizes.items() for word in item]
        argv += ["--data-dir", f"{folder}/primer", "--device", device.type, "--compile" if compiled else "--no-compile"]
        if flags.activation_checkpointing:
            argv.append("--activation-checkpointing")
        base_train.main(argv)
    shape = recipe.RecipeFlags(depth=depth, head_dim=flags.head_dim, max_seq_len=flags.max_seq_len)
    config = recipe.model_config(shape, flags.vocab_size)
    target = planner.local_target(device, 1, dtype)
    wanted = costs.TrainingSetup(
        flags.device_batch_size, compiled=compiled, activation_checkpointing=flags.activation_checkpointing
    )
    setup = planner.training_setup(config, target, tokens_per_step, wanted)
    return hardware.peak_memory(device), costs.training_memory(config, setup).peak


if __name__ == "__main__":
    main()
