"""
speedrun.sh at toy size: killed in the middle of a stage and started again, it skips what is finished and resumes the
rest. Also its error messages.

    python -m pytest tests/test_speedrun.py
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from factories import wait_until

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (Path(sys.prefix) / "bin/activate").exists(), reason="speedrun.sh needs a virtual environment to reuse"
)


@pytest.fixture
def speedrun(tmp_path):
    """Starts speedrun.sh in this environment with a temporary base folder; returns the process and its log file."""
    processes = []

    def start(**variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT_")}
        environment |= {"NANOCHAT_VENV": sys.prefix, "NANOCHAT_BASE_DIR": str(tmp_path / "base")} | variables
        log = tmp_path / f"log{len(processes)}.txt"
        with log.open("w") as output:
            command = ["bash", ROOT / "speedrun.sh"]
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        processes.append(process)
        return process, log

    yield start
    for process in processes:
        if process.poll() is None:
            kill(process)


def kill(process):
    """Kills the script and the stage that it runs."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_speedrun_resumes_and_its_model_answers(speedrun, tmp_path):
    process, log = speedrun(NANOCHAT_SPEEDRUN="tiny")
    checkpoints = tmp_path / "base/base_checkpoints/speedrun"

    def has_checkpoint():
        assert process.poll() is None, log.read_text()
        return list(checkpoints.glob("step_*"))

    wait_until(has_checkpoint, seconds=300)
    kill(process)
    assert "== base_train:" in log.read_text() and "step 40/40" not in log.read_text()

    process, log = speedrun(NANOCHAT_SPEEDRUN="tiny")
    code = process.wait(timeout=600)
    output = log.read_text()
    assert code == 0, output
    for stage in ("data", "tok_train", "tok_eval"):
        assert f"== {stage}: skipped, finished before" in output
    assert re.search(r"^== base_train: .* --resume$", output, re.MULTILINE)
    assert "step 1/40" not in output and "step 40/40" in output
    for stage in ("base_train", "base_eval", "chat_sft", "chat_eval"):
        assert re.search(rf"^== {stage} took \d+ s$", output, re.MULTILINE)
    assert re.search(r"^> What is the capital of France\?\n.*\S", output, re.MULTILINE)
    assert "done in" in output.splitlines()[-1]


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"NANOCHAT_SPEEDRUN": "huge"}, "error: NANOCHAT_SPEEDRUN is huge: use tiny, or unset it"),
        ({"NANOCHAT_DATA_DIR": "/no/folder"}, "error: NANOCHAT_DATA_DIR is /no/folder, which is not a folder"),
        ({"NANOCHAT_VENV": "/no/venv"}, "error: NANOCHAT_VENV is /no/venv, which is not a virtual environment"),
    ],
)
def test_bad_setting_ends_in_one_line(speedrun, variables, message):
    process, log = speedrun(**variables)
    assert process.wait(timeout=60) == 1
    [line] = log.read_text().splitlines()
    assert line.startswith(message)
