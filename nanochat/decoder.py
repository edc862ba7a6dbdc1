"""
The decode step: reads one token of each active slot and samples the next one. Generation spends most of its time here.

A slot holds the keys and values of a sequence and nothing else; what a step reads and how it samples is passed to each
call, a StepToken per slot. It is the model's own forward pass (gpt.py) with one token per sequence, the slots as its KV
cache (slot_attention.py), and weights in the fastest layout (packed.py). The forward pass can be compiled
(step_forward.py). On CUDA the step is captured as a graph, compiled or not.

    Decoder.step → GPT.hidden → SlotCache.attend … → logits → sample → next tokens

Shapes: B slots in a step, the first ones; T tokens of each (1, or more with drafts), V vocabulary.
"""

import threading
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from nanochat import hardware, packed
from nanochat.distributed import warn0
from nanochat.gpt import GPT, rotary_table
from nanochat.kv_cache import KVCache, Prefix, upload
from nanochat.sampling import BatchSampling, RowSampling, next_power_of_two, sample
from nanochat.shared_prompts import PromptShape, SharedPrompts
from nanochat.slot_attention import StepInputs, attend_by_products, attend_by_sums
from nanochat.step_forward import PackagedForward, StepForward, can_compile, compile_forward, is_compile_error

MIN_GRAPH_KEYS = 256  # a captured step reads this many keys or a higher power of two; heuristic, not tuned
MIN_SHARED_GRAPH_KEYS = 64  # the same if prompts are shared: rings hold only what was generated
KEY_MULTIPLE = 32  # without graphs, the number of keys is rounded up to this; heuristic, not tuned
MAX_GRAPHS = 64  # captured graphs that are kept, one per BatchSampling and shape; heuristic, not tuned
CAPTURE_LOCK = threading.Lock()  # a process can capture one graph at a time, and a server has a thread per engine

# A token that a step reads, in float64, which holds token numbers and float32 exactly: its position, the token before
# it (anything at position 0) and the token itself; top_k, temperature and top_p, as in sampling.RowSampling; a random
# number in [0, 1), to sample the next one. The host needs 1.8 µs per slot and step with these (Zen 4). If they stayed
# on the device it would need 1.3, but they would have to be moved with slots, restored after a capture, and replaced
# where a tool forces a token.
StepToken = array
NUM_COLUMNS = 7  # of a StepToken


class StepShape(NamedTuple):
    """What a step's computation depends on: on CUDA, one graph is captured for each of these."""

    num_slots: int
    num_tokens: int  # of each slot
    num_keys: int  # of each ring, at most
    sampling: BatchSampling
    prompts: PromptShape | None  # None = prompts are not shared


class Sampled(NamedTuple):
    """The results of a step, on the device."""

    tokens_BT: torch.Tensor
    logprobs_BT: torch.Tensor | None  # None if no row wants them


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
        if self.is_compiled:
            self.forward = compile_forward(self.model, name=f"{model.config} {choice.dtype} {choice.layout}")
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
        # The tokens of a step. Captured graphs read them at a fixed address.
        size = num_slots * (1 + self.max_drafted) * NUM_COLUMNS
        self.host_rows = torch.zeros(size, dtype=torch.float64, pin_memory=device.type == "cuda")
        self.host_bytes = self.host_rows.numpy().data.cast("B")  # the same memory
        self.rows = self.host_rows.to(device, non_blocking=True)  # on a CPU the same tensor
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

    def step(
        self, tokens: Sequence[Sequence[StepToken]], sampling: BatchSampling
    ) -> tuple[list[list[int]], list[list[float]]]:
        """
        Reads T consecutive tokens of each of the first slots, 1 or 1 + max_drafted, and samples the next token after
        each. Returns these by slot, and their log-probabilities (zeros, unless `sampling` asks for them). A later step
        may start at an earlier position again, which replaces the keys and values from there on.
        """
        num_slots, T = len(tokens), len(tokens[0])
        batch = num_slots
        if self.use_static_shapes:
            batch = min(next_power_of_two(num_slots), self.num_slots)
        self._upload([*tokens, *[tokens[0]] * (batch - num_slots)])  # unused slots repeat what the first one does
        prompts = None
        positions = self.host_rows[: num_slots * T * NUM_COLUMNS : T * NUM_COLUMNS].int().tolist()
        if self.prompts:
            prompts = self.prompts.shape(self._round_up_keys(self.prompts.longest), self.use_static_shapes)
            self.prompts.prepare(batch, prompts)
            lengths = self.prompts.lengths
            positions = [position - length for position, length in zip(positions, lengths, strict=True)]
        num_keys = min(self._round_up_keys(max(positions) + T), self.length + self.max_drafted)
        shape = StepShape(batch, T, num_keys, sampling, prompts)
        if self.use_graphs:
            sampled = self._replay(shape)
        else:
            with hardware.num_threads(self.num_threads):
                sampled = self._run_or_fall_back(self._step, shape)
        logprobs = [[0.0] * T] * num_slots
        if sampled.logprobs_BT is not None:
            logprobs = sampled.logprobs_BT[:num_slots].tolist()
        return sampled.tokens_BT[:num_slots].tolist(), logprobs

    def _upload(self, tokens: Sequence[Sequence[StepToken]]) -> None:
        """Writes the tokens to where the step reads them."""
        joined = b"".join(chain.from_iterable(tokens))
        self.host_bytes[: len(joined)] = joined
        if self.rows is not self.host_rows:
            size = len(joined) // self.rows.itemsize
            self.rows[:size].copy_(self.host_rows[:size], non_blocking=True)

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
        rows_NX = self.rows[: B * T * NUM_COLUMNS].view(B * T, NUM_COLUMNS)
        positions_N, previous_N, tokens_N, top_k_N = rows_NX[:, :4].long().unbind(1)
        tokens_BT, positions_BT, previous_B1 = tokens_N.view(B, T), positions_N.view(B, T), previous_N.view(B, T)[:, :1]
        keys, values = self.cache.views(B, num_keys)
        prompts: list[torch.Tensor] = []
        if self.prompts and prompt_shape:
            prompts = self.prompts.tensors(B, prompt_shape)
        inputs = StepInputs(tokens_BT, positions_BT, previous_B1, keys, values, self.ring_lengths_L, prompts)
        raw_BTV = self.forward(*inputs)
        rows = RowSampling(top_k_N, *rows_NX[:, 4:].float().unbind(1))
        sampled_N, logprobs_N = sample(raw_BTV.flatten(0, 1), rows, sampling, self.model.config.logit_softcap)
        return Sampled(sampled_N.view(B, T), None if logprobs_N is None else logprobs_N.view(B, T))
