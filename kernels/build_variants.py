"""Build the folders that Hugging Face's package `kernels` loads: `python kernels/build_variants.py [FOLDER]`.

The device code is Python, so that a build is a copy of ``torch-ext/sgfast_kernels`` for each backend of ``build.toml``,
with a file ``metadata.json``, and the card with its placeholders filled in. FOLDER is ``kernels/build`` by default:

    build/CARD.md
    build/torch-cuda/__init__.py, metadata.json, divergence/, ...
    build/torch-rocm/, build/torch-xpu/   the same

``kernels.get_local_kernel(Path("kernels"))`` loads the folder of the machine's backend. A publisher runs Hugging Face's
`kernel-builder`, which reads the same ``build.toml`` and ``CARD.md``.
"""

import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

from jinja2 import Template

FOLDER = Path(__file__).parent
MODULE = "sgfast_kernels"
SOURCES = FOLDER / "torch-ext" / MODULE


def build_variants(target: Path) -> list[Path]:
    """Write the folders of all backends, in place of former ones, and the card. Return the backends' folders."""
    general = tomllib.loads((FOLDER / "build.toml").read_text())["general"]
    variants = [_write_variant(target, backend, general) for backend in general["backends"]]
    (target / "CARD.md").write_text(card(general))
    return variants


def card(general: dict) -> str:
    """Return the card with the values of ``build.toml``, as `kernel-builder` fills it in."""
    repository = general.get("hub", {}).get("repo-id", "{repo_id}")
    return Template((FOLDER / "CARD.md").read_text(), trim_blocks=True, keep_trailing_newline=True).render(
        repo_id=repository, license=general["license"]
    )


def _write_variant(target: Path, backend: str, general: dict) -> Path:
    variant = target / f"torch-{backend}"
    if variant.exists():
        shutil.rmtree(variant)
    shutil.copytree(SOURCES, variant, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    metadata = {
        "name": general["name"],
        # The name of the module in Python. Two versions of the kernels can be loaded side by side.
        "id": f"_{MODULE}_{backend}_{_digest(SOURCES)[:7]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def _digest(folder: Path) -> str:
    sources = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / "build"
    for folder in build_variants(target):
        print(folder)
