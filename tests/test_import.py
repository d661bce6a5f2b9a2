"""What importing sgfast needs, and what it must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgfast

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_sgfast_needs_torch_alone():
    """Everything optional is made unimportable; the operations still run."""
    output = run(
        "import sys\n"
        "for name in ('triton', 'transformers', 'peft', 'safetensors', 'typer', 'rich', 'matplotlib', 'numpy',\n"
        "             'accelerate', 'tokenizers', 'gguf', 'sgfast_kernels'):\n"
        "    sys.modules[name] = None\n"
        "import torch, sgfast\n"
        "logits = torch.zeros(2, 5)\n"
        "sgfast.ops.standard_normal((2,), 0)\n"
        "print(sgfast.ops.divergences(logits, logits, 'jeffreys')['jeffreys'].tolist())\n"
        "print(sgfast.explain(sgfast.ops.divergences, logits, logits, 'jeffreys'))\n"
    )
    assert output.startswith("[0.0, 0.0]\n")
    assert "implementation='torch'" in output


def test_what_most_people_come_for_is_at_the_top():
    output = run(
        "import sgfast, sys, traceback\n"
        "later = set(sgfast._MODULES)\n"
        "assert {'SgtTrainer', 'TokenizerWrapper', 'StainedGlassTransformForText'} <= later\n"
        "assert not later & set(vars(sgfast)) and later <= set(dir(sgfast)) & set(sgfast.__all__)\n"
        "for name in sorted(set(sgfast.__all__) - later):\n"
        "    exec(f'from sgfast import {name}')\n"
        "assert not {'transformers', 'sgfast.client', 'sgfast.huggingface'} & set(sys.modules)\n"
        "from sgfast import DivergenceLoss, StainedGlassTransformForText, TokenizerWrapper, divergences\n"
        "print(DivergenceLoss is sgfast.loss.DivergenceLoss, divergences is sgfast.ops.divergences)\n"
        "import sgfast.client, sgfast.huggingface\n"
        "print(StainedGlassTransformForText is sgfast.client.StainedGlassTransformForText)\n"
        "print(TokenizerWrapper is sgfast.huggingface.TokenizerWrapper)\n"
        "try:\n"
        "    sgfast.DivergenceLos\n"
        "except AttributeError as error:\n"
        "    print(traceback.format_exc().splitlines()[-1])\n"
    )
    assert output == (
        "True True\nTrue\nTrue\n"
        "AttributeError: module 'sgfast' has no attribute 'DivergenceLos'. "
        "Did you mean 'DivergenceLoss' or 'divergences'?\n"
    )


def test_everyday_names_are_those_that_their_packages_export():
    """Every name of the packages that a new user would look for at the top, one object in both places."""
    for package, count in ((sgfast.ops, 7), (sgfast.loss, 7), (sgfast.model, 3), (sgfast.noise_layer, 7)):
        shared = [name for name in package.__all__ if name in sgfast.__all__ and name != "divergences"]
        assert len(shared) == count
        assert all(getattr(sgfast, name) is getattr(package, name) for name in shared)
    assert sgfast.UtilityMetrics is sgfast.metrics.UtilityMetrics
    assert sgfast.PrivacyMetrics is sgfast.metrics.PrivacyMetrics


def test_trainer_at_the_top():
    from sgfast.huggingface.trainer import SgtTrainer

    assert sgfast.SgtTrainer is sgfast.huggingface.SgtTrainer is SgtTrainer
    assert "SgtTrainer" in dir(sgfast.huggingface)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = sgfast.huggingface.Trainer


def test_a_missing_library_is_named_with_its_extra():
    output = run(
        "import sys\n"
        "sys.modules['accelerate'] = None\n"
        "try:\n"
        "    from sgfast import SgtTrainer\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    assert output == "SgtTrainer needs accelerate: pip install 'sgfast[trainer]'\n"


def test_type_checkers_see_the_names_that_come_later():
    """The imports that type checkers read are those that run when a name is asked for."""
    tree = ast.parse((ROOT / "sgfast" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: statement.module for statement in block.body for name in statement.names}
    assert seen == sgfast._MODULES


def test_a_call_of_the_module_names_the_function():
    logits = torch.zeros(2, 5)
    with pytest.raises(TypeError, match=r"is a module .* call sgfast\.ops\.divergences"):
        sgfast.loss.divergences(logits, logits, "forward_kl")
    compiled = torch.compile(
        lambda one, other: sgfast.loss.divergences.jeffreys_divergence(one, other), fullgraph=True, backend="eager"
    )
    assert compiled(logits, logits).tolist() == [0.0, 0.0]


def test_sgfast_imports_no_heavy_library():
    heavy = "{'transformers', 'triton', 'matplotlib', 'safetensors', 'typer', 'rich', 'peft'}"
    assert run(f"import sys, sgfast\nprint(sorted({heavy} & set(sys.modules)))") == "[]\n"
