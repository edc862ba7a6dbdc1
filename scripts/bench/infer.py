"""
Generation with the engine beside a straightforward implementation: the same model and settings, a cache of keys and
values, one text a row, every row from the first to the last step.

    python -m scripts.bench infer --depth 4 --head-dim 64 --vocab-size 8192          # = python -m scripts.bench.infer …
    python -m scripts.bench infer -i sft --batch-sizes 1,64,256 --int8               # a trained model

Utilisation compares the decode steps with what this machine was measured to copy and to multiply. `ratios` has each
batch size: the engine's tokens/s over the straightforward code's in float32 (on a GPU in its own dtype).
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from nanochat import checkpoint_manager, hardware
from nanochat.cli import command, flag
from nanochat.common import UserError, human
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, decode_flops, kv_bytes_read, matmul_weights
from nanochat.recipe import RecipeFlags, model_config
from nanochat.tokenizer import Tokenizer, default_dir


@dataclass(frozen=True)
class Flags:
    depth: int = flag(4, "layers of a model with initial weights")
    head_dim: int = flag(128, "channels per attention head")
    vocab_size: int = flag(32768, "tokens")
    max_seq_len: int = flag(2048, "tokens of context")
    source: str = flag("", "stage of a trained model to take instead: base, mid, sft or rl", short="-i")
    model_tag: str = flag("", "name of its checkpoints; default the one written last", short="-g")
    batch_sizes: str = flag("1,8,32", "requests at a time")
    prompt_tokens: int = flag(64, "of each request")
    max_tokens: int = flag(128, "new tokens of each request")
    temperature: float = flag(1.0, "of sampling; 0 = greedy")
    top_k: int = flag(50, "sample among the k likeliest tokens; 0 = among all")
    int8: bool = flag(False, "the engine also with weights of 8 bits")
    rounds: int = flag(5, "runs of each, in turns; medians count")
    device: str = flag("auto", "cuda | mps | cpu | auto")


@command
def main(flags: Flags) -> dict[str, float]:
    """Returns the ratios."""
    try:
        batch_sizes = [int(size) for size in flags.batch_sizes.split(",")]
    except ValueError:
        raise UserError(f"--batch-sizes {flags.batch_sizes}: give whole numbers with commas, such as 1,8,32") from None
    device = hardware.pick_device(flags.device)
    if min(batch_sizes, default=0) < 1 or flags.rounds < 1:
        raise UserError("--batch-sizes and --rounds must be at least 1")
    bandwidth = hardware.copy_bandwidth(device)
    dtypes = [hardware.pick_dtype(device)] if device.type != "cpu" else [torch.float32, torch.bfloat16]
    table = Table("weights", "rows", "tokens/s", "plain", "ratio", "first token", "bandwidth used", "FLOP/s used")
    results, baseline = {}, dict[int, float]()
    for dtype in dtypes:
        model = load(flags, device, dtype)
        rate = hardware.matmul_rate(device, dtype)
        for int8 in (False, True) if flags.int8 else (False,):
            name = "int8" if int8 else str(dtype).removeprefix("torch.")
            if int8 and dtype != dtypes[-1]:
                continue
            for B in batch_sizes:
                result = measure(model, B, flags, int8)
                baseline.setdefault(B, result["plain"])
                steps = result["tokens_per_second"] / B
                context = flags.prompt_tokens + flags.max_tokens // 2
                weight_bytes = matmul_weights(model.config) * (1 if int8 else dtype.itemsize)
                cache_dtype = torch.float32 if device.type == "cpu" else dtype
                result["bandwidth"] = (
                    steps * (weight_bytes + B * kv_bytes_read(model.config, context, cache_dtype)) / bandwidth
                )
                result["flops"] = result["tokens_per_second"] * decode_flops(model.config, context) / rate
                result["ratio"] = result["tokens_per_second"] / baseline[B]
                results[f"{name} {B}"] = result
                table.add_row(
                    name, str(B), f"{result['tokens_per_second']:,.0f}", f"{result['plain']:,.0f}",
                    f"{result['ratio']:.2f}", f"{result['first_token'] * 1e3:.1f} ms",
                    f"{result['bandwidth']:.0%}", f"{result['flops']:.1%}",
                )  # fmt: skip
    Console().print(table)
    memory = hardware.peak_memory(device)
    print(
        f"{hardware.describe(device)}: copies {bandwidth / 1e9:.1f} GB/s; peak memory {human(memory)}B; plain: the "
        f"straightforward code in the same dtype; ratio: to it in {str(dtypes[0]).removeprefix('torch.')}"
    )
    ratios = {key: round(result["ratio"], 3) for key, result in results.items()}
    print(json.dumps({"benchmark": "infer", "results": results, "peak_memory": memory, "ratios": ratios}))
    return ratios


def load(flags: Flags, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model, ready for inference."""
    if flags.source:
        tokenizer = Tokenizer.load(default_dir())
        return checkpoint_manager.load_model(flags.source, flags.model_tag, -1, tokenizer, device, dtype)[0]
    shape = RecipeFlags(depth=flags.depth, head_dim=flags.head_dim, max_seq_len=flags.max_seq_len)
    config = model_config(shape, flags.vocab_size)
    torch.manual_seed(0)
    model = GPT.create(config, device, dtype)
    model.cast_weights()
    return model.requires_grad_(False)


def measure(model: GPT, B: int, flags: Flags, int8: bool) -> dict[str, float]:
    """Tokens/s of the engine and of the plain code, prompts included, and the engine's seconds to a first token."""
    engine = Engine(model, NoSpecialTokens(), B, int8)  # type: ignore[arg-type]
    prompt = torch.randint(model.config.vocab_size, (flags.prompt_tokens,)).tolist()

    def generate(num_requests: int, max_tokens: int) -> None:
        settings = (max_tokens, flags.temperature, flags.top_k)
        engine.generate([Request(prompt, *settings, seed=seed) for seed in range(num_requests)])

    runs: dict[str, Callable[[], None]] = {
        "tokens_per_second": lambda: generate(B, flags.max_tokens),
        "plain": lambda: plain_generate(model, prompt, B, flags.max_tokens, flags.temperature, flags.top_k),
        "first_token": lambda: generate(1, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(flags.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()  # ends with the tokens on the host
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first one warms up
    num_tokens = B * flags.max_tokens
    return {name: median if name == "first_token" else num_tokens / median for name, median in medians.items()}


class NoSpecialTokens:
    """In a tokenizer's place: nothing that the model says ends a text or calls a tool."""

    bos = -1

    def special(self, text: str) -> int:
        return -1


class PlainCache:
    """Keys and values of rows that all have the same length."""

    def __init__(self, model: GPT, B: int, length: int):
        config = model.config
        shape = (config.n_layer, B, config.n_kv_head, length, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        self.previous_B1C = torch.zeros(B, 1, config.n_embd, device=model.device, dtype=model.dtype)
        self.start = 0

    def begin(self, num_tokens: int) -> None:
        self.stop = self.start + num_tokens
        self.positions_BT = torch.arange(self.start, self.stop, device=self.keys.device)[None]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        self.keys[layer, :, :, self.start : self.stop] = k
        self.values[layer, :, :, self.start : self.stop] = v
        first = max(0, self.start - window)  # prompts are shorter than a window here
        keys, values = self.keys[layer, :, :, first : self.stop], self.values[layer, :, :, first : self.stop]
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=q.size(2) > 1, enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)


@torch.inference_mode()
def plain_generate(model: GPT, prompt: list[int], B: int, num_tokens: int, temperature: float, top_k: int) -> list:
    """Straightforward sampling, as one writes it first: prompt, then token by token, torch.multinomial."""
    cache = PlainCache(model, B, len(prompt) + num_tokens)
    ids_BT = torch.tensor([prompt] * B, device=model.device)
    said = []
    for _ in range(num_tokens):
        cache.begin(ids_BT.size(1))
        logits_BV = model.logits(model.hidden(ids_BT, cache)[:, -1])
        cache.start = cache.stop
        if temperature:
            best_BK, ids_BK = logits_BV.topk(min(top_k or logits_BV.size(1), logits_BV.size(1)))
            ids_BT = ids_BK.gather(1, torch.multinomial((best_BK / temperature).softmax(dim=-1), 1))
        else:
            ids_BT = logits_BV.argmax(dim=-1, keepdim=True)
        said.append(ids_BT.flatten().tolist())
    return said


if __name__ == "__main__":
    main()
