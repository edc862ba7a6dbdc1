"""
Data mixtures: pretraining on several folders of shards, each with its share of the tokens.

    --data-dir climbmix=0.8,cosmopedia=0.2        # known names, see KNOWN
    --data-dir ~/books=0.5,~/code=0.3,~/web=0.2   # folders of shards; $NANOCHAT_DATA_DIR takes the same
    --data-dir ~/books                            # a single folder is a mixture of one source

Each row of a batch is packed from a single source, as it would be without a mixture (dataloader.py). The next row is
always from the source that is furthest behind its weight. Nothing is random, so a run can be repeated, and after any
number of rows each source is within about one row of its share. A source that has been read to its end starts again
while the others continue, so a small source with a large weight is read several times. The metrics epochs/<name> count
how often.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat import dataset
from nanochat.common import UserError, base_dir
from nanochat.dataloader import Batch, MicroBatch, PretrainLoader, StreamsLoader, pack_batch
from nanochat.dataset import RowGroups
from nanochat.distributed import Dist
from nanochat.tokenizer import Tokenizer
from nanochat.train import Step

# Public datasets: name → the command that writes its shards, with {folder} for <base>/base_data_<name>.
# 20 GB are about 4.5 B tokens, enough for a fifth of any run on one node.
MAKE_SHARDS = "python -m scripts.make_shards --max-gigabytes 20 --out {folder} "
KNOWN = {
    "climbmix": "python -m nanochat.dataset -n 170 --data-dir {folder}",
    "cosmopedia": MAKE_SHARDS + "hub:HuggingFaceTB/smollm-corpus:cosmopedia-v2",
    "fineweb-edu": MAKE_SHARDS + "hub:karpathy/fineweb-edu-100b-shuffle",
}
# Rounded weights, such as 0.333,0.333,0.333, are accepted and divided by their sum.
SUM_TOLERANCE = 0.002


@dataclass(frozen=True)
class Source:
    """A folder of shards and its share of the training tokens."""

    name: str  # in metrics and messages
    weight: float
    train_shards: list[Path]
    val_shards: list[Path]


def find_sources(data_dir: str = "") -> list[Source]:
    """
    Returns the sources that data_dir names (default: $NANOCHAT_DATA_DIR, then the public dataset); a single folder has
    weight 1. Reads only the footers of the shards.

    Raises UserError if a source is unknown, named twice, or lacks usable shards, and if the weights are not positive
    numbers that sum to 1.
    """
    text = data_dir or os.environ.get("NANOCHAT_DATA_DIR", "")
    if dataset.is_mixture(text):
        weights, directories = _parse(text)
    elif _is_known(text):
        weights, directories = [1.0], [_find_directory(text)]
    else:
        weights, directories = [1.0], [dataset.resolve_data_dir(text)]
    sources = []
    for weight, directory in zip(weights, directories, strict=True):
        namesakes = [other for other in directories if other.name == directory.name]
        name = directory.name.removeprefix(dataset.PUBLIC_PREFIX) if len(namesakes) == 1 else str(directory)
        sources.append(Source(name, weight, *dataset.split_shards(directory)))
    return sources


def _parse(text: str) -> tuple[list[float], list[Path]]:
    """The weights, which sum to 1, and the folders of a mixture such as "climbmix=0.8,cosmopedia=0.2"."""
    weights: list[float] = []
    directories: list[Path] = []
    for item in text.split(","):
        name, equals, number = item.strip().rpartition("=")
        if not equals or not name:
            raise UserError(f"{text}: each source of a mixture needs a name and a weight, such as climbmix=0.8")
        weights.append(_parse_weight(name, number))
        directory = _find_directory(name)
        if directory.resolve() in [other.resolve() for other in directories]:
            raise UserError(f"{text} names {directory} twice: add up its weights")
        directories.append(directory)
    total = sum(weights)
    if abs(total - 1) > SUM_TOLERANCE:
        raise UserError(f"the weights of {text} sum to {total:g}: they are shares of the tokens and must sum to 1")
    return [weight / total for weight in weights], directories


def _parse_weight(name: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not 0 < weight <= 1:
        raise UserError(f"the weight of {name} is {number!r}: use its share of the tokens, between 0 and 1")
    return weight


def _is_known(name: str) -> bool:
    return name in KNOWN and not Path(name).is_dir()  # a folder of the current directory takes precedence


def _find_directory(name: str) -> Path:
    """The folder of a source: `name` itself, or that of a known dataset."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    if name not in KNOWN:
        raise UserError(f"{name} is neither a folder nor one of the known datasets, {', '.join(KNOWN)}")
    directory = base_dir() / f"{dataset.PUBLIC_PREFIX}{name}"
    if not any(directory.glob("*.parquet")):
        raise UserError(f"{directory} has no shards: make them with `{KNOWN[name].format(folder=directory)}`")
    return directory


def furthest_behind(weights: Sequence[float], amounts: Sequence[int]) -> int:
    """
    Returns the index of the source that is furthest behind its weight; on a tie, the first one. A source is
    behind by: its weight times the total (the next unit counted), minus its amount.

    >>> amounts = [0, 0]
    >>> for _ in range(5):
    ...     amounts[furthest_behind([0.6, 0.4], amounts)] += 1
    >>> amounts
    [3, 2]
    """
    total = sum(amounts) + 1
    lags = [weight * total - amount for weight, amount in zip(weights, amounts, strict=True)]
    return lags.index(max(lags))


# ---- training ----


def create_loader(
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    *,
    batch_size: int,  # B
    sequence_len: int,  # T
    dist: Dist,
    states: Sequence[dict[str, Any]] = (),  # of all streams of the run to resume
) -> StreamsLoader:
    """Returns this rank's loader of the training split. UserError if the states belong to other sources."""
    check_resumable(sources, states)
    num_streams = len(states) or dist.world_size

    def make_stream(number: int) -> PretrainLoader | MixtureLoader:
        stream = Dist(dist.device, number, num_streams)
        return create_stream(tokenizer, sources, batch_size=1, sequence_len=sequence_len, dist=stream, states=states)

    return StreamsLoader(make_stream, num_streams, batch_size, dist)


def create_stream(
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    *,
    batch_size: int,  # B
    sequence_len: int,  # T
    dist: Dist,  # its number among the streams
    states: Sequence[dict[str, Any]] = (),
) -> "PretrainLoader | MixtureLoader":
    """Returns the loader of one stream (StreamsLoader): with a single source, a PretrainLoader."""
    if len(sources) > 1:
        return MixtureLoader(
            tokenizer, sources, batch_size=batch_size, sequence_len=sequence_len, dist=dist, states=states
        )
    row_groups = RowGroups(sources[0].train_shards)
    return PretrainLoader(
        tokenizer, row_groups, batch_size=batch_size, sequence_len=sequence_len, dist=dist, states=states
    )


def check_resumable(sources: Sequence[Source], states: Sequence[dict[str, Any]]) -> None:
    """Raises UserError unless the data states of a checkpoint belong to these sources with these weights."""
    now = {source.name: source.weight for source in sources} if len(sources) > 1 else {}
    for state in states:
        saved = state.get("weights", {})  # a single source saves none
        if list(saved.items()) != list(now.items()):
            raise UserError(
                f"the checkpoint was trained on {_describe(saved)}, not on {_describe(now)}: resume with the same "
                "--data-dir, or start a new run with another --model-tag"
            )


def _describe(weights: dict[str, float]) -> str:
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items()) or "a single folder"


class MixtureLoader:
    """
    Endless batches of packed rows from several sources, for one rank: one PretrainLoader per source, each with its own
    position and packing buffer. The weights hold on each rank, and therefore over all ranks.

    `states` are the data states of all ranks of the run to resume.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        *,
        batch_size: int,  # B
        sequence_len: int,  # T
        dist: Dist,
        states: Sequence[dict[str, Any]] = (),
    ):
        self.names = [source.name for source in sources]
        self.weights = [source.weight for source in sources]
        self.batch_size = batch_size
        self.sequence_len = sequence_len
        self.world_size = dist.world_size
        self.loaders = [
            PretrainLoader(
                tokenizer,
                RowGroups(source.train_shards),
                batch_size=batch_size,
                sequence_len=sequence_len,
                dist=dist,
                states=[_state_of_source(state, i) for state in states],
            )
            for i, source in enumerate(sources)
        ]
        # Rows per source so far. Rank r starts r rows later in the sequence of sources. Otherwise, with one row per
        # rank, all rows of a step would be from the same source.
        self.rows = [0] * len(sources)
        self._source = 0  # of the last row
        for _ in range(dist.rank):
            self._count_row()
        if states:
            self.rows = list(states[dist.rank]["rows"])

    def steps(self, accumulation: int, num_steps: int, first_step: int = 0) -> Iterator[Step]:
        """
        Yields steps first_step … num_steps - 1, each with `accumulation` micro-batches on this rank. The metrics of a
        step are the epochs of each source.
        """
        num_tokens = self.batch_size * self.sequence_len * accumulation * self.world_size
        for i in range(first_step, num_steps):
            micro_batches: list[MicroBatch] = [(*self.next_batch(), num_tokens) for _ in range(accumulation)]
            by_name = dict(zip(self.names, self.loaders, strict=True))
            for name, loader in by_name.items():
                loader.warn_of_second_epoch(name, i)
            position = "; ".join(f"{name} {loader.describe_position()}" for name, loader in by_name.items())
            metrics = {f"epochs/{name}": loader.epochs for name, loader in by_name.items()}
            yield Step(micro_batches, i / num_steps, num_tokens, self.state(), position, metrics)

    def next_batch(self) -> Batch:
        return pack_batch(self._pack, self.batch_size, self.sequence_len)

    def state(self) -> dict[str, Any]:
        """The weights, the rows per source, and the state of each source, with its number before each key."""
        state: dict[str, Any] = {"weights": dict(zip(self.names, self.weights, strict=True)), "rows": list(self.rows)}
        for i, loader in enumerate(self.loaders):
            state |= {f"{i}.{key}": value for key, value in loader.state().items()}
        return state

    def reading(self) -> str:
        """The file and row group that is read now, or next."""
        return self.loaders[self._source].reading()

    def _pack(self, row: np.ndarray) -> None:
        self._source = self._count_row()
        self.loaders[self._source].pack(row)

    def _count_row(self) -> int:
        """Counts the next row and returns its source."""
        source = furthest_behind(self.weights, self.rows)
        self.rows[source] += 1
        return source


def _state_of_source(state: dict[str, Any], source: int) -> dict[str, Any]:
    prefix = f"{source}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# ---- texts, for the tokenizer ----


def iterate_texts(
    weights: Sequence[float], shards: Sequence[Sequence[Path]], doc_cap: int | None = None
) -> Iterator[str]:
    """
    Yields documents of several sources, cropped to doc_cap characters. The share of a source in the characters is its
    weight. A source that ends is read again until all of them have been read once. A single source is therefore read
    once, in order.
    """
    texts = [dataset.iterate_texts(of_source) for of_source in shards]
    chars = [0] * len(shards)
    unfinished = set(range(len(shards)))
    while True:
        source = furthest_behind(weights, chars)
        text = next(texts[source], None)
        if text is not None:
            text = text[:doc_cap]
            chars[source] += len(text)
            yield text
            continue
        unfinished.discard(source)
        if not unfinished:
            return
        if not chars[source]:
            raise UserError(f"{shards[source][0].parent} has no text: leave it out of the mixture")
        texts[source] = dataset.iterate_texts(shards[source])
