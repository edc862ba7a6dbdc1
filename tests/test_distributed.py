"""
Distributed training: two processes over gloo train like one with twice the accumulation.

    python -m pytest tests/test_distributed.py
"""

import contextlib
import os
import signal
import socket
from dataclasses import replace

import pytest
import torch

from nanochat import distributed
from nanochat.common import UserError
from nanochat.distributed import Dist
from nanochat.gpt import GPT, GPTConfig
from nanochat.guards import Guards
from nanochat.muon import SHARD_MIN_NUMEL, StepSchedule, build_optimizer
from nanochat.recipe import param_groups
from nanochat.train import Hook, Step, Stopped, Trainer, TrainState, token_loss

pytestmark = pytest.mark.slow  # the fixture starts two processes

WORLD_SIZE, NUM_STEPS = 2, 3
STEADY = StepSchedule(0.1, 0.9)
V, T, ROWS = 256, 48, 4  # vocabulary, tokens per row, rows per optimizer step


def make(dist, seed=0):
    """Depth 2, one value gate: a Muon group of one matrix for two ranks. Two tables are sharded, the third is not."""
    torch.manual_seed(seed)
    model = GPT.create(GPTConfig(T, V, n_layer=2, n_head=2, n_kv_head=1, n_embd=64))
    for p in model.parameters():
        if not p.any():  # projections start at zero, where gradients are zero: no test of anything
            torch.nn.init.normal_(p, std=0.02)
    assert model.transformer.wte.weight.numel() >= SHARD_MIN_NUMEL > model.value_embeds["1"].weight.numel()
    return model, build_optimizer(model, param_groups(model.config), rank=dist.rank, world_size=dist.world_size)


def steps(dist, first, last):
    """The same rows in every step, split between the ranks; together always two micro-batches of two rows."""
    for i in range(first, last):
        ids = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(i))
        halves = [(half[:, :-1], half[:, 1:], ROWS * T) for half in ids.chunk(2)]
        yield Step(halves if dist.world_size == 1 else [halves[dist.rank]], i / 10, ROWS * T, {})


def run(dist, model, optimizer, first, last):
    losses, grad_norms = [], []

    def schedule(step, progress):
        return StepSchedule(0.1 * (1 - progress), 0.9)

    def log(state, metrics):
        losses.append(metrics["train/loss"])
        grad_norms.append(metrics["train/grad_norm"])

    trainer = Trainer(model, optimizer, TrainState(), dist, log=log)
    trainer.fit(steps(dist, first, last), token_loss, schedule, [])
    return {"losses": losses, "grad_norms": grad_norms}


def report(dist, restore_from=None):
    """Weights, optimizer state and metrics of one rank after training."""
    model, optimizer = make(dist)
    if restore_from:
        model, optimizer = make(dist, seed=1)
        model.load_state_dict(restore_from["weights"])
        optimizer.load_full_state(restore_from["state"])
        metrics = run(dist, model, optimizer, NUM_STEPS, 2 * NUM_STEPS)
    else:
        metrics = run(dist, model, optimizer, 0, NUM_STEPS)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "state": optimizer.full_state()} | metrics


def report_bad_step(dist, skip_bad_steps):
    """The first loss is not finite on the last rank only: (optimizer steps, skipped steps, error) of this rank."""
    model, optimizer = make(dist)
    state = TrainState()

    def loss_fn(model, micro_batch):
        is_bad = state.step == 0 and dist.rank == dist.world_size - 1
        return token_loss(model, micro_batch) * (float("nan") if is_bad else 1.0)

    trainer = Trainer(model, optimizer, state, dist, log=lambda state, metrics: None, skip_bad_steps=skip_bad_steps)
    data = [replace(step, position=f"text {dist.rank}") for step in steps(dist, 0, 2)]
    error = ""
    try:
        trainer.fit(data, loss_fn, lambda step, progress: STEADY, [])
    except UserError as caught:
        error = str(caught)
    return [optimizer.num_steps, state.skipped_steps, error]


def report_signals(dist):
    """A signal reaches the last rank only: the steps after which this rank saved, and whether it was stopped."""
    saved, stopped = [], False

    def interrupted():
        for i, step in enumerate(steps(dist, 0, 5)):
            if dist.rank == dist.world_size - 1 and i in (1, 3):
                os.kill(os.getpid(), signal.SIGUSR1 if i == 1 else signal.SIGTERM)
            yield step

    trainer = Trainer(*make(dist), TrainState(), dist, log=lambda state, metrics: None)
    try:
        save = Hook(0, lambda state: saved.append(state.step), saves=True)
        trainer.fit(interrupted(), token_loss, lambda step, progress: STEADY, [save])
    except Stopped:
        stopped = True
    return saved, stopped


def report_drift(dist):
    """One bit of one weight differs on the last rank: the error."""
    model, optimizer = make(dist)
    guards = Guards(dist, 0, lambda: "")
    guards.check_ranks(optimizer.params(), 1)
    if dist.rank == dist.world_size - 1:
        model.lm_head.weight.data.view(torch.int32)[3, 5] ^= 1
    try:
        guards.check_ranks(optimizer.params(), 2)
    except UserError as error:
        return str(error)


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    with distributed.init("cpu") as dist:
        dist.barrier()
        dist.print0("once")
        result = {
            "is_main": dist.is_main,
            "sum": dist.sum(torch.tensor([1.0, rank])).tolist(),
            "any": [dist.any_rank(rank == 1), dist.any_rank(True), dist.any_rank(False)],
            "gather": dist.gather({"rank": rank}),
            "trained": report(dist),
            "restored": report(dist, torch.load(folder / "one.pt", weights_only=True)),
            "skipped": report_bad_step(dist, skip_bad_steps=1),
            "stopped": report_bad_step(dist, skip_bad_steps=0),
            "signals": report_signals(dist),
            "drifted": report_drift(dist),
        }
    torch.save(result, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(one rank after 3 steps, the same after 3 more, the reports of two ranks)."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = Dist(torch.device("cpu"))
    first = report(alone)
    torch.save(first, folder / "one.pt")
    second = report(alone, restore_from=first)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, folder), nprocs=WORLD_SIZE)
    return first, second, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def assert_close(ours, theirs):
    """By norm: rounding may turn single signs in the decay of MuonAdamW (see test_muon.py)."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        error, norm = (ours[name] - tensor).float().norm(), tensor.float().norm()
        assert error <= 1e-3 * norm, f"{name}: {error / norm:.1e}"


def test_two_ranks_train_like_one_rank_with_twice_the_accumulation(results):
    one, _, ranks = results
    for rank in ranks:
        assert_close(rank["trained"]["weights"], one["weights"])
        assert rank["trained"]["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert rank["trained"]["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-4)
    for name, weight in ranks[0]["trained"]["weights"].items():
        assert torch.equal(weight, ranks[1]["trained"]["weights"][name]), f"{name} differs between the ranks"


def test_signal_to_one_rank_saves_and_stops_all_in_the_same_step(results):
    _, _, ranks = results
    assert [rank["signals"] for rank in ranks] == [([2, 4], True)] * WORLD_SIZE


def test_full_state_of_two_ranks_equals_that_of_one(results):
    one, _, (first, other) = results
    state = first["trained"]["state"]
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in one["state"].items()}
    assert_close(state, one["state"])
    assert not other["trained"]["state"]  # only rank 0 gathers it


def test_full_state_of_one_rank_loads_on_two(results):
    _, second, ranks = results
    for rank in ranks:
        assert_close(rank["restored"]["weights"], second["weights"])
        assert rank["restored"]["losses"] == pytest.approx(second["losses"], rel=1e-5)
    assert_close(ranks[0]["restored"]["state"], second["state"])


def test_all_ranks_skip_a_step_that_is_bad_on_one_of_them(results):
    *_, ranks = results
    assert [rank["skipped"] for rank in ranks] == [[1, 1, ""]] * WORLD_SIZE


def test_all_ranks_stop_and_name_the_rank_with_the_bad_batch(results):
    *_, ranks = results
    for rank in ranks:
        num_steps, _, error = rank["stopped"]
        assert num_steps == 0
        assert f"the loss is nan at step 0 (data: text 1), rank 1 on {socket.gethostname()};" in error
        assert "text 0" not in error and "--skip-bad-steps" in error


def test_ranks_with_different_weights_stop_and_are_named(results):
    *_, ranks = results
    for rank in ranks:  # of two ranks none is in the majority
        for part in ("after step 2", "rank 0 on", "rank 1 on", socket.gethostname()):
            assert part in rank["drifted"]


def test_collectives_agree_on_all_ranks(results):
    *_, ranks = results
    assert [rank["is_main"] for rank in ranks] == [True, False]
    for rank in ranks:
        assert rank["sum"] == [2.0, 1.0]
        assert rank["any"] == [True, True, False]
        assert rank["gather"] == [{"rank": 0}, {"rank": 1}]


def test_single_process_works_without_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with distributed.init("cpu") as dist:
        assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)
        assert dist.sum(torch.tensor([3.0])).tolist() == [3.0]
        assert dist.any_rank(True) is True and dist.any_rank(False) is False
        assert dist.gather("x") == ["x"]
        dist.barrier()
        assert not torch.distributed.is_initialized()


def test_init_with_unknown_device_raises_before_joining_a_group(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--device"), distributed.init("tpu"):
        pass


@pytest.mark.parametrize("error, is_left", [(UserError, True), (SystemExit, False), (None, False)])
def test_init_does_not_destroy_the_group_after_an_error(monkeypatch, error, is_left):
    """Destroying it could wait for ranks that wait for this one. All ranks raise SystemExit (Stopped) together."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    try:
        with contextlib.suppress(UserError, SystemExit), distributed.init("cpu"):
            if error:
                raise error
        assert torch.distributed.is_initialized() == is_left
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
