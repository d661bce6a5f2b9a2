"""The head of a causal language model as a function from final hidden states to logits, a few rows at a time."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sgfast.model.decoder import backbone_of, causal_lm_of


class _BackboneOutput:
    """A backbone's output that holds hidden states and nothing else."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _PassThrough(nn.Module):
    """Replaces the backbone and returns its input embeddings."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _BackboneOutput:
        return _BackboneOutput(inputs_embeds)


def language_model_head(base_model: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from final hidden states (n, D), after the final norm, to logits (n, V).

    The function runs the model's own forward without the backbone. The family's own steps (a bias, Gemma's soft cap,
    Cohere's and Granite's scales, adapters on the head) therefore run as in the model. The model shares its modules
    with the function and is not changed.

    Args:
        base_model: a Hugging Face causal language model, or a PEFT model around one.

    Raises:
        ValueError: the model has no backbone.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from sgfast.metrics import language_model_head
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(
        ...         vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ...     )
        ... )
        >>> ids = torch.arange(4)[None]
        >>> hidden = model.model(input_ids=ids).last_hidden_state
        >>> torch.allclose(language_model_head(model)(hidden[0]), model(input_ids=ids).logits[0], atol=1e-6)
        True
    """
    causal_lm, backbone = causal_lm_of(base_model), backbone_of(base_model)
    names = [name for name, child in causal_lm.named_children() if child is backbone]
    if not names:
        raise ValueError(f"{type(causal_lm).__name__} does not hold its backbone as a direct submodule")
    without_backbone = copy.copy(causal_lm)
    without_backbone._modules = causal_lm._modules | {names[0]: _PassThrough()}
    # A forward in the instance (accelerate puts one there) is bound to the model with its backbone.
    without_backbone.__dict__.pop("forward", None)

    def head(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, without_backbone(inputs_embeds=hidden[None], use_cache=False).logits[0])

    return head
