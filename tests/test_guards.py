"""
Guard rails: jumps of the loss, weights that differ, slow ranks, the state of a GPU. What needs several processes is in
test_distributed.py, bad steps are in test_train.py.

    python -m pytest tests/test_guards.py
"""

import random

import pytest
import torch

from nanochat import guards, hardware
from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.guards import Guards, RankReport, weight_checksum

CPU = Dist(torch.device("cpu"))


class Ranks(Dist):
    """A rank among several; the reports of the others are given."""

    reports: list[RankReport]

    def gather(self, value):
        return self.reports


def ranks(*reports, rank=0, device="cpu"):
    dist = Ranks(torch.device(device), rank=rank, world_size=len(reports))
    object.__setattr__(dist, "reports", list(reports))
    return dist


def make(dist=CPU):
    return Guards(dist, 0, lambda: "no checkpoint")


def feed(losses, capsys):
    """The warnings about these losses."""
    guard = make()
    for step, loss in enumerate(losses):
        guard.check_loss(loss, f"step {step} (data: shard 1)")
    return capsys.readouterr().err.splitlines()


def noisy(count, mean=3.0, slope=0.0):
    rng = random.Random(0)
    return [mean - slope * i + rng.gauss(0, 0.05) for i in range(count)]


def test_jump_of_the_loss_is_reported_once(capsys):
    (warning,) = feed([*noisy(60), 5.0, 5.1, 5.2, 4.0, *noisy(100)], capsys)
    assert "the loss jumped to 5.000 at step 60 (data: shard 1); it was 3.0" in warning


@pytest.mark.parametrize(
    "losses",
    [noisy(2000), noisy(300, mean=10.0, slope=0.02), [0.1, 9.0], [2.0] * 100],
    ids=["noise", "falling", "first steps", "constant"],
)
def test_normal_losses_cause_no_warning(losses, capsys):
    assert feed(losses, capsys) == []


def test_checksum_changes_with_any_bit_and_with_any_order_of_bits():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(8, 4, generator=generator), torch.randn(5, generator=generator).bfloat16()]
    before = weight_checksum(params)
    assert weight_checksum(params) == before
    for param, integers in ((params[0], torch.int32), (params[1], torch.int16)):
        for bit in (0, 7, 14):
            flat = param.view(integers).view(-1)
            flat[3] ^= 1 << bit
            assert weight_checksum(params) != before
            flat[3] ^= 1 << bit


def test_rank_with_other_weights_is_named_by_rank_and_host():
    same = [RankReport("a", 1, 0.0), RankReport("a", 1, 0.0), RankReport("b", 1, 0.0)]
    with pytest.raises(UserError) as caught:
        make()._check_weights([*same, RankReport("b", 2, 0.0)], step=300)
    assert "after step 300 the weights of rank 3 on b differ from those of the other ranks" in str(caught.value)


def test_all_ranks_are_named_if_none_is_in_the_majority():
    reports = [RankReport("a", i // 10, 0.0) for i in range(20)]
    with pytest.raises(UserError, match="rank 7 on a and 12 more differ from each other"):
        make()._check_weights(reports, step=1)


def test_slow_rank_warns_about_itself(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    reports = [RankReport("a", 0, seconds) for seconds in (1.0, 1.1, 1.5, 0.9)]
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        make(ranks(*reports, rank=rank)).check_ranks([torch.zeros(2)], step=200)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: rank 2 on ")
    assert "takes 1.50 times as long here as on the median rank in the 100 steps before step 200" in warning


def test_gpu_that_becomes_slower_is_reported_with_its_state(capsys, monkeypatch):
    monkeypatch.setattr(guards, "Stopwatch", lambda device: None)
    monkeypatch.setattr(guards, "gpu_health", lambda device: "900 of 1980 MHz, 91 °C, slowed down by heat")
    guard = make(ranks(RankReport("a", 0, 1.0), device="cuda"))
    for seconds in (1.0, 1.2, 1.3):
        guard.dist.reports[0] = RankReport("a", 0, seconds)
        guard.check_ranks([torch.zeros(2)], step=100)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "takes 1.30 times as long here as before" in warning
    assert warning.endswith(": 900 of 1980 MHz, 91 °C, slowed down by heat")


def test_time_per_token_is_that_since_the_last_check(monkeypatch):
    guard = make()
    monkeypatch.setattr(guard.stopwatch, "seconds", lambda: 2.0)
    guard.note_time(4)
    guard.note_time(4)
    guard.check_ranks([torch.zeros(2)], step=100)
    assert (guard.fastest, guard.seconds, guard.tokens) == (0.5, 0.0, 0)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("1200, 1980, 88, 0x0000000000000084", "1200 of 1980 MHz, 88 °C, slowed down by power cap and power brake"),
        ("1980, 1980, 40, 0x0000000000000001", "1980 of 1980 MHz, 40 °C"),
        ('Field "clocks_event_reasons.active" is not a valid field to query.', ""),
    ],
)
def test_gpu_health_reads_nvidia_smi(line, expected, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"uuid": "1-2"}))
    assert hardware.gpu_health(torch.device("cuda", 0)) == expected
    assert hardware.gpu_health(torch.device("cpu")) == ""
