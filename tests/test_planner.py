"""
The plan of a run: the machines, what fits, --plan, --hours and --budget, and what happens when memory runs out.

    python -m pytest tests/test_planner.py
"""

import json
import re
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from factories import save_checkpoint, tiny_gpt, write_shards

from nanochat import hardware, planner
from nanochat.cards import CARDS, find_card, find_machine
from nanochat.checkpoint_manager import CheckpointReader
from nanochat.cli import Restart, command, flag, parse, to_argv
from nanochat.common import UserError
from nanochat.costs import GIB, TrainingSetup, rl_memory, training_memory
from nanochat.gpt import GPT
from nanochat.recipe import RecipeFlags, derive, model_config
from nanochat.train import Trainer
from scripts import base_train, chat_rl, chat_sft, chat_web, mid_train

VOCAB = 32768


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


# ---- machines ----


@pytest.mark.parametrize(
    "name, num_gpus, card",
    [("8xH100", 8, "H100"), ("1xa100-40", 1, "A100-40"), ("RTX4090", 1, "RTX4090"), ("t4", 1, "T4")],
)
def test_machine_is_found_by_name(name, num_gpus, card):
    machine = find_machine(name)
    assert (machine.num_gpus, machine.card.name) == (num_gpus, card)


@pytest.mark.parametrize("name", ["8xH1000", "0xH100", "H100x8", "x", "", "-1xH100"])
def test_unknown_machine_names_the_cards(name):
    with pytest.raises(UserError, match="as in 8xH100; cards: .*RTX4090"):
        find_machine(name)


def test_every_card_is_found_by_its_drivers_name():
    assert [find_card(f"NVIDIA {card.driver_name}") for card in CARDS] == list(CARDS)
    assert find_card("NVIDIA A100-SXM4-80GB").name == "A100-80"
    assert find_card("Tesla T4").name == "T4"
    assert find_card("NVIDIA Abacus") is None


def test_fp8_needs_a_card_that_has_it():
    assert planner.named_target("1xH100", fp8=True).rate_of(model_config(RecipeFlags(depth=24), VOCAB)) > 500e12
    with pytest.raises(UserError, match="leave out --fp8"):
        planner.named_target("1xA100-80", fp8=True)


# ---- what fits ----


def check(name, flags, rows):
    config = model_config(flags, VOCAB)
    target = planner.named_target(name, fp8=False)
    planner.check_fits(config, TrainingSetup(rows=rows, dtype=target.dtype, world_size=target.count), target, flags)


def test_batch_that_does_not_fit_names_one_that_does():
    with pytest.raises(UserError, match=r"32 rows per pass takes \S+ GiB .* 76.2 GiB: use --device-batch-size 16"):
        check("8xH100", RecipeFlags(depth=24), rows=32)
    check("8xH100", RecipeFlags(depth=24), rows=16)


def test_model_that_does_not_fit_names_a_depth_that_does():
    with pytest.raises(UserError, match=r"use --depth \d+ or less") as error:
        check("1xRTX4090", RecipeFlags(depth=100), rows=1)
    depth = int(re.search(r"--depth (\d+)", str(error.value)).group(1))
    check("1xRTX4090", RecipeFlags(depth=depth), rows=1)
    with pytest.raises(UserError):
        check("1xRTX4090", RecipeFlags(depth=depth + 1), rows=1)


def test_error_names_activation_checkpointing_where_only_that_helps():
    config, target = model_config(RecipeFlags(depth=20), VOCAB), planner.named_target("1xRTX4090", fp8=False)
    setup = TrainingSetup(rows=1, accumulation=2, dtype=target.dtype)
    sizes = [training_memory(config, replace(setup, activation_checkpointing=flag)).peak for flag in (False, True)]
    target = replace(target, memory=sum(sizes) / 2)  # between the two
    with pytest.raises(UserError, match="use --activation-checkpointing --device-batch-size 1"):
        planner.check_fits(config, setup, target, RecipeFlags(depth=20))
    planner.check_fits(config, replace(setup, activation_checkpointing=True), target)


def test_model_that_fits_only_in_parts_is_told_to_shard(base_dir, capsys):
    plan = ["--plan", "--for", "8xRTX4090", "--depth", "30", "--device-batch-size", "1"]
    with pytest.raises(SystemExit, match="use --shard --activation-checkpointing --device-batch-size 1"):
        base_train.main(plan)
    capsys.readouterr()
    base_train.main([*plan, "--shard", "--activation-checkpointing"])
    assert "gathered weights" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="use --depth"):  # a single GPU
        base_train.main(["--plan", "--for", "1xRTX4090", "--depth", "30", "--device-batch-size", "1"])


def test_depth_100_is_refused_on_this_machine(base_dir, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "available_memory", lambda: 16 * GIB)
    monkeypatch.setattr(planner, "measured_rate", lambda *_: 1e11)
    with pytest.raises(SystemExit, match=r"use --depth \d+ or less"):
        base_train.main(["--depth", "100", "--plan", "--device", "cpu"])
    assert "does NOT fit" in capsys.readouterr().out


# ---- --plan, --hours, --budget ----


def test_plan_of_another_machine_reads_neither_data_nor_weights(base_dir, capsys):
    base_train.main(["--plan", "--for", "8xH100", "--depth", "24", "--fp8", "--target-param-data-ratio", "9.5"])
    table = {line[2:20].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "8 GPUs x 16 rows x 2048 tokens, 4 times" in table["batch"]
    assert "6,612 optimizer steps" in table["training"]
    assert "2h00m" in table["time"] and "$48" in table["cost"]
    assert "fits" in table["memory per rank"]
    assert list(base_dir.iterdir()) == []


def test_plan_with_activation_checkpointing_has_larger_batches_and_takes_longer(base_dir, capsys):
    plan = ["--plan", "--for", "1xRTX4090", "--depth", "16"]
    rows, hours, mfu = [], [], []
    for flags in ([], ["--activation-checkpointing"]):
        base_train.main([*plan, *flags])
        out = capsys.readouterr().out
        rows.append(int(re.search(r"1 GPUs x (\d+) rows", out).group(1)))
        hours.append(float(re.search(r"time +(\d+)h", out).group(1)))
        mfu.append(float(re.search(r"(\d+)% MFU", out).group(1)))
    assert rows[1] >= 4 * rows[0]
    assert 1.25 < hours[1] / hours[0] < 1.35
    assert mfu[1] == pytest.approx(mfu[0] * hours[0] / hours[1], abs=1)  # MFU counts no FLOP twice


def test_plan_of_this_machine_measures_its_speed(base_dir, capsys):
    small = ["--depth", "1", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "64"]
    base_train.main([*small, "--plan", "--device", "cpu", "--num-iterations", "5"])
    out = capsys.readouterr().out
    assert "trial passes" in out and "no price is known" in out


@pytest.mark.parametrize("limit", [["--hours", "2"], ["--budget", "48"]])
def test_hours_or_budget_choose_the_depth(base_dir, capsys, limit):
    base_train.main(["--plan", "--for", "8xH100", *limit])
    out = capsys.readouterr().out
    depth = int(re.search(r"--depth (\d+) is the largest", out).group(1))
    target = planner.named_target("8xH100", fp8=False)
    hours = []
    for d in (depth, depth + 1):
        recipe = derive(RecipeFlags(depth=d), VOCAB)
        hours.append(target.seconds(recipe.model, recipe.flops) / 3600)
    assert hours[0] <= 2 < hours[1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--for", "8xH100", "--budget", "0.001"], "too short even for --depth 1"),
        (["--for", "8xH100", "--budget", "5", "--hours", "1"], "give only one"),
        (["--device", "cpu", "--budget", "5"], "use --hours, or name a machine"),
        (["--for", "8xH10", "--budget", "5"], "cards: "),
        (["--for", "1xT4", "--depth", "20"], r"use --depth \d+ or less"),
        (["--for", "1xA100-40", "--depth", "24", "--device-batch-size", "32"], "use --device-batch-size 4"),
    ],
)
def test_impossible_limits_are_refused(base_dir, monkeypatch, flags, message):
    monkeypatch.setattr(planner, "measured_rate", lambda *_: 1e11)
    with pytest.raises(SystemExit, match=message):
        base_train.main([*flags, "--plan"])


# ---- out of memory ----

SMALL = ["--device", "cpu", "--depth", "1", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "64"]
SMALL += ["--total-batch-size", "512", "--num-iterations", "6", "--eval-every", "-1", "--sample-every", "-1"]
SMALL += ["--save-every", "2", "--no-compile"]


@pytest.fixture
def trainable(base_dir, monkeypatch, golden_tokenizer):
    """A base folder with a tokenizer and shards."""
    golden_tokenizer.save(base_dir / "tokenizer")
    write_shards(base_dir / "shards", texts_per_shard=40)
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(base_dir / "shards"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return base_dir


def losses(base_dir, tag):
    lines = (base_dir / f"report/metrics/base_train-{tag}.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("failing_step, resumes", [(0, False), (3, True)])
def test_out_of_memory_continues_with_half_the_rows(trainable, monkeypatch, failing_step, resumes):
    accumulate = Trainer._accumulate

    def fail_with_large_batches(trainer, micro_batches, loss_fn):
        if trainer.state.step == failing_step and micro_batches[0][0].size(0) == 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return accumulate(trainer, micro_batches, loss_fn)

    base_train.main([*SMALL, "--device-batch-size", "8", "--model-tag", "large"])
    monkeypatch.setattr(Trainer, "_accumulate", fail_with_large_batches)
    with pytest.raises(Restart, match="with 4 rows per pass") as restart:
        base_train.main([*SMALL, "--device-batch-size", "8", "--model-tag", "small"])
    flags = restart.value.flags
    assert (flags.device_batch_size, flags.resume) == (4, resumes)
    base_train.main(to_argv(flags))
    assert losses(trainable, "small") == pytest.approx(losses(trainable, "large"), rel=1e-4)


def test_out_of_memory_with_one_row_is_a_user_error(trainable, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "_accumulate", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(SystemExit, match="with 1 row per pass: use --activation-checkpointing"):
        base_train.main([*SMALL, "--device-batch-size", "1"])


def test_restart_replaces_the_process(monkeypatch):
    @dataclass(frozen=True)
    class Flags:
        rows: int = flag(8, "rows")
        fast: bool = flag(True, "speed")
        for_: str = flag("", "machine")

    def main(flags: Flags) -> None:
        raise Restart("out of memory", Flags(rows=4, fast=False, for_="8xH100"))

    monkeypatch.setattr(sys, "argv", ["base_train.py", "--rows", "8"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "scripts.base_train", "--rows", "8"])
    started = []
    monkeypatch.setattr("os.execv", lambda program, argv: started.append(argv[1:]))
    command(main)()
    assert started == [["-m", "scripts.base_train", "--rows", "4", "--no-fast", "--for", "8xH100"]]
    assert parse(Flags, started[0][2:]) == Flags(rows=4, fast=False, for_="8xH100")


def test_auto_batch_is_the_largest_that_fits(trainable, monkeypatch, capsys):
    config = model_config(RecipeFlags(depth=1, aspect_ratio=32, head_dim=32, max_seq_len=64), 1024)
    setup = TrainingSetup(rows=2, accumulation=4, dtype=torch.float32, compiled=False, device="cpu")
    monkeypatch.setattr(hardware, "available_memory", lambda: training_memory(config, setup).peak)
    base_train.main([*SMALL, "--model-tag", "auto"])
    assert "with 2 rows per pass" in capsys.readouterr().out
    monkeypatch.setattr(hardware, "available_memory", lambda: 16 * GIB)
    base_train.main([*SMALL, "--model-tag", "auto", "--resume", "--num-iterations", "7"])
    assert "with 2 rows per pass" in capsys.readouterr().out  # a resumed run keeps its batch


def test_run_that_cannot_fit_is_refused_before_the_model_is_built(trainable, monkeypatch):
    monkeypatch.setattr(hardware, "available_memory", lambda: 16 * GIB)
    monkeypatch.setattr(GPT, "__init__", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(SystemExit, match=r"use --depth \d+ or less"):
        base_train.main(["--depth", "100", "--device", "cpu"])


# ---- compiling ----


@pytest.mark.slow
@pytest.mark.parametrize("pays_off", [True, False])
def test_compiling_is_decided_after_three_steps_and_kept(trainable, monkeypatch, capsys, pays_off):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    monkeypatch.setattr(hardware, "can_compile", lambda device: True)
    factor = 0.5 if pays_off else 2
    monkeypatch.setattr(hardware, "seconds_compiled", lambda seconds, layers, **_: seconds * factor)
    argv = [flag for flag in SMALL if flag != "--no-compile"] + ["--save-every", "1", "--model-tag", "c"]
    base_train.main(argv)
    assert len(compiled) == pays_off
    assert "are left, with torch.compile about" in capsys.readouterr().out
    decisions = [CheckpointReader("base", "c").load(step).meta["compiled"] for step in range(1, 7)]
    assert decisions == [None, None, *[pays_off] * 4]
    base_train.main([*argv, "--resume", "--num-iterations", "7"])
    assert len(compiled) == 2 * pays_off
    assert "are left, with torch.compile" not in capsys.readouterr().out


# ---- plans of the later stages ----


@pytest.mark.parametrize(
    "script, stage, argv, words",
    [
        (chat_sft, "base", [], ["optimizer steps", "activations", "those of one optimizer step"]),
        (chat_sft, "base", ["--num-iterations", "100"], ["100 optimizer steps", "$"]),
        (mid_train, "base", [], ["activations"]),
        (chat_rl, "sft", ["--kl-coef", "0.1"], ["KV cache", "decoder's weights", "reference model", "256 rollouts"]),
        (chat_web, "sft", ["--num-rows", "64"], ["KV cache", "fits", "64"]),
    ],
)
def test_later_stages_plan_from_a_checkpoint(base_dir, golden_tokenizer, capsys, script, stage, argv, words):
    golden_tokenizer.save(base_dir / "tokenizer")
    save_checkpoint(tiny_gpt(initial=True), stage, "d2", tokenizer=golden_tokenizer)
    before = sorted(base_dir.rglob("*"))
    script.main([*argv, "--plan", "--for", "8xH100"])
    out = capsys.readouterr().out
    assert "8xH100" in out and all(word in out for word in words)
    assert sorted(base_dir.rglob("*")) == before


def test_rollouts_that_do_not_fit_are_refused():
    config = model_config(RecipeFlags(depth=24), VOCAB)
    target = planner.named_target("1xRTX4090", fp8=False)
    setup = planner.training_setup(config, target, 0, TrainingSetup(rows=1, compiled=False))
    memory = rl_memory(config, setup, slots=256, length=2048, has_reference=True)
    with pytest.raises(UserError, match="lower --rollout-batch-size"):
        planner.check_memory(memory, target, "lower --rollout-batch-size")


def test_machine_to_plan_for_needs_plan(trainable):
    with pytest.raises(SystemExit, match="use it with --plan"):
        base_train.main([*SMALL, "--for", "8xH100"])
