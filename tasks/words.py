"""English words for the spelling tasks, with nothing to download."""

import os
import re
from pathlib import Path
from zlib import crc32

from nanochat.common import UserError
from nanochat.primer import SPELLING_WORDS, all_facts
from nanochat.tokenizer import Tokenizer

WORD = re.compile(r"[a-z]{3,20}")
TEST_SHARE = 5  # one word in this many is for testing; arbitrary


def words(split: str, tokenizer: Tokenizer | None = None) -> list[str]:
    """
    Lower-case words of one split, "train" or "test", sorted; which split a word is in follows from the word alone.
    They are those of the primer's facts, the same everywhere, and besides, only where asked for:
    - with a tokenizer the words of its vocabulary: tokens that a space begins (a few of them only begin a word);
    - with $NANOCHAT_WORD_LIST those of that file, one a line, such as /usr/share/dict/words. UserError without it.
    """
    assert split in ("train", "test"), split
    found = set(WORD.findall(" ".join(f"{fact.subject} {fact.answer}" for _, fact in all_facts()).lower()))
    found |= set(SPELLING_WORDS)
    if tokenizer:
        texts = [token[1:].decode("utf-8", errors="replace") for token in tokenizer.tokens if token.startswith(b" ")]
        found |= set(filter(WORD.fullmatch, texts))
    if path := os.environ.get("NANOCHAT_WORD_LIST"):
        found |= read_words(Path(path).expanduser())
    return sorted(word for word in found if is_held_out(word) == (split == "test"))


def is_held_out(word: str) -> bool:
    """Whether the word is for testing. Those that the primer's own conversations spell never are."""
    return crc32(word.encode()) % TEST_SHARE == 0 and word not in SPELLING_WORDS


def read_words(path: Path) -> set[str]:
    try:
        found = set(filter(WORD.fullmatch, path.read_text(encoding="utf-8").split("\n")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"NANOCHAT_WORD_LIST cannot be read, correct it or unset it: {error}") from error
    if not found:
        raise UserError(f"NANOCHAT_WORD_LIST: {path} has no line that is a word in lower case")
    return found
