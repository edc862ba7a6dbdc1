"""
The conversation format and its conversion to token ids, used by training, evaluation, the server and the chat.

    {"messages": [
        {"role": "user", "content": "What is 12 * 3?"},
        {"role": "assistant", "content": [                  # a list of parts, or a string
            {"type": "python", "text": "12*3"},
            {"type": "python_output", "text": "36"},
            {"type": "text", "text": "36."}]}]}

becomes

    <|bos|> <|user_start|> What is 12 * 3? <|user_end|> <|assistant_start|>
    <|python_start|> 12*3 <|python_end|> <|output_start|> 36 <|output_end|> 36. <|assistant_end|>

The model is trained on what it has to generate itself: the assistant's text, its tool calls with their markers, and the
end token. The loss mask excludes everything else, tool outputs included. The name of a special token in a text is
encoded as ordinary characters, so that users cannot forge one.
"""

import codecs
import itertools
import string
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


@dataclass(frozen=True)
class PartKind:
    """How a part of an assistant message is rendered."""

    start: str  # special token before the text; empty = none
    end: str  # special token after it
    supervised: bool  # whether text and markers are trained on


PART_KINDS = {
    "text": PartKind("", "", supervised=True),
    "python": PartKind("<|python_start|>", "<|python_end|>", supervised=True),
    "python_output": PartKind("<|output_start|>", "<|output_end|>", supervised=False),
}


# ---- conversations ----


def validate(conversation: Mapping[str, Any]) -> None:
    """
    Raises UserError, with the index of the message, unless the conversation has the format above: user and assistant
    alternate, the user first, after at most one system message.
    """
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError('a conversation is {"messages": [{"role": …, "content": …}, …]}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f'message {i}: expected {{"role": …, "content": …}}')
    system = ["system"] if messages and messages[0]["role"] == "system" else []
    if len(messages) <= len(system):
        raise UserError("a conversation needs a user message")
    expected_roles = itertools.chain(system, itertools.cycle(["user", "assistant"]))
    for i, (message, role) in enumerate(zip(messages, expected_roles, strict=False)):
        if message["role"] != role:
            raise UserError(f"message {i}: expected role {role!r}, found {message['role']!r}")
        _validate_content(i, role, message["content"])


def _validate_content(i: int, role: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if role != "assistant":
        raise UserError(f"message {i}: the content of role {role} must be a string, found {type(content).__name__}")
    if not isinstance(content, Sequence):
        found = type(content).__name__
        raise UserError(f"message {i}: the content must be a string or a list of parts, found {found}")
    for j, part in enumerate(content):
        is_part = isinstance(part, Mapping) and part.get("type") in tuple(PART_KINDS)
        if not is_part or not isinstance(part.get("text"), str):
            raise UserError(f'message {i}, part {j}: expected {{"type": {" | ".join(PART_KINDS)}, "text": a string}}')


def turns(*contents: str | list[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages with these contents, alternating between user and assistant."""
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


# ---- conversation → token ids ----


def render(
    conversation: Mapping[str, Any], tokenizer: Tokenizer, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """
    Returns the ids of a conversation and its loss mask, 1 where the model is trained on the token and 0 elsewhere, both
    truncated to max_tokens. Raises UserError if the conversation is not valid.
    """
    ids, mask = [tokenizer.bos], [0]
    for message in _join_system_message(conversation):
        for tokens, supervised in _segments(message, tokenizer):
            ids += tokens
            mask += [int(supervised)] * len(tokens)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(conversation: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Returns the prompt for the assistant's next reply. If the conversation ends with a reply, it is left out."""
    messages = _join_system_message(conversation)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render({"messages": messages}, tokenizer)
    return [*ids, tokenizer.special("<|assistant_start|>")]


def render_to_fit(
    conversation: Mapping[str, Any], tokenizer: Tokenizer, context: int, max_tokens: int
) -> tuple[list[int], int]:
    """
    Like render_for_completion, but leaves out the oldest exchanges until there is room for a reply of max_tokens or of
    half the context, whichever is less. Returns the ids and the number of messages left out. The system message always
    stays.

    Raises UserError if system message and last user message alone are too long.
    """
    validate(conversation)
    messages = list(conversation["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    room = context - min(max_tokens, context // 2)
    num_system = 1 if messages[0]["role"] == "system" else 0

    def ids_without(dropped: int) -> list[int]:
        kept = messages[:num_system] + messages[num_system + dropped :]
        return render_for_completion({"messages": kept}, tokenizer)

    candidates = range(0, len(messages) - num_system, 2)  # a question is left out together with its reply
    # Binary search: the key is False for the first candidates and True from the first one that fits.
    first_fitting = bisect_left(candidates, True, key=lambda dropped: len(ids_without(dropped)) <= room)
    if first_fitting == len(candidates):
        num_tokens = len(ids_without(candidates[-1]))
        raise UserError(
            f"message and system message have {num_tokens} tokens, at most {room} fit beside the reply: shorten one"
        )
    dropped = candidates[first_fitting]
    return ids_without(dropped), dropped


def _join_system_message(conversation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The validated messages. The format has no marker for a system message: it is joined to the first user message."""
    validate(conversation)
    messages = list(conversation["messages"])
    if messages[0]["role"] == "system":
        system, user, *rest = messages
        joined = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
        messages = [joined, *rest]
    return messages


def _segments(message: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """Yields (token ids, whether they are trained on) for the segments of a message."""
    special, encode = tokenizer.special, tokenizer.encode
    content = message["content"]
    if message["role"] == "user":
        yield [special("<|user_start|>"), *encode(content), special("<|user_end|>")], False
        return
    yield [special("<|assistant_start|>")], False
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        kind = PART_KINDS[part["type"]]
        tokens = encode(part["text"])
        if kind.start:
            tokens = [special(kind.start), *tokens, special(kind.end)]
        yield tokens, kind.supervised
    yield [special("<|assistant_end|>")], True


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str] = string.ascii_uppercase) -> str:
    """
    Returns a multiple-choice question as the content of a user message. Raises ValueError if there are too few letters.

    A letter follows its choice, which helps small models to bind the two. It follows "=" without a space, so that it is
    the same token as in the reply.
    """
    if len(letters) < len(choices):
        raise ValueError(f"{len(choices)} choices but only {len(letters)} letters")
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=False))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


# ---- token ids → parts ----


class PartReader:
    """Converts generated tokens to text, token by token, and tracks the kind of part that the text belongs to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        marked = {name: kind for name, kind in PART_KINDS.items() if kind.start}
        self._kind_by_start = {tokenizer.special(kind.start): name for name, kind in marked.items()}
        self._ends = {tokenizer.special(kind.end) for kind in marked.values()}
        self._start_part("text")

    def read(self, token: int) -> tuple[str, str]:
        """Returns the kind of part and the characters that this token completes, possibly none."""
        if token in self._kind_by_start:
            self._start_part(self._kind_by_start[token])
            return self.kind, ""
        if token in self._ends:
            self._start_part("text")
            return self.kind, ""
        is_special = token >= self.tokenizer.vocab_size - len(SPECIAL_TOKENS)
        if is_special:
            return self.kind, ""
        return self.kind, self._decoder.decode(self.tokenizer.decode_bytes([token]))

    def _start_part(self, kind: str) -> None:
        self.kind = kind
        # Incremental, because a character may span several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")


def read_parts(tokens: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Returns generated tokens as the content of an assistant message, a list of parts."""
    reader = PartReader(tokenizer)
    parts: list[dict[str, str]] = []
    for token in tokens:
        kind, text = reader.read(token)
        if not text:
            continue
        if parts and parts[-1]["type"] == kind:
            parts[-1]["text"] += text
        else:
            parts.append({"type": kind, "text": text})
    return parts


def completion_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the text of generated tokens without tool calls and their outputs."""
    return "".join(part["text"] for part in read_parts(tokens, tokenizer) if part["type"] == "text")
