r"""
Compare variants of the training recipe with the baseline: over depths and seeds, at equal FLOPs or equal time.

    python -m scripts.experiment "warmdown=--warmdown-ratio 0.85 --final-lr-frac 0" "lr=--matrix-lr 0.03" \
        --name schedule --depths 4,6 --seeds 3 --train-flags "--head-dim 64 --max-seq-len 512"
    python -m scripts.experiment gains@rms-gains --name gains --equal time          # the code of a branch or commit
    python -m scripts.experiment --name laws --depths 4,6,8 --flops 1e15,3e15,1e16 --seeds 1   # scaling laws
    python -m scripts.experiment "sums=--identity-file sums.jsonl" --name mix --stage sft --base-tags d4,d6 \
        --eval-flags "-a QuizFree,Sums" --train-flags "--num-iterations 100"        # chat models

A variant is NAME=FLAGS (flags of base_train), NAME@REF (a git branch or commit, checked out in a worktree) or both:
NAME@REF=FLAGS. The baseline is the code of this folder with --train-flags only. Each run is a base_train in a separate
process. At equal FLOPs its budget is that of the baseline's recipe at the depth, or each of --flops. With --equal time
a first run of each variant measures its speed, and the budgets of the others follow from that.

Without GPUs the runs take turns, all variants with one seed before the next seed, so that a machine that becomes slower
or faster changes all of them alike. With GPUs there is one run per GPU. The baseline also runs with a second set of
seeds, for the noise floor, and with the budgets of --ladder, for the compute multiplier. How a difference is judged:
nanochat/experiment/statistics.py.

    <base>/experiments/<name>/results.jsonl    a line per run: flags, commit, seed, bits per byte, FLOPs, seconds
    <base>/experiments/<name>/report.html      charts and tables
    <base>/experiments/<name>/<tag>.log        what a run printed

With --stage sft each run is a chat_sft, from each of --base-tags in place of the depths, and a chat_eval. It is judged
by its error: 1 - ChatCORE, or 1 - mean accuracy of other tasks. All runs have the steps that --train-flags gives them.

The same command again continues an experiment that was stopped, and shows the results of one that is complete.
"""

import io
import math
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from nanochat import planner, recipe
from nanochat.checkpoint_manager import find
from nanochat.cli import COUNT, DEPTH, POSITIVE, command, flag, parse
from nanochat.common import UserError, base_dir, exclusive_lock, human
from nanochat.experiment import page
from nanochat.experiment import statistics as stats
from nanochat.experiment.trials import Results, Runner, Trial, checkout, find_slots
from nanochat.logging import print_table
from nanochat.report.sessions import commit as current_commit
from scripts import base_train, chat_eval, chat_sft

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"base": base_train, "sft": chat_sft}
CHOSEN_HERE = {  # flags that a variant cannot have
    "base": ("depth", "seed", "model_tag", "resume", "plan", "for_", "hours", "budget"),
    "sft": ("base_tag", "base_step", "source", "seed", "model_tag", "resume", "plan", "for_"),
}
HORIZON = {  # flags that must be the same in all variants
    "base": ("num_iterations", "target_flops", "target_param_data_ratio"),
    "sft": ("num_iterations", "total_batch_size"),
}
DEFAULTS = ("--eval-every", "0", "--sample-every", "-1", "--save-minutes", "10", "--keep-last", "1")

NOTES = (
    "Verdict: better or worse if a t-test (Welch's, p < 0.05) finds a difference of the same sign at two depths, and "
    "at no depth one of the other sign. At two depths, a variant without any effect passes that once in 800 times. Not "
    "shown does not mean that there is no difference: detectable is the smallest one that the test could have found.",
    "Baseline again: a second set of seeds compared with the first, the noise floor.",
    "Compute: FLOPs that the baseline needs for the variant's bits per byte, divided by the variant's, interpolated "
    "between runs of the baseline with other budgets; with a 95 % interval. Time: the same for seconds of training.",
)


@dataclass(frozen=True)
class Flags:
    variants: list[str] = flag((), "NAME=FLAGS, NAME@REF or NAME@REF=FLAGS; none = only the baseline")
    name: str = flag("experiment", "name of the experiment, and the start of the tags of its runs")
    stage: str = flag("base", "what is trained", choices=tuple(SCRIPTS))
    train_flags: str = flag("", "flags of base_train, or of chat_sft, for all runs")
    base_tags: str = flag("", "with --stage sft: comma-separated base models to train on")
    eval_flags: str = flag("", "with --stage sft: flags of chat_eval")
    depths: tuple[int, ...] = flag((4, 6), "depths to train", DEPTH)
    flops: tuple[float, ...] = flag(
        (), "budgets of training FLOPs; default: that of the recipe at each depth", POSITIVE
    )
    seeds: int = flag(
        3, "seeds of each variant; the baseline has twice as many, half of them for the noise floor", COUNT
    )
    equal: str = flag("flops", "what the runs of a depth have in common", choices=("flops", "time"))
    ladder: tuple[float, ...] = flag(
        (0.7, 1.4), "further budgets of the baseline, as multiples, for the compute multiplier", POSITIVE
    )
    gpus_per_run: int = flag(1, "GPUs of one run", COUNT)
    keep_checkpoints: bool = flag(False, "keep the models of finished runs")
    plan: bool = flag(False, "print how many runs are missing and the results so far, and train nothing")


@dataclass(frozen=True)
class Variant:
    """Flags, and the code that they are given to."""

    name: str
    flags: tuple[str, ...]  # of base_train or chat_sft, besides those of all runs
    code: Path
    commit: str


@dataclass(frozen=True)
class Cell:
    """One depth with one budget, or one base model, in which variants are compared."""

    depth: int
    budget: float  # FLOPs; 1 for chat_sft
    name: str  # in tags: the depth and a budget that is not the recipe's, or the base model
    base_tag: str  # of the base model, for chat_sft
    parameters: int  # N of the baseline's model (recipe.scaling_params)


@command
def main(flags: Flags) -> list[stats.Row]:
    """Trains what is missing and reports; returns the rows of the table."""
    check_name("--name", flags.name)
    folder = base_dir() / "experiments" / flags.name
    with exclusive_lock(folder / "lock", f"{folder} is in use by another process: wait for it, or use another --name"):
        experiment = Experiment.read(flags, folder)
        experiment.check()
        results = Results(folder)
        device = parse_flags(flags.stage, stats.BASELINE, experiment.shared).device
        slots = find_slots(device, flags.gpus_per_run)
        runner = Runner(folder, results, slots, keep_checkpoints=flags.keep_checkpoints)
        if flags.equal == "time":
            run(experiment.timing_trials(), runner, flags)
        trials = experiment.trials(results)
        run(trials, runner, flags)
        found = [result for result in map(results.find, trials) if result]
        rows = report(flags, found, folder) if found else []
    if runner.failures:
        raise UserError(f"{len(runner.failures)} runs failed, the first one: {runner.failures[0]}")
    return rows


def run(trials: list[Trial], runner: Runner, flags: Flags) -> None:
    """Runs the trials that have no result yet; with --plan it only prints how many they are."""
    missing = [trial for trial in trials if not runner.results.find(trial)]
    flops = sum(trial.flops for trial in missing)
    cost = f", which take {flops:.2e} FLOPs" if flops else ""
    print(f"{flags.name}: {len(trials)} runs, {len(missing)} without a result yet{cost}", flush=True)
    if not flags.plan:
        runner.run(missing)


# ---- what is compared ----


@dataclass(frozen=True)
class Experiment:
    """The grid of variants, cells and seeds."""

    flags: Flags
    shared: tuple[str, ...]  # flags of base_train or chat_sft for all runs
    evaluation: tuple[str, ...]  # flags of chat_eval
    variants: list[Variant]  # the first one is the baseline
    cells: list[Cell]

    @classmethod
    def read(cls, flags: Flags, folder: Path) -> "Experiment":
        """The experiment that the flags describe. UserError names what is wrong."""
        shared = split("--train-flags", flags.train_flags)
        variants = [Variant(stats.BASELINE, (), ROOT, current_commit())]
        variants += [read_variant(text, folder) for text in flags.variants]
        names = [variant.name for variant in variants]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two variants are named {name!r}: give them different names")
        cells = find_base_models(flags) if flags.stage == "sft" else find_cells(flags, shared)
        evaluation = read_evaluation(flags)
        return cls(flags, shared, evaluation, variants, cells)

    def check(self) -> None:
        """UserError if the training script would refuse the flags of a run."""
        for variant, cell in product(self.variants, self.cells):
            self.check_variant(variant, cell)

    def check_variant(self, variant: Variant, cell: Cell) -> None:
        own = (*self.shared, *variant.flags)
        fixed = self.cell_flags(cell, cell.budget)
        stage = self.flags.stage
        if variant.code != ROOT:  # other code may have other flags, so it checks them, without measuring this machine
            module = SCRIPTS[stage].__name__
            command = [sys.executable, "-m", module, *own, *fixed, "--plan", "--for", "1xH100"]
            done = subprocess.run(command, cwd=variant.code, capture_output=True, text=True)
            if done.returncode:
                message = done.stderr.strip().splitlines()[-1].removeprefix("error: ")
                raise UserError(f"flags of {variant.name}: {message}")
            return
        given, shared = parse_flags(stage, variant.name, own), parse_flags(stage, variant.name, self.shared)
        default = SCRIPTS[stage].Flags()
        for name in CHOSEN_HERE[stage]:
            if getattr(given, name) != getattr(default, name):
                word = f"--{name.rstrip('_').replace('_', '-')}"
                raise UserError(f"flags of {variant.name}: scripts.experiment chooses {word}, leave it out")
        for name in HORIZON[stage]:
            if getattr(given, name) != getattr(shared, name):
                raise UserError(f"flags of {variant.name}: all variants have the same budget, give it in --train-flags")
        if stage == "base":
            try:
                recipe.derive(parse_flags(stage, variant.name, (*own, *fixed)), planner.planned_vocab_size())
            except UserError as error:
                raise UserError(f"flags of {variant.name} at depth {cell.depth}: {error}") from error

    def cell_flags(self, cell: Cell, flops: float) -> tuple[str, ...]:
        """The flags that put a run into a cell. flops: of the run."""
        if self.flags.stage == "sft":
            return ("--base-tag", cell.base_tag)
        return ("--depth", str(cell.depth), "--target-flops", repr(flops), "--num-iterations", "-1")

    def timing_trials(self) -> list[Trial]:
        """One run of each variant at equal FLOPs, for its speed; its bits per byte count for nothing."""
        return [
            self.trial(variant, cell, seed=0, role="timing", flops=cell.budget)
            for cell, variant in product(self.cells, self.variants)
        ]

    def trials(self, results: Results) -> list[Trial]:
        """All other runs, in the order in which they take turns."""
        baseline, *others = self.variants
        num_seeds = self.flags.seeds
        found = []
        for seed, cell in product(range(1, num_seeds + 1), self.cells):
            found.append(self.trial(baseline, cell, seed=seed, role="compared", flops=cell.budget))
            for variant in others:
                speed = self.speed(variant, cell, results)
                if speed:
                    flops = speed * cell.budget
                    found.append(self.trial(variant, cell, seed=seed, role="compared", flops=flops))
            if others:
                found.append(self.trial(baseline, cell, seed=seed + num_seeds, role="compared", flops=cell.budget))
                for factor in self.flags.ladder if self.flags.stage == "base" else ():
                    flops = factor * cell.budget
                    found.append(self.trial(baseline, cell, seed=seed, role="ladder", flops=flops))
        return found

    def speed(self, variant: Variant, cell: Cell, results: Results) -> float:
        """
        With --equal time, FLOPs per second of a variant as a multiple of the baseline's; 0 if they were not measured,
        with --plan or because the run failed. Else 1.
        """
        if self.flags.equal == "flops":
            return 1.0
        speeds = []
        for timed in (variant, self.variants[0]):
            result = results.find(self.trial(timed, cell, seed=0, role="timing", flops=cell.budget))
            if not result:
                return 0.0
            speeds.append(result["flops"] / result["seconds"])
        return speeds[0] / speeds[1]

    def trial(self, variant: Variant, cell: Cell, *, seed: int, role: str, flops: float) -> Trial:
        """One run. flops: its own budget, which differs from the cell's on the ladder and at equal time."""
        kind = {"compared": "", "timing": "timing", "ladder": f"x{flops / cell.budget:g}"}[role]
        # The commit of a branch is part of the tag: when the branch has moved, its runs are trained again.
        commit = variant.commit if variant.code != ROOT else ""
        parts = (self.flags.name, variant.name, commit, cell.name, kind, f"s{seed}")
        own = (*DEFAULTS, *self.shared, *variant.flags, *self.cell_flags(cell, flops))
        return Trial(
            stage=self.flags.stage,
            tag="-".join(part for part in parts if part),
            variant=variant.name,
            cell=cell.name,
            depth=cell.depth,
            budget=cell.budget,
            role=role,
            seed=seed,
            flops=0.0 if self.flags.stage == "sft" else flops,
            parameters=cell.parameters,
            argv=(*own, "--seed", str(seed), "--resume"),
            evaluation=self.evaluation,
            code=variant.code,
            commit=variant.commit,
        )


def check_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{what} {name!r}: use letters, digits and . - _ only")


def split(what: str, text: str) -> tuple[str, ...]:
    """The words of a command line."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{what} {text!r}: {error}, close the quotation mark") from error


def read_variant(text: str, folder: Path) -> Variant:
    """The variant that a word of the command line describes; checks out its branch or commit."""
    found = re.fullmatch(r"([^@=]+)(?:@([^=]+))?(?:=(.*))?", text, re.DOTALL)
    if not found or (found[2] is None and found[3] is None):
        raise UserError(f"variant {text!r}: write NAME=FLAGS, NAME@REF or NAME@REF=FLAGS")
    name, ref, words = found.groups()
    check_name("variant", name)
    if name.startswith(stats.BASELINE):
        raise UserError(f"variant {name!r}: that is the name of the runs with --train-flags only, choose another one")
    code, commit = checkout(ROOT, ref, folder / "worktrees") if ref else (ROOT, current_commit())
    return Variant(name, split(f"variant {name}", words or ""), code, commit)


def find_cells(flags: Flags, shared: tuple[str, ...]) -> list[Cell]:
    """The cells of the experiment, with the budgets of --flops or of the baseline's recipe."""
    vocab_size = planner.planned_vocab_size()
    cells = []
    for depth in flags.depths:
        plan = recipe.derive(parse_flags("base", stats.BASELINE, (*shared, "--depth", str(depth))), vocab_size)
        parameters = recipe.scaling_params(plan.model)
        budgets = {f"d{depth}-{flops:g}".replace("+", ""): flops for flops in flags.flops} or {f"d{depth}": plan.flops}
        cells += [Cell(depth, flops, name, "", parameters) for name, flops in budgets.items()]
    return cells


def find_base_models(flags: Flags) -> list[Cell]:
    """The cells of an experiment with chat_sft: one per base model."""
    if not flags.base_tags:
        raise UserError("--stage sft trains on base models: name them, as in --base-tags d4,d6")
    if flags.equal == "time" or flags.flops:
        raise UserError(
            "--equal time and --flops are for --stage base: give chat_sft --num-iterations in --train-flags"
        )
    cells = []
    for tag in flags.base_tags.split(","):
        config = find("base", tag).config
        cells.append(Cell(config.n_layer, 1.0, tag, tag, recipe.scaling_params(config)))
    return cells


def read_evaluation(flags: Flags) -> tuple[str, ...]:
    """The flags of chat_eval. UserError if they are wrong."""
    words = split("--eval-flags", flags.eval_flags)
    if words and flags.stage != "sft":
        raise UserError("--eval-flags are for --stage sft: base models are judged by their bits per byte")
    given = parse_or_explain("--eval-flags", chat_eval, words)
    chat_eval.check(given)
    return words


def parse_flags(stage: str, variant: str, argv: tuple[str, ...]) -> Any:
    """The flags of base_train or chat_sft; UserError names the variant that they are wrong in."""
    return parse_or_explain(f"flags of {variant}", SCRIPTS[stage], argv)


def parse_or_explain(what: str, script: ModuleType, argv: tuple[str, ...]) -> Any:
    """Parses the flags of a script. UserError, not the end of the program, if they are wrong."""
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return parse(script.Flags, argv)
    except SystemExit as error:
        message = stderr.getvalue().strip().removeprefix("error: ").removesuffix("; see --help")
        raise UserError(f"{what}: {message}; see python -m {script.__name__} --help") from error


# ---- results ----


def report(flags: Flags, results: list[dict[str, Any]], folder: Path) -> list[stats.Row]:
    """Prints the tables and writes the page."""
    rows = stats.summarize(results, flags.seeds)
    laws = stats.fit_scaling_laws(results) if flags.stage == "base" and not flags.variants else None
    tables: list[tuple[str, list[tuple[str, ...]]]] = []
    figures = page.comparison_charts(results, rows) if flags.stage == "base" else page.task_charts(results)
    if flags.variants:
        tables.append(("Verdicts", verdict_table(rows)))
        figures.append(page.differences_chart(rows))
    elif laws:
        tables.append(("Scaling laws", scaling_table(laws)))
        figures = page.scaling_charts(laws)
    elif len(flags.depths) > 1 and flags.stage == "base":
        figures = [page.miniseries_chart(rows)]
    if flags.stage == "sft":
        tables.append(("Accuracy", accuracy_table(results, flags.seeds)))
    tables.append(("Runs", comparison_table(rows)))
    for heading, table in tables:
        print_table(heading, table)
    commits = sorted({result["commit"] or "unknown" for result in results})
    equal = {"base": "equal FLOPs" if flags.equal == "flops" else "equal time", "sft": "equal steps"}[flags.stage]
    lead = f"{len(results)} runs with {equal} on {results[-1]['device']}; commit {', '.join(commits)}"
    if len({result["commit"] for result in results if result["variant"] == stats.BASELINE}) > 1:
        lead += "; the baseline was trained with several commits: if they train differently, use another --name"
    print(lead)
    path = folder / "report.html"
    notes = NOTES if flags.variants else ()
    page.write_page(path, title=flags.name, lead=lead, figures=figures, tables=tables, notes=notes)
    print(f"written: {path}")
    return rows


def accuracy_table(results: list[dict[str, Any]], num_seeds: int) -> list[tuple[str, ...]]:
    """The mean accuracy per task with its 95 % interval, and the p-value of its difference from the baseline's."""
    tasks = list(results[0]["scores"])
    columns = []
    for task in tasks:
        rows = stats.summarize_task(results, num_seeds, task)
        columns.append([describe_accuracy(row) for row in rows])
    lines: list[tuple[str, ...]] = [("base model", "variant", *tasks)]
    for i, row in enumerate(rows):
        lines.append((row.cell, row.variant, *(column[i] for column in columns)))
    return lines


def describe_accuracy(row: stats.Row) -> str:
    text = f"{1 - stats.mean(row.values):.1%}"
    if len(row.values) > 1:
        text += f" ± {stats.mean_margin(row.values):.1%}"
    return f"{text}, p {describe_p(row.difference.p)}" if row.difference else text


def describe_p(p: float) -> str:
    if math.isnan(p):
        return "unknown"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def describe_share(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.2%}"


def comparison_table(rows: list[stats.Row]) -> list[tuple[str, ...]]:
    """One line per variant and cell. The loss is bits per byte, or the error of chat models."""
    has_variants = any(row.difference for row in rows)
    head = ["depth", "FLOPs", "tokens", "variant", "loss", "seeds"]
    if has_variants:
        head += ["difference", "p", "detectable", "compute", "time"]
    lines: list[tuple[str, ...]] = [tuple(head)]
    for row in rows:
        loss = f"{stats.mean(row.values):.4f}"
        if len(row.values) > 1:
            loss += f" ± {stats.deviation(row.values):.4f}"
        line = [str(row.depth), f"{row.flops:.3g}", human(row.tokens), row.variant, loss, str(len(row.values))]
        difference = row.difference
        if difference:
            line += [f"{difference.relative:+.2%}", describe_p(difference.p), describe_share(difference.detectable)]
            line += [describe_multiplier(row.compute), describe_multiplier(row.time)]
        lines.append((*line, *[""] * (len(head) - len(line))))
    return lines


def describe_multiplier(multiplier: stats.Multiplier | None) -> str:
    if multiplier is None or math.isnan(multiplier.value):
        return "unknown"
    text = f"{multiplier.value:.3f}"
    if not math.isnan(multiplier.low + multiplier.high):
        text += f" ({multiplier.low:.3f} to {multiplier.high:.3f})"
    return f"{text}, extrapolated" if multiplier.is_extrapolated else text


def verdict_table(rows: list[stats.Row]) -> list[tuple[str, ...]]:
    lines = [("variant", "verdict")]
    lines += [(variant, verdict) for variant, verdict in stats.verdicts(rows).items()]
    return lines


def scaling_table(laws: stats.ScalingLaws) -> list[tuple[str, ...]]:
    """N_opt and D_opt of each budget, and their laws."""
    lines: list[tuple[str, ...]] = [("FLOPs", "N_opt", "D_opt", "D_opt / N_opt")]
    for budget in laws.curves:
        best, tokens = laws.parameters.get(budget), laws.tokens.get(budget)
        if best and tokens:
            lines.append((f"{budget:.3g}", human(best), human(tokens), f"{tokens / best:.1f}"))
        else:
            lines.append((f"{budget:.3g}", "outside of the depths that were trained", "", ""))
    if laws.parameters_law and laws.tokens_law:
        exponents = (f"FLOPs^{laws.parameters_law.exponent:.2f}", f"FLOPs^{laws.tokens_law.exponent:.2f}")
        lines.append(("power law", *exponents, ""))
    return lines


if __name__ == "__main__":
    main()
