"""MMLU: multiple-choice questions on 57 subjects, from school to professional level (https://arxiv.org/abs/2009.03300)."""

from typing import Any

from nanochat.conversation import multiple_choice, turns
from tasks import hub
from tasks.common import Task

LETTERS = ["A", "B", "C", "D"]


class MMLU(Task):
    kind = "categorical"

    def __init__(self, split: str) -> None:
        """`split` is "auxiliary_train" (for training, from other benchmarks), "validation", "dev" or "test"."""
        self.rows = hub.load("cais/mmlu", "all", split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        question = multiple_choice(row["question"], row["choices"], LETTERS)
        messages = turns(question, LETTERS[row["answer"]])
        return {"messages": messages, "letters": LETTERS, "subject": row["subject"]}
