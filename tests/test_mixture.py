"""
Data mixtures: what --data-dir may name, realised weights, exact resume, ranks, bits per byte and texts per source.

    python -m pytest tests/test_mixture.py
"""

import json
import os
import random
import shutil
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import golden
from factories import random_text, tiny_gpt, write_shard, write_shards

from nanochat import dataset, hardware, mixture
from nanochat.common import UserError
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import RowGroups
from nanochat.distributed import Dist
from nanochat.eval import bpb
from nanochat.eval.bpb import evaluate_bpb, evaluate_bpb_of_sources
from nanochat.mixture import (
    MixtureLoader,
    Source,
    check_resumable,
    create_loader,
    create_stream,
    find_sources,
    furthest_behind,
)
from scripts import base_eval, base_train, tok_eval, tok_train

CPU = torch.device("cpu")
BOS = 0
FIRST_TOKENS = (1, 10**6, 2 * 10**6)  # of the documents of the three sources; the serial numbers follow


class NumberTokenizer:
    """A tokenizer for texts that are token ids already."""

    bos = BOS

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


def number_source(folder, number, weight, *, num_documents=1200, rows_per_group=100):
    """A source whose documents start with a serial number, which also tells the source; the last shard validates."""
    generator = random.Random(number)
    serial_numbers = range(FIRST_TOKENS[number], FIRST_TOKENS[number] + num_documents)
    texts = [f"{serial} " + "9999999 " * generator.randint(5, 40) for serial in serial_numbers]
    name = f"source{number}"
    train = write_shard(folder / name / "0.parquet", texts, rows_per_group=rows_per_group)
    val = write_shard(folder / name / "1.parquet", ["5 6 7"])
    return Source(name, weight, [train], [val])


@pytest.fixture
def sources(tmp_path):
    return [number_source(tmp_path, 0, 0.5), number_source(tmp_path, 1, 0.3), number_source(tmp_path, 2, 0.2)]


def make_loader(sources, *, batch_size=4, rank=0, world_size=1, states=()):
    return create_stream(
        NumberTokenizer(), sources, batch_size=batch_size, sequence_len=64, dist=Dist(CPU, rank, world_size),
        states=states,
    )  # fmt: skip


def rows_of(loader, num_batches):
    """The complete rows, T + 1 tokens each, of the next batches."""
    batches = [loader.next_batch() for _ in range(num_batches)]
    return torch.cat([torch.cat([x, y[:, -1:]], dim=1) for x, y in batches])


def source_of(row):
    """The number of the source of the row's documents; fails if they are from different sources."""
    serials = [int(row[i + 1]) for i in range(len(row) - 1) if row[i] == BOS]
    numbers = {sum(serial >= first for first in FIRST_TOKENS) - 1 for serial in serials}
    assert len(numbers) == 1
    return numbers.pop()


# ---- what --data-dir names ----


def test_find_sources_single_folder_has_weight_one(tmp_path, base_dir, monkeypatch):
    shards = write_shards(tmp_path / "mine")
    expected = [Source("mine", 1.0, shards[:2], shards[2:])]
    assert find_sources(str(tmp_path / "mine")) == expected
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "mine"))
    assert find_sources() == expected


def test_find_sources_folder_with_signs_of_a_mixture_is_a_folder(tmp_path):
    write_shards(tmp_path / "language=en,de")
    assert [source.name for source in find_sources(str(tmp_path / "language=en,de"))] == ["language=en,de"]


def test_find_sources_mixture_of_known_name_and_folder(tmp_path, base_dir, monkeypatch):
    write_shards(base_dir / "base_data_cosmopedia")
    write_shards(tmp_path / "x=y")
    text = f"cosmopedia=0.2, {tmp_path}/x=y=0.8"
    monkeypatch.setenv("NANOCHAT_DATA_DIR", text)
    for sources in (find_sources(text), find_sources()):
        assert [(source.name, source.weight) for source in sources] == [("cosmopedia", 0.2), ("x=y", 0.8)]
        assert sources[0].train_shards[0].parent == base_dir / "base_data_cosmopedia"
    assert [source.name for source in find_sources("cosmopedia")] == ["cosmopedia"]
    with pytest.raises(UserError, match="this command takes one folder: pass one with --data-dir"):
        dataset.resolve_data_dir()


def test_find_sources_equal_folder_names_are_told_apart_by_path(tmp_path):
    for parent in ("a", "b"):
        write_shards(tmp_path / parent / "shards")
    sources = find_sources(f"{tmp_path}/a/shards=0.5,{tmp_path}/b/shards=0.5")
    assert [source.name for source in sources] == [f"{tmp_path}/a/shards", f"{tmp_path}/b/shards"]


def test_find_sources_rounded_weights_are_scaled_to_sum_to_one(tmp_path):
    for name in "abc":
        write_shards(tmp_path / name)
    sources = find_sources(",".join(f"{tmp_path}/{name}=0.333" for name in "abc"))
    assert sum(source.weight for source in sources) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{a}=0.8,{b}=0.3", "sum to 1.1: they are shares of the tokens and must sum to 1"),
        ("{a}=0.5,{b}=0.4", "sum to 0.9"),
        ("{a}=1.2,{b}=-0.2", "weight of .*/a is '1.2': use its share of the tokens, between 0 and 1"),
        ("{a}=0.5,{b}=-0.5", "weight of .*/b is '-0.5'"),
        ("{a}=1,{b}=0", "weight of .*/b is '0'"),
        ("{a}=most,{b}=0.2", "weight of .*/a is 'most'"),
        ("{a}=nan,{b}=0.2", "weight of .*/a is 'nan'"),
        ("{a}=,{b}=1", "weight of .*/a is ''"),
        ("{a}=0.8,{b}", "each source of a mixture needs a name and a weight, such as climbmix=0.8"),
        ("climbmix,cosmopedia", "each source of a mixture needs a name and a weight"),
        ("{a}=0.8,,{b}=0.2", "each source of a mixture needs a name and a weight"),
        ("{a}=0.8,=0.2", "each source of a mixture needs a name and a weight"),
        ("{a}=0.8,nowhere=0.2", "nowhere is neither a folder nor one of the known datasets, climbmix, cosmopedia"),
        ("{a}=0.8,{a}/=0.2", "names .*/a twice: add up its weights"),
        ("{a}=0.8,{b}/../a=0.2", "names .*/a twice"),
        ("{a}=0.8,{empty}=0.2", "empty has no parquet shards"),
        ("{a}=0.8,cosmopedia=0.2", "base_data_cosmopedia has no shards: make them with `python -m scripts.make_shards"),
        ("cosmopedia", "base_data_cosmopedia has no shards: make them with"),
        ("{a}=0.8,climbmix=0.2", "make them with `python -m nanochat.dataset -n 170 --data-dir .*base_data_climbmix`"),
    ],
)  # fmt: skip
def test_find_sources_wrong_input_raises_one_line(tmp_path, base_dir, text, message):
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    folders = {name: tmp_path / name for name in ("a", "b", "empty")}
    with pytest.raises(UserError, match=message) as error:
        find_sources(text.format(**folders))
    assert "\n" not in str(error.value)


def test_download_to_a_mixture_is_refused(base_dir, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", "climbmix=0.8,cosmopedia=0.2")
    with pytest.raises(SystemExit, match="climbmix=0.8,cosmopedia=0.2 is a mixture"):
        dataset.main(["-n", "1"])
    assert not Path("climbmix=0.8,cosmopedia=0.2").exists()


# ---- the order of the sources ----


@pytest.mark.parametrize("weights", [[0.8, 0.2], [0.5, 0.3, 0.2], [0.97, 0.01, 0.02], [0.25] * 4, [1 / 3, 2 / 3]])
def test_furthest_behind_keeps_every_source_within_one_row_of_its_weight(weights):
    rows = [0] * len(weights)
    for num_rows in range(1, 2001):
        rows[furthest_behind(weights, rows)] += 1
        assert all(abs(row - weight * num_rows) < 1 + 1e-9 for row, weight in zip(rows, weights, strict=True))


# ---- training ----


def test_mixture_rows_are_of_one_source_each_in_the_proportions_of_the_weights(sources):
    loader = make_loader(sources)
    counts = Counter(source_of(row) for row in rows_of(loader, 250))
    assert counts == {0: 500, 1: 300, 2: 200} and loader.rows == [500, 300, 200]


def test_mixture_rows_of_a_source_are_those_of_its_own_loader(sources):
    alone = [make_loader([source]) for source in sources]
    rows_alone = [iter(rows_of(loader, 30)) for loader in alone]
    for row in rows_of(make_loader(sources), 40):
        assert torch.equal(row, next(rows_alone[source_of(row)]))


def test_mixture_of_one_source_is_the_plain_loader(tmp_path):
    source = number_source(tmp_path, 0, 1.0)
    plain = PretrainLoader(
        NumberTokenizer(), RowGroups(source.train_shards), batch_size=4, sequence_len=64, dist=Dist(CPU)
    )
    loader = make_loader([source])
    assert type(loader) is PretrainLoader
    assert torch.equal(rows_of(loader, 20), rows_of(plain, 20)) and loader.state().keys() == plain.state().keys()
    one_of_many = MixtureLoader(NumberTokenizer(), [source], batch_size=4, sequence_len=64, dist=Dist(CPU))
    assert torch.equal(rows_of(one_of_many, 20), rows_of(make_loader([source]), 20))


@pytest.mark.parametrize("world_size", [2, 5, 8])
def test_mixture_rows_of_all_ranks_in_a_step_are_of_different_sources(sources, world_size):
    """One row per rank and step; without the shift by rank, all ranks would take from the same source."""
    loaders = [make_loader(sources, batch_size=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(10):
        counts = Counter(source_of(rows_of(loader, 1)[0]) for loader in loaders)
        for number, source in enumerate(sources):
            assert abs(counts[number] - source.weight * world_size) < 2
    for loader in loaders:
        assert all(abs(rows - weight * (10 + loader.world_size)) < 5 for rows, weight in
                   zip(loader.rows, loader.weights, strict=True))  # fmt: skip


@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_mixture_resumed_continues_bitwise(sources, after, rank, world_size):
    loaders = [make_loader(sources, rank=r, world_size=world_size) for r in range(world_size)]
    loader = loaders[rank]
    rows_of(loader, after + 1)
    states = [json_and_tensors(one.state()) for one in loaders]
    resumed = make_loader(sources, rank=rank, world_size=world_size, states=states)
    for expected, step in zip(loader.steps(2, 12), resumed.steps(2, 12), strict=True):
        assert step.metrics == expected.metrics
        for (x, y, _), (x_expected, y_expected, _) in zip(step.micro_batches, expected.micro_batches, strict=True):
            assert torch.equal(x, x_expected) and torch.equal(y, y_expected)


def json_and_tensors(state):
    """The state as a checkpoint stores it: tensors apart, everything else through JSON."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return json.loads(json.dumps({key: value for key, value in state.items() if key not in tensors})) | tensors


def steps_of_all_ranks(sources, world_size, first, last, *, rows_per_step=12, states=()):
    """For each step the rows of all ranks, and the states of all streams after the last step."""
    rows, states_after = [], []
    for rank in range(world_size):
        loader = create_loader(
            NumberTokenizer(), sources, batch_size=1, sequence_len=64, dist=Dist(CPU, rank, world_size), states=states
        )
        steps = list(loader.steps(rows_per_step // world_size, last, first))
        rows.append([[row for x, _, _ in step.micro_batches for row in x.tolist()] for step in steps])
        states_after += [json_and_tensors(state) for state in steps[-1].data_state["streams"]]
    return [sum(parts, []) for parts in zip(*rows, strict=True)], states_after


@pytest.mark.parametrize("world_sizes", [(1, 2, 4, 1), (4, 2, 1, 3), (2, 3, 6, 2)])
def test_streams_rows_of_each_step_do_not_depend_on_the_number_of_ranks(sources, world_sizes):
    """Two streams on three ranks: the second rank reads both of them."""
    expected, _ = steps_of_all_ranks(sources, world_sizes[0], 0, 8)
    found, states = [], []
    for i, world_size in enumerate(world_sizes):
        rows, states = steps_of_all_ranks(sources, world_size, 2 * i, 2 * i + 2, states=states)
        assert len(states) == world_sizes[0]
        found += rows
    assert found == expected


def test_streams_other_batch_size_that_they_do_not_divide_is_refused(sources):
    _, states = steps_of_all_ranks(sources, 4, 0, 1)
    with pytest.raises(UserError, match="among 4 streams.*--total-batch-size"):
        steps_of_all_ranks(sources, 1, 1, 2, rows_per_step=10, states=states)


def test_mixture_counts_epochs_and_warns_once_per_source(tmp_path, capsys):
    large = number_source(tmp_path, 0, 0.5, num_documents=4000)
    small = number_source(tmp_path, 1, 0.5, num_documents=1500)
    loader = make_loader([large, small])
    steps = list(loader.steps(accumulation=10, num_steps=40))
    assert 0 < steps[0].metrics["epochs/source0"] < steps[0].metrics["epochs/source1"] < 1
    assert steps[-1].metrics["epochs/source0"] < 1 < steps[-1].metrics["epochs/source1"]
    assert "source0 shard 0, row group" in steps[-1].position and "; source1 shard 0" in steps[-1].position
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "source1 starts its second epoch at step" in warnings[0]
    next(make_loader([large, small], states=[loader.state()]).steps(10, 41, 40))
    assert not capsys.readouterr().err  # a resumed run does not repeat it


def test_check_resumable_other_sources_or_weights_are_refused(sources):
    states = [make_loader(sources).state()]
    other_weights = [Source(s.name, 1 / 3, s.train_shards, s.val_shards) for s in sources]
    was = r"trained on source0=0.5,source1=0.3,source2=0.2, not on "
    cases = [
        (sources[:1], states, was + "a single folder: resume with the same --data-dir"),
        (sources[:2], states, was + "source0=0.5,source1=0.3:"),
        (sources[::-1], states, was + "source2=0.2,source1=0.3,source0=0.5:"),
        (other_weights, states, was + "source0=0.333"),
        (sources, [make_loader(sources[:1]).state()], "trained on a single folder, not on source0=0.5"),
    ]
    for now, saved, message in cases:
        with pytest.raises(UserError, match=message):
            check_resumable(now, saved)


# ---- evaluation ----


def test_bpb_of_mixture_weighs_tokens_and_equals_that_of_a_single_source(golden_tokenizer, tmp_path):
    model = tiny_gpt(sequence_len=32)
    generator = random.Random(1)
    shards = {
        "words": [write_shard(tmp_path / "w.parquet", [random_text(generator, 5, 50) for _ in range(1100)])],
        "digits": [write_shard(tmp_path / "d.parquet", ["17 4711 42 1989 " * 6] * 1100)],
    }

    def evaluate(sources, num_tokens):
        return evaluate_bpb_of_sources(
            model, golden_tokenizer, sources, batch_size=2, num_tokens=num_tokens, dist=Dist(CPU)
        )

    alone = {name: evaluate([(name, 1.0, files)], 8 * 64) for name, files in shards.items()}
    for name, files in shards.items():
        loader = PretrainLoader(golden_tokenizer, RowGroups(files), batch_size=2, sequence_len=32, dist=Dist(CPU))
        batches = [loader.next_batch() for _ in range(8)]
        token_bytes = golden_tokenizer.token_bytes()
        assert alone[name] == {"bpb": evaluate_bpb(model, batches, token_bytes, Dist(CPU))}

    # Three times as many batches of one as of the other: together they are text of the mixture.
    found = evaluate([("words", 0.75, shards["words"]), ("digits", 0.25, shards["digits"])], 32 * 64)
    assert found.keys() == {"bpb", "bpb/words", "bpb/digits"}
    assert found["bpb/digits"] == alone["digits"]["bpb"] != found["bpb/words"]
    loaders = [
        PretrainLoader(golden_tokenizer, RowGroups(files), batch_size=2, sequence_len=32, dist=Dist(CPU))
        for files in shards.values()
    ]
    batches = [loaders[0].next_batch() for _ in range(24)] + [loaders[1].next_batch() for _ in range(8)]
    assert found["bpb"] == pytest.approx(evaluate_bpb(model, batches, golden_tokenizer.token_bytes(), Dist(CPU)))


class Rank(Dist):
    """One of several ranks that are threads of this process."""

    parts: list[torch.Tensor]
    barrier_of_all: threading.Barrier

    def sum(self, tensor):
        self.parts.append(tensor)
        self.barrier_of_all.wait(20)
        return torch.stack(self.parts).sum(0)


@pytest.mark.parametrize("world_size, num_streams", [(2, 1), (3, 1), (2, 4), (3, 2)])
def test_bpb_of_streams_does_not_depend_on_the_number_of_ranks(
    golden_tokenizer, tmp_path, monkeypatch, world_size, num_streams
):
    model = tiny_gpt(sequence_len=32)
    generator = random.Random(1)
    files = [
        write_shard(tmp_path / f"{i}.parquet", [random_text(generator, 5, 50) for _ in range(400)]) for i in range(4)
    ]

    num_batches = Counter()

    def count(model, batches, token_bytes, dist):
        for batch in batches:
            num_batches[dist.rank, dist.world_size] += 1
            yield batch

    sums = bpb._sums
    monkeypatch.setattr(bpb, "_sums", lambda *args: sums(args[0], count(*args), *args[2:]))

    def evaluate(dist):
        sources = [("words", 1.0, files)]
        return evaluate_bpb_of_sources(
            model, golden_tokenizer, sources, batch_size=2, num_tokens=11 * 64, dist=dist, num_streams=num_streams
        )

    monkeypatch.setattr(Rank, "parts", [], raising=False)
    monkeypatch.setattr(Rank, "barrier_of_all", threading.Barrier(world_size), raising=False)
    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(evaluate, [Rank(CPU, rank, world_size) for rank in range(world_size)]))
    for result in found:
        assert result["bpb"] == pytest.approx(evaluate(Dist(CPU))["bpb"], rel=1e-6)
    # A sharded model needs all ranks to compute a batch, so each rank must have as many as the others.
    assert len({num_batches[rank, world_size] for rank in range(world_size)}) == 1


# ---- texts for the tokenizer ----


def test_iterate_texts_keeps_the_weights_in_characters_and_reads_every_source(tmp_path):
    generator = random.Random(0)
    long = [write_shard(tmp_path / "long.parquet", [generator.choice("ab") * 100 for _ in range(40)])]
    short = [write_shard(tmp_path / "short.parquet", [f"{i:07d}" for i in range(20)])]
    texts = list(mixture.iterate_texts([0.8, 0.2], [long, short], doc_cap=50))
    chars = Counter({"long": 0, "short": 0})
    for text in texts:
        chars["long" if text[0] in "ab" else "short"] += len(text)
        total = chars.total()
        assert abs(chars["short"] - 0.2 * total) <= 50
    assert chars["long"] == 40 * 50  # capped, and read once
    assert Counter(texts)["0000000"] > 1  # the smaller source is repeated
    assert list(mixture.iterate_texts([1.0], [long])) == list(dataset.iterate_texts(long))


def test_iterate_texts_source_without_text_raises(tmp_path):
    with_text = [write_shard(tmp_path / "a.parquet", ["text"] * 10)]
    without = [write_shard(tmp_path / "b" / "b.parquet", [None, ""])]
    with pytest.raises(UserError, match="b has no text: leave it out of the mixture"):
        list(mixture.iterate_texts([0.5, 0.5], [with_text, without]))


# ---- the scripts ----

BASE = ["--device", "cpu", "--no-compile", "--depth", "1", "--aspect-ratio", "32", "--head-dim", "32"]
BASE += ["--max-seq-len", "64", "--device-batch-size", "5", "--total-batch-size", "640", "--num-iterations", "6"]
BASE += ["--eval-tokens", "1280", "--eval-every", "3", "--save-every", "3", "--sample-every", "-1"]


@pytest.fixture
def two_sources(base_dir, tmp_path, monkeypatch, golden_tokenizer):
    """Two folders of text and the golden tokenizer; returns the value of --data-dir."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    golden_tokenizer.save(base_dir / "tokenizer")
    generator = random.Random(0)
    for shard in range(2):
        texts = [random_text(generator, 10, 60) for _ in range(1200)]
        write_shard(tmp_path / "words" / f"{shard}.parquet", texts, rows_per_group=200)
    shutil.copytree(golden("packing/data"), base_dir / "base_data_cosmopedia")
    return f"cosmopedia=0.2,{tmp_path}/words=0.8"


def metrics(base_dir, tag):
    lines = [
        json.loads(line) for line in (base_dir / f"report/metrics/base_train-{tag}.jsonl").read_text().splitlines()
    ]
    timed = ("seconds", "elapsed", "peak_memory", "train/tokens_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines if "step" in line]


@pytest.mark.slow
def test_base_train_on_a_mixture_stopped_and_resumed_is_bitwise_equal(two_sources, base_dir, monkeypatch, capsys):
    # These choices are measured, so on a busy machine two runs could compute differently.
    monkeypatch.setattr(hardware, "pick_matmul_precision", lambda *_: "highest")
    monkeypatch.setattr(hardware, "bf16_faster_on_cpu", lambda: False)
    argv = [*BASE, "--data-dir", two_sources]
    base_train.main([*argv, "--model-tag", "whole"])
    evaluate = base_train.evaluate_bpb_of_sources

    def evaluate_and_stop(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(base_train, "evaluate_bpb_of_sources", evaluate_and_stop)
        with pytest.raises(SystemExit, match="after step 4.*--resume"):
            base_train.main([*argv, "--model-tag", "parts"])
    monkeypatch.setenv("NANOCHAT_DATA_DIR", two_sources)  # the same as --data-dir
    base_train.main([*BASE, "--model-tag", "parts", "--resume"])
    whole, parts = (base_dir / "base_checkpoints" / tag / "step_000006" for tag in ("whole", "parts"))
    for name in ("model.safetensors", "optimizer.safetensors", "data.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    lines = metrics(base_dir, "whole")
    assert metrics(base_dir, "parts") == lines
    validations = [line for line in lines if "val/bpb" in line]
    assert len(validations) == 2
    for line in validations:
        low, high = sorted(line[f"val/bpb/{name}"] for name in ("cosmopedia", "words"))
        assert low < line["val/bpb"] < high
    assert all({"epochs/cosmopedia", "epochs/words"} <= line.keys() for line in lines if "train/loss" in line)
    state = json.loads((whole / "state.json").read_text())["data_states"][0]
    assert state["weights"] == {"cosmopedia": 0.2, "words": 0.8} and state["rows"] == [12, 48]  # 6 steps of 10 rows

    def fail(*args):
        pytest.fail("a model was built first")

    monkeypatch.setattr("nanochat.run.Run.build", fail)
    for other in (two_sources.replace("0.2", "0.3").replace("0.8", "0.7"), str(base_dir / "base_data_cosmopedia")):
        with pytest.raises(SystemExit, match="trained on cosmopedia=0.2,words=0.8, not on .*: resume with the same"):
            base_train.main([*BASE, "--model-tag", "parts", "--resume", "--data-dir", other])


@pytest.mark.slow
def test_base_eval_and_tokenizer_scripts_report_each_source(two_sources, base_dir, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", two_sources)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(base_dir / "empty"))
    base_train.main([*BASE, "--num-iterations", "1"])
    numbers = base_eval.main(["--device", "cpu", "--eval", "bpb", "--split-tokens", "1280"])
    assert set(numbers) == {
        "train bpb", "train bpb/cosmopedia", "train bpb/words", "val bpb", "val bpb/cosmopedia", "val bpb/words",
    }  # fmt: skip
    out = capsys.readouterr().out
    assert f"val bits per byte of words: {numbers['val bpb/words']:.4f}" in out
    trained_on = metrics(base_dir, "d1")[-1]
    assert numbers["val bpb/words"] == pytest.approx(trained_on["val/bpb/words"], rel=1e-5)
    assert numbers["val bpb"] == pytest.approx(trained_on["val/bpb"], rel=1e-5)

    results = tok_eval.main([])
    assert list(results)[4:] == [
        "train split of cosmopedia", "val split of cosmopedia", "train split of words", "val split of words",
    ]  # fmt: skip
    mixed = tok_train.main(["--vocab-size", "400", "--max-chars", "100000", "--tokenizer-dir", str(base_dir / "t")])
    assert mixed.vocab_size == 400


def test_known_datasets_have_a_command_with_their_folder():
    for name, how in mixture.KNOWN.items():
        assert "{folder}" in how and how.startswith("python -m "), name
