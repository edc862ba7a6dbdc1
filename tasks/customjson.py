"""Conversations from a JSONL file, one array of messages per line: [{"role": "user", "content": "Hi"}, …]."""

from pathlib import Path
from typing import Any

from nanochat.common import UserError, describe_error, parse_json
from nanochat.conversation import validate
from tasks.common import Task


class CustomJSON(Task):
    """The conversations in the order of the file. Raises UserError with the line number of an invalid one."""

    kind = "conversations"

    def __init__(self, path: str | Path) -> None:
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would split at U+2028 too
        except OSError as error:
            raise UserError(describe_error(error)) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}): convert it") from error
        self.rows = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self.rows.append(_parse(path, number, line))
        if not self.rows:
            raise UserError(f"{path} has no conversations: write one array of messages per line")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _parse(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        conversation = {"messages": parse_json(line)}
        validate(conversation)
    except ValueError as error:  # not JSON, or not valid
        raise UserError(f"{path}, line {number}: {error}") from error
    return conversation
