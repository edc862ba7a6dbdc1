"""
docs/new-ability.md, "Your own task": followed step by step in a copy of the code.

    python -m pytest tests/test_tasks_guide.py
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from factories import save_checkpoint, tiny_gpt

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def chat_model(base_dir, golden_tokenizer):
    """Saves a tokenizer and an untrained chat model."""
    save_checkpoint(tiny_gpt(initial=True), "sft", "d2", tokenizer=golden_tokenizer)


@pytest.mark.slow
def test_guide_to_adding_a_task_works_as_written(tmp_path, chat_model):
    guide = (ROOT / "docs/new-ability.md").read_text(encoding="utf-8").split("## Your own task\n")[1]
    file, lines, command = re.findall(r"```(?:python|diff|sh)\n(.*?)```", guide, re.DOTALL)
    path = re.search(r"`(tasks/\w+\.py)`", guide)[1]
    copy = tmp_path / "copy"
    for folder in ("nanochat", "tasks", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))

    assert not (copy / path).exists()
    (copy / path).write_text(file, encoding="utf-8")
    new_import, new_entry = (line.removeprefix("+") for line in lines.splitlines(keepends=True))
    script = (copy / "scripts/chat_eval.py").read_text(encoding="utf-8")
    script, imports = re.subn(r"(?m)^(?=from tasks\.)", lambda _: new_import, script, count=1)
    script, entries = re.subn(r"(?m)^(TASKS\b.*\{\n)", lambda match: match[0] + new_entry, script, count=1)
    assert imports == entries == 1
    (copy / "scripts/chat_eval.py").write_text(script, encoding="utf-8")

    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "-ec", command], cwd=copy, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^Echo\b.*[/ ]3\b", ran.stdout, re.MULTILINE), ran.stdout
