"""
Shards: which are for training and which for validation, what is wrong with a folder in one line, row groups under one
numbering, the public download.

    python -m pytest tests/test_dataset.py
"""

import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_server import running

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import RowGroups, iterate_texts, resolve_data_dir, split_shards

SOURCE = "/datasets/karpathy/climbmix-400b-shuffle/resolve/main"


def write(path, texts, rows_per_group=2, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = texts if isinstance(texts, pa.Table) else pa.table({column: texts})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def some(folder, num_shards=3):
    return [write(folder / f"shard_{i:05d}.parquet", [f"{i}.{j}" for j in range(5)]) for i in range(num_shards)]


def test_the_folder_is_the_argument_then_the_environment_then_the_public_one(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    assert resolve_data_dir() == tmp_path / "base_data_climbmix"
    monkeypatch.setenv("NANOCHAT_DATA_DIR", "~/b")
    assert resolve_data_dir() == Path.home() / "b"
    assert resolve_data_dir("/a") == Path("/a")


def test_the_last_shard_by_name_is_for_validation(tmp_path):
    shards = some(tmp_path)
    (tmp_path / ".shard_00009.parquet.0123.part").write_bytes(b"half")  # a download under way
    assert split_shards(tmp_path) == (shards[:2], shards[2:])


def folder_missing(folder):
    pass


def folder_empty(folder):
    folder.mkdir()


def one_shard(folder):
    some(folder, 1)


def truncated(folder):
    shard = some(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def other_column(folder):
    some(folder)
    write(folder / "shard_00001.parquet", ["x"], column="content")


def numbers(folder):
    some(folder)
    write(folder / "shard_00001.parquet", [1, 2])


def no_rows(folder):
    some(folder)
    write(folder / "shard_00001.parquet", pa.table({"text": pa.array([], pa.string())}))


def only_null(folder):
    some(folder)
    write(folder / "shard_00001.parquet", pa.table({"text": pa.array([None] * 5, pa.string())}))


def only_empty(folder):
    some(folder)
    write(folder / "shard_00001.parquet", ["", None, ""])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (folder_missing, "data does not exist: fetch some with"),
        (folder_empty, "data has no parquet shards: fetch some with"),
        (one_shard, "one shard only: at least two are needed"),
        (truncated, "shard_00001.parquet is not a whole parquet file: delete it"),
        (other_column, "shard_00001.parquet needs a column `text` of strings, it has: content: string"),
        (numbers, "needs a column `text` of strings, it has: text: int64"),
        (no_rows, "shard_00001.parquet holds no text"),
        (only_null, "shard_00001.parquet holds no text"),
        (only_empty, "shard_00001.parquet holds no text"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message) as error:
        split_shards(tmp_path / "data")
    assert "\n" not in str(error.value)


def test_large_strings_and_files_without_statistics(tmp_path):
    shards = some(tmp_path)
    pq.write_table(pa.table({"text": pa.array(["x"], pa.large_string())}), shards[0], write_statistics=False)
    assert split_shards(tmp_path)[0] == shards[:2]


def test_a_public_folder_without_its_validation_shard_promotes_no_training_shard(tmp_path):
    folder = tmp_path / "base_data_climbmix"
    some(folder)
    with pytest.raises(UserError, match="validation shard, shard_06542.parquet: fetch it with"):
        split_shards(folder)
    validation = write(folder / "shard_06542.parquet", ["v"])
    assert split_shards(folder)[1] == [validation]


def test_row_groups_under_one_numbering(tmp_path):
    row_groups = RowGroups(some(tmp_path, 2))  # 5 documents each, in row groups of 2
    assert len(row_groups) == 6
    assert [row_groups.position(unit) for unit in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [row_groups.texts(unit) for unit in (5, 0, 2)] == [["1.4"], ["0.0", "0.1"], ["0.4"]]
    with pytest.raises(AssertionError):
        row_groups.texts(6)
    assert len(RowGroups([])) == 0


def test_null_and_empty_documents_are_left_out(tmp_path):
    shard = write(tmp_path / "a.parquet", ["x", None, "", "y"])
    assert list(iterate_texts([shard])) == ["x", "y"]


def test_all_documents_in_order(tmp_path):
    assert list(iterate_texts(some(tmp_path, 2))) == [f"{i}.{j}" for i in range(2) for j in range(5)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        for i in (0, 1, 2, 6542):
            content = io.BytesIO()
            pq.write_table(pa.table({"text": [f"{i}"]}), content)
            server.files[f"{SOURCE}/shard_{i:05d}.parquet"] = content.getvalue()
        yield server


def test_the_public_download(hub, tmp_path, capsys):
    dataset.main(["-n", "2"])
    folder = tmp_path / "base_data_climbmix"
    assert "2 training shards, 1 for validation" in capsys.readouterr().out
    train, validation = split_shards(folder)
    assert list(iterate_texts(train + validation)) == ["0", "1", "6542"]
    assert hub.log[0][1].endswith("shard_06542.parquet")  # before all others
    hub.log.clear()
    dataset.main(["-n", "3"])
    assert len(split_shards(folder)[0]) == 3
    assert {path[-9:-8] for _, path, *_ in hub.log} == {"2"}  # only what was missing


def test_a_missing_shard_is_named_and_the_exit_code_is_not_zero(hub):
    with pytest.raises(SystemExit) as error:
        dataset.main(["-n", "4"])
    assert "1 of 4 files are missing" in str(error.value.code) and "shard_00003.parquet" in str(error.value.code)


def test_without_the_validation_shard_no_training_shard_is_fetched(hub, tmp_path):
    del hub.files[f"{SOURCE}/shard_06542.parquet"]
    with pytest.raises(SystemExit, match="shard_06542.parquet"):
        dataset.main(["-n", "2"])
    assert list((tmp_path / "base_data_climbmix").glob("*.parquet")) == []


def test_the_public_dataset_is_not_mixed_with_another(hub, tmp_path):
    some(tmp_path / "mine")
    with pytest.raises(SystemExit, match="holds shards of something else"):
        dataset.main(["-n", "2", "--data-dir", str(tmp_path / "mine")])
    dataset.main(["-n", "1", "--data-dir", str(tmp_path / "disk")])
    dataset.main(["-n", "2", "--data-dir", str(tmp_path / "disk")])
    assert len(split_shards(tmp_path / "disk")[0]) == 2


@pytest.mark.parametrize("number", ["0", "-2", "6543"])
def test_numbers_of_shards_that_there_are_not(hub, number):
    with pytest.raises(SystemExit, match="ask for 1 to 6542, or -1 for all"):
        dataset.main(["-n", number])
    assert not hub.log


def test_the_folder_that_the_environment_names():
    if "NANOCHAT_DATA_DIR" not in os.environ:
        pytest.skip("NANOCHAT_DATA_DIR is not set")
    train, validation = split_shards(resolve_data_dir())
    assert next(iterate_texts(validation)) and len(RowGroups(train)) >= len(train)
