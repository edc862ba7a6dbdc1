"""
Shares of right answers: their intervals, the mean over tasks, pass@k.

    python -m pytest tests/test_metrics.py
"""

import itertools
import random

import pytest
import torch

from nanochat.eval.chat import CHATCORE, Score
from nanochat.eval.metrics import core_metric
from nanochat.rollout import pass_at_k


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    "correct, total, low, high",  # 95 % Wilson intervals, e.g. Brown, Cai, DasGupta 2001 (doi 10.1214/ss/1009213286)
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25528, 0.36620)],
)
def test_wilsons_interval(correct, total, low, high):
    assert Score("a", correct, total, 0.0).interval == pytest.approx((low, high), abs=1e-4)
    assert Score("a", correct, total, 0.0).accuracy == correct / total


def test_the_interval_holds_what_it_promises_of_several_answers_too():
    """Questions of a difficulty of their own, answered four times each: 95 of 100 intervals hold the true accuracy."""
    rng, held = random.Random(0), 0
    for _ in range(400):
        rights = [sum(rng.random() < rng.choice((0.0, 0.3, 0.9)) for _ in range(4)) for _ in range(60)]
        low, high = Score("a", sum(rights), 60, 0.0, num_samples=4).interval
        held += low <= 0.4 <= high
    assert held >= 0.95 * 400


def test_chatcore():
    right = {"ARC-Easy": 40, "ARC-Challenge": 25, "MMLU": 100, "GSM8K": 10, "HumanEval": 0, "SpellingBee": 50}
    assert right.keys() == CHATCORE.keys()
    scores = [Score(name, right[name], 100, CHATCORE[name]) for name in right]
    core, margin = core_metric(scores)
    assert core == pytest.approx((0.2 + 0.0 + 1.0 + 0.1 + 0.0 + 0.5) / 6)
    rng, means = random.Random(0), []
    for _ in range(2000):  # the spread of ChatCORE over repeated examinations
        drawn = [sum(rng.random() < s.accuracy for _ in range(100)) / 100 for s in scores]
        means.append(sum((a - s.baseline) / (1 - s.baseline) for a, s in zip(drawn, scores, strict=True)) / 6)
    spread = 1.96 * torch.tensor(means).std().item()
    assert margin == pytest.approx(spread, rel=0.1)
