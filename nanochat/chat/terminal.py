"""
A terminal to chat in: lines are edited and remembered, an answer is shown as Markdown while it grows, and Ctrl-C stops
the answer, not the program. Into a pipe, or on a terminal that cannot move its cursor, text goes as it is.
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

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Markdown
from rich.syntax import Syntax
from rich.theme import Theme

MAX_HISTORY = 1000  # lines brought back by the arrow keys; arbitrary
FRAME_SECONDS = 1 / 30  # between two drawings of an answer; arbitrary
MIN_WIDTH = 20  # columns; Markdown's tables and lists lose text in fewer than about 10
DRAWING_SHARE = 0.2  # of the time at most, however long the answer is; arbitrary

# What a model writes may not steer the terminal: ESC becomes the picture "␛", and so on; C1 controls have no pictures.
CONTROLS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}

# No backgrounds: they would be black on a light screen.
THEME = Theme({"markdown.code": "cyan", **{f"markdown.h{level}": "bold" for level in range(1, 7)}})


def make_console() -> Console:
    """Prints text as it is, without colours where there is no terminal."""
    return Console(highlight=False, markup=False, soft_wrap=True, theme=THEME)


def can_redraw(console: Console) -> bool:
    """Whether lines on the screen can be written again. Colours may be forced into a pipe, but it has no cursor."""
    return console.is_interactive and console.file.isatty() and console.width >= MIN_WIDTH


def printable(text: str) -> str:
    """The text without power over the terminal."""
    return text.translate(CONTROLS)


# ---- what the user says ----


class LineEditor:
    """
    Reads lines. In a terminal, where Python has readline: arrow keys, a history that outlives the program, and a
    pasted text of several lines as one (GNU readline).
    """

    def __init__(self, console: Console, history: Path):
        self.console, self.history, self.keeps_history, self.readline = console, history, True, None
        self.prompt = "You: " if sys.stdin.isatty() else ""
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return
        try:
            import readline
        except ImportError:  # on Windows
            return
        self.readline = readline
        if can_redraw(console):
            self.prompt = "\001\x1b[1m\002You:\001\x1b[0m\002 "  # \001 and \002 enclose what takes no room on the line
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_auto_history(False)  # it would keep the lines of a pasted text apart
        for text in self._remembered():
            readline.add_history(text)

    def read(self) -> str:
        """The next line, or pasted lines. EOFError after the last one, KeyboardInterrupt at Ctrl-C."""
        text = input(self.prompt).strip()
        if text and self.readline:
            self.readline.add_history(text)
            if self.keeps_history:
                self._remember(text)
        return text

    @contextmanager
    def _history_if_possible(self) -> Iterator[Path]:
        """Where it cannot be read or written, as in another user's folder, that ends it and not the chat."""
        try:
            yield self.history
        except OSError as error:
            self.keeps_history = False
            self.console.print(f"(no history of what is asked: {error})", style="dim")

    def _remembered(self) -> list[str]:
        texts: list[str] = []
        with self._history_if_possible() as history:
            if not history.exists():
                return texts
            for line in history.read_text(encoding="utf-8", errors="replace").splitlines()[-MAX_HISTORY:]:
                try:
                    texts.append(str(json.loads(line)))
                except json.JSONDecodeError:  # half a line, of a disk that was full
                    continue
        return texts

    def _remember(self, text: str) -> None:
        """A line more in a file that only the user can read: several chats may write to it."""
        with self._history_if_possible() as history:
            history.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(text) + "\n")


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """
    In a terminal: Ctrl-C only sets the event, and what is typed waits for the next prompt instead of showing up amidst
    the answer. Elsewhere Ctrl-C ends the program, as scripts expect.
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
    modes = termios.tcgetattr(sys.stdin)
    quiet = [*modes]
    quiet[3] &= ~termios.ECHO  # among the local modes
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)


# ---- what the model says ----


def show(pieces: Iterable[str], console: Console) -> None:
    """Prints a text as it comes, and ends its last line."""
    if can_redraw(console):
        view = MarkdownView(console)
        for piece in pieces:
            view.add(printable(piece))
        view.draw()
    else:
        for piece in pieces:
            write(console, printable(piece))
    write(console, "\n")


def write(console: Console, text: str) -> None:
    """As it is, at once."""
    console.file.write(text)
    console.file.flush()


class MarkdownView:
    """
    A growing text as Markdown. Only lines that changed are written again, over the old ones and no further up than the
    screen reaches: nothing flickers, and what has scrolled away is not repeated. When the window is resized, each
    terminal moves lines in its own way: from then on the text is appended as it comes.
    """

    def __init__(self, console: Console):
        self.console, self.size = console, console.size
        self.text, self.num_shown = "", 0  # characters of it
        self.lines = [""]  # on the screen, with the cursor at the end of the last
        self.next_frame = 0.0

    def add(self, piece: str) -> None:
        self.text += piece
        if time.monotonic() >= self.next_frame:
            self.draw()

    def draw(self) -> None:
        start = time.monotonic()
        if self.console.size == self.size:
            write(self.console, self._update(markdown_lines(self.text, self.console)))
            self.num_shown = len(self.text.rstrip())  # Markdown leaves out spaces at the end
        else:
            write(self.console, self.text[self.num_shown :])
            self.num_shown = len(self.text)
        now = time.monotonic()
        self.next_frame = now + max(FRAME_SECONDS, (now - start) * (1 / DRAWING_SHARE - 1))

    def _update(self, lines: list[str]) -> str:
        """What makes the terminal show these lines instead of those before."""
        old = self.lines
        same = next((i for i, (a, b) in enumerate(zip(old, lines, strict=False)) if a != b), len(lines))
        top = max(0, len(old) - self.size.height)  # the first on the screen
        first = max(top, min(same, len(old) - 1, len(lines) - 1))
        rest = lines[first:] or [""]
        self.lines = old[:first] + rest
        up = len(old) - 1 - first
        # Without automatic wrapping, for terminals disagree on the width of some characters. Each line erases what is
        # left of the old one in its place, the last one all lines below.
        body = "\n".join(f"{line}\x1b[K" for line in rest)
        return "\x1b[?7l\r" + (f"\x1b[{up}A" if up else "") + body + "\x1b[J\x1b[?7h"


def markdown_lines(text: str, console: Console) -> list[str]:
    """The text as Markdown, in lines with their colours, one column narrower than the console."""
    with console.capture() as capture:
        console.print(AnswerMarkdown(text), width=console.width - 1, soft_wrap=False)
    return [line.rstrip() for line in capture.get().rstrip().split("\n")]


class Code(CodeBlock):
    """Highlighted, in the terminal's own colours."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme="ansi_dark", word_wrap=True, padding=(0, 2))


class AnswerMarkdown(Markdown):
    """Markdown as small models mean it: line breaks and HTML are kept, and 2*3*4 is no emphasis."""

    elements = Markdown.elements | {"fence": Code, "code_block": Code}

    def __init__(self, text: str):
        super().__init__(text, hyperlinks=False)  # so that addresses are seen
        for block in self.parsed:
            if block.type == "html_block":
                block.type = "code_block"
            before = ""
            tokens = block.children or []
            for i, token in enumerate(tokens):
                if token.type == "softbreak":
                    token.type = "hardbreak"
                elif token.type == "html_inline":
                    token.type = "text"
                elif token.type in ("em_open", "strong_open") and re.search(r"[A-Za-z0-9)]$", before):
                    end = (token.type.replace("open", "close"), token.level)
                    closing = next(other for other in tokens[i:] if (other.type, other.level) == end)
                    for marker in (token, closing):
                        marker.type, marker.tag, marker.content = "text", "", marker.markup
                before = token.content
