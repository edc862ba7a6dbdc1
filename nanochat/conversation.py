"""
The conversation protocol: messages → token ids and loss mask. Training, chat, server and tasks all go through here.

    {"messages": [
        {"role": "user", "content": "What is 12 * 3?"},
        {"role": "assistant", "content": [                  # or one string
            {"type": "python", "text": "12*3"},
            {"type": "python_output", "text": "36"},
            {"type": "text", "text": "36."}]}]}

    <|bos|> <|user_start|> What is 12 * 3? <|user_end|> <|assistant_start|>
    <|python_start|> 12*3 <|python_end|> <|output_start|> 36 <|output_end|> 36. <|assistant_end|>
"""

import codecs
import itertools
import string
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

# Kind of assistant part → (the markers around it, whether the model learns to say it; outputs are the tool's words).
PARTS: dict[str, tuple[tuple[str, str] | None, int]] = {
    "text": (None, 1),
    "python": (("<|python_start|>", "<|python_end|>"), 1),
    "python_output": (("<|output_start|>", "<|output_end|>"), 0),
}
SUPERVISED_STYLE, OTHER_STYLE = "green", "bright_black"


def validate(conversation: Mapping[str, Any]) -> None:
    """UserError, naming the message, unless user and assistant alternate, after at most one system message."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError('a conversation is {"messages": [{"role": …, "content": …}, …]}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f'message {i}: expected {{"role": …, "content": …}}')
    system = ["system"] if messages and messages[0]["role"] == "system" else []
    if len(messages) <= len(system):
        raise UserError("a conversation needs a user message")
    roles = itertools.chain(system, itertools.cycle(["user", "assistant"]))
    for i, (message, role) in enumerate(zip(messages, roles, strict=False)):
        if message["role"] != role:
            raise UserError(f"message {i}: expected role {role!r}, found {message['role']!r}")
        _validate_content(i, role, message["content"])


def _validate_content(i: int, role: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if role != "assistant" or not isinstance(content, Sequence):
        expected = "a string or a list of parts" if role == "assistant" else "a string"
        raise UserError(f"message {i}: the content of the {role} must be {expected}, found {type(content).__name__}")
    for j, part in enumerate(content):
        is_part = isinstance(part, Mapping) and part.get("type") in tuple(PARTS) and isinstance(part.get("text"), str)
        if not is_part:
            raise UserError(f'message {i}, part {j}: expected {{"type": {" | ".join(PARTS)}, "text": a string}}')


def render(
    conversation: Mapping[str, Any], tokenizer: Tokenizer, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """
    The ids of a conversation and, for each, 1 where the model is to learn it and 0 elsewhere; cut at max_tokens.
    UserError if the conversation is not valid.
    """
    ids: list[int] = []
    mask: list[int] = []

    def add(tokens: list[int], supervised: int) -> None:
        ids.extend(tokens)
        mask.extend([supervised] * len(tokens))

    special, encode = tokenizer.special, tokenizer.encode
    add([tokenizer.bos], 0)
    for message in _turns(conversation):
        content = message["content"]
        if message["role"] == "user":
            add([special("<|user_start|>"), *encode(content), special("<|user_end|>")], 0)
            continue
        add([special("<|assistant_start|>")], 0)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            markers, supervised = PARTS[part["type"]]
            tokens = encode(part["text"])
            add([special(markers[0]), *tokens, special(markers[1])] if markers else tokens, supervised)
        add([special("<|assistant_end|>")], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(conversation: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The ids after which the assistant speaks: without the reply that the conversation may end with. Never cut."""
    messages = _turns(conversation)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render({"messages": messages}, tokenizer)
    return [*ids, tokenizer.special("<|assistant_start|>")]


def render_to_fit(
    conversation: Mapping[str, Any], tokenizer: Tokenizer, context: int, max_tokens: int
) -> tuple[list[int], int]:
    """
    render_for_completion, and how many of the oldest messages were left out so that a context of so many tokens has
    room for max_tokens of reply, or is half empty. The system message stays. UserError if the last question alone is
    too long for that.
    """
    validate(conversation)
    messages, room = list(conversation["messages"]), context - min(max_tokens, context // 2)
    if messages[-1]["role"] == "assistant":
        messages.pop()
    start = 1 if messages[0]["role"] == "system" else 0

    def ids_without(dropped: int) -> list[int]:
        return render_for_completion({"messages": messages[:start] + messages[start + dropped :]}, tokenizer)

    drops = range(0, len(messages) - start, 2)  # a question goes with its answer
    fitting = drops[bisect_left(drops, True, key=lambda dropped: len(ids_without(dropped)) <= room) :]
    if not fitting:
        raise UserError(f"the message has {len(ids_without(drops[-1]))} tokens: the model reads {room} at a time")
    return ids_without(fitting[0]), fitting[0]


def _turns(conversation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages, checked, with the system message (the protocol has no marker for it) joined to the first user's."""
    validate(conversation)
    messages = list(conversation["messages"])
    if messages[0]["role"] == "system":
        system, user, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
    return messages


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str] = string.ascii_uppercase) -> str:
    """
    A multiple-choice question as user content. The letter comes after its choice, and right after "=", so that small
    models bind the two and the letter is the very token of the answer, without a space. ValueError: too few letters.
    """
    if len(letters) < len(choices):
        raise ValueError(f"{len(choices)} choices but only {len(letters)} letters")
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=False))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def colour_view(ids: Sequence[int], mask: Sequence[int], tokenizer: Tokenizer) -> Text:
    """A rendered conversation for the terminal: what the model learns in one colour, the rest in another."""
    view = Text()
    for supervised, run in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        view.append(tokenizer.decode([token for token, _ in run]), SUPERVISED_STYLE if supervised else OTHER_STYLE)
    return view


class PartReader:
    """Reads an assistant's tokens as they come and tells which kind of part each piece of text belongs to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.kinds = {tokenizer.special(m[0]): kind for kind, (m, _) in PARTS.items() if m}
        self.ends = {tokenizer.special(m[1]) for m, _ in PARTS.values() if m}
        self._start("text")

    def read(self, token: int) -> tuple[str, str]:
        """(kind, whole characters of it that this token completes, perhaps none)."""
        if token in self.kinds:
            self._start(self.kinds[token])
        elif token in self.ends:
            self._start("text")
        elif token < self.tokenizer.vocab_size - len(SPECIAL_TOKENS):
            return self.kind, self.decoder.decode(self.tokenizer.decode_bytes([token]))
        return self.kind, ""

    def _start(self, kind: str) -> None:
        self.kind = kind
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # characters may span tokens


def read_parts(tokens: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Generated tokens as the content of an assistant message: a list of parts."""
    reader = PartReader(tokenizer)
    parts: list[dict[str, str]] = []
    for token in tokens:
        kind, text = reader.read(token)
        if text and parts and parts[-1]["type"] == kind:
            parts[-1]["text"] += text
        elif text:
            parts.append({"type": kind, "text": text})
    return parts


def spoken_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """What generated tokens say, tool calls and their outputs left out."""
    return "".join(part["text"] for part in read_parts(tokens, tokenizer) if part["type"] == "text")
