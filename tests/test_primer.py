"""The embedded corpus: true, reproducible, evenly distributed, and examined in wordings it never shows."""

import json
import operator
import re
from collections import Counter
from functools import cache
from random import Random

import pyarrow.parquet as pq
import pytest

from nanochat import primer
from nanochat.primer_chat import LETTERS, all_facts, choice_question, held_out
from nanochat.primer_facts import COUNTRIES, OPPOSITES, entries, fact_table, number_words
from nanochat.primer_wordings import HELD_FRAMES, TRAIN_FRAMES, relations, sentence

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@cache
def documents():
    return primer.documents()


@cache
def conversations(split):
    return primer.conversations(split)


def texts(conversation):
    for message in conversation["messages"]:
        content = message["content"]
        yield content if isinstance(content, str) else "\n".join(part["text"] for part in content)


@cache
def training_text():
    return "\n".join([*documents(), *(text for c in conversations("train") for text in texts(c))]).lower()


def test_tables():
    table = fact_table()
    assert sum(len(entries(rows)) for rows in COUNTRIES.values()) == len(table["continent"]) == 195
    capitals = {fact.subject: fact.answer for fact in table["capital"]}
    assert len(capitals) == len(set(capitals.values())) == 193 and all(capitals.values())
    assert capitals["France"] == "Paris" and capitals["the Netherlands"] == "Amsterdam"
    symbols = {fact.subject: fact.answer for fact in table["symbol"]}
    assert len(symbols) == len(set(symbols.values())) == 118
    assert all(re.fullmatch("[A-Z][a-z]?", symbol) for symbol in symbols.values())
    numbers = {fact.subject: fact.answer for fact in table["atomic_number"]}
    assert [numbers[name] for name in ("hydrogen", "neon", "iron", "silver", "gold", "uranium", "oganesson")] == [
        "1", "10", "26", "47", "79", "92", "118",
    ]  # fmt: skip
    opposites = [word for pair in entries(OPPOSITES) for word in pair]
    assert len(opposites) == len(set(opposites))
    assert [number_words(n) for n in (0, 13, 40, 47, 100)] == "zero,thirteen,forty,forty-seven,one hundred".split(",")
    for name, facts in table.items():
        assert len({fact.subject for fact in facts}) == len(facts), f"{name} has two answers for one subject"


def test_deterministic_and_seeded():
    assert primer.conversations("val") == conversations("val")
    assert primer.quiz() == primer.quiz() != primer.quiz(1)
    assert primer.sums("test") == primer.sums("test") != primer.sums("test", 1)


def test_sizes():
    size = sum(len(text.encode()) for text in documents())
    assert 25_000 <= len(documents()) <= 40_000 and 5e6 < size < 8e6
    assert len(set(documents())) == len(documents())
    assert 12_000 <= len(conversations("train")) <= 16_000 and 200 <= len(conversations("val")) <= 999
    assert len(primer.quiz()) == 400 and len(primer.sums("test")) == 200


def test_every_fact_is_often_told():
    told = Counter(part for text in documents() for part in re.split(r"\n|(?<=[.?]) |Answer: |\w+: ", text))
    for relation, fact in all_facts():
        clauses = {*relation.statements(fact), *relation.say("R", fact)}
        count = sum(told[sentence(clause)] for clause in clauses)
        assert count >= 30, (fact, count)
    assert "what is the capital of france?" in training_text()


def test_replies_hold_the_answer_as_whole_words():
    def holds(text, phrase):
        return re.search(rf"\b{re.escape(phrase.removeprefix('the '))}\b", text, re.IGNORECASE)

    for relation, fact in all_facts():
        assert holds(relation.reply(fact), fact.answer), fact
        if relation.reversible(fact):
            assert holds(relation.reply(fact, reverse=True), fact.subject), fact


def test_conversations_are_well_formed():
    for conversation in conversations("train") + conversations("val"):
        messages = conversation["messages"]
        assert len(messages) >= 2 and len(messages) % 2 == 0
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        for message in messages[::2]:
            assert isinstance(message["content"], str) and message["content"]
        for message in messages[1::2]:
            content = message["content"]
            if isinstance(content, list):
                assert {part["type"] for part in content} == {"text", "python", "python_output"}
                check_tool_use(content)
            else:
                assert content
    train = {json.dumps(c) for c in conversations("train")}
    assert len(train) == len(conversations("train"))
    assert not train & {json.dumps(c) for c in conversations("val")}


def check_tool_use(parts):
    """The outputs follow from the expressions, worked out here in another way."""
    for part, output in zip(parts, parts[1:], strict=False):
        if part["type"] != "python":
            continue
        assert output["type"] == "python_output"
        if spelled := re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", part["text"]):
            word, letter = spelled.groups()
            assert output["text"] == str(len([c for c in word if c == letter]))
            assert parts[0]["text"] == f"{word}: {', '.join(word)}. "
        else:
            a, sign, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", part["text"]).groups()
            result = OPERATIONS[sign](int(a), int(b))
            assert result >= 0 and float(output["text"]) == result and output["text"].isdigit()
            assert parts[-1] == {"type": "text", "text": f"{a} {sign} {b} = {output['text']}."}


def test_multiple_choice_answers():
    letters, right = Counter(), re.compile(r"Multiple Choice question: (.*)\n(?:- .*=[A-D]\n){4}\nRespond only .*\.")
    for conversation in conversations("train"):
        said = list(texts(conversation))
        for question, answer in zip(said[::2], said[1::2], strict=True):
            if question.startswith("Multiple Choice"):
                assert right.fullmatch(question) and answer in LETTERS
                assert len(set(re.findall(r"- (.*)=[A-D]", question))) == 4
                letters[answer] += 1
    assert min(letters.values()) > 0.9 * max(letters.values()) and letters.total() > 5000
    question = choice_question("What is hot?", ["ice", "fire", "snow", "rain"])
    assert question == (
        "Multiple Choice question: What is hot?\n- ice=A\n- fire=B\n- snow=C\n- rain=D\n\n"
        "Respond only with the letter of the correct answer."
    )


def test_quiz():
    quiz = primer.quiz()
    kinds = Counter(item["kind"] for item in quiz)
    assert kinds == {"choice": 200, "free": 200}
    assert Counter(item["answer"] for item in quiz if item["kind"] == "choice") == dict.fromkeys(LETTERS, 50)
    for item in quiz:
        assert item["question"].lower() not in training_text(), item
        if item["kind"] == "choice":
            assert len(set(item["choices"])) == 4 and item["answer"] in LETTERS
        else:
            assert not re.search(rf"\b{re.escape(item['answer'])}\b", item["question"], re.IGNORECASE)


def test_no_held_wording_is_a_training_wording():
    def wordings(frames, nouns, questions):
        for relation in relations().values():
            words = relation.wordings
            yield from (frame.format(noun) for noun in words.get(nouns, ()) for frame in frames)
            yield from (words.get(questions, ()))

    held = {*wordings(HELD_FRAMES, "n", "h"), *wordings(HELD_FRAMES, "N", "H")}
    train = {*wordings(TRAIN_FRAMES, "n", "q"), *wordings(TRAIN_FRAMES, "N", "Q"), *wordings((), "", "X")}
    assert len(held) > 200 and len(train) > 1000 and not held & train


@pytest.mark.parametrize("reverse", [False, True])
def test_choices_hold_the_answer_once(reverse):
    rng = Random(0)
    for relation in relations().values():
        for fact in relation.facts:
            if not reverse or relation.reversible(fact) or "X" in relation.wordings:
                choices = relation.choices(rng, fact, reverse)
                assert len(set(choices)) == 4 and choices.count(fact.subject if reverse else fact.answer) == 1


def test_sums_are_held_out():
    for item in primer.sums("test"):
        content = item["conversation"]["messages"][1]["content"]
        check_tool_use(content)
        assert item["conversation"]["messages"][0]["content"] == item["question"]
        assert content[-1]["text"].endswith(f"= {item['answer']}.")
    shown = re.findall(r"(\d+) ?[-+*/] ?(\d+)", training_text())
    assert len(shown) > 10_000 and not any(held_out(int(a), int(b)) for a, b in shown)


def test_write_shards(tmp_path):
    paths = primer.write_shards(tmp_path, num_shards=3)
    assert [path.name for path in paths] == [f"shard_{i:05d}.parquet" for i in range(3)]
    tables = [pq.read_table(path) for path in paths]
    assert [table.column_names for table in tables] == [["text"]] * 3
    rows = [table["text"].to_pylist() for table in tables]
    assert [text for shard in rows for text in shard] == documents()
    assert 0.02 < len(rows[-1]) / len(documents()) < 0.05 < len(rows[0]) / len(documents())
    assert pq.ParquetFile(paths[0]).metadata.row_group(0).num_rows == 512
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in primer.write_shards(tmp_path, num_shards=3)] == before
