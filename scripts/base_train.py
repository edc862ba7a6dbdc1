r"""
Pretrain a base model. One dial: --depth.

    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth 24    # one 8xH100 node
    python -m scripts.base_train --depth 24 --resume                             # after a break
    python -m scripts.base_train --depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 16 \
        --total-batch-size 8192 --num-iterations 200 --eval-tokens 500000        # a laptop, minutes
"""

from dataclasses import asdict, dataclass
from itertools import islice

from nanochat import attention, dataset, distributed, fp8, hardware, recipe
from nanochat.cli import command, flag
from nanochat.common import human
from nanochat.dataloader import PretrainLoader, prefetch
from nanochat.dataset import RowGroups
from nanochat.engine import Engine, sample_prompts
from nanochat.eval.bpb import evaluate_bpb
from nanochat.gpt import param_counts
from nanochat.logging import check_wandb
from nanochat.muon import MuonAdamW
from nanochat.run import Settings, prepare
from nanochat.tokenizer import Tokenizer, default_dir
from nanochat.train import Hook, TrainState, token_loss


@dataclass(frozen=True)
class Flags:
    depth: int = flag(20, "transformer layers; width, batch, steps and learning rates follow (nanochat/recipe.py)")
    aspect_ratio: int = flag(64, "channels of width per layer")
    head_dim: int = flag(128, "channels per attention head")
    max_seq_len: int = flag(2048, "tokens of context")
    window_pattern: str = flag("SSSL", "windows of attention, tiled over the layers: S a quarter of the context, L all")
    num_iterations: int = flag(-1, "optimizer updates; -1 = from --target-flops or the ratio")
    target_flops: float = flag(-1.0, "training FLOPs to spend; -1 = from the ratio")
    target_param_data_ratio: float = flag(12.0, "tokens per parameter (matrices and lm_head)")
    device_batch_size: int = flag(32, "rows per forward pass and rank; lower it if out of memory")
    total_batch_size: int = flag(-1, "tokens per update over all ranks; -1 = from depth and horizon")
    embedding_lr: float = flag(0.3, "learning rate of the token embeddings, before batch and width factors")
    unembedding_lr: float = flag(0.008, "learning rate of lm_head, before batch and width factors")
    matrix_lr: float = flag(0.02, "learning rate of the matrices (Muon), before the batch factor")
    scalar_lr: float = flag(0.5, "learning rate of the residual scalars, before the batch factor")
    weight_decay: float = flag(0.28, "Muon's weight decay at the reference batch and horizon")
    warmup_steps: int = flag(40, "updates of linear learning-rate warm-up")
    warmdown_ratio: float = flag(0.65, "share of the run over which the learning rate falls")
    final_lr_frac: float = flag(0.05, "learning rate at the end, as a share of the full one")
    eval_every: int = flag(250, "updates between validations; 0 = only at the end, -1 = never")
    eval_tokens: int = flag(80 * 524288, "validation tokens; over all ranks")
    sample_every: int = flag(2000, "updates between samples; 0 = only at the end, -1 = never")
    save_every: int = flag(-1, "updates between checkpoints besides the last; -1 = none")
    keep_last: int = flag(-1, "checkpoints to keep; -1 = all")
    resume: bool = flag(False, "continue from the newest intact checkpoint of this tag, if there is one")
    model_tag: str = flag("", "name of the checkpoints; default d<depth>")
    data_dir: str = flag("", "folder of parquet shards; default $NANOCHAT_DATA_DIR, else the public shards")
    device: str = flag("auto", "cuda | mps | cpu | auto")
    compile: bool = flag(True, "torch.compile model and optimizer where the machine can")
    attention: str = flag(
        "auto", f"kernel: auto (the fastest that is found to work here) | {' | '.join(attention.LOADERS)}"
    )
    fp8: bool = flag(False, "train the large matrices in FP8; evaluation stays as it is (GPUs from Ada and Hopper on)")
    seed: int = flag(42, "of the initial weights")
    run: str = flag("", "wandb run name; empty = console and metrics file only")


@command
def main(flags: Flags) -> None:
    with distributed.init(flags.device) as dist:
        # check: whatever can be wrong is found before anything expensive
        check_wandb(flags.run)
        tokenizer = Tokenizer.load(default_dir())
        train_shards, val_shards = dataset.split_shards(dataset.resolve_data_dir(flags.data_dir))
        plan = plan_run(flags, tokenizer.vocab_size)
        B, T = flags.device_batch_size, flags.max_seq_len
        accumulation = recipe.accumulation_steps(plan.total_batch_size, B, T, dist.world_size)
        if flags.fp8:
            fp8.check(plan.model, B * T, dist.device)
        tag = flags.model_tag or f"d{flags.depth}"
        start = prepare("base", tag, plan.model, tokenizer, dist, flags.resume, flags.keep_last)

        # build
        rates = (flags.embedding_lr, flags.unembedding_lr, flags.matrix_lr, flags.scalar_lr)
        settings = Settings(B, plan.total_batch_size, *rates)
        config = {"flags": asdict(flags), "recipe": asdict(plan), "settings": asdict(settings)}
        run = start.build(
            settings.rates(), plan.batch_factor, config, plan.weight_decay, flags.compile,
            seed=flags.seed, fp8=flags.fp8, attention=flags.attention, flops=plan.flops,
        )  # fmt: skip
        loader = PretrainLoader(
            tokenizer, RowGroups(train_shards), batch_size=B, sequence_len=T, dist=dist, states=run.data_states
        )
        steps = prefetch(loader.steps(accumulation, plan.num_iterations, run.state.step), dist.device)
        logger = run.logger(flags.run, plan.num_iterations)
        dist.print0(
            f"{tag}: {human(param_counts(plan.model)['total'])} parameters, {plan.num_iterations} updates of "
            f"{plan.total_batch_size:,} tokens ({accumulation} x {B} x {T} x {dist.world_size} ranks), "
            f"{plan.flops:.2e} FLOPs; {hardware.describe(dist.device)}{', FP8' if flags.fp8 else ''}"
        )

        # run
        def evaluate(state: TrainState) -> dict[str, float]:
            val_loader = PretrainLoader(tokenizer, RowGroups(val_shards), batch_size=B, sequence_len=T, dist=dist)
            num_batches = max(1, flags.eval_tokens // (B * T * dist.world_size))
            bpb = evaluate_bpb(run.eval_model, islice(val_loader.batches(), num_batches), tokenizer.token_bytes(), dist)
            return {"val/bpb": bpb}

        def sample(state: TrainState) -> dict[str, float]:
            if dist.is_main:
                sample_prompts(Engine(run.model, tokenizer))
            return {}

        hooks = [Hook(flags.eval_every, evaluate), Hook(flags.sample_every, sample), run.save_hook(flags.save_every)]
        lr_options = (flags.warmup_steps, flags.warmdown_ratio, flags.final_lr_frac)

        def schedule(optimizer: MuonAdamW, step: int, progress: float) -> None:
            recipe.pretrain_schedule(optimizer, step, plan.num_iterations, *lr_options)

        state = run.train(steps, token_loss, schedule, hooks, logger)

        # report
        parameters = param_counts(plan.model)["total"]
        logger.finish(state, model=start.checkpoints.good, parameters=parameters, flops=plan.flops)


def plan_run(flags: Flags, vocab_size: int) -> recipe.Recipe:
    return recipe.derive(
        flags.depth,
        vocab_size,
        flags.aspect_ratio,
        flags.head_dim,
        flags.max_seq_len,
        flags.window_pattern,
        flags.target_param_data_ratio,
        flags.total_batch_size,
        flags.num_iterations,
        flags.target_flops,
        flags.weight_decay,
    )


if __name__ == "__main__":
    main()
