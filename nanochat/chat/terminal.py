"""
The terminal side of the chat: a line editor with a history file, and responses shown as Markdown while they grow.

Ctrl-C stops a response, not the program. Into a pipe, or on a terminal that cannot move its cursor, text is written
unformatted as it arrives.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Markdown
from rich.segment import Segment, SegmentLines
from rich.syntax import Syntax
from rich.theme import Theme

from nanochat.common import parse_json

MAX_HISTORY = 1000  # messages that the arrow keys bring back; heuristic, not tuned
FRAME_SECONDS = 1 / 30  # between two frames of a growing response; heuristic, not tuned
MAX_DRAWING_SHARE = 0.2  # share of the time that drawing may take; long responses are drawn less often; not tuned
MIN_WIDTH = 20  # columns; Markdown's tables and lists lose text in fewer than about 10
DISABLE_WRAPPING, ENABLE_WRAPPING = "\x1b[?7l", "\x1b[?7h"

# A model's output must not control the terminal: ESC becomes its picture "␛", and so on. C1 controls have no pictures.
CONTROLS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}

# No background colours: they would be black on a light screen.
THEME = Theme({"markdown.code": "cyan", **{f"markdown.h{level}": "bold" for level in range(1, 7)}})


def make_console() -> Console:
    """A console that prints text unchanged, and without colours where there is no terminal."""
    return Console(highlight=False, markup=False, soft_wrap=True, theme=THEME)


def can_redraw(console: Console) -> bool:
    """Whether lines on the screen can be rewritten. Colours may be forced into a pipe, but a pipe has no cursor."""
    return console.is_interactive and console.file.isatty() and console.width >= MIN_WIDTH


def printable(text: str) -> str:
    """The text without control characters."""
    return text.translate(CONTROLS)


# ---- input ----


class LineEditor:
    """
    Reads the user's messages. In a terminal they are edited with arrow keys, a pasted text of several lines is one
    message, and a history file outlives the program. Elsewhere each line is a message.
    """

    def __init__(self, console: Console, history_path: Path):
        self.console = console
        self.history_path = history_path
        self.keeps_history = True
        self.prompt = "You: " if sys.stdin.isatty() else ""
        self.session: PromptSession[str] | None = None
        if sys.stdin.isatty() and sys.stdout.isatty() and not console.is_dumb_terminal:
            history = InMemoryHistory(self._load_history())
            self.session = PromptSession([("bold", "You:"), ("", " ")], history=history, enable_suspend=True)

    def read(self) -> str:
        """The next message. Raises EOFError at the end of input, KeyboardInterrupt at Ctrl-C."""
        if not self.session:
            return input(self.prompt).strip()
        text = self.session.prompt().strip()
        if text and self.keeps_history:
            self._append_to_history(text)
        return text

    @contextmanager
    def _ignore_unusable_history(self) -> Iterator[None]:
        """If the file cannot be read or written, as in another user's folder, the chat continues without it."""
        try:
            yield
        except OSError as error:
            self.keeps_history = False
            self.console.print(f"(messages are not kept for the arrow keys: {error})", style="dim")

    def _load_history(self) -> list[str]:
        texts: list[str] = []
        with self._ignore_unusable_history():
            if not self.history_path.exists():
                return texts
            lines = self.history_path.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines[-MAX_HISTORY:]:
                try:
                    texts.append(str(parse_json(line)))
                except ValueError:  # half a line, written to a full disk
                    continue
        return texts

    def _append_to_history(self, text: str) -> None:
        """Appends a line to a file that only the user can read; several chats may write to it at the same time."""
        with self._ignore_unusable_history():
            self.history_path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.history_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(text) + "\n")


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """
    In a terminal, Ctrl-C only sets the event, and keys typed meanwhile wait for the next prompt instead of appearing
    in the middle of the response. Elsewhere Ctrl-C ends the program, as scripts expect.
    """
    stop = threading.Event()
    if not sys.stdin.isatty():
        yield stop
        return
    previous = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        with _without_echo():
            yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _without_echo() -> Iterator[None]:
    try:
        import termios
    except ImportError:  # on Windows
        yield
        return
    LOCAL_MODES = 3  # index in the list of tcgetattr
    modes = termios.tcgetattr(sys.stdin)
    quiet_modes = list(modes)
    quiet_modes[LOCAL_MODES] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet_modes)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)


# ---- output ----


def show(pieces: Iterable[str], console: Console) -> None:
    """Prints a text as it arrives and ends its last line."""
    if can_redraw(console):
        with MarkdownView(console) as view:
            for piece in pieces:
                view.add(printable(piece))
        return
    for piece in pieces:
        write(console, printable(piece))
    write(console, "\n")


def write(console: Console, text: str) -> None:
    """Writes unformatted text immediately."""
    console.file.write(text)
    console.file.flush()


class MarkdownView:
    """
    A growing text, shown as Markdown.

    The last lines, as many as the screen has room for, are a live display (rich.live), which is drawn again whenever
    the text grows. Lines above them are printed once and scroll away.
    """

    def __init__(self, console: Console):
        self.console = console
        self.live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self.text = ""
        self.lines: list[list[Segment]] = []  # as last rendered
        self.num_printed = 0  # of these lines, above the live display
        self.width = console.width
        self.next_frame = 0.0  # time.monotonic()

    def __enter__(self) -> "MarkdownView":
        # Terminals disagree on the width of some characters; without automatic wrapping, a line stays one line.
        write(self.console, DISABLE_WRAPPING)
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.draw()
        self.live.stop()
        write(self.console, ENABLE_WRAPPING)

    def add(self, piece: str) -> None:
        self.text += piece
        if time.monotonic() >= self.next_frame:
            self.draw()

    def draw(self) -> None:
        start = time.monotonic()
        lines = markdown_lines(self.text, self.console)
        if self.console.width != self.width:
            self.num_printed = self._printed_after_resize(lines)
            self.width = self.console.width
        self.lines = lines
        live_from = max(self.num_printed, len(lines) - (self.console.height - 1))
        with self.console:  # one write for both
            if live_from > self.num_printed:
                leaving = lines[self.num_printed : live_from]
                self.console.print(SegmentLines(leaving, new_lines=True), end="")
                self.num_printed = live_from
            self.live.update(SegmentLines(separated(lines[live_from:])), refresh=True)
        now = time.monotonic()
        self.next_frame = now + max(FRAME_SECONDS, (now - start) * (1 / MAX_DRAWING_SHARE - 1))

    def _printed_after_resize(self, new_lines: list[list[Segment]]) -> int:
        """
        Returns how many of the new lines, which have another width, are printed already. A line that is printed only in
        part does not count, so that part is repeated.
        """
        remaining = sum(num_characters(line) for line in self.lines[: self.num_printed])
        for i, line in enumerate(new_lines):
            remaining -= num_characters(line)
            if remaining < 0:
                return i
        return len(new_lines)


def markdown_lines(text: str, console: Console) -> list[list[Segment]]:
    """Renders the text as Markdown, one column narrower than the console; spaces at the end of lines are left out."""
    options = console.options.update(width=console.width - 1)
    lines = [list(line) for line in console.render_lines(ResponseMarkdown(text), options, pad=False)]
    for line in lines:
        while line and not line[-1].text.strip():
            line.pop()
    while lines and not lines[-1]:
        lines.pop()
    return lines


def num_characters(line: list[Segment]) -> int:
    """Without spaces, of which there are more or fewer in another width."""
    return sum(len("".join(segment.text.split())) for segment in line)


def separated(lines: list[list[Segment]]) -> list[list[Segment]]:
    """The lines with line breaks between them, and none after the last."""
    return [[*line, Segment.line()] for line in lines[:-1]] + lines[-1:]


class Code(CodeBlock):
    """A code block, highlighted in the terminal's own colours."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme="ansi_dark", word_wrap=True, padding=(0, 2))


class ResponseMarkdown(Markdown):
    """
    Markdown as small models mean it: line breaks and HTML are kept as they are, and asterisks after a letter, digit or
    parenthesis are not emphasis but multiplication (2*3*4).
    """

    elements = Markdown.elements | {"fence": Code, "code_block": Code}

    def __init__(self, text: str):
        super().__init__(text, hyperlinks=False)  # so that addresses are visible
        for block in self.parsed:
            if block.type == "html_block":
                block.type = "code_block"
            self._keep_literally(block.children or [])

    def _keep_literally(self, tokens: list) -> None:
        before = ""
        for i, token in enumerate(tokens):
            if token.type == "softbreak":
                token.type = "hardbreak"
            elif token.type == "html_inline":
                token.type = "text"
            elif token.type in ("em_open", "strong_open") and re.search(r"[A-Za-z0-9)]$", before):
                close_type = token.type.replace("open", "close")
                closing = next(t for t in tokens[i:] if t.type == close_type and t.level == token.level)
                for marker in (token, closing):
                    marker.type, marker.tag, marker.content = "text", "", marker.markup
            before = token.content
