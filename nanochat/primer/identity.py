"""
Conversations that give a model a name and a character, from a short YAML file of facts, for scripts/make_identity.py.

    identity = read_identity(Path("kari.yaml"))             # the facts; scripts/samples/identity.yaml shows all of them
    conversations = generate_identity(identity, 500)        # each is a list of exchanges

An exchange is a question with its reply. A conversation has one to three about the model, in random wordings from
identity.txt, and often a greeting, a question about the primer's facts, thanks or a goodbye. So the model learns to
give its name anywhere in a conversation, and to answer other questions as before. The result depends on the seed only.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from string import Formatter
from typing import Any, NamedTuple

import yaml

from nanochat.common import UserError
from nanochat.primer.conversations import ConversationWriter
from nanochat.primer.data import load_entries, load_wordings, read_sections
from nanochat.primer.questions import distinct

WORDINGS = Path(__file__).with_name("identity.txt")
NOT_TOPICS = ("greeting", "other assistants")  # sections of the file that are not topics of a conversation
LISTS = ("character", "likes", "dislikes", "catchphrases")
VERBATIM = ("catchphrases",)  # the full stop at the end of other facts is removed: wordings have their own
MAX_CHARACTERS = 300  # of a fact (heuristic): conversations have to fit into short contexts

# Heuristic, not tuned: how often the name is asked for, compared with another topic, and shares of conversations or
# questions.
NAME_WEIGHT = 3
ANSWER_WEIGHT = 2
GREETING_SHARE = 0.3
CASUAL_SHARE = 0.15  # of the questions are in lower case without punctuation, as people type
CATCHPHRASE_SHARE = 0.4
MAX_CONVERSATIONS = 10_000  # a name alone gives more different ones


@dataclass(frozen=True)
class Identity:
    """Who the model is. An empty field is not mentioned in any conversation."""

    name: str
    what: str = "a small language model"  # with its article
    maker: str = ""
    home: str = ""
    birthday: str = ""
    purpose: str = ""  # verb phrase: "help with sums"
    character: tuple[str, ...] = ()  # adjectives
    likes: tuple[str, ...] = ()
    dislikes: tuple[str, ...] = ()
    catchphrases: tuple[str, ...] = ()  # some replies start with one
    answers: tuple[tuple[str, str], ...] = ()  # (question, reply), used word for word

    def values(self) -> dict[str, str]:
        """The facts that are given, as they are put into the wordings."""
        texts = {name: getattr(self, name) for name in ("name", "what", "maker", "home", "birthday", "purpose")}
        texts |= {name: enumeration(getattr(self, name)) for name in ("character", "likes", "dislikes")}
        return {name: text for name, text in texts.items() if text}


class Exchange(NamedTuple):
    """
    A question and its reply. `required` is what the reply has to contain if another model writes it; `fixed` replies
    have to stay as they are.
    """

    question: str
    reply: Any  # text or a list of parts
    required: str = ""
    fixed: bool = False


def enumeration(items: tuple[str, ...]) -> str:
    """
    >>> enumeration(("tea", "rain", "old maps"))
    'tea, rain and old maps'
    """
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1] if items else "") if part)


# ---- YAML → Identity ----


def read_identity(path: Path) -> Identity:
    """Reads the facts. UserError with the number of the line if the file is not as scripts/samples/identity.yaml."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        remedy = 'put texts with special characters in quotation marks, and write lists as "[a, b]"'
        raise UserError(f"{path}, line {line}: not valid YAML ({error.problem}): {remedy}") from error
    except (yaml.YAMLError, RecursionError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {problem}; scripts/samples/identity.yaml is an example") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f'{path}, line 1: expected facts, one per line, such as "name: Kari"')
    facts: dict[str, Any] = {}
    for key, node in _entries(path, root):
        known = [field.name for field in fields(Identity)]
        if key.value not in known:
            close = difflib.get_close_matches(key.value, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
            raise _problem(path, key, f"unknown fact {key.value!r}: {remedy}")
        facts[key.value] = _value(path, key.value, node)
    if "name" not in facts:
        raise UserError(f'{path}: the name is missing: add a line such as "name: Kari"')
    return Identity(**facts)


def _entries(path: Path, mapping: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys and values of a mapping. UserError if a key occurs twice or is not a text."""
    seen: dict[str, int] = {}
    for key, node in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem(path, key, "the text before the colon is a list or mapping: put it in quotation marks")
        if key.value in seen:
            raise _problem(path, key, f"{key.value!r} was given in line {seen[key.value]} already: remove one of them")
        seen[key.value] = key.start_mark.line + 1
        yield key, node


def _value(path: Path, name: str, node: yaml.Node) -> Any:
    if name == "answers":
        if not isinstance(node, yaml.MappingNode):
            raise _problem(path, node, 'answers: expected indented lines of the form "question?: answer"')
        return tuple(
            (_text(path, "the question", key), _text(path, "the answer", answer))
            for key, answer in _entries(path, node)
        )
    if name in LISTS:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(_text(path, name, item) for item in items)
    return _text(path, name, node)


def _text(path: Path, name: str, node: yaml.Node) -> str:
    """The text of a value, whatever YAML takes it for: the name No is not a truth value here."""
    if not isinstance(node, yaml.ScalarNode):
        remedy = 'a list "[a, b]" of texts' if name in LISTS else "one text"
        raise _problem(path, node, f"{name}: expected {remedy}; put a text with special characters in quotation marks")
    text = " ".join(node.value.split())
    if not text or (node.tag == "tag:yaml.org,2002:null" and node.style is None):
        raise _problem(path, node, f"{name} is empty: write a text after the colon, or remove the line")
    if len(text) > MAX_CHARACTERS:
        raise _problem(path, node, f"{name} has {len(text)} characters: shorten it to at most {MAX_CHARACTERS}")
    is_fact = name in {field.name for field in fields(Identity)} - set(VERBATIM)
    return text.removesuffix(".") if is_fact else text


def _problem(path: Path, node: yaml.Node, message: str) -> UserError:
    return UserError(f"{path}, line {node.start_mark.line + 1}: {message}")


# ---- Identity → conversations ----


class IdentityWriter:
    """Writes one conversation after the other."""

    def __init__(self, identity: Identity, rng: Random) -> None:
        self.identity = identity
        self.rng = rng
        self.values = identity.values()
        self.others = [
            name for name in load_wordings("other assistants", WORDINGS)["names"] if not self._is_own_name(name)
        ]
        cast = [person.split(",")[0] for person in load_entries("cast")]
        self.wrong_names = [name for name in cast if not self._is_own_name(name)]
        self.primer = ConversationWriter(rng)
        topics = [section for section in read_sections(WORDINGS) if section not in NOT_TOPICS]
        self.topics = [topic for topic in topics if self._replies(topic)]
        self.topics += ["name"] * (NAME_WEIGHT - 1)
        self.topics += ["answers"] * (ANSWER_WEIGHT if identity.answers else 0)

    def conversation(self) -> list[Exchange]:
        """One to three questions about the model, with a greeting before and other exchanges after it."""
        exchanges = [self.ask("greeting")] if self.rng.random() < GREETING_SHARE else []
        number = self.rng.choice((1, 1, 2, 2, 3))
        topics = self.rng.sample(sorted(set(self.topics)), k=min(number, len(set(self.topics))))
        topics[0] = self.rng.choice(self.topics)
        exchanges += [self.ask(topic) for topic in dict.fromkeys(topics)]
        tail = self.primer.tail()
        exchanges += [Exchange(*pair, fixed=True) for pair in zip(tail[::2], tail[1::2], strict=True)]
        return exchanges

    def ask(self, topic: str) -> Exchange:
        """A question about a topic and the reply to it, in random wordings."""
        if topic == "answers":
            question, reply = self.rng.choice(self.identity.answers)
            return Exchange(self._as_typed(question), reply, fixed=True)
        wordings = load_wordings(topic, WORDINGS)
        values = self.values | {
            "other": self.rng.choice(self.others),
            "wrong_name": self.rng.choice(self.wrong_names),
        }
        question = self.rng.choice(wordings["question"]).format(**values)
        reply = self.rng.choice(self._replies(topic)).format(**values)
        reply = reply[0].upper() + reply[1:]
        if self.identity.catchphrases and self.rng.random() < CATCHPHRASE_SHARE:
            reply = f"{self.rng.choice(self.identity.catchphrases)} {reply}"
        required = wordings.get("required", ("",))[0].format(**values)
        return Exchange(self._as_typed(question), reply, required)

    def _replies(self, topic: str) -> list[str]:
        """The wordings of the reply that need only facts that are given."""
        given = {*self.values, "other", "wrong_name"}
        replies = load_wordings(topic, WORDINGS)["reply"]
        return [reply for reply in replies if {field for _, field, _, _ in Formatter().parse(reply) if field} <= given]

    def _as_typed(self, question: str) -> str:
        return question.lower().rstrip("?.!") if self.rng.random() < CASUAL_SHARE else question

    def _is_own_name(self, name: str) -> bool:
        return name.lower() in self.identity.name.lower()


def generate_identity(identity: Identity, number: int, seed: int = 0) -> list[list[Exchange]]:
    """Returns `number` different conversations, at most MAX_CONVERSATIONS."""
    assert number <= MAX_CONVERSATIONS, number
    writer = IdentityWriter(identity, Random(f"identity {seed}"))
    return list(distinct(writer.conversation, number, repr, set()))
