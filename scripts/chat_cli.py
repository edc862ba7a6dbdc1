"""
Chat with a model in the terminal.

    python -m scripts.chat_cli                                          # the newest fine-tuned model
    python -m scripts.chat_cli -p "What is the capital of France?"      # one answer, for scripts
    python -m scripts.chat_cli -i rl -t 0.6

In the chat: `clear` starts a new conversation, `quit` ends; Ctrl-C stops an answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from nanochat import checkpoint_manager, hardware
from nanochat.common import UserError
from nanochat.conversation import PartReader, read_parts, render_to_fit
from nanochat.engine import Engine, Request
from nanochat.flags import command, flag
from nanochat.tokenizer import Tokenizer, default_dir

STYLES = {"text": "", "python": "cyan", "python_output": "magenta"}


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", short="-s")
    prompt: str = flag("", "answer this and end; the answer alone goes to standard output", short="-p")
    temperature: float = flag(0.6, "of sampling; 0 = greedy", short="-t")
    top_k: int = flag(50, "sample among the k likeliest tokens; 0 = among all", short="-k")
    max_tokens: int = flag(512, "tokens of an answer", short="-m")
    seed: int = flag(42, "of sampling")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> None:
    if flags.temperature < 0 or flags.top_k < 0 or flags.max_tokens < 1:
        raise UserError("--temperature and --top-k must be at least 0, --max-tokens at least 1")
    device = hardware.pick_device(flags.device)
    tokenizer = Tokenizer.load(default_dir())
    model, checkpoint = checkpoint_manager.load_model(
        flags.source, flags.model_tag, flags.step, tokenizer, device, hardware.pick_dtype(device)
    )
    settings = Request([], flags.max_tokens, flags.temperature, flags.top_k, seed=flags.seed)
    chat = Chat(Engine(model, tokenizer, num_rows=1), settings)
    if flags.prompt:
        print("".join(text for kind, text in chat.answer(flags.prompt) if kind == "text").strip())
        return
    console = Console(highlight=False)
    console.print(f"{checkpoint.path}, {hardware.describe(device)}. `clear` for a new conversation, `quit` to end.")
    talk(chat, console)


class Chat:
    """One conversation with the model, in messages."""

    def __init__(self, engine: Engine, settings: Request):
        self.engine, self.settings = engine, settings
        self.messages: list[dict[str, Any]] = []
        self.dropped = 0  # old messages left out of the last prompt

    def answer(self, text: str) -> Iterator[tuple[str, str]]:
        """Streams the reply as (kind of part, text); what was said by then is kept if the caller stops early."""
        self.messages.append({"role": "user", "content": text})
        prompt = self.prompt()
        reader, tokens = PartReader(self.engine.tokenizer), []
        try:
            for _, token, _ in self.engine.stream([replace(self.settings, prompt=prompt)]):
                if token is not None:
                    tokens.append(token)
                    kind, piece = reader.read(token)
                    if piece:
                        yield kind, piece
        finally:
            self.messages.append({"role": "assistant", "content": read_parts(tokens, self.engine.tokenizer)})

    def prompt(self) -> list[int]:
        """The conversation's tokens; the oldest turns are dropped for good until half the context is free for more."""
        engine = self.engine
        context, max_tokens = engine.model.config.sequence_len, self.settings.max_tokens
        try:
            ids, self.dropped = render_to_fit({"messages": self.messages}, engine.tokenizer, context, max_tokens)
        except UserError:
            self.messages.pop()
            raise
        self.messages = self.messages[self.dropped :]
        return ids


def with_brackets(pieces: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Sets tool calls apart: [12*13 → 156]."""
    marks = {"python": "[", "python_output": " → "}
    before = "text"
    for kind, piece in pieces:
        if kind != before:
            yield before, marks.get(kind, "] ")
            before = kind
        yield kind, piece


def talk(chat: Chat, console: Console) -> None:
    """Asks and answers until the user quits."""
    while True:
        try:
            text = console.input("\n[bold]You:[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text in ("quit", "exit"):
            return
        if text == "clear":
            chat.messages = []
            console.print("A new conversation.")
        elif text:
            try:
                console.print("[bold]nanochat:[/bold] ", end="")
                for kind, piece in with_brackets(chat.answer(text)):
                    console.print(piece, end="", style=STYLES[kind], markup=False, soft_wrap=True)
            except KeyboardInterrupt:
                console.print(" …", end="")
            except UserError as error:
                console.print(f"{error}", style="red", markup=False, end="")
            console.print()
            if chat.dropped:
                console.print(f"(the context was full: the oldest {chat.dropped} messages were dropped)", style="dim")


if __name__ == "__main__":
    main()
