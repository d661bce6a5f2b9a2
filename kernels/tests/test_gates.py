"""The compile report and the traffic count, in processes of their own, and the rules of packaging.

Triton decides at its first import whether the process interprets kernels or compiles them.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_proofs import kernel_report

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "torch-ext" / "sgfast_kernels"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, **variables: str) -> str:
    """Run Python from the repository's root. Return the output, or fail with the output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INT"))}
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode:
        pytest.fail(f"{' '.join(arguments)} exited {process.returncode}:\n{process.stdout}", pytrace=False)
    return process.stdout


def imports(folder: Path) -> Iterator[tuple[str, str]]:
    """Each file below a folder, with the top-level name of each absolute import in the file."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                yield str(path.relative_to(ROOT)), name.partition(".")[0]


@needs_triton
def test_kernels_compile_within_budget():
    run("-m", "benchmarks.kernel_report", "--check")


@needs_triton
def test_report_says_what_is_over_budget_and_what_changed():
    name = "hidden_forward bf16 4096"
    good = {"spills": 0, "float64": 0, "registers": 52, "vector_loads": 4}
    bad = {"spills": 2, "float64": 0, "registers": 90, "vector_loads": 0}
    assert kernel_report.over_budget({name: {"sm90": good, "gfx942": good}}) == []
    assert kernel_report.over_budget({name: {"sm90": bad}}) == [
        f"{name}, sm90: spills 2, budget 0",
        f"{name}, sm90: registers 90, budget 64",
        f"{name}, sm90: 0 16-byte loads, at least 4 wanted",
    ]
    name = "divergence_forward bf16 151936 kl [1]"
    thrifty, wasteful = (good | {"instructions_per_element": spent} for spent in (8.0, 99.9))
    assert kernel_report.over_budget({name: {"sm90": thrifty, "sm100": wasteful}}) == []
    assert kernel_report.over_budget({name: {"sm90": wasteful}}) == [
        f"{name}, sm90: 99.9 instructions per element, budget 12"
    ]
    assert kernel_report.over_budget({name.replace("[1]", "[2]"): {"sm90": wasteful}}) == []
    assert kernel_report.differences({name: {"sm90": good}}, {name: {"sm90": good}}) == []
    assert kernel_report.differences({name: {"sm90": good}, "new": {}}, {name: {"sm90": good | {"registers": 40}}}) == [
        f"{name}, sm90: registers 40 → 52",
        "new: not in the snapshot",
    ]


@needs_triton
def test_kernels_move_no_more_than_they_must():
    run("-m", "benchmarks.traffic")


def test_gpu_programme_without_a_gpu():
    assert "no GPU" in run("-m", "benchmarks.gpu", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")


FIND_KERNELS = "import importlib.util; spec = importlib.util.find_spec('kernels'); print(spec and spec.origin)"


def test_kernels_is_never_a_package_of_ours(tmp_path):
    # A package of that name would hide Hugging Face's, which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    origin = run("-c", FIND_KERNELS).strip()
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels")
    (tmp_path / "kernels").mkdir()
    installed = tmp_path / "kernels" / "__init__.py"
    installed.write_text("")
    assert run("-c", FIND_KERNELS, PYTHONPATH=str(tmp_path)).strip() == str(installed)


def test_kernels_import_nothing_but_torch_and_triton():
    for path, imported in imports(KERNELS):
        assert imported in {"torch", "triton"} | sys.stdlib_module_names, f"{path} imports {imported}"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("tests", {"benchmarks"}),
        ("benchmarks", {"tests"}),
        ("kernels", {"benchmarks", "kernels", "tests"}),
        ("sgfast", {"benchmarks", "kernel_proofs", "kernels", "tests"}),
    ],
)
def test_neither_of_tests_and_benchmarks_imports_the_other(folder, forbidden):
    found = list(imports(ROOT / folder))
    assert {imported for _, imported in found} >= {"torch"}
    assert [(path, imported) for path, imported in found if imported in forbidden] == []


def test_torch_implementations_need_neither_triton_nor_the_kernels():
    run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import sgfast, torch\n"
        "sgfast.ops.hidden_distances(torch.ones(2, 3), torch.ones(2, 3))\n"
        "assert 'sgfast_kernels' not in sys.modules",
    )
