"""
Twenty steps of base_train on the golden text have the losses that are stored in tests/golden/loss_curve.json.

    python -m pytest tests/test_loss_curve.py
    python tests/test_loss_curve.py             # writes the file again, after a change that is meant to change losses
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
from conftest import GOLDEN

from nanochat.tokenizer import Tokenizer
from scripts import base_train

FILE = GOLDEN / "loss_curve.json"
FLAGS = "--recipe nanochat --device cpu --no-compile --attention banded --depth 2 --aspect-ratio 32".split()
FLAGS += "--head-dim 32 --max-seq-len 128 --device-batch-size 4 --total-batch-size 1024 --num-iterations 20".split()
FLAGS += "--warmup-steps 5 --eval-tokens 2048 --eval-every 5 --sample-every -1".split()
# In nats and bits. The same code without AVX-512 or without any AVX differs by at most 3e-6; on a Zen 4 by 1e-7, also
# if oneDNN multiplies instead of MKL. AMX, which rounds to bfloat16, is not used for float32 products
# (hardware.pick_matmul_precision). A matrix learning rate that is 5 % too high differs by 9e-5 in the last bits per
# byte.
TOLERANCE = 2e-5


def losses_of_run(base_dir):
    """Pretrains in this folder and returns the logged curves: training loss (smoothed) and validation bits per byte."""
    Tokenizer.load(GOLDEN / "tokenizer").save(base_dir / "tokenizer")
    base_train.main([*FLAGS, "--data-dir", str(GOLDEN / "packing/data")])
    metrics_file = base_dir / "report/metrics/base_train-d2.jsonl"
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in ("train/loss", "val/bpb")}


@pytest.mark.slow
def test_loss_curve_equals_golden_curve(base_dir, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    expected = json.loads(FILE.read_text())
    found = losses_of_run(base_dir)
    assert len(found["train/loss"]) == 20
    assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=0, abs=TOLERANCE)
    assert found["val/bpb"] == pytest.approx(expected["val/bpb"], rel=0, abs=TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"NANOCHAT_BASE_DIR": folder, "NANOCHAT_DTYPE": "float32"}
        curves = {name: [round(value, 7) for value in curve] for name, curve in losses_of_run(Path(folder)).items()}
    FILE.write_text(json.dumps(curves, indent=1) + "\n")
