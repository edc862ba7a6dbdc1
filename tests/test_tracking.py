"""
Trackers: the real packages without a network, and what happens when one is missing, fails or hangs.

    python -m pytest tests/test_tracking.py
"""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanochat import tracking
from nanochat.common import UserError
from nanochat.tracking import Tracker, check_tracker

ROOT = Path(__file__).resolve().parent.parent
START = {"run": "mine", "group": "base_train-d2", "run_id": "abcd1234", "config": {"flags": {"depth": 2}}}

# A run of steps 1 to 3, then the same run, resumed after the checkpoint of step 2, to step 4.
TRACK_TWICE = """
import os, sys, time
from nanochat import tracking
from nanochat.tracking import Tracker

tracking.INIT_SECONDS = int(os.environ.get("TEST_INIT_SECONDS", "30"))
for resumed, steps in ((False, (1, 2, 3)), (True, (3, 4))):
    config = {"flags": {"depth": 2}}
    tracker = Tracker(sys.argv[1], run="mine", group="base_train-d2", run_id="abcd1234", config=config, resumed=resumed)
    for step in steps:
        tracker.log(step, {"train/loss": step / 4, "eval/pass@8": 0.5, "samples": ["text"]})
    tracker.finish({"model": "base/d2", "val/bpb": 0.75})
    time.sleep(1)  # wandb names a folder by the second
"""


def track_twice(name, base_dir, **environment):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", TRACK_TWICE, name],
        cwd=ROOT,
        env=os.environ | {"NANOCHAT_BASE_DIR": str(base_dir), "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    return done.stdout


# ---- the real packages ----


@pytest.mark.slow
def test_wandb_offline_holds_the_run_under_one_id(base_dir):
    track_twice("wandb", base_dir, WANDB_MODE="offline", WANDB_SILENT="true")
    files = sorted(base_dir.glob("wandb/offline-run-*-abcd1234/run-abcd1234.wandb"))
    assert len(files) == 2  # offline, the two parts are separate folders until `wandb sync` joins them by their id
    for file in files:
        content = file.read_bytes()
        assert all(word in content for word in (b"train/loss", b"eval/pass@8", b"base_train-d2", b"depth", b"val/bpb"))


@pytest.mark.slow
def test_wandb_without_network_logs_the_run_offline(base_dir):
    unreachable = {"WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": "http://127.0.0.1:9", "TEST_INIT_SECONDS": "1"}
    out = track_twice("wandb", base_dir, WANDB_SILENT="true", **unreachable)
    assert out.count("wandb is not reachable") == 2 and out.count("\n") == 2
    assert len(list(base_dir.glob("wandb/offline-run-*-abcd1234/run-abcd1234.wandb"))) == 2


@pytest.mark.slow
def test_trackio_continues_a_resumed_run(base_dir):
    track_twice("trackio", base_dir, TRACKIO_DIR=str(base_dir / "trackio"))
    with sqlite3.connect(base_dir / "trackio/nanochat.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert len({row[0] for row in rows}) == 1 and {row[1] for row in rows} == {"mine-abcd1234"}
    logged = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
    losses = [(step, metrics["train/loss"]) for step, metrics in logged if "train/loss" in metrics]
    assert losses == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 0.75), (4, 1.0)]
    assert logged[-1][1] == {"final/model": "base/d2", "final/val/bpb": 0.75}


@pytest.mark.slow
def test_mlflow_continues_a_resumed_run(base_dir):
    track_twice("mlflow", base_dir)
    with sqlite3.connect(base_dir / "mlflow.db") as database:
        runs = database.execute("select name, status from runs").fetchall()
        losses = database.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        names = {name for (name,) in database.execute("select distinct key from metrics")}
        params = dict(database.execute("select key, value from params").fetchall())
        tags = dict(database.execute("select key, value from tags").fetchall())
    assert runs == [("mine", "FINISHED")] and params == {"flags.depth": "2"}
    assert sorted(set(losses)) == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert names == {"train/loss", "eval/pass_8"}
    assert tags["final.val/bpb"] == "0.75" and tags["group"] == "base_train-d2"


# ---- missing, failing or hanging ----


@pytest.mark.parametrize("name", ["", "wandb", "trackio", "mlflow"])
def test_missing_package_is_named_with_its_install_command(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name or "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=f"not installed: pip install {name or 'wandb'}"):
        check_tracker(name, "mine")


def test_tracker_without_run_name_or_with_unknown_name_is_a_user_error():
    with pytest.raises(UserError, match="add --run NAME"):
        check_tracker("trackio", "")
    with pytest.raises(UserError, match="use one of wandb, trackio, mlflow"):
        check_tracker("tensorboard", "mine")
    check_tracker("", "")


class BrokenBackend:
    """Fails at its start or at a step."""

    def __init__(self, failing_step=2, **start):
        self.failing_step = failing_step
        if failing_step == 0:
            raise ConnectionError("no route\nto host")

    def log(self, step, metrics):
        if step == self.failing_step:
            raise ConnectionError("no route\nto host")

    def finish(self, numbers):
        raise AssertionError("a tracker that has failed is not used again")


@pytest.mark.parametrize("failing_step", [0, 2])
def test_failing_tracker_prints_one_line_and_is_given_up(monkeypatch, capsys, failing_step):
    monkeypatch.setitem(tracking.BACKENDS, "mlflow", lambda **start: BrokenBackend(failing_step, **start))
    tracker = Tracker("mlflow", **START, resumed=False)
    for step in range(1, 5):
        tracker.log(step, {"train/loss": 1.0})
    tracker.finish({})
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("mlflow failed (no route to host): ")


def test_hanging_tracker_delays_only_the_end_and_not_for_long(monkeypatch, capsys):
    release = threading.Event()

    class HangingBackend(BrokenBackend):
        def log(self, step, metrics):
            release.wait(60)

    monkeypatch.setitem(tracking.BACKENDS, "wandb", HangingBackend)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.05)
    tracker = Tracker("wandb", **START, resumed=False)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish({})
    assert "did not take everything within" in capsys.readouterr().out
    release.set()
    tracker.thread.join()
