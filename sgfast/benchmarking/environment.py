"""The environment of a measurement: device, versions, date and commit."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from sgfast._version import __version__

_CHECKOUT = Path(__file__).parents[2]
_LIBRARIES = ("torch", "triton", "transformers", "liger-kernel", "textbrewer")


def environment(device: str) -> dict[str, Any]:
    """Return the device, its threads (CPU), versions, the date in UTC, and the commit if this is a checkout."""
    on_cpu = torch.device(device).type == "cpu"
    return {
        "device": _processor() if on_cpu else torch.cuda.get_device_name(device),
        "kind": torch.device(device).type,
        "threads": torch.get_num_threads() if on_cpu else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "sgfast": __version__,
        **{name: _installed(name) for name in _LIBRARIES},
    }


def statement(environment: dict[str, Any]) -> str:
    """Describe the environment in words, and say what its figures are good for."""
    threads = environment["threads"]
    where = environment["device"] + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")
    versions = [f"{name} {environment[name]}" for name in ("sgfast", *_LIBRARIES) if environment.get(name)]
    text = f"{where}; {', '.join(versions)}; {environment['date'][:10]}"
    text += f", commit {environment['commit']}." if environment["commit"] else "."
    if environment["kind"] == "cpu":
        text += " Times on a CPU are good for ratios within one run; they say nothing about a GPU."
    return text


def commit() -> str | None:
    """Return the checkout's commit, with ``+changes`` if code differs from it; None for an installed package."""
    if not (_CHECKOUT / ".git").exists():
        return None
    head = _git("rev-parse", "--short=10", "HEAD")
    return head and head + ("+changes" if _git("status", "--porcelain", "--", "*.py") else "")


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", *arguments], cwd=_CHECKOUT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the CPU's name. Linux has the name in a file, other systems tell Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
