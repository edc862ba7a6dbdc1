"""HumanEval: complete Python functions, graded by tests that run in a sandbox (https://arxiv.org/abs/2107.03374)."""

import re
import textwrap
from typing import Any

from nanochat.conversation import turns
from nanochat.sandbox.parent import Result, run
from tasks import hub
from tasks.common import Conversation, Task

CODE_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
# How a line without indentation starts if it is code. Any other line without indentation is prose.
CODE_LINE = re.compile(
    r"^(?:(?:def|class|import|from|async def|if|for|try|except|else|elif)\b|[@#)\]}]|[A-Za-z_]\w* *=[^=])", re.MULTILINE
)
PROSE_LINE = re.compile(rf"^(?!{CODE_LINE.pattern})\S", re.MULTILINE)
BLANK_LINES_AT_START = re.compile(r"\A(?:[ \t]*\n)+")
MAX_LOGGED_OUTPUT = 2000  # characters


class HumanEval(Task):
    kind = "generative"

    def __init__(self, timeout: float = 5.0) -> None:
        """`timeout` in seconds is for the tests of one completion. The reference solutions need a 50th of 5 s."""
        self.rows = hub.load("openai/openai_humaneval", "openai_humaneval", "test")
        self.timeout = timeout

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        messages = turns(row["prompt"], f"```python\n{row['prompt']}{row['canonical_solution']}```")
        grading = {key: row[key] for key in ("task_id", "prompt", "test", "entry_point")}
        return {"messages": messages, **grading}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completed function passes the tests. May be called from several threads."""
        return self.run_tests(conversation, completion).passed

    def grade(self, conversation: Conversation, completion: str) -> dict[str, Any]:
        """Returns the verdict, the end of the output (usually a traceback), and the sandbox's active protections."""
        result = self.run_tests(conversation, completion)
        return {
            "correct": result.passed,
            "outcome": result.outcome,
            "output": result.output[-MAX_LOGGED_OUTPUT:],
            "protections": result.protections,
        }

    def run_tests(self, conversation: Conversation, completion: str) -> Result:
        prompt, function = conversation["prompt"], conversation["entry_point"]
        check = f"{prompt}\n{conversation['test']}"  # some tests use helper functions of the prompt
        return run(prompt + extract_code(completion, function), check, function, self.timeout)


def extract_code(completion: str, function: str) -> str:
    r"""
    Returns the code of a completion, which is appended to the prompt: the rest of the function's body, or the whole
    function again.

    - With ``` blocks, it is the first block that defines the function, otherwise the first block.
    - Without blocks, it is the completion up to the first line of prose. If the completion defines the function, prose
      before the code is removed too.
    - A body without indentation is indented.

    >>> extract_code("Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt adds.", "double")
    'def double(x):\n    return 2 * x\n'
    >>> extract_code("return 2 * x", "double")
    '    return 2 * x'
    """
    definition = re.compile(rf"^(?:async )?def {re.escape(function)}\b", re.MULTILINE)
    blocks = CODE_BLOCK.findall(completion)
    code = completion
    if blocks:
        code = next((block for block in blocks if definition.search(block)), blocks[0])
    code = BLANK_LINES_AT_START.sub("", code)

    is_indented = code.startswith((" ", "\t"))
    if not definition.search(code) and not is_indented:
        return textwrap.indent(code, "    ")
    if blocks:
        return code
    if definition.search(code):
        code = code[CODE_LINE.search(code).start() :]
    prose = PROSE_LINE.search(code)
    return code[: prose.start()] if prose else code
