"""The presets by name: TextBrewer's dictionaries, which users extend by assigning to them."""

from collections.abc import Callable
from typing import Any

from sgfast.loss.presets.attention import att_ce_loss, att_ce_mean_loss, att_mse_loss, att_mse_sum_loss
from sgfast.loss.presets.hidden import cos_loss, hid_mse_loss, pkd_loss
from sgfast.loss.presets.kd import kd_ce_loss, kd_mse_loss
from sgfast.loss.presets.pairs import fsp_loss, mmd_loss
from sgfast.loss.presets.projections import linear_projection, projection_with_activation
from sgfast.loss.presets.schedulers import (
    constant_temperature_scheduler,
    cwsm_temperature_scheduler_builder,
    flsw_temperature_scheduler_builder,
    linear_decay_weight_scheduler,
    linear_growth_weight_scheduler,
)
from sgfast.ops import validation

FEATURES = ["hidden", "attention"]

#: The keys of an adaptor's dictionary, all optional.
ADAPTOR_KEYS = ["logits", "logits_mask", "losses", "inputs_mask", "labels", *FEATURES]

#: f(logits_S, logits_T, temperature=1) → scalar.
KD_LOSS_MAP: dict[str, Callable[..., Any]] = {"mse": kd_mse_loss, "ce": kd_ce_loss}

#: f(dim_in, dim_out) → module.
PROJ_MAP: dict[str, Callable[..., Any]] = {
    "linear": linear_projection,
    "relu": projection_with_activation("ReLU"),
    "tanh": projection_with_activation("Tanh"),
}

#: f(state_S, state_T, mask=None) → scalar.
MATCH_LOSS_MAP: dict[str, Callable[..., Any]] = {
    "attention_mse_sum": att_mse_sum_loss,
    "attention_mse": att_mse_loss,
    "attention_ce_mean": att_ce_mean_loss,
    "attention_ce": att_ce_loss,
    "hidden_mse": hid_mse_loss,
    "cos": cos_loss,
    "pkd": pkd_loss,
    "gram": fsp_loss,
    "fsp": fsp_loss,
    "mmd": mmd_loss,
    "nst": mmd_loss,
}

#: f(x) → weight, for x = step / steps.
WEIGHT_SCHEDULER: dict[str, Callable[..., Any]] = {
    "linear_decay": linear_decay_weight_scheduler,
    "linear_growth": linear_growth_weight_scheduler,
}


class TemperatureSchedulers(dict[Any, Any]):
    """A dictionary of schedulers and of builders of schedulers.

    ``schedulers["constant"]`` returns the stored function. ``schedulers["flsw", 1, 2]`` (or a list) calls the stored
    function with the arguments, ``schedulers["flsw", {"beta": 1, "gamma": 2}]`` with keywords.

    Example:
        >>> import torch
        >>> scheduler = TEMPERATURE_SCHEDULER[["cwsm", {"beta": 1.0, "min_temperature": 0.5}]]
        >>> scheduler(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.zeros(2, 2), 4.0)
        tensor([3.5016, 4.4984])
    """

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, list | tuple):
            return super().__getitem__(key)
        name, *arguments = key
        if len(arguments) == 1 and isinstance(arguments[0], dict):
            return super().__getitem__(name)(**arguments[0])
        return super().__getitem__(name)(*arguments)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key[0] if isinstance(key, list | tuple) and key else key)


#: f(logits_S, logits_T, base_temperature) → a number or a tensor of the row shape; ``flsw`` and ``cwsm`` build one.
TEMPERATURE_SCHEDULER = TemperatureSchedulers(
    {
        "constant": constant_temperature_scheduler,
        "flsw": flsw_temperature_scheduler_builder,
        "cwsm": cwsm_temperature_scheduler_builder,
    }
)

_MAPS: dict[str, dict[Any, Any]] = {
    "kd_loss": KD_LOSS_MAP,
    "match_loss": MATCH_LOSS_MAP,
    "match_Loss": MATCH_LOSS_MAP,  # TextBrewer's spelling
    "projection": PROJ_MAP,
    "weight_scheduler": WEIGHT_SCHEDULER,
    "temperature_scheduler": TEMPERATURE_SCHEDULER,
}


def register_new(map_name: str, name: str, func: Callable[..., Any]) -> None:
    """Add a user's function to a preset dictionary. An assignment to the dictionary does the same.

    Args:
        map_name: ``kd_loss``, ``match_loss`` (also ``match_Loss``), ``projection``, ``weight_scheduler`` or
            ``temperature_scheduler``.
        name: the key of the function.
        func: called as the dictionary's other entries are.

    Raises:
        ValueError: there is no such dictionary.
        TypeError: ``func`` cannot be called.
    """
    validation.check_choice("map_name", map_name, _MAPS)
    if not callable(func):
        raise TypeError(f"func must be callable; got {type(func).__name__}")
    _MAPS[map_name][name] = func
