"""GSM8K: grade-school math word problems, solved with calculator calls (https://arxiv.org/abs/2110.14168)."""

import re
from typing import Any

from nanochat.conversation import turns
from tasks import hub
from tasks.common import Conversation, Task, final_number


class GSM8K(Task):
    kind = "generative"

    def __init__(self, split: str) -> None:  # "train" or "test"
        self.rows = hub.load("openai/gsm8k", "main", split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        answer = final_number(row["answer"])
        assert answer is not None, f"no number after #### in {row['answer']!r}"
        messages = turns(row["question"], solution_parts(row["answer"]))
        return {"messages": messages, "answer": str(answer)}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the number after "####" equals that of the reference; "1,000.0" equals "1000"."""
        return final_number(completion) == final_number(f"#### {conversation['answer']}")


def solution_parts(answer: str) -> list[dict[str, str]]:
    """
    Converts the calculator annotations <<expression=result>> of a solution to tool calls.

    >>> [part["text"] for part in solution_parts("He has 2 * 3 = <<2*3=6>>6 eggs.")]
    ['He has 2 * 3 = ', '2*3', '6', '6 eggs.']
    """
    parts = []
    for i, piece in enumerate(re.split(r"<<(.*?)>>", answer)):  # text and annotations alternate
        if i % 2 == 0:
            parts.append({"type": "text", "text": piece})
        else:
            expression, _, result = piece.rpartition("=")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
    return [part for part in parts if part["text"]]
