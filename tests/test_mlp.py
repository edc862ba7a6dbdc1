"""
The fused MLP: its kernel in Triton's interpreter, which computes on a CPU, and the choice between it and the formula.

    python -m pytest tests/test_mlp.py
    TRITON_INTERPRET=1 python -m pytest tests/test_mlp.py     # the kernel too, if the package triton is installed
"""

import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from factories import NEEDS_NUMBERS, tiny_gpt

from nanochat import fp8
from nanochat.kernels import mlp
from nanochat.muon import build_optimizer
from nanochat.recipe import param_groups

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= mlp.MIN_CAPABILITY
# Triton reads the variable when it is imported, so a test cannot set it.
CAN_RUN = importlib.util.find_spec("triton") is not None and (HAS_GPU or os.environ.get("TRITON_INTERPRET") == "1")
NEEDS_TRITON = pytest.mark.skipif(not CAN_RUN, reason="needs the package triton, and a GPU or TRITON_INTERPRET=1")
CUDA = torch.device("cuda", 0)
DEVICE = CUDA if HAS_GPU else torch.device("cpu")
# The interpreter multiplies the bits of bfloat16 as whole numbers (Triton 3.6).
DTYPES = [torch.bfloat16] if HAS_GPU else [torch.float16, torch.float32]


def runs_kernel(test):
    """Marks a test that runs the kernel: on a GPU if there is one, else in the interpreter."""
    return NEEDS_TRITON(NEEDS_NUMBERS(pytest.mark.gpu(test) if HAS_GPU else test))


@pytest.fixture
def relu2():
    from nanochat.kernels import relu2

    return relu2


# ---- the kernel ----


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [96, 128, 200])
def test_fused_mlp_is_as_exact_as_the_formula(relu2, dtype, num_tokens):
    inputs, grad = mlp.random_inputs(64, num_tokens, DEVICE, dtype)
    exact = mlp.output_and_gradients(mlp.plain, [x.double() for x in inputs], grad.double())
    fused = mlp.output_and_gradients(relu2.mlp, inputs, grad)
    formula = mlp.output_and_gradients(mlp.plain, inputs, grad)
    for ours, theirs, reference in zip(fused, formula, exact, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error, formula_error = (float((y.double() - reference).norm() / reference.norm()) for y in (ours, theirs))
        assert error < 1.1 * formula_error + 1e-6


@runs_kernel
def test_probe_passes_the_fused_mlp_and_fails_a_wrong_one(relu2):
    mlp.probe(relu2.mlp, 64, DEVICE, DTYPES[0])
    with pytest.raises(ValueError, match="the output is wrong by"):
        mlp.probe(lambda x, w1, w2: 1.05 * relu2.mlp(x, w1, w2), 64, DEVICE, DTYPES[0])


@runs_kernel
def test_compiled_fused_mlp_is_one_graph_and_equals_eager(relu2):
    torch._dynamo.reset()
    inputs, grad = mlp.random_inputs(64, 128, DEVICE, DTYPES[0])
    compiled = torch.compile(relu2.mlp, fullgraph=True, dynamic=False, backend="aot_eager")
    results = [mlp.output_and_gradients(kernel, inputs, grad) for kernel in (compiled, relu2.mlp)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@runs_kernel
def test_operators_are_registered_correctly(relu2):
    (x, w1, w2), grad = mlp.random_inputs(64, 96, DEVICE, DTYPES[0])
    torch.library.opcheck(relu2.relu2_linear, (x, w1), test_utils=("test_schema", "test_faketensor"))
    a = relu2.relu2_linear(x, w1)
    torch.library.opcheck(relu2.relu2_linear_backward, (grad, w2, a), test_utils=("test_schema", "test_faketensor"))


# ---- in a model ----


def loss_and_gradients(model):
    ids = torch.arange(64).view(2, 32)
    loss = model(ids, ids)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def test_model_uses_the_kernel_in_training_only():
    calls = []

    def kernel(*arguments):
        calls.append(arguments)
        return mlp.plain(*arguments)

    model = tiny_gpt()
    expected = loss_and_gradients(model)
    model.use_mlp(kernel)
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model), expected, strict=True))
    assert len(calls) == model.config.n_layer
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert len(calls) == model.config.n_layer


def test_fp8_layers_replace_the_kernel():
    model = tiny_gpt()
    model.use_mlp(mlp.plain)
    fp8.use_fp8(model, build_optimizer(model, param_groups(model.config)), compile=False)
    assert all(block.mlp.fused is None for block in model.transformer.h)


# ---- the choice ----


def choose(C=768, device=CUDA, dtype=torch.bfloat16):
    lines = []
    return mlp.choose(C, 4096, device, dtype, compile=False, log=lines.append), lines


@pytest.fixture
def on_ampere(monkeypatch):
    """As if there were a GPU on which the kernel works: it takes 1 ms, the formula 2."""
    module = SimpleNamespace(mlp=lambda x, w1, w2: x, MULTIPLE=64)
    monkeypatch.setitem(sys.modules, "nanochat.kernels.relu2", module)
    monkeypatch.setattr("nanochat.kernels.relu2", module, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(mlp, "probe", lambda *_: None)
    monkeypatch.setattr(mlp, "_milliseconds", lambda *_: [1.0, 2.0])
    return module


def test_choose_takes_the_fused_mlp_where_it_is_faster(on_ampere, monkeypatch):
    assert choose() == (on_ampere.mlp, ["MLP: fused 1.00 ms, plain 2.00 ms: fused"])
    monkeypatch.setattr(mlp, "_milliseconds", lambda *_: [2.0, 1.5])
    assert choose() == (None, ["MLP: fused 2.00 ms, plain 1.50 ms: plain"])


def test_choose_logs_why_the_fused_mlp_does_not_work(on_ampere, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(mlp, "probe", fail)
    assert choose() == (None, ["MLP: the fused kernel does not work here (RuntimeError: no such instruction)"])


@pytest.mark.parametrize("unsupported", [{"C": 96}, {"dtype": torch.float32}, {"device": torch.device("cpu")}])
def test_choose_takes_the_formula_elsewhere(on_ampere, unsupported):
    assert choose(**unsupported) == (None, [])


def test_choose_takes_the_formula_on_old_cards_and_without_triton(on_ampere, monkeypatch):
    monkeypatch.delattr("nanochat.kernels.relu2")
    monkeypatch.setitem(sys.modules, "nanochat.kernels.relu2", None)
    assert choose() == (None, [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose() == (None, [])


@pytest.mark.parametrize("num_tokens", [128, 256])  # 256: inputs and a weight have equal shapes
def test_timing_measures_forward_and_backward(num_tokens):
    fused, formula = mlp._milliseconds((mlp.plain, mlp.plain), 64, num_tokens, torch.device("cpu"), False)
    assert 0 < fused < 1000 and 0 < formula < 1000
