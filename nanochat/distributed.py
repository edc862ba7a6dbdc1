"""
Distributed training for all stages: one `Dist` per process, which also works when there is only one process.

Under torchrun the processes join a process group (nccl on CUDA, gloo elsewhere); without it a process is rank 0 of 1.
Every method works in both cases, so callers need not distinguish them. A function that is called collective exchanges
data between the ranks: all of them have to call it, and in the same order.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanochat.hardware import pick_device

TIMEOUT = timedelta(minutes=60)  # rank 0 may evaluate or download for long while the others wait (not tuned)


@dataclass(frozen=True)
class Dist:
    """This process: its device and its rank among all processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def host(self) -> str:
        return socket.gethostname()

    @property
    def name(self) -> str:
        """Rank and host, for messages."""
        return f"rank {self.rank} on {self.host}"

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item()) if self.world_size > 1 else flag

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks in order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def print0(self, *args: Any) -> None:
        """print on rank 0 only."""
        if self.is_main:
            print(*args, flush=True)


@contextmanager
def init(device_name: str = "auto") -> Iterator[Dist]:
    """Joins the process group that torchrun's environment variables describe, if any, until the block ends."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = pick_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Dist(device)
        return
    backend, bound_device = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound_device)
    try:
        yield Dist(device, dist.get_rank(), world_size)
    except SystemExit:  # train.Stopped, which all ranks raise together
        dist.destroy_process_group()
        raise
    # Not after an error of one rank: NCCL would wait for the operations that the other ranks still take part in. Ending
    # the process aborts them, and torchrun then ends the other ranks.
    dist.destroy_process_group()


def warn0(message: str) -> None:
    """Prints a warning to stderr, on rank 0 only; for code that has no Dist."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def warn_of_rank(message: str) -> None:
    """Prints a warning about this rank to stderr; with several ranks, it starts with rank and host."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        message = f"rank {os.environ['RANK']} on {socket.gethostname()}: {message}"
    print(f"warning: {message}", file=sys.stderr, flush=True)
