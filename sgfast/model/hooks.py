"""Forward hooks that live as long as the model that registered them, not as long as the hooked module."""

import weakref
from typing import Any

from torch import nn


class Hook:
    """Hook that does not keep its owner alive. In copies and pickles of the hooked module the hook does nothing."""

    def __init__(self, owner: nn.Module, method: str, *arguments: Any) -> None:
        self.owner: weakref.ref[nn.Module] | None = weakref.ref(owner)
        self.method = method
        self.arguments = arguments

    def __call__(self, *what_torch_passes: Any) -> Any:
        """Call the owner's method. Return None, which changes nothing, if the owner no longer exists."""
        owner = self.owner() if self.owner is not None else None
        return getattr(owner, self.method)(*self.arguments, *what_torch_passes) if owner is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": None, "method": self.method, "arguments": self.arguments}


def hook_forward(owner: nn.Module, module: nn.Module, method: str, *arguments: Any) -> None:
    """Call ``owner.method(*arguments, module, inputs, output)`` after every forward of ``module``, while owner lives.

    Register hooks once, at construction: torch.compile does not see hooks that are added later.
    """
    _drop_dead(module._forward_hooks)
    handle = module.register_forward_hook(Hook(owner, method, *arguments))
    weakref.finalize(owner, handle.remove)


def hook_arguments(owner: nn.Module, module: nn.Module, method: str, *arguments: Any) -> None:
    """Call ``owner.method(*arguments, module, positional, keywords)`` before every forward, while owner lives."""
    _drop_dead(module._forward_pre_hooks)
    handle = module.register_forward_pre_hook(Hook(owner, method, *arguments), with_kwargs=True)
    weakref.finalize(owner, handle.remove)


def _drop_dead(hooks: dict[int, Any]) -> None:
    """Remove hooks without an owner, which a copied module has from its original."""
    for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and hook.owner is None]:
        del hooks[key]
