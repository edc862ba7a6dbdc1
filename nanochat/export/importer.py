"""
Import of models: Hugging Face folders and checkpoints of other nanochat versions become ordinary checkpoints.

A source is a folder, or a repository of the hub, which is downloaded. It may be:

- a Hugging Face folder of the native class NanoChatForCausalLM, or one that `scripts.export --to hf` wrote:
  config.json, *.safetensors, tokenizer.json
- a nanochat checkpoint: model_<step>.pt, meta_<step>.json, and tokenizer.pkl beside them or where nanochat has it

No code from the source is executed.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nanochat import checkpoint_manager, legacy
from nanochat.common import UserError, base_dir, parse_json
from nanochat.export.hf import TABLES, our_name
from nanochat.export.hf_tokenizer import read_tokenizer
from nanochat.gpt import ADDITIONS, GPT, GPTConfig
from nanochat.tokenizer import FILE_NAME, PICKLE_NAME, Tokenizer, default_dir

HUB_FILES = ["*.json", "*.safetensors", "*.pt", "*.pkl", "tokenizer/*"]  # of a repository; *_optim files are left out
UNPACKED = 1.1  # disk space that a model takes, as a multiple of its weights in float32 (heuristic)


@dataclass(frozen=True)
class Model:
    """A model that was read from a source."""

    config: GPTConfig
    weights: dict[str, torch.Tensor]  # by our names, float32, with padded vocabulary
    tokenizer: Tokenizer
    step: int
    meta: dict[str, Any]  # what the checkpoint keeps besides: hyperparameters of its training


def import_model(source: str, stage: str, tag: str) -> Path:
    """
    Imports a folder, or a repository of the hub, as the first checkpoint of a stage and tag. Returns its folder. Raises
    UserError, before anything is written, for a source that cannot be used, a tag that is taken, or a full disk.
    """
    if checkpoint_manager.CheckpointReader(stage, tag).steps():
        raise UserError(f"the {stage} tag {tag!r} holds checkpoints: choose another --model-tag")
    folder = find_folder(source)
    model = read(folder)
    check(model, folder)
    check_disk(model)
    model.tokenizer.add_to(default_dir())
    meta = model.meta | {"imported_from": source, "tokenizer": model.tokenizer.fingerprint}
    return checkpoint_manager.save_weights(stage, tag, model.step, model.config, model.weights, meta)


# ---- the source ----


def find_folder(source: str) -> Path:
    """The folder of a source. Downloads a repository of the hub into the cache of huggingface_hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise UserError(f"there is no folder {source}: give a folder, or a repository of the hub as owner/name")
    return download(source)


def download(repo: str) -> Path:
    """Downloads the files of a model from $HF_ENDPOINT or huggingface.co. UserError if that fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES, ignore_patterns="optim_*", endpoint=endpoint))
    except GatedRepoError as error:
        raise UserError(f"{repo} asks for access: request it on {endpoint}/{repo}, then run hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{endpoint} has no model {repo}, or it is private: check the name, or log in") from error
    except (HTTPError, HFValidationError, OSError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{repo} could not be downloaded from {endpoint} ({problem}): check the network") from error


def read(folder: Path) -> Model:
    """Reads a Hugging Face folder or a nanochat checkpoint. UserError if files are missing or damaged."""
    if (folder / "config.json").exists():
        return read_hf(folder)
    if legacy.checkpoint_steps(folder):
        return read_checkpoint(folder)
    raise UserError(
        f"{folder} holds no model: it needs config.json, *.safetensors and tokenizer.json (Hugging Face), "
        "or model_*.pt, meta_*.json and tokenizer.pkl (nanochat)"
    )


# ---- Hugging Face folders ----


def read_hf(folder: Path) -> Model:
    config_file = folder / "config.json"
    try:
        saved = parse_json(config_file.read_bytes())
        config = model_config(saved)
        notes = saved.get("nanochat", {})
        fingerprint = notes.get("tokenizer")
        step = notes.get("step", 0)
        settings = notes.get("settings", {})
        if type(step) is not int or step < 0 or not isinstance(settings, dict):
            raise ValueError("step or settings of the training run are not usable")
    except UserError as error:
        raise UserError(f"{config_file}: {error}: import another model") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{config_file} is not usable ({type(error).__name__}: {error}): download it again") from error
    tokenizer = read_tokenizer(folder)
    if fingerprint not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{folder}/tokenizer.json is not the tokenizer that the model was exported with: "
            "restore the file, or export the model again"
        )
    weights = {}
    for name, weight in read_safetensors(folder).items():
        ours = our_name(name)
        if ours is None:
            raise UserError(f"{folder} has the weight {name}, which no nanochat model has: import another model")
        weights[ours] = padded(weight.float(), config) if ours.startswith(TABLES) else weight.float()
    return Model(config, weights, tokenizer, step, {"settings": settings})


def model_config(saved: Mapping[str, Any]) -> GPTConfig:
    """
    Our configuration for the content of a config.json. UserError if it describes something else than a nanochat model.

    rms_norm_eps is ignored: published folders have transformers' default, which no nanochat model was trained with.
    """
    kind = saved["model_type"]
    if kind not in ("nanochat", "nanochat_modern"):
        raise UserError(f"model_type {kind!r} is not nanochat")
    is_modern = kind == "nanochat_modern"
    rope = saved.get("rope_parameters") or {}
    features = {name: is_modern and saved[name] for name in ADDITIONS}
    num_layers = saved["num_hidden_layers"] - (1 if features["smear"] else 0)
    softcap = saved.get("final_logit_softcapping", 15.0)
    config = GPTConfig(
        sequence_len=saved["max_position_embeddings"],
        vocab_size=saved["vocab_size"],
        n_layer=num_layers,
        n_head=saved["num_attention_heads"],
        n_kv_head=saved.get("num_key_value_heads") or saved["num_attention_heads"],
        n_embd=saved["hidden_size"],
        window_pattern=saved["window_pattern"] if is_modern else "L",
        qk_gain=saved["qk_gain"] if is_modern else 1.0,
        rope_base=float(saved.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        logit_softcap=float(softcap or 0.0),
        **features,
    )
    expected = {
        "intermediate_size": 4 * config.n_embd,
        "head_dim": config.head_dim,
        "hidden_act": "relu2",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_scaling": None,
    }
    different = [name for name, value in expected.items() if saved.get(name, value) != value]
    if rope.get("rope_type", "default") != "default":
        different.append("rope_type")
    if different:
        raise UserError(f"nanochat models have other values of {', '.join(different)}")
    return config


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all *.safetensors files. UserError if one of the index is missing, or one is damaged."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    try:
        if index.exists():
            files = [folder / name for name in sorted(set(parse_json(index.read_bytes())["weight_map"].values()))]
        if not files:
            raise UserError(f"{folder} has no *.safetensors: download all files of the model")
        weights: dict[str, torch.Tensor] = {}
        for file in files:
            weights |= load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or error} is missing: download all files of the model") from error
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the weights in {folder} are damaged ({error}): download them again") from error
    return weights


def padded(table: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    """(V, X) → (V', X): rows of zeros, which no token uses, so that the rows are a round number."""
    if table.dim() != 2 or len(table) != config.vocab_size:
        return table  # `check` reports it
    result = table.new_zeros(config.padded_vocab_size, table.size(1))
    result[: len(table)] = table
    return result


# ---- nanochat checkpoints ----


def read_checkpoint(folder: Path) -> Model:
    """The newest step of a folder with model_<step>.pt and meta_<step>.json."""
    step = max(legacy.checkpoint_steps(folder))
    try:
        model_file, meta = legacy.read_checkpoint(folder, step)
        config = GPTConfig(**meta["model_config"])
        weights = {name: weight.float() for name, weight in legacy.read_weights(model_file).items()}
    except UserError:
        raise
    except legacy.UNREADABLE as error:
        first_line = str(error).partition("\n")[0]
        problem = f"{type(error).__name__}: {first_line}"
        raise UserError(f"step {step} of {folder} is not readable ({problem}): download it again") from error
    return Model(config, weights, find_tokenizer(folder), step, meta)


def find_tokenizer(folder: Path) -> Tokenizer:
    """
    The tokenizer of a nanochat checkpoint: in its folder, in tokenizer/ below it, or in tokenizer/ of the base folder,
    <base>/base_checkpoints/d12.
    """
    places = [folder, folder / "tokenizer", folder.absolute().parent.parent / "tokenizer"]
    for place in places:
        if (place / FILE_NAME).exists() or (place / PICKLE_NAME).exists():
            return Tokenizer.load(place)
    raise UserError(f"{folder} has no tokenizer: put the model's own {PICKLE_NAME} into it")


# ---- checks ----


def check(model: Model, folder: Path) -> None:
    """UserError unless weights, configuration and tokenizer fit together."""
    num_tokens = model.tokenizer.vocab_size
    if num_tokens != model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {num_tokens} tokens, the model {model.config.vocab_size}: "
            "put the model's own tokenizer into it"
        )
    if model.config.n_layer > len(model.weights):  # a damaged number: building such a model could take forever
        raise UserError(
            f"{folder}: the configuration has {model.config.n_layer} layers, and there are weights for fewer: "
            "download all files of the model again"
        )
    expected = {name: tuple(weight.shape) for name, weight in GPT(model.config, "meta").state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in model.weights.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} does not belong to it" for name in found if name not in expected]
    for name, shape in expected.items():
        if found.get(name, shape) != shape:
            problems.append(f"{name} is {found[name]}, not {shape}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{folder}: the weights do not fit the configuration ({'; '.join(problems[:3])}{more}): "
            "download all files of the model again"
        )


def check_disk(model: Model) -> None:
    """UserError if the base folder's disk is too small for the checkpoint."""
    needed = UNPACKED * sum(weight.nbytes for weight in model.weights.values())
    base_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base_dir()).free
    if free < needed:
        raise UserError(
            f"{base_dir()} has {free / 1e9:.1f} GB free, the model needs {needed / 1e9:.1f} GB: free some space"
        )
