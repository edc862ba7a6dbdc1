"""
Chunked cross entropy against F.cross_entropy on all logits: losses, gradients, precision, memory, compilation.

    python -m pytest tests/test_loss.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import hardware, loss
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss import cross_entropy, softcap

N, C, V, PADDED = 90, 16, 150, 192
CAPS = [15.0, 0.0]  # 0 = no softcap


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 32 * PADDED)  # of 32 rows, the last one of 26
    torch.manual_seed(0)


def inputs(dtype=torch.float32, scale=3.0):
    """Hidden states, lm_head, and targets of which some are -1. Logits go beyond the softcap of 15."""
    targets_N = torch.randint(V, (N,))
    targets_N[::7] = -1
    return torch.randn(N, C).to(dtype).requires_grad_(), (scale * torch.randn(PADDED, C)).requires_grad_(), targets_N


def plain(hidden_NC, head_VC, targets_N, reduction, cap=15.0):
    logits_NV = F.linear(hidden_NC, head_VC.to(hidden_NC.dtype))[:, :V].float()
    if cap:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=-1, reduction=reduction)


def chunked(hidden_NC, head_VC, targets_N, reduction, cap=15.0):
    return cross_entropy(hidden_NC, head_VC, targets_N, vocab_size=V, cap=cap, reduction=reduction)


def results(function, hidden_NC, head_VC, targets_N, reduction, cap=15.0):
    """The losses and both gradients, for an incoming gradient that is not 1."""
    losses = function(hidden_NC, head_VC, targets_N, reduction, cap)
    incoming = torch.linspace(0.5, 2.0, losses.numel()).view_as(losses)
    return losses.detach(), *torch.autograd.grad(losses, [hidden_NC, head_VC], incoming)


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_float32_losses_and_gradients_equal_plain_cross_entropy(reduction, cap):
    case = inputs()
    actuals = results(chunked, *case, reduction, cap)
    for actual, expected in zip(actuals, results(plain, *case, reduction, cap), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert error(actual, expected) < 1e-6


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_uncapped_logits_beyond_the_range_of_exp_stay_finite(reduction):
    case = inputs(scale=100.0)
    logits_NV = F.linear(case[0], case[1])
    assert logits_NV.max() > 500  # exp(500) is infinite in float32
    for actual, expected in zip(
        results(chunked, *case, reduction, 0.0), results(plain, *case, reduction, 0.0), strict=True
    ):
        assert error(actual, expected) < 1e-6


def test_softcap_bounds_logits_and_keeps_them_without_a_cap():
    logits = torch.tensor([-1000.0, -1.0, 0.0, 1.0, 1000.0])
    capped = softcap(logits, 15.0)
    torch.testing.assert_close(capped, torch.tensor([-15.0, -0.99852, 0.0, 0.99852, 15.0]), rtol=1e-4, atol=0)
    assert softcap(logits, 0.0) is logits


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bfloat16_error_is_no_larger_than_that_of_plain_cross_entropy(reduction):
    """The gradient of lm_head is rounded once per chunk instead of once, which differs only by noise."""
    hidden_NC, head_VC, targets_N = inputs(torch.bfloat16)
    exact = (hidden_NC.detach().double().requires_grad_(), head_VC.detach().bfloat16().double().requires_grad_())
    truth = results(plain, *exact, targets_N, reduction)
    ours = results(chunked, hidden_NC, head_VC, targets_N, reduction)
    theirs = results(plain, hidden_NC, head_VC, targets_N, reduction)
    assert [part.dtype for part in ours] == [torch.float32, torch.bfloat16, torch.float32]
    for actual, usual, expected in zip(ours, theirs, truth, strict=True):
        assert error(actual, expected) < max(1.1 * error(usual, expected), 1e-6)


def test_gradients_of_either_input_alone_and_of_none():
    hidden_NC, head_VC, targets_N = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            chunked(hidden_NC, head_VC, targets_N, "none"), plain(hidden_NC, head_VC, targets_N, "none")
        )
    for tensors in ((hidden_NC.detach(), head_VC), (hidden_NC, head_VC.detach())):
        (wanted,) = [tensor for tensor in tensors if tensor.requires_grad]
        (actual,) = torch.autograd.grad(chunked(*tensors, targets_N, "sum"), wanted)
        (expected,) = torch.autograd.grad(plain(*tensors, targets_N, "sum"), wanted)
        assert error(actual, expected) < 1e-6


def test_targets_of_minus_one_have_no_loss_and_no_gradient():
    hidden_NC, head_VC, targets_N = inputs()
    losses_N, grad_NC, grad_VC = results(chunked, hidden_NC, head_VC, targets_N, "none")
    assert (losses_N[targets_N < 0] == 0).all() and (grad_NC[targets_N < 0] == 0).all()
    assert (grad_NC[targets_N >= 0] != 0).any(dim=1).all()
    assert (grad_VC[V:] == 0).all()


class Allocations(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, and the most bytes that exist at once."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.peak = 0
        self.sizes = {}  # storage → bytes, of all that operations have returned and that still exist

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            storage = result.untyped_storage()
            self.sizes[StorageWeakRef(storage)] = storage.nbytes()
            self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
            self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_intermediate_is_larger_than_a_chunk(monkeypatch, reduction):
    with Allocations() as allocations:
        results(chunked, *inputs(), reduction)
    assert allocations.largest == 32 * PADDED


def test_compiled_code_has_few_chunks(monkeypatch):
    """torch.compile unrolls the loop over them."""
    assert loss.chunk_rows(90, PADDED, compiled=True) == 32
    assert loss.chunk_rows(9000, PADDED, compiled=True) == 9000 / loss.MAX_CHUNKS
    assert loss.chunk_rows(9000, PADDED, compiled=False) == 32


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("dtype, copies", [(torch.float32, 2.0), (torch.bfloat16, 2.5)])
def test_peak_memory_is_a_few_copies_of_a_chunk(dtype, copies, cap):
    case = inputs(dtype)
    with Allocations() as allocations:
        results(chunked, *case, "sum", cap)
    chunk, gradients = 4 * 32 * PADDED, case[0].nbytes + case[1].nbytes
    assert allocations.peak < copies * chunk + 3 * gradients


@pytest.mark.skipif(not hardware.can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("cap", CAPS)
def test_compiled_as_one_graph_equals_eager(cap):
    case = inputs()
    compiled = torch.compile(chunked, fullgraph=True, dynamic=False)
    for actual, expected in zip(results(compiled, *case, "sum", cap), results(chunked, *case, "sum", cap), strict=True):
        assert error(actual, expected) < 1e-5


def test_the_models_loss_has_the_gradients_of_its_logits():
    model = GPT.create(GPTConfig(sequence_len=N, vocab_size=V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    ids = torch.randint(V, (1, N + 1))
    x, y = ids[:, :-1], ids[:, 1:]
    gradients = []
    for value in (model(x, y), F.cross_entropy(model(x).flatten(0, 1), y.flatten())):
        gradients.append(torch.autograd.grad(value, [model.lm_head.weight, model.smear_gate.weight]))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-8)
