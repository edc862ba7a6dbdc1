"""
Static plots for report.md, drawn with matplotlib: a few curves of each training stage, one line per run.

matplotlib is optional (pip install 'nanochat[plots]'), and it takes a second or two to load: a stage that ends rewrites
the report without plots, `python -m scripts.report` draws them.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.common import atomic_path
from nanochat.report.reader import labels

PANELS = (  # metric, title, whether its scale is logarithmic
    ("train/loss", "training loss", False),
    ("val/bpb", "validation, bits per byte", False),
    ("train/grad_norm", "gradient norm", True),
    ("train/tokens_per_second", "tokens per second", False),
    ("rl/reward", "reward", False),
    ("eval/pass@1", "pass@1", False),
)
COLORS = ("#0f766e", "#c2410c", "#4338ca", "#be185d", "#7c6a0a", "#475569")
DASHES = ("-", "--", ":", "-.")  # with the markers they tell curves apart in black and white
MARKERS = ("o", "s", "^", "D", "v", "P")
COLUMNS = 2


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_plots(folder: Path, name: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """
    Draws <name>-<stage>.png for each training stage; returns the names of the files. Empty if matplotlib is not
    installed.
    """
    if not has_matplotlib():
        return []
    from matplotlib.figure import Figure

    names = []
    for stage in dict.fromkeys(stage["name"] for run in runs for stage in run["stages"] if stage.get("curves")):
        panels = [panel for panel in PANELS if any(curve_of(run, stage, panel[0]) for run in runs)]
        if not panels:
            continue
        num_rows = -(-len(panels) // COLUMNS)
        figure = Figure(figsize=(4.6 * COLUMNS, 2.7 * num_rows), layout="constrained")
        figure.suptitle(stage, fontweight="bold")
        for number, (metric, title, is_log) in enumerate(panels, 1):
            axes = figure.add_subplot(num_rows, COLUMNS, number)
            draw_panel(axes, metric, runs, stage)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("steps", fontsize=9)
            if is_log:
                axes.set_yscale("log")
        if len(runs) > 1:
            figure.axes[0].legend(fontsize=8)
        names.append(f"{name}-{stage}.png")
        with atomic_path(folder / names[-1]) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    return names


def draw_panel(axes: Any, metric: str, runs: Sequence[dict[str, Any]], stage: str) -> None:
    """One metric of all runs."""
    names = labels(runs)
    for i, run in enumerate(runs):
        curve = curve_of(run, stage, metric)
        if curve:
            count = len(curve["step"])
            axes.plot(
                curve["step"],
                curve["value"],
                label=names[i],
                color=COLORS[i % len(COLORS)],
                linestyle=DASHES[i % len(DASHES)],
                linewidth=1.4,
                marker=MARKERS[i % len(MARKERS)] if len(runs) > 1 or count < 12 else "",
                markersize=4,
                markevery=max(1, count // 6),
            )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def curve_of(run: dict[str, Any], stage: str, metric: str) -> dict[str, list[float]] | None:
    for found in run["stages"]:
        if found["name"] == stage:
            return found.get("curves", {}).get(metric)
    return None
