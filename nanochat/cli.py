"""
Command-line flags from a frozen dataclass, for all scripts: one field is one flag with one line of help.

    @dataclass(frozen=True)
    class Flags:
        depth: int = flag(20, "transformer layers; everything else follows from it")
        source: str = flag("sft", "stage to load", short="-i", choices=("base", "sft"))

    @command
    def main(flags: Flags) -> None: ...

    main()                    # reads sys.argv; `--help` shows each line of help with its default
    main(["--depth", "4"])    # how tests call it

Errors that a user can fix end the program with one line. NANOCHAT_DEBUG=1 shows the traceback instead.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar, get_type_hints

from nanochat.common import UserError

T = TypeVar("T")
METAVARS = {int: "N", float: "X", str: "TEXT"}  # how --help shows a value


def flag(default: Any, help: str, short: str = "", choices: Sequence[Any] | None = None, auto: bool = False) -> Any:
    """
    A dataclass field with its default, help text, short name and allowed values. auto: -1 is written "auto" on the
    command line. A field whose name is a word of Python ends in _, which the flag leaves out. A field of
    type list[str] takes the arguments without a flag.
    """
    return field(default=default, metadata={"help": help, "short": short, "choices": choices, "auto": auto})


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
            parser.add_argument(f.name, nargs="+", metavar=f.name.upper(), help=f.metadata["help"])
            continue
        name, kind = _flag_name(f.name), hints[f.name]
        names = [f.metadata["short"], name] if f.metadata["short"] else [name]
        help_line = f.metadata["help"]
        if f.default not in ("", MISSING):
            help_line += f" (default: {'auto' if f.metadata['auto'] else f.default})"
        options: dict[str, Any] = {"default": f.default, "help": help_line, "dest": f.name}
        choices = f.metadata["choices"]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": choices, "required": f.default is MISSING}
            if f.metadata["auto"]:
                options["type"] = _int_or_auto
            if not choices:
                options["metavar"] = METAVARS[kind]
        parser.add_argument(*names, **options)
    return cls(**vars(parser.parse_intermixed_args(argv)))


def _int_or_auto(text: str) -> int:
    if text != "auto" and not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: write a number or auto")
    return -1 if text == "auto" else int(text)


def require_positive(flags: Any, *names: str, or_default: bool = False) -> None:
    """UserError unless each of these flags is at least 1 or, with or_default, -1."""
    for name in names:
        value = getattr(flags, name)
        if value < 1 and not (or_default and value == -1):
            limit = "at least 1, or -1 for the default" if or_default else "at least 1"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {limit}")


class Restart(Exception):
    """Raised by a command to be started again, in a new process with other flags."""

    def __init__(self, reason: str, flags: Any):
        super().__init__(reason)
        self.flags = flags


def to_argv(flags: Any) -> list[str]:
    """The command line that parse() turns into these flags."""
    argv = []
    for f in fields(flags):
        name, value = _flag_name(f.name), getattr(flags, f.name)
        argv += [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
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
        except (UserError, OSError) as error:  # OSErrors name their file: no permission, no space left
            if os.environ.get("NANOCHAT_DEBUG"):
                raise
            raise SystemExit(f"error: {' '.join(str(error).split())}") from error
        except KeyboardInterrupt as interrupt:
            raise SystemExit("interrupted") from interrupt

    return run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message} (see --help)\n")
