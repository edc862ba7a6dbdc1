"""
A nanochat model for transformers: a decoder-only transformer with rotary positions, normed queries and keys, relu² in
the MLP, grouped key/value heads and sliding windows, and four additions: value embeddings, smear, backout and residual
scalars. Needs torch and transformers only.

Shapes: B sequences, T tokens, C channels, H query heads, K key/value heads, D channels per head, V vocabulary, L tokens
that a query can attend to.

A difference to other models: smear needs the previous token, also when it was part of an earlier call. It is found by
one more attention layer, without weights (PreviousToken). So the previous token comes out of the ordinary KV cache, and
every cache works: static ones, beam search, prefix sharing, and the paged cache of vLLM, which the model never sees.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_nanochat import NanoChatConfig

SMEAR_CHANNELS = 24  # channels that the smear gate reads
VALUE_GATE_CHANNELS = 12  # channels that the gate of the value embeddings reads
VALUE_GATE_SCALE = 3.0  # a value embedding is added with a weight between 0 and this
POSITION_BITS = 20  # of PreviousToken: more than a million positions
NUM_DIGITS = 8  # of a token id in PreviousToken
DIGIT_BITS = 4  # bits of such a digit: small enough that digits are exact in every dtype, FP8 included
# transformers 5.24 renamed the argument and the output of the KV cache.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def norm(x, eps):
    """RMS norm over the last axis, without learned weights."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotary_tables(config, position_ids, dtype):
    """cos and sin of each token's angles, (B, 1, T, D/2): computed here, because from_pretrained keeps no buffers."""
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32) / config.head_dim
    angles = position_ids[:, None, :, None].float() * config.rope_theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHTD, cos, sin):
    """Rotary positions: turns channel j of both halves by minus the angle of the position."""
    x1, x2 = x_BHTD.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in plain torch. query (B, H, T, D), key and value (B, K, L, D) → (B, T, H, D) and the weights."""
    groups = query.size(1) // key.size(1)
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionLayer(nn.Module):
    """What both kinds of attention layers share: the slot in the KV cache and the choice of the attention backend."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None

    def attend(self, query_BHTD, key_BKTD, value_BKTD, masks, cache, **kwargs):
        """Adds keys and values to the cache and attends to all of them; returns (B, T, H * D)."""
        if cache is not None:
            key_BKTD, value_BKTD = cache.update(key_BKTD, value_BKTD, self.layer_idx)
        backend = self.config._attn_implementation
        function = eager_attention if backend == "eager" else ALL_ATTENTION_FUNCTIONS[backend]
        kwargs |= {"scaling": self.scaling, "dropout": 0.0, "sliding_window": self.sliding_window}
        output, _ = function(self, query_BHTD, key_BKTD, value_BKTD, masks[self.layer_type], **kwargs)
        B, _, T, _ = query_BHTD.shape
        return output.reshape(B, T, -1)


class PreviousToken(AttentionLayer):
    """
    Attention that returns the token before each token.

    The key of a token is the binary representation of its position, as channels of ±1, and the query is that of the
    position before. Their product is largest for the right key, and the factor on the query is so large that softmax
    gives it a weight of 1. The values are the digits of the token ids.
    """

    QUERY_SCALE = 512.0  # two keys differ in the scores by at least 1024 / sqrt(D): the smaller one gets no weight

    def forward(self, input_ids, position_ids, dtype, masks, cache, **kwargs):
        """Returns the ids of the previous tokens, (B, T). For the first token of a sequence the result is arbitrary."""
        query_BTD = self.QUERY_SCALE * self.as_signs(position_ids - 1, dtype)
        key_BTD = self.as_signs(position_ids, dtype)
        shifts = DIGIT_BITS * torch.arange(self.config.head_dim, device=input_ids.device).clamp(max=NUM_DIGITS)
        value_BTD = (input_ids[..., None] >> shifts & (2**DIGIT_BITS - 1)).to(dtype)
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        query = query_BTD[:, None].expand(-1, H, -1, -1)
        key, value = key_BTD[:, None].expand(-1, K, -1, -1), value_BTD[:, None].expand(-1, K, -1, -1)
        output = self.attend(query, key, value, masks, cache, **kwargs)
        digits = output[..., :NUM_DIGITS].round().long()  # of the first head; all heads return the same
        return (digits << shifts[:NUM_DIGITS]).sum(dim=-1).clamp(0, self.config.vocab_size - 1)

    def as_signs(self, position_ids, dtype):
        """The bits of the positions as ±1, followed by zeros, (B, T, D)."""
        channels = torch.arange(self.config.head_dim, device=position_ids.device)
        signs = 2 * (position_ids[..., None] >> channels.clamp(max=POSITION_BITS) & 1) - 1
        return torch.where(channels < POSITION_BITS, signs, 0).to(dtype)


class NanoChatAttention(AttentionLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.has_value_embeds = layer_idx in config.layers_with_value_embeds
        if self.has_value_embeds:
            self.value_embed = nn.Embedding(config.vocab_size, K * D)
            self.value_gate = nn.Linear(VALUE_GATE_CHANNELS, K, bias=False)

    def forward(self, x_BTC, input_ids, rotary, masks, cache, **kwargs):
        B, T, _ = x_BTC.shape
        D, eps, gain = self.config.head_dim, self.config.rms_norm_eps, self.config.qk_gain
        q = self.q_proj(x_BTC).view(B, T, -1, D).transpose(1, 2)
        k = self.k_proj(x_BTC).view(B, T, -1, D).transpose(1, 2)
        v = self.v_proj(x_BTC).view(B, T, -1, D)
        if self.has_value_embeds:
            gate = VALUE_GATE_SCALE * torch.sigmoid(self.value_gate(x_BTC[..., :VALUE_GATE_CHANNELS]))
            v = v + gate[..., None] * self.value_embed(input_ids).view(B, T, -1, D)
        q = gain * norm(rotate(q, *rotary), eps)
        k = gain * norm(rotate(k, *rotary), eps)
        return self.o_proj(self.attend(q, k, v.transpose(1, 2), masks, cache, **kwargs))


class NanoChatMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)).square())


class NanoChatDecoderLayer(GradientCheckpointingLayer):
    """Attention, then MLP, each on the normed residual stream and added to it."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = NanoChatAttention(config, layer_idx)
        self.mlp = NanoChatMLP(config)

    def forward(self, x_BTC, input_ids, rotary, masks, cache=None, **kwargs):
        x_BTC = x_BTC + self.self_attn(norm(x_BTC, self.eps), input_ids, rotary, masks, cache, **kwargs)
        return x_BTC + self.mlp(norm(x_BTC, self.eps))


class NanoChatPreTrainedModel(PreTrainedModel):
    config_class = NanoChatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoChatDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


class NanoChatModel(NanoChatPreTrainedModel):
    """The model without lm_head."""

    def __init__(self, config):
        super().__init__(config)
        num_layers = config.num_weighted_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([NanoChatDecoderLayer(config, i) for i in range(num_layers)])
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(num_layers))
            self.x0_lambdas = nn.Parameter(torch.zeros(num_layers))
        if config.smear:
            self.previous_token = PreviousToken(config, num_layers)
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        **kwargs,  # for the attention backend
    ):
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("nanochat models need input_ids: value embeddings and smear are looked up by token")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if position_ids is None:
            position_ids = self.positions(input_ids, attention_mask, cache)
        position_ids = position_ids.expand_as(input_ids)
        x = norm(self.embed_tokens(input_ids), self.config.rms_norm_eps)
        # Masks are made before a new cache: only without a cache, position_ids that restart separate packed sequences.
        masks = self.masks(x, attention_mask, position_ids, cache)
        if use_cache and cache is None and not (self.gradient_checkpointing and self.training):
            cache = DynamicCache(config=self.config)
        if self.config.smear:
            previous_ids = self.previous_token(input_ids, position_ids, x.dtype, masks, cache, **kwargs)
            x = self.smear(x, previous_ids, position_ids)
        rotary = rotary_tables(self.config, position_ids, x.dtype)
        states = self.run_layers(x, input_ids, rotary, masks, cache, **kwargs)
        output = BaseModelOutputWithPast(
            last_hidden_state=states[-1], hidden_states=states if output_hidden_states else None, **{CACHE: cache}
        )
        return output.to_tuple() if return_dict is False else output

    def run_layers(self, x, input_ids, rotary, masks, cache, **kwargs):
        """The inputs of all layers and the final normed states, each (B, T, C)."""
        states = []
        x0 = middle = x
        for i, layer in enumerate(self.layers):
            states.append(x)
            if self.config.residual_scalars:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            x = layer(x, input_ids, rotary, masks, cache=cache, **kwargs)
            if i == len(self.layers) // 2:
                middle = x
        if self.config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        return (*states, norm(x, self.config.rms_norm_eps))

    def positions(self, input_ids, attention_mask, cache):
        """The position of each token in its sequence, (B, T) or (1, T); padding on the left is not counted."""
        T = input_ids.size(1)
        if attention_mask is not None and not isinstance(attention_mask, dict) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -T:]
        num_cached = cache.get_seq_length() if cache is not None else 0
        return torch.arange(T, device=input_ids.device)[None] + num_cached

    def masks(self, x_BTC, attention_mask, position_ids, cache):
        """The mask of each layer type, in the form that the attention backend takes."""
        if isinstance(attention_mask, dict):  # generate() makes the masks of static caches itself
            return attention_mask
        arguments = (self.config, x_BTC, attention_mask, cache, position_ids)
        masks = {"full_attention": create_causal_mask(*arguments)}
        if "sliding_attention" in self.config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(*arguments)
        return masks

    def smear(self, x_BTC, previous_ids, position_ids):
        """Adds a gated share of the previous token's embedding, except to the first token of a sequence."""
        previous_BTC = norm(self.embed_tokens(previous_ids), self.config.rms_norm_eps)
        gate_BT1 = self.smear_lambda.to(x_BTC.dtype) * torch.sigmoid(self.smear_gate(x_BTC[..., :SMEAR_CHANNELS]))
        return x_BTC + torch.where(position_ids[..., None] > 0, gate_BT1 * previous_BTC, 0.0)


class NanoChatForCausalLM(NanoChatPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = NanoChatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Logits (B, T, V) in float32, of the last logits_to_keep tokens or of all for 0; with labels, the loss too."""
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept]).float()
        cap = self.config.final_logit_softcapping
        if cap:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            **{CACHE: output[CACHE] if CACHE in output else None},
        )
        return result.to_tuple() if return_dict is False else result
