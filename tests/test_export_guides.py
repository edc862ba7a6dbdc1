"""
docs/transformers.md and docs/trl.md: their commands and their code run as written.

    python -m pytest tests/test_export_guides.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import save_checkpoint, tiny_gpt

from nanochat import load

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def chat_model(base_dir, tmp_path, monkeypatch, golden_tokenizer):
    """Saves a random chat model; commands find its scripts from any folder."""
    save_checkpoint(tiny_gpt(sequence_len=256), "sft", tokenizer=golden_tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def run_guide(name):
    """Runs the blocks of a guide in order, all but installations. Returns the names that its Python code defines."""
    guide = (ROOT / "docs" / name).read_text(encoding="utf-8")
    namespace: dict = {}
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", guide, re.DOTALL):
        if language == "python":
            exec(code, namespace)
        else:
            commands = "\n".join(line for line in code.splitlines() if not line.startswith("pip install"))
            subprocess.run(["bash", "-ec", commands], check=True)
    return namespace


@pytest.mark.slow
def test_guide_to_transformers_runs_as_written(chat_model, capsys):
    pytest.importorskip("transformers")
    run_guide("transformers.md")
    assert "<|python_start|>6*7<|python_end|>42.<|assistant_end|>" in capsys.readouterr().out
    assert load("sft", "tuned", device="cpu").chat("Hello", max_tokens=2) is not None


@pytest.mark.slow
def test_guide_to_trl_runs_as_written_and_lowers_the_loss(chat_model, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    pytest.importorskip("trl")
    losses = []
    original = transformers.Trainer.train

    def train(self):
        original(self)
        losses.append([entry["loss"] for entry in self.state.log_history if "loss" in entry])

    monkeypatch.setattr(transformers.Trainer, "train", train)
    names = run_guide("trl.md")
    assert losses[0][-1] < losses[0][0] and losses[1][-1] < losses[1][0] and len(losses[2]) == 5

    with torch.no_grad():
        ids = torch.tensor([names["tokenizer"]("so it is")["input_ids"]])
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)(
            ids
        ).logits
        assert torch.allclose(names["merged"](ids).logits, adapted, atol=1e-5)
        model = load("sft", "tuned-lora", device="cpu").model
        assert torch.allclose(model(ids), adapted, atol=1e-4)
    completions = [[{"content": "It is 3 + 4 = 7."}], [{"content": "8"}]]
    assert names["reward"](completions, ["7", "7"]) == [1.0, 0.0]
