"""
Command-line flags from a dataclass, and one-line errors.

    python -m pytest tests/test_cli.py
"""

from dataclasses import MISSING, dataclass

import pytest

from nanochat.cli import command, flag, parse, require_positive
from nanochat.common import UserError


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


def test_require_positive_names_the_flag_and_its_value():
    require_positive(Flags(), "depth", "workers")
    with pytest.raises(UserError, match="^--matrix-lr -1: must be at least 1$"):
        require_positive(Flags(matrix_lr=-1), "depth", "matrix_lr")
    require_positive(Flags(matrix_lr=-1), "depth", "matrix_lr", or_default=True)
    with pytest.raises(UserError, match="^--depth -2: must be at least 1, or -1 for the default$"):
        require_positive(Flags(depth=-2), "depth", or_default=True)
