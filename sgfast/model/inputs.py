"""What callers give a noisy language model, checked and completed; and the state of one forward."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.model.capture import Transform
from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.utils.positions import position_ids_of


class Inputs(NamedTuple):
    """A batch: the base model's arguments, and masks (B, T) bool."""

    arguments: dict[str, Any]
    attended: Tensor
    selected: Tensor  # to be transformed


def prepare_inputs(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    noise_mask: Tensor | None,
    others: Mapping[str, Any],
    known: frozenset[str],
) -> Inputs:
    """Check a batch and complete it: masks, position ids from the attention mask, no cache.

    Args:
        input_ids: (B, T), or None with ``inputs_embeds`` among ``others``.
        attention_mask: (B, T) or None.
        noise_mask: (B, T) or None.
        others: further arguments; what is not ``known`` is dropped.
        known: names of the base model's arguments.
    """
    arguments = {name: value for name, value in others.items() if name in known}
    inputs_embeds = arguments.pop("inputs_embeds", None)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    shape = inputs_embeds.shape[:2] if input_ids is None else input_ids.shape
    device = inputs_embeds.device if input_ids is None else input_ids.device
    if len(shape) != 2:
        raise ValueError(f"the tokens must be (batch, length); got shape {tuple(shape)}")
    if arguments.get("past_key_values") is not None:
        raise ValueError("past_key_values cannot be given: the clean and the noisy pass would share one cache")
    for name, mask in (("attention_mask", attention_mask), ("noise_mask", noise_mask)):
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None; got {type(mask).__name__}")
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{name} must have the shape of the tokens, {tuple(shape)}; got {tuple(mask.shape)}")
    everything = torch.ones(shape, dtype=torch.bool, device=device)
    attended = everything if attention_mask is None else attention_mask != 0
    selected = attended if noise_mask is None else (noise_mask != 0) & attended
    if input_ids is None:
        arguments["inputs_embeds"] = inputs_embeds
    else:
        arguments["input_ids"] = input_ids
    arguments["attention_mask"] = attended.long()
    if "position_ids" in known:
        position_ids = arguments.get("position_ids")
        arguments["position_ids"] = position_ids_of(attended) if position_ids is None else position_ids.expand(shape)
    arguments.setdefault("use_cache", False)
    return Inputs(arguments, attended, selected)


class Pass:
    """The state that hooks need while the base model runs."""

    def __init__(
        self, attended: Tensor, selected: Tensor, layers: frozenset[int], batch: tuple[Tensor | None, ...]
    ) -> None:
        self.attended = attended
        self.selected = selected
        self.layers = layers
        self.batch = batch
        self.clean_graph = False
        self.seed: int | Tensor | None = None  # of a draw that is shared
        self.half = "clean"
        self.transform: Transform | None = None
        self.clean_layers: dict[int, Tensor] = {}
        self.noisy_layers: dict[int, Tensor] = {}


def ready_noise_layer(
    noise_layer_class: type[BaseNoiseLayer] | None, noise_layer: BaseNoiseLayer | None, arguments: dict[str, Any]
) -> BaseNoiseLayer:
    """The layer given, or a new one of the class."""
    if noise_layer_class is not None and not (
        isinstance(noise_layer_class, type) and issubclass(noise_layer_class, BaseNoiseLayer)
    ):
        raise TypeError(f"noise_layer_class must be a class of BaseNoiseLayer; got {noise_layer_class!r}")
    if noise_layer is None:
        if noise_layer_class is None:
            raise ValueError("give noise_layer_class, or a ready noise_layer")
        return noise_layer_class(**arguments)
    if not isinstance(noise_layer, noise_layer_class or BaseNoiseLayer):
        wanted = (noise_layer_class or BaseNoiseLayer).__name__
        raise TypeError(f"noise_layer must be a {wanted}; got {type(noise_layer).__name__}")
    if arguments:
        raise TypeError(f"a ready noise_layer takes no arguments; got {', '.join(arguments)}")
    return noise_layer
