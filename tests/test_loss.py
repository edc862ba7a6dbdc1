"""
Cross entropy by chunks against the plain one on all logits: losses, gradients, precision, memory, compiled.

    python -m pytest tests/test_loss.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import hardware, loss
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss import cross_entropy

N, C, V, PADDED, CAP = 90, 16, 150, 192, 15.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 32 * PADDED)  # of 32 rows, the last one of 26
    torch.manual_seed(0)


def inputs(dtype=torch.float32):
    """Hidden states, a head, targets of which some are left out; logits reach into the cap."""
    targets_N = torch.randint(V, (N,))
    targets_N[::7] = -1
    return torch.randn(N, C).to(dtype).requires_grad_(), (3 * torch.randn(PADDED, C)).requires_grad_(), targets_N


def plain(hidden_NC, head_VC, targets_N, reduction):
    logits_NV = F.linear(hidden_NC, head_VC.to(hidden_NC.dtype))[:, :V].float()
    return F.cross_entropy(CAP * torch.tanh(logits_NV / CAP), targets_N, ignore_index=-1, reduction=reduction)


def chunked(hidden_NC, head_VC, targets_N, reduction):
    return cross_entropy(hidden_NC, head_VC, targets_N, V, CAP, reduction)


def results(function, hidden_NC, head_VC, targets_N, reduction):
    """The losses and both gradients, for an incoming gradient that is not 1."""
    losses = function(hidden_NC, head_VC, targets_N, reduction)
    incoming = torch.linspace(0.5, 2.0, losses.numel()).view_as(losses)
    return losses.detach(), *torch.autograd.grad(losses, [hidden_NC, head_VC], incoming)


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_float32_equals_the_plain_way(reduction):
    case = inputs()
    for actual, expected in zip(results(chunked, *case, reduction), results(plain, *case, reduction), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert error(actual, expected) < 1e-6


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bfloat16_is_as_close_to_the_truth_as_the_plain_way(reduction):
    """The head's gradient is rounded once per chunk instead of once, which is the same in all but noise."""
    hidden_NC, head_VC, targets_N = inputs(torch.bfloat16)
    exact = (hidden_NC.detach().double().requires_grad_(), head_VC.detach().bfloat16().double().requires_grad_())
    truth = results(plain, *exact, targets_N, reduction)
    ours = results(chunked, hidden_NC, head_VC, targets_N, reduction)
    theirs = results(plain, hidden_NC, head_VC, targets_N, reduction)
    assert [part.dtype for part in ours] == [torch.float32, torch.bfloat16, torch.float32]
    for actual, usual, expected in zip(ours, theirs, truth, strict=True):
        assert error(actual, expected) < max(1.1 * error(usual, expected), 1e-6)


def test_without_gradients_and_with_only_one_of_them():
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


def test_targets_left_out_have_no_loss_and_no_gradient():
    hidden_NC, head_VC, targets_N = inputs()
    losses_N, grad_NC, grad_VC = results(chunked, hidden_NC, head_VC, targets_N, "none")
    assert (losses_N[targets_N < 0] == 0).all() and (grad_NC[targets_N < 0] == 0).all()
    assert (grad_NC[targets_N >= 0] != 0).any(dim=1).all()
    assert (grad_VC[V:] == 0).all()


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that a result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nothing_is_larger_than_a_chunk(monkeypatch, reduction):
    case = inputs()
    with LargestTensor() as largest:
        results(chunked, *case, reduction)
    assert largest.elements == 32 * PADDED
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)  # no more than MAX_CHUNKS chunks: of 12 rows then
    with LargestTensor() as largest:
        results(chunked, *case, reduction)
    assert largest.elements == max(12 * PADDED, PADDED * C)


@pytest.mark.skipif(not hardware.can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_compiled_without_a_break():
    case = inputs()
    compiled = torch.compile(chunked, fullgraph=True, dynamic=False)
    for actual, expected in zip(results(compiled, *case, "sum"), results(chunked, *case, "sum"), strict=True):
        assert error(actual, expected) < 1e-5


def test_the_model_trains_on_it():
    model = GPT.create(GPTConfig(sequence_len=N, vocab_size=V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    ids = torch.randint(V, (1, N + 1))
    x, y = ids[:, :-1], ids[:, 1:]
    gradients = []
    for value in (model(x, y), F.cross_entropy(model(x).flatten(0, 1), y.flatten())):
        gradients.append(torch.autograd.grad(value, [model.lm_head.weight, model.smear_gate.weight]))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-8)
