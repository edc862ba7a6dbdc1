"""
The stages that train on conversations: mid_train and chat_sft are this, with their own name, source and defaults.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat import checkpoint_manager, distributed, hardware
from nanochat.cli import flag
from nanochat.common import UserError, human
from nanochat.dataloader import ConversationLoader, prefetch
from nanochat.eval.bpb import evaluate_bpb
from nanochat.gpt import flops_per_token
from nanochat.logging import check_wandb
from nanochat.recipe import accumulation_steps, finetune_schedule
from nanochat.run import prepare, settings_of
from nanochat.tokenizer import Tokenizer, default_dir
from nanochat.train import Hook, TrainState, token_loss
from tasks.common import Task, TaskMixture, limited
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.quiz import PrimerChat
from tasks.smoltalk import SmolTalk
from tasks.spelling import SimpleSpelling, SpellingBee


@dataclass(frozen=True)
class Flags:
    base_tag: str = flag("", "name of the checkpoints to start from; default the one written last")
    base_step: int = flag(-1, "step of the checkpoint to start from; -1 = the newest")
    model_tag: str = flag("", "name of the checkpoints; default that of the ones it starts from")
    smoltalk_epochs: int = flag(1, "times through SmolTalk; 0 = without")
    mmlu_epochs: int = flag(3, "times through MMLU's auxiliary training questions; 0 = without")
    gsm8k_epochs: int = flag(4, "times through GSM8K's training problems; 0 = without")
    simplespelling_epochs: int = flag(1, "times through 200,000 words to spell; 0 = without")
    spellingbee_epochs: int = flag(1, "times through 80,000 words with letters to count; 0 = without")
    identity_epochs: int = flag(2, "times through the conversations about who the model is; 0 = without")
    identity_file: str = flag("", "JSONL of these, one array of messages a line; empty = those that come along")
    primer_epochs: int = flag(0, "times through the embedded corpus' conversations; 0 = without")
    num_iterations: int = flag(-1, "optimizer updates; -1 = once through the mixture")
    device_batch_size: int = flag(-1, "rows per forward pass and rank; -1 = as the run it starts from")
    total_batch_size: int = flag(-1, "tokens per update over all ranks; -1 = as the run it starts from")
    init_lr_frac: float = flag(0.8, "learning rates at the start, as a share of the base's")
    load_optimizer: bool = flag(True, "start from the optimizer's momentum, too")
    eval_every: int = flag(200, "updates between validations; 0 = only at the end, -1 = never")
    eval_examples: int = flag(1000, "held-out conversations to validate on")
    save_every: int = flag(-1, "updates between checkpoints besides the last; -1 = none")
    keep_last: int = flag(-1, "checkpoints to keep; -1 = all")
    resume: bool = flag(False, "continue from the newest intact checkpoint of this tag, if there is one")
    device: str = flag("auto", "cuda | mps | cpu | auto")
    compile: bool = flag(True, "torch.compile model and optimizer where the machine can")
    run: str = flag("", "wandb run name; empty = console and metrics file only")


def finetune(stage: str, source_stage: str, flags: Flags) -> None:
    """Runs a stage on a model of another one, both of checkpoint_manager.STAGES: checks, builds, trains and reports."""
    if flags.num_iterations < 1 and flags.num_iterations != -1:
        raise UserError(f"--num-iterations {flags.num_iterations}: must be at least 1, or -1 for one pass")
    with distributed.init(flags.device) as dist:
        # check
        check_wandb(flags.run)
        tokenizer = Tokenizer.load(default_dir())
        source = checkpoint_manager.find(source_stage, flags.base_tag, flags.base_step)
        tag = flags.model_tag or source.tag
        start = prepare(stage, tag, source, tokenizer, dist, flags.resume, flags.keep_last)
        begun_from = start.saved.meta["base"] if start.saved else str(source.path)
        given = {"device_batch_size": flags.device_batch_size, "total_batch_size": flags.total_batch_size}
        given = {name: value for name, value in given.items() if value != -1}
        settings = replace(settings_of(start.saved or source), **given)
        B, T = settings.device_batch_size, source.config.sequence_len
        accumulation = accumulation_steps(settings.total_batch_size, B, T, dist.world_size)
        train_data, val_data = mixture(flags, tokenizer)

        # build
        config = {"flags": asdict(flags), "base": begun_from, "settings": asdict(settings)}
        rates = settings.rates(flags.init_lr_frac)
        num_tokens = flags.num_iterations * settings.total_batch_size if flags.num_iterations > 0 else math.inf
        flops = num_tokens * flops_per_token(source.config)  # of one pass nobody knows before it is rendered
        run = start.build(rates, settings.batch_factor, config, 0.0, flags.compile, flags.load_optimizer, flops=flops)
        loader = ConversationLoader(
            tokenizer, train_data, batch_size=B, sequence_len=T, dist=dist, states=run.data_states
        )
        steps = prefetch(loader.steps(accumulation, flags.num_iterations), dist.device)
        logger = run.logger(flags.run, max(flags.num_iterations, 0))
        dist.print0(
            f"{tag} from {begun_from}: {human(len(train_data))} conversations, updates of "
            f"{settings.total_batch_size:,} tokens ({accumulation} x {B} x {T} x {dist.world_size} ranks); "
            f"{hardware.describe(dist.device)}, {start.dtype}"
        )

        # run
        def evaluate(state: TrainState) -> dict[str, float]:
            val_loader = ConversationLoader(tokenizer, val_data, batch_size=B, sequence_len=T, dist=dist)
            return {"val/bpb": evaluate_bpb(run.eval_model, val_loader.batches(), tokenizer.token_bytes(), dist)}

        hooks = [Hook(flags.eval_every, evaluate), run.save_hook(flags.save_every)]
        state = run.train(steps, token_loss, finetune_schedule, hooks, logger)

        # report
        numbers = {"conversations": len(train_data), "cut to a row": state.data_state.get("truncated", 0)}
        logger.finish(state, model=start.checkpoints.good, **numbers)


def identity(file: str) -> Task:
    return CustomJSON(file) if file else PrimerChat("train", kinds=("who", "greeting"))


def mixture(flags: Flags, tokenizer: Tokenizer) -> tuple[TaskMixture, Task]:
    """Conversations to train on and to validate on; the latter from splits that are in no reported score."""
    sources: list[tuple[int, Any, Any]] = [
        (flags.smoltalk_epochs, lambda: SmolTalk("train"), lambda: SmolTalk("test")),
        (flags.mmlu_epochs, lambda: MMLU("auxiliary_train"), lambda: MMLU("validation")),
        (flags.gsm8k_epochs, lambda: GSM8K("train"), None),
        (flags.simplespelling_epochs, lambda: SimpleSpelling("train", 200_000, tokenizer), None),
        (flags.spellingbee_epochs, lambda: SpellingBee("train", 80_000, tokenizer), None),
        (flags.identity_epochs, lambda: identity(flags.identity_file), None),
        (flags.primer_epochs, lambda: PrimerChat("train"), lambda: PrimerChat("val")),
    ]
    train_tasks: list[Task] = []
    val_tasks: list[Task] = []
    for epochs, training, validation in sources:
        if epochs > 0:
            train_tasks += [training()] * epochs
            val_tasks += [validation()] if validation else []
    if not train_tasks:
        raise UserError("nothing to train on: give at least one source an epoch, such as --smoltalk-epochs 1")
    if not val_tasks:
        print("validation: these sources have nothing held out, so it is on conversations that are trained on")
    val = TaskMixture(val_tasks or train_tasks[:1])
    return TaskMixture(train_tasks), limited(val, flags.eval_examples)
