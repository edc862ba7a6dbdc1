"""
Reinforcement learning on questions whose answers can be graded: GRPO (arXiv 2402.03300) without its extra terms.

    questions → completions → rewards → advantages → loss

For each question the current model samples a group of completions. Each completion gets a reward, and its advantage is
the reward minus the mean of its group. A step raises the probability of completions that beat their group's mean and
lowers that of the others. For completion i with its sampled tokens t:

    advantage_i = reward_i - mean(rewards of the group)
    loss        = -sum over all i and t of (advantage_i * logprob_it) / number of sampled tokens of the step

What differs from GRPO as published:
- The advantage is not divided by the group's standard deviation, which would give more weight to questions that are
  almost always or almost never solved (Dr. GRPO, arXiv 2503.20783).
- The sum runs over all tokens of the step, so a token counts the same in a long and in a short completion (DAPO,
  arXiv 2503.14476).
- With one optimizer step per batch of rollouts, the model that is trained is the one that sampled, so the probability
  ratio is 1 and needs no clipping. For several steps per batch there is PPO's clipped ratio (arXiv 1707.06347).
- There is no KL penalty unless asked for.

Shapes: B rows, T tokens, N trained tokens of a micro-batch, V vocabulary, S tokens that could have been sampled.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from nanochat.common import UserError
from nanochat.conversation import completion_text, render_for_completion
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.progress import Bar
from nanochat.request import Completion, Request
from nanochat.tokenizer import Tokenizer
from nanochat.train import Step

T = TypeVar("T")


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled. The loss computes probabilities under the same distribution."""

    num_samples: int = 16  # completions per question: the size of a group
    max_tokens: int = 256  # of a completion, tool output included
    temperature: float = 1.0
    top_k: int = 50  # 0 = all tokens
    logprobs: bool = False  # keep the log-probabilities at the time of sampling; needed for ratios


@dataclass(frozen=True)
class Question:
    prompt: list[int]  # token ids
    reward_fn: Callable[[str], float]  # text of a completion → reward


@dataclass(frozen=True)
class Rollout:
    """A graded completion of a question. Plain data: ranks exchange rollouts, and checkpoints contain them."""

    prompt: list[int]
    completion: list[int]  # with the end token, if one was sampled
    sampled: list[bool]  # per token of the completion; False: forced by a tool
    logprobs: list[float]  # per token of the completion, at the time of sampling; empty unless asked for
    reward: float
    advantage: float
    finish: str  # as in engine.Completion

    def state_dict(self) -> dict[str, Any]:
        """For JSON. The completion's key is "answer", as in the checkpoints of earlier versions."""
        state = dict(vars(self))
        state["answer"] = state.pop("completion")
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Rollout":
        fields = dict(state)
        fields["completion"] = fields.pop("answer")
        return cls(**fields)


def load_questions(
    task: Any, tokenizer: Tokenizer, max_prompt_tokens: int, limit: float = math.inf
) -> tuple[list[Question], int]:
    """
    Returns the first `limit` questions of a task (tasks/common.py) whose prompts are short enough, and how many
    questions were skipped on the way because their prompts are too long. UserError if no prompt is short enough.
    """
    questions: list[Question] = []
    lengths: list[int] = []
    for conversation in task:
        if len(questions) >= limit:
            break
        prompt = render_for_completion(conversation, tokenizer)
        lengths.append(len(prompt))
        if len(prompt) <= max_prompt_tokens:
            questions.append(Question(prompt, partial(task.reward, conversation)))
    if not questions:
        raise UserError(
            f"no question fits: the shortest has {min(lengths, default=0)} tokens, the model's context minus "
            f"--max-new-tokens leaves {max_prompt_tokens}: lower --max-new-tokens, or train a model with a longer "
            f"--max-seq-len"
        )
    return questions, len(lengths) - len(questions)


# ---- questions → completions → rewards → advantages ----


def sample_rollouts(
    engine: Engine, questions: Sequence[Question], numbers: Sequence[int], config: RolloutConfig, dist: Dist
) -> list[Rollout]:
    """
    Samples and grades a group of completions per question; returns the rollouts in the order of the questions.
    Collective: the ranks share the questions, and every rank gets all rollouts.

    numbers: one per question; it determines the seeds of the question's completions. So completions depend neither
    on the number of ranks nor on what else is sampled at the same time. Training counts its questions over the whole
    run. Each evaluation counts from 0, so that all evaluations use the same seeds.
    """
    template = Request([], config.max_tokens, config.temperature, config.top_k, logprobs=config.logprobs)
    own_questions = questions[dist.rank :: dist.world_size]
    requests = []
    for question, number in zip(own_questions, numbers[dist.rank :: dist.world_size], strict=True):
        for i in range(config.num_samples):
            requests.append(replace(template, prompt=question.prompt, seed=number * config.num_samples + i))
    with Bar(f"rollouts of {len(own_questions)} questions", len(requests), unit="completions") as bar:
        completions = engine.generate(requests, bar.update)
    groups = _split(completions, config.num_samples)
    graded = [
        grade_group(question, group, engine.tokenizer) for question, group in zip(own_questions, groups, strict=True)
    ]

    graded_by_rank = dist.gather(graded)
    rollouts = []
    for i in range(len(questions)):
        rollouts += graded_by_rank[i % dist.world_size][i // dist.world_size]
    return rollouts


def _split(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Returns consecutive groups of `size` items; the last one may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def grade_group(question: Question, completions: Sequence[Completion], tokenizer: Tokenizer) -> list[Rollout]:
    """Computes the rewards and advantages of the completions of one question."""
    rewards = [question.reward_fn(completion_text(c.tokens, tokenizer)) for c in completions]
    advantages = group_advantages(rewards)
    rollouts = []
    for completion, reward, advantage in zip(completions, rewards, advantages, strict=True):
        tokens, sampled = list(completion.tokens), list(completion.sampled)
        if completion.finish == "stop":  # the end token is trained too: the model learns when to stop
            tokens.append(completion.end_token)
            sampled.append(True)
        rollouts.append(
            Rollout(question.prompt, tokens, sampled, completion.logprobs, reward, advantage, completion.finish)
        )
    return rollouts


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """
    Returns the rewards minus their mean. If all rewards are equal, it returns exact zeros without computing the mean,
    which rounding could change.

    >>> group_advantages([1.0, 0.0, 0.0, 1.0])
    [0.5, -0.5, -0.5, 0.5]
    >>> group_advantages([0.1, 0.1, 0.1])
    [0.0, 0.0, 0.0]
    """
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def summarize(rollouts: Sequence[Rollout], num_samples: int) -> dict[str, float]:
    """
    Metrics of a batch: mean reward, mean length in tokens, the fraction of groups with a training signal (not all
    rewards equal), and the fraction of completions that were cut off.
    """
    groups = _split(rollouts, num_samples)
    return {
        "rl/reward": math.fsum(r.reward for r in rollouts) / len(rollouts),
        "rl/length": sum(len(r.completion) for r in rollouts) / len(rollouts),
        "rl/signal": sum(any(r.advantage for r in group) for group in groups) / len(groups),
        "rl/cut": sum(r.finish != "stop" for r in rollouts) / len(rollouts),
    }


# ---- evaluation ----


def evaluate_pass_at_k(
    engine: Engine, questions: Sequence[Question], config: RolloutConfig, dist: Dist
) -> dict[str, float]:
    """pass@k for k = 1, 2, 4 … num_samples; a completion with a reward of at least 1 is correct. Collective."""
    rollouts = sample_rollouts(engine, questions, range(len(questions)), config, dist)
    num_correct = [sum(r.reward >= 1 for r in group) for group in _split(rollouts, config.num_samples)]
    metrics = {}
    for exponent in range(config.num_samples.bit_length()):
        k = 2**exponent
        scores = [pass_at_k(config.num_samples, correct, k) for correct in num_correct]
        metrics[f"eval/pass@{k}"] = math.fsum(scores) / len(scores)
    return metrics


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """
    The probability that at least one of k completions is correct, estimated without bias from num_samples >= k
    completions of which num_correct are correct (arXiv 2107.03374, equation 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


# ---- rollouts → micro-batches ----


class RolloutBatch(NamedTuple):
    """A micro-batch: rollouts of similar length, padded on the right. Only the sampled tokens are trained."""

    idx_BT: torch.Tensor
    positions_N: torch.Tensor  # in the flattened B * T; the model predicts targets_N there
    targets_N: torch.Tensor  # the trained tokens
    advantages_N: torch.Tensor
    old_logprobs_N: torch.Tensor  # at the time of sampling; zeros unless they were kept
    num_targets: int  # sampled tokens of the whole step over all ranks, groups with zero advantage included


def pack_micro_batches(
    rollouts: Sequence[Rollout], device_batch_size: int, dist: Dist, keep_zero_advantage: bool = False
) -> tuple[list[RolloutBatch], int]:
    """
    Returns this rank's micro-batches, the longest rollouts first, and the number of trained tokens over all ranks.

    A rollout with zero advantage has no gradient and is left out. With a KL term it has one: keep_zero_advantage keeps
    it. The loss is divided by the same number of tokens in both cases.
    """
    num_targets = sum(sum(r.sampled) for r in rollouts)
    used = [r for r in rollouts if r.advantage or keep_zero_advantage]
    used.sort(key=lambda r: len(r.prompt) + len(r.completion), reverse=True)
    own = used[dist.rank :: dist.world_size]
    batches = [_collate(rows, num_targets, dist.device) for rows in _split(own, device_batch_size)]
    return batches, sum(sum(r.sampled) for r in used)


def _collate(rollouts: Sequence[Rollout], num_targets: int, device: torch.device) -> RolloutBatch:
    shape = (len(rollouts), max(len(r.prompt) + len(r.completion) for r in rollouts))
    ids = torch.zeros(shape, dtype=torch.long)  # any id can be the padding, as attention is causal
    is_sampled = torch.zeros(shape, dtype=torch.bool)
    advantages, old_logprobs = torch.zeros(shape), torch.zeros(shape)
    for row, r in enumerate(rollouts):
        completion = slice(len(r.prompt), len(r.prompt) + len(r.completion))
        ids[row, : completion.stop] = torch.tensor(r.prompt + r.completion)
        is_sampled[row, completion] = torch.tensor(r.sampled)
        advantages[row] = r.advantage
        if r.logprobs:
            old_logprobs[row, completion] = torch.tensor(r.logprobs)
    # Positions and targets are in the same order, because column 0, the prompt's first token, is never sampled.
    return RolloutBatch(
        idx_BT=ids[:, :-1].to(device),
        positions_N=is_sampled[:, 1:].flatten().nonzero().squeeze(1).to(device),  # each predicts the token after it
        targets_N=ids[is_sampled].to(device),
        advantages_N=advantages[is_sampled].to(device),
        old_logprobs_N=old_logprobs[is_sampled].to(device),
        num_targets=num_targets,
    )


# ---- the loss ----


@dataclass(frozen=True)
class PolicyLoss:
    """
    The loss of a RolloutBatch: -sum(advantage * logprob) / sampled tokens of the step. The log-probabilities are those
    of the distribution that was sampled from: among the top k tokens, at the same temperature.

    clip_ratio: PPO's clipping, for several optimizer steps per batch of rollouts. The log-probability is replaced by
                ratio = probability now / probability at the time of sampling. A token with a positive advantage has no
                gradient once its ratio is above 1 + clip_ratio; with a negative one, once it is below 1 - clip_ratio.
    kl_coef:    weight of the KL divergence from `reference`, estimated per sampled token by Schulman's k3 estimator
                r - 1 - log r, where r is the reference's probability divided by the policy's. It is unbiased and never
                negative (http://joschu.net/blog/kl-approx.html). Both distributions are over the tokens that the policy
                could have sampled.
    """

    config: RolloutConfig
    clip_ratio: float = 0.0  # 0 = no ratio
    kl_coef: float = 0.0
    reference: GPT | None = None

    def __call__(self, model: GPT, batch: RolloutBatch) -> torch.Tensor:
        logits_NV = self._logits(model, batch)
        support_NS = None  # the tokens that could be sampled; None = all
        if 0 < self.config.top_k < logits_NV.size(1):
            support_NS = logits_NV.topk(self.config.top_k).indices
        logprobs_N = target_logprobs(logits_NV, batch.targets_N, support_NS)
        if self.clip_ratio:
            ratio_N = (logprobs_N - batch.old_logprobs_N).exp()
            clipped_N = ratio_N.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
            objective_N = torch.minimum(ratio_N * batch.advantages_N, clipped_N * batch.advantages_N)
        else:
            objective_N = logprobs_N * batch.advantages_N
        if self.reference is not None:
            with torch.no_grad():
                reference_logits_NV = self._logits(self.reference, batch)
                reference_N = target_logprobs(reference_logits_NV, batch.targets_N, support_NS)
            log_r_N = reference_N - logprobs_N
            objective_N = objective_N - self.kl_coef * (log_r_N.exp() - 1 - log_r_N)
        return -objective_N.sum() / batch.num_targets

    def _logits(self, model: GPT, batch: RolloutBatch) -> torch.Tensor:
        """Logits divided by the temperature, (N, V). Only the trained positions: this saves most of lm_head's work."""
        hidden_NC = model.hidden(batch.idx_BT).flatten(0, 1)[batch.positions_N]
        return model.logits(hidden_NC) / self.config.temperature


def target_logprobs(logits_NV: torch.Tensor, targets_N: torch.Tensor, support_NS: torch.Tensor | None) -> torch.Tensor:
    """
    Returns the log-probabilities (N,) of the targets among the tokens of support_NS (None: all), in nats. A target
    counts as one of these tokens even if, through rounding, it is not among the top k here: it was sampled.
    """
    target_N1 = logits_NV.gather(1, targets_N[:, None])
    if support_NS is None:
        total_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
    else:
        support_total_N1 = logits_NV.gather(1, support_NS).logsumexp(dim=1, keepdim=True)
        is_in_support_N1 = (support_NS == targets_N[:, None]).any(dim=1, keepdim=True)
        total_N1 = torch.where(is_in_support_N1, support_total_N1, torch.logaddexp(support_total_N1, target_N1))
    return (target_N1 - total_N1).squeeze(1)


# ---- the steps of the training loop ----


@dataclass(frozen=True)
class RolloutPlan:
    """How many rollouts are drawn for how many optimizer steps, and how they are packed into micro-batches."""

    num_steps: int  # optimizer steps of the run
    questions_per_batch: int  # over all ranks
    device_batch_size: int  # rollouts per micro-batch
    steps_per_batch: int = 1  # optimizer steps on each batch of rollouts
    keep_zero_advantage: bool = False  # see pack_micro_batches


def rollout_steps(
    plan: RolloutPlan,
    draw: Callable[[int, int], list[Rollout]],  # (number of the first question, optimizer step) → rollouts
    dist: Dist,
    state: dict[str, Any] | None = None,  # the first rank's data state, of a resumed run
) -> Iterator[Step]:
    """
    Yields the steps of reinforcement learning. Rollouts are drawn when the training loop asks for a step, so they are
    sampled with the newest weights. A step without a training signal has no micro-batches and no tokens. While a batch
    of rollouts has optimizer steps left, the data state contains it.
    """
    state = state or {"step": 0, "next": 0, "updates_left": 0, "rollouts": []}
    next_question = state["next"]
    steps_left = state["updates_left"]  # on the current batch of rollouts
    rollouts = [Rollout.from_state_dict(fields) for fields in state["rollouts"]]
    for step in range(state["step"] + 1, plan.num_steps + 1):
        if steps_left == 0:
            rollouts = draw(next_question, step)
            next_question += plan.questions_per_batch
            steps_left = plan.steps_per_batch
        steps_left -= 1
        micro_batches, num_tokens = pack_micro_batches(rollouts, plan.device_batch_size, dist, plan.keep_zero_advantage)
        data_state = {"step": step, "next": next_question, "updates_left": steps_left, "rollouts": []}
        if steps_left and dist.is_main:
            data_state["rollouts"] = [rollout.state_dict() for rollout in rollouts]
        # Every question has a group of equal size.
        metrics = summarize(rollouts, num_samples=len(rollouts) // plan.questions_per_batch)
        progress = (step - 1) / plan.num_steps
        yield Step(micro_batches, progress, num_tokens, data_state, f"questions up to {next_question}", metrics)
