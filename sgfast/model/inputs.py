"""Checks of a noisy language model's inputs and constructor arguments, and completion of the inputs."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.ops import validation
from sgfast.utils.positions import position_ids_of

CleanPass = Literal["separate", "joint"]


class Inputs(NamedTuple):
    """Batch of a noisy language model: arguments of the base model, and masks (B, T) bool."""

    arguments: dict[str, Any]
    attended: Tensor
    selected: Tensor  # True = transform this token


def prepare_inputs(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    noise_mask: Tensor | None,
    others: Mapping[str, Any],
    known: frozenset[str],
) -> Inputs:
    """Check a batch, add missing masks and position ids (from the attention mask), and switch the cache off.

    Args:
        input_ids: (B, T), or None with ``inputs_embeds`` among ``others``.
        attention_mask: (B, T) or None.
        noise_mask: (B, T) or None.
        others: further arguments. Arguments that are not in ``known`` are dropped.
        known: names of the base model's arguments.
    """
    arguments = {name: value for name, value in others.items() if name in known}
    inputs_embeds = arguments.pop("inputs_embeds", None)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    for name, tokens in (("input_ids", input_ids), ("inputs_embeds", inputs_embeds)):
        if tokens is not None:
            validation.check_tensor(name, tokens)
    shape = inputs_embeds.shape[:2] if input_ids is None else input_ids.shape
    device = inputs_embeds.device if input_ids is None else input_ids.device
    if len(shape) != 2:
        raise ValueError(f"the tokens must be (batch, length); got shape {tuple(shape)}")
    if arguments.get("past_key_values") is not None:
        raise ValueError("past_key_values cannot be given: the clean and the noisy pass would share one cache")
    for name, mask in (("attention_mask", attention_mask), ("noise_mask", noise_mask)):
        if mask is not None:
            validation.check_tensor(name, mask, "a torch.Tensor or None")
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{name} must have the shape of the tokens, {tuple(shape)}; got {tuple(mask.shape)}")
    everything = torch.ones(shape, dtype=torch.bool, device=device)
    attended = everything if attention_mask is None else validation.as_bool("attention_mask", attention_mask)
    selected = attended if noise_mask is None else validation.as_bool("noise_mask", noise_mask) & attended
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


def doubled(arguments: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return arguments with the batch twice: tensors with ``rows`` rows are concatenated with themselves."""
    return {
        name: torch.cat([value, value]) if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for name, value in arguments.items()
    }


def check_settings(base_model: Any, target_layer: Any, clean_pass: Any) -> None:
    """Check the types of a noisy language model's constructor arguments, before they are used."""
    if not isinstance(base_model, nn.Module):
        raise TypeError(f"base_model must be a torch.nn.Module; got {type(base_model).__name__}")
    if not isinstance(target_layer, str):
        raise TypeError(f"target_layer must be a string; got {type(target_layer).__name__}")
    if clean_pass not in get_args(CleanPass):
        raise ValueError(f"clean_pass must be 'separate' or 'joint'; got {clean_pass!r}")


def check_target(causal_lm: nn.Module, target_layer: str, input_shape: tuple[int, ...] | None, width: int) -> None:
    """Check that the target layer exists, and that ``input_shape`` ends in the width of the embeddings."""
    try:
        causal_lm.get_submodule(target_layer)
    except AttributeError as error:
        raise ValueError(f"base_model has no module {target_layer!r} (target_layer)") from error
    if input_shape is not None and input_shape[-1] != width:
        raise ValueError(f"input_shape must end in the embedding width {width}; got {input_shape}")


def ready_noise_layer(
    noise_layer_class: type[BaseNoiseLayer] | None, noise_layer: BaseNoiseLayer | None, arguments: dict[str, Any]
) -> BaseNoiseLayer:
    """Return the given noise layer, or make a new one of the class."""
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
