"""
Export to Hugging Face: a folder that AutoModelForCausalLM and AutoTokenizer of transformers load.

transformers has a class for the classic vintage, NanoChatForCausalLM. All other models come with a modelling file in
the folder (hf_files/), which users allow with trust_remote_code=True. Both use the same parameter names. The folder is
written without transformers: its formats are JSON and safetensors.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanochat.export.common import Format, Source
from nanochat.export.hf_tokenizer import write_tokenizer
from nanochat.export.model_card import model_card
from nanochat.gpt import ADDITIONS, NORM_EPS, GPTConfig
from nanochat.recipe import load_hyperparameters

SHARD_BYTES = 5_000_000_000  # transformers splits files of weights at this size, too
HF_FILES = Path(__file__).with_name("hf_files")
MODEL_FILES = (HF_FILES / "configuration_nanochat.py", HF_FILES / "modeling_nanochat.py")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 50, "max_new_tokens": 512}  # as chat_cli and chat_web

# Our parameter names → those of transformers; {} is the number of a layer.
NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.h.{}.attn.c_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "transformer.h.{}.attn.c_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "transformer.h.{}.attn.c_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "transformer.h.{}.attn.c_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "transformer.h.{}.attn.ve_gate.weight": "model.layers.{}.self_attn.value_gate.weight",
    "value_embeds.{}.weight": "model.layers.{}.self_attn.value_embed.weight",
    "transformer.h.{}.mlp.c_fc.weight": "model.layers.{}.mlp.fc1.weight",
    "transformer.h.{}.mlp.c_proj.weight": "model.layers.{}.mlp.fc2.weight",
    "resid_lambdas": "model.resid_lambdas",
    "x0_lambdas": "model.x0_lambdas",
    "smear_gate.weight": "model.smear_gate.weight",
    "smear_lambda": "model.smear_lambda",
    "backout_lambda": "model.backout_lambda",
    "lm_head.weight": "lm_head.weight",
}
TABLES = ("transformer.wte.", "lm_head.", "value_embeds.")  # have a row for each token of the padded vocabulary


def hf_name(name: str) -> str:
    """The name of one of our parameters in a Hugging Face folder."""
    layer = re.search(r"(?<=\.)\d+(?=\.)", name)
    if layer is None:
        return NAMES[name]
    return NAMES[name.replace(layer[0], "{}", 1)].format(layer[0])


def our_name(name: str) -> str | None:
    """The inverse of hf_name; None if no parameter of ours has this name."""
    layer = re.search(r"(?<=layers\.)\d+", name)
    number = layer[0] if layer else ""
    pattern = name.replace(f"layers.{number}.", "layers.{}.", 1)
    for ours, theirs in NAMES.items():
        if theirs == pattern:
            return ours.format(number)
    return None


def is_classic(config: GPTConfig) -> bool:
    """Whether NanoChatForCausalLM of transformers computes what this model computes."""
    has_additions = any(getattr(config, name) for name in ADDITIONS)
    has_full_windows = all(window == config.sequence_len for window in config.windows)
    return not has_additions and has_full_windows and config.qk_gain == 1.0


def check(source: Source) -> None:
    """Every model can be exported."""


def num_bytes(source: Source) -> int:
    """Size of the weights and of the tokenizer's files."""
    size = DTYPES[source.dtype].itemsize
    return size * sum(weight.numel() for weight in source.weights.values()) + 200 * source.config.vocab_size


def write(source: Source, folder: Path) -> None:
    """Writes the folder."""
    folder.mkdir()
    end_token = "<|bos|>" if source.stage == "base" else "<|assistant_end|>"  # a base model generates documents
    write_tokenizer(source.tokenizer, folder, sequence_len=source.config.sequence_len, end_token=end_token)
    write_json(folder / "config.json", model_config(source, end_token))
    write_json(folder / "generation_config.json", generation_config(source, end_token))
    if not is_classic(source.config):
        for file in MODEL_FILES:
            shutil.copy(file, folder)
    card = model_card(source, needs_code=not is_classic(source.config))
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_weights(source, folder)


def model_config(source: Source, end_token: str) -> dict[str, Any]:
    """The content of config.json."""
    common = {
        "bos_token_id": source.tokenizer.bos,
        "eos_token_id": source.tokenizer.special(end_token),
        "pad_token_id": None,  # a number would make that token's embedding constant in training
        "tie_word_embeddings": False,
        "dtype": source.dtype,
        "nanochat": {  # for the import
            "tokenizer": source.tokenizer.fingerprint,
            "stage": source.stage,
            "step": source.checkpoint.step,
            "settings": asdict(load_hyperparameters(source.checkpoint.meta)),
        },
    }
    kind = classic_config if is_classic(source.config) else modern_config
    return sizes(source.config) | kind(source.config) | common


def sizes(config: GPTConfig) -> dict[str, Any]:
    """
    The sizes, by their names in transformers. Every one is given, because the defaults of NanoChatConfig differ from
    ours: an MLP of 8192 channels, and an epsilon of 1e-6 (logits differ by 2e-5).
    """
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def classic_config(config: GPTConfig) -> dict[str, Any]:
    """What the configuration of transformers' own class has besides the sizes."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "num_hidden_layers": config.n_layer,
        "hidden_act": "relu2",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }


def modern_config(config: GPTConfig) -> dict[str, Any]:
    """What the configuration of the class in hf_files/ has besides the sizes."""
    is_sliding = [window < config.sequence_len for window in config.windows]
    layer_types = ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding]
    if config.smear:
        layer_types.append("full_attention")  # of PreviousToken
    return {
        "architectures": ["NanoChatForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_nanochat.NanoChatConfig",
            "AutoModel": "modeling_nanochat.NanoChatModel",
            "AutoModelForCausalLM": "modeling_nanochat.NanoChatForCausalLM",
        },
        "model_type": "nanochat_modern",
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        # Ours does not count the query's own position. Without sliding layers there is no window.
        "sliding_window": min(config.windows) + 1 if any(is_sliding) else None,
        "window_pattern": config.window_pattern,
        "rope_theta": config.rope_base,
        "qk_gain": config.qk_gain,
        **{name: getattr(config, name) for name in ADDITIONS},
    }


def generation_config(source: Source, end_token: str) -> dict[str, Any]:
    """The content of generation_config.json: stop tokens and sampling as in our engine and chat."""
    bos = source.tokenizer.bos
    end_ids = sorted({bos, source.tokenizer.special(end_token)})
    return SAMPLING | {"bos_token_id": bos, "eos_token_id": end_ids, "pad_token_id": bos}


def write_weights(source: Source, folder: Path) -> None:
    """
    Writes model.safetensors or, above SHARD_BYTES, several files and an index. Converts the weights file by file, so
    that the converted ones never take more memory than one file.
    """
    groups = list(split_into_shards(source))
    weight_map: dict[str, str] = {}
    total_size = 0
    for i, group in enumerate(groups):
        file_name = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {hf_name(name): converted(source, name).contiguous() for name in source.track(group, file_name)}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def split_into_shards(source: Source) -> Iterator[list[str]]:
    """The parameter names, in groups of at most SHARD_BYTES (a single larger tensor is a group)."""
    group: list[str] = []
    size = 0
    for name, weight in source.weights.items():
        bytes_of_weight = weight.numel() * DTYPES[source.dtype].itemsize
        if group and size + bytes_of_weight > SHARD_BYTES:
            yield group
            group = []
            size = 0
        group.append(name)
        size += bytes_of_weight
    yield group


def converted(source: Source, name: str) -> torch.Tensor:
    """A parameter without the padding of the vocabulary, in the exported dtype."""
    weight = source.weights[name]
    if name.startswith(TABLES):
        weight = source.unpad(weight)
    if name.endswith("_lambdas") or name.endswith("_lambda"):
        return weight  # a few numbers that scale everything: in float32, as the model computes with them
    return weight.to(DTYPES[source.dtype])


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


FORMAT = Format(dtypes=tuple(DTYPES), check=check, num_bytes=num_bytes, write=write)
