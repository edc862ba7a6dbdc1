"""
Accuracies: their confidence intervals, the mean over tasks, pass@k.

    python -m pytest tests/test_metrics.py
"""

import itertools
import random

import pytest
import torch

from nanochat.eval.chat import CHATCORE, ChatScore
from nanochat.eval.metrics import core_metric
from nanochat.rollout import pass_at_k


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_k_equals_share_of_subsets_with_a_correct_sample(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    "correct, total, low, high",  # 95 % Wilson intervals, e.g. Brown, Cai, DasGupta 2001 (doi 10.1214/ss/1009213286)
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25528, 0.36620)],
)
def test_interval_equals_published_wilson_intervals(correct, total, low, high):
    assert ChatScore("a", correct, total, 0.0).interval == pytest.approx((low, high), abs=1e-4)
    assert ChatScore("a", correct, total, 0.0).accuracy == correct / total


def test_interval_of_several_samples_holds_the_true_accuracy():
    """Questions of different difficulty, four samples each: 95 % of the intervals hold the true accuracy."""
    rng, held = random.Random(0), 0
    for _ in range(400):
        num_correct = [sum(rng.random() < rng.choice((0.0, 0.3, 0.9)) for _ in range(4)) for _ in range(60)]
        low, high = ChatScore("a", sum(num_correct), 60, 0.0, num_samples=4).interval
        held += low <= 0.4 <= high
    assert held >= 0.95 * 400


def test_core_metric_of_chatcore_has_margin_of_simulated_evaluations():
    correct = {"ARC-Easy": 40, "ARC-Challenge": 25, "MMLU": 100, "GSM8K": 10, "HumanEval": 0, "SpellingBee": 50}
    assert correct.keys() == CHATCORE.keys()
    scores = [ChatScore(name, correct[name], 100, CHATCORE[name]) for name in correct]
    core, margin = core_metric(scores)
    assert core == pytest.approx((0.2 + 0.0 + 1.0 + 0.1 + 0.0 + 0.5) / 6)
    rng, means = random.Random(0), []
    for _ in range(2000):  # the spread of ChatCORE over repeated evaluations
        drawn = [sum(rng.random() < s.accuracy for _ in range(100)) / 100 for s in scores]
        means.append(sum((a - s.baseline) / (1 - s.baseline) for a, s in zip(drawn, scores, strict=True)) / 6)
    spread = 1.96 * torch.tensor(means).std().item()
    assert margin == pytest.approx(spread, rel=0.1)
