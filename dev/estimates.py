"""
How long a micro-batch of pretraining and a decode step should take on an H100, from the FLOPs and bytes of our code.

    python dev/estimates.py     # the tables of docs/gpus.md; gpu_check.py prints each number beside its measurement

Matrix products and attention are limited by arithmetic: FLOPs divided by a rate. Everything else is limited by memory:
bytes divided by the bandwidth of copies. The rates were measured on an H100 SXM on 26 November 2026 with random data
(docs/gpus.md), except where a line says otherwise. The bytes are those of the compiled code, counted by count_bytes.py.
"""

from typing import Any

from nanochat.cards import Card, find_machine
from nanochat.costs import decode_bytes, flops_per_token, matmul_weights, param_counts
from nanochat.gpt import GPTConfig
from nanochat.recipe import RecipeFlags, model_config

CARD = find_machine("H100").card
BANDWIDTH = 2.911e12  # bytes/s of a copy, reads and writes; 3.35e12 on the data sheet
# bfloat16, see product_rate: 740e12 FLOP/s at width 768 and 786e12 at 1,536 in MLPs, without the time of relu²; in a
# whole micro-batch of depth 12 738e12.
PRODUCT_RATE, HALF_WIDTH = 838e12, 102
FP8_SPEEDUP = 1.74  # of products over bfloat16: 1,360e12 FLOP/s in the layers of depth 22
# FLOP/s, forward and backward: fa4 within compiled micro-batches of depths 12 and 22 (412e12 and 413e12), flash as 24
# layers by themselves, fa3 assumed to be as fast as fa4.
ATTENTION_RATE = {"flash": 232e12, "fa3": 410e12, "fa4": 410e12}
# Bandwidth of the layers' kernels as a share of a copy's. In FP8 some of them transpose, and at depth 22 everything but
# products and attention took 167 ms instead of 147.
BANDWIDTH_SHARE = {False: 1.0, True: 0.875}
IDLE_MS = 4.3  # between the kernels of a compiled micro-batch, at depth 12 (of 112.9) and at depth 22 (of 405.8)
ATTENTION_PASSES = 3.5  # forward 1, backward 2.5 with its recomputation
TILE = 128  # queries and keys that an attention kernel computes together, visible or not
# Bytes of compiled code besides products and attention, in bfloat16 and in FP8, as count_bytes.py counts them: "layer"
# per token, channel and layer; "edge" per token and channel; "logit" per logit; "matrix", "table", "head" per weight.
MOVED = {
    False: {"layer": 145.4, "edge": 26.2, "logit": 4.0, "matrix": 12.3, "table": 4.0, "head": 34.0},
    True: {"layer": 198.5, "edge": 16.2, "logit": 4.0, "matrix": 0.447, "table": 4.0, "head": 34.0},
}
LOGIT_REREAD = 2  # bytes per logit: a row of logits is too long to keep between its sum and its gradient
SUM_BYTES = 12  # per weight: torch adds the gradient of a micro-batch to the sum, two reads and a write in float32
# A decode step is one CUDA graph. Each of its kernels adds this to the time of its memory traffic: a step of depth 12
# took 0.518 ms with 151 kernels, of which 0.08 ms are traffic.
KERNEL_SECONDS = 2.9e-6
VOCAB_SIZE = 32768
ROWS = {12: 32, 20: 32, 24: 16}  # of a micro-batch, by depth


def main() -> None:
    for line in training_table() + [""] + decode_table():
        print(line)


# ---- training ----


def training_ms(config: GPTConfig, rows: int, *, attention: str = "flash", fp8: bool = False) -> dict[str, float]:
    """
    Milliseconds of a micro-batch by part, forward and backward, with the plain MLP. The fused one (kernels/relu2.py)
    was 7 % faster at width 768, and as fast at 1,536.
    """
    tokens, C = rows * config.sequence_len, config.n_embd
    counts, moved = param_counts(config), MOVED[fp8]
    rate = product_rate(C)
    block_products = 6 * tokens * counts["transformer_matrices"] / rate
    other_products = 6 * tokens * (matmul_weights(config) - counts["transformer_matrices"]) / rate
    num_tables = counts["wte"] + counts["value_embeds"]
    seconds = {
        "matrix products": block_products / (FP8_SPEEDUP if fp8 else 1) + other_products,
        "attention": attention_flops(config, rows) / ATTENTION_RATE.get(attention, ATTENTION_RATE["flash"]),
        "norms, rotary, relu²": tokens * C * moved["layer"] * config.n_layer / (BANDWIDTH_SHARE[fp8] * BANDWIDTH),
        "loss": (
            tokens * config.padded_vocab_size * (moved["logit"] + LOGIT_REREAD) + moved["head"] * counts["lm_head"]
        )
        / BANDWIDTH,
        "tables, casts, sums": (
            moved["edge"] * tokens * C
            + moved["matrix"] * counts["transformer_matrices"]
            + moved["table"] * num_tables
            + SUM_BYTES * counts["total"]
        )
        / BANDWIDTH,
    }
    return {part: 1e3 * value for part, value in seconds.items()} | {"between kernels": IDLE_MS}


def sum_ms(config: GPTConfig) -> float:
    """Milliseconds for adding a micro-batch's gradients to the sum, which the first one of a step need not do."""
    return 1e3 * SUM_BYTES * param_counts(config)["total"] / BANDWIDTH


def product_rate(width: int) -> float:
    """FLOP/s of the products of a layer in bfloat16; wide ones keep the tensor cores busier."""
    return PRODUCT_RATE * width / (width + HALF_WIDTH)


def attention_flops(config: GPTConfig, rows: int) -> float:
    """FLOPs of all layers, forward and backward. A kernel computes whole tiles, those on the edge of the mask too."""
    num_tiles = 0
    for window in config.windows:
        tiles_of_window = -(-window // TILE) + 1
        num_tiles += sum(min(row + 1, tiles_of_window) for row in range(-(-config.sequence_len // TILE)))
    return ATTENTION_PASSES * 4 * config.n_embd * TILE**2 * num_tiles * rows


def mfu(config: GPTConfig, rows: int, milliseconds: float, card: Card = CARD) -> float:
    """Share of the card's peak in 16 bits that a micro-batch reaches in this time."""
    return flops_per_token(config) * rows * config.sequence_len / (milliseconds / 1e3) / card.flops


def training_table() -> list[str]:
    variants: dict[str, dict[str, Any]] = {
        "`flash`": {},
        "`fa4`": {"attention": "fa4"},
        "`fa4`, FP8": {"attention": "fa4", "fp8": True},
    }
    lines = []
    for depth, rows in ROWS.items():
        config = model_config(RecipeFlags(depth=depth), VOCAB_SIZE)
        for name, options in variants.items():
            parts = training_ms(config, rows, **options)
            if not lines:
                lines += [table_row("ms per micro-batch", *parts, "total", "MFU"), "|---|" + "---:|" * (len(parts) + 2)]
            total = sum(parts.values())
            cells = [f"{value:.0f}" for value in [*parts.values(), total]]
            lines.append(table_row(f"d{depth}, {rows} rows, {name}", *cells, f"{mfu(config, rows, total):.0%}"))
    return lines


# ---- generation ----


def decode_kernels(depth: int, *, compiled: bool) -> int:
    """
    Kernels of a captured step of one row that samples from the top k: tests/test_null_gpu.py counts them. compiled: the
    forward pass.
    """
    return 37 + 8 * depth if compiled else 79 + 43 * depth


def decode_ms(config: GPTConfig, rows: int, context: int, num_kernels: int) -> float:
    """Milliseconds of a step in bfloat16."""
    return 1e3 * (decode_traffic(config, rows, context) / BANDWIDTH + num_kernels * KERNEL_SECONDS)


def decode_traffic(config: GPTConfig, rows: int, context: int) -> int:
    return decode_bytes(config, rows, context, weight_bytes=2, cache_dtype=CARD.dtype)


def decode_table() -> list[str]:
    lines = [
        table_row("decode step, 1 row", "kernels", "ms", "tokens/s", "bandwidth used", "kernels for 60 %"),
        "|---|" + "---:|" * 5,
    ]
    for depth in ROWS:
        config = model_config(RecipeFlags(depth=depth), VOCAB_SIZE)
        num_kernels, context = decode_kernels(depth, compiled=True), 1024
        ms = decode_ms(config, 1, context, num_kernels)
        floor = 1e3 * decode_traffic(config, 1, context) / BANDWIDTH
        most = (floor / 0.6 - floor) / 1e3 / KERNEL_SECONDS
        row = (f"d{depth}", str(num_kernels), f"{ms:.2f}", f"{1e3 / ms:.0f}", f"{floor / ms:.0%}", f"{most:.0f}")
        lines.append(table_row(*row))
    return lines


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
