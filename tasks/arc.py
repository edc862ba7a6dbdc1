"""ARC, the AI2 Reasoning Challenge: grade-school science questions, multiple choice (https://arxiv.org/abs/1803.05457)."""

from typing import Any

from nanochat.conversation import multiple_choice, turns
from tasks import hub
from tasks.common import Task


class ARC(Task):
    kind = "categorical"

    def __init__(self, subset: str, split: str) -> None:
        """`subset` is "ARC-Easy" or "ARC-Challenge", `split` is "train", "validation" or "test"."""
        self.rows = hub.load("allenai/ai2_arc", subset, split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        letters = row["choices"]["label"]  # A to E; a few questions have 1 to 4
        assert row["answerKey"] in letters, f"{row['id']}: the answer {row['answerKey']} is not among {letters}"
        question = multiple_choice(row["question"], row["choices"]["text"], letters)
        return {"messages": turns(question, row["answerKey"]), "letters": letters}
