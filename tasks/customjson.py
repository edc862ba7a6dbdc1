"""Conversations of your own from a JSONL file, a line an array of messages: [{"role": "user", "content": "Hi"}, …]."""

import json
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import validate
from tasks.common import Task


class CustomJSON(Task):
    """The conversations in the order of the file. UserError, naming the line, for one that is not right."""

    kind = "conversations"

    def __init__(self, path: str | Path) -> None:
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: text may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
        self.conversations = [_parse(path, i, line) for i, line in enumerate(lines, start=1) if line.strip()]
        if not self.conversations:
            raise UserError(f"{path} holds no conversations: put one array of messages on each line")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.conversations[index]


def _parse(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        conversation = {"messages": json.loads(line)}
        validate(conversation)
    except ValueError as error:  # of json as of validate
        raise UserError(f"{path}, line {number}: {error}") from error
    return conversation
