"""Reads the data files of the primer: facts.txt and wordings.txt, which describe their formats."""

from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Fact(NamedTuple):
    subject: str
    answer: str


@cache
def read_sections(file_name: str) -> dict[str, list[str]]:
    """Return the lines of each [section] of a file in this folder, without comments and empty lines."""
    sections: dict[str, list[str]] = {}
    for line in files("nanochat.primer").joinpath(file_name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def load_entries(section: str) -> list[str]:
    """Return the entries of a section of facts.txt."""
    return " ".join(read_sections("facts.txt")[section]).split("; ")


def load_facts(section: str) -> list[Fact]:
    """Return the entries of a section of facts.txt that have the form "subject: answer"."""
    return [Fact(*entry.rsplit(": ", 1)) for entry in load_entries(section)]


@cache
def load_wordings(section: str) -> dict[str, tuple[str, ...]]:
    """Return the wordings of each kind in a section of wordings.txt."""
    found: dict[str, tuple[str, ...]] = {}
    for line in read_sections("wordings.txt")[section]:
        kind, _, listed = line.partition(": ")
        found[kind] = found.get(kind, ()) + tuple(listed.split(" | "))
    return found
