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

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from nanochat import attention, hardware, logging, lora
from nanochat.checkpoint_manager import (
    NO_CHECKPOINT,
    STAGES,
    Checkpoint,
    CheckpointReader,
    CheckpointWriter,
    provisional,
    run_lock,
)
from nanochat.cli import COUNT_OR_DEFAULT, INTERVAL, NOT_NEGATIVE, Restart, flag
from nanochat.common import UserError, duration, seed_everything
from nanochat.costs import TrainingSetup, flops_per_token, training_memory
from nanochat.distributed import Dist, warn0
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import mlp
from nanochat.muon import MuonAdamW, ParamGroup, build_optimizer
from nanochat.planner import check_fits, count_rows, gib, local_target, training_setup
from nanochat.recipe import RecipeFlags, Schedule, load_hyperparameters
from nanochat.tokenizer import Tokenizer
from nanochat.tracking import Tracker, check_tracker
from nanochat.train import Hook, LossFunction, Step, Stopped, Trainer, TrainState

TRIAL_STEPS = 3  # steps of a run on a CPU before it is decided whether to compile


@dataclass(frozen=True)
class RunFlags:
    """The flags that all training stages share."""

    model_tag: str = flag("", "name of the run's checkpoints; default: d<depth>, in later stages the source's tag")
    save_every: int = flag(-1, "steps between checkpoints; 0 or -1 = only one, at the end", INTERVAL)
    save_minutes: float = flag(0.0, "minutes between checkpoints, besides those of --save-every; 0 = off", NOT_NEGATIVE)
    keep_last: int = flag(-1, "checkpoints to keep; -1 = all", COUNT_OR_DEFAULT)
    resume: bool = flag(False, "continue from the newest intact checkpoint of this tag, if there is one")
    device: str = flag("auto", "cuda | mps | cpu | auto")
    activation_checkpointing: bool = flag(
        False, "compute each layer again in the backward pass: a fraction of the memory, about a third more time"
    )
    skip_bad_steps: int = flag(
        0, "steps to leave out, at most, because their loss or gradient norm is not finite", NOT_NEGATIVE
    )
    run: str = flag("", "name of the run in the tracker; empty = console and metrics file only")
    tracker: str = flag("", "wandb | trackio | mlflow, with --run; default: wandb")
    plan: bool = flag(False, "print what the run needs (memory, time, cost) and exit, without reading data or weights")
    for_: str = flag("", "with --plan: another machine to plan for, such as 8xH100 or 1xRTX4090")


class Run:
    """One run of one stage. The attributes listed here are set by `build`, and `logger` by `open_log`."""

    model: GPT
    train_model: Any  # the model that training starts with: compiled if that is decided by then
    eval_model: Any  # the model for validation: compiled on CUDA only
    optimizer: MuonAdamW
    compiled: bool | None  # whether the model is, and on CUDA the optimizer too; None = not decided yet
    state: TrainState
    data_states: Sequence[dict[str, Any]]  # of the resumed checkpoint (restore_run); empty for a new run
    metadata: dict[str, Any]  # saved with each checkpoint
    logger: logging.Logger
    shards = False  # whether each rank keeps its rows of the parameters only (sharding.py); set it before fit_rows
    lora_rank = 0  # of the adapters that are trained instead of the model (use_lora); 0 = the model is trained
    rows = 0  # per pass and rank
    predicted_memory = 0.0  # bytes per rank at the peak; 0 = not predicted
    predicted_seconds = 0.0  # from the start of training to its end; 0 = not predicted

    def __init__(
        self, stage: str, tag: str, source: GPTConfig | Checkpoint, flags: RunFlags, *, tokenizer: Tokenizer, dist: Dist
    ):
        """Raises UserError if the run cannot start, or cannot be resumed, with this source and tokenizer."""
        self.stage = stage  # one of checkpoint_manager.STAGES
        self.tag = tag
        self.parent = source if isinstance(source, Checkpoint) else None
        self.config = source.config if isinstance(source, Checkpoint) else source
        self.flags = flags
        self.tokenizer = tokenizer
        self.dist = dist
        self.trial_seconds: list[float] = []  # of the steps before it is decided whether to compile
        if flags.for_:
            raise UserError("--for plans for another machine: use it with --plan")
        check_tracker(flags.tracker, flags.run)
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
        """Yields a checked run. Until the block ends no other run can use its tag. Errors: see __init__."""
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
            return self.resumed.meta["base"]  # the metadata of every stage but "base" has this key
        return str(self.parent.path) if self.parent else ""

    def use_lora(self, rank: int) -> None:
        """
        Trains adapters of this rank instead of the model (lora.py); 0 = the model. Call it before fit_rows. UserError
        if the model cannot have adapters of this rank, or the resumed run has others.
        """
        if rank:
            lora.check_rank(rank, self.config)
        if self.resumed:
            saved = self.resumed.meta.get("lora", {"rank": 0})["rank"]
            if saved != rank:
                raise UserError(f"the run was started with --lora-rank {saved}: use that, or another --model-tag")
        self.lora_rank = rank

    def build(
        self,
        groups: Iterable[ParamGroup],
        metadata: dict[str, Any],  # for checkpoints and log: hyperparameters and whatever else the stage keeps
        *,
        compile: bool = True,  # model and optimizer, if the machine can and it saves time
        attention: str = "auto",  # kernel for whole sequences, see attention.py
        seed: int = 42,  # of initial weights and samples
    ) -> None:
        """Builds model and optimizer; a resumed run gets their saved state. All ranks have to call this."""
        saved_precision = self.resumed.meta["matmul_precision"] if self.resumed else ""
        precision = hardware.pick_matmul_precision(self.dist.device, saved_precision)
        precision = hardware.tune_process(self.dist.device, self.dist.gather(precision)[0])  # all take rank 0's
        seed_everything(seed)
        self.model = self._build_model(attention)
        self.compiled = self._compiles_from_the_start(compile)
        mlp_name = self._choose_mlp()
        self.optimizer = build_optimizer(
            self.model, groups, rank=self.dist.rank, world_size=self.dist.world_size, compile=bool(self.compiled)
        )
        self.state, self.data_states = self._restore()
        self.train_model = self._compile() if self.compiled else self.model
        # On a CPU compiling the validation graph takes longer than validating.
        self.eval_model = self.train_model if self.dist.device.type == "cuda" else self.model
        self.metadata = metadata | {
            "flags": asdict(self.flags),
            "tokenizer": self.tokenizer.fingerprint,
            "matmul_precision": precision,
            "dtype": str(self.dtype),
            "compiled": self.compiled,
            "mlp": mlp_name,
        }
        if self.flags.run:
            saved = self.resumed.meta.get("tracking_id") if self.resumed else None
            self.metadata["tracking_id"] = saved or secrets.token_hex(4)
        if self.lora_rank:
            self.metadata["lora"] = {"rank": self.lora_rank, "base_crc32": self._lora_base().weights_crc32}

    def inherit_momentum(self) -> None:
        """Gives a new run the optimizer state of its source, if the source has one. A resumed run keeps its own."""
        if not self.parent or self.resumed or self.lora_rank:
            return
        if "lora" in self.parent.meta or not self.parent.restore_optimizer(self.optimizer):
            self.dist.print0(f"{self.parent.path} has no optimizer state: momentum starts from zero")

    def open_log(self, num_steps: int = 0) -> logging.Logger:
        """Opens the metrics file of the run. num_steps: optimizer steps of the whole run; 0 = unknown."""
        self.logger = logging.Logger(
            self.log_file("metrics"),
            self.dist,
            config=self.metadata,
            tracker=self._start_tracker(),
            num_steps=num_steps,
            flops_per_token=flops_per_token(self.config),
            first_step=self.state.step,
        )
        return self.logger

    def _start_tracker(self) -> Tracker | None:
        """The tracker of --run, on rank 0. A resumed run continues in it under the id that its checkpoint holds."""
        if not self.flags.run or not self.dist.is_main:
            return None
        run_id = self.metadata["tracking_id"]
        return Tracker(
            self.flags.tracker or "wandb",
            run=self.flags.run,
            group=f"{STAGES[self.stage][1]}-{self.tag}",
            run_id=run_id,
            config=self.metadata,
            resumed=self.resumed is not None and self.resumed.meta.get("tracking_id") == run_id,
        )

    def log_file(self, folder: str) -> Path:
        """The file with JSON lines that this run writes in a folder of the report: <folder>/<script>-<tag>.jsonl."""
        path = logging.report_dir() / folder / f"{STAGES[self.stage][1]}-{self.tag}.jsonl"
        return provisional(path) if self.writer.replaces_earlier else path

    def save_hook(self) -> Hook:
        """A hook that saves every --save-every steps, every --save-minutes, at the end, and after a signal."""

        def save(state: TrainState) -> None:
            self.writer.save(self.model, self.optimizer, state, self.metadata)

        return Hook(max(self.flags.save_every, 0), save, saves=True)

    def train(self, steps: Iterable[Step], loss_fn: LossFunction, schedule: Schedule, hooks: list[Hook]) -> TrainState:
        """Runs the loop of train.py to its end and waits for the last checkpoint."""
        self.trainer = Trainer(
            self.train_model,
            self.optimizer,
            self.state,
            self.dist,
            log=self.logger.log,
            scales_loss=self.dtype == torch.float16,
            last_saved=lambda: self.writer.last_saved,
            after_step=self._after_step,
            save_minutes=self.flags.save_minutes,
            skip_bad_steps=self.flags.skip_bad_steps,
        )
        self.start = time.perf_counter()
        try:
            with self.logger.live():
                self.trainer.fit(steps, loss_fn, schedule, hooks)
        except (RuntimeError, MemoryError) as error:
            if not hardware.is_out_of_memory(error):
                raise
            self._restart_with_fewer_rows()
        self.writer.wait()
        self.seconds = time.perf_counter() - self.start
        return self.state

    def finish(self, **numbers: Any) -> None:
        """Adds the final numbers of the run to the report. Prints predicted next to measured memory and time."""
        predictions = []
        if self.lora_rank:
            numbers[f"LoRA of rank {self.lora_rank}"] = lora.describe(self.model)
        if self.predicted_memory:
            peak = hardware.peak_memory(self.dist.device)
            numbers["predicted peak memory"] = gib(self.predicted_memory)
            predictions.append(f"peak memory {gib(peak)}, predicted {gib(self.predicted_memory)}")
        if self.predicted_seconds:
            numbers["predicted time"] = duration(self.predicted_seconds)
            predictions.append(f"time {duration(self.seconds)}, predicted {duration(self.predicted_seconds)}")
        if predictions:
            self.dist.print0("; ".join(predictions))
        self.logger.finish(STAGES[self.stage][1], self.state, model=self.writer.last_saved, **numbers)

    # ---- memory ----

    def fit_rows(
        self, wanted: int, total_batch_size: int, *, compile: bool, fp8: bool = False, flops: float = 0.0
    ) -> int:
        """
        Returns the rows per pass and rank, and prints the memory that they are expected to take. If `wanted` is -1,
        they are as many as fit, but not more than in the run that saved the checkpoint that this one starts from.
        UserError if they do not fit.
        """
        target = local_target(self.dist.device, self.dist.world_size, self.dtype, fp8)
        compiled = compile and hardware.can_compile(self.dist.device)
        recomputes = self.flags.activation_checkpointing
        wanted_setup = TrainingSetup(
            wanted,
            compiled=compiled,
            fp8=fp8,
            activation_checkpointing=recomputes,
            lora_rank=self.lora_rank,
            sharded=self.shards,
        )
        setup = training_setup(self.config, target, total_batch_size, wanted_setup)
        checkpoint = self.resumed or self.parent
        if wanted == -1 and checkpoint:
            before = load_hyperparameters(checkpoint.meta).device_batch_size
            if before < setup.rows and total_batch_size % (before * self.config.sequence_len * target.count) == 0:
                setup = replace(setup, rows=before)
        self.rows = min(self.dist.gather(setup.rows))
        setup = training_setup(self.config, target, total_batch_size, replace(wanted_setup, rows=self.rows))
        check_fits(self.config, setup, target, self.flags if isinstance(self.flags, RecipeFlags) else None)
        self.predicted_memory = training_memory(self.config, setup).peak
        expected = f"about {gib(self.predicted_memory)} of {gib(target.memory)} per rank"
        self.dist.print0(f"memory: {expected}, with {count_rows(self.rows)} per pass")
        if target.peak and not self.resumed:  # `flops` are those of the whole run
            self.predicted_seconds = target.seconds(self.config, flops, recomputes)
        return self.rows

    def _restart_with_fewer_rows(self) -> NoReturn:
        """
        Called when a step did not fit into memory. Raises Restart: half the rows per pass, from the last checkpoint.
        The batch of an optimizer step and the order of the data stay the same. UserError if no restart is possible.
        """
        self.writer.wait()
        fewer = self.rows // 2
        problem = f"out of memory in step {self.state.step} with {count_rows(self.rows)} per pass"
        if not fewer:
            remedy = "a smaller --depth or --max-seq-len, or a machine with more memory"
            if not self.flags.activation_checkpointing:
                remedy = f"--activation-checkpointing, {remedy}"
            raise UserError(f"{problem}: use {remedy}")
        if self.dist.world_size > 1:  # the other ranks wait in a collective operation: only torchrun can restart them
            raise UserError(f"{problem}: start again with --resume --device-batch-size {fewer}")
        has_saved = self.writer.last_saved != NO_CHECKPOINT
        start = f"from {self.writer.last_saved}" if has_saved else "from the start"
        flags: Any = self.flags  # the stage's own class: in all of them, these two fields exist
        flags = replace(flags, device_batch_size=fewer, resume=flags.resume or has_saved)
        raise Restart(f"{problem}: continuing {start} with {count_rows(fewer)} per pass", flags)

    # ---- the steps of opening and building ----

    def _find_resumed(self) -> Checkpoint | None:
        """The checkpoint that rank 0 finds; None if it finds none. UserError on ranks that do not have it."""
        reader = CheckpointReader(self.stage, self.tag)
        newest = reader.load() if reader.steps() and self.dist.is_main else None
        step = self.dist.gather(newest.step if newest else -1)[0]
        if step >= 0:
            return newest or self._load_step_of_main(reader, step)
        message = f"nothing to resume in {reader.path}: starting from the beginning"
        earlier = sorted(folder.name for folder in reader.path.parent.glob(f"{self.tag}.*"))
        if earlier:
            message += f" (earlier runs of this tag: {', '.join(earlier)})"
        self.dist.print0(message)
        return None

    def _load_step_of_main(self, reader: CheckpointReader, step: int) -> Checkpoint:
        try:
            return reader.load(step)
        except UserError as error:
            remedy = "use a NANOCHAT_BASE_DIR that all nodes share, or copy the checkpoint to this node"
            raise UserError(
                f"{self.dist.name} lacks the checkpoint that rank 0 resumes from ({error}): {remedy}"
            ) from error

    def _build_model(self, attention_name: str) -> GPT:
        device = self.dist.device
        checkpoint = self.resumed or self.parent
        if self.lora_rank:
            model = self._lora_base().build_model(device, self.dtype)
            lora.use_lora(model, self.lora_rank)
            if self.resumed:
                lora.load_adapters(model, self.resumed.saved_weights())
            self.dist.print0(f"LoRA of rank {self.lora_rank}: {lora.describe(model)}")
        elif self.shards:
            from nanochat import sharding  # here, because its part of torch takes a second to import

            weights = checkpoint.stored_weights() if checkpoint else None
            model = sharding.build(self.config, self.dist, self.dtype, weights)
        elif checkpoint:
            model = checkpoint.build_model(device, self.dtype)
        else:
            model = GPT.create(self.config, device, self.dtype)
        shape = self.config.attention_shape
        name, kernel = attention.choose(attention_name, shape, device, self.dtype, self.dist.print0)
        model.use_attention(kernel)
        model.activation_checkpointing = self.flags.activation_checkpointing
        self.dist.print0(f"computing in {self.dtype}, attention {name}")
        return model

    def _lora_base(self) -> Checkpoint:
        """The checkpoint that the adapters are trained on."""
        base = self.resumed.lora_base() if self.resumed else self.parent
        assert base is not None
        return base

    def _choose_mlp(self) -> str:
        """
        Lets the model use the fused MLP where that is faster, and returns "fused" or "plain". A resumed run keeps its
        choice, because it was measured.
        """
        kernel = None
        if not getattr(self.flags, "fp8", False) and (not self.resumed or self.resumed.meta.get("mlp") == "fused"):
            num_tokens = max(1, self.rows) * self.config.sequence_len
            kernel = mlp.choose(
                self.config.n_embd,
                num_tokens,
                self.dist.device,
                self.dtype,
                compile=bool(self.compiled),
                log=self.dist.print0,
            )
        self.model.use_mlp(kernel)
        return "fused" if kernel else "plain"

    def _compiles_from_the_start(self, allowed: bool) -> bool | None:
        """
        Whether to compile the model. None = decided after a few steps, for a new run on a CPU. A resumed run keeps its
        decision, and on a GPU compiling always saves time.
        """
        if not allowed:
            return False
        if not hardware.can_compile(self.dist.device):
            if self.dist.device.type == "cuda":
                reason = hardware.compile_obstacle(self.dist.device)
                warn0(f"training is slower than it could be, as torch.compile does not work: {reason}")
            return False
        if self.resumed and not self.shards:
            return self.resumed.meta.get("compiled", True)
        if self.shards:
            return self.dist.device.type == "cuda"
        return None if self.dist.device.type == "cpu" else True

    def _compile(self) -> torch.nn.Module:
        """The compiled model. It shares its parameters with self.model."""
        if self.shards:  # gathering the weights of a block cannot be compiled, so each block is
            for block in self.model.transformer.h:
                block.forward = torch.compile(block.forward, dynamic=False)
        elif self.dist.device.type == "cuda":
            self.model.compile_parts()
        else:  # at depth 4 the parts take 49 s instead of 41, as three of the four layers are of different kinds
            return torch.compile(self.model, dynamic=False)  # type: ignore[return-value]
        return self.model

    def _after_step(self, step: Step, seconds: float) -> None:
        if self.logger.block:
            self.logger.block.seek(step.progress, step.position)
        self._decide_on_compiling(step, seconds)

    def _decide_on_compiling(self, step: Step, seconds: float) -> None:
        """After step TRIAL_STEPS it decides, from the time that the steps so far have taken."""
        if self.compiled is not None:
            return
        self.trial_seconds.append(seconds)
        if self.state.step < TRIAL_STEPS:
            return
        seconds_per_step = min(self.trial_seconds)
        num_steps = (self.state.step - 1) / step.progress  # progress was measured before this step
        seconds_left = seconds_per_step * (num_steps - self.state.step)
        cached = self.parent is not None and bool(self.parent.meta.get("compiled"))  # with the same shapes
        seconds_compiled = hardware.seconds_compiled(seconds_left, self.config.n_layer, cached=cached)
        self.compiled = self.metadata["compiled"] = self.dist.gather(seconds_compiled < seconds_left)[0]
        chosen = "compiling the model" if self.compiled else "not compiling the model"
        self.dist.print0(
            f"{duration(seconds_left)} are left, with torch.compile about {duration(seconds_compiled)}: {chosen}"
        )
        self.predicted_seconds = time.perf_counter() - self.start + min(seconds_compiled, seconds_left)
        if self.compiled:
            self.trainer.model = self._compile()

    def _restore(self) -> tuple[TrainState, list[dict[str, Any]]]:
        """The loop's state and all ranks' data states; in a resumed run the saved ones (loads the optimizer too)."""
        if not self.resumed:
            return TrainState(), []
        state, data_states = self.resumed.restore_run(self.optimizer, self.dist)
        before, now = self.resumed.meta.get("flags", {}), asdict(self.flags)
        names = [name for name in before if name in now and name != "resume" and before[name] != now[name]]
        changes = ", ".join(f"{name} {before[name]} → {now[name]}" for name in names)
        self.dist.print0(f"resuming after step {state.step} with {changes or 'the same flags'}")
        return state, data_states
