"""
FP8 training (--fp8): the linear layers of the blocks compute in 8 bits, on GPUs from Ada and Hopper on.

A float8 number has a range of a few powers of two only, so each tensor is divided by a scale first, and the product is
multiplied by both scales. All three products of a layer run in FP8: y = x W^T in the forward pass, dx = dy W and
dW = dy^T x in the backward pass. Activations and weights use e4m3 (more precision), gradients e5m2 (more range), with
one scale per tensor (arXiv 2209.05433).

The scale follows from the tensor's own largest magnitude ("dynamic scaling"): there is no history of maxima to keep in
checkpoints, and torch.compile fuses the maximum and the cast with the operation before them. Weights change once per
optimizer step, so they are cast after the step and not in every micro-batch. In eval mode the layers are ordinary ones.

One scale serves all tokens of a micro-batch, so other rows and later tokens influence how a token is rounded. Replacing
them changes the log-probabilities of a random model (depth 4, width 256) by 1.5 % in the norm, as much as the rounding
itself does. In eval mode no result depends on a later token (tests/test_leaks.py).

Shapes: M rows (tokens), K input features, N output features.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn as nn

from nanochat.common import UserError
from nanochat.distributed import warn0
from nanochat.gpt import GPT, Block, GPTConfig
from nanochat.linear import JointLinear, Linear
from nanochat.muon import MuonAdamW

FORWARD = torch.float8_e4m3fn
BACKWARD = torch.float8_e5m2
MULTIPLE = 16  # the kernels require it of every dimension
MIN_FEATURES = 128  # of a layer's inputs and outputs: below, the casts cost more than the product saves
MIN_AMAX = 1e-30  # keeps the scale of an all-zero tensor above 0; gradients are far larger
MAX_ERROR = 0.1  # of a product of random matrices, relative in the norm; the rounding to 8 bits makes 0.04
MIN_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0


def check_support(config: GPTConfig, rows: int, device: torch.device, *, compile: bool) -> None:
    """
    UserError unless this device can train the model in FP8 with this many rows (tokens) per micro-batch. Warns if that
    will be slow, because the model is not compiled.
    """
    if torch.version.hip:
        raise UserError("--fp8 needs an NVIDIA GPU, this is torch for AMD: leave out --fp8")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            "--fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), "
            f"the device is {name}: leave out --fp8"
        )
    problem = probe(device)
    if problem:
        raise UserError(f"--fp8 does not work here ({problem}): leave out --fp8")
    if config.n_embd % MULTIPLE or config.n_embd < MIN_FEATURES:
        raise UserError(
            f"--fp8 needs a width of at least {MIN_FEATURES} and a multiple of {MULTIPLE}, this model has "
            f"{config.n_embd}: raise --depth, or leave out --fp8"
        )
    if rows % MULTIPLE:
        raise UserError(
            f"--fp8 needs --device-batch-size x --max-seq-len to be a multiple of {MULTIPLE}, not {rows}: change either"
        )
    if not compile:
        warn0(
            "--fp8 without torch.compile is about 4 times as slow as bfloat16, because every cast is a kernel of its "
            "own: leave out --fp8, or compile"
        )


def works_on(device: torch.device) -> bool:
    """Whether this device multiplies in FP8. A trial decides, where the hardware has the units."""
    has_units = device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    return has_units and not torch.version.hip and not probe(device)


def probe(device: torch.device) -> str:
    """Tries a product in FP8 and compares it with the exact one. Returns what is wrong, or an empty string."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(64, 256, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    try:
        (a8, scale_a), (b8, scale_b) = quantize(a, FORWARD), quantize(b, FORWARD)
        product = scaled_product(a8, b8.T, scale_a, scale_b, dtype=torch.bfloat16, fast=True)
    except RuntimeError as error:  # of torch, cuBLAS or the driver
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    exact = a.float() @ b.float().T
    error_norm = (product.float() - exact).norm() / exact.norm()
    return "" if error_norm < MAX_ERROR else f"a product is wrong by {error_norm:.0%}"


def use_fp8(model: GPT, optimizer: MuonAdamW, compile: bool) -> list["Fp8Linear | Fp8JointLinear"]:
    """
    Replaces the large linear layers of the blocks by FP8 layers and returns these; queries, keys and values are one
    layer. The optimizer casts their weights after every step. Parameters stay the same objects under the same names, so
    checkpoints do not change.

    Call it when the weights have their values, and before the model is compiled.
    """
    layers: list[Fp8Linear | Fp8JointLinear] = []
    for block in cast(Iterable[Block], model.transformer.h):
        attn, mlp = block.attn, block.mlp
        mlp.fused = None  # multiplies in bfloat16
        if _is_large(*attn.c_qkv.linears):
            attn.c_qkv = Fp8JointLinear(attn.c_qkv)
            layers.append(attn.c_qkv)
        for parent, name in ((attn, "c_proj"), (mlp, "c_fc"), (mlp, "c_proj")):
            linear = getattr(parent, name)
            if _is_large(linear):
                layer = Fp8Linear(linear)
                setattr(parent, name, layer)
                layers.append(layer)
    cast_weights = torch.compile(_cast_weights, dynamic=False) if compile else _cast_weights

    def cast_all(*_: object) -> None:
        for layer in layers:
            cast_weights([weight.detach() for weight in layer.weights], *layer.fp8.buffers())

    cast_all()
    optimizer.register_step_post_hook(cast_all)
    return layers


def _is_large(*linears: Linear) -> bool:
    sizes = linears[0].in_features, sum(linear.out_features for linear in linears)
    return all(size >= MIN_FEATURES and size % MULTIPLE == 0 for size in sizes)


class Fp8Weight(nn.Module):
    """
    FP8 copies of a layer's weight, (N, K), in both layouts: one for the forward and one for the backward pass. Code
    that changes the weight must update them (_cast_weights).
    """

    weight_NK: torch.Tensor
    weight_KN: torch.Tensor
    scale: torch.Tensor

    def __init__(self, N: int, K: int, device: torch.device):
        super().__init__()
        self.register_buffer("weight_NK", torch.empty(N, K, dtype=FORWARD, device=device), persistent=False)
        self.register_buffer("weight_KN", torch.empty(K, N, dtype=FORWARD, device=device), persistent=False)
        self.register_buffer("scale", torch.empty((), device=device), persistent=False)

    def forward(self, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        """x (…, K) → (…, N). The weights themselves, joined by rows to (N, K), only receive gradients."""
        x_MK = x.reshape(-1, x.size(-1))
        y_MN = _Fp8Product.apply(x_MK, self.weight_NK, self.weight_KN, self.scale, *weights)
        return y_MN.view(*x.shape[:-1], -1)


class Fp8Linear(Linear):
    """A linear layer that shares the weight of another one. In eval mode it is an ordinary one."""

    def __init__(self, linear: Linear):
        with torch.device("meta"):  # no memory and no random numbers for a weight that is replaced
            super().__init__(linear.in_features, linear.out_features)
        self.weight = linear.weight
        self.fp8 = Fp8Weight(linear.out_features, linear.in_features, self.weight.device)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [self.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fp8(x, self.weights) if self.training else super().forward(x)


class Fp8JointLinear(JointLinear):
    """
    Several layers as one FP8 product. One scale serves all weights, as those of queries, keys and values are about as
    large as each other; their gradients may differ by powers of two, which e5m2 has 30 of.
    """

    def __init__(self, joint: JointLinear):
        super().__init__(*joint.linears)
        num_outputs = sum(linear.out_features for linear in joint.linears)
        self.fp8 = Fp8Weight(num_outputs, joint.linears[0].in_features, joint.weights[0].device)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.split(self.fp8(x, self.weights)) if self.training else super().forward(x)


class _Fp8Product(torch.autograd.Function):
    """
    x W^T from the FP8 copies of the weight. Partial sums are kept short ("fast accumulation") in the forward pass only,
    as in torchao.
    """

    @staticmethod
    def forward(ctx, x_MK, weight_NK, weight_KN, weight_scale, *weights):
        x8_MK, x_scale = quantize(x_MK, FORWARD)
        ctx.save_for_backward(x8_MK, x_scale, weight_KN, weight_scale)
        ctx.weight_dtype = weights[0].dtype
        ctx.num_rows = [weight.size(0) for weight in weights]
        return scaled_product(x8_MK, weight_NK.T, x_scale, weight_scale, dtype=x_MK.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad_MN):
        x8_MK, x_scale, weight_KN, weight_scale = ctx.saved_tensors
        g8_MN, g_scale = quantize(grad_MN, BACKWARD)
        grad_x_MK = scaled_product(g8_MN, weight_KN.T, g_scale, weight_scale, dtype=grad_MN.dtype)
        g8_NM, x8_KM = g8_MN.T.contiguous(), x8_MK.T.contiguous()
        grad_weight_NK = scaled_product(g8_NM, x8_KM.T, g_scale, x_scale, dtype=ctx.weight_dtype)
        return grad_x_MK, None, None, None, *grad_weight_NK.split(ctx.num_rows)


def scaled_product(a, b, scale_a, scale_b, *, dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
    """(scale_a * a) @ (scale_b * b) in the given dtype, of FP8 matrices: a row-major, b column-major."""
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """
    x in FP8, row-major, and its scale, a float32 scalar: x is about scale * result. The scale maps the largest
    magnitude to the largest number of the format.
    """
    scale = x.abs().amax().float().clamp_min(MIN_AMAX) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).contiguous(), scale


@torch.no_grad()
def _cast_weights(
    weights: list[torch.Tensor], weight_NK: torch.Tensor, weight_KN: torch.Tensor, scale: torch.Tensor
) -> None:
    """Updates the FP8 copies of a layer from its weights."""
    quantized_NK, new_scale = quantize(torch.cat(weights), FORWARD)
    weight_NK.copy_(quantized_NK)
    weight_KN.copy_(quantized_NK.T)
    scale.copy_(new_scale)
