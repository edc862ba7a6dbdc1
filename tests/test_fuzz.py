"""
Fuzzing: every file that nanochat reads, damaged at random. The result is a correct one, or a UserError of one line.

    python -m pytest tests/test_fuzz.py                      # the same few cases every time
    NANOCHAT_FUZZ=5000 python -m pytest tests/test_fuzz.py   # 5,000 new random cases per file, hours

A file is damaged in two ways: its bytes (flipped bits, a missing end, a part overwritten, removed or repeated), and, if
it is JSON, its values (other types, missing keys, huge numbers, deep nesting, lone surrogates). Where a format has a
checksum, damaged bytes must never give another result than the intact file. Each case may allocate a few GiB at most
and must end within SECONDS.
"""

import contextlib
import copy
import gzip
import io
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GOLDEN, golden
from factories import CPU, conversation, save_checkpoint, tiny_gpt, tiny_optimizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_core_eval import write_bundle
from test_report import ended, started, write_core, write_sessions, write_training
from test_tasks import write_datasets

from nanochat import checkpoint_manager, hardware, logging, shards
from nanochat.chat.terminal import LineEditor
from nanochat.checkpoint_manager import CheckpointWriter, find, load_model
from nanochat.common import UserError
from nanochat.conversation import render
from nanochat.dataset import iterate_texts, split_shards
from nanochat.distributed import Dist
from nanochat.eval.core_tasks import FIELDS, load_tasks, tokenize_items
from nanochat.experiment.statistics import summarize
from nanochat.experiment.trials import FIELDS as RESULT_FIELDS
from nanochat.experiment.trials import Results
from nanochat.experiment.trials import read_metrics as read_metrics_of_trial
from nanochat.export import hf, importer
from nanochat.export.common import Source
from nanochat.primer.identity import read_identity
from nanochat.recipe import load_hyperparameters
from nanochat.report.files import data_of, markdown, page
from nanochat.report.reader import read_run
from nanochat.sources import find_sources
from nanochat.tokenizer import Tokenizer
from nanochat.train import TrainState
from scripts import make_identity, report
from tasks.arc import ARC
from tasks.customjson import CustomJSON

NUM_CASES = int(os.environ.get("NANOCHAT_FUZZ", "0"))
SECONDS = 20  # for a case that takes a few milliseconds
GIGABYTES = 6  # of address space on top of what the process has


# ---- damage ----

NESTED, DIGITS, TOO_LARGE = "@nested@", "@digits@", "@too-large@"  # json.dumps cannot write what they stand for
REPLACEMENTS = {
    NESTED: "[" * 100_000 + "]" * 100_000,
    DIGITS: "9" * 10_000,
    TOO_LARGE: "1e999",
}
VALUES = st.sampled_from(
    [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**70, 0.5, -1e308, float("nan")]
    + ["", "x", "\ud800", "\0", "../../x", "a\nb", "1", [], {}, [[]], [None], {"": {}}, list(REPLACEMENTS)[0]]
    + list(REPLACEMENTS)[1:]
)
VALUE_EDITS = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=6), st.sampled_from(["set", "set", "remove", "add"]), VALUES),
    min_size=1,
    max_size=2,
)
BYTE_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "overwrite", "remove", "repeat", "insert"]),
        st.floats(0, 1, exclude_max=True),  # where
        st.integers(0, 64),  # how many bytes
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def damage_bytes(content: bytes, edits: Sequence[tuple[str, float, int, int]]) -> bytes:
    damaged = bytearray(content)
    for kind, where, length, byte in edits:
        start = int(where * len(damaged))
        part = damaged[start : start + length]
        if kind == "flip" and damaged:
            damaged[start] ^= 1 << byte % 8
        elif kind == "cut":
            del damaged[start:]
        elif kind == "overwrite":
            damaged[start : start + length] = bytes([byte]) * len(part)
        elif kind == "remove":
            del damaged[start : start + length]
        elif kind == "repeat":
            damaged[start:start] = part
        elif kind == "insert":
            damaged[start:start] = bytes([byte]) * length
    return bytes(damaged)


def damage_json(content: bytes, edits: Sequence[tuple[list[int], str, Any]]) -> bytes:
    """Applies the edits to a JSON file, or to one of the lines of a file of JSON lines."""
    try:
        documents = [json.loads(content)]
    except ValueError:
        documents = [json.loads(line) for line in content.decode().splitlines()]
    for path, kind, value in edits:
        parent, key = documents, path[0] % len(documents) if path else 0
        for number in path[1:]:
            child = parent[key]
            if not isinstance(child, list | dict) or not child:
                break
            parent, key = child, list(child)[number % len(child)] if isinstance(child, dict) else number % len(child)
        if kind == "remove" and parent is not documents:
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent["new"] = copy.deepcopy(value)
        else:
            parent[key] = copy.deepcopy(value)  # the list of values holds lists, which a later edit may change
    text = "\n".join(json.dumps(document) for document in documents)
    for name, replacement in REPLACEMENTS.items():
        text = text.replace(f'"{name}"', replacement)
    return text.encode()


# ---- the limits of a case ----


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Within the block, too much memory raises MemoryError or RuntimeError, and too much time TimeoutError."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"reading takes more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIGABYTES * 2**30, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---- the files and how they are read ----


@dataclass(frozen=True)
class Reader:
    """A folder of valid files, and what reads them. With a checksum, only the intact files may be read."""

    write: Callable[[Path], object]  # writes the folder
    read: Callable[[Path], Any]  # a comparable result
    files: Sequence[str]  # those to damage
    has_checksum: bool = False


def write_tokenizer(folder: Path) -> None:
    Tokenizer.train(["so it is said " * 50], vocab_size=267).save(folder)


def read_tokenizer(folder: Path) -> str:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("so it is")) == "so it is"
    return tokenizer.fingerprint


def write_pickle(folder: Path) -> None:
    content = golden("tokenizer/tokenizer.pkl").read_bytes()
    (folder / "tokenizer.pkl").write_bytes(content)


def write_legacy(folder: Path) -> None:
    """An older checkpoint, in the place where nanochat looks for it."""
    step = golden("checkpoint/modern")
    target = folder / "base_checkpoints/old"
    target.mkdir(parents=True)
    (target / "model_000006.pt").write_bytes((step / "model_000006.pt").read_bytes())
    (target / "meta_000006.json").write_bytes((step / "meta_000006.json").read_bytes())
    Tokenizer.load(GOLDEN / "tokenizer").save(folder / "tokenizer")


def write_checkpoint(folder: Path) -> None:
    tokenizer = Tokenizer.train(["so it is said " * 50], vocab_size=267)
    save_checkpoint(tiny_gpt(n_layer=1, vocab_size=267), tokenizer=tokenizer)


def write_two_steps(folder: Path) -> None:
    write_checkpoint(folder)
    writer = CheckpointWriter("base", "tiny", Dist(CPU), resumed=find("base"))
    model = tiny_gpt(n_layer=1, vocab_size=267, seed=1)
    writer.save(model, tiny_optimizer(model), TrainState(2), {"tokenizer": find("base").meta["tokenizer"]})
    writer.wait()


def read_model(folder: Path) -> Any:
    model, tokenizer, checkpoint = load_model("base", "", -1, CPU, torch.float32)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    model(torch.zeros((1, 4), dtype=torch.long))
    return checkpoint.step, tokenizer.fingerprint, load_hyperparameters(checkpoint.meta), weights.double().sum().item()


def read_unverified_model(folder: Path) -> Any:
    """Reads a checkpoint whose manifest belongs to the damaged files."""
    for step in folder.glob("base_checkpoints/tiny/step_*"):
        files = [file for file in step.iterdir() if file.name != "manifest.json"]
        manifest = {
            file.name: {"bytes": file.stat().st_size, "crc32": checkpoint_manager._crc32(file)} for file in files
        }
        (step / "manifest.json").write_text(json.dumps(manifest))
    return read_model(folder)


def write_shards(folder: Path) -> None:
    """Shards as nanochat writes them, with a checksum per page."""
    for name in ("a", "b"):
        shards._write_shard(folder / f"{name}.parquet", [f"text {i} {name}".encode() for i in range(50)], 10_000)


def write_foreign_shards(folder: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": ["text " * i for i in range(50)]}), folder / f"{name}.parquet")


def read_shards(folder: Path) -> list[str]:
    train, validation = split_shards(folder)
    return list(iterate_texts(train + validation))


def write_texts(folder: Path) -> None:
    lines = "\n".join(json.dumps({"text": f"text {i}", "id": i}) for i in range(20))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.csv").write_text("id,text\n" + "\n".join(f'{i},"text ""{i}"""' for i in range(20)))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pa.CompressedOutputStream(str(folder / "d.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(20)]}), folder / "e.parquet")


def read_texts(folder: Path) -> list[str | None]:
    found: list[str | None] = []
    for name in sorted(folder.iterdir()):
        sources, _ = find_sources([str(name)], "text", exclude=folder / "out")
        found += [text for source in sources for text in islice(source.documents(), 1000)]
        [source.estimate_bytes() for source in sources]
    return found


def write_conversations(folder: Path) -> None:
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
    rows = [conversation("hi", "hello", system="be kind"), conversation("1+1?", parts)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row["messages"]) for row in rows))


def read_conversations(folder: Path) -> Any:
    return [render(row, TOKENIZER) for row in CustomJSON(folder / "a.jsonl")]


def read_bundle(folder: Path) -> Any:
    tasks = load_tasks(folder)
    items = [(task, index) for task in tasks for index in range(len(task))]
    return list(tokenize_items(TOKENIZER, items, 64)), [item.get("gold") for task in tasks for item in task.items]


def write_identity(folder: Path) -> None:
    shutil.copy(Path(make_identity.__file__).parent / "samples/identity.yaml", folder)


def read_identity_file(folder: Path) -> Any:
    return read_identity(folder / "identity.yaml")


def write_history(folder: Path) -> None:
    (folder / "history").write_text("".join(json.dumps(text) + "\n" for text in ("hello", "how are you?")))


def read_history(folder: Path) -> Any:
    return LineEditor(Console(file=io.StringIO()), folder / "history")._load_history()


def write_metrics(folder: Path) -> None:
    config = {"flags": {"target_flops": 1e15, "depth": 4}, "recipe": {"horizon": 1000}}
    line = {"seconds": 0.1, "tokens": 10, "flops": 1e9, "train/tokens_per_second": 50.0, "val/bpb": 1.0}
    lines = [{"config": config}, *({"step": i} | line for i in range(1, 6))]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(folder: Path) -> Any:
    result = read_metrics_of_trial(folder / "a.jsonl")
    logging.append_after(3, folder / "a.jsonl").close()
    return result, (folder / "a.jsonl").read_text()


def write_results(folder: Path) -> None:
    result: dict[str, Any] = dict.fromkeys(RESULT_FIELDS, 1) | {"role": "compared", "device": "cpu", "commit": "abc"}
    result |= {"variant": "baseline", "cell": "d1", "flags": ["--depth", "1"]}
    lines = [json.dumps(result | {"tag": f"t{seed}", "seed": seed, "loss": 1 + seed / 100}) for seed in range(3)]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")


def read_results(folder: Path) -> Any:
    return summarize(list(Results(folder).by_tag.values()), 3)


def write_numbers(folder: Path) -> None:
    (folder / "report").mkdir()
    numbers = {"val/bpb": 0.9, "model": "base_checkpoints/d4/step_000100", "time": 1.5, "tokens/s": 20}
    (folder / "report/base_train.json").write_text(json.dumps(numbers))


def read_numbers(folder: Path) -> Any:
    report.main([])
    logging.save_numbers("base_train", {"model": "base_checkpoints/d4/step_000100", "val/bpb": 0.8})
    return (folder / "report/base_train.json").read_text()


def write_report_files(folder: Path) -> None:
    write_training(folder, config={"flags": {"depth": 2}, "settings": {"total_batch_size": 4096}, "recipe": {}})
    write_sessions(folder, started(), ended())
    write_core(folder)
    (folder / "report/tok_eval.json").write_text('{"results": {"news": {"ours": 3.1}}, "sizes": {"ours": 600}}')


def read_report_files(folder: Path) -> Any:
    run = read_run(folder)
    page(data_of([run, run]))
    return markdown([run]).partition("## Stages")[2]


def write_hf_folder(folder: Path) -> None:
    write_checkpoint(folder)
    checkpoint = find("base")
    hf.write(Source(checkpoint, checkpoint.load_tokenizer(), "base", "float32"), folder / "hf")


def read_hf_folder(folder: Path) -> Any:
    model = importer.read(folder / "hf")
    importer.check(model, folder / "hf")
    return model.config, model.tokenizer.fingerprint, model.step, sorted(model.weights)


def write_measurements(folder: Path) -> None:
    hardware.measured("threads", lambda: 2)


def read_measurements(folder: Path) -> Any:
    return hardware.measured("threads", lambda: 2)


def write_dataset(folder: Path) -> None:
    write_datasets(folder / "mirror")


def read_dataset(folder: Path) -> Any:
    os.environ["NANOCHAT_DATASETS_DIR"] = str(folder / "mirror")
    return list(ARC("ARC-Easy", "test"))


TOKENIZER = Tokenizer.load(GOLDEN / "tokenizer")
STEP = "base_checkpoints/tiny/step_000002"
READERS = {
    "tokenizer": Reader(write_tokenizer, read_tokenizer, ["tokenizer.json"], has_checksum=True),
    "pickled tokenizer": Reader(write_pickle, read_tokenizer, ["tokenizer.pkl"]),
    "older checkpoint": Reader(
        write_legacy, read_model, ["base_checkpoints/old/meta_000006.json", "base_checkpoints/old/model_000006.pt"]
    ),
    "checkpoint": Reader(
        write_two_steps,
        read_model,
        [f"{STEP}/{name}" for name in ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors")],
    ),
    "checkpoint with matching manifest": Reader(
        write_checkpoint,
        read_unverified_model,
        [f"{STEP[:-1]}1/{name}" for name in ("state.json", "model.safetensors")],
    ),
    "shards": Reader(write_shards, read_shards, ["a.parquet", "b.parquet"], has_checksum=True),
    "shards of others": Reader(write_foreign_shards, read_shards, ["a.parquet"]),
    "texts": Reader(write_texts, read_texts, ["a.jsonl", "b.csv", "c.jsonl.gz", "d.jsonl.zst", "e.parquet"]),
    "conversations": Reader(write_conversations, read_conversations, ["a.jsonl"]),
    "CORE": Reader(
        write_bundle,
        read_bundle,
        ["core.yaml", "eval_meta_data.csv", *(f"eval_data/some/{kind}.jsonl" for kind in FIELDS)],
    ),
    "identity": Reader(write_identity, read_identity_file, ["identity.yaml"]),
    "history": Reader(write_history, read_history, ["history"]),
    "metrics": Reader(write_metrics, read_metrics, ["a.jsonl"]),
    "results": Reader(write_results, read_results, ["results.jsonl"]),
    "numbers": Reader(write_numbers, read_numbers, ["report/base_train.json"]),
    "report": Reader(
        write_report_files,
        read_report_files,
        [
            f"report/{name}"
            for name in ("metrics/base_train-d2.jsonl", "metrics/base_eval-d2.jsonl", "sessions.jsonl", "tok_eval.json")
        ],
    ),
    "Hugging Face": Reader(
        write_hf_folder,
        read_hf_folder,
        [f"hf/{name}" for name in ("config.json", "tokenizer.json", "model.safetensors")],
    ),
    "measurements": Reader(write_measurements, read_measurements, ["measurements/*.json"]),
    "dataset": Reader(write_dataset, read_dataset, ["mirror/allenai/ai2_arc/ARC-Easy/test.parquet"]),
}
CASES = [(name, file) for name, reader in READERS.items() for file in reader.files]


@pytest.mark.parametrize(("name", "file"), CASES)
def test_damaged_file_is_read_correctly_or_refused_in_one_line(base_dir, capsys, name, file):
    reader = READERS[name]
    reader.write(base_dir)
    expected = reader.read(base_dir)
    (path,) = base_dir.glob(file)
    intact = {other: other.read_bytes() for other in base_dir.rglob("*") if other.is_file()}

    def check(damaged: bytes, must_be_equal: bool) -> None:
        for other, content in intact.items():
            if other.read_bytes() != content:  # the previous case damaged it, or reading it changed it
                other.write_bytes(content)
        path.write_bytes(damaged)
        try:
            with limits():
                result = reader.read(base_dir)
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error)
        else:
            assert not must_be_equal or result == expected

    options = {"max_examples": NUM_CASES or 4, "derandomize": not NUM_CASES, "deadline": None, "database": None}

    @settings(**options)
    @given(BYTE_EDITS)
    def check_bytes(edits):
        check(damage_bytes(intact[path], edits), reader.has_checksum)

    @settings(**options)
    @given(VALUE_EDITS)
    def check_values(edits):
        check(damage_json(intact[path], edits), must_be_equal=False)

    check_bytes()
    if path.suffix in (".json", ".jsonl"):
        check_values()
