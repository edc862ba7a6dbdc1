"""Compiling ahead of time: packages on the disk, and weights that change after compiling."""

import shutil

import pytest
import torch
import torch.nn as nn

from nanochat import aot, hardware

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hardware.can_compile(torch.device("cpu")), reason="needs a C++ compiler"),
]


SHAPES = ({0: torch.export.Dim.DYNAMIC},)


class Scaled(nn.Module):
    """A product with a weight, and with a scalar that torch would write into the code as a constant."""

    def __init__(self, scale: float):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor([scale]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


@pytest.fixture
def source(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    source = tmp_path / "source.py"
    source.write_text("version 1")
    return source


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "scaled.pt2"
    aot.compile_package(Scaled(1.0), (torch.zeros(5, 4),), SHAPES, path)
    return path


@pytest.fixture
def copies(compiled, monkeypatch):
    """Counts compilations, whose result is a copy: compiling takes seconds."""
    count = []

    def copy(module, inputs, shapes, path):
        count.append(path)
        shutil.copyfile(compiled, path)

    monkeypatch.setattr(aot, "compile_package", copy)
    return count


def load(module, source):
    return aot.load_or_compile(module, (torch.zeros(5, 4),), SHAPES, name="scaled", sources=[source])


def check(package, module):
    for rows in (2, 7):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(package([x]), module(x).detach())


def test_package_reads_the_present_weights(source, copies):
    module = Scaled(2.0)
    package = load(module, source)
    check(package, module)
    with torch.no_grad():
        module.scale.fill_(3.0)
    check(package, module)
    module.linear.weight = nn.Parameter(torch.randn(3, 4))
    package.refresh()
    check(package, module)


def test_package_is_compiled_once_per_version_of_the_source(source, copies):
    load(Scaled(1.0), source)
    other = Scaled(-1.0)
    check(load(other, source), other)
    assert len(copies) == 1
    source.write_text("version 2")
    load(other, source)
    assert len(copies) == 2


def test_package_that_is_damaged_is_compiled_again(source, copies, compiled):
    module = Scaled(2.0)
    load(module, source)
    (file,) = (source.parent / "compiled").iterdir()
    flipped = bytearray(compiled.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for content in (b"", compiled.read_bytes()[:1000], b"no archive", flipped):
        file.write_bytes(content)
        check(load(module, source), module)
        assert file.read_bytes() == compiled.read_bytes()


def test_packages_used_last_are_kept(source, copies, monkeypatch):
    monkeypatch.setattr(aot, "MAX_PACKAGES", 1)
    load(Scaled(1.0), source)
    source.write_text("version 2")
    load(Scaled(1.0), source)
    assert len(list((source.parent / "compiled").iterdir())) == 1


def test_base_folder_that_cannot_be_written_is_no_obstacle(source, copies):
    (source.parent / "compiled").write_text("a file in place of the folder")
    module = Scaled(2.0)
    check(load(module, source), module)


def test_module_that_cannot_be_compiled_is_an_error(source, monkeypatch):
    monkeypatch.setattr(aot, "compile_package", None)
    with pytest.raises(aot.CompileError, match="not callable"):
        load(Scaled(1.0), source)
