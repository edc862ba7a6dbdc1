"""
Data loaders: tokenize text, pack it into batches and yield one `Step` per optimizer step.

Two loaders of the same shape:
- PretrainLoader reads documents from parquet shards, without end.
- ConversationLoader reads conversations, once or for a number of steps.

        loader = PretrainLoader(tokenizer, RowGroups(shards), batch_size=B, sequence_len=T, dist=dist)
        for step in prefetch(loader.steps(accumulation, num_steps), dist.device, reading=loader.reading):
            for x_BT, y_BT, num_targets in step.micro_batches:
                ...

Both pack best-fit (arXiv 2404.10830): to fill a row of T + 1 tokens, they repeatedly take from a buffer
the longest document that still fits. When none fits, pretraining crops the shortest document to the room left in the
row, so that no computation is spent on padding; fine-tuning pads the row, so that conversations stay complete. Every
document starts with BOS, and so does every row. Inputs are a row's first T tokens, targets its last T.

A step's `data_state` holds the position in the data and the documents in the buffer. A loader that is constructed with
such `states` yields exactly the batches that an uninterrupted run would yield next.

**The data of a step does not depend on the number of ranks**, so a run can be resumed on more or fewer of them. The
conversations are packed by every rank, which keeps its share of the rows. That would be too slow for pretraining, where
the text is read as several streams, one for each rank that the run was started with (StreamsLoader).

Shapes: B rows per micro-batch and rank, T tokens per row.
"""

import bisect
import functools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.conversation import render
from nanochat.dataset import RowGroups
from nanochat.distributed import Dist, warn0, warn_of_rank
from nanochat.tokenizer import Tokenizer
from nanochat.train import Step

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, (B, T) each, int64; a target of -1 has no loss
MicroBatch = tuple[torch.Tensor, torch.Tensor, int]  # inputs, targets, and the number of targets in the whole step

TEXTS_PER_CALL = 128  # documents tokenized per call: keeps all threads busy without delaying the first batch
# A larger buffer crops fewer tokens away, but it changes the order of the documents more. Measured share of cropped
# tokens (3,000 rows of English text, vocabulary 32,768), which is large where rows are shorter than most documents:
#   documents in the buffer    100    1,000    10,000
#   T = 2048                  21 %     14 %       8 %
#   T = 512                   74 %     72 %      50 %
MIN_DOCUMENTS_IN_BUFFER = 1000
STALL_SECONDS = 60  # of waiting for data before a warning: a shared disk may take seconds (heuristic, not tuned)
MIN_CONVERSATIONS_IN_BUFFER = 256  # heuristic, not tuned


class PackingBuffer:
    """
    Documents sorted by length, so that best fit takes a binary search instead of a scan of the buffer. Among documents
    of equal length the oldest is returned first.

    >>> buffer = PackingBuffer(["bb", "a", "cc", "dddd"])
    >>> buffer.pop_longest(3), buffer.pop_longest(3), buffer.pop_shortest(), len(buffer)
    ('bb', 'cc', 'a', 1)
    """

    def __init__(self, documents: Iterable[Any] = ()):
        # (length, -number of arrival, document), sorted. Of equally long documents the oldest comes last: its negative
        # number is the highest. The numbers are unique, so documents themselves are never compared.
        self._entries: list[tuple[Any, ...]] = []
        self._num_arrived = 0
        for document in documents:
            self.add(document, len(document))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Any]:
        """The documents, oldest first."""
        oldest_first = sorted(self._entries, key=operator.itemgetter(1), reverse=True)
        return (document for _, _, document in oldest_first)

    def add(self, document: Any, length: int) -> None:
        bisect.insort(self._entries, (length, -self._num_arrived, document))
        self._num_arrived += 1

    def pop_longest(self, max_length: int) -> Any | None:
        """Removes and returns the longest document of at most max_length tokens; None if every document is longer."""
        num_fitting = bisect.bisect_left(self._entries, (max_length + 1,))
        return self._entries.pop(num_fitting - 1)[-1] if num_fitting else None

    def pop_shortest(self) -> Any:
        return self.pop_longest(self._entries[0][0])


class PretrainLoader:
    """
    Endless batches of packed documents: those of one rank, or of one stream of many (StreamsLoader), which `dist`
    describes as rank `dist.rank` of `dist.world_size`.

    Row groups are numbered consecutively over all epochs, and rank r reads r, r + world_size, r + 2 * world_size, …
    With fewer row groups than ranks, every rank reads all row groups and takes every world_size-th text.

    `states` are the data states of all ranks of the run to resume. Raises UserError if they belong to other shards;
    also, at the first batch, if no row group has text for this rank.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        row_groups: RowGroups,
        *,
        batch_size: int,  # B
        sequence_len: int,  # T
        dist: Dist,
        states: Sequence[dict[str, Any]] = (),
    ):
        self.tokenizer = tokenizer
        self.row_groups = row_groups
        self.batch_size = batch_size
        self.sequence_len = sequence_len
        self.world_size = dist.world_size

        if len(row_groups) >= dist.world_size:
            self.row_group = dist.rank  # the one to read next
            self._stride = dist.world_size
            self._own_texts = slice(None)
        else:
            self.row_group = 0
            self._stride = 1
            self._own_texts = slice(dist.rank, None, dist.world_size)
        self.texts_done = 0  # number of this rank's texts already taken from that row group
        self.buffer = PackingBuffer()
        # Keeps one row group, because reading it costs more than tokenizing TEXTS_PER_CALL of its texts.
        self._read = functools.lru_cache(maxsize=1)(row_groups.texts)

        if any(state["num_units"] != len(row_groups) for state in states):
            raise UserError("the checkpoint was trained on other shards: resume with the same --data-dir")
        if states:
            self._restore(states[dist.rank])
        self._last_row_group = self.row_group  # for messages
        self._is_repeating = self.epochs >= 1

    def steps(self, accumulation: int, num_steps: int, first_step: int = 0) -> Iterator[Step]:
        """Yields steps first_step … num_steps - 1, each with `accumulation` micro-batches on this rank."""
        num_tokens = self.batch_size * self.sequence_len * accumulation * self.world_size
        for i in range(first_step, num_steps):
            micro_batches: list[MicroBatch] = [(*self.next_batch(), num_tokens) for _ in range(accumulation)]
            self.warn_of_second_epoch("the training text", i)
            yield Step(micro_batches, i / num_steps, num_tokens, self.state(), self.describe_position())

    def batches(self) -> Iterator[Batch]:
        """Yields batches without end, for evaluation."""
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        return pack_batch(self.pack, self.batch_size, self.sequence_len)

    @property
    def epochs(self) -> float:
        """How often the shards have been read, over all ranks."""
        return self.row_group / len(self.row_groups)

    def position(self) -> tuple[int, int, int]:
        """Returns (shard, row group in that shard, epoch) of the last texts read; epochs count from 1."""
        epoch, index = divmod(self._last_row_group, len(self.row_groups))
        shard, row_group = self.row_groups.locate(index)
        return shard, row_group, epoch + 1

    def describe_position(self) -> str:
        shard, row_group, epoch = self.position()
        return f"shard {shard}, row group {row_group}, epoch {epoch}"

    def reading(self) -> str:
        """The file and row group that is read now, or next."""
        shard, row_group = self.row_groups.locate(self.row_group % len(self.row_groups))
        return f"{self.row_groups.shards[shard]}, row group {row_group}"

    def warn_of_second_epoch(self, text: str, step: int) -> None:
        """Warns when the second epoch starts. `text` names what the shards hold."""
        if self.epochs >= 1 and not self._is_repeating:
            warn0(f"{text} starts its second epoch at step {step}: with more shards, it would not repeat itself")
            self._is_repeating = True

    def state(self) -> dict[str, Any]:
        """
        The position in the data and the buffer, as numbers and tensors. The keys belong to the checkpoint format, which
        is older than the names in this class: a "unit" is a row group, "waiting" are the documents in the buffer.
        """
        documents = list(self.buffer)
        tokens = np.concatenate(documents) if documents else np.empty(0, np.int32)
        return {
            "num_units": len(self.row_groups),
            "unit": self.row_group,
            "texts_done": self.texts_done,
            "waiting": torch.from_numpy(tokens),
            "waiting_lengths": torch.tensor([len(document) for document in documents], dtype=torch.int64),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.row_group = state["unit"]
        self.texts_done = state["texts_done"]
        self.buffer = PackingBuffer(_buffered_documents(state))

    def pack(self, row: np.ndarray) -> None:
        """Fills the row with documents from the buffer."""
        filled = 0
        while filled < len(row):
            while len(self.buffer) < MIN_DOCUMENTS_IN_BUFFER:
                self._refill()
            room = len(row) - filled
            document = self.buffer.pop_longest(room)
            if document is None:
                # The rest of a cropped document is discarded. The shortest one wastes the fewest tokens.
                document = self.buffer.pop_shortest()[:room]
            row[filled : filled + len(document)] = document
            filled += len(document)

    def _refill(self) -> None:
        """Tokenizes the next texts into the buffer."""
        texts = self._texts_of_row_group()
        next_texts = texts[self.texts_done : self.texts_done + TEXTS_PER_CALL]
        self._last_row_group = self.row_group
        self.texts_done += TEXTS_PER_CALL
        if self.texts_done >= len(texts):
            self.row_group += self._stride
            self.texts_done = 0
        for ids in self.tokenizer.encode_batch(next_texts):
            document = np.array([self.tokenizer.bos, *ids], dtype=np.int32)
            self.buffer.add(document, len(document))

    def _texts_of_row_group(self) -> list[str]:
        """This rank's texts of the current row group; row groups without any are skipped."""
        for _ in range(len(self.row_groups) + 1):
            texts = self._read(self.row_group % len(self.row_groups))[self._own_texts]
            if texts:
                return texts
            self.row_group += self._stride
        raise UserError("the shards have no text for this rank: use fewer ranks or more text")


def pack_batch(pack: Callable[[np.ndarray], None], batch_size: int, sequence_len: int) -> Batch:
    """Calls `pack`, which fills a row of T + 1 tokens, for every row; returns inputs and targets."""
    rows = np.empty((batch_size, sequence_len + 1), dtype=np.int64)
    for row in rows:
        pack(row)
    rows_BT = torch.from_numpy(rows)
    return rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous()


class Stream(Protocol):
    """A PretrainLoader, or a mixture of several (mixture.py)."""

    def steps(self, accumulation: int, num_steps: int, first_step: int = 0) -> Iterator[Step]: ...

    def reading(self) -> str: ...


class StreamsLoader:
    """
    This rank's share of the rows of each step of pretraining, whatever the number of ranks.

    The text is read as num_streams streams, as many as the run was started with ranks. Each has its own position and
    packing buffer, and yields an equal share of the rows of a step. The rows are numbered, and each rank takes a
    contiguous range of them: that of one stream as long as the number of ranks stays the same. A rank of a run that
    was resumed on fewer ranks reads several streams. On more ranks, several of them read the same stream and drop the
    rows of the others: twice the number of ranks means twice the work of tokenizing and packing.

    So a step has the same rows on any number of ranks, and no document is skipped or read twice. The data state of a
    stream is saved by the rank that takes its first row.
    """

    def __init__(self, make_stream: Callable[[int], Stream], num_streams: int, batch_size: int, dist: Dist):
        self.make_stream = make_stream  # from the number of a stream
        self.num_streams = num_streams
        self.batch_size = batch_size  # B
        self.dist = dist
        self.streams: list[Stream] = []  # those that this rank reads

    def reading(self) -> str:
        """The files and row groups that this rank reads now, or next."""
        return "; ".join(stream.reading() for stream in self.streams)

    def steps(self, accumulation: int, num_steps: int, first_step: int = 0) -> Iterator[Step]:
        """
        Yields steps first_step … num_steps - 1, each with `accumulation` micro-batches on this rank. UserError if the
        streams cannot have equal shares of the rows.
        """
        num_rows = self.batch_size * accumulation * self.dist.world_size
        if num_rows % self.num_streams:
            raise UserError(
                f"the {num_rows} rows of a step cannot be divided among {self.num_streams} streams of text (one per "
                "rank that the run was started on): keep its --total-batch-size"
            )
        num_own = num_rows // self.dist.world_size
        return self._steps(num_rows // self.num_streams, num_steps, first_step, num_own)

    def _steps(self, rows_per_stream: int, num_steps: int, first_step: int, num_own: int) -> Iterator[Step]:
        own = range(self.dist.rank * num_own, (self.dist.rank + 1) * num_own)
        numbers = range(own[0] // rows_per_stream, own[-1] // rows_per_stream + 1)
        num_skipped = own[0] - numbers[0] * rows_per_stream  # at the start of the first stream
        self.streams = [self.make_stream(number) for number in numbers]
        steps = [stream.steps(rows_per_stream, num_steps, first_step) for stream in self.streams]
        for parts in zip(*steps, strict=True):  # the micro-batches of a part have one row each
            rows = [row for part in parts for row in part.micro_batches][num_skipped : num_skipped + num_own]
            states = [
                part.data_state
                for number, part in zip(numbers, parts, strict=True)
                if number * rows_per_stream in own  # otherwise the rank before this one saves it
            ]
            yield replace(parts[0], micro_batches=self._batches(rows), data_state={"streams": states})

    def _batches(self, rows: list[MicroBatch]) -> list[MicroBatch]:
        """Joins micro-batches of one row to those of B rows."""
        batches = []
        for first in range(0, len(rows), self.batch_size):
            inputs, targets, (num_targets, *_) = zip(*rows[first : first + self.batch_size], strict=True)
            batches.append((torch.cat(inputs), torch.cat(targets), num_targets))
        return batches


def _buffered_documents(state: dict[str, Any]) -> list[np.ndarray]:
    return [document.numpy() for document in state["waiting"].split(state["waiting_lengths"].tolist())]


class ConversationLoader:
    """
    Padded rows of whole conversations: one pass over them, or as many passes as num_steps steps need.

    Every rank packs the rows of all ranks and keeps its own share. Progress, and with it the learning rate, is then
    equal on all ranks, and the data does not depend on the number of ranks. A conversation longer than a row is
    truncated, and counted. Micro-batches and steps without a single target are skipped. A step's num_tokens includes
    the padding: it counts what the model computes.

    Raises UserError if the state belongs to other conversations; also, during training, if a whole pass has no target.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        conversations: Sequence[dict[str, Any]],
        *,
        batch_size: int,  # B
        sequence_len: int,  # T
        dist: Dist,
        states: Sequence[dict[str, Any]] = (),  # of the run to resume; equal on all ranks
    ):
        self.tokenizer = tokenizer
        self.conversations = conversations
        self.batch_size = batch_size
        self.sequence_len = sequence_len
        self.dist = dist

        self.step = 0
        self.next_index = 0  # of the conversation to render next; it keeps growing over the passes
        self.truncated = 0
        self.buffer = PackingBuffer()  # of (index, ids, mask)
        if states:
            self._restore(states[0])

    def steps(self, accumulation: int, num_steps: int = -1) -> Iterator[Step]:
        """Yields steps of up to `accumulation` micro-batches on this rank, until step num_steps; -1 = one pass."""
        rows_per_rank = self.batch_size * accumulation
        num_rows = rows_per_rank * self.dist.world_size
        own_rows = slice(self.dist.rank * rows_per_rank, (self.dist.rank + 1) * rows_per_rank)
        packed_at_last_target = self._num_packed()
        while (progress := self._progress(num_steps)) < 1:
            rows = [self._pack_row(num_steps) for _ in range(num_rows)]
            num_targets = int(sum((targets >= 0).sum() for _, targets in rows))
            if num_targets == 0:
                # Without this check, conversations that have no targets would be packed again and again, forever.
                if self._num_packed() - packed_at_last_target >= len(self.conversations):
                    raise UserError(
                        "no conversation has a reply to train on: look at the data with scripts.show_conversation"
                    )
                continue
            packed_at_last_target = self._num_packed()
            self.step += 1
            micro_batches = self._micro_batches(rows[own_rows], num_targets)
            position = f"conversation {self.next_index}, {self.truncated} truncated to a row"
            yield Step(micro_batches, progress, num_rows * self.sequence_len, self.state(), position)

    def reading(self) -> str:
        """The conversation that is read now, or next."""
        return f"conversation {self.next_index % max(1, len(self.conversations))} of {len(self.conversations)}"

    def batches(self) -> Iterator[Batch]:
        """Yields the batches of one pass that have a target on this rank, for evaluation."""
        for step in self.steps(accumulation=1):
            for x_BT, y_BT, _ in step.micro_batches:
                yield x_BT, y_BT

    def state(self) -> dict[str, Any]:
        """The position in the data and the indices of the buffered conversations. The keys are a checkpoint format."""
        return {
            "total": len(self.conversations),
            "next": self.next_index,
            "step": self.step,
            "truncated": self.truncated,
            "waiting": [index for index, _, _ in self.buffer],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state["total"] != len(self.conversations):
            raise UserError(
                f"the run to resume had {state['total']} conversations, now there are {len(self.conversations)}: "
                "resume with the same flags"
            )
        self.step = state["step"]
        self.next_index = state["next"]
        self.truncated = state["truncated"]
        for index in state["waiting"]:
            self._render_to_buffer(index)

    def _num_packed(self) -> int:
        return self.next_index - len(self.buffer)

    def _progress(self, num_steps: int) -> float:
        """The fraction of the run that is done: of num_steps, or of the conversations if there is a single pass."""
        if num_steps != -1:
            return self.step / num_steps
        if len(self.conversations) == 0:
            return 1.0
        return self._num_packed() / len(self.conversations)

    def _pack_row(self, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, (T,) each, of one row of whole conversations."""
        self._fill_buffer(one_pass=num_steps == -1)
        row = np.full(self.sequence_len + 1, self.tokenizer.bos)  # any token can pad: padding is not a target
        supervised = np.zeros(self.sequence_len + 1, dtype=bool)
        filled = 0
        while (conversation := self.buffer.pop_longest(len(row) - filled)) is not None:
            _, ids, mask = conversation
            row[filled : filled + len(ids)] = ids
            supervised[filled : filled + len(ids)] = mask
            filled += len(ids)
        return row[:-1], np.where(supervised[1:], row[1:], -1)

    def _fill_buffer(self, one_pass: bool) -> None:
        """
        Renders conversations until the buffer has enough to choose from. A pass is packed completely before the next
        one starts: otherwise long conversations of the next pass could be packed before short ones of this pass.
        """
        while len(self.buffer) < MIN_CONVERSATIONS_IN_BUFFER:
            all_rendered = self.next_index > 0 and self.next_index % len(self.conversations) == 0
            if all_rendered and (one_pass or len(self.buffer) > 0):
                return
            self.truncated += self._render_to_buffer(self.next_index)
            self.next_index += 1

    def _render_to_buffer(self, index: int) -> bool:
        """Adds a conversation, truncated to a row, to the buffer; returns whether it was too long."""
        ids, mask = render(self.conversations[index % len(self.conversations)], self.tokenizer)
        row_length = self.sequence_len + 1
        self.buffer.add((index, ids[:row_length], mask[:row_length]), min(len(ids), row_length))
        return len(ids) > row_length

    def _micro_batches(self, rows: list[tuple[np.ndarray, np.ndarray]], num_targets: int) -> list[MicroBatch]:
        """Groups rows into micro-batches; leaves out those without a target."""
        micro_batches = []
        for first in range(0, len(rows), self.batch_size):
            inputs, targets = zip(*rows[first : first + self.batch_size], strict=True)
            x_BT = torch.from_numpy(np.stack(inputs))
            y_BT = torch.from_numpy(np.stack(targets))
            if (y_BT >= 0).any():
                micro_batches.append((x_BT, y_BT, num_targets))
        return micro_batches


def to_device(step: Step, device: torch.device) -> Step:
    """
    The step with its tensors on the device. On CUDA the copies are asynchronous, from pinned memory. Torch's pinned
    allocator reuses a buffer only after its copy has finished, so no buffer is overwritten while it is being copied.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if device.type == "cuda":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)

    micro_batches = [tuple(move(value) for value in micro_batch) for micro_batch in step.micro_batches]
    return replace(step, micro_batches=micro_batches)


def prefetch(
    steps: Iterator[Step], device: torch.device, ahead: int = 2, reading: Callable[[], str] = lambda: "the data"
) -> Iterator[Step]:
    """
    Yields the steps with their tensors on the device. A thread builds up to `ahead` of them while the current one is
    trained on, so that tokenizing and packing do not delay the GPU. An exception is raised at the step that failed.
    Warns when training has to wait for long; `reading` returns the place in the data that the thread is at.
    """

    def build_next() -> Step | None:
        step = next(steps, None)
        return None if step is None else to_device(step, device)

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        pending = deque(executor.submit(build_next) for _ in range(ahead))
        while (step := _wait_for(pending.popleft(), reading)) is not None:
            pending.append(executor.submit(build_next))
            yield step
    finally:
        executor.shutdown(cancel_futures=True)


def _wait_for(step: Future[Step | None], reading: Callable[[], str]) -> Step | None:
    """The result of the thread; a warning every STALL_SECONDS until it is there."""
    seconds = 0
    while not wait([step], timeout=STALL_SECONDS).done:
        seconds += STALL_SECONDS
        warn_of_rank(f"training has waited {seconds} s for {reading()}")
    return step.result()
