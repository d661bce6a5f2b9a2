"""Forward hooks that belong to the model that registered them, not to the module they are registered on."""

import weakref
from typing import Any

from torch import nn


class Hook:
    """A hook that neither keeps its owner alive nor follows the hooked module into copies and pickles."""

    def __init__(self, owner: nn.Module, method: str, *arguments: Any) -> None:
        self.owner: weakref.ref[nn.Module] | None = weakref.ref(owner)
        self.method = method
        self.arguments = arguments

    def __call__(self, *what_torch_passes: Any) -> Any:
        """Call the owner's method; None, which changes nothing, when there is no owner any more."""
        owner = self.owner() if self.owner is not None else None
        return getattr(owner, self.method)(*self.arguments, *what_torch_passes) if owner is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": None, "method": self.method, "arguments": self.arguments}


def hook_forward(owner: nn.Module, module: nn.Module, method: str, *arguments: Any) -> None:
    """Call ``owner.method(*arguments, module, inputs, output)`` after every forward of ``module``, while owner lives.

    Hook once, at construction: torch.compile does not see hooks that come later.
    """
    _drop_dead(module._forward_hooks)
    handle = module.register_forward_hook(Hook(owner, method, *arguments))
    weakref.finalize(owner, handle.remove)


def hook_arguments(owner: nn.Module, module: nn.Module, method: str, *arguments: Any) -> None:
    """Call ``owner.method(*arguments, module, positional, keywords)`` before every forward, as `hook_forward` does."""
    _drop_dead(module._forward_pre_hooks)
    handle = module.register_forward_pre_hook(Hook(owner, method, *arguments), with_kwargs=True)
    weakref.finalize(owner, handle.remove)


def _drop_dead(hooks: dict[int, Any]) -> None:
    """Forget the hooks that came into a copied module without their owner."""
    for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and hook.owner is None]:
        del hooks[key]
