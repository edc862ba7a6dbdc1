"""Starts the ranks of a distributed run as processes on this machine, which exchange data over gloo, for the tests."""

import faulthandler
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 240  # seconds until ranks that hang are ended, with their stacks in the log

# Imports torch and the stages once, in a server that then forks the ranks: importing takes each process 3 seconds.
multiprocessing.set_forkserver_preload(["scripts.base_train", "scripts.chat_sft", "scripts.chat_rl"])


def launch(world_size: int, function: Callable[..., None], *args: Any, log: Path) -> None:
    """
    Calls function(*args) in world_size processes, with the environment variables that torchrun sets. Raises the error
    of a rank. Their output is in the files <log>.0, <log>.1, … A function that joins several process groups one after
    the other calls `next_group` between them.
    """
    ports = _free_ports(8)
    environment = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world_size), "PORTS": " ".join(map(str, ports))}
    torch.multiprocessing.start_processes(
        _run_rank, (os.environ | environment, log, function, args), nprocs=world_size, start_method="forkserver"
    )


def next_group() -> None:
    """Sets another port: at the old one a fast rank could still find the store of the group before."""
    os.environ["MASTER_PORT"], _, os.environ["PORTS"] = os.environ["PORTS"].partition(" ")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


def _run_rank(rank: int, environment: dict[str, str], log: Path, function: Callable[..., None], args: Any) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = log.with_name(f"{log.name}.{rank}").open("a", buffering=1)
    faulthandler.dump_traceback_later(TIMEOUT, exit=True, file=sys.stderr)
    next_group()
    function(*args)
