"""
Packing: golden batches, a linear scan as the reference, resume, ranks; conversations; the prefetch thread.

    python -m pytest tests/test_dataloader.py
"""

import threading
import time
from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from conftest import golden

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.conversation import render
from nanochat.dataloader import BestFit, PretrainLoader, conversation_steps, on_device, prefetch, pretrain_steps
from nanochat.dataset import RowGroups, split_shards
from nanochat.train import Step

BOS = 0


class Numbers:
    """A tokenizer of texts that are numbers already."""

    bos = BOS

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


class Units:
    """Row groups in memory that note which rank read what."""

    def __init__(self, units):
        self.units, self.read = units, Counter()

    def __len__(self):
        return len(self.units)

    def position(self, unit):
        return 0, unit

    def texts(self, unit):
        self.read[unit] += 1
        return self.units[unit]


def random_units(num_units, texts_per_unit, longest=40, seed=0):
    """Documents whose first number is their own, so that each can be recognized."""
    generator = np.random.default_rng(seed)
    serial = iter(range(1, 10**9))

    def text():
        filler = generator.integers(10**6, 2 * 10**6, generator.integers(0, longest))
        return " ".join(map(str, [next(serial), *filler]))

    return [[text() for _ in range(texts_per_unit)] for _ in range(num_units)]


def batches_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def serials(documents):
    return [int(document[1]) for document in documents]


# ---- pretraining ----


@pytest.mark.parametrize("split", ["train", "val"])
def test_golden_packing(golden_tokenizer, split):
    train, val = split_shards(golden("packing/data"))
    loader = PretrainLoader(golden_tokenizer, RowGroups(train if split == "train" else val), 4, 128)
    for x, y, position in torch.load(golden("packing/batches_B4_T128.pt"), weights_only=True)[split]:
        ours_x, ours_y = loader.batch()
        assert torch.equal(ours_x, x.long()) and torch.equal(ours_y, y.long())
        expected = {"shard": position["pq_idx"], "row_group": position["rg_idx"], "epoch": position["epoch"]}
        assert loader.position() == expected


def naive_rows(units, num_rows, row_length):
    """The definition: the first of the longest that fit, found by looking at all; else the shortest, cropped."""

    def documents():
        while True:
            for texts in units:
                for first in range(0, len(texts), dataloader.TEXTS_PER_CALL):
                    some = texts[first : first + dataloader.TEXTS_PER_CALL]
                    yield [[BOS, *ids] for ids in Numbers().encode_batch(some)]

    source, waiting, rows = documents(), [], []
    for _ in range(num_rows):
        row = []
        while len(row) < row_length:
            while len(waiting) < dataloader.MIN_WAITING:
                waiting.extend(next(source))
            room = row_length - len(row)
            fitting = [len(document) for document in waiting if len(document) <= room]
            length = max(fitting) if fitting else min(len(document) for document in waiting)
            best = next(i for i, document in enumerate(waiting) if len(document) == length)
            row += waiting.pop(best)[:room]
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("units, texts, longest, length", [(3, 700, 40, 64), (1, 130, 100, 33), (5, 300, 200, 50)])
def test_packing_equals_a_linear_scan(units, texts, longest, length):
    units = random_units(units, texts, longest)
    loader = PretrainLoader(Numbers(), Units(units), 6, length)
    expected = naive_rows(units, 24, length + 1)
    for i in range(4):
        x, y = loader.batch()
        rows = expected[6 * i : 6 * i + 6]
        assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:])
        assert (x[:, 0] == BOS).all()


def test_best_fit_takes_the_oldest_among_equals():
    waiting = BestFit(["bb", "a", "cc", "dddd"])
    assert [waiting.pop_longest(3), waiting.pop_longest(3), waiting.pop_longest(0)] == ["bb", "cc", None]
    assert [waiting.pop_shortest(), waiting.pop_shortest(), len(waiting)] == ["a", "dddd", 0]


@pytest.mark.parametrize("after", [0, 1, 2, 7])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_resumed_batches_are_bitwise_the_same(after, rank, world_size):
    units = random_units(7, 333)
    loader = PretrainLoader(Numbers(), Units(units), 4, 48, rank, world_size)
    peer = PretrainLoader(Numbers(), Units(units), 4, 48, 1 - rank, world_size) if world_size > 1 else None
    for _ in range(after):
        loader.batch()
    states = [loader.state()] if peer is None else [peer.state(), loader.state()]
    again = PretrainLoader(Numbers(), Units(units), 4, 48, rank, world_size, states)
    for _ in range(12):
        assert batches_equal(loader.batch(), again.batch())
        assert loader.position() == again.position()


def test_more_ranks_than_row_groups_share_their_texts():
    units = random_units(2, 50)
    shares = []
    for rank in range(5):
        loader = PretrainLoader(Numbers(), Units(units), 2, 32, rank, 5)
        x, _ = loader.batch()
        assert (x[:, 0] == BOS).all()
        shares.append({tuple(document) for document in loader.waiting.documents.values()})
    for a, b in combinations(shares, 2):
        assert not a & b


def test_no_text_for_a_rank_is_an_error_and_no_endless_search():
    with pytest.raises(UserError, match="no text for this rank"):
        PretrainLoader(Numbers(), Units([["1 2"], []]), 2, 32, 1, 2).batch()
    with pytest.raises(UserError, match="no text for this rank"):
        PretrainLoader(Numbers(), Units([[], []]), 2, 32).batch()


def test_a_place_in_other_shards_is_refused():
    state = PretrainLoader(Numbers(), Units(random_units(3, 50)), 2, 32).state()
    with pytest.raises(UserError, match="other shards"):
        PretrainLoader(Numbers(), Units(random_units(4, 50)), 2, 32, states=[state])


def test_ranks_read_disjoint_row_groups_and_together_all():
    units = random_units(12, 400)
    seen = []
    for rank in range(3):
        row_groups = Units(units)
        loader = PretrainLoader(Numbers(), row_groups, 4, 64, rank, 3)
        while loader.unit < 12:
            loader.batch()
        seen.append({unit for unit in row_groups.read if unit % 3 == rank})
        assert all(unit % 3 == rank for unit in row_groups.read)
    assert sorted(set().union(*seen)) == list(range(12))


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3), (4, 2)])
def test_another_number_of_ranks_loses_no_document(before, after):
    units = random_units(24, 300)
    loaders = [PretrainLoader(Numbers(), Units(units), 4, 64, rank, before) for rank in range(before)]
    trained, num_hidden = set(), 0

    def train(loader):
        nonlocal num_hidden
        x, y = loader.batch()
        trained.update(x.flatten().tolist(), y.flatten().tolist())
        num_hidden += int((y[:, -1] == BOS).sum())  # a document cropped to its BOS does not show its number

    for rank, loader in enumerate(loaders):
        for _ in range(5 + 20 * rank):  # some far ahead of the others
            train(loader)
    waiting = [serial for loader in loaders for serial in serials(loader.waiting.documents.values())]
    states = [loader.state() for loader in loaders]
    again = [PretrainLoader(Numbers(), Units(units), 4, 64, rank, after, states) for rank in range(after)]
    dealt = [serial for loader in again for serial in serials(loader.waiting.documents.values())]
    assert sorted(dealt) == sorted(waiting)
    for loader in again:  # what was neither trained nor waits is still to be read
        while loader.unit < len(units):
            train(loader)
    waiting_now = {serial for loader in again for serial in serials(loader.waiting.documents.values())}
    everything = {int(text.split()[0]) for texts in units for text in texts}
    assert len(everything - trained - waiting_now) <= num_hidden


def test_pretrain_steps_count_what_the_loss_is_divided_by():
    loader = PretrainLoader(Numbers(), Units(random_units(2, 600)), 3, 16, rank=1, world_size=2)
    steps = list(pretrain_steps(loader, accumulation=4, num_iterations=10, first=7))
    assert [step.progress for step in steps] == [0.7, 0.8, 0.9]
    for step in steps:
        assert step.num_tokens == 3 * 16 * 4 * 2 and len(step.micro_batches) == 4
        assert {num_targets for _, _, num_targets in step.micro_batches} == {step.num_tokens}
    assert torch.equal(steps[-1].data_state["waiting"], loader.state()["waiting"])


# ---- conversations ----


def conversations(count, longest=60, seed=0):
    """Each says its own number, so that it can be found again; a few have an empty reply: only the end is learned."""
    generator = np.random.default_rng(seed)

    def words(n):
        return " ".join(generator.choice(["apple", "pear", "plum", "fig"], n))

    return [
        {
            "messages": [
                {"role": "user", "content": f"{i}: {words(generator.integers(1, longest))}"},
                {"role": "assistant", "content": words(generator.integers(0, longest))},
            ]
        }
        for i in range(count)
    ]


def rows_of(step):
    """The rows of a step: inputs and the last target on."""
    return [(x, y) for xs, ys, _ in step.micro_batches for x, y in zip(xs, ys, strict=True)]


def texts_in(steps, bos):
    """All conversations in the steps' inputs, as tuples of ids; what follows the last is padding."""
    found = Counter()
    for step in steps:
        for x, _ in rows_of(step):
            ids = x.tolist()
            starts = [i for i, token in enumerate(ids) if token == bos] + [len(ids)]
            found.update(tuple(ids[i:j]) for i, j in zip(starts, starts[1:], strict=False))
    return found


def step_list(data, tokenizer, batch=2, length=200, accumulation=2, **options):
    return list(conversation_steps(data, tokenizer, batch, length, accumulation, **options))


def test_every_conversation_is_trained_whole_once(golden_tokenizer):
    data = conversations(300)
    rendered = [render(conversation, golden_tokenizer) for conversation in data]
    assert max(len(ids) for ids, _ in rendered) <= 600
    steps = step_list(data, golden_tokenizer, length=600)
    found = texts_in(steps, golden_tokenizer.bos)
    for ids, _ in rendered:
        # a row's last token is target only, so that of a conversation that ends there is not among the inputs
        assert found[tuple(ids)] + found[tuple(ids[:-1])] == 1
    learned = Counter(token for step in steps for _, y in rows_of(step) for token in y[y >= 0].tolist())
    expected = Counter(token for ids, mask in rendered for token, m in zip(ids, mask, strict=True) if m)
    assert learned == expected
    assert steps[-1].data_state["truncated"] == 0


def test_targets_are_supervised_tokens_only_and_follow_their_inputs(golden_tokenizer):
    for step in step_list(conversations(40), golden_tokenizer):
        for x, y in rows_of(step):
            both = y[:-1] >= 0
            assert torch.equal(x[1:][both], y[:-1][both])
            assert not (y == golden_tokenizer.bos).any()  # neither padding nor the start of the next one
            assert not (y == golden_tokenizer.special("<|user_start|>")).any()


def test_too_long_conversations_are_cut_at_the_row_and_counted(golden_tokenizer):
    data = conversations(50)
    lengths = [len(render(conversation, golden_tokenizer)[0]) for conversation in data]
    length = sorted(lengths)[30]
    steps = step_list(data, golden_tokenizer, length=length)
    assert steps[-1].data_state["truncated"] == sum(n > length + 1 for n in lengths) > 0
    assert str(steps[-1].data_state["truncated"]) in steps[-1].position
    starts = sum(int((x == golden_tokenizer.bos).sum()) for step in steps for x, _ in rows_of(step))
    assert starts >= len(data) - sum(step.num_tokens // length - len(rows_of(step)) for step in steps)


def test_every_supervised_token_of_a_step_weighs_the_same(golden_tokenizer):
    for step in step_list(conversations(60), golden_tokenizer):
        supervised = sum(int((y >= 0).sum()) for _, y, _ in step.micro_batches)
        assert {num_targets for *_, num_targets in step.micro_batches} == {supervised}
        assert all((y >= 0).any() for _, y, _ in step.micro_batches)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_have_the_rows_of_one(golden_tokenizer, world_size):
    data = conversations(120)
    alone = step_list(data, golden_tokenizer, accumulation=4)
    ranks = [
        step_list(data, golden_tokenizer, accumulation=4 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(steps) for steps in ranks} == {len(alone)}
    for step, *parts in zip(alone, *ranks, strict=True):
        micro_batches = [micro_batch for part in parts for micro_batch in part.micro_batches]
        assert len(micro_batches) == len(step.micro_batches)
        for ours, theirs in zip(step.micro_batches, micro_batches, strict=True):
            assert batches_equal(ours[:2], theirs[:2]) and ours[2] == theirs[2]
        assert {part.progress for part in parts} == {step.progress}
        assert {part.num_tokens for part in parts} == {step.num_tokens}


@pytest.mark.parametrize("num_iterations", [-1, 25])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_resumed_fine_tuning_is_bitwise_the_same(golden_tokenizer, after, num_iterations):
    data = conversations(330)
    steps = step_list(data, golden_tokenizer, num_iterations=num_iterations)
    again = step_list(data, golden_tokenizer, num_iterations=num_iterations, state=steps[after - 1].data_state)
    assert len(again) == len(steps) - after > 0
    for one, other in zip(steps[after:], again, strict=True):
        assert one.progress == other.progress and one.data_state == other.data_state
        for ours, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
            assert batches_equal(ours[:2], theirs[:2]) and ours[2] == theirs[2]


@pytest.mark.parametrize("num_iterations", [-1, 3, 40])
def test_progress_grows_from_0_and_stays_below_1(golden_tokenizer, num_iterations):
    steps = step_list(conversations(90), golden_tokenizer, num_iterations=num_iterations)
    progress = [step.progress for step in steps]
    assert progress[0] == 0 and progress == sorted(progress) and progress[-1] < 1
    if num_iterations > 0:
        assert len(steps) == num_iterations


def test_steps_may_take_several_passes(golden_tokenizer):
    data = conversations(20)
    steps = step_list(data, golden_tokenizer, length=600, num_iterations=40)
    passes = steps[-1].data_state["next"] // len(data)
    assert passes > 2
    found = Counter()
    for ids, count in texts_in(steps, golden_tokenizer.bos).items():
        found[ids[:5]] += count
    times = [found[tuple(render(conversation, golden_tokenizer)[0][:5])] for conversation in data]
    assert passes - 1 <= min(times) and max(times) <= passes + 1  # all are seen equally often


def test_a_batch_without_a_target_is_skipped(golden_tokenizer):
    silent = [{"messages": [{"role": "user", "content": "apple " * 100}]}] * 3
    answer = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fig"}]
    with pytest.raises(UserError, match="reply to learn from"):
        step_list(silent, golden_tokenizer, length=64)
    (step,) = step_list([*silent, {"messages": answer}], golden_tokenizer, batch=1, length=64, accumulation=1)
    assert step.micro_batches[0][2] > 0 and step.data_state["truncated"] == 3


# ---- prefetch ----


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_prefetch_keeps_the_order():
    assert list(prefetch(iter(range(100)))) == list(range(100))
    assert list(prefetch(iter([]))) == []


def test_prefetch_raises_the_exception_in_its_place():
    def broken():
        yield 1
        yield 2
        raise ValueError("bad shard")

    got = []
    with pytest.raises(ValueError, match="bad shard"):
        for item in prefetch(broken()):
            got.append(item)
    assert got == [1, 2]


def test_prefetch_runs_ahead_but_not_far():
    made = []

    def source():
        for i in range(50):
            made.append(i)
            yield i

    items = prefetch(source(), size=3)
    assert next(items) == 0
    assert wait_until(lambda: len(made) == 3)
    time.sleep(0.05)
    assert len(made) == 3
    items.close()


def test_prefetch_stops_its_thread_when_the_consumer_leaves():
    before = set(threading.enumerate())
    items = prefetch(iter(range(10**9)))
    assert list(islice(items, 5)) == [0, 1, 2, 3, 4]
    assert set(threading.enumerate()) - before
    items.close()
    assert wait_until(lambda: not set(threading.enumerate()) - before)


def test_on_device_moves_tensors_and_keeps_the_rest():
    x = torch.arange(6).view(2, 3)
    (step,) = on_device(iter([Step([(x, x + 1, 6)], 0.5, 6, {"unit": 1}, "here")]), torch.device("cpu"))
    ((inputs, targets, num_targets),) = step.micro_batches
    assert torch.equal(inputs, x) and torch.equal(targets, x + 1) and num_targets == 6
    assert (step.progress, step.num_tokens, step.data_state, step.position) == (0.5, 6, {"unit": 1}, "here")
