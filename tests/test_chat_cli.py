"""
The chat in the terminal, as its user has it: in a real pseudo-terminal with a model that says what it is told to, and
through pipes; what becomes of an answer's Markdown; a conversation's commands.

    python -m pytest tests/test_chat_cli.py
"""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import readline
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import GOLDEN
from rich.cells import cell_len
from rich.console import Console
from scripted_chat import ScriptedEngine

from nanochat.chat import terminal
from nanochat.chat.session import Chat, with_calls
from nanochat.common import UserError
from nanochat.engine import Request
from scripts import chat_cli

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds until a test gives up
PLAIN_ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
PLAIN_ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
CALL = [
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
    """A chat in a pseudo-terminal: keys go in, and what it writes is read until it has said what is waited for."""

    def __init__(self, folder, answers, rows=12, columns=40, **environment):
        (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
        self.rows, self.new, self.output, self.code = rows, b"", "", None
        environment = {**PLAIN_ENVIRONMENT, "TERM": "xterm", **environment}
        self.process, self.keyboard = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, "tests/scripted_chat.py", str(folder)], environment)
        self.resize(rows, columns)

    def __enter__(self):
        return self.wait("You:")

    def __exit__(self, *_):
        os.close(self.keyboard)
        if self.code is None:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)

    def resize(self, rows, columns):
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, text):
        deadline, text = time.monotonic() + PATIENCE, text.encode()
        while text not in self.new:
            assert time.monotonic() < deadline, f"no {text} in {self.new}"
            if select.select([self.keyboard], [], [], 1)[0]:
                self.new += os.read(self.keyboard, 65536)
        end = self.new.index(text) + len(text)
        self.output += self.new[:end].decode()
        self.new = self.new[end:]
        return self

    def type(self, keys):
        os.write(self.keyboard, keys.encode())
        return self

    def ask(self, text):
        """Types a line, and waits for the next prompt."""
        self.type(text + "\r").wait("\n")  # the prompt that the line stands at may be drawn again
        return self.wait("You:")

    def end(self, keys):
        """The exit code."""
        self.type(keys)
        with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
            while piece := os.read(self.keyboard, 65536):
                self.new += piece
        self.output += self.new.decode()
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return self.code

    @property
    def lines(self):
        return drawn(self.output, self.rows)


def drawn(output, rows):
    """The lines of a screen so high, and before them those that scrolled off. Knows what chats write."""
    lines, row, column = [[]], 0, 0
    for number, control, char in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|(.)", output, re.DOTALL):
        top = max(0, len(lines) - rows)
        if control == "A":
            row = max(top, row - int(number or 1))
        elif control == "K":
            del lines[row][column:]
        elif control == "J":
            del lines[row][column:], lines[row + 1 :]
        elif char == "\r":
            column = 0
        elif char == "\n":
            row += 1
            lines += [[]] if row == len(lines) else []
        elif char == "\b":
            column -= 1
        elif char:
            lines[row][column : column + 1] = [char]
            column += 1
    return ["".join(line).rstrip() for line in lines]


def markdown(text, columns=40):
    """The lines that the text becomes in a terminal so wide, without their colours."""
    lines = terminal.markdown_lines(text, fake_terminal(columns))
    return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in lines]


def fake_terminal(columns=40, rows=24):
    return Console(file=io.StringIO(), force_terminal=True, width=columns, height=rows, theme=terminal.THEME)


def test_an_evening_in_the_terminal(tmp_path):
    with Terminal(tmp_path, [[0, CALL]], columns=100) as chat:
        chat.ask("What is 12 times 13?").type("\x1b[A").ask("")  # arrow up: the same again
        assert chat.lines.count("You: What is 12 times 13?") == 2
        assert chat.lines.count("It is [12*13 → 156] 156.") == 2
        assert "\x1b[36m[12*13 → 156]" in chat.output  # set apart
        chat.type("half a thou").wait("thou")
        time.sleep(0.5)  # as a person would: Python's readline overlooks a signal while it echoes a key
        chat.type("\x03").wait("(quit or Ctrl-D ends)").wait("You:")
        for command, reply in {
            "/help": "/retry      ",
            "/nonsense": "/nonsense: not a command",
            "/temperature": "temperature 1",
            f"/save {tmp_path}/chat.json": "Saved: ",
            "/clear": "A new conversation.",
            "/retry": "/retry: nothing has been said",
        }.items():
            chat.ask(command)
            assert any(line.startswith(reply) for line in chat.lines)
        assert chat.end("\x04") == 0
    assert len(json.loads((tmp_path / "chat.json").read_text())["messages"]) == 4

    history = tmp_path / "history.jsonl"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with history.open("a") as file:
        file.write('"half a li')  # the disk was full
    with Terminal(tmp_path, [[0, "fine"]], columns=100) as chat:
        chat.type("\x1b[A" * 8).wait("What is 12 times 13?")  # remembered from the other evening
        assert chat.end("\x15quit\r") == 0

    history.unlink()
    history.mkdir()
    with Terminal(tmp_path, [[0, "fine"]], columns=100) as chat:  # nor is it needed
        assert any("no history" in line for line in chat.lines)
        chat.ask("How are you?")
        assert "fine" in chat.lines and chat.end("\x04") == 0


@pytest.mark.skipif("GNU" not in str(readline.__doc__), reason="needs GNU readline")
def test_pasted_lines_are_one_message(tmp_path):
    with Terminal(tmp_path, [[0, "fine"]]) as chat:
        chat.type("\x1b[200~two\nlines\x1b[201~").wait("lines").type("\r").wait("fine").wait("You:")
        assert chat.lines.count("fine") == 1
    assert json.loads((tmp_path / "history.jsonl").read_text()) == "two\nlines"


def test_an_answer_longer_than_the_screen(tmp_path):
    with Terminal(tmp_path, [[0.001, LONG]], rows=5) as chat:
        lines = chat.ask("go").lines
    assert lines[:2] == ["", "You: go"] and lines[-2:] == ["", "You:"]
    assert lines[2:-2] == markdown(LONG)  # each line once
    assert all(cell_len(line) < 40 for line in lines)


@pytest.mark.parametrize("rows", [5, 100])
def test_a_growing_answer_is_right_at_every_moment(rows):
    console = fake_terminal(rows=rows)
    view = terminal.MarkdownView(console)
    for i, char in enumerate(LONG, 1):
        view.add(char)
        view.draw()
        screen = drawn(console.file.getvalue().replace("\n", "\r\n"), rows)
        if rows == 100:
            assert screen == markdown(LONG[:i])
    assert screen == markdown(LONG)
    assert console.file.getvalue().count("line 3") <= 3  # what stays is left alone


def test_ctrl_c_stops_the_answer_only(tmp_path):
    with Terminal(tmp_path, [[0.01, SLOW], [0.01, "Gladly. " * 8], [0, "fine"]], 50) as chat:
        chat.type("go\r").wait("three").type("\x03").wait("(stopped)").wait("You:")
        assert "^C" not in chat.output
        chat.ask(f"/save {tmp_path}/chat.json")
        chat.type("go\r").wait("Gladly.").type("typed ahead\r").wait("fine").wait("You:")
        assert chat.lines[-5:] == ["", "You: typed ahead", "fine", "", "You:"]
    _, answer = json.loads((tmp_path / "chat.json").read_text())["messages"]
    said = answer["content"][0]["text"]
    assert said.startswith("one two three") and len(said) < len(SLOW)


def test_a_window_that_is_resized_loses_nothing(tmp_path):
    text = "one two three " + " ".join(f"word{i}" for i in range(60))
    with Terminal(tmp_path, [[0.01, text]]) as chat:
        chat.type("go\r").wait("three").resize(20, 30)
        chat.wait("word20")
        chat.resize(20, 100)
        lines = chat.wait("You:").lines
    assert "".join(lines).replace(" ", "") == f"You:go{text}You:".replace(" ", "")


def test_a_terminal_that_cannot_show_markdown(tmp_path):
    with Terminal(tmp_path, [[0, "some **text**, \x1b[2J 名前 😀"]], TERM="dumb") as chat:
        chat.ask("go").end("\x04")
    assert "some **text**, ␛[2J 名前 😀" in chat.lines
    assert "\x1b" not in chat.output


def test_no_colours_if_one_wants_none(tmp_path):
    with Terminal(tmp_path, [[0, "# head\n`code` and **bold**"]], NO_COLOR="1") as chat:
        chat.ask("go").ask("/nonsense")
    assert "code and \x1b[1mbold" in chat.output and not re.search(r"\x1b\[[\d;]*3\d", chat.output)


# ---- through pipes ----


def test_a_conversation_through_pipes(tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps([[0, CALL], [0, "名前 **x**\n\x1b[31m"]]))
    done = subprocess.run(
        [sys.executable, "tests/scripted_chat.py", str(tmp_path)],
        input=b"one\n\n/temperature x\ntwo\n",
        env=PLAIN_ENVIRONMENT | {"TERM": "xterm"},
        cwd=ROOT,
        capture_output=True,
        timeout=PATIENCE,
    )
    lines = [line for line in done.stdout.decode().split("\n") if line]
    problem = "/temperature x: must be a number of at least 0 (0 = greedy)"
    assert lines == ["It is [12*13 → 156] 156.", problem, "名前 **x**", "␛[31m"]
    assert done.returncode == 0 and not done.stderr
    assert not (tmp_path / "history.jsonl").exists()


@pytest.fixture
def scripted_main(monkeypatch, tokenizer):
    """chat_cli.main, but for the model. Returns the engine."""
    engine = ScriptedEngine([[0, CALL]], tokenizer)
    monkeypatch.setattr(chat_cli, "default_dir", lambda: GOLDEN / "tokenizer")
    monkeypatch.setattr(chat_cli.checkpoint_manager, "load_model", lambda *_: (None, None))
    monkeypatch.setattr(chat_cli, "Engine", lambda *_, **__: engine)
    return engine


def test_the_question_from_standard_input(scripted_main, monkeypatch, capsys, tokenizer):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines \xff\n")))
    chat_cli.main(["--device", "cpu", "-p", "-"])
    assert capsys.readouterr().out == "It is 156.\n"  # the answer alone
    assert "two\nlines \ufffd<|user_end|>" in tokenizer.decode(scripted_main.requests[0].prompt)


def test_nothing_on_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    with pytest.raises(SystemExit, match="error: -p -: there is no question"):
        chat_cli.main(["-p", "-"])


# ---- what is said ----


@pytest.fixture
def tokenizer(golden_tokenizer):
    return golden_tokenizer


def chat_with(tokenizer, *answers, context=2048, max_tokens=512):
    return Chat(ScriptedEngine([[0, answer] for answer in answers], tokenizer, context), Request([], max_tokens))


def said(chat, question):
    return "".join(with_calls(chat.answer(question)))


def test_another_answer_with_another_seed(tokenizer):
    chat = chat_with(tokenizer, "first", "second", "third", CALL)
    assert said(chat, "a") == "first" and said(chat, "b") == "second"
    assert "".join(with_calls(chat.retry())) == "third"
    first, second, third = chat.engine.requests
    assert third.prompt == second.prompt != first.prompt
    assert third.seed != second.seed == first.seed
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert said(chat, "c") == "It is [12*13 → 156] 156."


def test_what_was_said_before_it_was_stopped_stays(tokenizer):
    chat = chat_with(tokenizer, "名前 and so on", "fine")
    pieces = chat.answer("a")
    while "名" not in next(pieces)[1]:
        pass
    pieces.close()
    assert chat.messages[1]["content"] == [{"type": "text", "text": "名"}]
    assert said(chat, "b") == "fine"
    assert "名<|assistant_end|>" in tokenizer.decode(chat.engine.requests[1].prompt)
    chat.answer("c").close()  # stopped before it began
    assert said(chat, "d") == "fine"


def test_the_file_has_what_the_context_has_not(tokenizer, tmp_path):
    chat = chat_with(tokenizer, "so be it", context=100, max_tokens=20)
    for i in range(5):
        assert said(chat, f"question {i} " + "x" * 20) == "so be it"
    assert chat.dropped == 2 and chat.start > 2
    assert max(len(request.prompt) for request in chat.engine.requests) <= 80
    with pytest.raises(UserError, match="the model reads 80 at a time"):
        said(chat, "x" * 1000)
    chat.save(str(tmp_path / "new/chat.json"))
    messages = json.loads((tmp_path / "new/chat.json").read_text())["messages"]
    assert len(messages) == 10 and messages == chat.messages


def test_the_conversation_as_a_text(tokenizer, tmp_path):
    chat = chat_with(tokenizer, CALL)
    said(chat, "12 * 13?")
    path = chat.save(str(tmp_path / "chat.md"))
    assert path.read_text() == "**You:** 12 * 13?\n\n**nanochat:** It is `[12*13 → 156]` 156.\n"


def test_what_cannot_be_saved(tokenizer, tmp_path):
    chat = chat_with(tokenizer, "fine")
    with pytest.raises(UserError, match="nothing has been said"):
        chat.save(str(tmp_path / "chat.json"))
    said(chat, "a")
    mine = tmp_path / "mine.md"
    mine.write_text("mine")
    for name, words in {
        "": "ends in .json",
        str(tmp_path / "chat.txt"): "ends in .json",
        str(mine): "such a file already",
        "~nobody-has-this-name/chat.md": "no such user",
        str(mine / "chat.md"): "File exists: .*/mine.md'",
        str(tmp_path / ("x" * 300 + ".md")): "File name too long",
    }.items():
        with pytest.raises(UserError, match=words):
            chat.save(name)
    assert mine.read_text() == "mine" and os.listdir(tmp_path) == ["mine.md"]


@pytest.mark.parametrize("number", ["-1", "nan", "inf", "warm"])
def test_temperatures(tokenizer, number):
    chat = chat_with(tokenizer, "fine")
    chat.set_temperature("0.25")
    with pytest.raises(UserError, match=f"/temperature {number}: must be a number of at least 0"):
        chat.set_temperature(number)
    assert chat.settings.temperature == 0.25


@pytest.mark.parametrize(
    "text, lines",
    [
        ("2*3*4 = 24, (1)*2*(3), a**b**c", ["2*3*4 = 24, (1)*2*(3), a**b**c"]),
        ("a *b* **c** 这是**重点**内容", ["a b c 这是重点内容"]),
        ("one\ntwo<br>three\n#### 18", ["one", "two<br>three", "", "18"]),
        ("<div>\nx\n</div>", ["  <div>", "  x", "  </div>"]),
        ("```\na*b*c <br>", ["  a*b*c <br>"]),  # it has not ended yet
        ("[x](http://y.z)", ["x (http://y.z)"]),
        ("", [""]),
    ],
)
def test_markdown_loses_nothing(text, lines):
    assert markdown(text) == lines
