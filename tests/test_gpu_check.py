"""
dev/gpu_check.sh as a dry run: its results, and that a second call runs only what has not passed.

    python -m pytest tests/test_gpu_check.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def gpu_check(folder, *arguments):
    command = ["bash", ROOT / "dev/gpu_check.sh", "--out", folder, "--commit", "abc", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)


def test_second_dry_run_repeats_only_what_has_not_passed(tmp_path):
    done = gpu_check(tmp_path, "--dry-run", "0", "7")
    assert done.returncode == 0, done.stdout
    assert "| 7 | **two_models**: passed |" in (tmp_path / "table.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["commit"] == "abc" and results["parts"]["7"]["rows"][0]["measured"] == "40 answers"

    for number in range(12):  # as if all but one had passed
        results["parts"][str(number)] = results["parts"]["0"]
    results["parts"]["0"] = results["parts"]["0"] | {"status": "failed"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    done = gpu_check(tmp_path, "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith("0 machine: passed")
    assert "7 two_models" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_fails_and_names_the_remedy(tmp_path):
    done = gpu_check(tmp_path, "0")
    assert done.returncode == 1
    assert "0 machine: failed" in done.stdout and "use --dry-run" in done.stdout
