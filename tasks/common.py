"""
The task protocol: a task is a dataset of conversations which can be trained on, and which may grade completions.

To add a task, add one file with a subclass of Task that defines __getitem__, __len__ (unless it sets `rows`), and
is_correct if completions can be graded.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

SEED = 42  # of all shuffles, so that "the first 100 problems" are the same in every run

Conversation = Mapping[str, Any]


class Task(ABC):
    """
    A sequence of conversations {"messages": […]}, each ending with the assistant's reference reply. An item may have
    further keys, which grading needs. `rows` are the source of the items; a task without rows defines __len__.

    `kind` selects how a model is evaluated:
    - "categorical":   the model chooses one of item["letters"]
    - "generative":    the model generates a completion, which is_correct grades
    - "conversations": not at all, the task is for training only
    """

    kind: str
    rows: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(self.rows)

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
        self.rows = [(task, index) for task in tasks for index in range(len(task))]
        random.Random(seed).shuffle(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        task, task_index = self.rows[index]
        return task[task_index]


def limited(task: Task, max_examples: int) -> Task:
    """Return the first max_examples items of a task; all of them if max_examples is negative."""
    if max_examples < 0 or max_examples >= len(task):
        return task
    return _Limited(task, max_examples)


class _Limited(Task):
    def __init__(self, task: Task, num_items: int) -> None:
        self.task = task
        self.rows = range(num_items)
        self.kind, self.is_correct, self.grade, self.reward = task.kind, task.is_correct, task.grade, task.reward

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.task[self.rows[index]]


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
