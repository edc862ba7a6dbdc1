"""
The decode step: reads one token of each active slot and samples the next one. Generation spends most of its time here.

A slot holds the keys and values of a sequence and nothing else; what a step reads and how it samples is passed to each
call, a StepRow per slot. It is the model's own forward pass (gpt.py) with one token per sequence, the slots as its KV
cache, and weights in the fastest layout (packed.py). The forward pass can be compiled: on a CPU ahead of time (aot.py),
which makes a token at depth 4 1.1 to 1.5 times as fast as torch.compile, on CUDA by torch.compile. On CUDA the step is
captured as a graph, compiled or not.

    Decoder.step → GPT.hidden → SlotCache.attend … → logits → sample → next tokens

Shapes: R slots, B of them (the first ones) active in a step, T tokens of each (1, or more with drafts), S keys, C
width, K key/value heads, G query heads for each of them, D head size, V vocabulary.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from nanochat import aot, hardware, packed
from nanochat.attention import small_products
from nanochat.distributed import warn0
from nanochat.gpt import GPT, rotary_table
from nanochat.kv_cache import KVCache
from nanochat.sampling import BatchSampling, RowSampling, SamplingParams, next_power_of_two, sample
from nanochat.shared_prompts import LayerPrompts, PromptShape, SharedPrompts, StepPrompts

MIN_GRAPH_KEYS = 256  # a captured step reads this many keys or a higher power of two; heuristic, not tuned
MIN_SHARED_GRAPH_KEYS = 64  # the same if prompts are shared: rings hold only what was generated
KEY_MULTIPLE = 32  # without graphs, the number of keys is rounded up to this; heuristic, not tuned
MAX_GRAPHS = 64  # captured graphs that are kept, one per BatchSampling and shape; heuristic, not tuned
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
    Path(__file__).with_name(name) for name in ("decoder.py", "gpt.py", "packed.py", "aot.py", "shared_prompts.py")
]
NUM_COLUMNS = 5  # numbers of a StepRow besides a token and a random number per token read
CAPTURE_LOCK = threading.Lock()  # a process can capture one graph at a time, and a server has a thread per engine


@dataclass(frozen=True)
class Prefix:
    """
    The model's state after a sequence of tokens: the keys and values of its last n tokens, as many as the window
    covers, of all L layers with that window: (2, L, n, K, D).
    """

    tokens: tuple[int, ...]
    caches: dict[int, torch.Tensor]  # by window


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the host to a device, on CUDA without waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class StepShape(NamedTuple):
    """What a step's computation depends on: on CUDA, one graph is captured for each of these."""

    num_slots: int
    num_tokens: int  # of each slot
    num_keys: int  # of each ring, at most
    sampling: BatchSampling
    prompts: PromptShape | None  # None = prompts are not shared


class StepRow(NamedTuple):
    """What a step reads and samples in a slot. All rows of a step have the same number of tokens T."""

    position: int  # of the first token, in the context
    previous: int  # the token before it; anything at position 0
    tokens: list[int]  # 1 or, with drafts, 1 + max_drafted
    params: SamplingParams
    uniforms: list[float]  # a random number in [0, 1) per token, to sample the next one


class Sampled(NamedTuple):
    """The results of a step, on the device."""

    tokens_BT: torch.Tensor
    logprobs_BT: torch.Tensor | None  # None if no row wants them


class StepInputs(NamedTuple):
    """What the forward pass of a step reads."""

    tokens_BT: torch.Tensor
    position_B1: torch.Tensor  # of the first token of each row
    previous_B1: torch.Tensor  # the token before it
    keys: list[torch.Tensor]  # by layer, (B * K, S, D): the first S entries of the rings of the active slots
    values: list[torch.Tensor]
    ring_lengths_L: torch.Tensor  # by layer
    prompts: list[torch.Tensor]  # from SharedPrompts.tensors; empty if prompts are not shared


class SlotCache:
    """
    The active slots as the KV cache of one forward pass (gpt.Cache).

    A layer's keys and values are a ring: those of position p are stored at p modulo the ring's length. Keys are already
    rotated, so their order does not matter. With shared prompts, positions in the ring begin after the prompt.
    """

    def __init__(self, inputs: StepInputs, attend_rows: Callable[..., torch.Tensor]):
        tokens_BT, position_B1, self.previous_B1, self.keys, self.values, self.ring_lengths_L, prompts = inputs
        self.positions_BT = position_B1 + torch.arange(tokens_BT.size(1), device=tokens_BT.device)
        self.attend_rows = attend_rows
        self.prompts = StepPrompts(prompts) if prompts else None
        self.ring_positions_BT = self.positions_BT
        if self.prompts is not None:
            self.ring_positions_BT = self.positions_BT - self.prompts.lengths_B[:, None]
        self.rings: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by window: layers with one have equal rings

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Writes the new keys and values, (B, T, K, D), and returns the attention of the queries (B, T, H, D)."""
        B, T, K, D = k.shape
        keys, values = self.keys[layer], self.values[layer]
        indices_NT, mask_NTX = self._ring(layer, window, num_kv_heads=K)
        rows_N1 = torch.arange(B * K, device=k.device)[:, None]
        keys[rows_N1, indices_NT] = k.transpose(1, 2).reshape(B * K, T, D).to(keys.dtype)
        values[rows_N1, indices_NT] = v.transpose(1, 2).reshape(B * K, T, D).to(values.dtype)

        q = (q / math.sqrt(D)).to(keys.dtype)
        q_NGD = q.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4).reshape(B * K, -1, D)  # G * T queries per row
        prompts = None if self.prompts is None else self.prompts.layer(layer)
        y_NGD = self.attend_rows(q_NGD, keys, values, mask_NTX, prompts)
        return y_NGD.view(B, K, -1, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, -1, D).to(v.dtype)

    def _ring(self, layer: int, window: int, *, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Where the new keys of a layer go, (B * K, T), and what is added to the scores: 0, or minus infinity for entries
        that a query does not see, (B * K, T, S), with shared prompts (B * K, T, P + S).
        """
        ring, size = self.ring_lengths_L[layer], self.keys[layer].size(1)
        if window not in self.rings:
            positions_BT1 = self.ring_positions_BT[:, :, None]
            entries_S = torch.arange(size, device=positions_BT1.device)
            age_BTS = (positions_BT1 - entries_S) % ring  # distance of the query to the last position stored there
            is_hidden_BTS = age_BTS > positions_BT1.clamp(max=window)
            if self.prompts is not None:
                in_prompt_BTP = self.prompts.is_hidden(layer, self.ring_positions_BT, window)
                is_hidden_BTS = torch.cat([in_prompt_BTP, is_hidden_BTS], dim=-1)
            mask_BTX = torch.zeros(is_hidden_BTS.shape, device=age_BTS.device).masked_fill(is_hidden_BTS, -torch.inf)
            self.rings[window] = (
                (self.ring_positions_BT % ring).repeat_interleave(num_kv_heads, dim=0),
                mask_BTX.repeat_interleave(num_kv_heads, dim=0),
            )
        return self.rings[window]


def attend_by_products(
    q_NGD: torch.Tensor,
    keys_NSD: torch.Tensor,
    values_NSD: torch.Tensor,
    mask_NTX: torch.Tensor,
    prompts: LayerPrompts | None = None,
) -> torch.Tensor:
    """
    Attention as two matrix products. On CUDA the scores of 16-bit queries and keys are float32, as in the kernels that
    train: rounded to bfloat16, a score of 16 is off by up to 0.06, and so is the logarithm of its probability.
    """
    P = mask_NTX.size(2) - keys_NSD.size(1)
    mask_NGX = _mask_of_groups(mask_NTX, q_NGD.size(1))
    is_half_on_cuda = keys_NSD.is_cuda and keys_NSD.dtype != torch.float32
    options: dict[str, Any] = {"out_dtype": torch.float32} if is_half_on_cuda else {}
    with small_products():
        scores = torch.baddbmm(mask_NGX[..., P:], q_NGD, keys_NSD.transpose(1, 2), **options)
        if prompts is None:
            return torch.bmm(scores.softmax(dim=-1).to(values_NSD.dtype), values_NSD)
        scores = torch.cat([prompts.scores(q_NGD) + mask_NGX[..., :P], scores], dim=-1)
        weights = scores.softmax(dim=-1)
        y_ring = torch.bmm(weights[..., P:].to(values_NSD.dtype), values_NSD)
        return y_ring + prompts.weighted_sum(weights[..., :P])


def attend_by_sums(
    q_NGD: torch.Tensor,
    keys_NSD: torch.Tensor,
    values_NSD: torch.Tensor,
    mask_NTX: torch.Tensor,
    prompts: LayerPrompts | None = None,
) -> torch.Tensor:
    """
    The same as sums over elementwise products, which torch.compile turns into loops that read each key and value once,
    in 16 bits too. With one query per key, matrix products have no advantage.
    """
    P = mask_NTX.size(2) - keys_NSD.size(1)
    mask_NGX = _mask_of_groups(mask_NTX, q_NGD.size(1))
    scores = (q_NGD[:, :, None].float() * keys_NSD[:, None].float()).sum(dim=-1)
    if prompts is not None:
        scores = torch.cat([prompts.scores(q_NGD), scores], dim=-1)
    weights = (scores + mask_NGX).softmax(dim=-1)
    y = (weights[..., P:, None] * values_NSD[:, None].float()).sum(dim=2)
    return y if prompts is None else y + prompts.weighted_sum(weights[..., :P])


def attend_without_maximum(
    q_NGD: torch.Tensor,
    keys_NSD: torch.Tensor,
    values_NSD: torch.Tensor,
    mask_NTX: torch.Tensor,
    prompts: LayerPrompts | None = None,
) -> torch.Tensor:
    """
    attend_by_sums in two kernels on CUDA instead of three.

    Queries and keys are normed, so no score exceeds gain² sqrt(D), 16 at head size 128: softmax need not subtract the
    maximum first. The sum of the weights is computed once per channel, in the loop that adds up the values.
    """
    P = mask_NTX.size(2) - keys_NSD.size(1)
    mask_NGX = _mask_of_groups(mask_NTX, q_NGD.size(1))
    scores = (q_NGD[:, :, None].float() * keys_NSD[:, None].float()).sum(dim=-1)
    if prompts is None:
        weights = (scores + mask_NGX).exp()[..., None].expand(*scores.shape, q_NGD.size(2))
        return (weights * values_NSD[:, None].float()).sum(dim=2) / weights.sum(dim=2)
    weights = (torch.cat([prompts.scores(q_NGD), scores], dim=-1) + mask_NGX).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    y_ring = (weights[..., P:, None] * values_NSD[:, None].float()).sum(dim=2)
    return y_ring + prompts.weighted_sum(weights[..., :P])


def _mask_of_groups(mask_NTS: torch.Tensor, num_queries: int) -> torch.Tensor:
    """(N, T, S) → (N, G * T, S): the mask for every query head of a key/value head."""
    return mask_NTS.repeat(1, num_queries // mask_NTS.size(1), 1)


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

    def __call__(self, tokens_BT, position_B1, previous_B1, keys, values, ring_lengths_L, prompts) -> torch.Tensor:
        B, T = tokens_BT.shape
        key = (B == 1, T)
        if key not in self.packages:
            with torch.inference_mode(False):
                self.packages[key] = self._load(1 if B == 1 else 3, T, dtype=keys[0].dtype, is_shared=bool(prompts))
        return self.packages[key]([tokens_BT, position_B1, previous_B1, *keys, *values, ring_lengths_L, *prompts])

    def refresh(self) -> None:
        """Must be called after tensors of the model were replaced."""
        for package in self.packages.values():
            package.refresh()

    def _load(self, B: int, T: int, dtype: torch.dtype, is_shared: bool) -> aot.Package:
        """For this number of slots if it is 1, and any above 1 if not; for any numbers of keys and prompts."""
        config = self.module.model.config
        position_B1, previous_B1, tokens_BT = split_rows(torch.zeros((B, 2 + T), dtype=torch.long))
        keys, values = self._example_caches(B, 50, dtype)
        ring_lengths_L = torch.ones(config.n_layer, dtype=torch.long)
        prompts: list[torch.Tensor] = []
        if is_shared:
            U, M = (1, 1) if B == 1 else (5, 7)
            per_row = torch.zeros((3, B), dtype=torch.long).unbind()
            prompt_keys, prompt_values = self._example_caches(U, 70, dtype)
            prompts = [*per_row, torch.zeros((U, M), dtype=torch.long), *prompt_keys, *prompt_values]
        examples = (tokens_BT, position_B1, previous_B1, keys, values, ring_lengths_L, prompts)

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


class Decoder:
    """Slots, each with the keys and values of a sequence, and `step`, which samples a token for the first B of them."""

    def __init__(
        self,
        model: GPT,
        max_slots: int,
        *,
        precisions: Sequence[str] = (),
        compile: bool = False,
        max_drafted: int = 0,
        share_prompts: bool = False,
    ):
        """
        precisions: as in packed.choose. compile: the forward pass, if `can_compile`. max_drafted: further tokens of a
        slot that a step may read. share_prompts: see shared_prompts.py; a slot then begins after the prompt.
        """
        self.max_drafted = max_drafted
        self.original = model
        device = model.device
        self.is_compiled = compile and can_compile(model)
        choice = packed.choose(model, max_slots, compiled=self.is_compiled, precisions=precisions)
        self.num_threads = choice.num_threads
        self.model = packed.packed_copy(model, choice.dtype, choice.layout)
        if max_drafted:  # drafts may reach behind the end of the context
            config = model.config
            length = config.sequence_len + max_drafted
            self.model.cos, self.model.sin = rotary_table(length, config.head_dim, config.rope_base, device)
        self.weight_ptrs = [p.data_ptr() for p in model.parameters()]
        # On a CPU, eager attention is 2.5 to 6 times as fast in float32 as in bfloat16.
        is_eager_on_cpu = device.type == "cpu" and not self.is_compiled
        self.dtype = torch.float32 if is_eager_on_cpu else self.model.dtype
        self.cache = KVCache(model.config, device, self.dtype)
        self.prompts: SharedPrompts | None = None
        if share_prompts:
            self.prompts = SharedPrompts(model.config, device, self.dtype)
        self.forward: Callable[..., torch.Tensor] = StepForward(self.model, attend_by_products)
        if self.is_compiled and device.type == "cpu":
            hardware.keep_freed_pages()
            name = f"{model.config} {choice.dtype} {choice.layout}"
            self.forward = PackagedForward(StepForward(self.model, attend_by_sums), name)
        elif self.is_compiled:
            # One graph for all numbers of slots and keys (and one for a single slot). By default torch takes two sizes
            # that are equal at first for the same one, and compiles again when they are not.
            torch.fx.experimental._config.use_duck_shape = False  # type: ignore[attr-defined]
            # Two graphs per engine, and a server has an engine per GPU and model. Beyond torch's limit of 8 it fails.
            torch._dynamo.config.recompile_limit = MAX_COMPILED
            module = StepForward(self.model, attend_without_maximum)
            self.forward = torch.compile(module, dynamic=True, fullgraph=True, options=CUDA_OPTIONS)
        self.num_slots = 0  # so far; `reserve` adds more
        self.length = 0  # of a slot, in tokens
        # On CUDA each step is a captured graph; static shapes keep the number of graphs small. These are two flags, so
        # that tests can use the shapes without the graphs.
        self.use_static_shapes = self.use_graphs = device.type == "cuda"
        if self.use_graphs:
            # torch's default stream for captures belongs to the device that was used first in the process.
            self.capture_stream = torch.cuda.Stream(device)
        self.graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Sampled]] = {}

    def refresh_weights(self) -> None:
        """Must be called after the model's weights have changed."""
        packed.refresh(self.model)
        weight_ptrs = [p.data_ptr() for p in self.original.parameters()]
        if weight_ptrs != self.weight_ptrs:  # the graphs read from the old addresses
            self.graphs.clear()
            if isinstance(self.forward, PackagedForward):
                self.forward.refresh()
        self.weight_ptrs = weight_ptrs

    # ---- slots ----

    def reserve(self, num_slots: int, length: int) -> None:
        """Grows to at least `num_slots` slots of `length` tokens; the slots keep their contents."""
        num_slots, length = max(num_slots, self.num_slots), max(length, self.length)
        if (num_slots, length) == (self.num_slots, self.length):
            return
        config, device = self.model.config, self.model.device
        # + 1: the token itself. Drafted tokens need entries besides those that the first token of the step sees.
        self.rings = {window: min(window + 1, length) + self.max_drafted for window in config.windows}
        self.ring_lengths = [self.rings[window] for window in config.windows]  # by layer
        self.ring_lengths_L = upload(torch.tensor(self.ring_lengths), device)
        self.cache.grow(num_slots, self.rings)
        if self.prompts:
            self.prompts.reserve_slots(num_slots)
        # The rows of a step. Captured graphs read them at a fixed address; on a CPU both are the same tensor.
        size = num_slots * (NUM_COLUMNS + 2 * (1 + self.max_drafted))
        self.host_rows = torch.zeros(size, dtype=torch.float64, pin_memory=device.type == "cuda")
        self.rows = self.host_rows.to(device, non_blocking=True)
        self.num_slots, self.length = num_slots, length
        self.graphs.clear()

    def fill(self, first_slot: int, num_slots: int, prefix: Prefix) -> None:
        """Puts a prefix into consecutive slots. On CUDA the host waits for nothing."""
        if self.prompts:
            if self.prompts.fill(prefix.tokens, prefix.caches, num_slots):
                self.graphs.clear()
            return
        slots = slice(first_slot, first_slot + num_slots)
        for window, states in prefix.caches.items():
            ring = self.rings[window]
            states = states[:, :, -ring:]
            start = (len(prefix.tokens) - states.size(2)) % ring
            to_the_end, behind = states.tensor_split([ring - start], dim=2)
            self.cache.write(window, slots, start, to_the_end)
            self.cache.write(window, slots, 0, behind)

    def free(self, slot: int, num_slots: int) -> None:
        """Frees one of the first num_slots slots, all of which are filled, by moving the last of them there."""
        if self.prompts:
            self.prompts.free(slot)
        if slot < num_slots - 1:
            self.cache.move(num_slots - 1, slot)

    # ---- the step ----

    def step(self, rows: Sequence[StepRow], sampling: BatchSampling) -> tuple[list[list[int]], list[list[float]]]:
        """
        Reads the tokens of the first slots, a row for each, and samples the next token after each of them. Returns for
        each slot a list of T tokens and, if `sampling` asks for them, one of their log-probabilities. A later step may
        start at an earlier position again, which replaces the keys and values from there on.
        """
        num_slots, T = len(rows), len(rows[0].tokens)
        batch = num_slots
        if self.use_static_shapes:
            batch = min(next_power_of_two(num_slots), self.num_slots)
        prompts = None
        positions = [row.position for row in rows]
        if self.prompts:
            prompts = self.prompts.shape(self._round_up_keys(self.prompts.longest), self.use_static_shapes)
            self.prompts.prepare(batch, prompts)
            lengths = self.prompts.lengths
            positions = [position - length for position, length in zip(positions, lengths, strict=True)]
        num_keys = min(self._round_up_keys(max(positions) + T), self.length + self.max_drafted)
        self._upload([*rows, *[rows[0]] * (batch - num_slots)])  # unused slots repeat what the first one does
        shape = StepShape(batch, T, num_keys, sampling, prompts)
        if self.use_graphs:
            sampled = self._replay(shape)
        else:
            with hardware.num_threads(self.num_threads):
                sampled = self._run_or_fall_back(self._step, shape)
        logprobs = [] if sampled.logprobs_BT is None else sampled.logprobs_BT[:num_slots].tolist()
        return sampled.tokens_BT[:num_slots].tolist(), logprobs

    def _upload(self, rows: Sequence[StepRow]) -> None:
        """Writes the rows where the step reads them, in float64, which holds token numbers and float32 exactly."""
        vocab_size = self.model.config.vocab_size
        numbers: list[float] = []
        for position, previous, tokens, params, uniforms in rows:
            numbers += (position, previous, *tokens)
            numbers += (params.top_k or vocab_size, params.temperature, params.top_p, *uniforms)
        self.host_rows.numpy()[: len(numbers)] = numbers
        self.rows[: len(numbers)].copy_(self.host_rows[: len(numbers)], non_blocking=True)

    def _round_up_keys(self, count: int) -> int:
        """The number of keys that a step reads to see `count` of them."""
        if not self.use_static_shapes:
            return -(-count // KEY_MULTIPLE) * KEY_MULTIPLE
        return max(MIN_SHARED_GRAPH_KEYS if self.prompts else MIN_GRAPH_KEYS, next_power_of_two(count))

    def _replay(self, shape: StepShape) -> Sampled:
        """Runs the step as a CUDA graph, captured at the first call with this shape."""
        if shape not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                self.graphs.clear()
            with CAPTURE_LOCK, torch.cuda.device(self.model.device):
                self._run_or_fall_back(self._warm_up, shape)
                self.graphs[shape] = self._capture(shape)
        graph, sampled = self.graphs[shape]
        graph.replay()
        return sampled

    def _run_or_fall_back(self, run: Callable[[StepShape], Sampled], shape: StepShape) -> Sampled:
        """Runs the step, without compiled code if compiling fails, which has changed nothing yet."""
        try:
            return run(shape)
        except RuntimeError as error:
            if not is_compile_error(error):
                raise
            reason = " ".join(str(error).split("\n")[:2])
            warn0(f"the decode step is not compiled, which makes it slower: {reason}")
            # On a CPU in any dtype: by sums.
            self.forward = StepForward(self.model, attend_by_products if self.use_graphs else attend_by_sums)
            return run(shape)

    def _capture(self, shape: StepShape) -> tuple[torch.cuda.CUDAGraph, Sampled]:
        pool = next((graph.pool() for graph, _ in self.graphs.values()), None)  # all graphs share one memory pool
        graph = torch.cuda.CUDAGraph()
        # By default a capture fails when another thread allocates memory or waits for its own work at the same time.
        with torch.cuda.graph(graph, pool=pool, stream=self.capture_stream, capture_error_mode="thread_local"):
            sampled = self._step(shape)
        return graph, sampled

    def _warm_up(self, shape: StepShape) -> Sampled:
        """Runs the step before it is captured, as libraries initialize at their first call."""
        stream = self.capture_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                sampled = self._step(shape)
        torch.cuda.current_stream().wait_stream(stream)
        return sampled

    def _step(self, shape: StepShape) -> Sampled:
        """The step itself. All of it runs on the device: the host reads no value, so it can be captured as a graph."""
        B, T, num_keys, sampling, prompt_shape = shape
        rows_BX = self.rows[: B * (NUM_COLUMNS + 2 * T)].view(B, -1)
        position_B1, previous_B1, tokens_BT = split_rows(rows_BX[:, : 2 + T].long())
        keys, values = self.cache.views(B, num_keys)
        prompts: list[torch.Tensor] = []
        if self.prompts and prompt_shape:
            prompts = self.prompts.tensors(B, prompt_shape)
        inputs = StepInputs(tokens_BT, position_B1, previous_B1, keys, values, self.ring_lengths_L, prompts)
        raw_BTV = self.forward(*inputs)
        params_B3, uniform_BT = rows_BX[:, 2 + T :].float().split([3, T], dim=1)
        params_N3 = params_B3.repeat_interleave(T, dim=0) if T > 1 else params_B3
        top_k_N, temperature_N, top_p_N = params_N3.unbind(1)
        rows = RowSampling(top_k_N, temperature_N, top_p_N, uniform_BT.flatten())
        tokens_N, logprobs_N = sample(raw_BTV.flatten(0, 1), rows, sampling, self.model.config.logit_softcap)
        return Sampled(tokens_N.view(B, T), None if logprobs_N is None else logprobs_N.view(B, T))


def split_rows(rows_BX: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The columns that the forward pass reads, (B, 2 + T): positions, previous tokens and tokens."""
    return rows_BX.split([1, 1, rows_BX.size(1) - 2], dim=1)


def can_compile(model: GPT) -> bool:
    """Whether the forward pass of decode steps can be compiled, and reasonably soon."""
    is_slow = model.device.type == "cpu" and model.config.n_layer > MAX_LAYERS_TO_COMPILE
    return not is_slow and hardware.can_compile(model.device)


def is_compile_error(error: RuntimeError) -> bool:
    """Whether torch.compile failed, not the code that it compiled."""
    from torch._dynamo.exc import TorchDynamoException  # imported late: it takes a second

    return isinstance(error, (aot.CompileError, TorchDynamoException))
