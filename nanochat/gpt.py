"""
The model: a decoder-only transformer (GPT) with rotary positions, for training and inference.

    model = GPT.create(GPTConfig(n_layer=12), device, torch.bfloat16)
    loss = model(idx_BT, targets_BT)        # training
    logits_BTV = model(idx_BT)              # inference; engine.py passes a KV cache

Differences from GPT-2: rotary positions instead of learned ones, RMS norm (weights are optional), normed queries and
keys, relu² in the MLP, grouped key/value heads, sliding windows, no biases, no dropout, lm_head not tied to the
embedding. On top of that come four cheap additions that let information bypass the layers: value embeddings, smear,
backout and residual scalars. GPTConfig has a field for each, so this file describes a whole family of models; legacy.py
knows the fields of models that were trained by older versions.

Shapes: B sequences (rows), T tokens, Q selected tokens, C = n_embd channels, H query heads, K key/value heads,
D = C / H channels per head, V vocabulary, N = B * T.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.attention import AttentionShape, Kernel, attend
from nanochat.common import UserError
from nanochat.kernels.mlp import MlpKernel
from nanochat.linear import JointLinear, Linear
from nanochat.loss import cross_entropy, softcap

NORM_EPS = 1.1920929e-07  # float32's epsilon, whatever the dtype
VOCAB_MULTIPLE = 64  # embedding tables are padded to this: round shapes multiply faster, and ranks can share the rows
SHORT_WINDOW_MULTIPLE = 128  # block size of the attention kernels
SMEAR_CHANNELS = 24  # channels that the smear gate reads
VE_GATE_CHANNELS = 12  # channels that the gate of the value embeddings reads
MAX_SIZE = 1 << 20  # of any size in GPTConfig: larger ones come from damaged files
VE_GATE_SCALE = 3.0  # a value embedding is added with a weight between 0 and this


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and features of a model. UserError if they do not fit together."""

    sequence_len: int = 2048  # tokens of context in training; windows are fractions of it
    vocab_size: int = 32768  # without padding
    n_layer: int = 12
    n_head: int = 6
    # Fewer key/value heads than query heads make the KV cache smaller (grouped-query attention, arXiv 2305.13245).
    n_kv_head: int = 6
    n_embd: int = 768
    # S: a quarter of the context, L: all of it; repeated over the layers, and the last layer is always L. Three of four
    # layers only need nearby tokens: this saves attention FLOPs and KV cache (Longformer, arXiv 2004.05150).
    window_pattern: str = "SSSL"
    # In every second layer, attention adds a learned embedding of the token to its values, through a gate: parameters
    # that cost almost no FLOPs (in the spirit of value residual learning, arXiv 2410.17897).
    value_embeds: bool = True
    # Each token's embedding takes in a little of the previous token's, so that the first layer already sees bigrams
    # (compare token shift in RWKV, arXiv 2305.13048).
    smear: bool = True
    # The residual stream (the vector per token that the layers add to) after the middle layer, times a learned number,
    # is subtracted before lm_head. So the first half can pass information to later layers without adding it to the
    # prediction.
    backout: bool = True
    # Before each layer, x = resid_lambda * x + x0_lambda * x0, where x0 is the embedding: the layer chooses how much it
    # reads of the token itself.
    residual_scalars: bool = True
    # Learned factors, one per channel, on the normed input of each MLP and on the final norm (the gains of RMSNorm,
    # arXiv 1910.07467). The matrix after a norm can learn them too, but Muon's steps are as large in all directions.
    norm_gains: bool = False
    # Factor on queries and keys after their norm. Normed vectors bound the scores, which keeps attention stable in 16
    # bits (QK norm, arXiv 2010.04245); the factor multiplies that bound by 1.2².
    qk_gain: float = 1.2
    # Base of the rotary frequencies (arXiv 2104.09864): the longest wavelength is 2 pi * base^(1 - 2/D).
    rope_base: float = 100_000.0
    # Logits are squashed into ± this by a tanh, so that none runs away (Gemma 2, arXiv 2408.00118); 0 = not capped.
    logit_softcap: float = 15.0

    def __post_init__(self) -> None:
        self._check_values()
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise UserError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}, "
                f"and n_head a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.smear and self.n_embd < SMEAR_CHANNELS:
            raise UserError(f"n_embd {self.n_embd} must be at least {SMEAR_CHANNELS}: raise --depth or --head-dim")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window pattern {self.window_pattern!r}: use the letters S (short) and L (full)")

    def _check_values(self) -> None:
        """Checks each field alone: configurations are also read from files, where anything may stand."""
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= MAX_SIZE:
                raise UserError(f"{name} is {size!r:.40}: it must be a whole number from 1 to {MAX_SIZE:,}")
        for name in (*ADDITIONS, "norm_gains"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r:.40}: it must be true or false")
        for name in ("qk_gain", "rope_base", "logit_softcap"):
            number = getattr(self, name)
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not is_number or not 0 <= number < math.inf or (number == 0 and name != "logit_softcap"):
                raise UserError(f"{name} is {number!r:.40}: it must be a positive number")
        if not isinstance(self.window_pattern, str):
            raise UserError(f"the window pattern is {self.window_pattern!r:.40}: it must be a text")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> list[int]:
        """Window of each layer in tokens: a query sees its own key and that many before it."""
        quarter = math.ceil(self.sequence_len / 4 / SHORT_WINDOW_MULTIPLE) * SHORT_WINDOW_MULTIPLE
        sizes = {"S": min(quarter, self.sequence_len), "L": self.sequence_len}
        pattern = self.window_pattern
        windows = [sizes[pattern[i % len(pattern)]] for i in range(self.n_layer)]
        windows[-1] = self.sequence_len
        return windows

    @property
    def attention_shape(self) -> AttentionShape:
        return AttentionShape(self.sequence_len, self.n_head, self.n_kv_head, self.head_dim, tuple(self.windows))

    @property
    def layers_with_value_embeds(self) -> list[int]:
        """Every second layer, counted so that the last one is among them."""
        if not self.value_embeds:
            return []
        return [i for i in range(self.n_layer) if i % 2 == (self.n_layer - 1) % 2]

    @property
    def kv_width(self) -> int:
        """Channels of the keys of one layer, and of its values."""
        return self.n_kv_head * self.head_dim


# ADDITIONS: the fields of the additions, which other programs do not implement. PORTABLE: the values of a model
# without them, with full windows and without softcap, which a converter can export. On a small corpus nothing is lost:
# depth 12 on 28 M tokens ended at 1.3209 bits per byte against 1.3300 for the full model.
ADDITIONS = ("value_embeds", "smear", "backout", "residual_scalars")
PORTABLE: dict[str, Any] = dict.fromkeys(ADDITIONS, False) | {"window_pattern": "L", "logit_softcap": 0.0}


Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin at the positions of the tokens, against (B, T, H, D/2)


class Cache(Protocol):
    """The KV cache as the model sees it during one forward pass; engine.py and eval/ implement it."""

    positions_BT: torch.Tensor  # of the tokens that are passed in
    previous_B1: torch.Tensor  # the token before the first one of each row; anything at the start of a sequence

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Stores the new keys and values, and returns the attention of the queries to all keys that they see."""
        ...


class LayerInputs(NamedTuple):
    """What all layers read."""

    x0_BTC: torch.Tensor  # the embedding of the tokens
    idx_BT: torch.Tensor
    rotary: Rotary
    cache: Cache | None
    columns_BQ: torch.Tensor | None = None  # the tokens that the last layer computes, see GPT.hidden; None = all


# ---- parts ----


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last axis (arXiv 1910.07467), without learned weights; GPTConfig.norm_gains adds some."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotary_table(length: int, head_dim: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * base^(-2j/D), each (length, D/2) in float32."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary positions (arXiv 2104.09864). Channel j of the first half and channel j of the second half are a point in a
    plane, which is rotated by minus the angle of the position: the product of a query and a key then depends on their
    distance only. cos and sin broadcast against (B, T, H, D/2).
    """
    x1, x2 = x_BTHD.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def select_columns(x_BT: torch.Tensor, columns_BQ: torch.Tensor | None) -> torch.Tensor:
    """(B, T, …) → (B, Q, …): the given columns of each row; all of them for None."""
    if columns_BQ is None:
        return x_BT
    return x_BT[torch.arange(x_BT.size(0), device=x_BT.device)[:, None], columns_BQ]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.window = config.windows[layer]
        self.head_dim = config.head_dim
        self.gain = config.qk_gain
        self.attend: Kernel = attend
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_width)
        self.c_v = Linear(config.n_embd, config.kv_width)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.c_qkv = JointLinear(self.c_q, self.c_k, self.c_v)
        self.has_value_embeds = layer in config.layers_with_value_embeds
        if self.has_value_embeds:
            self.ve_gate = Linear(VE_GATE_CHANNELS, config.n_kv_head)

    def forward(self, x_BTC: torch.Tensor, value_embed_BTKD: torch.Tensor | None, inputs: LayerInputs) -> torch.Tensor:
        cos, sin = inputs.rotary
        cos_Q, sin_Q = select_columns(cos, inputs.columns_BQ), select_columns(sin, inputs.columns_BQ)
        q, k, v = self.project(x_BTC, inputs.columns_BQ)
        if value_embed_BTKD is not None:
            gate_BTK = VE_GATE_SCALE * torch.sigmoid(self.ve_gate(x_BTC[..., :VE_GATE_CHANNELS]))
            v = v + gate_BTK.unsqueeze(-1) * value_embed_BTKD
        q = self.gain * norm(rotate(q, cos_Q, sin_Q))
        k = self.gain * norm(rotate(k, cos, sin))
        if inputs.cache is None:
            y = self.attend(q, k, v, self.window)
        else:
            y = inputs.cache.attend(self.layer, q, k, v, self.window)
        return self.c_proj(y.flatten(2))

    def project(self, x_BTC: torch.Tensor, columns_BQ: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Queries (B, Q, H, D), keys and values (B, T, K, D), not normed and not rotated yet."""
        if columns_BQ is None:
            projected = self.c_qkv(x_BTC)
        else:
            projected = self.c_q(select_columns(x_BTC, columns_BQ)), self.c_k(x_BTC), self.c_v(x_BTC)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        return q, k, v


class MLP(nn.Module):
    """Two matrices with relu² between them: as good as GELU or better, and cheaper (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.fused: MlpKernel | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused is not None and torch.is_grad_enabled():
            return self.fused(x, self.c_fc.weight.to(x.dtype), self.c_proj.weight.to(x.dtype))
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normed stream and added to it (pre-norm)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.mlp_norm: Callable[[torch.Tensor], torch.Tensor] = norm  # packed.py does it within the MLP's first product

    def forward(
        self,
        x: torch.Tensor,
        value_embed: torch.Tensor | None,
        inputs: LayerInputs,
        mlp_gain_C: torch.Tensor | None,
    ) -> torch.Tensor:
        x = select_columns(x, inputs.columns_BQ) + self.attn(norm(x), value_embed, inputs)
        normed = self.mlp_norm(x)
        if mlp_gain_C is not None:
            normed = normed * mlp_gain_C.to(x.dtype)
        return x + self.mlp(normed)


class Trunk(nn.Module):
    """
    Token embeddings and layers. The attribute names `transformer` (in GPT), `wte` and `h` are part of the parameter
    names in checkpoints.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])


class Factors(NamedTuple):
    """Learned factors of a layer; None if the model does not have them."""

    resid_lambda: torch.Tensor | None  # on the residual stream before the layer
    x0_lambda: torch.Tensor | None  # on the embedding, which is added to it
    mlp_gain_C: torch.Tensor | None  # on the normed input of the MLP


def run_layer(
    block: Block,
    table: nn.Module | None,  # its value embeddings
    factors: Factors,
    x: torch.Tensor,
    inputs: LayerInputs,
) -> torch.Tensor:
    """The residual stream after a layer. The number of the layer is not passed: it would be a constant in its code."""
    if factors.resid_lambda is not None and factors.x0_lambda is not None:
        x = factors.resid_lambda * x + factors.x0_lambda * inputs.x0_BTC
    value_embed = None
    if table is not None:
        value_embed = table(inputs.idx_BT).to(x.dtype).unflatten(-1, (-1, block.attn.head_dim))
    return block(x, value_embed, inputs, factors.mlp_gain_C)


# ---- the model ----


class GPT(nn.Module):
    """
    The whole model. Parameters are float32; `dtype` is the dtype that the forward pass computes in.

    The constructor allocates the parameters on the device but gives them no values: GPT.create initialises them for
    training, load_state_dict fills them from a checkpoint.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: GPTConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        # Training keeps only the input of each layer and computes the rest again in the backward pass: at depth 24 a
        # 13th of the memory for activations, for a third more FLOPs (arXiv 1604.06174).
        self.activation_checkpointing = False
        self.run_start, self.run_layer, self.run_loss = GPT._start, run_layer, GPT._loss  # see compile_parts
        device = torch.device(device)
        with torch.device("meta"):  # shapes without memory: torch's own initialisation would take longer than loading
            self.transformer = Trunk(config)
            self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
            # The tables are in float32 like all weights. In bfloat16 with float32 moments they would save 2.6 GB at
            # depth 24, but the validation loss was higher: 5.640 instead of 5.605 nats, 5.653 with stochastic rounding
            # (one seed, depth 4, 200 steps of 2,048 tokens, on a CPU).
            self.value_embeds = nn.ModuleDict()
            for i in config.layers_with_value_embeds:
                self.value_embeds[str(i)] = nn.Embedding(config.padded_vocab_size, config.kv_width)
            if config.residual_scalars:
                self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
                self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
            if config.smear:
                self.smear_gate = Linear(SMEAR_CHANNELS, 1)
                self.smear_lambda = nn.Parameter(torch.empty(1))
            if config.backout:
                self.backout_lambda = nn.Parameter(torch.empty(1))
            if config.norm_gains:
                self.mlp_gains = nn.Parameter(torch.empty(config.n_layer, config.n_embd))
                self.final_gain = nn.Parameter(torch.empty(config.n_embd))
        self.to_empty(device=device)
        cos, sin = rotary_table(config.sequence_len, config.head_dim, config.rope_base, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @classmethod
    def create(cls, config: GPTConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> "GPT":
        """A new model with initial weights, drawn from torch's global generator of the device."""
        model = cls(config, device, dtype)
        model.init_weights()
        return model

    @property
    def device(self) -> torch.device:
        return self.cos.device

    def use_attention(self, kernel: Kernel) -> None:
        """Sets the kernel for whole sequences (attention.choose). The default kernel runs on every device."""
        for block in cast(Iterable[Block], self.transformer.h):
            block.attn.attend = kernel

    def use_mlp(self, kernel: MlpKernel | None) -> None:
        """Sets the kernel of the MLPs for training (kernels/mlp.py); None = the plain formula."""
        for block in cast(Iterable[Block], self.transformer.h):
            block.mlp.fused = kernel

    @torch.no_grad()
    def init_weights(self) -> None:
        """
        Initial values, drawn from torch's global generator of the model's device.

        Most matrices are uniform (no outliers) with standard deviation 1/sqrt(C), so that activations keep their size;
        c_fc has 0.4 of that. Matrices that write into the residual stream are zero: every block starts as the identity,
        and the gradient reaches all of them, changed only by the residual scalars (compare Fixup, arXiv 1901.09321).
        lm_head is almost zero: a new model gives all tokens almost the same probability.
        """
        # Only for new models: torch's default values are drawn first and replaced below. Drawing them advances the
        # random generator, so that a seed gives the same weights as in earlier versions.
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.reset_parameters()
        config = self.config
        bound = math.sqrt(3 / config.n_embd)  # a uniform distribution in ±bound has standard deviation bound / sqrt(3)
        self.transformer.wte.weight.normal_(std=0.8)
        self.lm_head.weight.normal_(std=0.001)
        for block in cast(Iterable[Block], self.transformer.h):
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                linear.weight.uniform_(-bound, bound)
            block.mlp.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.has_value_embeds:
                block.attn.ve_gate.weight.uniform_(0, 0.02)  # slightly positive: sigmoid just above 1/2
        for table in self.value_embeds.parameters():
            table.uniform_(-bound, bound)
        self._init_factors()

    def _init_factors(self) -> None:
        config = self.config
        if config.residual_scalars:
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, config.n_layer))
            self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, config.n_layer))
        if config.smear:
            self.smear_gate.weight.uniform_(0, 0.02)
            self.smear_lambda.zero_()
        if config.backout:
            self.backout_lambda.fill_(0.2)
        if config.norm_gains:
            self.mlp_gains.fill_(1.0)
            self.final_gain.fill_(1.0)

    def cast_weights(self) -> None:
        """For inference only: casts matrices and tables to the compute dtype once, instead of at every use."""
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
        Logits (B, T, V) in float32. With targets, the cross entropy in nats, where targets of -1 are ignored: a scalar
        for reduction "mean" or "sum", (B, T) for "none".
        """
        if targets_BT is None:
            return self.logits(self.hidden(idx_BT, cache))
        return self.run_loss(self, *self._run_layers(idx_BT, cache), targets_BT, reduction)

    def hidden(
        self, idx_BT: torch.Tensor, cache: Cache | None = None, columns_BQ: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The final normed states, (B, T, C). columns_BQ (only with a cache) selects tokens of each row: the result is
        then (B, Q, C), and the last layer computes only these and passes only their queries to cache.attend. Without
        that CORE takes 1.29 times as long at depth 4 (Zen 4, float32, CPU time of one thread, medians of 5).
        """
        return GPT._end(self, *self._run_layers(idx_BT, cache, columns_BQ))

    def compile_parts(self, **options: Any) -> None:
        """
        Compiles what precedes the layers, a layer, and what follows them, for calls without a cache. Layers of one kind
        share their code, so the time does not grow with the depth: on two cores 40 s at depth 24 in FP8, where
        torch.compile takes 120 s for the whole model, whose activations take 4 % more memory. `options` go to
        torch.compile.
        """
        torch._dynamo.config.recompile_limit = 32  # kinds of layers, each with and without gradients; 8 by default
        compile = partial(torch.compile, dynamic=False, **options)
        self.run_start, self.run_layer, self.run_loss = compile(GPT._start), compile(run_layer), compile(GPT._loss)

    def _run_layers(
        self, idx_BT: torch.Tensor, cache: Cache | None, columns_BQ: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after the last layer and after the middle one."""
        config = self.config
        start, layer = GPT._start, run_layer
        if cache is None:
            start, layer = self.run_start, self.run_layer
        x, rotary = start(self, idx_BT, cache)
        middle = x
        inputs = LayerInputs(x, idx_BT, rotary, cache)
        factors = self._factors()
        recomputes = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(cast(Iterable[Block], self.transformer.h)):
            table = self.value_embeds[str(i)] if str(i) in self.value_embeds else None
            if i == config.n_layer - 1:
                inputs = inputs._replace(columns_BQ=columns_BQ)
            arguments = block, table, factors[i], x, inputs
            if recomputes:  # nothing in a layer is random, so the state of the random generator need not be restored
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
            if i == config.n_layer // 2:
                middle = x
        if config.n_layer > 2:  # with 1 or 2, `middle` comes from the last layer, which has selected the columns
            middle = select_columns(middle, columns_BQ)
        return x, middle

    def _factors(self) -> list[Factors]:
        """Of each layer. unbind: its gradient is one stack, that of an index per layer is a sum of vectors."""
        missing: Iterable[Any] = [None] * self.config.n_layer
        resid_lambdas = x0_lambdas = gains = missing
        if self.config.residual_scalars:
            resid_lambdas, x0_lambdas = self.resid_lambdas.unbind(), self.x0_lambdas.unbind()
        if self.config.norm_gains:
            gains = self.mlp_gains.unbind()
        return [Factors(*factors) for factors in zip(resid_lambdas, x0_lambdas, gains, strict=True)]

    # The parts that compile_parts compiles. A copy of the model calls them too, so they are given the model.

    def _start(self, idx_BT: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Rotary]:
        x = self._embed(idx_BT)
        if self.config.smear:
            x = self._smear(x, cache)
        return x, self._rotary(idx_BT, cache)

    def _end(self, x: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        if self.config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        x = norm(x)
        return x * self.final_gain.to(x.dtype) if self.config.norm_gains else x

    def _loss(self, x: torch.Tensor, middle: torch.Tensor, targets_BT: torch.Tensor, reduction: str) -> torch.Tensor:
        loss = cross_entropy(
            GPT._end(self, x, middle).flatten(0, 1),
            self.lm_head.weight,
            targets_BT.flatten(),
            vocab_size=self.config.vocab_size,
            cap=self.config.logit_softcap,
            reduction=reduction,
        )
        return loss.view_as(targets_BT) if reduction == "none" else loss

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, V) in float32, soft-capped, without the padding of the vocabulary."""
        return softcap(self.lm_head(hidden)[..., : self.config.vocab_size].float(), self.config.logit_softcap)

    def _embed(self, idx_BT: torch.Tensor) -> torch.Tensor:
        return norm(self.transformer.wte(idx_BT).to(self.dtype))

    def _rotary(self, idx_BT: torch.Tensor, cache: Cache | None) -> Rotary:
        """cos and sin at the tokens' positions, in the compute dtype, to broadcast against (B, T, H, D/2)."""
        num_tokens = idx_BT.size(1)
        assert cache or num_tokens <= self.config.sequence_len, f"{num_tokens} tokens do not fit the context"
        positions = slice(num_tokens) if cache is None else cache.positions_BT
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        return cos.to(self.dtype), sin.to(self.dtype)

    def _smear(self, x_BTC: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Adds a gated share of the previous token's embedding to each token's."""
        if cache is None:
            previous_B1C = torch.zeros_like(x_BTC[:, :1])
        else:
            previous_B1C = self._embed(cache.previous_B1) * (cache.positions_BT[:, :1, None] > 0)
        previous_BTC = torch.cat([previous_B1C, x_BTC[:, :-1]], dim=1)
        gate_BT1 = self.smear_lambda.to(x_BTC.dtype) * torch.sigmoid(self.smear_gate(x_BTC[..., :SMEAR_CHANNELS]))
        return x_BTC + gate_BT1 * previous_BTC
