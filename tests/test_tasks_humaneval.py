"""
HumanEval: extracting code from completions, grading it.

    python -m pytest tests/test_tasks_humaneval.py
    NANOCHAT_DATASETS_DIR=… python -m pytest tests/test_tasks_humaneval.py    # all 164 problems, from a local mirror
"""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_tasks import write_dataset

from tasks.humaneval import HumanEval, extract_code

PROMPT = '''from math import sqrt


def square(x: int) -> int:
    return x * x


def length(a: int, b: int) -> float:
    """ Length of the hypotenuse.
    >>> length(3, 4)
    5.0
    """
'''
BODY = "    c = square(a) + square(b)\n    return sqrt(c)\n"
TEST = """

METADATA = {}


def check(candidate):
    assert candidate(3, 4) == 5
    assert candidate(0, 7) == sqrt(square(7))
"""
ROW = {"task_id": "Test/0", "prompt": PROMPT, "canonical_solution": BODY, "test": TEST, "entry_point": "length"}


@pytest.fixture
def task(tmp_path, monkeypatch):
    write_dataset(tmp_path / "mirror", "openai/openai_humaneval", "openai_humaneval", {"test": [ROW]})
    monkeypatch.setenv("NANOCHAT_DATASETS_DIR", str(tmp_path / "mirror"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return HumanEval(timeout=20)


def test_humaneval_item_has_prompt_and_correct_reference(task):
    [conversation] = task
    assert task.kind == "generative" and conversation["task_id"] == "Test/0"
    question, answer = conversation["messages"]
    assert question == {"role": "user", "content": PROMPT} and task.is_correct(conversation, answer["content"])
    assert task.reward(conversation, answer["content"]) == 1.0


LOOSE = "c = square(a) + square(b)\nreturn sqrt(c)"
WHOLE = "import math\n\ndef length(a, b):\n    return helper(a, b)\n\ndef helper(a, b):\n    return math.hypot(a, b)\n"
COMPLETIONS = {
    "body": BODY,
    "body after blank lines": f"\n   \n{BODY}",
    "body without indentation": LOOSE,
    "body, then prose": f"{BODY}\nThis is Pythagoras' theorem.\n\n    c = 0",
    "body, then a helper and prose": f"    return helper(a, b)\n\ndef helper(a, b):\n{BODY}\nDone.",
    "block with a body": f"The rest is:\n\n```python\n{BODY}```",
    "block with a body without indentation": f"```\n{LOOSE}\n```",
    "block with the function": f"Here it is:\n\n```python\n{WHOLE}```\n\nIt uses hypot.",
    "indented block": f"1. So:\n   ```py\n{WHOLE}   ```",
    "block that is not closed": f"```python\n{WHOLE}",
    "second of two blocks": f"```bash\npip install math\n```\n```python\n{WHOLE}```",
    "first of two blocks": f"```python\n{WHOLE}```\nUse it:\n```python\nprint(length(1, 2)\n```",
    "function": WHOLE,
    "function between prose": f"Sure!\n\n{WHOLE}\nThat is all: 1, 2, 3.",
    "prompt and body": PROMPT + BODY,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPLETIONS)
def test_is_correct_right_completion_in_any_form_passes(task, name):
    result = task.run_tests(task[0], COMPLETIONS[name])
    assert result.passed, result.output


WRONG = {
    "nothing": "",
    "prose": "I do not know.",
    "empty body": "    pass\n",
    "empty block": "```python\n```",
    "wrong": BODY.replace("+", "-"),
    "exit": "    import sys\n    sys.exit(0)",
    "hard exit": "    import os\n    os._exit(0)",
    "its own check": WHOLE.replace("hypot", "dist") + "\ndef check(candidate):\n    pass\n",
    "other function": "def size(a, b):\n    return (a * a + b * b) ** 0.5",
    "equal to everything": "    class All:\n        def __eq__(self, other): return True\n    return All()",
}


@pytest.mark.parametrize("name", WRONG)
def test_is_correct_wrong_completion_fails(task, name):
    assert not task.is_correct(task[0], WRONG[name])


def test_extract_code_keeps_code_unchanged():
    constant = 'TEXT = """\nText without indentation.\n"""\n'
    assert extract_code(f"```python\n{constant}{WHOLE}```", "length") == constant + WHOLE
    assert extract_code(BODY, "length") == BODY
    body_and_class = "    return 1\n\n\nclass A:\n    pass\n\n"
    assert extract_code(f"{body_and_class}The end.", "length") == body_and_class


@pytest.mark.slow
@pytest.mark.skipif("NANOCHAT_DATASETS_DIR" not in os.environ, reason="NANOCHAT_DATASETS_DIR is not set")
def test_humaneval_references_pass_and_empty_bodies_fail(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    task = HumanEval(timeout=30)
    conversations = list(task)
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda c: task.is_correct(c, c["messages"][-1]["content"]), conversations))
        empty = list(pool.map(lambda c: task.is_correct(c, "    pass\n"), conversations))
    assert right == [True] * 164 and empty == [False] * 164
