"""HumanEval: Python functions to complete, judged by running tests in a sandbox (https://arxiv.org/abs/2107.03374)."""

import re
import textwrap
from typing import Any

from nanochat.sandbox.parent import Result, run
from tasks import hub
from tasks.common import SEED, Conversation, Task

FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
# A line at the left margin with which a program begins or goes on; anything else there is talk.
CODE_LINE = re.compile(
    r"^(?:(?:def|class|import|from|async def|if|for|try|except|else|elif)\b|[@#)\]}]|[A-Za-z_]\w* *=[^=])", re.MULTILINE
)
TALK_LINE = re.compile(rf"^(?!{CODE_LINE.pattern})\S", re.MULTILINE)
BLANK_LINES = re.compile(r"\A(?:[ \t]*\n)+")
KEPT_OUTPUT = 2000  # characters; arbitrary


class HumanEval(Task):
    kind = "generative"

    def __init__(self, timeout: float = 5.0) -> None:
        """timeout: seconds for the tests of one answer; arbitrary, 50 times what the reference answers need."""
        self.rows = hub.load("openai/openai_humaneval", "openai_humaneval", "test").shuffle(seed=SEED)
        self.timeout = timeout

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": f"```python\n{row['prompt']}{row['canonical_solution']}```"},
        ]
        names = ("task_id", "prompt", "test", "entry_point")
        return {"messages": messages} | {name: row[name] for name in names}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completed function passes the tests, in a sandbox. May be called from several threads."""
        return self.run(conversation, completion).passed

    def grade(self, conversation: Conversation, completion: str) -> dict[str, Any]:
        """The verdict, the end of what was printed (mostly a traceback), and the protections that were on."""
        result = self.run(conversation, completion)
        details = {"outcome": result.outcome, "output": result.output[-KEPT_OUTPUT:]}
        return {"correct": result.passed, **details, "protections": result.protections}

    def run(self, conversation: Conversation, completion: str) -> Result:
        """The verdict with what was printed and which protections were on."""
        prompt, function = conversation["prompt"], conversation["entry_point"]
        check = f"{prompt}\n{conversation['test']}"  # some tests use what the prompt defines
        return run(prompt + code_of(completion, function), check, function, self.timeout)


def code_of(completion: str, function: str) -> str:
    r"""
    The part of a completion that, after the prompt, makes a program: the rest of the function's body, or the whole
    function once more. If there are ``` blocks, it is the first that defines the function, else the first. If there
    are none, it is all that looks like code: a definition of the function with what stands before and after it, or a
    body; both end before the first line at the left margin that is no code. A body at the left margin is indented.

    >>> code_of("Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt adds.", "double")
    'def double(x):\n    return 2 * x\n'
    >>> code_of("return 2 * x", "double")
    '    return 2 * x'
    """
    defines = re.compile(rf"^(?:async )?def {re.escape(function)}\b", re.MULTILINE)
    blocks = FENCED.findall(completion)
    code = BLANK_LINES.sub("", next(filter(defines.search, blocks), blocks[0]) if blocks else completion)
    if not defines.search(code) and code[:1] not in (" ", "\t"):
        return textwrap.indent(code, "    ")
    if blocks:
        return code
    if defines.search(code):
        code = code[CODE_LINE.search(code).start() :]
    talk = TALK_LINE.search(code)
    return code[: talk.start()] if talk else code
