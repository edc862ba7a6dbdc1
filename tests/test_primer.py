"""
The primer: facts that are true, text that is reproducible and balanced, a quiz in wordings that training never shows.

    python -m pytest tests/test_primer.py
"""

import hashlib
import json
import operator
import re
import shutil
from collections import Counter
from functools import cache
from random import Random

import pyarrow.parquet as pq
import pytest
from factories import write_shard

from nanochat.common import UserError
from nanochat.primer import (
    CONVERSATION_MIX,
    all_facts,
    contains_phrase,
    generate_conversations,
    generate_documents,
    generate_quiz,
    generate_sums,
    write_shards,
)
from nanochat.primer.data import load_facts, load_wordings
from nanochat.primer.facts import fact_table, number_words
from nanochat.primer.questions import ask_choice
from nanochat.primer.relations import relations, sentence, with_choices
from nanochat.primer.sums import is_held_out
from scripts import primer as primer_script
from tasks.quiz import PrimerChat, QuizChoice, QuizFree, Sums

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@cache
def documents():
    return generate_documents()


@cache
def conversations(split):
    return generate_conversations(split)


def texts(conversation):
    for message in conversation["messages"]:
        content = message["content"]
        yield content if isinstance(content, str) else "\n".join(part["text"] for part in content)


@cache
def training_text():
    return "\n".join([*documents(), *(text for c in conversations("train") for text in texts(c))]).lower()


def test_fact_table_is_complete_and_consistent():
    table = fact_table()
    assert len(table["continent"]) == 195
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
    opposites = [word for pair in load_facts("opposites") for word in pair]
    assert len(opposites) == len(set(opposites))
    assert [number_words(n) for n in (0, 13, 40, 47, 100)] == "zero,thirteen,forty,forty-seven,one hundred".split(",")
    for name, facts in table.items():
        assert len({fact.subject for fact in facts}) == len(facts), f"{name} has two answers for one subject"


def sha256(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@pytest.mark.slow
def test_generated_text_is_unchanged():
    """Results in README.md and reports are for exactly this text."""
    assert sha256(documents()) == "07592f93f0a65cad"
    assert sha256(conversations("train")) == "2e9906ac15385515"
    assert sha256(conversations("val")) == "6b9a0b449aa19f70"
    assert sha256(generate_quiz()) == "79cd0d7eb899b5f3"


@pytest.mark.slow
def test_generated_text_depends_on_the_seed_only():
    assert generate_conversations("val") == conversations("val")
    assert generate_quiz() == generate_quiz() != generate_quiz(1)
    assert generate_sums("test") == generate_sums("test") != generate_sums("test", 1)


@pytest.mark.slow
def test_generated_text_has_the_documented_sizes():
    size = sum(len(text.encode()) for text in documents())
    assert 25_000 <= len(documents()) <= 35_000 and 5e6 < size < 7e6
    assert len(set(documents())) == len(documents())
    assert len(conversations("train")) == sum(CONVERSATION_MIX.values()) == 12_500
    assert 200 <= len(conversations("val")) <= 999
    assert len(generate_quiz()) == 400 and len(generate_sums("test")) == 200


def test_documents_state_every_fact_often():
    count = Counter(part for text in documents() for part in re.split(r"\n|(?<=[.?]) |Answer: |\w+: ", text))
    for relation, fact in all_facts():
        clauses = {*relation.statements(fact), *relation.render("reverse reply", fact)}
        assert sum(count[sentence(clause)] for clause in clauses) >= 30, fact


def test_conversations_ask_every_fact_in_its_plainest_wording():
    asked = {tuple(texts(c)) for c in conversations("train") if len(c["messages"]) == 2}
    for relation, fact in all_facts():
        assert (relation.plainest_question(fact), relation.reply(fact)) in asked, fact
    capitals = {question for question, _ in asked if re.fullmatch("What is the capital of [^:]*[?]", question)}
    assert len(capitals) == 193 and "What is the capital of France?" in capitals


def test_replies_contain_the_answer_as_whole_words():
    for relation, fact in all_facts():
        assert contains_phrase(relation.reply(fact), fact.answer), fact
        if relation.is_reversible(fact):
            assert contains_phrase(relation.reply(fact, reverse=True), fact.subject), fact


def test_conversations_are_valid_and_splits_are_disjoint():
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
    """Computes the outputs of the expressions independently of the generator."""
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


@pytest.mark.slow
def test_conversations_of_some_kinds_are_a_subset():
    everything = [json.dumps(c) for c in conversations("train")]
    kinds = ("identity", "greeting")
    some = [json.dumps(c) for c in generate_conversations("train", kinds=kinds)]
    assert len(some) == 500 and set(some) < set(everything)
    assert not set(some) & {json.dumps(c) for c in generate_conversations("val", kinds=kinds)}
    assert len(PrimerChat("train", ("identity",))) == 300 < len(PrimerChat("train")) == len(everything)
    with pytest.raises(AssertionError, match="poem"):
        generate_conversations("train", kinds=("poem",))


@pytest.mark.parametrize(
    "text, phrase, expected",
    [
        ("It is the Sea.", "the sea", True),
        ("South Africa", "africa", True),
        ("Es.", "Es", True),
        ("Australasia", "Asia", False),
        ("seas", "the sea", False),
        ("Essen", "Es", False),
    ],
)
def test_contains_phrase_matches_whole_words_without_article(text, phrase, expected):
    assert contains_phrase(text, phrase) == expected


def test_with_choices_uses_every_frame():
    rng, choices = Random(0), ["ice", "fire", "snow", "rain"]
    assert {with_choices(rng, "What is hot?", choices) for _ in range(100)} == {
        "What is hot: ice, fire, snow or rain?",
        "What is hot? Ice, fire, snow or rain?",
        "What is hot? Choose from ice, fire, snow and rain.",
        "Choose from ice, fire, snow and rain. What is hot?",
        "Ice, fire, snow or rain? What is hot?",
    }
    assert "Name it: ice, fire, snow or rain." in {with_choices(rng, "Name it.", choices) for _ in range(100)}


@pytest.mark.parametrize("held_out", [False, True])
def test_choice_questions_contain_each_choice_once_and_no_other_answer(held_out):
    rng, facts, indices = Random(0), all_facts(), Counter()
    for _ in range(2000):
        choice = ask_choice(rng, lambda: rng.choice(facts), held_out=held_out)
        assert len(choice.choices) == 4
        assert [c for c in choice.choices if contains_phrase(choice.reply, c)] == [choice.right]
        for one in choice.choices:
            assert [c for c in choice.choices if contains_phrase(c, one)] == [one], choice
            assert len(re.findall(rf"(?<!\w){re.escape(one)}(?!\w)", choice.question, re.IGNORECASE)) == 1, choice
        indices[choice.choices.index(choice.right)] += 1
    assert min(indices.values()) > 0.8 * max(indices.values())


def stem(item):
    """The question of a quiz item without its choices and their frame."""
    listed = rf"{re.escape(', '.join(item['choices'][:-1]))} (or|and) {re.escape(item['choices'][-1])}[?.]"
    return re.sub(rf"(:| ?Choose from)? ?{listed} ?", "", item["question"], flags=re.IGNORECASE)


@pytest.mark.slow
def test_quiz_is_balanced_and_in_unseen_wordings():
    quiz = generate_quiz()
    assert Counter(item["kind"] for item in quiz) == {"choice": 200, "free": 200}
    choices = [item for item in quiz if item["kind"] == "choice"]
    assert Counter(item["choices"].index(item["answer"]) for item in choices) == dict.fromkeys(range(4), 50)
    for item in quiz:
        question = stem(item) if item["kind"] == "choice" else item["question"]
        assert len(question) > 10 and question.lower() not in training_text(), item
        assert not contains_phrase(question, item["answer"]) and " or " not in question, item
        assert item["question"].lower() not in training_text()


def test_quiz_and_sums_accept_only_correct_completions():
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
                assert not task.is_correct(item, question), "listing all choices is not an answer"
    sums = Sums("test")
    assert sums.is_correct(sums[0], f"So 1 + 2 = {sums[0]['answer']}.") and not sums.is_correct(sums[0], "x")


def all_wordings(frames, noun_kind, question_kind):
    for relation in relations().values():
        nouns = relation.wordings.get(noun_kind, ())
        yield from (frame.format(noun) for noun in nouns for frame in frames)
        yield from relation.wordings.get(question_kind, ())


def test_held_out_wordings_are_no_training_wordings():
    frames = load_wordings("frames")
    held_out = {
        *all_wordings(frames["held-out"], "noun", "held-out question"),
        *all_wordings(frames["held-out"], "reverse noun", "reverse held-out question"),
    }
    train = {
        *all_wordings(frames["train"], "noun", "question"),
        *all_wordings(frames["train"], "reverse noun", "reverse question"),
        *all_wordings((), "", "reverse choice question"),
    }
    assert len(held_out) > 200 and len(train) > 1000 and not held_out & train


def test_wordings_have_known_kinds():
    kinds = {"title", "statement", "reply", "noun", "question", "held-out question"}
    kinds |= {f"reverse {kind}" for kind in ("noun", "question", "held-out question", "reply", "choice question")}
    assert {kind for relation in relations().values() for kind in relation.wordings} == kinds


@pytest.mark.parametrize("reverse", [False, True])
def test_choices_contain_the_answer_once(reverse):
    rng = Random(0)
    for relation in relations().values():
        for fact in relation.facts:
            if not reverse or relation.is_reversible(fact) or relation.has_ambiguous_reverse:
                choices = relation.choices(rng, fact, reverse)
                assert len(set(choices)) == 4 and choices.count(fact.subject if reverse else fact.answer) == 1


def test_sums_of_the_test_split_are_held_out():
    for item in generate_sums("test"):
        check_tool_use(item["reply"])
        assert item["reply"][-1]["text"].endswith(f"= {item['answer']}.")
    pairs = re.findall(r"(\d+) ?[-+*/] ?(\d+)", training_text())
    assert len(pairs) > 10_000 and not any(is_held_out(int(a), int(b)) for a, b in pairs)


# ---- shards ----


@pytest.fixture(scope="module")
def written_primer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("primer") / "written"
    write_shards(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_write_shards_holds_the_documents(tmp_path):
    paths = write_shards(tmp_path, num_shards=3)
    assert [path.name for path in paths] == [f"shard_{i:05d}.parquet" for i in range(3)]
    tables = [pq.read_table(path) for path in paths]
    assert [table.column_names for table in tables] == [["text"]] * 3
    rows = [table["text"].to_pylist() for table in tables]
    assert [text for shard in rows for text in shard] == documents()
    assert 0.02 < len(rows[-1]) / len(documents()) < 0.05 < len(rows[0]) / len(documents())
    assert pq.ParquetFile(paths[0]).metadata.row_group(0).num_rows == 512


@pytest.mark.slow
def test_write_shards_over_a_primer_replaces_it(written_primer, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written_primer, folder)
    write_shards(folder)
    assert contents(folder) == contents(written_primer)
    write_shards(folder, seed=1)
    assert contents(folder).keys() == contents(written_primer).keys()
    assert contents(folder) != contents(written_primer)


@pytest.mark.slow
def test_write_shards_over_a_primer_without_marker_needs_the_same_seed(written_primer, tmp_path):
    """A version without marker wrote it, or the run was interrupted."""
    folder = tmp_path / "copy"
    shutil.copytree(written_primer, folder, ignore=shutil.ignore_patterns("primer.json"))
    before = contents(folder)
    with pytest.raises(UserError, match="shard_00000.parquet, which is not part of a primer"):
        write_shards(folder, seed=1)
    assert contents(folder) == before
    write_shards(folder)
    assert contents(folder) == contents(written_primer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, has_primer",
    [("shard_00000.parquet", False), ("primer.json", False), ("zebra.parquet", True), ("notes", True)],
)
def test_primer_script_folder_with_other_files_is_refused(written_primer, tmp_path, name, has_primer):
    folder = tmp_path / "data"
    if has_primer:
        shutil.copytree(written_primer, folder)
    write_shard(folder / name, ["precious"])
    before = contents(folder)
    with pytest.raises(SystemExit) as error:
        primer_script.main(["--data-dir", str(folder)])
    message = str(error.value.code)
    assert name in message and "choose an empty or new folder with --data-dir" in message and "\n" not in message
    assert contents(folder) == before


@pytest.mark.slow
def test_primer_script_default_folder_is_in_the_base_dir(base_dir, capsys):
    primer_script.main([])
    assert f"{base_dir / 'primer'}: 4 shards" in capsys.readouterr().out
    assert len(list((base_dir / "primer").glob("*.parquet"))) == 4
