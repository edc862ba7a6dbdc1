"""
Generation: the engine against straightforward code for the same model and sampling parameters (plain.py).

    python -m scripts.bench infer --depth 4 --head-dim 64 --vocab-size 8192
    python -m scripts.bench infer -i sft --batch-sizes 1,64,256 --int8               # a trained model

The last two columns compare the decode steps with this machine's memory bandwidth and speed of matrix products, which
are measured first. `ratios`: for each data type and batch size, the engine's tokens/s divided by those of the
straightforward code in float32 (on a GPU in the engine's dtype).
"""

import statistics
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from nanochat import checkpoint_manager, hardware
from nanochat.cli import command, flag, require_positive
from nanochat.common import UserError, human
from nanochat.costs import decode_flops, kv_bytes_read, matmul_weights
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.recipe import RecipeFlags, model_config
from nanochat.tokenizer import Tokenizer, default_dir
from scripts.bench.harness import alternate, print_table, report, timed
from scripts.bench.plain import PlainCache, sample_next


@dataclass(frozen=True)
class Flags:
    depth: int = flag(4, "layers of a model with initial weights")
    head_dim: int = flag(128, "channels per attention head")
    vocab_size: int = flag(32768, "tokens")
    max_seq_len: int = flag(2048, "tokens of context")
    source: str = flag("", "stage of a trained model to use instead: base, mid, sft or rl", short="-i")
    model_tag: str = flag("", "tag of its checkpoint; default the one written last", short="-g")
    batch_sizes: str = flag("1,8,32", "requests at a time")
    prompt_tokens: int = flag(64, "tokens of each prompt")
    max_tokens: int = flag(128, "new tokens of each request")
    temperature: float = flag(1.0, "sampling temperature; 0 = greedy")
    top_k: int = flag(50, "sample among the k most likely tokens; 0 = all tokens")
    int8: bool = flag(False, "also measure the engine with 8-bit weights")
    rounds: int = flag(5, "runs of each side, in turn; the medians count")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    batch_sizes = parse_batch_sizes(flags.batch_sizes)
    require_positive(flags, "prompt_tokens", "max_tokens", "rounds")
    device = hardware.pick_device(flags.device)
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cpu" else [hardware.pick_dtype(device)]
    bandwidth = hardware.copy_bandwidth(device)
    context = flags.prompt_tokens + flags.max_tokens // 2  # tokens that a step reads, on average

    results: dict[str, dict[str, float]] = {}
    baselines: dict[int, float] = {}  # tokens/s by batch size, in the first dtype
    for dtype in dtypes:
        model = load(flags, device, dtype)
        matmul_rate = hardware.matmul_rate(device, dtype)
        variants = {str(dtype).removeprefix("torch."): False}  # name → 8-bit weights
        if flags.int8 and dtype == dtypes[-1]:
            variants["int8"] = True
        for name, int8 in variants.items():
            for B in batch_sizes:
                result = measure(model, B, flags, int8)
                speed = result["tokens_per_second"]
                result["bandwidth"] = bytes_per_step(model, B, context, int8) * speed / B / bandwidth
                result["flops"] = decode_flops(model.config, context) * speed / matmul_rate
                result["ratio"] = speed / baselines.setdefault(B, result["plain"])
                results[f"{name} {B}"] = result

    print_table("engine and plain code, by weights and requests at a time", table_rows(results))
    memory = hardware.peak_memory(device)
    print(
        f"{hardware.describe(device)}: copies {bandwidth / 1e9:.1f} GB/s; peak memory {human(memory)}B; plain: the "
        f"straightforward code in the same dtype; ratio: against it in {dtypes[0]}"
    )
    ratios = {name: result["ratio"] for name, result in results.items()}
    return report("infer", ratios, results=results, peak_memory=memory)


def parse_batch_sizes(text: str) -> list[int]:
    try:
        batch_sizes = [int(size) for size in text.split(",")]
    except ValueError:
        raise UserError(f"--batch-sizes {text}: give whole numbers with commas, such as 1,8,32") from None
    if min(batch_sizes) < 1:
        raise UserError(f"--batch-sizes {text}: each must be at least 1")
    return batch_sizes


def load(flags: Flags, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model, ready for inference."""
    if flags.source:
        tokenizer = Tokenizer.load(default_dir())
        return checkpoint_manager.load_model(flags.source, flags.model_tag, -1, tokenizer, device, dtype)[0]
    shape = RecipeFlags(depth=flags.depth, head_dim=flags.head_dim, max_seq_len=flags.max_seq_len)
    torch.manual_seed(0)
    model = GPT.create(model_config(shape, flags.vocab_size), device, dtype)
    model.cast_weights()
    return model.requires_grad_(False)


def measure(model: GPT, B: int, flags: Flags, int8: bool) -> dict[str, float]:
    """Tokens/s of the engine and of the plain code, prompts included, and the engine's seconds to a first token."""
    no_special_tokens: Any = SimpleNamespace(bos=-1, special=lambda text: -1)  # no token ends a completion
    engine = Engine(model, no_special_tokens, B, int8)
    prompt = torch.randint(model.config.vocab_size, (flags.prompt_tokens,)).tolist()
    request = Request(prompt, flags.max_tokens, flags.temperature, flags.top_k)
    requests = [replace(request, seed=seed) for seed in range(B)]
    first_token = replace(request, max_tokens=1)
    runs = {  # each ends with the tokens on the host
        "engine": lambda: timed(lambda: engine.generate(requests)),
        "plain": lambda: timed(lambda: plain_generate(model, prompt, B, flags)),
        "first_token": lambda: timed(lambda: engine.generate([first_token])),
    }
    seconds = {name: statistics.median(turns) for name, turns in alternate(runs, flags.rounds).items()}
    num_tokens = B * flags.max_tokens
    return {
        "tokens_per_second": num_tokens / seconds["engine"],
        "plain": num_tokens / seconds["plain"],
        "first_token": seconds["first_token"],
    }


@torch.inference_mode()
def plain_generate(model: GPT, prompt: list[int], B: int, flags: Flags) -> list[list[int]]:
    """Generates token by token with straightforward code; returns the tokens of each step, on the host."""
    cache = PlainCache(model, B, len(prompt) + flags.max_tokens)
    ids_BT = torch.tensor([prompt] * B, device=model.device)
    steps = []
    for _ in range(flags.max_tokens):
        ids_BT = sample_next(cache.read(ids_BT), flags.temperature, flags.top_k)
        steps.append(ids_BT.flatten().tolist())
    return steps


def bytes_per_step(model: GPT, B: int, context: int, int8: bool) -> float:
    """Bytes that a decode step of the engine reads: all weights, and the KV cache of B sequences."""
    cache_dtype = torch.float32 if model.device.type == "cpu" else model.dtype
    weight_bytes = matmul_weights(model.config) * (1 if int8 else model.dtype.itemsize)
    return weight_bytes + B * kv_bytes_read(model.config, context, cache_dtype)


def table_rows(results: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
    rows = {}
    for name, result in results.items():
        rows[name] = {
            "tokens/s": f"{result['tokens_per_second']:,.0f}",
            "plain": f"{result['plain']:,.0f}",
            "ratio": f"{result['ratio']:.2f}",
            "first token": f"{result['first_token'] * 1e3:.1f} ms",
            "bandwidth used": f"{result['bandwidth']:.0%}",
            "FLOP/s used": f"{result['flops']:.1%}",
        }
    return rows


if __name__ == "__main__":
    main()
