"""The embedded corpus: true, reproducible, evenly distributed, and examined in wordings it never shows."""

import json
import operator
import re
from collections import Counter
from functools import cache
from random import Random

import pyarrow.parquet as pq
import pytest

from nanochat.primer import documents as primer
from nanochat.primer.conversations import CONVERSATION_MIX, all_facts, ask_choice, held_out
from nanochat.primer.facts import COUNTRIES, OPPOSITES, entries, fact_table, number_words
from nanochat.primer.wordings import HELD_FRAMES, TRAIN_FRAMES, names, relations, sentence, with_choices
from tasks.quiz import PrimerChat, QuizChoice, QuizFree, Sums

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
    assert 25_000 <= len(documents()) <= 35_000 and 5e6 < size < 7e6
    assert len(set(documents())) == len(documents())
    assert len(conversations("train")) == sum(CONVERSATION_MIX.values()) == 12_500
    assert 200 <= len(conversations("val")) <= 999
    assert len(primer.quiz()) == 400 and len(primer.sums("test")) == 200


def test_every_fact_is_often_told():
    told = Counter(part for text in documents() for part in re.split(r"\n|(?<=[.?]) |Answer: |\w+: ", text))
    for relation, fact in all_facts():
        clauses = {*relation.statements(fact), *relation.say("R", fact)}
        count = sum(told[sentence(clause)] for clause in clauses)
        assert count >= 30, (fact, count)


def test_every_fact_is_plainly_asked_in_conversations():
    asked = {tuple(texts(c)) for c in conversations("train") if len(c["messages"]) == 2}
    for relation, fact in all_facts():
        assert (relation.plain(fact), relation.reply(fact)) in asked, fact
    capitals = {question for question, _ in asked if re.fullmatch("What is the capital of [^:]*[?]", question)}
    assert len(capitals) == 193 and "What is the capital of France?" in capitals


def test_replies_hold_the_answer_as_whole_words():
    for relation, fact in all_facts():
        assert names(relation.reply(fact), fact.answer), fact
        if relation.reversible(fact):
            assert names(relation.reply(fact, reverse=True), fact.subject), fact


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


def test_kinds_of_conversations():
    whole = [json.dumps(c) for c in conversations("train")]
    some = [json.dumps(c) for c in primer.conversations("train", kinds=("who", "greeting"))]
    assert len(some) == 500 and set(some) < set(whole)
    assert not set(some) & {json.dumps(c) for c in primer.conversations("val", kinds=("who", "greeting"))}
    assert len(PrimerChat("train", ("who",))) == 300 < len(PrimerChat("train")) == len(whole)
    with pytest.raises(ValueError, match="no kind whom"):
        primer.conversations("train", kinds=("whom",))


def test_names():
    assert names("It is the Sea.", "the sea") and names("South Africa", "africa") and names("Es.", "Es")
    assert not names("Australasia", "Asia") and not names("seas", "the sea") and not names("Essen", "Es")


def test_choices_in_words():
    rng, choices = Random(0), ["ice", "fire", "snow", "rain"]
    assert {with_choices(rng, "What is hot?", choices) for _ in range(100)} == {
        "What is hot: ice, fire, snow or rain?", "What is hot? Ice, fire, snow or rain?",
        "What is hot? Choose from ice, fire, snow and rain.", "Choose from ice, fire, snow and rain. What is hot?",
        "Ice, fire, snow or rain? What is hot?",
    }  # fmt: skip
    assert "Name it: ice, fire, snow or rain." in {with_choices(rng, "Name it.", choices) for _ in range(100)}


@pytest.mark.parametrize("held", [False, True])
def test_choice_questions_are_clear(held):
    rng, facts, places = Random(0), all_facts(), Counter()
    for _ in range(2000):
        choice = ask_choice(rng, lambda: rng.choice(facts), held)
        assert len(choice.choices) == 4 and [c for c in choice.choices if names(choice.reply, c)] == [choice.right]
        for one in choice.choices:
            assert [c for c in choice.choices if names(c, one)] == [one], choice
            assert len(re.findall(rf"(?<!\w){re.escape(one)}(?!\w)", choice.question, re.IGNORECASE)) == 1, choice
        places[choice.choices.index(choice.right)] += 1
    assert min(places.values()) > 0.8 * max(places.values())


def stem(item):
    """The question of a quiz item without its choices and their frame."""
    listed = rf"{re.escape(', '.join(item['choices'][:-1]))} (or|and) {re.escape(item['choices'][-1])}[?.]"
    return re.sub(rf"(:| ?Choose from)? ?{listed} ?", "", item["question"], flags=re.IGNORECASE)


def test_quiz():
    quiz = primer.quiz()
    assert Counter(item["kind"] for item in quiz) == {"choice": 200, "free": 200}
    choices = [item for item in quiz if item["kind"] == "choice"]
    assert Counter(item["choices"].index(item["answer"]) for item in choices) == dict.fromkeys(range(4), 50)
    for item in quiz:
        question = stem(item) if item["kind"] == "choice" else item["question"]
        assert len(question) > 10 and question.lower() not in training_text(), item
        assert not names(question, item["answer"]) and " or " not in question, item
        assert item["question"].lower() not in training_text()


def test_judges():
    tasks = QuizFree(), QuizChoice()
    assert [len(task) for task in tasks] == [200, 200] and all(task.kind == "generative" for task in tasks)
    for task in tasks:
        for item in task:
            question, answer = item["messages"][0]["content"], item["answer"]
            assert task.is_correct(item, item["messages"][1]["content"])
            assert task.is_correct(item, f"The answer is {answer.upper()}.")
            assert not task.is_correct(item, "I do not know.") and not task.is_correct(item, f"x{answer}x")
            for choice in item["choices"]:
                assert task.is_correct(item, f"It is {choice}.") == (choice == answer)
            if item["choices"]:
                assert not task.is_correct(item, question), "naming all choices is no answer"
    sums = Sums("test")
    assert sums.is_correct(sums[0], f"So 1 + 2 = {sums[0]['answer']}.") and not sums.is_correct(sums[0], "x")


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
