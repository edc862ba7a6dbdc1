"""The primer's examination, questions and sums that training never shows in these wordings; and its conversations."""

import re
from collections.abc import Sequence
from typing import Any

from nanochat.primer import documents as primer
from nanochat.primer.wordings import names
from tasks.common import Conversation, Task


class QuizFree(Task):
    kind = "generative"
    item_kind = "free"

    def __init__(self) -> None:
        self.items = [item for item in primer.quiz() if item["kind"] == self.item_kind]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        messages = [
            {"role": "user", "content": item["question"]},
            {"role": "assistant", "content": item["answer"]},
        ]
        return {"messages": messages, "answer": item["answer"], "choices": item.get("choices", [])}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion names the answer, as whole words, and no other choice."""
        others = [choice for choice in conversation["choices"] if choice != conversation["answer"]]
        return names(completion, conversation["answer"]) and not any(names(completion, other) for other in others)


class QuizChoice(QuizFree):
    """The same with four choices in the question."""

    item_kind = "choice"


class Sums(Task):
    kind = "generative"
    hard = False

    def __init__(self, split: str) -> None:
        """split: "train" or "test"."""
        self.items = primer.sums(split, hard=self.hard)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        return {"messages": item["conversation"]["messages"], "answer": item["answer"]}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the last number of the completion is the result."""
        numbers = re.findall(r"-?\d+", completion)
        return bool(numbers) and numbers[-1] == conversation["answer"]


class HardSums(Sums):
    """With larger numbers than the primer's conversations have: something left to learn by reinforcement."""

    hard = True


class PrimerChat(Task):
    kind = "conversations"

    def __init__(self, split: str, kinds: Sequence[str] = ()) -> None:
        """split: "train" or "val"; kinds: some of primer.CONVERSATION_MIX, as ("who", "greeting"), all without."""
        self.items = primer.conversations(split, kinds=kinds)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]
