"""
docs/serve.md: its exports are executed, and its other commands refer to files that these exports write. What needs
llama.cpp runs if it is installed; vLLM and ollama do not run here.

    python -m pytest tests/test_serve_guide.py
"""

import re
import shlex
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from factories import save_checkpoint, tiny_gpt, wait_until

from nanochat.gpt import PORTABLE
from nanochat.tokenizer import PORTABLE_SPLIT_PATTERN, Tokenizer
from scripts import export

GUIDE = (Path(__file__).resolve().parent.parent / "docs/serve.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]
EXPORTS = [shlex.split(line)[3:] for line in COMMANDS if line.startswith("python -m scripts.export ")]


@pytest.fixture
def folder(base_dir, golden_tokenizer, tmp_path, monkeypatch) -> Path:
    """The current folder after all exports of the guide, of a portable model."""
    pytest.importorskip("gguf")
    ranks = {token: i for i, token in enumerate(golden_tokenizer.tokens)}
    model = tiny_gpt(**PORTABLE, n_embd=64, n_head=4, n_kv_head=4)
    save_checkpoint(model, "sft", tokenizer=Tokenizer(PORTABLE_SPLIT_PATTERN, ranks))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for arguments in EXPORTS:
        export.main(arguments)
    return work


@pytest.mark.slow
def test_commands_of_the_guide_refer_to_what_its_exports_write(folder):
    assert {arguments[arguments.index("--to") + 1] for arguments in EXPORTS} == {"hf", "gguf", "html"}
    for program, argument in (("vllm", 2), ("llama-cli", 2), ("llama-server", 2), ("ollama create", 4)):
        command = next(line for line in COMMANDS if line.startswith(program))
        assert (folder / shlex.split(command)[argument]).exists(), command
    modelfile = (folder / "gguf/Modelfile").read_text()
    assert (folder / "gguf" / re.match(r"FROM (\S+)", modelfile)[1]).exists()


@pytest.mark.slow
def test_static_host_of_the_guide_serves_the_page(folder):
    command = next(line for line in COMMANDS if "http.server" in line)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    argv = [sys.executable, *shlex.split(command.replace("8080", port))[1:], "--bind", "127.0.0.1"]
    server = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: accepts_connections(int(port)))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
            assert response.read() == (folder / "site/index.html").read_bytes()
    finally:
        server.terminate()
        server.wait()


def accepts_connections(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_python_example_of_the_guide_runs(folder, capsys):
    pytest.importorskip("llama_cpp")
    capsys.readouterr()
    code = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1]
    exec(compile(code, "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out.strip()
