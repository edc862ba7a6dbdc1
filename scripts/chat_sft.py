"""
Fine-tune a base model on conversations.

    python -m scripts.chat_sft                                                        # the usual mixture
    python -m scripts.chat_sft --smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0 --primer-epochs 2   # the primer's
    python -m scripts.chat_sft --identity-file mine.jsonl                             # with conversations of your own
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from nanochat import checkpoint_manager, distributed, hardware
from nanochat.checkpoint_manager import Checkpoint, CheckpointDir
from nanochat.common import UserError, human, seed_everything
from nanochat.dataloader import conversation_steps, on_device, prefetch
from nanochat.flags import command, flag
from nanochat.gpt import flops_per_token
from nanochat.loss_eval import evaluate_bpb
from nanochat.muon import LearningRates, build_optimizer
from nanochat.recipe import REFERENCE_BATCH, accumulation_steps, finetune_schedule
from nanochat.report import Logger, check_wandb
from nanochat.tokenizer import Tokenizer, default_dir
from nanochat.train import Hook, TrainState, token_loss, train
from tasks.common import Task, TaskMixture, limited
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.quiz import PrimerChat
from tasks.smoltalk import SmolTalk

INHERITED = -1  # the value of a flag that comes from the base model's run


@dataclass(frozen=True)
class Flags:
    source: str = flag("base", "stage to start from", short="-i", choices=("base", "mid"))
    base_tag: str = flag("", "name of the base checkpoints; default the one written last")
    base_step: int = flag(-1, "step of the base checkpoint; -1 = the newest")
    model_tag: str = flag("", "name of the checkpoints; default that of the base")
    smoltalk_epochs: int = flag(1, "times through SmolTalk; 0 = without")
    mmlu_epochs: int = flag(3, "times through MMLU's auxiliary training questions; 0 = without")
    gsm8k_epochs: int = flag(4, "times through GSM8K's training problems; 0 = without")
    identity_epochs: int = flag(2, "times through the conversations about who the model is; 0 = without")
    identity_file: str = flag("", "JSONL of these, one array of messages a line; empty = those that come along")
    primer_epochs: int = flag(0, "times through the embedded corpus' conversations; 0 = without")
    num_iterations: int = flag(-1, "optimizer updates; -1 = once through the mixture")
    device_batch_size: int = flag(INHERITED, "rows per forward pass and rank; -1 = as the base")
    total_batch_size: int = flag(INHERITED, "tokens per update over all ranks; -1 = as the base")
    init_lr_frac: float = flag(0.8, "learning rates at the start, as a share of the base's")
    load_optimizer: bool = flag(True, "start from the base's optimizer momentum")
    eval_every: int = flag(200, "updates between validations; 0 = only at the end, -1 = never")
    eval_examples: int = flag(1000, "held-out conversations to validate on")
    save_every: int = flag(-1, "updates between checkpoints besides the last; -1 = none")
    keep_last: int = flag(-1, "checkpoints to keep; -1 = all")
    resume: bool = flag(False, "continue from the newest intact checkpoint of this tag, if there is one")
    device: str = flag("auto", "cuda | mps | cpu | auto")
    compile: bool = flag(True, "torch.compile model and optimizer where the machine can")
    run: str = flag("", "wandb run name; empty = console and metrics file only")


@command
def main(flags: Flags) -> None:
    if flags.num_iterations < 1 and flags.num_iterations != -1:
        raise UserError(f"--num-iterations {flags.num_iterations}: must be at least 1, or -1 for one pass")
    with distributed.init(flags.device) as dist:
        # check
        device, dtype = dist.device, hardware.pick_dtype(dist.device)
        check_wandb(flags.run)
        tokenizer = Tokenizer.load(default_dir())
        base = checkpoint_manager.find(flags.source, flags.base_tag, flags.base_step)
        base.check_tokenizer(tokenizer)
        T = base.config.sequence_len
        B, total_batch_size, rates = inherit(flags, base)
        accumulation = accumulation_steps(total_batch_size, B, T, dist.world_size)
        tag = flags.model_tag or base.tag
        checkpoints = CheckpointDir("sft", tag, dist, flags.keep_last)
        saved = checkpoints.load_newest() if flags.resume else None
        if saved:
            saved.check_resumable(tokenizer, base.config, dtype)
        train_data, val_data = mixture(flags)

        # build
        precision = hardware.tune_process(device, saved.meta["matmul_precision"] if saved else "")
        precision = hardware.tune_process(device, dist.gather(precision)[0])  # all ranks as the first
        seed_everything(42)
        model = (saved or base).build_model(device, dtype)
        compiling = flags.compile and hardware.can_compile(device)
        batch_factor = (total_batch_size / REFERENCE_BATCH) ** 0.5
        optimizer = build_optimizer(model, rates, batch_factor, 0.0, dist.rank, dist.world_size, compiling)
        if flags.load_optimizer and not saved and not base.restore_optimizer(optimizer):
            dist.print0(f"{base.path} has no optimizer state: momentum starts from zero")
        state, data_states = saved.restore_run(optimizer, dist) if saved else (TrainState(), [])
        shape = (tokenizer, B, T, accumulation, dist.rank, dist.world_size)
        data_steps = conversation_steps(train_data, *shape, flags.num_iterations, (data_states or [None])[0])
        steps = prefetch(on_device(data_steps, device))
        fast_model = torch.compile(model, dynamic=False) if compiling else model
        eval_model = fast_model if device.type == "cuda" else model  # on a CPU compiling costs more than a validation
        config = {"flags": asdict(flags), "base": str(base.path), "total_batch_size": total_batch_size}
        config |= {"tokenizer": tokenizer.fingerprint, "matmul_precision": precision, "dtype": str(dtype)}
        num_steps = max(flags.num_iterations, 0)
        logger = Logger(
            "chat_sft", tag, config, dist, flags.run, num_steps, flops_per_token(model.config), first_step=state.step
        )
        dist.print0(
            f"{tag} from {base.path}: {human(len(train_data))} conversations, updates of {total_batch_size:,} tokens "
            f"({accumulation} x {B} x {T} x {dist.world_size} ranks); {hardware.describe(device)}, {dtype}"
        )

        # run
        def evaluate(state: TrainState) -> dict[str, float]:
            val_steps = conversation_steps(val_data, tokenizer, B, T, 1, dist.rank, dist.world_size)
            batches = ((x, y) for step in val_steps for x, y, _ in step.micro_batches)
            return {"val/bpb": evaluate_bpb(eval_model, batches, tokenizer.token_bytes(), dist)}

        hooks = [
            Hook(flags.eval_every, evaluate),
            checkpoints.save_hook(flags.save_every, model, optimizer, config),
        ]
        with checkpoints:
            state = train(
                fast_model, optimizer, steps, token_loss, finetune_schedule, hooks, logger.log, state, dist,
                scale_loss=dtype == torch.float16, last_checkpoint=lambda: checkpoints.good,
            )  # fmt: skip

        # report
        numbers = {"conversations": len(train_data), "cut to a row": state.data_state.get("truncated", 0)}
        logger.finish(state, model=checkpoints.good, **numbers)


def inherit(flags: Flags, base: Checkpoint) -> tuple[int, int, LearningRates]:
    """Rows per pass, tokens per update and learning rates: the base run's own unless flags say otherwise."""
    theirs: dict[str, Any] = base.meta.get("flags") or base.meta.get("user_config") or {}
    B = theirs.get("device_batch_size", 32) if flags.device_batch_size == INHERITED else flags.device_batch_size
    total = base.meta.get("recipe", {}).get("total_batch_size") or base.meta.get("total_batch_size") or REFERENCE_BATCH
    total = total if flags.total_batch_size == INHERITED else flags.total_batch_size
    rates = LearningRates()
    embedding = theirs.get("embedding_lr", rates.embedding)
    return B, total, LearningRates(
        flags.init_lr_frac * theirs.get("unembedding_lr", rates.unembedding),
        flags.init_lr_frac * embedding,
        flags.init_lr_frac * embedding / 2,
        flags.init_lr_frac * theirs.get("matrix_lr", rates.matrix),
        flags.init_lr_frac * theirs.get("scalar_lr", rates.scalar),
    )  # fmt: skip


def identity(file: str) -> Task:
    return CustomJSON(file) if file else PrimerChat("train", kinds=("who", "greeting"))


def mixture(flags: Flags) -> tuple[TaskMixture, TaskMixture]:
    """Conversations to train on and to validate on; the latter from splits that are in no reported score."""
    sources: list[tuple[int, Any, Any]] = [
        (flags.smoltalk_epochs, lambda: SmolTalk("train"), lambda: SmolTalk("test")),
        (flags.mmlu_epochs, lambda: MMLU("auxiliary_train"), lambda: MMLU("validation")),
        (flags.gsm8k_epochs, lambda: GSM8K("train"), None),
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


if __name__ == "__main__":
    main()
