"""Reads facts.txt and wordings.txt, whose first lines describe their formats, and other files of these formats."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

FACTS = Path(__file__).with_name("facts.txt")
WORDINGS = Path(__file__).with_name("wordings.txt")


class Fact(NamedTuple):
    subject: str
    answer: str


@cache
def read_sections(path: Path) -> dict[str, list[str]]:
    """Returns the lines of each [section] of a file, without comments and empty lines."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def load_entries(section: str) -> list[str]:
    """Returns the entries of a section of facts.txt."""
    return " ".join(read_sections(FACTS)[section]).split("; ")


def load_facts(section: str) -> list[Fact]:
    """Returns the entries of a section of facts.txt that have the form "subject: answer"."""
    return [Fact(*entry.rsplit(": ", 1)) for entry in load_entries(section)]


@cache
def load_wordings(section: str, path: Path = WORDINGS) -> dict[str, tuple[str, ...]]:
    """Returns the wordings of each kind in a section."""
    wordings: dict[str, tuple[str, ...]] = {}
    for line in read_sections(path)[section]:
        kind, _, listed = line.partition(": ")
        wordings[kind] = wordings.get(kind, ()) + tuple(listed.split(" | "))
    return wordings
