"""
A short version of tests/faults.py: a kill of each stage, a damaged checkpoint, a full and a read-only disk.

    python -m pytest tests/test_faults.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")


@pytest.mark.slow
def test_runs_with_faults_end_as_the_uninterrupted_run(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(FAULTS.parent.parent)}
    parts = ["base", "sft", "rl", "damage", "disk"]  # the disk is left out where it cannot be mounted
    command = [sys.executable, str(FAULTS), *parts, "--count", "1", "--folder", str(tmp_path / "all")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    tallies = json.loads(result.stdout.splitlines()[-1])
    assert [tallies[part]["kills"] for part in ("base", "sft", "rl")] == [1, 1, 1]
    assert tallies["damage"]["runs"] + tallies["damage"]["refused"] == 1
