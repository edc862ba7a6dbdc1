"""The conversations of the primer, which a model is fine-tuned on: facts, sums, spelling, identity, greetings."""

import json
from collections.abc import Sequence
from random import Random
from typing import Any

from nanochat.conversation import turns
from nanochat.primer.data import load_wordings
from nanochat.primer.facts import SPELLING_WORDS
from nanochat.primer.questions import Deck, ask_choice, ask_free, distinct
from nanochat.primer.relations import all_facts
from nanochat.primer.sums import OPERATORS, ask_sum

# Training conversations per kind; the proportions are heuristic, not tuned. Multiple choice lists its choices without
# letters, because a small model does not learn them: with 4 layers of width 256, after 2.1 M tokens of pretraining and
# 1.7 M of fine-tuning, answers by letter stayed at chance (27 %), while the accuracy on unseen free questions was 92 %
# and on unseen sums 100 %. The real datasets teach letters.
CONVERSATION_MIX = {
    "choice": 2500, "fact": 3600, "several": 1400, "sum": 3000, "compare": 500, "spell": 500, "count": 500,
    "identity": 300, "greeting": 200,
}  # fmt: skip
VAL_SHARE = 0.025  # validation conversations per training conversation of the same kind

IDENTITY_REPLIES = {question: replies[0] for question, replies in load_wordings("identity").items()}
GREETINGS = ("Hello", "Hi", "Hello there", "Hi there", "Good morning", "Good evening", "Hey", "Good day")
GREETING_ENDS = ("!", ".", ", nanochat!", ", nanochat.", "", "! How are you?", ". How are you?", ", how are you?")
THANKS = ("Thank you!", "Thanks.", "Thank you very much.", "Great, thanks!", "Thanks a lot!")
GOODBYES = ("Goodbye!", "Bye!", "See you later.", "Good night!")


class ConversationWriter:
    """
    Writes conversations, with one method per kind of CONVERSATION_MIX. A method returns the contents of the messages,
    alternating between user and assistant.
    """

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.facts = Deck(rng, all_facts())
        self.operators = Deck(rng, OPERATORS)
        self.plain_facts = all_facts()  # not yet asked for in the plainest wording

    def choice(self) -> list[Any]:
        choice = ask_choice(self.rng, self.facts.draw)
        return [choice.question, choice.reply]

    def fact(self) -> list[Any]:
        """Every fact once in its plainest wording, then random facts in random wordings."""
        if self.plain_facts:
            relation, fact = self.plain_facts.pop()
            return [relation.plainest_question(fact), relation.reply(fact)]
        return [*ask_free(self.rng, *self.facts.draw())]

    def several(self) -> list[Any]:
        """Two to four questions, mostly about facts."""
        contents: list[Any] = []
        for _ in range(self.rng.choice((2, 3, 4))):
            roll = self.rng.random()
            if roll < 0.15:
                contents += ask_sum(self.rng, self.operators.draw())
            elif roll < 0.3:
                contents += self.choice()
            else:
                contents += ask_free(self.rng, *self.facts.draw())
        return contents

    def sum(self) -> list[Any]:
        contents: list[Any] = [*ask_sum(self.rng, self.operators.draw())]
        if self.rng.random() < 0.2:
            contents += ask_sum(self.rng, self.operators.draw())
        return contents

    def compare(self) -> list[Any]:
        limit = self.rng.choice((20, 100, 100, 1000))
        a, b = self.rng.sample(range(limit), 2)
        larger = self.rng.random() < 0.5
        asked = self.rng.choice(("Which is", "Which number is", "What is"))
        question = f"{asked} {'larger' if larger else 'smaller'}, {a} or {b}?"
        low, high = sorted((a, b))
        reply = f"{high} is larger than {low}." if larger else f"{low} is smaller than {high}."
        return [question, reply]

    def spell(self) -> list[Any]:
        word = self.rng.choice(SPELLING_WORDS)
        question = self.rng.choice(load_wordings("spelling")["spell"]).format(w=word)
        return [question, f"{word}: {', '.join(word)}."]

    def count(self) -> list[Any]:
        word = self.rng.choice(SPELLING_WORDS)
        letter = self.rng.choice(word if self.rng.random() < 0.9 else "aeiorst")
        number = word.count(letter)
        times = "time" if number == 1 else "times"
        reply = [
            {"type": "text", "text": f"{word}: {', '.join(word)}. "},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": str(number)},
            {"type": "text", "text": f"The letter {letter} occurs {number} {times} in {word}."},
        ]
        question = self.rng.choice(load_wordings("spelling")["count"]).format(l=letter, w=word)
        return [question, reply]

    def identity(self) -> list[Any]:
        question = self.rng.choice(list(IDENTITY_REPLIES))
        start = self.greet() if self.rng.random() < 0.5 else []
        return [*start, question, IDENTITY_REPLIES[question], *self.tail()]

    def greeting(self) -> list[Any]:
        return [*self.greet(), *self.tail()]

    def greet(self) -> list[Any]:
        greeting = self.rng.choice(GREETINGS)
        end = self.rng.choice(GREETING_ENDS)
        well = "I am well. " if "how are you" in end.lower() else ""
        return [greeting + end, f"Hello! {well}How can I help you?"]

    def tail(self) -> list[Any]:
        """A question, thanks and a goodbye, each of them optional."""
        contents: list[Any] = []
        if self.rng.random() < 0.5:
            contents += ask_free(self.rng, *self.facts.draw())
        if self.rng.random() < 0.4:
            contents += [self.rng.choice(THANKS), "You are welcome!"]
        if self.rng.random() < 0.3:
            contents += [self.rng.choice(GOODBYES), "Goodbye!"]
        return contents


def generate_conversations(split: str, seed: int = 0, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
    """
    Returns the conversations (format: nanochat/conversation.py) of the split "train" or "val". No conversation is in
    both. `kinds` selects kinds of CONVERSATION_MIX, by default all; their conversations do not depend on the selection.
    """
    assert split in ("train", "val"), split
    assert set(kinds) <= set(CONVERSATION_MIX), kinds
    writer = ConversationWriter(Random(f"conversations {seed}"))
    seen: set[str] = set()
    selected: list[dict[str, Any]] = []
    for kind, num_train in CONVERSATION_MIX.items():
        count = num_train + round(num_train * VAL_SHARE)
        contents = distinct(getattr(writer, kind), count, json.dumps, seen)
        written = [{"messages": turns(*each)} for each in contents]
        if not kinds or kind in kinds:
            selected += written[:num_train] if split == "train" else written[num_train:]
    Random(f"order {seed}").shuffle(selected)
    return selected
