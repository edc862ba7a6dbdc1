"""
The architecture as a test: who may import whom, what importing may do, how long a module may be, and that every
package that is imported is one that is declared.

    python -m pytest tests/test_layers.py
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    "nanochat",
    "tasks",
    "scripts",
)  # from the bottom: each may import itself and what is below
IMPORTABLE = {"nanochat": {"nanochat"}, "tasks": {"nanochat", "tasks"}, "scripts": {"nanochat", "tasks", "scripts"}}
MAY_SEE_FROM_THE_CORE = {"kernels"}  # of nanochat's sub-packages
TOUCH_TORCH_DISTRIBUTED = {"nanochat/distributed.py", "nanochat/muon.py"}
DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)
ENVIRONMENT = {"sys.argv", "os.environ", "os.getenv", "open", "torch.device", "torch.cuda.is_available", "base_dir"}
PACKAGE_OF = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
}  # where module and package differ

MODULES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
}


def layer_of(name):
    return name.split("/")[0]


def imports(tree):
    """(module, line) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: say the whole name of what is imported"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_for_types(node):
    """`if TYPE_CHECKING:` and nothing but imports in it."""
    is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse
    return is_guard and all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body)


def test_imports_point_down():
    wrong = [
        f"{name}:{line} imports {module}"
        for name, tree in MODULES.items()
        for module, line in imports(tree)
        if module.split(".")[0] in LAYERS and module.split(".")[0] not in IMPORTABLE[layer_of(name)]
    ]
    assert not wrong


def test_the_flat_core_needs_no_sub_package_but_kernels():
    packages = {path.parent.name for path in (ROOT / "nanochat").glob("*/__init__.py")} - MAY_SEE_FROM_THE_CORE
    wrong = [
        f"{name}:{line} imports {module}"
        for name, tree in MODULES.items()
        if re.fullmatch(r"nanochat/\w+\.py", name)
        for module, line in imports(tree)
        if module.startswith("nanochat.") and module.split(".")[1] in packages
    ]
    assert not wrong


def test_only_two_modules_touch_torch_distributed():
    wrong = [
        f"{name}:{line}"
        for name, tree in MODULES.items()
        for module, line in imports(tree)
        if module.startswith("torch.distributed") and name not in TOUCH_TORCH_DISTRIBUTED
    ]
    wrong += [
        f"{name}:{node.lineno}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed.")
        if name not in TOUCH_TORCH_DISTRIBUTED
    ]
    assert not wrong


@pytest.mark.parametrize("name", MODULES)
def test_importing_defines_and_does_nothing_else(name):
    for node in MODULES[name].body:
        defines = isinstance(node, DEFINITIONS) or is_docstring(node) or is_main_guard(node) or is_for_types(node)
        assert defines, f"{name}:{node.lineno}"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            found = {ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Name | ast.Attribute)}
            assert not found & ENVIRONMENT, f"{name}:{node.lineno}: {found & ENVIRONMENT} at import"


@pytest.mark.parametrize("name", MODULES)
def test_no_function_changes_a_global(name):
    assert not [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, ast.Global)]


def declared_packages():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_third_party_import_is_declared():
    known = declared_packages() | set(LAYERS)
    undeclared = {
        f"{name}:{line} imports {top}"
        for name, tree in MODULES.items()
        for module, line in imports(tree)
        if (top := module.split(".")[0]) not in sys.stdlib_module_names
        if PACKAGE_OF.get(top, top).lower().replace("_", "-") not in known
    }
    assert not undeclared


def test_every_script_can_be_run_and_says_how():
    for name, tree in MODULES.items():
        if Path(name).parent.as_posix() == "scripts" and not name.endswith("__init__.py"):
            command = f"python -m scripts.{Path(name).stem}"
            assert command in (ast.get_docstring(tree) or ""), f"{name}: no command to paste"
            assert any(is_main_guard(node) for node in tree.body), f"{name}: no main guard"
