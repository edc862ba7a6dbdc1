"""
The forward pass of a decode step (decoder.py) as a function of tensors, eager or compiled.

On a CPU it is compiled ahead of time (aot.py), which makes a token at depth 4 1.1 to 1.5 times as fast as
torch.compile, on CUDA by torch.compile.

Shapes: B slots in a step, T tokens of each, V vocabulary; U prompts that slots share, M slots of one prompt at most.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from nanochat import aot, hardware
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.slot_attention import SlotCache, StepInputs, attend_by_sums, attend_without_maximum

# Deeper models are not compiled on a CPU: it takes 4 s per layer for each of the two graphs, and in wide layers most of
# the time is spent in the matrix products, which stay the same.
MAX_LAYERS_TO_COMPILE = 12
MAX_COMPILED = 64  # graphs that torch.compile makes for all engines of a process, on CUDA
# Of Inductor: fuse kernels that share few bytes (a position), and sums of few products (the gates of value embeddings)
# into what follows them. Small kernels take longer to start than to run.
CUDA_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "score_fusion_memory_threshold": 1,
    "unroll_reductions_threshold": 16,
}
# A package that was compiled from other versions of these files is not used. The forward pass calls functions of
# loss.py and attention.py in training only.
SOURCES = [
    Path(__file__).with_name(f"{name}.py")
    for name in ("step_forward", "slot_attention", "shared_prompts", "gpt", "linear", "packed", "aot")
]


class StepForward(nn.Module):
    """The forward pass of a step as a function of tensors, which can be compiled."""

    def __init__(self, model: GPT, attend_rows: Callable[..., torch.Tensor]):
        super().__init__()
        self.model, self.attend_rows = model, attend_rows

    def forward(self, *inputs: Any) -> torch.Tensor:
        """The logits before the softcap, (B, T, V) in the compute dtype. The arguments are StepInputs."""
        cache = SlotCache(StepInputs(*inputs), self.attend_rows)
        return self.model.lm_head(self.model.hidden(inputs[0], cache))


class PackagedForward:
    """The same, compiled ahead of time for a CPU: a package for a single slot and one for more, by number of tokens."""

    def __init__(self, module: StepForward, name: str):
        self.module, self.name = module, name
        self.packages: dict[tuple[bool, int], aot.Package] = {}

    def __call__(self, tokens_BT, positions_BT, previous_B1, keys, values, ring_lengths_L, prompts) -> torch.Tensor:
        B, T = tokens_BT.shape
        key = (B == 1, T)
        if key not in self.packages:
            with torch.inference_mode(False):
                self.packages[key] = self._load(1 if B == 1 else 3, T, dtype=keys[0].dtype, is_shared=bool(prompts))
        return self.packages[key]([tokens_BT, positions_BT, previous_B1, *keys, *values, ring_lengths_L, *prompts])

    def refresh(self) -> None:
        """Must be called after tensors of the model were replaced."""
        for package in self.packages.values():
            package.refresh()

    def _load(self, B: int, T: int, dtype: torch.dtype, is_shared: bool) -> aot.Package:
        """For this number of slots if it is 1, and any above 1 if not; for any numbers of keys and prompts."""
        config = self.module.model.config
        # With the strides that they have in Decoder._step.
        columns = torch.zeros((B * T, 4), dtype=torch.long).unbind(1)
        positions_BT, previous_BT, tokens_BT = (column.view(B, T) for column in columns[:3])
        keys, values = self._example_caches(B, 50, dtype)
        ring_lengths_L = torch.ones(config.n_layer, dtype=torch.long)
        prompts: list[torch.Tensor] = []
        if is_shared:
            U, M = (1, 1) if B == 1 else (5, 7)
            per_row = torch.zeros((3, B), dtype=torch.long).unbind()
            prompt_keys, prompt_values = self._example_caches(U, 70, dtype)
            prompts = [*per_row, torch.zeros((U, M), dtype=torch.long), *prompt_keys, *prompt_values]
        examples = (tokens_BT, positions_BT, previous_BT[:, :1], keys, values, ring_lengths_L, prompts)

        rows: dict[int, Any] = {} if B == 1 else {0: torch.export.Dim.DYNAMIC}
        in_caches = [rows | {1: torch.export.Dim.DYNAMIC}] * config.n_layer
        table = {} if B == 1 else dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
        in_prompts = [rows] * 3 + [table] + in_caches * 2 if is_shared else []
        shapes: Any = (rows, rows, rows, in_caches, in_caches, {}, in_prompts)
        name = f"{self.name} {dtype} {B} x {T}" + " shared prompts" * is_shared
        return aot.load_or_compile(self.module, examples, shapes, name=name, sources=SOURCES)

    def _example_caches(self, num_sequences: int, size: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], ...]:
        """Keys and values by layer. Those of different windows have different lengths."""
        config = self.module.model.config
        cache = KVCache(config, torch.device("cpu"), dtype)
        cache.grow(num_sequences, {window: size + 2 * i for i, window in enumerate(cache.layers)})
        return cache.views(num_sequences, num_tokens=2 * size)


def compile_forward(model: GPT, name: str) -> Callable[..., torch.Tensor]:
    """The compiled forward pass, which is made at the first call. name: as in aot.load_or_compile."""
    if model.device.type == "cpu":
        hardware.keep_freed_pages()
        return PackagedForward(StepForward(model, attend_by_sums), name)
    # One graph for all numbers of slots and keys (and one for a single slot). By default torch takes two sizes that are
    # equal at first for the same one, and compiles again when they are not.
    torch.fx.experimental._config.use_duck_shape = False  # type: ignore[attr-defined]
    # Two graphs per engine, and a server has an engine per GPU and model. Beyond torch's limit of 8 it fails.
    torch._dynamo.config.recompile_limit = MAX_COMPILED
    module = StepForward(model, attend_without_maximum)
    return torch.compile(module, dynamic=True, fullgraph=True, options=CUDA_OPTIONS)


def can_compile(model: GPT) -> bool:
    """Whether the forward pass of decode steps can be compiled, and reasonably soon."""
    is_slow = model.device.type == "cpu" and model.config.n_layer > MAX_LAYERS_TO_COMPILE
    return not is_slow and hardware.can_compile(model.device)


def is_compile_error(error: RuntimeError) -> bool:
    """Whether torch.compile failed, not the code that it compiled."""
    from torch._dynamo.exc import TorchDynamoException  # imported late: it takes a second

    return isinstance(error, (aot.CompileError, TorchDynamoException))
