"""
Command-line flags from a frozen dataclass, for all scripts: one field is one flag with one line of help.

    @dataclass(frozen=True)
    class Flags:
        depth: int = flag(20, "transformer layers; everything else follows from it", COUNT)
        source: str = flag("sft", "stage to load", short="-i", choices=("base", "sft"))

    @command
    def main(flags: Flags) -> None: ...

    main()                    # reads sys.argv; `--help` shows each line of help with its default
    main(["--depth", "4"])    # how tests call it

A flag that takes a number states the range that the number must be in, and nothing else checks it. Errors that a user
can fix end the program with one line. NANOCHAT_DEBUG=1 shows the traceback instead.
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from nanochat.common import UserError, describe_error

T = TypeVar("T")
LISTS = {tuple[int, ...]: int, tuple[float, ...]: float}  # types of fields with several numbers → type of each
METAVARS = {int: "N", float: "X", str: "TEXT"} | dict.fromkeys(LISTS, "N,N")  # how --help shows a value


@dataclass(frozen=True)
class Range:
    """The numbers that a flag accepts, infinity and NaN never. The flag's help gives their unit and what -1 means."""

    low: float
    high: float = math.inf
    above: bool = False  # only numbers above `low`, not `low` itself
    default: bool = False  # -1 is accepted as well
    auto: bool = False  # the same, and -1 is written "auto" on the command line

    def __contains__(self, number: float) -> bool:
        if number == -1 and (self.default or self.auto):
            return True
        return self.low <= number <= self.high and number < math.inf and not (self.above and number == self.low)

    def __str__(self) -> str:
        limits = f"{'above' if self.above else 'at least'} {self.low:,}"
        if self.high < math.inf:
            limits = f"from {self.low:,} to {self.high:,}"
        if self.auto:
            return f"{limits} or auto"
        return f"{limits} or -1" if self.default else limits


COUNT = Range(1)
COUNT_OR_DEFAULT = Range(1, default=True)
COUNT_OR_AUTO = Range(1, auto=True)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
INTERVAL = Range(0, default=True)  # steps between two events; 0 and -1 have a meaning of their own
STEP = Range(0, default=True)  # of a checkpoint; -1 = the newest
DEPTH = Range(1, 200)
SEED = Range(0, 2**63 - 1)  # what torch accepts


def flag(
    default: Any,
    help: str,
    within: Range | None = None,
    *,
    short: str = "",
    choices: Sequence[Any] | None = None,
) -> Any:
    """
    A dataclass field with its default, help text, range (numbers need one, or choices), short name and allowed values.
    A field whose name is a word of Python ends in _, which the flag leaves out. A field of type list[str] takes the
    arguments without a flag, one of type tuple[int, ...] or tuple[float, ...] takes numbers separated by commas.
    """
    return field(default=default, metadata={"help": help, "within": within, "short": short, "choices": choices})


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Parses argv (sys.argv by default) into an instance of cls; exits with one line on bad input."""
    hints = get_type_hints(cls)
    positional = [f.name for f in fields(cls) if hints[f.name] == list[str]]  # type: ignore[arg-type]
    parser = _Parser(
        usage=" ".join(["%(prog)s", *(f"{name.upper()}…" for name in positional), "[flags]"]),
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=120),
    )
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name in positional:
            nargs = "+" if f.default is MISSING else "*"
            parser.add_argument(f.name, nargs=nargs, default=f.default, metavar=f.name.upper(), help=f.metadata["help"])
            continue
        name, kind = _flag_name(f.name), hints[f.name]
        names = [f.metadata["short"], name] if f.metadata["short"] else [name]
        help_line = f.metadata["help"]
        if f.default not in ("", (), MISSING):
            help_line += f" (default: {_to_text(f, f.default)})"
        options: dict[str, Any] = {"default": f.default, "help": help_line, "dest": f.name}
        choices = f.metadata["choices"]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            read = str if kind is str else functools.partial(_read_value, f, kind)
            options |= {"type": read, "choices": choices, "required": f.default is MISSING}
            if not choices:
                options["metavar"] = METAVARS[kind]
        parser.add_argument(*names, **options)
    return cls(**vars(parser.parse_intermixed_args(argv)))


def _read_value(f: Field[Any], kind: type, text: str) -> Any:
    """The value of a flag that takes numbers. argparse puts the flag's name before the message of an error."""
    if kind in LISTS:
        return tuple(_read_number(f, LISTS[kind], part) for part in text.split(",")) if text else ()
    return _read_number(f, kind, text)


def _read_number(f: Field[Any], kind: type, text: str) -> Any:
    within = f.metadata["within"] or Range(-math.inf)
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    if within.auto and text == "auto":
        return -1
    try:
        number = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        if within.auto:
            what += " or auto"
        raise argparse.ArgumentTypeError(f"{shown!r} is not {what} ({f.metadata['help']})") from None
    if number not in within:
        raise argparse.ArgumentTypeError(f"{shown} must be {within} ({f.metadata['help']})")
    if kind is int and number >= 2**63:
        raise argparse.ArgumentTypeError(f"{shown} is too large ({f.metadata['help']})")
    return number


def _to_text(f: Field[Any], value: Any) -> str:
    """A flag's value as it is written on the command line."""
    within = f.metadata["within"]
    if within and within.auto and value == -1:
        return "auto"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Restart(Exception):
    """Raised by a command to be started again, in a new process with other flags."""

    def __init__(self, reason: str, flags: Any):
        super().__init__(reason)
        self.flags = flags


def to_argv(flags: Any, *, changed_only: bool = False) -> list[str]:
    """The command line that parse() turns into these flags. changed_only: without those that have their defaults."""
    argv = []
    for f in fields(flags):
        name, value = _flag_name(f.name), getattr(flags, f.name)
        if changed_only and value == f.default:
            continue
        argv += [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, _to_text(f, value)]
    return argv


def _flag_name(field_name: str) -> str:
    return "--" + field_name.rstrip("_").replace("_", "-")


def command(main: Callable[[Any], T]) -> Callable[..., T]:
    """
    Turns main(flags) into main(argv=None), which parses the command line. UserError, OSError and Ctrl-C end the program
    with one line on stderr and exit code 1.
    """
    cls = next(iter(get_type_hints(main).values()))

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> T:
        flags = parse(cls, argv, sys.modules[main.__module__].__doc__)
        try:
            return main(flags)
        except Restart as restart:
            if argv is not None:  # not started from the command line
                raise
            print(restart, flush=True)
            program = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv[1:])]  # such as -m scripts.base_train
            os.execv(sys.executable, [sys.executable, *program, *to_argv(restart.flags)])
        except (UserError, OSError) as error:
            if os.environ.get("NANOCHAT_DEBUG"):
                raise
            raise SystemExit(f"error: {describe_error(error)}") from error
        except KeyboardInterrupt as interrupt:
            raise SystemExit("interrupted") from interrupt

    return run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see --help\n")
