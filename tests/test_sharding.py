"""
Sharded training (--shard) on two ranks against replicated training on one: weights, losses, bytes, checkpoints.

    python -m pytest tests/test_sharding.py
"""

import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from factories import random_text, tiny_config, write_shard
from ranks import launch, next_group
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from nanochat import distributed, hardware, sharding
from nanochat.checkpoint_manager import load_model, stage_dir
from nanochat.costs import TrainingSetup, bytes_communicated
from nanochat.distributed import Dist
from nanochat.gpt import GPT
from nanochat.muon import MuonAdamW, StepSchedule, build_optimizer, gather_weights, is_sharded
from nanochat.recipe import param_groups
from nanochat.train import token_loss
from scripts import base_train

CPU = torch.device("cpu")
WORLD_SIZE, NUM_STEPS = 2, 3
# Three layers, so that a rank owns padding; tables and most matrices have at least SHARD_MIN_NUMEL numbers.
SIZES = {"n_layer": 3, "n_embd": 128, "n_head": 4, "n_kv_head": 4, "vocab_size": 500, "sequence_len": 32}
CONFIG = tiny_config(**SIZES, norm_gains=True)
ROWS = 4

STEPS = ["--device", "cpu", "--no-compile", "--save-every", "2", "--num-iterations", "4", "--eval-every", "0"]
MODEL = ["--depth", "2", "--head-dim", "64", "--max-seq-len", "64", "--device-batch-size", "2", "--norm-gains"]
BASE = [
    "--recipe",
    "nanochat",  # the rates of long runs: higher ones make rounding errors grow
    *STEPS,
    *MODEL,
    "--total-batch-size",
    "512",
    "--weight-decay",
    "0",
    "--eval-tokens",
    "256",
    "--sample-every",
    "-1",
]


# ---- one model, step by step ----


def micro_batches(step, dist):
    """Two micro-batches per rank of the same rows for any number of ranks."""
    ids = torch.randint(500, (ROWS, 33), generator=torch.Generator().manual_seed(step))
    parts = [(part[:, :-1], part[:, 1:], ROWS * 32) for part in ids.chunk(2 * WORLD_SIZE)]
    return parts[2 * dist.rank : 2 * dist.rank + 2] if dist.world_size > 1 else parts


def train(model, optimizer, dist, first, last):
    """Losses and squared gradient norms, summed over the ranks, of steps first … last - 1."""
    numbers = []
    for step in range(first, last):
        optimizer.set_schedule(StepSchedule(0.1, 0.9))
        losses = [token_loss(model, micro_batch) for micro_batch in micro_batches(step, dist)]
        for loss in losses:
            loss.backward()
        square_norm = optimizer.reduce_gradients()
        numbers.append(dist.sum(torch.stack([torch.stack(losses).sum().detach(), square_norm])).tolist())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return numbers


def optimizer_of(model, dist) -> MuonAdamW:
    return build_optimizer(model, param_groups(CONFIG), rank=dist.rank, world_size=dist.world_size)


def result_of(model, optimizer, dist, numbers):
    weights = gather_weights(dict(model.named_parameters()), dist.rank, dist.world_size)
    return {"numbers": numbers, "weights": weights, "state": optimizer.full_state()}


def collectives(trace: Path):
    """The collective operations of a trace of the profiler, in order: (name, numbers in the whole tensor)."""
    whole = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "alltoall_base_": 0}  # argument: the larger tensor
    for event in sorted(json.loads(trace.read_text())["traceEvents"], key=lambda event: event["ts"]):
        name = event["name"].removeprefix("c10d::")
        if name in whole:
            yield name, math.prod(event["args"]["Input Dims"][whole[name]])
        elif name == "allreduce_":
            yield name, sum(math.prod(dims) for dims in event["args"]["Input Dims"][0])


def bytes_sent(trace: Path, world_size: int) -> float:
    """Bytes of float32 numbers that a rank sends in these operations, as bytes_communicated counts them."""
    passes = Counter({"allreduce_": 1})  # reduce-scatter and all-gather
    return sum(4 * (1 + passes[name]) * (world_size - 1) / world_size * n for name, n in collectives(trace))


def profiled_step(model, optimizer, dist, file):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for micro_batch in micro_batches(99, dist):
            token_loss(model, micro_batch).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    profiler.export_chrome_trace(str(file))


def work(folder):
    """What each of the two ranks does."""
    with distributed.init("cpu") as dist:
        torch.manual_seed(0)
        model = sharding.build(CONFIG, dist, torch.float32)
        first = {name: p.shape for name, p in model.named_parameters() if is_sharded(p)}
        result = {"initial": gather_weights(dict(model.named_parameters()), dist.rank, 2), "sharded": first}
        start = torch.load(folder / "start.pt", weights_only=True)
        for name, recomputes in (("trained", False), ("recomputed", True)):
            model = sharding.build(CONFIG, dist, torch.float32, start)
            model.activation_checkpointing = recomputes
            optimizer = optimizer_of(model, dist)
            numbers = train(model, optimizer, dist, 0, NUM_STEPS)
            result[name] = result_of(model, optimizer, dist, numbers)
        if dist.is_main:
            torch.save(result["trained"], folder / "middle.pt")
        dist.barrier()
        middle = torch.load(folder / "middle.pt", weights_only=True)
        result["longer"] = result_of(model, optimizer, dist, train(model, optimizer, dist, NUM_STEPS, NUM_STEPS + 2))
        model = sharding.build(CONFIG, dist, torch.float32, middle["weights"])
        optimizer = optimizer_of(model, dist)
        optimizer.load_full_state(middle["state"])
        result["resumed"] = result_of(model, optimizer, dist, train(model, optimizer, dist, NUM_STEPS, NUM_STEPS + 2))
        profiled_step(model, optimizer, dist, folder / f"sharded{dist.rank}.json")
        model = GPT(CONFIG)
        model.load_state_dict(start)
        profiled_step(model, optimizer_of(model, dist), dist, folder / f"replicated{dist.rank}.json")
    torch.save(result, folder / f"rank{dist.rank}.pt")
    base = stage_dir("base")
    for tag, resume in (("whole", ()), ("parts", ("--resume",)), ("from-one", ("--resume",))):
        next_group()
        if dist.is_main and tag == "parts":  # the other rank waits for this one in distributed.init
            shutil.copytree(base / "whole/step_000002", base / "parts/step_000002")
        base_train.main([*BASE, "--shard", "--model-tag", tag, *resume])


@pytest.fixture(scope="module")
def results(tmp_path_factory, golden_tokenizer):
    """A folder with what one rank did, replicated, and two ranks, sharded."""
    folder = tmp_path_factory.mktemp("base")
    alone = Dist(CPU)
    torch.manual_seed(0)
    model = GPT.create(CONFIG)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        if not p.any():  # projections start at zero, where gradients are zero: no test of anything
            torch.nn.init.normal_(p, std=0.02)
    torch.save({name: p.detach().clone() for name, p in model.named_parameters()}, folder / "start.pt")
    optimizer = optimizer_of(model, alone)
    one = result_of(model, optimizer, alone, train(model, optimizer, alone, 0, NUM_STEPS)) | {"initial": initial}

    rng = random.Random(0)
    for name in ("0", "1"):
        texts = [random_text(rng, 5, 60) for _ in range(1500)]
        write_shard(folder / f"shards/{name}.parquet", texts, rows_per_group=50)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BASE_DIR": folder, "DATA_DIR": folder / "shards", "DTYPE": "float32"}.items():
            patch.setenv(f"NANOCHAT_{name}", str(value))
        patch.setattr(hardware, "pick_matmul_precision", lambda *_: "highest")
        golden_tokenizer.save(folder / "tokenizer")
        base_train.main([*BASE, "--model-tag", "one"])
        base = stage_dir("base")
        shutil.copytree(base / "one/step_000002", base / "from-one/step_000002")
        launch(WORLD_SIZE, work, folder, log=folder / "log")
        shutil.copytree(base / "whole/step_000002", base / "on-one/step_000002")
        base_train.main([*BASE, "--model-tag", "on-one", "--resume"])
    return folder, one, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def assert_close(ours, theirs, tolerance=1e-3):
    """By norm: rounding may turn single signs in the decay of MuonAdamW (see test_muon.py)."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        error, norm = (ours[name] - tensor).float().norm(), tensor.float().norm()
        assert error <= tolerance * norm, f"{name}: {error / norm:.1e}"


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_large_parameters_are_sharded_and_initialised_as_on_one_rank(results):
    _, one, ranks = results
    assert_equal(ranks[0]["initial"], one["initial"])
    small = {"resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"}
    small |= {"mlp_gains", "final_gain"}
    gates = {name for name in one["initial"] if "ve_gate" in name}
    assert ranks[1]["sharded"].keys() == one["initial"].keys() - small - gates


@pytest.mark.parametrize("run", ["trained", "recomputed"])
def test_two_sharded_ranks_train_like_one_replicated(results, run):
    _, one, ranks = results
    for rank in ranks:
        assert torch.tensor(rank[run]["numbers"]).allclose(torch.tensor(one["numbers"]), rtol=1e-4)
    assert_close(ranks[0][run]["weights"], one["weights"])
    assert_close(ranks[0][run]["state"], one["state"])
    assert not ranks[1][run]["weights"] and not ranks[1][run]["state"]


def test_sharded_model_resumed_from_whole_weights_and_state_is_bitwise_equal(results):
    *_, ranks = results
    assert ranks[0]["resumed"]["numbers"] == ranks[0]["longer"]["numbers"]
    assert_equal(ranks[0]["resumed"]["weights"], ranks[0]["longer"]["weights"])
    assert_equal(ranks[0]["resumed"]["state"], ranks[0]["longer"]["state"])


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_bytes_of_a_step_equal_the_formula(results, mode):
    folder, *_ = results
    setup = TrainingSetup(rows=1, accumulation=2, world_size=WORLD_SIZE, dtype=torch.float32, sharded=mode == "sharded")
    expected = sum(bytes_communicated(CONFIG, setup).values())
    for rank in range(WORLD_SIZE):
        assert bytes_sent(folder / f"{mode}{rank}.json", WORLD_SIZE) == expected


def test_base_train_sharded_resumes_bitwise(results):
    base = results[0] / "base_checkpoints"
    for name in ("model", "optimizer", "data"):
        whole, parts = (load_file(base / f"{tag}/step_000004/{name}.safetensors") for tag in ("whole", "parts"))
        assert_equal(parts, whole)


@pytest.mark.parametrize("tag, reference", [("from-one", "one"), ("on-one", "whole")])
def test_base_train_sharded_and_replicated_share_checkpoints_and_losses(results, tag, reference):
    """A run of one replicated rank, resumed on two sharded ones, and the other way round."""
    folder, *_ = results
    found, expected = (
        [json.loads(line) for line in (folder / f"report/metrics/base_train-{name}.jsonl").read_text().splitlines()]
        for name in (tag, reference)
    )
    for name in ("train/loss", "val/bpb"):
        last, last_expected = ([line[name] for line in lines if name in line][-1] for lines in (found, expected))
        assert last == pytest.approx(last_expected, rel=1e-5)
    ours, theirs = (
        load_file(folder / f"base_checkpoints/{name}/step_000004/model.safetensors") for name in (tag, reference)
    )
    for name in ("smear_gate.weight", "smear_lambda", "backout_lambda"):  # their first gradients are rounding errors
        del ours[name], theirs[name]
    assert_close(ours, theirs, tolerance=1e-2)


def test_checkpoint_of_a_sharded_run_loads_for_inference(results, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(results[0]))
    model, _, checkpoint = load_model("base", "whole", -1, CPU, torch.float32)
    assert checkpoint.step == 4 and model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()


def test_shard_with_fp8_is_refused(results, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(results[0]))
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(results[0] / "shards"))
    with pytest.raises(SystemExit, match="leave out --fp8 or --shard"):
        base_train.main([*BASE, "--shard", "--fp8", "--model-tag", "eight-bits"])


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_communication_of_a_muon_group_is_started_before_the_next_group_computes(results, mode):
    """The all-gather (sharded: all-to-all) of updated weights runs while the groups after it are orthogonalized."""
    events = json.loads((results[0] / f"{mode}0.json").read_text())["traceEvents"]
    names = [event["name"] for event in sorted(events, key=lambda event: event["ts"])]
    last_product = len(names) - names[::-1].index("aten::baddbmm")
    operation = {"replicated": "c10d::_allgather_base_", "sharded": "c10d::alltoall_base_"}[mode]
    first_product = names.index("aten::baddbmm", names.index(operation if mode == "sharded" else "aten::baddbmm"))
    assert names[first_product:last_product].count(operation) >= 2
