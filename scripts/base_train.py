r"""
Pretrain a base model. One dial: --depth.

    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth 24    # one 8xH100 node
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth 24 --save-every 500 --resume
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth 48 --shard --activation-checkpointing
    python -m scripts.base_train --depth 4 --head-dim 64 --max-seq-len 512 --device-batch-size 16 \
        --total-batch-size 8192 --num-iterations 200 --eval-tokens 500000        # a laptop, minutes
"""

from dataclasses import asdict, dataclass, replace
from functools import partial

from nanochat import attention, distributed, fp8, hardware, mixture, planner, recipe
from nanochat.checkpoint_manager import Checkpoint, CheckpointReader
from nanochat.cli import COUNT, INTERVAL, NOT_NEGATIVE, SEED, command, flag
from nanochat.common import UserError, duration
from nanochat.costs import TrainingSetup, param_counts
from nanochat.dataloader import prefetch
from nanochat.distributed import Dist
from nanochat.engine import Engine, sample_prompts
from nanochat.eval.bpb import evaluate_bpb_of_sources
from nanochat.gpt import GPTConfig
from nanochat.logging import print_table
from nanochat.report.record import recorded
from nanochat.run import Run, RunFlags
from nanochat.tokenizer import PORTABLE_SPLIT_PATTERN, Tokenizer, default_dir
from nanochat.train import Hook, TrainState, token_loss


@dataclass(frozen=True)
class Flags(RunFlags, recipe.RecipeFlags):
    data_dir: str = flag("", "folder of shards, or mixture: climbmix=0.8,cosmopedia=0.2; default $NANOCHAT_DATA_DIR")
    eval_every: int = flag(250, "steps between validations; 0 = only at the end, -1 = never", INTERVAL)
    eval_tokens: int = flag(80 * 524288, "validation tokens over all GPUs; the default is 80 x 2^19", COUNT)
    sample_every: int = flag(500, "steps between samples; 0 = only at the end, -1 = never", INTERVAL)
    compile: bool = flag(True, "use torch.compile, if the machine can and the run is long enough to save time")
    attention: str = flag("auto", f"auto (the fastest) or a kernel of attention.py: {', '.join(attention.LOADERS)}")
    fp8: bool = flag(False, "train the large matrices in FP8 (GPUs from Ada and Hopper on); evaluation is not affected")
    shard: bool = flag(
        False, "keep a part of each parameter per rank, for models that do not fit into one GPU (docs/scaling.md)"
    )
    seed: int = flag(42, "seed of initial weights and samples", SEED)
    hours: float = flag(
        0.0, "choose the largest --depth that this machine (or that of --for) trains in this time", NOT_NEGATIVE
    )
    budget: float = flag(0.0, "choose the largest --depth that costs at most this many dollars; 0 = off", NOT_NEGATIVE)


@command  # main() reads the flags from the command line (nanochat/cli.py)
@recorded("base_train")
def main(flags: Flags) -> None:
    flags = choose_depth(flags)
    if flags.plan:
        print_plan(flags)
        return
    with distributed.init(flags.device) as dist:
        pretrain(flags, dist)


def pretrain(flags: Flags, dist: Dist) -> None:
    """Trains the model of the flags to the end of its run."""
    # Check: errors are found before anything expensive starts.
    tag = flags.model_tag or f"d{flags.depth}"
    tokenizer, flags = pick_tokenizer(tag, flags)
    sources = mixture.find_sources(flags.data_dir)
    if flags.portable and tokenizer.pattern != PORTABLE_SPLIT_PATTERN:
        distributed.warn0("the tokenizer is not portable: train one with tok_train --portable")
    plan = recipe.derive(flags, tokenizer.vocab_size)
    with Run.open("base", tag, plan.model, flags, tokenizer=tokenizer, dist=dist) as run:
        if run.resumed:
            mixture.check_resumable(sources, run.resumed.meta["data_states"])
        run.shards = flags.shard
        B = run.fit_rows(
            flags.device_batch_size, plan.total_batch_size, compile=flags.compile, fp8=flags.fp8, flops=plan.flops
        )
        T = flags.max_seq_len
        accumulation = recipe.accumulation_steps(plan.total_batch_size, B, T, dist.world_size)
        check_fp8(flags, plan.model, B * T, dist)

        # Build.
        if dist.is_main:
            print_table(f"How the recipe of {tag} was derived", recipe.explain(flags, plan))
        run.build(
            plan.groups,
            {"recipe": asdict(plan), "settings": asdict(plan.hyperparameters) | {"device_batch_size": B}},
            compile=flags.compile,
            attention=flags.attention,
            seed=flags.seed,
        )
        if flags.fp8:  # layers may still be replaced: torch.compile compiles in the first step
            fp8.use_fp8(run.model, run.optimizer, bool(run.compiled))
        loader = mixture.create_loader(
            tokenizer, sources, batch_size=B, sequence_len=T, dist=dist, states=run.data_states
        )
        steps = loader.steps(accumulation, plan.num_iterations, run.state.step)
        steps = prefetch(steps, dist.device, reading=loader.reading)
        run.open_log(plan.num_iterations)
        dist.print0(
            f"{tag}: {param_counts(plan.model)['total']:,} parameters, {plan.num_iterations} steps of "
            f"{plan.total_batch_size:,} tokens ({accumulation} x {B} x {T} x {dist.world_size} ranks), "
            f"{plan.flops:.2e} FLOPs; {hardware.describe(dist.device)}{', FP8' if flags.fp8 else ''}"
        )

        # Train.
        def evaluate(state: TrainState) -> dict[str, float]:
            shards = [(source.name, source.weight, source.val_shards) for source in sources]
            bpb = evaluate_bpb_of_sources(
                run.eval_model,
                tokenizer,
                shards,
                batch_size=B,
                num_tokens=flags.eval_tokens,
                dist=dist,
                num_streams=loader.num_streams,
            )
            return {f"val/{name}": value for name, value in bpb.items()}

        hooks = [Hook(flags.eval_every, evaluate), sample_hook(flags, run, tokenizer), run.save_hook()]
        run.train(steps, token_loss, partial(recipe.pretrain_schedule, flags, plan.num_iterations), hooks)
        run.finish(parameters=param_counts(plan.model)["total"], flops=plan.flops)


def sample_hook(flags: Flags, run: Run, tokenizer: Tokenizer) -> Hook:
    """A hook that logs samples every --sample-every steps; never with --shard."""

    def sample(state: TrainState) -> None:
        if run.dist.is_main:
            run.logger.log_samples(state, sample_prompts(Engine(run.model, tokenizer)))

    if flags.shard:
        run.dist.print0("no samples with --shard: an engine needs the whole model on one GPU")
        return Hook(-1, sample)
    return Hook(flags.sample_every, sample)


def check_fp8(flags: Flags, config: GPTConfig, num_tokens: int, dist: Dist) -> None:
    """UserError if --fp8 is given and cannot be used with these flags, this model or this GPU."""
    if not flags.fp8:
        return
    if flags.shard:
        raise UserError("--fp8 works on whole weights: leave out --fp8 or --shard")
    compiles = flags.compile and hardware.can_compile(dist.device)
    fp8.check_support(config, num_tokens, dist.device, compile=compiles)


def pick_tokenizer(tag: str, flags: Flags) -> tuple[Tokenizer, Flags]:
    """The default tokenizer and the flags. A run that is resumed keeps its tokenizer and its recipe."""
    reader = CheckpointReader("base", tag)
    if not flags.resume or not reader.steps():
        return Tokenizer.load(default_dir()), flags
    earlier = reader.load()
    return earlier.load_tokenizer(), keep_recipe(flags, earlier)


def keep_recipe(flags: Flags, earlier: Checkpoint) -> Flags:
    """The flags with which a run is resumed: one from before there was --recipe has that of nanochat."""
    if "recipe" in earlier.meta.get("flags", {}):
        return flags
    return replace(flags, recipe="nanochat")


# ---- the plan ----


def choose_depth(flags: Flags) -> Flags:
    """Returns the flags with the depth that --hours or --budget allows."""
    if flags.hours and flags.budget:
        raise UserError("--hours and --budget both choose the depth: give only one of them")
    if not flags.hours and not flags.budget:
        return flags
    target = planner.find_target(flags.for_, flags.device, flags.fp8)
    seconds = 3600 * flags.hours or target.seconds_for(flags.budget)
    depth = planner.depth_for(flags, planner.planned_vocab_size(), target, seconds, wanted_setup(flags))
    print(f"--depth {depth} is the largest that {target.name} trains in {duration(seconds)}")
    return replace(flags, depth=depth, hours=0.0, budget=0.0, for_=flags.for_ if flags.plan else "")


def wanted_setup(flags: Flags) -> TrainingSetup:
    """What the flags say about memory, for the planner."""
    return TrainingSetup(
        rows=flags.device_batch_size,
        compiled=flags.compile,
        fp8=flags.fp8,
        activation_checkpointing=flags.activation_checkpointing,
        sharded=flags.shard,
    )


def print_plan(flags: Flags) -> None:
    plan = recipe.derive(flags, planner.planned_vocab_size())
    target = planner.find_target(flags.for_, flags.device, flags.fp8)
    setup = planner.training_setup(plan.model, target, plan.total_batch_size, wanted_setup(flags))
    rows = planner.training_rows(plan.model, setup, target, num_steps=plan.num_iterations, flops=plan.flops)
    print_table(f"Plan of {flags.model_tag or f'd{flags.depth}'}", rows)
    planner.check_fits(plan.model, setup, target, flags)


if __name__ == "__main__":
    main()
