"""The configuration of a nanochat model for transformers. config.json holds its values."""

from transformers import PretrainedConfig


class NanoChatConfig(PretrainedConfig):
    """Sizes under the names that transformers uses for all models, and a field for each feature of nanochat."""

    model_type = "nanochat_modern"  # "nanochat" is the class of transformers for models without these features
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        *,
        vocab_size=32768,
        hidden_size=768,
        intermediate_size=3072,
        # Attention layers of the KV cache: with smear, one more than there are layers with weights (PreviousToken).
        num_hidden_layers=13,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=128,
        max_position_embeddings=2048,
        layer_types=None,  # "full_attention" or "sliding_attention" for each layer; default: all full
        sliding_window=None,  # keys that a query sees in a sliding layer, its own included
        rms_norm_eps=1.1920929e-07,
        rope_theta=100_000.0,
        qk_gain=1.2,  # factor on normed queries and keys
        final_logit_softcapping=15.0,  # None = logits are not capped
        value_embeds=True,  # attention adds an embedding of the token to its values, in every second layer
        smear=True,  # each token's embedding takes in a little of the previous token's
        backout=True,  # a multiple of the middle layer's output is subtracted at the end
        residual_scalars=True,  # learned factors on the residual stream and on the embedding, before each layer
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.qk_gain = qk_gain
        self.final_logit_softcapping = final_logit_softcapping
        self.value_embeds = value_embeds
        self.smear = smear
        self.backout = backout
        self.residual_scalars = residual_scalars
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def num_weighted_layers(self):
        """Layers with attention and MLP."""
        return self.num_hidden_layers - 1 if self.smear else self.num_hidden_layers

    @property
    def layers_with_value_embeds(self):
        """Every second layer, counted so that the last one is among them."""
        last = self.num_weighted_layers - 1
        return [i for i in range(last + 1) if self.value_embeds and i % 2 == last % 2]
