"""
Guard rails of training: finds what would silently waste a run, and names the step, the rank and its host.

- loss or gradient norm that is not finite   the run ends, or continues without this step (--skip-bad-steps)
- a jump of the loss                         a warning
- ranks whose weights differ                 the run ends: a rank computed wrongly, or the network altered bits
- a rank that is slower than the others, or a GPU that is slower than it was   a warning with the GPU's clock,
                                             temperature and reasons to slow down (nvidia-smi)

The first two use numbers that the training loop reads anyway. The other two exchange a few bytes between the ranks
every CHECK_EVERY steps. A data loader that stalls is reported where training waits for it (dataloader.prefetch).
"""

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from nanochat.common import UserError
from nanochat.distributed import Dist, warn0, warn_of_rank
from nanochat.hardware import gpu_health

CHECK_EVERY = 100  # steps. The checksum reads all weights: 2 ms at depth 24 on an H100 (its memory bandwidth)
LOSS_WINDOW = 50  # losses that the next one is compared with
MIN_LOSSES = 20  # fewer say too little about the spread
SPIKE_SIGMAS = 6.0  # standard deviations of these losses above their mean (heuristic, not tuned)
SLOW = 1.25  # times as long as the median rank, or as the same GPU took before (heuristic, not tuned)
MAX_NAMED = 8  # ranks in one message


@dataclass(frozen=True)
class RankReport:
    """What each rank tells the others."""

    host: str
    checksum: int  # of its weights
    seconds_per_token: float  # of its forward and backward passes; 0 = not measured


class Stopwatch:
    """
    Measures how long the device computes between start() and stop(). On CUDA it does not wait for the device: call
    `seconds` after something else has.
    """

    def __init__(self, device: torch.device):
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self.times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def seconds(self) -> float:
        if self.events:
            return self.events[0].elapsed_time(self.events[1]) / 1000
        return self.times[1] - self.times[0]

    def _mark(self, which: int) -> None:
        if self.events:
            self.events[which].record()
        else:
            self.times[which] = time.perf_counter()


class Guards:
    """The guard rails of one run, for the training loop."""

    def __init__(self, dist: Dist, skip_bad_steps: int, last_saved: Callable[[], str]):
        self.dist = dist
        self.skip_bad_steps = skip_bad_steps  # in the whole run
        self.last_saved = last_saved  # path of the last checkpoint, for messages
        self.stopwatch = Stopwatch(dist.device)  # for the forward and backward passes of a step
        self.losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self.seconds = 0.0  # of these passes since the last check
        self.tokens = 0  # of this rank in this time
        self.fastest = math.inf  # seconds per token of this rank in the fastest interval between two checks

    def skip_or_stop(self, problem: str, where: str, own_loss: float, num_skipped: int) -> None:
        """
        Called on all ranks when the loss or the gradient norm over all ranks is not finite. Returns if the step may be
        skipped, otherwise raises UserError. where: step and position in the data of this rank.
        """
        reports = self.dist.gather((math.isfinite(own_loss), f"{where}, {self.dist.name}"))
        bad = [place for is_finite, place in reports if not is_finite] or [place for _, place in reports]
        problem += f" at {_listed(bad)}"
        if num_skipped >= self.skip_bad_steps:
            skipped = f" ({num_skipped} bad steps were skipped before)" if num_skipped else ""
            remedy = "to leave out such steps, use --skip-bad-steps N"
            raise UserError(f"{problem}{skipped}; last checkpoint: {self.last_saved()}; {remedy}")
        warn0(f"{problem}: step skipped, {self.skip_bad_steps - num_skipped - 1} more may be")

    def check_loss(self, loss: float, where: str) -> None:
        """Warns if the loss of a step is far above those before it."""
        if len(self.losses) >= MIN_LOSSES:
            mean = statistics.fmean(self.losses)
            deviation = statistics.stdev(self.losses)
            if loss > mean + SPIKE_SIGMAS * deviation > mean:
                before = f"{mean:.3f} ± {deviation:.3f} in the {len(self.losses)} steps before"
                warn0(f"the loss jumped to {loss:.3f} at {where}; it was {before}")
                self.losses.clear()  # one warning per spike
        self.losses.append(loss)

    def note_time(self, num_tokens: int) -> None:
        """Adds what the stopwatch measured in this step, for this rank's tokens. The device must be synchronized."""
        self.seconds += self.stopwatch.seconds()
        self.tokens += num_tokens

    def check_ranks(self, params: Iterable[torch.Tensor], step: int) -> None:
        """
        Compares the weights and the speed of all ranks; all of them have to call it. UserError if weights that should
        be equal differ.
        """
        seconds_per_token = self.seconds / self.tokens if self.tokens else 0.0
        self.seconds, self.tokens = 0.0, 0
        checksum = weight_checksum(params) if self.dist.world_size > 1 else 0
        reports = self.dist.gather(RankReport(self.dist.host, checksum, seconds_per_token))
        self._check_weights(reports, step)
        self._check_speed(reports, step)

    def _check_weights(self, reports: list[RankReport], step: int) -> None:
        by_checksum = Counter(report.checksum for report in reports)
        if len(by_checksum) == 1:
            return
        most_common, count = by_checksum.most_common(1)[0]
        has_majority = count > len(reports) / 2
        names = [
            f"rank {rank} on {report.host}"
            for rank, report in enumerate(reports)
            if report.checksum != most_common or not has_majority
        ]
        differ = "differ from those of the other ranks" if has_majority else "differ from each other"
        raise UserError(
            f"after step {step} the weights of {_listed(names)} {differ}: continue with --resume from a checkpoint "
            "before it; if it happens there again, that GPU or its host's memory is damaged"
        )

    def _check_speed(self, reports: list[RankReport], step: int) -> None:
        """The slow rank itself prints the warning: only its host can ask its GPU."""
        own = reports[self.dist.rank].seconds_per_token
        if not own:
            return
        median = statistics.median_low([report.seconds_per_token for report in reports])
        problem = ""
        if median and own > SLOW * median:
            problem = f"takes {own / median:.2f} times as long here as on the median rank"
        elif self.dist.device.type == "cuda" and own > SLOW * self.fastest:
            problem = f"takes {own / self.fastest:.2f} times as long here as before"
        self.fastest = min(self.fastest, own)
        if problem:
            health = gpu_health(self.dist.device)
            reasons = f": {health}" if health else ""
            warn_of_rank(f"training {problem} in the {CHECK_EVERY} steps before step {step}{reasons}")


def weight_checksum(params: Iterable[torch.Tensor]) -> int:
    """The sum of the bit patterns of all weights as integers: any single change changes it."""
    integers = {2: torch.int16, 4: torch.int32}
    sums = [p.detach().view(integers[p.element_size()]).sum() for p in params]
    return int(torch.stack(sums).sum())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return "; ".join(names[:MAX_NAMED]) + more
