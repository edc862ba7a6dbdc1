"""Questions about the facts of the primer, free or multiple choice, and the quiz for the evaluation of models."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple, TypeVar

from nanochat.primer.data import Fact
from nanochat.primer.relations import UNCLEAR_CHOICES, Relation, all_facts, contains_phrase, sentence, with_choices

T = TypeVar("T")

QUIZ_ITEMS = 400


class Deck:
    """Draws items in random order and reshuffles when all are drawn, so that each is drawn equally often."""

    def __init__(self, rng: Random, items: Sequence[Any]) -> None:
        self.rng = rng
        self.items = list(items)
        self.rest: list[Any] = []

    def draw(self) -> Any:
        if not self.rest:
            self.rest = self.items.copy()
            self.rng.shuffle(self.rest)
        return self.rest.pop()


def distinct(make: Callable[[], T], count: int, key: Callable[[T], str], seen: set[str]) -> Iterator[T]:
    """Yields `count` results of `make` whose keys differ from each other and from `seen`; adds the keys to `seen`."""
    misses = 0
    while count > 0:
        item = make()
        if key(item) not in seen:
            seen.add(key(item))
            count -= 1
            misses = 0
            yield item
        else:
            misses += 1
            assert misses <= 1000, "there are too few different results: ask for fewer"


class Choice(NamedTuple):
    question: str  # with the choices
    choices: list[str]
    right: str
    reply: str


def ask_choice(
    rng: Random, draw: Callable[[], tuple[Relation, Fact]], *, held_out: bool = False, right_index: int | None = None
) -> Choice:
    """
    Returns a multiple-choice question. Facts are drawn until one gives a clear question: the question does not contain
    the right choice, and the reply contains no wrong one. right_index: index of the right choice, by default random.
    """
    while True:
        relation, fact = draw()
        use_reverse_choice = not held_out and relation.has_ambiguous_reverse
        reverse = rng.random() < 0.3 and (use_reverse_choice or relation.is_reversible(fact))
        nouns = relation.render("reverse noun" if reverse else "noun", fact)
        if reverse and use_reverse_choice:
            question = sentence(rng.choice(relation.render("reverse choice question", fact)))
        elif nouns and not held_out and rng.random() < 0.15:
            question = f"Which of these is {rng.choice(nouns)}?"
        else:
            question = relation.ask(rng, fact, held_out, reverse)
        right = fact.subject if reverse else fact.answer
        reply = relation.reply(fact, reverse)
        choices = relation.choices(rng, fact, reverse, context=f"{question} {reply}")
        if len(choices) == 4 and right not in UNCLEAR_CHOICES and not contains_phrase(question, right):
            if right_index is not None:
                index = choices.index(right)
                choices[index], choices[right_index] = choices[right_index], choices[index]
            return Choice(with_choices(rng, question, choices), choices, right, reply)


def ask_free(rng: Random, relation: Relation, fact: Fact) -> tuple[str, str]:
    """Returns a question and the reply to it."""
    reverse = rng.random() < 0.3 and relation.is_reversible(fact)
    return relation.ask(rng, fact, reverse=reverse), relation.reply(fact, reverse)


def generate_quiz(seed: int = 0) -> list[dict[str, Any]]:
    """
    Returns QUIZ_ITEMS questions in held-out wordings, half multiple choice, half free. All facts are drawn equally
    often.

    An item has the keys kind ("choice" or "free"), question, answer and, for multiple choice, choices. A completion is
    correct if it contains the answer. Free questions do not contain the answer. Among the choices the answer is equally
    often at each index.
    """
    rng = Random(f"quiz {seed}")
    facts = Deck(rng, all_facts())
    right_indices = Deck(rng, range(4))
    items: list[dict[str, Any]] = []
    while len(items) < QUIZ_ITEMS:
        if len(items) % 2 == 1:
            question, choices, right, _ = ask_choice(rng, facts.draw, held_out=True, right_index=right_indices.draw())
            items.append({"kind": "choice", "question": question, "choices": choices, "answer": right})
            continue
        relation, fact = facts.draw()
        reverse = rng.random() < 0.25 and relation.is_reversible(fact)
        question = relation.ask(rng, fact, held_out=True, reverse=reverse)
        answer = fact.subject if reverse else fact.answer
        if not contains_phrase(question, answer):
            items.append({"kind": "free", "question": question, "answer": answer})
    return items
