"""Fast, exact, memory-bounded losses and metrics for privacy transforms and distilled language models."""

import importlib
from typing import TYPE_CHECKING, Any

from sgfast import loss, metrics, model, noise_layer, ops
from sgfast._version import __version__
from sgfast.ops.dispatch import explain, use_impl

if TYPE_CHECKING:
    from sgfast.loss import DivergenceLoss
    from sgfast.ops import divergences

__all__ = [
    "DivergenceLoss",
    "__version__",
    "divergences",
    "explain",
    "loss",
    "metrics",
    "model",
    "noise_layer",
    "ops",
    "use_impl",
]

# The most used names, each with the module that exports it. The module is imported when the name is asked for.
_MODULES = {"DivergenceLoss": "sgfast.loss", "divergences": "sgfast.ops"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
