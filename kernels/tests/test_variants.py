"""The folders of `make kernel-build`, loaded by Hugging Face's package `kernels`.

Tests run `kernels` in processes of their own: a process interprets kernels from its first import of Triton on.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
SOURCES = KERNELS / "torch-ext" / "sgfast_kernels"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "build"
    subprocess.run([sys.executable, KERNELS / "build_variants.py", folder], check=True, capture_output=True)
    return folder


def run(code: str, folder: Path) -> str:
    """Run Python where neither the repository nor an installed sgfast can be imported."""
    hidden = "import sys; sys.modules['sgfast'] = sys.modules['sgfast_kernels'] = None\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", hidden + code],
        cwd=folder,
        env=environment | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# A CPU-only PyTorch is taken for a CUDA build while `kernels` chooses a folder. Triton then interprets the kernels.
LOAD = """
import torch
from pathlib import Path
from kernels import get_local_kernel
version, torch.version.cuda = torch.version.cuda, "12.8"
sgfast_kernels = get_local_kernel(Path("{repository}"))
torch.version.cuda = version
"""


@needs_triton
def test_example_of_the_card_runs_on_the_local_build(build):
    """The card's example with the local folder and the CPU, against PyTorch's own divergence in float64."""
    card = (build / "CARD.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    calls = "".join(line for line in example.splitlines(keepends=True) if "kernels import" not in line)
    calls, replaced = re.subn(r"= get_kernel\(.*\)\n", "= sgfast_kernels\n", calls)
    assert replaced == 1
    output = run(
        LOAD.format(repository=build.parent)
        + calls.replace('device="cuda"', 'device="cpu"')
        + """
from torch.nn.functional import kl_div
p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
for value, first, second in ((forward_kl, p, q), (reverse_kl, q, p)):
    expected = kl_div(second, first, reduction="none", log_target=True).sum(-1)
    print(value.shape == (4, 8), float(((value - expected) / expected).abs().max()) < 1e-6)
print(sgfast_kernels.__name__, sgfast_kernels.__file__)
""",
        build.parent,
    )
    first, second, module = output.splitlines()
    assert first == second == "True True"
    name, file = module.split()
    assert Path(file) == build / "torch-cuda" / "__init__.py"
    assert name == json.loads((build / "torch-cuda" / "metadata.json").read_text())["id"]


@needs_triton
def test_noise_of_the_local_build_is_that_of_sgfast(build):
    """One folder named directly. The stream of a seed is fixed: its numbers stand here and in sgfast's own operator."""
    import sgfast

    output = run(
        f"import torch; from pathlib import Path; from kernels import get_local_kernel\n"
        f"kernel = get_local_kernel(Path({str(build / 'torch-rocm')!r}))\n"
        f"print(kernel.standard_normal(torch.tensor([7]), (5,), 0, torch.float32).tolist())\n",
        build,
    )
    assert json.loads(output) == pytest.approx(sgfast.ops.standard_normal((5,), 7).tolist(), abs=1e-6)


def test_folders_hold_the_device_code_and_nothing_else(build):
    assert {entry.name for entry in build.iterdir()} == {"CARD.md", "torch-cuda", "torch-rocm", "torch-xpu"}
    sources = {str(file.relative_to(SOURCES)): file.read_bytes() for file in SOURCES.rglob("*.py")}
    for backend in ("cuda", "rocm", "xpu"):
        variant = build / f"torch-{backend}"
        files = {str(file.relative_to(variant)): file.read_bytes() for file in variant.rglob("*") if file.is_file()}
        metadata = json.loads(files.pop("metadata.json"))
        assert files == sources
        assert metadata["backend"] == {"type": backend}
        assert metadata["license"] == "Apache-2.0"


def test_build_toml_is_of_the_newest_edition(build):
    """`kernels` parses the file, and would print a warning for a former edition."""
    code = f"from kernels._rust import Build; print(Build.open({str(KERNELS)!r}).general)"
    process = subprocess.run([sys.executable, "-c", code], cwd=build, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "General(backends=[Cuda, Rocm, Xpu])\n", "")


def test_card_names_every_public_function():
    exported = set(re.findall(r'^    "([a-z_]+)",$', (SOURCES / "__init__.py").read_text(), flags=re.M))
    named = set(re.findall(r"`([a-z_]+)`", (KERNELS / "CARD.md").read_text()))
    assert exported <= named
    assert len(exported) == 15
