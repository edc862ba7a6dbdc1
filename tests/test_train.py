"""
The training loop: exact resume, hooks, signals, losses that are not finite, float16 loss scaling; one loop for
pretraining, SFT and RL.

    python -m pytest tests/test_train.py
"""

import copy
import math
import os
import signal
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_gpt, tiny_optimizer

from nanochat import train
from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import StepSchedule, adamw_update, build_optimizer
from nanochat.recipe import param_groups
from nanochat.train import Hook, Step, Stopped, Trainer, TrainState, token_loss

V, B, T = 50, 4, 8  # vocabulary, rows, tokens per row
CPU = Dist(torch.device("cpu"))


def make(seed=0):
    torch.manual_seed(seed)
    model = GPT.create(GPTConfig(T, V, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    return model, build_optimizer(model, param_groups(model.config))


def steps(num_steps, start=0):
    """Deterministic data: step i always holds the same tokens, wherever the run started."""
    for i in range(start, num_steps):
        ids_BT = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(i))
        batch = (ids_BT[:, :-1], ids_BT[:, 1:], B * T)
        yield Step([batch], i / num_steps, B * T, {"next": i + 1}, f"rows {i}")


def decay(step, progress):
    return StepSchedule(1 - progress, 0.9)


def run(model, optimizer, data, state=None, loss_fn=token_loss, hooks=(), log=lambda state, metrics: None, **options):
    trainer = Trainer(model, optimizer, state or TrainState(), CPU, log=log, **options)
    return trainer.fit(data, loss_fn, decay, list(hooks))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def restored(saved):
    model, optimizer = make(seed=1)
    model.load_state_dict(saved[0])
    optimizer.load_full_state(saved[1])
    return model, optimizer, TrainState(**saved[2], data_state=saved[3])


def snapshot(model, optimizer, state):
    return copy.deepcopy((model.state_dict(), optimizer.full_state(), state.to_dict(), state.data_state))


@pytest.mark.parametrize("after", [1, 7])
def test_resumed_run_is_bitwise_equal_to_uninterrupted_run(after):
    losses = {"whole": [], "again": []}
    model, optimizer = make()
    run(model, optimizer, steps(12), log=lambda state, m: losses["whole"].append(m["train/loss"]))

    half, half_optimizer = make()
    state = run(half, half_optimizer, list(steps(12))[:after])
    again, again_optimizer, state = restored(snapshot(half, half_optimizer, state))
    rest = steps(12, start=state.data_state["next"])
    state = run(again, again_optimizer, rest, state, log=lambda state, m: losses["again"].append(m["train/loss"]))

    assert state.step == 12
    assert torch.equal(weights(model), weights(again))
    assert losses["again"] == losses["whole"][after:]


def test_resumed_run_counts_tokens_and_time_of_the_whole_run():
    logged = []
    model, optimizer = make()
    state = run(model, optimizer, list(steps(4))[:2])
    assert state.total_tokens == 2 * B * T and state.elapsed > 0
    model, optimizer, state = restored(snapshot(model, optimizer, replace(state, elapsed=1000.0)))
    run(model, optimizer, steps(4, start=2), state, log=lambda s, _: logged.append((s.total_tokens, s.elapsed)))
    assert [tokens for tokens, _ in logged] == [3 * B * T, 4 * B * T]
    assert 1000 < logged[0][1] < logged[1][1] < 2000


def test_micro_batches_sum_to_the_full_batch():
    (step,) = steps(1)
    ((x, y, num_targets),) = step.micro_batches
    halves = replace(step, micro_batches=[(x[:3], y[:3], num_targets), (x[3:], y[3:], num_targets)])
    grads = []
    for data in (step, halves):
        model, optimizer = make()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        torch.manual_seed(5)
        model.load_state_dict({name: torch.randn_like(p) * 0.1 for name, p in model.state_dict().items()})
        seen = {}
        optimizer.step = lambda model=model, seen=seen: seen.update(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
        run(model, optimizer, [data])
        grads.append(seen)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-7)


def test_gradients_do_not_leak_into_the_next_step():
    model, optimizer = make()
    run(model, optimizer, steps(1))
    assert all(p.grad is None for p in model.parameters())


def test_logged_loss_is_unbiased_from_the_first_step():
    seen = []
    model, optimizer = make()
    expected = token_loss(model, next(steps(1)).micro_batches[0]).item()
    run(model, optimizer, steps(1), log=lambda state, metrics: seen.append(metrics["train/loss"]))
    assert math.isclose(seen[0], expected, rel_tol=1e-6)


def test_smooth_loss_is_the_weighted_mean_of_the_losses():
    values = [3.0, 1.0, 2.0]
    state = TrainState()
    model, optimizer = make()
    for value in values:
        step = next(steps(1))
        run(model, optimizer, [step], state, loss_fn=lambda m, b, v=value: token_loss(m, b) * 0 + v)
    by_hand = [0.9**2, 0.9, 1.0]
    expected = sum(w * v for w, v in zip(by_hand, values, strict=True)) / sum(by_hand)
    assert math.isclose(state.smooth_loss, expected, rel_tol=1e-6)
    assert math.isnan(TrainState().smooth_loss)


@pytest.mark.parametrize("every, expected", [(-1, []), (0, [10]), (4, [4, 8, 10]), (5, [5, 10]), (99, [10])])
def test_hooks_run_every_n_steps_and_at_the_end(every, expected):
    ran = []
    model, optimizer = make()
    run(model, optimizer, steps(10), hooks=[Hook(every, lambda state: ran.append(state.step) or {})])
    assert ran == expected


def test_hooks_run_in_eval_mode_and_their_metrics_are_logged():
    modes, logged = [], []
    model, optimizer = make()
    hook = Hook(2, lambda state: modes.append(model.training) or {"val/bpb": 1.0})
    run(model, optimizer, steps(2), hooks=[hook], log=lambda state, metrics: logged.append(metrics))
    assert modes == [False] and logged[-1] == {"val/bpb": 1.0}
    assert model.training


def test_steps_are_pulled_lazily():
    """RL is on-policy only if the data of a step are made after the step before it."""
    model, optimizer = make()
    versions = []

    def rollouts():
        for step in steps(3):
            versions.append(weights(model))
            yield step

    run(model, optimizer, rollouts())
    assert not torch.equal(versions[0], versions[1]) and not torch.equal(versions[1], versions[2])


# ---- stopping ----


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_after_the_current_step_and_saves(which):
    ran = []
    model, optimizer = make()

    def interrupted():
        for i, step in enumerate(steps(10)):
            if i == 3:
                os.kill(os.getpid(), which)
            yield step

    hooks = [
        Hook(2, lambda state: ran.append(("eval", state.step)) or {}),
        Hook(0, lambda state: ran.append(("save", state.step, state.data_state["next"])) or {}, saves=True),
    ]
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="step 4.*--resume"):
        run(model, optimizer, interrupted(), hooks=hooks)
    assert ran == [("eval", 2), ("save", 4, 4)]
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("which, expected", [(signal.SIGTERM, [3]), (signal.SIGUSR1, [3, 6])])
def test_signal_in_a_step_saves_at_the_end_of_that_step(which, expected):
    saved = []
    model, optimizer = make()

    def loss_fn(model, batch):
        if optimizer.num_steps == 2:
            os.kill(os.getpid(), which)
        return token_loss(model, batch)

    hooks = [Hook(0, lambda state: saved.append(state.step), saves=True)]
    try:
        run(model, optimizer, steps(6), hooks=hooks, loss_fn=loss_fn)
    except Stopped:
        assert which == signal.SIGTERM
    assert saved == expected  # after SIGUSR1 the run continues to its end


def test_minutes_between_checkpoints_count_from_the_last_one(monkeypatch):
    now, saved = [1000.0], []
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    model, optimizer = make()

    def slow_steps():
        for step in steps(10):
            now[0] += 25
            yield step

    hooks = [Hook(7, lambda state: saved.append(state.step), saves=True)]
    run(model, optimizer, slow_steps(), hooks=hooks, save_minutes=1)
    assert saved == [3, 6, 7, 10]  # every third step, and the seventh by its interval


def test_last_checkpoint_precedes_the_last_evaluation():
    ran = []
    hooks = [Hook(0, lambda state: ran.append("evaluate")), Hook(0, lambda state: ran.append("save"), saves=True)]
    run(*make(), steps(2), hooks=hooks)
    assert ran == ["save", "evaluate"]


def test_run_stopped_by_a_signal_resumes_bitwise():
    model, optimizer = make()
    run(model, optimizer, steps(8))

    saved = []
    half, half_optimizer = make()

    def interrupted():
        for i, step in enumerate(steps(8)):
            if i == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    def save(state):
        saved.append(snapshot(half, half_optimizer, state))
        return {}

    with pytest.raises(Stopped):
        run(half, half_optimizer, interrupted(), hooks=[Hook(-1, save, saves=True)])
    again, again_optimizer, state = restored(saved[0])
    run(again, again_optimizer, steps(8, start=state.data_state["next"]), state)
    assert torch.equal(weights(model), weights(again))


def test_loss_that_is_not_finite_raises_before_the_optimizer_step():
    model, optimizer = make()
    ran = []

    def loss_fn(model, batch):
        loss = token_loss(model, batch)
        return loss * math.nan if optimizer.num_steps == 3 else loss

    options = {
        "hooks": [Hook(1, lambda state: ran.append(state.step) or {})],
        "last_saved": lambda: "step 2 in d4",
    }
    with pytest.raises(UserError) as caught:
        run(model, optimizer, steps(10), loss_fn=loss_fn, **options)
    for part in ("nan", "step 3", "rows 3", "step 2 in d4"):
        assert part in str(caught.value)
    assert ran == [1, 2, 3] and optimizer.num_steps == 3  # neither an update nor a checkpoint after the bad loss
    assert torch.isfinite(weights(model)).all()


def test_gradient_that_is_not_finite_raises_before_the_optimizer_step():
    model, optimizer = make()
    before = weights(model)

    def loss_fn(model, batch):
        return token_loss(model, batch) + torch.sqrt(model.smear_lambda).sum()  # sqrt has no finite slope at 0

    with pytest.raises(UserError, match="gradient norm is (inf|nan) at step 0"):
        run(model, optimizer, steps(1), loss_fn=loss_fn)
    assert torch.equal(weights(model), before)


def test_bad_step_is_skipped_and_the_run_goes_on_without_it():
    """Its weights and its smoothed loss are those of a run that never had this step."""
    results = []
    for bad_step in (None, 1):
        model, optimizer = make()
        state, logged = TrainState(), []

        def loss_fn(model, batch, state=state, bad_step=bad_step):
            return token_loss(model, batch) * (math.inf if state.step == bad_step else 1.0)

        data = [step for i, step in enumerate(steps(4)) if bad_step or i != 1]
        schedule = StepSchedule(0.5, 0.9)
        trainer = Trainer(
            model, optimizer, state, CPU, log=lambda state, m, logged=logged: logged.append(m), skip_bad_steps=1
        )
        trainer.fit(data, loss_fn, lambda step, progress, schedule=schedule: schedule, [])
        results.append((weights(model), state.smooth_loss, state.skipped_steps, optimizer.num_steps, logged))
    without, skipped = results
    assert torch.equal(without[0], skipped[0]) and skipped[1] == pytest.approx(without[1])
    assert without[2:4] == (0, 3) and skipped[2:4] == (1, 3)
    assert skipped[4][1]["train/skipped_steps"] == 1 and "train/loss" not in skipped[4][1]


def test_more_bad_steps_than_allowed_end_the_run():
    model, optimizer = make()
    state = TrainState()
    with pytest.raises(UserError, match=r"step 2 \(data: rows 2\).*2 bad steps were skipped before"):
        run(model, optimizer, steps(4), state, loss_fn=lambda m, b: token_loss(m, b) * math.nan, skip_bad_steps=2)
    assert (state.step, state.skipped_steps) == (2, 2)


def test_gradient_norm_and_learning_rates_are_logged():
    model, optimizer = make()
    logged = []
    token_loss(model, next(steps(1)).micro_batches[0]).backward()
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    optimizer.zero_grad()
    run(model, optimizer, steps(2), log=lambda state, metrics: logged.append(metrics))
    assert logged[0]["train/grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert logged[1]["lr/wte"] == pytest.approx(0.5 * logged[0]["lr/wte"])
    assert {name for name in logged[0] if name.startswith("lr/")} == {
        f"lr/{group.name}" for group in param_groups(model.config)
    }


# ---- float16 ----


def test_overflow_halves_the_loss_scale_and_skips_the_step():
    model, optimizer = make()
    before = weights(model)
    big = [replace(step, micro_batches=step.micro_batches * 2) for step in steps(1)]

    def overflowing(model, batch):
        return token_loss(model, batch) / 2 + (model.smear_lambda * 1e38).sum() * 0.5  # finite itself, as it is 0

    state = run(model, optimizer, big, loss_fn=overflowing, scales_loss=True)
    assert (state.loss_scale, state.good_steps, state.step) == (2.0**15, 0, 1)
    assert torch.equal(weights(model), before) and optimizer.num_steps == 0
    state = run(model, optimizer, steps(1), state, scales_loss=True)
    assert (state.loss_scale, state.good_steps) == (2.0**15, 1)
    assert not torch.equal(weights(model), before)


def test_loss_scale_doubles_after_2000_steps_without_overflow():
    model, optimizer = make()
    state = run(model, optimizer, steps(1), TrainState(good_steps=1999), scales_loss=True)
    assert state.loss_scale == 2.0**17


def test_loss_scaling_changes_neither_loss_nor_weights():
    results = []
    for scales_loss in (False, True):  # a power of two: exact in floating point
        model, optimizer = make()
        state = run(model, optimizer, steps(3), scales_loss=scales_loss)
        results.append((weights(model), state.smooth_loss))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_step_without_micro_batches_on_this_rank_is_counted():
    for scales_loss in (False, True):
        model, optimizer = make()
        state = run(model, optimizer, [Step([], 0.0, B * T, {})], scales_loss=scales_loss)
        assert state.step == 1 and state.smooth_loss == 0


# ---- one loop for all stages ----


def policy_gradient(model, batch):
    x_BT, y_BT, advantage_B = batch
    logp_BT = -model(x_BT, y_BT, reduction="none")
    return -(logp_BT * advantage_B[:, None]).sum() / (y_BT >= 0).sum()


def test_sft_and_rl_losses_work_in_the_same_loop():
    model, optimizer = make()
    (step,) = steps(1)
    x, y, _ = step.micro_batches[0]
    y = y.clone()
    y[:, : T // 2] = -1
    seen = []
    sft = replace(step, micro_batches=[(x, y, B * T // 2)])
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1).item()
    run(model, optimizer, [sft], log=lambda state, metrics: seen.append(metrics["train/loss"]))
    assert math.isclose(seen[0], expected, rel_tol=1e-5)
    before = weights(model)
    rl = replace(step, micro_batches=[(x, y, torch.tensor([1.0, -1.0, 0.5, -0.5]))])
    run(model, optimizer, [rl], loss_fn=policy_gradient)
    assert not torch.equal(before, weights(model))


class ZeroSums(Dist):
    """Waits for the numbers to add, as the loop does, but returns zeros: on the null GPU the numbers are garbage."""

    def sum(self, tensor):
        return torch.tensor([0.0 for _ in tensor.tolist()])


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_step_waits_for_the_gpu_once(compile):
    """More would leave the GPU idle while the host prepares the next kernels."""
    device = torch.device("cuda", 0)
    model = tiny_gpt(device=device)
    optimizer = tiny_optimizer(model)
    if compile:
        optimizer.compiles = True  # its kernels get tensors; compiling them takes minutes and changes no copy
        optimizer.adamw_kernel = adamw_update
    ids_BT = torch.randint(V, (B, T), device=device)
    num_waits = []

    def data():
        for _ in range(4):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield Step([(ids_BT, ids_BT, B * T)] * 3, 0.0, B * T, {})
            num_waits.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))

    trainer = Trainer(model, optimizer, TrainState(), ZeroSums(device), log=lambda state, metrics: None)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        trainer.fit(data(), token_loss, decay, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert num_waits == [1] * 4


def test_loss_falls_on_repeated_data():
    model, optimizer = make()
    (step,) = steps(1)
    losses = []
    run(model, optimizer, [step] * 30, log=lambda state, metrics: losses.append(metrics["train/loss"]))
    assert losses[-1] < 0.7 * losses[0]
