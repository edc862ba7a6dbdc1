"""What every part needs: where files live, errors a user can act on, files that are whole or absent, formatting."""

import errno
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class UserError(ValueError):
    """Something the user can put right. The message is one line and names the remedy."""


def base_dir() -> Path:
    """Where everything generated lives: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()


def seed_everything(seed: int) -> None:
    """Seeds Python's and torch's generators, on every device."""
    random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """
    Yields a temporary path beside `path`; what was written there, a file or a folder, replaces `path` when the block
    ends, and is removed when it raises. A crash leaves the old content or the new, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            fsync(file)
        old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
        if path.is_dir():
            os.replace(path, old)  # a rename cannot replace a folder that holds something
        os.replace(temporary, path)
        fsync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:  # write() does not name its file
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def human(number: float) -> str:
    """1234567 -> '1.23M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """95 -> '1m35s'."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
