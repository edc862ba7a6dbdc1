"""
All stages through their command lines, on the primer and a tiny model: from raw text to a chat, interrupted and
resumed; and the one-line errors for wrong input.

    python -m pytest tests/test_stages.py
"""

import io
import json
import os
import shutil
import signal
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import GOLDEN
from factories import Letters, refusal

from nanochat import checkpoint_manager, hardware, rollout, tracking
from nanochat.eval.chat import CHATCORE
from nanochat.eval.metrics import core_metric
from nanochat.gpt import GPT
from nanochat.recipe import load_hyperparameters
from nanochat.tokenizer import Tokenizer
from scripts import (
    base_eval,
    base_train,
    chat_cli,
    chat_eval,
    chat_rl,
    chat_sft,
    mid_train,
    primer,
    report,
    show_conversation,
    tok_eval,
    tok_train,
)

pytestmark = pytest.mark.slow  # the fixture runs all stages

VOCAB = 600
COMMON = ["--device", "cpu", "--no-compile", "--save-every", "3", "--eval-every", "3"]
BASE = [*COMMON, "--depth", "2", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "128"]
BASE += ["--device-batch-size", "4", "--total-batch-size", "1024", "--num-iterations", "6", "--eval-tokens", "2048"]
SFT = [*COMMON, "--smoltalk-epochs", "0", "--mmlu-epochs", "0", "--gsm8k-epochs", "0", "--identity-epochs", "1"]
SFT += ["--simplespelling-epochs", "0", "--spellingbee-epochs", "0", "--primer-epochs", "1"]
SFT += ["--num-iterations", "6", "--eval-examples", "8"]
RL = ["--device", "cpu", "--task", "hardsums", "--num-iterations", "6", "--save-every", "3", "--eval-every", "3"]
RL += ["--examples-per-step", "2", "--num-samples", "4", "--max-new-tokens", "12", "--device-batch-size", "3"]
RL += ["--eval-examples", "4", "--eval-samples", "2"]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A base folder with the primer, a tokenizer, a base model and chat models, each made by its stage."""
    base_dir = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        patch.setenv("NANOCHAT_DATA_DIR", str(base_dir / "primer"))
        patch.setenv("TIKTOKEN_CACHE_DIR", str(base_dir / "nothing"))
        patch.delenv("NANOCHAT_DTYPE", raising=False)
        # These choices are measured, so two runs could compute differently; comparisons below are bitwise.
        patch.setattr(hardware, "pick_matmul_precision", lambda *_: "highest")
        patch.setattr(hardware, "bf16_faster_on_cpu", lambda: False)
        primer.main([])
        tok_train.main(["--vocab-size", str(VOCAB), "--max-chars", "300000"])
        base_train.main(BASE)
        mid_train.main(SFT)
        chat_sft.main(SFT)
        (base_dir / "log.txt").write_text(out.getvalue())
        yield base_dir


def metrics(workspace, name):
    """The metrics file without values that depend on the clock."""
    lines = [json.loads(line) for line in (workspace / f"report/metrics/{name}.jsonl").read_text().splitlines()]
    timed = ("seconds", "elapsed", "peak_memory", "train/tokens_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines if "step" in line]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


# ---- the stages in order ----


ATTENTION_OPS = ("nanochat::", "_flash_attention_forward", "flex_attention", "scaled_dot_product")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_model_is_compiled_once(workspace, monkeypatch, device):
    """Six steps of two micro-batches, validations, checkpoints, samples: one graph, on a GPU another to validate."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count, fullgraph=True))
    monkeypatch.setattr(hardware, "can_compile", lambda device: True)
    caches: list[bool] = []
    monkeypatch.setattr(hardware, "seconds_compiled", lambda *_, cached: caches.append(cached) or 0.0)
    base_train.main([*BASE, "--compile", "--device", device, "--model-tag", "compiled"])
    models = [graph for graph in graphs if any(op in graph.code for op in ATTENTION_OPS)]  # the others are optimizers
    assert len(models) == (1 if device == "cpu" else 2)
    if device == "cpu":
        assert len(graphs) == 1 and metrics(workspace, "base_train-compiled") == metrics(workspace, "base_train-d2")
        chat_sft.main([*SFT, "--compile", "--base-tag", "compiled"])
        assert caches == [False, True]  # the model of the second stage is in torch's cache
        shutil.rmtree(workspace / "chatsft_checkpoints/compiled")
    shutil.rmtree(workspace / "base_checkpoints/compiled")  # other tests list all tags


def test_tokenizer_is_trained_and_evaluated(workspace, capsys):
    assert Tokenizer.load(workspace / "tokenizer").vocab_size == VOCAB
    results = tok_eval.main([])
    assert results["val split"]["ours"] > 1.5


def test_base_train_logs_samples_and_saves(workspace):
    log = (workspace / "log.txt").read_text()
    assert "d2: " in log and "6 steps of 1,024 tokens (2 x 4 x 128 x 1 ranks)" in log
    assert "'Once upon a time' → " in log  # samples, at the end
    assert "lr of lm_head" in log and "arXiv 2205.10287" in log  # the derivation of the recipe
    lines = metrics(workspace, "base_train-d2")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert [line["step"] for line in lines if "val/bpb" in line] == [3, 6]
    assert [line["tokens"] for line in lines if "train/loss" in line] == [1024 * step for step in range(1, 7)]
    assert lines[0]["train/grad_norm"] > 0 and lines[0]["lr/wte"] > 0 and lines[-1]["flops"] > 1e9
    (sampled,) = [line for line in lines if "samples" in line]
    assert sampled["step"] == 6 and sampled["samples"][0].keys() == {"prompt", "completion"}
    folder = workspace / "base_checkpoints/d2"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000003", "step_000006"]


def test_chat_sft_starts_from_the_base_model(workspace):
    lines = metrics(workspace, "chat_sft-d2")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    (sampled,) = [line for line in lines if "samples" in line]
    assert sampled["step"] == 6 and sampled["samples"][0]["prompt"] == "What is the capital of France?"
    checkpoint = checkpoint_manager.find("sft")
    assert (checkpoint.tag, checkpoint.step) == ("d2", 6)
    assert checkpoint.meta["base"].endswith("base_checkpoints/d2/step_000006")


def test_mid_train_starts_from_the_base_model(workspace, capsys):
    losses = [line["train/loss"] for line in metrics(workspace, "mid_train-d2") if "train/loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    checkpoint = checkpoint_manager.find("mid")
    assert (checkpoint.tag, checkpoint.step) == ("d2", 6)
    assert checkpoint.meta["base"].endswith("base_checkpoints/d2/step_000006")
    assert checkpoint.meta["flags"]["init_lr_frac"] == 1.0  # its own default


def test_chat_sft_starts_from_mid_with_inherited_hyperparameters(workspace, capsys):
    chat_sft.main([*SFT, "-i", "mid", "--model-tag", "from-mid"])
    assert "(2 x 4 x 128 x 1 ranks)" in capsys.readouterr().out  # batches handed on from base_train through mid_train
    checkpoint, mid = checkpoint_manager.find("sft", "from-mid"), checkpoint_manager.find("mid")
    assert checkpoint.meta["base"] == str(mid.path)
    inherited = [load_hyperparameters(c.meta) for c in (checkpoint, mid, checkpoint_manager.find("base"))]
    assert inherited[0] == inherited[1] == inherited[2]
    first = [metrics(workspace, f"chat_sft-{tag}")[0]["train/loss"] for tag in ("d2", "from-mid")]
    assert first[1] < first[0]  # it has seen conversations before
    shutil.rmtree(checkpoint.path.parent)


STAGES = [  # script, flags, stage, the function that validates
    (base_train, BASE, "base", (base_train, "evaluate_bpb_of_sources")),
    (mid_train, SFT, "mid", (chat_sft, "evaluate_bpb")),
    (chat_sft, SFT, "sft", (chat_sft, "evaluate_bpb")),
]


@pytest.mark.parametrize("script, argv, stage, validation", STAGES, ids=["base", "mid", "sft"])
def test_stopped_and_resumed_run_is_bitwise_equal(workspace, monkeypatch, capsys, script, argv, stage, validation):
    if stage != "base":
        argv = [*argv, "--base-tag", "d2"]
    whole, name = checkpoint_manager.stage_dir(stage) / "d2", script.__name__.removeprefix("scripts.")
    evaluate = getattr(*validation)

    def evaluate_and_stop(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)  # at the validation after step 3: the run ends after step 4
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*validation, evaluate_and_stop)
        with pytest.raises(SystemExit, match="after step 4.*--resume"):
            script.main([*argv, "--model-tag", "parts"])
    parts = whole.with_name("parts")
    assert sorted(path.name for path in parts.iterdir()) == ["step_000003", "step_000004"]
    torch.manual_seed(12345)
    script.main([*argv, "--model-tag", "parts", "--resume"])

    assert files_of(parts / "step_000006") == files_of(whole / "step_000006")
    assert metrics(workspace, f"{name}-parts") == metrics(workspace, f"{name}-d2")
    shutil.rmtree(parts)


@pytest.mark.parametrize("script, argv, stage", [stage[:3] for stage in STAGES], ids=["base", "mid", "sft"])
def test_run_continued_with_activation_checkpointing_is_bitwise_equal(workspace, capsys, script, argv, stage):
    whole = checkpoint_manager.stage_dir(stage) / "d2"
    argv = [*argv, "--model-tag", "recomputed", *([] if stage == "base" else ["--base-tag", "d2"])]
    recomputed = whole.with_name("recomputed")
    shutil.copytree(whole / "step_000003", recomputed / "step_000003")
    capsys.readouterr()
    script.main([*argv, "--activation-checkpointing", "--resume"])
    assert "activation_checkpointing False → True" in capsys.readouterr().out
    assert files_of(recomputed / "step_000006") == files_of(whole / "step_000006")
    shutil.rmtree(recomputed)


def test_resumed_run_continues_under_the_same_id_in_the_tracker(workspace, monkeypatch):
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    starts, backend = [], Mock()
    monkeypatch.setitem(tracking.BACKENDS, "wandb", lambda **start: starts.append(start) or backend)
    argv = [*BASE, "--model-tag", "tracked", "--sample-every", "-1", "--run", "mine"]
    base_train.main([*argv, "--num-iterations", "3"])
    base_train.main([*argv, "--num-iterations", "4", "--resume"])
    base_train.main([*argv, "--num-iterations", "1", "--model-tag", "other"])
    assert [start["resumed"] for start in starts] == [False, True, False]
    assert starts[0]["run_id"] == starts[1]["run_id"] != starts[2]["run_id"]
    assert starts[0]["run"] == "mine" and starts[0]["group"] == "base_train-tracked"
    steps = [call.args[0] for call in backend.log.call_args_list if "train/loss" in call.args[1]]
    assert steps == [1, 2, 3, 4, 1] and backend.finish.call_count == 3
    for tag in ("tracked", "other"):
        shutil.rmtree(workspace / "base_checkpoints" / tag)


def test_new_run_that_fails_before_its_first_checkpoint_leaves_the_earlier_run(workspace, monkeypatch, capsys):
    argv = [*BASE, "--model-tag", "again", "--sample-every", "-1"]
    base_train.main([*argv, "--num-iterations", "3"])
    folder = workspace / "base_checkpoints/again"
    weights, lines = files_of(folder / "step_000003"), metrics(workspace, "base_train-again")
    with monkeypatch.context() as patch:  # --resume was forgotten, and the run fails at its first validation
        patch.setattr(base_train, "evaluate_bpb_of_sources", Mock(side_effect=RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            base_train.main([*argv, "--save-every", "-1"])
    assert "'again' holds an earlier run" in capsys.readouterr().out
    assert files_of(folder / "step_000003") == weights
    assert metrics(workspace, "base_train-again") == lines
    base_train.main([*argv, "--num-iterations", "4", "--resume"])
    assert "resuming after step 3" in capsys.readouterr().out

    base_train.main(argv)  # succeeds, and takes the name together with its metrics
    assert sorted(path.name for path in folder.iterdir()) == ["step_000003", "step_000006"]
    assert sorted(path.name for path in folder.with_name("again.1").iterdir()) == ["step_000003", "step_000004"]
    assert metrics(workspace, "base_train-again")[-1]["step"] == 6
    assert metrics(workspace, "base_train-again.1")[-1]["step"] == 4
    shutil.rmtree(folder)
    base_train.main([*argv, "--num-iterations", "1", "--resume"])
    assert "starting from the beginning (earlier runs of this tag: again.1)" in capsys.readouterr().out
    for tag in ("again", "again.1"):
        shutil.rmtree(folder.with_name(tag))


def test_portable_model_is_trained_and_saved_with_its_configuration(workspace, capsys):
    base_train.main([*BASE, "--model-tag", "portable", "--portable", "--num-iterations", "1", "--sample-every", "-1"])
    assert "train one with tok_train --portable" in capsys.readouterr().err
    checkpoint = checkpoint_manager.find("base", "portable")
    assert checkpoint.config.logit_softcap == 0 and set(checkpoint.config.windows) == {128}
    names = checkpoint.weights().keys()
    assert not any("lambda" in name or "value_embeds" in name or "smear" in name for name in names)
    shutil.rmtree(checkpoint.path.parent)


def test_resumed_run_keeps_its_source_and_batch_size(workspace, capsys):
    other = ["--model-tag", "other", "--total-batch-size", "512", "--sample-every", "-1"]
    base_train.main([*BASE, *other, "--num-iterations", "1"])
    chat_sft.main([*SFT, "--model-tag", "kept", "--base-tag", "d2", "--num-iterations", "1"])
    capsys.readouterr()
    chat_sft.main([*SFT, "--model-tag", "kept", "--base-tag", "other", "--num-iterations", "2", "--resume"])
    out = capsys.readouterr().out
    assert "base_checkpoints/d2/step_000006" in out and "(2 x 4 x 128 x 1 ranks)" in out
    shutil.rmtree(workspace / "base_checkpoints/other")
    shutil.rmtree(workspace / "chatsft_checkpoints/kept")


def transcripts(workspace, tag):
    return [
        json.loads(line) for line in (workspace / f"report/transcripts/chat_rl-{tag}.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("options", [[], ["--updates-per-batch", "2", "--clip-ratio", "0.2", "--kl-coef", "0.1"]])
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_interrupted_and_resumed_rl_run_is_bitwise_equal(workspace, monkeypatch, capsys, options, how):
    monkeypatch.setitem(chat_rl.TASKS, "hardsums", Letters)
    argv = [*RL, *options, "--base-tag", "d2"]
    whole, parts = (checkpoint_manager.stage_dir("rl") / tag for tag in ("whole", "parts"))
    chat_rl.main([*argv, "--model-tag", "whole"])
    summary = "5 questions of hardsums, 2 test questions, 0 skipped (too long), 6 optimizer steps, 2 x 4 completions"
    assert summary in capsys.readouterr().out
    lines = metrics(workspace, "chat_rl-whole")
    assert [line["step"] for line in lines if "eval/pass@2" in line] == [0, 3, 6]
    sampled = [line for line in lines if "samples" in line]
    assert [line["step"] for line in sampled] == [0, 3, 6] and "<|user_start|>" in sampled[0]["samples"][0]["prompt"]
    rewards = [line["rl/reward"] for line in lines if "rl/reward" in line]
    assert len(rewards) == 6 and len(set(rewards)) == (3 if options else 6)
    shown = transcripts(workspace, "whole")
    assert [line["step"] for line in shown[::4]] == ([1, 3, 5] if options else [1, 2, 3, 4, 5, 6])
    assert shown[0].keys() == {"step", "prompt", "answer", "reward", "advantage"} and "oak" in shown[0]["prompt"]

    sample, evaluate = rollout.sample_rollouts, rollout.evaluate_pass_at_k
    evaluations = []

    def sample_or_be_killed(engine, questions, numbers, sampling, dist):
        if len(evaluations) == 2 and numbers[0] >= (
            4 if options else 8
        ):  # for step 5: the last checkpoint is of step 3
            raise RuntimeError("killed")
        return sample(engine, questions, numbers, sampling, dist)

    def evaluate_and_stop(*args):
        evaluations.append(1)
        if how == "stopped" and len(evaluations) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # at the evaluation after step 3: the run ends after step 4
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "evaluate_pass_at_k", evaluate_and_stop)
        if how == "killed":
            patch.setattr(rollout, "sample_rollouts", sample_or_be_killed)
        with pytest.raises(
            (SystemExit, RuntimeError), match="after step 4.*--resume" if how == "stopped" else "killed"
        ):
            chat_rl.main([*argv, "--model-tag", "parts"])
    last = {"stopped": "step_000004", "killed": "step_000003"}[how]
    assert max(path.name for path in parts.iterdir()) == last
    assert transcripts(workspace, "parts")[-1]["step"] == (3 if options else 4)
    torch.manual_seed(12345)
    recompute = ["--activation-checkpointing"] if how == "killed" else []  # which changes no bit
    chat_rl.main([*argv, "--model-tag", "parts", "--resume", *recompute])

    assert files_of(parts / "step_000006") == files_of(whole / "step_000006")
    assert metrics(workspace, "chat_rl-parts") == metrics(workspace, "chat_rl-whole")
    assert transcripts(workspace, "parts") == transcripts(workspace, "whole")
    report.main([])
    assert "| chat_rl | eval/pass@1 |" in (workspace / "report/report.md").read_text()
    shutil.rmtree(parts.parent)


def test_resumed_run_of_an_older_version_keeps_its_learning_rates():
    flags = base_train.Flags(num_iterations=2)
    for saved, expected in (({}, "nanochat"), ({"recipe": "default"}, "default")):  # the flag did not exist
        assert base_train.keep_recipe(flags, SimpleNamespace(meta={"flags": saved})).recipe == expected


def test_resume_without_checkpoint_starts_from_the_beginning(workspace, capsys):
    base_train.main([*BASE, "--model-tag", "fresh", "--resume", "--num-iterations", "1", "--sample-every", "-1"])
    assert "starting from the beginning" in capsys.readouterr().out
    shutil.rmtree(workspace / "base_checkpoints/fresh")


def test_base_eval_repeats_the_last_validation(workspace, capsys):
    numbers = base_eval.main([*CPU, "--split-tokens", "2048", "--device-batch-size", "4"])
    out = capsys.readouterr().out
    assert "val bits per byte" in out and "The capital of France is" in out and "Without a prompt" in out
    validations = [line for line in metrics(workspace, "base_train-d2") if "val/bpb" in line]
    assert numbers["val bpb"] == pytest.approx(validations[-1]["val/bpb"], rel=1e-9)  # the same batches
    line = metrics(workspace, "base_eval-d2")[-1]
    assert (line["stage"], line["step"], line["numbers"]) == ("base", 6, numbers)
    assert line["model"].endswith("base_checkpoints/d2/step_000006")
    assert "Once upon a time" in [sample["prompt"] for sample in line["samples"]]
    assert list(base_eval.main([*CPU, "--eval", "sample"])) == []


def test_base_eval_works_on_a_chat_model(workspace, capsys):
    numbers = base_eval.main([*CPU, "-i", "sft", "--eval", "bpb", "--split-tokens", "2048"])
    assert numbers.keys() == {"train bpb", "val bpb"}


def test_chat_eval_scores_and_records_each_task(workspace, capsys):
    argv = [*CPU, "-a", "QuizFree,QuizChoice,Sums", "-x", "4", "-m", "8", "-b", "3"]
    scores = chat_eval.main(argv)
    assert [score.total for score in scores.values()] == [4, 4, 4]
    out = capsys.readouterr().out
    assert out.count("95 % interval") == 3 and "chatsft_checkpoints/d2" in out
    assert chat_eval.main([*argv, "-i", "base"]).keys() == scores.keys()
    assert "ChatCORE" not in out  # which is of other tasks
    evaluations = metrics(workspace, "chat_eval-d2")[-2:]
    assert [(line["stage"], line["limits"]) for line in evaluations] == [("sft", ["first 4"]), ("base", ["first 4"])]
    assert evaluations[0]["scores"]["Sums"]["accuracy"] == scores["Sums"].accuracy
    lines = (workspace / "report/chat_eval/sft-d2-000006-first-4/Sums.jsonl").read_text().splitlines()
    assert [json.loads(line)["problem"] for line in lines] == [0, 1, 2, 3]


def test_chat_eval_with_several_samples_reports_pass_at_k(workspace, capsys):
    argv = [*CPU, "-a", "SpellingBee", "-x", "3", "-m", "8", "-t", "1", "-n", "4", "--pass-k", "1,4"]
    score = chat_eval.main(argv)["SpellingBee"]
    assert (score.total, score.num_samples, score.pass_at.keys()) == (3, 4, {1, 4})
    assert "pass@4" in capsys.readouterr().out
    numbers = json.loads((workspace / "report/chat_eval_sft.json").read_text())
    assert numbers["SpellingBee (first 3, temperature 1.0), pass@4"] == score.pass_at[4]
    assert metrics(workspace, "chat_eval-d2")[-1]["scores"]["SpellingBee"]["pass@4"] == score.pass_at[4]


def test_chatcore_is_the_mean_of_centered_scores(workspace, monkeypatch, capsys):
    for name in CHATCORE:  # as if they were all like this one, which needs no dataset
        monkeypatch.setitem(chat_eval.TASKS, name, chat_eval.TASKS["Sums"])
    scores = chat_eval.main([*CPU, "-a", ",".join(CHATCORE), "-x", "3", "-m", "8"])
    core, margin = core_metric([scores[name] for name in CHATCORE])
    assert f"ChatCORE       {core:7.4f}  (± {margin:.4f}" in capsys.readouterr().out
    assert json.loads((workspace / "report/chat_eval_sft.json").read_text())["ChatCORE (first 3)"] == core


def test_chat_cli_with_a_prompt_prints_one_completion(workspace, capsys):
    argv = [*CPU, "-p", "Why is the sky blue?", "-m", "12"]
    answers = []
    for seed in ("1", "1", "2"):
        chat_cli.main([*argv, "--seed", seed])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    assert "checkpoints" not in answers[0]  # the answer alone


def test_chat_cli_with_questions_prints_them_with_independent_responses(workspace, capsys):
    argv = [*CPU, "-t", "0", "-m", "12"]
    chat_cli.main([*argv, "Who are you?", "What is 2 + 3?"])
    output = capsys.readouterr().out
    chat_cli.main([*argv, "-p", "What is 2 + 3?"])
    alone = capsys.readouterr().out
    assert output.startswith("> Who are you?\n") and output.endswith(f"> What is 2 + 3?\n{alone}")


def test_chat_cli_drops_old_messages_when_the_context_is_full(workspace, capsys, monkeypatch):
    long = "so " * 500
    said = iter(["hello", "and then?", *["tell me more of that"] * 4, long, "clear", "hello", "", "quit"])
    monkeypatch.setattr("builtins.input", lambda *args: next(said))
    chat_cli.main([*CPU, "-m", "40"])
    out = " ".join(capsys.readouterr().out.split())
    assert "messages were dropped" in out  # the context is full before long
    assert "at most 88 fit" in out
    assert "A new conversation." in out
    assert not list(said)


def test_report_lists_all_stages(workspace, capsys):
    report.main([])
    out = capsys.readouterr().out
    assert out.index("base_train") < out.index("mid_train") < out.index("chat_sft")
    report.main(["d2"])
    text = (workspace / "report/report-d2.md").read_text()
    for row in ("tok_train | vocabulary | 600", "base_train | val/bpb", "base_train | steps", "mid_train | steps"):
        assert f"| {row} |" in text
    assert text.index("| Pretraining | complete |") < text.index("| Supervised fine-tuning | complete |")
    assert "The capital of France" in text and "What is 47 + 85?" in text  # samples


def test_show_conversation_colours_supervised_tokens(workspace, tmp_path, capsys):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps(messages))
    show_conversation.main(["--path", str(tmp_path / "mine.jsonl")])
    out = capsys.readouterr().out
    assert "<|user_start|>hi<|user_end|>" in out and "trained on" in out
    show_conversation.main(["--source", "spellingbee", "--num", "2"])
    assert capsys.readouterr().out.count("<|python_start|>") == 2


def test_chat_sft_trains_on_spelling(workspace, capsys):
    argv = [*SFT, "--primer-epochs", "0", "--identity-epochs", "0", "--simplespelling-epochs", "1"]
    argv += ["--spellingbee-epochs", "1", "--model-tag", "spelling", "--num-iterations", "1"]
    chat_sft.main(argv)
    assert "280K conversations" in capsys.readouterr().out
    shutil.rmtree(workspace / "chatsft_checkpoints/spelling")


def test_chat_sft_trains_on_own_conversations(workspace, tmp_path, capsys):
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(messages)] * 20))
    argv = [*SFT, "--primer-epochs", "0", "--identity-file", str(tmp_path / "mine.jsonl"), "--model-tag", "mine"]
    chat_sft.main([*argv, "--num-iterations", "1"])
    assert "20 conversations" in capsys.readouterr().out
    shutil.rmtree(workspace / "chatsft_checkpoints/mine")


# ---- what can be wrong ----


@pytest.fixture
def broken(workspace, tmp_path, monkeypatch):
    """A copy of the workspace to damage; shards in data/."""
    copy = tmp_path / "copy"
    shutil.copytree(workspace, copy, ignore=shutil.ignore_patterns("primer", "report"))
    (copy / "data").mkdir()
    for shard in (workspace / "primer").glob("*.parquet"):
        (copy / "data" / shard.name).symlink_to(shard)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(copy))
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(copy / "data"))
    return copy


def nothing(workspace):
    pass


def no_shards(workspace):
    shutil.rmtree(workspace / "data")


def one_shard(workspace):
    for shard in sorted((workspace / "data").iterdir())[1:]:
        shard.unlink()


def replace_first_shard(workspace):
    shard = min((workspace / "data").iterdir())
    shard.unlink()
    return shard


def corrupt_shard(workspace):
    replace_first_shard(workspace).write_bytes(b"PAR1 and no more")


def no_text_column(workspace):
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), replace_first_shard(workspace))


def no_tokenizer(workspace):
    shutil.rmtree(workspace / "tokenizer")


def broken_tokenizer(workspace):
    (workspace / "tokenizer/tokenizer.json").write_text("{")


def lost_tokenizer(workspace):
    """Another tokenizer is in place, and that of the models is gone."""
    shutil.rmtree(workspace / "tokenizer")
    Tokenizer.load(GOLDEN / "tokenizer").save(workspace / "tokenizer")


def no_checkpoints(workspace):
    for stage in ("base", "mid", "chatsft"):
        shutil.rmtree(workspace / f"{stage}_checkpoints")


def damage(*steps):
    def flip_a_byte(workspace):
        for stage in ("base", "chatsft"):
            for step in steps:
                path = workspace / f"{stage}_checkpoints/d2/step_{step:06d}/model.safetensors"
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)

    return flip_a_byte


WRONG = [  # what was done, script, flags, words of the error
    (no_shards, base_train, BASE, "nanochat.dataset"),
    (no_shards, tok_train, [], "nanochat.dataset"),
    (no_shards, base_eval, CPU, "nanochat.dataset"),
    (one_shard, base_train, BASE, "only one shard"),
    (corrupt_shard, base_train, BASE, "not a complete parquet file: delete it"),
    (corrupt_shard, tok_train, [], "not a complete parquet file: delete it"),
    (no_text_column, base_train, BASE, "needs a column `text`"),
    (no_tokenizer, base_train, BASE, "scripts.tok_train"),
    (no_tokenizer, base_eval, CPU, "scripts.tok_train"),
    (no_tokenizer, mid_train, SFT, "scripts.tok_train"),
    (no_tokenizer, chat_sft, SFT, "scripts.tok_train"),
    (no_tokenizer, chat_eval, CPU, "scripts.tok_train"),
    (no_tokenizer, chat_cli, CPU, "scripts.tok_train"),
    (no_tokenizer, tok_eval, [], "scripts.tok_train"),
    (no_tokenizer, show_conversation, [], "scripts.tok_train"),
    (broken_tokenizer, base_train, BASE, "restore the file, or train a new one"),
    (lost_tokenizer, base_train, [*BASE, "--resume"], "another tokenizer (vocabulary 600, here 1024)"),
    (lost_tokenizer, base_eval, CPU, "another tokenizer"),
    (lost_tokenizer, mid_train, SFT, "another tokenizer"),
    (lost_tokenizer, chat_sft, [*SFT, "-i", "mid"], "another tokenizer"),
    (lost_tokenizer, chat_eval, CPU, "another tokenizer"),
    (lost_tokenizer, chat_cli, CPU, "another tokenizer"),
    (no_checkpoints, base_eval, CPU, "scripts.base_train"),
    (no_checkpoints, mid_train, SFT, "scripts.base_train"),
    (no_checkpoints, chat_sft, SFT, "scripts.base_train"),
    (no_checkpoints, chat_sft, [*SFT, "-i", "mid"], "scripts.mid_train"),
    (no_checkpoints, chat_eval, [*CPU, "-i", "mid"], "scripts.mid_train"),
    (no_checkpoints, chat_eval, CPU, "scripts.chat_sft"),
    (no_checkpoints, chat_cli, CPU, "scripts.chat_sft"),
    (nothing, base_eval, [*CPU, "-g", "d9"], "there are d2"),
    (nothing, mid_train, [*SFT, "--base-tag", "d9"], "there are d2"),
    (nothing, chat_sft, [*SFT, "--base-tag", "d9"], "there are d2"),
    (nothing, chat_sft, [*SFT, "-i", "mid", "--base-tag", "d9"], "there are d2"),
    (nothing, chat_eval, [*CPU, "-g", "d9"], "there are d2"),
    (nothing, chat_cli, [*CPU, "-g", "d9"], "there are d2"),
    (nothing, chat_cli, [*CPU, "-s", "5"], "it has 3, 6"),
    (nothing, base_eval, [*CPU, "-s", "5"], "it has 3, 6"),
    (damage(6), base_eval, [*CPU, "-s", "6"], "is corrupt"),
    (damage(3, 6), chat_cli, CPU, "no intact checkpoint"),
    (damage(3, 6), base_train, [*BASE, "--resume"], "no intact checkpoint"),
    (nothing, base_train, [*BASE, "--resume", "--max-seq-len", "64"], "another model"),
    (nothing, base_train, [*BASE, "--total-batch-size", "1000"], "--total-batch-size 512 or 1024"),
    (nothing, mid_train, [*SFT, "--total-batch-size", "1000"], "--total-batch-size 896 or 1024"),
    (nothing, chat_sft, [*SFT, "--total-batch-size", "1000"], "--total-batch-size 896 or 1024"),
    (nothing, base_train, [*BASE, "--window-pattern", "SXL"], "use the letters S (short) and L (full)"),
    (nothing, base_train, [*BASE, "--window-pattern", ""], "use the letters S (short) and L (full)"),
    (nothing, base_train, [*BASE, "--fp8"], "the device is cpu: leave out --fp8"),
    (nothing, chat_eval, [*CPU, "-n", "8"], "add --temperature"),
    (
        nothing,
        chat_eval,
        [*CPU, "-n", "8", "-t", "1", "--pass-k", "1,16"],
        "at most --num-samples, which is 8",
    ),
    (nothing, chat_eval, [*CPU, "-a", "Quiz"], "choose among ARC-Easy"),
    (nothing, base_eval, [*CPU, "--eval", "bpb,cor"], "choose among core, bpb, sample"),
    (nothing, chat_cli, [*CPU, "-p", "so " * 500], "at most 64 fit"),
    (nothing, mid_train, [*SFT, "--identity-epochs", "0", "--primer-epochs", "0"], "--smoltalk-epochs 1"),
    (nothing, chat_sft, [*SFT, "--identity-epochs", "0", "--primer-epochs", "0"], "--smoltalk-epochs 1"),
    (nothing, chat_sft, [*SFT, "--identity-file", "nowhere.jsonl"], "nowhere.jsonl"),
    (nothing, chat_sft, [*SFT, "-i", "sft"], "give another --model-tag"),
    (no_tokenizer, chat_rl, RL, "scripts.tok_train"),
    (lost_tokenizer, chat_rl, RL, "another tokenizer"),
    (no_checkpoints, chat_rl, RL, "scripts.chat_sft"),
    (nothing, chat_rl, [*RL, "-i", "rl"], "scripts.chat_rl"),
    (nothing, chat_rl, [*RL, "--base-tag", "d9"], "there are d2"),
    (nothing, chat_rl, [*RL, "--base-step", "5"], "it has 3, 6"),
    (nothing, chat_rl, [*RL, "--max-new-tokens", "128"], "no question fits"),
    (nothing, chat_rl, [*RL, "--top-k", "1"], "use at least 2"),
    (nothing, chat_rl, [*RL, "--updates-per-batch", "2"], "--clip-ratio, such as 0.2"),
    (nothing, tok_train, ["--vocab-size", "100"], "too small"),
    (nothing, show_conversation, ["--path", "nowhere.jsonl"], "nowhere.jsonl"),
]


def case_name(case):
    done, script, argv, words = case
    return f"{done.__name__}-{script.__name__.removeprefix('scripts.')}-{words}".replace(" ", "_")


@pytest.mark.parametrize("done, script, argv, words", WRONG, ids=map(case_name, WRONG))
def test_user_mistake_ends_in_one_line_before_a_model_is_built(broken, monkeypatch, capsys, done, script, argv, words):
    done(broken)
    if "-p" not in argv:  # that takes a model to see
        monkeypatch.setattr(GPT, "__init__", lambda *args: pytest.fail("a model was built first"))
    message = refusal(script, argv, capsys)
    assert words in message


def test_models_keep_their_tokenizer_when_another_takes_its_place(broken, capsys):
    Tokenizer.load(GOLDEN / "tokenizer").save(broken / "tokenizer")
    base_train.main([*BASE, "--resume"])
    chat_sft.main([*SFT, "--num-iterations", "1", "--model-tag", "again"])
    for tag in ("d2", "again"):
        chat_cli.main([*CPU, "-g", tag, "-p", "hi", "-m", "2"])
    assert checkpoint_manager.find("sft", "again").config.vocab_size == 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [base_train, base_eval, mid_train, chat_sft, chat_rl, chat_eval, chat_cli])
def test_missing_gpu_ends_in_one_line(broken, capsys, script):
    assert "use --device cpu" in refusal(script, ["--device", "cuda"], capsys)


def test_damaged_newest_checkpoint_warns_and_falls_back(broken, capsys):
    damage(6)(broken)
    chat_cli.main([*CPU, "-p", "hello", "-m", "4"])
    out = capsys.readouterr()
    warnings = [line for line in (out.out + out.err).splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "step_000006" in warnings[0]
    assert "warning" not in out.out  # where the answer goes, for scripts
    base_train.main([*BASE, "--resume", "--sample-every", "-1"])
    assert files_of(broken / "base_checkpoints/d2/step_000006").keys() == {
        "model.safetensors", "optimizer.safetensors", "data.safetensors",
    }  # fmt: skip
