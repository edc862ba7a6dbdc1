"""
Spelling tasks: count the letters of a word (SpellingBee), spell a word (SimpleSpelling).

A model reads tokens, not letters, so it has to learn how each token is spelled. The items are generated: item i is
determined by the seed i in training and 10,000,000 + i in testing.
"""

import re
from random import Random
from typing import Any

from nanochat.tokenizer import Tokenizer
from tasks.common import Conversation, Task, final_number
from tasks.words import load_words

FIRST_SEED = {"train": 0, "test": 10_000_000}
DEFAULT_SIZE = {"train": 80_000, "test": 500}  # items; heuristic, not tuned

# {l} is the letter and {w} the word. The words are English, the questions in several languages.
WORDINGS = {
    "English": (
        "How many {l} are in {w}?", "How many {l} are there in {w}?", "How many letters {l} are in {w}?",
        "How many {l} does {w} have?", "How many {l} does the word {w} contain?", "How many times is {l} in {w}?",
        "How many times does {l} occur in {w}?", "How many times does the letter {l} appear in the word {w}?",
        "How often does {l} occur in {w}?", "How often is the letter {l} used in {w}?",
        "How often do I write {l} when I write {w}?", "How many of the letters of {w} are {l}?",
        "In {w}, how many {l} are there?",
        "How many {l} do you see in {w}?", "How many {l} do I need for {w}?", "{w}: how many {l}?",
        "The word {w} has how many {l}?", "The letter {l} is in {w} how many times?", "Count the {l} in {w}.",
        "Count the letter {l} in the word {w}.", "Count how often {l} occurs in {w}.", "Please count the {l} in {w}.",
        "Can you count the {l} in {w}?", "Could you tell me how many {l} are in {w}?", "Tell me how many {l} {w} has.",
        "What is the number of {l} in {w}?", "Give me the number of {l} in {w}.", "Number of {l} in {w}?",
        "Look at the word {w}. How many {l} are in it?", "I wrote {w}. How many {l} did I write?",
        "Is there a {l} in {w}, and how many?", "Do you know how many {l} there are in {w}?",
    ),
    "Spanish": (
        "¿Cuántas {l} hay en {w}?", "¿Cuántas letras {l} tiene la palabra {w}?", "¿Cuántas veces aparece {l} en {w}?",
        "Cuenta las {l} de {w}.",
    ),
    "French": (
        "Combien de {l} y a-t-il dans {w} ?", "Combien de fois trouve-t-on la lettre {l} dans {w} ?",
        "Compte les {l} dans le mot {w}.",
    ),
    "German": (
        "Wie viele {l} sind in {w}?", "Wie oft kommt {l} in {w} vor?", "Wie viele {l} hat das Wort {w}?",
        "Zähle die {l} in {w}.",
    ),
    "Italian": ("Quante {l} ci sono in {w}?", "Quante volte compare la lettera {l} in {w}?", "Conta le {l} in {w}."),
    "Portuguese": ("Quantas letras {l} há em {w}?", "Quantas vezes {l} aparece na palavra {w}?"),
    "Dutch": ("Hoeveel {l} zitten er in {w}?", "Hoe vaak komt de letter {l} voor in {w}?"),
    "Swedish": ("Hur många {l} finns det i {w}?", "Hur ofta förekommer {l} i ordet {w}?"),
    "Polish": ("Ile razy litera {l} występuje w słowie {w}?", "Ile liter {l} jest w słowie {w}?"),
    "Russian": ("Сколько букв {l} в слове {w}?", "Сколько раз буква {l} встречается в слове {w}?"),
    "Chinese": ("{w}里有几个{l}？", "单词{w}中{l}出现了多少次？", "数一数{w}里的字母{l}。"),
    "Japanese": ("{w}に{l}はいくつありますか？", "{w}という単語に{l}は何回出てきますか？"),
    "Korean": ("{w}에 {l} 글자가 몇 개 있나요?", "단어 {w}에서 글자 {l}는 몇 번 나오나요?"),
}  # fmt: skip
QUOTES = ("{}", "{}", "'{}'", '"{}"', "`{}`", "“{}”", "‘{}’", "«{}»", "「{}」", "*{}*", "({})")
SPELLING_WORDINGS = (
    "Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "How is {w} spelled?", "Please spell {w}.",
    "Spell out {w}.", "Which letters are in {w}?", "Take {w} apart into letters.", "{w}, letter by letter?",
)  # fmt: skip


class _SpellingTask(Task):
    """The words of a split and a random generator for each item."""

    kind = "generative"

    def __init__(self, split: str, size: int | None = None, tokenizer: Tokenizer | None = None) -> None:
        """
        `split` is "train" or "test", which share no word. `size` is the number of items, DEFAULT_SIZE by default. With
        a tokenizer, the words of its vocabulary are used too.
        """
        self.words = load_words(split, tokenizer)
        self.size = DEFAULT_SIZE[split] if size is None else size
        self.first_seed = FIRST_SEED[split]

    def __len__(self) -> int:
        return self.size

    def random(self, index: int) -> Random:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return Random(self.first_seed + index)


class SpellingBee(_SpellingTask):
    """How often does a letter occur in a word? The reply spells the word, counts, and checks with the calculator."""

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
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return {"messages": messages, "answer": number}

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
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": spell(word)}]
        return {"messages": messages, "answer": word}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the text after the last colon lists the letters of the word one by one."""
        _, _, spelling = completion.rpartition(":")
        return re.findall(r"[a-z]+", spelling.lower()) == list(conversation["answer"])


def draw_question(rng: Random, word: str, letter: str) -> str:
    """Return a question in a random wording, mostly in English, with random quotation marks."""
    language = "English" if rng.random() < 0.6 else rng.choice(list(WORDINGS))
    wording = rng.choice(WORDINGS[language])
    quote_letter = rng.choice(QUOTES)
    quote_word = rng.choice(QUOTES)
    if rng.random() < 0.5:
        quote_letter = quote_word
    return make_informal(rng, wording.format(l=quote_letter.format(letter), w=quote_word.format(word)))


def make_informal(rng: Random, question: str) -> str:
    """Sometimes convert to lower case, sometimes remove the final mark."""
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.？。 ")
    return question


def spell(word: str) -> str:
    """
    Commas without spaces make it likely that each letter is a separate token.

    >>> spell("apple")
    'apple: a,p,p,l,e'
    """
    return f"{word}: {','.join(word)}"


def tally(word: str, letter: str) -> str:
    r"""
    Return the letters one per line, with a running count at those that are counted.

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
