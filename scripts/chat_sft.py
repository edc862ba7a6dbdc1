r"""
Fine-tune a base model on conversations (SFT).

    python -m scripts.chat_sft                                                        # the usual mixture
    python -m scripts.chat_sft --smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 \
        --simplespelling-epochs 0 --spellingbee-epochs 0 --primer-epochs 2            # the primer's conversations only
    python -m scripts.chat_sft --identity-file mine.jsonl                             # from scripts.make_identity
    python -m scripts.chat_sft -i mid                                                 # from a model of mid_train
    python -m scripts.chat_sft -i sft --model-tag better                              # further from a chat model
    python -m scripts.chat_sft --lora-rank 16                                         # LoRA, for a small GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft

Batch sizes, learning rates and the optimizer's state are taken from the run that trained the source model.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from nanochat import checkpoint_manager, distributed, hardware, lora, planner, recipe
from nanochat.checkpoint_manager import Checkpoint
from nanochat.cli import (
    COUNT,
    COUNT_OR_AUTO,
    COUNT_OR_DEFAULT,
    INTERVAL,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    STEP,
    command,
    flag,
)
from nanochat.common import UserError, human
from nanochat.conversation import render_for_completion
from nanochat.costs import TrainingSetup, flops_per_token
from nanochat.dataloader import ConversationLoader, prefetch
from nanochat.distributed import Dist
from nanochat.engine import Engine, sample_greedily
from nanochat.eval.bpb import evaluate_bpb
from nanochat.logging import print_table
from nanochat.primer import CONVERSATION_MIX
from nanochat.report.record import recorded
from nanochat.run import Run, RunFlags
from nanochat.tokenizer import Tokenizer
from nanochat.train import Hook, TrainState, token_loss
from tasks.common import SEED as TASK_SEED
from tasks.common import Task, TaskMixture, limited
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.quiz import PrimerChat
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee

SAMPLE_QUESTIONS = ("What is the capital of France?", "What is 47 + 85?", "Who are you?")

IDENTITY_KINDS = ("identity", "greeting")  # the primer's conversations about who the model is


@dataclass(frozen=True)
class FinetuneFlags(RunFlags):
    """The flags of the stages that train on conversations: this one and scripts/mid_train.py."""

    base_tag: str = flag("", "tag of the checkpoint to start from; default: the one written last")
    base_step: int = flag(-1, "step of the checkpoint to start from; -1 = the newest", STEP)
    smoltalk_epochs: int = flag(1, "times through SmolTalk; 0 = without", NOT_NEGATIVE)
    mmlu_epochs: int = flag(3, "times through MMLU's auxiliary training questions; 0 = without", NOT_NEGATIVE)
    gsm8k_epochs: int = flag(4, "times through GSM8K's training problems; 0 = without", NOT_NEGATIVE)
    simplespelling_epochs: int = flag(1, "times through 200,000 words to spell; 0 = without", NOT_NEGATIVE)
    spellingbee_epochs: int = flag(1, "times through 80,000 words with letters to count; 0 = without", NOT_NEGATIVE)
    identity_epochs: int = flag(2, "times through the conversations about who the model is; 0 = without", NOT_NEGATIVE)
    identity_file: str = flag("", "JSONL file of them instead of the built-in ones, an array of messages per line")
    primer_epochs: int = flag(0, "times through the conversations of the embedded corpus; 0 = without", NOT_NEGATIVE)
    num_iterations: int = flag(-1, "optimizer steps; -1 = once through the mixture", COUNT_OR_DEFAULT)
    device_batch_size: int = flag(-1, "sequences per GPU and pass; auto = as in the source's run", COUNT_OR_AUTO)
    total_batch_size: int = flag(
        -1, "tokens per optimizer step over all GPUs; -1 = as in the source's run", COUNT_OR_DEFAULT
    )
    init_lr_frac: float = flag(0.8, "initial learning rates, as a share of pretraining's", POSITIVE)
    lora_rank: int = flag(
        0, "train adapters of this rank instead of the model, for small GPUs (lora.py); 0 = the model", NOT_NEGATIVE
    )
    lora_lr: float = flag(0.01, "with --lora-rank: initial learning rate of the adapters, at batch 2^19", POSITIVE)
    seed: int = flag(TASK_SEED, "seed of the order of the conversations, and of the adapters of --lora-rank", SEED)
    load_optimizer: bool = flag(True, "start with the optimizer's state from the end of the source's run")
    eval_every: int = flag(200, "steps between validations; 0 = only at the end, -1 = never", INTERVAL)
    eval_examples: int = flag(1000, "held-out conversations to validate on", COUNT)
    sample_every: int = flag(200, "steps between samples; 0 = only at the end, -1 = never", INTERVAL)
    compile: bool = flag(True, "use torch.compile, if the machine can and the run is long enough to save time")


@dataclass(frozen=True)
class Flags(FinetuneFlags):
    source: str = flag("base", "stage to start from", short="-i", choices=("base", "mid", "sft"))


@command
@recorded("chat_sft")
def main(flags: Flags) -> None:
    finetune("sft", flags.source, flags)


def finetune(stage: str, source_stage: str, flags: FinetuneFlags) -> None:
    """Trains a model of source_stage on conversations; both are stages of checkpoint_manager.STAGES."""
    if flags.plan:
        print_plan(flags, checkpoint_manager.find(source_stage, flags.base_tag, flags.base_step))
        return
    with distributed.init(flags.device) as dist:
        finetune_on(dist, stage, source_stage, flags)


def finetune_on(dist: Dist, stage: str, source_stage: str, flags: FinetuneFlags) -> None:
    # Check.
    source = checkpoint_manager.find(source_stage, flags.base_tag, flags.base_step)
    tokenizer = source.load_tokenizer()
    tag = flags.model_tag or source.tag
    if source_stage == stage and tag == source.tag:
        raise UserError(f"the run would overwrite {source.path}, which it starts from: give another --model-tag")
    with Run.open(stage, tag, source, flags, tokenizer=tokenizer, dist=dist) as run:
        run.use_lora(flags.lora_rank)
        inherited = inherited_hyperparameters(flags, run.resumed or source)
        B = run.fit_rows(flags.device_batch_size, inherited.total_batch_size, compile=flags.compile)
        T = source.config.sequence_len
        accumulation = recipe.accumulation_steps(inherited.total_batch_size, B, T, dist.world_size)
        train_data, val_data = mixture(flags, tokenizer)

        # Build.
        groups = recipe.param_groups(source.config, inherited, weight_decay=0.0, lr_frac=flags.init_lr_frac)
        if flags.lora_rank:
            groups = recipe.lora_groups(inherited, flags.lora_lr)
        settings = asdict(inherited) | {"device_batch_size": B}
        metadata = {"base": run.parent_checkpoint, "settings": settings}
        run.build(groups, metadata, compile=flags.compile, seed=flags.seed)
        if flags.load_optimizer:
            run.inherit_momentum()
        loader = ConversationLoader(
            tokenizer, train_data, batch_size=B, sequence_len=T, dist=dist, states=run.data_states
        )
        steps = prefetch(loader.steps(accumulation, flags.num_iterations), dist.device, reading=loader.reading)
        run.open_log(max(flags.num_iterations, 0))
        if dist.is_main:
            rows = recipe.explain_groups(groups, inherited, source.config.n_embd, flags.init_lr_frac)
            print_table(f"Learning rates of {tag}", rows)
        dist.print0(
            f"{tag} from {run.parent_checkpoint}: {human(len(train_data))} conversations, steps of "
            f"{inherited.total_batch_size:,} tokens ({accumulation} x {B} x {T} x {dist.world_size} ranks); "
            f"{hardware.describe(dist.device)}"
        )

        # Train.
        def evaluate(state: TrainState) -> dict[str, float]:
            val_loader = ConversationLoader(tokenizer, val_data, batch_size=B, sequence_len=T, dist=dist)
            return {"val/bpb": evaluate_bpb(run.eval_model, val_loader.batches(), tokenizer.token_bytes(), dist)}

        def sample(state: TrainState) -> None:
            if dist.is_main:
                run.logger.log_samples(state, sample_questions(Engine(run.model, tokenizer)))

        hooks = [Hook(flags.eval_every, evaluate), Hook(flags.sample_every, sample), run.save_hook()]
        state = run.train(steps, token_loss, recipe.finetune_schedule, hooks)
        truncated = state.data_state.get("truncated", 0)
        run.finish(**{"conversations": len(train_data), "conversations truncated to a row": truncated})


def sample_questions(engine: Engine, max_tokens: int = 48) -> list[dict[str, str]]:
    """Asks a few questions: a quick look at what a chat model has learned. Returns what sample_greedily does."""
    prompts = {}
    for text in SAMPLE_QUESTIONS:
        prompts[text] = render_for_completion({"messages": [{"role": "user", "content": text}]}, engine.tokenizer)
    return sample_greedily(engine, prompts, max_tokens)


def print_plan(flags: FinetuneFlags, source: Checkpoint) -> None:
    """Prints what the run needs. How many steps one pass takes is known only after all conversations are read."""
    target = planner.find_target(flags.for_, flags.device)
    hyperparameters = inherited_hyperparameters(flags, source)
    rows = flags.device_batch_size if flags.device_batch_size != -1 else hyperparameters.device_batch_size
    if flags.lora_rank:
        lora.check_rank(flags.lora_rank, source.config)
    wanted = TrainingSetup(
        rows,
        compiled=flags.compile,
        activation_checkpointing=flags.activation_checkpointing,
        lora_rank=flags.lora_rank,
    )
    setup = planner.training_setup(source.config, target, hyperparameters.total_batch_size, wanted)
    num_steps = max(flags.num_iterations, 1)
    flops = float(num_steps * hyperparameters.total_batch_size) * flops_per_token(source.config)
    table = planner.training_rows(source.config, setup, target, num_steps=num_steps, flops=flops)
    print_table(f"Plan of {flags.model_tag or source.tag} from {source.path}", table)
    planner.check_fits(source.config, setup, target)
    if flags.num_iterations == -1:
        print("time and cost are those of one optimizer step; give --num-iterations for those of a whole run")


def inherited_hyperparameters(flags: FinetuneFlags, checkpoint: Checkpoint) -> recipe.Hyperparameters:
    """The hyperparameters of the run that saved the checkpoint; flags override batch sizes."""
    names = ("device_batch_size", "total_batch_size")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) != -1}
    return replace(recipe.load_hyperparameters(checkpoint.meta), **given)


def mixture(flags: FinetuneFlags, tokenizer: Tokenizer) -> tuple[TaskMixture, Task]:
    """
    Conversations to train on and to validate on. Validation uses no questions of the test splits, which chat_eval
    reports. A mixture without held-out conversations is validated on training conversations.
    """
    kinds: list[str] = []  # of the primer's conversations; empty = all
    if flags.identity_file and flags.identity_epochs > 0:  # leave out those that give the model another name
        kinds = [kind for kind in CONVERSATION_MIX if kind not in IDENTITY_KINDS]
    # (epochs, function for the training split, function for the held-out split or None). The functions are called only
    # if epochs is above 0, because they download data.
    sources: list[tuple[int, Callable[[], Task], Callable[[], Task] | None]] = [
        (flags.smoltalk_epochs, lambda: SmolTalk("train"), lambda: SmolTalk("test")),
        (flags.mmlu_epochs, lambda: MMLU("auxiliary_train"), lambda: MMLU("validation")),
        (flags.gsm8k_epochs, lambda: GSM8K("train"), None),
        (flags.simplespelling_epochs, lambda: SimpleSpelling("train", 200_000, tokenizer), None),
        (flags.spellingbee_epochs, lambda: SpellingBee("train", 80_000, tokenizer), None),
        (flags.identity_epochs, lambda: identity(flags.identity_file), None),
        (flags.primer_epochs, lambda: PrimerChat("train", kinds), lambda: PrimerChat("val", kinds)),
    ]
    train_tasks: list[Task] = []
    val_tasks: list[Task] = []
    for epochs, training, validation in sources:
        if epochs > 0:
            train_tasks += [training()] * epochs
            if validation:
                val_tasks.append(validation())
    if not train_tasks:
        raise UserError("nothing to train on: give at least one source an epoch, such as --smoltalk-epochs 1")
    if not val_tasks:
        print("validation: these sources have no held-out split, so validation uses training conversations")
        val_tasks = train_tasks[:1]
    return TaskMixture(train_tasks, flags.seed), limited(TaskMixture(val_tasks), flags.eval_examples)


def identity(file: str) -> Task:
    return CustomJSON(file) if file else PrimerChat("train", kinds=IDENTITY_KINDS)


if __name__ == "__main__":
    main()
