"""
Attention against the textbook formula: windows, grouped heads, a cache; the kernels that run on this machine, stand-ins
for packages that need a GPU, and the choice of a kernel.

    python -m pytest tests/test_attention.py
"""

import math
import sys
import types

import pytest
import torch
from factories import NEEDS_NUMBERS, tiny_gpt

from nanochat import attention
from nanochat.attention import (
    LOADERS,
    AttentionShape,
    attend,
    attend_cached,
    attend_masked,
    band_mask,
    choose,
    probe,
)
from nanochat.common import UserError
from nanochat.kernels import cpu


def naive_attention(q_BTHD, k_BSKD, v_BSKD, mask_BTS):
    """A masked softmax per query head; the mask is true where a query sees a key."""
    num_heads, group = q_BTHD.size(2), q_BTHD.size(2) // k_BSKD.size(2)
    outputs = []
    for head in range(num_heads):
        q, k, v = q_BTHD[:, :, head], k_BSKD[:, :, head // group], v_BSKD[:, :, head // group]
        scores_BTS = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~mask_BTS, -math.inf)
        outputs.append(scores_BTS.softmax(dim=-1) @ v)
    return torch.stack(outputs, dim=2)


def naive_window(num_tokens, window):
    """(1, T, T): query t sees t - window … t."""
    rows = [[max(t - window, 0) <= s <= t for s in range(num_tokens)] for t in range(num_tokens)]
    return torch.tensor(rows)[None]


def random_heads(num_tokens, num_heads, num_kv_heads, head_dim=8, rows=2):
    torch.manual_seed(0)
    shapes = [(rows, num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def rms_norm(x):
    return torch.nn.functional.rms_norm(x, (x.size(-1),))


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "num_tokens, window", [(1, 4), (7, 0), (33, 1), (37, 5), (64, 16), (61, 60), (61, 61), (62, 60), (5, 99)]
)
def test_attend_equals_a_masked_softmax_forward_and_backward(num_tokens, window, num_heads, num_kv_heads):
    qkv = random_heads(num_tokens, num_heads, num_kv_heads)
    weight = torch.randn(2, num_tokens, num_heads, 8)
    fast = attend(*qkv, window)
    fast_grads = torch.autograd.grad((fast * weight).sum(), qkv)
    slow = naive_attention(*qkv, naive_window(num_tokens, window))
    slow_grads = torch.autograd.grad((slow * weight).sum(), qkv)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for fast_grad, slow_grad in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_attend_ignores_keys_after_the_query_and_before_its_window(window):
    q, k, v = (x.detach() for x in random_heads(9, 2, 1))
    before = attend(q, k, v, window)
    k[:, 5], v[:, 5] = 50.0, 50.0
    changed = (attend(q, k, v, window) != before).flatten(2).any(-1).any(0)
    assert changed.tolist() == [5 <= t <= 5 + window for t in range(9)]


def test_band_mask_of_any_positions_and_range_of_keys():
    mask = band_mask(torch.tensor([[4, 5], [0, 9]]), 2, 7, window=2)  # keys 2 3 4 5 6
    assert mask.int().tolist() == [[[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]]
    assert torch.equal(band_mask(torch.arange(11), 0, 11, 4)[None], naive_window(11, 4))


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (4, 1)])
def test_attend_cached_equals_the_last_tokens_of_attend(num_heads, num_kv_heads):
    q, k, v = random_heads(23, num_heads, num_kv_heads)
    for new_tokens in (1, 6):
        positions_BT = torch.arange(23 - new_tokens, 23).expand(2, -1)
        mask_B1TS = band_mask(positions_BT, 0, 23, window=7).unsqueeze(1)
        cached = attend_cached(q[:, -new_tokens:], k, v, mask_B1TS)
        torch.testing.assert_close(cached, attend(q, k, v, 7)[:, -new_tokens:], rtol=1e-5, atol=1e-5)


# ---- the kernels ----


def window_shape(num_tokens=200, num_heads=4, num_kv_heads=2, head_dim=16, windows=(128, 200)):
    return AttentionShape(num_tokens, num_heads, num_kv_heads, head_dim, windows)


def assert_close(kernel, qkv, window, tolerance):
    """Compares output and gradients with those of naive_attention in float32, in the norm."""
    grad = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))
    expected_inputs = [x.detach().float().requires_grad_() for x in qkv]
    expected = naive_attention(*expected_inputs, naive_window(qkv[0].size(1), window))
    expected = [expected, *torch.autograd.grad(expected, expected_inputs, grad)]
    output = kernel(*qkv, window)
    found = [output, *torch.autograd.grad(output, qkv, grad.to(output.dtype))]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == qkv[0].dtype
        assert (a.float() - b).norm() <= tolerance * max(b.norm(), grad.norm())  # some gradients are exactly 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("num_tokens, window", [(1, 4), (128, 128), (300, 128), (300, 7), (257, 0), (300, 299)])
def test_blocks_equal_a_masked_softmax(num_tokens, window, num_heads, num_kv_heads, dtype, tolerance):
    q, k, v = random_heads(num_tokens, num_heads, num_kv_heads, head_dim=16)
    qkv = [x.detach().to(dtype).requires_grad_() for x in (1.2 * rms_norm(q), 1.2 * rms_norm(k), v)]
    assert_close(LOADERS["blocks"](), qkv, window, tolerance)


def test_blocks_do_not_depend_on_saved_weights_and_heads_at_a_time(monkeypatch):
    qkv, grad = random_heads(300, 4, 2), torch.randn(2, 300, 4, 8)
    results = []
    for saved, cached in ((2**24, 2**21), (0, 2**21), (2**24, 3 * 128 * 256), (0, 1)):
        monkeypatch.setattr(cpu, "SAVED_WEIGHTS", saved)
        monkeypatch.setattr(cpu, "CACHED_SCORES", cached)
        output = LOADERS["blocks"]()(*qkv, 128)
        results.append([output, *torch.autograd.grad(output, qkv, grad)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


def test_blocks_do_not_overflow_at_the_largest_scores_of_normed_heads():
    q = torch.ones(1, 130, 1, 128) * 1.2
    v = torch.randn(1, 130, 1, 128)
    mean = v.cumsum(dim=1) / torch.arange(1, 131)[:, None, None]  # all keys are alike
    torch.testing.assert_close(LOADERS["blocks"]()(q, q, v, 130), mean, rtol=1e-4, atol=1e-5)


def test_sdpa_equals_a_masked_softmax():
    for window in (5, 60):
        assert_close(LOADERS["sdpa"](), random_heads(61, 4, 2), window, 1e-5)


@pytest.mark.slow
def test_flex_forward_equals_a_masked_softmax():
    kernel = LOADERS["flex"]()
    q, k, v = (x.detach() for x in random_heads(64, 2, 1, head_dim=16))
    torch.testing.assert_close(kernel(q, k, v, 9), naive_attention(q, k, v, naive_window(64, 9)), rtol=1e-4, atol=1e-5)


def scores_and_lse(q, k, window):
    """(B, H, T, S) and (B, H, T), for keys of all query heads."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
    scores = scores.masked_fill(~naive_window(q.size(1), window)[:, None], -math.inf)
    return scores, scores.logsumexp(-1)


class StandIn(types.ModuleType):
    """A module that replaces a package of CUDA kernels: the same functions, computed on the CPU."""

    def __init__(self, name, wrong_by=0.0):
        super().__init__(name)
        self.wrong_by, self.calls = wrong_by, []

    def forward(self, q, k, v, window):
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        window = q.size(1) if window in (None, -1) else window
        self.calls.append(("forward", window))
        _, lse = scores_and_lse(q, k.repeat_interleave(q.size(2) // k.size(2), 2), window)
        return attend(q, k, v, window).contiguous() * (1 + self.wrong_by), lse

    def backward(self, grad, q, k, v, output, lse, window):
        assert grad.is_contiguous()
        window = q.size(1) if window in (None, -1) else window
        self.calls.append(("backward", window))
        group = q.size(2) // k.size(2)
        keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        p = (scores_and_lse(q, keys, window)[0] - lse[..., None]).exp()
        dp = torch.einsum("bthd,bshd->bhts", grad, values)
        ds = p * (dp - (grad * output).sum(-1).mT[..., None]) / q.size(-1) ** 0.5
        dk, dv = torch.einsum("bhts,bthd->bshd", ds, q), torch.einsum("bhts,bthd->bshd", p, grad)
        dk, dv = (x.unflatten(2, (-1, group)).sum(3).contiguous() for x in (dk, dv))
        return torch.einsum("bhts,bshd->bthd", ds, keys).contiguous(), dk, dv


class FA3(StandIn):
    def flash_attn_func(self, q, k, v, causal=False, window_size=(-1, -1), return_attn_probs=False):
        assert causal and window_size[1] == 0 and return_attn_probs
        return self.forward(q, k, v, window_size[0])

    def _flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        assert is_causal and window_size_right == 0 and softmax_scale == q.size(-1) ** -0.5
        assert (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k) == (None,) * 6
        for buffer, grad in zip((dq, dk, dv), self.backward(dout, q, k, v, out, softmax_lse, window_size_left)):  # noqa: B905
            buffer.copy_(grad)


class FA4(StandIn):
    def flash_attn_func(self, q, k, v, causal=False, window_size=(None, None), return_lse=False):
        assert causal and window_size[1] is None and return_lse
        return self.forward(q, k, v, window_size[0])

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, causal=False, window_size_left=None):
        assert causal
        return self.backward(dout, q, k, v, out, lse, window_size_left)


@pytest.fixture
def stand_in(monkeypatch):
    """A function that installs a stand-in for a package; afterwards, the loaders look for the real one again."""

    def install(name, **options):
        LOADERS[name].cache_clear()
        if name == "fa3":
            module = FA3(name, **options)
            monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
            return module
        module = FA4(name, **options)
        cute = types.ModuleType("flash_attn.cute")
        cute.interface = module
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
        monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)
        return module

    yield install
    for name in ("fa3", "fa4"):
        LOADERS[name].cache_clear()


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_packages_get_their_arguments_as_documented(stand_in, name):
    module = stand_in(name)
    kernel = LOADERS[name]()
    for window in (5, 36, 37, 99):
        assert_close(kernel, random_heads(37, 4, 2), window, 1e-5)
    assert module.calls == [(way, w) for w in (5, 37, 37, 37) for way in ("forward", "backward")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fa3", "fa4", "blocks"])
def test_operators_pass_opcheck_and_compile_into_one_graph(stand_in, name):
    if name != "blocks":
        stand_in(name)
    kernel, qkv = LOADERS[name](), random_heads(40, 4, 2)
    if name == "blocks":  # its operator takes blocks of heads
        heads = [torch.randn(2, 6, 128, 8, requires_grad=True) for _ in range(3)]
        for keep in (True, False):
            torch.library.opcheck(torch.ops.nanochat.blocks.default, (*heads, 7, keep))
    else:
        torch.library.opcheck(getattr(torch.ops.nanochat, name).default, (*qkv, 7))
    compiled = torch.compile(lambda *x: kernel(*x, 7).sin(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*qkv).sum(), qkv), torch.autograd.grad(kernel(*qkv, 7).sin().sum(), qkv)
    )


# ---- the choice ----


def choose_here(name="auto", dtype=torch.float32):
    """Name and function of the kernel chosen on the CPU, and the lines that were logged."""
    lines = []
    found, kernel = choose(name, window_shape(), torch.device("cpu"), dtype, lines.append)
    return found, kernel, lines


def test_auto_takes_blocks_on_a_cpu_where_onednn_multiplies(monkeypatch):
    assert choose_here(dtype=torch.bfloat16)[::2] == ("blocks", [])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert choose_here()[::2] == ("banded", [])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert choose_here()[::2] == ("blocks", [])
    assert choose_here(dtype=torch.float16)[::2] == ("banded", [])


@pytest.mark.parametrize(
    "capability, packages", [((9, 0), ("fa3", "fa4")), ((10, 3), ("fa4",)), ((12, 0), ()), ((8, 0), ()), ((7, 5), ())]
)
def test_auto_tries_packages_only_on_the_gpus_that_they_are_made_for(monkeypatch, capability, packages):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    candidates = attention._candidates(torch.device("cuda", 0), torch.bfloat16)
    assert candidates == (*packages, "flash", "flex", "banded")


def test_auto_skips_kernels_that_do_not_work_and_logs_why(monkeypatch, stand_in):
    monkeypatch.setattr(attention, "_candidates", lambda device, dtype: ("fa3", "fa4", "banded"))
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed: skipped without a line
    stand_in("fa3", wrong_by=0.1)
    name, kernel, lines = choose_here()
    assert (name, kernel) == ("banded", attend)
    assert len(lines) == 1 and "fa3 does not work here" in lines[0] and "output is wrong by 0.1" in lines[0]

    module = stand_in("fa3")
    module.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error:\nno kernel image"))
    name, _, lines = choose_here()
    assert name == "banded" and lines == [
        "attention: fa3 does not work here (RuntimeError: CUDA error: no kernel image), trying the next kernel"
    ]
    stand_in("fa3")
    assert choose_here()[::2] == ("fa3", [])


def test_named_kernel_that_does_not_work_is_a_user_error(monkeypatch):
    assert choose_here("sdpa")[:2] == ("sdpa", attend_masked)
    with pytest.raises(UserError, match="--attention best: unknown.*fa3.*banded"):
        choose_here("best")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    LOADERS["fa4"].cache_clear()
    with pytest.raises(UserError, match="--attention fa4: its package is not installed"):
        choose_here("fa4")
    with pytest.raises(UserError, match="--attention blocks does not work here .*float16"):
        choose_here("blocks", dtype=torch.float16)
    with pytest.raises(UserError, match="--attention flash does not work here"):
        choose_here("flash")


def test_model_trains_with_the_kernel_that_was_set():
    model = tiny_gpt(sequence_len=160, window_pattern="S")
    idx_BT = torch.randint(50, (2, 160))
    results = []
    for name in ("banded", "blocks"):
        model.use_attention(choose(name, model.config.attention_shape, torch.device("cpu"), torch.float32)[1])
        loss = model(idx_BT, idx_BT)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@NEEDS_NUMBERS
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa3", "fa4", "flash", "flex", "banded", "sdpa"])
def test_installed_kernel_works_compiled_on_a_gpu(name):
    device = torch.device("cuda")
    try:
        kernel = LOADERS[name]()
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    probe(kernel, AttentionShape(1024, 4, 2, 128, (256, 1024)), device, torch.bfloat16)
    compiled = torch.compile(lambda *x: kernel(*x), dynamic=False, fullgraph=True)
    probe(compiled, AttentionShape(1024, 4, 2, 128, (256, 1024)), device, torch.bfloat16)


@pytest.mark.parametrize("precision, within", [("highest", "highest"), ("high", "high"), ("medium", "highest")])
def test_small_products_change_the_precision_within_the_block_only(precision, within):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with attention.small_products():
            assert torch.get_float32_matmul_precision() == within
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
