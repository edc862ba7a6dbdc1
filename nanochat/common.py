"""Shared by all modules: the base folder, errors for users, atomic file writes, seeds, formatting of numbers."""

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class UserError(ValueError):
    """An error that the user can fix. Its message is one line and names the remedy."""


def base_dir() -> Path:
    """The folder of all files: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. UserError if that is a file."""
    folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    if folder.is_file():
        raise UserError(f"NANOCHAT_BASE_DIR is {folder}, which is a file: set it to a folder")
    return folder


def describe_error(error: BaseException) -> str:
    """The message of an error as one line; for errors of the operating system with the remedy."""
    if not isinstance(error, OSError) or not error.filename or error.errno is None:
        return " ".join(str(error).split())
    name = os.fsdecode(error.filename)
    problem = f"{name}: {error.strerror}"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        path = Path(name)
        file = next((part for part in (path, *path.parents) if part.is_file()), path)
        return f"{file} is a file, where a folder is needed: choose another folder, or move the file"
    if error.errno == errno.EISDIR:
        return f"{name} is a folder, where a file is needed: name a file"
    if error.errno == errno.ENOENT:
        return f"{name} does not exist: check the path"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{problem}: change its permissions, or choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{problem}: free some space, or choose another disk"
    return problem


def seed_everything(seed: int) -> None:
    """Seeds the random generators of Python and of torch on every device."""
    random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """
    Yields a temporary path beside `path`, for a file or a folder. When the block ends, what was written there is
    flushed to the disk and replaces `path`; when the block raises, it is removed.

    After a crash `path` holds the old content or all of the new. Only a folder that already exists has to be removed
    before the new one can take its name: a crash in between leaves a part of the old one, or nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            fsync(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:  # write() does not name its file
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Deletes the temporary files and folders that killed processes left of atomic_path(path)."""
    for leftover in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+(\.old)?\.tmp", leftover.name):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


@contextmanager
def exclusive_lock(file: Path, problem: str) -> Iterator[None]:
    """Holds a lock until the block or the process ends; UserError(problem) if another process holds it."""
    import fcntl  # not on Windows

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(problem) from None
        yield  # closing the file releases the lock


def check_writable(folder: Path) -> None:
    """OSError if the folder, which need not exist, cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError if it is none, and also if it is nested too deeply to be parsed."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def human(number: float) -> str:
    """
    A number with at most three digits and a unit.

    >>> human(1234567)
    '1.23M'
    """
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """
    A time span with its two largest units.

    >>> duration(95)
    '1m35s'
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
