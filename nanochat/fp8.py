"""
FP8 linear layers for training: e4m3 for activations and weights, e5m2 for gradients, one scale per tensor (arXiv
2209.05433). All three products of a layer, forward and backward, are in FP8.

A scale follows from the largest magnitude at hand, so there is no history to keep or to save. It is plain torch code:
torch.compile fuses casts and maxima with what comes before them. Weights change once per optimizer step, so they are
cast after it rather than in every micro-batch. In eval mode the layers are ordinary ones that compute in x's dtype.

Shapes: M rows (tokens), K input features, N output features.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn as nn

from nanochat.common import UserError
from nanochat.gpt import GPT, Block, GPTConfig, Linear
from nanochat.muon import MuonAdamW

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2  # more precision, more range
MULTIPLE = 16  # what the kernels ask of every dimension
MIN_FEATURES = 128  # of either side of a layer; below it the casts cost more than the product saves (specification)
MIN_AMAX = 1e-30  # keeps the scale of an all-zero tensor finite, far below what gradients come to
MIN_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0


def check(config: GPTConfig, rows: int, device: torch.device) -> None:
    """UserError unless this device can train the model in FP8 with that many rows (tokens) at a time."""
    needed = "a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        raise UserError(f"--fp8 needs {needed}, the device is {device.type}: leave out --fp8")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--fp8 needs {needed}, {name} has {capability[0]}.{capability[1]}: leave out --fp8")
    if config.n_embd % MULTIPLE or config.n_embd < MIN_FEATURES:
        raise UserError(
            f"--fp8 needs a width of at least {MIN_FEATURES} and a multiple of {MULTIPLE}, this model has "
            f"{config.n_embd}: raise --depth, or leave out --fp8"
        )
    if rows % MULTIPLE:
        raise UserError(
            f"--fp8 needs --device-batch-size x --max-seq-len to be a multiple of {MULTIPLE}, not {rows}: change either"
        )


def use_fp8(model: GPT, optimizer: MuonAdamW, compile: bool) -> list["Fp8Linear"]:
    """
    Puts FP8 layers in the place of the blocks' linear layers that are large enough, and has the optimizer cast their
    weights after every step. The parameters stay the same objects under the same names. To be called once the weights
    are loaded, before the model is compiled. Returns the layers.
    """
    layers = []
    for block in cast(Iterable[Block], model.transformer.h):
        for parent in (block.attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear) and all(
                    n >= MIN_FEATURES and n % MULTIPLE == 0 for n in child.weight.shape
                ):
                    layers.append(Fp8Linear(child))
                    setattr(parent, name, layers[-1])
    cast_weight = torch.compile(_cast_weight, dynamic=False) if compile else _cast_weight

    def cast_weights(*_: object) -> None:
        for layer in layers:
            cast_weight(layer.weight.detach(), layer.weight_NK, layer.weight_KN, layer.scale)

    cast_weights()
    optimizer.register_step_post_hook(cast_weights)
    return layers


class Fp8Linear(Linear):
    """Takes over a layer's weight; its FP8 copies, in both layouts, are good until the weight changes."""

    weight_NK: torch.Tensor
    weight_KN: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        with torch.device("meta"):  # no memory and no random numbers for a weight that is replaced
            super().__init__(linear.in_features, linear.out_features)
        self.weight = linear.weight
        device = linear.weight.device
        for name, shape in (("weight_NK", linear.weight.shape), ("weight_KN", linear.weight.T.shape)):
            self.register_buffer(name, torch.empty(shape, dtype=FORWARD, device=device), persistent=False)
        self.register_buffer("scale", torch.empty((), device=device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        x_MK = x.reshape(-1, x.size(-1))
        y_MN = _Fp8Product.apply(x_MK, self.weight, self.weight_NK, self.weight_KN, self.scale)
        return y_MN.view(*x.shape[:-1], -1)


class _Fp8Product(torch.autograd.Function):
    """
    x @ weight.T from the weight's FP8 copies; the weight itself, unread, is what the gradient goes to. torch._scaled_mm
    wants its first operand row-major and its second column-major. As in torchao, sums of partial products are kept
    short (fast accumulation) in the forward pass only.
    """

    @staticmethod
    def forward(ctx, x_MK, weight, weight_NK, weight_KN, weight_scale):
        x8_MK, x_scale = quantize(x_MK, FORWARD)
        ctx.save_for_backward(x8_MK, x_scale, weight_KN, weight_scale)
        ctx.weight_dtype = weight.dtype
        return torch._scaled_mm(
            x8_MK, weight_NK.T, scale_a=x_scale, scale_b=weight_scale, out_dtype=x_MK.dtype, use_fast_accum=True
        )

    @staticmethod
    def backward(ctx, grad_MN):
        x8_MK, x_scale, weight_KN, weight_scale = ctx.saved_tensors
        g8_MN, g_scale = quantize(grad_MN, BACKWARD)
        grad_x_MK = torch._scaled_mm(g8_MN, weight_KN.T, scale_a=g_scale, scale_b=weight_scale, out_dtype=grad_MN.dtype)
        g8_NM, x8_KM = g8_MN.T.contiguous(), x8_MK.T.contiguous()
        grad_weight_NK = torch._scaled_mm(g8_NM, x8_KM.T, scale_a=g_scale, scale_b=x_scale, out_dtype=ctx.weight_dtype)
        return grad_x_MK, grad_weight_NK, None, None, None


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x in FP8, row-major, and the scale () in float32 to multiply it with; the largest magnitude fills the range."""
    scale = x.abs().amax().float().clamp_min(MIN_AMAX) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).contiguous(), scale


@torch.no_grad()
def _cast_weight(weight: torch.Tensor, weight_NK: torch.Tensor, weight_KN: torch.Tensor, scale: torch.Tensor) -> None:
    """Fills a layer's FP8 copies."""
    quantized_NK, new_scale = quantize(weight, FORWARD)
    weight_NK.copy_(quantized_NK)
    weight_KN.copy_(quantized_NK.T)
    scale.copy_(new_scale)
