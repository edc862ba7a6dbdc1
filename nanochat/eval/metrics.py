"""How many answers are right, and how sure that is: what CORE and ChatCORE have in common."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskScore:
    label: str
    correct: int
    total: int
    baseline: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, 95 % confidence."""
        return wilson(self.accuracy, self.total)

    @property
    def centered(self) -> float:
        """0 for guessing, 1 for all right."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)


def wilson(share: float, total: int) -> tuple[float, float]:
    """
    Wilson's score interval of a share among `total`, 95 % confidence. Of a mean of numbers between 0 and 1 as well: it
    is then no narrower than need be, for no such numbers vary more than zeros and ones of the same mean do.
    """
    z, n, p = 1.96, total, share
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def core_metric(scores: Sequence[TaskScore]) -> tuple[float, float]:
    """
    CORE or ChatCORE, the mean of the centered scores, and the half width of its 95 % interval: the tasks' half widths
    are centered too, and added as the standard deviations of independent numbers are, for they are multiples of these.
    """
    margins = [(score.interval[1] - score.interval[0]) / 2 / (1 - score.baseline) for score in scores]
    return sum(score.centered for score in scores) / len(scores), math.hypot(*margins) / len(scores)
