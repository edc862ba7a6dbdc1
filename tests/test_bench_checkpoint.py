"""
The benchmark of checkpoints at a tiny size: it measures a stall, a copy and a write, and leaves nothing behind.

    python -m pytest tests/test_bench_checkpoint.py
"""

import json

from scripts.bench import __main__ as bench

TINY = ["checkpoint", "--device", "cpu", "--depth", "1", "--head-dim", "64", "--vocab-size", "300", "--rounds", "1"]


def test_benchmark_reports_stall_copy_and_write(base_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "disk"
    folder.mkdir()
    ratios = bench.main([*TINY, "--folder", str(folder)])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "checkpoint" and last["ratios"] == ratios and ratios["stall"] > 0
    assert last["bytes"] > 1e6 and all(seconds > 0 for seconds in last["seconds"])
    assert not list(folder.iterdir()) and not list(base_dir.iterdir())
