"""
The terminal chat as its user sees it: in a pseudo-terminal with scripted responses, through pipes, and the commands.

    python -m pytest tests/test_chat_cli.py
"""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest
from rich.cells import cell_len
from rich.console import Console
from scripted_chat import ScriptedEngine

from nanochat.chat import terminal
from nanochat.chat.session import ChatSession, format_tool_calls
from nanochat.common import UserError
from nanochat.request import Request
from scripts import chat_cli

ROOT = Path(__file__).parent.parent
TIMEOUT = 300  # seconds until a test fails
PLAIN_ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
PLAIN_ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
PLAIN_ENVIRONMENT |= {"PROMPT_TOOLKIT_NO_CPR": "1"}  # nothing here answers where the cursor is
TOOL_CALL = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "12*13"},
    {"type": "python_output", "text": "156"},
    {"type": "text", "text": "156."},
]
LONG = "\n".join(f"line {i}" for i in range(8)) + "\n\n" + "many words " * 20 + "**and bold\nones**, 名前 😀\n\n"
LONG += "```python\nx = 2*3*4\n```\n\n" + "\n".join(f"{i}. item" for i in range(10, 22))
SLOW = "one two three " + "and so on " * 300


# ---- in a terminal ----


class Terminal:
    """A chat in a pseudo-terminal, with a terminal emulator that holds the screen and what scrolled off it."""

    def __init__(self, folder, responses, rows=12, columns=40, **environment):
        (folder / "responses.json").write_text(json.dumps(responses), encoding="utf-8")
        self.emulator = Emulator(rows, columns)
        self.unread = b""
        self.output = ""
        self.exit_code = None
        environment = {**PLAIN_ENVIRONMENT, "TERM": "xterm", **environment}
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, "tests/scripted_chat.py", str(folder)], environment)
        self.resize(rows, columns)

    def __enter__(self):
        return self.wait("You:")

    def __exit__(self, *_):
        os.close(self.descriptor)
        if self.exit_code is None:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)

    def resize(self, rows, columns):
        self.emulator.resize(rows, columns)
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, text):
        """Reads the output up to this text."""
        deadline = time.monotonic() + TIMEOUT
        text = text.encode()
        while text not in self.unread:
            assert time.monotonic() < deadline, f"no {text} in {self.unread}"
            if select.select([self.descriptor], [], [], 1)[0]:
                self.unread += os.read(self.descriptor, 65536)
        self._take(self.unread.index(text) + len(text))
        return self

    def _take(self, num_bytes):
        text = self.unread[:num_bytes].decode()
        self.unread = self.unread[num_bytes:]
        self.output += text
        self.emulator.feed(text)

    def type(self, keys):
        os.write(self.descriptor, keys.encode())
        return self

    def send(self, text):
        """Types a message and waits for the next prompt."""
        self.type(text + "\r").wait("\n")  # until then the prompt of this line may be drawn again
        return self.wait("You:")

    def end(self, keys):
        """Types keys that end the program and returns its exit code."""
        self.type(keys)
        with contextlib.suppress(OSError):  # how Linux reports that the other side is closed
            while piece := os.read(self.descriptor, 65536):
                self.unread += piece
        self._take(len(self.unread))
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return self.exit_code

    @property
    def lines(self):
        return self.emulator.lines


class Emulator:
    """A terminal emulator (pyte) that keeps the lines that scroll off the screen."""

    def __init__(self, rows, columns):
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self.stream = pyte.Stream(self.screen)

    def feed(self, text):
        self.stream.feed(text)

    def resize(self, rows, columns):
        self.screen.resize(rows, columns)

    @property
    def lines(self):
        """All lines up to the cursor's."""
        scrolled = ["".join(line[column].data for column in range(len(line))) for line in self.screen.history.top]
        shown = self.screen.display[: self.screen.cursor.y + 1]
        return [line.rstrip() for line in [*scrolled, *shown]]


def markdown(text, columns=40):
    """The lines of the text as Markdown in a terminal of this width."""
    lines = terminal.markdown_lines(text, fake_terminal(columns))
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


def fake_terminal(columns=40, rows=24):
    return Console(file=FakeTerminal(), force_terminal=True, width=columns, height=rows, theme=terminal.THEME)


@pytest.mark.slow
def test_terminal_commands_and_history_work(tmp_path):
    with Terminal(tmp_path, [[0, TOOL_CALL]], columns=100) as chat:
        chat.send("What is 12 times 13?").type("\x1b[A").wait("What is 12 times 13?").send("")  # arrow up: once more
        assert chat.lines.count("You: What is 12 times 13?") == 2
        assert chat.lines.count("It is [12*13 → 156] 156.") == 2
        assert "\x1b[36m[12*13 → 156]" in chat.output  # highlighted
        chat.type("half a thou").wait("thou").type("\x03").wait("(quit or Ctrl-D quits)").wait("You:")
        for command, reply in {
            "/help": "/retry      ",
            "/nonsense": "/nonsense: unknown command",
            "/temperature": "temperature 1",
            f"/save {tmp_path}/chat.json": "Saved: ",
            "/clear": "A new conversation.",
            "/retry": "/retry: there are no messages yet",
        }.items():
            chat.send(command)
            assert any(line.startswith(reply) for line in chat.lines)
        assert chat.end("\x04") == 0
    assert len(json.loads((tmp_path / "chat.json").read_text())["messages"]) == 4
    history = tmp_path / "history.jsonl"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with history.open("a") as file:
        file.write('"half a li')  # the disk was full
    with Terminal(tmp_path, [[0, "fine"]], columns=100) as chat:
        chat.type("\x1b[A" * 8).wait("What is 12 times 13?")  # from the earlier chat
        assert chat.end("\x15quit\r") == 0


@pytest.mark.slow
def test_terminal_with_unusable_history_file_warns_and_continues(tmp_path):
    (tmp_path / "history.jsonl").mkdir()
    with Terminal(tmp_path, [[0, "fine"]], columns=100) as chat:
        assert any("not kept for the arrow keys" in line for line in chat.lines)
        chat.send("How are you?")
        assert "fine" in chat.lines and chat.end("\x04") == 0


@pytest.mark.slow
def test_terminal_pasted_lines_are_one_message(tmp_path):
    with Terminal(tmp_path, [[0, "fine"]]) as chat:
        chat.type("\x1b[200~two\nlines\x1b[201~").wait("lines").type("\r").wait("fine").wait("You:")
        assert chat.lines.count("fine") == 1
    assert json.loads((tmp_path / "history.jsonl").read_text()) == "two\nlines"


@pytest.mark.slow
def test_terminal_response_longer_than_screen_shows_each_line_once(tmp_path):
    with Terminal(tmp_path, [[0.001, LONG]], rows=5) as chat:
        lines = chat.send("go").lines
    assert lines[:2] == ["", "You: go"] and lines[-2:] == ["", "You:"]
    assert lines[2:-2] == markdown(LONG)
    assert all(cell_len(line) < 40 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 100])
def test_markdown_view_after_every_character_shows_text_so_far(rows):
    console = fake_terminal(rows=rows)
    emulator = Emulator(rows, 40)
    with terminal.MarkdownView(console) as view:
        for i, char in enumerate(LONG, 1):
            view.add(char)
            view.draw()
            emulator.feed(console.file.getvalue().replace("\n", "\r\n"))
            console.file.seek(0)
            console.file.truncate()
            if rows == 100:
                assert emulator.lines == markdown(LONG[:i])
    assert emulator.lines == markdown(LONG)


@pytest.mark.parametrize("columns", [30, 39, 60])
def test_markdown_view_after_resize_loses_no_text(columns):
    """Lines that have scrolled off stay as they are; what follows has the new width."""
    text = " ".join(f"word{i:03d}" for i in range(100))
    console = fake_terminal(rows=6)
    emulator = Emulator(6, 40)
    with terminal.MarkdownView(console) as view:
        view.add(text[:500])
        view.draw()
        console.width = columns
        emulator.feed(console.file.getvalue().replace("\n", "\r\n"))
        emulator.resize(6, max(columns, 40))  # this emulator would cut lines that were printed before
        console.file.seek(0)
        console.file.truncate()
        view.add(text[500:])
    emulator.feed(console.file.getvalue().replace("\n", "\r\n"))
    assert set(text.split()) <= set(" ".join(emulator.lines).split())


@pytest.mark.slow
def test_terminal_ctrl_c_stops_the_response_only(tmp_path):
    with Terminal(tmp_path, [[0.01, SLOW], [0.01, "Gladly. " * 8], [0, "fine"]], 50) as chat:
        chat.type("go\r").wait("three").type("\x03").wait("(stopped)").wait("You:")
        assert "^C" not in chat.output
        chat.send(f"/save {tmp_path}/chat.json")
        chat.type("go\r").wait("Gladly.").type("typed ahead\r").wait("fine").wait("You:")
        assert chat.lines[-5:] == ["", "You: typed ahead", "fine", "", "You:"]
    _, response = json.loads((tmp_path / "chat.json").read_text())["messages"]
    text = response["content"][0]["text"]
    assert text.startswith("one two three") and len(text) < len(SLOW)


@pytest.mark.slow
def test_terminal_resized_during_response_loses_no_text(tmp_path):
    text = "one two three " + " ".join(f"word{i}" for i in range(60))
    with Terminal(tmp_path, [[0.01, text]], 20) as chat:
        chat.type("go\r").wait("three").resize(20, 30)
        chat.wait("word20")
        chat.resize(20, 100)
        words = " ".join(chat.wait("You:").lines).split()
    assert list(dict.fromkeys(words)) == ["You:", "go", *text.split()]


@pytest.mark.slow
def test_terminal_without_cursor_shows_plain_text(tmp_path):
    with Terminal(tmp_path, [[0, "some **text**, \x1b[2J 名前 😀"]], TERM="dumb") as chat:
        chat.send("go").end("\x04")
    assert "some **text**, ␛[2J 名前 😀" in chat.output
    assert "\x1b" not in chat.output


@pytest.mark.slow
def test_terminal_with_no_color_shows_bold_only(tmp_path):
    with Terminal(tmp_path, [[0, "# head\n`code` and **bold**"]], NO_COLOR="1") as chat:
        chat.send("go").send("/nonsense")
    assert "code and \x1b[1mbold" in chat.output and not re.search(r"\x1b\[[\d;]*3\d", chat.output)


# ---- through pipes ----


@pytest.mark.slow
def test_pipes_conversation_is_plain_text(tmp_path):
    (tmp_path / "responses.json").write_text(json.dumps([[0, TOOL_CALL], [0, "名前 **x**\n\x1b[31m"]]))
    done = subprocess.run(
        [sys.executable, "tests/scripted_chat.py", str(tmp_path)],
        input=b"one\n\n/temperature x\ntwo\n",
        env=PLAIN_ENVIRONMENT | {"TERM": "xterm"},
        cwd=ROOT,
        capture_output=True,
        timeout=TIMEOUT,
    )
    lines = [line for line in done.stdout.decode().split("\n") if line]
    problem = "/temperature x: must be a number of at least 0 (0 = greedy)"
    assert lines == ["It is [12*13 → 156] 156.", problem, "名前 **x**", "␛[31m"]
    assert done.returncode == 0 and not done.stderr
    assert not (tmp_path / "history.jsonl").exists()


@pytest.fixture
def scripted_main(monkeypatch, tokenizer):
    """Replaces the model of chat_cli.main; returns the engine."""
    engine = ScriptedEngine([[0, TOOL_CALL]], tokenizer)
    monkeypatch.setattr(chat_cli.checkpoint_manager, "load_model", lambda *_: (None, None, None))
    monkeypatch.setattr(chat_cli, "Engine", lambda *_, **__: engine)
    return engine


def test_prompt_from_standard_input_prints_response_only(scripted_main, monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines \xff\n")))
    chat_cli.main(["--device", "cpu", "-p", "-"])
    assert capsys.readouterr().out == "It is 156.\n"  # nothing but the response
    assert "two\nlines \ufffd<|user_end|>" in tokenizer.decode(scripted_main.requests[0].prompt)


def test_speculate_is_passed_to_the_engine(scripted_main, monkeypatch):
    options = {}
    monkeypatch.setattr(chat_cli, "Engine", lambda *_, **given: options.update(given) or scripted_main)
    chat_cli.main(["--device", "cpu", "-p", "two", "--speculate", "3"])
    assert options["speculate"] == 3


def test_prompt_from_empty_standard_input_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    with pytest.raises(SystemExit, match="error: -p -: standard input is empty"):
        chat_cli.main(["-p", "-"])


# ---- sessions ----


@pytest.fixture
def tokenizer(golden_tokenizer):
    return golden_tokenizer


def chat_with(tokenizer, *responses, context=2048, max_tokens=512):
    return ChatSession(
        ScriptedEngine([[0, content] for content in responses], tokenizer, context), Request([], max_tokens)
    )


def response(chat, message):
    return "".join(format_tool_calls(chat.respond(message)))


def test_retry_uses_another_seed(tokenizer):
    chat = chat_with(tokenizer, "first", "second", "third", TOOL_CALL)
    assert response(chat, "a") == "first" and response(chat, "b") == "second"
    assert "".join(format_tool_calls(chat.retry())) == "third"
    first, second, third = chat.engine.requests
    assert third.prompt == second.prompt != first.prompt
    assert third.seed != second.seed == first.seed
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert response(chat, "c") == "It is [12*13 → 156] 156."


def test_stopped_response_keeps_generated_text(tokenizer):
    chat = chat_with(tokenizer, "名前 and so on", "fine")
    pieces = chat.respond("a")
    while "名" not in next(pieces)[1]:
        pass
    pieces.close()
    assert chat.messages[1]["content"] == [{"type": "text", "text": "名"}]
    assert response(chat, "b") == "fine"
    assert "名<|assistant_end|>" in tokenizer.decode(chat.engine.requests[1].prompt)
    chat.respond("c").close()  # stopped before the first token
    assert response(chat, "d") == "fine"


def test_session_beyond_context_drops_from_prompt_not_from_file(tokenizer, tmp_path):
    chat = chat_with(tokenizer, "so be it", context=100, max_tokens=20)
    for i in range(5):
        assert response(chat, f"question {i} " + "x" * 20) == "so be it"
    assert chat.num_dropped == 2 and chat.first_in_prompt > 2
    assert max(len(request.prompt) for request in chat.engine.requests) <= 80
    with pytest.raises(UserError, match="at most 80 fit"):
        response(chat, "x" * 1000)
    chat.save(str(tmp_path / "new/chat.json"))
    messages = json.loads((tmp_path / "new/chat.json").read_text())["messages"]
    assert len(messages) == 10 and messages == chat.messages


def test_save_as_markdown_is_readable_text(tokenizer, tmp_path):
    chat = chat_with(tokenizer, TOOL_CALL)
    response(chat, "12 * 13?")
    path = chat.save(str(tmp_path / "chat.md"))
    assert path.read_text() == "**You:** 12 * 13?\n\n**nanochat:** It is `[12*13 → 156]` 156.\n"


def test_save_to_invalid_name_raises(tokenizer, tmp_path):
    chat = chat_with(tokenizer, "fine")
    with pytest.raises(UserError, match="there are no messages yet"):
        chat.save(str(tmp_path / "chat.json"))
    response(chat, "a")
    mine = tmp_path / "mine.md"
    mine.write_text("mine")
    for name, words in {
        "": "must end in .json",
        str(tmp_path / "chat.txt"): "must end in .json",
        str(mine): "exists already",
        "~nobody-has-this-name/chat.md": "no such user",
        str(mine / "chat.md"): "File exists: .*/mine.md'",
        str(tmp_path / ("x" * 300 + ".md")): "File name too long",
    }.items():
        with pytest.raises(UserError, match=words):
            chat.save(name)
    assert mine.read_text() == "mine" and os.listdir(tmp_path) == ["mine.md"]


@pytest.mark.parametrize("number", ["-1", "nan", "inf", "warm"])
def test_set_temperature_invalid_number_raises(tokenizer, number):
    chat = chat_with(tokenizer, "fine")
    chat.set_temperature("0.25")
    with pytest.raises(UserError, match=f"/temperature {number}: must be a number of at least 0"):
        chat.set_temperature(number)
    assert chat.template.temperature == 0.25


@pytest.mark.parametrize(
    "text, lines",
    [
        ("2*3*4 = 24, (1)*2*(3), a**b**c", ["2*3*4 = 24, (1)*2*(3), a**b**c"]),
        ("a *b* **c** 这是**重点**内容", ["a b c 这是重点内容"]),
        ("one\ntwo<br>three\n#### 18", ["one", "two<br>three", "", "18"]),
        ("<div>\nx\n</div>", ["  <div>", "  x", "  </div>"]),
        ("```\na*b*c <br>", ["  a*b*c <br>"]),  # it has not ended yet
        ("[x](http://y.z)", ["x (http://y.z)"]),
        ("", []),
    ],
)
def test_markdown_lines_keep_literal_text(text, lines):
    assert markdown(text) == lines
