"""
Checkpoints: older formats, exact round trips, finding, replacing an earlier run, damaged files, full disks, kills.

    python -m pytest tests/test_checkpoint_manager.py
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden
from factories import save_checkpoint, tiny_gpt
from safetensors.torch import load_file, save_file

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import (
    FORMAT,
    Checkpoint,
    CheckpointReader,
    CheckpointWriter,
    find,
    find_by_path,
    load_model,
    provisional,
    run_lock,
    stage_dir,
)
from nanochat.common import UserError
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import RowGroups, split_shards
from nanochat.distributed import Dist
from nanochat.eval.bpb import evaluate_bpb
from nanochat.gpt import GPT, GPTConfig
from nanochat.legacy import VINTAGES
from nanochat.muon import build_optimizer
from nanochat.recipe import param_groups
from nanochat.tokenizer import Tokenizer
from nanochat.train import TrainState

CPU = torch.device("cpu")
V = 50


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def make(seed=0, config=None):
    torch.manual_seed(seed)
    model = GPT.create(config or GPTConfig(8, V, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    return model, build_optimizer(model, param_groups(model.config))


def train(model, optimizer, num_steps=1):
    for _ in range(num_steps):
        ids_BT = torch.randint(V, (2, 9))
        model(ids_BT[:, :-1], ids_BT[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(step, tag="d2", writer=None, meta=None):
    """Saves a model whose backout_lambda is the step, as part of the run of that tag; returns the folder."""
    model, optimizer = make()
    model.backout_lambda.data.fill_(step)
    writer = writer or continued(tag)
    writer.save(model, optimizer, TrainState(step, data_state={"unit": step, "ids": torch.arange(3)}), meta or {})
    writer.wait()
    return stage_dir("base") / tag / f"step_{step:06d}"


def new_run(tag="d2", dist=None, **options):
    """The writer of a new run."""
    return CheckpointWriter("base", tag, dist or Dist(CPU), **options)


def continued(tag="d2", **options):
    """The writer of a run that has been resumed, if there is something to resume; it saves any step."""
    writer = new_run(tag, **options)
    writer.replaces_earlier = False
    return writer


def resumed(tag="d2"):
    return new_run(tag, resumed=CheckpointReader("base", tag).load())


def saved_steps(tag="d2"):
    return CheckpointReader("base", tag).steps()


def step_of(checkpoint):
    model = checkpoint.build_model(CPU, torch.float32)
    assert model.backout_lambda.item() == checkpoint.step
    return checkpoint.step


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- legacy checkpoints ----


def legacy(base_dir, vintage):
    folder = golden(f"checkpoint/{vintage}")
    shutil.copytree(folder, base_dir / "base_checkpoints" / vintage)
    Tokenizer.load(GOLDEN / "tokenizer").save(base_dir / "tokenizer")
    return folder


def test_modern_checkpoint_matches_golden_bits_per_byte(base_dir, golden_tokenizer):
    expected = json.loads((legacy(base_dir, "modern") / "expected.json").read_text())
    model, _, checkpoint = load_model("base", "modern", -1, CPU, torch.float32)
    assert (checkpoint.step, checkpoint.tag) == (expected["step"], "modern")
    assert model.config.value_embeds and model.config.qk_gain == 1.2
    assert not model.training
    B, T = expected["device_batch_size"], expected["max_seq_len"]
    _, val_shards = split_shards(golden("packing/data"))
    loader = PretrainLoader(golden_tokenizer, RowGroups(val_shards), batch_size=B, sequence_len=T, dist=Dist(CPU))
    batches = loader.batches()
    bpb = evaluate_bpb(
        model, islice(batches, expected["eval_tokens"] // (B * T)), golden_tokenizer.token_bytes(), Dist(CPU)
    )
    assert bpb == pytest.approx(expected["val_bpb"], abs=1e-5)


def test_classic_checkpoint_matches_golden_logits(base_dir, golden_tokenizer):
    folder = legacy(base_dir, "classic")
    expected = torch.load(folder / "expected.pt", weights_only=True)
    meta_file = min(folder.glob("meta_*.json"))
    config = json.loads(meta_file.read_text())["model_config"]
    model, _, _ = load_model("base", "", -1, CPU, torch.float32)
    assert not model.config.value_embeds and model.config.qk_gain == 1.0
    assert model.config.windows == [config["sequence_len"]] * config["n_layer"]
    with torch.no_grad():
        torch.testing.assert_close(model(expected["x"]), expected["logits"], rtol=0, atol=1e-4)


def write_legacy(folder, step, weights, config):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config}))


def legacy_model():
    model, optimizer = make()
    config = asdict(model.config)
    for field in VINTAGES["modern"]:
        del config[field]  # these files are older than the fields
    return model.state_dict(), config, optimizer


def test_legacy_checkpoint_of_a_compiled_model_loads(base_dir, golden_tokenizer):
    weights, config, optimizer = legacy_model()
    compiled = {f"_orig_mod.{name}": weight.bfloat16() for name, weight in weights.items()}
    write_legacy(base_dir / "base_checkpoints/old", 7, compiled, config)
    checkpoint = find("base")
    model = checkpoint.build_model(CPU, torch.float32)
    assert same(dict(model.named_parameters()), {name: w.bfloat16().float() for name, w in weights.items()})
    assert not checkpoint.restore_optimizer(optimizer)
    with pytest.raises(UserError, match="not resumed"):
        checkpoint.check_resumable(golden_tokenizer, checkpoint.config, torch.float32)


@pytest.mark.parametrize("gone, new", [("smear_lambda", None), (None, "lm_head.bias"), ("x0_lambdas", "x1_lambdas")])
def test_missing_and_surplus_parameters_are_named(base_dir, gone, new):
    weights, config, _ = legacy_model()
    weights |= {new: torch.zeros(1)} if new else {}
    weights.pop(gone, None)
    write_legacy(base_dir / "base_checkpoints/old", 7, weights, config)
    with pytest.raises(UserError) as caught:
        find("base").build_model(CPU, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert (f'Missing key(s) in state_dict: "{gone}"' in message) == bool(gone)
    assert (f'Unexpected key(s) in state_dict: "{new}"' in message) == bool(new)


def test_parameter_of_another_shape_is_named(base_dir):
    weights, config, _ = legacy_model()
    write_legacy(base_dir / "base_checkpoints/old", 7, weights | {"x0_lambdas": torch.zeros(5)}, config)
    with pytest.raises(UserError, match=r"x0_lambdas: .*\[5\].*\[2\]"):
        find("base").build_model(CPU, torch.float32)


def test_code_in_a_legacy_checkpoint_is_not_executed(base_dir, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(base_dir / "ran"),)

    weights, config, _ = legacy_model()
    write_legacy(base_dir / "base_checkpoints/old", 6, weights, config)
    write_legacy(base_dir / "base_checkpoints/old", 7, {"lm_head.weight": Bomb()}, config)
    assert find("base").step == 6
    assert not (base_dir / "ran").exists()
    assert "step 7 of" in capsys.readouterr().err


# ---- round trips ----


def test_saved_run_is_restored_bitwise(monkeypatch):
    trained_on = threading.Event()
    monkeypatch.setattr(checkpoint_manager, "save_file", lambda *args: trained_on.wait(60) and save_file(*args))
    model, optimizer = make()
    train(model, optimizer, 3)
    data_state = {"unit": 4, "texts_done": 128, "waiting": torch.arange(9, dtype=torch.int32)}
    state = TrainState(3, 0.7, 1.25, 4096, 2.0**12, 5, data_state=data_state)
    writer = new_run()
    writer.save(model, optimizer, state, {"flags": {"depth": 2}})
    random_state = torch.get_rng_state()
    expected = {name: p.clone() for name, p in model.named_parameters()}, optimizer.full_state()
    train(model, optimizer)  # training continues before a byte is written: the thread has copies
    trained_on.set()
    writer.wait()

    torch.manual_seed(99)
    checkpoint = find("base", "d2", 3)
    assert checkpoint.meta["flags"] == {"depth": 2} and checkpoint.meta["format"] == FORMAT
    other, other_optimizer = make(seed=1)
    restored_model = checkpoint.build_model(CPU, torch.float32)
    restored, (restored_data,) = checkpoint.restore_run(other_optimizer, Dist(CPU))
    assert same(dict(restored_model.named_parameters()), expected[0])
    assert same(other_optimizer.full_state(), expected[1])
    assert restored.to_dict() == state.to_dict()
    assert restored_data.pop("waiting").equal(data_state.pop("waiting")) and restored_data == data_state
    assert torch.equal(torch.get_rng_state(), random_state)


class TwoRanks(Dist):
    """Rank 0 of two; the other one is simulated."""

    def gather(self, value):
        (state,), generators = value
        return [value, ([state | {"unit": 1, "waiting": state["waiting"] + 10}], generators)]


def test_data_states_of_all_ranks_are_saved():
    model, optimizer = make()
    state = TrainState(1, data_state={"unit": 0, "waiting": torch.arange(2)})
    writer = new_run(dist=TwoRanks(CPU))
    writer.save(model, optimizer, state, {})
    writer.wait()
    _, data_states = find("base").restore_run(optimizer, Dist(CPU, rank=1, world_size=2))
    assert [state["unit"] for state in data_states] == [0, 1]
    assert [state["waiting"].tolist() for state in data_states] == [[0, 1], [10, 11]]


# ---- which one ----


def test_find_returns_the_newest_step_or_the_given_one(capsys):
    for step in (20, 100, 3):
        save(step)
    assert saved_steps() == [3, 20, 100]
    assert [step_of(find("base", "d2", step)) for step in (-1, 20, 3)] == [100, 20, 3]
    with pytest.raises(UserError, match="no checkpoint of step 50: it has 3, 20, 100"):
        find("base", "d2", 50)


def test_default_tag_is_the_one_written_last():
    for tag, hours_ago in (("d2", 3), ("d12", 1), ("d20", 2)):
        written = time.time() - 3600 * hours_ago
        os.utime(save(1, tag) / "manifest.json", (written, written))
    assert find("base").tag == "d12"  # neither the largest nor the first
    with pytest.raises(UserError, match="no base checkpoint with tag 'd4': there are d12, d2, d20"):
        find("base", "d4")


def test_find_by_path_works_after_the_base_folder_has_moved(base_dir):
    for step in (1, 2):
        save(step)
    noted = f"/somewhere/else/{stage_dir('base').name}/d2/step_000001"
    assert step_of(find_by_path(noted)) == 1
    with pytest.raises(UserError, match="no checkpoint of step 7: it has 1, 2"):
        find_by_path(noted.replace("1", "7"))


def test_missing_checkpoint_error_names_the_training_script():
    with pytest.raises(UserError, match="scripts.chat_sft"):
        find("sft")
    with pytest.raises(UserError, match="unknown stage"):
        find("raw")


def test_other_files_in_the_folder_are_ignored(base_dir):
    folder = save(7)
    shutil.copytree(folder, folder.with_name("step_000007_before_the_move"))
    (folder.parent / "step_000009").mkdir()  # without a manifest
    (base_dir / "base_checkpoints/notes.txt").write_text("x")
    assert step_of(find("base")) == 7


@pytest.mark.parametrize("keep_last, kept", [(-1, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_keep_last_prunes_old_checkpoints(keep_last, kept):
    writer = new_run(keep_last=keep_last)
    for step in (1, 2, 3, 4):
        save(step, writer=writer)
    assert saved_steps() == kept


def test_keep_last_orders_steps_by_number_also_beyond_six_digits():
    writer = new_run(keep_last=2)
    for step in (999_998, 999_999, 1_000_000):
        save(step, writer=writer)
    assert saved_steps() == [999_999, 1_000_000]
    assert step_of(find("base")) == 1_000_000


# ---- a new run under the tag of an earlier one ----


def test_pruning_that_is_interrupted_leaves_no_damaged_checkpoint(monkeypatch, capsys):
    writer = new_run(keep_last=1)
    save(1, writer=writer)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: (path / "manifest.json").unlink())  # and then a kill
        save(2, writer=writer)
    assert saved_steps() == [2]
    save(3, writer=writer)
    assert [path.name for path in writer.path.iterdir()] == ["step_000003"]


def test_folder_that_cannot_be_written_raises_before_training(base_dir):
    (base_dir / "base_checkpoints").mkdir()
    (base_dir / "base_checkpoints/d2").touch()
    with pytest.raises(FileExistsError):
        new_run()


def test_earlier_run_keeps_its_name_until_the_new_one_has_saved(capsys):
    save(100)
    writer = new_run()
    assert step_of(find("base", "d2")) == 100  # a new run that fails now leaves everything as it was
    save(7, writer=writer)
    assert step_of(find("base", "d2")) == 7
    assert step_of(find("base", "d2.1")) == 100
    assert "'d2.1'" in capsys.readouterr().out
    save(5, writer=new_run())
    assert [step_of(find("base", tag)) for tag in ("d2", "d2.1", "d2.2")] == [5, 100, 7]


def test_earlier_run_keeps_its_name_when_the_first_save_fails(monkeypatch):
    save(100)
    writer = new_run()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_manager, "save_file", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(UserError, match="disk full"):
            save(7, writer=writer)
    assert step_of(find("base", "d2")) == 100
    save(8, writer=writer)
    assert (step_of(find("base", "d2")), step_of(find("base", "d2.1"))) == (8, 100)


def test_metrics_are_renamed_with_their_run(base_dir):
    save(100)
    metrics = write_metrics(base_dir)
    writer = new_run()
    provisional(metrics).write_text("new")
    assert metrics.read_text() == "earlier"
    save(7, writer=writer)
    assert metrics.read_text() == "new" and not provisional(metrics).exists()
    assert metrics.with_name("base_train-d2.1.jsonl").read_text() == "earlier"


def write_metrics(base_dir):
    metrics = base_dir / "report" / "metrics" / "base_train-d2.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("earlier")
    (base_dir / "report" / "base_train.json").write_text("{}")  # a file among the report's folders
    return metrics


@pytest.mark.parametrize("num_renames", [1, 2, 3])
def test_swap_killed_after_any_rename_is_completed_by_the_next_run(base_dir, monkeypatch, num_renames):
    save(100, "d2.4")  # a set-aside run of before: the next number is 5
    folder = save(100).parent
    metrics = write_metrics(base_dir)
    writer = new_run()
    provisional(metrics).write_text("new")
    rename, renamed = Path.rename, []

    def rename_until_killed(path, target):
        renamed.append(path)
        if len(renamed) > num_renames:
            raise OSError("killed")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="killed"):
        patch.setattr(Path, "rename", rename_until_killed)
        save(7, writer=writer)
    with run_lock("base", "d2", Dist(CPU)):
        assert saved_steps() == [7] and saved_steps("d2.5") == [100]
        assert metrics.read_text() == "new" and not provisional(metrics).exists()
        assert metrics.with_name("base_train-d2.5.jsonl").read_text() == "earlier"
    assert not provisional(folder).exists()


def test_leftover_metrics_of_a_failed_new_run_are_not_given_to_the_next_one(base_dir):
    save(100)
    metrics = write_metrics(base_dir)
    new_run()
    provisional(metrics).write_text("failed")
    save(7, writer=new_run())
    assert metrics.read_text() == "earlier" and not provisional(metrics).exists()


def test_leftovers_of_a_failed_new_run_are_not_found_as_a_tag():
    folder = save(100).parent
    shutil.copytree(folder, provisional(folder))
    with pytest.raises(UserError, match="there are d2$"):
        find("base", "d9")


def test_last_saved_is_the_resumed_checkpoint_or_none():
    save(100)
    assert new_run().last_saved == "no checkpoint"
    assert resumed().last_saved.endswith("step_000100")


def test_run_resumed_at_its_end_does_not_rewrite_its_checkpoint():
    path = save(100)
    before = (path / "state.json").read_text()
    writer = resumed()
    model, optimizer = make()
    writer.save(model, optimizer, TrainState(100), {})
    writer.wait()
    assert (path / "state.json").read_text() == before


@pytest.mark.parametrize("tag", ["a/b", "../d2", ".hidden", ""])
def test_tag_that_is_no_plain_folder_name_raises(tag):
    with pytest.raises(UserError, match="plain folder name"):
        CheckpointReader("base", tag)


def test_resumed_run_saves_into_the_same_folder():
    save(5)
    save(10, writer=resumed())
    assert saved_steps() == [5, 10]


def test_saving_a_step_again_replaces_it():
    save(5, meta={"try": 1})
    save(5, meta={"try": 2})
    assert find("base").meta["try"] == 2


# ---- what can happen to files ----


def flip_a_byte(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-10] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def truncate(folder):
    content = (folder / "optimizer.safetensors").read_bytes()
    (folder / "optimizer.safetensors").write_bytes(content[: len(content) // 2])


DAMAGES = {
    "a flipped byte": flip_a_byte,
    "a file cut short": truncate,
    "a file gone": lambda folder: (folder / "data.safetensors").unlink(),
    "an empty file": lambda folder: (folder / "state.json").write_text(""),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "garbage": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00{"),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "a list for a manifest": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "numbers in it": lambda folder: (folder / "manifest.json").write_text('{"model.safetensors": 1}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_newest_checkpoint_falls_back_to_the_previous_one(damage, capsys):
    save(10)
    damage(save(20))
    assert step_of(find("base", "d2")) == 10
    err = capsys.readouterr().err
    assert "warning" in err and ("step_000020" in err or "step 20 of" in err) and "falling back" in err


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_given_by_step_raises(damage):
    save(10)
    damage(save(20))
    with pytest.raises(UserError) as caught:
        find("base", "d2", 20)
    message = str(caught.value)
    assert "step 20" in message or "step_000020" in message
    assert "it has 10" in message and "falling back" not in message and "\n" not in message


def test_only_damaged_checkpoints_raise():
    for step in (10, 20):
        flip_a_byte(save(step))
    with pytest.raises(UserError, match="no intact checkpoint"):
        find("base")


def test_resumed_run_overwrites_a_damaged_checkpoint():
    save(10)
    flip_a_byte(save(20))
    writer = resumed()
    assert writer.resumed.step == 10
    save(20, writer=writer)
    assert step_of(find("base")) == 20


def test_newer_format_version_raises():
    save(10)
    folder = save(20)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": FORMAT + 1}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {
        "bytes": (folder / "state.json").stat().st_size,
        "crc32": checkpoint_manager._crc32(folder / "state.json"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"format {FORMAT + 1}, this nanochat reads {FORMAT}"):
        find("base")


def test_leftovers_of_a_killed_save_are_ignored_and_removed():
    folder = save(10)
    leftover = folder.with_name(".step_000020.4711.tmp")
    shutil.copytree(folder, leftover)
    assert step_of(find("base")) == 10
    save(30)
    assert not leftover.exists() and saved_steps() == [10, 30]


def test_full_disk_keeps_the_previous_checkpoint_and_raises(monkeypatch, capsys):
    full = [False]

    def save_file_if_room(tensors, path):
        if full[0] and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint_manager, "save_file", save_file_if_room)
    writer = new_run()
    save(10, writer=writer)
    full[0] = True
    with pytest.raises(UserError, match="No space left on device.*last one: .*step_000010"):
        save(20, writer=writer)
    assert step_of(find("base")) == 10
    assert [p.name for p in writer.path.iterdir()] == ["step_000010"]  # the incomplete one is gone

    model, optimizer = make()
    writer.save(model, optimizer, TrainState(25), {})
    writer.pending.exception()  # waits until it has failed too
    full[0] = False
    save(30, writer=writer)  # a later save succeeds, and the run ends well
    assert "could not be written" in capsys.readouterr().err
    assert step_of(find("base")) == 30


def test_checkpoint_that_cannot_fit_is_not_started_and_training_continues(monkeypatch, capsys):
    free = [2**40]
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checkpoint_manager.shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    writer = new_run()
    save(10, writer=writer)
    free[0] = 1000
    monkeypatch.setattr(checkpoint_manager, "save_file", lambda *args: pytest.fail("it was started"))
    with pytest.raises(UserError, match="free some space, or choose another disk; last one: .*step_000010"):
        save(20, writer=writer)
    warning = capsys.readouterr().err
    assert "step 20 could not be written" in warning and "No space left for" in warning and "1KB are free" in warning
    assert "would resume from" in warning and warning.count("\n") == 1
    assert saved_steps() == [10]


SAVE_FOREVER = """
from tests.test_checkpoint_manager import new_run, save

writer = new_run()
step = 0
while True:
    step += 1
    save(step, writer=writer)
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.004, 0.011, 0.02])
def test_kill_while_saving_leaves_only_complete_checkpoints(base_dir, after):
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", SAVE_FOREVER]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        said = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout]
    newest = find("base")
    assert said[-1] <= step_of(newest) <= said[-1] + 1
    assert saved_steps() == list(range(1, newest.step + 1))
    for step in saved_steps():  # none that only looks whole
        assert find("base", "d2", step).weights().keys() == dict(make()[0].named_parameters()).keys()


# ---- what it was made with ----


def golden_sized(base_dir, golden_tokenizer, fingerprint=None):
    model, optimizer = make(config=GPTConfig(8, golden_tokenizer.vocab_size, 1, 1, 1, 32))
    writer = continued("d1")
    writer.save(model, optimizer, TrainState(1), {"tokenizer": fingerprint or golden_tokenizer.fingerprint})
    writer.wait()
    return find("base")


def test_other_tokenizer_raises(base_dir, golden_tokenizer):
    checkpoint = golden_sized(base_dir, golden_tokenizer)
    checkpoint.check_tokenizer(golden_tokenizer)
    checkpoint.check_resumable(golden_tokenizer, checkpoint.config, torch.float32)
    fingerprints = f"fingerprint 0123456789abcdef, here {golden_tokenizer.fingerprint}"  # the vocabularies are equal
    with pytest.raises(UserError, match=f"another tokenizer .{fingerprints}"):
        golden_sized(base_dir, golden_tokenizer, "0123456789abcdef").check_tokenizer(golden_tokenizer)
    save(1, "d2")
    golden_tokenizer.save(base_dir / "tokenizer")
    with pytest.raises(UserError, match="another tokenizer .*vocabulary 50, here 1024"):
        load_model("base", "d2", -1, CPU, torch.float32)


def test_models_with_different_tokenizers_load_from_one_base_folder(base_dir, golden_tokenizer):
    other = Tokenizer.train(["so it is said " * 50], vocab_size=267)
    save_checkpoint(tiny_gpt(), tag="first", tokenizer=golden_tokenizer)
    save_checkpoint(tiny_gpt(vocab_size=267), tag="second", tokenizer=other)  # takes the place of the first tokenizer
    for tag, tokenizer in (("first", golden_tokenizer), ("second", other)):
        _, loaded, _ = load_model("base", tag, -1, CPU, torch.float32)
        assert loaded.fingerprint == tokenizer.fingerprint


def test_missing_tokenizer_is_named_by_its_fingerprint(base_dir, golden_tokenizer):
    save_checkpoint(tiny_gpt(), tokenizer=golden_tokenizer)
    (base_dir / "tokenizer/tokenizer.json").unlink()
    Tokenizer.train(["so it is said " * 50], vocab_size=267).save(base_dir / "tokenizer")
    with pytest.raises(UserError, match=rf"tokenizer\.{golden_tokenizer.fingerprint}\.json"):
        find("base").load_tokenizer()


def test_resuming_another_model_raises(base_dir, golden_tokenizer):
    checkpoint = golden_sized(base_dir, golden_tokenizer)
    with pytest.raises(UserError, match="another model"):
        other = GPTConfig(16, golden_tokenizer.vocab_size, 1, 1, 1, 32)
        checkpoint.check_resumable(golden_tokenizer, other, torch.float32)


def test_files_are_safetensors_and_json():
    folder = save(3)
    assert sorted(p.name for p in folder.iterdir()) == [
        "data.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    assert same(weights, find("base").weights())
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_resuming_in_another_dtype_raises(golden_tokenizer):
    checkpoint = Checkpoint(Path("step_000001"), 1, {"model_config": {"vocab_size": 1024}, "dtype": "torch.bfloat16"})
    checkpoint.check_resumable(golden_tokenizer, checkpoint.config, torch.bfloat16)
    with pytest.raises(UserError, match="NANOCHAT_DTYPE=bfloat16"):
        checkpoint.check_resumable(golden_tokenizer, checkpoint.config, torch.float32)


def test_second_run_on_a_tag_raises_until_the_first_has_ended():
    with run_lock("sft", "d2", Dist(CPU)), run_lock("base", "d2", Dist(CPU)):
        with pytest.raises(UserError, match="another run works on .*chatsft_checkpoints/d2: .*--model-tag"):
            with run_lock("sft", "d2", Dist(CPU)):
                pass
    with run_lock("sft", "d2", Dist(CPU)):
        pass
