"""
Reinforcement learning: rewards and advantages, micro-batches, the loss against a slow reference and against the
engine's log-probabilities, steps that resume, and a model that learns from rewards alone.

    python -m pytest tests/test_rollout.py
"""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from factories import GOLDEN_VOCAB_SIZE, tiny_gpt, tiny_optimizer

from nanochat import rollout
from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.muon import build_optimizer
from nanochat.recipe import param_groups, rl_schedule
from nanochat.request import Completion
from nanochat.rollout import PolicyLoss, Question, Rollout, RolloutBatch, RolloutConfig, RolloutPlan
from nanochat.train import Trainer, TrainState

CPU = Dist(torch.device("cpu"))
SAMPLING = RolloutConfig(num_samples=4, max_tokens=12, top_k=7)


@pytest.fixture(scope="module")
def model():
    return tiny_gpt()


def make_rollout(tokens=(5, 6), reward=0.0, advantage=0.0, *, prompt=(1, 2, 3), sampled=None, finish="length"):
    sampled = [True] * len(tokens) if sampled is None else list(sampled)
    return Rollout(list(prompt), list(tokens), sampled, [], reward, advantage, finish)


def make_questions(tokenizer, count=3):
    """Questions of several lengths. The reward has many values: the share of the letter e in the completion."""
    texts = ["Say e." * (i + 1) for i in range(count)]
    return [
        Question([tokenizer.bos, *tokenizer.encode(text)], lambda text: text.count("e") / (len(text) + 1))
        for text in texts
    ]


# ---- completions, rewards, advantages ----


def test_grade_group_advantages_are_rewards_minus_group_mean(golden_tokenizer):
    end = golden_tokenizer.special("<|assistant_end|>")
    completions = [
        Completion(golden_tokenizer.encode("yes"), [True] * len(golden_tokenizer.encode("yes")), [], "stop", end),
        Completion(golden_tokenizer.encode("no"), [False] * len(golden_tokenizer.encode("no")), [], "length"),
        Completion([], [], [], "stop", end),
    ]
    question = Question([1], lambda text: {"yes": 1.0, "no": 0.2, "": 0.0}[text])
    group = rollout.grade_group(question, completions, golden_tokenizer)
    assert [r.reward for r in group] == [1.0, 0.2, 0.0]
    assert [r.advantage for r in group] == pytest.approx([0.6, -0.2, -0.4])
    assert group[0].completion == [*completions[0].tokens, end] and group[0].sampled[-1]  # the end token is trained
    assert group[1].completion == completions[1].tokens and not any(group[1].sampled)  # tool output is not
    assert group[2].completion == [end]

    same = rollout.grade_group(Question([1], lambda text: 0.1), completions, golden_tokenizer)  # 0.1 is not exact
    assert [r.advantage for r in same] == [0.0] * 3


def test_summarize_mean_reward_length_signal_and_cut_off():
    rollouts = [
        make_rollout((5, 6), 1.0, 0.5, finish="stop"),
        make_rollout((5,), 0.0, -0.5),
        make_rollout((5, 6, 7), 1.0),
        make_rollout((5, 6, 7), 1.0),
    ]
    assert rollout.summarize(rollouts, 2) == {"rl/reward": 0.75, "rl/length": 2.25, "rl/signal": 0.5, "rl/cut": 0.75}


def test_evaluate_pass_at_k_powers_of_two_are_means_over_questions(golden_tokenizer, model):
    number = itertools.count()
    questions = [Question([1], lambda text: float(next(number) % 2 == 0)), Question([2], lambda text: 0.0)]
    scores = rollout.evaluate_pass_at_k(
        Engine(model, golden_tokenizer), questions, replace(SAMPLING, num_samples=5), CPU
    )
    assert scores == pytest.approx({"eval/pass@1": 0.6 / 2, "eval/pass@2": 0.9 / 2, "eval/pass@4": 1 / 2})


class Talk:
    """A task with the methods of tasks.common.Task."""

    texts = ("hi", "hello " * 20, "yo")

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"messages": [{"role": "user", "content": self.texts[index]}], "text": self.texts[index]}

    def reward(self, conversation, completion):
        return float(completion == conversation["text"])


def test_load_questions_long_prompts_are_skipped_and_counted(golden_tokenizer):
    questions, too_long = rollout.load_questions(Talk(), golden_tokenizer, 12)
    assert too_long == 1
    assert [question.reward_fn("hi") for question in questions] == [1.0, 0.0]
    first, too_long = rollout.load_questions(Talk(), golden_tokenizer, 12, limit=1)
    assert [question.prompt for question in first] == [questions[0].prompt] and too_long == 0
    with pytest.raises(UserError, match="no question fits: the shortest has .*--max-new-tokens"):
        rollout.load_questions(Talk(), golden_tokenizer, 2)


class OneOf(Dist):
    """One of several ranks that run one after the other: gather returns the values of those that have run."""

    def gather(self, value):
        others = self.gathered[self.world_size] = self.gathered.get(self.world_size, {}) | {self.rank: value}
        return [others.get(rank) for rank in range(self.world_size)]

    gathered: dict = {}  # noqa: RUF012


def test_sample_rollouts_any_ranks_and_rows_same_completions(golden_tokenizer, model):
    questions, numbers = make_questions(golden_tokenizer), range(7, 10)
    expected = rollout.sample_rollouts(Engine(model, golden_tokenizer), questions, numbers, SAMPLING, CPU)
    assert len(expected) == 12 and len({tuple(r.completion) for r in expected}) > 3
    assert [r.prompt for r in expected] == [q.prompt for q in questions for _ in range(4)]
    few_rows = rollout.sample_rollouts(Engine(model, golden_tokenizer, max_slots=3), questions, numbers, SAMPLING, CPU)
    assert few_rows == expected
    for rank in (1, 2, 3, 0):  # of four, for three questions; the first one runs last, with the others' rollouts
        dist = OneOf(CPU.device, rank, 4)
        if rank:
            with pytest.raises(TypeError):  # the first rank's rollouts are missing
                rollout.sample_rollouts(Engine(model, golden_tokenizer), questions, numbers, SAMPLING, dist)
        else:
            assert (
                rollout.sample_rollouts(Engine(model, golden_tokenizer), questions, numbers, SAMPLING, dist) == expected
            )
    others = rollout.sample_rollouts(Engine(model, golden_tokenizer), questions, range(8, 11), SAMPLING, CPU)
    assert all(a.completion != b.completion for a, b in zip(others[::4], expected[::4], strict=True))


# ---- micro-batches ----


def some_rollouts(count=11, seed=0):
    """Prompts and completions of several lengths, some tokens forced, some rollouts with zero advantage."""
    random = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=random))

    rollouts = []
    for i in range(count):
        tokens = [draw(0, GOLDEN_VOCAB_SIZE) for _ in range(draw(1, 9))]
        sampled = [draw(0, 4) > 0 for _ in tokens]
        prompt = [draw(0, GOLDEN_VOCAB_SIZE) for _ in range(draw(1, 9))]
        advantage = (0.0, 0.5, -1.25)[i % 3]
        rollouts.append(make_rollout(tokens, 0.0, advantage, prompt=prompt, sampled=sampled))
    return rollouts


def test_pack_micro_batches_only_sampled_tokens_are_targets():
    rollouts = some_rollouts()
    batches, num_tokens = rollout.pack_micro_batches(rollouts, 3, CPU)
    used = [r for r in rollouts if r.advantage]
    assert num_tokens == sum(sum(r.sampled) for r in used)
    assert [len(batch.idx_BT) for batch in batches] == [3, 3, 1]
    lengths = [batch.idx_BT.size(1) for batch in batches]
    assert lengths == sorted(lengths, reverse=True)  # padded to the longest rollout only
    assert lengths[0] == max(len(r.prompt) + len(r.completion) for r in used) - 1
    seen = []
    for batch in batches:
        assert batch.num_targets == sum(sum(r.sampled) for r in rollouts)  # of all groups
        width = batch.idx_BT.size(1)
        for position, target, advantage in zip(batch.positions_N, batch.targets_N, batch.advantages_N, strict=True):
            row, column = divmod(int(position), width)
            seen.append((batch.idx_BT[row, : column + 1].tolist(), int(target), float(advantage)))
    expected = [
        ([*r.prompt, *r.completion[:i]], r.completion[i], r.advantage)
        for r in used
        for i in range(len(r.completion))
        if r.sampled[i]
    ]
    assert sorted(seen) == sorted(expected)


def test_pack_micro_batches_ranks_share_the_rollouts():
    rollouts = some_rollouts()
    shares = [rollout.pack_micro_batches(rollouts, 2, Dist(CPU.device, rank, 3)) for rank in range(3)]
    rows = [sum(len(batch.idx_BT) for batch in batches) for batches, _ in shares]
    assert rows == [3, 2, 2] and len({num_tokens for _, num_tokens in shares}) == 1
    assert rollout.pack_micro_batches(rollouts[:2], 2, Dist(CPU.device, 1, 2))[0] == []  # fewer than ranks


def test_pack_micro_batches_zero_advantage_is_left_out_unless_kept():
    rollouts = [make_rollout()] * 4
    assert rollout.pack_micro_batches(rollouts, 4, CPU) == ([], 0)
    batches, num_tokens = rollout.pack_micro_batches(rollouts, 4, CPU, keep_zero_advantage=True)
    assert len(batches) == 1 and num_tokens == 8


# ---- the loss ----


def naive_logprob(model, ids, token, sampling):
    """Log-probability of one token after others, from a softmax over the tokens that could be sampled."""
    logits = model(torch.tensor([ids]))[0, -1] / sampling.temperature
    allowed = (
        logits >= logits.topk(sampling.top_k).values[-1]
        if sampling.top_k
        else torch.ones_like(logits, dtype=torch.bool)
    )
    allowed = allowed | (torch.arange(len(logits)) == token)
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(0)[token]


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("top_k, temperature", [(0, 1.0), (7, 0.7)])
def test_policy_loss_any_micro_batches_and_ranks_equals_naive_loss(top_k, temperature):
    sampling, rollouts = RolloutConfig(top_k=top_k, temperature=temperature), some_rollouts()
    total = sum(sum(r.sampled) for r in rollouts)

    model = tiny_gpt()
    naive = -sum(
        r.advantage * naive_logprob(model, [*r.prompt, *r.completion[:i]], r.completion[i], sampling) / total
        for r in rollouts
        for i in range(len(r.completion))
        if r.sampled[i]
    )
    naive.backward()
    expected = grads(model)

    for ranks, rows in ((1, 11), (1, 2), (3, 2)):
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for rank in range(ranks):
            for batch in rollout.pack_micro_batches(rollouts, rows, Dist(CPU.device, rank, ranks))[0]:
                part = PolicyLoss(sampling)(model, batch)
                part.backward()
                loss += part.item()
        assert loss == pytest.approx(naive.item(), abs=1e-5)
        for name, grad in grads(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("top_k, temperature", [(0, 1.0), (7, 0.7)])
def test_target_logprobs_unchanged_weights_equal_the_engines(golden_tokenizer, model, top_k, temperature):
    sampling = replace(SAMPLING, top_k=top_k, temperature=temperature, logprobs=True)
    rollouts = rollout.sample_rollouts(
        Engine(model, golden_tokenizer), make_questions(golden_tokenizer), range(3), sampling, CPU
    )
    for batch in rollout.pack_micro_batches(rollouts, 4, CPU, keep_zero_advantage=True)[0]:
        logits = model.logits(model.hidden(batch.idx_BT).flatten(0, 1)[batch.positions_N]) / temperature
        support = logits.topk(top_k).indices if top_k else None
        ours = rollout.target_logprobs(logits, batch.targets_N, support)
        assert batch.old_logprobs_N.min() < -0.1
        torch.testing.assert_close(ours, batch.old_logprobs_N, rtol=0, atol=1e-4)


def test_target_logprobs_target_outside_support_joins_it():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    ours = rollout.target_logprobs(logits, torch.tensor([2]), support_NS=torch.tensor([[0, 1]]))
    assert ours.item() == pytest.approx(logits[0, :3].log_softmax(0)[2].item())


def batch_of(targets, advantages, old_logprobs):
    """One row; every target follows the same three tokens."""
    positions = torch.full((len(targets),), 2)
    numbers = torch.tensor([advantages, old_logprobs])
    return RolloutBatch(torch.tensor([[1, 2, 3]]), positions, torch.tensor(targets), *numbers, num_targets=1)


def test_policy_loss_clipped_ratio_has_no_gradient_beyond_the_clip(model):
    sampling = RolloutConfig(top_k=0)
    logprob = float(naive_logprob(model, [1, 2, 3], 5, sampling).detach())

    def loss_and_gradient(advantage, ratio):
        model.zero_grad()
        loss = PolicyLoss(sampling, clip_ratio=0.2)(model, batch_of([5], [advantage], [logprob - math.log(ratio)]))
        loss.backward()
        return float(loss.detach()), model.lm_head.weight.grad.norm().item()

    model.zero_grad()
    PolicyLoss(sampling)(model, batch_of([5], [1.0], [0.0])).backward()
    plain = model.lm_head.weight.grad.norm().item()
    assert loss_and_gradient(1.0, 1.0) == pytest.approx((-1.0, plain), rel=1e-4)
    assert loss_and_gradient(1.0, 1.1) == pytest.approx((-1.1, 1.1 * plain), rel=1e-4)
    assert loss_and_gradient(1.0, 1.5) == pytest.approx((-1.2, 0.0))
    assert loss_and_gradient(1.0, 0.5) == pytest.approx((-0.5, 0.5 * plain), rel=1e-4)  # towards 1: kept
    assert loss_and_gradient(-1.0, 0.5) == pytest.approx((0.8, 0.0))
    assert loss_and_gradient(-1.0, 1.5) == pytest.approx((1.5, 1.5 * plain), rel=1e-4)


def test_policy_loss_kl_term_is_the_divergence_on_average(model):
    reference, sampling = tiny_gpt(seed=1), RolloutConfig(top_k=5)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))[0, -1]
        support = logits.topk(5).indices
        p = logits[support].log_softmax(0)
        q = reference(torch.tensor([[1, 2, 3]]))[0, -1][support].log_softmax(0)
        losses = [
            PolicyLoss(sampling, kl_coef=0.5, reference=reference)(model, batch_of([token], [0.0], [0.0]))
            for token in support.tolist()
        ]
    assert min(losses) >= 0
    assert torch.dot(p.exp(), torch.stack(losses)).item() == pytest.approx(
        0.5 * torch.dot(p.exp(), p - q).item(), rel=1e-4
    )
    loss = PolicyLoss(sampling, kl_coef=0.5, reference=model)(model, batch_of([int(support[0])], [0.0], [0.0]))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


# ---- steps ----


def drawn(first, step):
    """Rollouts whose tokens are the numbers of question and step; every third batch has no training signal."""
    advantage = 0.0 if first % 6 == 4 else 0.5
    return [make_rollout((first, step), 1.0, advantage), make_rollout((first + 1, step), 0.0, -advantage)]


def rl_steps(num_steps, state=None, updates=1, draw=drawn):
    plan = RolloutPlan(num_steps, questions_per_batch=2, device_batch_size=2, steps_per_batch=updates)
    return rollout.rollout_steps(plan, draw, CPU, state)


def test_rollout_steps_draw_only_when_a_step_needs_rollouts():
    calls = []

    def draw(first, step):
        calls.append((first, step))
        return drawn(first, step)

    data = rl_steps(5, updates=2, draw=draw)
    expected = [[(0, 1)], [(0, 1)], [(0, 1), (2, 3)], [(0, 1), (2, 3)], [(0, 1), (2, 3), (4, 5)]]
    for i, so_far in enumerate(expected):
        step = next(data)
        assert calls == so_far and step.progress == i / 5
    assert next(data, None) is None


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_rollout_steps_resumed_after_any_step_continue_identically(updates):
    def contents(step):
        tokens = [batch.targets_N.tolist() for batch in step.micro_batches]
        return tokens, step.progress, step.num_tokens, step.data_state, step.metrics

    whole = list(rl_steps(9, updates=updates))
    assert [step.num_tokens == 0 for step in whole] == [i // updates % 3 == 2 for i in range(9)]
    assert all(bool(step.micro_batches) == bool(step.num_tokens) for step in whole)
    for i, step in enumerate(whole):
        state = json.loads(json.dumps(step.data_state))
        assert [contents(s) for s in rl_steps(9, state, updates)] == [contents(s) for s in whole[i + 1 :]]


def test_rollout_steps_state_of_earlier_version_loads():
    """The keys of the data state in checkpoints that exist."""
    fields = {"prompt": [1], "answer": [2, 3], "sampled": [True, True], "logprobs": [], "reward": 1.0}
    rollouts = [fields | {"advantage": advantage, "finish": "stop"} for advantage in (0.5, -0.5)]
    state = {"step": 1, "next": 2, "updates_left": 1, "rollouts": rollouts}
    step = next(rl_steps(4, state, updates=3))
    assert step.num_tokens == 4 and step.metrics["rl/length"] == 2
    assert step.data_state == {"step": 2, "next": 2, "updates_left": 0, "rollouts": []}
    assert Rollout.from_state_dict(rollouts[0]).state_dict() == rollouts[0]


@pytest.mark.slow
@pytest.mark.parametrize("scale_loss", [False, True])
def test_train_step_without_signal_counts_but_changes_no_weight(scale_loss):
    model = tiny_gpt()
    optimizer = tiny_optimizer(model)
    seen, logged = [], []

    def data():
        for step in rl_steps(3):  # the third has no training signal
            yield step
            seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    state = TrainState(loss_scale=256.0)
    log = lambda state, metrics: logged.append(metrics)  # noqa: E731
    trainer = Trainer(model, optimizer, state, CPU, log=log, scales_loss=scale_loss)
    trainer.fit(data(), PolicyLoss(RolloutConfig(top_k=0)), rl_schedule, [])
    assert state.step == 3 and not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert [line["rl/signal"] for line in logged] == [1.0, 1.0, 0.0]
    assert torch.isfinite(seen[2]).all()


@pytest.mark.slow
def test_train_rewarded_letter_becomes_more_frequent(golden_tokenizer):
    """A random model learns to write the letter e from rewards alone."""
    model = tiny_gpt()
    groups = [replace(group, lr=0.0 if group.skips_first_step else 0.01) for group in param_groups(model.config)]
    optimizer = build_optimizer(model, groups)
    engine = Engine(model, golden_tokenizer)
    questions = make_questions(golden_tokenizer)
    sampling = RolloutConfig(num_samples=16, max_tokens=6, top_k=0)

    def draw(first, step):
        engine.refresh_weights()
        return rollout.sample_rollouts(engine, questions, range(first, first + 3), sampling, CPU)

    plan = RolloutPlan(num_steps=25, questions_per_batch=3, device_batch_size=16)
    steps = rollout.rollout_steps(plan, draw, CPU)
    rewards = []
    trainer = Trainer(
        model, optimizer, TrainState(), CPU, log=lambda state, metrics: rewards.append(metrics["rl/reward"])
    )
    trainer.fit(steps, PolicyLoss(sampling), rl_schedule, [])
    assert rewards[-1] > 3 * rewards[0]
