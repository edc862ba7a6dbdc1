"""
Files and folders that are whole or absent, paths, seeds, formatting.

    python -m pytest tests/test_common.py
"""

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from nanochat.common import (
    UserError,
    atomic_path,
    base_dir,
    describe_error,
    duration,
    exclusive_lock,
    human,
    remove_leftovers,
    seed_everything,
)  # fmt: skip


def fill(path, kind, content):
    """A file, or a folder with a file in a folder."""
    if kind == "folder":
        (path / "inner").mkdir(parents=True)
        path = path / "inner" / "file"
    path.write_text(content)


def read(path):
    return (path / "inner" / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize(
    "old, new", [(None, "file"), ("file", "file"), ("folder", "file"), (None, "folder"), ("folder", "folder")]
)
def test_the_new_content_replaces_the_old(tmp_path, old, new):
    target = tmp_path / "below" / "target"
    if old:
        target.parent.mkdir()
        fill(target, old, "old")
    with atomic_path(target) as temporary:
        fill(temporary, new, "new")
        assert temporary.parent == target.parent and temporary != target  # a rename must stay on one disk
        assert target.exists() == bool(old)
    assert read(target) == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("old", [True, False])
def test_when_the_block_raises_the_old_content_stays_and_nothing_else(tmp_path, kind, old):
    target = tmp_path / "target"
    if old:
        fill(target, kind, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        fill(temporary, kind, "half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == ([target] if old else [])
    assert not old or read(target) == "old"


def test_a_block_that_writes_nothing_is_an_error_that_keeps_the_old(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_remove_leftovers_deletes_only_those_of_the_path(tmp_path):
    for name in (".target.12.tmp", ".target.12.old.tmp", ".target.v2.12.tmp", ".target.tmp", "target"):
        fill(tmp_path / name, "folder", "text")
    fill(tmp_path / ".target.34.tmp", "file", "text")
    remove_leftovers(tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.tmp", ".target.v2.12.tmp", "target"]


def test_exclusive_lock_is_held_until_the_block_ends(tmp_path):
    lock = tmp_path / "locks" / "a"
    with pytest.raises(KeyError), exclusive_lock(lock, "taken"):
        with pytest.raises(UserError, match="^taken$"), exclusive_lock(lock, "taken"):
            pass
        raise KeyError
    with exclusive_lock(lock, "taken"):
        pass


def test_base_dir_is_read_when_asked_for(monkeypatch):
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    assert base_dir() == Path.home() / ".cache" / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/elsewhere")
    assert base_dir() == Path.home() / "elsewhere"


def test_base_dir_that_is_a_file_raises(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file, which is a file: set it to a folder"):
        base_dir()


@pytest.mark.parametrize(
    "number, name, message",
    [
        (errno.EEXIST, "file/new", "{tmp}/file is a file, where a folder is needed: choose another folder, or move"),
        (errno.ENOTDIR, "file/a/b", "{tmp}/file is a file, where a folder is needed"),
        (errno.EISDIR, "", "{tmp} is a folder, where a file is needed: name a file"),
        (errno.ENOENT, "gone", "{tmp}/gone does not exist: check the path"),
        (errno.EACCES, "file", "{tmp}/file: Permission denied: change its permissions"),
        (errno.EROFS, "file", "{tmp}/file: Read-only file system: change its permissions, or choose another place"),
        (errno.ENOSPC, "file", "{tmp}/file: No space left on device: free some space, or choose another disk"),
        (errno.EIO, "file", "{tmp}/file: Input/output error"),
    ],
)
def test_describe_error_names_the_file_and_the_remedy(tmp_path, number, name, message):
    (tmp_path / "file").touch()
    path = tmp_path / name
    shown = describe_error(OSError(number, os.strerror(number), str(path)))
    assert shown.startswith(message.format(tmp=tmp_path)) and "Errno" not in shown


def test_describe_error_of_another_error_is_one_line():
    assert describe_error(ValueError("two\n  lines")) == "two lines"
    assert describe_error(OSError("no name")) == "no name"


def test_one_seed_for_all():
    drawn = []
    for _ in range(2):
        seed_everything(7)
        drawn.append((random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (7.5, "7.5"), (999, "999"), (1000, "1K"), (1234567, "1.23M"), (-2.5e9, "-2.5B"), (3.1e12, "3.1T")],
)
def test_human(number, text):
    assert human(number) == text


@pytest.mark.parametrize("seconds, text", [(0, "0s"), (59.4, "59s"), (95, "1m35s"), (3600, "1h00m"), (7325, "2h02m")])
def test_duration(seconds, text):
    assert duration(seconds) == text
