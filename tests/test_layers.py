"""Across modules: imports go downward, private names stay in their module, importing is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import fusedshape

PACKAGE = Path(fusedshape.__file__).parent
# From the bottom up: a module may import from its own layer's package and from lower layers.
LAYERS = [
    {"validate", "compiling", "columns", "haar"},
    {"activations", "kinds", "windows", "files", "interrupts", "loading", "shell"},
    {"spec", "torch_ops"},
    {"undo", "nodes"},
    {"guard"},
    {"proxies"},
    {"reference", "native", "timing", "tracing"},
    {"kernels", "faithful", "portable", "sums"},
    {"theory"},
    {"ops"},
    {"init", "rewriting"},
    {"nn"},
    {"tuning"},
    {"machine"},
    {"diagnose"},
    {"convert", "fold"},
    {"explain", "shortcuts", "tap", "unfuse"},
    {"models"},
    {"train"},
    {"bench"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """First components, below fusedshape, of what a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "fusedshape":
                names = [f"fusedshape.{alias.name}" for alias in node.names]
            else:
                names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "fusedshape":
                first = rest.partition(".")[0]
                found.add(first if first in RANK else "__init__")
    return found


def test_imports_go_downward() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 15
    for path in files:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        assert own in RANK, f"{path} has no layer: give it one in LAYERS and in ARCHITECTURE.md"
        for name in imported(path) - {own}:
            assert RANK[name] < RANK[own], f"{path} imports {name}, which stands above it"


def private_uses(source: str, modules: set[str]) -> list[str]:
    """Names with a leading underscore that a file takes from other modules of the package."""
    tree = ast.parse(source)
    found, known = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusedshape"):
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.endswith("__"):
                    found.append(f"{node.module}.{alias.name}")
                if f"{node.module}.{alias.name}" in modules:
                    known.add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            known |= {alias.asname or alias.name for alias in node.names if alias.name in modules}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in known:
            private = node.attr.startswith("_") and not node.attr.endswith("__")
            found += [f"{ast.unparse(node.value)}.{node.attr}"] if private else []
    return found


def test_no_private_name_crosses_a_module() -> None:
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__") for name in files}
    for path in files.values():
        assert not private_uses(path.read_text(), modules), path


def test_private_names_are_found() -> None:
    source = """
import fusedshape.native, torch
from fusedshape.kernels import conv, gemm as product
from fusedshape.spec import ActSpec, _check
torch._C, conv.__name__, conv._plan, ActSpec._fields, product._plan, fusedshape.native._load
"""
    modules = {"fusedshape.native", "fusedshape.kernels.conv", "fusedshape.kernels.gemm"}
    want = ["fusedshape.spec._check", "conv._plan", "product._plan", "fusedshape.native._load"]
    assert sorted(private_uses(source, modules)) == sorted(want)


def test_the_picture_of_the_architecture_has_every_module() -> None:
    picture = (PACKAGE.parent / "ARCHITECTURE.md").read_text().split("```")[1]
    words = set(re.findall(r"[a-z_]+", picture))
    assert {name for name in RANK if not name.startswith("__")} - words == set()


def test_architecture_names_every_module() -> None:
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert path.name in text, f"ARCHITECTURE.md does not mention {path.name}"


def test_import_is_quiet_and_light() -> None:
    code = (
        "import sys, torch; import fusedshape; "
        "heavy = [m for m in ('triton', 'scipy', 'matplotlib', 'sklearn') if m in sys.modules]; "
        "print(heavy, torch.cuda.is_initialized())"
    )
    # torch itself may have brought Triton in; what counts is what fusedshape adds.
    base = "import sys, torch; print([m for m in ('triton',) if m in sys.modules])"
    before, after = (
        subprocess.run([sys.executable, "-W", "error", "-c", c], capture_output=True, text=True)
        for c in (base, code)
    )
    assert after.returncode == 0, after.stderr
    assert after.stderr == ""
    assert after.stdout.split(" False")[0].strip() == before.stdout.strip()
