"""
Examinations: both kinds of answers, several to a question, prompts that do not fit, the record, ranks that share the
work.

    python -m pytest tests/test_eval_chat.py
"""

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from factories import FAMILY

from nanochat.conversation import render_for_completion
from nanochat.distributed import Dist
from nanochat.engine import Engine, Request
from nanochat.eval import chat as module
from nanochat.eval.chat import batches, choose, evaluate, fit, last_states, write
from nanochat.eval.metrics import wilson
from nanochat.gpt import GPT, GPTConfig
from nanochat.rollout import pass_at_k
from tasks.common import Task, limited

CPU = Dist(torch.device("cpu"))
CONTEXT = 128
SHORT = Request([], max_tokens=5, temperature=0.0)


def make_engine(tokenizer, **config):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    model = GPT(GPTConfig(CONTEXT, tokenizer.vocab_size, **(sizes | config)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Engine(model, tokenizer, num_rows=4)


@pytest.fixture(scope="module")
def engine(golden_tokenizer):
    return make_engine(golden_tokenizer)


class Choice(Task):
    """Questions of many lengths, with two to five letters."""

    kind = "categorical"

    def __init__(self, num_questions=23, words=1):
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


class Written(Choice):
    """A text is right if its first character comes before "m"."""

    kind = "generative"

    def is_correct(self, conversation, completion):
        return completion[:1] < "m"


@torch.no_grad()
def naive_choices(engine, task):
    """One question at a time, with all logits of the whole vocabulary."""
    found = []
    for conversation in (task[i] for i in range(len(task))):
        prompt = fit(render_for_completion(conversation, engine.tokenizer), CONTEXT)
        logits = engine.model(torch.tensor([prompt]))[0, -1]
        scores = {letter: logits[engine.tokenizer.encode(letter)[0]].item() for letter in conversation["letters"]}
        found.append(max(scores, key=scores.get))
    return found


def texts(answers):
    return {(answer.problem, answer.sample): answer.answer for answer in answers}


# ---- multiple choice ----


@pytest.mark.parametrize("vintage", FAMILY)
@pytest.mark.parametrize("n_layer", [1, 2, 4])
def test_the_state_of_the_last_column_is_that_of_a_whole_forward_pass(golden_tokenizer, vintage, n_layer):
    model = make_engine(golden_tokenizer, **FAMILY[vintage], n_layer=n_layer).model
    rows = [[random.Random(i).randrange(model.config.vocab_size) for _ in range(n)] for i, n in enumerate((1, 40, 128))]
    with torch.no_grad():
        for row, state in zip(rows, last_states(model, rows), strict=True):
            torch.testing.assert_close(state, model.hidden(torch.tensor([row]))[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_columns", [1, 300, 100_000])
def test_batched_choices_equal_one_at_a_time(engine, max_columns):
    expected = naive_choices(engine, Choice())
    assert len(set(expected)) > 2
    answers = sorted(choose(engine, Choice(), range(23), max_columns), key=lambda answer: answer.problem)
    assert [answer.answer for answer in answers] == expected
    references = [Choice()[i]["messages"][-1]["content"] for i in range(23)]
    assert [answer.correct for answer in answers] == [a == b for a, b in zip(expected, references, strict=True)]
    for i, answer in enumerate(answers):
        probabilities = answer.details["probabilities"]
        assert "".join(probabilities) == Choice()[i]["letters"]  # on offer, and no others
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-3)
        assert max(probabilities, key=probabilities.get) == answer.answer


def test_batches_hold_each_prompt_once_within_the_budget():
    prompts = [[0] * random.Random(i).randrange(1, 60) for i in range(200)] + [[0] * 500]
    found = list(batches(prompts, 256))
    assert sorted(i for batch in found for i in batch) == list(range(201))
    assert all(len(batch) * max(len(prompts[i]) for i in batch) <= 256 for batch in found if len(batch) > 1)
    assert len(found) < 2 * sum(map(len, prompts)) / 256
    assert list(batches([], 256)) == []


# ---- written answers ----


def test_written_answers_are_judged_by_the_task(engine):
    score = evaluate(engine, "Written", Written(), CPU, SHORT)
    answers = write(engine, Written(), range(23), SHORT)
    assert score.correct == sum(answer.answer[:1] < "m" for answer in answers) and 0 < score.correct < 23
    prompts = [render_for_completion(Written()[i], engine.tokenizer) for i in range(23)]
    plain = engine.generate([Request(prompt, 5, temperature=0.0) for prompt in prompts])
    assert texts(answers) == {(i, 0): engine.tokenizer.decode(each.tokens) for i, each in enumerate(plain)}


def test_answers_are_judged_at_the_same_time(engine):
    everyone = Barrier(module.JUDGES, timeout=30)

    class Patient(Written):
        def grade(self, conversation, completion):
            everyone.wait()
            return {"correct": True, "waited": 1}

    answers = write(engine, Patient(module.JUDGES * 2), range(module.JUDGES * 2), SHORT)
    assert all(answer.correct and answer.details["waited"] for answer in answers)


def test_sampled_answers_have_a_seed_of_their_own(engine):
    class Same(Written):
        def __getitem__(self, index):
            return super().__getitem__(0)

    answers = write(engine, Same(), range(23), Request([], 5, temperature=1.0), 3)
    assert len(answers) == 69 and len(set(texts(answers).values())) > 50


def test_what_is_sampled_depends_on_nothing_but_the_question(engine):
    settings = Request([], 5, temperature=1.0, top_k=50)
    whole = texts(write(engine, Written(), range(23), settings, 2))
    some = texts(write(engine, Written(), range(1, 23, 2), settings, 2))
    assert some == {key: text for key, text in whole.items() if key[0] % 2}


def test_pass_at_k_of_several_answers(engine):
    score = evaluate(engine, "Written", Written(), CPU, Request([], 5, temperature=1.0), 4, [1, 2, 4])
    right = Counter()
    for answer in write(engine, Written(), range(23), Request([], 5, temperature=1.0), 4):
        right[answer.problem] += answer.correct
    assert (score.correct, score.total, score.num_samples) == (sum(right.values()), 23, 4)
    assert score.accuracy == pytest.approx(score.pass_at[1]) == pytest.approx(sum(right.values()) / 92)
    assert score.pass_at[4] == pytest.approx(sum(right[i] > 0 for i in range(23)) / 23)
    for k in (1, 2, 4):
        assert score.pass_at[k] == pytest.approx(sum(pass_at_k(4, right[i], k) for i in range(23)) / 23)
    assert score.interval == wilson(score.accuracy, 23)  # not of 92: answers to one question are alike


def test_choices_have_one_answer_and_no_pass_at_k(engine):
    score = evaluate(engine, "Choice", Choice(), CPU, Request([], 5, temperature=1.0), 4, [1, 4])
    assert (score.num_samples, score.total, score.pass_at) == (1, 23, {})


# ---- prompts that do not fit ----


def test_a_prompt_is_cut_after_its_first_token():
    assert fit([1, 2, 3, 4], 4) == [1, 2, 3, 4]
    assert fit([1, 2, 3, 4], 3) == [1, 3, 4]
    assert fit([1, 2, 3, 4], 1) == [1]


@pytest.mark.parametrize("max_columns", [1, 700])
def test_cut_choices_are_answered_and_counted(engine, max_columns):
    task = Choice(words=9)
    lengths = [len(render_for_completion(task[i], engine.tokenizer)) for i in range(23)]
    answers = choose(engine, task, range(23), max_columns)
    assert [a.cut for a in sorted(answers, key=lambda a: a.problem)] == [length > CONTEXT for length in lengths]
    assert texts(answers) == {(i, 0): letter for i, letter in enumerate(naive_choices(engine, task))}
    assert 0 < evaluate(engine, "Choice", task, CPU).cut == sum(length > CONTEXT for length in lengths) < 23


@pytest.mark.parametrize("max_tokens, room", [(28, 100), (64, 64), (1000, 64)])
def test_cut_prompts_leave_room_for_the_answer_and_that_for_them(engine, monkeypatch, max_tokens, room):
    task = Written(23, 9)
    lengths = [len(render_for_completion(task[i], engine.tokenizer)) for i in range(23)]
    requests = []
    stream = Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda self, some: requests.extend(some) or stream(self, some))
    score = evaluate(engine, "Written", task, CPU, Request([], max_tokens, temperature=1.0), 2)
    read = [len(request.prompt) for request in requests]
    assert read == sorted((min(length, room) for length in lengths * 2), reverse=True)
    assert all(request.prompt[0] == engine.tokenizer.bos for request in requests)
    assert score.cut == sum(length > room for length in lengths) > 0


# ---- the record ----


def test_every_answer_is_on_record(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 10)  # several windows
    path = tmp_path / "folder" / "Written.jsonl"
    said = []
    settings = Request([], 5, temperature=1.0)
    score = evaluate(engine, "Written", Written(words=9), CPU, settings, 3, [], path, said.append)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["problem"], line["sample"]) for line in lines] == [(i, j) for i in range(23) for j in range(3)]
    assert sum(line["correct"] for line in lines) == score.correct
    assert sum(line["cut"] for line in lines) == 3 * score.cut > 0
    for line in lines:
        conversation = Written(words=9)[line["problem"]]
        assert line["reference"] == conversation["messages"][-1]["content"]
        assert line["prompt"].endswith(conversation["messages"][0]["content"][-20:] + "<|user_end|><|assistant_start|>")
        assert line["correct"] == (line["answer"][:1] < "m") and line["finish"] in ("stop", "length")
    assert said[-1] == 69 and said == sorted(said)
    evaluate(engine, "Choice", Choice(), CPU, record=path)  # another record takes its place
    assert json.loads(path.read_text().splitlines()[-1])["probabilities"]
    assert [file.name for file in path.parent.iterdir()] == ["Written.jsonl"]


def test_an_examination_that_fails_leaves_the_old_record(engine, tmp_path):
    class Broken(Written):
        def is_correct(self, conversation, completion):
            raise RuntimeError("no sandbox")

    path = tmp_path / "Written.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="no sandbox"):
        evaluate(engine, "Written", Broken(), CPU, SHORT, record=path)
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


@pytest.mark.parametrize("world_size", [2, 30])  # 30: some have nothing to do
@pytest.mark.parametrize("kind", [Choice, Written])
def test_ranks_share_the_work_and_agree(golden_tokenizer, tmp_path, monkeypatch, kind, world_size):
    monkeypatch.setattr(module, "WINDOW", 8)
    settings = Request([], 3, temperature=1.0)
    whole = evaluate(make_engine(golden_tokenizer), "a", kind(), CPU, settings, 2, [2], tmp_path / "whole.jsonl")
    monkeypatch.setattr(Rank, "shared", [None] * world_size, raising=False)
    monkeypatch.setattr(Rank, "barrier", Barrier(world_size, timeout=60), raising=False)
    engines = [make_engine(golden_tokenizer) for _ in range(world_size)]

    def run(rank):
        dist = Rank(CPU.device, rank, world_size)
        return evaluate(engines[rank], "a", kind(), dist, settings, 2, [2], tmp_path / "ranks.jsonl")

    with ThreadPoolExecutor(world_size) as pool:
        assert list(pool.map(run, range(world_size))) == [whole] * world_size
    records = [
        [json.loads(line) | {"probabilities": None} for line in (tmp_path / f"{name}.jsonl").open()]  # all but rounding
        for name in ("whole", "ranks")
    ]
    assert records[0] == records[1]


def test_baselines_belong_to_the_names(engine):
    assert evaluate(engine, "MMLU", limited(Choice(), 4), CPU).baseline == 0.25
    assert evaluate(engine, "Choice", limited(Choice(), 4), CPU).baseline == 0.0
