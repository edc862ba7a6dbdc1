"""
README and the guides in docs/: every block of commands runs as written, with toy sizes, and every name that a guide
links to exists.

The blocks of language `bash` of a document run in one shell, in a home folder. `python` and `torchrun` are
stand-ins there: they hand each command to this process, which calls the script's `main` with the flags of TOY appended
(the last one of a flag counts). That saves a start of Python per command. All guides start from one small model, which
README's first command made. Blocks of language `sh` are not run: installations, servers, other programs.

    python -m pytest tests/test_guides.py
"""

import ast
import importlib
import io
import os
import re
import shutil
import subprocess
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from nanochat import hardware
from nanochat.cli import parse

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [
    "first-model.md",
    "your-own-text.md",
    "personality.md",
    "new-ability.md",
    "reinforcement-learning.md",
    "evaluation.md",
    "one-gpu.md",
    "scaling-laws.md",
    "experiments.md",
]

SFT = "--num-iterations 1 --eval-examples 2 --no-compile --smoltalk-epochs 0 --mmlu-epochs 0 --gsm8k-epochs 0"
TOY = {
    "scripts.tok_train": "--vocab-size 600 --max-chars 100000",
    "scripts.base_train": "--depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 128 --device-batch-size 4 "
    "--total-batch-size 512 --num-iterations 2 --eval-tokens 512 --no-compile",
    "scripts.base_eval": "--split-tokens 512 --device-batch-size 4",
    "scripts.chat_sft": f"{SFT} --primer-epochs 1",
    "scripts.chat_eval": "-x 2 -m 4",
    "scripts.chat_cli": "-m 4",
    "scripts.experiment": "--plan",  # tests/test_experiment.py trains
    "scripts.chat_rl": "--num-iterations 1 --examples-per-step 2 --num-samples 2 --max-new-tokens 4 --eval-examples 2",
}
# Servers and downloads: only their flags are checked.
NOT_RUN = {"nanochat.dataset", "scripts.chat_web"}

STAND_IN = """#!/usr/bin/env bash
{ printf '%s\\0' "$PWD"; env -0; printf '\\0'; printf '%s\\0' "$@"; } > "$BRIDGE/request"
echo call > "$BRIDGE/calls"
read -r code < "$BRIDGE/codes"
cat "$BRIDGE/output"
exit "$code"
"""


class Shell:
    """Runs blocks of bash in a home folder, with scripts run by this process."""

    def __init__(self, folder: Path, home: Path):
        self.folder, self.home = folder, home
        self.commands: list[list[str]] = []  # that were run: module and arguments as written
        programs = folder / "venv/bin"
        programs.mkdir(parents=True)
        (programs / "activate").write_text(f'export PATH="{programs}:$PATH"\n')
        for name in ("python", "torchrun"):
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        os.mkfifo(folder / "calls")
        os.mkfifo(folder / "codes")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT_")}
        self.environment |= {
            "HOME": str(home),
            "BRIDGE": str(folder),
            "NANOCHAT_VENV": str(folder / "venv"),
            "PATH": f"{programs}:{os.environ['PATH']}",
        }

    def run(self, block: str) -> str:
        """Runs the block; fails the test if a command fails. Returns everything that was printed."""
        for name in ("speedrun.sh", "runs", ".venv"):
            if not (self.home / name).exists():
                (self.home / name).symlink_to(self.folder / "venv" if name == ".venv" else ROOT / name)
        with (self.folder / "printed").open("w") as out:
            process = subprocess.Popen(
                ["bash", "-ec", block], cwd=self.home, env=self.environment, stdout=out, stderr=out
            )

            def report_end() -> None:
                process.wait()
                (self.folder / "calls").write_text("end\n")

            threading.Thread(target=report_end).start()
            while (self.folder / "calls").read_text() == "call\n":
                self.answer()
        printed = (self.folder / "printed").read_text()
        assert process.returncode == 0, f"{block}\n{printed}"
        return printed

    def answer(self) -> None:
        """Runs the command that a stand-in asks for; gives it the exit code and the output."""
        environment, _, arguments = (self.folder / "request").read_bytes().decode().partition("\0\0")
        directory, *variables = environment.split("\0")
        words = arguments.split("\0")[:-1]
        code, output = 0, io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
            patch.chdir(directory)
            for name in [name for name in os.environ if name.startswith("NANOCHAT_")]:
                patch.delenv(name)
            for variable in variables:
                name, _, value = variable.partition("=")
                if name == "HOME" or name.startswith("NANOCHAT_"):
                    patch.setenv(name, value)
            try:
                self.run_module(words[words.index("-m") + 1 :])
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else int(bool(exit.code))
                if isinstance(exit.code, str):
                    output.write(f"{exit.code}\n")
        (self.folder / "output").write_text(output.getvalue())
        (self.folder / "codes").write_text(f"{code}\n")

    def run_module(self, words: list[str]) -> None:
        module, *arguments = words
        if module == "nanochat.hardware":
            print(1)  # rank
            return
        self.commands.append(words)
        script = importlib.import_module(module)
        if module in NOT_RUN:
            parse(script.Flags, arguments)
            return
        if "--plan" not in arguments:
            arguments += TOY.get(module, "").split()
        script.main(arguments)


@pytest.fixture(scope="module")
def toy_machine():
    """Choices that would be measured, and downloads, are replaced for all commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "bf16_faster_on_cpu", lambda: False)
        patch.setattr(hardware, "pick_device", lambda *_: torch.device("cpu"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TIKTOKEN_CACHE_DIR", "/nonexistent")
        yield


@pytest.fixture(scope="module")
def first_run(toy_machine, tmp_path_factory):
    """The home folder after README's first command, and what that printed."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "home").mkdir()
    shell = Shell(folder / "shell", folder / "home")
    printed = shell.run("bash speedrun.sh")
    return folder / "home", printed


@pytest.fixture
def shell(first_run, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(first_run[0], home, symlinks=True)
    shutil.copytree(ROOT / "docs", home / "texts")
    return Shell(tmp_path / "shell", home)


def blocks(path: Path) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_first_command_of_readme_trains_a_model_that_answers(first_run):
    home, printed = first_run
    assert "bash speedrun.sh" in blocks(ROOT / "README.md")[0]
    assert (home / ".cache/nanochat/report/report.md").exists()
    assert "> What is the capital of France?" in printed and "done in" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_commands_of_guide_run(shell, name):
    shell.run("\n".join(blocks(ROOT / "docs" / name)))
    assert shell.commands


@pytest.mark.parametrize("folder", ["nanochat", "scripts", "runs", "rustbpe", "tasks"])
def test_reading_tour_names_every_module(folder):
    tour = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    assert f"{folder}/" in tour
    if folder != "nanochat":
        return
    modules = [path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    packages = [f"{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py")]
    assert not [name for name in modules + packages if name not in tour]


def links_to_code():
    """(document, name, path) of every link like [`GPT.forward`](../nanochat/gpt.py)."""
    for path in DOCS:
        for name, target in re.findall(r"\[`([\w.]+)`\]\(([\w./-]+\.py)\)", path.read_text(encoding="utf-8")):
            yield path.name, name, (path.parent / target).resolve()


@pytest.mark.parametrize("document, name, path", sorted(links_to_code()))
def test_name_that_a_guide_links_to_exists(document, name, path):
    scope = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in scope if getattr(node, "name", "") == part]
        assert found, f"{document} links to {name}, which {path.name} does not define"
        scope = getattr(found[0], "body", [])


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_and_sections_that_a_document_links_to_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        address = "".join(target)
        if address.startswith("http"):
            continue
        file, _, section = address.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), address
        if section:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert section in slugs, address
