"""
Chat with a model in the terminal.

    python -m scripts.chat_cli                                          # the newest fine-tuned model
    python -m scripts.chat_cli -i rl -t 0.6
    python -m scripts.chat_cli -p "What is the capital of France?"      # one answer, for scripts
    python -m scripts.chat_cli -p - < question.txt > answer.txt

In the chat, /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.
"""

import io
import math
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from rich.console import Console

from nanochat import checkpoint_manager, hardware
from nanochat.chat.session import Chat, with_calls
from nanochat.chat.terminal import LineEditor, can_redraw, interruptible, make_console, printable, show
from nanochat.cli import command, flag
from nanochat.common import UserError, base_dir
from nanochat.engine import Engine, Request
from nanochat.tokenizer import Tokenizer, default_dir

HELP = """\
/retry            answer the last question anew, with another seed
/temperature [x]  show the temperature of sampling, or set it; 0 = greedy
/save FILE        keep the conversation, as messages (.json) or to be read (.md)
/clear, clear     begin a new conversation
/quit, quit       end, as exit and Ctrl-D do
Ctrl-C stops an answer; the arrow keys bring back what was asked."""


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", short="-s")
    prompt: str = flag("", "answer this, - for standard input, and end; prints the answer alone", short="-p")
    temperature: float = flag(0.6, "of sampling; 0 = greedy", short="-t")
    top_k: int = flag(50, "sample among the k likeliest tokens; 0 = among all", short="-k")
    max_tokens: int = flag(512, "tokens of an answer", short="-m")
    seed: int = flag(42, "of sampling")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> None:
    if not 0 <= flags.temperature < math.inf or flags.top_k < 0 or flags.max_tokens < 1:
        raise UserError("--temperature and --top-k must be at least 0, --max-tokens at least 1")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the encoding lacks is no reason to end
    prompt = sys.stdin.read().strip() if flags.prompt == "-" else flags.prompt
    if flags.prompt == "-" and not prompt:
        raise UserError("-p -: there is no question on standard input")
    device = hardware.pick_device(flags.device)
    tokenizer = Tokenizer.load(default_dir())
    model, checkpoint = checkpoint_manager.load_model(
        flags.source, flags.model_tag, flags.step, tokenizer, device, hardware.pick_dtype(device)
    )
    settings = Request([], flags.max_tokens, flags.temperature, flags.top_k, seed=flags.seed)
    chat = Chat(Engine(model, tokenizer, num_rows=1), settings)
    if prompt:
        print(printable("".join(piece for kind, piece in chat.answer(prompt) if kind == "text").strip()))
        return
    console = make_console()
    console.print(f"{checkpoint.path}, {hardware.describe(device)}. /help lists the commands.")
    talk(chat, console, LineEditor(console, base_dir() / "chat_history.jsonl"))


def talk(chat: Chat, console: Console, editor: LineEditor) -> None:
    """Asks and answers until the user quits."""
    while True:
        console.print()
        try:
            text = editor.read()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n(quit or Ctrl-D ends)", style="dim")
            continue
        if text in ("/quit", "quit", "exit"):
            return
        try:
            respond(chat, text, console)
        except UserError as error:
            console.print(f"{error}", style="red")


def respond(chat: Chat, text: str, console: Console) -> None:
    """Answers a question, or obeys a command."""
    match text.split(maxsplit=1):
        case []:
            pass
        case ["/help"]:
            console.print(HELP)
        case ["/clear"] | ["clear"]:
            chat.clear()
            console.print("A new conversation.")
        case ["/retry"]:
            show_answer(chat, chat.retry(), console)
        case ["/save", *name]:
            console.print(f"Saved: {chat.save(''.join(name))}")
        case ["/temperature", *number]:
            if number:
                chat.set_temperature(number[0])
            console.print(f"temperature {chat.settings.temperature:g}")
        case [word, *_] if word.startswith("/"):
            raise UserError(f"{word}: not a command here, /help lists them")
        case _:
            show_answer(chat, chat.answer(text), console)


def show_answer(chat: Chat, pieces: Generator[tuple[str, str]], console: Console) -> None:
    """Streams an answer until it ends or Ctrl-C stops it, and says what the user would not see otherwise."""
    quote = "`" if can_redraw(console) else ""  # as code, in Markdown
    with closing(pieces), interruptible() as stop:
        show(with_calls(until(stop, pieces), quote), console)
    notes = {
        "stopped": stop.is_set(),
        f"cut at {chat.settings.max_tokens} tokens: --max-tokens allows more": chat.completion.finish == "length",
        "cut: the context is full": chat.completion.finish == "context",
        f"the context was full: the oldest {chat.dropped} messages were dropped": chat.dropped > 0,
    }
    for note, applies in notes.items():
        if applies:
            console.print(f"({note})", style="dim")


def until(stop: threading.Event, pieces: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for piece in pieces:
        yield piece
        if stop.is_set():
            return


if __name__ == "__main__":
    main()
