"""
FP8 training (--fp8): the linear layers of the blocks compute in 8 bits, on GPUs from Ada and Hopper on.

A float8 number has a range of a few powers of two only, so each tensor is divided by a scale first, and the product is
multiplied by both scales. All three products of a layer run in FP8: y = x W^T in the forward pass, dx = dy W and
dW = dy^T x in the backward pass. Activations and weights use e4m3 (more precision), gradients e5m2 (more range), with
one scale per tensor (arXiv 2209.05433).

The scale follows from the tensor's own largest magnitude ("dynamic scaling"): there is no history of maxima to keep in
checkpoints, and torch.compile fuses the maximum and the cast with the operation before them. Weights change once per
optimizer step, so they are cast after the step and not in every micro-batch. In eval mode the layers are ordinary ones.

Shapes: M rows (tokens), K input features, N output features.
"""

import torch
import torch.nn as nn

from nanochat.common import UserError
from nanochat.distributed import warn0
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.muon import MuonAdamW

FORWARD = torch.float8_e4m3fn
BACKWARD = torch.float8_e5m2
MULTIPLE = 16  # the kernels require it of every dimension
MIN_FEATURES = 128  # of a layer's inputs and outputs: below, the casts cost more than the product saves
MIN_AMAX = 1e-30  # keeps the scale of an all-zero tensor above 0; gradients are far larger
MIN_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0


def check_support(config: GPTConfig, rows: int, device: torch.device, *, compile: bool) -> None:
    """
    UserError unless this device can train the model in FP8 with this many rows (tokens) per micro-batch. Warns if that
    will be slow, because the model is not compiled.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            "--fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), "
            f"the device is {name}: leave out --fp8"
        )
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


def use_fp8(model: GPT, optimizer: MuonAdamW, compile: bool) -> list["Fp8Linear"]:
    """
    Replaces the large linear layers of the blocks by FP8 layers and returns these. The optimizer casts their weights
    after every step. Parameters stay the same objects under the same names, so checkpoints do not change.

    Call it when the weights have their values, and before the model is compiled.
    """
    layers = []
    for parent in list(model.transformer.h.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and _is_large(child):
                layer = Fp8Linear(child)
                setattr(parent, name, layer)
                layers.append(layer)
    cast_weight = torch.compile(_cast_weight, dynamic=False) if compile else _cast_weight

    def cast_weights(*_: object) -> None:
        for layer in layers:
            cast_weight(layer.weight.detach(), layer.weight_NK, layer.weight_KN, layer.scale)

    cast_weights()
    optimizer.register_step_post_hook(cast_weights)
    return layers


def _is_large(linear: Linear) -> bool:
    return all(n >= MIN_FEATURES and n % MULTIPLE == 0 for n in linear.weight.shape)


class Fp8Linear(Linear):
    """
    A linear layer that shares the weight of another one and keeps FP8 copies of it in both layouts: one for the forward
    and one for the backward pass. Code that changes the weight must update the copies (_cast_weight).
    """

    weight_NK: torch.Tensor
    weight_KN: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        with torch.device("meta"):  # no memory and no random numbers for a weight that is replaced
            super().__init__(linear.in_features, linear.out_features)
        self.weight = linear.weight
        N, K = linear.weight.shape
        device = linear.weight.device
        self.register_buffer("weight_NK", torch.empty(N, K, dtype=FORWARD, device=device), persistent=False)
        self.register_buffer("weight_KN", torch.empty(K, N, dtype=FORWARD, device=device), persistent=False)
        self.register_buffer("scale", torch.empty((), device=device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        x_MK = x.reshape(-1, x.size(-1))
        y_MN = _Fp8Product.apply(x_MK, self.weight, self.weight_NK, self.weight_KN, self.scale)
        return y_MN.view(*x.shape[:-1], -1)


class _Fp8Product(torch.autograd.Function):
    """
    x W^T from the FP8 copies of the weight. The weight itself is an argument only so that it receives a gradient.
    Partial sums are kept short ("fast accumulation") in the forward pass only, as in torchao.
    """

    @staticmethod
    def forward(ctx, x_MK, weight, weight_NK, weight_KN, weight_scale):
        x8_MK, x_scale = quantize(x_MK, FORWARD)
        ctx.save_for_backward(x8_MK, x_scale, weight_KN, weight_scale)
        ctx.weight_dtype = weight.dtype
        return scaled_product(x8_MK, weight_NK.T, x_scale, weight_scale, dtype=x_MK.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad_MN):
        x8_MK, x_scale, weight_KN, weight_scale = ctx.saved_tensors
        g8_MN, g_scale = quantize(grad_MN, BACKWARD)
        grad_x_MK = scaled_product(g8_MN, weight_KN.T, g_scale, weight_scale, dtype=grad_MN.dtype)
        g8_NM, x8_KM = g8_MN.T.contiguous(), x8_MK.T.contiguous()
        grad_weight_NK = scaled_product(g8_NM, x8_KM.T, g_scale, x_scale, dtype=ctx.weight_dtype)
        return grad_x_MK, grad_weight_NK, None, None, None


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
def _cast_weight(weight: torch.Tensor, weight_NK: torch.Tensor, weight_KN: torch.Tensor, scale: torch.Tensor) -> None:
    """Updates the FP8 copies of a layer from its weight."""
    quantized_NK, new_scale = quantize(weight, FORWARD)
    weight_NK.copy_(quantized_NK)
    weight_KN.copy_(quantized_NK.T)
    scale.copy_(new_scale)
