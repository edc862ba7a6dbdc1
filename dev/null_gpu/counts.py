"""
What the null GPU counted, and what programs on it need: for code that runs under dev/null_gpu/run.sh.

    counts.reset()
    step()
    found = counts.read()                       # kind → name → number
    assert found["sync"].total() == 1
"""

import collections
import ctypes
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat import attention, fp8, rollout
from nanochat.eval import bpb

IS_LOADED = "NULLGPU" in os.environ


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(os.environ["NULLGPU"]) / "libcudart.so.13"))


def reset() -> None:
    _library().nullgpu_reset()


def read() -> dict[str, Counter[str]]:
    """
    Counts since the last reset, by kind and name: "launch" (of a kernel), "captured" (in a graph), "sync" (host waits
    for the device), "memcpy", "call" (of other functions; those in capitals break a rule of stream capture), "escaped"
    (launched outside the stream that its thread captures).
    """
    counts: dict[str, Counter[str]] = collections.defaultdict(Counter)
    with tempfile.NamedTemporaryFile("r") as file:
        _library().nullgpu_dump(file.name.encode())
        for line in file:
            kind, number, name = line.rstrip("\n").split("\t", 2)
            counts[kind][name] = int(number)
    return counts


def ignore_numbers(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """
    Kernels compute nothing here, so code that looks at numbers is patched: attention kernels are tried without a
    comparison, validations count one target, and one completion of a group earns more than the others.
    """

    def probe(kernel: Any, shape: attention.AttentionShape, device: torch.device, dtype: torch.dtype) -> None:
        size = (1, shape.num_tokens, shape.num_heads, shape.head_dim)
        kv_size = (1, shape.num_tokens, shape.num_kv_heads, shape.head_dim)
        inputs = [torch.zeros(s, device=device, dtype=dtype) for s in (size, kv_size, kv_size)]
        for window in sorted(set(shape.windows)):
            attention._output_and_gradients(kernel, inputs, inputs[0], window)

    sums = bpb._sums

    def sums_of_one_target(*arguments: Any) -> tuple[float, ...]:
        return tuple(1.0 for _ in sums(*arguments))

    def advantages(rewards: Any) -> list[float]:
        return [math.sqrt(len(rewards)), *[-1.0] * (len(rewards) - 1)]

    patch(attention, "probe", probe)
    patch(fp8, "probe", lambda device: "")
    patch(bpb, "_sums", sums_of_one_target)
    patch(rollout, "group_advantages", advantages)
