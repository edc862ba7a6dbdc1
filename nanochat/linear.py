"""
The linear layers of the model (gpt.py). Some features work by replacing them: training in FP8 (fp8.py) and the weight
layouts for generation (packed.py).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Linear(nn.Linear):
    """
    A linear layer without bias. The weight is stored in float32, because updates of 1e-3 of its size would vanish in
    bfloat16, and cast to the activations' dtype for the product. So torch.autocast is not needed. Casting once per
    optimizer step instead of once per micro-batch would save 0.4 % of a micro-batch at depth 24 (6 bytes per weight),
    and need a copy that everything that changes a weight has to update.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class JointLinear(nn.Module):
    """
    Several linear layers with the same input. The weights stay parameters of the layers, so checkpoints do not change.

    In training on a GPU they are one product. In the backward pass that saves the sum of the gradients by x, and FP8
    (fp8.py) quantizes x and the gradient once instead of once per layer: 258 → 230 kernels in a micro-batch at depth 4,
    compiled, and 311 → 267 in FP8. On a CPU one product of queries, keys and
    values is not faster than three: within 4 % in eager code, 2 to 8 % slower compiled (C 128 to 512). For inference it
    would mean to join the weights in every call.
    """

    def __init__(self, *linears: Linear):
        super().__init__()
        self.linears = linears  # a tuple, which torch does not search: the layers are not registered a second time

    @property
    def weights(self) -> list[torch.Tensor]:
        return [linear.weight for linear in self.linears]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output of each layer, (…, out_features)."""
        if not (x.is_cuda and torch.is_grad_enabled()):
            return tuple(linear(x) for linear in self.linears)
        return self.multiply(x)

    def multiply(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same by one product, on any device."""
        weight = torch.cat([weight.to(x.dtype) for weight in self.weights])
        return self.split(F.linear(x, weight))

    def split(self, joined: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return joined.split([linear.out_features for linear in self.linears], dim=-1)
