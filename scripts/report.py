"""
Report what ran, with which settings, how long and with what result: the final numbers as a table, and all of it in
report/report.html (one page, to share) and report.md. Every stage rewrites these files when it starts and ends.

    python -m scripts.report                        # the newest run in the base folder
    python -m scripts.report d12                    # the run with this tag
    python -m scripts.report d12 d16 ~/other/base   # compare runs: tags or base folders
    python -m scripts.report --serve                # a page on this machine that follows the run while it trains
    python -m scripts.report --price 2.5            # dollars per GPU-hour, for the cost in this and later reports

The plots of report.md need matplotlib: pip install 'nanochat[plots]'.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat.cli import NOT_NEGATIVE, Range, command, flag
from nanochat.common import UserError, base_dir
from nanochat.logging import shown
from nanochat.report.files import write_files
from nanochat.report.plots import draw_plots, has_matplotlib
from nanochat.report.reader import all_final_numbers, has_runs, labels, read_run, save_price
from nanochat.report.server import ReportServer


@dataclass(frozen=True)
class Flags:
    runs: list[str] = flag((), "tags in the base folder, or base folders; default: the newest run")
    serve: bool = flag(False, "serve a page on this machine that follows the runs, instead of writing files")
    port: int = flag(8020, "port of --serve; 0 = any free one", Range(0, 65535))
    price: float = flag(
        0.0,
        "dollars per GPU-hour (without GPUs: per hour), kept for later reports; 0 = the last one given, else typical "
        "for the card, if it is known",
        NOT_NEGATIVE,
    )


@command
def main(flags: Flags) -> None:
    places = [find_place(name) for name in flags.runs] or [(base_dir(), "")]
    if flags.serve:
        serve(flags, places)
        return
    runs = read_runs(places, flags.price)
    if flags.price:
        for base, _ in places:
            save_price(base, flags.price)
    for run in runs:
        for warning in run["warnings"]:
            print(f"warning: {warning}")
    columns = {}
    for label, run in zip(labels(runs), runs, strict=True):
        columns[label] = {stage["name"]: stage.get("numbers", {}) for stage in run["stages"]}
    print_numbers(columns if flags.runs else {"value": all_final_numbers(base_dir())})
    folder, name = base_dir() / "report", file_name(flags.runs)
    plots = draw_plots(folder, name, runs)
    write_files(folder, name, runs, plots)
    print(f"written: {folder / name}.html and {name}.md")
    if not plots and not has_matplotlib():
        print("report.md has no plots without matplotlib: pip install 'nanochat[plots]'")


def find_place(name: str) -> tuple[Path, str]:
    """(base folder, tag) of an argument; the tag is empty for a base folder. UserError if it is neither."""
    path = Path(name).expanduser()
    is_tag = Path(name).name == name and not has_runs(path)
    if is_tag:
        return base_dir(), name
    if not path.is_dir():
        raise UserError(f"{name}: there is no such base folder; give a base folder, or a tag in {base_dir()}")
    return path, ""


def read_runs(places: list[tuple[Path, str]], price: float) -> list[dict[str, Any]]:
    return [read_run(base, tag, price) for base, tag in places]


def file_name(names: list[str]) -> str:
    """Name of the files: report, or one that names the runs."""
    return "-".join(["report", *[Path(name).name for name in names]])


def serve(flags: Flags, places: list[tuple[Path, str]]) -> None:
    """Serves the page until Ctrl-C."""
    try:
        server = ReportServer(flags.port, partial(read_runs, places, flags.price))
    except OSError as error:
        raise UserError(f"--port {flags.port} cannot be used ({error.strerror}): choose another --port") from error
    with server, suppress(KeyboardInterrupt):
        print(f"{server.url} follows the run; Ctrl-C ends it", flush=True)
        server.serve_forever()


def print_numbers(columns: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Prints final numbers by stage, with a column for each run. columns: heading → stage → name → number."""
    table = Table("stage", "result", *columns)
    by_run = list(columns.values())
    for stage in dict.fromkeys(stage for column in by_run for stage in column):
        rows = [column.get(stage, {}) for column in by_run]
        for name in dict.fromkeys(name for row in rows for name in row):
            if name != "time":
                table.add_row(stage, escape(name), *[escape(shown(row[name])) if name in row else "" for row in rows])
    Console().print(table)


if __name__ == "__main__":
    main()
