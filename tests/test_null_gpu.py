"""
The CUDA path on the null GPU: what does not depend on numbers. Syncs, kernel launches, captured graphs, memory, every
stage with --device cuda. Kernels compute nothing there and the host reads zeros, but torch's checks of devices, dtypes
and shapes are the real ones.

    bash dev/null_gpu/run.sh        # see dev/README.md; elsewhere these tests are skipped
"""

import asyncio
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_stages
import torch
import torch.distributed as dist
from factories import save_checkpoint, tiny_gpt, tiny_optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat import attention, cards, fp8, recipe
from nanochat.costs import GIB, TrainingSetup, training_memory
from nanochat.dataloader import prefetch
from nanochat.distributed import Dist
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.muon import build_optimizer
from nanochat.request import Request
from nanochat.serve.scheduler import ServedModel, Service
from nanochat.train import Step, Trainer, TrainState, token_loss

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "dev/null_gpu"), str(ROOT / "dev")]
import count_bytes  # noqa: E402
import counts  # noqa: E402
import estimates  # noqa: E402
import gpu_choices  # noqa: E402

relu2 = pytest.importorskip("nanochat.kernels.relu2", exc_type=ImportError)  # Triton comes with torch for CUDA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not counts.IS_LOADED, reason="needs dev/null_gpu/run.sh")]
DEVICE = torch.device("cuda", 0)
VOCAB = 1024
NO_SPECIAL_TOKENS = SimpleNamespace(bos=-1, special=lambda text: -1)  # no token ends a completion


@pytest.fixture(autouse=True)
def numbers_are_ignored(monkeypatch):
    counts.ignore_numbers(monkeypatch.setattr)
    counts.reset()


def toy_flags(depth, **changes):
    sizes = {"depth": depth, "aspect_ratio": 64, "head_dim": 32, "max_seq_len": 256}
    return recipe.RecipeFlags(**sizes | changes)


def make_model(flags, kernel="flash", vocab_size=VOCAB, device=DEVICE):
    model = GPT.create(recipe.model_config(flags, vocab_size), device, torch.bfloat16)
    model.use_attention(attention.LOADERS[kernel]())
    return model


def broken_rules(found):
    """What happened during stream captures that CUDA does not allow."""
    return [name for name in found["call"] if name.split()[0].isupper()] + list(found["escaped"])


# ---- training ----


def launches(run):
    """Kernels that `run` launches, at its second call, and how often the host waited."""
    run()
    counts.reset()
    run()
    found = counts.read()
    return found["launch"].total(), found["sync"].total()


def training_functions(model, train_model, compile=False):
    optimizer = build_optimizer(model, recipe.param_groups(model.config), compile=compile)
    x_BT = torch.zeros(2, model.config.sequence_len, dtype=torch.long, device=DEVICE)

    def micro_batch():
        token_loss(train_model, (x_BT, x_BT, x_BT.numel())).backward()

    def update():
        micro_batch()
        optimizer.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return micro_batch, update


@pytest.mark.parametrize("depth", [2, 4])
def test_micro_batch_launches_few_kernels_and_never_waits(depth):
    model = make_model(toy_flags(depth))
    micro_batch, update = training_functions(model, model)
    update()
    num_launches, num_syncs = launches(micro_batch)
    assert num_syncs == 0
    assert num_launches <= 110 + 117 * depth  # eager; 24 at 4 layers are saved by one product for q, k and v


def test_fused_mlp_keeps_less_and_launches_less():
    results = []
    for kernel in (None, relu2.mlp):
        model = make_model(toy_flags(4))
        model.use_mlp(kernel)
        micro_batch, _ = training_functions(model, model)
        num_launches, num_syncs = launches(micro_batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        micro_batch()
        results.append((num_launches, torch.cuda.max_memory_allocated() - before))
        assert num_syncs == 0
        model.zero_grad()
    (plain_launches, plain_bytes), (fused_launches, fused_bytes) = results
    assert fused_launches <= plain_launches - 5 * 4  # 566 - 546: relu, square and their derivatives in each layer
    assert fused_bytes < plain_bytes


@pytest.mark.slow
@pytest.mark.parametrize("mlp_kernel", [None, relu2.mlp], ids=["plain", "fused"])
def test_compiled_training_has_few_graphs_and_kernels(mlp_kernel):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(toy_flags(2))
    model.use_mlp(mlp_kernel)
    model.compile_parts(fullgraph=True)
    micro_batch, update = training_functions(model, model, compile=True)
    update()
    update()
    num_launches, num_syncs = launches(micro_batch)
    assert num_syncs == 0
    assert num_launches <= 30 + 60 * 2  # 144
    num_launches, num_syncs = launches(update)
    assert num_syncs == 0
    assert num_launches <= 150 + 175  # a micro-batch, then the optimizer's 165
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # start, loss, a layer without and one with value embeddings; the optimizer's functions, one per shape and group
    assert num_graphs <= 4 + 11
    update()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("use_fp8", [False, True], ids=["bfloat16", "fp8"])
def test_estimates_count_the_bytes_that_compiled_code_moves(use_fp8):
    assert count_bytes.bytes_moved(use_fp8) == pytest.approx(estimates.MOVED[use_fp8], rel=0.05)


@pytest.mark.parametrize("is_prefetched", [False, True], ids=["", "prefetched"])
def test_training_step_waits_for_the_device_once(is_prefetched):
    flags, num_steps = toy_flags(2), 5
    model = make_model(flags)
    x_BT = torch.zeros(2, flags.max_seq_len, dtype=torch.long)
    syncs = []

    def steps():
        for i in range(num_steps):
            yield Step([(x_BT, x_BT, x_BT.numel())] * 2, i / num_steps, 2 * x_BT.numel(), {})

    def to_device():
        for step in steps():
            micro_batches = [(x.to(DEVICE), y.to(DEVICE), n) for x, y, n in step.micro_batches]
            counts.reset()
            yield Step(micro_batches, step.progress, step.num_tokens, {})

    def after_step(step, seconds):
        syncs.append(dict(counts.read()["sync"]))
        counts.reset()

    optimizer = build_optimizer(model, recipe.param_groups(model.config))
    trainer = Trainer(model, optimizer, TrainState(), Dist(DEVICE), log=lambda *_: None, after_step=after_step)
    batches = prefetch(steps(), DEVICE) if is_prefetched else to_device()
    trainer.fit(batches, token_loss, partial(recipe.pretrain_schedule, flags, num_steps), [])
    assert [sum(step.values()) for step in syncs[1:]] == [1] * (num_steps - 1), syncs


@pytest.mark.parametrize("kernel", ["flash", "banded", "sdpa", "flex"])
@pytest.mark.parametrize("use_fp8", [False, True], ids=["bfloat16", "fp8"])
def test_every_kernel_trains(kernel, use_fp8):
    model = make_model(toy_flags(2), kernel)
    optimizer = tiny_optimizer(model)
    if use_fp8:
        assert fp8.use_fp8(model, optimizer, compile=False)
    x_BT = torch.zeros(2, model.config.sequence_len, dtype=torch.long, device=DEVICE)
    for _ in range(2):
        model(x_BT, x_BT).backward()
        optimizer.step()
        assert all(p.grad is not None and p.grad.device == p.device for p in model.parameters())
        optimizer.zero_grad(set_to_none=True)


MEMORY_CASES = [  # depth, rows, changes of TrainingSetup, in which 2 micro-batches per step are the default
    (12, 32, {}),
    (12, 32, {"accumulation": 1}),
    (12, 16, {}),
    (20, 16, {}),
    (22, 8, {}),
    (24, 8, {}),
    (24, 8, {"fp8": True}),
    (12, 32, {"activation_checkpointing": True}),
    (24, 32, {"activation_checkpointing": True}),
    (24, 32, {"activation_checkpointing": True, "fp8": True}),
]
COMPILED_CASES = [  # minutes each: NULLGPU_COMPILED=1 bash dev/null_gpu/run.sh -k peak
    (12, 32, {"compiled": True}),
    (24, 16, {"compiled": True}),
    (24, 16, {"compiled": True, "fp8": True}),
    (24, 32, {"compiled": True, "activation_checkpointing": True}),
]
if os.environ.get("NULLGPU_COMPILED"):
    MEMORY_CASES += COMPILED_CASES


@pytest.mark.parametrize("depth, rows, changes", MEMORY_CASES)
def test_peak_memory_is_as_predicted(depth, rows, changes):
    setup = TrainingSetup(rows, **{"accumulation": 2, "compiled": False} | changes)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = make_model(recipe.RecipeFlags(depth=depth), vocab_size=32768)
    model.activation_checkpointing = setup.activation_checkpointing
    optimizer = build_optimizer(model, recipe.param_groups(model.config), compile=setup.compiled)
    if setup.fp8:
        fp8.use_fp8(model, optimizer, setup.compiled)
    if setup.compiled:
        model.compile_parts(fullgraph=True)
    x_BT = torch.zeros(rows, model.config.sequence_len, dtype=torch.long, device=DEVICE)
    for _ in range(2):
        for _ in range(setup.accumulation):
            token_loss(model, (x_BT, x_BT, x_BT.numel())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = training_memory(model.config, setup).peak
    assert predicted / GIB == pytest.approx(measured / GIB, rel=0.05)


def test_steps_of_many_ranks_map_no_memory_even_if_little_is_left():
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        torch.cuda.empty_cache()
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # as hardware.py does
        torch.cuda.reset_peak_memory_stats()
        model = make_model(recipe.RecipeFlags(depth=12), vocab_size=32768)
        optimizer = build_optimizer(model, recipe.param_groups(model.config), rank=0, world_size=8)
        x_BT = torch.zeros(8, model.config.sequence_len, dtype=torch.long, device=DEVICE)

        def mapped_bytes():
            """Bytes that were mapped and unmapped during a step."""
            before = torch.cuda.memory_stats()
            token_loss(model, (x_BT, x_BT, x_BT.numel())).backward()
            optimizer.reduce_gradients()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after = torch.cuda.memory_stats()
            return [after[name] - before[name] for name in ("reserved_bytes.all.allocated", "reserved_bytes.all.freed")]

        assert mapped_bytes()[0] > 0
        mapped_bytes()  # the first step with optimizer state
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.02 * torch.cuda.max_memory_allocated() / total)
        for _ in range(4):
            mapped_bytes()
        assert [mapped_bytes() for _ in range(3)] == [[0, 0]] * 3
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        dist.destroy_process_group()


# ---- generation ----


def requests_of_every_kind(max_tokens=20):
    kinds = [{}, {"temperature": 0.0, "logprobs": True}, {"top_k": 5}, {"top_k": 20, "top_p": 0.5, "logprobs": True}]
    return [Request([*range(1, 2 + 30 * i)], max_tokens, seed=i, **kind) for i, kind in enumerate(kinds)]


def captured_step(depth, num_slots, compile):
    """The counts of a step that captures a graph; checks that those after it only replay it."""
    model = make_model(toy_flags(depth)).requires_grad_(False)
    model.cast_weights()
    engine = Engine(model, NO_SPECIAL_TOKENS, max_slots=num_slots, compile=compile)
    for seed in range(num_slots):
        engine.add(Request([1, 2, 3], max_tokens=20, top_k=50, seed=seed))
    counts.reset()
    engine.step()
    captured = counts.read()
    assert captured["call"]["captures"] == 1 and not broken_rules(captured)
    for _ in range(3):
        counts.reset()
        engine.step()
        found = counts.read()
        assert found["call"]["graph launches"] == 1 and found["launch"].total() == 0
        assert found["sync"].total() == 1  # the tokens are read
    return captured["captured"].total()


@pytest.mark.parametrize("depth, num_slots", [(2, 1), (4, 1), (4, 4)])
def test_decode_step_is_one_graph(depth, num_slots):
    num_kernels = captured_step(depth, num_slots, compile=False)
    assert num_kernels <= estimates.decode_kernels(depth, compiled=False) + 2


def test_compiled_decode_step_has_few_kernels():
    """Few enough to stay under 250 at depth 24. Further shapes compile nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kernels = {depth: captured_step(depth, 1, compile=True) for depth in (2, 4)}
    assert kernels == {depth: estimates.decode_kernels(depth, compiled=True) for depth in (2, 4)}
    per_layer = (kernels[4] - kernels[2]) / 2
    assert kernels[2] + 22 * per_layer < 250
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_decode_step_compiles_once_for_one_slot_and_once_for_more():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(toy_flags(2)).requires_grad_(False)
    model.cast_weights()
    engine = Engine(model, NO_SPECIAL_TOKENS, max_slots=8, compile=True)
    for num_slots in (1, 2, 8, 1, 5):
        engine.generate([Request([1, 2, 3], max_tokens=4, seed=seed) for seed in range(num_slots)])
    engine.generate([Request([1] * 200, max_tokens=40)] * 3)  # longer slots, more keys
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"] and not broken_rules(counts.read())


def test_engine_serves_requests_of_every_kind():
    model = make_model(toy_flags(2)).requires_grad_(False)
    engine = Engine(model, NO_SPECIAL_TOKENS, max_slots=2)
    engine.prefixes.chunk_size = 16
    completions = engine.generate(requests_of_every_kind())
    assert [len(completion.tokens) for completion in completions] == [20] * 4
    assert [len(completion.logprobs) for completion in completions] == [0, 20, 0, 20]
    model.train()
    engine.refresh_weights()
    engine.add(Request([1] * 40, max_tokens=200))  # the slots grow
    engine.step()
    engine.cancel(engine.num_requests - 1)
    assert not engine.is_busy and not broken_rules(counts.read())


# ---- stages ----


@pytest.fixture
def run(base_dir, monkeypatch, capsys):
    """Runs a stage script on the GPU and returns what it prints."""
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(base_dir / "primer"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(base_dir / "nothing"))
    test_stages.primer.main([])
    test_stages.tok_train.main(["--vocab-size", str(test_stages.VOCAB), "--max-chars", "300000"])

    def run_script(script, argv):
        script.main([*argv, "--device", "cuda"])
        return capsys.readouterr().out

    return run_script


@pytest.mark.slow
def test_every_stage_runs_on_a_gpu(run):
    scripts, base, sft, rl = test_stages, test_stages.BASE, test_stages.SFT, test_stages.RL
    assert "attention flash" in run(scripts.base_train, [*base, "--num-iterations", "4"])
    assert "resuming after step 4" in run(scripts.base_train, [*base, "--resume"])
    run(scripts.base_eval, ["--eval", "bpb,sample", "--split-tokens", "2048", "--device-batch-size", "4"])
    run(scripts.mid_train, sft)
    run(scripts.chat_sft, [*sft, "-i", "mid"])
    run(scripts.chat_rl, rl)
    run(
        scripts.chat_rl,
        [*rl, "--model-tag", "ppo", "--updates-per-batch", "2", "--clip-ratio", "0.2", "--kl-coef", "1"],
    )
    run(scripts.chat_eval, ["-a", "QuizFree,QuizChoice,Sums", "-x", "4", "-m", "8", "-b", "3"])
    run(scripts.chat_eval, ["-i", "rl", "-a", "SpellingBee", "-x", "3", "-m", "8", "-t", "1", "-n", "4"])
    run(scripts.chat_cli, ["-p", "Why is the sky blue?", "-m", "12"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--fp8"], ["--attention", "banded"], ["--portable"]], ids=lambda o: o[0][2:])
def test_base_train_runs_with_the_option(run, options):
    wide = ["--aspect-ratio", "64", "--sample-every", "-1"]
    run(test_stages.base_train, [*test_stages.BASE, *wide, *options, "--num-iterations", "2"])


@pytest.mark.slow
def test_checkpoint_of_a_cpu_is_served_on_a_gpu(base_dir, golden_tokenizer, capsys):
    save_checkpoint(tiny_gpt(), "sft", tokenizer=golden_tokenizer)
    test_stages.chat_cli.main(["-p", "hello", "-m", "8", "--device", "cuda"])


# ---- other cards ----


@pytest.mark.slow  # on a T4, a kernel is compiled before it turns out that it does not fit
@pytest.mark.parametrize("name", gpu_choices.CARDS)
def test_page_of_gpus_shows_what_is_chosen_on_the_card(name):
    row = gpu_choices.choices_on(cards.find_machine(name).card)
    page = (ROOT / "docs/gpus.md").read_text(encoding="utf-8")
    assert row in page.splitlines(), f"docs/gpus.md is out of date, the row is now:\n{row}"


def test_unknown_old_card_computes_in_float32_without_compiling():
    program = """
import torch
from nanochat import hardware
device = torch.device("cuda", 0)
print(hardware.gpu_card(device), hardware.pick_dtype(device), hardware.can_compile(device))
"""
    environment = os.environ | {"NULLGPU_CARD": "Some Other Card,6.1,8.0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "None torch.float32 False", done.stderr


# ---- several engines: the last tests, because a capture that fails spoils the process ----


def serve(models, num_requests=20):
    """Number of tokens of the response to each request; every model gets `num_requests` from as many clients."""

    async def ask(service, model, client):
        handle = service.submit(model, [Request([1, 2, 3, client], max_tokens=4 + client, seed=client)], str(client))
        try:
            async for _ in handle.updates():
                pass
            return len(handle.generations[0].tokens)
        finally:
            handle.close()

    async def run():
        service = Service(models)
        service.start()
        while service.status == "loading":
            await asyncio.sleep(0.01)
        assert service.status == "ok"
        counts_of_tokens = await asyncio.gather(*(ask(service, m, i) for m in models for i in range(num_requests)))
        service.close()
        return counts_of_tokens

    return asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("num_devices, num_models", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_engines_in_several_threads_capture_and_answer(golden_tokenizer, num_devices, num_models):
    from scripts.chat_web import make_engine

    if torch.cuda.device_count() < num_devices:
        pytest.skip("NULLGPU_DEVICES=1")
    models = []
    for i in range(num_models):
        engines = []
        for device in range(num_devices):
            model = tiny_gpt(dtype=torch.bfloat16, device=f"cuda:{device}").requires_grad_(False)
            engines.append(partial(make_engine, model, golden_tokenizer, 4))
        models.append(ServedModel(f"model {i}", golden_tokenizer, model.config, engines, queue_size=64))
    assert serve(models) == [4 + i for i in range(20)] * num_models
    assert not broken_rules(counts.read())
