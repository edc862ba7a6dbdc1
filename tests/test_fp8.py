"""
FP8 layers against the same arithmetic in float32: quantize, dequantize, multiply.

torch's FP8 product runs on CPUs too, but some compute 33 million operations per second with it. So here the product is
emulated in float32, which holds every FP8 number exactly; one test compares the emulation with the real product.

    python -m pytest tests/test_fp8.py
"""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from factories import NEEDS_NUMBERS

from nanochat import fp8
from nanochat.common import UserError
from nanochat.fp8 import Fp8JointLinear, Fp8Linear, quantize, use_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.linear import JointLinear, Linear
from nanochat.muon import build_optimizer
from nanochat.recipe import param_groups

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= fp8.MIN_CAPABILITY
NEEDS_GPU = [pytest.mark.gpu, NEEDS_NUMBERS, pytest.mark.skipif(not HAS_GPU, reason="no GPU with FP8")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
CONFIG = GPTConfig(sequence_len=32, vocab_size=96, n_layer=2, n_head=2, n_kv_head=1, n_embd=128)


def emulated_product(a, b, scale_a, scale_b, *, dtype, fast=False):
    assert a.is_contiguous() and b.T.is_contiguous()  # the real product requires these layouts
    return ((a.float() @ b.float()) * (scale_a * scale_b)).to(dtype)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    torch.manual_seed(0)
    if not HAS_GPU:
        monkeypatch.setattr(fp8, "scaled_product", emulated_product)


def dequantized(x, dtype):
    scale = x.float().abs().max() / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).float() * scale


def make_layer(features_in, features_out, device):
    layer = Fp8Linear(Linear(features_in, features_out).to(device))
    cast_weights(layer)
    return layer


def cast_weights(layer):
    fp8._cast_weights(layer.weights, *layer.fp8.buffers())


def make(dtype=torch.float32, with_fp8=True, seed=0):
    torch.manual_seed(seed)
    model = GPT.create(CONFIG, dtype=dtype)
    optimizer = build_optimizer(model, param_groups(model.config, weight_decay=0.0))
    layers = use_fp8(model, optimizer, compile=False) if with_fp8 else []
    return model.train(), optimizer, layers


def batch(step=0, rows=4):
    """Sequences that can be learned: each token follows from the previous one."""
    first = torch.randint(96, (rows, 1), generator=torch.Generator().manual_seed(step))
    ids_BT = (first * 7 + 5 * torch.arange(33)) % 96
    return ids_BT[:, :-1], ids_BT[:, 1:]


def train(model, optimizer, first, last, rows=4):
    losses = []
    for step in range(first, last):
        loss = model(*batch(step, rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- arithmetic ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format_a", [fp8.FORWARD, fp8.BACKWARD])
def test_emulated_product_equals_torchs(monkeypatch, dtype, format_a):
    monkeypatch.undo()
    device = "cuda" if HAS_GPU else "cpu"
    a, scale_a = quantize(torch.randn(16, 16, device=device), format_a)
    b, scale_b = quantize(torch.randn(32, 16, device=device), fp8.FORWARD)
    actual = fp8.scaled_product(a, b.T, scale_a, scale_b, dtype=dtype)
    expected = emulated_product(a, b.T, scale_a, scale_b, dtype=dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, precision", [(torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3)])
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_quantize_fills_the_range_of_the_format(dtype, precision, magnitude):
    x = magnitude * torch.randn(64, 64)
    quantized, scale = quantize(x, dtype)
    assert quantized.float().abs().max() == torch.finfo(dtype).max
    error = (quantized.float() * scale - x).abs()
    smallest = torch.finfo(dtype).smallest_normal * scale  # below it precision falls
    assert (error <= precision * x.abs().clamp_min(smallest) * 1.001).all()


def test_quantize_keeps_zeros_and_infinities():
    quantized, scale = quantize(torch.zeros(4, 4), torch.float8_e4m3fn)
    assert (quantized.float() * scale == 0).all()
    quantized, scale = quantize(torch.tensor([[1.0, float("inf")]]), torch.float8_e4m3fn)
    assert not (quantized.float() * scale).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_layer_equals_float32_arithmetic_on_quantized_tensors(device, dtype, tolerance):
    if device == "cuda":  # the tensor cores of an H100 add up FP8 products with fewer bits than float32: 2e-4 measured
        tolerance = max(tolerance, 1e-3)
    layer = make_layer(256, 144, device)
    x = torch.randn(4, 8, 256, device=device).to(dtype).requires_grad_()
    grad = 1e-6 * torch.randn(4, 8, 144, device=device).to(dtype)
    y = layer(x)
    grad_x, grad_weight = torch.autograd.grad(y, [x, layer.weight], grad)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)

    x8, weight8 = (dequantized(t.detach(), torch.float8_e4m3fn) for t in (x, layer.weight))
    grad8 = dequantized(grad, torch.float8_e5m2)
    expected_weight = grad8.flatten(0, 1).T @ x8.flatten(0, 1)
    for actual, expected in ((y, x8 @ weight8.T), (grad_x, grad8 @ weight8), (grad_weight, expected_weight)):
        assert (actual.float() - expected).norm() < tolerance * expected.norm()
    exact = F.linear(x.float(), layer.weight)
    assert 1e-3 < (y.float() - exact).norm() / exact.norm() < 0.06  # the error of FP8, and not more


@pytest.mark.parametrize("device", DEVICES)
def test_joint_layer_equals_one_layer_with_all_weights_and_quantizes_once(device, monkeypatch):
    quantized = []
    monkeypatch.setattr(fp8, "quantize", lambda x, dtype: quantized.append(dtype) or quantize(x, dtype))
    linears = [Linear(128, n).to(device) for n in (128, 32, 64)]
    joint = Fp8JointLinear(JointLinear(*linears))
    single = make_layer(128, 224, device)
    with torch.no_grad():
        single.weight.copy_(torch.cat(joint.weights))
    cast_weights(joint)
    cast_weights(single)
    x, grad = torch.randn(2, 16, 128, device=device, requires_grad=True), torch.randn(2, 16, 224, device=device)
    quantized.clear()
    outputs = joint(x)
    grad_x, *grad_weights = torch.autograd.grad(outputs, [x, *joint.weights], joint.split(grad))
    assert quantized == [fp8.FORWARD, fp8.BACKWARD]
    expected = single(x)
    expected_grad_x, expected_grad_weight = torch.autograd.grad(expected, [x, single.weight], grad)
    assert [y.size(-1) for y in outputs] == [128, 32, 64] and torch.equal(torch.cat(outputs, dim=-1), expected)
    assert torch.equal(grad_x, expected_grad_x) and torch.equal(torch.cat(grad_weights), expected_grad_weight)
    assert [g.shape for g in grad_weights] == [linear.weight.shape for linear in linears]


@pytest.mark.parametrize("device", DEVICES)
def test_layer_with_zero_weights_has_finite_gradients(device):
    layer = make_layer(128, 128, device)
    torch.nn.init.zeros_(layer.weight)
    cast_weights(layer)
    x = torch.randn(16, 128, device=device, requires_grad=True)
    y = layer(x)
    grad_x, grad_weight = torch.autograd.grad(y, [x, layer.weight], torch.ones_like(y))
    assert (y == 0).all() and (grad_x == 0).all()
    assert grad_weight.isfinite().all() and (grad_weight != 0).any()


# ---- in a model ----


def test_use_fp8_replaces_large_layers_and_keeps_parameters():
    plain, _, _ = make(with_fp8=False)
    model, optimizer, layers = make()
    blocks = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear | Fp8JointLinear)}
    large = ("attn.c_qkv", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert blocks == {f"transformer.h.{i}.{name}" for i in (0, 1) for name in large}
    assert len(layers) == 8
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}


def test_weights_are_cast_once_per_optimizer_step(monkeypatch):
    casts = []
    cast_weights = fp8._cast_weights
    monkeypatch.setattr(fp8, "_cast_weights", lambda *tensors: casts.append(1) or cast_weights(*tensors))
    model, optimizer, layers = make()
    assert len(casts) == len(layers)
    for _ in range(3):
        model(*batch()).backward()
    assert len(casts) == len(layers)
    optimizer.step()
    assert len(casts) == 2 * len(layers)
    for layer in layers:
        copy_NK = layer.fp8.weight_NK.float() * layer.fp8.scale
        torch.testing.assert_close(copy_NK, dequantized(torch.cat(layer.weights).detach(), torch.float8_e4m3fn))
        assert torch.equal(layer.fp8.weight_KN.float().T, layer.fp8.weight_NK.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_mode_equals_a_model_without_fp8(dtype):
    model, optimizer, _ = make(dtype)
    train(model, optimizer, 0, 2)
    plain, _, _ = make(dtype, with_fp8=False)
    plain.load_state_dict(model.state_dict())
    x, y = batch(9)
    with torch.no_grad():
        assert torch.equal(model.eval()(x, y), plain(x, y))
        assert not torch.equal(model.train()(x, y), plain(x, y))


@pytest.mark.slow
def test_alternating_training_and_evaluation_compiles_once_each():
    model, optimizer, _ = make()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(model, dynamic=False, fullgraph=True, backend=counter)
    graphs = []
    for step in range(4):
        fast.train()
        fast(*batch(step), reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()
        fast.eval()
        with torch.no_grad():
            fast(*batch(step), reduction="none")
        graphs.append(counter.frame_count)
    assert graphs == [2, 2, 2, 2]  # one graph to train, one to evaluate


@pytest.mark.slow
def test_layer_compiles_into_one_graph():
    layer = make_layer(128, 144, "cpu")
    x, grad = torch.randn(32, 128, requires_grad=True), torch.randn(32, 144)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")):
        y = function(x)
        results.append((y.detach(), *torch.autograd.grad(y, [x, layer.weight], grad)))
    for eager, compiled in zip(*results, strict=True):
        assert (compiled - eager).norm() < 1e-3 * eager.norm()  # another rounding of a scale can move some casts


@pytest.mark.slow
def test_loss_curve_follows_that_of_bfloat16():
    curves = [train(*make(torch.bfloat16, with_fp8)[:2], 0, 40, rows=8) for with_fp8 in (False, True)]
    last = [sum(curve[-5:]) / 5 for curve in curves]
    assert last[0] < 0.8 * curves[0][0]
    assert last[1] == pytest.approx(last[0], rel=0.005)
    assert curves[0] != curves[1]


def test_resuming_needs_no_fp8_state():
    model, optimizer, _ = make()
    train(model, optimizer, 0, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.full_state()))
    expected = train(model, optimizer, 2, 4)

    model, optimizer, _ = make(with_fp8=False, seed=1)
    model.load_state_dict(saved[0])
    optimizer.load_full_state(saved[1])
    use_fp8(model, optimizer, compile=False)
    assert train(model, optimizer, 2, 4) == expected


# ---- unsupported devices and sizes ----


@pytest.mark.parametrize(
    "capability, width, rows, part",
    [((8, 6), 128, 64, "the device is Old Card"), ((9, 0), 96, 64, "this model has 96"), ((9, 0), 128, 40, "not 40")],
)
def test_unsupported_training_is_a_user_error_with_the_reason(monkeypatch, capability, width, rows, part):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(fp8, "probe", lambda device: "")
    config = GPTConfig(n_head=1, n_kv_head=1, n_embd=width)
    with pytest.raises(UserError, match=part) as caught:
        fp8.check_support(config, rows, torch.device("cuda", 0), compile=True)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fp8.check_support(CONFIG, 64, torch.device("cuda", 0), compile=True)


@pytest.mark.parametrize(
    "factor, problem", [(1.0, ""), (1.5, "a product is wrong by 50%"), (None, "RuntimeError: none")]
)
def test_probe_tries_a_product(monkeypatch, factor, problem):
    def product(*arguments, **options):
        if factor is None:
            raise RuntimeError("none")
        return factor * emulated_product(*arguments, **options)

    monkeypatch.setattr(fp8, "scaled_product", product)
    assert fp8.probe(CPU) == problem
    assert not fp8.works_on(CPU)
    monkeypatch.setattr(fp8, "probe", lambda device, probe=fp8.probe: probe(CPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    assert fp8.works_on(gpu) == (not problem)
    if problem:
        with pytest.raises(UserError, match=f"{problem}.: leave out --fp8"):
            fp8.check_support(CONFIG, 64, gpu, compile=True)


def test_cpu_is_a_user_error():
    with pytest.raises(UserError, match="the device is cpu: leave out --fp8"):
        fp8.check_support(CONFIG, 64, CPU, compile=True)


def test_amd_gpu_is_a_user_error(monkeypatch):
    # Its compute capability would pass: torch reports 9.4 for an MI300, whose 8-bit numbers have another format.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(UserError, match="torch for AMD: leave out --fp8"):
        fp8.check_support(CONFIG, 64, torch.device("cuda", 0), compile=True)


def test_fp8_without_compiling_warns_in_one_line(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fp8, "probe", lambda device: "")
    fp8.check_support(CONFIG, 64, torch.device("cuda", 0), compile=True)
    assert not capsys.readouterr().err
    fp8.check_support(CONFIG, 64, torch.device("cuda", 0), compile=False)
    message = capsys.readouterr().err
    assert "--fp8 without torch.compile" in message and message.count("\n") == 1
