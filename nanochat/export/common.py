"""
What all export formats share: the model to export, the checks before writing, and the atomic write.

A format is one module of this package with a `FORMAT`, which formats.py lists:

    FORMAT = Format(dtypes=("float32", "bfloat16"), check=check, num_bytes=num_bytes, write=write)

`write` gets a path that does not exist yet and creates a file or a folder there. It is a temporary path: only when
`write` has returned does the result get its final name.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError, atomic_path, remove_leftovers
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer

DISK_MARGIN = 50_000_000  # bytes that must stay free (heuristic, not tuned)


# Passes items through, and shows how many have been consumed on a progress line with this description.
Track = Callable[[Sequence[str], str], Iterable[str]]


def no_progress(items: Sequence[str], description: str) -> Iterable[str]:
    return items


@dataclass(frozen=True)
class Source:
    """A model to export."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    stage: str  # one of checkpoint_manager.STAGES
    dtype: str  # of the exported weights: one of Format.dtypes
    track: Track = no_progress

    @property
    def config(self) -> GPTConfig:
        """That of the exported model, in which the gains of norms are part of the matrices after them."""
        return replace(self.checkpoint.config, norm_gains=False)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Parameter name → float32 tensor on the CPU; the vocabulary is padded, see `unpad`."""
        return fold_gains({name: weight.float() for name, weight in self.checkpoint.weights().items()})

    def unpad(self, table: torch.Tensor) -> torch.Tensor:
        """The rows of an embedding table or of lm_head that belong to tokens: (V', X) → (V, X)."""
        return table[: self.config.vocab_size]


def fold_gains(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with the gains of norms, if there are any, multiplied into the matrices after them."""
    folded = dict(weights)
    if "final_gain" in folded:
        for layer, gain_C in enumerate(folded.pop("mlp_gains")):
            name = f"transformer.h.{layer}.mlp.c_fc.weight"
            folded[name] = folded[name] * gain_C
        folded["lm_head.weight"] = folded["lm_head.weight"] * folded.pop("final_gain")
    return folded


@dataclass(frozen=True)
class Format:
    """An export format."""

    dtypes: tuple[str, ...]  # of the weights, as --dtype takes them; the first is the default
    check: Callable[[Source], None]  # UserError, which names the obstacles, if the format cannot express the model
    num_bytes: Callable[[Source], int]  # upper bound for the size of the result
    write: Callable[[Source, Path], None]  # creates a file or a folder at a path that does not exist
    # Text files to write next to `out`, by path.
    companions: Callable[[Source, Path], dict[Path, str]] = lambda source, out: {}


def export(source: Source, target_format: Format, out: Path) -> None:
    """
    Writes the model to `out` in a format. Raises UserError, before anything is written, if the format cannot express
    the model, if `out` exists and is not an empty folder, or if the disk is too small.
    """
    check_target(out)
    target_format.check(source)
    companions = target_format.companions(source, out)
    for file in companions:
        check_target(file)
    check_disk(out, target_format.num_bytes(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    with atomic_path(out) as temporary:
        target_format.write(source, temporary)
    for file, text in companions.items():
        with atomic_path(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def check_target(out: Path) -> None:
    """UserError if the path holds anything."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise UserError(f"{out} exists and is not an empty folder: choose another --out, or remove it")


def check_disk(out: Path, needed: int) -> None:
    """UserError if the disk has not this many bytes free."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed + DISK_MARGIN:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, the export needs about {(needed + DISK_MARGIN) / 1e9:.1f} GB: "
            "free some space, or choose another --out"
        )


def describe_size(path: Path) -> str:
    """The size of a file or folder in MB, as text."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
