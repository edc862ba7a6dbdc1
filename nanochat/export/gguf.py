r"""
Export of portable models to GGUF, the file format of llama.cpp, ollama and LM Studio.

    python -m scripts.export -i sft --to gguf --dtype q8_0 --out chat/model.gguf

llama.cpp does not know our architecture. But one that it knows, `apertus`, computes exactly what a model of the
portable profile (base_train --portable) computes, if the weights are rewritten:

- relu²: the activation of apertus is xIELU (arXiv 2411.13010): softplus(α_p) x² + β x for x > 0, and otherwise
  softplus(α_n) (e^x - 1 - x) + β x. With α_p = ln(e - 1), α_n = -100 and β = 0 the factors are 1 and 0 (3.7e-44).
- The norm after the embedding looks at one token only, so the table holds normed rows.
- Norms have weights there: ones, and for queries and keys the gain. Rotation and norm are interchangeable.
- llama.cpp rotates by plus the angle, we rotate by minus the angle. Swapping the halves of each query and key head
  reverses the direction.
- The portable split pattern has the name "bailingmoe" in llama.cpp.

An ollama Modelfile is written next to the file. There is no calculator: llama.cpp generates its call as text.

Shapes: V vocabulary, C channels, H heads (of queries or keys), D channels per head.
"""

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.export.common import Format, Source
from nanochat.export.hf_tokenizer import CHAT_TEMPLATE, byte_characters, merges
from nanochat.gpt import ADDITIONS, NORM_EPS, GPTConfig, norm
from nanochat.tokenizer import PORTABLE_SPLIT_PATTERN, SPECIAL_TOKENS, Tokenizer

# --dtype → GGUF's name of such a file. Norm weights are always float32.
FILE_TYPES = {"f16": "MOSTLY_F16", "f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
Q8_BLOCK = 32  # q8_0: weights that share a scale
XIELU = {"alpha_p": math.log(math.e - 1), "alpha_n": -100.0, "beta": 0.0, "eps": -1e-6}
# With f16 weights llama.cpp rounds activations to float16, which ends at 65,504, and relu² can exceed it. Dividing c_fc
# by 8 and multiplying c_proj by 8² leaves every result as it was: these are powers of two.
F16_SHRINK = 8.0
TEMPERATURE, TOP_K = 0.6, 50  # as chat_cli and chat_web

# The chat template in ollama's template language (that of Go), which adds <|bos|> itself. The system message is joined
# to the first user message.
OLLAMA_TEMPLATE = """\
{{- $system := "" }}
{{- range .Messages }}
{{- if eq .Role "system" }}{{ $system = printf "%s\\n\\n" .Content }}
{{- else if eq .Role "user" }}<|user_start|>{{ $system }}{{ .Content }}<|user_end|>{{ $system = "" }}
{{- else if eq .Role "assistant" }}<|assistant_start|>{{ .Content }}<|assistant_end|>
{{- end }}
{{- end }}<|assistant_start|>"""


def check(source: Source) -> None:
    """UserError, which names what stands in the way, unless llama.cpp can compute what the model computes."""
    obstacles = list(find_obstacles(source.config, source.tokenizer))
    if obstacles:
        raise UserError(
            f"llama.cpp cannot express {source.checkpoint.path}, because of {', '.join(obstacles)}: train a portable "
            "model (tok_train --portable, then base_train --portable), or use --to hf or html"
        )
    if source.dtype == "q8_0" and source.config.n_embd % Q8_BLOCK:
        raise UserError(
            f"--dtype q8_0 needs a width that is a multiple of {Q8_BLOCK}, this model has {source.config.n_embd}: "
            "use --dtype f16"
        )
    if not importlib.util.find_spec("gguf"):
        raise UserError("--to gguf needs the package gguf: pip install 'nanochat[gguf]'")


def find_obstacles(config: GPTConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the features of a model that `apertus` does not have."""
    for name in ADDITIONS:
        if getattr(config, name):
            yield name.replace("_", " ")
    if min(config.windows) < config.sequence_len:
        yield f"sliding windows ({config.window_pattern})"
    if config.logit_softcap:
        yield f"the logit softcap ({config.logit_softcap:g})"
    if tokenizer.pattern != PORTABLE_SPLIT_PATTERN:
        yield "the tokenizer's split pattern"


def num_bytes(source: Source) -> int:
    """Size of the weights, with their scales, and of the tokenizer."""
    bits = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}[source.dtype]
    num_weights = sum(math.prod(tensor.shape) for tensor in tensors_of(source.config))
    return round(bits / 8 * num_weights) + 200 * source.config.vocab_size


def write(source: Source, file: Path) -> None:
    """Writes the GGUF file. Converts tensor by tensor, so that only one converted tensor is in memory."""
    import gguf

    writer = gguf.GGUFWriter(file, "apertus")
    add_model(writer, source)
    add_tokenizer(writer, source.tokenizer, chats=source.stage != "base")
    tensors = tensors_of(source.config)
    matrix_type = gguf.GGMLQuantizationType[source.dtype.upper()]
    types = {t.name: matrix_type if len(t.shape) > 1 else gguf.GGMLQuantizationType.F32 for t in tensors}
    for tensor in tensors:
        size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, types[tensor.name]))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=types[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    by_name = {tensor.name: tensor for tensor in tensors}
    for name in source.track(list(by_name), "writing"):
        weights = convert(by_name[name], source)
        writer.write_tensor_data(gguf.quantize(weights.contiguous().numpy(), types[name]))
    writer.close()


# ---- metadata ----


def add_model(writer: Any, source: Source) -> None:
    """Adds sizes and hyperparameters. `writer` is a gguf.GGUFWriter."""
    import gguf

    config = source.config
    writer.add_type("model")
    writer.add_name(f"{source.checkpoint.tag} {source.stage}")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[source.dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    for name, value in XIELU.items():
        writer.add_array(f"xielu.{name}", [value] * config.n_layer)
    writer.add_sampling_temp(TEMPERATURE)
    writer.add_sampling_top_k(TOP_K)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, *, chats: bool) -> None:
    """
    Adds tokens, merges, special tokens and, if the model `chats`, the chat template. A completion ends with
    <|assistant_end|> or <|bos|>, as in our engine.
    """
    import gguf

    characters = byte_characters()

    def as_text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    types = [gguf.TokenType.NORMAL] * len(tokenizer.tokens) + [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("bailingmoe")
    writer.add_token_list([as_text(token) for token in tokenizer.tokens] + list(SPECIAL_TOKENS))
    writer.add_token_types(types)
    writer.add_token_merges([f"{as_text(left)} {as_text(right)}" for left, right in merges(tokenizer.tokens)])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.special("<|assistant_end|>"))
    writer.add_eot_token_id(tokenizer.bos)
    writer.add_add_bos_token(True)
    if chats:
        writer.add_chat_template(chat_template())


def chat_template() -> str:
    """The template of the hf export without the marks of generated text, which only training needs."""
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


def companions(source: Source, out: Path) -> dict[Path, str]:
    """The Modelfile for ollama. It turns off ollama's penalty for repetitions, which our engine does not have."""
    template = "{{ .Prompt }}" if source.stage == "base" else OLLAMA_TEMPLATE
    text = f'''\
FROM ./{out.name}
TEMPLATE """{template}"""
PARAMETER stop "<|assistant_end|>"
PARAMETER stop "<|bos|>"
PARAMETER num_ctx {source.config.sequence_len}
PARAMETER temperature {TEMPERATURE}
PARAMETER top_k {TOP_K}
PARAMETER top_p 1
PARAMETER min_p 0
PARAMETER repeat_penalty 1
'''
    return {out.with_name("Modelfile"): text}


# ---- tensors ----


@dataclass(frozen=True)
class TensorSource:
    """A tensor of the file and where it comes from."""

    name: str  # in the file
    parameter: str  # our name; "" for the weights of a norm, which we do not have
    shape: tuple[int, ...]


def tensors_of(config: GPTConfig) -> list[TensorSource]:
    """All tensors of the file."""
    C = config.n_embd
    tensors = [
        TensorSource("token_embd.weight", "transformer.wte.weight", (config.vocab_size, C)),
        TensorSource("output_norm.weight", "", (C,)),
        TensorSource("output.weight", "lm_head.weight", (config.vocab_size, C)),
    ]
    in_block = [
        TensorSource("attn_norm", "", (C,)),
        TensorSource("attn_q_norm", "", (config.head_dim,)),
        TensorSource("attn_k_norm", "", (config.head_dim,)),
        TensorSource("attn_q", "attn.c_q", (C, C)),
        TensorSource("attn_k", "attn.c_k", (config.kv_width, C)),
        TensorSource("attn_v", "attn.c_v", (config.kv_width, C)),
        TensorSource("attn_output", "attn.c_proj", (C, C)),
        TensorSource("ffn_norm", "", (C,)),
        TensorSource("ffn_up", "mlp.c_fc", (4 * C, C)),
        TensorSource("ffn_down", "mlp.c_proj", (C, 4 * C)),
    ]
    for layer in range(config.n_layer):
        for tensor in in_block:
            parameter = f"transformer.h.{layer}.{tensor.parameter}.weight" if tensor.parameter else ""
            tensors.append(TensorSource(f"blk.{layer}.{tensor.name}.weight", parameter, tensor.shape))
    return tensors


def convert(tensor: TensorSource, source: Source) -> torch.Tensor:
    """The values of a tensor of the file, in float32."""
    config, name = source.config, tensor.name
    if not tensor.parameter:
        return torch.full(tensor.shape, config.qk_gain if "_q_norm" in name or "_k_norm" in name else 1.0)
    weight = source.weights[tensor.parameter]
    if name == "token_embd.weight":
        return norm(source.unpad(weight))
    if name == "output.weight":
        return source.unpad(weight)
    if "attn_q." in name or "attn_k." in name:
        return swap_halves(weight, config.head_dim)
    if source.dtype == "f16" and "ffn_up" in name:
        return weight / F16_SHRINK
    if source.dtype == "f16" and "ffn_down" in name:
        return weight * F16_SHRINK**2
    return weight


def swap_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Swaps the two halves of the rows of each head: (H D, C) → (H D, C)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)


FORMAT = Format(dtypes=tuple(FILE_TYPES), check=check, num_bytes=num_bytes, write=write, companions=companions)
