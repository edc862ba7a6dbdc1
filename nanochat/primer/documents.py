"""
The embedded corpus: a child's encyclopaedia in plain English, generated, with no network and nothing to download.

    documents()         what a model is pretrained on           write_shards()   the same as parquet shards
    conversations()     what it is finetuned on                 quiz(), sums()   what it is examined with

It exists so that a laptop can go through every stage in minutes and the result can be judged: a model of a few million
parameters learns these facts, and the exam asks for them in wordings, and for sums of numbers, that it never saw.
Everything follows from the seed. Tables: primer_facts.py; wordings: primer_wordings.py.
"""

from pathlib import Path
from random import Random

from nanochat.common import atomic_path
from nanochat.primer.conversations import (
    CONVERSATION_MIX,
    GREETINGS,
    SUM_OPERATORS,
    WHO_REPLIES,
    WORDS,
    Deck,
    all_facts,
    ask_choice,
    ask_free,
    compute,
    conversations,
    distinct,
    operands,
    quiz,
    sums,
)
from nanochat.primer.facts import CAST, Fact, number_words
from nanochat.primer.wordings import Relation, sentence

__all__ = ["CONVERSATION_MIX", "DOCUMENT_MIX", "conversations", "documents", "quiz", "sums", "write_shards"]

# Documents per kind. Proportions by reasoning, not by experiment: most of the text tells or asks facts, each 40 to 70
# times in all. Multiple choice is in words: see CONVERSATION_MIX for why there are no letters.
DOCUMENT_MIX = {
    "entry": 5500, "theme": 5500, "list": 2500, "questions": 6500, "dialogue": 2000, "choice": 2500,
    "sum": 3000, "numbers": 500, "spelling": 500, "story": 900,
}  # fmt: skip
VAL_SHARE = 0.03  # of the documents: the last shard, which is the validation split by convention
ROWS_PER_GROUP = 512

QUESTION_STYLES = ("{} {}", "{}\n{}", "Question: {}\nAnswer: {}", "Q: {}\nA: {}")
SUM_PHRASES = {"+": "{a} plus {b}", "-": "{a} minus {b}", "*": "{a} times {b}", "/": "{a} divided by {b}"}
STORY_OPENINGS = (
    "One {time}, {name} woke up early.", "It was a {weather} {time}.", "The home of {name} is {home}.",
    "Once, on a {weather} {time}, {name} went out.", "This is a story about {name} and {pet_name}.",
)  # fmt: skip
STORY_MIDDLES = (
    "{name} has a {pet}, and the {pet} is called {pet_name}.", "{pet_name} the {pet} ran to the {place}.",
    "{name} ate {food}, because {food} is what {name} likes best.", "{pet_name} was hungry, so {name} fed the {pet}.",
    "Then {name} met {friend}, who lives in {friend_home}.", "{friend} came with {friend_pet} the {friend_animal}.",
    "{name} wore a {colour} hat, for {colour} is the colour {name} likes best.",
    "{name} and {friend} walked to the {place}.", "{name} likes {hobby} more than anything.",
    "{friend} talked about {friend_hobby} all the time.", "At the {place} they found a {thing}.",
    "{pet_name} and {friend_pet} played with the {thing}.", "{name} could not find {possessive} {thing}.",
    "{friend} helped {name} to look for the {thing}.", "They shared {friend_food}, which {friend} had brought along.",
)  # fmt: skip
STORY_ENDS = (
    "In the evening {name} went back to {home}.", "Then {name} and {pet_name} went home and slept.",
    "It was a good {time}, {name} said.", "{friend} said goodbye, and {name} was happy.",
)  # fmt: skip
STORY_WORDS = {
    "time": ("morning", "day", "afternoon", "evening"),
    "weather": ("sunny", "rainy", "windy", "cold", "warm", "quiet"),
    "place": ("river", "forest", "market", "school", "beach", "park", "bridge", "hill", "old mill", "garden"),
    "thing": ("ball", "key", "book", "kite", "red box", "shell", "coin", "letter", "small bell", "rope"),
}


class Writer:
    """Writes documents, one kind per method named in DOCUMENT_MIX."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        facts = all_facts()
        self.facts, self.operators = Deck(rng, facts), Deck(rng, SUM_OPERATORS)
        self.within = {relation.name: Deck(rng, relation.facts) for relation, _ in facts}
        subjects: dict[str, list[tuple[Relation, Fact]]] = {}
        for relation, fact in facts:
            subjects.setdefault(fact.subject, []).append((relation, fact))
        self.subjects = Deck(rng, [several for several in subjects.values() if len(several) > 1])
        self.cast = [person.strip().split(", ") for person in CAST.strip().split("\n")]

    def same_kind(self, count: int) -> tuple[Relation, list[Fact]]:
        """Up to `count` facts of one relation, large relations as much oftener as they have more facts."""
        relation, _ = self.facts.deal()
        deck = self.within[relation.name]
        return relation, list(dict.fromkeys(deck.deal() for _ in range(count)))

    def some(self, count: int) -> list[tuple[Relation, Fact]]:
        """Facts of one relation or, as often, of any."""
        if self.rng.random() < 0.5:
            return [self.facts.deal() for _ in range(count)]
        relation, facts = self.same_kind(count)
        return [(relation, fact) for fact in facts]

    def entry(self) -> str:
        """All about one subject."""
        clauses = [
            clause
            for relation, fact in self.subjects.deal()
            for clause in self.rng.sample(relation.statements(fact), self.rng.choice((1, 2, 2)))
        ]
        self.rng.shuffle(clauses)
        return " ".join(map(sentence, clauses))

    def theme(self) -> str:
        """Several facts of one kind, some set side by side."""
        relation, facts = self.same_kind(self.rng.choice((4, 5, 6)))
        clauses = [self.rng.choice(relation.statements(fact)) for fact in facts]
        if self.rng.random() < 0.4 and len(clauses) > 2:
            clauses[:2] = [self.rng.choice((", and ", ", but ", ", while ")).join(clauses[:2])]
        return " ".join(map(sentence, clauses))

    def list(self) -> str:
        relation, facts = self.same_kind(self.rng.choice((6, 8, 10)))
        title = relation.wordings["t"][0]
        mark = self.rng.choice((": ", ": ", " - "))
        return "\n".join([sentence(title)[:-1] + ":", *(f"{fact.subject}{mark}{fact.answer}" for fact in facts)])

    def questions(self) -> str:
        asked = [ask_free(self.rng, *fact) for fact in self.some(self.rng.choice((3, 4, 5)))]
        style = self.rng.choice(QUESTION_STYLES)
        return "\n".join(style.format(question, answer) for question, answer in asked)

    def dialogue(self) -> str:
        (asker, *_), (teller, *_) = self.rng.sample(self.cast, 2)
        lines = []
        if self.rng.random() < 0.3:
            teller = "nanochat"
            question = self.rng.choice(list(WHO_REPLIES))
            lines = [f"{asker}: {question}", f"{teller}: {WHO_REPLIES[question]}"]
        elif self.rng.random() < 0.3:
            lines = [f"{asker}: {self.rng.choice(GREETINGS)}, {teller}!", f"{teller}: Hello, {asker}!"]
        for fact in self.some(self.rng.choice((2, 3, 4))):
            question, answer = ask_free(self.rng, *fact)
            lines += [f"{asker}: {question}", f"{teller}: {answer}"]
        return "\n".join(lines)

    def choice(self) -> str:
        """Multiple choice, in words."""
        style = self.rng.choice(QUESTION_STYLES)
        asked = [ask_choice(self.rng, self.facts.deal) for _ in range(self.rng.choice((1, 2)))]
        return "\n".join(style.format(choice.question, choice.reply) for choice in asked)

    def sum(self) -> str:
        lines = []
        for _ in range(self.rng.choice((2, 3, 4))):
            operator = self.operators.deal()
            a, b = operands(self.rng, operator)
            words, result = SUM_PHRASES[operator].format(a=a, b=b), compute(a, operator, b)
            lines.append(
                self.rng.choice((
                    f"What is {words}? {a}{operator}{b}={result}. {a} {operator} {b} = {result}.",
                    f"To work out {words}, type {a}{operator}{b}. The calculator shows {result}.",
                    f"{sentence(words)[:-1]} is {result}: {a} {operator} {b} = {result}.",
                    f"{a} {operator} {b} = {result}",
                ))
            )  # fmt: skip
        return "\n".join(lines)

    def numbers(self) -> str:
        """Which is larger; counting on."""
        limit = self.rng.choice((20, 100, 1000))
        low, high = sorted(self.rng.sample(range(limit), 2))
        start, step = self.rng.randrange(limit), self.rng.choice((1, 1, 2, 5, 10))
        counted = ", ".join(str(start + step * i) for i in range(8))
        lines = [
            f"{high} is larger than {low}.", f"{low} is smaller than {high}.",
            f"Which is larger, {low} or {high}? {high} is larger than {low}.",
            f"Which is smaller, {high} or {low}? {low} is smaller than {high}.",
            f"Counting in steps of {number_words(step)}: {counted}.",
        ]  # fmt: skip
        return " ".join(self.rng.sample(lines, 3))

    def spelling(self) -> str:
        lines = []
        for word in self.rng.sample(WORDS, 3):
            letter, letters = self.rng.choice(word), ", ".join(word)
            often = {1: "once", 2: "twice"}.get(word.count(letter), f"{number_words(word.count(letter))} times")
            lines += self.rng.sample([
                f"The word {word} is spelled {letters}. It has {len(word)} letters.",
                f"{word}: {letters}. The letter {letter} occurs {often} in {word}.",
                f"How do you spell {word}? {letters}.",
            ], 2)  # fmt: skip
        return "\n".join(lines)

    def story(self) -> str:
        me, friend = self.rng.sample(self.cast, 2)
        name, possessive, pet, pet_name, home, colour, food, hobby = me
        words: dict[str, str] = {key: self.rng.choice(values) for key, values in STORY_WORDS.items()}
        words |= {"name": name, "possessive": possessive, "pet": pet, "home": home}
        words |= {"pet_name": pet_name, "colour": colour, "food": food, "hobby": hobby, "friend": friend[0]}
        words |= {"friend_animal": friend[2], "friend_pet": friend[3], "friend_home": friend[4]}
        words |= {"friend_food": friend[6], "friend_hobby": friend[7]}
        middles = sorted(self.rng.sample(range(len(STORY_MIDDLES)), self.rng.choice((3, 4, 5))))
        told = [self.rng.choice(STORY_OPENINGS), *(STORY_MIDDLES[i] for i in middles), self.rng.choice(STORY_ENDS)]
        return " ".join(line.format(**words) for line in told)


def documents(seed: int = 0) -> list[str]:
    """Every document, no two alike, in random order."""
    rng = Random(f"documents {seed}")
    writer, seen = Writer(rng), set[str]()
    several = [
        text for kind, count in DOCUMENT_MIX.items() for text in distinct(getattr(writer, kind), count, str, seen)
    ]
    rng.shuffle(several)
    return several


def write_shards(directory: Path, seed: int = 0, num_shards: int = 4) -> list[Path]:
    """Writes the documents as shard_00000.parquet … with one column, "text"; the last, small shard is validation."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert num_shards >= 2, "one shard for training and one for validation, at least"
    texts = documents(seed)
    val = round(len(texts) * VAL_SHARE)
    train, per_shard = len(texts) - val, -(-(len(texts) - val) // (num_shards - 1))
    starts = [min(i * per_shard, train) for i in range(num_shards)]
    paths = []
    for i, (start, end) in enumerate(zip(starts, [*starts[1:], len(texts)], strict=True)):
        paths.append(directory / f"shard_{i:05d}.parquet")
        with atomic_path(paths[-1]) as temporary:
            table = pa.table({"text": texts[start:end]})
            pq.write_table(table, temporary, row_group_size=ROWS_PER_GROUP, compression="zstd")
    return paths
