"""
The primer's conversations: questions over every fact, multiple choice, sums through the calculator, spelling; and what
it is examined with, a quiz in wordings and sums of number pairs that training never shows.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar
from zlib import crc32

from nanochat.primer.facts import ANIMALS, Fact, entries
from nanochat.primer.wordings import UNCLEAR, Relation, names, relations, sentence, with_choices

T = TypeVar("T")

# Training conversations per kind; the proportions are arbitrary. Choices are in words: answers to letters stayed at
# chance (27 %) with 4 layers of width 256 after 2.1 M tokens of pretraining and 1.7 M of finetuning, where unseen free
# questions were at 92 % and unseen sums at 100 %. Letters are left to the real datasets.
CONVERSATION_MIX = {
    "choice": 2500, "fact": 3600, "several": 1400, "sum": 3000, "compare": 500, "spell": 500, "count": 500, "who": 300,
    "greeting": 200,
}  # fmt: skip
VAL_SHARE = 0.025  # of each kind, held apart for validation
QUIZ_ITEMS = 400
TEST_SUMS = 200
# For reinforcement learning: of the answers sampled from the SFT model of speedrun.sh, about half are right.
HARD_SUMS = {"train": 4000, "test": 400}

SUM_WORDINGS = {
    "+": (
        "What is {a} plus {b}?", "What is {a} + {b}?", "Add {a} and {b}.", "Work out {a} + {b}.",
        "Calculate {a} + {b}.",
        "How much is {a} plus {b}?", "How much is {a} + {b}?", "{a} + {b} = ?", "{a} + {b}", "Work out {a} plus {b}.",
        "What is the sum of {a} and {b}?", "Please add {a} and {b}.", "Can you add {a} and {b}?", "{a} plus {b}?",
        "What do you get if you add {a} and {b}?", "Compute {a}+{b}.", "What is {a}+{b}?", "Tell me {a} plus {b}.",
    ),
    "-": (
        "What is {a} minus {b}?", "What is {a} - {b}?", "Work out {a} - {b}.", "Calculate {a} - {b}.", "{a} - {b} = ?",
        "How much is {a} minus {b}?", "How much is {a} - {b}?", "{a} - {b}", "Work out {a} minus {b}.",
        "Please work out {a} minus {b}.", "{a} minus {b}?", "Compute {a}-{b}.", "What is {a}-{b}?",
        "Tell me {a} minus {b}.", "Take {b} away from {a}.", "Subtract {b} from {a}.",
        "What is the difference between {a} and {b}?", "What is left if you take {b} from {a}?",
    ),
    "*": (
        "What is {a} times {b}?", "What is {a} * {b}?", "Work out {a} * {b}.", "Calculate {a} * {b}.", "{a} * {b} = ?",
        "How much is {a} times {b}?", "How much is {a} * {b}?", "{a} * {b}", "Work out {a} times {b}.",
        "Multiply {a} by {b}.", "Please multiply {a} by {b}.", "Multiply {a} and {b}.", "{a} times {b}?",
        "What is the product of {a} and {b}?", "Compute {a}*{b}.", "What is {a}*{b}?", "Tell me {a} times {b}.",
    ),
    "/": (
        "What is {a} divided by {b}?", "What is {a} / {b}?", "Divide {a} by {b}.", "Work out {a} / {b}.",
        "How much is {a} divided by {b}?", "Calculate {a} / {b}.", "{a} / {b} = ?",
    ),
}  # fmt: skip
SUM_OPERATORS = "+++---**" * 2 + "/"  # drawn from evenly
HARD_SUM_OPERATORS = "++--*"

WORDS = tuple(
    """
apple banana cherry strawberry raspberry blueberry orange lemon tomato potato carrot onion pepper cabbage butter bread
cheese cookie coffee water summer winter spring autumn window door kitchen table chair bottle pillow blanket mirror
letter pencil paper school teacher pupil lesson number hammer ladder garden flower tree forest river mountain valley
island ocean village castle bridge street market doctor farmer baker sailor soldier driver singer dancer mother father
sister brother daughter family friend rabbit kitten puppy chicken elephant giraffe kangaroo crocodile butterfly beetle
spider rocket planet galaxy moon star cloud thunder rain snow wind storm rainbow yellow purple green silver golden
happy little pretty clever strong gentle funny hungry sleepy angry coming running swimming jumping reading writing
singing balloon bicycle engine train wagon tunnel paddle needle thread button jacket mitten slipper pocket basket
barrel candle lantern puzzle marble kettle saucer pepperoni committee address success bookkeeper mississippi coconut
pineapple avocado cucumber broccoli spinach mushroom peanut almond walnut raisin muffin pancake waffle pudding noodle
""".split()
) + tuple(animal for animal, _ in entries(ANIMALS))

WHO_QUESTIONS = (
    "Who are you?", "What are you?", "What is your name?", "Who am I talking to?", "Tell me who you are.",
    "Tell me about yourself.", "Do you have a name?", "What should I call you?", "Are you a person?",
    "Are you a computer?", "Introduce yourself.", "What kind of thing are you?", "Who made you?",
    "How were you made?", "Where do you come from?", "What can you do?", "How can you help me?", "What do you know?",
)  # fmt: skip
WHO_NAME = "I am nanochat, a small language model."
WHO_MADE = "I am nanochat, a small language model. I was trained from nothing by the code in one repository."
WHO_CAN = "I am nanochat. I can answer simple questions, spell words and work out sums."
WHO_REPLIES = dict.fromkeys(WHO_QUESTIONS, WHO_NAME) | {
    "Who made you?": WHO_MADE, "How were you made?": WHO_MADE, "Where do you come from?": WHO_MADE,
    "What can you do?": WHO_CAN, "How can you help me?": WHO_CAN, "What do you know?": WHO_CAN,
    "What is your name?": "My name is nanochat.", "Do you have a name?": "My name is nanochat.",
    "What should I call you?": "My name is nanochat.",
    "Are you a person?": "No. " + WHO_NAME, "Are you a computer?": "I am a program. " + WHO_NAME,
}  # fmt: skip
GREETINGS = ("Hello", "Hi", "Hello there", "Hi there", "Good morning", "Good evening", "Hey", "Good day")
GREETING_ENDS = ("!", ".", ", nanochat!", ", nanochat.", "", "! How are you?", ". How are you?", ", how are you?")
THANKS = ("Thank you!", "Thanks.", "Thank you very much.", "Great, thanks!", "Thanks a lot!")
GOODBYES = ("Goodbye!", "Bye!", "See you later.", "Good night!")


class Deck:
    """Deals the items in random order, and shuffles them anew when all are dealt: random, and evenly distributed."""

    def __init__(self, rng: Random, items: Sequence[Any]) -> None:
        self.rng, self.items = rng, list(items)
        self.rest: list[Any] = []

    def deal(self) -> Any:
        if not self.rest:
            self.rest = self.items.copy()
            self.rng.shuffle(self.rest)
        return self.rest.pop()


def all_facts() -> list[tuple[Relation, Fact]]:
    return [(relation, fact) for relation in relations().values() for fact in relation.facts]


def distinct(make: Callable[[], T], count: int, key: Callable[[T], str], seen: set[str]) -> Iterator[T]:
    """`count` things that `make` makes, no two alike, and none whose key is in `seen`; keys are added to it."""
    misses = 0
    while count:
        thing = make()
        if key(thing) not in seen:
            seen.add(key(thing))
            yield thing
            count, misses = count - 1, 0
        elif (misses := misses + 1) > 1000:
            raise AssertionError("the wordings are used up: ask for fewer of this kind")


def held_out(a: int, b: int) -> bool:
    """One pair of numbers in twelve belongs to the test sums, whatever the operation and the order."""
    return crc32(f"{min(a, b)} {max(a, b)}".encode()) % 12 == 0


def operands(rng: Random, operator: str, test: bool = False) -> tuple[int, int]:
    """Two numbers for a sum in non-negative integers, of the training pairs or the test pairs."""
    while True:
        limit = rng.choice((20, 100, 100, 1000))
        a, b = rng.randrange(1, limit), rng.randrange(1, limit)
        if operator == "*":
            b = rng.randrange(2, 13 if limit == 1000 else min(limit, 100))
        elif operator == "/":
            b = rng.randrange(2, 13)
            a = b * rng.randrange(2, 60)
        elif operator == "-":
            a, b = max(a, b), min(a, b)
        if held_out(a, b) == test:
            return a, b


def hard_operands(rng: Random, operator: str, test: bool = False) -> tuple[int, int]:
    """The same for hard sums: two first numbers in three have four digits, where those of other sums have fewer."""
    while True:
        limit = rng.choice((1000, 10_000, 10_000))
        a, b = rng.randrange(limit // 10, limit), rng.randrange(1, 1000)
        if operator == "*":
            b = rng.randrange(2, 13)
        elif operator == "-":
            a, b = max(a, b), min(a, b)
        if held_out(a, b) == test:
            return a, b


def compute(a: int, operator: str, b: int) -> int:
    """What the calculator answers."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]


@dataclass(frozen=True)
class Choice:
    question: str  # with the choices in it
    choices: list[str]
    right: str
    reply: str


def ask_choice(
    rng: Random, deal: Callable[[], tuple[Relation, Fact]], held: bool = False, place: int | None = None
) -> Choice:
    """
    Multiple choice in words, sometimes backwards, about the first dealt fact that can be asked so that the question
    itself does not name the right choice, nor the reply a wrong one. place: where the right one stands.
    """
    while True:
        relation, fact = deal()
        backwards = not held and "X" in relation.wordings
        reverse = rng.random() < 0.3 and (backwards or relation.reversible(fact))
        phrases = relation.say("N" if reverse else "n", fact)
        if reverse and backwards:
            question = sentence(rng.choice(relation.say("X", fact)))
        elif phrases and not held and rng.random() < 0.15:
            question = f"Which of these is {rng.choice(phrases)}?"
        else:
            question = relation.ask(rng, fact, held, reverse)
        right, reply = fact.subject if reverse else fact.answer, relation.reply(fact, reverse)
        choices = relation.choices(rng, fact, reverse, said=f"{question} {reply}")
        if len(choices) == 4 and right not in UNCLEAR and not names(question, right):
            if place is not None:
                here = choices.index(right)
                choices[here], choices[place] = choices[place], choices[here]
            return Choice(with_choices(rng, question, choices), choices, right, reply)


def ask_free(rng: Random, relation: Relation, fact: Fact) -> tuple[str, str]:
    """A question and its short, regular answer."""
    reverse = rng.random() < 0.3 and relation.reversible(fact)
    return relation.ask(rng, fact, reverse=reverse), relation.reply(fact, reverse)


def conversation(*turns: str | list[dict[str, str]]) -> dict[str, Any]:
    """User and assistant in turns, the user first."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def parts(*typed: tuple[str, str]) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for kind, text in typed]


def sum_turns(
    rng: Random, operator: str, test: bool = False, hard: bool = False
) -> tuple[str, list[dict[str, str]], str]:
    """A question for a sum, the answer through the calculator, and the result."""
    a, b = (hard_operands if hard else operands)(rng, operator, test)
    question = rng.choice(SUM_WORDINGS[operator]).format(a=a, b=b)
    result = str(compute(a, operator, b))
    expression, said = f"{a}{operator}{b}", f"{a} {operator} {b} = {result}."
    return question, parts(("python", expression), ("python_output", result), ("text", said)), result


class Talk:
    """Makes conversations, one kind of CONVERSATION_MIX per method."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.facts, self.plain = Deck(rng, all_facts()), all_facts()
        self.operators = Deck(rng, SUM_OPERATORS)

    def choice(self) -> dict[str, Any]:
        choice = ask_choice(self.rng, self.facts.deal)
        return conversation(choice.question, choice.reply)

    def fact(self) -> dict[str, Any]:
        """First of all every fact in its plainest wording, then any in any."""
        if self.plain:
            relation, fact = self.plain.pop()
            return conversation(relation.plain(fact), relation.reply(fact))
        return conversation(*ask_free(self.rng, *self.facts.deal()))

    def several(self) -> dict[str, Any]:
        """Questions one after another, mostly over facts."""
        turns: list[Any] = []
        for _ in range(self.rng.choice((2, 3, 4))):
            roll = self.rng.random()
            if roll < 0.15:
                turns += sum_turns(self.rng, self.operators.deal())[:2]
            elif roll < 0.3:
                choice = ask_choice(self.rng, self.facts.deal)
                turns += [choice.question, choice.reply]
            else:
                turns += ask_free(self.rng, *self.facts.deal())
        return conversation(*turns)

    def sum(self) -> dict[str, Any]:
        question, answer, _ = sum_turns(self.rng, self.operators.deal())
        turns: list[Any] = [question, answer]
        if self.rng.random() < 0.2:
            turns += sum_turns(self.rng, self.operators.deal())[:2]
        return conversation(*turns)

    def compare(self) -> dict[str, Any]:
        limit = self.rng.choice((20, 100, 100, 1000))
        a, b = self.rng.sample(range(limit), 2)
        larger = self.rng.random() < 0.5
        wordings = ("Which is {}, {} or {}?", "Which number is {}, {} or {}?", "What is {}, {} or {}?")
        question = self.rng.choice(wordings).format("larger" if larger else "smaller", a, b)
        low, high = sorted((a, b))
        return conversation(question, f"{high} is larger than {low}." if larger else f"{low} is smaller than {high}.")

    def spell(self) -> dict[str, Any]:
        word = self.rng.choice(WORDS)
        wordings = ("Spell {}.", "How do you spell {}?", "Spell the word {}.", "How is {} spelled?", "Please spell {}.",
                    "Which letters are in {}?", "Can you spell the word {}?")  # fmt: skip
        return conversation(self.rng.choice(wordings).format(word), f"{word}: {', '.join(word)}.")

    def count(self) -> dict[str, Any]:
        word = self.rng.choice(WORDS)
        letter = self.rng.choice(word if self.rng.random() < 0.9 else "aeiorst")
        wordings = (
            "How many {l} are in {w}?", "How often does the letter {l} occur in {w}?", "Count the letter {l} in {w}.",
            "How many times is the letter {l} in the word {w}?", "How many letters {l} are there in {w}?",
        )  # fmt: skip
        number = word.count(letter)
        said = f"The letter {letter} occurs {number} time{'' if number == 1 else 's'} in {word}."
        answer = parts(
            ("text", f"{word}: {', '.join(word)}. "),
            ("python", f"'{word}'.count('{letter}')"),
            ("python_output", str(number)),
            ("text", said),
        )
        return conversation(self.rng.choice(wordings).format(l=letter, w=word), answer)

    def who(self) -> dict[str, Any]:
        question = self.rng.choice(WHO_QUESTIONS)
        start = self.greet() if self.rng.random() < 0.5 else []
        return conversation(*start, question, WHO_REPLIES[question], *self.tail())

    def greeting(self) -> dict[str, Any]:
        return conversation(*self.greet(), *self.tail())

    def greet(self) -> list[str]:
        greeting, end = self.rng.choice(GREETINGS), self.rng.choice(GREETING_ENDS)
        well = "I am well. " if "how are you" in end.lower() else ""
        return [greeting + end, f"Hello! {well}How can I help you?"]

    def tail(self) -> list[str]:
        """A question, thanks, a goodbye: or not."""
        turns: list[str] = []
        if self.rng.random() < 0.5:
            turns += ask_free(self.rng, *self.facts.deal())
        if self.rng.random() < 0.4:
            turns += [self.rng.choice(THANKS), "You are welcome!"]
        if self.rng.random() < 0.3:
            turns += [self.rng.choice(GOODBYES), "Goodbye!"]
        return turns


def conversations(split: str, seed: int = 0, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
    """
    Conversations (spec: nanochat/conversation.py) of one split, "train" or "val"; no conversation is in both.
    kinds: of CONVERSATION_MIX, all without; any of them alone are the same conversations as among all.
    """
    assert split in ("train", "val"), split
    if unknown := set(kinds) - set(CONVERSATION_MIX):
        raise ValueError(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(CONVERSATION_MIX)}")
    talk, seen = Talk(Random(f"conversations {seed}")), set[str]()
    made: list[dict[str, Any]] = []
    for kind, count in CONVERSATION_MIX.items():
        ours = list(distinct(getattr(talk, kind), count + round(count * VAL_SHARE), json.dumps, seen))
        if not kinds or kind in kinds:
            made += ours[:count] if split == "train" else ours[count:]
    Random(f"order {seed}").shuffle(made)
    return made


def quiz(seed: int = 0) -> list[dict[str, Any]]:
    """
    QUIZ_ITEMS items in held-out wordings over facts drawn evenly, half "choice" (question: with its choices in words,
    the right one at each place as often), half "free". "answer" is a phrase that the completion is to name and the
    question, its choices apart, does not.
    """
    rng = Random(f"quiz {seed}")
    facts, places = Deck(rng, all_facts()), Deck(rng, range(4))
    items: list[dict[str, Any]] = []
    while len(items) < QUIZ_ITEMS:
        if len(items) % 2:
            choice = ask_choice(rng, facts.deal, held=True, place=places.deal())
            items.append(
                {"kind": "choice", "question": choice.question, "choices": choice.choices, "answer": choice.right}
            )
        else:
            relation, fact = facts.deal()
            reverse = rng.random() < 0.25 and relation.reversible(fact)
            question = relation.ask(rng, fact, held=True, reverse=reverse)
            answer = fact.subject if reverse else fact.answer
            if not names(question, answer):
                items.append({"kind": "free", "question": question, "answer": answer})
    return items


def sums(split: str = "test", seed: int = 0, hard: bool = False) -> list[dict[str, Any]]:
    """
    TEST_SUMS sums, or HARD_SUMS hard ones: question, answer, reference conversation. The pairs of numbers of "test" are
    in no training text, nor in "train".
    """
    assert split in ("train", "test"), split
    rng = Random(f"{'hard ' if hard else ''}sums {split} {seed}")
    operators = Deck(rng, HARD_SUM_OPERATORS if hard else SUM_OPERATORS)

    def make() -> dict[str, Any]:
        question, answer, result = sum_turns(rng, operators.deal(), split == "test", hard)
        return {"question": question, "answer": result, "conversation": conversation(question, answer)}

    return list(distinct(make, HARD_SUMS[split] if hard else TEST_SUMS, lambda item: item["question"], set()))
