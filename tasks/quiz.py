"""
The tasks of the primer (nanochat/primer): quiz and sums for evaluation and reinforcement learning, conversations for
fine-tuning. The wordings of the quiz and the sums of the test split do not occur in training texts.
"""

import re
from collections.abc import Sequence
from typing import Any

from nanochat.conversation import turns
from nanochat.primer import contains_phrase, generate_conversations, generate_quiz, generate_sums
from tasks.common import Conversation, Task


class QuizFree(Task):
    """Questions without choices. A completion is correct if it contains the answer."""

    kind = "generative"
    item_kind = "free"

    def __init__(self) -> None:
        self.rows = [item for item in generate_quiz() if item["kind"] == self.item_kind]

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.rows[index]
        messages = turns(item["question"], item["answer"])
        return {"messages": messages, "answer": item["answer"], "choices": item.get("choices", [])}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        answer = conversation["answer"]
        wrong = [choice for choice in conversation["choices"] if choice != answer]
        if any(contains_phrase(completion, choice) for choice in wrong):
            return False
        return contains_phrase(completion, answer)


class QuizChoice(QuizFree):
    """Questions that list four choices. A completion that contains a wrong one too is not correct."""

    item_kind = "choice"


class Sums(Task):
    """Sums. A completion is correct if its last number is the result."""

    kind = "generative"
    hard = False

    def __init__(self, split: str) -> None:  # "train" or "test"
        self.rows = generate_sums(split, hard=self.hard)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.rows[index]
        return {"messages": turns(item["question"], item["reply"]), "answer": item["answer"]}

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        numbers = re.findall(r"-?\d+", completion)
        return bool(numbers) and numbers[-1] == conversation["answer"]


class HardSums(Sums):
    """Sums of larger numbers than in the primer's conversations, so that reinforcement learning can improve on SFT."""

    hard = True


class PrimerChat(Task):
    """The primer's conversations. `kinds` selects some of primer.CONVERSATION_MIX, by default all."""

    kind = "conversations"

    def __init__(self, split: str, kinds: Sequence[str] = ()) -> None:  # "train" or "val"
        self.rows = generate_conversations(split, kinds=kinds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]
