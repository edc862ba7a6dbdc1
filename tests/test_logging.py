"""
Logging: the metrics file, console lines, and the final numbers of all stages.

    python -m pytest tests/test_logging.py
"""

import json
from types import SimpleNamespace

import pytest
import torch

from nanochat import logging
from nanochat.cards import CARDS
from nanochat.distributed import Dist
from nanochat.logging import Logger, append_evaluation, report_dir
from nanochat.train import TrainState

CPU = Dist(torch.device("cpu"))


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def lines(name="base_train-d2"):
    return [json.loads(line) for line in metrics_file(name).read_text().splitlines()]


def metrics_file(name="base_train-d2"):
    return report_dir() / f"metrics/{name}.jsonl"


def logger(dist=CPU, **options):
    return Logger(metrics_file(), dist, config={"flags": {"depth": 2}}, **options)


def log_steps(log, steps):
    for step in steps:
        state = TrainState(step, seconds=step / 3, elapsed=float(step), total_tokens=10 * step)
        log.log(state, {"train/loss": 1 / step})


def test_metrics_file_has_one_json_object_per_line():
    log = logger(num_steps=7, flops_per_token=100.0)
    log_steps(log, (1, 2))
    log.log(TrainState(2, seconds=2 / 3, elapsed=3.0, total_tokens=50), {"val/bpb": 0.9})
    head, *steps = lines()
    assert head.pop("device").startswith("cpu")
    assert head == {"config": {"flags": {"depth": 2}}, "num_steps": 7, "flops_per_token": 100.0, "world_size": 1}
    assert all(line.pop("peak_memory") > 2**20 for line in steps)
    assert steps == [
        {"step": 1, "seconds": 0.333, "elapsed": 1.0, "tokens": 10, "flops": 1000.0, "train/loss": 1.0},
        {"step": 2, "seconds": 0.667, "elapsed": 2.0, "tokens": 20, "flops": 2000.0, "train/loss": 0.5},
        {"step": 2, "seconds": 0.667, "elapsed": 3.0, "tokens": 50, "flops": 5000.0, "val/bpb": 0.9},
    ]


def test_samples_are_in_the_file_and_not_in_the_final_numbers():
    samples = [{"prompt": "2 + 2 =", "completion": " 5"}]
    log = logger()
    log.log_samples(TrainState(3), samples)
    assert lines()[-1]["step"] == 3 and lines()[-1]["samples"] == samples
    log.finish("base_train", TrainState(3))
    assert "samples" not in json.loads((report_dir() / "base_train.json").read_text())


def test_evaluations_of_a_tag_are_appended():
    append_evaluation("base_eval", "d2", {"step": 1, "numbers": {"CORE": 0.1}})
    append_evaluation("base_eval", "d2", {"step": 2, "numbers": {"CORE": 0.2}})
    first, second = lines("base_eval-d2")
    assert (first["numbers"], second["numbers"]) == ({"CORE": 0.1}, {"CORE": 0.2})
    assert 0 < first["time"] <= second["time"]


def test_new_run_starts_a_new_metrics_file():
    log_steps(logger(), (1, 2))
    log_steps(logger(), (1,))
    assert [line.get("step") for line in lines()] == [None, 1]


def test_resumed_run_drops_lines_after_its_checkpoint():
    log_steps(logger(), (1, 2, 3, 4))
    log_steps(logger(first_step=2), (3,))
    assert [line.get("step") for line in lines()] == [None, 1, 2, 3]


def test_truncated_last_line_is_dropped():
    log_steps(logger(), (1, 2))
    path = report_dir() / "metrics/base_train-d2.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "sec')
    log_steps(logger(first_step=3), (4,))
    assert [line.get("step") for line in lines()] == [None, 1, 2, 4]


def test_stages_and_tags_have_separate_files():
    log_steps(Logger(metrics_file("chat_sft-mine"), CPU, config={}), (1,))
    assert [line.get("step") for line in lines("chat_sft-mine")] == [None, 1]


def test_only_rank_0_writes(base_dir, capsys):
    log = logger(Dist(CPU.device, rank=1, world_size=2))
    log_steps(log, (1,))
    log.finish("base_train", TrainState(1))
    assert not report_dir().exists() and not capsys.readouterr().out


def test_console_shows_first_and_last_step_and_all_evaluations(capsys):
    log = logger(num_steps=5)
    for step in range(1, 6):
        log.log(TrainState(step), {"train/loss": 2.0, "train/tokens_per_second": 12345.6})
    log.log(TrainState(5), {"val/bpb": 0.9})
    assert capsys.readouterr().out.splitlines() == [
        "step 1/5 | loss 2.0000 | 12,346 tokens/s",
        "step 5/5 | loss 2.0000 | 12,346 tokens/s",
        "step 5/5 | val/bpb 0.9000",
    ]


def test_learning_rates_are_in_the_file_and_not_on_the_console(capsys):
    logger().log(TrainState(1), {"train/loss": 2.0, "lr/wte": 0.3})
    assert lines()[-1]["lr/wte"] == 0.3
    assert "lr/wte" not in capsys.readouterr().out


def test_time_left_is_computed_from_timed_steps(capsys):
    log = logger(num_steps=104)
    log.log(TrainState(14, seconds=20.0, tokens=1000), {"val/bpb": 1.0})
    assert "step 14/104, 3m00s left" in capsys.readouterr().out


def test_mfu_is_logged_where_the_peak_is_known(monkeypatch, capsys):
    monkeypatch.setattr(logging, "gpu_card", lambda device: CARDS[0]._replace(flops=1e12))
    log = logger(flops_per_token=1e6)
    log.log(TrainState(1), {"train/loss": 1.0, "train/tokens_per_second": 4e5})
    assert lines()[-1]["train/mfu"] == pytest.approx(0.4)


def test_finish_saves_the_final_numbers():
    log = logger()
    log.log(TrainState(1), {"train/loss": 3.0, "train/tokens_per_second": 10.0})
    log.log(TrainState(2), {"val/bpb": 0.8})
    log.finish("base_train", TrainState(2, seconds=95.0, tokens=9500), parameters=7)
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


def test_very_large_and_small_numbers_are_shown_in_scientific_notation():
    assert [logging.shown(value) for value in (1.234e18, 1.5e-5, 0.0, 0.51239, 7, "none")] == [
        "1.234e+18",
        "1.5e-05",
        "0.0000",
        "0.5124",
        "7",
        "none",
    ]


def test_tracker_gets_the_metrics_and_the_final_numbers():
    sent = []
    tracker = SimpleNamespace(log=lambda step, metrics: sent.append((step, metrics)), finish=sent.append)
    log = logger(tracker=tracker)
    log_steps(log, (1,))
    log.finish("base_train", TrainState(1), parameters=7)
    assert sent[0] == (1, {"train/loss": 1.0})
    assert sent[1].items() >= {"train/loss": 1.0, "parameters": 7}.items()
