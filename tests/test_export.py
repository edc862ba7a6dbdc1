"""
Export: what all formats share, from the command line. tests/test_export_hf.py has the Hugging Face format.

    python -m pytest tests/test_export.py
"""

import shutil

import pytest
from factories import save_checkpoint, tiny_gpt

from nanochat.export import common
from nanochat.legacy import VINTAGES
from scripts import export


@pytest.fixture
def classic(base_dir, golden_tokenizer):
    """A classic fine-tuned model with the tag "tiny"."""
    return save_checkpoint(tiny_gpt(**VINTAGES["classic"]), "sft", tokenizer=golden_tokenizer)


def fail(capsys, *argv):
    """Runs an export that has to fail; returns its error message, which must be one line."""
    with pytest.raises(SystemExit) as stopped:
        export.main(list(argv))
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_export_without_out_is_an_error(classic, capsys):
    assert "--out is missing" in fail(capsys)


def test_export_of_unknown_tag_lists_the_tags(classic, tmp_path, capsys):
    assert "there are tiny" in fail(capsys, "-g", "d99", "--out", str(tmp_path / "x"))


def test_dtype_that_the_format_lacks_lists_its_dtypes(classic, tmp_path, capsys):
    message = fail(capsys, "--dtype", "int3", "--out", str(tmp_path / "x"))
    assert "--to hf offers float32, bfloat16" in message


def test_target_with_files_is_refused_and_unchanged(classic, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/notes").write_text("mine")
    assert "not an empty folder" in fail(capsys, "--out", str(tmp_path / "x"))
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["notes"]


def test_empty_target_folder_is_filled(classic, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    export.main(["--out", str(tmp_path / "x")])
    assert (tmp_path / "x/config.json").exists()
    assert f"to {tmp_path}/x (" in capsys.readouterr().out


def test_full_disk_is_an_error_before_anything_is_written(classic, tmp_path, monkeypatch, capsys):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: full)
    assert "free some space" in fail(capsys, "--out", str(tmp_path / "new/x"))
    assert not (tmp_path / "new").exists()


def test_failed_export_leaves_nothing_behind(classic, tmp_path, monkeypatch, capsys):
    def fail_after_a_file(source, folder):
        folder.mkdir()
        (folder / "part").write_text("half")
        raise OSError(28, "No space left on device")

    broken = common.Format(("float32",), lambda source: None, lambda source: 0, fail_after_a_file)
    monkeypatch.setitem(export.FORMATS, "hf", broken)
    assert "No space left" in fail(capsys, "--out", str(tmp_path / "out/x"))
    assert list((tmp_path / "out").iterdir()) == []
