"""
What a person sees of a run: the metrics file, the console, wandb's absence, and the summary.

    python -m pytest tests/test_report.py
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from nanochat import logging as report
from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.logging import Logger, print_summary, report_dir, save_numbers, start_wandb
from nanochat.train import TrainState

CPU = Dist(torch.device("cpu"))


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def lines(name="base_train-d2"):
    return [json.loads(line) for line in (report_dir() / f"metrics/{name}.jsonl").read_text().splitlines()]


def logger(**options):
    return Logger("base_train", "d2", {"flags": {"depth": 2}}, CPU, **options)


def log_steps(log, steps):
    for step in steps:
        log.log(TrainState(step, seconds=step / 3), {"train/loss": 1 / step})


def test_metrics_are_one_json_object_a_line():
    log = logger()
    log_steps(log, (1, 2))
    log.log(TrainState(2, seconds=2 / 3), {"val/bpb": 0.9})
    assert lines() == [
        {"config": {"flags": {"depth": 2}}},
        {"step": 1, "seconds": 0.333, "train/loss": 1.0},
        {"step": 2, "seconds": 0.667, "train/loss": 0.5},
        {"step": 2, "seconds": 0.667, "val/bpb": 0.9},
    ]


def test_a_new_run_begins_a_new_file():
    log_steps(logger(), (1, 2))
    log_steps(logger(), (1,))
    assert [line.get("step") for line in lines()] == [None, 1]


def test_a_resumed_run_forgets_what_was_logged_after_its_checkpoint():
    log_steps(logger(), (1, 2, 3, 4))
    log_steps(logger(first_step=2), (3,))
    assert [line.get("step") for line in lines()] == [None, 1, 2, 3]


def test_a_last_line_that_a_crash_cut_short_is_left_out():
    log_steps(logger(), (1, 2))
    path = report_dir() / "metrics/base_train-d2.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "sec')
    log_steps(logger(first_step=3), (4,))
    assert [line.get("step") for line in lines()] == [None, 1, 2, 4]


def test_stages_and_tags_have_files_of_their_own():
    log_steps(Logger("chat_sft", "mine", {}, CPU), (1,))
    assert [line.get("step") for line in lines("chat_sft-mine")] == [None, 1]


def test_only_rank_0_writes(base_dir, capsys):
    log = Logger("base_train", "d2", {}, Dist(CPU.device, rank=1, world_size=2), run="x")
    log_steps(log, (1,))
    log.finish(TrainState(1))
    assert not report_dir().exists() and not capsys.readouterr().out


def test_the_console_shows_first_and_last_step_and_every_evaluation(capsys):
    log = logger(num_steps=5)
    for step in range(1, 6):
        log.log(TrainState(step), {"train/loss": 2.0, "train/tokens_per_second": 12345.6})
    log.log(TrainState(5), {"val/bpb": 0.9})
    assert capsys.readouterr().out.splitlines() == [
        "step 1/5 | loss 2.0000 | 12,346 tokens/s",
        "step 5/5 | loss 2.0000 | 12,346 tokens/s",
        "step 5/5 | val/bpb 0.9000",
    ]


def test_the_time_left_follows_from_the_timed_steps(capsys):
    log = logger(num_steps=103)
    log.log(TrainState(13, seconds=20.0, tokens=1000), {"val/bpb": 1.0})
    assert "step 13/103, 3m00s left" in capsys.readouterr().out


def test_utilization_where_the_gpus_peak_is_known(monkeypatch, capsys):
    monkeypatch.setattr(report, "gpu_peaks", lambda device: (1e12, 1e12))
    log = Logger("base_train", "d2", {}, CPU, flops_per_token=1e6)
    log.log(TrainState(1), {"train/loss": 1.0, "train/tokens_per_second": 4e5})
    assert lines()[-1]["train/mfu"] == pytest.approx(0.4)


def test_the_final_numbers():
    log = logger()
    log.log(TrainState(1), {"train/loss": 3.0, "train/tokens_per_second": 10.0})
    log.log(TrainState(2), {"val/bpb": 0.8})
    log.finish(TrainState(2, seconds=95.0, tokens=9500), parameters=7)
    numbers = json.loads((report_dir() / "base_train.json").read_text())
    expected = {
        "train/loss": 3.0,
        "val/bpb": 0.8,
        "steps": 2,
        "training time": "1m35s",
        "tokens/s": 100,
        "parameters": 7,
    }
    assert numbers.items() >= expected.items()
    assert numbers["peak memory"].endswith("GiB")
    assert "train/tokens_per_second" not in numbers


def test_the_summary_has_the_stages_that_ran_in_the_order_asked_for(capsys):
    save_numbers("chat_sft", {"val/bpb": 0.51239, "time left": "none"})
    save_numbers("base_train", {"steps": 3})
    print_summary(["base_train", "mid_train", "chat_sft"])
    assert (report_dir() / "report.md").read_text().splitlines() == [
        "# Report",
        "",
        "| stage | result | value |",
        "|---|---|---|",
        "| base_train | steps | 3 |",
        "| chat_sft | val/bpb | 0.5124 |",
        "| chat_sft | time left | none |",
    ]
    out = capsys.readouterr().out
    assert out.index("base_train") < out.index("chat_sft") and "0.5124" in out and "mid_train" not in out


def test_large_numbers_are_short_and_small_ones_not_lost(capsys):
    save_numbers("base_train", {"flops": 1.234e18, "rate": 1.5e-5, "zero": 0.0})
    print_summary(["base_train"])
    text = (report_dir() / "report.md").read_text()
    assert "| 1.234e+18 |" in text and "| 1.5e-05 |" in text and "| 0.0000 |" in text


# ---- wandb ----


def test_without_wandb_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes an import fail
    with pytest.raises(UserError, match=r"pip install 'nanochat\[wandb\]'"):
        logger(run="mine")


class FakeWandb:
    class errors:
        class Error(Exception):
            pass

    def __init__(self, reachable=True):
        self.reachable, self.inits, self.logged, self.summary = reachable, [], [], {}

    def init(self, **options):
        self.inits.append(options)
        if not self.reachable and options.get("mode") != "offline":
            raise self.errors.Error("no network")
        return SimpleNamespace(
            log=lambda metrics, step: self.logged.append((step, metrics)),
            summary=self.summary,
            finish=lambda: self.logged.append("end"),
        )


def test_wandb_gets_what_is_logged(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = logger(run="mine")
    log_steps(log, (1,))
    log.finish(TrainState(1), parameters=7)
    assert (
        fake.inits[0].items() >= {"name": "mine", "group": "base_train-d2", "config": {"flags": {"depth": 2}}}.items()
    )
    assert fake.logged == [(1, {"train/loss": 1.0}), "end"]
    assert fake.summary["parameters"] == 7


def test_wandb_without_a_network_logs_offline_and_says_so(monkeypatch, capsys):
    fake = FakeWandb(reachable=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    start_wandb("mine", "group", {})
    assert [options.get("mode") for options in fake.inits] == [None, "offline"]
    assert "no network" in capsys.readouterr().out
