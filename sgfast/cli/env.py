"""Command ``sgfast env``: what a report of a fault must say about the machine and its packages."""

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from sgfast._version import __version__
from sgfast.benchmarking.environment import commit
from sgfast.ops.dispatch import explain
from sgfast.ops.divergence import divergences

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "typer",
    "matplotlib",
)
_VARIABLES = ("SGFAST_IMPL", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")


def run_env(*, as_json: bool) -> None:
    """Print the environment as lines or as JSON."""
    found = environment()
    if as_json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {'not installed' if value is None else value}")


def environment() -> dict[str, Any]:
    """Return versions (None: not installed), devices, the implementation that runs on each, and what sets it."""
    found: dict[str, Any] = {"sgfast": __version__, "commit": commit() or "an installed package"}
    found |= {"Python": platform.python_version(), "platform": platform.platform()}
    found |= {name: _version(name) for name in _PACKAGES}
    found["CUDA of torch"] = torch.version.cuda or "none: a build for CPUs"
    found["CPU"] = f"{os.cpu_count()} processors, {torch.get_num_threads()} threads of torch; {_implementation('cpu')}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            found[f"cuda:{index}"] = f"{properties.name}, {memory}; {_implementation(f'cuda:{index}')}"
    if torch.backends.mps.is_available():
        found["mps"] = f"Apple GPU; {_implementation('mps')}"
    return found | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _implementation(device: str) -> str:
    """Tell the implementation of `divergences` on a device. A choice that cannot run is part of the answer."""
    logits = torch.zeros(1, 8, device=device)
    try:
        choice = explain(divergences, logits, logits, "forward_kl")
    except (ValueError, RuntimeError) as error:
        return str(error)
    return f"runs {choice.implementation} ({choice.reason})"
