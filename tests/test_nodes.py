"""
Several nodes: two hosts in network namespaces, made by tests/nodes_trial.py; and the heartbeat that finds lost ranks.

    python -m pytest tests/test_nodes.py
"""

import json
import threading
import time

import nodes_trial
import pytest
import torch
import torch.distributed as dist
from factories import wait_until

from nanochat import heartbeat
from nanochat.checkpoint_manager import CheckpointReader
from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.heartbeat import Heartbeat
from nanochat.run import Run


@pytest.mark.slow
def test_job_on_two_hosts_survives_a_kill_with_the_same_loss_curve(tmp_path, monkeypatch):
    if not nodes_trial.is_permitted():
        pytest.skip("needs root, iproute2 and network namespaces")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(nodes_trial.ROOT / "tests/golden/packing/data"))
    before, found, output = nodes_trial.kill_a_process(nodes_trial.make_base(tmp_path / "base"))
    assert list(found) == list(range(1, nodes_trial.NUM_STEPS + 1))
    assert {step: found[step] for step in before} == before
    assert "resuming after step" in output
    # The survivor names itself, its host and its step.
    assert "error: rank 0 on host0 lost the other ranks in step" in output or "error: rank 1 on host0" in output


def test_rank_without_the_checkpoint_of_rank_0_names_its_host_and_the_remedy(base_dir):
    run = Run.__new__(Run)
    run.dist = Dist(torch.device("cpu"), rank=1, world_size=2)
    with pytest.raises(UserError, match="rank 1 on .* lacks the checkpoint that rank 0 resumes from.* all nodes share"):
        run._load_step_of_main(CheckpointReader("base", "d1"), 5)


@pytest.fixture
def beats(monkeypatch):
    """Returns a function that makes the heartbeat of a rank; all share a store. make.ended: why ranks were ended."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 0.3)
    monkeypatch.setattr(heartbeat, "GRACE_SECONDS", 0.1)
    store, ended, made = dist.HashStore(), [], []

    def make(rank, connect=lambda: store):
        beat = Heartbeat(connect, rank, 2, f"host{rank}", watches=rank == 0)
        beat._end = lambda problem: (ended.append(problem), beat.stopping.set())
        made.append(beat)
        return beat

    make.ended = ended
    yield make
    for beat in made:
        beat.stopping.set()


def test_heartbeat_of_living_ranks_ends_nothing(beats):
    ranks = [beats(0), beats(1)]
    for rank in ranks[::-1]:
        rank.start()
    time.sleep(0.6)  # twice as long as a rank may be silent
    for rank in ranks:
        rank.close("done")
    assert beats.ended == []


def test_silent_rank_is_named_with_host_and_step(beats):
    other = beats(1)
    other.place = "in step 7"
    other._beat("runs")  # and never again
    beats(0).start()
    wait_until(lambda: beats.ended)
    assert beats.ended[0].startswith("rank 1 on host1 has not responded for ")
    assert beats.ended[0].endswith("it was in step 7")


def test_rank_that_failed_is_named_after_a_grace_period(beats):
    other = beats(1)
    other.place = "in step 7"
    other._beat("failed")
    beats(0).start()
    wait_until(lambda: beats.ended)
    assert beats.ended == ["rank 1 on host1 ended with an error, in step 7"]


def test_rank_that_is_done_is_not_waited_for(beats):
    beats(1)._beat("done")
    first = beats(0)
    first.start()
    time.sleep(0.6)
    first.close("done")
    assert beats.ended == []


def test_store_that_stays_away_ends_the_rank(beats):
    is_there = threading.Event()
    is_there.set()
    store = dist.HashStore()

    class Link:
        def set(self, *pair):
            if not is_there.is_set():
                raise RuntimeError("connection reset")
            store.set(*pair)

    beats(1, Link).start()
    is_there.clear()
    wait_until(lambda: beats.ended)
    assert "no contact to the store of rank 0" in beats.ended[0] and "connection reset" in beats.ended[0]


def test_heartbeat_tells_where_the_others_are(beats):
    other, own = beats(1), beats(0)
    other.place = "evaluating or saving after step 5"
    other._beat("runs")
    own._beat("runs")
    assert own.describe_others() == "rank 1 on host1: evaluating or saving after step 5"
    assert json.loads(own.store.get("1"))["count"] == 1
