"""
Turns facts into sentences and questions, in many wordings. Some wordings are held out for the quiz.

The wordings are in wordings.txt, which also explains their kinds ("statement", "reverse question", …). A Relation holds
all facts of one kind, such as capitals, and turns them into statements and questions. "Reverse" always means from the
answer to the subject: "which country has the capital Paris?".
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from random import Random

from nanochat.primer.data import Fact, load_entries, load_wordings
from nanochat.primer.facts import COLOUR_NAMES, PLANETS, SMALL_NUMBERS, fact_table, plural

UNCLEAR_CHOICES = ("A", "I")  # letters that are words too, so they can occur in any question or reply
NEAR_SYNONYMS = [set(group.split(", ")) for group in load_entries("near synonyms")]
# Further wrong choices for relations with few different answers.
EXTRA_CHOICES = {
    "month_days": ("29", "27"), "mixture": COLOUR_NAMES, "colour": COLOUR_NAMES, "legs": SMALL_NUMBERS[2:11],
    "known:0": PLANETS,
}  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """All facts of one kind with their wordings."""

    name: str
    facts: tuple[Fact, ...]
    choice_pool: tuple[str, ...]  # answers that multiple choice may offer
    unique_answers: frozenset[str]  # the answers that only one fact has
    wordings: dict[str, tuple[str, ...]]  # by kind, see wordings.txt

    def render(self, kind: str, fact: Fact) -> list[str]:
        """Returns the fact in every wording of this kind."""
        values = _fields(fact)
        return [wording.format(**values) for wording in self.wordings.get(kind, ())]

    def ask(self, rng: Random, fact: Fact, held_out: bool = False, reverse: bool = False) -> str:
        """
        Returns a random question in training wordings or in held-out ones. Noun phrases in a question frame and special
        questions of this relation are equally likely.
        """
        direction = "reverse " if reverse else ""
        nouns = self.render(f"{direction}noun", fact)
        questions = self.render(f"{direction}held-out question" if held_out else f"{direction}question", fact)
        if nouns and (not questions or rng.random() < 0.5):
            frame = rng.choice(load_wordings("frames")["held-out" if held_out else "train"])
            return sentence(frame.format(rng.choice(nouns)))
        return sentence(rng.choice(questions))

    def reply(self, fact: Fact, reverse: bool = False) -> str:
        return sentence(self.render("reverse reply" if reverse else "reply", fact)[0])

    def statements(self, fact: Fact) -> list[str]:
        """Returns the clauses that state the fact; `sentence` turns a clause into a sentence."""
        clauses = self.render("statement", fact) + self.render("reply", fact)
        if not self.has_ambiguous_reverse:
            clauses += self.render("reverse reply", fact)
        return clauses

    @property
    def has_ambiguous_reverse(self) -> bool:
        """Whether many subjects share an answer: then only multiple choice can ask for the subject."""
        return "reverse choice question" in self.wordings

    def is_reversible(self, fact: Fact) -> bool:
        """Whether there are wordings that ask for the subject, and no other subject has this answer."""
        return "reverse question" in self.wordings and fact.answer in self.unique_answers

    def plainest_question(self, fact: Fact) -> str:
        nouns = self.render("noun", fact)
        if nouns:
            return sentence(f"what is {nouns[0]}?")
        return sentence(self.render("question", fact)[0])

    def choices(self, rng: Random, fact: Fact, reverse: bool = False, context: str = "") -> list[str]:
        """
        Returns the right answer and three wrong ones, or fewer if the relation has too few answers, in random order. No
        choice contains another one. No wrong choice occurs in `context`, the question and reply.
        """
        right = fact.subject if reverse else fact.answer
        similar = {answer for group in NEAR_SYNONYMS if fact.answer in group for answer in group}
        if reverse:
            others = [f.subject for f in self.facts if f.answer != fact.answer and f.answer not in similar]
        else:
            others = [answer for answer in self.choice_pool if answer != right and answer not in similar]
        choices = [right]
        for other in rng.sample(others, len(others)):
            if len(choices) == 4:
                break
            if other in UNCLEAR_CHOICES or contains_phrase(context, other):
                continue
            if not any(contains_phrase(choice, other) or contains_phrase(other, choice) for choice in choices):
                choices.append(other)
        rng.shuffle(choices)
        return choices


@cache
def relations() -> dict[str, Relation]:
    """Returns all relations by name, in the order of facts.fact_table."""
    found = {}
    for name, facts in fact_table().items():
        count = Counter(fact.answer for fact in facts)
        found[name] = Relation(
            name,
            facts=tuple(facts),
            choice_pool=tuple(sorted({*count, *EXTRA_CHOICES.get(name, ())})),
            unique_answers=frozenset(answer for answer in count if count[answer] == 1),
            wordings=load_wordings(name.split(":")[0]),
        )
    return found


def all_facts() -> list[tuple[Relation, Fact]]:
    return [(relation, fact) for relation in relations().values() for fact in relation.facts]


def _fields(fact: Fact) -> dict[str, str]:
    s, a = fact.subject, fact.answer
    x, _, y = s.partition(" in ")
    return {"s": s, "a": a, "an": with_article(s), "aa": with_article(a), "p": plural(s), "x": x, "y": y}


def with_article(noun: str) -> str:
    """
    >>> with_article("owl"), with_article("dog")
    ('an owl', 'a dog')
    """
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence(clause: str) -> str:
    """
    Adds a capital letter, and a full stop unless the clause ends with a mark.

    >>> sentence("dogs bark"), sentence("do dogs bark?")
    ('Dogs bark.', 'Do dogs bark?')
    """
    mark = "" if clause[-1] in ".?!" else "."
    return clause[0].upper() + clause[1:] + mark


def with_choices(rng: Random, question: str, choices: list[str]) -> str:
    """Returns a question and its choices as one text. The question must end with a punctuation mark."""
    listed = ", ".join(choices[:-1])
    last = choices[-1]
    any_of = f"{listed} or {last}"
    frame = rng.choice(load_wordings("choices")["frame"])
    capitalized = any_of[0].upper() + any_of[1:]
    return frame.format(
        question=question[:-1], mark=question[-1], any=any_of, Any=capitalized, all=f"{listed} and {last}"
    )


def contains_phrase(text: str, phrase: str) -> bool:
    """
    Whether the phrase, without its article, occurs in the text as whole words, in any case.

    >>> contains_phrase("It is the Sea.", "a sea"), contains_phrase("seas", "a sea")
    (True, False)
    """
    return _phrase_pattern(phrase).search(text) is not None


@cache
def _phrase_pattern(phrase: str) -> re.Pattern[str]:
    bare = re.sub("^(the|an|a) ", "", phrase)
    return re.compile(rf"(?<!\w){re.escape(bare)}(?!\w)", re.IGNORECASE)
