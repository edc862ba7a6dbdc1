"""
The tracked files are free of phrases that this project replaced by plain English or by the field's own terms.

    python -m pytest tests/test_language.py
"""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = (
    "LICENSE",
    "nanochat/primer/facts.txt",  # training text
    "nanochat/primer/wordings.txt",
    "scripts/samples/",  # texts for the comparison of tokenizers
    "tests/golden/",
    "tests/test_language.py",
)
SUFFIXES = {".py", ".md", ".sh", ".rs", ".toml", ".html", ".txt", ".yaml", ".yml", ""}

# Regular expression → what to write instead.
PHRASES = {
    r"(?-i:\bgo(es)? on\b)|\bgoing on\b|\bwent on\b|\bgone on\b": "continues, resumes",
    r"\bbegun\b": "started",
    r"\banew\b": "again",
    r"\blikeliest\b": "most likely",
    r"\blikelier\b": "more likely",
    r"\bexamin(e|es|ed|ing|ation|ations)\b": "evaluate",
    r"\b(process|thread|copy|checkpoint|schedule|status|difficulty|storage|tokens) of (its|their) own\b": "separate",
    r", in words\b|\bin words[.,;]( |$)": "as text",
    r"(?-i:(?<!~)\bnobody\b)": "no client, no process, …",
    r"; arbitrary\b|\(arbitrary\b|# arbitrary\b": "heuristic, not tuned",
    r"\bhimself\b": "itself",
    r"\bwhat is due\b": "the expected response",
    r"\bwhoever\b": "the caller, the client that …",
    r"\bfor others too\b": "to listen on all interfaces",
    r"\bthat people have\b|\bas people have\b": "legacy, existing",
    r"\bmay well be\b": "is probably",
    r"\bwhole or not there\b": "crash-safe",
    r"\bwhat a person sees\b": "console, metrics file, summary",
    r"\bsay so to\b": "point at",
    r"\bwhole road\b": "full pipeline",
    r"\btold when to\b": "got 429 with Retry-After",
    r"\bminds by what name\b": "validates the Host header",
    r"\bstands there\b": "is repeated",
    r"\bwhat has still to be\b": "unnormalised",
    r"\bexpect to hear\b": "response schema",
}


@cache
def tracked_lines():
    """(file and line number, line) of all tracked text files."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    lines = []
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in SUFFIXES and not name.startswith(SKIPPED):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                lines.append((f"{name}:{number}", line))
    return lines


@pytest.mark.parametrize("phrase", PHRASES)
def test_no_tracked_file_contains_the_phrase(phrase):
    pattern = re.compile(phrase, re.IGNORECASE)
    found = [f"{place}: {line.strip()}" for place, line in tracked_lines() if pattern.search(line)]
    assert not found, f"write {PHRASES[phrase]!r}:\n" + "\n".join(found)
