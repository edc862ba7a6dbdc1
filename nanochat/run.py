"""
What every training stage does around the loop of train.py: check, build, run.

    with distributed.init(flags.device) as dist:
        start = prepare("sft", tag, source, tokenizer, dist, flags.resume)       # checks only
        run = start.build(settings.rates(0.8), settings.batch_factor, config)    # model, optimizer, where it stands
        logger = run.logger(flags.run)
        hooks = [Hook(flags.eval_every, evaluate), run.save_hook(flags.save_every)]
        state = run.train(steps, token_loss, finetune_schedule, hooks, logger)
        logger.finish(state, model=start.checkpoints.good)

`source` is what a new run starts from: a configuration, which means random weights, or a checkpoint of another stage.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from nanochat import hardware
from nanochat.attention import choose
from nanochat.checkpoint_manager import STAGES, Checkpoint, CheckpointDir
from nanochat.common import seed_everything
from nanochat.distributed import Dist
from nanochat.fp8 import use_fp8
from nanochat.gpt import GPT, GPTConfig, flops_per_token
from nanochat.logging import Logger
from nanochat.muon import LearningRates, MuonAdamW, build_optimizer
from nanochat.recipe import REFERENCE_BATCH
from nanochat.tokenizer import Tokenizer
from nanochat.train import Hook, Step, TrainState, train


@dataclass(frozen=True)
class Settings:
    """What a run hands on to the stages after it; its checkpoints say it under "settings"."""

    device_batch_size: int = 32  # rows per forward pass and rank
    total_batch_size: int = REFERENCE_BATCH  # tokens per update over all ranks
    embedding_lr: float = 0.3  # these four as pretraining had them, before batch and width factors
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5

    @property
    def batch_factor(self) -> float:
        """On the learning rates: nanochat/recipe.py, 4."""
        return math.sqrt(self.total_batch_size / REFERENCE_BATCH)

    def rates(self, share: float = 1.0) -> LearningRates:
        """The learning rates of a stage that takes this share of pretraining's."""
        embedding = share * self.embedding_lr
        value_embedding = embedding / 2  # as in the defaults; they are embeddings too
        unembedding, matrix, scalar = share * self.unembedding_lr, share * self.matrix_lr, share * self.scalar_lr
        smear_backout = share * LearningRates.smear_backout  # no flag of pretraining's sets it
        return LearningRates(unembedding, embedding, value_embedding, matrix, scalar, smear_backout)


def settings_of(checkpoint: Checkpoint) -> Settings:
    """The settings of the run that a checkpoint is from; the defaults for what an older one does not say."""
    meta = checkpoint.meta
    known: dict[str, Any] = {}
    for place in (meta.get("user_config"), meta.get("flags"), meta, meta.get("recipe"), meta.get("settings")):
        known |= {name: value for name, value in (place or {}).items() if value not in (None, -1)}  # -1: left open
    return Settings(**{f.name: known[f.name] for f in fields(Settings) if f.name in known})


def changed_flags(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, for a run that goes on: what may well be meant, but should not go unnoticed."""
    changes = [f"{k} {before[k]} → {now[k]}" for k in before if k in now and k != "resume" and before[k] != now[k]]
    return f"going on with other flags: {', '.join(changes)}" if changes else "going on with the same flags"


@dataclass(frozen=True)
class Start:
    """A run of a stage, checked and not yet built."""

    stage: str  # of checkpoint_manager.STAGES
    source: GPTConfig | Checkpoint
    tokenizer: Tokenizer
    dist: Dist
    dtype: torch.dtype  # of the computation
    checkpoints: CheckpointDir
    saved: Checkpoint | None  # what a resumed run goes on from

    def build(
        self,
        rates: LearningRates,
        batch_factor: float,
        config: dict[str, Any],  # for checkpoints and log: flags, settings, and what else the stage has to say
        weight_decay: float = 0.0,
        compile: bool = True,  # model and optimizer, where the machine can
        load_momentum: bool = False,  # of the source's optimizer; else it starts from zero
        seed: int = 42,  # of initial weights and sampling
        attention: str = "auto",  # kernel for whole sequences: the fastest that works here, or one of attention.LOADERS
        fp8: bool = False,  # matrix products of training in FP8, where fp8.check has found that this can be
        flops: float = math.inf,  # of the whole run, over all ranks: a short one is not worth compiling for
    ) -> "Run":
        """The new run, or the resumed one as it was left. Collective; tunes the process and seeds its generators."""
        self.checkpoints.lock()
        dist, device, origin = self.dist, self.dist.device, self.saved or self.source
        precision = hardware.tune_process(device, self.saved.meta["matmul_precision"] if self.saved else "")
        precision = hardware.tune_process(device, dist.gather(precision)[0])  # all ranks as the first
        seed_everything(seed)
        if isinstance(origin, Checkpoint):
            model = origin.build_model(device, self.dtype)
        else:
            model = GPT.create(origin, device, self.dtype)
        kernel_name, kernel = choose(attention, model.config.attention_shape, device, self.dtype, dist.print0)
        model.use_attention(kernel)
        compiling = compile and hardware.can_compile(device) and self._compiling_pays(model.config, flops)
        if compiling:
            hardware.ready_compiler(device)
        dist.print0(f"computing in {self.dtype}, attention {kernel_name}, {'' if compiling else 'not '}compiled")
        optimizer = build_optimizer(model, rates, batch_factor, weight_decay, dist.rank, dist.world_size, compiling)
        state, data_states = TrainState(), list[dict[str, Any]]()
        if self.saved:
            dist.print0(changed_flags(self.saved.meta.get("flags", {}), config["flags"]))
            state, data_states = self.saved.restore_run(optimizer, dist)
        elif load_momentum and isinstance(origin, Checkpoint) and not origin.restore_optimizer(optimizer):
            dist.print0(f"{origin.path} has no optimizer state: momentum starts from zero")
        if fp8:
            use_fp8(model, optimizer, compiling)
        config = config | {"tokenizer": self.tokenizer.fingerprint}
        config |= {"matmul_precision": precision, "dtype": str(self.dtype), "compiled": compiling}
        return Run(self, model, optimizer, compiling, state, data_states, config)

    def _compiling_pays(self, config: GPTConfig, flops: float) -> bool:
        """The same on all ranks, and after a break as before it."""
        if self.saved:
            return self.saved.meta.get("compiled", True)
        pays = hardware.compiling_pays(self.dist.device, self.dtype, flops / self.dist.world_size, config.n_layer)
        return self.dist.gather(pays)[0]


def prepare(
    stage: str,
    tag: str,
    source: GPTConfig | Checkpoint,
    tokenizer: Tokenizer,
    dist: Dist,
    resume: bool = False,
    keep_last: int = -1,  # checkpoints; -1 = all
) -> Start:
    """UserError unless a run of this stage can begin, or with `resume` go on, with this tokenizer and model."""
    if isinstance(source, Checkpoint):
        source.check_tokenizer(tokenizer)
    checkpoints = CheckpointDir(stage, tag, dist, keep_last)
    saved = checkpoints.load_newest() if resume else None
    dtype = hardware.pick_training_dtype(dist.device, saved.meta.get("dtype", "") if saved else "")
    dtype = dist.gather(dtype)[0]  # all ranks as the first
    if saved:
        saved.check_resumable(tokenizer, source.config if isinstance(source, Checkpoint) else source, dtype)
    return Start(stage, source, tokenizer, dist, dtype, checkpoints, saved)


class Run:
    """A run of a stage, ready to train."""

    def __init__(
        self,
        start: Start,
        model: GPT,
        optimizer: MuonAdamW,
        compiling: bool,
        state: TrainState,
        data_states: list[dict[str, Any]],  # of all ranks that saved; empty for a new run
        config: dict[str, Any],
    ):
        self.start, self.model, self.optimizer, self.compiling = start, model, optimizer, compiling
        self.state, self.data_states, self.config = state, data_states, config
        self.fast_model: Any = torch.compile(model, dynamic=False) if compiling else model
        # On a CPU compiling costs more than a validation.
        self.eval_model = self.fast_model if start.dist.device.type == "cuda" else model

    def logger(self, wandb_run: str = "", num_steps: int = 0) -> Logger:
        """The stage's log; num_steps: of the whole run, 0 = unknown."""
        stage, tag, flops = STAGES[self.start.stage][1], self.start.checkpoints.tag, flops_per_token(self.model.config)
        return Logger(stage, tag, self.config, self.start.dist, wandb_run, num_steps, flops, self.state.step)

    def save_hook(self, every: int) -> Hook:
        return self.start.checkpoints.save_hook(every, self.model, self.optimizer, self.config)

    def train(
        self,
        steps: Iterable[Step],
        loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor],
        set_schedule: Callable[[MuonAdamW, int, float], None],
        hooks: list[Hook],
        logger: Logger,
    ) -> TrainState:
        """The loop, as described in train.py, and the wait until the last checkpoint is on the disk."""
        checkpoints = self.start.checkpoints
        with checkpoints:
            return train(
                self.fast_model, self.optimizer, steps, loss_fn, set_schedule, hooks, logger.log, self.state,
                self.start.dist, self.start.dtype == torch.float16, lambda: checkpoints.good,
            )  # fmt: skip
