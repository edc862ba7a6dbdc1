"""
A run of a training stage, for the stage scripts: checks, builds and restores everything around the loop of train.py.

    with Run.open("sft", tag, source, flags, tokenizer=tokenizer, dist=dist) as run:   # checks only, nothing is built
        run.build(groups, metadata)                                     # model, optimizer, state of a resumed run
        logger = run.open_log(num_steps)
        hooks = [Hook(flags.eval_every, evaluate), run.save_hook()]
        run.train(steps, token_loss, finetune_schedule, hooks)
        run.finish()

`source` is what a new run starts from: a model configuration (random weights) or a checkpoint of another stage.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import attention, hardware, logging
from nanochat.checkpoint_manager import STAGES, Checkpoint, CheckpointReader, CheckpointWriter, provisional, run_lock
from nanochat.cli import flag
from nanochat.common import seed_everything
from nanochat.distributed import Dist
from nanochat.gpt import GPT, GPTConfig, flops_per_token
from nanochat.muon import MuonAdamW, ParamGroup, build_optimizer
from nanochat.recipe import Schedule
from nanochat.tokenizer import Tokenizer
from nanochat.train import Hook, LossFunction, Step, Stopped, Trainer, TrainState


@dataclass(frozen=True)
class RunFlags:
    """The flags that all training stages share."""

    model_tag: str = flag("", "name of the run's checkpoints; default: d<depth>, in later stages that of the source")
    save_every: int = flag(-1, "steps between checkpoints; -1 = only one, at the end")
    keep_last: int = flag(-1, "checkpoints to keep; -1 = all")
    resume: bool = flag(False, "continue from the newest intact checkpoint of this tag, if there is one")
    device: str = flag("auto", "cuda | mps | cpu | auto")
    run: str = flag("", "wandb run name; empty = console and metrics file only")


class Run:
    """One run of one stage. The attributes listed here are set by `build`, and `logger` by `open_log`."""

    model: GPT
    train_model: Any  # the model, compiled where that pays
    eval_model: Any  # the model as validations should call it
    optimizer: MuonAdamW
    compiled: bool  # whether train_model and, on CUDA, the optimizer are
    state: TrainState
    data_states: Sequence[dict[str, Any]]  # of all ranks that saved the resumed checkpoint; empty for a new run
    metadata: dict[str, Any]  # saved with each checkpoint
    logger: logging.Logger

    def __init__(
        self, stage: str, tag: str, source: GPTConfig | Checkpoint, flags: RunFlags, *, tokenizer: Tokenizer, dist: Dist
    ):
        """UserError unless the run can start, or be resumed, with this source and tokenizer."""
        self.stage = stage  # one of checkpoint_manager.STAGES
        self.tag = tag
        self.parent = source if isinstance(source, Checkpoint) else None
        self.config = source.config if isinstance(source, Checkpoint) else source
        self.flags = flags
        self.tokenizer = tokenizer
        self.dist = dist
        logging.check_wandb(flags.run)
        if self.parent:
            self.parent.check_tokenizer(tokenizer)
        self.resumed = self._find_resumed() if flags.resume else None
        saved_dtype = self.resumed.meta.get("dtype", "") if self.resumed else ""
        self.dtype = dist.gather(hardware.pick_training_dtype(dist.device, saved_dtype))[0]  # all ranks take rank 0's
        if self.resumed:
            self.resumed.check_resumable(tokenizer, self.config, self.dtype)
        self.writer = CheckpointWriter(stage, tag, dist, keep_last=flags.keep_last, resumed=self.resumed)
        if self.writer.replaces_earlier:
            print(
                f"the tag {tag!r} holds an earlier run, which will be renamed when this one saves its first checkpoint "
                "(to continue the earlier run instead, stop this one and add --resume)",
                flush=True,
            )

    @classmethod
    @contextmanager
    def open(
        cls, stage: str, tag: str, source: GPTConfig | Checkpoint, flags: RunFlags, *, tokenizer: Tokenizer, dist: Dist
    ) -> Iterator["Run"]:
        """A checked run; until the block ends no other run can use its tag. See __init__ for errors."""
        with run_lock(stage, tag, dist):
            run = cls(stage, tag, source, flags, tokenizer=tokenizer, dist=dist)
            try:
                yield run
            except Stopped:
                run.writer.wait()
                raise
            except BaseException:
                run.writer.close()
                raise
            run.writer.wait()

    @property
    def parent_checkpoint(self) -> str:
        """Path of the checkpoint that the run started from, also after it was resumed."""
        if self.resumed:
            return self.resumed.meta["base"]
        return str(self.parent.path) if self.parent else ""

    def build(
        self,
        groups: Iterable[ParamGroup],
        metadata: dict[str, Any],  # for checkpoints and log: hyperparameters and what else the stage wants to keep
        *,
        compile: bool = True,  # model and optimizer, if the machine can and the run is long enough to save time
        attention: str = "auto",  # kernel for whole sequences, see attention.py
        seed: int = 42,  # of initial weights and samples
        total_flops: float = math.inf,  # of the whole run over all ranks: compiling does not pay for a short one
    ) -> None:
        """Builds model and optimizer, and restores them when the run is resumed. All ranks have to call it."""
        saved_precision = self.resumed.meta["matmul_precision"] if self.resumed else ""
        precision = hardware.pick_matmul_precision(self.dist.device, saved_precision)
        precision = hardware.tune_process(self.dist.device, self.dist.gather(precision)[0])  # all take rank 0's
        seed_everything(seed)
        self.model = self._build_model(attention)
        self.compiled = compile and self._can_and_should_compile(total_flops)
        if self.compiled:
            hardware.warm_up_compiler(self.dist.device)  # in the background
        self.optimizer = build_optimizer(
            self.model, groups, rank=self.dist.rank, world_size=self.dist.world_size, compile=self.compiled
        )
        self.state, self.data_states = self._restore()
        self.dist.print0("compiling the model" if self.compiled else "running the model without torch.compile")
        self.train_model = torch.compile(self.model, dynamic=False) if self.compiled else self.model
        # On a CPU compiling the validation graph takes longer than validating.
        self.eval_model = self.train_model if self.dist.device.type == "cuda" else self.model
        self.metadata = metadata | {
            "flags": asdict(self.flags),
            "tokenizer": self.tokenizer.fingerprint,
            "matmul_precision": precision,
            "dtype": str(self.dtype),
            "compiled": self.compiled,
        }

    def inherit_momentum(self) -> None:
        """Loads the optimizer state of the source into a new run, where the source has one."""
        if self.parent and not self.resumed and not self.parent.restore_optimizer(self.optimizer):
            self.dist.print0(f"{self.parent.path} has no optimizer state: momentum starts from zero")

    def open_log(self, num_steps: int = 0) -> logging.Logger:
        """Opens the metrics file of the run. num_steps: of the whole run; 0 = unknown."""
        self.logger = logging.Logger(
            self.log_file("metrics"),
            self.dist,
            config=self.metadata,
            wandb_run=self.flags.run,
            num_steps=num_steps,
            flops_per_token=flops_per_token(self.config),
            first_step=self.state.step,
        )
        return self.logger

    def log_file(self, folder: str) -> Path:
        """Where this run writes its JSON lines in a folder of the report: <folder>/<script>-<tag>.jsonl."""
        path = logging.report_dir() / folder / f"{STAGES[self.stage][1]}-{self.tag}.jsonl"
        return provisional(path) if self.writer.replaces_earlier else path

    def save_hook(self) -> Hook:
        """Saves every --save-every steps, at the end, and when a signal ends the run."""

        def save(state: TrainState) -> None:
            self.writer.save(self.model, self.optimizer, state, self.metadata)

        return Hook(max(self.flags.save_every, 0), save, when_stopped=True)

    def train(self, steps: Iterable[Step], loss_fn: LossFunction, schedule: Schedule, hooks: list[Hook]) -> TrainState:
        """Runs the loop of train.py to its end and waits for the last checkpoint."""
        trainer = Trainer(
            self.train_model,
            self.optimizer,
            self.state,
            self.dist,
            log=self.logger.log,
            scales_loss=self.dtype == torch.float16,
            last_saved=lambda: self.writer.last_saved,
        )
        trainer.fit(steps, loss_fn, schedule, hooks)
        self.writer.wait()
        return self.state

    def finish(self, **numbers: Any) -> None:
        """Adds the final numbers of the run to the report."""
        self.logger.finish(STAGES[self.stage][1], self.state, model=self.writer.last_saved, **numbers)

    # ---- the steps of opening and building ----

    def _find_resumed(self) -> Checkpoint | None:
        reader = CheckpointReader(self.stage, self.tag)
        if reader.steps():
            return reader.load()
        message = f"nothing to resume in {reader.path}: starting from the beginning"
        earlier = sorted(folder.name for folder in reader.path.parent.glob(f"{self.tag}.*"))
        if earlier:
            message += f" (earlier runs of this tag: {', '.join(earlier)})"
        self.dist.print0(message)
        return None

    def _build_model(self, attention_name: str) -> GPT:
        device = self.dist.device
        checkpoint = self.resumed or self.parent
        if checkpoint:
            model = checkpoint.build_model(device, self.dtype)
        else:
            model = GPT.create(self.config, device, self.dtype)
        shape = self.config.attention_shape
        name, kernel = attention.choose(attention_name, shape, device, self.dtype, self.dist.print0)
        model.use_attention(kernel)
        self.dist.print0(f"computing in {self.dtype}, attention {name}")
        return model

    def _can_and_should_compile(self, total_flops: float) -> bool:
        """The same decision on all ranks, and the saved one after a resume."""
        device = self.dist.device
        if not hardware.can_compile(device):
            return False
        if self.resumed:
            return self.resumed.meta.get("compiled", True)
        flops = total_flops / self.dist.world_size
        return self.dist.gather(hardware.compiling_pays_off(device, self.dtype, flops, self.config.n_layer))[0]

    def _restore(self) -> tuple[TrainState, list[dict[str, Any]]]:
        """State of the loop and data states of all ranks: new ones, or those of a resumed run with its optimizer."""
        if not self.resumed:
            return TrainState(), []
        state, data_states = self.resumed.restore_run(self.optimizer, self.dist)
        before, now = self.resumed.meta.get("flags", {}), asdict(self.flags)
        names = [name for name in before if name in now and name != "resume" and before[name] != now[name]]
        changes = ", ".join(f"{name} {before[name]} → {now[name]}" for name in names)
        self.dist.print0(f"resuming after step {state.step} with {changes or 'the same flags'}")
        return state, data_states
