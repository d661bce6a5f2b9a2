"""What importing sgfast needs, and what it must not do."""

import subprocess
import sys
from pathlib import Path

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
        "import sgfast\n"
        "assert not {'DivergenceLoss', 'divergences'} & set(vars(sgfast))\n"
        "assert {'DivergenceLoss', 'divergences'} <= set(dir(sgfast)) & set(sgfast.__all__)\n"
        "from sgfast import DivergenceLoss, divergences\n"
        "print(DivergenceLoss is sgfast.loss.DivergenceLoss, divergences is sgfast.ops.divergences)\n"
        "try:\n"
        "    sgfast.DivergenceLos\n"
        "except AttributeError as error:\n"
        "    print(error)\n"
    )
    assert output == "True True\nmodule 'sgfast' has no attribute 'DivergenceLos'\n"


def test_sgfast_imports_no_heavy_library():
    heavy = "{'transformers', 'triton', 'matplotlib', 'safetensors', 'typer', 'rich', 'peft'}"
    assert run(f"import sys, sgfast\nprint(sorted({heavy} & set(sys.modules)))") == "[]\n"
