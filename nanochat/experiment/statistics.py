"""
The statistics of experiments: is a variant better than the baseline, and how much compute does that save?

A cell is one depth with one budget; in each cell the baseline and the variants are trained with several seeds, and the
result of a run is its validation loss in bits per byte (less is better). With chat models a cell is one base model, and
the result is the error, 1 - ChatCORE or 1 - mean accuracy.

Is a difference real? Per cell, Welch's t-test of the variant's seeds against those of the baseline: two-sided, with the
variance of each group and the degrees of freedom of Welch and Satterthwaite. Three seeds of a variant and six of the
baseline give 2 to 7 degrees of freedom, so that a difference has to be 2.4 to 4.3 standard errors, not just 2. The
verdict is "better" or "worse" only if p < 0.05 with the same sign at two depths, and at no depth with the other sign.
If the results are normally distributed, a variant without any effect passes that at two depths with probability
2 x 0.025^2 = 0.13 %; with k variants, one of them passes k times as often. "Not shown" is everything else: it does not
mean that there is no difference. The seeds are not paired, although runs with one seed have the same initial weights
and order of data: in long runs their results become independent, and then a paired test of three seeds finds less.

The noise floor is the baseline against itself: a second set of seeds, compared like a variant. The smallest difference
that a test could find (`Difference.detectable`) is given with each comparison.

What is it worth? The compute multiplier is the FLOPs that the baseline needs for the variant's bits per byte, divided
by those of the variant: 1.1 means that the baseline needs 10 % more. They are interpolated between runs of the baseline
with other budgets (the ladder), linearly in the logarithms of FLOPs and of bits per byte. Its interval is that of the
t-test, 95 %, carried through the interpolation; the ladder is taken as exact.

Scaling laws (arXiv 2203.15556, approach 2): for each budget a parabola through bits per byte over log N, whose minimum
is N_opt, with D_opt tokens; then N_opt and D_opt as powers of the FLOPs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

ALPHA = 0.05
DEPTHS_NEEDED = 2


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))


# ---- is it better? ----


@dataclass(frozen=True)
class Difference:
    """Welch's t-test of a variant against the baseline."""

    value: float  # mean of the variant - mean of the baseline
    relative: float  # the same as a share of the baseline's mean
    error: float  # standard error of `value`; NaN if one of the two has only one seed
    p: float  # two-sided; NaN likewise
    margin: float  # half the width of the 95 % interval of `value`; NaN likewise
    detectable: float  # the smallest difference with p < ALPHA: `margin` as a share of the baseline's mean

    @property
    def is_shown(self) -> bool:
        return self.p < ALPHA


def compare(baseline: Sequence[float], variant: Sequence[float]) -> Difference:
    """Compares the results of a variant's seeds with those of the baseline's."""
    value = mean(variant) - mean(baseline)
    center = mean(baseline) or math.nan  # chat models may make no error
    relative = value / center
    if min(len(baseline), len(variant)) < 2:
        return Difference(value, relative, math.nan, math.nan, math.nan, math.nan)
    parts = [deviation(group) ** 2 / len(group) for group in (baseline, variant)]
    error = math.sqrt(sum(parts))
    if error == 0:  # the seed changes nothing: then every difference is real
        p = 0.0 if value else 1.0
        return Difference(value, relative, 0.0, p, 0.0, 0.0)
    squares = parts[0] ** 2 / (len(baseline) - 1) + parts[1] ** 2 / (len(variant) - 1)
    freedom = sum(parts) ** 2 / squares
    margin = t_quantile(freedom) * error
    return Difference(value, relative, error, t_test_p(value / error, freedom), margin, margin / center)


def mean_margin(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of at least two values."""
    return t_quantile(len(values) - 1) * deviation(values) / math.sqrt(len(values))


def t_test_p(t: float, freedom: float) -> float:
    """
    The two-sided p-value of a t statistic, for at least one degree of freedom.

    With t = sqrt(freedom) tan(angle), the density is proportional to cos(angle)^(freedom - 1) on a finite range, which
    Simpson's rule integrates to 6 digits.

    >>> round(t_test_p(2.776, 4), 4)
    0.05
    """
    start = math.atan(abs(t) / math.sqrt(freedom))
    angles = np.linspace(start, math.pi / 2, 401)
    heights = np.cos(angles).clip(min=0) ** (freedom - 1)
    area = (angles[1] - start) / 3 * (heights[0] + heights[-1] + 4 * heights[1::2].sum() + 2 * heights[2:-1:2].sum())
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    return min(1.0, 2 * math.exp(log_scale) * float(area))


def t_quantile(freedom: float, alpha: float = ALPHA) -> float:
    """The t statistic whose two-sided p-value is alpha."""
    low, high = 0.0, 1e4
    for _ in range(50):
        middle = (low + high) / 2
        if t_test_p(middle, freedom) > alpha:
            low = middle
        else:
            high = middle
    return high


def verdict(differences: Mapping[tuple[int, str], Difference]) -> str:
    """ "better", "worse" or "not shown", from the comparisons of a variant by (depth, cell)."""
    better = {depth for (depth, _), difference in differences.items() if difference.is_shown and difference.value < 0}
    worse = {depth for (depth, _), difference in differences.items() if difference.is_shown and difference.value > 0}
    if len(better) >= DEPTHS_NEEDED and not worse:
        return "better"
    if len(worse) >= DEPTHS_NEEDED and not better:
        return "worse"
    return "not shown"


# ---- what is it worth? ----


@dataclass(frozen=True)
class Multiplier:
    """Compute that the baseline needs for the variant's bits per byte, as a multiple of the variant's."""

    value: float
    low: float  # ends of the 95 % interval; NaN with one seed
    high: float
    is_extrapolated: bool  # the variant's bits per byte are outside of the ladder


def flops_needed(ladder: Mapping[float, float], bits: float) -> float:
    """
    The FLOPs with which the baseline reaches `bits`, from its bits per byte by FLOPs: interpolated between the
    neighbouring budgets, or extrapolated from the two at the end. NaN if there are fewer than two budgets, or if more
    FLOPs do not make the baseline better there.

    >>> round(flops_needed({1e15: 1.0, 4e15: 0.5}, 0.5**0.5) / 1e15, 3)
    2.0
    """
    if min(bits, *ladder.values()) <= 0:
        return math.nan
    points = sorted((math.log(flops), math.log(value)) for flops, value in ladder.items())
    wanted = math.log(bits)
    segments = list(zip(points, points[1:], strict=False))
    if not segments:
        return math.nan
    inside = [segment for segment in segments if segment[0][1] >= wanted >= segment[1][1]]
    ends = segments[0] if wanted > points[0][1] else segments[-1]
    (x0, y0), (x1, y1) = inside[0] if inside else ends
    if y1 >= y0:
        return math.nan
    return math.exp(x0 + (wanted - y0) / (y1 - y0) * (x1 - x0))


def compute_multiplier(ladder: Mapping[float, float], bits: float, margin: float, flops: float) -> Multiplier:
    """
    ladder: the baseline's mean bits per byte by FLOPs, at the variant's depth. bits, margin: the variant's mean and the
    half width of the interval of its difference from the baseline. flops: of one run of the variant.
    """
    value, high, low = (flops_needed(ladder, level) / flops for level in (bits, bits - margin, bits + margin))
    is_outside = not min(ladder.values()) <= bits <= max(ladder.values())
    return Multiplier(value, low, high, is_outside)


# ---- scaling laws ----


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent."""

    factor: float
    exponent: float

    def __call__(self, x: float) -> float:
        return self.factor * x**self.exponent


def fit_power_law(points: Mapping[float, float]) -> PowerLaw | None:
    """The least-squares line through y by x in logarithms; None for fewer than two points."""
    if len(points) < 2:
        return None
    slope, intercept = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)
    return PowerLaw(math.exp(intercept), float(slope))


@dataclass(frozen=True)
class Parabola:
    """y = a z^2 + b z + c with z = log x."""

    a: float
    b: float
    c: float

    def __call__(self, x: float) -> float:
        z = math.log(x)
        return (self.a * z + self.b) * z + self.c


def fit_parabola(points: Mapping[float, float]) -> Parabola | None:
    """The least-squares parabola through y by x; None for fewer than three points."""
    if len(points) < 3:
        return None
    coefficients = np.polyfit(np.log(list(points)), list(points.values()), 2)
    return Parabola(*(float(value) for value in coefficients))


def optimum(points: Mapping[float, float]) -> float | None:
    """The x at the minimum of the parabola through y by x; None if there is none between the first x and the last."""
    parabola = fit_parabola(points)
    if parabola is None or parabola.a <= 0:
        return None
    best = math.exp(-parabola.b / (2 * parabola.a))
    return best if min(points) <= best <= max(points) else None


# ---- from the results of runs ----

BASELINE = "baseline"
AGAIN = "baseline again"  # the row with the noise floor


@dataclass(frozen=True)
class Row:
    """One variant in one cell, over its seeds."""

    variant: str
    cell: str
    depth: int
    values: tuple[float, ...]  # bits per byte; of chat models the error, 1 - ChatCORE or 1 - mean accuracy
    flops: float  # of one run, the mean over the seeds
    tokens: float  # likewise
    seconds: tuple[float, ...]  # of training, per seed
    difference: Difference | None = None  # from the baseline; None for the baseline itself
    compute: Multiplier | None = None  # None without a ladder
    time: Multiplier | None = None  # seconds in place of FLOPs; None without a ladder


def summarize(results: Sequence[Mapping[str, Any]], num_seeds: int) -> list[Row]:
    """
    The rows of an experiment by cell: the baseline, its second set of seeds (those above num_seeds) compared with the
    first, and the variants compared with all seeds of the baseline. Trials that have no result yet are left out.
    """
    rows = []
    compared = [result for result in results if result["role"] == "compared"]
    for depth, _, name in sorted({(result["depth"], result["budget"], result["cell"]) for result in compared}):
        cell = [result for result in compared if result["cell"] == name]
        baseline = [result for result in cell if result["variant"] == BASELINE]
        if not baseline:
            continue
        steps = ladder(results, depth)
        rows.append(row_of(BASELINE, baseline))
        first = [result for result in baseline if result["seed"] <= num_seeds]
        second = [result for result in baseline if result["seed"] > num_seeds]
        if first and second:
            rows.append(compared_row(AGAIN, second, first, steps))
        for variant in dict.fromkeys(result["variant"] for result in cell):
            if variant != BASELINE:
                own = [result for result in cell if result["variant"] == variant]
                rows.append(compared_row(variant, own, baseline, steps))
    return rows


def ladder(results: Sequence[Mapping[str, Any]], depth: int) -> dict[float, float]:
    """The baseline's mean bits per byte by FLOPs at a depth, over all of its budgets."""
    values: dict[float, list[float]] = {}
    for result in results:
        if result["variant"] == BASELINE and result["depth"] == depth and result["role"] != "timing":
            values.setdefault(result["flops"], []).append(result["loss"])
    return {flops: mean(group) for flops, group in sorted(values.items())}


def row_of(variant: str, results: Sequence[Mapping[str, Any]]) -> Row:
    """The row of a variant in one cell, without a comparison."""
    return Row(
        variant,
        results[0]["cell"],
        results[0]["depth"],
        values=tuple(result["loss"] for result in results),
        flops=mean([result["flops"] for result in results]),
        tokens=mean([result["tokens"] for result in results]),
        seconds=tuple(result["seconds"] for result in results),
    )


def compared_row(
    variant: str,
    results: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]],
    steps: Mapping[float, float],  # the ladder
) -> Row:
    """The row of a variant in one cell, compared with the baseline."""
    row, reference = row_of(variant, results), row_of(BASELINE, baseline)
    difference = compare(reference.values, row.values)
    row = replace(row, difference=difference)
    if len(steps) < 2:
        return row
    compute = compute_multiplier(steps, mean(row.values), difference.margin, row.flops)
    speed = compare(
        [reference.flops / seconds for seconds in reference.seconds], [row.flops / seconds for seconds in row.seconds]
    )
    return replace(row, compute=compute, time=time_multiplier(compute, speed))


def time_multiplier(compute: Multiplier, speed: Difference) -> Multiplier:
    """speed: of the variant compared with the baseline, in FLOPs per second. Its interval widens that of `compute`."""
    factor, margin = 1 + speed.relative, speed.detectable
    return Multiplier(
        compute.value * factor,
        compute.low * max(factor - margin, 0.0),
        compute.high * (factor + margin),
        compute.is_extrapolated,
    )


def summarize_task(results: Sequence[Mapping[str, Any]], num_seeds: int, task: str) -> list[Row]:
    """The same as `summarize` for one task of chat models: the values are 1 - accuracy."""
    errors = [{**result, "loss": 1 - result["scores"][task]} for result in results]
    return summarize(errors, num_seeds)


def verdicts(rows: Sequence[Row]) -> dict[str, str]:
    """The verdict on each variant."""
    found: dict[str, dict[tuple[int, str], Difference]] = {}
    for row in rows:
        if row.difference:
            found.setdefault(row.variant, {})[row.depth, row.cell] = row.difference
    return {variant: verdict(differences) for variant, differences in found.items()}


@dataclass(frozen=True)
class ScalingLaws:
    """The best models of several budgets of FLOPs."""

    curves: dict[float, dict[float, float]]  # budget → parameters N → bits per byte
    parameters: dict[float, float]  # budget → N_opt, where the parabola has a minimum between the trained models
    tokens: dict[float, float]  # budget → D_opt, likewise
    parameters_law: PowerLaw | None  # of N_opt; None for fewer than two budgets with a minimum
    tokens_law: PowerLaw | None


def fit_scaling_laws(results: Sequence[Mapping[str, Any]]) -> ScalingLaws | None:
    """The laws of the baseline's runs; None if no budget was trained with three depths."""
    curves: dict[float, dict[float, float]] = {}
    parameters: dict[float, float] = {}
    tokens: dict[float, float] = {}
    compared = [result for result in results if result["variant"] == BASELINE and result["role"] == "compared"]
    for budget in sorted({result["budget"] for result in compared}):
        cell = [result for result in compared if result["budget"] == budget]
        sizes = sorted({result["parameters"] for result in cell})
        if len(sizes) < 3:
            continue
        bits = {}
        horizons = {}
        for size in sizes:
            same = [result for result in cell if result["parameters"] == size]
            bits[size] = mean([result["loss"] for result in same])
            horizons[size] = mean([result["tokens"] for result in same])
        curves[budget] = bits
        best = optimum(bits)
        if best:
            parameters[budget] = best
            tokens[budget] = math.exp(np.interp(math.log(best), np.log(sizes), np.log(list(horizons.values()))))
    if not curves:
        return None
    return ScalingLaws(curves, parameters, tokens, fit_power_law(parameters), fit_power_law(tokens))
