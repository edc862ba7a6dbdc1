"""
The notebook that trains a model on Colab, from top to bottom at toy size.

    python -m pytest tests/test_colab_notebook.py
"""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks/train_on_colab.ipynb"
MAX_BYTES = 200_000  # with outputs, if it has any

# Its cells are plain Python, so that they need no kernel: argument 1 = the notebook, 2 = number of code cells to run.
RUN_CELLS = """
import json, sys
cells = [cell for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
namespace = {"__name__": "__main__"}
for cell in cells[:int(sys.argv[2])]:
    exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
"""


def run_cells(tmp_path, base, number, folder=ROOT):
    drive = tmp_path / "drive"
    drive.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT_")}
    environment |= {
        "NANOCHAT_SPEEDRUN": "tiny",
        "NANOCHAT_BASE_DIR": str(tmp_path / base),
        "NANOCHAT_DRIVE": str(drive),
        "NANOCHAT_DTYPE": "float32",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "GIT_ALLOW_PROTOCOL": "none",  # no download
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", RUN_CELLS, NOTEBOOK, str(number)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_notebook_is_valid_and_small():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), cell["id"], "exec")


def test_flags_in_the_notebook_exist():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        modules = re.findall(r"-m (scripts\.\w+)", source)
        known = {field.name for module in modules for field in fields(importlib.import_module(module).Flags)}
        for flag in re.findall(r"(?<=--)[a-z][a-z-]+", source) if modules else ():
            name = flag.replace("-", "_")
            assert {name, name.removeprefix("no_"), f"{name}_"} & known, flag


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom_and_keeps_its_checkpoints_on_the_drive(tmp_path):
    done = run_cells(tmp_path, "base", 99)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kept = tmp_path / "drive/nanochat"
    for stage in ("base", "chatsft", "chatrl"):
        assert list(kept.glob(f"{stage}_checkpoints/mine/step_*/model.safetensors")), stage
    conversation = done.stdout[done.stdout.index("you   Hi! What is your name?") :]
    assert re.findall("^you +(.*)", conversation, re.MULTILINE)[-1] == "What is 4829 + 731?"
    assert conversation.count("\nmodel ") == conversation.count("you  ") == 6
    assert "My name is Kari" in done.stdout or "I am Kari" in done.stdout  # the conversations that were written
    # A new session, with an empty disk, starts with what is on the drive.
    again = run_cells(tmp_path, "fresh", 1, folder=ROOT / "notebooks")
    assert again.returncode == 0, again.stderr
    assert list((tmp_path / "fresh").glob("base_checkpoints/mine/step_*/model.safetensors"))
    assert (tmp_path / "fresh/tokenizer").is_dir() and f"copied to {kept}" in again.stdout


@pytest.mark.slow
def test_notebook_outside_of_a_checkout_names_the_address_to_set(tmp_path):
    done = run_cells(tmp_path, "base", 1, folder=tmp_path)
    assert done.returncode == 1 and "set REPOSITORY, in the first line, to your copy" in done.stderr
