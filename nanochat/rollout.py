"""
Reinforcement learning: answers are sampled, rewarded, compared with the other answers to the same question, and made
more or less likely accordingly.

It is GRPO (arXiv 2402.03300) cut down to the policy gradient. The answers to one question are a group, and an answer's
advantage is its reward less the group's mean; it is not divided by the group's standard deviation, which would favour
questions that are nearly solved or nearly hopeless (arXiv 2503.20783). Every token of a step weighs the same, however
long its answer (DAPO, arXiv 2503.14476). With one update per batch of rollouts the policy that sampled is the one that
is updated, so there is no ratio to clip; PPO's clipped ratio (arXiv 1707.06347) and a KL term are there for the asking.

Shapes: B rows, T tokens, N trained tokens of a micro-batch, V vocabulary, S tokens that could have been sampled.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nanochat.common import UserError
from nanochat.conversation import render_for_completion, spoken_text
from nanochat.distributed import Dist
from nanochat.engine import Completion, Engine, Request
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from nanochat.train import Step


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. The loss scores them under the same distribution."""

    num_samples: int = 16  # answers per question: a group
    max_tokens: int = 256  # of an answer, the tools' included
    temperature: float = 1.0
    top_k: int = 50  # 0 = among all tokens
    logprobs: bool = False  # keep those of the moment of sampling, for ratios


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    judge: Callable[[str], float]  # what the assistant says → reward


@dataclass(frozen=True)
class Rollout:
    """One answer to a question. Plain data: it travels between ranks and into checkpoints."""

    prompt: list[int]
    answer: list[int]  # with the end token, if one was sampled
    sampled: list[bool]  # per token of the answer; False: a tool's
    logprobs: list[float]  # per token of the answer, when it was sampled; empty unless asked for
    reward: float
    advantage: float
    finish: str  # as Completion's


def questions_of(task: Any, tokenizer: Tokenizer, room: int, at_most: float = math.inf) -> tuple[list[Question], int]:
    """
    The first questions of a task (tasks/common.py) whose prompts have at most `room` tokens, and how many had more
    among those looked at. UserError if none fits.
    """
    fitting: list[Question] = []
    lengths: list[int] = []
    for i in range(len(task)):
        if len(fitting) >= at_most:
            break
        conversation = task[i]
        prompt = render_for_completion(conversation, tokenizer)
        lengths.append(len(prompt))
        if len(prompt) <= room:
            fitting.append(Question(prompt, partial(task.reward, conversation)))
    if not fitting:
        raise UserError(
            f"no question fits: the shortest has {min(lengths, default=0)} tokens, the model's context less "
            f"--max-new-tokens leaves {room}: lower --max-new-tokens, or train a model with a longer --max-seq-len"
        )
    return fitting, len(lengths) - len(fitting)


def sample(
    engine: Engine, questions: Sequence[Question], numbers: Sequence[int], sampling: Sampling, dist: Dist
) -> list[Rollout]:
    """
    Answers to the questions, group after group; collective, and all ranks get all. `numbers`, one per question and
    unlike any other of the run, are what the answers' seeds follow from: the texts depend neither on the number of
    ranks nor on what else is sampled at the same time.
    """
    mine = range(dist.rank, len(questions), dist.world_size)
    requests = [
        Request(
            questions[i].prompt, sampling.max_tokens, sampling.temperature, sampling.top_k,
            seed=numbers[i] * sampling.num_samples + j, logprobs=sampling.logprobs,
        )
        for i in mine
        for j in range(sampling.num_samples)
    ]  # fmt: skip
    completions = iter(engine.generate(requests))
    groups = [group(questions[i], [next(completions) for _ in range(sampling.num_samples)], engine) for i in mine]
    everyone = dist.gather(groups)
    return [rollout for i in range(len(questions)) for rollout in everyone[i % dist.world_size][i // dist.world_size]]


def group(question: Question, completions: Sequence[Completion], engine: Engine) -> list[Rollout]:
    """Rewards the answers to one question and compares them with each other."""
    rewards = [question.judge(spoken_text(c.tokens, engine.tokenizer)) for c in completions]
    mean = math.fsum(rewards) / len(rewards)
    alike = min(rewards) == max(rewards)  # exactly zero then, whatever the rounding of the mean
    rollouts = []
    for completion, reward in zip(completions, rewards, strict=True):
        answer, sampled = list(completion.tokens), list(completion.sampled)
        if completion.finish == "stop":  # when to stop is learned too
            answer.append(completion.end_token)
            sampled.append(True)
        advantage = 0.0 if alike else reward - mean
        rollouts.append(
            Rollout(question.prompt, answer, sampled, completion.logprobs, reward, advantage, completion.finish)
        )
    return rollouts


def summarize(rollouts: Sequence[Rollout], num_samples: int) -> dict[str, float]:
    """For the log: mean reward, mean tokens of an answer, the share of groups with signal, that of answers cut off."""
    groups = [rollouts[i : i + num_samples] for i in range(0, len(rollouts), num_samples)]
    return {
        "rl/reward": math.fsum(r.reward for r in rollouts) / len(rollouts),
        "rl/length": sum(len(r.answer) for r in rollouts) / len(rollouts),
        "rl/signal": sum(any(r.advantage for r in group) for group in groups) / len(groups),
        "rl/cut": sum(r.finish != "stop" for r in rollouts) / len(rollouts),
    }


def evaluate(engine: Engine, questions: Sequence[Question], sampling: Sampling, dist: Dist) -> dict[str, float]:
    """pass@k for k = 1, 2, 4 … num_samples; a reward of 1 or more is a pass. Collective."""
    n = sampling.num_samples
    rollouts = sample(engine, questions, range(len(questions)), sampling, dist)
    correct = [sum(r.reward >= 1 for r in rollouts[i : i + n]) for i in range(0, len(rollouts), n)]
    ks = [2**i for i in range(n.bit_length())]
    return {f"eval/pass@{k}": math.fsum(pass_at_k(n, c, k) for c in correct) / len(correct) for k in ks}


# ---- from rollouts to optimizer updates ----


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of about one length, padded, as the loss takes them."""

    idx_BT: torch.Tensor
    trained_N: torch.Tensor  # places in the flattened B * T before the trained tokens
    targets_N: torch.Tensor  # the trained tokens
    advantages_N: torch.Tensor
    old_logprobs_N: torch.Tensor  # zeros unless they were kept
    num_targets: int  # trained tokens of the whole step over all ranks, those of groups without signal included


def pack(
    rollouts: Sequence[Rollout], device_batch_size: int, dist: Dist, with_all: bool = False
) -> tuple[list[RolloutBatch], int]:
    """
    This rank's micro-batches, the longest rollouts first, and the number of trained tokens in those of all ranks. What
    has no advantage has no gradient and is left out, unless with_all asks for it: a KL term trains on every answer.
    """
    num_targets = sum(sum(r.sampled) for r in rollouts)
    used = sorted(
        (r for r in rollouts if with_all or r.advantage), key=lambda r: len(r.prompt) + len(r.answer), reverse=True
    )
    mine = used[dist.rank :: dist.world_size]
    batches = [
        _pad(mine[i : i + device_batch_size], num_targets, dist.device) for i in range(0, len(mine), device_batch_size)
    ]
    return batches, sum(sum(r.sampled) for r in used)


def _pad(rollouts: Sequence[Rollout], num_targets: int, device: torch.device) -> RolloutBatch:
    T = max(len(r.prompt) + len(r.answer) for r in rollouts) - 1
    idx_BT = torch.zeros((len(rollouts), T), dtype=torch.long)  # what pads is after all that matters: any token does
    trained, targets, advantages, old_logprobs = list[int](), list[int](), list[float](), list[float]()
    for row, r in enumerate(rollouts):
        ids = (r.prompt + r.answer)[:-1]
        idx_BT[row, : len(ids)] = torch.tensor(ids)
        places = [i for i, sampled in enumerate(r.sampled) if sampled]
        trained += [row * T + len(r.prompt) - 1 + i for i in places]
        targets += [r.answer[i] for i in places]
        advantages += [r.advantage] * len(places)
        old_logprobs += [r.logprobs[i] for i in places] if r.logprobs else [0.0] * len(places)
    trained_N, targets_N = torch.tensor([trained, targets], dtype=torch.long, device=device)
    advantages_N, old_logprobs_N = torch.tensor([advantages, old_logprobs], dtype=torch.float32, device=device)
    return RolloutBatch(idx_BT.to(device), trained_N, targets_N, advantages_N, old_logprobs_N, num_targets)


@dataclass(frozen=True)
class PolicyLoss:
    """
    The loss of a RolloutBatch: -sum(log-probability * advantage) / trained tokens of the step. The log-probability is
    that of the distribution sampled from, so it is of the top k at the same temperature.

    clip_ratio: for several updates per batch: the ratio to the log-probability when sampled takes the place of the
                log-probability, and stops counting once it is further than this from 1
    kl_coef:    weight of the KL divergence from `reference`, estimated per sampled token by Schulman's k3, r - 1 - log
                r with r the reference's probability over the policy's (http://joschu.net/blog/kl-approx.html): unbiased
                and never negative. Both distributions are over the tokens that the policy could have sampled.
    """

    sampling: Sampling
    clip_ratio: float = 0.0  # 0 = no ratio
    kl_coef: float = 0.0
    reference: GPT | None = None

    def __call__(self, model: GPT, batch: RolloutBatch) -> torch.Tensor:
        logits_NV = self._logits(model, batch)
        k = self.sampling.top_k
        support_NS = logits_NV.topk(k, dim=-1).indices if 0 < k < logits_NV.size(1) else None
        logprobs_N = logprobs(logits_NV, batch.targets_N, support_NS)
        if self.clip_ratio:
            ratio_N = (logprobs_N - batch.old_logprobs_N).exp()
            clipped_N = ratio_N.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
            gain_N = torch.minimum(ratio_N * batch.advantages_N, clipped_N * batch.advantages_N)
        else:
            gain_N = logprobs_N * batch.advantages_N
        if self.reference is not None:
            with torch.no_grad():
                reference_N = logprobs(self._logits(self.reference, batch), batch.targets_N, support_NS)
            log_r_N = reference_N - logprobs_N
            gain_N = gain_N - self.kl_coef * (log_r_N.exp() - 1 - log_r_N)
        return -gain_N.sum() / batch.num_targets

    def _logits(self, model: GPT, batch: RolloutBatch) -> torch.Tensor:
        """(N, V): of the trained places only, which spares most of the head."""
        hidden_NC = model.hidden(batch.idx_BT).flatten(0, 1)[batch.trained_N]
        return model.logits(hidden_NC) / self.sampling.temperature


def logprobs(logits_NV: torch.Tensor, targets_N: torch.Tensor, support_NS: torch.Tensor | None) -> torch.Tensor:
    """
    Natural logarithms (N,) of the targets' probabilities among the tokens of support_NS (None: all). The target always
    counts among them: it was sampled, even if by another rounding it would not be among the top k.
    """
    chosen_N1 = logits_NV.gather(1, targets_N[:, None])
    if support_NS is None:
        return (chosen_N1 - logits_NV.logsumexp(dim=1, keepdim=True)).squeeze(1)
    total_N1 = logits_NV.gather(1, support_NS).logsumexp(dim=1, keepdim=True)
    is_in_N1 = (support_NS == targets_N[:, None]).any(dim=1, keepdim=True)
    return (chosen_N1 - torch.where(is_in_N1, total_N1, torch.logaddexp(total_N1, chosen_N1))).squeeze(1)


def rollout_steps(
    draw: Callable[[int, int], list[Rollout]],  # (number of the first question, step it is for) → rollouts
    pack: Callable[[Sequence[Rollout]], tuple[list[RolloutBatch], int]],
    questions_per_batch: int,
    updates_per_batch: int,
    num_steps: int,  # updates
    dist: Dist,
    state: dict[str, Any] | None = None,  # the first rank's of a resumed run
) -> Iterator[Step]:
    """
    Reinforcement learning's steps. Rollouts are drawn when the loop asks for the step, thus from the newest weights. A
    step without any signal has no micro-batches and no tokens. A batch that is not used up is part of the data state.
    """
    state = state or {"step": 0, "next": 0, "updates_left": 0, "rollouts": []}
    step, next_question, updates_left = state["step"], state["next"], state["updates_left"]
    rollouts = [Rollout(**fields) for fields in state["rollouts"]]
    while step < num_steps:
        progress = step / num_steps
        step += 1
        if not updates_left:
            rollouts = draw(next_question, step)
            next_question, updates_left = next_question + questions_per_batch, updates_per_batch
        updates_left -= 1
        micro_batches, num_tokens = pack(rollouts)
        kept = [vars(rollout) for rollout in rollouts] if updates_left and dist.is_main else []
        data_state = {"step": step, "next": next_question, "updates_left": updates_left, "rollouts": kept}
        metrics = summarize(rollouts, len(rollouts) // questions_per_batch)
        yield Step(micro_batches, progress, num_tokens, data_state, f"questions up to {next_question}", metrics)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """
    The chance that one of k answers is right, estimated without bias from num_samples >= k of which num_correct are
    (arXiv 2107.03374, equation 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
