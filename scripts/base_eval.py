"""
Evaluate a base model: bits per byte on both splits, and samples.

    python -m scripts.base_eval                      # the checkpoint written last
    python -m scripts.base_eval -g d12 --eval bpb
"""

from dataclasses import dataclass
from itertools import islice

from nanochat import checkpoint_manager, dataset, distributed, hardware
from nanochat.common import UserError
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import RowGroups
from nanochat.engine import Engine, Request, sample_prompts
from nanochat.flags import command, flag
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import save_numbers
from nanochat.stage import settings_of
from nanochat.tokenizer import Tokenizer, default_dir

EVALUATIONS = ("bpb", "sample")


@dataclass(frozen=True)
class Flags:
    eval: str = flag(",".join(EVALUATIONS), "what to do, with commas between: bpb = bits per byte, sample = samples")
    source: str = flag("base", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", short="-s")
    device_batch_size: int = flag(-1, "rows per forward pass and rank; -1 = as in training")
    split_tokens: int = flag(40 * 524288, "tokens per split for bits per byte, over all ranks")
    data_dir: str = flag("", "folder of parquet shards; default $NANOCHAT_DATA_DIR, else the public shards")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    wanted = flags.eval.split(",")
    if unknown := set(wanted) - set(EVALUATIONS):
        raise UserError(f"--eval {unknown.pop()}: there are {', '.join(EVALUATIONS)}")
    if flags.device_batch_size < 1 and flags.device_batch_size != -1:
        raise UserError(f"--device-batch-size {flags.device_batch_size}: must be at least 1, or -1")
    with distributed.init(flags.device) as dist:
        tokenizer = Tokenizer.load(default_dir())
        dtype = hardware.pick_dtype(dist.device)
        shards = dataset.split_shards(dataset.resolve_data_dir(flags.data_dir)) if "bpb" in wanted else ([], [])
        model, checkpoint = checkpoint_manager.load_model(
            flags.source, flags.model_tag, flags.step, tokenizer, dist.device, dtype
        )
        hardware.tune_process(dist.device)
        dist.print0(f"{checkpoint.path}, {hardware.describe(dist.device)}, {dtype}")
        B, T = flags.device_batch_size, model.config.sequence_len
        if B == -1:
            B = settings_of(checkpoint).device_batch_size
        num_batches = max(1, flags.split_tokens // (B * T * dist.world_size))
        numbers = {}
        for split, files in zip(("train", "val"), shards, strict=True):
            if files:
                batches = PretrainLoader(tokenizer, RowGroups(files), B, T, dist.rank, dist.world_size).batches()
                numbers[f"{split} bpb"] = evaluate_bpb(
                    model, islice(batches, num_batches), tokenizer.token_bytes(), dist
                )
                dist.print0(f"{split} bits per byte: {numbers[f'{split} bpb']:.4f}")
        if "sample" in wanted and dist.is_main:
            engine = Engine(model, tokenizer)
            sample_prompts(engine)
            print("Without a prompt, at temperature 1:")
            for completion in engine.generate([Request([tokenizer.bos], 128, seed=seed) for seed in range(4)]):
                print(f"  {tokenizer.decode(completion.tokens)!r}")
        if dist.is_main:
            save_numbers("base_eval", {"model": str(checkpoint.path)} | numbers)
    return numbers


if __name__ == "__main__":
    main()
