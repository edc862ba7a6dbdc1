"""
Chat with a model in the terminal.

    python -m scripts.chat_cli                                          # the newest fine-tuned model
    python -m scripts.chat_cli -i rl -t 0.6
    python -m scripts.chat_cli -p "What is the capital of France?"      # one response, for scripts
    python -m scripts.chat_cli -p - < question.txt > response.txt
    python -m scripts.chat_cli "Who are you?" "What is 2 + 3?"          # questions and responses, one after the other

In the chat, /help lists the commands; Ctrl-C stops a response, Ctrl-D quits.
"""

import io
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from rich.console import Console

from nanochat import checkpoint_manager, hardware
from nanochat.chat.session import ChatSession, format_tool_calls
from nanochat.chat.terminal import LineEditor, can_redraw, interruptible, make_console, printable, show
from nanochat.cli import COUNT, NOT_NEGATIVE, SEED, STEP, command, flag
from nanochat.common import UserError, base_dir
from nanochat.engine import Engine
from nanochat.request import Request

HELP = """\
/retry            generate another response to the last message, with another seed
/temperature [x]  show or set the sampling temperature; 0 = greedy
/save FILE        save the conversation, as messages (.json) or as readable text (.md)
/clear, clear     start a new conversation
/quit, quit       quit, as exit and Ctrl-D do
Ctrl-C stops a response; the arrow keys bring back earlier messages."""


@dataclass(frozen=True)
class Flags:
    questions: list[str] = flag((), "print each of these with its response, in separate conversations, and quit")
    source: str = flag("sft", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default: the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", STEP, short="-s")
    prompt: str = flag("", "print the response to this message, - for standard input, and quit", short="-p")
    temperature: float = flag(0.6, "sampling temperature; 0 = greedy", NOT_NEGATIVE, short="-t")
    top_k: int = flag(50, "sample among the k most likely tokens; 0 = among all", NOT_NEGATIVE, short="-k")
    max_tokens: int = flag(512, "tokens per response", COUNT, short="-m")
    seed: int = flag(42, "seed of sampling", SEED)
    speculate: int = flag(
        0, "tokens drafted per step where text repeats (4: 1.2 times as fast on a CPU); 0 = off", NOT_NEGATIVE
    )
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the encoding lacks must not end the program
    prompt = sys.stdin.read().strip() if flags.prompt == "-" else flags.prompt
    if flags.prompt == "-" and not prompt:
        raise UserError("-p -: standard input is empty")

    device = hardware.pick_device(flags.device)
    dtype = hardware.pick_dtype(device)
    model, tokenizer, checkpoint = checkpoint_manager.load_model(
        flags.source, flags.model_tag, flags.step, device, dtype
    )
    template = Request([], flags.max_tokens, flags.temperature, flags.top_k, seed=flags.seed)
    engine = Engine(model, tokenizer, max_slots=1, precisions=hardware.chat_precisions(), speculate=flags.speculate)
    session = ChatSession(engine, template)
    if prompt:
        print_response(session, prompt)
        return
    for question in flags.questions:
        print("> " + question)
        print_response(session, question)
        session.clear()
    if flags.questions:
        return
    console = make_console()
    console.print(f"{checkpoint.path}, {hardware.describe(device)}. /help lists the commands.")
    chat(session, console, LineEditor(console, base_dir() / "chat_history.jsonl"))


def print_response(session: ChatSession, message: str) -> None:
    """Prints the text of the response, without tool calls."""
    response = "".join(text for kind, text in session.respond(message) if kind == "text")
    print(printable(response.strip()), flush=True)


def chat(session: ChatSession, console: Console, editor: LineEditor) -> None:
    """Reads messages and commands until the user quits."""
    while True:
        console.print()
        try:
            text = editor.read()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("(quit or Ctrl-D quits)", style="dim")
            continue
        if text in ("/quit", "quit", "exit"):
            return
        try:
            handle(text, session, console)
        except UserError as error:
            console.print(f"{error}", style="red")


def handle(text: str, session: ChatSession, console: Console) -> None:
    """Executes a command, or responds to a message."""
    match text.split(maxsplit=1):
        case []:
            pass
        case ["/help"]:
            console.print(HELP)
        case ["/clear"] | ["clear"]:
            session.clear()
            console.print("A new conversation.")
        case ["/retry"]:
            show_response(session, session.retry(), console)
        case ["/save", *name]:
            console.print(f"Saved: {session.save(''.join(name))}")
        case ["/temperature", *number]:
            if number:
                session.set_temperature(number[0])
            console.print(f"temperature {session.template.temperature:g}")
        case [word, *_] if word.startswith("/"):
            raise UserError(f"{word}: unknown command, /help lists the commands")
        case _:
            show_response(session, session.respond(text), console)


def show_response(session: ChatSession, pieces: Generator[tuple[str, str]], console: Console) -> None:
    """Streams a response until it is complete or Ctrl-C stops it, then notes why it is incomplete, if it is."""
    quote = "`" if can_redraw(console) else ""  # Markdown for code
    with closing(pieces), interruptible() as stop:
        show(format_tool_calls(until_set(stop, pieces), quote), console)
    finish = session.completion.finish
    notes = []
    if stop.is_set():
        notes.append("stopped")
    if finish == "length":
        notes.append(f"cut at {session.template.max_tokens} tokens: --max-tokens allows more")
    if finish == "context":
        notes.append("cut: the context is full")
    if session.num_dropped > 0:
        notes.append(f"the context was full: the oldest {session.num_dropped} messages were dropped")
    for note in notes:
        console.print(f"({note})", style="dim")


def until_set(stop: threading.Event, pieces: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yields pieces until the event is set."""
    for piece in pieces:
        yield piece
        if stop.is_set():
            return


if __name__ == "__main__":
    main()
