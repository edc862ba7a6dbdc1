"""
Reads files that older versions of nanochat wrote: model configurations, .pt checkpoints, pickled tokenizers.

- Checkpoints used to be two files per step, model_<step>.pt and meta_<step>.json.
- Configurations used to have one field "vintage", which was "modern" or "classic", instead of a field per feature. The
  oldest ones do not have it either; then the names of the parameters show which vintage it is.
- The tokenizer used to be a pickled tiktoken.Encoding, tokenizer.pkl.

Nothing here executes code from a file, and nothing writes these formats any more.
"""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nanochat.common import UserError, parse_json
from nanochat.gpt import ADDITIONS

# The fields of GPTConfig that each vintage stands for.
VINTAGES: dict[str, dict[str, Any]] = {
    "modern": dict.fromkeys(ADDITIONS, True) | {"qk_gain": 1.2, "rope_base": 100_000.0, "logit_softcap": 15.0},
    # October 2025; also the model that transformers implements as NanoChatForCausalLM.
    "classic": dict.fromkeys(ADDITIONS, False)
    | {"qk_gain": 1.0, "rope_base": 10_000.0, "logit_softcap": 15.0, "window_pattern": "L"},
}

# What reading a damaged file can raise, in any format. LookupError: a field is missing.
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pickle.PickleError,
    zipfile.BadZipFile,
)  # fmt: skip


# ---- model configurations ----


def upgrade_config(saved: dict[str, Any], parameter_names: Collection[str] | None = None) -> dict[str, Any]:
    """
    Replaces the vintage in a saved configuration by the fields of GPTConfig that it stands for; UserError if it is
    unknown. If the configuration does not name a vintage, the names of the model's parameters show it, where given.
    """
    if any(field in saved for field in VINTAGES["modern"]):
        return saved
    fields = dict(saved)
    vintage = fields.pop("vintage", None)
    if vintage is None and parameter_names is not None:
        vintage = "modern" if "resid_lambdas" in parameter_names else "classic"
        fields.setdefault("window_pattern", "L")
    if vintage is None:
        return fields
    if vintage not in VINTAGES:
        raise UserError(f"unknown vintage {vintage!r} in a saved model configuration: use modern or classic")
    return fields | VINTAGES[vintage]


# ---- checkpoints: model_<step>.pt, meta_<step>.json ----


def checkpoint_steps(directory: Path) -> set[int]:
    """The steps of the .pt checkpoints in a folder."""
    numbers = [file.stem.removeprefix("model_") for file in directory.glob("model_*.pt")]
    return {int(number) for number in numbers if number.isdigit()}


def read_checkpoint(directory: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """
    The file of weights of a .pt checkpoint, and the content of its JSON file with "model_config" upgraded. One of
    UNREADABLE if either is damaged.
    """
    model_file = directory / f"model_{step:06d}.pt"
    with zipfile.ZipFile(model_file) as archive:  # torch.load does not compare the checksums if it maps the file
        if damaged := archive.testzip():
            raise ValueError(f"{model_file}: {damaged} is corrupt")
    meta = parse_json((directory / f"meta_{step:06d}.json").read_bytes())
    meta["model_config"] = upgrade_config(meta["model_config"], read_weights(model_file).keys())
    return model_file, meta


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Parameters by name, without the prefix that torch.compile adds."""
    weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name.removeprefix("_orig_mod."): weight for name, weight in weights.items()}


# ---- tokenizers: tokenizer.pkl ----


# The instructions of a pickled tiktoken.Encoding (protocols 3 to 5). A pickle with others could exhaust the memory, or
# crash Python with deeply nested keys.
ENCODING_OPCODES = frozenset(
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL NEWOBJ BUILD EMPTY_TUPLE EMPTY_DICT SETITEM SETITEMS NONE "
    "BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BININT BININT1 BININT2 BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "MEMOIZE".split()
)


def read_encoding_pickle(content: bytes) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """
    Split pattern, token ids and special token ids of a pickled tiktoken.Encoding. ValueError for any other pickle.

    Unpickling usually executes whatever the file asks for, but it can do so only through the classes and functions that
    the file names. Here every name but that of Encoding is refused, and Encoding is replaced by a SimpleNamespace,
    which only keeps the attributes it is given.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> type:
            if (module, name) != ("tiktoken.core", "Encoding"):
                raise pickle.UnpicklingError(f"it asks for {module}.{name}, which was not run")
            return SimpleNamespace

    try:
        _check_opcodes(content)
        found = Unpickler(io.BytesIO(content)).load()
    except (*UNREADABLE, MemoryError, OverflowError) as error:  # a damaged pickle may raise almost anything
        raise ValueError(str(error) or type(error).__name__) from error
    pattern = getattr(found, "pat_str", None)
    ranks = getattr(found, "mergeable_ranks", None)
    if not isinstance(pattern, str) or not isinstance(ranks, dict):
        raise ValueError("it is not a tiktoken.Encoding with a pattern and ranks")
    if not all(type(token) is bytes and type(rank) is int for token, rank in ranks.items()):
        raise ValueError("its ranks are not bytes → number")
    return pattern, ranks, getattr(found, "special_tokens", {})


def _check_opcodes(content: bytes) -> None:
    """ValueError if a pickle has other instructions than those above, or would reserve memory beyond its size."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in ENCODING_OPCODES:
            raise ValueError(f"it contains {opcode.name}, which was not run")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(content):  # the size of a table
            raise ValueError("it has a damaged index")
