"""
The terminal chat with a model that gives scripted responses: tests/test_chat_cli.py runs this in a terminal.

    python tests/scripted_chat.py folder

The folder holds responses.json, [[seconds per token, content], …], and the history file.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from conftest import GOLDEN

from nanochat.chat.session import ChatSession
from nanochat.chat.terminal import LineEditor, make_console
from nanochat.conversation import render
from nanochat.request import Completion, Request
from nanochat.tokenizer import Tokenizer
from scripts.chat_cli import chat


class ScriptedEngine:
    """Gives the responses in order, whatever the prompt is, and then the last one again and again."""

    def __init__(self, responses, tokenizer, context=2048):
        self.responses = list(responses)
        self.tokenizer = tokenizer
        self.requests = []
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=context))

    def stream(self, requests):
        self.requests += requests
        seconds, content = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": content}]
        ids, _ = render({"messages": messages}, self.tokenizer)
        completion = Completion()
        for token in ids[4:-1]:  # after bos, user_start, user_end and assistant_start
            time.sleep(seconds)
            completion.tokens.append(token)
            yield 0, token, completion
        completion.finish = "stop"
        yield 0, None, completion

    def read_ahead(self, prompt, completion):
        """There is nothing to read."""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    responses = json.loads((folder / "responses.json").read_text(encoding="utf-8"))
    console = make_console()
    session = ChatSession(ScriptedEngine(responses, Tokenizer.load(GOLDEN / "tokenizer")), Request([], 512))
    chat(session, console, LineEditor(console, folder / "history.jsonl"))
