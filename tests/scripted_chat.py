"""
The chat in the terminal with a model that says what it is told to: what tests/test_chat_cli.py runs in a terminal.

    python tests/scripted_chat.py folder      # answers.json in it: [[seconds per token, content], …]; the history too
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from conftest import GOLDEN

from nanochat.chat.session import Chat
from nanochat.chat.terminal import LineEditor, make_console
from nanochat.conversation import render
from nanochat.engine import Completion, Request
from nanochat.tokenizer import Tokenizer
from scripts.chat_cli import talk


class ScriptedEngine:
    """Answers in order, whatever is asked; the last one again and again."""

    def __init__(self, answers, tokenizer, context=2048):
        self.answers, self.tokenizer, self.requests = list(answers), tokenizer, []
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=context))

    def stream(self, requests):
        self.requests += requests
        seconds, content = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        question, completion = {"role": "user", "content": ""}, Completion()
        ids, _ = render({"messages": [question, {"role": "assistant", "content": content}]}, self.tokenizer)
        for token in ids[4:-1]:  # after bos, user_start, user_end and assistant_start
            time.sleep(seconds)
            completion.tokens.append(token)
            yield 0, token, completion
        completion.finish = "stop"
        yield 0, None, completion


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    console = make_console()
    chat = Chat(ScriptedEngine(answers, Tokenizer.load(GOLDEN / "tokenizer")), Request([], 512))
    talk(chat, console, LineEditor(console, folder / "history.jsonl"))
