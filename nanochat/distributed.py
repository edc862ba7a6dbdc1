"""
Distributed training for all stages: one `Dist` per process, which also works when there is only one process.

Under torchrun the processes join a process group (nccl on CUDA, gloo elsewhere); without it a process is rank 0 of 1.
Every method works in both cases, so callers need not distinguish them. A function that is called collective exchanges
data between the ranks: all of them have to call it, and in the same order.
"""

import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanochat.common import UserError
from nanochat.hardware import pick_device
from nanochat.heartbeat import Heartbeat

# Of each collective operation. While ranks wait in one, another may compile, download, evaluate or write to a slow
# disk. A rank that died is noticed long before, by its heartbeat. (heuristic, not tuned)
TIMEOUT = timedelta(minutes=60)
STORE_TIMEOUT = timedelta(seconds=60)  # of the heartbeat's messages


@dataclass(frozen=True)
class Dist:
    """This process: its device and its rank among all processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    heartbeat: Heartbeat | None = None  # with several ranks

    def note(self, place: str) -> None:
        """Notes where the program is, such as "in step 7", for messages about lost ranks."""
        if self.heartbeat:
            self.heartbeat.place = place

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
    group = Dist(device, dist.get_rank(), world_size)
    heartbeat = start_heartbeat(group) if world_size > 1 else None
    state = "failed"
    try:
        yield replace(group, heartbeat=heartbeat)
        state = "done"
    except SystemExit:  # train.Stopped, which all ranks raise together
        state = "done"
        raise
    except RuntimeError as error:
        if heartbeat and _is_about_communication(error):
            raise UserError(_describe_failure(group, heartbeat, error)) from error
        raise
    finally:
        if heartbeat:
            heartbeat.close(state)
        # Not after an error of one rank: NCCL would wait for the operations that the other ranks still take part in.
        # Ending the process aborts them, and torchrun then ends the other ranks.
        if state == "done":
            dist.destroy_process_group()


def start_heartbeat(group: Dist) -> Heartbeat:
    """Starts this rank's heartbeat, in the store that the process group was made with. All ranks have to call it."""
    run = group.gather(uuid.uuid4().hex)[0]  # the store may still hold the beats of the processes before a restart

    def connect() -> dist.Store:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
        return dist.PrefixStore(f"heartbeat/{run}", store)

    watches = int(os.environ.get("LOCAL_RANK", 0)) == 0
    heartbeat = Heartbeat(connect, group.rank, group.world_size, group.host, watches=watches)
    heartbeat.start()
    group.barrier()
    return heartbeat


def _is_about_communication(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Timed out waiting" in str(error)


def _describe_failure(group: Dist, heartbeat: Heartbeat, error: RuntimeError) -> str:
    reason = str(error).partition("\n")[0]
    others = heartbeat.describe_others()
    return (
        f"{group.name} lost the other ranks {heartbeat.place} ({reason}); the others: {others or 'not reachable'}; "
        "torchrun restarts the job if it may, otherwise start it again with --resume"
    )


def warn0(message: str) -> None:
    """Prints a warning to stderr, on rank 0 only; for code that has no Dist."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def warn_of_rank(message: str) -> None:
    """Prints a warning about this rank to stderr; with several ranks, it starts with rank and host."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        message = f"rank {os.environ['RANK']} on {socket.gethostname()}: {message}"
    print(f"warning: {message}", file=sys.stderr, flush=True)
