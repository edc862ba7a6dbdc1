"""
Spelling tasks: reproducible items, correct answers, many wordings, splits that share no word.

    python -m pytest tests/test_tasks_spelling.py
"""

import hashlib
import json
import re
from collections import Counter

import pytest

from nanochat.common import UserError
from nanochat.conversation import render
from nanochat.primer import SPELLING_WORDS
from nanochat.tools import calculate
from tasks.common import limited
from tasks.spelling import QUOTES, WORDINGS, SimpleSpelling, SpellingBee, make_informal, spell, tally
from tasks.words import load_words

TASKS = [SpellingBee, SimpleSpelling]


@pytest.fixture(autouse=True)
def no_word_list(monkeypatch):
    monkeypatch.delenv("NANOCHAT_WORD_LIST", raising=False)


def digest(task, count):
    return hashlib.sha256(json.dumps([task[i] for i in range(count)]).encode()).hexdigest()[:16]


# ---- words ----


def test_load_words_splits_are_disjoint():
    train, test = load_words("train"), load_words("test")
    assert len(train) > 900 and len(test) > 200 and not set(train) & set(test)
    assert all(re.fullmatch("[a-z]{3,20}", word) for word in train + test)
    assert set(SPELLING_WORDS) <= set(train)  # the primer's conversations spell them


def test_load_words_tokenizer_adds_its_words(golden_tokenizer):
    for split, other in (("train", "test"), ("test", "train")):
        more = set(load_words(split, golden_tokenizer))
        assert more > set(load_words(split)) and not more & set(load_words(other, golden_tokenizer))
        tokens = {token.decode(errors="replace").strip() for token in golden_tokenizer.tokens}
        assert more - set(load_words(split)) <= tokens


def test_load_words_word_list_adds_its_words(tmp_path, monkeypatch):
    path = tmp_path / "words"
    path.write_text("zymurgy\nZürich\nit's\nquokka\n\nab\nUpper\nwombat\naardvark\n" + "x" * 21)
    before = load_words("train") + load_words("test")
    monkeypatch.setenv("NANOCHAT_WORD_LIST", str(path))
    assert {*load_words("train"), *load_words("test")} - set(before) == {"zymurgy", "quokka", "wombat", "aardvark"}
    assert not set(load_words("train")) & set(load_words("test"))


@pytest.mark.parametrize("content", [None, b"\xff", b"Upper\n"])
def test_load_words_unusable_word_list_raises(tmp_path, monkeypatch, content):
    path = tmp_path / "words"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("NANOCHAT_WORD_LIST", str(path))
    with pytest.raises(UserError, match="NANOCHAT_WORD_LIST"):
        SpellingBee("train")


# ---- items ----


def test_items_are_unchanged():
    """Scores are comparable only between identical items."""
    assert digest(SpellingBee("test"), 500) == "ca78b537e4804df2"
    assert digest(SimpleSpelling("test"), 500) == "029d1dc379202061"
    assert SpellingBee("train", 5)[3] == SpellingBee("train", 5000)[3] != SpellingBee("test")[3]


@pytest.mark.parametrize("cls", TASKS)
def test_spelling_task_is_a_sequence_of_its_size(cls):
    assert (len(cls("train")), len(cls("test")), len(cls("train", 7))) == (80_000, 500, 7)
    assert len(list(cls("train", 7))) == 7 and len(limited(cls("test"), 3)) == 3
    for index in (7, -1):
        with pytest.raises(IndexError):
            cls("train", 7)[index]


@pytest.mark.parametrize("split", ["train", "test"])
def test_spelling_bee_items_are_correct_and_varied(split, golden_tokenizer):
    vocabulary, numbers, wordings = set(load_words(split)), Counter(), set()
    task = SpellingBee(split, 2000)
    for conversation in task:
        question, answer = (message["content"] for message in conversation["messages"])
        before, call, output, after = (part["text"] for part in answer)
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call).groups()
        number = str(sum(each == letter for each in word))
        assert word in vocabulary and word in question and letter in question.replace(word, "", 1)
        assert calculate(call) == output == number == conversation["answer"] and after == f"\n\n#### {number}"
        spelled, counted, conclusion = before.split("\n\n")
        assert spelled == f"{word}: {','.join(word)}" and conclusion == f"That makes {number}. To be sure: "
        assert "".join(line[0] for line in counted.split("\n")) == word
        assert re.findall(r"\d+", counted) == [str(i + 1) for i in range(int(number))]
        assert task.is_correct(conversation, before + after) and task.reward(conversation, after) == 1.0
        numbers[number] += 1
        wordings.add(question.replace(word, "W", 1))
    assert numbers["0"] > 50 and numbers["1"] > 500 and numbers["2"] > 200 and numbers["3"] > 10
    assert len(wordings) > 1000
    ids, mask = render(task[0], golden_tokenizer)
    assert len(ids) == len(mask) < 256


def test_spelling_bee_grades_the_number_after_the_hashes():
    task = SpellingBee("test")
    conversation = next(c for c in task if c["answer"] == "2")
    for completion in ("#### 2", "well\n####2", "#### 2.0", "#### 2 #### 3"):
        assert task.reward(conversation, completion) == 1.0
    for completion in ("", "2", "#### 3", "#### 22", "#### two", "#### -2"):
        assert task.reward(conversation, completion) == 0.0


def test_simple_spelling_grades_the_letters():
    task = SimpleSpelling("test")
    for conversation in limited(task, 300):
        answer, word = conversation["messages"][1]["content"], conversation["answer"]
        assert answer == spell(word) and word in conversation["messages"][0]["content"]
        assert task.is_correct(conversation, answer)
        assert task.is_correct(conversation, f"It is: {', '.join(word.upper())}.") and task.reward(conversation, answer)
        for wrong in ("", word, f"{word}: {word}", f"{word}: {','.join(word[:-1])}", f"{word}: {','.join(word + 'x')}"):
            assert not task.is_correct(conversation, wrong), wrong


def test_spell_and_tally_format_letters():
    assert spell("apple") == "apple: a,p,p,l,e"
    assert tally("apple", "p") == "a\np 1\np 2\nl\ne" and tally("cat", "z") == "c\na\nt"


def test_wordings_have_one_letter_and_one_word():
    everything = [wording for wordings in WORDINGS.values() for wording in wordings]
    assert len(set(everything)) == len(everything) > 60 and len(WORDINGS) == 13
    for wording in everything:
        assert wording.count("{l}") == wording.count("{w}") == 1, wording
        assert wording.format(l="{}", w="{}").count("{}") == 2
    assert all(quote.count("{}") == 1 for quote in QUOTES)
    questions = {make_informal(SpellingBee("train").random(i), "How Many?") for i in range(100)}
    assert questions == {"How Many?", "how many?", "How Many", "how many"}
