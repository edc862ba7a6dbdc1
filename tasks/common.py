"""
The base class of tasks. A task is a dataset of conversations to train on or to evaluate with.

To add a task, add one file with a subclass of Task. It sets `kind` and defines:
- __getitem__
- __len__, unless it sets `rows`
- is_correct, if its completions can be graded
- reward, if reinforcement learning needs other rewards than 1 for correct and 0 for wrong
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

SEED = 42  # of all shuffles: "the first 100 questions" are the same ones in every run

Conversation = Mapping[str, Any]


class Task(ABC):
    """
    A sequence of conversations {"messages": […]}. The last message is the assistant's reference reply. A conversation
    may have further keys, which grading needs.

    `kind` selects how a model is evaluated:
    - "categorical":   the model chooses one of conversation["letters"]
    - "generative":    the model generates a completion, which is_correct grades
    - "conversations": not at all, the task is for training only
    """

    kind: str
    rows: Sequence[Any] = ()  # the source of the conversations, one row for each

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a conversation. Must raise IndexError if index >= len(self), so that `for` loops end."""

    def is_correct(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion is correct. May be called from several threads."""
        raise TypeError(f"{type(self).__name__} has no is_correct: its completions cannot be graded")

    def grade(self, conversation: Conversation, completion: str) -> dict[str, Any]:
        """Returns {"correct": bool, …}: the verdict, and details for the log. May be called from several threads."""
        return {"correct": self.is_correct(conversation, completion)}

    def reward(self, conversation: Conversation, completion: str) -> float:
        """Returns the reward for reinforcement learning."""
        return float(self.is_correct(conversation, completion))


class TaskMixture(Task):
    """The conversations of tasks in a fixed random order. If a task is listed twice, each of its items occurs twice."""

    kind = "conversations"

    def __init__(self, tasks: Sequence[Task], seed: int = SEED) -> None:
        self.rows = [(task, index) for task in tasks for index in range(len(task))]
        random.Random(seed).shuffle(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        task, task_index = self.rows[index]
        return task[task_index]


def limited(task: Task, max_examples: int) -> Task:
    """Returns a task with the first max_examples conversations of a task; with all if max_examples is negative."""
    if max_examples < 0 or max_examples >= len(task):
        return task
    return _Limited(task, max_examples)


class _Limited(Task):
    """The first conversations of another task, which also grades the completions."""

    def __init__(self, task: Task, max_examples: int) -> None:
        self.task = task
        self.rows = range(max_examples)
        self.kind, self.is_correct, self.grade, self.reward = task.kind, task.is_correct, task.grade, task.reward

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.task[self.rows[index]]  # raises IndexError beyond the limit


def final_number(text: str) -> Decimal | None:
    """
    Returns the number after the first "####" that is followed by a number; None if there is none.

    >>> final_number("So 3 * 400 = 1200 dollars.\\n#### $1,200.00")
    Decimal('1200.00')
    """
    match = re.search(r"####\s*\$?([-+]?)\$?([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)", text)
    if match is None:
        return None
    sign, digits = match[1], match[2]
    return Decimal(sign + digits.replace(",", ""))
