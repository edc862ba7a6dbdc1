"""
Records each start of a stage and how it ended, and rewrites the report at both.

    @command
    @recorded("base_train")
    def main(flags: Flags) -> None: ...
"""

import functools
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nanochat.cli import Restart
from nanochat.common import base_dir
from nanochat.distributed import warn0
from nanochat.report import files
from nanochat.report.sessions import describe_start, gpu_name, sessions_file

T = TypeVar("T")


def recorded(stage: str) -> Callable[[Callable[[Any], T]], Callable[[Any], T]]:
    """
    Decorates main(flags) of a stage: its start and end are recorded, and at both the report of the base folder is
    rewritten. A plan (--plan) and ranks other than 0 record nothing.
    """
    return functools.partial(_decorate, stage)


def _decorate(stage: str, main: Callable[[Any], T]) -> Callable[[Any], T]:
    @functools.wraps(main)
    def run(flags: Any) -> T:
        if getattr(flags, "plan", False) or os.environ.get("RANK", "0") != "0":
            return main(flags)
        with session(stage, flags):
            return main(flags)

    return run


@contextmanager
def session(stage: str, flags: Any) -> Iterator[None]:
    """Records what happens in the block as a session of this stage."""
    base = base_dir()
    name = {"session": uuid.uuid4().hex[:12]}
    record(base, lambda: name | describe_start(stage, flags))
    end, message = "failed", ""
    try:
        yield
        end = "complete"
    except BaseException as error:
        end, message = outcome(error)
        raise
    finally:
        record(base, lambda: name | {"end": end, "message": message} | gpu_name())


def record(base: Path, describe: Callable[[], dict[str, Any]]) -> None:
    """Appends a line to the sessions and rewrites the report. A stage never fails because of its report."""
    try:
        file = sessions_file(base)
        file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(describe() | {"time": round(time.time(), 3)})
        with file.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
        files.write_report(base)
    except Exception as error:  # noqa: BLE001  whatever is wrong with the report, the stage has its own result
        warn0(f"the report was not written ({type(error).__name__}: {error}): `python -m scripts.report` writes it")


def outcome(error: BaseException) -> tuple[str, str]:
    """How a session ended that raised this error, and the message."""
    message = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "by Ctrl-C"
    if isinstance(error, Restart):
        return "restarted", message
    if isinstance(error, SystemExit):  # train.Stopped, or a normal end
        return ("complete", "") if error.code in (None, 0) else ("stopped", message)
    return "failed", message if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {message}"
