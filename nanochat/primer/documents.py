"""The documents of the primer, for pretraining, and the shards that hold them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_path, parse_json
from nanochat.primer.conversations import GREETINGS, IDENTITY_REPLIES
from nanochat.primer.data import Fact, load_entries, load_wordings
from nanochat.primer.facts import SPELLING_WORDS, number_words
from nanochat.primer.questions import Deck, ask_choice, ask_free, distinct
from nanochat.primer.relations import Relation, all_facts, sentence
from nanochat.primer.sums import OPERATORS, compute, draw_operands

# Documents per kind; the proportions are heuristic, not tuned. Most documents state facts or ask for them, so that each
# fact occurs 40 to 70 times. Multiple choice has no letters; CONVERSATION_MIX explains why.
DOCUMENT_MIX = {
    "entry": 5500, "theme": 5500, "fact_list": 2500, "questions": 6500, "dialogue": 2000, "choice": 2500,
    "sum": 3000, "numbers": 500, "spelling": 500, "story": 900,
}  # fmt: skip
VAL_SHARE = 0.03  # of the documents; they are in the last shard, which is the validation split in every data folder
ROWS_PER_GROUP = 512
MARKER = "primer.json"  # file in the folder of the shards, with the hashes of their texts

QUESTION_STYLES = ("{} {}", "{}\n{}", "Question: {}\nAnswer: {}", "Q: {}\nA: {}")
SUM_PHRASES = {"+": "{a} plus {b}", "-": "{a} minus {b}", "*": "{a} times {b}", "/": "{a} divided by {b}"}
STORY_WORDS = ("time", "weather", "place", "thing")
# The fields of a person in the section [cast]; the last three are favourites.
CAST_FIELDS = ("name", "possessive", "pet", "pet_name", "home", "colour", "food", "hobby")


class DocumentWriter:
    """Writes documents, with one method per kind of DOCUMENT_MIX."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        facts = all_facts()
        self.facts = Deck(rng, facts)
        self.operators = Deck(rng, OPERATORS)
        self.facts_of_relation = {relation.name: Deck(rng, relation.facts) for relation, _ in facts}
        by_subject: dict[str, list[tuple[Relation, Fact]]] = {}
        for relation, fact in facts:
            by_subject.setdefault(fact.subject, []).append((relation, fact))
        self.subjects = Deck(rng, [about for about in by_subject.values() if len(about) > 1])
        self.cast = [person.split(", ") for person in load_entries("cast")]

    def draw_related(self, count: int) -> tuple[Relation, list[Fact]]:
        """Draws up to `count` facts of one relation. Relations with more facts are drawn more often."""
        relation, _ = self.facts.draw()
        deck = self.facts_of_relation[relation.name]
        return relation, list(dict.fromkeys(deck.draw() for _ in range(count)))

    def draw_facts(self, count: int) -> list[tuple[Relation, Fact]]:
        """Draws facts, in half of the cases all from one relation."""
        if self.rng.random() < 0.5:
            return [self.facts.draw() for _ in range(count)]
        relation, facts = self.draw_related(count)
        return [(relation, fact) for fact in facts]

    def entry(self) -> str:
        """All facts about one subject."""
        clauses: list[str] = []
        for relation, fact in self.subjects.draw():
            statements = relation.statements(fact)
            clauses += self.rng.sample(statements, self.rng.choice((1, 2, 2)))
        self.rng.shuffle(clauses)
        return " ".join(sentence(clause) for clause in clauses)

    def theme(self) -> str:
        """Several facts of one relation, sometimes two in one sentence."""
        relation, facts = self.draw_related(self.rng.choice((4, 5, 6)))
        clauses = [self.rng.choice(relation.statements(fact)) for fact in facts]
        if self.rng.random() < 0.4 and len(clauses) > 2:
            conjunction = self.rng.choice((", and ", ", but ", ", while "))
            clauses = [conjunction.join(clauses[:2]), *clauses[2:]]
        return " ".join(sentence(clause) for clause in clauses)

    def fact_list(self) -> str:
        relation, facts = self.draw_related(self.rng.choice((6, 8, 10)))
        title = sentence(relation.wordings["title"][0])[:-1] + ":"
        mark = self.rng.choice((": ", ": ", " - "))
        return "\n".join([title, *(f"{fact.subject}{mark}{fact.answer}" for fact in facts)])

    def questions(self) -> str:
        asked = [ask_free(self.rng, *fact) for fact in self.draw_facts(self.rng.choice((3, 4, 5)))]
        style = self.rng.choice(QUESTION_STYLES)
        return "\n".join(style.format(question, answer) for question, answer in asked)

    def dialogue(self) -> str:
        people = self.rng.sample(self.cast, 2)
        asker, teller = people[0][0], people[1][0]
        lines = []
        if self.rng.random() < 0.3:
            teller = "nanochat"
            question = self.rng.choice(list(IDENTITY_REPLIES))
            lines = [f"{asker}: {question}", f"{teller}: {IDENTITY_REPLIES[question]}"]
        elif self.rng.random() < 0.3:
            lines = [f"{asker}: {self.rng.choice(GREETINGS)}, {teller}!", f"{teller}: Hello, {asker}!"]
        for fact in self.draw_facts(self.rng.choice((2, 3, 4))):
            question, answer = ask_free(self.rng, *fact)
            lines += [f"{asker}: {question}", f"{teller}: {answer}"]
        return "\n".join(lines)

    def choice(self) -> str:
        """One or two multiple-choice questions."""
        style = self.rng.choice(QUESTION_STYLES)
        asked = [ask_choice(self.rng, self.facts.draw) for _ in range(self.rng.choice((1, 2)))]
        return "\n".join(style.format(choice.question, choice.reply) for choice in asked)

    def sum(self) -> str:
        lines = []
        for _ in range(self.rng.choice((2, 3, 4))):
            operator = self.operators.draw()
            a, b = draw_operands(self.rng, operator)
            phrase = SUM_PHRASES[operator].format(a=a, b=b)
            result = compute(a, operator, b)
            wordings = (
                f"What is {phrase}? {a}{operator}{b}={result}. {a} {operator} {b} = {result}.",
                f"To work out {phrase}, type {a}{operator}{b}. The calculator shows {result}.",
                f"{sentence(phrase)[:-1]} is {result}: {a} {operator} {b} = {result}.",
                f"{a} {operator} {b} = {result}",
            )
            lines.append(self.rng.choice(wordings))
        return "\n".join(lines)

    def numbers(self) -> str:
        """Sentences about the larger of two numbers, and counting in steps."""
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
        for word in self.rng.sample(SPELLING_WORDS, 3):
            letter = self.rng.choice(word)
            letters = ", ".join(word)
            number = word.count(letter)
            times = {1: "once", 2: "twice"}.get(number, f"{number_words(number)} times")
            wordings = [
                f"The word {word} is spelled {letters}. It has {len(word)} letters.",
                f"{word}: {letters}. The letter {letter} occurs {times} in {word}.",
                f"How do you spell {word}? {letters}.",
            ]
            lines += self.rng.sample(wordings, 2)
        return "\n".join(lines)

    def story(self) -> str:
        person, friend = self.rng.sample(self.cast, 2)
        parts = load_wordings("story")
        words = {key: self.rng.choice(parts[key]) for key in STORY_WORDS}
        for key, own, of_friend in zip(CAST_FIELDS, person, friend, strict=True):
            words[key] = own
            words[f"friend_{key}"] = of_friend
        middles = sorted(self.rng.sample(range(len(parts["middle"])), self.rng.choice((3, 4, 5))))
        opening = self.rng.choice(parts["opening"])
        ending = self.rng.choice(parts["end"])
        lines = [opening, *(parts["middle"][i] for i in middles), ending]
        return " ".join(line.format(**words) for line in lines)


def generate_documents(seed: int = 0) -> list[str]:
    """Returns all documents in random order; no two are the same."""
    rng = Random(f"documents {seed}")
    writer = DocumentWriter(rng)
    seen: set[str] = set()
    texts: list[str] = []
    for kind, count in DOCUMENT_MIX.items():
        texts += distinct(getattr(writer, kind), count, str, seen)
    rng.shuffle(texts)
    return texts


def write_shards(directory: Path, seed: int = 0, num_shards: int = 4) -> list[Path]:
    """
    Writes the documents as shard_00000.parquet, … with one column "text" and return the paths. The last and smallest
    shard is the validation split.

    Raises UserError if the folder holds files that this function has not written.
    """
    assert num_shards >= 2, "at least one shard for training and one for validation"
    directory.mkdir(parents=True, exist_ok=True)  # an unusable folder is reported before the documents are generated
    shards = _split_documents(generate_documents(seed), num_shards)
    hashes = {name: _hash_texts(texts) for name, texts in shards.items()}
    _require_own_folder(directory, hashes)
    for name, texts in shards.items():
        with atomic_path(directory / name) as temporary:
            pq.write_table(
                pa.table({"text": texts}),
                temporary,
                row_group_size=ROWS_PER_GROUP,
                compression="zstd",
                write_page_checksum=True,
            )
    with atomic_path(directory / MARKER) as temporary:
        temporary.write_text(json.dumps({"seed": seed, "sha256": hashes}, indent=1), encoding="utf-8")
    return [directory / name for name in shards]


def _split_documents(texts: list[str], num_shards: int) -> dict[str, list[str]]:
    """Returns the texts of each shard, by file name."""
    num_train = len(texts) - round(len(texts) * VAL_SHARE)
    per_shard = -(-num_train // (num_shards - 1))  # rounded up
    train = texts[:num_train]
    shards = [train[i * per_shard : (i + 1) * per_shard] for i in range(num_shards - 1)]
    return {f"shard_{i:05d}.parquet": shard for i, shard in enumerate([*shards, texts[num_train:]])}


def _require_own_folder(directory: Path, hashes: dict[str, str]) -> None:
    """
    Raises UserError if a file in the folder is not part of a primer. A shard is part of one if its hash is in the
    marker file or in `hashes`, the hashes of the shards to be written. The latter are needed because interrupted runs
    and older versions leave no marker file.
    """
    recorded = _read_marker(directory / MARKER)
    for path in sorted(directory.glob("[!.]*")):  # hidden files are temporary
        if path.name == MARKER and recorded:
            continue
        if _hash_shard(path) not in (hashes.get(path.name), recorded.get(path.name)):
            raise UserError(
                f"{directory} holds {path.name}, which is not part of a primer and could be overwritten: "
                "choose an empty or new folder with --data-dir"
            )


def _read_marker(path: Path) -> dict[str, str]:
    """Returns the hash of each shard; empty if the file does not exist or is not a marker file."""
    try:
        return dict(parse_json(path.read_bytes())["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _hash_shard(path: Path) -> str:
    """Returns the hash of a shard's texts, or "" if the file is not a shard."""
    try:
        return _hash_texts(pq.read_table(path, columns=["text"])["text"].to_pylist())
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return ""


def _hash_texts(texts: Sequence[str | None]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
