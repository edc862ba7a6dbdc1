"""
Factories for the tests: tiny models, engines, checkpoints, shards of text and conversations.

Everything is small enough for a slow CPU core (a model takes a few milliseconds) and deterministic: the same arguments
give the same object. Sizes are keyword arguments; a test names only those that matter to it.

    model = tiny_gpt(n_layer=3, window_pattern="SL")     # random weights, vocabulary of the golden tokenizer
    engine = tiny_engine(model, golden_tokenizer)        # always generates max_tokens
    save_checkpoint(tiny_gpt(initial=True), "sft", "d2", tokenizer=golden_tokenizer)
"""

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.checkpoint_manager import CheckpointWriter
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.gpt import GPT, PORTABLE, GPTConfig
from nanochat.legacy import VINTAGES
from nanochat.muon import MuonAdamW, build_optimizer
from nanochat.recipe import param_groups
from nanochat.tokenizer import Tokenizer
from nanochat.train import TrainState
from tasks.common import Task

CPU = torch.device("cpu")
# On the null GPU, stub libraries that take the place of CUDA, kernels do nothing: whatever they compute is garbage.
NEEDS_NUMBERS = pytest.mark.skipif("NULLGPU" in os.environ, reason="the null GPU computes nothing")
GOLDEN_VOCAB_SIZE = 1024  # of the golden tokenizer (conftest.py)
RANDOM_STD = 0.3  # large enough that logits differ clearly between tokens

FAMILY = VINTAGES | {"portable": PORTABLE, "gains": {"norm_gains": True}}  # values of GPTConfig's fields

WORDS = "the cat sat on a mat and saw one old dog run by it in the sun while 12 birds sang of 345 ways home".split()


# ---- models ----


def tiny_config(**changes: Any) -> GPTConfig:
    """A configuration of two layers, 32 channels and two query heads that share one key/value head."""
    sizes: dict[str, Any] = {
        "sequence_len": 64,
        "vocab_size": GOLDEN_VOCAB_SIZE,
        "n_layer": 2,
        "n_head": 2,
        "n_kv_head": 1,
        "n_embd": 32,
    }
    return GPTConfig(**sizes | changes)


def tiny_gpt(
    *,
    seed: int = 0,
    initial: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = CPU,
    **config: Any,
) -> GPT:
    """
    A tiny model in training mode. `config` changes tiny_config.

    By default every parameter is drawn from a normal distribution, so that every part of the model affects its output.
    With `initial`, the parameters have the values that training starts from: projections are zero, so that each block
    is the identity.
    """
    torch.manual_seed(seed)
    if initial:
        return GPT.create(tiny_config(**config), torch.device(device), dtype)
    model = GPT(tiny_config(**config), torch.device(device), dtype)
    randomize(model, seed=seed)
    return model


def randomize(model: torch.nn.Module, *, seed: int = 0, std: float = RANDOM_STD) -> None:
    """Draws every parameter from a normal distribution of this standard deviation."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)


def tiny_optimizer(model: GPT, **options: Any) -> MuonAdamW:
    """The optimizer of the training stages with its default learning rates."""
    return build_optimizer(model, param_groups(model.config), **options)


def tiny_engine(model: GPT, tokenizer: Tokenizer, *, max_slots: int = 4, stop: bool = False, **options: Any) -> Engine:
    """
    An engine that always generates max_tokens: a random model samples end tokens too, and here they end nothing.
    With `stop`, they end the completion as usual.
    """
    engine = Engine(model, tokenizer, max_slots, **options)
    if not stop:
        engine.stop_tokens = set()
    return engine


# ---- files: checkpoints and shards ----


def save_checkpoint(
    model: GPT,
    stage: str = "base",
    tag: str = "tiny",
    *,
    step: int = 1,
    tokenizer: Tokenizer | None = None,
    meta: dict[str, Any] | None = None,
) -> Path:
    """
    Saves the model with a fresh optimizer under $NANOCHAT_BASE_DIR and returns the folder of the tag. With a tokenizer,
    saves that too and ties the checkpoint to it.
    """
    meta = dict(meta or {})
    writer = CheckpointWriter(stage, tag, Dist(CPU))
    if tokenizer is not None:
        meta["tokenizer"] = tokenizer.fingerprint
        tokenizer.save(writer.path.parent.parent / "tokenizer")
    writer.save(model, tiny_optimizer(model), TrainState(step), meta)
    writer.wait()
    return writer.path


def write_shard(
    path: Path, texts: Sequence[Any] | pa.Table, *, column: str = "text", rows_per_group: int | None = None
) -> Path:
    """Writes one parquet shard and its folder; `texts` may be a whole table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = texts if isinstance(texts, pa.Table) else pa.table({column: texts})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_shards(
    folder: Path, num_shards: int = 3, *, texts_per_shard: int = 5, rows_per_group: int | None = 2
) -> list[Path]:
    """Writes shards whose texts are "0.0", "0.1", …: the numbers of the shard and of the text in it."""
    return [
        write_shard(
            folder / f"shard_{i:05d}.parquet",
            [f"{i}.{j}" for j in range(texts_per_shard)],
            rows_per_group=rows_per_group,
        )
        for i in range(num_shards)
    ]


# ---- text ----


def random_text(rng: random.Random, low: int, high: int) -> str:
    """From `low` to `high` words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def conversation(*contents: Any, system: str = "") -> dict[str, Any]:
    """The contents as messages of user and assistant in turn, after an optional system message."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        messages.append({"role": "user" if i % 2 == 0 else "assistant", "content": content})
    return {"messages": messages}


# ---- commands that fail ----


def refusal(script: Any, argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a script that has to end with an error; returns its message, which must be one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        script.main(argv)
    code = caught.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err.strip()
    assert code not in (0, None)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ---- tasks ----


class Letters(Task):
    """A task that rewards even an untrained model: the share of vowels in its completion."""

    kind = "generative"

    def __init__(self, split):
        self.words = ("oak", "elm", "yew", "ash", "fir") if split == "train" else ("box", "bay")

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return {"messages": [{"role": "user", "content": self.words[index]}]}

    def reward(self, conversation, completion):
        return sum(letter in "aeiou" for letter in completion) / (len(completion) + 1)


# ---- waiting for threads and processes ----


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Returns as soon as the condition holds; fails the test if it does not within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition does not hold after {seconds} s"
        time.sleep(0.005)
