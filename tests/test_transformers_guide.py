"""
docs/transformers.md: its commands and its code run as written.

    python -m pytest tests/test_transformers_guide.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from factories import save_checkpoint, tiny_gpt

from nanochat import load

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_guide_runs_as_written(base_dir, tmp_path, monkeypatch, capsys, golden_tokenizer):
    pytest.importorskip("transformers")
    save_checkpoint(tiny_gpt(), "sft", tokenizer=golden_tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    guide = (ROOT / "docs/transformers.md").read_text(encoding="utf-8")
    namespace: dict = {}
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", guide, re.DOTALL):
        if language == "bash":
            subprocess.run(["bash", "-ec", code], check=True)
        else:
            exec(code, namespace)
    assert "<|python_start|>6*7<|python_end|>42.<|assistant_end|>" in capsys.readouterr().out
    assert load("sft", "tuned", device="cpu").chat("Hello", max_tokens=2) is not None
