"""smol-smoltalk: general conversations, selected for small models (https://arxiv.org/abs/2502.02737)."""

from typing import Any

from nanochat.conversation import validate
from tasks import hub
from tasks.common import Task


class SmolTalk(Task):
    kind = "conversations"

    def __init__(self, split: str) -> None:  # "train" or "test"
        self.rows = hub.load("HuggingFaceTB/smol-smoltalk", None, split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation = {"messages": self.rows[index]["messages"]}
        validate(conversation)
        return conversation
