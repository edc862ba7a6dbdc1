"""What CORE and ChatCORE have in common: accuracies, their confidence intervals, and the mean over tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.96  # standard deviations on both sides of the mean that hold 95 % of a normal distribution


@dataclass(frozen=True)
class TaskScore:
    label: str
    correct: int
    total: int
    baseline: float  # accuracy of guessing, 0 … 1

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy."""
        return wilson_interval(self.accuracy, self.total)

    @property
    def centered(self) -> float:
        """The accuracy rescaled so that guessing is 0 and all correct is 1."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)


def wilson_interval(share: float, total: int) -> tuple[float, float]:
    """
    Wilson's 95 % confidence interval of a share among `total` trials (https://doi.org/10.1214/ss/1009213286).

    It also holds for the mean of numbers between 0 and 1, where it is wide enough or wider: among all such numbers of
    one mean, zeros and ones vary the most.
    """
    z, n = Z_95, total
    center = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def core_metric(scores: Sequence[TaskScore]) -> tuple[float, float]:
    """
    Returns CORE or ChatCORE, the mean of the centered accuracies, and half the width of its 95 % confidence interval.

    The tasks are independent, so the half widths, which are multiples of standard deviations, add up in squares.
    """
    margins = []
    for score in scores:
        low, high = score.interval
        margins.append((high - low) / 2 / (1 - score.baseline))
    mean = sum(score.centered for score in scores) / len(scores)
    return mean, math.hypot(*margins) / len(scores)
