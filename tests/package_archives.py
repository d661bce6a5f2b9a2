"""Checks of the archives that `make package` wrote to the folder dist."""

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sgfast

ROOT = Path(__file__).parents[1]
NAME = f"sgfast-{sgfast.__version__}"
WHEEL, SOURCES = ROOT / f"dist/{NAME}-py3-none-any.whl", ROOT / f"dist/{NAME}.tar.gz"
WRITTEN_BY_SETUPTOOLS = ("PKG-INFO", "setup.cfg", "sgfast.egg-info/")
NOT_IN_SOURCES = (".ci/", ".gitignore")


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no clone")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def test_sources_are_what_git_tracks():
    with tarfile.open(SOURCES) as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    names = {name for name in names if not name.startswith(WRITTEN_BY_SETUPTOOLS)}
    assert names == {name for name in tracked() if not name.startswith(NOT_IN_SOURCES)}


def test_wheel_holds_the_two_packages_and_the_licence():
    names = set(zipfile.ZipFile(WHEEL).namelist())
    packages = {name.removeprefix("kernels/torch-ext/") for name in tracked()}
    packages = {name for name in packages if name.startswith(("sgfast/", "sgfast_kernels/"))}
    information = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    assert {"sgfast/py.typed", "sgfast/cli/main.py", "sgfast_kernels/divergence/forward.py"} <= packages
    assert names == packages | {f"{NAME}.dist-info/{name}" for name in information}


def test_metadata_of_the_wheel():
    with zipfile.ZipFile(WHEEL) as archive:
        metadata = Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())
    assert metadata["Version"] == sgfast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    without_extra = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert without_extra == ["torch>=2.11"]


def test_wheel_works_where_it_is_installed(tmp_path):
    """A divergence with a gradient, the device code and the command, from the installed files alone."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path / "installed", WHEEL], check=True)
    code = (
        "import sys; sys.path.insert(0, 'installed')\n"
        "import sgfast, sgfast_kernels, torch\n"
        "logits = torch.tensor([[0.0, 1.0]], requires_grad=True)\n"
        "loss = sgfast.DivergenceLoss('forward_kl')(logits, torch.tensor([[1.0, 0.0]]))\n"
        "loss.backward()\n"
        "print(sgfast.__file__, sgfast_kernels.__file__, round(loss.item(), 6), logits.grad.tolist()[0][1] > 0)\n"
        "import sgfast.cli.main\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    installed = (tmp_path / "installed").resolve()
    # KL((e, 1) / (1 + e) || (1, e) / (1 + e)) = (e - 1) / (e + 1)
    assert run.stdout.split() == [
        f"{installed}/sgfast/__init__.py",
        f"{installed}/sgfast_kernels/__init__.py",
        "0.462117",
        "True",
    ]
