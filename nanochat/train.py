"""
The training loop, shared by pretraining, fine-tuning and reinforcement learning.

Beyond model, optimizer and schedule, stages differ in three things only, and pass them in:
- steps:   iterator of Step, one per optimizer update. It is pulled lazily, so RL rollouts are on-policy by
           construction; pretraining and SFT wrap theirs in a prefetcher, safe because the data state travels along
- loss_fn: (model, micro_batch) → scalar loss, already normalized over the whole step and over all ranks
- hooks:   what happens every so often (evaluate, sample, save)
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

from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.muon import MuonAdamW

LOSS_EMA_BETA = 0.9  # smoothing of the logged loss; logging only
UNTIMED_STEPS = 3  # compilation and allocator warm-up, left out of the throughput


@dataclass(frozen=True)
class Step:
    """The data of one optimizer update."""

    micro_batches: list[Any]
    progress: float  # fraction of the run done before this step, in [0, 1)
    num_tokens: int  # over all ranks; 0 = nothing to learn from: the step counts, and no weight moves
    data_state: dict[str, Any]  # where the data source stands after this step, for resume
    position: str = ""  # the same in words
    metrics: dict[str, float] = field(default_factory=dict)  # of the data itself, logged with the loss


@dataclass
class TrainState:
    """All that must survive a restart besides model, optimizer and data."""

    step: int = 0  # updates applied so far
    loss_ema: float = 0.0  # biased; read smooth_loss instead
    seconds: float = 0.0  # timed training time
    tokens: int = 0  # trained on in that time
    loss_scale: float = 2.0**16  # float16 only
    good_steps: int = 0  # updates since the loss scale last changed
    data_state: dict[str, Any] = field(default_factory=dict)

    @property
    def smooth_loss(self) -> float:
        return self.loss_ema / (1 - LOSS_EMA_BETA**self.step) if self.step else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; the data state, which is each rank's own, is saved apart."""
        return {key: value for key, value in asdict(self).items() if key != "data_state"}


@dataclass(frozen=True)
class Hook:
    """Runs after every `every` updates, and once after the last one; returns metrics to log."""

    every: int  # in updates; 0 = only after the last one, -1 = never
    run: Callable[[TrainState], dict[str, float]]
    when_stopped: bool = False  # also when a signal ends the run early

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


class Stopped(SystemExit):
    """A signal ended the run after its state was saved."""


def train(
    model: torch.nn.Module,
    optimizer: MuonAdamW,
    steps: Iterable[Step],
    loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor],
    set_schedule: Callable[[MuonAdamW, int, float], None],  # (optimizer, step, progress)
    hooks: list[Hook],
    log: Callable[[TrainState, dict[str, float]], None],
    state: TrainState,
    dist: Dist,
    scale_loss: bool = False,  # float16: dynamic loss scaling
    last_checkpoint: Callable[[], str] = lambda: "no checkpoint",  # in words, for the error below
) -> TrainState:
    """
    Trains until `steps` ends; all ranks must see the same number of steps. SIGTERM and SIGINT end the run after the
    step at hand: the hooks that ask for it run, then Stopped is raised. UserError when the loss is not finite.
    """
    model.train()
    first, just_run = state.step, list[Hook]()
    with stop_signals() as stop:
        start = time.perf_counter()
        for step in steps:
            set_schedule(optimizer, state.step, step.progress)
            loss = accumulate(model, step.micro_batches, loss_fn, state.loss_scale if scale_loss else 1.0, dist)
            if step.num_tokens and (not scale_loss or unscale(optimizer, state, dist)):
                optimizer.step()  # not without gradients: momentum alone would go on moving the weights
            optimizer.zero_grad(set_to_none=True)
            numbers = torch.stack([loss, torch.tensor(float(bool(stop)), device=loss.device)])
            loss_value, stopping = dist.sum(numbers).tolist()  # the only host-device sync of the step
            seconds = time.perf_counter() - start  # with the wait for the data

            if not math.isfinite(loss_value):
                where = f"step {state.step} (data: {step.position})"
                raise UserError(f"the loss is {loss_value} at {where}; last good: {last_checkpoint()}")
            state.step += 1
            state.loss_ema = LOSS_EMA_BETA * state.loss_ema + (1 - LOSS_EMA_BETA) * loss_value
            if state.step - first > UNTIMED_STEPS:
                state.seconds += seconds
                state.tokens += step.num_tokens
            state.data_state = step.data_state
            speed = {"train/tokens_per_second": step.num_tokens / seconds}
            log(state, {"train/loss": state.smooth_loss} | step.metrics | speed)
            if stopping:
                run_hooks(model, [h for h in hooks if h.when_stopped], log, state)
                raise Stopped(f"stopped by a signal after step {state.step}, all saved: go on with --resume")
            just_run = [h for h in hooks if h.is_due(state.step)]
            run_hooks(model, just_run, log, state)
            if state.step == first + 1:
                gc.collect()
                gc.freeze()  # what set-up made never dies: keep the collector from scanning it
            start = time.perf_counter()
    run_hooks(model, [h for h in hooks if h.every >= 0 and h not in just_run], log, state)
    return state


def accumulate(model, micro_batches: list[Any], loss_fn: Callable, loss_scale: float, dist: Dist) -> torch.Tensor:
    """Forward and backward of one step's micro-batches; returns the sum of their losses, unscaled, on the device."""
    total = torch.zeros((), device=dist.device)
    for micro_batch in micro_batches:
        loss = loss_fn(model, micro_batch)
        (loss * loss_scale if loss_scale != 1.0 else loss).backward()
        total += loss.detach()
    return total


def unscale(optimizer: MuonAdamW, state: TrainState, dist: Dist) -> bool:
    """
    float16's dynamic loss scale: divides the gradients by it and says whether they are finite on all ranks. Halved on
    overflow, doubled after 2,000 good steps, as torch's GradScaler does; that class knows nothing of other ranks.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if grads:  # a rank may be without supervised tokens in a step
        torch._foreach_mul_(grads, 1 / state.loss_scale)
    overflow = dist.any_rank(not all(bool(torch.isfinite(g).all()) for g in grads))
    state.good_steps = 0 if overflow else state.good_steps + 1
    if overflow:
        state.loss_scale /= 2
    elif state.good_steps % 2000 == 0:
        state.loss_scale *= 2
    return not overflow


def run_hooks(model: torch.nn.Module, hooks: list[Hook], log: Callable, state: TrainState) -> None:
    """Runs the hooks with the model in eval mode."""
    model.eval()
    for hook in hooks:
        metrics = hook.run(state)
        if metrics:
            log(state, metrics)
    model.train()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills with the SIGTERM and SIGINT received in the block; a second one acts as it would outside."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    try:
        for received_signal in (signal.SIGTERM, signal.SIGINT):
            previous[received_signal] = signal.signal(received_signal, note)
    except ValueError:  # signals belong to the main thread; elsewhere the run cannot be stopped this way
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def token_loss(model: torch.nn.Module, micro_batch: tuple[torch.Tensor, torch.Tensor, int]) -> torch.Tensor:
    """Cross entropy of next tokens, of a micro-batch (inputs, targets, number of targets in the whole step)."""
    x_BT, y_BT, num_targets = micro_batch
    return model(x_BT, y_BT, reduction="sum") / num_targets
