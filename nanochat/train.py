"""
The training loop that all stages share: pretraining, fine-tuning and reinforcement learning.

A stage gives the loop four things:
- steps:    an iterator of Step, one per optimizer step. The loop asks for a step when it needs it: reinforcement
            learning samples its rollouts only then, with the newest weights (on-policy). The loaders of the other
            stages prepare steps ahead in a thread. Each Step carries the state of the data for resuming after it, so
            steps that were prepared but not trained on are not lost.
- loss_fn:  (model, micro_batch) → scalar loss, already normalized over the whole step and over all ranks
- schedule: (step, progress) → StepSchedule: learning rates, momentum and weight decay (nanochat/recipe.py)
- hooks:    what happens every N steps: evaluate, sample, save
"""

import gc
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nanochat.distributed import Dist
from nanochat.guards import CHECK_EVERY, Guards
from nanochat.muon import MuonAdamW, is_sharded, local
from nanochat.recipe import Schedule

LOSS_EMA_BETA = 0.9  # smooths the logged loss; nothing else depends on it
UNTIMED_STEPS = 4  # warm-up, the trial of run.py and the compilation that may follow: left out of the throughput
LOSS_SCALE_GROWTH_STEPS = 2000  # float16: the default of torch.amp.GradScaler

LossFunction = Callable[[torch.nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """The data of one optimizer step."""

    micro_batches: list[Any]  # of this rank; the first item of each is its input tokens, (B, T)
    progress: float  # share of the run done before this step, in [0, 1)
    # Tokens over all ranks: all that the model computes, padding included; in reinforcement learning only the sampled
    # tokens that are trained on. 0 = nothing to learn: the step counts, but no weight changes.
    num_tokens: int
    # The state of the data source after this step, for resuming. If this rank reads several sources (StreamsLoader), or
    # shares one with the rank before it, then a list of their states as the only value, "streams".
    data_state: dict[str, Any]
    position: str = ""  # the position in the data as text, for error messages
    metrics: dict[str, float] = field(default_factory=dict)  # of the data itself, logged with the loss


@dataclass
class TrainState:
    """What must survive a restart besides model and optimizer."""

    step: int = 0  # optimizer steps so far
    loss_ema: float = 0.0  # biased towards 0: use smooth_loss instead
    seconds: float = 0.0  # of training, without the first UNTIMED_STEPS steps
    tokens: int = 0  # trained on in these seconds
    loss_scale: float = 2.0**16  # float16 only
    good_steps: int = 0  # float16 only: steps since the last overflow
    skipped_steps: int = 0  # because their loss or gradient was not finite
    data_state: dict[str, Any] = field(default_factory=dict)  # of the last Step
    total_tokens: int = 0  # trained on since the first step, for the log
    elapsed: float = 0.0  # seconds since training started, evaluations and samples included, pauses excluded

    @property
    def smooth_loss(self) -> float:
        """The moving average of the loss, without the bias of its start at 0 (as Adam corrects its moments)."""
        num_losses = self.step - self.skipped_steps
        return self.loss_ema / (1 - LOSS_EMA_BETA**num_losses) if num_losses else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers. The state of the data differs between the ranks and is saved separately."""
        return {key: value for key, value in asdict(self).items() if key != "data_state"}


@dataclass(frozen=True)
class Hook:
    """Runs every N steps (`every`) and once after the last one; may return metrics to log."""

    every: int  # in steps; 0 = only after the last one, -1 = never
    run: Callable[[TrainState], dict[str, float] | None]
    saves: bool = False  # writes a checkpoint: runs also when the time or a signal asks for one

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


class Stopped(SystemExit):
    """A signal ended the run, and its state was saved."""


@dataclass
class Requests:
    """What signals have asked this process for."""

    stop: bool = False  # SIGTERM, SIGINT: save and end the run
    save: bool = False  # SIGUSR1: save and continue


@dataclass
class Trainer:
    """The loop with what it works on. All ranks must see the same number of steps."""

    model: torch.nn.Module
    optimizer: MuonAdamW
    state: TrainState
    dist: Dist
    log: Callable[[TrainState, dict[str, float]], None]
    scales_loss: bool = False  # dynamic loss scaling, for float16
    last_saved: Callable[[], str] = lambda: "no checkpoint"  # for error messages
    after_step: Callable[[Step, float], None] = lambda step, seconds: None  # before the hooks; may replace the model
    save_minutes: float = 0.0  # between checkpoints, besides those of the hooks' intervals; 0 = no such limit
    skip_bad_steps: int = 0  # steps without a finite loss and gradient that may be skipped in the whole run
    start_time: float = field(default=0.0, init=False)  # on time.perf_counter, see fit

    def fit(self, steps: Iterable[Step], loss_fn: LossFunction, schedule: Schedule, hooks: list[Hook]) -> TrainState:
        """
        Trains until `steps` ends. Hooks that save also run at the end of a step in which SIGUSR1 arrived, or at which
        save_minutes have passed since the last checkpoint. After SIGTERM or SIGINT they run at the end of the step, and
        Stopped is raised. UserError when loss or gradient are not finite.
        """
        state = self.state
        self.guards = Guards(self.dist, self.skip_bad_steps, self.last_saved)
        first_step = state.step
        self.save_time = time.monotonic()
        self.start_time = time.perf_counter() - state.elapsed  # as if a resumed run had never paused
        just_run: list[Hook] = []
        self.model.train()
        with catch_signals() as self.requests:
            start = time.perf_counter()
            for step in steps:
                self.dist.note(f"in step {state.step}")
                metrics, agreed = self._train_step(step, loss_fn, schedule)
                seconds = time.perf_counter() - start  # includes waiting for the data, or sampling it
                if state.step - first_step > UNTIMED_STEPS:
                    state.seconds += seconds
                    state.tokens += step.num_tokens
                    self.guards.note_time(sum(micro_batch[0].numel() for micro_batch in step.micro_batches))
                if state.step == first_step + 1 or state.step % CHECK_EVERY == 0:
                    replicated = [p for p in self.optimizer.params() if not is_sharded(p)]
                    self.guards.check_ranks(replicated, state.step)
                state.total_tokens += step.num_tokens
                self._log(metrics | step.metrics | {"train/tokens_per_second": step.num_tokens / seconds})
                self.after_step(step, seconds)
                if agreed.stop:
                    self._run_hooks([hook for hook in hooks if hook.saves])
                    raise Stopped(f"stopped by a signal after step {state.step}, saved: continue with --resume")
                just_run = [hook for hook in hooks if hook.is_due(state.step) or (hook.saves and agreed.save)]
                self._run_hooks(just_run)
                if state.step == first_step + 1:
                    gc.collect()
                    gc.freeze()  # objects made during set-up live to the end: the collector need not scan them
                start = time.perf_counter()
            # The checkpoint comes first: what follows may take minutes, and --resume repeats it.
            last = [hook for hook in hooks if hook.every >= 0 and hook not in just_run]
            self._run_hooks(sorted(last, key=lambda hook: not hook.saves))
        return state

    def _train_step(self, step: Step, loss_fn: LossFunction, schedule: Schedule) -> tuple[dict[str, float], Requests]:
        """One optimizer step. Returns its metrics and what any rank was asked for."""
        state, optimizer = self.state, self.optimizer
        optimizer.set_schedule(schedule(state.step, step.progress))
        loss = self._accumulate(step.micro_batches, loss_fn)
        can_step = step.num_tokens > 0  # without tokens there is no gradient, and momentum alone would move the weights
        if can_step and self.scales_loss:
            can_step = self._unscale_gradients()
        square_norm = optimizer.reduce_gradients() if can_step else torch.zeros_like(loss)

        # The only host-device synchronization of a step (float16 has one more, and every 100 steps guards.py has two).
        # It comes before the optimizer, so that a loss that is not finite never reaches the weights.
        numbers = torch.stack([loss, square_norm, *self._take_requests(loss)])
        loss_value, square_norm_value, num_stopping, num_saving = self.dist.sum(numbers).tolist()
        grad_norm = math.sqrt(square_norm_value)
        is_good = self._is_good(step, loss, loss_value, grad_norm)
        if is_good:
            state.loss_ema = LOSS_EMA_BETA * state.loss_ema + (1 - LOSS_EMA_BETA) * loss_value
        else:
            state.skipped_steps += 1
        if is_good and can_step:
            optimizer.step()
        optimizer.pending.clear()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.data_state = step.data_state
        metrics = {"train/skipped_steps": float(state.skipped_steps)}
        if is_good:
            metrics = {"train/loss": state.smooth_loss, "train/grad_norm": grad_norm}
        rates = {f"lr/{name}": lr for name, lr in optimizer.learning_rates().items()}
        return metrics | rates, Requests(num_stopping > 0, num_saving > 0)

    def _take_requests(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What this rank was asked for since the last step, as two numbers to add up over the ranks: all of them save in
        the same step, at the cost of 8 bytes in an exchange that takes place anyway. Rank 0's clock decides for all.
        """
        waited = time.monotonic() - self.save_time
        is_time = self.dist.is_main and 0 < 60 * self.save_minutes <= waited
        save = self.requests.save or is_time
        self.requests.save = False
        return torch.full_like(like, float(self.requests.stop)), torch.full_like(like, float(save))

    def _is_good(self, step: Step, own_loss: torch.Tensor, loss: float, grad_norm: float) -> bool:
        """
        Whether loss and gradient norm, which are those over all ranks, are finite. False: this step may be skipped.
        UserError if it may not. The arguments are equal on all ranks but for own_loss, and so is the decision.
        """
        where = f"step {self.state.step} (data: {step.position})"
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                problem = f"the {name} is {value}"
                self.guards.skip_or_stop(problem, where, own_loss.item(), self.state.skipped_steps)
                return False
        self.guards.check_loss(loss, where)
        return True

    def _accumulate(self, micro_batches: list[Any], loss_fn: LossFunction) -> torch.Tensor:
        """
        Forward and backward pass of each micro-batch; returns the sum of their losses, () on the device.

        Autograd adds up the gradients, one addition per parameter. It moves 12 bytes per parameter: 5.9 of 350 ms of a
        micro-batch at depth 24 on an H100 (estimated). A single addition of all would move as many, and would need
        memory for two sets of gradients.
        """
        total = torch.zeros((), device=self.dist.device)
        self.guards.stopwatch.start()
        for micro_batch in micro_batches:
            loss = loss_fn(self.model, micro_batch)
            total += loss.detach()
            if self.scales_loss:
                loss = loss * self.state.loss_scale
            loss.backward()
        self.guards.stopwatch.stop()
        return total

    def _unscale_gradients(self) -> bool:
        """
        float16: divides the gradients by the loss scale and returns whether they are finite on all ranks. The scale is
        halved on overflow and doubled after 2,000 steps without one. torch's GradScaler does the same, but it does not
        look at the other ranks.
        """
        state = self.state
        grads = [local(p.grad) for p in self.optimizer.params() if p.grad is not None]
        if grads:  # a rank may have no supervised tokens in a step
            torch._foreach_mul_(grads, 1 / state.loss_scale)
        overflow = self.dist.any_rank(not all(bool(torch.isfinite(grad).all()) for grad in grads))
        if overflow:
            state.loss_scale /= 2
            state.good_steps = 0
            return False
        state.good_steps += 1
        if state.good_steps % LOSS_SCALE_GROWTH_STEPS == 0:
            state.loss_scale *= 2
        return True

    def _run_hooks(self, hooks: list[Hook]) -> None:
        """Runs the hooks with the model in eval mode."""
        self.model.eval()
        if hooks:
            self.dist.note(f"evaluating or saving after step {self.state.step}")
        for hook in hooks:
            metrics = hook.run(self.state)
            if metrics:
                self._log(metrics)
            if hook.saves:
                self.save_time = time.monotonic()
        self.model.train()

    def _log(self, metrics: dict[str, float]) -> None:
        self.state.elapsed = time.perf_counter() - self.start_time
        self.log(self.state, metrics)


@contextmanager
def catch_signals() -> Iterator[Requests]:
    """
    Yields what signals ask for while the block runs. A second SIGTERM or SIGINT has its usual effect. SIGUSR1 is what
    Slurm sends before a job's time is over (#SBATCH --signal=USR1@120); the job may use the rest of it.
    """
    requests = Requests()
    previous: dict[int, Any] = {}

    def stop(number: int, frame: Any) -> None:
        requests.stop = True
        signal.signal(number, previous[number])

    def save(number: int, frame: Any) -> None:
        requests.save = True

    handlers: dict[int, Any] = {signal.SIGTERM: stop, signal.SIGINT: stop}
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        handlers[signal.SIGUSR1] = save
    try:
        for which, handler in handlers.items():
            previous[which] = signal.signal(which, handler)
    except ValueError:  # Python handles signals in the main thread only; elsewhere a run cannot be stopped this way
        pass
    try:
        yield requests
    finally:
        for which, earlier in previous.items():
            signal.signal(which, earlier)


def token_loss(model: torch.nn.Module, micro_batch: tuple[torch.Tensor, torch.Tensor, int]) -> torch.Tensor:
    """Next-token cross entropy of a micro-batch (inputs, targets, number of targets in the whole step)."""
    x_BT, y_BT, num_targets = micro_batch
    return model(x_BT, y_BT, reduction="sum") / num_targets
