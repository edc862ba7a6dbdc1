"""ARC, the AI2 Reasoning Challenge: multiple-choice science questions of grade school (https://arxiv.org/abs/1803.05457)."""

from typing import Any

from nanochat.conversation import multiple_choice
from tasks import hub
from tasks.common import SEED, Task


class ARC(Task):
    kind = "categorical"

    def __init__(self, subset: str, split: str) -> None:
        """subset: "ARC-Easy" or "ARC-Challenge"; split: "train", "validation" or "test"."""
        self.rows = hub.load("allenai/ai2_arc", subset, split).shuffle(seed=SEED)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        letters = row["choices"]["label"]  # A to E, or 1 to 4 in the questions from New York
        assert row["answerKey"] in letters, f"{row['id']}: the answer {row['answerKey']} is not among {letters}"
        question = multiple_choice(row["question"], row["choices"]["text"], letters)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["answerKey"]}]
        return {"messages": messages, "letters": letters}
