"""
The decode step: reads one token of each active slot and samples the next one. Generation spends most of its time here.

It is the model's forward pass (gpt.py) written a second time, for a single position per sequence: the weights are
packed once, the KV cache stays in place, tokens are sampled on the device, and on CUDA the whole step is captured as a
graph. A change of the model must be made in both files; tests/test_engine.py compares them.

    Decoder.step → _forward → logits → sample → next tokens

Shapes: R slots, B of them (the first ones) active in a step, T positions of a slot, C width, K key/value heads, D head
size, V vocabulary, k candidates of top-k sampling.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanochat.distributed import warn0
from nanochat.gpt import GPT, NORM_EPS, SMEAR_CHANNELS, VE_GATE_SCALE, Block, GPTConfig, norm
from nanochat.loss import softcap

MIN_GRAPH_KEYS = 256  # a captured step reads this many keys or a higher power of two; heuristic, not tuned
MAX_GRAPHS = 64  # captured graphs that are kept, one per BatchSampling and shape; heuristic, not tuned
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


# ---- logits → probabilities → sample ----


class SamplingParams(NamedTuple):
    """How one sequence is sampled."""

    temperature: float  # 0 = greedy
    top_k: int  # 0 = all tokens
    top_p: float  # 1 = all tokens
    logprobs: bool


@dataclass(frozen=True)
class BatchSampling:
    """Which parts of `sample` a step needs; the others are skipped. The values per row are in RowSampling."""

    greedy: bool = False  # some row is greedy
    # The k of each torch.topk to compute. A row with a top_k uses that, a row with only a top_p the vocabulary's size,
    # both rounded up to a power of two.
    candidates: tuple[int, ...] = ()
    top_p: bool = False  # some row has a top_p below 1
    full_vocab: bool = False  # some row samples from the whole vocabulary
    logprobs: bool = False  # some row wants the log-probability of its token

    @classmethod
    def of(cls, rows: list[SamplingParams], vocab_size: int) -> "BatchSampling":
        sampled = [row for row in rows if row.temperature > 0]
        limits = [row.top_k or vocab_size for row in sampled if row.top_k or row.top_p < 1]
        return cls(
            greedy=len(sampled) < len(rows),
            candidates=tuple(sorted({_next_power_of_two(limit) for limit in limits})),  # few sizes, so few graphs
            top_p=any(row.top_p < 1 for row in sampled),
            full_vocab=any(not row.top_k and row.top_p >= 1 for row in sampled),
            logprobs=any(row.logprobs for row in rows),
        )


class RowSampling(NamedTuple):
    """The sampling parameters of the rows of a step, on the device."""

    temperature_B: torch.Tensor
    top_k_B: torch.Tensor  # the vocabulary's size = all tokens
    top_p_B: torch.Tensor
    uniform_B: torch.Tensor  # a random number in [0, 1) each


def sample(
    raw_BV: torch.Tensor, rows: RowSampling, batch: BatchSampling, logit_softcap: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Samples the next token of each row from its logits before the softcap. Returns the tokens (B,) and, if a row wants
    them, their log-probabilities (B,) under the distribution that they were sampled from: the softmax of the capped
    logits divided by the temperature, limited to the top_k most likely tokens, and then to the fewest of these whose
    probabilities add up to top_p. Greedy rows get the log-probability under the full softmax at temperature 1.

    A row's token depends on its own logits only, not on the other rows. torch.topk orders equal logits differently for
    different k, so each row uses a k that follows from its own top_k (see BatchSampling), whatever else is in the
    batch.
    """
    is_sampled_B = rows.temperature_B > 0
    temperature_B1 = torch.where(is_sampled_B, rows.temperature_B, 1.0)[:, None]
    tokens_B, logprobs_B = rows.uniform_B.long(), rows.uniform_B  # placeholders: every row is replaced below
    if batch.full_vocab:
        logits_BV = softcap(raw_BV.float(), logit_softcap)
        probs_BV = torch.softmax(logits_BV / temperature_B1, dim=-1)
        tokens_B, logprobs_B = sample_index(probs_BV, rows.uniform_B)
    for size in batch.candidates:  # usually one
        best_Bk, ids_Bk = raw_BV.topk(min(size, raw_BV.size(1)), dim=-1)  # the softcap would not change the order
        logits_Bk = softcap(best_Bk.float(), logit_softcap)
        probs_Bk = limit_probs(logits_Bk / temperature_B1, rows, batch.top_p)
        indices_B, limited_logprobs_B = sample_index(probs_Bk, rows.uniform_B)
        limited_tokens_B = ids_Bk.gather(1, indices_B[:, None]).squeeze(1)
        is_limited_B = (rows.top_k_B < raw_BV.size(1)) | (rows.top_p_B < 1)
        # The rows whose top_k, rounded up to a power of two, is this size: size / 2 < top_k <= size.
        uses_size_B = is_limited_B & (size // 2 < rows.top_k_B) & (rows.top_k_B <= size)
        tokens_B = torch.where(uses_size_B, limited_tokens_B, tokens_B)
        logprobs_B = torch.where(uses_size_B, limited_logprobs_B, logprobs_B)
    if batch.greedy:
        best_B, ids_B = raw_BV.max(dim=-1)
        tokens_B = torch.where(is_sampled_B, tokens_B, ids_B)
        if batch.logprobs:
            logits_BV = softcap(raw_BV.float(), logit_softcap)
            greedy_logprobs_B = softcap(best_B.float(), logit_softcap) - logits_BV.logsumexp(dim=-1)
            logprobs_B = torch.where(is_sampled_B, logprobs_B, greedy_logprobs_B)
    return tokens_B, logprobs_B if batch.logprobs else None


def limit_probs(logits_Bk: torch.Tensor, rows: RowSampling, use_top_p: bool) -> torch.Tensor:
    """Returns the probabilities (B, k) of logits in descending order, with the top_k and top_p of each row applied."""
    ranks_k = torch.arange(logits_Bk.size(1), device=logits_Bk.device)
    probs_Bk = logits_Bk.masked_fill(ranks_k >= rows.top_k_B[:, None], -torch.inf).softmax(dim=-1)
    if not use_top_p:
        return probs_Bk
    total_before_Bk = probs_Bk.cumsum(dim=-1) - probs_Bk
    is_cut_Bk = (total_before_Bk >= rows.top_p_B[:, None]) & (ranks_k > 0)  # the most likely token always stays
    probs_Bk = probs_Bk.masked_fill(is_cut_Bk, 0.0)
    return probs_Bk / probs_Bk.sum(dim=-1, keepdim=True)


def sample_index(probs: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Inverse transform sampling: returns for each row the first index at which the cumulative probability exceeds the
    random number, and the log-probability of that index, (B,) each.

    torch.multinomial draws one random number per token of the vocabulary instead of one per row: 5.7 against 1.0 ms for
    32 rows and 8,192 tokens.
    """
    cumulative = probs.cumsum(dim=-1)
    thresholds = uniform_B[:, None] * cumulative[:, -1:]  # the sum is not exactly 1
    indices = torch.searchsorted(cumulative, thresholds, right=True)
    indices = indices.clamp_max(probs.size(1) - 1)  # NaN would give an index past the end
    return indices.squeeze(1), probs.gather(1, indices).squeeze(1).log()


# ---- weights ----


class PackedLinear:
    """
    A linear layer without bias whose weight is one or more of the model's matrices, stacked. In the "plain" layout, a
    single matrix that has the right dtype is shared with the model, so that optimizer steps need no copy. Everything
    else is a copy, which `refresh` makes again.
    """

    def __init__(self, weights: Callable[[], list[torch.Tensor]], dtype: torch.dtype, layout: str):
        """layout: as chosen by choose_layout; "int8" has one scale per output channel."""
        self.weights, self.dtype, self.layout = weights, dtype, layout
        self.weight = self.scale = torch.empty(0)
        self.is_shared = False  # the weight is the model's own tensor
        self.refresh()

    def refresh(self) -> None:
        """Copies the model's weights again, in place where possible: captured graphs read from the old address."""
        sources = [weight.detach() for weight in self.weights()]
        weights = [weight.to(self.dtype) for weight in sources]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if self.layout == "packed":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 0)
        elif self.layout == "int8":
            scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127
            self.scale = copy_or_replace(self.scale, scale.to(self.dtype))
            self.weight = copy_or_replace(self.weight, (weight.float() / scale[:, None]).round().to(torch.int8))
        elif self.layout == "transposed":
            self.weight = weight.t().contiguous()
        else:
            was_shared = self.is_shared
            self.is_shared = weight.data_ptr() == sources[0].data_ptr()
            if was_shared or self.is_shared:  # never write to a shared tensor: it belongs to the model
                self.weight = weight
            else:
                self.weight = copy_or_replace(self.weight, weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        if self.layout == "packed":
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        if self.layout == "transposed":
            return torch.mm(x, self.weight)
        if self.layout == "plain":
            return F.linear(x, self.weight)
        if x.is_cpu:
            return torch._weight_int8pack_mm(x, self.weight, self.scale)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


def copy_or_replace(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns `old` with the values of `new` if the shapes are equal, otherwise `new` itself."""
    if old.shape == new.shape and old.data_ptr() != new.data_ptr():
        return old.copy_(new)
    return new


def choose_layout(model: GPT, num_slots: int, int8: bool) -> str:
    """
    The fastest weight layout: "plain", "packed" (by oneDNN, for the CPU), "transposed" or "int8".

    Speed of "packed" over "plain" on a Zen 5 CPU with 8 rows: 1.4 in bfloat16 and 1.2 to 1.6 in float32; lm_head with a
    vocabulary of 8,192: 1.8 and 2.9. One row in float32 is limited by memory bandwidth: "transposed" weights (20 MB)
    are read at 42 GB/s instead of 13. Weights that are being trained in the compute dtype stay "plain" and are shared
    with the model.
    """
    weight = model.lm_head.weight
    is_training = weight.dtype == model.dtype and weight.requires_grad
    if int8:
        if model.device.type == "cuda":
            warn0("8-bit weights are slower than bfloat16 on a GPU: each step writes them out in 16 bits")
        return "int8"
    if model.device.type != "cpu" or is_training:
        return "plain"
    if model.dtype == torch.float32:
        if num_slots == 1:
            return "transposed"
        return "packed" if torch.backends.mkldnn.is_available() else "plain"
    has_fast_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "packed" if model.dtype == torch.bfloat16 and has_fast_bfloat16 else "plain"


class LayerWeights:
    """The matrices of one block."""

    def __init__(self, block: Block, dtype: torch.dtype, layout: str):
        attn = block.attn

        def attn_inputs() -> list[torch.Tensor]:
            weights = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]
            if attn.has_value_embeds:
                num_missing = attn.c_q.in_features - attn.ve_gate.in_features
                weights.append(F.pad(attn.ve_gate.weight, (0, num_missing)))  # the gate reads the first channels only
            return weights

        # Queries, keys, values and gates in one product: for small products the call takes as long as the arithmetic.
        self.attn_in = PackedLinear(attn_inputs, dtype, layout)
        self.attn_out = PackedLinear(lambda: [attn.c_proj.weight], dtype, layout)
        self.mlp_in = PackedLinear(lambda: [block.mlp.c_fc.weight], dtype, layout)
        self.mlp_out = PackedLinear(lambda: [block.mlp.c_proj.weight], dtype, layout)

    def refresh(self) -> None:
        for linear in (self.attn_in, self.attn_out, self.mlp_in, self.mlp_out):
            linear.refresh()


# ---- the decoder ----


class RingContext(NamedTuple):
    """How one decode step uses the rings of one length."""

    num_keys: int  # to read
    indices: torch.Tensor  # (B * K,): where the new keys go, in the cache flattened to (R * K * ring, D)
    mask: torch.Tensor | None  # (B * K, num_keys, 1), added to the scores; None: every key is visible


class SlotStart(NamedTuple):
    """What a slot starts with, after its prefix."""

    token: int  # read by the next step
    params: SamplingParams
    uniforms: torch.Tensor  # a random number in [0, 1) for each token to sample


class StepContext(NamedTuple):
    """What all layers of one decode step share."""

    tokens_B: torch.Tensor
    cos_B1D: torch.Tensor
    sin_B1D: torch.Tensor
    rings: dict[int, RingContext]  # by length; layers with equal windows have equal rings


class Decoder:
    """
    Slots, each with the state of a sequence and its sampling parameters, and `step`, which adds a token to the first B.

    A slot keeps the keys and values of each layer in a ring of the layer's window + 1 entries: position p is
    stored at p modulo the ring's length. Keys are already rotated, so their order in the ring does not matter. Before
    the ring is full, the entries up to the current position are visible; after that, all are.
    """

    def __init__(self, model: GPT, max_slots: int, int8: bool = False):
        self.model = model
        config, device = model.config, model.device
        # On a CPU, attention is 2.5 to 6 times as fast in float32 as in bfloat16, and the other operations between the
        # matrix products are no slower.
        self.dtype = torch.float32 if device.type == "cpu" else model.dtype

        layout = choose_layout(model, max_slots, int8)
        blocks = [cast(Block, block) for block in model.transformer.h]
        self.layers = [LayerWeights(block, model.dtype, layout) for block in blocks]
        self.head = PackedLinear(lambda: [model.lm_head.weight[: config.vocab_size]], model.dtype, layout)
        self.weight_ptrs = [p.data_ptr() for p in model.parameters()]

        # Rotation of a whole head at once: x * cos + (x with its halves swapped) * sin. For the second half, sin gets
        # the minus sign that gpt.rotate has there.
        self.cos = model.cos.to(self.dtype).repeat(1, 2)[:, None]
        self.sin = model.sin.to(self.dtype).repeat(1, 2)[:, None]
        self.sin[..., config.head_dim // 2 :] *= -1
        # The gains of queries and keys. Those of the queries include attention's factor 1 / sqrt(D).
        gain = blocks[0].attn.gain
        gains = [gain / math.sqrt(config.head_dim)] * config.n_head + [gain] * config.n_kv_head
        self.gains = torch.tensor(gains, device=device, dtype=self.dtype)[:, None]
        self.norm_eps = torch.tensor(NORM_EPS, device=device, dtype=self.dtype)

        self.layers_by_window = layers_by_window(config)
        self.num_slots = 0  # so far; `reserve` adds more
        self.length = 0  # of a slot, in tokens
        # On CUDA each step is a captured graph; static shapes keep the number of graphs small. These are two flags, so
        # that tests can use the shapes without the graphs.
        self.use_static_shapes = self.use_graphs = device.type == "cuda"
        if self.use_graphs:
            # torch's default stream for captures belongs to the device that was used first in the process.
            self.capture_stream = torch.cuda.Stream(device)
        self.graphs: dict[tuple[int, int, BatchSampling], torch.cuda.CUDAGraph] = {}

    def refresh_weights(self) -> None:
        """Must be called after the model's weights have changed."""
        for layer in self.layers:
            layer.refresh()
        self.head.refresh()
        weight_ptrs = [p.data_ptr() for p in self.model.parameters()]
        if weight_ptrs != self.weight_ptrs:  # the graphs read from the old addresses
            self.graphs.clear()
        self.weight_ptrs = weight_ptrs

    # ---- slots ----

    def reserve(self, num_slots: int, length: int) -> None:
        """Grows to at least `num_slots` slots of `length` tokens; the slots keep their contents."""
        num_slots, length = max(num_slots, self.num_slots), max(length, self.length)
        if (num_slots, length) == (self.num_slots, self.length):
            return
        config, device = self.model.config, self.model.device
        old_tensors = self.slot_tensors() if self.num_slots else []

        self.rings = [min(window + 1, length) for window in config.windows]  # by layer; + 1 for the token itself
        # Layers with one window share a tensor, (2, L, R, K, ring, D), so that a slot is filled with few copies.
        self.caches: dict[int, torch.Tensor] = {}
        self.keys, self.values = [torch.empty(0)] * config.n_layer, [torch.empty(0)] * config.n_layer
        for window, layers in self.layers_by_window.items():
            shape = (2, len(layers), num_slots, config.n_kv_head, min(window + 1, length), config.head_dim)
            self.caches[window] = torch.zeros(shape, device=device, dtype=self.dtype)
            for layer, (keys, values) in zip(layers, self.caches[window].unbind(1), strict=True):
                self.keys[layer], self.values[layer] = keys.flatten(0, 1), values.flatten(0, 1)
        self.previous_RC = torch.zeros((num_slots, config.n_embd), device=device, dtype=self.dtype)  # for smear
        self.tokens_R = torch.zeros(num_slots, device=device, dtype=torch.long)  # the next step reads these
        self.positions_R = torch.zeros(num_slots, device=device, dtype=torch.long)  # their positions
        self.temperature_R = torch.zeros(num_slots, device=device)
        self.top_k_R = torch.zeros(num_slots, device=device, dtype=torch.long)
        self.top_p_R = torch.ones(num_slots, device=device)
        self.uniform_RT = torch.zeros((num_slots, length), device=device)  # a random number per position
        self.logprobs_R = torch.zeros(num_slots, device=device)

        self.num_slots, self.length = num_slots, length
        if old_tensors:
            for new, old in zip(self.slot_tensors(), old_tensors, strict=True):
                # Correct for rings too: only a ring as long as its slot grows, and in it no position has wrapped yet.
                new[tuple(slice(size) for size in old.shape)] = old
        self.range = torch.arange(length, device=device)
        head_indices = torch.arange(num_slots * config.n_kv_head, device=device).view(num_slots, -1)
        self.ring_starts = {ring: head_indices * ring for ring in set(self.rings)}  # (R, K), in the flattened cache
        self.graphs.clear()

    def slot_tensors(self) -> list[torch.Tensor]:
        """Everything that belongs to a slot; the first dimension of each tensor is R."""
        caches = [cache.movedim(2, 0) for cache in self.caches.values()]
        sampling = [self.temperature_R, self.top_k_R, self.top_p_R, self.uniform_RT]
        return [*caches, self.previous_RC, self.tokens_R, self.positions_R, *sampling]

    def fill(self, first_slot: int, prefix: Prefix, starts: Sequence[SlotStart]) -> None:
        """Puts sequences that share a prefix into consecutive slots. On CUDA the host waits for nothing."""
        device, position = self.model.device, len(prefix.tokens)
        slots = slice(first_slot, first_slot + len(starts))
        vocab_size = self.model.config.vocab_size
        integers = [[start.token, position, start.params.top_k or vocab_size] for start in starts]
        tokens_B, positions_B, top_k_B = upload(torch.tensor(integers).T, device)
        self.tokens_R[slots], self.positions_R[slots], self.top_k_R[slots] = tokens_B, positions_B, top_k_B
        numbers = torch.tensor([[start.params.temperature, start.params.top_p] for start in starts])
        self.temperature_R[slots], self.top_p_R[slots] = upload(numbers.T, device)
        uniforms_BT = pad_sequence([start.uniforms for start in starts], batch_first=True)
        self.uniform_RT[slots, position : position + uniforms_BT.size(1)] = upload(uniforms_BT, device)
        if position == 0:
            self.previous_RC[slots] = 0
            return
        self.previous_RC[slots] = self._embed(upload(torch.tensor(prefix.tokens[-1:]), device))
        for window, cache in self.caches.items():
            ring = cache.size(4)
            states = prefix.caches[window][:, :, -ring:].transpose(2, 3).unsqueeze(2)  # (2, L, 1, K, n, D)
            start = (position - states.size(4)) % ring
            split = min(ring - start, states.size(4))  # the states behind it go to the start of the ring
            cache[:, :, slots, :, start : start + split] = states[..., :split, :]
            if split < states.size(4):
                cache[:, :, slots, :, : states.size(4) - split] = states[..., split:, :]

    def force(self, tokens: dict[int, int]) -> None:
        """Replaces the tokens just sampled, by slot."""
        slots_B, tokens_B = upload(torch.tensor(list(tokens.items())).T, self.model.device)
        self.tokens_R[slots_B] = tokens_B

    def move(self, source: int, target: int) -> None:
        """Copies the contents of one slot to another."""
        for tensor in self.slot_tensors():
            tensor[target] = tensor[source]

    # ---- the step ----

    def step(
        self, num_slots: int, min_position: int, max_position: int, sampling: BatchSampling
    ) -> tuple[list[int], list[float]]:
        """
        Reads the current token of each of the first num_slots slots and samples the next one, which becomes the current
        token. Returns the sampled tokens and, if `sampling` asks for them, their log-probabilities. min_position and
        max_position: the lowest and highest position among the tokens read.
        """
        batch, num_keys = num_slots, max_position + 1
        if self.use_static_shapes:
            batch = min(_next_power_of_two(num_slots), self.num_slots)
            num_keys = min(max(MIN_GRAPH_KEYS, _next_power_of_two(num_keys)), self.length)
            min_position = 0  # the mask is always computed
        if self.use_graphs:
            self._replay(batch, num_keys, sampling)
        else:
            self._step(batch, num_keys, min_position, sampling)
        logprobs = self.logprobs_R[:num_slots].tolist() if sampling.logprobs else []
        return self.tokens_R[:num_slots].tolist(), logprobs

    def _replay(self, batch: int, num_keys: int, sampling: BatchSampling) -> None:
        """Runs the step as a CUDA graph, captured at the first call with these arguments."""
        key = (batch, num_keys, sampling)
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                self.graphs.clear()
            with CAPTURE_LOCK, torch.cuda.device(self.model.device):
                self._warm_up(batch, num_keys, sampling)
                self.graphs[key] = self._capture(batch, num_keys, sampling)
        self.graphs[key].replay()

    def _capture(self, batch: int, num_keys: int, sampling: BatchSampling) -> torch.cuda.CUDAGraph:
        pool = next((graph.pool() for graph in self.graphs.values()), None)  # all graphs share one memory pool
        graph = torch.cuda.CUDAGraph()
        # By default a capture fails when another thread allocates memory or waits for its own work at the same time.
        with torch.cuda.graph(graph, pool=pool, stream=self.capture_stream, capture_error_mode="thread_local"):
            self._step(batch, num_keys, 0, sampling)
        return graph

    def _warm_up(self, batch: int, num_keys: int, sampling: BatchSampling) -> None:
        """Runs the step before it is captured, as libraries initialize at their first call, and undoes its effects."""
        state = (self.tokens_R, self.positions_R, self.previous_RC)
        saved = [tensor.clone() for tensor in state]
        stream = self.capture_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(batch, num_keys, 0, sampling)
                for tensor, value in zip(state, saved, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)

    def _step(self, B: int, num_keys: int, min_position: int, sampling: BatchSampling) -> None:
        """The step itself. All of it runs on the device: the host reads no value, so it can be captured as a graph."""
        tokens_B, positions_B = self.tokens_R[:B], self.positions_R[:B]
        context = self._context(tokens_B, positions_B, num_keys, min_position)
        raw_BV = self._forward(context, self.previous_RC[:B])
        uniform_B = self.uniform_RT[:B].gather(1, positions_B[:, None]).squeeze(1)
        rows = RowSampling(self.temperature_R[:B], self.top_k_R[:B], self.top_p_R[:B], uniform_B)
        next_tokens_B, logprobs_B = sample(raw_BV, rows, sampling, self.model.config.logit_softcap)
        tokens_B.copy_(next_tokens_B)
        if logprobs_B is not None:
            self.logprobs_R[:B] = logprobs_B
        positions_B.add_(1).clamp_(max=self.length - 1)  # the clamp matters only for unused slots of the batch

    # ---- the forward pass ----

    def _context(
        self, tokens_B: torch.Tensor, positions_B: torch.Tensor, num_keys: int, min_position: int
    ) -> StepContext:
        """num_keys: the most keys that a layer reads; min_position: the lowest of the positions."""
        rings: dict[int, RingContext] = {}
        masks: dict[int, torch.Tensor | None] = {}  # by number of keys
        for length, starts in self.ring_starts.items():
            size = min(length, num_keys)
            if size not in masks:
                all_visible = min_position + 1 >= size
                masks[size] = None if all_visible else self._mask(positions_B, size)
            indices = (starts[: len(tokens_B)] + (positions_B % length)[:, None]).view(-1)
            rings[length] = RingContext(size, indices, masks[size])
        return StepContext(tokens_B, self.cos[positions_B], self.sin[positions_B], rings)

    def _mask(self, positions_B: torch.Tensor, num_keys: int) -> torch.Tensor:
        """(B * K, num_keys, 1): 0 for ring entries up to the position, minus infinity for those not written yet."""
        is_hidden = self.range[:num_keys] > positions_B[:, None]
        is_hidden = is_hidden.repeat_interleave(self.model.config.n_kv_head, dim=0)
        dtype = torch.float32 if is_hidden.is_cuda else self.dtype  # of the scores
        mask = torch.zeros(is_hidden.shape, device=is_hidden.device, dtype=dtype)
        return mask.masked_fill_(is_hidden, -torch.inf)[:, :, None]

    def _forward(self, context: StepContext, previous_BC: torch.Tensor) -> torch.Tensor:
        """
        Returns the logits before the softcap, (B, V) in the compute dtype; gpt.py explains all steps. previous_BC: the
        embeddings of the previous tokens, for smear; updated in place.
        """
        model, config = self.model, self.model.config
        x_BC = self._embed(context.tokens_B)
        if config.smear:
            x_BC = self._smear(x_BC, previous_BC)
        if config.residual_scalars:
            x0_LBC = (model.x0_lambdas.to(self.dtype)[:, None, None] * x_BC).unbind()
            resid_L = model.resid_lambdas.to(self.dtype).unbind()
        middle = x_BC
        for i, layer in enumerate(self.layers):
            if config.residual_scalars:
                x_BC = torch.addcmul(x0_LBC[i], x_BC, resid_L[i])
            x_BC = x_BC + self._attend(i, self._norm(x_BC), context)
            x_BC = x_BC + layer.mlp_out(layer.mlp_in(self._norm(x_BC)).relu_().square_())
            if i == len(self.layers) // 2:
                middle = x_BC
        if config.backout:
            x_BC = torch.addcmul(x_BC, middle, model.backout_lambda.to(self.dtype), value=-1)
        return self.head(self._norm(x_BC))

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        # Two casts: the first rounds as the model does, the second is to the dtype that the decoder computes in.
        return self._norm(F.embedding(tokens, self.model.transformer.wte.weight).to(self.model.dtype).to(self.dtype))

    def _smear(self, x_BC: torch.Tensor, previous_BC: torch.Tensor) -> torch.Tensor:
        gate = F.linear(x_BC[:, :SMEAR_CHANNELS], self.model.smear_gate.weight.to(self.dtype)).sigmoid_()
        smeared = torch.addcmul(x_BC, gate * self.model.smear_lambda.to(self.dtype), previous_BC)
        previous_BC.copy_(x_BC)
        return smeared

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """gpt.norm; on a CPU with fewer and cheaper operations than F.rms_norm has there: 5.0 against 9.4 µs a row."""
        if x.device.type != "cpu":
            return norm(x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.norm_eps, length, length, value=1 / x.size(-1)).rsqrt_()

    def _attend(self, i: int, x_BC: torch.Tensor, context: StepContext) -> torch.Tensor:
        """The attention of layer i, (B, C): writes the new keys and values into the cache, then reads the cache."""
        config = self.model.config
        B, num_kv, D = len(x_BC), config.n_kv_head, config.head_dim
        num_qk = config.n_head + num_kv
        inputs = self.layers[i].attn_in(x_BC).to(self.dtype)
        heads = inputs[:, : (num_qk + num_kv) * D].unflatten(1, (-1, D))
        qk, v = heads[:, :num_qk], heads[:, num_qk:]
        if str(i) in self.model.value_embeds:
            gate_BK = VE_GATE_SCALE * inputs[:, -num_kv:].sigmoid()
            table = cast(nn.Embedding, self.model.value_embeds[str(i)]).weight
            value_embed = F.embedding(context.tokens_B, table).to(self.model.dtype).to(self.dtype).view(B, num_kv, D)
            v = torch.addcmul(v, gate_BK[:, :, None], value_embed)
        rotated = torch.addcmul(qk * context.cos_B1D, qk.roll(D // 2, dims=-1), context.sin_B1D)
        qk = self._norm(rotated) * self.gains

        ring = context.rings[self.rings[i]]
        self.keys[i].view(-1, D).index_copy_(0, ring.indices, qk[:, -num_kv:].reshape(-1, D))
        self.values[i].view(-1, D).index_copy_(0, ring.indices, v.reshape(-1, D))
        keys = self.keys[i][: B * num_kv, : ring.num_keys]
        values = self.values[i][: B * num_kv, : ring.num_keys]

        # Scores are keys times queries: on a CPU up to a quarter faster than queries times keys.
        q = qk[:, :-num_kv].reshape(B * num_kv, -1, D).transpose(1, 2)
        weights = _scores(keys, q, ring.mask).softmax(dim=1).to(self.dtype)
        y = torch.bmm(weights.transpose(1, 2), values)
        return self.layers[i].attn_out(y.view(B, -1))


def _scores(keys: torch.Tensor, q: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    keys times queries, plus the mask. On CUDA the product of 16-bit factors stays in float32, as in the kernels that
    train: rounded to bfloat16, a score of 16 is off by up to 0.06, and so is the logarithm of its probability.
    """
    if keys.is_cuda and keys.dtype != torch.float32:
        if mask is None:
            return torch.bmm(keys, q, out_dtype=torch.float32)
        return torch.baddbmm(mask.expand(-1, -1, q.size(2)), keys, q, out_dtype=torch.float32)
    return torch.bmm(keys, q) if mask is None else torch.baddbmm(mask, keys, q)


def layers_by_window(config: GPTConfig) -> dict[int, list[int]]:
    """The indices of the layers that have the same window."""
    layers: dict[int, list[int]] = {}
    for layer, window in enumerate(config.windows):
        layers.setdefault(window, []).append(layer)
    return layers


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
