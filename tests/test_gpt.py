"""
The model: golden logits, losses, gradients and costs; plain members of the family and windows against slow references;
initial values; configurations; precision; activation checkpointing.

    python -m pytest tests/test_gpt.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from factories import FAMILY, tiny_config, tiny_gpt
from test_attention import naive_attention, naive_window

from nanochat import costs, hardware
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.linear import JointLinear, Linear
from nanochat.muon import MuonAdamW, build_optimizer
from nanochat.recipe import param_groups

CASES = ["gpt/case0.pt", "gpt/case1.pt", "gpt/case2.pt"]  # in the repository: case1, logits of the last 16 tokens only


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return torch.load(golden(request.param), weights_only=True)


def load(case, dtype=torch.float32):
    model = GPT(GPTConfig(**case["config"]), dtype=dtype)
    model.load_state_dict(case["state_dict"])
    return model


def tiny(**changes):
    sizes = {"sequence_len": 256, "vocab_size": 70, "n_layer": 3, "n_head": 4, "n_kv_head": 2}
    return tiny_gpt(**sizes | changes)


# ---- golden ----


def test_logits_equal_golden(case):
    with torch.no_grad():
        logits = load(case)(case["x"])
    assert logits.dtype == torch.float32 and logits.shape == (*case["x"].shape, case["config"]["vocab_size"])
    expected = case["logits"]
    torch.testing.assert_close(logits[:, -expected.size(1) :], expected, rtol=0, atol=1e-4)


def test_losses_and_gradients_equal_golden(case):
    model = load(case)
    loss = model(case["x"], case["y"])
    loss.backward()
    assert math.isclose(loss.item(), case["loss"], abs_tol=1e-4)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(case["grad_norms"], rel=1e-3)
    with torch.no_grad():
        losses_BT = model(case["x"], case["y"], reduction="none")
        total = model(case["x"], case["y"], reduction="sum")
    torch.testing.assert_close(losses_BT, case["loss_none"].view_as(losses_BT), rtol=0, atol=1e-4)
    torch.testing.assert_close(total, losses_BT.sum())


def test_costs_equal_golden(case):
    config = GPTConfig(**case["config"])
    assert costs.flops_per_token(config) == case["flops_per_token"]
    assert costs.param_counts(config) == case["param_counts"]
    assert [(window, 0) for window in config.windows] == case["window_sizes"]
    assert config.n_layer * 2 * config.kv_width * 4 == case["kv_bytes_per_token_fp32"]


def test_bfloat16_logits_are_close_to_float32(case):
    with torch.no_grad():
        exact, rounded = load(case)(case["x"]), load(case, torch.bfloat16)(case["x"])
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()


# ---- slow references ----


def rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()


def plain_logits(weights, config, idx_BT):
    """A model with full windows and without the optional parts, written for clarity only."""
    B, T = idx_BT.shape
    D = config.head_dim
    angle = torch.arange(T)[:, None] * config.rope_base ** (-2 * torch.arange(D // 2) / D)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]

    def rotate(x):
        x1, x2 = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], dim=-1)

    gains = weights.get("mlp_gains", torch.ones(config.n_layer, 1))
    x = rms_norm(weights["transformer.wte.weight"][idx_BT])
    for i in range(config.n_layer):
        layer = {k.split(f"h.{i}.")[1]: w for k, w in weights.items() if f".h.{i}." in k}
        y = rms_norm(x)
        q, k, v = ((y @ layer[f"attn.{name}.weight"].T).view(B, T, -1, D) for name in ("c_q", "c_k", "c_v"))
        q, k = (config.qk_gain * rms_norm(rotate(x)) for x in (q, k))
        y = naive_attention(q, k, v, naive_window(T, T))
        x = x + y.flatten(2) @ layer["attn.c_proj.weight"].T
        normed = gains[i] * rms_norm(x)
        x = x + (normed @ layer["mlp.c_fc.weight"].T).relu().square() @ layer["mlp.c_proj.weight"].T
    logits = (weights.get("final_gain", 1) * rms_norm(x) @ weights["lm_head.weight"].T)[..., : config.vocab_size]
    if config.logit_softcap:
        logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
    return logits


@pytest.mark.parametrize("member", ["classic", "portable"])
@pytest.mark.parametrize("norm_gains", [False, True])
def test_plain_models_equal_the_slow_reference(member, norm_gains):
    model = tiny(**FAMILY[member], norm_gains=norm_gains)
    torch.nn.init.normal_(model.lm_head.weight, std=3.0)  # logits beyond the softcap
    idx_BT = torch.randint(70, (2, 150))  # longer than a short window would be
    with torch.no_grad():
        expected = plain_logits(dict(model.named_parameters()), model.config, idx_BT)
        logits = model(idx_BT)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        loss = model(idx_BT[:, :-1], idx_BT[:, 1:])
        torch.testing.assert_close(loss, F.cross_entropy(expected[:, :-1].flatten(0, 1), idx_BT[:, 1:].flatten()))
    assert (logits.abs().max() > 15) == (member == "portable")
    assert model.config.windows == [256] * 3
    optional = ("ve_gate", "value_embeds", "lambda", "smear")
    assert not [name for name in model.state_dict() if any(part in name for part in optional)]


@pytest.mark.parametrize("num_tokens", [1, 2, 129, 131, 255])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_windows_equal_a_full_mask_forward_and_backward(num_tokens, num_kv_heads):
    model = tiny(window_pattern="SSL", n_kv_head=num_kv_heads)
    assert model.config.windows == [128, 128, 256]
    ids = torch.randint(70, (2, num_tokens + 1))

    def run():
        loss = model(ids[:, :-1], ids[:, 1:])
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)

    fast_loss, fast_grads = run()
    model.use_attention(lambda q, k, v, window: naive_attention(q, k, v, naive_window(q.size(1), window)))
    slow_loss, slow_grads = run()
    torch.testing.assert_close(fast_loss, slow_loss)
    for fast, slow in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-5)


def test_targets_of_minus_one_are_ignored():
    model = tiny()
    ids = torch.randint(70, (2, 12))
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[0, 3:] = -1
    losses_BT = model(x, y, reduction="none")
    kept = F.cross_entropy(model(x)[y >= 0], y[y >= 0])
    assert (losses_BT[y < 0] == 0).all()
    torch.testing.assert_close(model(x, y), kept)
    torch.testing.assert_close(model(x, y, reduction="sum"), kept * (y >= 0).sum())


def test_joint_layer_equals_its_layers_and_owns_no_parameters():
    torch.manual_seed(0)
    linears = [Linear(16, n) for n in (16, 8, 4)]
    joint = JointLinear(*linears)
    x, grads = torch.randn(2, 5, 16, requires_grad=True), [torch.randn(2, 5, n) for n in (16, 8, 4)]
    results = []
    for outputs in (joint(x), joint.multiply(x)):
        results.append([*outputs, *torch.autograd.grad(outputs, [x, *joint.weights], grads)])
    for separate, together in zip(*results, strict=True):
        torch.testing.assert_close(together, separate)
    assert not joint.state_dict()


# ---- initial values ----


def test_initial_values_of_every_parameter():
    config = GPTConfig(sequence_len=64, vocab_size=1000, n_layer=4, n_head=8, n_kv_head=4, n_embd=128)
    torch.manual_seed(0)
    model = GPT.create(config)
    bound = math.sqrt(3 / 128)
    rules = {  # ending of the name: (kind, scale)
        "wte.weight": ("normal", 0.8),
        "lm_head.weight": ("normal", 0.001),
        "attn.c_q.weight": ("uniform", (-bound, bound)),
        "attn.c_k.weight": ("uniform", (-bound, bound)),
        "attn.c_v.weight": ("uniform", (-bound, bound)),
        "attn.ve_gate.weight": ("uniform", (0.0, 0.02)),
        "mlp.c_fc.weight": ("uniform", (-0.4 * bound, 0.4 * bound)),
        "c_proj.weight": ("equal", [0.0]),
        "value_embeds.1.weight": ("uniform", (-bound, bound)),
        "value_embeds.3.weight": ("uniform", (-bound, bound)),
        "resid_lambdas": ("equal", [1.15, 1.15 - 0.1 / 3, 1.05 + 0.1 / 3, 1.05]),
        "x0_lambdas": ("equal", [0.20, 0.15, 0.10, 0.05]),
        "smear_gate.weight": ("uniform", (0.0, 0.02)),
        "smear_lambda": ("equal", [0.0]),
        "backout_lambda": ("equal", [0.2]),
    }
    used = set()
    for name, p in model.named_parameters():
        ending = next(ending for ending in rules if name.endswith(ending))
        kind, scale = rules[ending]
        used.add(ending)
        assert p.dtype == torch.float32
        if kind == "equal":
            torch.testing.assert_close(p.data, torch.tensor(scale).expand_as(p))
        elif kind == "normal":
            assert p.std().item() == pytest.approx(scale, rel=0.02) and abs(p.mean().item()) < 0.02 * scale, name
            assert p.abs().max() > 3 * scale, name  # a uniform distribution would end at 1.7
        else:
            low, high = scale
            spread = high - low
            assert low <= p.min() < low + 0.15 * spread and high - 0.15 * spread < p.max() <= high, name
            tolerance = 4 * spread / math.sqrt(12 * p.numel())  # four standard errors of the mean
            assert abs(p.mean().item() - (low + high) / 2) < tolerance, name
    assert used == set(rules)
    assert sum(p.numel() for p in model.parameters()) == costs.param_counts(config)["total"]


def test_new_model_predicts_all_tokens_alike():
    config = GPTConfig(sequence_len=32, vocab_size=500, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    ids = torch.randint(500, (4, 33))
    loss = GPT.create(config)(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(500), abs=0.01)


def test_seed_gives_the_weights_it_always_gave():
    """A run of the same seed must be the same run in later versions of this file."""
    torch.manual_seed(0)
    model = GPT.create(GPTConfig(sequence_len=64, vocab_size=1000, n_layer=4, n_head=8, n_kv_head=4, n_embd=128))
    expected = {
        "transformer.wte.weight": 1.2770618200302124,
        "lm_head.weight": 0.0007818075246177614,
        "transformer.h.0.attn.c_q.weight": -0.008202936500310898,
        "transformer.h.3.mlp.c_fc.weight": -0.04735775664448738,
        "value_embeds.1.weight": 0.0636482685804367,
        "smear_gate.weight": 0.004013278521597385,
    }
    weights = model.state_dict()
    assert {name: weights[name].flatten()[7].item() for name in expected} == expected


def test_constructor_allocates_without_drawing_random_numbers():
    before = torch.get_rng_state()
    model = GPT(tiny_config(sequence_len=16))
    assert torch.equal(torch.get_rng_state(), before)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert model.cos.shape == (16, 8) and (model.cos.square() + model.sin.square()).allclose(torch.ones(16, 8))
    abstract = GPT(tiny_config(), device="meta")
    assert {tensor.device.type for tensor in [*abstract.parameters(), *abstract.buffers()]} == {"meta"}


# ---- configuration and costs ----


@pytest.mark.parametrize("sequence_len, short", [(2048, 512), (512, 128), (513, 256), (100, 100), (1500, 384)])
def test_short_window_is_a_quarter_of_the_context_in_whole_blocks(sequence_len, short):
    config = GPTConfig(sequence_len=sequence_len, n_layer=6, window_pattern="SSL")
    assert config.windows == [short, short, sequence_len, short, short, sequence_len]
    assert GPTConfig(sequence_len=sequence_len, n_layer=2, window_pattern="S").windows == [short, sequence_len]


@pytest.mark.parametrize(
    "change", [{"window_pattern": "SLX"}, {"window_pattern": ""}, {"n_head": 5}, {"n_head": 6, "n_kv_head": 4}]
)
def test_impossible_configurations_are_user_errors(change):
    with pytest.raises(UserError):
        GPTConfig(**change)


def test_gains_of_a_new_model_change_nothing_and_are_trained():
    plain, gained = (tiny_gpt(initial=True, norm_gains=norm_gains) for norm_gains in (False, True))
    ids = torch.randint(70, (2, 20))
    assert torch.equal(plain(ids), gained(ids))
    optimizer = build_optimizer(gained, param_groups(gained.config))
    group = next(group for group in optimizer.param_groups if group["name"] == "gains")
    resid = next(group for group in optimizer.param_groups if group["name"] == "resid")
    same = ("kind", "lr", "decay", "betas", "skips_first_step")
    assert {name: group[name] for name in same} == {name: resid[name] for name in same}
    assert group["names"] == ["mlp_gains", "final_gain"]
    for _ in range(3):  # at first the MLPs' outputs are zero, and so are the gradients of their inputs
        gained(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert (gained.mlp_gains != 1).any(dim=1).all() and (gained.final_gain != 1).all()


FEATURES = ["value_embeds", "smear", "backout", "residual_scalars"]


@pytest.mark.parametrize("off", [[], *([feature] for feature in FEATURES), FEATURES])
def test_features_can_be_turned_off_one_by_one(off):
    model = tiny(**dict.fromkeys(off, False))
    names = {name.split(".")[0] for name in model.state_dict()} - {"transformer", "lm_head"}
    expected = {
        "value_embeds": {"value_embeds"},
        "smear": {"smear_gate", "smear_lambda"},
        "backout": {"backout_lambda"},
        "residual_scalars": {"resid_lambdas", "x0_lambdas"},
    }
    assert names == set().union(*(expected[feature] for feature in FEATURES if feature not in off))
    assert sum(p.numel() for p in model.parameters()) == costs.param_counts(model.config)["total"]
    ids = torch.randint(70, (2, 20))
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())


def test_costs_of_inference_by_counting():
    config = GPTConfig(sequence_len=512, vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=64, window_pattern="S")
    length = 300
    seen_by_last = 129 + 129 + 301
    assert costs.decode_flops(config, length) == 2 * costs.matmul_weights(config) + 4 * 64 * seen_by_last
    assert costs.kv_bytes_read(config, length, torch.bfloat16) == seen_by_last * 2 * 1 * 32 * 2


# ---- precision ----


def test_small_updates_survive_in_float32_masters():
    """1,000 updates of -0.001 on 0.8: lost in a bfloat16 table, not in our float32 masters of a bfloat16 model."""
    plain = torch.full((1,), 0.8, dtype=torch.bfloat16)
    for _ in range(1000):
        plain -= 0.001
    assert plain.item() == torch.tensor(0.8, dtype=torch.bfloat16).item()

    config = GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    model = GPT(config, dtype=torch.bfloat16)
    table = model.transformer.wte.weight
    torch.nn.init.constant_(table, 0.8)
    (group,) = [g for g in build_optimizer(model, param_groups(model.config)).param_groups if g["name"] == "wte"]
    group = group | {"lr": 0.001, "decay": 0.0}
    optimizer = MuonAdamW([group], rank=0, world_size=1, compile=False, dtype=model.dtype)
    table.grad = torch.ones_like(table)  # Adam's update on a constant gradient is the learning rate
    for _ in range(1000):
        optimizer.step()
    torch.testing.assert_close(table.data, torch.full_like(table, -0.2), rtol=0, atol=1e-3)


# ---- activation checkpointing ----


def loss_gradients_and_kept_bytes(model, x_BT, y_BT):
    """`kept`: bytes that the forward pass keeps for the backward pass, besides parameters."""
    kept, parameters = {}, {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x_BT, y_BT)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("member", FAMILY)
def test_activation_checkpointing_saves_memory_and_changes_no_bit(member):
    model = tiny(**FAMILY[member], n_layer=6)
    x_BT = torch.randint(model.config.vocab_size, (4, 33))
    loss, gradients, kept = loss_gradients_and_kept_bytes(model, x_BT[:, :-1], x_BT[:, 1:])
    model.zero_grad(set_to_none=True)
    model.activation_checkpointing = True
    same_loss, same_gradients, kept_less = loss_gradients_and_kept_bytes(model, x_BT[:, :-1], x_BT[:, 1:])
    assert torch.equal(loss, same_loss)
    assert all(map(torch.equal, gradients, same_gradients))
    assert kept_less < kept / 4


@pytest.mark.slow
@pytest.mark.skipif(not hardware.can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_activation_checkpointing_compiles_as_one_graph():
    model = tiny(n_layer=2)
    x_BT = torch.randint(model.config.vocab_size, (2, 33))
    loss, gradients, _ = loss_gradients_and_kept_bytes(model, x_BT[:, :-1], x_BT[:, 1:])
    model.zero_grad(set_to_none=True)
    model.activation_checkpointing = True
    compiled_loss = torch.compile(model, fullgraph=True, dynamic=False)(x_BT[:, :-1], x_BT[:, 1:])
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)
