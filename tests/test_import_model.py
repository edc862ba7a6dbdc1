"""
Import of models: Hugging Face folders, nanochat checkpoints and repositories of the hub, and every mistake on the way.

    python -m pytest tests/test_import_model.py
"""

import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, golden
from factories import CPU, FAMILY, save_checkpoint, tiny_gpt
from file_server import running
from safetensors.torch import load_file, save_file

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import load_model
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import RowGroups, split_shards
from nanochat.distributed import Dist
from nanochat.eval.bpb import evaluate_bpb
from nanochat.export import importer
from nanochat.export.hf_tokenizer import write_tokenizer
from nanochat.tokenizer import Tokenizer
from scripts import chat_cli, chat_sft, export, import_model


@pytest.fixture
def tokenizer():
    """Another tokenizer than the golden one, of a size that gets padded."""
    return Tokenizer.train(["so it is said " * 50], vocab_size=267)


@pytest.fixture
def folder(base_dir, tmp_path, tokenizer):
    """An exported modern model; its base folder holds its checkpoint "tiny", too."""
    save_checkpoint(tiny_gpt(vocab_size=267, n_layer=3, window_pattern="SL"), "sft", tokenizer=tokenizer)
    export.main(["--out", str(tmp_path / "hf")])
    return tmp_path / "hf"


def load(tag, stage="sft"):
    model, tokenizer, _ = load_model(stage, tag, -1, CPU, torch.float32)
    return model, tokenizer


def logits(model, num_tokens=267):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(0, num_tokens, (2, 50)))


def bits_per_byte(model, tokenizer, expected):
    """Validation bits per byte on the golden shards."""
    B, T = expected["device_batch_size"], expected["max_seq_len"]
    _, val_shards = split_shards(golden("packing/data"))
    loader = PretrainLoader(tokenizer, RowGroups(val_shards), batch_size=B, sequence_len=T, dist=Dist(CPU))
    batches = [batch for _, batch in zip(range(expected["eval_tokens"] // (B * T)), loader.batches(), strict=False)]
    return evaluate_bpb(model, batches, tokenizer.token_bytes(), Dist(CPU))


# ---- what can be imported ----


@pytest.mark.parametrize("member", sorted(FAMILY.keys() - {"gains"}))
def test_exported_model_imports_with_bitwise_equal_logits(base_dir, tmp_path, tokenizer, member):
    save_checkpoint(tiny_gpt(vocab_size=267, n_layer=3, **FAMILY[member]), "rl", "trained", tokenizer=tokenizer)
    export.main(["-i", "rl", "--out", str(tmp_path / "hf")])
    import_model.main([str(tmp_path / "hf"), "--model-tag", "again", "-i", "rl"])
    original, _ = load("trained", "rl")
    imported, its_tokenizer = load("again", "rl")
    assert imported.config == original.config
    assert torch.equal(logits(imported), logits(original))
    assert its_tokenizer.fingerprint == tokenizer.fingerprint


def test_export_puts_gains_of_norms_into_the_matrices_after_them(base_dir, tmp_path, tokenizer):
    save_checkpoint(tiny_gpt(vocab_size=267, n_layer=3, norm_gains=True), "rl", "trained", tokenizer=tokenizer)
    export.main(["-i", "rl", "--out", str(tmp_path / "hf")])
    import_model.main([str(tmp_path / "hf"), "--model-tag", "again", "-i", "rl"])
    original, _ = load("trained", "rl")
    imported, _ = load("again", "rl")
    assert original.config.norm_gains and imported.config == replace(original.config, norm_gains=False)
    torch.testing.assert_close(logits(imported), logits(original), rtol=1e-4, atol=1e-4)


def test_imported_model_keeps_its_tokenizer_beside_the_one_in_place(folder, base_dir, golden_tokenizer, tokenizer):
    shutil.rmtree(base_dir / "tokenizer")
    golden_tokenizer.save(base_dir / "tokenizer")
    import_model.main([str(folder), "--model-tag", "mine"])
    assert Tokenizer.load(base_dir / "tokenizer").fingerprint == golden_tokenizer.fingerprint
    assert load("mine")[1].fingerprint == tokenizer.fingerprint


@pytest.mark.slow
def test_imported_model_can_be_chatted_with_fine_tuned_and_exported(folder, base_dir, tmp_path, capsys):
    shutil.rmtree(base_dir)
    import_model.main([str(folder), "--model-tag", "mine", "-i", "mid"])
    chat_cli.main(["-i", "mid", "-g", "mine", "-p", "hi", "-m", "4", "--device", "cpu"])
    conversations = tmp_path / "conversations.jsonl"
    messages = [{"role": "user", "content": "so"}, {"role": "assistant", "content": "it is"}]
    conversations.write_text(f"{json.dumps(messages)}\n" * 20)
    flags = ["--identity-file", str(conversations), "--identity-epochs", "1", "--smoltalk-epochs", "0"]
    flags += ["--mmlu-epochs", "0", "--gsm8k-epochs", "0", "--simplespelling-epochs", "0", "--spellingbee-epochs", "0"]
    flags += ["--primer-epochs", "0", "--total-batch-size", "128", "--device-batch-size", "1", "--num-iterations", "2"]
    chat_sft.main(
        [*flags, "-i", "mid", "--base-tag", "mine", "--model-tag", "tuned", "--device", "cpu", "--no-compile"]
    )
    export.main(["-g", "tuned", "--out", str(tmp_path / "tuned")])
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "tuned/model.safetensors")
    assert before.keys() == after.keys()


def test_resuming_an_imported_model_is_an_error(folder, tokenizer):
    import_model.main([str(folder), "--model-tag", "mine"])
    checkpoint = checkpoint_manager.find("sft", "mine")
    with pytest.raises(ValueError, match="weights only"):
        checkpoint.check_resumable(tokenizer, checkpoint.config, torch.float32)


def test_tokenizer_that_lists_every_pair_of_a_token_is_the_same(folder, tokenizer):
    """As the converter of transformers writes it: merges as strings, all pairs that make a token, in order of ids."""
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    pairs = [(text[:i], text[i:]) for text in vocab for i in range(1, len(text))]
    data["model"]["merges"] = [f"{left} {right}" for left, right in pairs if left in vocab and right in vocab]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    import_model.main([str(folder), "--model-tag", "mine"])
    assert load("mine")[1].fingerprint == tokenizer.fingerprint


def test_sharded_folder_equals_the_single_file(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("nanochat.export.hf.SHARD_BYTES", 50_000)
    export.main(["--out", str(tmp_path / "shards")])
    shards = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].startswith("model-00001-of-")
    import_model.main([str(tmp_path / "shards"), "--model-tag", "mine"])
    assert torch.equal(logits(load("mine")[0]), logits(load("tiny")[0]))


def test_golden_modern_checkpoint_imports_with_its_bits_per_byte(base_dir):
    source = golden("checkpoint/modern")
    shutil.copytree(source, base_dir / "elsewhere")
    shutil.copy(GOLDEN / "tokenizer/tokenizer.pkl", base_dir / "elsewhere")
    import_model.main([str(base_dir / "elsewhere"), "--model-tag", "modern", "-i", "base"])
    expected = json.loads((source / "expected.json").read_text())
    assert bits_per_byte(*load("modern", "base"), expected) == pytest.approx(expected["val_bpb"], abs=1e-5)


def test_golden_classic_checkpoint_imports_with_its_logits(base_dir):
    source = golden("checkpoint/classic")
    shutil.copytree(source, base_dir / "old/base_checkpoints/d4")
    (base_dir / "old/tokenizer").mkdir()
    shutil.copy(GOLDEN / "tokenizer/tokenizer.pkl", base_dir / "old/tokenizer")
    import_model.main([str(base_dir / "old/base_checkpoints/d4"), "--model-tag", "classic", "-i", "base"])
    expected = torch.load(source / "expected.pt", weights_only=True)
    model, _ = load("classic", "base")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["x"]), expected["logits"], rtol=0, atol=1e-4)


def test_repository_of_the_hub_is_downloaded_and_imported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with running() as server:
        server.add_model("someone/tiny", folder)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        import_model.main(["someone/tiny", "--model-tag", "mine"])
        assert "no model someone/other" in fail("someone/other", "--model-tag", "other")
        assert not server.gets("/someone/tiny/resolve/0123456789abcdef0123456789abcdef01234567/README.md")
    assert torch.equal(logits(load("mine")[0]), logits(load("tiny")[0]))
    assert "could not be downloaded" in fail("someone/third", "--model-tag", "third")  # the server is gone


# ---- mistakes ----


def fail(*argv):
    """Runs an import that has to fail; returns its error message, which must be one line."""
    with pytest.raises(SystemExit) as stopped:
        import_model.main(list(argv))
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def break_tokenizer(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(content))


def use_golden_tokenizer(folder):
    write_tokenizer(Tokenizer.load(GOLDEN / "tokenizer"), folder, sequence_len=64, end_token="<|bos|>")
    config = json.loads((folder / "config.json").read_text())
    config["nanochat"].pop("tokenizer")
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE = {  # what happens to an exported folder, and words of the error
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "holds no model: it needs config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors: download all files"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json: download all files"),
    "config is no json": (lambda f: (f / "config.json").write_text("{"), "download it again"),
    "config lacks a size": (lambda f: (f / "config.json").write_text('{"model_type": "nanochat"}'), "KeyError"),
    "another model": (lambda f: edit_json(f / "config.json", model_type="llama"), "'llama' is not nanochat"),
    "other mlp": (lambda f: edit_json(f / "config.json", intermediate_size=9), "other values of intermediate_size"),
    "other depth": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "do not fit the configuration"),
    "other vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=300), "267 tokens, the model 300"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "are damaged"),
    "lost tensor": (lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")), "lm_head.weight is missing"),
    "foreign tensor": (lambda f: edit_weights(f, lambda w: w.update(x=torch.ones(1))), "weight x, which no nanochat"),
    "other shape": (
        lambda f: edit_weights(f, lambda w: w.update({"model.x0_lambdas": torch.ones(7)})),
        "x0_lambdas is (7,), not (3,)",
    ),
    "merges": (break_tokenizer, "its merges do not follow"),
    "other tokenizer": (use_golden_tokenizer, "1024 tokens, the model 267: put the model's own"),
    "changed tokenizer": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("{1,2}", "{1,3}")),
        "is not the tokenizer that the model was exported with",
    ),
    "missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}'),
        "is missing: download all files",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_is_an_error_and_nothing_is_written(folder, base_dir, name):
    damage, words = DAMAGE[name]
    damage(folder)
    before = sorted(base_dir.rglob("*"))
    assert words in fail(str(folder), "--model-tag", "mine")
    assert sorted(base_dir.rglob("*")) == before


def test_missing_folder_and_missing_tag_are_errors(folder, base_dir):
    assert "there is no folder ./nowhere" in fail("./nowhere", "--model-tag", "mine")
    assert "--model-tag is missing" in fail(str(folder))
    assert "import one at a time" in fail(str(folder), str(folder), "--model-tag", "mine")
    assert "plain folder name" in fail(str(folder), "--model-tag", "a/b")


def test_tag_that_holds_checkpoints_is_refused(folder, base_dir):
    assert "the sft tag 'tiny' holds checkpoints" in fail(str(folder), "--model-tag", "tiny")


def test_full_disk_is_an_error_before_anything_is_written(folder, base_dir, monkeypatch):
    full = shutil.disk_usage(base_dir)._replace(free=1000)
    monkeypatch.setattr(importer.shutil, "disk_usage", lambda path: full)
    assert "free some space" in fail(str(folder), "--model-tag", "mine")
    assert not (base_dir / "chatsft_checkpoints/mine").exists()


class Malicious:
    """Its pickle runs a command when it is loaded by pickle.load."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def nanochat_folder(path):
    """A checkpoint of another nanochat version: the golden modern one."""
    shutil.copytree(golden("checkpoint/modern"), path)
    shutil.copy(GOLDEN / "tokenizer/tokenizer.pkl", path)
    return path


def test_pickled_tokenizer_that_wants_to_run_code_is_refused(base_dir, tmp_path):
    source = nanochat_folder(tmp_path / "source")
    (source / "tokenizer.pkl").write_bytes(pickle.dumps(Malicious(f"touch {tmp_path}/ran")))
    assert "which was not run" in fail(str(source), "--model-tag", "mine")
    assert not (tmp_path / "ran").exists()


def test_weights_that_want_to_run_code_are_refused(base_dir, tmp_path):
    source = nanochat_folder(tmp_path / "source")
    torch.save({"a": Malicious(f"touch {tmp_path}/ran")}, source / "model_000006.pt")
    assert "is not readable" in fail(str(source), "--model-tag", "mine")
    assert not (tmp_path / "ran").exists()


def test_checkpoint_without_tokenizer_or_configuration_is_an_error(base_dir, tmp_path):
    source = nanochat_folder(tmp_path / "a/b/source")
    (source / "tokenizer.pkl").unlink()
    assert "put the model's own tokenizer.pkl into it" in fail(str(source), "--model-tag", "mine")
    (source / "meta_000006.json").unlink()
    assert "meta_000006.json" in fail(str(source), "--model-tag", "mine")
