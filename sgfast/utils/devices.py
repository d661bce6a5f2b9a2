"""Devices that a user names: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""

import os
import re

import torch

from sgfast.ops.validation import did_you_mean

_NAMES = ("auto", "cpu", "cuda", "mps")
# PyTorch has fewer devices than this. A larger number would overflow its type.
_MOST_DIGITS = 2


def check_device_name(name: str, source: str = "device") -> str:
    """Check that a name is one of a device, whether this machine has the device or not, and return the name.

    Raises:
        ValueError: the name is none of a device. The message names ``source``.

    Example:
        >>> check_device_name("cuda:1")
        'cuda:1'
    """
    if name not in _NAMES and not re.fullmatch(rf"cuda:[0-9]{{1,{_MOST_DIGITS}}}", name):
        suggestion = did_you_mean(name, _NAMES)
        raise ValueError(f"{source} must be auto, cpu, cuda, cuda:N or mps; got {name[:100]!r}{suggestion}")
    return name


def find_device(name: str = "auto", source: str = "--device") -> torch.device:
    """Return the device of this process.

    ``auto`` takes a GPU of CUDA if there is one, else the CPU. Among several processes (torchrun), ``auto`` and
    ``cuda`` give every process its own GPU.

    Args:
        name: name of the device.
        source: option or setting that holds the name, for the errors.

    Raises:
        ValueError: the name is none of a device, this machine does not have the device, or a numbered GPU is asked for
            by one of several processes.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    check_device_name(name, source)
    kind, _, number = name.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{source} mps: PyTorch finds no Apple GPU here")
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"{source} {name}: PyTorch finds no CUDA GPU here")
    if not number:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    if int(number) >= count:
        found = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"{source} {name}: PyTorch finds {found} here")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{source} {name}: each of several processes takes its own GPU; give cuda")
    return torch.device("cuda", int(number))
