"""
The architecture as tests: which layer may import which, what happens at import, which packages must be declared, and
what every script must offer.

    python -m pytest tests/test_layers.py
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each layer may import itself and the layers below it.
MAY_IMPORT = {
    "scripts": {"scripts", "tasks", "nanochat"},
    "tasks": {"tasks", "nanochat"},
    "nanochat": {"nanochat"},
}
SUB_PACKAGES_OF_THE_CORE = {"kernels"}  # that nanochat/*.py may import
MAY_USE_TORCH_DISTRIBUTED = {"nanochat/distributed.py", "nanochat/muon.py", "nanochat/sharding.py"}

# Statements that a module may have at its top level, besides docstrings, a main guard and imports for types.
DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)
# Names that a top-level assignment may not use: their values depend on the process or the machine.
ENVIRONMENT = {"sys.argv", "os.environ", "os.getenv", "open", "torch.device", "torch.cuda.is_available", "base_dir"}

# Where the name of a module differs from that of its package.
PACKAGE_OF = {
    "PIL": "pillow",
    "flash_attn": "flash-attn-4",
    "flash_attn_interface": "flash-attn-3",
    "mlflow": "mlflow-skinny",
    "yaml": "pyyaml",
}

MODULES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for layer in MAY_IMPORT
    for path in sorted((ROOT / layer).rglob("*.py"))
    if path.parent.name != "hf_files"  # modules of exported models: transformers imports them, this package does not
}


def imports(tree):
    """(module, line) of every import, including those inside functions; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: use absolute imports"
            yield node.module, node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def all_imports():
    """(file, line, module) of every import in the repository."""
    for name, tree in MODULES.items():
        for module, line in imports(tree):
            yield name, line, module


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_import_for_types(node):
    """`if TYPE_CHECKING:` with nothing but imports inside."""
    is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse
    return is_guard and all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body)


# ---- imports ----


def test_layers_import_only_downwards():
    wrong = []
    for name, line, module in all_imports():
        layer, imported = name.split("/")[0], module.split(".")[0]
        if imported in MAY_IMPORT and imported not in MAY_IMPORT[layer]:
            wrong.append(f"{name}:{line} imports {module}")
    assert not wrong


def test_flat_core_imports_no_sub_package_but_kernels():
    sub_packages = {path.parent.name for path in (ROOT / "nanochat").glob("*/__init__.py")}
    forbidden = {f"nanochat.{package}" for package in sub_packages - SUB_PACKAGES_OF_THE_CORE}
    wrong = []
    for name, line, module in all_imports():
        is_core = re.fullmatch(r"nanochat/\w+\.py", name)
        if is_core and ".".join(module.split(".")[:2]) in forbidden:
            wrong.append(f"{name}:{line} imports {module}")
    assert not wrong


def test_only_modules_for_many_ranks_use_torch_distributed():
    wrong = [f"{name}:{line}" for name, line, module in all_imports() if module.startswith("torch.distributed")]
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed."):
                wrong.append(f"{name}:{node.lineno}")
    assert {place.split(":")[0] for place in wrong} <= MAY_USE_TORCH_DISTRIBUTED


def declared_packages():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_third_party_import_is_declared_in_pyproject():
    known = declared_packages() | set(MAY_IMPORT)
    wrong = []
    for name, line, module in all_imports():
        top = module.split(".")[0]
        if top not in sys.stdlib_module_names and PACKAGE_OF.get(top, top).lower().replace("_", "-") not in known:
            wrong.append(f"{name}:{line} imports {top}")
    assert not wrong


# ---- modules ----


# Sets an environment variable, as it has to be set before torch is loaded.
ACTS_ON_IMPORT = {"scripts/__init__.py"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - ACTS_ON_IMPORT))
def test_import_only_defines(name):
    for node in MODULES[name].body:
        allowed = isinstance(node, DEFINITIONS) or is_docstring(node) or is_main_guard(node)
        assert allowed or is_import_for_types(node), f"{name}:{node.lineno}"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            used = {ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Name | ast.Attribute)}
            assert not used & ENVIRONMENT, f"{name}:{node.lineno}: {used & ENVIRONMENT} at import"


@pytest.mark.parametrize("name", MODULES)
def test_no_function_changes_a_global(name):
    assert not [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, ast.Global)]


def commands():
    """(file, command) of every module that is run from the command line."""
    for name in MODULES:
        path = Path(name)
        if path.name in ("__init__.py", "__main__.py"):
            continue
        if path.parent.as_posix() == "scripts":
            yield name, f"python -m scripts.{path.stem}"
        if path.parent.as_posix() == "scripts/bench" and any(is_main_guard(node) for node in MODULES[name].body):
            yield name, f"python -m scripts.bench {path.stem}"


@pytest.mark.parametrize("name, command", list(commands()))
def test_script_can_be_run_and_shows_its_command(name, command):
    assert command in (ast.get_docstring(MODULES[name]) or ""), f"{name}: no command to paste"
    assert any(is_main_guard(node) for node in MODULES[name].body), f"{name}: no main guard"
