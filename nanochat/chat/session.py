"""A chat with a model: questions, answers as they come, other answers, the conversation in a file."""

import json
import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_path
from nanochat.conversation import PartReader, read_parts, render_to_fit
from nanochat.engine import Completion, Engine, Request


class Chat:
    """One conversation with the model. All of it is kept; the model reads from message `start` on."""

    def __init__(self, engine: Engine, settings: Request):
        self.engine, self.settings = engine, settings
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.start = 0
        self.dropped = 0  # messages that the last prompt had no room for any more
        self.completion = Completion()  # the last one

    def answer(self, text: str) -> Generator[tuple[str, str]]:
        """
        Streams the reply as (kind of part, text, perhaps none); what was said by then is kept if the caller stops
        early. UserError, and nothing is kept, if the question is too long.
        """
        engine, question = self.engine, {"role": "user", "content": text}
        context, max_tokens = engine.model.config.sequence_len, self.settings.max_tokens
        messages = [*self.messages[self.start :], question]
        ids, self.dropped = render_to_fit({"messages": messages}, engine.tokenizer, context, max_tokens)
        self.start += self.dropped
        self.completion = Completion()
        reader = PartReader(engine.tokenizer)
        try:
            for _, token, completion in engine.stream([replace(self.settings, prompt=ids)]):
                self.completion = completion
                if token is not None:
                    yield reader.read(token)
        finally:
            said = read_parts(self.completion.tokens, engine.tokenizer)
            self.messages += [question, {"role": "assistant", "content": said}]

    def retry(self) -> Generator[tuple[str, str]]:
        """Streams another reply to the last question, with the next seed. UserError if there is none."""
        if not self.messages:
            raise UserError("/retry: nothing has been said yet")
        self.settings = replace(self.settings, seed=self.settings.seed + 1)
        *self.messages, question, _ = self.messages
        return self.answer(question["content"])

    def set_temperature(self, number: str) -> None:
        """As the user typed it. UserError if it is none."""
        try:
            temperature = float(number)
        except ValueError:
            temperature = math.nan
        if not 0 <= temperature < math.inf:
            raise UserError(f"/temperature {number}: must be a number of at least 0 (0 = greedy)")
        self.settings = replace(self.settings, temperature=temperature)

    def save(self, name: str) -> Path:
        """Writes the conversation to a new file. UserError if that cannot be."""
        try:
            path = Path(name).expanduser()
        except RuntimeError as error:
            raise UserError(f"/save {name}: there is no such user") from error
        if not self.messages:
            raise UserError("/save: nothing has been said yet")
        if path.suffix not in (".json", ".md"):
            raise UserError("/save FILE: its name ends in .json for messages, or in .md for a text to read")
        if path.suffix == ".json":
            text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        else:
            text = "\n\n".join(map(as_markdown, self.messages))
        try:
            if path.exists():
                raise UserError(f"/save {name}: there is such a file already, choose another name")
            with atomic_path(path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"/save: {error}") from error
        return path


def as_markdown(message: Mapping[str, Any]) -> str:
    """A message as a paragraph that tells who speaks."""
    if message["role"] == "user":
        return f"**You:** {message['content']}"
    parts = ((part["type"], part["text"]) for part in message["content"])
    return f"**nanochat:** {''.join(with_calls(parts, quote='`'))}"


def with_calls(pieces: Iterable[tuple[str, str]], quote: str = "") -> Iterator[str]:
    """The text of an answer, with each tool call set apart, and quoted: [12*13 → 156]."""
    said = (piece for piece in pieces if piece[1])
    for is_call, part in groupby(said, key=lambda piece: piece[0] != "text"):
        if is_call:
            steps = ["".join(text for _, text in step) for _, step in groupby(part, key=itemgetter(0))]
            yield f"{quote}[{' → '.join(steps)}]{quote} "
        else:
            yield from (text for _, text in part)
