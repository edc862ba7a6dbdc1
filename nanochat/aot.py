"""
Compiles a forward pass ahead of time (AOTInductor) for a CPU, and keeps the machine code on the disk.

torch.compile has to trace the code again in every process, which takes 20 s for a decode step, and checks guards in
every call, 0.2 ms of 1.6. A compiled package is loaded in a second, and called without guards: the caller must pass
tensors of the dtypes and numbers of dimensions that it was compiled for, in the sizes that were declared as dynamic.
"""

import hashlib
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
import torch.nn as nn

from nanochat import hardware
from nanochat.common import atomic_path, base_dir

COMPILE_LOCK = threading.Lock()  # a server has a thread per engine, and tracing changes settings of the process
MAX_PACKAGES = 32  # files of 2 MB that are kept, the last used ones


class CompileError(RuntimeError):
    """The module cannot be compiled here."""


class Functional(nn.Module):
    """
    A module as a function of its own parameters and buffers too. As constants of a package they could not change: torch
    writes small ones into the code.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.hidden = (module,)  # in a tuple, which torch does not search for parameters
        self.names = list(tensors_of(module))

    def forward(self, tensors: list[torch.Tensor], *inputs: Any) -> torch.Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        return torch.func.functional_call(self.hidden[0], named, inputs)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


class Package:
    """A compiled forward pass of a module, with the module's present parameters and buffers."""

    def __init__(self, path: Path, module: nn.Module):
        """RuntimeError or OSError if the file is absent or damaged."""
        from torch._inductor import aoti_load_package  # imported late: it takes a second

        os.utime(path)  # the last use
        self.run = aoti_load_package(str(path)).loader.boxed_run
        self.module = module
        self.refresh()

    def refresh(self) -> None:
        """Must be called after tensors of the module were replaced by others. New values in place need no call."""
        self.tensors = list(tensors_of(self.module).values())

    def __call__(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The output. inputs: those of the module, with the tensors of lists in their place."""
        (output,) = self.run([*self.tensors, *inputs])
        return output


def load_or_compile(
    module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, *, name: str, sources: Iterable[Path]
) -> Package:
    """
    The compiled `module`, from the disk if this machine has compiled it before.

    inputs, dynamic_shapes: as for torch.export, not made in inference mode. Dimensions and strides that are equal in
    `inputs` may be taken for the same one. name: what the code depends on besides the dtypes and shapes of the module's
    tensors: its configuration, and which dimensions are dynamic. sources: the files that contain the module's code.
    CompileError if that fails.
    """
    facts = [name, hardware.cpu_name(), torch.__version__, str(torch.get_num_threads())]
    facts += [f"{key} {tensor.dtype} {tuple(tensor.shape)}" for key, tensor in tensors_of(module).items()]
    digest = hashlib.sha256("|".join(facts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = base_dir() / "compiled" / f"{digest.hexdigest()[:16]}.pt2"
    with suppress(OSError, RuntimeError, BadZipFile):  # absent or damaged: compile
        with ZipFile(path) as archive:
            is_damaged = archive.testzip() is not None  # torch does not compare checksums, and runs what is there
        if not is_damaged:
            return Package(path, module)
    with COMPILE_LOCK, tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / path.name
        try:
            compile_package(module, inputs, dynamic_shapes, new)
        except Exception as error:  # noqa: BLE001  torch, the C++ compiler and the disk raise errors of many types
            raise CompileError(f"{type(error).__name__}: {error}") from error
        with suppress(OSError):  # a base folder that cannot be written: compile again next time
            with atomic_path(path) as temporary:
                shutil.copyfile(new, temporary)
            remove_oldest(path.parent)
        return Package(new, module)


def compile_package(module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, path: Path) -> None:
    """Writes a package."""
    from torch._inductor import aoti_compile_and_package

    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        # Training on a CPU asks for deterministic algorithms. For writes of keys and values to distinct indices they
        # would be slower and change nothing.
        torch.use_deterministic_algorithms(False)
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = list(tensors_of(module).values())
            fixed: list[dict[int, Any]] = [{}] * len(tensors)
            shapes = (fixed, dynamic_shapes)
            program = torch.export.export(Functional(module), (tensors, *inputs), dynamic_shapes=shapes, strict=False)
            aoti_compile_and_package(program, package_path=str(path))
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def remove_oldest(folder: Path) -> None:
    """Removes the packages that were not used for the longest time."""
    with suppress(OSError):  # another process removes them too
        packages = sorted(folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime)
        for path in packages[:-MAX_PACKAGES]:
            path.unlink()
