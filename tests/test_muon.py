"""
The optimizer on one rank: golden steps, parameter groups, gradient norm, orthogonalization, state for checkpoints.
For several ranks see tests/test_distributed.py.

    python -m pytest tests/test_muon.py
"""

import copy

import pytest
import torch
from conftest import golden
from factories import FAMILY, tiny_optimizer

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import can_compile
from nanochat.muon import MuonAdamW, StepSchedule, adamw_update, build_optimizer, muon_update, orthogonalize
from nanochat.recipe import Hyperparameters, param_groups

# In the repository: one matrix of each kind and 16 rows of each table (AdamW works element by element).
CASES = ["optimizer/three_steps_excerpt.pt", "optimizer/three_steps.pt"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return torch.load(golden(request.param), weights_only=True)


def golden_optimizer(case):
    """The optimizer of the whole model, on those parameters that the file has."""
    setup = case["setup"]
    names = ("unembedding_lr", "embedding_lr", "matrix_lr", "scalar_lr")
    hyperparameters = Hyperparameters(**{name: setup[name] for name in names})
    model = GPT.create(GPTConfig(**case["config"]))
    groups = param_groups(model.config, hyperparameters, weight_decay=setup["weight_decay"])
    whole = build_optimizer(model, groups)
    params = {name: torch.nn.Parameter(weight.clone()) for name, weight in case["before"].items()}
    groups = []
    for group in whole.param_groups:
        names = [name for name in group["names"] if name in params]
        groups.append(dict(group) | {"names": names, "params": [params[name] for name in names]})
    groups = [group for group in groups if group["names"]]
    return MuonAdamW(groups, rank=0, world_size=1, compile=False, dtype=torch.float32), params


def test_three_steps_match_golden_weights(case):
    """
    1e-4 of each parameter's norm, not of each element: weight decay looks at the sign of update * weight, and rounding
    may turn it where either is next to nothing.
    """
    optimizer, params = golden_optimizer(case)
    schedule = case["schedule"]
    for i, (grads, after) in enumerate(zip(case["grads"], case["after"], strict=True)):
        decay_multiplier = schedule["muon_weight_decay"][i] / case["setup"]["weight_decay"]
        optimizer.set_schedule(
            StepSchedule(schedule["lr_multiplier"][i], schedule["muon_momentum"][i], decay_multiplier)
        )
        for name, p in params.items():
            p.grad = grads[name].clone()
        optimizer.step()
        for name, p in params.items():
            error, norm = (p.data - after[name]).norm(), after[name].norm()
            assert error <= 1e-4 * norm, f"step {i}, {name}: {error / norm:.1e}"


def test_parameter_groups_match_golden(case):
    optimizer, params = golden_optimizer(case)
    ours = {name: group for group in optimizer.param_groups for name in group["names"]}
    expected = {name: group for group in case["groups"] for name in group["params"] if name in params}
    assert ours.keys() == expected.keys() == params.keys()
    for name, group in expected.items():
        assert ours[name]["kind"] == group["kind"]
        assert ours[name]["lr"] == pytest.approx(group["lr"], rel=1e-9)
        assert ours[name]["decay"] == group["weight_decay"]
        assert ours[name].get("betas") == group.get("betas")


def small_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=32)
    return GPT.create(config, dtype=dtype)


def random_steps(model, optimizer, num_steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for i in range(num_steps):
        optimizer.set_schedule(StepSchedule(1.0 - 0.1 * i, 0.85 + 0.01 * i))
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_each_parameter_is_in_one_group_and_learning_rates_scale_with_width_and_batch():
    model = small_model()
    hyperparameters = Hyperparameters(total_batch_size=2**17)  # a quarter of the reference: half the learning rates
    groups = build_optimizer(model, param_groups(model.config, hyperparameters)).param_groups
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(names)
    width = (32 / 768) ** -0.5
    expected = {"lm_head": 0.008 * width / 2, "wte": 0.3 * width / 2, "value_embeds": 0.15 * width / 2}
    expected |= {"resid": 0.005 / 2, "x0": 0.5 / 2, "smear_backout": 0.2 / 2}
    assert {g["name"]: g["lr"] for g in groups if g["kind"] == "adamw"} == pytest.approx(expected)
    assert {g["lr"] for g in groups if g["kind"] == "muon"} == {0.02 / 2}


def test_model_without_optional_parts_has_fewer_groups_and_trains():
    model = GPT.create(GPTConfig(16, 64, 2, 2, 2, 32, **FAMILY["classic"]))
    optimizer = tiny_optimizer(model)
    assert {g["name"] for g in optimizer.param_groups if g["kind"] == "adamw"} == {"lm_head", "wte"}
    random_steps(model, optimizer, 2, seed=0)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("rows, columns", [(24, 24), (64, 16), (16, 64), (1, 12), (12, 1)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_singular_vectors(rows, columns):
    torch.manual_seed(0)
    u, values, vh = torch.linalg.svd(torch.randn(3, rows, columns), full_matrices=False)
    stack = u @ torch.diag_embed(values.clamp_min(0.02 * values.max())) @ vh  # five iterations do not lift all from 0
    out = orthogonalize(stack)
    values = torch.linalg.svdvals(out)
    assert out.shape == stack.shape and values.min() > 0.8 and values.max() < 1.2
    assert ((out - u @ vh).norm(dim=(-2, -1)) < 0.15 * (u @ vh).norm(dim=(-2, -1))).all()


def test_step_without_gradients_only_decays_weights():
    model = small_model()
    optimizer = build_optimizer(model, param_groups(model.config, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()  # no gradient at all, as on a rank without supervised tokens
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            decay = 1 - group["lr"] * group["decay"] if group["kind"] == "adamw" else 1.0
            torch.testing.assert_close(p.data, before[name] * decay)


def test_steps_after_loading_state_are_bitwise_equal():
    model = small_model()
    optimizer = tiny_optimizer(model)
    random_steps(model, optimizer, 3, seed=1)
    saved = copy.deepcopy((model.state_dict(), optimizer.full_state()))
    random_steps(model, optimizer, 3, seed=2)

    again = small_model(seed=7)
    again.load_state_dict(saved[0])
    again_optimizer = tiny_optimizer(again)
    again_optimizer.load_full_state(saved[1])
    random_steps(again, again_optimizer, 3, seed=2)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    first, second = optimizer.full_state(), again_optimizer.full_state()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_gradient_norm_is_that_of_all_parameters():
    model = small_model()
    optimizer = tiny_optimizer(model)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.1 * i)
    expected = sum(p.grad.square().sum() for p in model.parameters())
    torch.testing.assert_close(optimizer.reduce_gradients(), expected)


def test_step_after_reduce_gradients_equals_step_alone():
    models = [small_model(), small_model()]
    for model in models:
        optimizer = tiny_optimizer(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if model is models[0]:
            optimizer.reduce_gradients()
        optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_full_state_is_a_copy_by_parameter_name():
    model = small_model()
    optimizer = tiny_optimizer(model)
    random_steps(model, optimizer, 1, seed=1)
    state = optimizer.full_state()
    frozen = copy.deepcopy(state)
    random_steps(model, optimizer, 1, seed=2)
    assert all(torch.equal(state[key], frozen[key]) for key in state)
    parameters = {key.rpartition(".")[0] for key in state if key != "num_steps"}
    assert parameters == {name for name, _ in model.named_parameters()}


def test_full_state_of_an_unused_optimizer_loads():
    optimizer = tiny_optimizer(small_model())
    again = tiny_optimizer(small_model())
    again.load_full_state(optimizer.full_state())
    assert again.num_steps == 0


def test_full_state_of_another_model_raises_user_error():
    optimizer = tiny_optimizer(small_model())
    random_steps(small_model(), optimizer, 1, seed=1)
    deeper = GPT.create(GPTConfig(16, 64, 4, 2, 1, 32))
    with pytest.raises(UserError, match="another model"):
        tiny_optimizer(deeper).load_full_state(optimizer.full_state())


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("update", [adamw_update, muon_update])
def test_compiled_update_matches_eager_without_recompiling(update):
    """Compiled it takes its rates as tensors, and a new rate must not mean compiling again."""
    compiled = torch.compile(update, dynamic=False)
    extra = (torch.float32,) if update is muon_update else ()
    states = [torch.zeros(2, 8, 16), torch.zeros(2, 1, 16) if update is muon_update else torch.zeros(2, 8, 16)]
    eager, fast = ([torch.ones(2, 8, 16), *(state.clone() for state in states)] for _ in range(2))
    torch.manual_seed(0)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in (1, 2, 3):
        grad = torch.randn(2, 8, 16)
        rates = (0.1 / step, 0.1, 0.9, 0.95) + ((step,) if update is adamw_update else ())
        update(eager[0], grad.clone(), *eager[1:], *rates, *extra)
        compiled(fast[0], grad.clone(), *fast[1:], *(torch.tensor(r, dtype=torch.float32) for r in rates), *extra)
    for ours, theirs in zip(fast, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
