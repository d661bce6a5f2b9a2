"""Imports run downwards: docs/architecture.md draws the floors, and no package imports from a floor above its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A package may import those on lower floors, and nothing else of the project.
FLOORS = (
    {"sgfast_kernels", "_version"},
    {"ops"},
    {"sides", "utils"},
    {"noise_layer"},
    {"model"},
    {"loss", "metrics"},
    {"huggingface"},
    {"client"},
    {"training", "benchmarking"},
    {"evaluation", "demo"},
    {"examples", "cli"},
    {"scripts", "__main__"},
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
PACKAGES = sorted({path.name.removesuffix(".py") for path in (ROOT / "sgfast").iterdir()} & FLOOR.keys())


def imported(path: Path) -> set[str]:
    """Names of the project's packages that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in found]
    return {name[1] if name[0] == "sgfast" and len(name) > 1 else name[0] for name in parts if "sgfast" in name[0]}


def sources(package: str) -> list[Path]:
    folder = ROOT / "sgfast" / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_package_has_a_floor():
    names = {
        path.stem for path in (ROOT / "sgfast").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names - {"__init__"} == FLOOR.keys() - {"sgfast_kernels"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_downwards(package):
    for path in sources(package):
        # sgfast itself has lazy names and `explain`: modules above every floor of operations may use them.
        above = {name for name in imported(path) - {package} if FLOOR.get(name, 0) >= FLOOR[package]}
        assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}"


def test_kernels_import_triton_torch_and_themselves():
    for path in sorted((ROOT / "kernels" / "torch-ext").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            foreign = {name.split(".")[0] for name in names} & {"sgfast", "tests", "benchmarks"}
            assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"
