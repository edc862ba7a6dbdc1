"""
Evaluation of chat models: both kinds of tasks, several samples, truncated prompts, the record, ranks.

    python -m pytest tests/test_eval_chat.py
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from factories import FAMILY, tiny_engine, tiny_gpt

from nanochat.conversation import render_for_completion
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.eval import chat as eval_chat
from nanochat.eval.chat import (
    GRADING_THREADS,
    Sampling,
    choose_letters,
    evaluate_task,
    grade_completions,
    truncate_prompt,
)
from nanochat.eval.metrics import wilson_interval
from nanochat.request import Request
from nanochat.rollout import pass_at_k
from tasks.common import Task, limited

CPU = Dist(torch.device("cpu"))
CONTEXT = 128
NUM_QUESTIONS = 23
ALL = range(NUM_QUESTIONS)
GREEDY = Sampling(Request([], max_tokens=5, temperature=0.0))


def random_sampling(num_samples=1, pass_k=(), **changes):
    return Sampling(Request([], **{"max_tokens": 5, "temperature": 1.0} | changes), num_samples, pass_k)


def make_engine(tokenizer, **config):
    return tiny_engine(tiny_gpt(sequence_len=CONTEXT, **config), tokenizer, stop=True)


@pytest.fixture(scope="module")
def engine(golden_tokenizer):
    return make_engine(golden_tokenizer)


class Letters(Task):
    """Questions of many lengths, with two to five letters."""

    kind = "categorical"

    def __init__(self, num_questions=NUM_QUESTIONS, words=1):
        self.num_questions, self.words = num_questions, words

    def __len__(self):
        return self.num_questions

    def __getitem__(self, index):
        letters = "ABCDE"[: 2 + index % 4]
        question = f"Is it {index}?" + " Yes?" * (self.words * (index % 7))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": letters[index % len(letters)]},
        ]
        return {"messages": messages, "letters": letters}


class Written(Letters):
    """A completion is correct if its first character comes before "m"."""

    kind = "generative"

    def is_correct(self, conversation, completion):
        return completion[:1] < "m"


@torch.no_grad()
def naive_letters(engine, task):
    """One question at a time, with all logits of the whole vocabulary."""
    found = []
    for conversation in (task[i] for i in range(len(task))):
        prompt = truncate_prompt(render_for_completion(conversation, engine.tokenizer), CONTEXT)
        logits = engine.model(torch.tensor([prompt]))[0, -1]
        scores = {letter: logits[engine.tokenizer.encode(letter)[0]].item() for letter in conversation["letters"]}
        found.append(max(scores, key=scores.get))
    return found


def texts(graded):
    return {(completion.problem, completion.sample): completion.answer for completion in graded}


# ---- categorical tasks ----


@pytest.mark.parametrize("vintage", FAMILY)
@pytest.mark.parametrize("n_layer", [1, 2, 4])
def test_choose_letters_of_all_kinds_of_models_equals_one_at_a_time(golden_tokenizer, vintage, n_layer):
    engine = make_engine(golden_tokenizer, **FAMILY[vintage], n_layer=n_layer)
    graded = choose_letters(engine, Letters(), ALL)
    assert [texts(graded)[i, 0] for i in ALL] == naive_letters(engine, Letters())


@pytest.mark.parametrize("max_columns", [1, 300, 100_000])
def test_choose_letters_in_batches_equals_one_at_a_time(engine, max_columns):
    expected = naive_letters(engine, Letters())
    assert len(set(expected)) > 2
    graded = choose_letters(engine, Letters(), ALL, max_columns=max_columns)
    graded.sort(key=lambda completion: completion.problem)
    assert [completion.answer for completion in graded] == expected
    for i, completion in enumerate(graded):
        probabilities = completion.details["probabilities"]
        assert "".join(probabilities) == Letters()[i]["letters"]  # of the offered letters only
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-3)
        assert max(probabilities, key=probabilities.get) == completion.answer


# ---- generative tasks ----


def test_grade_completions_equals_engine_and_task(engine):
    score = evaluate_task(engine, "Written", Written(), CPU, sampling=GREEDY)
    graded = grade_completions(engine, Written(), ALL, GREEDY)
    assert score.correct == sum(completion.answer[:1] < "m" for completion in graded) and 0 < score.correct < 23
    prompts = [render_for_completion(Written()[i], engine.tokenizer) for i in ALL]
    plain = engine.generate([Request(prompt, 5, temperature=0.0) for prompt in prompts])
    assert texts(graded) == {(i, 0): engine.tokenizer.decode(each.tokens) for i, each in enumerate(plain)}


def test_grade_completions_grades_in_parallel(engine):
    everyone = Barrier(GRADING_THREADS, timeout=30)

    class Slow(Written):
        def grade(self, conversation, completion):
            everyone.wait()
            return {"correct": True, "waited": 1}

    problems = range(GRADING_THREADS * 2)
    graded = grade_completions(engine, Slow(len(problems)), problems, GREEDY)
    assert all(completion.correct and completion.details["waited"] for completion in graded)


def test_grade_completions_of_equal_questions_have_different_seeds(engine):
    class Same(Written):
        def __getitem__(self, index):
            return super().__getitem__(0)

    graded = grade_completions(engine, Same(), ALL, random_sampling(3))
    assert len(graded) == 69 and len(set(texts(graded).values())) > 50


def test_grade_completions_does_not_depend_on_other_questions(engine):
    sampling = random_sampling(2, top_k=50)
    of_all = texts(grade_completions(engine, Written(), ALL, sampling))
    of_some = texts(grade_completions(engine, Written(), range(1, 23, 2), sampling))
    assert of_some == {key: text for key, text in of_all.items() if key[0] % 2}


def test_evaluate_task_reports_pass_at_k(engine):
    score = evaluate_task(engine, "Written", Written(), CPU, sampling=random_sampling(4, (1, 2, 4)))
    num_correct = Counter()
    for completion in grade_completions(engine, Written(), ALL, random_sampling(4)):
        num_correct[completion.problem] += completion.correct
    assert (score.correct, score.total, score.num_samples) == (sum(num_correct.values()), 23, 4)
    assert score.accuracy == pytest.approx(score.pass_at[1]) == pytest.approx(sum(num_correct.values()) / 92)
    assert score.pass_at[4] == pytest.approx(sum(num_correct[i] > 0 for i in ALL) / 23)
    for k in (1, 2, 4):
        assert score.pass_at[k] == pytest.approx(sum(pass_at_k(4, num_correct[i], k) for i in ALL) / 23)
    assert score.interval == wilson_interval(score.accuracy, 23)  # not of 92: samples of one question are alike


def test_evaluate_task_categorical_ignores_sampling(engine):
    score = evaluate_task(engine, "Letters", Letters(), CPU, sampling=random_sampling(4, (1, 4)))
    assert (score.num_samples, score.total, score.pass_at) == (1, 23, {})


# ---- prompts that do not fit ----


def test_truncate_prompt_keeps_first_token_and_end():
    assert truncate_prompt([1, 2, 3, 4], 4) == [1, 2, 3, 4]
    assert truncate_prompt([1, 2, 3, 4], 3) == [1, 3, 4]
    assert truncate_prompt([1, 2, 3, 4], 1) == [1]


@pytest.mark.parametrize("max_columns", [1, 700])
def test_choose_letters_of_truncated_prompts_counts_them(engine, max_columns):
    task = Letters(words=9)
    lengths = [len(render_for_completion(task[i], engine.tokenizer)) for i in ALL]
    graded = choose_letters(engine, task, ALL, max_columns=max_columns)
    graded.sort(key=lambda completion: completion.problem)
    assert [completion.cut for completion in graded] == [length > CONTEXT for length in lengths]
    assert texts(graded) == {(i, 0): letter for i, letter in enumerate(naive_letters(engine, task))}
    assert 0 < evaluate_task(engine, "Letters", task, CPU).cut == sum(length > CONTEXT for length in lengths) < 23


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens, max_prompt", [(28, 100), (64, 64), (1000, 64)])
def test_grade_completions_of_truncated_prompts_leaves_room(engine, monkeypatch, max_tokens, max_prompt):
    task = Written(words=9)
    lengths = [len(render_for_completion(task[i], engine.tokenizer)) for i in ALL]
    requests = []
    stream = Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda self, some: requests.extend(some) or stream(self, some))
    score = evaluate_task(engine, "Written", task, CPU, sampling=random_sampling(2, max_tokens=max_tokens))
    prompt_lengths = [len(request.prompt) for request in requests]
    assert prompt_lengths == sorted((min(length, max_prompt) for length in lengths * 2), reverse=True)
    assert all(request.prompt[0] == engine.tokenizer.bos for request in requests)
    assert score.cut == sum(length > max_prompt for length in lengths) > 0


# ---- the record ----


def test_evaluate_task_records_every_completion(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_chat, "COMPLETIONS_AT_A_TIME", 10)  # several windows
    path = tmp_path / "folder" / "Written.jsonl"
    score = evaluate_task(engine, "Written", Written(words=9), CPU, sampling=random_sampling(3), record=path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keys = ["problem", "sample", "correct", "cut", "prompt", "answer", "reference", "finish"]
    assert all(list(line) == keys for line in lines)
    assert [(line["problem"], line["sample"]) for line in lines] == [(i, j) for i in ALL for j in range(3)]
    assert sum(line["correct"] for line in lines) == score.correct
    assert sum(line["cut"] for line in lines) == 3 * score.cut > 0
    for line in lines:
        messages = Written(words=9)[line["problem"]]["messages"]
        assert line["reference"] == messages[-1]["content"]
        assert line["prompt"].endswith(messages[0]["content"][-20:] + "<|user_end|><|assistant_start|>")
        assert line["correct"] == (line["answer"][:1] < "m") and line["finish"] in ("stop", "length")
    evaluate_task(engine, "Letters", Letters(), CPU, record=path)  # replaces the record
    assert json.loads(path.read_text().splitlines()[-1])["probabilities"]
    assert [file.name for file in path.parent.iterdir()] == ["Written.jsonl"]


def test_grade_completions_reports_progress(engine):
    reported = []
    grade_completions(engine, Written(), ALL, random_sampling(3), report=reported.append)
    assert reported == list(range(1, 70))


def test_evaluate_task_that_fails_keeps_the_old_record(engine, tmp_path):
    class Broken(Written):
        def is_correct(self, conversation, completion):
            raise RuntimeError("no sandbox")

    path = tmp_path / "Written.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="no sandbox"):
        evaluate_task(engine, "Written", Broken(), CPU, sampling=GREEDY, record=path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# ---- ranks ----


class Rank(Dist):
    """One of several ranks that run as threads."""

    def gather(self, value):
        self.shared[self.rank] = value
        self.barrier.wait()
        values = list(self.shared)
        self.barrier.wait()
        return values


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 30])  # with 30, some ranks have no questions
@pytest.mark.parametrize("kind", [Letters, Written])
def test_evaluate_task_on_ranks_equals_one_process(golden_tokenizer, tmp_path, monkeypatch, kind, world_size):
    monkeypatch.setattr(eval_chat, "COMPLETIONS_AT_A_TIME", 8)
    sampling = random_sampling(2, (2,), max_tokens=3)
    whole = evaluate_task(
        make_engine(golden_tokenizer), "a", kind(), CPU, sampling=sampling, record=tmp_path / "whole.jsonl"
    )
    monkeypatch.setattr(Rank, "shared", [None] * world_size, raising=False)
    monkeypatch.setattr(Rank, "barrier", Barrier(world_size, timeout=60), raising=False)
    engines = [make_engine(golden_tokenizer) for _ in range(world_size)]

    def run(rank):
        dist = Rank(CPU.device, rank, world_size)
        return evaluate_task(engines[rank], "a", kind(), dist, sampling=sampling, record=tmp_path / "ranks.jsonl")

    with ThreadPoolExecutor(world_size) as pool:
        assert list(pool.map(run, range(world_size))) == [whole] * world_size
    records = []
    for name in ("whole", "ranks"):
        with (tmp_path / f"{name}.jsonl").open() as file:
            records.append([json.loads(line) | {"probabilities": None} for line in file])  # these differ by rounding
    assert records[0] == records[1]


def test_evaluate_task_takes_baseline_from_label(engine):
    assert evaluate_task(engine, "MMLU", limited(Letters(), 4), CPU).baseline == 0.25
    assert evaluate_task(engine, "Letters", limited(Letters(), 4), CPU).baseline == 0.0
