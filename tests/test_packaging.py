"""
The wheel that `pip install .` builds contains every module and data file of the packages.

    python -m pytest tests/test_packaging.py
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanochat", "scripts", "tasks")
BUILD = "import sys, setuptools.build_meta; setuptools.build_meta.build_wheel(sys.argv[1])"


def source_files():
    """All files below the packages, relative to the repository."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_wheel_contains_every_module_and_data_file(tmp_path):
    setuptools = pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "copy"  # building leaves files beside the sources
    copy.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    environment = os.environ | {"PYTHONPATH": str(Path(setuptools.__file__).parent.parent)}
    build = [sys.executable, "-c", BUILD, tmp_path]
    done = subprocess.run(build, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert "nanochat/serve/ui.html" in packed
    assert not source_files() - packed
