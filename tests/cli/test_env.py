"""``sgfast --version`` and ``sgfast env``."""

import importlib.metadata
import json
import platform

import pytest
import torch

import sgfast
from sgfast.cli.main import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code
    return capsys.readouterr().out


def test_version(capsys):
    assert run(capsys, "--version") == f"sgfast {sgfast.__version__}\n"


def test_versions_devices_and_implementation(capsys, monkeypatch):
    monkeypatch.setenv("SGFAST_IMPL", "torch")
    found = json.loads(run(capsys, "env", "--json"))
    assert found["sgfast"] == sgfast.__version__
    assert found["Python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == importlib.metadata.version("transformers")
    assert found["SGFAST_IMPL"] == "torch"
    assert "runs torch (SGFAST_IMPL=torch)" in found["CPU"]
    lines = run(capsys, "env").splitlines()
    assert [line.split()[0] for line in lines] == [name.split()[0] for name in found]


def test_what_is_missing_or_wrong_is_part_of_the_answer(capsys, monkeypatch):
    monkeypatch.setenv("SGFAST_IMPL", "tritn")
    version = importlib.metadata.version

    def without_triton(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_triton)
    lines = run(capsys, "env").splitlines()
    assert "triton not installed" in [" ".join(line.split()) for line in lines]
    assert any(line.startswith("CPU") and "Did you mean 'triton'?" in line for line in lines)
