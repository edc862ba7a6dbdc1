"""
What a model costs: parameters, FLOPs, memory and time. Pure arithmetic on its configuration.

    setup = TrainingSetup(rows=16, world_size=8)
    training_memory(config, setup).peak               # bytes per GPU
    largest_batch(config, setup, total_batch_size, capacity)

What is stored (weights, gradients, optimizer state, KV cache) follows from the sizes of the model. What a forward pass
keeps for the backward pass is a multiple of tokens x layers x channels: the factors below were measured.
`python -m scripts.bench memory` compares predictions with measured peaks.

Units: bytes, seconds, FLOPs. A micro-batch has rows x sequence_len tokens.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from nanochat.gpt import SMEAR_CHANNELS, VE_GATE_CHANNELS, GPTConfig
from nanochat.loss import chunk_rows
from nanochat.muon import SHARD_MIN_NUMEL
from nanochat.tokenizer import SPECIAL_TOKENS

GIB = 2**30

# Bytes per token and channel that the forward pass keeps on a GPU, in 16 bits: LAYER_BYTES in each layer, EDGE_BYTES
# once (embedding, smear, backout); twice as much in float32. Measured with FlashAttention at depths 4 to 24, compiled
# and not: within 1 %. Two of them are due to layers without value embeddings, where v keeps the joint product of q, k
# and v in memory. FP8 layers keep their inputs in 8 bits.
LAYER_BYTES = 41.0
LAYER_BYTES_FP8 = {True: 28.8, False: 37.0}  # compiled, eager
BANDED_BYTES = 2.0  # in each layer, the masks of the kernel "banded"
GAIN_BYTES = {True: 0.0, False: 2.0}  # compiled, eager: in each layer, the normed input of the MLP before its gain
EDGE_BYTES = 10.0
# With activation checkpointing a layer keeps only its input, which for the first one is among EDGE_BYTES.
INPUT_BYTES = 2.0
# What the backward pass of one layer needs besides: gradients of activations.
BACKWARD_BYTES = {True: 29.0, False: 26.0}  # compiled, eager
BACKWARD_BYTES_FP8 = {True: 29.0, False: 43.0}  # eager, each cast to 8 bits goes through float32
# On a CPU, bytes per token, layer and channel: one pass per step; several passes per step, which fragment the heap.
# Measured at depths 4 to 8, 2,048 to 16,384 tokens a pass. CPU_PROCESS is what the process takes besides. Eager code
# needs more memory than compiled code, and every run on a CPU starts without torch.compile, so this is the peak.
CPU_LAYER_BYTES = {torch.float32: (132.0, 204.0), torch.bfloat16: (93.0, 93.0), torch.float16: (93.0, 93.0)}
CPU_PROCESS = 0.61 * GIB
# While the loss is computed: memory in units of one chunk of logits in float32.
LOSS_COPIES = {True: 1.4, False: 2.5}  # compiled, eager
# During Muon's update: memory in units of the largest stack of matrices.
MUON_COPIES = {True: 2.6, False: 6.3}


# ---- parameters and FLOPs ----


def param_counts(config: GPTConfig) -> dict[str, int]:
    """Number of parameters by group, and their total."""
    C = config.n_embd
    num_value_embeds = len(config.layers_with_value_embeds)
    block = 2 * C * C + 2 * C * config.kv_width + 8 * C * C  # queries and output; keys and values; MLP
    value_gates = num_value_embeds * VE_GATE_CHANNELS * config.n_kv_head
    smear = SMEAR_CHANNELS + 1 if config.smear else 0
    gains = (config.n_layer + 1) * C * config.norm_gains
    counts = {
        "wte": config.padded_vocab_size * C,
        "value_embeds": num_value_embeds * config.padded_vocab_size * config.kv_width,
        "lm_head": config.padded_vocab_size * C,
        "transformer_matrices": config.n_layer * block + value_gates,
        "scalars": 2 * config.n_layer * config.residual_scalars + smear + config.backout + gains,
    }
    return counts | {"total": sum(counts.values())}


def lora_params(config: GPTConfig, rank: int) -> int:
    """Parameters that LoRA (lora.py) trains: two factors for each matrix of a block, and rows of lm_head."""
    C, kv_width = config.n_embd, config.kv_width
    sides = 2 * (C + C) + 2 * (C + kv_width) + 2 * (C + 4 * C)  # queries and output; keys and values; MLP
    return config.n_layer * rank * sides + len(SPECIAL_TOKENS) * C


def matmul_weights(config: GPTConfig) -> int:
    """Number of weights that multiply activations: each costs 2 FLOPs per token forward and 4 backward."""
    counts = param_counts(config)
    smear_gate = SMEAR_CHANNELS if config.smear else 0
    return counts["transformer_matrices"] + counts["lm_head"] + smear_gate


def flops_per_token(config: GPTConfig) -> int:
    """
    Forward and backward FLOPs per trained token, as the PaLM paper counts them (arXiv 2204.02311, appendix B): matrix
    products only, no embedding look-ups, and no discount for the causal mask.
    """
    attention = sum(12 * config.n_embd * window for window in config.windows)
    return 6 * matmul_weights(config) + attention


def recomputed_share(config: GPTConfig) -> float:
    """
    FLOPs that activation checkpointing adds, as a share of flops_per_token: a second forward pass of the layers. MFU
    does not count them.
    """
    attention = sum(4 * config.n_embd * window for window in config.windows)
    return (2 * param_counts(config)["transformer_matrices"] + attention) / flops_per_token(config)


def decode_flops(config: GPTConfig, context: int) -> int:
    """Forward FLOPs of one more token after `context` tokens."""
    return 2 * matmul_weights(config) + 4 * config.n_embd * _num_keys(config, context)


def kv_bytes_read(config: GPTConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of the KV cache that decoding one token reads after `context` tokens."""
    return _num_keys(config, context) * 2 * config.kv_width * dtype.itemsize


def decode_bytes(config: GPTConfig, rows: int, context: int, *, weight_bytes: int, cache_dtype: torch.dtype) -> int:
    """
    Bytes that a decode step of several sequences reads: all weights, of that many bytes each, and the KV cache of every
    sequence after `context` tokens.
    """
    return weight_bytes * matmul_weights(config) + rows * kv_bytes_read(config, context, cache_dtype)


def _num_keys(config: GPTConfig, context: int) -> int:
    """Keys that one token after `context` tokens sees, its own included, summed over the layers."""
    return sum(min(window, context) + 1 for window in config.windows)


# ---- communication of training ----


def bytes_communicated(config: GPTConfig, setup: "TrainingSetup") -> dict[str, float]:
    """
    Bytes that each rank sends per optimizer step, by purpose (and receives as many). W ranks exchange n bytes in a
    ring: an all-gather or a reduce-scatter sends n (W - 1) / W, an all-reduce twice that, and an all-to-all, where n
    are the bytes of one rank, n (W - 1) / W too. muon.py and sharding.py say what is exchanged. The few numbers that
    the training loop exchanges are left out.
    """
    W = setup.world_size
    sent = 4 * (W - 1) / W  # bytes per number in float32
    matrices = matrix_shapes(config)
    tables = Counter({(config.padded_vocab_size, config.n_embd): 2})
    tables[config.padded_vocab_size, config.kv_width] += len(config.layers_with_value_embeds)

    def is_large(shape: tuple[int, int]) -> bool:
        return setup.sharded and math.prod(shape) >= SHARD_MIN_NUMEL

    def per_rank(count: int) -> int:
        """Matrices or rows of each rank, padding included."""
        return math.ceil(count / W)

    # Replicated parameters: gradients to their owner, updated weights back.
    replicated = param_counts(config)["scalars"]
    replicated += sum(rows * columns * n for (rows, columns), n in tables.items() if not is_large((rows, columns)))
    replicated += sum(math.prod(shape) * per_rank(n) * W for shape, n in matrices.items() if not is_large(shape))
    if not setup.sharded:
        return {"gradients": sent * replicated, "weights": sent * replicated}

    large_matrices = [(columns, rows, n) for (rows, columns), n in matrices.items() if is_large((rows, columns))]
    blocks = sum(columns * per_rank(rows) * W * n for columns, rows, n in large_matrices)
    edges = sum(columns * per_rank(rows) * W * n for (rows, columns), n in tables.items() if is_large((rows, columns)))
    dedicated = sum(columns * per_rank(rows) * per_rank(n) * W for columns, rows, n in large_matrices)
    block_bytes = setup.dtype.itemsize / 4 * blocks  # gathered in the compute dtype
    return {
        "gathered weights": setup.accumulation * sent * (2 * block_bytes + edges),  # blocks: forward and backward pass
        "gradients": setup.accumulation * sent * (blocks + edges) + sent * replicated,
        "Muon": 2 * sent * dedicated,
        "weights": sent * replicated,
    }


def matrix_shapes(config: GPTConfig) -> Counter[tuple[int, int]]:
    """The matrices that Muon trains: shape → number of them. Those of one shape are exchanged together."""
    C, L = config.n_embd, config.n_layer
    shapes: Counter[tuple[int, int]] = Counter()
    for shape, count in (
        ((C, C), 2 * L),  # queries, output
        ((config.kv_width, C), 2 * L),  # keys, values
        ((4 * C, C), L),
        ((C, 4 * C), L),
        ((config.n_kv_head, VE_GATE_CHANNELS), len(config.layers_with_value_embeds)),
    ):
        shapes[shape] += count
    return shapes


# ---- memory of training ----


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained: everything that its memory depends on."""

    rows: int  # per micro-batch and rank
    accumulation: int = 1  # micro-batches per step
    world_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = True
    fp8: bool = False
    attention: str = "flash"
    device: str = "cuda"
    activation_checkpointing: bool = False
    lora_rank: int = 0  # of the adapters that are trained (lora.py); 0 = the model is trained
    sharded: bool = False  # each rank keeps its rows of the parameters only (sharding.py)


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose, for one rank. Each phase of a step needs some of these parts at the same time."""

    parts: dict[str, float]
    phases: dict[str, tuple[str, ...]]

    def of_phase(self, phase: str) -> float:
        return sum(self.parts[part] for part in self.phases[phase])

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.of_phase)

    @property
    def peak(self) -> float:
        return self.of_phase(self.peak_phase)


def training_memory(config: GPTConfig, setup: TrainingSetup) -> Memory:
    """
    Memory of one rank: at the end of the last micro-batch's forward pass, where the loss is computed; in its backward
    pass, at the last layer and at the end; and during the optimizer's update.

    Where a step has a single micro-batch, its gradients do not exist yet at the last layer: the backward pass makes
    them while it frees activations. At depth 22 that leaves 5.3 GiB (counted on the null GPU at depths 8 to 24).
    """
    counts = param_counts(config)
    matrices = counts["transformer_matrices"]
    others = counts["total"] - matrices  # tables, lm_head and scalars, which AdamW updates
    itemsize = setup.dtype.itemsize
    share = 1 / setup.world_size
    largest_stack = 4 * 4 * config.n_embd**2 * config.n_layer * share  # the MLPs' matrices, 4 C x C each, in float32
    cast_layers = 1 if setup.activation_checkpointing else config.n_layer  # whose weights exist in 16 bits

    parts = {
        "process": 0.0 if setup.device == "cuda" else CPU_PROCESS,
        "weights": 4.0 * counts["total"],
        "gradients": 4.0 * counts["total"],
        "optimizer state": (8 * others + 4 * matrices) * share,  # two moments for AdamW, a momentum for Muon
        "cast weights": itemsize * matrices * cast_layers / config.n_layer if itemsize < 4 and not setup.fp8 else 0.0,
        "FP8 weights": 2.0 * matrices if setup.fp8 else 0.0,  # two layouts
        "gathered weights": 0.0,
        "loss": _loss_bytes(config, setup),
        "update": 4.0 * matrices + MUON_COPIES[setup.compiled] * largest_stack,
        "communication": 4.0 * matrices + 4 * counts["total"] * share if setup.world_size > 1 else 0.0,
        **_activations(config, setup),
    }
    if setup.lora_rank:
        parts |= _lora_parts(config, setup)
    if setup.sharded:
        parts |= _sharded_parts(config, setup)
    always = ("process", "weights", "optimizer state", "FP8 weights", "gathered weights")
    # What was measured on CPUs counts the gradients with the activations of a single pass (CPU_LAYER_BYTES).
    has_gradients = setup.accumulation > 1 or setup.device != "cuda"
    summed = ("gradients",) if has_gradients else ()  # of earlier micro-batches
    phases = {
        "loss": (*always, *summed, "cast weights", "activations", "loss"),
        "backward pass": (*always, *summed, "cast weights", "activations", "layer in backward"),
        "end of the backward pass": (*always, "gradients", "cast weights", "layer in backward"),
        "optimizer update": (*always, "gradients", "update", "communication"),
    }
    return Memory(parts, phases)


def _lora_parts(config: GPTConfig, setup: TrainingSetup) -> dict[str, float]:
    """What LoRA needs instead. The changed weights are computed for each use and kept for the backward pass."""
    counts = param_counts(config)
    trained = lora_params(config, setup.lora_rank)
    head = 4.0 * config.padded_vocab_size * config.n_embd
    return {
        "gradients": 4.0 * trained,
        "optimizer state": 8.0 * trained / setup.world_size,
        "cast weights": float(setup.dtype.itemsize * counts["transformer_matrices"]),
        "loss": _loss_bytes(config, setup) + head,
        "update": 0.0,
        "communication": 4.0 * trained if setup.world_size > 1 else 0.0,
    }


def _sharded_parts(config: GPTConfig, setup: TrainingSetup) -> dict[str, float]:
    """
    What sharded training needs instead. While a block computes, the next one's weights are gathered; in the backward
    pass, its gradient exists besides, and in float32 while it is summed. On a GPU the joint product of queries, keys
    and values keeps a copy of these weights in each layer, unless layers are computed again.
    """
    counts = param_counts(config)
    share = 1 / setup.world_size
    block = counts["transformer_matrices"] / config.n_layer
    table = config.padded_vocab_size * config.n_embd
    joined = (config.n_embd + 2 * config.kv_width) * config.n_embd * config.n_layer
    keeps_joined = setup.device == "cuda" and not setup.activation_checkpointing
    matrices = counts["transformer_matrices"] * share
    return {
        "weights": 4.0 * counts["total"] * share,
        "gradients": 4.0 * counts["total"] * share,
        "cast weights": float(setup.dtype.itemsize * joined) if keeps_joined else 0.0,
        "gathered weights": 3.0 * setup.dtype.itemsize * block + 4 * block + 2 * 4.0 * table,
        "update": MUON_COPIES[setup.compiled] * 16.0 * config.n_embd**2 * config.n_layer * share,
        "communication": 2 * 4.0 * matrices,  # gradients and directions that arrive
    }


def _activations(config: GPTConfig, setup: TrainingSetup) -> dict[str, float]:
    """What the forward pass keeps for the backward pass, and what a layer needs in its backward pass besides."""
    tokens_channels = setup.rows * config.sequence_len * config.n_embd
    if setup.device != "cuda":
        kept = CPU_LAYER_BYTES[setup.dtype][setup.accumulation > 1] * config.n_layer
        return {"activations": tokens_channels * kept, "layer in backward": 0.0}
    by_layer, in_backward = LAYER_BYTES, BACKWARD_BYTES[setup.compiled]
    if setup.fp8:
        by_layer, in_backward = LAYER_BYTES_FP8[setup.compiled], BACKWARD_BYTES_FP8[setup.compiled]
    if setup.attention == "banded":
        by_layer += BANDED_BYTES
    by_layer += GAIN_BYTES[setup.compiled] * config.norm_gains
    kept = by_layer * config.n_layer
    if setup.activation_checkpointing:
        kept = INPUT_BYTES * (config.n_layer - 1)
        in_backward += by_layer - INPUT_BYTES
    unit = setup.dtype.itemsize / 2 * tokens_channels
    # Compiled code keeps the two tensors of lm_head's gradient, of the forward and of the backward pass, to the end.
    head = 8.0 * config.padded_vocab_size * config.n_embd if setup.compiled else 0.0
    return {"activations": unit * (kept + EDGE_BYTES), "layer in backward": unit * in_backward + head}


def _loss_bytes(config: GPTConfig, setup: TrainingSetup) -> float:
    tokens = setup.rows * config.sequence_len
    rows = chunk_rows(tokens, config.padded_vocab_size, compiled=setup.compiled)
    chunk = 4 * min(tokens, rows) * config.padded_vocab_size
    gradients = setup.dtype.itemsize * tokens * config.n_embd + 4 * config.padded_vocab_size * config.n_embd
    cast_head = setup.dtype.itemsize * config.padded_vocab_size * config.n_embd
    return LOSS_COPIES[setup.compiled] * chunk + gradients + cast_head


# ---- what fits ----


def largest_batch(config: GPTConfig, setup: TrainingSetup, total_batch_size: int, capacity: float) -> int:
    """
    The most rows per micro-batch that fit into `capacity` bytes and divide the rows that each rank trains on per step.
    If these are even in number, only powers of two are tried. 0 if not even one row fits.
    """
    if total_batch_size % (config.sequence_len * setup.world_size):
        return 1  # not a whole number of rows: recipe.accumulation_steps raises the error
    rows_per_step = total_batch_size // (config.sequence_len * setup.world_size)
    sizes = [rows for rows in range(1, rows_per_step + 1) if rows_per_step % rows == 0]
    if rows_per_step % 2 == 0:
        sizes = [rows for rows in sizes if rows.bit_count() == 1]
    setups = [replace(setup, rows=rows, accumulation=rows_per_step // rows) for rows in sizes]
    fitting = [setup.rows for setup in setups if training_memory(config, setup).peak <= capacity]
    return max(fitting, default=0)


# ---- generation ----


def cache_bytes(config: GPTConfig, slots: int, length: int, dtype: torch.dtype) -> float:
    """The KV cache of an engine whose slots hold `length` tokens. Each layer keeps at most its window + 1 of them."""
    keys = sum(min(window + 1, length) for window in config.windows)
    return 2.0 * slots * keys * config.kv_width * dtype.itemsize


def engine_parts(
    config: GPTConfig, slots: int, length: int, dtype: torch.dtype, device: str, *, compiled: bool = False
) -> dict[str, float]:
    """What an engine needs besides the weights of its model. compiled: its decode step."""
    counts = param_counts(config)
    cache_dtype = dtype if compiled or device == "cuda" else torch.float32  # see Decoder
    return {
        "decoder's weights": float(dtype.itemsize * (counts["transformer_matrices"] + counts["lm_head"])),
        "KV cache": cache_bytes(config, slots, length, cache_dtype),
        "sampling": 3.0 * 4 * slots * config.padded_vocab_size,  # logits, probabilities, sorted ones, in float32
    }


def generation_memory(
    config: GPTConfig, slots: int, length: int, dtype: torch.dtype, device: str, *, compiled: bool = False
) -> Memory:
    """Memory of a model that is loaded for inference, with its engine. compiled: the decode step."""
    parts = {"weights": float(dtype.itemsize * param_counts(config)["total"])}
    parts |= engine_parts(config, slots, length, dtype, device, compiled=compiled)
    if device != "cuda":
        parts["process"] = CPU_PROCESS
    return Memory(parts, {"decode step": tuple(parts)})


def rl_memory(config: GPTConfig, setup: TrainingSetup, slots: int, length: int, has_reference: bool) -> Memory:
    """Training as in `setup`, plus an engine and, if has_reference, the model that the run started from."""
    training = training_memory(config, setup)
    extra = engine_parts(config, slots, length, setup.dtype, setup.device)
    if has_reference:
        extra["reference model"] = training.parts["weights"]
    phases = {phase: (*parts, *extra) for phase, parts in training.phases.items()}
    return Memory(training.parts | extra, phases)


# ---- time ----


def expected_mfu(config: GPTConfig, fp8: bool) -> float:
    """
    The share of a GPU's 16-bit peak that training reaches. It is larger for wider models. Fitted to public runs on
    8xH100: 47.6 % in bfloat16 at depth 20 (1.08 M tokens/s, October 2025), about 50 % at depth 24, and 58 % in FP8 at
    depth 24 (2.02 h for 9.5 tokens per parameter, 1.65 h for 8). FP8 gains nothing at depth 12.
    """
    if fp8:
        return 0.92 * config.n_embd / (config.n_embd + 900)
    return 0.62 * config.n_embd / (config.n_embd + 384)
