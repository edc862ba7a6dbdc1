"""English words for the spelling tasks. They need no download."""

import os
import re
from pathlib import Path
from zlib import crc32

from nanochat.common import UserError
from nanochat.primer import SPELLING_WORDS, all_facts
from nanochat.tokenizer import Tokenizer

WORD = re.compile(r"[a-z]{3,20}")
TEST_SHARE = 5  # one in five words belongs to the test split; heuristic, not tuned


def load_words(split: str, tokenizer: Tokenizer | None = None) -> list[str]:
    """
    Returns the lower-case words of the split "train" or "test", sorted. The split of a word depends on the word only.

    The words are those of the primer's facts, and in addition, if given:
    - the tokens of `tokenizer` that are a space and a word (a few are only the beginning of a word)
    - the words of the file $NANOCHAT_WORD_LIST, one per line, such as /usr/share/dict/words

    Raises UserError if that file cannot be read or has no words.
    """
    assert split in ("train", "test"), split
    found = set(SPELLING_WORDS)
    for _, fact in all_facts():
        found.update(WORD.findall(f"{fact.subject} {fact.answer}".lower()))
    if tokenizer:
        for token in tokenizer.tokens:
            text = token.decode("utf-8", errors="replace")
            if text.startswith(" ") and WORD.fullmatch(text[1:]):
                found.add(text[1:])
    if path := os.environ.get("NANOCHAT_WORD_LIST"):
        found |= read_words(Path(path).expanduser())
    return sorted(word for word in found if is_held_out(word) == (split == "test"))


def is_held_out(word: str) -> bool:
    """Whether the word belongs to the test split. The words that the primer's conversations spell never do."""
    return crc32(word.encode()) % TEST_SHARE == 0 and word not in SPELLING_WORDS


def read_words(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"NANOCHAT_WORD_LIST cannot be read, correct it or unset it: {error}") from error
    found = {line for line in lines if WORD.fullmatch(line)}
    if not found:
        raise UserError(f"NANOCHAT_WORD_LIST: {path} has no line with a lower-case word, correct it or unset it")
    return found
