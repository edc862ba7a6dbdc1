"""
Show conversations as the model sees them: green is what it learns to say, the rest is context.

    python -m scripts.show_conversation --path identity.jsonl --num 3
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from nanochat.common import UserError
from nanochat.conversation import colour_view, render
from nanochat.flags import command, flag
from nanochat.tokenizer import Tokenizer, default_dir


@dataclass(frozen=True)
class Flags:
    path: str = flag("", "JSONL file, one array of messages a line")
    num: int = flag(5, "conversations to show")
    max_tokens: int = flag(2048, "tokens after which a conversation is cut, as in training")
    tokenizer_dir: str = flag("", "folder of the tokenizer; empty = tokenizer/ in $NANOCHAT_BASE_DIR")


@command
def main(flags: Flags) -> None:
    tokenizer = Tokenizer.load(Path(flags.tokenizer_dir) if flags.tokenizer_dir else default_dir())
    console = Console()
    for line, messages in islice(read_messages(Path(flags.path)), flags.num):
        try:
            ids, mask = render({"messages": messages}, tokenizer, flags.max_tokens)
        except UserError as error:
            raise UserError(f"{flags.path}, line {line}: {error}") from error
        console.rule(f"line {line}: {len(ids)} tokens, {sum(mask)} learned")
        console.print(colour_view(ids, mask, tokenizer))


def read_messages(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, what the line holds), empty lines left out."""
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}: name a JSONL file with --path")
    with path.open(encoding="utf-8") as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                try:
                    yield line, json.loads(content)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {line} is not JSON: {error}") from error


if __name__ == "__main__":
    main()
