"""
The model: a decoder-only transformer with rotary positions, QK norm, relu² MLPs, sliding windows, value embeddings, and
a few scalars that carry information past the layers.

Shapes: B rows, T tokens, C = n_embd, H query heads, K key/value heads, D = C / H, V vocabulary, V' vocabulary padded.

GPTConfig describes a family of models: every part beyond a plain transformer has a field that turns it off. The
defaults are what base_train trains; legacy.py has the values of models that were trained by older versions.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import AttentionShape, Kernel, attend
from nanochat.common import UserError
from nanochat.loss import cross_entropy, softcap

NORM_EPS = 1.1920929e-07  # float32's epsilon, whatever the dtype
VOCAB_MULTIPLE = 64  # tables are padded to this: matrix products like round shapes, and ranks can share the rows
SHORT_WINDOW_MULTIPLE = 128  # block size of the attention kernels
SMEAR_CHANNELS = 24
VE_GATE_CHANNELS = 12
VE_GATE_SCALE = 3.0


@dataclass(frozen=True)
class GPTConfig:
    sequence_len: int = 2048  # tokens of context in training; windows are fractions of it
    vocab_size: int = 32768  # true vocabulary; logits are cut back to it
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers, S short, L full; the last layer is always L
    value_embeds: bool = True  # every second layer adds an embedding of the token to its values
    smear: bool = True  # each token's embedding takes in a little of the previous one's
    backout: bool = True  # the output of the middle layer is subtracted before lm_head
    residual_scalars: bool = True  # learned weights per layer for the residual stream and for the embedding
    qk_gain: float = 1.2  # on normed queries and keys: sharpens the softmax by its square
    rope_base: float = 100_000.0  # wavelengths of the rotary positions grow up to 2 pi times this many tokens
    logit_softcap: float = 15.0  # logits stay within ± this; 0 = not capped

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise UserError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, that of n_kv_head {self.n_kv_head}"
            )
        if self.smear and self.n_embd < SMEAR_CHANNELS:
            raise UserError(f"n_embd {self.n_embd} must be at least {SMEAR_CHANNELS}: raise --depth or --head-dim")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window pattern {self.window_pattern!r}: use the letters S (short) and L (full)")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> list[int]:
        """Window of each layer, in tokens."""
        short = math.ceil(self.sequence_len / 4 / SHORT_WINDOW_MULTIPLE) * SHORT_WINDOW_MULTIPLE
        pattern = self.window_pattern
        sizes = {"S": min(short, self.sequence_len), "L": self.sequence_len}
        return [sizes[pattern[i % len(pattern)]] for i in range(self.n_layer - 1)] + [self.sequence_len]

    @property
    def attention_shape(self) -> AttentionShape:
        return AttentionShape(self.sequence_len, self.n_head, self.n_kv_head, self.head_dim, tuple(self.windows))

    @property
    def layers_with_value_embeds(self) -> list[int]:
        if not self.value_embeds:
            return []
        return [i for i in range(self.n_layer) if i % 2 == (self.n_layer - 1) % 2]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Without the parts that other programs do not implement, a model can be exported to every format.
PORTABLE: dict[str, Any] = {
    "window_pattern": "L",
    "value_embeds": False,
    "smear": False,
    "backout": False,
    "residual_scalars": False,
    "logit_softcap": 0.0,
}


class Cache(Protocol):
    """What the model asks of a KV cache during one forward pass (see engine.py)."""

    positions_BT: torch.Tensor
    previous_B1C: torch.Tensor  # the un-smeared embedding before the first token; zeros at the start of a text

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor: ...


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotary_table(length: int, head_dim: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * base^(-2j/D), each (length, D/2) in float32."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (first half, second half) by minus the angle; cos and sin broadcast against (B, T, H, D/2)."""
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def take(x_BT: torch.Tensor, columns_BQ: torch.Tensor) -> torch.Tensor:
    """(B, T, …) → (B, Q, …): of each row the columns named."""
    return x_BT[torch.arange(x_BT.size(0), device=x_BT.device)[:, None], columns_BQ]


class Linear(nn.Linear):
    """No bias; the float32 master weight is cast to the activations' dtype, so there is no autocast."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, config.windows[layer], config.head_dim
        self.attend: Kernel = attend
        self.gain = config.qk_gain
        kv_width = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_width)
        self.c_v = Linear(config.n_embd, kv_width)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.has_value_embeds = layer in config.layers_with_value_embeds
        if self.has_value_embeds:
            self.ve_gate = Linear(VE_GATE_CHANNELS, config.n_kv_head)

    def forward(self, x_BTC, value_embed_BTKD, cos, sin, cache: Cache | None, columns_BQ: torch.Tensor | None = None):
        B, T, _ = x_BTC.shape
        x_BQC, cos_Q, sin_Q = (x if columns_BQ is None else take(x, columns_BQ) for x in (x_BTC, cos, sin))
        q = self.c_q(x_BQC).unflatten(-1, (-1, self.head_dim))
        k = self.c_k(x_BTC).view(B, T, -1, self.head_dim)
        v = self.c_v(x_BTC).view(B, T, -1, self.head_dim)
        if value_embed_BTKD is not None:
            gate_BTK = VE_GATE_SCALE * torch.sigmoid(self.ve_gate(x_BTC[..., :VE_GATE_CHANNELS]))
            v = v + gate_BTK.unsqueeze(-1) * value_embed_BTKD
        q, k = self.gain * norm(rotate(q, cos_Q, sin_Q)), self.gain * norm(rotate(k, cos, sin))
        if cache is None:
            y = self.attend(q, k, v, self.window)
        else:
            y = cache.attend(self.layer, q, k, v, self.window)
        return self.c_proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, value_embed, cos, sin, cache: Cache | None, columns_BQ: torch.Tensor | None = None):
        normed = norm(x)
        x = x if columns_BQ is None else take(x, columns_BQ)
        x = x + self.attn(normed, value_embed, cos, sin, cache, columns_BQ)
        return x + self.mlp(norm(x))


class Trunk(nn.Module):
    """Token embeddings and blocks, under the names that checkpoints have."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])


class GPT(nn.Module):
    """Weights are float32 masters; `dtype` is what the forward pass computes in."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: GPTConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        device = torch.device(device)
        with device:
            self.transformer = Trunk(config)
            self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
            kv_width = config.n_kv_head * config.head_dim
            tables = {str(i): nn.Embedding(config.padded_vocab_size, kv_width) for i in config.layers_with_value_embeds}
            self.value_embeds = nn.ModuleDict(tables)
            if config.residual_scalars:
                self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
                self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
            if config.smear:
                self.smear_gate = Linear(SMEAR_CHANNELS, 1)
                self.smear_lambda = nn.Parameter(torch.zeros(1))
            if config.backout:
                self.backout_lambda = nn.Parameter(torch.zeros(1))
        cos, sin = rotary_table(config.sequence_len, config.head_dim, config.rope_base, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @classmethod
    def create(cls, config: GPTConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> "GPT":
        """A new model with initial weights."""
        model = cls(config, device, dtype)
        model.init_weights()
        return model

    @property
    def device(self) -> torch.device:
        return self.cos.device

    def use_attention(self, kernel: Kernel) -> None:
        """For whole sequences, in place of the one that runs anywhere (attention.py: choose)."""
        for block in cast(Iterable[Block], self.transformer.h):
            block.attn.attend = kernel

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values; draws from torch's global generator of the model's device."""
        config = self.config
        C, n_layer = config.n_embd, config.n_layer
        bound = math.sqrt(3 / C)  # a uniform distribution of standard deviation 1/sqrt(C)
        self.transformer.wte.weight.normal_(std=0.8)
        self.lm_head.weight.normal_(std=0.001)
        for block in cast(Iterable[Block], self.transformer.h):
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear.weight.uniform_(-bound, bound)
            block.mlp.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound)
            block.attn.c_proj.weight.zero_()  # every block starts as the identity
            block.mlp.c_proj.weight.zero_()
            if block.attn.has_value_embeds:
                block.attn.ve_gate.weight.uniform_(0, 0.02)  # a gate barely open, on the side that learns
        for table in self.value_embeds.parameters():
            table.uniform_(-bound, bound)
        if config.residual_scalars:
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, n_layer))
            self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, n_layer))
        if config.smear:
            self.smear_gate.weight.uniform_(0, 0.02)
            self.smear_lambda.zero_()
        if config.backout:
            self.backout_lambda.fill_(0.2)

    def cast_weights(self) -> None:
        """For inference only: matrices and tables to the compute dtype, once instead of at every use."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight = nn.Parameter(module.weight.to(self.dtype), requires_grad=False)

    def forward(
        self,
        idx_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """
        Logits (B, T, V) in float32; with targets, the cross entropy in nats, targets of -1 left out: reduction "mean"
        or "sum" gives a scalar, "none" gives (B, T).
        """
        hidden_BTC = self.hidden(idx_BT, cache)
        if targets_BT is None:
            return self.logits(hidden_BTC)
        hidden_NC, targets_N = hidden_BTC.flatten(0, 1), targets_BT.flatten()
        vocab_size, cap = self.config.vocab_size, self.config.logit_softcap
        loss = cross_entropy(hidden_NC, self.lm_head.weight, targets_N, vocab_size, cap, reduction)
        return loss.view_as(targets_BT) if reduction == "none" else loss

    def hidden(
        self, idx_BT: torch.Tensor, cache: Cache | None = None, columns_BQ: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The final normed states, (B, T, C). With a cache one may ask for those of some columns only, (B, Q, C): the last
        block then computes no others, and hands cache.attend the queries of these alone.
        """
        if cache is None:
            assert idx_BT.size(1) <= self.config.sequence_len, f"{idx_BT.size(1)} tokens do not fit the context"
            cos, sin = self.cos[: idx_BT.size(1), None], self.sin[: idx_BT.size(1), None]
        else:
            cos, sin = self.cos[cache.positions_BT].unsqueeze(2), self.sin[cache.positions_BT].unsqueeze(2)
        cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        x = norm(self.transformer.wte(idx_BT).to(self.dtype))
        if self.config.smear:
            x = self.smear(x, cache)
        x0 = middle = x
        for i, block in enumerate(self.transformer.h):
            if self.config.residual_scalars:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value_embed = None
            if str(i) in self.value_embeds:
                value_embed = self.value_embeds[str(i)](idx_BT).to(x.dtype)
                value_embed = value_embed.unflatten(-1, (self.config.n_kv_head, self.config.head_dim))
            x = block(x, value_embed, cos, sin, cache, columns_BQ if i == self.config.n_layer - 1 else None)
            if i == self.config.n_layer // 2:
                middle = x
        if self.config.backout:
            if columns_BQ is not None and self.config.n_layer > 2:  # else `middle` is of the last block itself
                middle = take(middle, columns_BQ)
            x = x - self.backout_lambda.to(x.dtype) * middle
        return norm(x)

    def smear(self, x_BTC: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Mixes a little of the previous token's embedding into each, as far as a gate lets it."""
        previous_B1C = torch.zeros_like(x_BTC[:, :1])  # the first token has none
        if cache is not None:
            previous_B1C = cache.previous_B1C.clone()
            cache.previous_B1C = x_BTC[:, -1:]
        previous_BTC = torch.cat([previous_B1C, x_BTC[:, :-1]], dim=1)
        gate_BT1 = self.smear_lambda.to(x_BTC.dtype) * torch.sigmoid(self.smear_gate(x_BTC[..., :SMEAR_CHANNELS]))
        return x_BTC + gate_BT1 * previous_BTC

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, V) in float32, soft-capped."""
        return softcap(self.lm_head(hidden)[..., : self.config.vocab_size].float(), self.config.logit_softcap)


# ---- costs that follow from the configuration alone ----


def param_counts(config: GPTConfig) -> dict[str, int]:
    """Parameters by group."""
    C, table_rows, kv_width = config.n_embd, config.padded_vocab_size, config.n_kv_head * config.head_dim
    num_tables = len(config.layers_with_value_embeds)
    scalars = 0
    if config.residual_scalars:
        scalars += 2 * config.n_layer
    if config.smear:
        scalars += SMEAR_CHANNELS + 1
    if config.backout:
        scalars += 1
    counts = {
        "wte": table_rows * C,
        "value_embeds": num_tables * table_rows * kv_width,
        "lm_head": table_rows * C,
        "transformer_matrices": config.n_layer * (2 * C * C + 2 * C * kv_width + 8 * C * C)
        + num_tables * VE_GATE_CHANNELS * config.n_kv_head,
        "scalars": scalars,
    }
    return counts | {"total": sum(counts.values())}


def matmul_weights(config: GPTConfig) -> int:
    """Weights that multiply activations: each costs 2 FLOPs a token forward, 4 backward."""
    counts = param_counts(config)
    smear_gate = SMEAR_CHANNELS if config.smear else 0
    return counts["transformer_matrices"] + counts["lm_head"] + smear_gate


def flops_per_token(config: GPTConfig) -> int:
    """Forward and backward FLOPs per trained token (the PaLM paper's count: no causal discount, no embeddings)."""
    attention = sum(12 * config.n_embd * min(window, config.sequence_len) for window in config.windows)
    return 6 * matmul_weights(config) + attention


def prefill_flops(config: GPTConfig, num_tokens: int) -> int:
    """Forward FLOPs of a prompt, logits of its last token only."""
    keys_seen = sum(_band_area(num_tokens, window) for window in config.windows)
    head = param_counts(config)["lm_head"]
    return 2 * (matmul_weights(config) - head) * num_tokens + 2 * head + 4 * config.n_embd * keys_seen


def decode_flops(config: GPTConfig, context: int) -> int:
    """Forward FLOPs of one more token after `context` tokens."""
    keys_seen = sum(min(window, context) + 1 for window in config.windows)
    return 2 * matmul_weights(config) + 4 * config.n_embd * keys_seen


def kv_bytes_per_token(config: GPTConfig, dtype: torch.dtype) -> int:
    """Bytes that one token occupies in the KV cache."""
    return config.n_layer * 2 * config.n_kv_head * config.head_dim * dtype.itemsize


def kv_bytes_read(config: GPTConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of the KV cache that decoding one token reads after `context` tokens."""
    keys_seen = sum(min(window, context) + 1 for window in config.windows)
    return keys_seen * 2 * config.n_kv_head * config.head_dim * dtype.itemsize


def _band_area(num_tokens: int, window: int) -> int:
    """Number of (query, key) pairs with 0 <= query - key <= window."""
    ramp = min(num_tokens, window + 1)
    return ramp * (ramp + 1) // 2 + (num_tokens - ramp) * (window + 1)
