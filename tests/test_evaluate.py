"""
Examinations: intervals, both kinds of answers, prompts that do not fit, ranks that share the work.

    python -m pytest tests/test_evaluate.py
"""

import pytest
import torch

from nanochat.conversation import render_for_completion
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from tasks.common import Task
from tasks.evaluate import Score, count_categorical, count_generative, evaluate, fit

CPU = Dist(torch.device("cpu"))
CONTEXT = 128


@pytest.fixture(scope="module")
def engine(golden_tokenizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(CONTEXT, golden_tokenizer.vocab_size, 2, 2, 1, 32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Engine(model, golden_tokenizer, num_rows=4)


class Choice(Task):
    """Questions of many lengths; the second half of the letters is right more often than chance has it."""

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
    """A text is right if its first character comes before "m"; notes what it was asked to judge."""

    kind = "generative"

    def __init__(self, *options):
        super().__init__(*options)
        self.judged = []

    def is_correct(self, conversation, completion):
        self.judged.append((conversation["messages"][0]["content"], completion))
        return completion[:1] < "m"


@torch.no_grad()
def naive_categorical(engine, task):
    """One question at a time, without padding."""
    correct = []
    for conversation in (task[i] for i in range(len(task))):
        prompt = fit(render_for_completion(conversation, engine.tokenizer), CONTEXT)
        logits = engine.model(torch.tensor([prompt]))[0, -1]
        scores = {letter: logits[engine.tokenizer.encode(letter)[0]].item() for letter in conversation["letters"]}
        correct.append(max(scores, key=scores.get) == conversation["messages"][-1]["content"])
    return correct


# ---- the interval ----


@pytest.mark.parametrize(
    "correct, total, low, high",  # 95 % Wilson intervals, e.g. Brown, Cai, DasGupta 2001 (doi 10.1214/ss/1009213286)
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25528, 0.36620)],
)
def test_wilsons_interval(correct, total, low, high):
    assert Score(correct, total).interval == pytest.approx((low, high), abs=1e-4)
    assert Score(correct, total).accuracy == correct / total


# ---- multiple choice ----


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batched_choices_equal_one_at_a_time(engine, batch_size):
    expected = naive_categorical(engine, Choice())
    assert 0 < sum(expected) < len(expected)
    assert count_categorical(engine, Choice(), range(23), batch_size) == (sum(expected), 0)
    assert evaluate(engine, Choice(), CPU, batch_size) == Score(sum(expected), 23)


def test_only_the_letters_on_offer_count(engine, golden_tokenizer):
    class One(Choice):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"letters": super().__getitem__(index)["messages"][-1]["content"]}

    assert count_categorical(engine, One(), range(23), 4) == (23, 0)


# ---- written answers ----


def test_written_answers_are_judged_by_the_task(engine):
    task = Written()
    score = evaluate(engine, task, CPU, max_tokens=5)
    questions = [task[i]["messages"][0]["content"] for i in range(23)]
    assert [question for question, _ in task.judged] == questions
    assert score == Score(sum(text[:1] < "m" for _, text in task.judged), 23)
    again = Written()
    evaluate(engine, again, CPU, max_tokens=5)
    assert again.judged == task.judged


def test_sampled_answers_have_a_seed_of_their_own(engine):
    class Same(Written):
        def __getitem__(self, index):
            return super().__getitem__(0)

    task = Same()
    evaluate(engine, task, CPU, max_tokens=5, temperature=1.0)
    assert len(set(task.judged)) > 15


# ---- prompts that do not fit ----


def test_a_prompt_is_cut_after_its_first_token():
    assert fit([1, 2, 3, 4], 4) == [1, 2, 3, 4]
    assert fit([1, 2, 3, 4], 3) == [1, 3, 4]
    assert fit([1, 2, 3, 4], 1) == [1]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_cut_choices_are_answered_and_counted(engine, batch_size):
    task = Choice(words=9)
    lengths = [len(render_for_completion(task[i], engine.tokenizer)) for i in range(23)]
    num_cut = sum(length > CONTEXT for length in lengths)
    assert 0 < num_cut < 23
    assert count_categorical(engine, task, range(23), batch_size) == (sum(naive_categorical(engine, task)), num_cut)


@pytest.mark.parametrize("max_tokens, room", [(28, 100), (64, 64), (1000, 64)])
def test_cut_prompts_leave_room_for_the_answer_and_that_for_them(engine, monkeypatch, max_tokens, room):
    task = Written(23, 9)
    lengths = [len(render_for_completion(task[i], engine.tokenizer)) for i in range(23)]
    requests = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, some: requests.extend(some) or generate(self, some))
    _, num_cut = count_generative(engine, task, range(23), max_tokens, 0.0)
    assert [len(request.prompt) for request in requests] == [min(length, room) for length in lengths]
    assert all(request.prompt[0] == engine.tokenizer.bos for request in requests)
    assert num_cut == sum(length > room for length in lengths) > 0


# ---- ranks ----


class Rank(Dist):
    """One of several ranks, whose sums are its own part."""

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("world_size", [2, 3, 30])  # 30: some have nothing to do
@pytest.mark.parametrize("kind", [Choice, Written])
def test_the_ranks_parts_add_up(engine, kind, world_size):
    whole = evaluate(engine, kind(), CPU, 4, max_tokens=3)
    parts = [evaluate(engine, kind(), Rank(CPU.device, rank, world_size), 4, 3) for rank in range(world_size)]
    assert whole == Score(*(sum(getattr(part, name) for part in parts) for name in ("correct", "total", "cut")))


def test_sampled_answers_do_not_depend_on_the_number_of_ranks(engine):
    whole, mine = Written(), Written()
    count_generative(engine, whole, range(23), 4, 1.0)
    count_generative(engine, mine, range(1, 23, 2), 4, 1.0)
    assert mine.judged == whole.judged[1::2]
