"""The head of a causal language model as one matrix and one bias, with its adapters.

The head is read from a model of transformers, and the reading is checked against the model's own forward. A head with
a soft cap, with quantised weights or of an unknown kind is not one matrix: `plain_head_refusal` gives the reason.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgfast.model.head import language_model_head
from sgfast.sides import LinearLogits

# Rows of the check, and the tolerance of two products in different orders.
_CHECKED_ROWS, _CHECK_TOLERANCE = 3, 1e-3


class HeadWeights(NamedTuple):
    """The matrix (V, D) and the bias (V,) or None that a head applies in one forward pass, with their graph."""

    weight: Tensor
    bias: Tensor | None


class NotPlainError(ValueError):
    """Error of a head that is not one matrix. The message is the reason."""


def find_head(causal_lm: nn.Module) -> nn.Module:
    """Return the module that makes the logits of a model of transformers.

    Raises:
        NotPlainError: the model has none.
    """
    getter = getattr(causal_lm, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Module):
        raise NotPlainError(f"{type(causal_lm).__name__} has no head that can be read")
    return head


def head_weights(head: nn.Module) -> HeadWeights:
    """Return the weights that a head applies now: a linear layer, LoRA on one, or a trained copy (modules_to_save).

    Raises:
        NotPlainError: another kind of head, or adapters that are more than an added matrix.
    """
    if type(head).__name__ == "ModulesToSaveWrapper":
        wrapper: Any = head
        active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
        original = wrapper.disable_adapters or not active
        return head_weights(wrapper.original_module if original else wrapper.modules_to_save[active[0]])
    if hasattr(head, "lora_A") and hasattr(head, "get_delta_weight"):
        return _with_lora(head)
    # fully_shard makes a subclass of its own.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise NotPlainError(f"its head is a {type(head).__name__}, not a linear layer")
    return HeadWeights(head.weight, head.bias)


def _with_lora(head: Any) -> HeadWeights:
    base = head_weights(head.base_layer)
    if head.disable_adapters:
        if head.merged:
            raise NotPlainError("adapters are merged into its head and disabled")
        return base
    weight, bias = base
    for name in () if head.merged else head.active_adapters:
        if name not in head.lora_A:
            continue
        if name in head.lora_variant or getattr(head, "fan_in_fan_out", False):
            raise NotPlainError("its head has an adapter that is more than an added product")
        if getattr(head.lora_dropout[name], "p", 0.0) > 0:
            raise NotPlainError("its head has an adapter with dropout, which differs from position to position")
        # The product B·A is (V, D), made once for each forward pass.
        delta = head.lora_B[name].weight @ head.lora_A[name].weight
        weight = weight + (delta * head.scaling[name]).to(weight.dtype)
        if (added := head.lora_B[name].bias) is not None:
            bias = added * head.scaling[name] if bias is None else bias + added * head.scaling[name]
    return HeadWeights(weight, bias)


def plain_head_refusal(causal_lm: nn.Module) -> str | None:
    """Return the reason why a model's logits are not ``hidden @ weight.T + bias``; None if they are.

    The model's own forward, without its backbone, runs on a few random rows with its head and without it.
    """
    try:
        head = find_head(causal_lm)
        if "_hf_hook" in head.__dict__:
            return "the weights of its head are loaded for each call"
        weight, bias = head_weights(head)
    except NotPlainError as error:
        return str(error)
    if weight.is_meta or type(weight.detach()) not in (Tensor, nn.Parameter):
        return "the weights of its head are not in this process's memory as a whole"
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_CHECKED_ROWS, weight.shape[1], generator=generator).to(weight)
    try:
        run = language_model_head(causal_lm)
        with torch.no_grad():
            logits = run(hidden).float()
            with replaced_forward(head, lambda passed: passed):
                kept = run(hidden)
            if kept.shape != hidden.shape:
                return "its forward changes the hidden states after the head"
            expected = nn.functional.linear(kept, weight, bias).float()
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        return f"its forward without a backbone failed: {str(error).splitlines()[0]}"
    if not torch.allclose(logits, expected, rtol=0, atol=_CHECK_TOLERANCE * float(logits.abs().max())):
        return "its forward does more than one product and one scale, such as a soft cap"
    return None


def linear_logits(causal_lm: nn.Module, arguments: Mapping[str, Any]) -> LinearLogits:
    """Run a model with a plain head (see `plain_head_refusal`) up to the head.

    Raises:
        NotPlainError: the head has changed since the check.
    """
    head = find_head(causal_lm)
    weight, bias = head_weights(head)
    with replaced_forward(head, lambda hidden: hidden):
        hidden = causal_lm(**arguments).logits
    return LinearLogits(hidden, weight, bias)


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace a module's forward inside the block."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
