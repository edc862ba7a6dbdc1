"""
The portable preset from the command line: tokenizer and model are trained, saved, resumed, loaded and generate text.

    python -m pytest tests/test_portable.py
"""

import shutil

import pytest
import torch
from conftest import GOLDEN

from nanochat import costs, gpt
from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine
from nanochat.request import Request
from nanochat.tokenizer import PORTABLE_SPLIT_PATTERN, Tokenizer, default_dir
from scripts import base_train, tok_train

DATA = ["--data-dir", str(GOLDEN / "packing/data")]
SIZES = ["--depth", "3", "--aspect-ratio", "16", "--head-dim", "16", "--max-seq-len", "64"]
RUN = ["--device-batch-size", "2", "--total-batch-size", "256", "--eval-every", "-1", "--sample-every", "-1"]
MACHINE = ["--device", "cpu", "--no-compile", "--attention", "banded"]


@pytest.mark.slow
def test_portable_model_trains_resumes_loads_and_generates(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tok_train.main([*DATA, "--portable", "--vocab-size", "300"])
    flags = ["--portable", *DATA, *SIZES, *RUN, *MACHINE, "--num-iterations", "6", "--save-every", "3"]
    base_train.main(flags)
    weights = load_weights()
    folder = tmp_path / "base_checkpoints/d3"
    shutil.rmtree(folder / "step_000006")
    base_train.main([*flags, "--resume"])
    assert weights.keys() == load_weights().keys()
    assert all(torch.equal(weight, load_weights()[name]) for name, weight in weights.items())

    tokenizer = Tokenizer.load(default_dir())
    assert tokenizer.pattern == PORTABLE_SPLIT_PATTERN
    model, _, _ = load_model("base", "d3", -1, torch.device("cpu"), torch.float32)
    assert {field: getattr(model.config, field) for field in gpt.PORTABLE} == gpt.PORTABLE
    assert model.config.windows == [64] * 3
    assert sum(p.numel() for p in model.parameters()) == costs.param_counts(model.config)["total"]
    names = {name.split(".", 1)[0] for name in model.state_dict()}
    assert names == {"transformer", "lm_head"} and not any("ve_gate" in name for name in model.state_dict())

    prompt = [tokenizer.bos, *tokenizer.encode("The")]
    (completion,) = Engine(model, tokenizer).generate([Request(prompt, max_tokens=4, temperature=0.0)])
    tokens = list(prompt)
    for token in completion.tokens:
        logits_V = model(torch.tensor([tokens]))[0, -1]
        assert token == logits_V.argmax()
        tokens.append(token)


def load_weights():
    model, _, _ = load_model("base", "d3", -1, torch.device("cpu"), torch.float32)
    return {name: weight.clone() for name, weight in model.state_dict().items()}
