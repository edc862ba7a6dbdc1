"""
The task protocol: a task is a dataset of conversations which can be trained on, and which may grade completions.

To add a task, add one file with a subclass of Task that defines __len__ and __getitem__, and is_correct if completions
can be graded.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

SEED = 42  # of all shuffles of rows, so that "the first 100 problems" are the same in every run

Conversation = Mapping[str, Any]


class Task(ABC):
    """
    A sequence of conversations {"messages": […]}, each ending with the assistant's reference reply. An item may have
    further keys, which grading needs. `kind` selects how a model is evaluated:
    - "categorical":   the model chooses one of item["letters"]
    - "generative":    the model generates a completion, which is_correct grades
    - "conversations": not at all, the task is for training only
    """

    kind: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the conversation at 0 <= index < len. Raise IndexError beyond, so that `for` loops end."""

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion is correct. May be called from several threads."""
        raise TypeError(f"{type(self).__name__} has no is_correct: its completions cannot be graded")

    def grade(self, conversation: Conversation, completion: str) -> dict[str, Any]:
        """Return {"correct": …} and details for the log. May be called from several threads."""
        return {"correct": self.is_correct(conversation, completion)}

    def reward(self, conversation: Conversation, completion: str) -> float:
        """Return the reward for reinforcement learning."""
        return float(self.is_correct(conversation, completion))


class TaskMixture(Task):
    """The items of several tasks in one fixed random order. A task listed twice contributes its items twice."""

    kind = "conversations"

    def __init__(self, tasks: Sequence[Task], seed: int = SEED) -> None:
        self.tasks = list(tasks)
        self._order: list[tuple[Task, int]] = []
        for task in self.tasks:
            self._order += [(task, index) for index in range(len(task))]
        random.Random(seed).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        task, task_index = self._order[index]
        return task[task_index]


def limited(task: Task, max_examples: int) -> Task:
    """Return the first max_examples items of a task; all of them if max_examples is negative."""
    if max_examples < 0 or max_examples >= len(task):
        return task
    return _Limited(task, max_examples)


class _Limited(Task):
    def __init__(self, task: Task, num_items: int) -> None:
        self.task = task
        self.kind = task.kind
        self._indices = range(num_items)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.task[self._indices[index]]

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        return self.task.is_correct(conversation, completion)

    def grade(self, conversation: Conversation, completion: str) -> dict[str, Any]:
        return self.task.grade(conversation, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        return self.task.reward(conversation, completion)


def final_number(text: str) -> Decimal | None:
    """
    Return the number after the first "####", or None.

    >>> final_number("So 3 * 400 = 1200 dollars.\\n#### $1,200.00")
    Decimal('1200.00')
    """
    match = re.search(r"####\s*\$?([-+]?)\$?([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)", text)
    if match is None:
        return None
    sign, digits = match[1], match[2]
    return Decimal(sign + digits.replace(",", ""))
