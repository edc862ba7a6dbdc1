"""
The results of an experiment as one HTML page, which needs no other file and no script: charts as SVG and tables.

It has the style sheet of the report's page (report/page.html), so that it follows the system's light or dark colours.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import atomic_path
from nanochat.experiment.statistics import AGAIN, Row, ScalingLaws, deviation, fit_parabola, ladder, mean, mean_margin
from nanochat.report.files import PAGE

WIDTH, HEIGHT = 520, 300  # of a chart, in units of the SVG
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40  # margins, for the axes
LOG_RATIO = 3  # an axis whose values differ by more is logarithmic
DASHES = ("", "8 5", "2 4", "10 4 2 4")  # with the markers they tell series apart in black and white
MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z",
    "M-3-3h6v6h-6Z",
    "M0-4 3.8 3h-7.6Z",
    "M0-4.2 4.2 0 0 4.2-4.2 0Z",
)


@dataclass(frozen=True)
class Series:
    """What a chart draws in one colour."""

    label: str
    points: Mapping[float, Sequence[float]]  # x → values: their mean, their standard deviation and each of them
    is_line: bool = False  # whether the means are joined


@dataclass(frozen=True)
class Interval:
    """A value with half the width of its interval."""

    label: str
    value: float
    margin: float
    look: int  # number of its colour and marker


def write_page(
    path: Path,
    *,
    title: str,
    lead: str,
    figures: Sequence[str],
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]],  # heading and rows, the first of which is the head
    notes: Sequence[str],
) -> None:
    """Writes the page. Titles, cells and notes are text; figures are SVG, made by the functions below."""
    style = re.search(r"<style>.*?</style>", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert style
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        style[0],
        "<style>td, th { white-space: nowrap; }</style>",
        '</head><body><main class="column">',
        f'<div id="head"><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p></div>',
        f'<div class="grid">{"".join(figures)}</div>',
    ]
    for heading, rows in tables:
        lines.append(f"<section><h2>{html.escape(heading)}</h2>{table(rows)}</section>")
    if notes:
        items = "".join(f'<p class="lead" style="margin-top: .5rem">{html.escape(note)}</p>' for note in notes)
        lines.append(f'<section style="padding-bottom: 2.5rem"><h2>How to read this</h2>{items}</section>')
    lines.append("</main></body></html>")
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = ""
    for row in rows[1:]:
        body += f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ---- the charts of an experiment ----


def comparison_charts(results: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[str]:
    """Bits per byte over FLOPs: one chart per depth, with the baseline's ladder and the variants."""
    figures = []
    variants = list(dict.fromkeys(row.variant for row in rows if row.difference and row.variant != AGAIN))
    for depth in sorted({row.depth for row in rows}):
        points: dict[float, list[float]] = {flops: [] for flops in ladder(results, depth)}
        for result in results:
            if result["variant"] == "baseline" and result["depth"] == depth and result["flops"] in points:
                points[result["flops"]].append(result["loss"])
        series = [Series("baseline", points, is_line=True)]
        for variant in variants:
            own = {row.flops: row.values for row in rows if (row.variant, row.depth) == (variant, depth)}
            series.append(Series(variant, own))
        figures.append(chart(f"Depth {depth}", "bits per byte; mean, standard deviation and seeds", series, "FLOPs"))
    return figures


def differences_chart(rows: Sequence[Row]) -> str:
    """The difference of each variant from the baseline in percent, with its 95 % interval."""
    intervals = []
    variants = list(dict.fromkeys(row.variant for row in rows if row.variant != AGAIN))
    for row in rows:
        if row.difference and math.isfinite(row.difference.detectable):
            look = variants.index(row.variant) if row.variant in variants else 0
            value, margin = 100 * row.difference.relative, 100 * row.difference.detectable
            intervals.append(Interval(f"{row.variant}, {row.cell}", value, margin, look))
    return interval_chart("Difference", "from the baseline's loss, with 95 % interval", intervals)


def task_charts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The accuracy of chat models: one chart per task."""
    figures = []
    variants = list(dict.fromkeys(result["variant"] for result in results))
    for task in results[0]["scores"]:
        intervals = []
        for cell, variant in dict.fromkeys((result["cell"], result["variant"]) for result in results):
            same = [result for result in results if (result["cell"], result["variant"]) == (cell, variant)]
            values = [100 * result["scores"][task] for result in same]
            margin = mean_margin(values) if len(values) > 1 else 0.0
            intervals.append(Interval(f"{variant}, {cell}", mean(values), margin, variants.index(variant)))
        figures.append(interval_chart(task, "accuracy, mean over the seeds with 95 % interval", intervals))
    return figures


def interval_chart(title: str, note: str, intervals: Sequence[Interval]) -> str:
    """A row per interval, in percent."""
    left, row_height = 190, 26  # space of the labels; of one row
    height = row_height * len(intervals) + TOP + BOTTOM
    ends = [0.0]
    for interval in intervals:
        ends += [interval.value - interval.margin, interval.value + interval.margin]
    axis = axis_for(ends, left, WIDTH - RIGHT, is_log=False)
    parts = []
    for tick in axis.ticks():
        x = axis(tick)
        parts.append(f'<line class="grid-line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{short(tick)} %</text>')
    parts.append(f'<path class="whisker" d="M{axis(0):.1f} {TOP}V{height - BOTTOM}"/>')
    for i, interval in enumerate(intervals):
        y = TOP + row_height * (i + 0.5)
        low, high = axis(interval.value - interval.margin), axis(interval.value + interval.margin)
        name = html.escape(interval.label)
        parts.append(f'<text class="value" x="{left - 10}" y="{y + 4}" text-anchor="end">{name}</text>')
        whisker = f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"
        parts.append(f'<path d="{whisker}" stroke="var(--c{interval.look % 8})" stroke-width="1.4" fill="none"/>')
        text = f"{interval.label}: {interval.value:.2f} % ± {interval.margin:.2f}"
        parts.append(draw_marker(axis(interval.value), y, interval.look, text))
    return figure(title, note, "".join(parts), height=height)


def miniseries_chart(rows: Sequence[Row]) -> str:
    """Bits per byte over FLOPs: one curve through all depths."""
    series = Series("baseline", {row.flops: row.values for row in rows}, is_line=True)
    return chart("All depths", "bits per byte", [series], "FLOPs")


def scaling_charts(laws: ScalingLaws) -> list[str]:
    """Bits per byte over N per budget, and the best N and D over the budgets."""
    series = []
    for budget, curve in laws.curves.items():
        series.append(Series(f"{short(budget)} FLOPs", {size: [bits] for size, bits in curve.items()}))
    lines = []
    for curve in laws.curves.values():
        parabola = fit_parabola(curve)
        assert parabola
        lines.append({x: parabola(x) for x in spread(min(curve), max(curve), 40)})
    figures = [chart("Equal FLOPs", "bits per byte, with a parabola per budget", series, "parameters N", lines=lines)]
    for title, points, law in (
        ("Best size", laws.parameters, laws.parameters_law),
        ("Best number of tokens", laws.tokens, laws.tokens_law),
    ):
        if law:
            fitted = {x: law(x) for x in points}
            note = f"exponent {law.exponent:.2f}"
            values = Series(title, {x: [y] for x, y in points.items()})
            figures.append(chart(title, note, [values], "FLOPs", lines=[fitted]))
    return figures


# ---- one chart ----


@dataclass(frozen=True)
class Axis:
    """Turns values into positions."""

    low: float
    high: float
    start: float  # position of `low`
    end: float
    is_log: bool

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to eight round values."""
        if not self.is_log:
            rough = (self.high - self.low) / 5
            power = 10 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
            return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = math.log10(self.high / self.low)
        factors = (1,) if decades > 4 else (1, 3) if decades > 1.5 else (1, 1.5, 2, 3, 5, 7)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [factor * 10.0**power for power in powers for factor in factors]
        return [value for value in values if self.low <= value <= self.high]


def spread(low: float, high: float, count: int) -> list[float]:
    """Values from low to high at equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def axis_for(values: Sequence[float], start: float, end: float, *, is_log: bool) -> Axis:
    """An axis with a margin around the values."""
    low, high = min(values), max(values)
    if is_log:
        factor = max((high / low) ** 0.08, 1.08)
        return Axis(low / factor, high * factor, start, end, is_log)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return Axis(low - margin, high + margin, start, end, is_log)


def chart(
    title: str, note: str, series: Sequence[Series], x_name: str, *, lines: Sequence[Mapping[float, float]] = ()
) -> str:
    """A figure. lines: further curves; the i-th has the look of the i-th series."""
    ys = [value for one in series for values in one.points.values() for value in values]
    for line in lines:
        ys += line.values()
    xs = [x for one in series for x in one.points]
    x_axis = axis_for(xs, LEFT, WIDTH - RIGHT, is_log=True)
    y_axis = axis_for(ys, HEIGHT - BOTTOM, TOP, is_log=max(ys) > LOG_RATIO * min(ys))
    parts = [draw_grid(x_axis, y_axis, x_name)]
    for i, line in enumerate(lines):
        parts.append(draw_line(line, x_axis, y_axis, i))
    for i, one in enumerate(series):
        parts.append(draw_series(one, x_axis, y_axis, i))
    legend = ""
    if len(series) > 1:
        legend = "".join(f"<li>{swatch(i)}{html.escape(one.label)}</li>" for i, one in enumerate(series))
        legend = f'<ul class="legend">{legend}</ul>'
    return figure(title, note, "".join(parts), legend=legend)


def figure(title: str, note: str, content: str, *, height: int = HEIGHT, legend: str = "") -> str:
    label = html.escape(f"{title}: {note}; the values are in the tables", quote=True)
    return (
        f'<figure class="card"><figcaption><span>{html.escape(title)}</span><small>{html.escape(note)}</small>'
        f'</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
        f"{content}</svg>{legend}</figure>"
    )


def draw_grid(x_axis: Axis, y_axis: Axis, x_name: str) -> str:
    parts = []
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<line class="grid-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_axis.ticks():
        parts.append(
            f'<text x="{x_axis(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(tick)}</text>'
        )
    name = html.escape(x_name)
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{name}</text>')
    return "".join(parts)


def draw_series(series: Series, x_axis: Axis, y_axis: Axis, look: int) -> str:
    """Each value as a faint dot, mean and standard deviation as a marker with whiskers. The title shows the numbers."""
    color = f"var(--c{look % 8})"
    shift = 10 * ((look + 1) // 2) * (1 if look % 2 else -1)  # beside the baseline, which has the same FLOPs
    parts = []
    if series.is_line:
        means = {x: mean(values) for x, values in series.points.items()}
        parts.append(draw_line(means, x_axis, y_axis, look))
    for x, values in series.points.items():
        middle, spread_of = mean(values), deviation(values)
        place = x_axis(x) + (shift if len(values) > 1 else 0)
        text = f"{series.label}: {middle:.4f}"
        if len(values) > 1:
            text += f" ± {spread_of:.4f}, {len(values)} seeds"
            top, bottom = y_axis(middle + spread_of), y_axis(middle - spread_of)
            whisker = f"M{place:.1f} {top:.1f}V{bottom:.1f}M{place - 4:.1f} {top:.1f}h8M{place - 4:.1f} {bottom:.1f}h8"
            parts.append(f'<path d="{whisker}" stroke="{color}" stroke-width="1.4" fill="none"/>')
            for value in values:
                y = y_axis(value)
                parts.append(f'<circle cx="{place:.1f}" cy="{y:.1f}" r="2" fill="{color}" opacity="0.45"/>')
        parts.append(draw_marker(place, y_axis(middle), look, text))
    return "".join(parts)


def draw_marker(x: float, y: float, look: int, text: str) -> str:
    """text: shown where the mouse points at the marker."""
    return (
        f'<path class="marker" d="{MARKERS[look % 4]}" stroke="var(--c{look % 8})" '
        f'transform="translate({x:.1f} {y:.1f})"><title>{html.escape(text)}</title></path>'
    )


def draw_line(points: Mapping[float, float], x_axis: Axis, y_axis: Axis, look: int) -> str:
    path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in sorted(points.items()))
    dash = DASHES[look % 4]
    return f'<polyline class="curve" points="{path}" stroke="var(--c{look % 8})" stroke-dasharray="{dash}"/>'


def swatch(look: int) -> str:
    color = f"var(--c{look % 8})"
    return (
        f'<svg viewBox="0 0 28 12" aria-hidden="true"><line x1="1" y1="6" x2="27" y2="6" stroke="{color}" '
        f'stroke-width="2" stroke-dasharray="{DASHES[look % 4]}"/><path d="{MARKERS[look % 4]}" fill="var(--raised)" '
        f'stroke="{color}" stroke-width="1.4" transform="translate(14 6)"/></svg>'
    )


def short(value: float) -> str:
    """A number of an axis."""
    return f"{value:.4g}".replace("e+0", "e").replace("e+", "e")
