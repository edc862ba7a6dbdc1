"""
Devices and dtypes, the table of GPUs, compiling, and the settings of a training process.

    python -m pytest tests/test_hardware.py
"""

import os
import subprocess
import sys

import pytest
import torch

from nanochat import hardware
from nanochat.common import UserError

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_without_a_gpu_is_the_cpu(no_gpu):
    assert hardware.pick_device() == CPU
    assert hardware.pick_device("auto", local_rank=3) == CPU


@pytest.mark.parametrize("name", ["cuda", "mps", "tpu", "cuda:0", ""])
def test_missing_device_is_a_user_error(no_gpu, name):
    with pytest.raises(UserError, match="--device"):
        hardware.pick_device(name)


def test_each_local_rank_gets_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [hardware.pick_device("cuda", rank) for rank in (0, 1)] == [torch.device("cuda", rank) for rank in (0, 1)]
    assert hardware.pick_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="nproc_per_node=2"):
        hardware.pick_device("cuda", 2)


def test_pick_device_configures_cuda_for_every_program(monkeypatch):
    """Not only for training: prompts of a chat have many lengths, too."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    torch.backends.cuda.enable_cudnn_sdp(True)
    hardware.pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"

    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")  # set by the user
    hardware.pick_device("cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.gpu
def test_pick_device_sets_the_allocator_before_it_starts():
    code = """
import torch
from nanochat.hardware import pick_device
pick_device("cuda")
torch.cuda.init()
print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""
    variables = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
    assert output.split() == ["True"]


def test_dtype_follows_the_device_unless_the_environment_sets_it(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    assert hardware.pick_dtype(CPU) == torch.float32
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert hardware.pick_dtype(torch.device("cuda", 0)) == dtype
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        monkeypatch.setenv("NANOCHAT_DTYPE", name)
        assert hardware.pick_dtype(CPU) == dtype


def test_cpu_trains_in_the_faster_dtype_and_resumes_in_the_first_one(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    for faster, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(hardware, "bf16_faster_on_cpu", lambda faster=faster: faster)
        assert hardware.pick_training_dtype(CPU) == dtype
        assert hardware.pick_training_dtype(CPU, "torch.float32") == torch.float32
        assert hardware.pick_training_dtype(CPU, "torch.bfloat16") == torch.bfloat16
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert hardware.pick_training_dtype(CPU, "torch.float32") == torch.float16  # resuming is refused later, in run.py
    monkeypatch.delenv("NANOCHAT_DTYPE")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert hardware.pick_training_dtype(torch.device("cuda", 0), "torch.float32") == torch.bfloat16


def test_compiling_saves_time_in_long_runs_only():
    """A Xeon with AMX had 272 s left without compiling, and took 31 s to compile four layers."""
    assert hardware.seconds_compiled(272.0, num_layers=4) < 272
    assert hardware.seconds_compiled(60.0, num_layers=4) > 60
    assert hardware.seconds_compiled(60.0, num_layers=4, cached=True) < 60  # compiled by an earlier stage


@pytest.mark.parametrize(
    "error, is_out_of_memory",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, is_out_of_memory):
    assert hardware.is_out_of_memory(error) == is_out_of_memory


def test_available_memory_is_bounded_by_the_limit_of_the_address_space():
    code = "from nanochat.hardware import available_memory; print(available_memory())"
    command = f"ulimit -v {6 * 2**20}; exec {sys.executable} -c '{code}'"
    limited = float(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout)
    assert 2**30 < limited < 6 * 2**30
    assert hardware.available_memory() > 0


def test_unknown_dtype_is_a_user_error(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "int8")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE=int8.*bfloat16"):
        hardware.pick_dtype(CPU)


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA Abacus", None),
    ],
)
def test_most_specific_name_gives_the_peak(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    card = hardware.gpu_card(torch.device("cuda", 0))
    assert (card and card.flops) == flops


def test_cpu_has_a_description_and_no_known_peak():
    assert hardware.gpu_card(CPU) is None
    assert "cpu" in hardware.describe(CPU) and "\n" not in hardware.describe(CPU)
    assert hardware.peak_memory(CPU) > 2**20


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not hardware.can_compile(CPU)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == "clang++" else None)
    assert hardware.can_compile(CPU)
    assert not hardware.can_compile(torch.device("mps"))


def test_compiling_on_cuda_needs_triton_and_a_c_compiler(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert hardware.can_compile(cuda)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C compiler" in hardware.compile_obstacle(cuda)
    monkeypatch.setenv("CC", "tcc")
    assert hardware.can_compile(cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton is not installed" in hardware.compile_obstacle(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not hardware.can_compile(cuda) and "older" in hardware.compile_obstacle(cuda)


@pytest.mark.parametrize("kind, module", [("cuda", torch.cuda), ("mps", torch.mps)])
def test_times_of_a_gpu_include_the_work_that_it_queued(monkeypatch, kind, module):
    calls = []
    monkeypatch.setattr(module, "synchronize", lambda: calls.append("synchronize"))
    hardware.best_seconds([lambda: calls.append("run")], torch.device(kind))
    assert calls[:4] == ["run", "synchronize"] * 2
    hardware.synchronize(CPU)


def test_matmul_rate_multiplies_random_numbers_and_leaves_the_global_generator_alone(monkeypatch):
    products = []

    def run_once(functions, device):
        products.append(functions[0]())
        return [1.0]

    monkeypatch.setattr(hardware, "best_seconds", run_once)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert hardware.matmul_rate(CPU, torch.float32) == 2 * 1024**3
    assert products[0].std() > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_chosen_cpu_matmul_is_exact():
    before = torch.get_float32_matmul_precision()
    try:
        hardware.tune_process(CPU)
        a, b = torch.randn(64, 256), torch.randn(256, 64)
        error = (a @ b).double() - a.double() @ b.double()
        assert error.abs().max() < 1e-4  # bfloat16 products would be off by 0.1
    finally:
        torch.set_float32_matmul_precision(before)


def test_training_process_on_a_cpu_is_deterministic():
    hardware.tune_process(torch.device("cpu"), "highest")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # that would only cost time
