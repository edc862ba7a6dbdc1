"""
The parts of dev/gpu_check.sh: what a GPU must show, and no CPU can. Each part is a function and runs in a process of
its own, because a CUDA error spoils its process, and has a time limit. Results are written after each part.

A measured number stands beside its estimate, which was made without a GPU (H100, bfloat16; dev/gpu.md). Where no
estimate is known, the column shows what the sizes of the model or the data sheet give.
"""

import argparse
import asyncio
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from nanochat import attention, fp8, hardware, recipe
from nanochat.common import base_dir, seed_everything
from nanochat.costs import GIB, TrainingSetup, training_memory
from nanochat.distributed import Dist
from nanochat.gpt import GPT, GPTConfig, Linear, flops_per_token
from nanochat.muon import MuonAdamW, build_optimizer
from nanochat.train import Step, Stopped, Trainer, TrainState, token_loss

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 480
DRY_FACTOR = 8  # time limits of a dry run are longer by this: a CPU is slow, and is perhaps busy with other work
BANDWIDTH = 2.8e12  # bytes/s and FLOP/s that the estimates assume of an H100
MATMUL_RATE = 570e12
IS_NULL_GPU = "NULLGPU" in os.environ  # its kernels do nothing, so numbers mean nothing there


@dataclass(frozen=True)
class Estimate:
    """ms of a micro-batch by kind of kernel; the rest: norms, rotary, relu², loss, tables, casts, sums of gradients."""

    rows: int
    products: float
    attention: float
    rest: float


TRAINING = {12: Estimate(32, 83, 21, 41), 24: Estimate(16, 231, 43, 76)}


@dataclass(frozen=True)
class Check:
    """A part that is running: where it computes, at what size, and its file of results."""

    device: torch.device
    dry: bool
    out: Path
    file: Path

    def record(self, what: str, measured: float | str, estimate: float | str | None = None, unit: str = "") -> None:
        """Adds a row to the table. Rows of a part that fails later are kept."""
        if isinstance(measured, float):
            measured = float(f"{measured:.4g}")
        if isinstance(estimate, float):
            estimate = float(f"{estimate:.3g}")
        row = {"what": what, "measured": measured, "unit": unit, "estimate": None if self.dry else estimate}
        print(json.dumps(row, ensure_ascii=False), flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def require(self, holds: bool, message: str) -> None:
        """Fails the part with this message unless the condition holds. Numbers of the null GPU are not judged."""
        if not holds and not IS_NULL_GPU:
            raise SystemExit(message)

    def flags(self, depth: int) -> recipe.RecipeFlags:
        """The recipe of a depth; at toy size of a model with a sixth of the layers."""
        if self.dry:
            return recipe.RecipeFlags(depth=max(2, depth // 6), aspect_ratio=32, head_dim=32, max_seq_len=256)
        return recipe.RecipeFlags(depth=depth)

    def config(self, depth: int) -> GPTConfig:
        return recipe.model_config(self.flags(depth), 1024 if self.dry else 32768)

    def compile(self, function: Any) -> Any:
        """torch.compile; in a dry run without Inductor, which takes minutes there."""
        return torch.compile(function, dynamic=False, backend="aot_eager" if self.dry else "inductor")

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Of one call: CUDA events on a GPU."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        run()
        end_event.record()
        torch.cuda.synchronize()
        return start_event.elapsed_time(end_event)

    def median_ms(self, run: Callable[[], object], repeats: int = 10) -> float:
        repeats = 2 if self.dry else repeats
        times = [self.milliseconds(run) for _ in range(2 + repeats)]
        return statistics.median(times[2:])

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call by the clock, with the work on the device that it starts."""
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


# ---- 0 to 2: the machine, attention, tests ----


def machine(check: Check) -> None:
    """Versions, copy bandwidth, a product of random matrices."""
    for name in ("triton", "flash-attn-3", "flash-attn-4"):
        check.record(name, version(name))
    check.record("C compiler, for Triton", shutil.which("cc") or shutil.which("gcc") or "none")
    size, dtype = (512, torch.float32) if check.dry else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=check.device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**20 if check.dry else 2**30, device=check.device)
    target = torch.empty_like(source)
    copy_ms = check.median_ms(lambda: target.copy_(source))
    check.record("copy, read + write", 2 * source.nbytes / copy_ms / 1e9, BANDWIDTH / 1e12, "TB/s")
    rate = 2 * size**3 / check.median_ms(lambda: a @ b, 20) * 1e3
    check.record(f"product of {size}³, {dtype}", rate / 1e12, MATMUL_RATE / 1e12, "TFLOP/s")


def kernels(check: Check) -> None:
    """Every attention kernel at depth 24, 16 rows: compared with the reference, then timed forward and backward."""
    config, dtype = check.config(24), hardware.pick_dtype(check.device)
    shape, rows = config.attention_shape, 1 if check.dry else TRAINING[24].rows
    name, _ = attention.choose("auto", shape, check.device, dtype)
    check.record("--attention auto chooses", name)
    size = (rows, shape.num_tokens, shape.num_heads, shape.head_dim)
    inputs = [torch.randn(size, device=check.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    grad = torch.randn(size, device=check.device, dtype=dtype)
    estimates = {"flash": TRAINING[24].attention, "fa3": TRAINING[24].attention / 2}
    broken = []
    for name in ("flash", "banded", "fa3", "fa4", "sdpa", "flex"):  # the one that is most likely to fail comes last
        try:
            kernel = attention.LOADERS[name]()
            attention.probe(kernel, shape, check.device, dtype)
            window_ms = {
                window: check.median_ms(lambda: torch.autograd.grad(kernel(*inputs, window), inputs, grad), 5)  # noqa: B023
                for window in set(config.windows)
            }
        except ImportError:
            check.record(name, "not installed")
        except Exception as error:  # noqa: BLE001  any error means that this kernel does not work; the others may
            check.record(name, f"does not work: {type(error).__name__} {error}"[:200])
            broken.append(name)
        else:
            total = sum(window_ms[window] for window in config.windows)
            check.record(f"{name}, all {config.n_layer} layers, {rows} rows", total, estimates.get(name), "ms")
    wanted = {"banded"} if check.device.type == "cpu" else {"flash", "banded"}
    check.require(not wanted & set(broken), f"{', '.join(broken)} do not work here")


def tests(check: Check) -> None:
    """The tests that need a GPU. A dry run only collects them."""
    import pytest

    class Counts:
        def __init__(self) -> None:
            self.outcomes: Counter[str] = Counter()
            self.failed: list[str] = []

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.outcomes[report.outcome] += 1
            if report.failed:
                self.failed.append(report.nodeid.removeprefix("tests/"))

    marked = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text("utf-8")]
    for name, selection in (("marked gpu", ["-m", "gpu", *map(str, marked)]), ("FP8", ["-k", "cuda", "tests/test_fp8.py"])):
        counts = Counts()
        options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *(["--collect-only"] if check.dry else [])]
        code = pytest.main([*options, *selection], plugins=[counts])
        passed, failed = counts.outcomes["passed"], counts.outcomes["failed"]
        check.record(f"tests: {name}", f"{passed} passed, {failed} failed, {counts.outcomes['skipped']} skipped")
        for test in counts.failed:
            check.record("failed", test)
        check.require(code == 0, f"{failed} tests failed (exit code {code})")


# ---- 3 to 5 and 9: training ----


class Training:
    """A model with its optimizer as base_train builds them."""

    def __init__(self, check: Check, config: GPTConfig, kernel: str, *, compiled: bool = False, use_fp8: bool = False):
        seed_everything(42)
        hardware.tune_process(check.device)
        self.config, self.device = config, check.device
        self.model = GPT.create(config, check.device, hardware.pick_dtype(check.device))
        self.model.use_attention(attention.LOADERS[kernel]())
        self.uses_inductor = compiled and not check.dry
        self.optimizer: MuonAdamW = build_optimizer(
            self.model, recipe.param_groups(config), compile=self.uses_inductor
        )
        if use_fp8:
            fp8.use_fp8(self.model, self.optimizer, self.uses_inductor)
        self.train_model = check.compile(self.model) if compiled else self.model

    def losses(self, flags: recipe.RecipeFlags, batches: list[torch.Tensor]) -> list[float]:
        """Trains on one batch (rows, T + 1) per step; returns the smoothed loss after each."""
        losses: list[float] = []
        steps = []
        for i, ids in enumerate(batches):
            ids = ids.to(self.device)
            micro_batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), ids[:, 1:].numel())
            steps.append(Step([micro_batch], i / len(batches), ids.numel(), {}))
        log = lambda state, metrics: losses.append(metrics["train/loss"])  # noqa: E731
        trainer = Trainer(self.train_model, self.optimizer, TrainState(), Dist(self.device), log)
        trainer.fit(steps, token_loss, partial(recipe.pretrain_schedule, flags, len(batches)), [])
        return losses


def curves(check: Check) -> None:
    """Depth 4, the same seed and text: kernels, compiled code and FP8 must give the same curve within 1 %."""
    from nanochat import primer
    from nanochat.tokenizer import Tokenizer

    flags = replace(check.flags(4), aspect_ratio=64, head_dim=64, max_seq_len=256 if check.dry else 512)
    tokenizer = Tokenizer.load(ROOT / "tests/golden/tokenizer")
    config = recipe.model_config(flags, tokenizer.vocab_size)
    rows, num_steps = (2, 4) if check.dry else (32, 20)
    size = rows * (config.sequence_len + 1)
    ids = torch.tensor(tokenizer.encode("\n\n".join(primer.generate_documents()[: 100 if check.dry else 3000])))
    batches = [chunk.view(rows, -1) for chunk in ids.repeat(1 + num_steps * size // len(ids)).split(size)[:num_steps]]
    on_gpu = check.device.type == "cuda"
    variants = {"banded, eager": ("banded", False, False), "banded, compiled": ("banded", True, False)}
    if on_gpu:
        variants |= {"flash, compiled": ("flash", True, False), "flash, FP8, compiled": ("flash", True, True)}
    reference: list[float] = []
    for name, (kernel, compiled, use_fp8) in variants.items():
        losses = Training(check, config, kernel, compiled=compiled, use_fp8=use_fp8).losses(flags, batches)
        check.record(f"{name}: loss first, last", f"{losses[0]:.4f}, {losses[-1]:.4f}")
        if not reference:
            reference = losses
            check.require(losses[-1] < losses[0], "the loss does not fall")
            continue
        difference = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True)) if reference[0] else 0.0
        check.record(f"{name}: largest difference", 100 * difference, "below 1", "%")
        check.require(difference < 0.01, f"{name} differs from eager banded by {difference:.1%}")


def train_speed(check: Check, depth: int) -> None:
    """One depth, compiled: ms of a micro-batch and of an update, MFU, peak memory, share of each kind of kernel."""
    estimate, config = TRAINING[depth], check.config(depth)
    rows = 2 if check.dry else estimate.rows
    on_gpu = check.device.type == "cuda"
    kernel, _ = attention.choose("auto", config.attention_shape, check.device, hardware.pick_dtype(check.device))
    training = Training(check, config, kernel, compiled=True)
    x, y = torch.randint(config.vocab_size, (2, rows, config.sequence_len), device=check.device).unbind()

    def micro_batch() -> None:
        token_loss(training.train_model, (x, y, 2 * y.numel())).backward()

    def update() -> None:
        training.optimizer.reduce_gradients()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

    check.record(f"d{depth} first step, with torch.compile", check.seconds(lambda: (micro_batch(), update())), unit="s")
    passes, updates = [], []
    for _ in range(1 if check.dry else 4):
        passes += [check.milliseconds(micro_batch) for _ in range(2)]
        updates.append(check.milliseconds(update))
    ms = statistics.median(passes[1:])
    total = estimate.products + estimate.attention + estimate.rest
    check.record(f"d{depth} micro-batch of {rows} rows, {kernel}", ms, total, "ms")
    check.record(f"d{depth} update", statistics.median(updates), None, "ms")
    card = hardware.gpu_card(check.device)
    if card:
        flops = flops_per_token(config) * x.numel()
        mfu = flops / (ms / 1e3) / card.flops
        check.record(f"d{depth} MFU of {card.name}", 100 * mfu, 100 * flops / (total / 1e3) / card.flops, "%")
    if on_gpu:
        setup = TrainingSetup(
            rows, accumulation=2, dtype=training.model.dtype, compiled=training.uses_inductor, attention=kernel
        )
        peak = training_memory(config, setup).peak / GIB
        check.record(f"d{depth} peak memory", torch.cuda.max_memory_allocated() / GIB, peak, "GiB")
        profile(check, depth, estimate, micro_batch)


def profile(check: Check, depth: int, estimate: Estimate, micro_batch: Callable[[], None]) -> None:
    """ms on the device by kind of kernel, and the ten longest kernels."""
    if IS_NULL_GPU:  # it has no profiler
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        micro_batch()
        torch.cuda.synchronize()
    kinds: Counter[str] = Counter()  # type: ignore[assignment]
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events:
        is_attention = re.search(r"flash|fmha|attention", event.key, re.IGNORECASE)
        is_product = re.search(r"gemm|nvjet|cutlass|xmma|cublas", event.key, re.IGNORECASE)
        kind = "attention" if is_attention else "matrix products" if is_product else "the rest"
        kinds[kind] += event.self_device_time_total / 1e3  # type: ignore[assignment]
    estimates = {"matrix products": estimate.products, "attention": estimate.attention, "the rest": estimate.rest}
    for kind, expected in estimates.items():
        check.record(f"d{depth} profile: {kind}", float(kinds[kind]), float(expected), "ms")
    for event in events[:10]:
        print(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:5} x {event.key[:120]}")


def fp8_layers(check: Check) -> None:
    """The matrices of depth 24 as FP8 layers and in bfloat16, compiled, forward and backward."""
    if check.device.type != "cuda":
        check.record("FP8", "needs a GPU")
        return
    config = check.config(24)
    C, M = config.n_embd, 256 if check.dry else TRAINING[24].rows * config.sequence_len
    for N, K in ((C, C), (4 * C, C), (C, 4 * C)):
        x = torch.randn(M, K, device=check.device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(M, N, device=check.device, dtype=torch.bfloat16)
        plain = Linear(K, N).to(check.device)
        times, results = [], []
        layer8 = fp8.Fp8Linear(plain)
        fp8._cast_weight(plain.weight.detach(), layer8.weight_NK, layer8.weight_KN, layer8.scale)
        for layer in (plain, layer8):
            run = check.compile(layer)
            parameters = (x, layer.weight)
            times.append(check.median_ms(lambda: torch.autograd.grad(run(x), parameters, grad)))  # noqa: B023
            results.append([run(x), *torch.autograd.grad(run(x), parameters, grad)])
        errors = [((b.float() - a.float()).norm() / a.float().norm()).item() for a, b in zip(*results, strict=True)]
        products = 6 * M * N * K / MATMUL_RATE * 1e3
        casts = 7 * M * (N + K) / BANDWIDTH * 1e3  # maximum, cast and a transposed copy of x and of the gradient
        check.record(f"{M} x {K} → {N}, bfloat16", times[0], products, "ms")
        check.record(f"{M} x {K} → {N}, FP8", times[1], products / 2 + casts, "ms")
        check.record(f"{M} x {K} → {N}, FP8: largest error of output and gradients", max(errors), "below 0.1")
        check.require(max(errors) < 0.1, f"FP8 differs from bfloat16 by {max(errors):.2g}")


def speed_of_depth_12(check: Check) -> None:
    train_speed(check, 12)


def speed_of_depth_24(check: Check) -> None:
    train_speed(check, 24)


# ---- 6 and 7: the engine and the server ----


def engine(check: Check) -> None:
    """Decoding with 1, 32 and 256 slots, capture of the graphs, prompts of 20 lengths."""
    from nanochat.engine import Engine, Prefill, Request
    from scripts.bench import infer

    no_special_tokens: Any = SimpleNamespace(bos=-1, special=lambda text: -1)  # no token ends a completion
    prompt_tokens, new_tokens = (8, 8) if check.dry else (64, 64)
    for depth in (12, 24):
        sizes = infer.Flags(depth=depth)
        if check.dry:
            sizes = infer.Flags(depth=depth // 6, head_dim=64, vocab_size=1024, max_seq_len=256)
        model = infer.load(sizes, check.device, hardware.pick_dtype(check.device))
        for slots in (1, 4, 8) if check.dry else (1, 32, 256):
            served = Engine(model, no_special_tokens, slots)
            for seed in range(slots):
                prompt = torch.randint(model.config.vocab_size, (prompt_tokens,)).tolist()
                served.add(Request(prompt, new_tokens, top_k=50, seed=seed))
            steps = []
            while served.is_busy:
                seconds = check.seconds(served.step)
                if len(served.active) == slots:
                    steps.append(seconds)
            step = statistics.median(steps[1:])
            floor = infer.bytes_per_step(model, slots, prompt_tokens + new_tokens // 2, False) / BANDWIDTH
            is_known = depth == 24 and slots == 1  # 693 kernels in a graph
            check.record(f"d{depth} tokens/s, {slots} slots", slots / step)
            estimate = 2.0 if is_known else f"floor {1e3 * floor:.2g}"
            check.record(f"d{depth} decode step, {slots} slots", 1e3 * step, estimate, "ms")
            check.record(f"d{depth} step with fill and capture, {slots} slots", 1e3 * steps[0], None, "ms")

        @torch.inference_mode()
        def read(length: int, model: GPT = model) -> None:
            prefill = Prefill([tuple(torch.randint(model.config.vocab_size, (length,)).tolist())], model)
            prefill.read(length)

        lengths = torch.randint(1, model.config.sequence_len, (20,)).tolist()
        for turn in ("first", "second"):  # a kernel that is planned for each shape is slow the first time
            times = [1e3 * check.seconds(partial(read, length)) for length in lengths]
            what = f"d{depth} prefill, 20 lengths, {turn} time: median, longest"
            check.record(what, f"{statistics.median(times):.1f}, {max(times):.1f}", None, "ms")


def server(check: Check) -> None:
    """Two models on one GPU, each with its engine thread; both answer 20 requests."""
    from nanochat.engine import Engine, Request
    from nanochat.serve.scheduler import ServedModel, Service
    from nanochat.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(ROOT / "tests/golden/tokenizer")
    config = recipe.model_config(replace(check.flags(6), head_dim=64, max_seq_len=256), tokenizer.vocab_size)

    def make_engine(model: GPT) -> Engine:
        if check.device.type == "cuda":
            torch.cuda.set_device(check.device)
        served = Engine(model, tokenizer, 8)
        served.stop_tokens = set()
        return served

    models = []
    for name in ("first", "second"):
        model = GPT.create(config, check.device, hardware.pick_dtype(check.device)).requires_grad_(False)
        models.append(ServedModel(name, tokenizer, config, [partial(make_engine, model)], queue_size=64))

    async def ask(service: Service, model: ServedModel, client: int) -> int:
        request = Request([tokenizer.bos, *range(client + 1)], max_tokens=8 + client, seed=client)
        handle = service.submit(model, [request], client=f"client {client}")
        try:
            return sum([sum(event.token is not None for event in events) async for events in handle.batches()])
        finally:
            handle.close()

    async def serve() -> list[int]:
        service = Service(models)
        service.start()
        while service.status == "loading":
            await asyncio.sleep(0.05)
        if service.status != "ok":
            raise SystemExit(f"the server is {service.status}, see the log")
        counts = await asyncio.gather(*(ask(service, model, i) for i in range(20) for model in models))
        service.close()
        return counts

    start = time.perf_counter()
    counts = asyncio.run(serve())
    check.record("two models at once, 40 requests", f"{len(counts)} answered", "40 answered")
    check.record("start, answers and end", time.perf_counter() - start, None, "s")
    expected = [8 + i for i in range(20) for _ in models]
    if counts != expected:
        raise SystemExit(f"the lengths of the responses are {counts}, not {expected}")


# ---- 8: all stages ----


def stages(check: Check) -> None:
    """From the primer's text to a chat, as tests/test_stages.py does it on a CPU; base_train is stopped and resumed."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_stages as sizes

    from scripts import base_eval, base_train, chat_cli, chat_eval, chat_rl, chat_sft, mid_train, primer, report
    from scripts import tok_eval, tok_train

    folder = check.out / "stages"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ |= {"NANOCHAT_BASE_DIR": str(folder), "NANOCHAT_DATA_DIR": str(folder / "primer")}
    device = ["--device", check.device.type]

    def run(script: Any, argv: list[str], what: str = "") -> None:
        what = f"{script.__name__.removeprefix('scripts.')} {what}".strip()
        check.record(what, check.seconds(lambda: script.main(argv)), None, "s")

    def losses(tag: str) -> Iterator[float]:
        for line in (folder / f"report/metrics/base_train-{tag}.jsonl").read_text().splitlines():
            if "train/loss" in line:
                yield json.loads(line)["train/loss"]

    def stop_and_evaluate(*arguments: Any, **options: Any) -> Any:
        if stop.call_count == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the run ends after the next step
        return evaluate(*arguments, **options)

    run(primer, [])
    run(tok_train, ["--vocab-size", str(sizes.VOCAB), "--max-chars", "300000"])
    run(tok_eval, [])
    run(base_train, [*sizes.BASE, *device])
    evaluate = base_train.evaluate_bpb_of_sources
    parts = [*sizes.BASE, *device, "--model-tag", "parts"]
    stop = mock.Mock(side_effect=stop_and_evaluate)
    with mock.patch.object(base_train, "evaluate_bpb_of_sources", stop), contextlib.suppress(Stopped):
        base_train.main(parts)
        check.require(False, "the run was not stopped by SIGTERM")
    run(base_train, [*parts, "--resume"], "resumed")
    difference = max(abs(a - b) for a, b in zip(losses("d2"), losses("parts"), strict=True))
    check.record("loss of the resumed run: largest difference", difference, "0")
    check.require(difference < 0.01, f"the resumed run differs by {difference:.2g}")
    shutil.rmtree(folder / "base_checkpoints/parts")
    run(base_eval, [*device, "--eval", "bpb,sample", "--split-tokens", "2048", "--device-batch-size", "4"])
    run(mid_train, [*sizes.SFT, *device])
    run(chat_sft, [*sizes.SFT, *device, "-i", "mid"])
    run(chat_rl, [*sizes.RL, *device])
    run(chat_eval, [*device, "-a", "QuizFree,QuizChoice,Sums", "-x", "4", "-m", "8", "-b", "3"])
    run(chat_cli, [*device, "-p", "Why is the sky blue?", "-m", "12"])
    run(report, [])


# ---- the runner ----

PARTS: list[tuple[Callable[[Check], None], int]] = [  # and the seconds that each may take, in order of value
    (machine, 15),
    (kernels, 50),
    (tests, 40),
    (curves, 60),
    (speed_of_depth_12, 110),
    (fp8_layers, 25),
    (engine, 45),
    (server, 20),
    (stages, 70),
    (speed_of_depth_24, 45),
]


def run_part(number: int, out: Path, dry: bool) -> None:
    """The process of one part."""
    if IS_NULL_GPU:
        sys.path.insert(0, str(ROOT / "dev/null_gpu"))
        import counts

        counts.ignore_numbers()
    device = hardware.pick_device()
    if device.type != "cuda" and not dry:
        raise SystemExit("there is no CUDA GPU here: use --dry-run, or check the driver (nvidia-smi)")
    PARTS[number][0](Check(device, dry, out, out / f"part_{number}.jsonl"))


def start_part(number: int, out: Path, dry: bool, limit: float) -> dict[str, Any]:
    """Runs a part in a new process; returns its status, its rows and the last line of its log."""
    rows, log = out / f"part_{number}.jsonl", out / f"part_{number}.log"
    rows.write_text("")
    start = time.perf_counter()
    command = [sys.executable, __file__, "--out", str(out), "--part", str(number), *(["--dry-run"] if dry else [])]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "failed" if process.wait(max(limit, 1)) else "passed"
        except subprocess.TimeoutExpired:
            status = f"not finished in {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the workers of Inductor
                process.wait()
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return {
        "part": PARTS[number][0].__name__,
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "error": "" if status == "passed" else last[:300],
        "rows": [json.loads(line) for line in rows.read_text().splitlines()],
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str]:
    """What results must share to stand in one table."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return {
        "commit": git.stdout.strip() or "unknown (not a git checkout)",
        "card": f"{card}{' (null GPU)' if IS_NULL_GPU else ''}",
        "versions": f"{versions}, Triton {version('triton')}",
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, for dev/gpu.md."""
    title = f"{'Dry run' if results['dry'] else 'GPU check'}, {results['date']}: {results['card']}"
    lines = [f"## {title}", f"Commit {results['commit']}; {results['versions']}.", ""]
    lines += ["| part | what | measured | estimate |", "| --- | --- | ---: | ---: |"]
    for number, part in sorted(results["parts"].items(), key=lambda item: int(item[0])):
        status = f"**{part['status']}** {part['error']}" if part["error"] else part["status"]
        lines.append(f"| {number} | **{part['part'].replace('_', ' ')}**: {status} | {part['seconds']:.0f} s | |")
        for row in part["rows"]:
            estimate = "" if row["estimate"] is None else row["estimate"]
            measured = f"{row['measured']} {row['unit']}"
            if isinstance(estimate, float) and estimate and math.isfinite(row["measured"]):
                estimate = f"{estimate:g} ({row['measured'] / estimate - 1:+.0%})"
            cells = [str(cell).replace("|", "/").replace("\n", " ").strip() for cell in (row["what"], measured, estimate)]
            lines.append(f"| | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev/gpu_check.sh", usage="%(prog)s [--dry-run] [--out FOLDER] [PART …]")
    parser.add_argument("parts", nargs="*", type=int, metavar="PART", help=f"0 to {len(PARTS) - 1}")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md and the logs")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of a process of this program
    args = parser.parse_args()
    out = (args.out or base_dir() / ("gpu_check-dry" if args.dry_run else "gpu_check")).resolve()
    if args.part is not None:
        run_part(args.part, out, args.dry_run)
        return

    out.mkdir(parents=True, exist_ok=True)
    file, facts = out / "results.json", describe() | {"dry": args.dry_run}
    results = json.loads(file.read_text()) if file.exists() else {}
    if {key: results.get(key) for key in facts} != facts:  # of another commit or card
        results = facts | {"parts": {}}
    results["date"] = datetime.date.today().isoformat()
    todo = [n for n in range(len(PARTS)) if results["parts"].get(str(n), {}).get("status") != "passed"]
    todo = args.parts or todo
    limits = [seconds * (DRY_FACTOR if args.dry_run else 1) for _, seconds in PARTS]
    deadline = time.monotonic() + TOTAL_SECONDS * (DRY_FACTOR if args.dry_run else 1)
    for i, number in enumerate(todo):
        # Time that a part leaves is for those after it.
        limit = max(limits[number], deadline - time.monotonic() - sum(limits[later] for later in todo[i + 1 :]))
        part = start_part(number, out, args.dry_run, min(limit, deadline - time.monotonic()))
        results["parts"][str(number)] = part
        file.write_text(json.dumps(results, indent=1) + "\n")
        (out / "table.md").write_text(table(results), encoding="utf-8")
        print(f"{number} {part['part']}: {part['status']}, {part['seconds']} s {part['error']}", flush=True)
    print(f"\n{table(results)}\n{file}")
    sys.exit(any(part["status"] != "passed" for part in results["parts"].values()))


if __name__ == "__main__":
    main()
