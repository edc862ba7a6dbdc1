"""
Generation: the engine compared with two straightforward ways to decode the same model (plain.py), one of them that of
Karpathy's nanochat, both in float32 and in bfloat16.

    python -m scripts.bench infer --depth 4 --head-dim 64 --vocab-size 8192
    python -m scripts.bench infer -i sft --batch-sizes 1,64,256 --int8               # a trained model

All sides complete the same prompt with the same sampling parameters, each in a separate process. Tokens/s include the
time for the prompt. The engine runs with its default settings. The last two rows of the table compare its decode steps
with this machine's memory bandwidth and speed of matrix products, which are measured first. `ratios`: tokens/s of the
engine divided by those of a baseline in its faster dtype; "nanochat 8" is with 8 requests at a time.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from nanochat import checkpoint_manager, hardware, planner
from nanochat.cli import COUNT, DEPTH, NOT_NEGATIVE, Range, command, flag
from nanochat.costs import decode_bytes, decode_flops
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.recipe import RecipeFlags, model_config
from nanochat.request import Request
from scripts.bench.harness import Worker, alternate, print_table, report, timed
from scripts.bench.plain import generate_like_nanochat, generate_static

NO_SPECIAL_TOKENS: Any = SimpleNamespace(bos=-1, special=lambda text: -1)  # a tokenizer: no token ends a completion
FIRST_TOKENS = "first tokens"
Generate = Callable[[Request, int], object]  # a request and how many at a time; ends with the tokens on the host


@dataclass(frozen=True)
class Flags:
    depth: int = flag(4, "layers of a model with initial weights", DEPTH)
    head_dim: int = flag(128, "channels per attention head", Range(16))
    vocab_size: int = flag(32768, "tokens", COUNT)
    max_seq_len: int = flag(2048, "tokens of context", COUNT)
    source: str = flag("", "stage of a trained model to use instead: base, mid, sft or rl", short="-i")
    model_tag: str = flag("", "tag of its checkpoint; default the one written last", short="-g")
    batch_sizes: tuple[int, ...] = flag((1, 8, 32), "requests at a time", COUNT)
    prompt_tokens: int = flag(64, "tokens of each prompt", COUNT)
    max_tokens: int = flag(128, "new tokens of each request", COUNT)
    temperature: float = flag(1.0, "sampling temperature; 0 = greedy", NOT_NEGATIVE)
    top_k: int = flag(50, "sample among the k most likely tokens; 0 = all tokens", NOT_NEGATIVE)
    int8: bool = flag(False, "also measure the engine with 8-bit weights")
    rounds: int = flag(5, "runs of each side, in turn; the medians count", COUNT)
    device: str = flag("auto", "cuda | mps | cpu | auto")


class Side(NamedTuple):
    """A way to generate: what makes it, from a model of that dtype."""

    make: Callable[[GPT], Generate]
    dtype: torch.dtype


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    device = hardware.pick_device(flags.device)
    if not flags.source:
        length = flags.prompt_tokens + flags.max_tokens
        planner.check_generation_fits(
            fresh_config(flags), max(flags.batch_sizes), length, planner.find_target("", flags.device)
        )
    dtype = hardware.pick_dtype(device)
    bandwidth, matmul_rate = hardware.copy_bandwidth(device), hardware.matmul_rate(device, dtype)
    sides = make_sides(device, flags.int8)
    workers = {name: Worker(work, side, flags) for name, side in sides.items()}
    configs: list[GPTConfig] = [worker.receive() for worker in workers.values()]
    seconds = measure(workers, flags, flags.batch_sizes)
    for worker in workers.values():
        worker.connection.send(None)

    speeds = {name: {B: B * flags.max_tokens / seconds[name][B] for B in flags.batch_sizes} for name in sides}
    ratios: dict[str, float] = {}
    columns: dict[str, dict[str, str]] = {}
    context = flags.prompt_tokens + flags.max_tokens // 2  # tokens that a step reads, on average
    cache_dtype = torch.float32 if device.type == "cpu" else dtype
    for B in flags.batch_sizes:
        column = columns[str(B)] = {name: f"{speed[B]:,.0f}" for name, speed in speeds.items()}
        engine = speeds["engine"][B]
        for baseline in ("nanochat", "static"):
            fastest = max(speed[B] for name, speed in speeds.items() if name.startswith(baseline))
            ratios[f"{baseline} {B}"] = engine / fastest
            column[f"engine over {baseline}"] = f"{engine / fastest:.2f} x"
        num_bytes = decode_bytes(configs[0], B, context, weight_bytes=dtype.itemsize, cache_dtype=cache_dtype)
        column["engine: first tokens"] = f"{1e3 * seconds[FIRST_TOKENS][B]:.1f} ms"
        column["engine: bandwidth used"] = f"{num_bytes * engine / B / bandwidth:.0%}"
        column["engine: FLOP/s used"] = f"{decode_flops(configs[0], context) * engine / matmul_rate:.1%}"
    print_table("tokens/s by requests at a time", transposed(columns))
    print(f"{hardware.describe(device)}: copies {bandwidth / 1e9:.1f} GB/s, products {matmul_rate / 1e9:,.0f} GFLOP/s")
    return report("infer", ratios, tokens_per_second=speeds, seconds_to_first_tokens=seconds[FIRST_TOKENS])


def transposed(columns: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for column, cells in columns.items():
        for row, cell in cells.items():
            rows.setdefault(row, {})[column] = cell
    return rows


def fresh_config(flags: Flags) -> GPTConfig:
    shape = RecipeFlags(depth=flags.depth, head_dim=flags.head_dim, max_seq_len=flags.max_seq_len)
    return model_config(shape, flags.vocab_size)


def load(flags: Flags, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model, ready for inference."""
    if flags.source:
        return checkpoint_manager.load_model(flags.source, flags.model_tag, -1, device, dtype)[0]
    torch.manual_seed(0)
    model = GPT.create(fresh_config(flags), device, dtype)
    model.cast_weights()
    return model.requires_grad_(False)


# ---- the sides ----


def make_sides(device: torch.device, int8: bool) -> dict[str, Side]:
    """The engine as the stages use it, and the baselines in each dtype."""
    default = hardware.pick_dtype(device)
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cpu" else [default]
    sides = {"engine": Side(engine_side, default)}
    if int8:
        sides["engine, 8-bit weights"] = Side(int8_side, dtypes[-1])
    for name, make in (("nanochat", nanochat_side), ("static", static_side)):
        sides |= {f"{name}, {str(dtype).removeprefix('torch.')}": Side(make, dtype) for dtype in dtypes}
    return sides


def engine_side(model: GPT, precisions: Sequence[str] = ("bfloat16",)) -> Generate:
    engines: dict[int, Engine] = {}  # by number of slots

    def generate(request: Request, B: int) -> object:
        if B not in engines:
            engines[B] = Engine(model, NO_SPECIAL_TOKENS, B, precisions=precisions, compile=True)
            engines[B].warm_up()
        return engines[B].generate([replace(request, seed=seed) for seed in range(B)])

    return generate


def int8_side(model: GPT) -> Generate:
    return engine_side(model, ("bfloat16", "int8"))


def nanochat_side(model: GPT) -> Generate:
    return lambda request, B: generate_like_nanochat(model, NO_SPECIAL_TOKENS, request, B)


def static_side(model: GPT) -> Generate:
    return lambda request, B: generate_static(model, request, B)


# ---- measuring ----


def measure(workers: dict[str, Worker], flags: Flags, batch_sizes: Sequence[int]) -> dict[str, dict[int, float]]:
    """
    Seconds of each side by batch size, prompts included, medians of alternating runs; and those of the engine until
    every request has its first token.
    """
    seconds: dict[str, dict[int, float]] = {}
    for B in batch_sizes:
        runs = {name: partial(worker.request, (B, flags.max_tokens)) for name, worker in workers.items()}
        runs[FIRST_TOKENS] = partial(workers["engine"].request, (B, 1))
        for name, turns in alternate(runs, flags.rounds).items():
            seconds.setdefault(name, {})[B] = statistics.median(turns)
    return seconds


def work(connection: Any, side: Side, flags: Flags) -> None:
    """The process of a side. Sends the model's configuration; answers (requests, tokens of each) with seconds."""
    device = hardware.pick_device(flags.device)
    model = load(flags, device, side.dtype)
    generate = side.make(model)
    torch.manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (flags.prompt_tokens,)).tolist()
    request = Request(prompt, flags.max_tokens, flags.temperature, flags.top_k)
    connection.send(model.config)
    while message := connection.recv():
        B, max_tokens = message
        connection.send(timed(partial(generate, replace(request, max_tokens=max_tokens), B)))


if __name__ == "__main__":
    main()
