"""
The Hugging Face format: models of each vintage, the tokenizer and the chat template, loaded by transformers.

    python -m pytest tests/test_export_hf.py
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from factories import CPU, save_checkpoint, tiny_engine, tiny_gpt
from safetensors.torch import load_file

from nanochat.dataloader import PretrainLoader
from nanochat.dataset import RowGroups, split_shards
from nanochat.distributed import Dist
from nanochat.legacy import VINTAGES
from nanochat.logging import save_numbers
from nanochat.request import Request
from scripts import export

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["", " ", "Hello, world!\n", "it's 1234567 o'clock\r\n\r\n  now", "日本語 и кириллица 😀 e\u0301", "<|bos|"]
PROMPTS = ("The cat", " one two three four five six seven eight nine ten" * 6, "日本 12345" * 3)
SIZES = {"n_layer": 5, "n_embd": 64, "n_head": 4, "sequence_len": 512}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, golden_tokenizer):
    """(our model, folder) of a classic fine-tuned model."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny_gpt(**VINTAGES["classic"]).eval()
    export_model(model, folder, golden_tokenizer)
    return model, folder / "hf"


def export_model(model, folder, tokenizer, *flags):
    """Exports the model, as a fine-tuned one, to folder/hf."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        save_checkpoint(model, "sft", tokenizer=tokenizer)
        export.main(["--out", str(folder / "hf"), *flags])


# ---- the model ----


def test_classic_model_is_the_native_class_with_equal_logits(exported):
    model, folder = exported
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(hf_model) is transformers.NanoChatForCausalLM
    ids = torch.randint(0, 1024, (2, 40))
    with torch.no_grad():
        assert torch.allclose(hf_model(ids).logits, model(ids), atol=1e-4)


@pytest.fixture(scope="module", params=["classic", "modern"])
def checked(request, tmp_path_factory, golden_tokenizer):
    """The results of tests/hf_checks.py for a model of each vintage, from a process that cannot import nanochat."""
    folder = tmp_path_factory.mktemp(request.param)
    features = VINTAGES[request.param] | SIZES
    model = tiny_gpt(n_kv_head=2, **features).eval()
    export_model(model, folder, golden_tokenizer)
    torch.manual_seed(1)
    ids = torch.randint(0, golden_tokenizer.bos, (2, 400))
    bfloat16 = tiny_gpt(n_kv_head=2, dtype=torch.bfloat16, **features).eval()
    prompts = [[golden_tokenizer.bos, *golden_tokenizer.encode(text)] for text in PROMPTS]
    requests = [Request(prompt, max_tokens=200, temperature=0.0) for prompt in prompts]
    with torch.no_grad():
        reference = {"ids": ids, "logits": model(ids), "logits_bfloat16": bfloat16(ids), "prompts": prompts}
    completions = tiny_engine(model, golden_tokenizer).generate(requests)
    reference["completions"] = [completion.tokens for completion in completions]
    torch.save(reference, folder / "reference.pt")
    command = [sys.executable, ROOT / "tests/hf_checks.py", folder / "hf", folder / "reference.pt"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_exported_model_agrees_in_a_process_without_nanochat(checked):
    assert checked.pop("bfloat16") < 1.2
    wrong = {check: number for check, number in checked.items() if number > 1e-4}
    assert not wrong
    assert len(checked) == 18


def test_golden_modern_checkpoint_has_its_bits_per_byte_in_transformers(base_dir, tmp_path, golden_tokenizer):
    source = golden("checkpoint/modern")
    expected = json.loads((source / "expected.json").read_text())
    shutil.copytree(source, base_dir / "base_checkpoints/modern")
    golden_tokenizer.save(base_dir / "tokenizer")
    export.main(["-i", "base", "--out", str(tmp_path / "hf")])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    B, T = expected["device_batch_size"], expected["max_seq_len"]
    _, val_shards = split_shards(golden("packing/data"))
    loader = PretrainLoader(golden_tokenizer, RowGroups(val_shards), batch_size=B, sequence_len=T, dist=Dist(CPU))
    nats = num_bytes = 0.0
    with torch.no_grad():
        for inputs, targets in islice(loader.batches(), expected["eval_tokens"] // (B * T)):
            losses = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten(), reduction="none")
            counted = golden_tokenizer.token_bytes()[targets.flatten()]
            nats += losses[counted > 0].sum().item()
            num_bytes += counted.sum().item()
    assert nats / math.log(2) / num_bytes == pytest.approx(expected["val_bpb"], abs=1e-5)


def test_bfloat16_export_is_half_as_large_and_keeps_scalars_in_float32(tmp_path, golden_tokenizer):
    export_model(tiny_gpt(), tmp_path, golden_tokenizer, "--dtype", "bfloat16")
    weights = load_file(tmp_path / "hf/model.safetensors")
    full = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert full == {"model.resid_lambdas", "model.x0_lambdas", "model.smear_lambda", "model.backout_lambda"}
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


# ---- the model card ----


def test_model_card_has_training_scores_and_parameters_of_the_checkpoint(base_dir, tmp_path, golden_tokenizer):
    settings = {"settings": {"total_batch_size": 1000, "matrix_lr": 0.02}}
    parent = save_checkpoint(tiny_gpt(), "base", step=30, tokenizer=golden_tokenizer, meta=settings) / "step_000030"
    folder = save_checkpoint(tiny_gpt(), "sft", step=5, meta=settings | {"base": str(parent)}) / "step_000005"
    save_numbers("chat_eval_sft", {"model": str(folder), "GSM8K": 0.25, "GSM8K, interval": "0.2000 to 0.3000"})
    save_numbers("base_eval", {"model": "another model", "CORE": 0.9})
    export.main(["--out", str(tmp_path / "hf")])
    card = (tmp_path / "hf/README.md").read_text()
    assert "| pretraining | 30 | 30K | unknown | matrix_lr 0.02 |" in card
    assert "| fine-tuning | 5 | 5K | unknown | matrix_lr 0.02 |" in card
    assert "| GSM8K | 0.2500 |" in card and "| GSM8K, interval | 0.2000 to 0.3000 |" in card
    assert "CORE |" not in card and "trust_remote_code=True" in card and "| total | " in card


def test_code_of_the_model_card_runs(exported, monkeypatch, capsys):
    card = (exported[1] / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(exported[1])
    exec(code, {})  # noqa: S102
    assert capsys.readouterr().out


# ---- the tokenizer ----


def random_texts(count):
    """Texts of characters from all of Unicode, mixed with ASCII."""
    rng = random.Random(0)
    for _ in range(count):
        codes = [rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000))) for _ in range(20)]
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def test_tokenizer_gives_the_same_ids(exported, golden_tokenizer):
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1])
    for text in [*TEXTS, *random_texts(200)]:
        assert hf_tokenizer(text)["input_ids"] == golden_tokenizer.encode(text)
        assert hf_tokenizer.decode(golden_tokenizer.encode(text)) == text


@pytest.mark.slow
def test_tokenizer_gives_the_same_ids_on_all_of_unicode(exported, golden_tokenizer):
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1])
    codes = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    runs = ["".join(codes[i : i + 64]) for i in range(0, len(codes), 64)]
    for texts in (codes, runs, list(random_texts(20_000))):
        found = [encoding.ids for encoding in hf_tokenizer.backend_tokenizer.encode_batch(texts)]
        assert found == golden_tokenizer.encode_batch(texts)


def test_chat_template_gives_ids_and_mask_of_the_golden_conversations(exported):
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1])
    for case in json.loads(golden("conversations/cases.json").read_text()):
        messages = case["conversation"]["messages"]
        result = hf_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert result["input_ids"][: case["max_tokens"]] == case["ids"]
        assert result["assistant_masks"][: case["max_tokens"]] == case["mask"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        prompt = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt["input_ids"] == case["completion_ids"]
