"""
LoRA (arXiv 2106.09685): fine-tuning of a few parameters, for small GPUs. chat_sft --lora-rank uses it.

The weights of the model stay as they are. Each matrix W of the blocks, (N, K), is replaced by W + scale * B A, and only
A, (rank, K), and B, (N, rank), are trained. Gradients and optimizer state exist for these only: 16 bytes per parameter
that is not trained become 4. A is random and B zero, so training starts from the model itself.

The new weight is computed before every use (a parametrization of torch), so everything that reads `weight` works as
before. A step takes about as long as one of full fine-tuning: what LoRA saves is memory, and disk space.

In addition the rows of lm_head for the special tokens are trained. Pretraining never sees these tokens, and pushes all
their logits down by the same amount: without rows of their own, the model could not tell the end of its reply from any
other special token.

Checkpoints contain only what was trained. When they are loaded, it is merged into the base model's weights.
"""

import math

import torch
import torch.nn as nn
from torch.nn.utils.parametrize import register_parametrization

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.linear import Linear
from nanochat.tokenizer import SPECIAL_TOKENS

# scale = ALPHA / rank. With it, the best learning rate hardly depends on the rank
# (https://thinkingmachines.ai/blog/lora/).
ALPHA = 32.0
PARAMETRIZATION = ".parametrizations.weight.0."  # between the names of a layer and of what is trained in it


class LowRankChange(nn.Module):
    """W → W + scale * B A."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        N, K = weight.shape
        self.scale = ALPHA / rank
        self.a = nn.Parameter(weight.new_empty(rank, K).normal_(std=1 / math.sqrt(K)))
        self.b = nn.Parameter(weight.new_zeros(N, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)


class SpecialRows(nn.Module):
    """Replaces the rows of the special tokens in a table (V, C)."""

    def __init__(self, table: torch.Tensor, vocab_size: int):
        super().__init__()
        self.start, self.end = vocab_size - len(SPECIAL_TOKENS), vocab_size
        self.rows = nn.Parameter(table[self.start : self.end].detach().clone())

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        return torch.cat([table[: self.start], self.rows, table[self.end :]])


def check_rank(rank: int, config: GPTConfig) -> None:
    """UserError unless matrices of the model can change by a matrix of this rank."""
    if not 1 <= rank <= config.kv_width:
        raise UserError(f"--lora-rank {rank}: use 1 to {config.kv_width}, typically 8 to 64; 0 = train all parameters")


def use_lora(model: GPT, rank: int) -> None:
    """Freezes the model and adds what LoRA trains. A is drawn from torch's global generator of the device."""
    model.requires_grad_(False)
    for layer in list(model.transformer.h.modules()):
        if isinstance(layer, Linear) and min(layer.weight.shape) >= rank:  # not the small gates
            register_parametrization(layer, "weight", LowRankChange(layer.weight, rank))
    register_parametrization(model.lm_head, "weight", SpecialRows(model.lm_head.weight, model.config.vocab_size))


def adapters(model: GPT) -> dict[str, nn.Parameter]:
    """What use_lora has added, by parameter name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_adapters(model: GPT, saved: dict[str, torch.Tensor]) -> None:
    """Sets what use_lora has added to the values of a checkpoint."""
    for name, parameter in adapters(model).items():
        parameter.copy_(saved[name])


def merge(
    weights: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], rank: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The weights of the fine-tuned model, from those of the base model and the saved adapters of that rank."""
    merged = dict(weights)
    for name, value in saved.items():
        layer, _, kind = name.partition(PARAMETRIZATION)
        weight = weights[f"{layer}.weight"].float()
        if kind == "rows":
            merged[f"{layer}.weight"] = weight.clone()
            merged[f"{layer}.weight"][vocab_size - len(value) : vocab_size] = value
        elif kind == "b":
            a = saved[f"{layer}{PARAMETRIZATION}a"]
            merged[f"{layer}.weight"] = torch.addmm(weight, value, a, alpha=ALPHA / rank)
    return merged


def describe(model: GPT) -> str:
    """How many parameters are trained, for the log."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"{trained:,} of {total:,} parameters are trained ({trained / (total - trained):.1%} of the model's)"
