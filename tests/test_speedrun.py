"""
What speedrun.sh chooses for a machine, and a run at toy size: killed in the middle of a stage and started again, it
skips what is finished and resumes the rest. Also its plan and its error messages.

    python -m pytest tests/test_speedrun.py
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from factories import wait_until
from test_report import stage_of

from nanochat import planner
from nanochat.cards import find_machine
from nanochat.cli import parse
from nanochat.common import UserError
from nanochat.costs import TrainingSetup
from nanochat.report.reader import read_run
from scripts import base_eval, base_train, chat_eval, chat_sft, make_shards
from scripts import speedrun as plan
from scripts.speedrun import Facts, Settings, decide

ROOT = Path(__file__).resolve().parent.parent
BASE = Path("/base")
needs_venv = pytest.mark.skipif(
    not (Path(sys.prefix) / "bin/activate").exists(), reason="speedrun.sh needs a virtual environment to reuse"
)


GPT2 = ["--depth", "22", "--target-param-data-ratio", "9.4", "--total-batch-size", "524288"]
GPT2 += ["--eval-every", "1000", "--sample-every", "2000"]


def gpus(count, card, **facts):
    has_fp8 = bool(card) and find_machine(card).card.has_fp8
    return Facts("cuda", count, card, **{"online": True, "has_fp8": has_fp8} | facts)


# ---- decisions ----


@pytest.mark.parametrize(
    "facts, flags, shards",
    [
        (gpus(8, "H100"), [*GPT2, "--fp8"], 175),
        (gpus(8, "H100", has_fp8=False), GPT2, 175),  # the trial failed
        (gpus(4, "H100"), [*GPT2, "--fp8"], 175),
        (gpus(2, "H100"), ["--depth", "20", "--fp8"], 152),
        (gpus(1, "H100"), ["--depth", "16"], 82),
        (gpus(8, "A100-80"), GPT2, 175),
        (gpus(1, "RTX4090"), ["--depth", "12"], 39),
        (gpus(8, ""), GPT2, 175),
        (gpus(1, ""), ["--depth", "12"], 39),
    ],
)
def test_gpus_with_a_network_train_on_public_text_what_takes_a_few_hours(facts, flags, shards):
    decisions = decide(Settings(), facts, BASE)
    assert decisions.base_train[: len(flags)] == flags
    assert decisions.base_train[len(flags)] == "--eval-tokens"
    assert decisions.data == ["python", "-m", "nanochat.dataset", "-n", str(shards)]
    assert decisions.data_dir == "" and decisions.vocab_size == (49152 if flags[:2] == GPT2[:2] else 32768)
    torchrun = ["torchrun", "--standalone", f"--nproc_per_node={facts.gpus}", "-m"]
    assert decisions.launch == (torchrun if facts.gpus > 1 else ["python", "-m"])
    assert "core,bpb,sample" in decisions.base_eval and "--primer-epochs" not in decisions.chat_sft


def test_eight_h100s_train_the_recipe_for_gpt2_in_one_pass_per_step():
    decisions = decide(Settings(), gpus(8, "H100"), BASE)
    flags = parse(base_train.Flags, decisions.base_train)
    recipe = plan.derive(flags, decisions.vocab_size)
    assert (recipe.model.n_embd, recipe.model.n_head, recipe.total_batch_size) == (1408, 11, 2**19)
    assert (flags.warmdown_ratio, flags.final_lr_frac, flags.norm_gains) == (0.65, 0.05, False)
    target = planner.named_target("8xH100", fp8=True)
    setup = planner.training_setup(recipe.model, target, recipe.total_batch_size, base_train.wanted_setup(flags))
    assert (setup.rows, setup.accumulation) == (32, 1)


def test_fp8_can_be_turned_off(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_FP8", "0")
    settings = plan.read_settings(tmp_path)
    assert "--fp8" not in decide(settings, gpus(8, "H100"), BASE).base_train
    monkeypatch.setenv("NANOCHAT_FP8", "no")
    with pytest.raises(UserError, match="NANOCHAT_FP8 is no: use 0"):
        plan.read_settings(tmp_path)


@pytest.mark.parametrize("card", ["H100", "A100-40", "RTX4090", "T4", "B200"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_choice_for_known_gpus_fits_and_takes_no_longer_than_allowed(count, card):
    decisions = decide(Settings(), gpus(count, card), BASE)
    flags = parse(base_train.Flags, decisions.base_train)
    recipe = plan.derive(flags, decisions.vocab_size)
    target = planner.named_target(f"{count}x{card}", flags.fp8)
    wanted = TrainingSetup(rows=-1, fp8=flags.fp8)
    setup = planner.training_setup(recipe.model, target, recipe.total_batch_size, wanted)
    planner.check_fits(recipe.model, setup, target)
    assert target.seconds(recipe.model, recipe.flops) <= 3600 * plan.MAX_HOURS


@pytest.mark.parametrize(
    "facts", [Facts("cpu"), Facts("cpu", online=True), Facts("mps"), gpus(8, "H100", online=False)]
)
def test_without_gpu_or_network_the_primer_is_the_text(facts):
    decisions = decide(Settings(), facts, BASE)
    assert decisions.data == ["python", "-m", "scripts.primer", "--data-dir", "/base/primer"]
    assert decisions.data_dir == "/base/primer" and decisions.vocab_size == 2048
    assert "--primer-epochs" in decisions.chat_sft and "QuizFree,QuizChoice,Sums" in decisions.chat_eval


def test_text_files_are_converted_to_shards():
    facts = Facts("cpu", text="files", text_bytes=69e6, online=True)
    decisions = decide(Settings(data_dir="/my texts"), facts, BASE)
    flags = parse(make_shards.Flags, decisions.data[3:])
    assert (flags.sources, flags.out) == (["/my texts"], "/base/text")
    assert decisions.data_dir == "/base/text" and decisions.vocab_size == 8192
    assert "--num-iterations" in decisions.chat_sft  # public datasets, shortened for a CPU


@pytest.mark.parametrize("kind, value", [("shards", "/shards"), ("mixture", "climbmix=0.8,cosmopedia=0.2")])
def test_shards_and_mixtures_are_used_as_they_are(kind, value):
    decisions = decide(Settings(data_dir=value), gpus(8, "H100", text=kind), BASE)
    assert decisions.data == [] and decisions.data_dir == value
    assert "bpb,sample" in decisions.base_eval


@pytest.mark.parametrize("text_bytes, vocab_size", [(50e3, 1024), (1e6, 2048), (69e6, 8192), (1e9, 32768)])
def test_vocabulary_is_one_that_the_text_is_enough_for(text_bytes, vocab_size):
    facts = gpus(1, "H100", text="files", text_bytes=text_bytes)
    assert decide(Settings(data_dir="/texts"), facts, BASE).vocab_size == vocab_size


@pytest.mark.parametrize("mode", ["", "tiny"])
@pytest.mark.parametrize(
    "facts", [Facts("cpu"), Facts("cpu", text="shards", online=True), gpus(1, "H100"), gpus(8, "H100", text="mixture")]
)
def test_all_flags_are_valid(mode, facts):
    decisions = decide(Settings(mode=mode, data_dir="/texts" if facts.text else ""), facts, BASE)
    for module, flags in (
        (base_train, decisions.base_train),
        (base_eval, decisions.base_eval),
        (chat_sft, decisions.chat_sft),
        (chat_eval, decisions.chat_eval),
    ):
        parse(module.Flags, flags)


def test_dtype_of_the_user_overrides_the_measured_one():
    facts = Facts("cpu", dtype="bfloat16")
    assert decide(Settings(), facts, BASE).dtype == "bfloat16"
    assert decide(Settings(dtype="float32"), facts, BASE).dtype == "float32"


# ---- what is written for bash, and kept for the next start ----


def test_bash_reads_the_same_words(tmp_path):
    decisions = decide(Settings(data_dir="/it's $HOME"), Facts("cpu", text="shards"), BASE)
    file = tmp_path / "stages.sh"
    file.write_text(plan.shell_variables(decisions, "", "/bundle", "my run"))
    script = 'source "$1"; printf "%s\\n" "$NANOCHAT_DATA_DIR" "${base_train[@]}"; echo "${#data[@]} ${base_eval[*]}"'
    done = subprocess.run(["bash", "-euc", script, "bash", file], capture_output=True, text=True, check=True)
    *words, last = done.stdout.splitlines()
    assert words == ["/it's $HOME", *decisions.base_train, "--run", "my run"]
    assert last.startswith("0 ") and "core,bpb,sample" in last  # the folder of CORE's tasks is set


@pytest.fixture
def start(base_dir, monkeypatch):
    """Calls scripts.speedrun as speedrun.sh does; returns what it has written for bash."""
    monkeypatch.delenv("NANOCHAT_SPEEDRUN", raising=False)
    monkeypatch.setattr(planner, "measured_rate", lambda *_: 1e11)

    def run(facts):
        monkeypatch.setattr(plan, "find_facts", lambda *_: facts)
        plan.main([])
        return (base_dir / "speedrun/stages.sh").read_text()

    return run


def test_restart_keeps_the_decisions_and_the_finished_stages(start, base_dir, capsys):
    first = start(Facts("cpu", dtype="bfloat16"))
    mark = base_dir / "speedrun/tok_train.done"
    mark.touch()
    assert start(Facts("cpu", dtype="float32", online=True)) == first
    assert mark.exists() and "as decided at the first start" in capsys.readouterr().out


def test_other_settings_run_all_stages_again(start, base_dir, monkeypatch, capsys):
    start(Facts("cpu"))
    mark = base_dir / "speedrun/tok_train.done"
    mark.touch()
    monkeypatch.setenv("NANOCHAT_SPEEDRUN", "tiny")
    assert "--depth 2 " in start(Facts("cpu"))
    assert not mark.exists() and "all stages run again" in capsys.readouterr().out


def test_decisions_of_another_version_are_made_again(start, base_dir):
    start(Facts("cpu"))
    (base_dir / "speedrun/decided.json").write_text('{"settings": 1}')
    assert "--depth 4 " in start(Facts("cpu"))


# ---- the script ----


@pytest.fixture
def speedrun(tmp_path):
    """Starts speedrun.sh in this environment with a temporary base folder; returns the process and its log file."""
    processes = []

    def start(*arguments, **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT_")}
        environment |= {"NANOCHAT_VENV": sys.prefix, "NANOCHAT_BASE_DIR": str(tmp_path / "base")} | variables
        log = tmp_path / f"log{len(processes)}.txt"
        with log.open("w") as output:
            command = ["bash", ROOT / "speedrun.sh", *arguments]
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        processes.append(process)
        return process, log

    yield start
    for process in processes:
        if process.poll() is None:
            kill(process)


def kill(process):
    """Kills the script and the stage that it runs."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@needs_venv
@pytest.mark.slow
def test_killed_speedrun_resumes_and_its_model_answers(speedrun, tmp_path):
    process, log = speedrun(NANOCHAT_SPEEDRUN="tiny")
    checkpoints = tmp_path / "base/base_checkpoints/speedrun"

    def has_checkpoint():
        assert process.poll() is None, log.read_text()
        return list(checkpoints.glob("step_*"))

    wait_until(has_checkpoint, seconds=300)
    kill(process)
    assert "== base_train:" in log.read_text() and "step 40/40" not in log.read_text()

    def base_train():
        return stage_of(read_run(tmp_path / "base"), "base_train")

    wait_until(lambda: base_train()["status"] == "killed", seconds=60)  # a large process takes a moment to end
    assert 0 < base_train()["step"] < 40

    process, log = speedrun(NANOCHAT_SPEEDRUN="tiny")
    wait_until(lambda: "| loss" in log.read_text() or process.poll() is not None, seconds=300)
    process.terminate()  # only the shell, which passes it on to the stage
    assert process.wait(timeout=60) == 143
    assert "saved: continue with --resume" in log.read_text() and "run the same command again" in log.read_text()

    process, log = speedrun(NANOCHAT_SPEEDRUN="tiny")
    code = process.wait(timeout=600)
    output = log.read_text()
    assert code == 0, output
    assert "\x1b" not in output  # plain lines in a file
    for stage in ("data", "tok_train", "tok_eval"):
        assert f"== {stage}: skipped, finished before" in output
    assert re.search(r"^== base_train: .* --resume$", output, re.MULTILINE)
    assert "step 1/40" not in output and "step 40/40" in output
    for stage in ("base_train", "base_eval", "chat_sft", "chat_eval"):
        assert re.search(rf"^== {stage} took \d+ s$", output, re.MULTILINE)
    assert re.search(r"^> What is the capital of France\?\n.*\S", output, re.MULTILINE)
    assert "done in" in output.splitlines()[-1]
    run = read_run(tmp_path / "base")
    assert {stage["status"] for stage in run["stages"]} == {"complete"}
    sessions = stage_of(run, "base_train")["sessions"]
    assert [session["status"] for session in sessions] == ["killed", "stopped", "complete"]
    assert run["chats"]["samples"] and stage_of(run, "base_train")["samples"] and run["tokenizer"]["results"]
    assert "](report-base_train.png)" in (tmp_path / "base/report/report.md").read_text()


@pytest.mark.skipif(any(Path(folder, "cargo").exists() for folder in ("/usr/bin", "/bin")), reason="cargo is there")
def test_ready_environment_is_used_without_writing_to_the_clone(tmp_path):
    """The clone may be read-only or somebody else's. (Whether it can be written to is no test for root.)"""
    for name in ("pyproject.toml", "constraints.txt", "runs/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("echo activated $HOME\n")
    stamp = subprocess.run("cat pyproject.toml constraints.txt | cksum", shell=True, cwd=ROOT, capture_output=True)
    (tmp_path / ".venv/stamp").write_bytes(stamp.stdout)
    command = ["bash", "-c", "source runs/setup.sh"]
    for folder in (".venv", "."):
        (tmp_path / folder).chmod(0o555)
    # Without cargo on the path there is no crate to build; without HOME it is that of /etc/passwd.
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 0 and re.match("activated /", done.stdout), done.stderr
    assert not (tmp_path / ".setup.lock").exists()


@needs_venv
@pytest.mark.slow
def test_plan_for_another_machine_writes_nothing(speedrun, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/note.md").write_text("One short note.\n" * 10_000)
    texts = str(tmp_path / "texts")
    process, log = speedrun("--plan", "--for", "8xH100", NANOCHAT_DATA_DIR=texts, HOME="")  # as in some containers
    output = log.read_text() if process.wait(timeout=60) == 0 else pytest.fail(log.read_text())
    assert "converted to shards" in output and "vocabulary  2,048 tokens" in output
    assert "--depth 22 --target-param-data-ratio 9.4 --total-batch-size 524288" in output and "--fp8" in output
    assert len(re.findall(r"^  time +\S+ ", output, re.MULTILINE)) == 2  # pretraining and fine-tuning
    assert not (tmp_path / "base").exists()


@needs_venv
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        ([], {"NANOCHAT_SPEEDRUN": "huge"}, "error: NANOCHAT_SPEEDRUN is huge: use tiny, or unset it"),
        ([], {"NANOCHAT_DATA_DIR": "/no/folder"}, "error: NANOCHAT_DATA_DIR is /no/folder, which is no folder"),
        ([], {"NANOCHAT_EVAL_BUNDLE": "no"}, "error: NANOCHAT_EVAL_BUNDLE is no, which is not a folder"),
        ([], {"NANOCHAT_DTYPE": "int4"}, "error: NANOCHAT_DTYPE=int4: unknown"),
        ([], {"NANOCHAT_VENV": "/no/venv"}, "error: NANOCHAT_VENV is /no/venv, which is not a virtual environment"),
        (["--plan", "--for", "8xH1"], {}, "error: --for 8xH1: write the number of GPUs and the card"),
        (["--for", "8xH100"], {}, "error: --for plans for another machine: use it with --plan"),
    ],
)
def test_bad_setting_ends_in_one_line(speedrun, arguments, variables, message):
    process, log = speedrun(*arguments, **variables)
    assert process.wait(timeout=60) == 1
    [line] = log.read_text().splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize("value", ["climbmix", "climbmix=0.8,~/books=0.2"])
def test_mixture_passes_unchanged(base_dir, monkeypatch, tmp_path, value):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", value)
    settings = plan.read_settings(tmp_path)
    assert settings.data_dir == value
    assert plan.inspect_text(value, base_dir) == ("mixture", math.inf)


def test_folder_without_text_is_refused(base_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "pictures"))
    (tmp_path / "pictures").mkdir()
    with pytest.raises(SystemExit, match="no file to read"):
        plan.main(["--plan"])
