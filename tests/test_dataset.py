"""
Shards: the training and validation split, damaged folders, row groups, the download of the public dataset.

    python -m pytest tests/test_dataset.py
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import write_shard, write_shards
from file_server import Fault, running

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import RowGroups, iterate_texts, resolve_data_dir, split_shards

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main"


# ---- folders ----


def test_data_dir_argument_precedes_environment_precedes_public_folder(base_dir, monkeypatch):
    assert resolve_data_dir() == base_dir / "base_data_climbmix"
    monkeypatch.setenv("NANOCHAT_DATA_DIR", "~/b")
    assert resolve_data_dir() == Path.home() / "b"
    assert resolve_data_dir("/a") == Path("/a")


def test_split_shards_last_by_name_is_validation(tmp_path):
    shards = write_shards(tmp_path)
    (tmp_path / ".cache").mkdir()
    write_shard(tmp_path / ".cache" / "shard_00009.parquet", ["not part of the dataset"])
    assert split_shards(tmp_path) == (shards[:2], shards[2:])


def missing_folder(folder):
    pass


def empty_folder(folder):
    folder.mkdir()


def single_shard(folder):
    write_shards(folder, 1)


def truncated_shard(folder):
    shard = write_shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def other_column(folder):
    write_shards(folder)
    write_shard(folder / "shard_00001.parquet", ["x"], column="content")


def numeric_column(folder):
    write_shards(folder)
    write_shard(folder / "shard_00001.parquet", [1, 2])


def no_rows(folder):
    write_shards(folder)
    write_shard(folder / "shard_00001.parquet", pa.table({"text": pa.array([], pa.string())}))


def only_null(folder):
    write_shards(folder)
    write_shard(folder / "shard_00001.parquet", pa.table({"text": pa.array([None] * 5, pa.string())}))


def only_empty(folder):
    write_shards(folder)
    write_shard(folder / "shard_00001.parquet", ["", None, ""])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing_folder, "data does not exist: download some with"),
        (empty_folder, "data has no parquet shards: download some with"),
        (single_shard, "only one shard: at least two are needed"),
        (truncated_shard, "shard_00001.parquet is not a complete parquet file: delete it"),
        (other_column, "shard_00001.parquet needs a column `text` of strings, it has: content: string"),
        (numeric_column, "needs a column `text` of strings, it has: text: int64"),
        (no_rows, "shard_00001.parquet has no text"),
        (only_null, "shard_00001.parquet has no text"),
        (only_empty, "shard_00001.parquet has no text"),
    ],
)
def test_split_shards_unusable_folder_raises_one_line(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message) as error:
        split_shards(tmp_path / "data")
    assert "\n" not in str(error.value)


def test_split_shards_accepts_large_strings_without_statistics(tmp_path):
    shards = write_shards(tmp_path)
    pq.write_table(pa.table({"text": pa.array(["x"], pa.large_string())}), shards[0], write_statistics=False)
    assert split_shards(tmp_path)[0] == shards[:2]


def test_split_shards_public_folder_without_validation_shard_raises(tmp_path):
    folder = tmp_path / "base_data_climbmix"
    write_shards(folder)
    with pytest.raises(UserError, match="validation shard of the public dataset, shard_06542.parquet: download it"):
        split_shards(folder)
    validation = write_shard(folder / "shard_06542.parquet", ["v"])
    assert split_shards(folder)[1] == [validation]


# ---- row groups ----


def test_row_groups_of_several_shards_are_numbered_consecutively(tmp_path):
    row_groups = RowGroups(write_shards(tmp_path, 2))  # 5 documents each, in row groups of 2
    assert len(row_groups) == 6
    assert [row_groups.locate(index) for index in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [row_groups.texts(index) for index in (5, 0, 2)] == [["1.4"], ["0.0", "0.1"], ["0.4"]]
    with pytest.raises(AssertionError):
        row_groups.texts(6)
    assert len(RowGroups([])) == 0


def test_row_groups_damaged_data_raises(tmp_path):
    shard = write_shard(tmp_path / "a.parquet", ["some text " * 100])
    row_groups = RowGroups([shard])
    content = bytearray(shard.read_bytes())
    content[4:60] = bytes(56)  # the page's header; the footer stays intact
    shard.write_bytes(content)
    with pytest.raises(UserError, match="a.parquet, row group 0 is damaged.*download or write the shard again"):
        row_groups.texts(0)


def test_row_groups_text_that_is_not_utf8_raises(tmp_path):
    texts = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    for read in (lambda: RowGroups([tmp_path / "a.parquet"]).texts(0), lambda: split_shards(tmp_path)):
        with pytest.raises(UserError, match="a.parquet, row group 0 is damaged.*utf-8"):
            read()


def test_split_shards_damaged_statistics_do_not_end_the_process(tmp_path):
    folder = tmp_path / "data"
    shards = write_shards(folder)
    content = shards[0].read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    found = 0
    for offset in range(footer, footer + 30):  # types of columns: pyarrow aborts if asked for statistics of other types
        for bit in (0, 2, 3):
            damaged = bytearray(content)
            damaged[offset] ^= 1 << bit
            shards[0].write_bytes(damaged)
            try:
                split_shards(folder)
            except UserError:
                found += 1
    assert found > 20


def test_iterate_texts_skips_null_and_empty_documents(tmp_path):
    shard = write_shard(tmp_path / "a.parquet", ["x", None, "", "y"])
    assert list(iterate_texts([shard])) == ["x", "y"]


def test_iterate_texts_yields_all_documents_in_order(tmp_path):
    assert list(iterate_texts(write_shards(tmp_path, 2))) == [f"{i}.{j}" for i in range(2) for j in range(5)]


def test_folder_of_the_environment_is_readable():
    if "NANOCHAT_DATA_DIR" not in os.environ:
        pytest.skip("NANOCHAT_DATA_DIR is not set")
    train, validation = split_shards(resolve_data_dir())
    assert next(iterate_texts(validation)) and len(RowGroups(train)) >= len(train)


# ---- download of the public dataset ----


@pytest.fixture
def hub(base_dir, monkeypatch):
    """A local server with shards 0, 1, 2 and 6542, and $HF_ENDPOINT pointing to it; retries do not wait."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        for i in (0, 1, 2, 6542):
            content = io.BytesIO()
            pq.write_table(pa.table({"text": [f"{i}"]}), content)
            server.files[f"{SOURCE}/shard_{i:05d}.parquet"] = content.getvalue()
        yield server


def requested_shards(server):
    return [int(match[1]) for _, path, *_ in server.log if (match := re.search(r"shard_(\d+)\.parquet", path))]


def test_download_fetches_training_and_validation_shards(hub, base_dir, capsys):
    dataset.main(["-n", "2"])
    folder = base_dir / "base_data_climbmix"
    assert "2 training shards, 1 for validation" in capsys.readouterr().out
    train, validation = split_shards(folder)
    assert list(iterate_texts(train + validation)) == ["0", "1", "6542"]
    assert requested_shards(hub)[0] == 6542  # before all others
    assert not list(folder.glob(".cache/huggingface/**/*"))


def test_download_requests_only_missing_shards(hub, base_dir):
    dataset.main(["-n", "2"])
    hub.log.clear()
    dataset.main(["-n", "3"])
    assert len(split_shards(base_dir / "base_data_climbmix")[0]) == 3
    assert set(requested_shards(hub)) == {2}
    hub.log.clear()
    dataset.main(["-n", "3"])
    assert hub.log == []


def test_download_missing_shard_is_named_and_exits_nonzero(hub, base_dir):
    with pytest.raises(SystemExit) as error:
        dataset.main(["-n", "4"])
    message = str(error.value.code)
    assert "1 of 4 shards" in message and "shard_00003.parquet (not found)" in message
    assert (base_dir / "base_data_climbmix" / "shard_00002.parquet").exists()  # the others arrived


def test_download_without_validation_shard_fetches_no_training_shard(hub, base_dir):
    del hub.files[f"{SOURCE}/shard_06542.parquet"]
    with pytest.raises(SystemExit, match="shard_06542.parquet"):
        dataset.main(["-n", "2"])
    assert list((base_dir / "base_data_climbmix").glob("*.parquet")) == []


def test_download_into_folder_of_another_dataset_is_refused(hub, tmp_path):
    write_shards(tmp_path / "mine")
    with pytest.raises(SystemExit, match="holds shards of another dataset"):
        dataset.main(["-n", "2", "--data-dir", str(tmp_path / "mine")])
    dataset.main(["-n", "1", "--data-dir", str(tmp_path / "disk")])
    dataset.main(["-n", "2", "--data-dir", str(tmp_path / "disk")])
    assert len(split_shards(tmp_path / "disk")[0]) == 2


@pytest.mark.parametrize("number", ["0", "-2", "6543"])
def test_download_impossible_number_of_shards_is_refused(hub, capsys, number):
    with pytest.raises(SystemExit) as error:
        dataset.main(["-n", number])
    message = f"{error.value.code} {capsys.readouterr().err}"
    assert "ask for 1 to 6542, or -1 for all" in message or "must be at least 1 or -1" in message
    assert not hub.log


def test_download_too_little_disk_is_refused_before_the_first_request(hub, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 * dataset.PUBLIC_SHARD_BYTES - 1))
    with pytest.raises(SystemExit, match="0.3 GB free, 3 shards need about 0.3 GB: free some space"):
        dataset.main(["-n", "2"])
    assert not hub.log
    dataset.main(["-n", "1"])


def test_download_offline_raises_one_line(base_dir, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as error:
        dataset.main(["-n", "2"])
    message = str(error.value.code)
    assert "http://127.0.0.1:9 cannot be reached: check the network" in message and "\n" not in message


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_download_unavailable_server_is_retried(hub, base_dir, method):
    hub.unavailable[f"{method} {SOURCE}/shard_00000.parquet"] = 2
    dataset.main(["-n", "1"])
    assert len(split_shards(base_dir / "base_data_climbmix")[0]) == 1


def test_download_broken_connection_is_retried(hub, base_dir):
    path = f"{SOURCE}/shard_00000.parquet"
    hub.break_at[path] = [100]
    dataset.main(["-n", "1"])
    assert (base_dir / "base_data_climbmix" / "shard_00000.parquet").read_bytes() == hub.files[path]
    assert len(hub.gets(path)) == 2


LATER = {"Retry-After": "1"}
FAULTS = {
    "500": [Fault(status=500)] * 2,
    "429 with Retry-After": [Fault(status=429, headers=LATER)] * 2,
    "stall": [Fault(stall_at=100)],
    "reset": [Fault(reset_at=100)] * 2,
    "reset before the first byte": [Fault(reset_at=0)],
    "other content of the same length": [Fault(content=b"x")],
    "too short": [Fault(content=b"", extra_length=0)],
    "a length that is too large": [Fault(extra_length=10)],
    "a length that is too small": [Fault(extra_length=-10)],
    "the file changes between two ranges": [Fault(reset_at=100), Fault(content=b"x")],
}


@pytest.mark.parametrize("name", FAULTS)
def test_download_with_a_faulty_server_ends_with_the_right_content(hub, base_dir, monkeypatch, name):
    path = f"{SOURCE}/shard_00000.parquet"
    content = hub.files[path]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    faults = [replace(fault, content=b"x" * len(content)) if fault.content else fault for fault in FAULTS[name]]
    hub.faults[f"GET {path}"] = list(faults)
    dataset.main(["-n", "1"])
    assert (base_dir / "base_data_climbmix" / "shard_00000.parquet").read_bytes() == content
    assert hub.faults[f"GET {path}"] == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=500), "500"),
        (Fault(content=b"x"), "its content does not match its checksum"),
        (Fault(extra_length=10), "shard_00000.parquet"),
    ],
)
def test_download_from_a_server_that_stays_faulty_is_one_line(hub, base_dir, fault, message):
    path = f"{SOURCE}/shard_00000.parquet"
    if fault.content:
        fault = replace(fault, content=b"x" * len(hub.files[path]))
    hub.faults[f"GET {path}"] = [fault] * 1000
    with pytest.raises(SystemExit) as error:
        dataset.main(["-n", "1"])
    assert message in str(error.value.code) and "run the same command again" in str(error.value.code)
    assert "\n" not in str(error.value.code)
    assert not (base_dir / "base_data_climbmix" / "shard_00000.parquet").exists()


@pytest.mark.slow
def test_download_killed_leaves_no_partial_shard_and_can_be_repeated(hub, base_dir):
    path = f"{SOURCE}/shard_00000.parquet"
    hub.hold_at[path] = 100
    environment = os.environ | {"HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "nanochat.dataset", "-n", "1"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not hub.gets(path) and process.poll() is None and time.monotonic() < deadline:
        pass
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    folder = base_dir / "base_data_climbmix"
    assert [shard.name for shard in folder.glob("*.parquet")] == ["shard_06542.parquet"]
    hub.hold_at.clear()
    dataset.main(["-n", "1"])
    assert (folder / "shard_00000.parquet").read_bytes() == hub.files[path]
    assert not list(folder.glob(".cache/huggingface/**/*"))  # nor what the killed download had written
