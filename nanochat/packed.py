"""
The weights of a model in the layout that multiplies fastest, for generation.

    choice = choose(model, num_rows=32, compiled=False)
    fast = packed_copy(model, choice.dtype, choice.layout)     # shares the embedding tables with `model`
    refresh(fast)                                              # after an optimizer step of `model`

The copy is a GPT like any other. Only its linear layers are replaced: by PackedLinear, which reads a copy of the weight
in another layout or data type.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import hardware
from nanochat.distributed import warn0
from nanochat.gpt import GPT, NORM_EPS, Block, norm


class PackedLinear(nn.Module):
    """
    One or several linear layers without bias and with the same input, as one product.

    layout: "plain" (N, K), "transposed" (K, N), "packed" (blocks of oneDNN, for CPUs) or "int8" (8-bit integers with
    one scale per output). A plain weight that already has the right dtype is shared with the layer, so that optimizer
    steps need no copy. Everything else is a copy, which `refresh` makes again.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        layers: list[nn.Linear],
        dtype: torch.dtype,
        layout: str,
        *,
        num_rows: int | None = None,
        norms_input: bool = False,
    ):
        """num_rows: the rows of the weight to use; None = all. norms_input: apply RMS norm to the input first."""
        super().__init__()
        # A tuple, which torch does not search: the layers and their parameters belong to the original model.
        self.layers = tuple(layers)
        self.dtype, self.layout, self.num_rows = dtype, layout, num_rows
        self.norms_input = norms_input
        self.sizes = [layer.out_features for layer in layers]
        for name in ("weight", "scale"):  # buffers, so that compiled code finds them
            self.register_buffer(name, torch.empty(0), persistent=False)
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
        # On CUDA, torch.compile turns sums over elementwise products into kernels that compute what follows too.
        if self.layout == "plain" and x.is_cuda and x.numel() == x.size(-1) and torch.compiler.is_compiling():
            y = self._multiply_row(x)
        elif self.norms_input:
            y = self._multiply(norm(x))
        else:
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

    def _multiply_row(self, x: torch.Tensor) -> torch.Tensor:
        """
        The product with a single row, (…, K) → (…, N), as a sum of products. Each weight is read once. The sum of
        squares for the norm is computed for every output again, in the same loop, which saves a kernel.
        """
        rows = x.float().unsqueeze(-2).expand(*x.shape[:-1], *self.weight.shape)
        y = (rows * self.weight.float()).sum(dim=-1)
        if self.norms_input:
            y = y * (rows.square().sum(dim=-1) / x.size(-1) + NORM_EPS).rsqrt()
        return y.to(x.dtype)


@dataclass(frozen=True)
class Choice:
    """How the products of a decode step are computed fastest."""

    dtype: torch.dtype
    layout: str
    num_threads: int


def choose(model: GPT, num_rows: int, *, compiled: bool, precisions: Sequence[str] = ()) -> Choice:
    """
    The fastest dtype, layout and number of threads for the products of a step with num_rows rows: measured on a CPU
    with one block and lm_head, once per machine. Which one wins differs by factors of 2 to 10 with rows, sizes, dtype
    and chip. Compiled code cannot use "packed".

    precisions: what may be used besides the model's own dtype, though it changes the logits: "bfloat16", and "int8" for
    8-bit weights with bfloat16 activations. A warning says if int8 is slower and therefore not used.
    """
    num_threads = torch.get_num_threads()
    if model.device.type != "cpu":
        if "int8" in precisions:
            warn0("8-bit weights are not used on a GPU: it is slower, as each step would write them out in 16 bits")
        return Choice(model.dtype, "plain", num_threads)
    if model.lm_head.weight.requires_grad and model.lm_head.weight.dtype == model.dtype:
        # Weights in training are shared: other layouts would be copied after every optimizer step. And nothing is
        # measured, so that a run of reinforcement learning is resumed bitwise.
        return Choice(model.dtype, "plain", num_threads)
    candidates = _candidates(model, compiled, precisions)
    config = model.config
    sizes = f"depth {config.n_layer}, widths {config.n_embd} and {config.kv_width}, vocabulary {config.vocab_size}"
    question = f"{'/'.join(candidates)}: {sizes}, {num_rows} rows"
    name, threads = hardware.measured(question, lambda: _measure(model, num_rows, candidates))
    if "int8" in precisions and not name.endswith("int8"):
        warn0(f"8-bit weights are not used: with {num_rows} rows, {name} is faster on this CPU")
    dtype, layout = name.split()
    return Choice(hardware.DTYPES[dtype], layout, threads)


def _candidates(model: GPT, compiled: bool, precisions: Sequence[str]) -> list[str]:
    """The dtypes and layouts that are compared, such as "float32 transposed"."""
    own = str(model.dtype).removeprefix("torch.")
    dtypes = dict.fromkeys([own, *(dtype for dtype in precisions if dtype == "bfloat16")])
    layouts = ["plain", "transposed"]
    if not compiled and torch.backends.mkldnn.is_available():
        layouts.append("packed")
    candidates = [f"{dtype} {layout}" for dtype in dtypes for layout in layouts]
    if "int8" in precisions:
        candidates.append("bfloat16 int8")
    return candidates


def _measure(model: GPT, num_rows: int, candidates: list[str]) -> tuple[str, int]:
    """The (candidate, number of threads) with the shortest time."""
    num_threads = torch.get_num_threads()
    multiply = [_products(model, num_rows, *candidate.split()) for candidate in candidates]
    seconds: dict[tuple[str, int], float] = {}
    for threads in sorted({1, num_threads, *(2**i for i in range(num_threads.bit_length()))}):
        with hardware.num_threads(threads):
            times = hardware.best_seconds(multiply, model.device, total_seconds=0.03)
            for candidate, best in zip(candidates, times, strict=True):
                # On a busy machine threads wait for each other. Fewer are chosen only if they are much faster, as the
                # choice is kept.
                seconds[candidate, threads] = best * (1.0 if threads == num_threads else 1.3)
    return min(seconds, key=seconds.__getitem__)


def _products(model: GPT, num_rows: int, dtype: str, layout: str) -> Callable[[], None]:
    """A function that computes the products of a step: those of the first block for every block, and lm_head."""
    config = model.config
    torch_dtype = hardware.DTYPES[dtype]
    products = _products_of(cast(Block, model.transformer.h[0]))
    in_block = [PackedLinear(layers, torch_dtype, layout) for _, _, layers in products]
    head = PackedLinear([model.lm_head], torch_dtype, layout)
    inputs = {n: torch.ones(num_rows, 1, n, dtype=torch_dtype) for n in (config.n_embd, 4 * config.n_embd)}

    def multiply() -> None:
        for linear in in_block * config.n_layer + [head]:
            linear(inputs[linear.layers[0].in_features])

    return multiply


def copy_or_replace(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns `old` with the values of `new` if the shapes are equal, otherwise `new` itself."""
    if old.shape == new.shape and old.data_ptr() != new.data_ptr():
        return old.copy_(new)
    return new


def packed_copy(model: GPT, dtype: torch.dtype, layout: str) -> GPT:
    """
    A copy for inference that computes in `dtype` and shares parameters and buffers with `model`. The linear layers
    become PackedLinear.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    copied.dtype = dtype
    fuses_norm = not model.config.norm_gains  # gains stand between the norm and the product
    for block in cast(Iterable[Block], copied.transformer.h):
        for parent, name, layers in _products_of(block):
            setattr(parent, name, PackedLinear(layers, dtype, layout, norms_input=name == "c_fc" and fuses_norm))
        if fuses_norm:
            block.mlp_norm = _unchanged
        if layout == "plain" and block.attn.has_value_embeds:
            setattr(block.attn, "ve_gate", PackedLinear([block.attn.ve_gate], dtype, layout))  # noqa: B010
    lm_head = PackedLinear([model.lm_head], dtype, layout, num_rows=model.config.vocab_size)
    setattr(copied, "lm_head", lm_head)  # noqa: B010  the attribute is declared as a Linear
    return copied.eval()


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _products_of(block: Block) -> list[tuple[nn.Module, str, list[nn.Linear]]]:
    """
    The matrix products of a block: module, attribute, layers. Queries, keys and values are one product, as a small
    product takes as long to call as to compute.
    """
    attn, mlp = block.attn, block.mlp
    return [
        (attn, "c_qkv", [attn.c_q, attn.c_k, attn.c_v]),
        (attn, "c_proj", [attn.c_proj]),
        (mlp, "c_fc", [mlp.c_fc]),
        (mlp, "c_proj", [mlp.c_proj]),
    ]


def refresh(copied: GPT) -> None:
    """Must be called after the weights of the original model have changed."""
    for module in copied.modules():
        if isinstance(module, PackedLinear):
            module.refresh()
