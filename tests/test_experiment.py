"""
Experiments: statistics on synthetic results, and real runs that are stopped and continued.

    python -m pytest tests/test_experiment.py
"""

import json
import math
import os
import random
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import GOLDEN
from factories import save_checkpoint, tiny_gpt, wait_until, write_shard

from nanochat.common import UserError
from nanochat.experiment import page, trials
from nanochat.experiment import statistics as stats
from nanochat.experiment.trials import Results, checkout, failure, find_slots
from nanochat.logging import read_lines
from scripts import experiment

NOISE = 0.004  # standard deviation over seeds, as a share of the bits per byte
SLOPE = 0.1  # bits per byte ~ FLOPs^-SLOPE


def synthetic_results(rng, *, gain=0.0, noise=NOISE, num_seeds=3, speed=1.0):
    """Results of a sweep over two depths, with a variant whose bits per byte are lower by the share `gain`."""

    def result(variant, depth, seed, factor, role):
        budget = 1e15 * depth**3
        bits = (1 - gain * (variant != "baseline")) * 1.1 * (factor * budget / 1e15) ** -SLOPE
        return {
            "variant": variant,
            "cell": f"d{depth}",
            "depth": depth,
            "budget": budget,
            "role": role,
            "seed": seed,
            "parameters": 1000 * depth,
            "loss": bits * (1 + rng.gauss(0, noise)),
            "flops": factor * budget,
            "tokens": 1000,
            "seconds": factor * budget / 1e14 / (speed if variant != "baseline" else 1),
        }

    results = []
    for depth in (4, 6):
        for seed in range(1, num_seeds + 1):
            results.append(result("baseline", depth, seed, 1, "compared"))
            results.append(result("baseline", depth, seed + num_seeds, 1, "compared"))
            results.append(result("idea", depth, seed, 1, "compared"))
            results += [result("baseline", depth, seed, factor, "ladder") for factor in (0.7, 1.4)]
    return results


def verdict_counts(**options):
    """How often each verdict was reached in 200 simulated experiments: of the variant, and of the noise floor."""
    counts = {"idea": dict.fromkeys(("better", "worse", "not shown"), 0)}
    counts[stats.AGAIN] = dict(counts["idea"])
    for i in range(200):
        rows = stats.summarize(synthetic_results(random.Random(i), **options), 3)
        for variant, verdict in stats.verdicts(rows).items():
            counts[variant][verdict] += 1
    return counts


# ---- statistics ----


@pytest.mark.parametrize("t, freedom", [(12.706, 1), (4.303, 2), (2.776, 4), (2.042, 30)])
def test_t_test_matches_published_table(t, freedom):
    assert stats.t_test_p(t, freedom) == pytest.approx(0.05, abs=5e-5)
    assert stats.t_quantile(freedom) == pytest.approx(t, abs=2e-3)


def test_welch_test_matches_scipy():
    difference = stats.compare([1.02, 1.04, 1.01, 1.05], [0.99, 1.0, 0.95])
    assert difference.p == pytest.approx(0.0583538, abs=1e-5)  # scipy.stats.ttest_ind(…, equal_var=False)
    assert difference.value == pytest.approx(-0.05)
    assert difference.detectable > 0.05 / 1.03


def test_planted_gain_of_three_percent_is_found_with_three_seeds():
    counts = verdict_counts(gain=0.03)
    assert counts["idea"]["better"] >= 196 and counts["idea"]["worse"] == 0
    assert counts[stats.AGAIN]["not shown"] >= 198


def test_planted_loss_is_found():
    assert verdict_counts(gain=-0.03)["idea"]["worse"] >= 196


def test_planted_null_is_refused():
    counts = verdict_counts(gain=0.0)
    assert counts["idea"]["not shown"] >= 198  # 0.13 % of them are expected to pass
    assert counts[stats.AGAIN]["not shown"] >= 198


def test_gain_at_one_depth_only_is_not_shown():
    found = {(4, "d4"): stats.compare([1.0, 1.001, 0.999], [0.9, 0.901, 0.899])}
    assert stats.verdict(found) == "not shown"
    assert stats.verdict(found | {(4, "d4-3e15"): found[4, "d4"]}) == "not shown"  # another budget, the same depth
    assert stats.verdict(found | {(6, "d6"): found[4, "d4"]}) == "better"
    worse = stats.compare([0.9, 0.901, 0.899], [1.0, 1.001, 0.999])
    assert stats.verdict(found | {(6, "d6"): found[4, "d4"], (8, "d8"): worse}) == "not shown"


def test_one_seed_shows_nothing():
    difference = stats.compare([1.0], [0.5])
    assert math.isnan(difference.p) and not difference.is_shown


def test_compute_multiplier_recovers_planted_savings():
    gain = 1 - 1.2**-SLOPE  # as if the baseline had 1.2 times the FLOPs
    rows = stats.summarize(synthetic_results(random.Random(0), gain=gain, noise=1e-4, speed=0.5), 3)
    for row in rows:
        if row.variant == "idea":
            assert row.compute.low < 1.2 < row.compute.high and row.compute.value == pytest.approx(1.2, rel=0.01)
            assert row.time.value == pytest.approx(0.6, rel=0.01)  # at half the speed
            assert not row.compute.is_extrapolated
        if row.variant == stats.AGAIN:
            assert row.compute.value == pytest.approx(1.0, rel=0.01)


def test_ladder_that_does_not_descend_gives_no_multiplier():
    assert math.isnan(stats.flops_needed({1e15: 1.0, 2e15: 1.1}, 1.05))
    assert math.isnan(stats.flops_needed({1e15: 1.0}, 1.0))
    assert stats.flops_needed({1e15: 1.0, 2e15: 0.9}, 0.85) > 2e15


def test_scaling_laws_recover_planted_exponents():
    results = []
    for budget in (1e15, 1e16, 1e17):
        best = 3 * budget**0.46
        for depth, factor in enumerate((0.25, 0.6, 1, 1.8, 4), 1):
            size = best * factor
            bits = 1 + 0.1 * math.log(factor) ** 2
            common = {"variant": "baseline", "role": "compared", "depth": depth, "budget": budget, "loss": bits}
            results.append(common | {"parameters": size, "tokens": budget / (6 * size)})
    laws = stats.fit_scaling_laws(results)
    assert laws.parameters_law.exponent == pytest.approx(0.46, abs=1e-3)
    assert laws.tokens_law.exponent == pytest.approx(0.54, abs=1e-3)
    assert laws.parameters_law(1e18) == pytest.approx(3 * 1e18**0.46, rel=0.02)


def test_minimum_outside_of_the_trained_sizes_is_no_optimum():
    assert stats.optimum({1e6: 3.0, 2e6: 2.0, 4e6: 1.2}) is None
    assert stats.optimum({1e6: 1.0, 2e6: 2.0, 4e6: 1.0}) is None  # a maximum
    assert stats.optimum({1e6: 2.0, 2e6: 1.0, 4e6: 2.0}) == pytest.approx(2e6)


# ---- the grid ----


def read(*argv):
    flags = experiment.parse(experiment.Flags, argv)
    return experiment.Experiment.read(flags, Path())


def test_runs_take_turns_by_seed_and_share_the_budget(base_dir):
    grid = read("lr=--matrix-lr 0.03", "--depths", "2,3", "--seeds", "2", "--name", "x")
    grid.check()
    found = grid.trials(Results(base_dir))
    assert len(found) == len({trial.tag for trial in found}) == 20
    first = [(trial.tag, round(trial.flops / trial.budget, 3)) for trial in found[:5]]
    assert first == [
        ("x-baseline-d2-s1", 1),
        ("x-lr-d2-s1", 1),
        ("x-baseline-d2-s3", 1),
        ("x-baseline-d2-x0.7-s1", 0.7),
        ("x-baseline-d2-x1.4-s1", 1.4),
    ]
    assert {trial.depth for trial in found[:10]} == {2, 3}
    assert {trial.seed for trial in found[10:]} == {2, 4}
    parsed = experiment.parse_flags("base", "lr", found[1].argv)
    assert (parsed.matrix_lr, parsed.depth, parsed.seed, parsed.resume) == (0.03, 2, 1, True)
    assert parsed.target_flops == found[0].flops


def test_equal_time_gives_a_slow_variant_fewer_flops(base_dir):
    grid = read("slow=--activation-checkpointing", "--depths", "2", "--seeds", "1", "--equal", "time")
    timing = grid.timing_trials()
    lines = []
    for trial, seconds in zip(timing, (10.0, 12.5), strict=True):
        line = dict.fromkeys(trials.FIELDS, 1) | {"tag": trial.tag, "flags": list(trial.argv), "role": "timing"}
        lines.append(line | {"variant": trial.variant, "cell": "d2", "commit": "", "device": "cpu", "seconds": seconds})
    (base_dir / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shares = {trial.tag: trial.flops / trial.budget for trial in grid.trials(Results(base_dir))}
    assert shares["experiment-slow-d2-s1"] == pytest.approx(0.8)
    assert shares["experiment-baseline-d2-s1"] == 1


def test_result_of_other_flags_is_refused(base_dir):
    one = read("--train-flags=--head-dim=32", "--depths", "2").trials(Results(base_dir))[0]
    other = read("--train-flags=--head-dim=64", "--depths", "2").trials(Results(base_dir))[0]
    line = dict.fromkeys(trials.FIELDS, 1) | {"tag": one.tag, "flags": list(one.argv), "role": "compared"}
    line |= {"variant": "baseline", "cell": "d2", "commit": "", "device": "cpu"}
    (base_dir / "results.jsonl").write_text(json.dumps(line) + "\n" + '{"tag": "cut')
    results = Results(base_dir)
    assert results.find(one)["bpb"] == 1
    with pytest.raises(
        UserError, match=r"with other flags \(then --head-dim=32 .*, now --head-dim=64 .*\): use another --name"
    ):
        results.find(other)


@pytest.mark.parametrize(
    "gpus, per_run, visible, expected",
    [
        (0, 1, "", [{}]),
        (2, 1, "", [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        (3, 2, "", [{"CUDA_VISIBLE_DEVICES": "0,1"}]),
        (2, 1, "4,6", [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]),
    ],
)
def test_runs_are_spread_over_the_gpus(monkeypatch, gpus, per_run, visible, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_slots("auto", per_run) == expected
    assert find_slots("cpu", 1) == [{}]


def test_branch_is_checked_out_beside_the_code(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", tmp_path / "code", *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "code").mkdir()
    git("init", "-q")
    for text, branch in (("old", "idea"), ("new", "other")):
        git("checkout", "-q", "-b", branch)
        (tmp_path / "code/file").write_text(text)
        git("add", "file")
        git("commit", "-q", "-m", text)
    path, commit = checkout(tmp_path / "code", "idea", tmp_path / "worktrees")
    assert (path / "file").read_text() == "old" and path.name == commit
    assert checkout(tmp_path / "code", "idea", tmp_path / "worktrees") == (path, commit)


def test_failed_run_of_the_baseline_ends_the_experiment(base_dir, tmp_path):
    (tmp_path / "t.log").write_text("some output\nerror: the loss is nan\n")
    [trial] = read("--depths", "2", "--seeds", "1").trials(Results(base_dir))
    trial = replace(trial, tag="t", variant="idea")
    assert failure(trial, tmp_path) == f"t failed: the loss is nan (its output: {tmp_path / 't.log'})"
    with pytest.raises(UserError, match="t failed: the loss is nan"):
        failure(replace(trial, variant="baseline"), tmp_path)


# ---- chat models ----


def test_chat_variants_take_turns_on_each_base_model(base_dir):
    for tag, depth in (("small", 1), ("large", 2)):
        save_checkpoint(tiny_gpt(n_layer=depth), tag=tag)
    argv = ["--stage", "sft", "--base-tags", "small,large", "--seeds", "1", "--eval-flags=-a Sums", "--name", "mix"]
    grid = read("less=--identity-epochs 1", *argv)
    grid.check()
    found = grid.trials(Results(base_dir))
    assert [trial.tag for trial in found[:3]] == ["mix-baseline-small-s1", "mix-less-small-s1", "mix-baseline-small-s2"]
    assert [trial.depth for trial in found] == [1, 1, 1, 2, 2, 2]
    training, evaluation = trials.Running(found[1]).commands
    assert {"scripts.chat_sft", "--identity-epochs", "--base-tag", "small"} <= set(training)
    assert evaluation == ["scripts.chat_eval", "-i", "sft", "-g", "mix-less-small-s1", "-a", "Sums"]


@pytest.mark.parametrize("numbers, loss", [({}, 0.5), ({"ChatCORE": 0.2}, 0.8)])
def test_error_of_a_chat_model_is_that_of_chatcore_or_of_its_tasks(tmp_path, numbers, loss):
    scores = {"Sums": {"accuracy": 0.9}, "QuizFree": {"accuracy": 0.1}}
    (tmp_path / "eval.jsonl").write_text(json.dumps({"scores": scores, "numbers": numbers}) + "\n")
    found = trials.read_scores(tmp_path / "eval.jsonl")
    assert found["scores"] == {"Sums": 0.9, "QuizFree": 0.1} and found["loss"] == pytest.approx(loss)


def test_accuracy_table_has_interval_and_p_value_per_task(tmp_path):
    results = []
    for variant, seeds, accuracies in (
        ("baseline", (1, 2, 3, 4), (0.9, 0.92, 0.88, 0.9)),
        ("none", (1, 2), (0.1, 0.12)),
    ):
        for seed, accuracy in zip(seeds, accuracies, strict=True):
            numbers = dict.fromkeys(("budget", "flops", "tokens", "seconds", "depth"), 1)
            scores = {"Sums": accuracy, "QuizFree": 0.5}
            names = {"variant": variant, "cell": "d4", "role": "compared", "seed": seed}
            results.append(numbers | names | {"scores": scores, "loss": 1 - (accuracy + 0.5) / 2})
    head, *lines = experiment.accuracy_table(results, 2)
    assert head == ("base model", "variant", "Sums", "QuizFree")
    assert [line[1] for line in lines] == ["baseline", stats.AGAIN, "none"]
    assert lines[0][2].startswith("90.0% ± 2.6%") and lines[2][2].startswith("11.0% ± 12.7%, p ")
    assert lines[2][3] == "50.0% ± 0.0%, p 1.000"
    assert len(page.task_charts(results)) == 2


# ---- the page ----


def test_page_shows_each_depth_and_variant(tmp_path):
    results = synthetic_results(random.Random(0), gain=0.03)
    rows = stats.summarize(results, 3)
    figures = page.comparison_charts(results, rows)
    assert len(figures) == 2
    for figure in figures:
        root = ElementTree.fromstring(figure)
        titles = [title.text for title in root.iter("title")]
        assert sum(title.startswith("idea") for title in titles) == 1
        assert sum(title.startswith("baseline") for title in titles) == 3
        assert len(list(root.iter("circle"))) == 6 + 3 + 3 + 3
    path = tmp_path / "report.html"
    tables = [("Verdicts", experiment.verdict_table(rows)), ("Comparison", experiment.comparison_table(rows))]
    page.write_page(path, title="a < b", lead="lead", figures=figures, tables=tables, notes=["note"])
    text = path.read_text()
    assert "a &lt; b" in text and "<td>idea</td><td>better</td>" in text and "light-dark(" in text


@pytest.mark.parametrize(
    "low, high, is_log", [(0.9, 1.3, False), (1.82, 1.84, False), (1e14, 3e15, True), (1e9, 2e9, True)]
)
def test_axis_has_a_few_ticks_within_its_range(low, high, is_log):
    axis = page.axis_for([low, high], 0, 100, is_log=is_log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    assert all(0 <= axis(tick) <= 100 for tick in ticks)


# ---- real runs ----


@pytest.mark.slow
def test_stopped_experiment_continues_where_it_was(base_dir, monkeypatch, capsys):
    (base_dir / "tokenizer").symlink_to(GOLDEN / "tokenizer")
    for i in range(2):
        write_shard(base_dir / f"data/shard_{i:05d}.parquet", [f"{j} the cat sat on a mat. " * 40 for j in range(50)])
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(base_dir / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Two runs at a time, as on a machine with two GPUs.
    slots = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setattr(experiment, "find_slots", lambda device, gpus_per_run: slots)
    sizes = "--aspect-ratio 32 --head-dim 16 --max-seq-len 32 --device-batch-size 2 --total-batch-size 64 "
    train_flags = sizes + "--eval-tokens 64 --no-compile --device cpu"
    argv = ["--name", "tiny", "--depths", "1", "--flops", "2e9,2.2e9", "--seeds", "1", "--train-flags", train_flags]
    metrics = base_dir / "report/metrics"

    def stop_when_both_train():
        wait_until(lambda: len([path for path in metrics.glob("*.jsonl") if len(read_lines(path)) > 5]) == 2, 120)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_both_train)
    thread.start()
    with pytest.raises(SystemExit, match="interrupted"):
        experiment.main(argv)
    thread.join()
    results = base_dir / "experiments/tiny/results.jsonl"
    assert not results.exists()

    rows = experiment.main(argv)
    assert [row.depth for row in rows] == [1, 1]
    logs = {path: path.read_text() for path in (base_dir / "experiments/tiny").glob("*.log")}
    assert len(logs) == 2 and all("resuming after step" in text for text in logs.values())
    for line in read_lines(results):
        assert line["flops"] == pytest.approx(line["budget"], rel=0.01)
        assert line["bpb"] > 0 and line["commit"] and "--seed" in line["flags"]
    assert not list((base_dir / "base_checkpoints").glob("tiny-*"))

    content = results.read_bytes()
    assert experiment.main(argv) == rows  # all runs have results: nothing is trained
    assert {path: path.read_text() for path in logs} == logs and results.read_bytes() == content
    assert (base_dir / "experiments/tiny/report.html").exists()
