"""
The parts of the GPU check (gpu_check.py runs them): what only a GPU can show, in the order of their value.

Each part is a function of a Check, to which it reports its numbers. A number stands beside its estimate for an H100 in
bfloat16 (estimates.py), or beside what the memory model predicts.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import estimates
import torch
from estimates import BANDWIDTH

from nanochat import attention, fp8, hardware, primer, recipe
from nanochat.common import seed_everything
from nanochat.costs import GIB, TrainingSetup, training_memory
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import mlp
from nanochat.linear import Linear
from nanochat.muon import build_optimizer
from nanochat.prefill import EMPTY, GPU_CHUNK, Prefill
from nanochat.request import Request
from nanochat.serve.scheduler import ServedModel, Service
from nanochat.tokenizer import Tokenizer
from nanochat.train import Step, Stopped, Trainer, TrainState, token_loss
from scripts.bench import infer

ROOT = Path(__file__).resolve().parent.parent
IS_NULL_GPU = "NULLGPU" in os.environ  # its kernels do nothing, so numbers mean nothing there


@dataclass(frozen=True)
class Check:
    """A part that is running: its device, its size, its results."""

    device: torch.device
    dry: bool  # at toy size
    folder: Path  # for whatever the part writes
    rows: Path  # file of its results so far, one JSON object per line

    def record(self, what: str, measured: float | str, unit: str = "", estimate: float | str = "") -> None:
        """Adds a row to the table; rows are kept if the part fails later."""
        measured = float(f"{measured:.4g}") if isinstance(measured, float) else measured
        estimate = float(f"{estimate:.3g}") if isinstance(estimate, float) else estimate
        row = {"what": what, "measured": measured, "unit": unit, "estimate": "" if self.dry else estimate}
        print(json.dumps(row, ensure_ascii=False), flush=True)
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def require(self, holds: bool, message: str) -> None:
        """Fails the part unless the condition holds. Numbers of the null GPU are not judged."""
        if not holds and not IS_NULL_GPU:
            raise SystemExit(message)

    @property
    def dtype(self) -> torch.dtype:
        return hardware.pick_dtype(self.device)

    @property
    def has_fp8(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.get_device_capability() >= fp8.MIN_CAPABILITY

    def flags(self, depth: int, **changes: Any) -> recipe.RecipeFlags:
        """The recipe of a depth; in a dry run that of a model with a sixth of the layers."""
        flags = recipe.RecipeFlags(depth=depth)
        if self.dry:
            flags = replace(flags, depth=max(2, depth // 6), aspect_ratio=32, head_dim=32, max_seq_len=256)
        return replace(flags, **changes)

    def config(self, depth: int, vocab_size: int = 32768) -> GPTConfig:
        return recipe.model_config(self.flags(depth), 1024 if self.dry else vocab_size)

    def compile(self, function: Any) -> Any:
        """torch.compile; in a dry run without Inductor, which would take minutes."""
        return torch.compile(function, dynamic=False, **self.compile_options)

    @property
    def compile_options(self) -> dict[str, str]:
        return {"backend": "aot_eager" if self.dry else "inductor"}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Of one call, by CUDA events; by the clock, the work on the device included, where there is no GPU."""
        if self.device.type != "cuda":
            return 1e3 * self.seconds(run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call, by the clock."""
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def median_ms(self, run: Callable[[], object], repeats: int = 10) -> float:
        """The median of several calls after two for warming up."""
        times = [self.milliseconds(run) for _ in range(2 + (2 if self.dry else repeats))]
        return statistics.median(times[2:])


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# ---- the machine, attention, tests ----


def machine(check: Check) -> None:
    """Copy bandwidth, a product of random matrices, packages that training would use."""
    for name in ("flash-attn-3", "flash-attn-4"):
        check.record(name, version(name))
    check.record("C compiler, for Triton", shutil.which("cc") or shutil.which("gcc") or "none")
    size, dtype = (512, torch.float32) if check.dry else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=check.device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**20 if check.dry else 2**30, device=check.device)
    target = torch.empty_like(source)
    copy_seconds = check.median_ms(lambda: target.copy_(source)) / 1e3
    check.record("copy, reads and writes", 2 * source.nbytes / copy_seconds / 1e12, "TB/s", BANDWIDTH / 1e12)
    product_seconds = check.median_ms(lambda: a @ b, 20) / 1e3
    check.record(
        f"product of {size}³", 2 * size**3 / product_seconds / 1e12, "TFLOP/s", estimates.product_rate(size) / 1e12
    )


def attention_kernels(check: Check) -> None:
    """Every kernel at depth 24 and 16 rows: compared with the reference, then timed forward and backward."""
    config = check.config(24)
    shape, num_rows = config.attention_shape, 1 if check.dry else estimates.ROWS[24]
    check.record("--attention auto", attention.choose("auto", shape, check.device, check.dtype)[0])
    size = (num_rows, shape.num_tokens, shape.num_heads, shape.head_dim)
    inputs = [torch.randn(size, device=check.device, dtype=check.dtype, requires_grad=True) for _ in range(3)]
    grad = torch.randn(size, device=check.device, dtype=check.dtype)
    flops = estimates.attention_flops(config, num_rows)
    broken = set()
    for name in ("flash", "banded", "fa3", "fa4", "sdpa", "flex"):  # those that may spoil the process come last
        try:
            kernel = attention.LOADERS[name]()
            attention.probe(kernel, shape, check.device, check.dtype)
            total = 0.0
            for window, count in Counter(config.windows).items():
                run = partial(_forward_and_backward, kernel, inputs, grad, window)
                total += count * check.median_ms(run, 5)
        except ImportError:
            check.record(name, "not installed")
        except Exception as error:  # noqa: BLE001  foreign code may raise anything; it means: this kernel does not work
            check.record(name, f"does not work: {type(error).__name__} {error}"[:150])
            broken.add(name)
        else:
            rate = estimates.ATTENTION_RATE.get(name)
            expected = 1e3 * flops / rate if rate else ""
            check.record(f"{name}, {config.n_layer} layers, {num_rows} rows", total, "ms", expected)
    needed = {"flash", "banded"} if check.dtype == torch.bfloat16 else {"banded"}
    check.require(not needed & broken, f"{', '.join(sorted(broken))} does not work")


def _forward_and_backward(kernel: Any, inputs: list[torch.Tensor], grad: torch.Tensor, window: int) -> None:
    torch.autograd.grad(kernel(*inputs, window), inputs, grad)


def gpu_tests(check: Check) -> None:
    """The tests that need a GPU. A dry run only collects them."""
    import pytest

    class Results:
        def __init__(self) -> None:
            self.passed = 0
            self.failed: list[str] = []

        def pytest_runtest_logreport(self, report: Any) -> None:
            self.passed += report.when == "call" and report.passed
            if report.failed:
                self.failed.append(report.nodeid)

    tests = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.stem != "test_null_gpu"]
    marked = [str(path) for path in tests if "mark.gpu" in path.read_text(encoding="utf-8")]
    selections = {"marked gpu": ["-m", "gpu", *marked], "FP8": ["-k", "cuda", str(ROOT / "tests/test_fp8.py")]}
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)] + ["--collect-only"] * check.dry
    problems = []
    for name, selection in selections.items():
        results = Results()
        code = pytest.main([*options, *selection], plugins=[results])
        check.record(name, f"{results.passed} passed, {len(results.failed)} failed")
        problems += results.failed or ([f"{name}: exit code {int(code)}"] if code else [])
    for problem in problems:
        check.record("failed", problem)
    check.require(not problems, f"{len(problems)} tests failed")


# ---- training ----


class Training:
    """A model and its optimizer, as base_train builds them."""

    def __init__(
        self,
        check: Check,
        config: GPTConfig,
        groups: Any,
        *,
        kernel: str,
        compiled: bool = False,
        use_fp8: bool = False,
    ):
        seed_everything(42)
        hardware.tune_process(check.device)
        self.config, self.device = config, check.device
        self.model = GPT.create(config, check.device, check.dtype)
        self.model.use_attention(attention.LOADERS[kernel]())
        self.uses_inductor = compiled and not check.dry
        self.optimizer = build_optimizer(self.model, groups, compile=self.uses_inductor)
        if use_fp8:
            fp8.use_fp8(self.model, self.optimizer, self.uses_inductor)
        if compiled:
            self.model.compile_parts(**check.compile_options)

    def losses(self, flags: recipe.RecipeFlags, batches: list[torch.Tensor]) -> list[float]:
        """Trains on one batch (rows, T + 1) per step; returns the smoothed loss after each."""
        losses: list[float] = []
        steps = []
        for i, ids in enumerate(batches):
            ids = ids.to(self.device)
            micro_batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), ids[:, 1:].numel())
            steps.append(Step([micro_batch], i / len(batches), ids.numel(), {}))

        def log(state: TrainState, metrics: dict[str, float]) -> None:
            losses.append(metrics["train/loss"])

        trainer = Trainer(self.model, self.optimizer, TrainState(), Dist(self.device), log)
        trainer.fit(steps, token_loss, partial(recipe.pretrain_schedule, flags, len(batches)), [])
        return losses


def loss_curves(check: Check) -> None:
    """Depth 4 from one seed on one text: compiled code, FP8 and eager code must agree within 1 % on average."""
    num_rows, num_steps, T = (2, 4, 256) if check.dry else (32, 20, 512)
    flags = check.flags(
        4, aspect_ratio=64, head_dim=64, max_seq_len=T, num_iterations=num_steps, total_batch_size=num_rows * T
    )
    tokenizer = Tokenizer.load(ROOT / "tests/golden/tokenizer")
    plan = recipe.derive(flags, tokenizer.vocab_size)
    size = num_rows * (T + 1)
    ids = torch.tensor(tokenizer.encode("\n\n".join(primer.generate_documents()[: 150 * num_steps])))
    ids = ids.repeat(1 + num_steps * size // len(ids))[: num_steps * size]
    batches = list(ids.view(num_steps, num_rows, T + 1))
    variants = {"banded, eager": ("banded", False, False)}
    if check.device.type == "cuda":
        kernel, _ = attention.choose("auto", plan.model.attention_shape, check.device, check.dtype)
        variants[f"{kernel}, compiled"] = (kernel, True, False)
        if check.has_fp8:
            variants[f"{kernel}, FP8, compiled"] = (kernel, True, True)
    else:
        variants["banded, compiled"] = ("banded", True, False)
    reference: list[float] = []
    for name, (kernel_name, compiled, use_fp8) in variants.items():
        training = Training(check, plan.model, plan.groups, kernel=kernel_name, compiled=compiled, use_fp8=use_fp8)
        losses = training.losses(flags, batches)
        check.record(f"{name}: first and last loss", f"{losses[0]:.4f}, {losses[-1]:.4f}")
        reference = reference or losses
        # The loss falls fast here, so rounding shows: on a CPU, float32 and bfloat16 differ by 0.3 % on average over
        # these steps, and by 1.9 % at most.
        differences = [abs(a - b) / max(b, 1e-9) for a, b in zip(losses, reference, strict=True)]
        mean = statistics.mean(differences)
        check.record(f"{name}: mean difference", 100 * mean, "%", "below 1")
        check.record(f"{name}: largest difference", 100 * max(differences), "%", "about 2")
        check.require(mean < 0.01, f"{name} differs from eager code by {mean:.1%}")
    check.require(reference[-1] < reference[0], "the loss does not fall")


def training_speed(
    check: Check, depth: int, num_rows: int, *, vocab_size: int = 32768, accumulation: int = 2, use_fp8: bool = False
) -> None:
    """One depth, compiled: ms of a micro-batch and of an optimizer step, MFU, peak memory, ms by kind of kernel."""
    config = check.config(depth, vocab_size)
    num_rows = 2 if check.dry else num_rows
    use_fp8 = use_fp8 and check.has_fp8
    kernel, _ = attention.choose("auto", config.attention_shape, check.device, check.dtype)
    expected = estimates.training_ms(config, num_rows, attention=kernel, fp8=use_fp8)
    expected_ms = sum(expected.values())
    groups = recipe.param_groups(config)
    training = Training(check, config, groups, kernel=kernel, compiled=True, use_fp8=use_fp8)
    x, y = torch.randint(config.vocab_size, (2, num_rows, config.sequence_len), device=check.device).unbind()

    def micro_batch() -> None:
        token_loss(training.model, (x, y, accumulation * y.numel())).backward()

    def update() -> None:
        training.optimizer.reduce_gradients()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)

    check.record(f"d{depth}: first step with torch.compile", check.seconds(lambda: (micro_batch(), update())), "s")
    pass_ms, update_ms = [], []
    for _ in range(1 if check.dry else 4):
        pass_ms += [check.milliseconds(micro_batch) for _ in range(accumulation)]
        update_ms.append(check.milliseconds(update))
    ms = statistics.median(pass_ms)
    kernels = f"{kernel}, FP8" if use_fp8 else kernel
    check.record(f"d{depth}: micro-batch, {num_rows} rows, {kernels}", ms, "ms", expected_ms)
    check.record(f"d{depth}: optimizer", statistics.median(update_ms), "ms")
    card = hardware.gpu_card(check.device)
    if card:
        mfu, expected_mfu = (100 * estimates.mfu(config, num_rows, value, card) for value in (ms, expected_ms))
        check.record(f"d{depth}: MFU on {card.name}", mfu, "%", expected_mfu)
    if check.device.type == "cuda":
        compiled = training.uses_inductor
        setup = TrainingSetup(
            num_rows, accumulation=accumulation, dtype=check.dtype, compiled=compiled, attention=kernel, fp8=use_fp8
        )
        predicted = training_memory(config, setup).peak / GIB
        check.record(f"d{depth}: peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB", predicted)
        profile(check, depth, micro_batch, expected)


def profile(check: Check, depth: int, micro_batch: Callable[[], None], expected: dict[str, float]) -> None:
    """ms of a micro-batch on the device by kind of kernel. The longest kernels are printed into the log."""
    if IS_NULL_GPU:  # it has no profiler
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        micro_batch()
        check.synchronize()
    kinds = {"matrix products": 0.0, "attention": 0.0, "the rest": 0.0}
    for event in sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total):
        ms = event.self_device_time_total / 1e3
        kind = "the rest"
        if re.search("flash|fmha|attention", event.key, re.IGNORECASE):  # first: their names hold "cutlass" too
            kind = "attention"
        elif re.search("gemm|nvjet|cutlass|xmma", event.key, re.IGNORECASE):
            kind = "matrix products"
        kinds[kind] += ms
        print(f"{ms:8.2f} ms {event.count:5} x {event.key[:120]}")
    rest = sum(expected.values()) - expected["matrix products"] - expected["attention"]
    for kind, ms in kinds.items():
        check.record(f"d{depth}: {kind}", ms, "ms", expected.get(kind, rest))


def fp8_layers(check: Check) -> None:
    """The matrices of depth 24 in FP8 and in bfloat16, compiled, forward and backward."""
    if not check.has_fp8:
        check.record("FP8", "not on this device")
        return
    config = check.config(24)
    C, M = config.n_embd, 256 if check.dry else estimates.ROWS[24] * config.sequence_len
    for N, K in ((C, C), (4 * C, C), (C, 4 * C)):
        x = torch.randn(M, K, device=check.device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(M, N, device=check.device, dtype=torch.bfloat16)
        plain = Linear(K, N).to(check.device)
        layer8 = fp8.Fp8Linear(plain)
        fp8._cast_weights(layer8.weights, *layer8.fp8.buffers())
        product_ms = 6e3 * M * N * K / estimates.product_rate(C)
        cast_ms = 7e3 * M * (N + K) / BANDWIDTH  # maximum, cast and transposed copy of the input and of the gradient
        results = []
        for name, layer, expected in (
            ("bfloat16", plain, product_ms),
            ("FP8", layer8, product_ms / estimates.FP8_SPEEDUP + cast_ms),
        ):
            compiled, parameters = check.compile(layer), (x, plain.weight)
            ms = check.median_ms(lambda: torch.autograd.grad(compiled(x), parameters, grad))  # noqa: B023
            check.record(f"{M} x {K} → {N}, {name}", ms, "ms", expected)
            y = compiled(x)
            results.append([y, *torch.autograd.grad(y, parameters, grad)])
        errors = [((b.float() - a.float()).norm() / a.float().norm()).item() for a, b in zip(*results, strict=True)]
        check.record("  largest error of output and gradients", max(errors), "", "below 0.1")
        check.require(max(errors) < 0.1, f"FP8 differs from bfloat16 by {max(errors):.2g}")


def fused_mlp(check: Check) -> None:
    """The MLP with relu² inside its products against the plain formula, compiled, forward and backward."""
    try:
        from nanochat.kernels import relu2
    except ImportError:
        check.record("fused MLP", "Triton is not installed")
        return
    if check.device.type != "cuda" or torch.cuda.get_device_capability() < mlp.MIN_CAPABILITY:
        check.record("fused MLP", "not on this device")
        return
    for depth in (12, 24):
        C = 128 if check.dry else check.config(depth).n_embd
        M = 256 if check.dry else estimates.ROWS[depth] * check.config(depth).sequence_len
        if not IS_NULL_GPU:
            mlp.probe(relu2.mlp, C, check.device, torch.bfloat16)
        inputs, grad = mlp.random_inputs(C, M, check.device, torch.bfloat16)
        product_ms = 48e3 * M * C**2 / estimates.product_rate(C)
        pass_ms = 8e3 * M * C / BANDWIDTH  # reads or writes (M, 4 C) once
        for name, kernel, passes in (("plain", mlp.plain, 7), ("fused", relu2.mlp, 1)):
            run = check.compile(kernel)
            ms = check.median_ms(lambda: mlp.output_and_gradients(run, inputs, grad))  # noqa: B023
            check.record(f"MLP of depth {depth}, {M} tokens, {name}", ms, "ms", product_ms + passes * pass_ms)


def depth_12(check: Check) -> None:
    training_speed(check, 12, estimates.ROWS[12])


def depth_24(check: Check) -> None:
    training_speed(check, 24, estimates.ROWS[24])


def depth_22_fp8(check: Check) -> None:
    """The shape that reaches GPT-2's CORE soonest on eight H100: docs/time_to_gpt2.md."""
    training_speed(check, 22, 32, vocab_size=49152, accumulation=1, use_fp8=True)


# ---- generation ----


def engine_speed(check: Check) -> None:
    """Decoding with 1, 32 and 256 slots, capture of the graphs, prompts of 20 lengths."""
    for depth in (12, 24):
        sizes = infer.Flags(depth=depth)
        if check.dry:
            sizes = infer.Flags(depth=depth // 6, head_dim=64, vocab_size=1024, max_seq_len=256)
        model = infer.load(sizes, check.device, check.dtype)
        for num_slots in (1, 4, 8) if check.dry else (1, 32, 256):
            decode_speed(check, depth, model, num_slots)
        lengths = torch.randint(1, model.config.sequence_len, (20,)).tolist()
        for turn in ("first", "second"):  # a kernel that makes a plan for each shape is slow the first time
            ms = [1e3 * check.seconds(partial(read_prompt, model, length)) for length in lengths]
            what = f"d{depth}: prompts of 20 lengths, {turn} time: median, longest"
            check.record(what, f"{statistics.median(ms):.1f}, {max(ms):.1f}", "ms")


def decode_speed(check: Check, depth: int, model: GPT, num_slots: int) -> None:
    prompt_tokens, new_tokens = (8, 8) if check.dry else (64, 64)
    no_special_tokens: Any = SimpleNamespace(bos=-1, special=lambda text: -1)  # no token ends a completion
    compiled = (depth, num_slots) == (12, 1) and not check.dry  # once: it takes 39 s, and at depth 24 more
    engine = Engine(model, no_special_tokens, num_slots, compile=compiled)
    for seed in range(num_slots):
        prompt = torch.randint(model.config.vocab_size, (prompt_tokens,)).tolist()
        engine.add(Request(prompt, new_tokens, top_k=50, seed=seed))
    steps = []
    while engine.is_busy:
        seconds = check.seconds(engine.step)
        if len(engine.active) == num_slots:
            steps.append(seconds)
    step = statistics.median(steps[1:])
    num_kernels = estimates.decode_kernels(model.config.n_layer, compiled=compiled)
    expected = estimates.decode_ms(model.config, num_slots, prompt_tokens + new_tokens // 2, num_kernels)
    what = f"d{depth}, {num_slots} slots{', compiled' if compiled else ''}: "
    check.record(what + "decode step", 1e3 * step, "ms", expected)
    check.record(what + "tokens/s", num_slots / step, "", 1e3 * num_slots / expected)
    check.record(what + "step that fills the slots and captures", 1e3 * steps[0], "ms")


@torch.inference_mode()
def read_prompt(model: GPT, length: int) -> None:
    tokens = tuple(torch.randint(model.config.vocab_size, (length,)).tolist())
    last = EMPTY
    for start in range(0, length, GPU_CHUNK):
        (last,) = Prefill(model).read([(last, tokens[start : start + GPU_CHUNK])])


def two_models(check: Check) -> None:
    """Two models on one GPU, an engine thread each; both must answer 20 requests that come at once."""
    tokenizer = Tokenizer.load(ROOT / "tests/golden/tokenizer")
    config = recipe.model_config(check.flags(6, head_dim=64, max_seq_len=256), tokenizer.vocab_size)

    def make_engine(model: GPT) -> Engine:
        if check.device.type == "cuda":
            torch.cuda.set_device(check.device)
        engine = Engine(model, tokenizer, 8)
        engine.stop_tokens = set()
        return engine

    models = []
    for name in ("first", "second"):
        model = GPT.create(config, check.device, check.dtype).requires_grad_(False)
        models.append(ServedModel(name, tokenizer, config, [partial(make_engine, model)], queue_size=64))

    async def ask(service: Service, model: ServedModel, client: int) -> int:
        request = Request([tokenizer.bos, *range(client + 1)], max_tokens=8 + client, seed=client)
        handle = service.submit(model, [request], client=f"client {client}")
        try:
            async for _ in handle.updates():
                pass
            return len(handle.generations[0].tokens)
        finally:
            handle.close()

    async def serve() -> list[int]:
        service = Service(models)
        service.start()
        while service.status == "loading":
            await asyncio.sleep(0.05)
        if service.status != "ok":
            raise SystemExit("an engine failed at its start, see the log")
        num_tokens = await asyncio.gather(*(ask(service, model, i) for i in range(20) for model in models))
        service.close()
        return num_tokens

    start = time.perf_counter()
    num_tokens = asyncio.run(serve())
    check.record("two models at once", f"{len(num_tokens)} answers", "", "40 answers")
    check.record("start and answers", time.perf_counter() - start, "s")
    if num_tokens != [8 + i for i in range(20) for _ in models]:
        raise SystemExit(f"wrong numbers of tokens: {num_tokens}")


# ---- all stages ----


def stages(check: Check) -> None:
    """From the primer's text to a chat, with the sizes of tests/test_stages.py; base_train is stopped and resumed."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_stages as toy

    folder = check.folder / "stages"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ |= {"NANOCHAT_BASE_DIR": str(folder), "NANOCHAT_DATA_DIR": str(folder / "primer")}
    device = ["--device", check.device.type]

    def run(script: Any, argv: list[str], note: str = "") -> None:
        check.record(script.__name__.removeprefix("scripts.") + note, check.seconds(lambda: script.main(argv)), "s")

    def losses(tag: str) -> list[float]:
        lines = (folder / f"report/metrics/base_train-{tag}.jsonl").read_text().splitlines()
        return [metrics["train/loss"] for metrics in map(json.loads, lines) if "train/loss" in metrics]

    def stop_and_evaluate(*arguments: Any, **options: Any) -> Any:
        if stop.call_count == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the run ends after the next step
        return evaluate(*arguments, **options)

    run(toy.primer, [])
    run(toy.tok_train, ["--vocab-size", str(toy.VOCAB), "--max-chars", "300000"])
    run(toy.tok_eval, [])
    run(toy.base_train, [*toy.BASE, *device])
    evaluate, stop = toy.base_train.evaluate_bpb_of_sources, mock.Mock(side_effect=stop_and_evaluate)
    parts = [*toy.BASE, *device, "--model-tag", "parts"]
    with mock.patch.object(toy.base_train, "evaluate_bpb_of_sources", stop), contextlib.suppress(Stopped):
        toy.base_train.main(parts)
        check.require(False, "SIGTERM did not stop the run")
    run(toy.base_train, [*parts, "--resume"], ", resumed")
    difference = max(abs(a - b) for a, b in zip(losses("d2"), losses("parts"), strict=True))
    check.record("loss of the resumed run: largest difference", difference, "", "0")
    check.require(difference < 0.01, f"the loss of the resumed run differs by {difference:.2g}")
    shutil.rmtree(folder / "base_checkpoints/parts")
    run(toy.base_eval, [*device, "--eval", "bpb,sample", "--split-tokens", "2048", "--device-batch-size", "4"])
    run(toy.mid_train, [*toy.SFT, *device])
    run(toy.chat_sft, [*toy.SFT, *device, "-i", "mid"])
    run(toy.chat_rl, [*toy.RL, *device])
    run(toy.chat_eval, [*device, "-a", "QuizFree,QuizChoice,Sums", "-x", "4", "-m", "8", "-b", "3"])
    run(toy.chat_cli, [*device, "-p", "Why is the sky blue?", "-m", "12"])
    run(toy.report, [])


PARTS: list[tuple[Callable[[Check], None], int]] = [  # in order of value, each with the seconds that it may take
    (machine, 15),
    (attention_kernels, 50),
    (gpu_tests, 40),
    (loss_curves, 60),
    (depth_12, 90),
    (fp8_layers, 25),
    (engine_speed, 45),
    (two_models, 20),
    (stages, 70),
    (depth_24, 45),
    (fused_mlp, 20),
    (depth_22_fp8, 60),
]
