"""TextBrewer's ``DistillationConfig``. A wrong value is refused when the configuration is built, not at its use."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgfast.loss.presets import registry
from sgfast.ops import validation

Layers = int | list[int]


@dataclass
class IntermediateMatch:
    """One pair of intermediate features to bring together. The fields have the names of TextBrewer's dictionaries.

    Args:
        layer_T: index in the list that the teacher's adaptor gives, or a list of two (``fsp``, ``nst``).
        layer_S: index in the list that the student's adaptor gives, or a list of two.
        feature: ``hidden`` or ``attention``.
        loss: a key of `MATCH_LOSS_MAP`.
        weight: weight of this loss in the total.
        proj: ``[name, student width, teacher width]``, where name is a key of `PROJ_MAP`. A fourth entry may be a
            dictionary of optimizer options (``{"lr": 1e-3}``) for `DistillationLoss.parameter_groups`.
    """

    layer_T: Layers
    layer_S: Layers
    feature: str
    loss: str
    weight: float
    proj: list[Any] | None = None

    def __post_init__(self) -> None:
        validation.check_choice("feature", self.feature, registry.FEATURES)
        for name, layers in (("layer_T", self.layer_T), ("layer_S", self.layer_S)):
            indices = layers if isinstance(layers, list | tuple) else [layers]
            if not indices or not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
                raise TypeError(f"{name} must be an int or a list of ints; got {layers!r}")
        if isinstance(self.layer_T, int) != isinstance(self.layer_S, int):
            raise ValueError(
                f"layer_T and layer_S must both be ints or both lists; got {self.layer_T} and {self.layer_S}"
            )
        _check_weight("weight", self.weight)
        if self.proj:
            self._check_projection(self.proj)

    @staticmethod
    def _check_projection(proj: list[Any]) -> None:
        *widths, options = [*proj[1:], {}] if len(proj) == 3 else proj[1:] or [None]
        if len(widths) != 2 or not all(type(width) is int and width > 0 for width in widths):
            raise ValueError(f"proj must be [name, student width, teacher width] and optional options; got {proj!r}")
        if not isinstance(options, dict):
            raise TypeError(f"the options in proj must be a dictionary; got {type(options).__name__}")
        if proj[0] not in registry.PROJ_MAP:
            raise ValueError(f"proj must start with one of {', '.join(registry.PROJ_MAP)}; got {proj[0]!r}")


@dataclass
class DistillationConfig:
    r"""Weights and kinds of the losses of a distillation.

    total = kd_loss_weight · Σ kd + hard_label_weight · Σ losses + Σ_i weight_i · match_i

    Args:
        temperature: divides both logits in the kd loss.
        temperature_scheduler: ``"none"`` (or None), ``"constant"``, ``["flsw", beta, gamma]``, ``["cwsm", beta]``, or a
            key of `TEMPERATURE_SCHEDULER` under which the user has stored a function.
        hard_label_weight: weight of the adaptor's ``losses``.
        hard_label_weight_scheduler: ``"none"`` (or None) or a key of `WEIGHT_SCHEDULER`.
        kd_loss_type: a key of `KD_LOSS_MAP`.
        kd_loss_weight: weight of the loss between logits.
        kd_loss_weight_scheduler: ``"none"`` (or None) or a key of `WEIGHT_SCHEDULER`.
        probability_shift: exchange the teacher's logits of the label and of its largest logit (needs ``labels``).
        intermediate_matches: dictionaries with the fields of `IntermediateMatch`.
        is_caching_logits: accepted because TextBrewer's configurations have it; the training loop decides on caching.
        min_temperature: lower bound of the temperature scheduler's result; None for none.
        overwrite_scheduled_weights: False: a weight scheduler's value multiplies the weight given here. True: the
            scheduler's value replaces the weight after the first `DistillationLoss.set_progress`, as in TextBrewer.

    Raises:
        TypeError: an argument's type.
        ValueError: a value out of range, or a name that is not in its dictionary.

    Example:
        >>> config = DistillationConfig.from_dict({
        ...     "temperature": 8,
        ...     "intermediate_matches": [
        ...         {"layer_T": 4, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1,
        ...          "proj": ["linear", 384, 768]},
        ...     ],
        ... })
        >>> config.kd_loss_type, config.intermediate_matches[0].loss
        ('ce', 'hidden_mse')
    """

    temperature: float = 4
    temperature_scheduler: Any = "none"
    hard_label_weight: float = 0
    hard_label_weight_scheduler: str | None = "none"
    kd_loss_type: str = "ce"
    kd_loss_weight: float = 1
    kd_loss_weight_scheduler: str | None = "none"
    probability_shift: bool = False
    intermediate_matches: list[IntermediateMatch] = field(default_factory=list)
    is_caching_logits: bool = False
    min_temperature: float | None = None
    overwrite_scheduled_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "min_temperature"):
            value = getattr(self, name)
            if (value is not None or name == "temperature") and not _is_number(value):
                raise TypeError(f"{name} must be a number; got {value!r}")
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {value}")
        for name in ("hard_label", "kd_loss"):
            _check_weight(f"{name}_weight", getattr(self, f"{name}_weight"))
            scheduler = getattr(self, f"{name}_weight_scheduler")
            if not is_none(scheduler) and scheduler not in registry.WEIGHT_SCHEDULER:
                known = ", ".join(registry.WEIGHT_SCHEDULER)
                raise ValueError(f"{name}_weight_scheduler must be 'none' or one of {known}; got {scheduler!r}")
        self._check_temperature_scheduler()
        matches = self.intermediate_matches or []
        self.intermediate_matches = [
            match if isinstance(match, IntermediateMatch) else _match(index, match)
            for index, match in enumerate(matches)
        ]

    def _check_temperature_scheduler(self) -> None:
        scheduler = self.temperature_scheduler
        if is_none(scheduler):
            return
        if scheduler not in registry.TEMPERATURE_SCHEDULER:
            known = ", ".join(registry.TEMPERATURE_SCHEDULER)
            raise ValueError(f"temperature_scheduler must be 'none' or among {known}; got {scheduler!r}")
        if scheduler in ("flsw", "cwsm"):
            parameters = {"flsw": "beta, gamma", "cwsm": "beta"}[scheduler]
            raise ValueError(f"the temperature scheduler {scheduler!r} needs parameters: [{scheduler!r}, {parameters}]")
        registry.TEMPERATURE_SCHEDULER[scheduler]  # builds it, so that missing parameters show here

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any]) -> "DistillationConfig":
        """Build a configuration from a dictionary of the arguments.

        Raises:
            ValueError: an unknown key, or a value out of range.
            TypeError: a value's type.
        """
        unknown = set(dict_object) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"unknown keys {', '.join(sorted(unknown))}; "
                f"a DistillationConfig has {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**dict_object)

    @classmethod
    def from_json_file(cls, json_filename: str | Path) -> "DistillationConfig":
        """Build a configuration from a JSON file that holds such a dictionary.

        Raises:
            ValueError: the file is not JSON or not a dictionary, an unknown key, or a value out of range.
            OSError: the file cannot be read.
        """
        try:
            content = json.loads(Path(json_filename).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{json_filename} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{json_filename} must hold a dictionary; got {type(content).__name__}")
        return cls.from_dict(content)


def is_none(scheduler: Any) -> bool:
    """Return True for the values that ask for no scheduler."""
    return scheduler is None or scheduler == "none"


def _match(index: int, values: Any) -> IntermediateMatch:
    if not isinstance(values, Mapping):
        raise TypeError(f"intermediate_matches[{index}] must be a dictionary; got {type(values).__name__}")
    fields = IntermediateMatch.__dataclass_fields__
    missing = [name for name in fields if name not in values and name != "proj"]
    unknown = [name for name in values if name not in fields]
    if missing or unknown:
        raise ValueError(
            f"intermediate_matches[{index}] must have {', '.join(fields)} (proj is optional); "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
        )
    return IntermediateMatch(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_weight(name: str, weight: Any) -> None:
    if not _is_number(weight):
        raise TypeError(f"{name} must be a number; got {weight!r}")
    if not math.isfinite(weight):
        raise ValueError(f"{name} must be finite; got {weight}")
