"""
Reinforcement learning: rewards and advantages, micro-batches, the loss against a slow reference and under the engine's
own log-probabilities, steps that resume, and that it learns.

    python -m pytest tests/test_rollout.py
"""

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from nanochat import rollout
from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.engine import Completion, Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import LearningRates, build_optimizer
from nanochat.recipe import rl_schedule
from nanochat.rollout import PolicyLoss, Question, Rollout, RolloutBatch, Sampling
from nanochat.train import TrainState, train

CPU = Dist(torch.device("cpu"))
V, CONTEXT = 1024, 64  # of the golden tokenizer; tokens
SAMPLING = Sampling(num_samples=4, max_tokens=12, top_k=7)


def make(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(CONTEXT, V, 2, n_head=2, n_kv_head=1, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def answer(tokens=(5, 6), reward=0.0, advantage=0.0, prompt=(1, 2, 3), sampled=None, finish="length"):
    sampled = [True] * len(tokens) if sampled is None else list(sampled)
    return Rollout(list(prompt), list(tokens), sampled, [], reward, advantage, finish)


def questions(tokenizer, count=3):
    """Of several lengths. The reward has many values: the share of lower-case e in what is said."""
    texts = ["Say e." * (i + 1) for i in range(count)]
    return [
        Question([tokenizer.bos, *tokenizer.encode(text)], lambda said: said.count("e") / (len(said) + 1))
        for text in texts
    ]


# ---- answers, rewards, advantages ----


def test_advantages_are_rewards_less_the_mean_of_the_group(golden_tokenizer, model):
    engine = Engine(model, golden_tokenizer)
    end = golden_tokenizer.special("<|assistant_end|>")
    said = [
        Completion(golden_tokenizer.encode("yes"), [True] * len(golden_tokenizer.encode("yes")), [], "stop", end),
        Completion(golden_tokenizer.encode("no"), [False] * len(golden_tokenizer.encode("no")), [], "length"),
        Completion([], [], [], "stop", end),
    ]
    group = rollout.group(Question([1], lambda text: {"yes": 1.0, "no": 0.2, "": 0.0}[text]), said, engine)
    assert [r.reward for r in group] == [1.0, 0.2, 0.0]
    assert [r.advantage for r in group] == pytest.approx([0.6, -0.2, -0.4])
    assert group[0].answer == [*said[0].tokens, end] and group[0].sampled[-1]  # when to stop is learned
    assert group[1].answer == said[1].tokens and not any(group[1].sampled)  # a tool's words are not
    assert group[2].answer == [end]

    same = rollout.group(Question([1], lambda text: 0.1), said, engine)  # three times 0.1 are not 0.3 in binary
    assert [r.advantage for r in same] == [0.0] * 3


def test_what_to_log():
    rollouts = [answer((5, 6), 1.0, 0.5, finish="stop"), answer((5,), 0.0, -0.5), *[answer((5, 6, 7), 1.0)] * 2]
    assert rollout.summarize(rollouts, 2) == {"rl/reward": 0.75, "rl/length": 2.25, "rl/signal": 0.5, "rl/cut": 0.75}


def test_evaluate(golden_tokenizer, model):
    number = itertools.count()
    asked = [Question([1], lambda said: float(next(number) % 2 == 0)), Question([2], lambda said: 0.0)]
    scores = rollout.evaluate(Engine(model, golden_tokenizer), asked, replace(SAMPLING, num_samples=5), CPU)
    assert scores == pytest.approx({"eval/pass@1": 0.6 / 2, "eval/pass@2": 0.9 / 2, "eval/pass@4": 1 / 2})


class Talk:
    """A task as tasks/common.py has them."""

    texts = ("hi", "hello " * 20, "yo")

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"messages": [{"role": "user", "content": self.texts[index]}], "text": self.texts[index]}

    def reward(self, conversation, said):
        return float(said == conversation["text"])


def test_questions_that_leave_no_room_are_counted(golden_tokenizer):
    asked, too_long = rollout.questions_of(Talk(), golden_tokenizer, 12)
    assert too_long == 1
    assert [question.judge(said) for question, said in zip(asked, ("hi", "hi"), strict=True)] == [1.0, 0.0]
    first, too_long = rollout.questions_of(Talk(), golden_tokenizer, 12, at_most=1)
    assert [question.prompt for question in first] == [asked[0].prompt] and too_long == 0
    with pytest.raises(UserError, match="no question fits: the shortest has .*--max-new-tokens"):
        rollout.questions_of(Talk(), golden_tokenizer, 2)


class OneOf(Dist):
    """One of several ranks, run one after the other: what the others gather is known."""

    def gather(self, value):
        others = self.gathered[self.world_size] = self.gathered.get(self.world_size, {}) | {self.rank: value}
        return [others.get(rank) for rank in range(self.world_size)]

    gathered: dict = {}  # noqa: RUF012


def test_answers_depend_neither_on_ranks_nor_on_rows(golden_tokenizer, model):
    asked, numbers = questions(golden_tokenizer), range(7, 10)
    expected = rollout.sample(Engine(model, golden_tokenizer), asked, numbers, SAMPLING, CPU)
    assert len(expected) == 12 and len({tuple(r.answer) for r in expected}) > 3
    assert [r.prompt for r in expected] == [q.prompt for q in asked for _ in range(4)]
    few_rows = rollout.sample(Engine(model, golden_tokenizer, num_rows=3), asked, numbers, SAMPLING, CPU)
    assert few_rows == expected
    for rank in (1, 2, 3, 0):  # of four, for three questions; the first then has what the others said
        dist = OneOf(CPU.device, rank, 4)
        if rank:
            with pytest.raises(TypeError):  # it cannot know the first one's
                rollout.sample(Engine(model, golden_tokenizer), asked, numbers, SAMPLING, dist)
        else:
            assert rollout.sample(Engine(model, golden_tokenizer), asked, numbers, SAMPLING, dist) == expected
    others = rollout.sample(Engine(model, golden_tokenizer), asked, range(8, 11), SAMPLING, CPU)
    assert all(a.answer != b.answer for a, b in zip(others[::4], expected[::4], strict=True))


# ---- micro-batches ----


def some_rollouts(count=11, seed=0):
    """Prompts and answers of several lengths, some tokens forced, some without advantage."""
    random = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=random))

    rollouts = []
    for i in range(count):
        tokens = [draw(0, V) for _ in range(draw(1, 9))]
        sampled = [draw(0, 4) > 0 for _ in tokens]
        prompt = [draw(0, V) for _ in range(draw(1, 9))]
        rollouts.append(answer(tokens, 0.0, (0.0, 0.5, -1.25)[i % 3], prompt, sampled))
    return rollouts


def test_a_micro_batch_trains_the_sampled_tokens_and_nothing_else():
    rollouts = some_rollouts()
    batches, num_tokens = rollout.pack(rollouts, 3, CPU)
    used = [r for r in rollouts if r.advantage]
    assert num_tokens == sum(sum(r.sampled) for r in used)
    assert [len(batch.idx_BT) for batch in batches] == [3, 3, 1]
    lengths = [batch.idx_BT.size(1) for batch in batches]
    assert lengths == sorted(lengths, reverse=True)  # and none is longer than its longest
    assert lengths[0] == max(len(r.prompt) + len(r.answer) for r in used) - 1
    seen = []
    for batch in batches:
        assert batch.num_targets == sum(sum(r.sampled) for r in rollouts)  # of all groups
        width = batch.idx_BT.size(1)
        for place, target, advantage in zip(batch.trained_N, batch.targets_N, batch.advantages_N, strict=True):
            row, column = divmod(int(place), width)
            seen.append((batch.idx_BT[row, : column + 1].tolist(), int(target), float(advantage)))
    expected = [
        ([*r.prompt, *r.answer[:i]], r.answer[i], r.advantage)
        for r in used
        for i in range(len(r.answer))
        if r.sampled[i]
    ]
    assert sorted(seen) == sorted(expected)


def test_ranks_share_the_rollouts():
    rollouts = some_rollouts()
    shares = [rollout.pack(rollouts, 2, Dist(CPU.device, rank, 3)) for rank in range(3)]
    rows = [sum(len(batch.idx_BT) for batch in batches) for batches, _ in shares]
    assert rows == [3, 2, 2] and len({num_tokens for _, num_tokens in shares}) == 1
    assert rollout.pack(rollouts[:2], 2, Dist(CPU.device, 1, 2))[0] == []  # fewer than ranks


def test_without_advantage_there_is_nothing_to_train_unless_asked_for():
    rollouts = [answer()] * 4
    assert rollout.pack(rollouts, 4, CPU) == ([], 0)
    batches, num_tokens = rollout.pack(rollouts, 4, CPU, with_all=True)
    assert len(batches) == 1 and num_tokens == 8


# ---- the loss ----


def naive_logprob(model, ids, token, sampling):
    """Of one token after others, from a full softmax over what could be sampled."""
    logits = model(torch.tensor([ids]))[0, -1] / sampling.temperature
    allowed = logits >= logits.topk(sampling.top_k).values[-1] if sampling.top_k else torch.ones(V, dtype=torch.bool)
    allowed = allowed | (torch.arange(V) == token)
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(0)[token]


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("top_k, temperature", [(0, 1.0), (7, 0.7)])
def test_the_loss_is_the_naive_one(top_k, temperature):
    sampling, rollouts = Sampling(top_k=top_k, temperature=temperature), some_rollouts()
    total = sum(sum(r.sampled) for r in rollouts)

    model = make()
    naive = -sum(
        r.advantage * naive_logprob(model, [*r.prompt, *r.answer[:i]], r.answer[i], sampling) / total
        for r in rollouts
        for i in range(len(r.answer))
        if r.sampled[i]
    )
    naive.backward()
    expected = grads(model)

    for ranks, rows in ((1, 11), (1, 2), (3, 2)):
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for rank in range(ranks):
            for batch in rollout.pack(rollouts, rows, Dist(CPU.device, rank, ranks))[0]:
                part = PolicyLoss(sampling)(model, batch)
                part.backward()
                loss += part.item()
        assert loss == pytest.approx(naive.item(), abs=1e-5)
        for name, grad in grads(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("top_k, temperature", [(0, 1.0), (7, 0.7)])
def test_log_probabilities_are_those_of_the_moment_of_sampling(golden_tokenizer, model, top_k, temperature):
    sampling = replace(SAMPLING, top_k=top_k, temperature=temperature, logprobs=True)
    rollouts = rollout.sample(Engine(model, golden_tokenizer), questions(golden_tokenizer), range(3), sampling, CPU)
    for batch in rollout.pack(rollouts, 4, CPU, with_all=True)[0]:
        logits = model.logits(model.hidden(batch.idx_BT).flatten(0, 1)[batch.trained_N]) / temperature
        support = logits.topk(top_k).indices if top_k else None
        ours = rollout.logprobs(logits, batch.targets_N, support)
        assert batch.old_logprobs_N.min() < -0.1
        torch.testing.assert_close(ours, batch.old_logprobs_N, rtol=0, atol=1e-4)


def test_a_token_that_a_tie_left_out_counts_among_those_that_could_be_sampled():
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    ours = rollout.logprobs(logits, torch.tensor([2]), support_NS=torch.tensor([[0, 1]]))
    assert ours.item() == pytest.approx(logits[0, :3].log_softmax(0)[2].item())


def batch_of(targets, advantages, old_logprobs):
    """One row; every target after the same three tokens."""
    places = torch.full((len(targets),), 2)
    numbers = torch.tensor([advantages, old_logprobs])
    return RolloutBatch(torch.tensor([[1, 2, 3]]), places, torch.tensor(targets), *numbers, num_targets=1)


def test_the_clipped_ratio_stops_where_it_has_gone_far_enough(model):
    sampling = Sampling(top_k=0)
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
    assert loss_and_gradient(1.0, 0.5) == pytest.approx((-0.5, 0.5 * plain), rel=1e-4)  # the way back stays open
    assert loss_and_gradient(-1.0, 0.5) == pytest.approx((0.8, 0.0))
    assert loss_and_gradient(-1.0, 1.5) == pytest.approx((1.5, 1.5 * plain), rel=1e-4)


def test_the_kl_term_is_the_divergence_on_average(model):
    reference, sampling = make(seed=1), Sampling(top_k=5)
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
    """Rollouts that tell which questions and which step they are for; every third batch has no signal."""
    advantage = 0.0 if first % 6 == 4 else 0.5
    return [answer((first, step), 1.0, advantage), answer((first + 1, step), 0.0, -advantage)]


def rl_steps(num_steps, state=None, updates=1, draw=drawn):
    return rollout.rollout_steps(
        draw, partial(rollout.pack, device_batch_size=2, dist=CPU), 2, updates, num_steps, CPU, state
    )


def test_rollouts_are_drawn_when_they_are_needed():
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
def test_steps_go_on_after_any_of_them(updates):
    def shown(step):
        tokens = [batch.targets_N.tolist() for batch in step.micro_batches]
        return tokens, step.progress, step.num_tokens, step.data_state, step.metrics

    whole = list(rl_steps(9, updates=updates))
    assert [step.num_tokens == 0 for step in whole] == [i // updates % 3 == 2 for i in range(9)]
    assert all(bool(step.micro_batches) == bool(step.num_tokens) for step in whole)
    for i, step in enumerate(whole):
        state = json.loads(json.dumps(step.data_state))
        assert [shown(s) for s in rl_steps(9, state, updates)] == [shown(s) for s in whole[i + 1 :]]


@pytest.mark.parametrize("scale_loss", [False, True])
def test_a_step_without_signal_counts_and_moves_nothing(model, scale_loss):
    model = make()
    optimizer = build_optimizer(model, LearningRates())
    seen, logged = [], []

    def data():
        for step in rl_steps(3):  # the third has no signal
            yield step
            seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    state = TrainState(loss_scale=256.0)
    train(
        model, optimizer, data(), PolicyLoss(Sampling(top_k=0)), rl_schedule, [],
        lambda state, metrics: logged.append(metrics), state, CPU, scale_loss,
    )  # fmt: skip
    assert state.step == 3 and not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert [line["rl/signal"] for line in logged] == [1.0, 1.0, 0.0]
    assert torch.isfinite(seen[2]).all()


def test_it_learns_what_is_rewarded(golden_tokenizer):
    """Of a model that has learned nothing: to say the letter e, from rewards alone."""
    model = make()
    optimizer = build_optimizer(model, LearningRates(0.01, 0.01, 0.01, 0.01, 0.0, 0.0))
    engine = Engine(model, golden_tokenizer)
    asked = questions(golden_tokenizer)
    sampling = Sampling(num_samples=16, max_tokens=6, top_k=0)

    def draw(first, step):
        engine.refresh_weights()
        return rollout.sample(engine, asked, range(first, first + 3), sampling, CPU)

    pack = partial(rollout.pack, device_batch_size=16, dist=CPU)
    rewards = []
    train(
        model, optimizer, rollout.rollout_steps(draw, pack, 3, 1, 25, CPU), PolicyLoss(sampling), rl_schedule, [],
        lambda state, metrics: rewards.append(metrics["rl/reward"]), TrainState(), CPU,
    )  # fmt: skip
    assert rewards[-1] > 3 * rewards[0]
