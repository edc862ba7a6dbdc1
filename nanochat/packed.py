"""
The weights of a model in the layout that multiplies fastest, for generation.

    fast = packed_copy(model, "packed")     # shares the embedding tables with `model`
    refresh(fast)                           # after an optimizer step of `model`

The copy is a GPT like any other. Only its linear layers are replaced: by PackedLinear, which reads a copy of the weight
in another layout or data type.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import hardware
from nanochat.gpt import GPT, Block

LAYOUTS = ("plain", "transposed", "packed", "int8")


class PackedLinear(nn.Module):
    """
    One or several linear layers without bias and with the same input, as one product.

    layout: "plain" (N, K), "transposed" (K, N), "packed" (blocks of oneDNN, for CPUs) or "int8" (8-bit integers with
    one scale per output). A plain weight that already has the right dtype is shared with the layer, so that optimizer
    steps need no copy. Everything else is a copy, which `refresh` makes again.
    """

    def __init__(self, layers: list[nn.Linear], dtype: torch.dtype, layout: str, num_rows: int | None = None):
        """num_rows: the rows of the weight to use; None = all."""
        super().__init__()
        # A tuple, which torch does not search: the layers and their parameters belong to the original model.
        self.layers = tuple(layers)
        self.dtype, self.layout, self.num_rows = dtype, layout, num_rows
        self.sizes = [layer.out_features for layer in layers]
        self.weight = self.scale = torch.empty(0)
        self.is_shared = False  # the weight is the original layer's own tensor
        self.refresh()

    def refresh(self) -> None:
        """Copies the weights again, in place where possible: captured graphs and compiled code keep the address."""
        sources = [layer.weight.detach()[: self.num_rows] for layer in self.layers]
        weights = [weight.to(self.dtype) for weight in sources]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if self.layout == "packed":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 0)
        elif self.layout == "int8":
            scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
            self.scale = copy_or_replace(self.scale, scale.to(self.dtype))
            self.weight = copy_or_replace(self.weight, (weight.float() / scale[:, None]).round().to(torch.int8))
        elif self.layout == "transposed":
            self.weight = copy_or_replace(self.weight, weight.t().contiguous())
        else:
            was_shared = self.is_shared
            self.is_shared = weight.data_ptr() == sources[0].data_ptr()
            if was_shared or self.is_shared:  # never write to a shared tensor: it belongs to the original model
                self.weight = weight
            else:
                self.weight = copy_or_replace(self.weight, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(…, K) → (…, N); for several layers a tuple with the outputs of each."""
        y = self._multiply(x)
        return y if len(self.sizes) == 1 else y.split(self.sizes, dim=-1)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "packed":
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        if self.layout == "transposed":
            return torch.matmul(x, self.weight)
        if self.layout == "plain":
            return F.linear(x, self.weight)
        if x.is_cpu:
            return torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


@dataclass(frozen=True)
class Choice:
    """How the products of a decode step are computed fastest."""

    layout: str
    num_threads: int


def choose(model: GPT, num_rows: int, *, compiled: bool) -> Choice:
    """
    The fastest layout and number of threads for the products of a step with num_rows rows: measured on a CPU with one
    block and lm_head, once per machine. Which layout wins differs by factors of 2 to 10 with rows, sizes, dtype and
    chip. Code that is compiled cannot use "packed". On a CPU, 8-bit weights are a user's choice, not a layout like the
    others: they change the logits.
    """
    num_threads = torch.get_num_threads()
    if model.device.type != "cpu":
        return Choice("plain", num_threads)
    if model.lm_head.weight.requires_grad and model.lm_head.weight.dtype == model.dtype:
        layouts = ["plain"]  # weights that are being trained are shared, not copied after every optimizer step
    elif compiled or not torch.backends.mkldnn.is_available():
        layouts = ["plain", "transposed"]
    else:
        layouts = ["plain", "transposed", "packed"]
    config = model.config
    sizes = (config.n_embd, config.kv_width, config.n_layer, config.vocab_size)
    key = f"products of {sizes} in {model.dtype}, {num_rows} rows, {','.join(layouts)}"
    layout, threads = hardware.measured(key, lambda: _measure(model, num_rows, layouts))
    return Choice(layout, min(threads, num_threads))


def _measure(model: GPT, num_rows: int, layouts: list[str]) -> tuple[str, int]:
    """The (layout, number of threads) with the shortest time."""
    num_threads = torch.get_num_threads()
    multiply = [_products(model, num_rows, layout) for layout in layouts]
    seconds: dict[tuple[str, int], float] = {}
    try:
        for threads in _numbers_of_threads(num_threads):
            torch.set_num_threads(threads)
            for layout, best in zip(layouts, hardware.best_seconds(multiply, model.device), strict=True):
                seconds[layout, threads] = best
    finally:
        torch.set_num_threads(num_threads)
    return min(seconds, key=seconds.__getitem__)


def _numbers_of_threads(most: int) -> list[int]:
    """1, 2, 4 … and all of them."""
    powers = [2**i for i in range(most.bit_length())]
    return sorted({*powers, most})


def _products(model: GPT, num_rows: int, layout: str) -> Callable[[], None]:
    """A function that computes the products of a step: those of one block, as often as there are blocks, and lm_head."""
    config = model.config
    block = cast(Block, model.transformer.h[0])
    attn, mlp = block.attn, block.mlp
    in_block = [
        PackedLinear(layers, model.dtype, layout)
        for layers in ([attn.c_q, attn.c_k, attn.c_v], [attn.c_proj], [mlp.c_fc], [mlp.c_proj])
    ]
    head = PackedLinear([model.lm_head], model.dtype, layout)
    inputs = {n: torch.ones(num_rows, 1, n, dtype=model.dtype) for n in (config.n_embd, 4 * config.n_embd)}

    def multiply() -> None:
        for linear in in_block * config.n_layer + [head]:
            linear(inputs[linear.layers[0].in_features])

    return multiply


def copy_or_replace(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns `old` with the values of `new` if the shapes are equal, otherwise `new` itself."""
    if old.shape == new.shape and old.data_ptr() != new.data_ptr():
        return old.copy_(new)
    return new


def packed_copy(model: GPT, layout: str) -> GPT:
    """A copy for inference that shares parameters and buffers with `model`; the linear layers become PackedLinear."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)
    dtype = model.dtype
    for block in packed.transformer.h:
        attn, mlp = block.attn, block.mlp
        # One product for queries, keys and values: small products take as long to call as to compute.
        attn.c_qkv = PackedLinear([attn.c_q, attn.c_k, attn.c_v], dtype, layout)
        attn.c_proj = PackedLinear([attn.c_proj], dtype, layout)
        mlp.c_fc = PackedLinear([mlp.c_fc], dtype, layout)
        mlp.c_proj = PackedLinear([mlp.c_proj], dtype, layout)
    packed.lm_head = PackedLinear([packed.lm_head], dtype, layout, num_rows=model.config.vocab_size)
    return packed.eval()


def refresh(packed: GPT) -> None:
    """Must be called after the weights of the original model have changed."""
    for module in packed.modules():
        if isinstance(module, PackedLinear):
            module.refresh()
