"""
The task protocol. A task is a sequence of conversations; where there is a right answer, it also tells a right one from
a wrong one. Adding a task is one file: a subclass with __len__ and __getitem__.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

SEED = 42  # of every shuffle of rows, so that "the first 100 problems" are the same everywhere; arbitrary

Conversation = Mapping[str, Any]


class Task(ABC):
    """
    Each item is {"messages": […]}, ending with the assistant's reference answer, plus what judging it takes. Kinds:
    - "categorical":   the answer is one of the item's "letters"
    - "generative":    the answer is written out and judged by is_correct
    - "conversations": there is nothing to judge
    """

    kind: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """The conversation at 0 <= index < len; IndexError beyond, which is what ends a `for` over a task."""

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        raise TypeError(f"{type(self).__name__} has no right answers to judge by")

    def grade(self, conversation: Conversation, completion: str) -> dict[str, Any]:
        """{"correct": …} and what else explains the verdict to a person. May be called from several threads."""
        return {"correct": self.is_correct(conversation, completion)}

    def reward(self, conversation: Conversation, completion: str) -> float:
        return float(self.is_correct(conversation, completion))


class TaskMixture(Task):
    """The rows of several tasks in one fixed random order. A task listed twice counts twice."""

    kind = "conversations"

    def __init__(self, tasks: Sequence[Task], seed: int = SEED) -> None:
        self.tasks = list(tasks)
        self._order = [(task, row) for task, rows in enumerate(self.tasks) for row in range(len(rows))]
        random.Random(seed).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        task, row = self._order[index]
        return self.tasks[task][row]


def limited(task: Task, max_examples: int) -> Task:
    """The first max_examples rows of a task; the task itself if it has no more, or max_examples is negative."""
    return task if max_examples < 0 or max_examples >= len(task) else _Limited(task, max_examples)


class _Limited(Task):
    def __init__(self, task: Task, num_rows: int) -> None:
        self.task = task
        self.kind = task.kind
        self._rows = range(num_rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.task[self._rows[index]]

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        return self.task.is_correct(conversation, completion)

    def grade(self, conversation: Conversation, completion: str) -> dict[str, Any]:
        return self.task.grade(conversation, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        return self.task.reward(conversation, completion)


def final_number(text: str) -> Decimal | None:
    """
    The number after the first "####", None without one.

    >>> final_number("So 3 * 400 = 1200 dollars.\\n#### $1,200.00")
    Decimal('1200.00')
    """
    match = re.search(r"####\s*\$?([-+]?)\$?([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)", text)
    return Decimal(match[1] + match[2].replace(",", "")) if match else None
