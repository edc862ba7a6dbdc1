"""
Command-line flags from a dataclass, and one-line errors.

    python -m pytest tests/test_cli.py
"""

import importlib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import pytest

from nanochat.cli import (
    COUNT,
    COUNT_OR_AUTO,
    COUNT_OR_DEFAULT,
    LISTS,
    POSITIVE,
    SEED,
    SHARE,
    Range,
    command,
    flag,
    parse,
    to_argv,
)
from nanochat.common import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Flags:
    depth: int = flag(20, "transformer layers")
    matrix_lr: float = flag(0.02, "learning rate of the matrices")
    source: str = flag("sft", "stage to load", short="-i", choices=("base", "sft"))
    workers: int = flag(4, "downloads at a time", choices=(1, 2, 4))
    compile: bool = flag(True, "compile the model")
    resume: bool = flag(False, "resume from the newest checkpoint")


@dataclass(frozen=True)
class Required:
    prompt: str = flag(MISSING, "what to say", short="-p")


@dataclass(frozen=True)
class Positional:
    files: list[str] = flag(MISSING, "files to read")
    out: str = flag("", "folder to write to")


@command
def main(flags: Flags) -> Flags:
    if flags.depth > 100:
        raise UserError(f"--depth {flags.depth}: at most 100")
    if flags.depth < 0:
        raise KeyError("a bug")
    return flags


def test_parse_without_arguments_gives_the_defaults():
    assert parse(Flags, []) == Flags(20, 0.02, "sft", 4, True, False)


def test_parse_reads_every_kind_of_flag():
    argv = ["--depth", "4", "--matrix-lr=1e-3", "-i", "base", "--workers", "2", "--no-compile", "--resume"]
    assert parse(Flags, argv) == Flags(4, 0.001, "base", 2, False, True)
    assert parse(Flags, ["--source", "base", "--compile", "--no-resume"]) == Flags(source="base")


def test_negative_number_is_a_value():
    assert parse(Flags, ["--depth", "-1"]).depth == -1


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--depth", "four"], "--depth"),
        (["--deep", "4"], "--deep"),
        (["-i", "rl"], "source"),
        (["--workers", "3"], "--workers"),
        (["--resume=yes"], "--resume"),
        (["stray"], "stray"),
    ],
)
def test_bad_flag_prints_one_line_and_exits_with_2(capsys, argv, named):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("error: ") and named in shown.err


def test_help_shows_docstring_flags_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "python -m pytest tests/test_cli.py" in shown  # the commands to paste keep their lines
    for text in ("--depth", "transformer layers", "default: 20", "-i", "--no-compile"):
        assert text in shown


def test_user_error_prints_one_line_and_exits_with_1():
    with pytest.raises(SystemExit) as caught:
        main(["--depth", "101"])
    assert caught.value.code == "error: --depth 101: at most 100"  # Python prints it to stderr and exits with 1


def test_debug_variable_shows_the_traceback_of_a_user_error(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DEBUG", "1")
    with pytest.raises(UserError):
        main(["--depth", "101"])


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError):
        main(["--depth", "-1"])


def test_main_returns_what_the_function_returns():
    assert main(["--depth", "4"]) == Flags(depth=4)


def test_flag_without_default_is_required(capsys):
    assert parse(Required, ["-p", "hello"]) == Required("hello")
    with pytest.raises(SystemExit) as caught:
        parse(Required, [])
    assert caught.value.code == 2 and "--prompt" in capsys.readouterr().err


def test_field_of_type_list_takes_the_arguments_without_a_flag(capsys):
    expected = Positional(["a", "b"], "c")
    assert parse(Positional, ["a", "b", "--out", "c"]) == parse(Positional, ["a", "--out", "c", "b"]) == expected
    with pytest.raises(SystemExit):
        parse(Positional, ["--out", "c"])
    assert "files" in capsys.readouterr().err.lower()
    with pytest.raises(SystemExit):
        parse(Positional, ["--help"])
    assert "FILES… [flags]" in capsys.readouterr().out


def test_ctrl_c_prints_one_line():
    @command
    def endless(flags: Flags) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="^interrupted$"):
        endless([])


# ---- ranges ----


@dataclass(frozen=True)
class Numbers:
    steps: int = flag(-1, "optimizer steps; -1 = once through the data", COUNT_OR_DEFAULT)
    rows: int = flag(-1, "rows per pass; auto = as many as fit", COUNT_OR_AUTO)
    rate: float = flag(0.02, "learning rate", POSITIVE)
    share: float = flag(0.5, "share of the run", SHARE)
    seed: int = flag(42, "seed of the samples", SEED)
    sizes: tuple[int, ...] = flag((1, 8), "batch sizes, separated by commas", COUNT)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "0"], "--steps: 0 must be at least 1 or -1 (optimizer steps; -1 = once through the data)"),
        (["--steps", "-2"], "--steps: -2 must be at least 1 or -1"),
        (["--steps", "2.5"], "--steps: '2.5' is not a whole number (optimizer steps"),
        (["--steps", "9" * 30], f"--steps: {'9' * 30} is too large (optimizer steps"),
        (["--steps", "9" * 9000], f"--steps: '{'9' * 40}…' is not a whole number"),
        (["--rows", "0"], "--rows: 0 must be at least 1 or auto (rows per pass"),
        (["--rows", "many"], "--rows: 'many' is not a whole number or auto"),
        (["--rate", "0"], "--rate: 0 must be above 0 (learning rate)"),
        (["--rate", "nan"], "--rate: nan must be above 0 (learning rate)"),
        (["--rate", "inf"], "--rate: inf must be above 0 (learning rate)"),
        (["--share", "1.5"], "--share: 1.5 must be from 0 to 1 (share of the run)"),
        (["--seed", "9223372036854775808"], "must be from 0 to 9,223,372,036,854,775,807 (seed of the samples)"),
        (["--sizes", "4,0"], "--sizes: 0 must be at least 1 (batch sizes, separated by commas)"),
        (["--sizes", "4,,8"], "--sizes: '' is not a whole number"),
    ],
)
def test_number_out_of_range_names_flag_range_and_unit(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        parse(Numbers, argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert message in error and error.startswith("error: argument ")


def test_number_in_range_is_accepted():
    argv = ["--steps=-1", "--rows", "auto", "--rate", "1e-9", "--share", "1", "--seed", str(2**63 - 1), "--sizes", "4"]
    assert parse(Numbers, argv) == Numbers(-1, -1, 1e-9, 1.0, 2**63 - 1, (4,))


def test_to_argv_is_the_inverse_of_parse(capsys):
    numbers = Numbers(steps=3, rate=0.5, sizes=(2, 3))
    assert parse(Numbers, to_argv(numbers)) == numbers
    assert parse(Numbers, to_argv(Numbers())) == Numbers()
    with pytest.raises(SystemExit):
        parse(Numbers, ["--help"])
    shown = capsys.readouterr().out
    assert "default: auto" in shown and "default: 1,8" in shown


def test_range_without_upper_limit_excludes_infinity():
    assert 10**400 in Range(0) and float("inf") not in Range(0) and float("nan") not in Range(-1)


SCRIPTS = [path for path in (ROOT / "scripts").rglob("*.py") if "@command" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "nanochat/dataset.py"], ids=lambda path: path.stem)
def test_every_number_of_every_script_has_a_range_that_its_default_is_in(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    flags = importlib.import_module(name).Flags
    hints = get_type_hints(flags)
    for f in fields(flags):
        if hints[f.name] not in (int, float, *LISTS) or f.metadata["choices"]:
            continue
        within = f.metadata["within"]
        assert within is not None, f"{name}: {f.name} has no range"
        values = f.default if isinstance(f.default, tuple) else (f.default,)
        assert all(value in within for value in values), f"{name}: the default of {f.name} is not in its range"
