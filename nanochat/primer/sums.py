"""
Sums of the primer, answered with the calculator tool.

One in twelve pairs of numbers is held out: training texts have no sums of these pairs, test sums only such.
"""

from random import Random
from typing import Any
from zlib import crc32

from nanochat.primer.data import load_wordings
from nanochat.primer.questions import Deck, distinct

NUM_TEST_SUMS = 200
# For reinforcement learning: the SFT model of speedrun.sh solves about half of them with sampled completions.
NUM_HARD_SUMS = {"train": 4000, "test": 400}
OPERATORS = "+++---**" * 2 + "/"  # each character is drawn equally often
HARD_OPERATORS = "++--*"


def is_held_out(a: int, b: int) -> bool:
    """Whether sums of these two numbers, with any operator and in any order, belong to the test split."""
    return crc32(f"{min(a, b)} {max(a, b)}".encode()) % 12 == 0


def draw_operands(rng: Random, operator: str, *, test: bool = False, hard: bool = False) -> tuple[int, int]:
    """
    Returns two numbers from the training pairs or the test pairs whose result is a non-negative integer.

    The numbers have at most three digits, except in hard sums, where two thirds of the first numbers have four.
    """
    while True:
        if hard:
            limit = rng.choice((1000, 10_000, 10_000))
            a, b = rng.randrange(limit // 10, limit), rng.randrange(1, 1000)
        else:
            limit = rng.choice((20, 100, 100, 1000))
            a, b = rng.randrange(1, limit), rng.randrange(1, limit)
        if operator == "*":
            b = rng.randrange(2, limit if limit <= 100 else 13)
        elif operator == "/":
            b = rng.randrange(2, 13)
            a = b * rng.randrange(2, 60)
        elif operator == "-":
            a, b = max(a, b), min(a, b)
        if is_held_out(a, b) == test:
            return a, b


def compute(a: int, operator: str, b: int) -> int:
    """Returns the result of the calculator tool."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]


def ask_sum(rng: Random, operator: str, *, test: bool = False, hard: bool = False) -> tuple[str, list[dict[str, str]]]:
    """Returns a question and the parts of its reply: calculator call, result, sentence."""
    a, b = draw_operands(rng, operator, test=test, hard=hard)
    question = rng.choice(load_wordings("sums")[operator]).format(a=a, b=b)
    result = str(compute(a, operator, b))
    reply = [
        {"type": "python", "text": f"{a}{operator}{b}"},
        {"type": "python_output", "text": result},
        {"type": "text", "text": f"{a} {operator} {b} = {result}."},
    ]
    return question, reply


def generate_sums(split: str = "test", seed: int = 0, *, hard: bool = False) -> list[dict[str, Any]]:
    """
    Returns NUM_TEST_SUMS sums, or NUM_HARD_SUMS hard ones, of the split "train" or "test".

    An item has the keys question, reply (a list of parts) and answer (the result).
    """
    assert split in ("train", "test"), split
    rng = Random(f"{'hard ' if hard else ''}sums {split} {seed}")
    operators = Deck(rng, HARD_OPERATORS if hard else OPERATORS)

    def make() -> dict[str, Any]:
        question, reply = ask_sum(rng, operators.draw(), test=split == "test", hard=hard)
        return {"question": question, "reply": reply, "answer": reply[1]["text"]}

    count = NUM_HARD_SUMS[split] if hard else NUM_TEST_SUMS
    return list(distinct(make, count, lambda item: item["question"], set()))
