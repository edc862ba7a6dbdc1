"""
Data loaders: golden batches, packing against a linear scan, exact resume, ranks, conversations, prefetching.

    python -m pytest tests/test_dataloader.py
"""

import re
import threading
import time
from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from conftest import golden
from factories import wait_until, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.conversation import render
from nanochat.dataloader import ConversationLoader, PackingBuffer, PretrainLoader, StreamsLoader, prefetch, to_device
from nanochat.dataset import RowGroups, split_shards
from nanochat.distributed import Dist
from nanochat.train import Step

BOS = 0
CPU = torch.device("cpu")


class NumberTokenizer:
    """A tokenizer for texts that are token ids already."""

    bos = BOS

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


class InMemoryRowGroups:
    """Stands in for dataset.RowGroups and counts the reads of each row group."""

    def __init__(self, row_groups):
        self.row_groups, self.reads = row_groups, Counter()

    def __len__(self):
        return len(self.row_groups)

    def locate(self, index):
        return 0, index

    def texts(self, index):
        self.reads[index] += 1
        return self.row_groups[index]


def pretrain_loader(row_groups, batch_size, sequence_len, *, rank=0, world_size=1, states=()):
    return PretrainLoader(
        NumberTokenizer(),
        InMemoryRowGroups(row_groups) if isinstance(row_groups, list) else row_groups,
        batch_size=batch_size,
        sequence_len=sequence_len,
        dist=Dist(CPU, rank, world_size),
        states=states,
    )


def random_row_groups(num_row_groups, texts_per_row_group, longest=40, seed=0):
    """Texts that start with a serial number, by which a document is recognised in a batch."""
    generator = np.random.default_rng(seed)
    serial_numbers = iter(range(1, 10**9))

    def text():
        filler = generator.integers(10**6, 2 * 10**6, generator.integers(0, longest))
        return " ".join(map(str, [next(serial_numbers), *filler]))

    return [[text() for _ in range(texts_per_row_group)] for _ in range(num_row_groups)]


def serial_numbers(documents):
    return [int(document[1]) for document in documents]


def assert_same_batch(batch, expected):
    for tensor, expected_tensor in zip(batch, expected, strict=True):
        assert torch.equal(tensor, expected_tensor)


def assert_same_step(step, expected):
    assert (step.progress, step.num_tokens, step.position) == (
        expected.progress,
        expected.num_tokens,
        expected.position,
    )
    for (x, y, num_targets), (x_expected, y_expected, num_expected) in zip(
        step.micro_batches, expected.micro_batches, strict=True
    ):
        assert_same_batch((x, y), (x_expected, y_expected))
        assert num_targets == num_expected


# ---- the packing buffer ----


def test_packing_buffer_equal_lengths_returns_oldest():
    buffer = PackingBuffer(["bb", "a", "cc", "dddd"])
    assert [buffer.pop_longest(3), buffer.pop_longest(3), buffer.pop_longest(0)] == ["bb", "cc", None]
    assert [buffer.pop_shortest(), buffer.pop_shortest(), len(buffer)] == ["a", "dddd", 0]


@given(st.lists(st.tuples(st.sampled_from(["add", "longest", "shortest"]), st.integers(1, 12)), max_size=60))
def test_packing_buffer_any_operations_equals_linear_scan(operations):
    buffer, expected = PackingBuffer(), []
    for serial_number, (operation, length) in enumerate(operations):
        if operation == "add":
            document = [serial_number] * length
            buffer.add(document, length)
            expected.append(document)
        elif operation == "longest":
            fitting = [document for document in expected if len(document) <= length]
            best = max(fitting, key=len, default=None)  # the first of the longest
            if best is not None:
                expected.remove(best)
            assert buffer.pop_longest(length) == best
        elif expected:
            best = min(expected, key=len)
            expected.remove(best)
            assert buffer.pop_shortest() == best
        assert list(buffer) == expected


# ---- pretraining ----


@pytest.mark.parametrize("split", ["train", "val"])
def test_pretrain_loader_golden_shards_gives_golden_batches(golden_tokenizer, split):
    train, val = split_shards(golden("packing/data"))
    row_groups = RowGroups(train if split == "train" else val)
    loader = PretrainLoader(golden_tokenizer, row_groups, batch_size=4, sequence_len=128, dist=Dist(CPU))
    for x, y, position in torch.load(golden("packing/batches_B4_T128.pt"), weights_only=True)[split]:
        assert_same_batch(loader.next_batch(), (x.long(), y.long()))
        assert loader.position() == (position["pq_idx"], position["rg_idx"], position["epoch"])


def rows_by_linear_scan(row_groups, num_rows, row_length):
    """The definition of best fit: the first of the longest documents that fit, else the shortest one, cropped."""

    def batches_of_documents():
        while True:
            for texts in row_groups:
                for first in range(0, len(texts), dataloader.TEXTS_PER_CALL):
                    some_texts = texts[first : first + dataloader.TEXTS_PER_CALL]
                    yield [[BOS, *ids] for ids in NumberTokenizer().encode_batch(some_texts)]

    source, buffer, rows = batches_of_documents(), [], []
    for _ in range(num_rows):
        row = []
        while len(row) < row_length:
            while len(buffer) < dataloader.MIN_DOCUMENTS_IN_BUFFER:
                buffer.extend(next(source))
            room = row_length - len(row)
            fitting = [len(document) for document in buffer if len(document) <= room]
            length = max(fitting) if fitting else min(len(document) for document in buffer)
            best = next(i for i, document in enumerate(buffer) if len(document) == length)
            row += buffer.pop(best)[:room]
        rows.append(row)
    return torch.tensor(rows)


@settings(max_examples=15, deadline=None)
@given(
    num_row_groups=st.integers(1, 5),
    texts_per_row_group=st.integers(100, 500),
    longest=st.integers(2, 200),
    sequence_len=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
def test_pretrain_loader_any_lengths_equals_linear_scan(
    num_row_groups, texts_per_row_group, longest, sequence_len, seed
):
    row_groups = random_row_groups(num_row_groups, texts_per_row_group, longest, seed)
    loader = pretrain_loader(row_groups, 6, sequence_len)
    expected = rows_by_linear_scan(row_groups, 12, sequence_len + 1)
    for first in (0, 6):
        x, y = loader.next_batch()
        rows = expected[first : first + 6]
        assert_same_batch((x, y), (rows[:, :-1], rows[:, 1:]))
        assert (x[:, 0] == BOS).all()


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(longest=st.integers(2, 200), sequence_len=st.integers(8, 80), seed=st.integers(0, 1000))
def test_pretrain_loader_one_epoch_neither_loses_nor_repeats_documents(longest, sequence_len, seed):
    row_groups = random_row_groups(2, 1500, longest, seed)
    ids_by_serial = {int(text.split()[0]): text.split() for texts in row_groups for text in texts}
    loader = pretrain_loader(row_groups, 1, sequence_len)  # a row at a time, so that no text of epoch 2 is read
    found, num_hidden = Counter(), 0
    while loader.row_group < 2:
        x, y = loader.next_batch()
        for row in torch.cat([x, y[:, -1:]], dim=1).tolist():
            starts = [i for i, token in enumerate(row) if token == BOS] + [len(row)]
            for start, end in zip(starts, starts[1:], strict=False):
                document = row[start + 1 : end]
                if not document:  # cropped to its BOS: its serial number does not show
                    num_hidden += 1
                    continue
                expected = [int(token) for token in ids_by_serial[document[0]]]
                assert document == expected[: len(document)]
                assert len(document) == len(expected) or end == len(row)  # only a row's last document is cropped
                found[document[0]] += 1
    found.update(serial_numbers(loader.buffer))
    num_read = len(found) + num_hidden
    assert set(found.values()) == {1}
    assert num_read >= len(ids_by_serial)
    assert len(ids_by_serial.keys() - found.keys()) <= num_hidden


@pytest.mark.parametrize("after", [0, 1, 2, 7])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_pretrain_loader_resumed_continues_bitwise(after, rank, world_size):
    row_groups = random_row_groups(7, 333)
    loaders = [pretrain_loader(row_groups, 4, 48, rank=r, world_size=world_size) for r in range(world_size)]
    loader = loaders[rank]
    for _ in range(after):
        loader.next_batch()
    states = [one.state() for one in loaders]
    resumed = pretrain_loader(row_groups, 4, 48, rank=rank, world_size=world_size, states=states)
    for _ in range(12):
        assert_same_batch(resumed.next_batch(), loader.next_batch())
        assert resumed.position() == loader.position()


def test_pretrain_loader_state_of_older_checkpoint_is_restored():
    """The keys and types of the data state are a file format."""
    documents = [[BOS, serial_number, 7, 7] for serial_number in range(1, 1001)]
    state = {
        "num_units": 2,
        "unit": 3,  # the second row group of the second epoch
        "texts_done": 128,
        "waiting": torch.tensor(documents, dtype=torch.int32).flatten(),
        "waiting_lengths": torch.full((1000,), 4),
    }
    row_groups = [["1"] * 10, [f"{2000 + i} 7 7" for i in range(256)]]
    loader = pretrain_loader(row_groups, 1, 7, states=[state])
    x, y = loader.next_batch()
    assert x.tolist() == [[BOS, 1, 7, 7, BOS, 2, 7]] and y.tolist() == [[1, 7, 7, BOS, 2, 7, 7]]
    assert serial_numbers(loader.buffer) == [*range(3, 1001), *range(2128, 2256)]
    assert loader.position() == (0, 1, 2)
    saved = loader.state()
    assert {key: saved[key] for key in ("num_units", "unit", "texts_done")} == {
        "num_units": 2,
        "unit": 4,
        "texts_done": 0,
    }
    assert saved["waiting"].dtype == torch.int32 and saved["waiting_lengths"].dtype == torch.int64
    assert len(saved["waiting"]) == saved["waiting_lengths"].sum() == 4 * len(loader.buffer)


def test_pretrain_loader_state_of_other_shards_is_refused():
    state = pretrain_loader(random_row_groups(3, 50), 2, 32).state()
    with pytest.raises(UserError, match="other shards"):
        pretrain_loader(random_row_groups(4, 50), 2, 32, states=[state])


def test_pretrain_loader_more_ranks_than_row_groups_splits_their_texts():
    row_groups = random_row_groups(2, 50)
    shares = []
    for rank in range(5):
        loader = pretrain_loader(row_groups, 2, 32, rank=rank, world_size=5)
        x, _ = loader.next_batch()
        assert (x[:, 0] == BOS).all()
        shares.append({tuple(document) for document in loader.buffer})
    for a, b in combinations(shares, 2):
        assert not a & b


@pytest.mark.parametrize("row_groups, rank, world_size", [([["1 2"], []], 1, 2), ([[], []], 0, 1)])
def test_pretrain_loader_rank_without_text_raises(row_groups, rank, world_size):
    with pytest.raises(UserError, match="no text for this rank"):
        pretrain_loader(row_groups, 2, 32, rank=rank, world_size=world_size).next_batch()


def test_pretrain_loader_ranks_read_disjoint_row_groups():
    row_groups = random_row_groups(12, 400)
    reads_by_rank = []
    for rank in range(3):
        source = InMemoryRowGroups(row_groups)
        loader = pretrain_loader(source, 4, 64, rank=rank, world_size=3)
        while loader.row_group < 12:
            loader.next_batch()
        assert all(index % 3 == rank for index in source.reads)
        reads_by_rank.append(set(source.reads))
    assert sorted(set().union(*reads_by_rank)) == list(range(12))


@pytest.mark.parametrize("row_groups", [random_row_groups(20, 400), random_row_groups(2, 4000)])
def test_streams_other_numbers_of_ranks_neither_skip_nor_repeat_documents(row_groups):
    """1 → 2 → 4 → 3 → 1 ranks from four streams. With two row groups, the streams share their texts."""
    states, trained, num_hidden = [], Counter(), 0
    for i, world_size in enumerate((4, 2, 1, 3, 4)):
        ranks = []
        for rank in range(world_size):
            loader = StreamsLoader(
                lambda n, states=states: pretrain_loader(row_groups, 1, 64, rank=n, world_size=4, states=states),
                num_streams=4, batch_size=2, dist=Dist(CPU, rank, world_size),
            )  # fmt: skip
            ranks.append(list(loader.steps(12 // world_size, num_steps=4 * i + 4, first_step=4 * i)))
        states = [state for steps in ranks for state in steps[-1].data_state["streams"]]
        for step in [step for steps in ranks for step in steps]:
            for x, y, num_targets in step.micro_batches:
                assert num_targets == step.num_tokens == 24 * 64
                for row in torch.cat([x, y[:, -1:]], dim=1).tolist():
                    starts = [i for i, token in enumerate(row) if token == BOS]
                    trained.update(row[start + 1] for start in starts if start < 64)
                    num_hidden += row[64] == BOS  # a document cropped to its BOS does not show its serial number
    streams = [pretrain_loader(row_groups, 1, 64, rank=n, world_size=4, states=states) for n in range(4)]
    trained.update(number for stream in streams for number in serial_numbers(stream.buffer))
    while any(stream.row_group < len(row_groups) for stream in streams):
        for stream in streams:
            if stream.row_group < len(row_groups):
                before = set(serial_numbers(stream.buffer))
                stream._refill()
                trained.update(set(serial_numbers(stream.buffer)) - before)
    assert set(trained.values()) == {1}
    assert 8000 - num_hidden <= len(trained) <= 8000


def test_pretrain_steps_from_first_step_have_progress_and_token_counts():
    loader = pretrain_loader(random_row_groups(2, 600), 3, 16, rank=1, world_size=2)
    steps = list(loader.steps(accumulation=4, num_steps=10, first_step=7))
    assert [step.progress for step in steps] == [0.7, 0.8, 0.9]
    for step in steps:
        assert step.num_tokens == 3 * 16 * 4 * 2 and len(step.micro_batches) == 4
        assert {num_targets for _, _, num_targets in step.micro_batches} == {step.num_tokens}
    assert torch.equal(steps[-1].data_state["waiting"], loader.state()["waiting"])
    assert steps[-1].position == "shard 0, row group 1, epoch 2"


# ---- conversations ----


def make_conversations(count, longest=60, seed=0):
    """Conversations that start with their own index; a few have an empty reply, of which only the end is trained on."""
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


def make_steps(conversations, tokenizer, *, batch_size=2, sequence_len=200, accumulation=2, num_steps=-1, **options):
    dist = Dist(CPU, options.get("rank", 0), options.get("world_size", 1))
    loader = ConversationLoader(
        tokenizer,
        conversations,
        batch_size=batch_size,
        sequence_len=sequence_len,
        dist=dist,
        states=options.get("states", ()),
    )
    return list(loader.steps(accumulation, num_steps))


def rows_of(step):
    """The (inputs, targets) rows of a step, over its micro-batches."""
    return [(x, y) for xs, ys, _ in step.micro_batches for x, y in zip(xs, ys, strict=True)]


def count_documents(steps, bos):
    """All documents in the steps' inputs, as tuples of ids. What follows the last one of a row is padding."""
    found = Counter()
    for step in steps:
        for x, _ in rows_of(step):
            ids = x.tolist()
            starts = [i for i, token in enumerate(ids) if token == bos] + [len(ids)]
            found.update(tuple(ids[i:j]) for i, j in zip(starts, starts[1:], strict=False))
    return found


def count_targets(steps):
    return Counter(token for step in steps for _, y in rows_of(step) for token in y[y >= 0].tolist())


def count_supervised(rendered, sequence_len):
    """The tokens to train on, of conversations that are cut to a row of sequence_len + 1."""
    tokens = Counter()
    for ids, mask in rendered:
        tokens.update(token for token, m in list(zip(ids, mask, strict=True))[: sequence_len + 1] if m)
    return tokens


def test_conversation_loader_one_pass_contains_each_conversation_once(golden_tokenizer):
    conversations = make_conversations(300)
    rendered = [render(conversation, golden_tokenizer) for conversation in conversations]
    assert max(len(ids) for ids, _ in rendered) <= 600
    steps = make_steps(conversations, golden_tokenizer, sequence_len=600)
    found = count_documents(steps, golden_tokenizer.bos)
    for ids, _ in rendered:
        # The last token of a row is a target only, so a conversation that ends there is one shorter in the inputs.
        assert found[tuple(ids)] + found[tuple(ids[:-1])] == 1
    assert steps[-1].data_state["truncated"] == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 60),
    longest=st.integers(2, 80),
    sequence_len=st.integers(40, 300),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_conversation_loader_any_lengths_trains_on_each_supervised_token_once(
    golden_tokenizer, count, longest, sequence_len, batch_size, seed
):
    conversations = make_conversations(count, longest, seed)
    rendered = [render(conversation, golden_tokenizer) for conversation in conversations]
    expected = count_supervised(rendered, sequence_len)
    if not expected:  # every reply starts beyond the row
        return
    steps = make_steps(conversations, golden_tokenizer, sequence_len=sequence_len, batch_size=batch_size)
    assert count_targets(steps) == expected
    for step in steps:
        for x, _ in rows_of(step):
            assert len(x) == sequence_len and x[0] == golden_tokenizer.bos


def test_conversation_loader_targets_are_supervised_tokens_after_their_inputs(golden_tokenizer):
    for step in make_steps(make_conversations(40), golden_tokenizer):
        for x, y in rows_of(step):
            both = y[:-1] >= 0
            assert torch.equal(x[1:][both], y[:-1][both])
            assert not (y == golden_tokenizer.bos).any()  # neither padding nor the start of the next conversation
            assert not (y == golden_tokenizer.special("<|user_start|>")).any()


def test_conversation_loader_too_long_conversations_are_truncated_and_counted(golden_tokenizer):
    conversations = make_conversations(50)
    rendered = [render(conversation, golden_tokenizer) for conversation in conversations]
    lengths = [len(ids) for ids, _ in rendered]
    sequence_len = sorted(lengths)[30]
    steps = make_steps(conversations, golden_tokenizer, sequence_len=sequence_len)
    assert steps[-1].data_state["truncated"] == sum(n > sequence_len + 1 for n in lengths) > 0
    assert f"{steps[-1].data_state['truncated']} truncated" in steps[-1].position
    assert count_targets(steps) == count_supervised(rendered, sequence_len)


def test_conversation_loader_micro_batches_share_the_number_of_targets_of_their_step(golden_tokenizer):
    for step in make_steps(make_conversations(60), golden_tokenizer):
        supervised = sum(int((y >= 0).sum()) for _, y, _ in step.micro_batches)
        assert {num_targets for *_, num_targets in step.micro_batches} == {supervised}
        assert all((y >= 0).any() for _, y, _ in step.micro_batches)


@pytest.mark.parametrize("world_size", [2, 4])
def test_conversation_loader_ranks_together_have_the_rows_of_one_rank(golden_tokenizer, world_size):
    conversations = make_conversations(120)
    alone = make_steps(conversations, golden_tokenizer, accumulation=4)
    by_rank = [
        make_steps(conversations, golden_tokenizer, accumulation=4 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(steps) for steps in by_rank} == {len(alone)}
    for step, *parts in zip(alone, *by_rank, strict=True):
        micro_batches = [micro_batch for part in parts for micro_batch in part.micro_batches]
        for expected, actual in zip(step.micro_batches, micro_batches, strict=True):
            assert_same_batch(actual[:2], expected[:2])
            assert actual[2] == expected[2]
        assert {part.progress for part in parts} == {step.progress}
        assert {part.num_tokens for part in parts} == {step.num_tokens}


@pytest.mark.parametrize("num_steps", [-1, 25])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_conversation_loader_resumed_continues_bitwise(golden_tokenizer, after, num_steps):
    conversations = make_conversations(330)
    steps = make_steps(conversations, golden_tokenizer, num_steps=num_steps)
    state = steps[after - 1].data_state
    resumed = make_steps(conversations, golden_tokenizer, num_steps=num_steps, states=[state])
    assert len(resumed) == len(steps) - after > 0
    for actual, expected in zip(resumed, steps[after:], strict=True):
        assert_same_step(actual, expected)
        assert actual.data_state == expected.data_state


def test_conversation_loader_state_of_older_checkpoint_is_restored(golden_tokenizer):
    """The keys of the data state are a file format."""
    conversations = make_conversations(10, longest=5)
    state = {"total": 10, "next": 10, "step": 6, "truncated": 2, "waiting": [8, 3]}
    (step,) = make_steps(conversations, golden_tokenizer, states=[state])
    found = count_documents([step], golden_tokenizer.bos)
    for index in (8, 3):
        ids, _ = render(conversations[index], golden_tokenizer)
        assert found[tuple(ids)] == 1
    assert step.progress == 0.8
    assert step.data_state == {"total": 10, "next": 10, "step": 7, "truncated": 2, "waiting": []}


def test_conversation_loader_state_of_other_conversations_is_refused(golden_tokenizer):
    state = make_steps(make_conversations(30), golden_tokenizer)[0].data_state
    with pytest.raises(UserError, match="had 30 conversations, now there are 31"):
        make_steps(make_conversations(31), golden_tokenizer, states=[state])


@pytest.mark.parametrize("num_steps", [-1, 3, 40])
def test_conversation_loader_progress_rises_from_0_and_stays_below_1(golden_tokenizer, num_steps):
    steps = make_steps(make_conversations(90), golden_tokenizer, num_steps=num_steps)
    progress = [step.progress for step in steps]
    assert progress[0] == 0 and progress == sorted(progress) and progress[-1] < 1
    if num_steps > 0:
        assert len(steps) == num_steps


def test_conversation_loader_several_passes_use_all_conversations_equally(golden_tokenizer):
    conversations = make_conversations(20)
    steps = make_steps(conversations, golden_tokenizer, sequence_len=600, num_steps=40)
    passes = steps[-1].data_state["next"] // len(conversations)
    assert passes > 2
    found = Counter()
    for ids, count in count_documents(steps, golden_tokenizer.bos).items():
        found[ids[:5]] += count
    times = [found[tuple(render(conversation, golden_tokenizer)[0][:5])] for conversation in conversations]
    assert passes - 1 <= min(times) and max(times) <= passes + 1


def test_conversation_loader_batch_without_target_is_skipped(golden_tokenizer):
    without_reply = [{"messages": [{"role": "user", "content": "apple " * 100}]}] * 3
    with pytest.raises(UserError, match="reply to train on"):
        make_steps(without_reply, golden_tokenizer, sequence_len=64)
    with_reply = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fig"}]
    conversations = [*without_reply, {"messages": with_reply}]
    (step,) = make_steps(conversations, golden_tokenizer, batch_size=1, sequence_len=64, accumulation=1)
    assert step.micro_batches[0][2] > 0 and step.data_state["truncated"] == 3


def test_conversation_loader_batches_are_one_pass(golden_tokenizer):
    conversations = make_conversations(40)
    loader = ConversationLoader(golden_tokenizer, conversations, batch_size=2, sequence_len=200, dist=Dist(CPU))
    steps = make_steps(conversations, golden_tokenizer, accumulation=1)
    for batch, step in zip(loader.batches(), steps, strict=True):
        assert_same_batch(batch, step.micro_batches[0][:2])


# ---- prefetch ----


def make_step(number):
    return Step([(torch.tensor([number]), torch.tensor([number + 1]), 1)], 0.0, 1, {"number": number})


def numbers(steps):
    return [step.data_state["number"] for step in steps]


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_prefetch_keeps_the_order(count):
    assert numbers(prefetch(map(make_step, range(count)), CPU)) == list(range(count))


def test_prefetch_failing_source_raises_after_the_steps_before():
    def source():
        yield make_step(1)
        yield make_step(2)
        raise ValueError("bad shard")

    steps = prefetch(source(), CPU)
    assert numbers(islice(steps, 2)) == [1, 2]
    with pytest.raises(ValueError, match="bad shard"):
        next(steps)


def test_prefetch_builds_a_bounded_number_of_steps_ahead():
    built = []

    def source():
        for number in range(50):
            built.append(number)
            yield make_step(number)

    steps = prefetch(source(), CPU, ahead=3)
    next(steps)
    wait_until(lambda: len(built) == 4)  # the current one and three ahead
    time.sleep(0.05)
    assert len(built) == 4
    steps.close()


def test_prefetch_warns_of_a_source_that_stalls_and_names_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataloader, "STALL_SECONDS", 0.01)
    shard = write_shard(tmp_path / "shard_00000.parquet", ["1 2 3"])
    row_groups = RowGroups([shard])
    loader = PretrainLoader(NumberTokenizer(), row_groups, batch_size=1, sequence_len=8, dist=Dist(CPU))
    is_read, warned = row_groups.texts, threading.Event()

    def slow_disk(index):
        assert warned.wait(20)
        return is_read(index)

    loader._read = slow_disk

    def reading():
        warned.set()
        return loader.reading()

    steps = prefetch(loader.steps(1, 2), CPU, reading=reading)
    assert next(steps).num_tokens == 8
    steps.close()
    assert re.search(rf"warning: training has waited .* s for {shard}, row group 0\n", capsys.readouterr().err)


def test_prefetch_closed_ends_its_thread():
    before = set(threading.enumerate())
    steps = prefetch(map(make_step, range(10**9)), CPU)
    assert numbers(islice(steps, 5)) == [0, 1, 2, 3, 4]
    assert set(threading.enumerate()) - before
    steps.close()
    wait_until(lambda: not set(threading.enumerate()) - before)


def test_to_device_moves_tensors_and_keeps_the_rest():
    x = torch.arange(6).view(2, 3)
    step = to_device(Step([(x, x + 1, 6)], 0.5, 6, {"unit": 1}, "here"), CPU)
    ((inputs, targets, num_targets),) = step.micro_batches
    assert torch.equal(inputs, x) and torch.equal(targets, x + 1) and num_targets == 6
    assert (step.progress, step.num_tokens, step.data_state, step.position) == (0.5, 6, {"unit": 1}, "here")
