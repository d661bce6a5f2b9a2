"""Noise layers whose parameters take their shapes from the layer's first input, or from a loaded state."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sgfast.noise_layer.base import BaseNoiseLayer


class LazyNoiseLayer(BaseNoiseLayer):
    """A noise layer whose parameters start at constants and have no shapes until `materialize` gives them shapes.

    The parameter objects stay the same objects, so that an optimizer may be built before. A state_dict leaves out
    parameters without a shape. A state_dict with shapes gives its shapes to a layer without them.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._initial_values: dict[str, float] = {}

    @abstractmethod
    def parameter_shapes(self, features: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter for inputs of shape (batch, *features)."""

    def declare(self, name: str, initial_value: float, requires_grad: bool = True) -> None:
        """Register a parameter without a shape."""
        self.register_parameter(name, cast(nn.Parameter, UninitializedParameter(requires_grad=requires_grad)))
        self._initial_values[name] = initial_value

    @property
    def materialized(self) -> bool:
        """True once the parameters have shapes."""
        return not self._lazy_names()

    def materialize(self, features: tuple[int, ...], device: torch.device | None = None) -> None:
        """Give all parameters their shapes and initial values. Nothing happens if they already have shapes.

        Args:
            features: the shape of an input without its batch dimension.
            device: the parameters' new device; None keeps their device.

        Raises:
            RuntimeError: torch.compile is tracing the layer. torch.compile then runs this forward eagerly, or refuses
                it with ``fullgraph``.
        """
        if self.materialized:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self).__name__} has no shapes yet: give them to its constructor, or run one forward, "
                f"before torch.compile"
            )
        # A first forward in inference mode must not make parameters that can never be trained.
        with torch.inference_mode(False), torch.no_grad():
            for name, shape in self.parameter_shapes(features).items():
                self._materialize(name, shape, device)
                nn.init.constant_(self.get_parameter(name), self._initial_values[name])

    def _materialize(self, name: str, shape: tuple[int, ...], device: torch.device | None = None) -> None:
        parameter = self._parameters[name]
        assert isinstance(parameter, UninitializedParameter)
        parameter.materialize(shape, device=device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        lazy = {name: self._parameters[name] for name in self._lazy_names()}
        for name in lazy:
            self._parameters[name] = None  # which torch leaves out
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters.update(lazy)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._lazy_names():
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor):
                self._materialize(name, tuple(loaded.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A layer without shapes is saved without its parameters and loads without them.
        if not any(prefix + name in state_dict for name in self._parameters):
            lazy = {prefix + name for name in self._lazy_names()}
            missing_keys[:] = [name for name in missing_keys if name not in lazy]

    def _lazy_names(self) -> list[str]:
        return [name for name, parameter in self._parameters.items() if isinstance(parameter, UninitializedParameter)]
