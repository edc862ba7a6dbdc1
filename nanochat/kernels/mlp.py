"""
Chooses how the MLPs multiply in training: by the plain formula, or with relu² inside the products (relu2.py).

    kernel = choose(config.n_embd, num_tokens, device, dtype, compile=True)      # None = the plain formula
    y = kernel(x, w1_NC, w2_CN)

The fused kernel is for CUDA GPUs of compute capability 8.0 or more in bfloat16. There it is tried against the plain
formula in float32, and then both are timed: cuBLAS may multiply so much faster than Triton that the plain formula wins.

Shapes: C channels, N = 4 C hidden channels.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from nanochat.hardware import best_seconds

# (x (…, C), w1 (N, C), w2 (C, N)) → (…, C), all in the compute dtype.
MlpKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

MIN_CAPABILITY = (8, 0)  # Ampere: bfloat16
MAX_ERROR = 0.02  # of the kernel, relative in the norm; the plain formula in bfloat16 is wrong by 0.004
MAX_TIMED_TOKENS = 2**14  # more take memory and do not change the ratio
PROBE_TOKENS = 200  # not a multiple of the kernel's tiles


def plain(x: torch.Tensor, w1_NC: torch.Tensor, w2_CN: torch.Tensor) -> torch.Tensor:
    """relu(x W1ᵀ)² W2ᵀ."""
    return F.linear(F.relu(F.linear(x, w1_NC)).square(), w2_CN)


def choose(
    num_channels: int,
    num_tokens: int,  # of a micro-batch
    device: torch.device,
    dtype: torch.dtype,
    *,
    compile: bool,  # as the model will be
    log: Callable[[str], None] = print,
) -> MlpKernel | None:
    """The fused kernel if it works here and is faster than the plain formula, else None."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return None
    try:
        from nanochat.kernels import relu2
    except ImportError:  # Triton is not installed; hardware.compile_obstacle tells
        return None
    if num_channels % relu2.MULTIPLE:
        return None
    try:
        probe(relu2.mlp, num_channels, device, dtype)
    except Exception as error:  # noqa: BLE001  a compiler may raise anything; all of it means: not this kernel
        log("MLP: the fused kernel does not work here " + " ".join(f"({type(error).__name__}: {error})".split())[:300])
        return None
    fused_ms, plain_ms = _milliseconds((relu2.mlp, plain), num_channels, num_tokens, device, compile)
    log(f"MLP: fused {fused_ms:.2f} ms, plain {plain_ms:.2f} ms: {'fused' if fused_ms < plain_ms else 'plain'}")
    return relu2.mlp if fused_ms < plain_ms else None


def probe(kernel: MlpKernel, num_channels: int, device: torch.device, dtype: torch.dtype) -> None:
    """Runs a kernel forward and backward on random numbers. ValueError if it differs from the formula in float32."""
    inputs, grad = random_inputs(num_channels, PROBE_TOKENS, device, dtype)
    results = output_and_gradients(kernel, inputs, grad)
    expected = output_and_gradients(plain, [x.float() for x in inputs], grad.float())
    names = ("output", "gradient of the input", "gradient of W1", "gradient of W2")
    for name, result, reference in zip(names, results, expected, strict=True):
        error = ((result.float() - reference).norm() / reference.norm()).item()
        if not error < MAX_ERROR:  # true for NaN as well
            raise ValueError(f"the {name} is wrong by {error:.2g} in the norm")


def output_and_gradients(
    kernel: MlpKernel, inputs: Sequence[torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = kernel(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def random_inputs(
    C: int, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, W1 and W2, and a gradient of the output; the weights have the sizes of a trained model."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1.0, num_tokens, C), (C**-0.5, 4 * C, C), ((4 * C) ** -0.5, C, 4 * C)]
    tensors = [std * torch.randn(rows, columns, generator=generator) for std, rows, columns in shapes]
    grad = torch.randn(num_tokens, C, generator=generator)
    return [x.to(device, dtype) for x in tensors], grad.to(device, dtype)


def _milliseconds(
    kernels: Sequence[MlpKernel], C: int, num_tokens: int, device: torch.device, compile: bool
) -> list[float]:
    """Of each kernel, forward and backward."""
    inputs, grad = random_inputs(C, min(num_tokens, MAX_TIMED_TOKENS), device, torch.bfloat16)
    functions: list[Callable[[], object]] = []
    for kernel in kernels:
        run = torch.compile(kernel, dynamic=False) if compile else kernel
        output_and_gradients(run, inputs, grad)  # compiles
        functions.append(partial(output_and_gradients, run, inputs, grad))
    return [1e3 * seconds for seconds in best_seconds(functions, device)]
