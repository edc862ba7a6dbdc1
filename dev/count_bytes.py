"""
Counts the bytes that the compiled training pass reads and writes besides matrix products and attention. estimates.py
turns them into milliseconds. Runs on the null GPU:

    bash dev/null_gpu/run.sh -- python dev/count_bytes.py

A micro-batch is compiled for two depths. Inductor's schedule says which buffers each fused kernel reads and writes, and
the shape of a buffer says what it belongs to; the difference between the depths is that of the layers. Nothing is
compiled by Triton.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.dependencies import MemoryDep
from torch._inductor.scheduler import ExternKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V as inductor

from nanochat import attention, fp8, recipe
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import build_optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent / "null_gpu"))
import counts  # noqa: E402

DEVICE = torch.device("cuda", 0)
WIDTH, ROWS, VOCAB_SIZE = 768, 8, 32768
DEPTHS = (2, 4)


class NoKernel:
    """Takes the place of a kernel of Triton, which need not run."""

    def run(self, *arguments: Any, **options: Any) -> None:
        pass


def main() -> None:
    counts.ignore_numbers()
    for use_fp8 in (False, True):
        print("FP8" if use_fp8 else "bfloat16", bytes_moved(use_fp8))


def bytes_moved(use_fp8: bool = False) -> dict[str, float]:
    """
    Bytes per micro-batch: "layer" per token, channel and layer; "edge" per token and channel, what comes before and
    after the layers; "logit" per logit; "matrix", "table" and "head" per weight of matrices, embeddings, lm_head.
    """
    shallow, deep = (_count(depth, use_fp8) for depth in DEPTHS)
    num_layers = DEPTHS[1] - DEPTHS[0]
    config = recipe.model_config(recipe.RecipeFlags(depth=4, aspect_ratio=WIDTH // 4), VOCAB_SIZE)
    tokens = ROWS * config.sequence_len
    layer = (deep["tokens"] - shallow["tokens"]) / num_layers
    edge = shallow["tokens"] - DEPTHS[0] * layer
    table_size = VOCAB_SIZE * WIDTH
    tables = (deep["tables"] - shallow["tables"]) / (num_layers / 2)  # value embeddings, in every second layer
    head = shallow["tables"] - 2 * tables  # the shallow model has two tables: the tokens' and one of value embeddings
    return {
        "layer": layer / (tokens * WIDTH),
        "edge": edge / (tokens * WIDTH),
        "logit": shallow["logits"] / (tokens * VOCAB_SIZE),
        "matrix": (deep["matrices"] - shallow["matrices"]) / (num_layers * 12 * WIDTH**2),
        "table": tables / table_size,
        "head": head / table_size,
    }


def _count(depth: int, use_fp8: bool) -> Counter[str]:
    """Bytes of one micro-batch by what they belong to."""
    torch._dynamo.reset()
    config = recipe.model_config(recipe.RecipeFlags(depth=depth, aspect_ratio=WIDTH // depth), VOCAB_SIZE)
    assert config.n_embd == WIDTH
    model = GPT.create(config, DEVICE, torch.bfloat16)
    model.use_attention(attention.LOADERS["flash"]())
    if use_fp8:
        fp8.use_fp8(model, build_optimizer(model, recipe.param_groups(config), compile=False), compile=True)
    num_bytes: Counter[str] = Counter()
    codegen = Scheduler.codegen

    def count_and_generate(scheduler: Scheduler) -> None:
        for node in scheduler.nodes:
            if not isinstance(node, ExternKernelSchedulerNode):
                num_bytes.update(_bytes_of(node, config))
        codegen(scheduler)

    ids = torch.zeros(ROWS, config.sequence_len, dtype=torch.long, device=DEVICE)
    with (
        mock.patch.object(Scheduler, "codegen", count_and_generate),
        mock.patch.object(AsyncCompile, "triton", lambda *arguments, **options: NoKernel()),
        inductor_config.patch(force_disable_caches=True),
    ):
        torch.compile(model, dynamic=False)(ids, ids).backward()
    return num_bytes


def _bytes_of(node: Any, config: GPTConfig) -> Counter[str]:
    """Bytes that a fused kernel reads and writes, by what they belong to. Buffers that no other one uses cost none."""
    tokens = ROWS * config.sequence_len
    dependencies = [*node.read_writes.reads, *node.read_writes.writes]
    looks_up = any(isinstance(dependency, MemoryDep) and dependency.is_indirect() for dependency in dependencies)
    num_bytes: Counter[str] = Counter()
    for name, size in node.get_read_write_buffer_accesses(include_reads=True, include_writes=True).items():
        buffer = inductor.graph.try_get_buffer(name)
        assert buffer is not None, name
        shape = [int(length) for length in buffer.get_size()]
        kind = _kind(shape, tokens, config.n_embd)
        if kind == "tables" and looks_up:  # Inductor counts the whole table, but one row per token is read or added to
            kind, size = "tokens", tokens * config.n_embd * buffer.get_dtype().itemsize
        num_bytes[kind] += size
    return num_bytes


def _kind(shape: list[int], tokens: int, width: int) -> str:
    """What a buffer belongs to: "tables" (lm_head is one), "logits", "tokens" or "matrices"."""
    if VOCAB_SIZE in shape:
        return "tables" if width in shape else "logits"
    return "tokens" if tokens in shape or ROWS in shape else "matrices"


if __name__ == "__main__":
    main()
