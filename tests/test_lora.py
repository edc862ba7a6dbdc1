"""
LoRA: adapters start from the model, are saved alone, resumed bitwise and merged exactly; the base model is verified.

    python -m pytest tests/test_lora.py
"""

import json
import re
import shutil

import pytest
import torch
from factories import CPU, GOLDEN_VOCAB_SIZE, conversation, randomize, save_checkpoint, tiny_config, tiny_gpt

from nanochat import checkpoint_manager, hardware, lora, recipe
from nanochat.common import UserError
from nanochat.costs import GIB, TrainingSetup, lora_params, training_memory
from nanochat.muon import build_optimizer
from nanochat.recipe import RecipeFlags, model_config
from nanochat.tokenizer import SPECIAL_TOKENS
from scripts import chat_sft

RANK = 4
OFF = [f"--{name}-epochs=0" for name in ("smoltalk", "mmlu", "gsm8k", "simplespelling", "spellingbee")]
SFT = [*OFF, "--identity-epochs", "20", "--device", "cpu", "--no-compile", "--device-batch-size", "2"]
SFT += ["--total-batch-size", "128", "--eval-every", "-1", "--save-every", "3", "--num-iterations", "6"]


def tokens():
    return torch.randint(GOLDEN_VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(1))


# ---- the adapters ----


def test_adapters_start_from_the_model_itself():
    model, plain = tiny_gpt().eval(), tiny_gpt().eval()
    lora.use_lora(model, RANK)
    assert torch.equal(model(tokens()), plain(tokens()))


def test_only_adapters_have_gradients_and_reach_the_optimizer():
    model = tiny_gpt()
    lora.use_lora(model, RANK)
    model(tokens(), tokens()).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(lora.adapters(model))
    optimizer = build_optimizer(model, recipe.lora_groups(recipe.Hyperparameters(), 0.01))
    assert set(optimizer.param_groups[0]["names"]) == with_gradient
    assert len(with_gradient) == 2 * 6 * model.config.n_layer + 1  # six matrices a layer, and the special tokens' rows


def test_merged_weights_compute_what_the_adapted_model_computes():
    model = tiny_gpt().eval()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora.use_lora(model, RANK)
    randomize(model.lm_head.parametrizations["weight"][0])
    for block in model.transformer.h:
        randomize(block.mlp.c_fc.parametrizations["weight"][0], std=0.05)
        randomize(block.attn.c_k.parametrizations["weight"][0], std=0.05)
    merged = tiny_gpt().eval()
    saved = {name: p.detach() for name, p in lora.adapters(model).items()}
    merged.load_state_dict(lora.merge(base, saved, RANK, GOLDEN_VOCAB_SIZE))
    with torch.no_grad():
        expected, actual = model(tokens()), merged(tokens())
    assert not torch.allclose(expected, tiny_gpt().eval()(tokens()), atol=0.1)
    assert (expected - actual).abs().max() < 1e-5 * expected.abs().max()


def test_only_rows_of_special_tokens_change_in_lm_head():
    model = tiny_gpt()
    before = model.lm_head.weight.detach().clone()
    lora.use_lora(model, RANK)
    with torch.no_grad():
        model.lm_head.parametrizations["weight"][0].rows.add_(1)
    changed = (model.lm_head.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(GOLDEN_VOCAB_SIZE - len(SPECIAL_TOKENS), GOLDEN_VOCAB_SIZE))


@pytest.mark.parametrize("rank", [-1, 17])
def test_rank_that_no_matrix_has_is_an_error(rank):
    with pytest.raises(UserError, match="--lora-rank .*: use 1 to 16"):
        lora.check_rank(rank, tiny_config())


def test_plan_counts_what_is_trained_and_saves_the_rest():
    model = tiny_gpt()
    lora.use_lora(model, RANK)
    assert lora_params(model.config, RANK) == sum(p.numel() for p in lora.adapters(model).values())
    config = model_config(RecipeFlags(depth=12), 32768)
    full, adapted = (training_memory(config, TrainingSetup(1, accumulation=2, lora_rank=rank)) for rank in (0, 16))
    assert adapted.parts["gradients"] + adapted.parts["optimizer state"] < 0.04 * (
        full.parts["gradients"] + full.parts["optimizer state"]
    )
    assert adapted.peak < 0.5 * full.peak
    # torch.cuda.max_memory_allocated over two steps of two micro-batches, not compiled: all parameters 6.166 GiB.
    setup = TrainingSetup(rows=2, accumulation=2, compiled=False, attention="banded", lora_rank=16)
    assert training_memory(config, setup).peak / GIB == pytest.approx(3.406, rel=0.05)


# ---- runs ----


@pytest.fixture
def sft(base_dir, tmp_path, golden_tokenizer, monkeypatch):
    """Runs chat_sft from a tiny base model on a file of conversations; returns the newest checkpoint."""
    monkeypatch.setattr(hardware, "pick_matmul_precision", lambda *_: "highest")
    monkeypatch.setattr(hardware, "bf16_faster_on_cpu", lambda: False)
    save_checkpoint(tiny_gpt(), tokenizer=golden_tokenizer)
    file = tmp_path / "conversations.jsonl"
    lines = [json.dumps(conversation("What is the sun?", "The sun is a star.")["messages"])] * 20
    file.write_text("\n".join(lines))

    def run(*argv):
        chat_sft.main([*SFT, "--identity-file", str(file), *argv])
        return checkpoint_manager.find("sft", "tiny")

    return run


def test_checkpoint_has_adapters_only_and_loads_merged(sft):
    checkpoint = sft("--lora-rank", "4")
    saved = checkpoint.saved_weights()
    assert all(".parametrizations." in name for name in saved)
    base = checkpoint_manager.find("base", "tiny")
    size = (checkpoint.path / "model.safetensors").stat().st_size
    assert size < 0.25 * (base.path / "model.safetensors").stat().st_size
    model, _, _ = checkpoint_manager.load_model("sft", "tiny", -1, CPU, torch.float32)
    adapted = base.build_model(CPU, torch.float32).eval()
    lora.use_lora(adapted, RANK)
    lora.load_adapters(adapted, saved)
    with torch.no_grad():
        assert (model(tokens()) - adapted(tokens())).abs().max() < 1e-5
        assert not torch.allclose(model(tokens()), base.build_model(CPU, torch.float32)(tokens()), atol=1e-3)


def test_resumed_run_is_bitwise_equal(sft):
    checkpoint = sft("--lora-rank", "4")
    expected = {file.name: file.read_bytes() for file in checkpoint.path.glob("*.safetensors")}
    shutil.rmtree(checkpoint.path)
    resumed = sft("--lora-rank", "4", "--resume")
    assert resumed.step == 6
    assert {file.name: file.read_bytes() for file in resumed.path.glob("*.safetensors")} == expected


def test_loss_falls_and_the_run_reports_what_is_trained(sft, base_dir, capsys):
    sft("--lora-rank", "4", "--num-iterations", "30", "--lora-lr", "0.5")
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0] - 0.3
    assert re.search(r"LoRA of rank 4: [\d,]+ of [\d,]+ parameters are trained", out)
    (section,) = (base_dir / "report").glob("chat_sft*")
    assert "parameters are trained" in section.read_text()


def test_resuming_with_another_rank_is_an_error(sft):
    sft("--lora-rank", "4", "--num-iterations", "3")
    with pytest.raises(SystemExit, match="started with --lora-rank 4: use that"):
        sft("--lora-rank", "8", "--resume")
    with pytest.raises(SystemExit, match="started with --lora-rank 4: use that"):
        sft("--resume")


def test_changed_or_missing_base_model_is_an_error_that_names_it(sft, golden_tokenizer):
    checkpoint = sft("--lora-rank", "4", "--num-iterations", "3")
    folder = save_checkpoint(tiny_gpt(seed=1), tokenizer=golden_tokenizer)  # a new run: the earlier one is renamed
    with pytest.raises(UserError, match=r"their base model .*base_checkpoints/tiny/step_000001 has other weights now"):
        checkpoint.weights()
    with pytest.raises(SystemExit, match="has other weights now"):
        sft("--lora-rank", "4", "--resume")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="base_checkpoints/tiny/step_000001 is missing"):
        checkpoint.weights()
    folder.with_name("tiny.1").rename(folder)
    assert "lm_head.weight" in checkpoint.weights()


def test_adapted_model_is_fine_tuned_further(sft, monkeypatch):
    """All parameters on top of adapters: they are merged, and momentum starts from zero."""
    checkpoint = sft("--lora-rank", "4", "--num-iterations", "3")
    monkeypatch.setitem(checkpoint_manager.STAGES, "mid", ("chatsft_checkpoints", "chat_sft"))
    sft("-i", "mid", "--model-tag", "full", "--num-iterations", "1")
    full = checkpoint_manager.find("sft", "full")
    assert full.saved_weights().keys() == checkpoint.weights().keys()
