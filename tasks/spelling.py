"""
Spelling tasks: count the letters of a word (SpellingBee), spell a word (SimpleSpelling).

A model reads tokens, not letters, so it has to learn how each token is spelled. The items are generated: the seed of
item i is i in the training split and 10,000,000 + i in the test split.
"""

import re
from pathlib import Path
from random import Random
from typing import Any

from nanochat.conversation import turns
from nanochat.primer.data import load_wordings
from nanochat.tokenizer import Tokenizer
from tasks.common import Conversation, Task, final_number
from tasks.words import load_words

FIRST_SEED = {"train": 0, "test": 10_000_000}
DEFAULT_SIZE = {"train": 80_000, "test": 500}  # items; heuristic, not tuned

QUESTIONS = Path(__file__).with_suffix(".txt")
WORDINGS = load_wordings("counting", QUESTIONS)  # by language
SPELLING_WORDINGS = load_wordings("spelling", QUESTIONS)["English"]
QUOTES = ("{}", "{}", "'{}'", '"{}"', "`{}`", "“{}”", "‘{}’", "«{}»", "「{}」", "*{}*", "({})")


class _SpellingTask(Task):
    """The words of a split and a random generator for each item."""

    kind = "generative"

    def __init__(self, split: str, size: int | None = None, tokenizer: Tokenizer | None = None) -> None:
        """
        `split` is "train" or "test"; no word is in both. `size` is the number of items, by default that of
        DEFAULT_SIZE. With a tokenizer, the words of its vocabulary are used too.
        """
        self.words = load_words(split, tokenizer)
        size = DEFAULT_SIZE[split] if size is None else size
        self.rows = range(FIRST_SEED[split], FIRST_SEED[split] + size)

    def random(self, index: int) -> Random:
        if index < 0:
            raise IndexError(index)
        return Random(self.rows[index])


class SpellingBee(_SpellingTask):
    """Count a letter in a word. The reply spells the word, counts the letter, and checks the count with a tool call."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = self.random(index)
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
        number = str(word.count(letter))
        counting = f"{spell(word)}\n\n{tally(word, letter)}\n\nThat makes {number}. To be sure: "
        reply = [
            {"type": "text", "text": counting},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": number},
            {"type": "text", "text": f"\n\n#### {number}"},
        ]
        question = draw_question(rng, word, letter)
        return {"messages": turns(question, reply), "answer": number}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the number after "####" is the answer."""
        return final_number(completion) == int(conversation["answer"])


class SimpleSpelling(_SpellingTask):
    """Spell a word: the first step of SpellingBee."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = self.random(index)
        word = rng.choice(self.words)
        wording = rng.choice(SPELLING_WORDINGS)
        quoted_word = rng.choice(QUOTES).format(word)
        question = make_informal(rng, wording.format(w=quoted_word))
        return {"messages": turns(question, spell(word)), "answer": word}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the text after the last colon lists the letters of the word one by one."""
        _, _, spelling = completion.rpartition(":")
        return re.findall(r"[a-z]+", spelling.lower()) == list(conversation["answer"])


def draw_question(rng: Random, word: str, letter: str) -> str:
    """Returns a question in a random wording, mostly in English, with random quotation marks."""
    language = "English" if rng.random() < 0.6 else rng.choice(list(WORDINGS))
    wording = rng.choice(WORDINGS[language])
    quote_letter = rng.choice(QUOTES)
    quote_word = rng.choice(QUOTES)
    if rng.random() < 0.5:
        quote_letter = quote_word
    return make_informal(rng, wording.format(l=quote_letter.format(letter), w=quote_word.format(word)))


def make_informal(rng: Random, question: str) -> str:
    """Sometimes converts the question to lower case, and sometimes removes the punctuation at its end."""
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.？。 ")
    return question


def spell(word: str) -> str:
    """
    Returns the word and its letters. There are no spaces after the commas, so that most letters are separate tokens.

    >>> spell("apple")
    'apple: a,p,p,l,e'
    """
    return f"{word}: {','.join(word)}"


def tally(word: str, letter: str) -> str:
    r"""
    Returns the letters of the word, one per line. Lines with the letter to count end with the count so far.

    >>> tally("apple", "p")
    'a\np 1\np 2\nl\ne'
    """
    lines = []
    count = 0
    for character in word:
        if character == letter:
            count += 1
            lines.append(f"{character} {count}")
        else:
            lines.append(character)
    return "\n".join(lines)
