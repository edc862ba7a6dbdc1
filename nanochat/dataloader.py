"""
From texts and conversations to batches.

Best-fit packing: a row of T + 1 tokens takes, again and again, the longest waiting document that fits whole.
Pretraining fills each row to the end by cropping the shortest when none fits; fine-tuning pads instead.

Both loaders are iterators of train.Step whose data_state says exactly where the data stands, the waiting documents
included, so that a resumed run sees the same batches. `prefetch` runs them ahead of the training in a thread.
"""

import bisect
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.conversation import render
from nanochat.dataset import RowGroups
from nanochat.tokenizer import Tokenizer
from nanochat.train import Step

T = TypeVar("T")
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, (B, T) each, int64; targets of -1 are not trained

TEXTS_PER_CALL = 128  # documents tokenized together: enough for the threads, few enough to keep the first batch quick
MIN_WAITING = 1000  # documents to choose from: more crops less, but the data comes less in order
MIN_WAITING_CONVERSATIONS = 256  # likewise; arbitrary


class BestFit:
    """Waiting documents, indexed by length; among equals the oldest leaves first."""

    def __init__(self, documents: Iterable[Any] = ()):
        self.documents: dict[int, Any] = {}  # by order of arrival
        self.arrivals_by_length: dict[int, deque[int]] = {}
        self.lengths: list[int] = []  # sorted, distinct
        self.arrivals = 0
        for document in documents:
            self.add(document)

    def __len__(self) -> int:
        return len(self.documents)

    def add(self, document: Any, length: int | None = None) -> None:
        length = len(document) if length is None else length
        if length not in self.arrivals_by_length:
            self.arrivals_by_length[length] = deque()
            bisect.insort(self.lengths, length)
        self.arrivals_by_length[length].append(self.arrivals)
        self.documents[self.arrivals] = document
        self.arrivals += 1

    def pop_longest(self, room: int) -> Any | None:
        """The longest document of at most `room` tokens; None if none is as short."""
        i = bisect.bisect_right(self.lengths, room)
        return self._pop(i - 1) if i else None

    def pop_shortest(self) -> Any:
        return self._pop(0)

    def _pop(self, index: int) -> Any:
        length = self.lengths[index]
        arrivals = self.arrivals_by_length[length]
        document = self.documents.pop(arrivals.popleft())
        if not arrivals:
            del self.arrivals_by_length[length], self.lengths[index]
        return document


class PretrainLoader:
    """
    Batches of packed documents for one rank, without end. The row groups of all epochs are numbered through, and rank r
    reads r, r + world_size, …; where there are fewer row groups than ranks, all read each of them and share its texts.
    UserError when no row group has a text for this rank, and for states that belong to other shards.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        row_groups: RowGroups,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world_size: int = 1,
        states: Sequence[dict[str, Any]] = (),
    ):
        self.tokenizer, self.row_groups = tokenizer, row_groups
        self.batch_size, self.sequence_len, self.world_size = batch_size, sequence_len, world_size
        shares_groups = len(row_groups) < world_size
        self.stride = 1 if shares_groups else world_size
        self.share = slice(rank, None, world_size) if shares_groups else slice(None)
        self.unit, self.texts_done, self.waiting = 0 if shares_groups else rank, 0, BestFit()
        self.texts: list[str] = []  # of row group `texts_unit`: reading one costs more than tokenizing a part of it
        self.texts_unit = -1
        if any(state["num_units"] != len(row_groups) for state in states):
            raise UserError("the checkpoint's place in the data is one in other shards: resume with its own --data-dir")
        if len(states) == world_size:
            self._restore(states[rank])
        elif states:
            self._restore_resharded(states, rank)
        self.last_unit = self.unit  # the row group read last, for messages

    def batch(self) -> Batch:
        rows = np.empty((self.batch_size, self.sequence_len + 1), dtype=np.int64)
        for row in rows:
            self._fill(row)
        rows_BT = torch.from_numpy(rows)
        return rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous()

    def batches(self) -> Iterator[Batch]:
        while True:
            yield self.batch()

    def state(self) -> dict[str, Any]:
        """Where the data stands: numbers and tensors only."""
        waiting = list(self.waiting.documents.values())
        return {
            "num_units": len(self.row_groups),
            "unit": self.unit,
            "texts_done": self.texts_done,
            "waiting": torch.from_numpy(np.concatenate(waiting or [np.empty(0, np.int32)])),
            "waiting_lengths": torch.tensor([len(document) for document in waiting], dtype=torch.int64),
        }

    def position(self) -> dict[str, int]:
        """The row group read last, for people: shard and row group from 0, epoch from 1."""
        epoch, unit = divmod(self.last_unit, len(self.row_groups))
        shard, row_group = self.row_groups.position(unit)
        return {"shard": shard, "row_group": row_group, "epoch": epoch + 1}

    def _fill(self, row: np.ndarray) -> None:
        filled = 0
        while filled < len(row):
            while len(self.waiting) < MIN_WAITING:
                self._refill()
            room = len(row) - filled
            document = self.waiting.pop_longest(room)
            if document is None:
                document = self.waiting.pop_shortest()[:room]
            row[filled : filled + len(document)] = document
            filled += len(document)

    def _refill(self) -> None:
        first_unit = self.unit
        while self.texts_unit != self.unit:
            self.texts, self.texts_unit = self.row_groups.texts(self.unit % len(self.row_groups))[self.share], self.unit
            if not self.texts:
                self.unit += self.stride
                if self.unit - first_unit > len(self.row_groups) * self.stride:
                    raise UserError("the shards have no text for this rank: use fewer ranks or more text")
        some = self.texts[self.texts_done : self.texts_done + TEXTS_PER_CALL]
        self.last_unit = self.unit
        self.texts_done += TEXTS_PER_CALL
        if self.texts_done >= len(self.texts):
            self.unit, self.texts_done = self.unit + self.stride, 0
        for ids in self.tokenizer.encode_batch(some):
            self.waiting.add(np.array([self.tokenizer.bos, *ids], dtype=np.int32))

    def _restore(self, state: dict[str, Any]) -> None:
        self.unit, self.texts_done = state["unit"], state["texts_done"]
        self.waiting = BestFit(_waiting(state))

    def _restore_resharded(self, states: Sequence[dict[str, Any]], rank: int) -> None:
        """Another number of ranks: waiting documents are dealt anew; the least advanced rank says where to read on."""
        start = min(state["unit"] for state in states)
        self.unit = start + (rank - start) % self.stride
        pool = [document for state in states for document in _waiting(state)]
        self.waiting = BestFit(pool[rank :: self.world_size])


def _waiting(state: dict[str, Any]) -> list[np.ndarray]:
    lengths = state["waiting_lengths"].numpy()
    return np.split(state["waiting"].numpy(), np.cumsum(lengths)[:-1]) if len(lengths) else []


def pretrain_steps(loader: PretrainLoader, accumulation: int, num_iterations: int, first: int = 0) -> Iterator[Step]:
    """One Step per optimizer update from update `first` on; a micro-batch is (inputs, targets, targets in the step)."""
    num_tokens = loader.batch_size * loader.sequence_len * accumulation * loader.world_size
    for i in range(first, num_iterations):
        micro_batches = [(*loader.batch(), num_tokens) for _ in range(accumulation)]
        yield Step(micro_batches, i / num_iterations, num_tokens, loader.state(), str(loader.position()))


def conversation_steps(
    conversations: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    device_batch_size: int,
    sequence_len: int,
    accumulation: int,
    rank: int = 0,
    world_size: int = 1,
    num_iterations: int = -1,
    state: dict[str, Any] | None = None,
) -> Iterator[Step]:
    """
    Fine-tuning: one pass over the conversations, or num_iterations updates over as many passes as that takes. Every
    rank packs all rows and takes its own from each update, so progress and learning rate are the same on all ranks, and
    the data does not depend on their number. A conversation longer than a row is cut there, and counted. UserError when
    there is nothing to learn, and for a state that belongs to other conversations.
    """
    total = len(conversations)
    state = state or {"total": total, "next": 0, "step": 0, "truncated": 0, "waiting": []}
    if state["total"] != total:
        raise UserError(f"the run was over {state['total']} conversations, here are {total}: resume with its own flags")
    next_index, step, truncated = state["next"], state["step"], state["truncated"]
    last_useful = next_index - len(state["waiting"])  # conversations packed when a step last had a target
    waiting = BestFit()

    def add(index: int) -> int:
        ids, mask = render(conversations[index % total], tokenizer)
        waiting.add((index, ids[: sequence_len + 1], mask[: sequence_len + 1]), min(len(ids), sequence_len + 1))
        return int(len(ids) > sequence_len + 1)

    for index in state["waiting"]:
        add(index)  # rendered anew rather than saved
    rows_per_rank = device_batch_size * accumulation
    end = float("inf") if num_iterations > 0 else total
    while step < num_iterations if num_iterations > 0 else (waiting or next_index < end):
        progress = step / num_iterations if num_iterations > 0 else (next_index - len(waiting)) / total
        rows = []
        for _ in range(rows_per_rank * world_size):
            # A pass ends before the next begins: else the long ones of the next could crowd out this one's short ones.
            while len(waiting) < MIN_WAITING_CONVERSATIONS and next_index < end and (next_index % total or not waiting):
                truncated += add(next_index)
                next_index += 1
            rows.append(_padded_row(waiting, sequence_len, tokenizer.bos))
        num_targets = int(sum((targets >= 0).sum() for _, targets in rows))
        if not num_targets:
            if next_index - len(waiting) - last_useful >= total:
                raise UserError("no conversation has a reply to learn from: look at the data with show_conversation")
            continue
        step, last_useful = step + 1, next_index - len(waiting)
        arrivals = [index for index, _, _ in waiting.documents.values()]
        data_state = {"total": total, "next": next_index, "step": step, "truncated": truncated, "waiting": arrivals}
        mine = rows[rank * rows_per_rank : (rank + 1) * rows_per_rank]
        position = f"conversation {next_index}, {truncated} cut at {sequence_len} tokens"
        micro_batches = _micro_batches(mine, device_batch_size, num_targets)
        yield Step(micro_batches, progress, len(rows) * sequence_len, data_state, position)


def _micro_batches(rows: list[tuple[np.ndarray, np.ndarray]], batch_size: int, num_targets: int) -> list[Any]:
    """Rows (inputs, targets) as micro-batches; those without a target are left out."""
    batches = []
    for first in range(0, len(rows), batch_size):
        inputs, targets = zip(*rows[first : first + batch_size], strict=True)
        x_BT, y_BT = torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))
        if (y_BT >= 0).any():
            batches.append((x_BT, y_BT, num_targets))
    return batches


def _padded_row(waiting: BestFit, sequence_len: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (T,) of one row of whole conversations."""
    ids, mask = np.full(sequence_len + 1, pad), np.zeros(sequence_len + 1, dtype=bool)
    filled = 0
    while (document := waiting.pop_longest(len(ids) - filled)) is not None:
        _, some_ids, some_mask = document
        ids[filled : filled + len(some_ids)] = some_ids
        mask[filled : filled + len(some_ids)] = some_mask
        filled += len(some_ids)
    return ids[:-1], np.where(mask[1:], ids[1:], -1)


def on_device(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """
    The steps with their tensors on the device. On CUDA through pinned memory, without waiting; torch's pinned allocator
    hands a buffer out again only when its copy is done.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

    for step in steps:
        yield replace(step, micro_batches=[tuple(map(move, batch)) for batch in step.micro_batches])


def prefetch(items: Iterator[T], size: int = 2) -> Iterator[T]:
    """Runs an iterator in a thread, up to `size` items ahead; its exception is raised here, in its place."""
    ready: queue.Queue[Callable[[], T]] = queue.Queue()
    room = threading.Semaphore(size)
    stopped = threading.Event()

    def work() -> None:
        while room.acquire() and not stopped.is_set():
            try:
                item = next(items)
                ready.put(lambda item=item: item)  # type: ignore[misc]
            except BaseException as error:  # noqa: BLE001  raised again on the other side, the end of items included
                ready.put(lambda error=error: _raise(error))  # type: ignore[misc]
                return

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                item = ready.get()()
            except StopIteration:
                return
            yield item
            room.release()
    finally:
        stopped.set()
        room.release()


def _raise(error: BaseException) -> Any:
    raise error
