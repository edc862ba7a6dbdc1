"""What CORE and ChatCORE have in common: accuracies, their confidence intervals, and the mean over tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.96  # 95 % of a normal distribution lie within this many standard deviations of the mean


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

    def to_dict(self) -> dict[str, float]:
        """For the metrics file (logging.py)."""
        low, high = self.interval
        return {
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "centered": self.centered,
            "correct": self.correct,
            "total": self.total,
            "baseline": self.baseline,
        }


def wilson_interval(fraction: float, total: int) -> tuple[float, float]:
    """
    Returns Wilson's 95 % confidence interval of a fraction of `total` trials (https://doi.org/10.1214/ss/1009213286).

    For the mean of numbers between 0 and 1 the interval is wide enough too: among all such numbers with a given mean,
    zeros and ones vary the most.
    """
    z, n = Z_95, total
    center = fraction + z * z / (2 * n)
    spread = z * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def core_metric(scores: Sequence[TaskScore]) -> tuple[float, float]:
    """
    Returns CORE or ChatCORE, the mean of the centered accuracies, and half the width of its 95 % confidence interval.

    The tasks are independent, so their variances add up: the half width of a sum is the root of the sum of the squared
    half widths.
    """
    margins = []
    for score in scores:
        low, high = score.interval
        margins.append((high - low) / 2 / (1 - score.baseline))
    mean = sum(score.centered for score in scores) / len(scores)
    return mean, math.hypot(*margins) / len(scores)
