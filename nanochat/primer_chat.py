"""
The primer's conversations: questions over every fact, multiple choice, sums through the calculator, spelling; and what
it is examined with, a quiz in wordings and sums of number pairs that training never shows.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, TypeVar
from zlib import crc32

from nanochat.primer_facts import ANIMALS, Fact, entries
from nanochat.primer_wordings import Relation, relations, sentence

T = TypeVar("T")

# Training conversations per kind; the proportions are arbitrary but for the share of multiple choice, whose step from
# an answer to its letter is the hardest thing for a small model.
CONVERSATION_MIX = {
    "choice": 5000, "fact": 3600, "several": 1400, "sum": 3000, "compare": 500, "spell": 500, "count": 500, "who": 300,
    "greeting": 200,
}  # fmt: skip
VAL_SHARE = 0.025  # of each kind, held apart for validation
QUIZ_ITEMS = 400
TEST_SUMS = 200
LETTERS = "ABCD"

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


def compute(a: int, operator: str, b: int) -> int:
    """What the calculator answers."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]


def choice_question(question: str, choices: Sequence[str]) -> str:
    """Multiple choice as the tasks render it: a copy of tasks/common.py's, since nanochat never imports tasks."""
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, LETTERS, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def ask_choice(rng: Random, relation: Relation, fact: Fact) -> tuple[str, list[str], str]:
    """A question, four choices and the letter of the right one; sometimes backwards, sometimes the answer itself."""
    roll = rng.random()
    if roll < 0.1:  # the way from a choice to its letter, with nothing to know
        choices = relation.choices(rng, fact)
        wording = rng.choice(("Which choice is {}?", "Which letter stands for {}?", "Choose {}.", "Which one is {}?"))
        return wording.format(fact.answer), choices, LETTERS[choices.index(fact.answer)]
    reverse = roll < 0.4 and ("X" in relation.wordings or relation.reversible(fact))
    choices = relation.choices(rng, fact, reverse)
    if reverse and "X" in relation.wordings:
        question = sentence(rng.choice(relation.say("X", fact)))
    else:
        question = relation.ask(rng, fact, reverse=reverse)
    return question, choices, LETTERS[choices.index(fact.subject if reverse else fact.answer)]


def ask_free(rng: Random, relation: Relation, fact: Fact) -> tuple[str, str]:
    """A question and its short, regular answer."""
    reverse = rng.random() < 0.3 and relation.reversible(fact)
    return relation.ask(rng, fact, reverse=reverse), relation.reply(fact, reverse)


def conversation(*turns: str | list[dict[str, str]]) -> dict[str, Any]:
    """User and assistant in turns, the user first."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def parts(*typed: tuple[str, str]) -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for kind, text in typed]


def sum_turns(rng: Random, operator: str, test: bool = False) -> tuple[str, list[dict[str, str]], str]:
    """A question for a sum, the answer through the calculator, and the result."""
    a, b = operands(rng, operator, test)
    question = rng.choice(SUM_WORDINGS[operator]).format(a=a, b=b)
    result = str(compute(a, operator, b))
    expression, said = f"{a}{operator}{b}", f"{a} {operator} {b} = {result}."
    return question, parts(("python", expression), ("python_output", result), ("text", said)), result


class Talk:
    """Makes conversations, one kind of CONVERSATION_MIX per method."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.facts = Deck(rng, all_facts())
        self.operators = Deck(rng, SUM_OPERATORS)

    def choice(self) -> dict[str, Any]:
        turns = []
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            relation, fact = self.facts.deal()
            question, choices, letter = ask_choice(self.rng, relation, fact)
            turns += [choice_question(question, choices), letter]
        if self.rng.random() < 0.1:
            why = self.rng.choice(("Why?", "Why is that?", "Explain.", "Say it in words.", "How do you know?"))
            turns += [why, relation.reply(fact)]
        return conversation(*turns)

    def fact(self) -> dict[str, Any]:
        return conversation(*ask_free(self.rng, *self.facts.deal()))

    def several(self) -> dict[str, Any]:
        """Questions one after another, mostly over facts."""
        turns: list[Any] = []
        for _ in range(self.rng.choice((2, 3, 4))):
            roll = self.rng.random()
            if roll < 0.15:
                turns += sum_turns(self.rng, self.operators.deal())[:2]
            elif roll < 0.3:
                question, choices, letter = ask_choice(self.rng, *self.facts.deal())
                turns += [choice_question(question, choices), letter]
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


def conversations(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations (spec: nanochat/conversation.py) of one split, "train" or "val"; no conversation is in both."""
    assert split in ("train", "val"), split
    talk, seen = Talk(Random(f"conversations {seed}")), set[str]()
    made: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for kind, count in CONVERSATION_MIX.items():
        held = round(count * VAL_SHARE)
        ours = list(distinct(getattr(talk, kind), count + held, json.dumps, seen))
        made["train"] += ours[held:]
        made["val"] += ours[:held]
    Random(f"order {seed}").shuffle(made[split])
    return made[split]


def quiz(seed: int = 0) -> list[dict[str, Any]]:
    """
    QUIZ_ITEMS items in held-out wordings over facts drawn evenly, half "choice" (answer: the letter, each as often as
    the others), half "free" (answer: a phrase to be found in the completion, and never in the question).
    """
    rng = Random(f"quiz {seed}")
    facts = Deck(rng, all_facts())
    letters = Deck(rng, LETTERS)
    items: list[dict[str, Any]] = []
    while len(items) < QUIZ_ITEMS:
        relation, fact = facts.deal()
        reverse = rng.random() < 0.25 and relation.reversible(fact)
        question = relation.ask(rng, fact, held=True, reverse=reverse)
        right = fact.subject if reverse else fact.answer
        answer = re.sub("^(the|an|a) ", "", right)
        if re.search(rf"\b{re.escape(answer)}\b", question, re.IGNORECASE):
            continue
        item = {"kind": "free", "question": question, "answer": answer}
        if len(items) % 2:
            choices, letter = relation.choices(rng, fact, reverse), letters.deal()
            here, there = choices.index(right), LETTERS.index(letter)
            choices[here], choices[there] = choices[there], choices[here]
            item = {"kind": "choice", "question": question, "choices": choices, "answer": letter}
        items.append(item)
    return items


def sums(split: str = "test", seed: int = 0) -> list[dict[str, Any]]:
    """TEST_SUMS sums with pairs of numbers that no training text has: question, answer, reference conversation."""
    assert split in ("train", "test"), split
    rng = Random(f"sums {split} {seed}")
    operators = Deck(rng, SUM_OPERATORS)

    def make() -> dict[str, Any]:
        question, answer, result = sum_turns(rng, operators.deal(), test=split == "test")
        return {"question": question, "answer": result, "conversation": conversation(question, answer)}

    return list(distinct(make, TEST_SUMS, lambda item: item["question"], set()))
