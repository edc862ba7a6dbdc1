"""
Every command in README.md, docs/, shell scripts and module docstrings starts a script that exists, with valid flags.

    python -m pytest tests/test_documented_commands.py
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from nanochat.cli import parse

ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.compile(r"-m (scripts\.\w+|nanochat\.dataset)\b(.*)")
END_OF_COMMAND = {"&&", "|", ">", "<", ";"}


def documented_texts():
    """(name, text) of the documentation, of the comments in shell scripts and of all module docstrings."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield path.name, path.read_text(encoding="utf-8")
    for path in [ROOT / "speedrun.sh", *sorted((ROOT / "runs").glob("*.sh"))]:
        lines = path.read_text(encoding="utf-8").splitlines()
        yield path.name, "\n".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    for folder in ("nanochat", "tasks", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            yield path.relative_to(ROOT).as_posix(), docstring or ""


def documented_commands():
    """(name, module, arguments) of every command that starts a script."""
    for name, text in documented_texts():
        for line in text.replace("\\\n", " ").splitlines():
            found = COMMAND.search(line)
            if not found or found[1] == "scripts.NAME":
                continue
            rest = found[2].split("`")[0]  # within a sentence the command ends at its quotation mark
            arguments = shlex.split(rest, comments=True)
            for i, argument in enumerate(arguments):
                if argument in END_OF_COMMAND:
                    arguments = arguments[:i]
                    break
            yield name, found[1], arguments


@pytest.mark.parametrize("name, module, arguments", sorted(documented_commands()))
def test_documented_command_has_valid_flags(name, module, arguments):
    if module == "scripts.bench":
        if not arguments or arguments[0] == "NAME":
            return
        module = f"scripts.bench.{arguments.pop(0)}"
    flags = importlib.import_module(module).Flags
    parse(flags, ["placeholder" if argument == "…" else argument for argument in arguments if argument != "--help"])
