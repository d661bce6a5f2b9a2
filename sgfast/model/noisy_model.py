"""Model that applies a noise layer to the input of any module, or to the output of one of the module's layers."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgfast.model.hooks import hook_arguments, hook_forward
from sgfast.model.noise_loss import (
    AdaptiveAlpha,
    check_interpolation,
    check_loss_function,
    interpolate,
    negative_log_mean,
    scalar_loss,
)
from sgfast.model.output import NoisyModelOutput
from sgfast.noise_layer.arguments import check_input_shape, check_log_scale
from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.ops.validation import check_real

# Noisy models whose forward or noise_disabled block is running. The innermost is the last.
_running: list["NoisyModel"] = []


class NoisyModel(nn.Module):
    """Frozen base model that computes on transformed values.

    A hook applies the noise layer at every forward of the base model, also if ``base_model`` is called directly. Use
    `noise_disabled` to run the base model on clean values. If several noisy models share one base model, the forward of
    each applies only its own noise layer. When a noisy model is deleted, its base model is clean again. Only one thread
    at a time may use a noisy model and its base model.

    The base model is frozen (``requires_grad_(False)``) and stays in eval mode, also under ``.train()``: dropout is
    off, and batch statistics do not change.

    The constructor takes the noise layer class and the base model in either order:

        NoisyModel(CloakNoiseLayerOneShot, base_model, percent_to_mask=0.6)
        NoisyModel(base_model, noise_layer_class=CloakNoiseLayerOneShot, percent_to_mask=0.6)

    Args:
        layer_and_base: ``noise_layer_class`` and ``base_model``, in either order.
        noise_layer_class: a subclass of `BaseNoiseLayer`.
        base_model: any module.
        target_layer: path of a module in the base model whose output is transformed. If the output is a tuple, the
            first element is transformed.
        target_parameter: name of the argument of the base model's forward that is transformed. The default, without a
            ``target_layer``, is the first argument.
        input_shape: shape (batch, *features) of the values to transform, for noise layers that take ``input_shape``.
            None takes the shape from the first forward, which must then come before DistributedDataParallel.
        noise_layer_kwargs: other arguments of ``noise_layer_class``. The noise layer moves to the base model's device.

    Raises:
        TypeError: a noise layer class or a base model is missing, given twice, or of another type.
        ValueError: the base model has no such layer or argument, or both targets are given.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sgfast.noise_layer import CloakNoiseLayer1
        >>> noisy_model = NoisyModel(CloakNoiseLayer1, nn.Conv2d(3, 4, kernel_size=2), target_parameter="input")
        >>> output = noisy_model(torch.ones(4, 3, 2, 2), noise_mask=torch.eye(2))
        >>> output.base_model_output.shape, output.std.shape
        (torch.Size([4, 4, 1, 1]), torch.Size([3, 2, 2]))
    """

    noise_layer: BaseNoiseLayer
    base_model: nn.Module
    adaptive_alpha: AdaptiveAlpha | None

    def __init__(
        self,
        *layer_and_base: type[BaseNoiseLayer] | nn.Module,
        noise_layer_class: type[BaseNoiseLayer] | None = None,
        base_model: nn.Module | None = None,
        target_layer: str | None = None,
        target_parameter: str | None = None,
        input_shape: tuple[int, ...] | None = None,
        **noise_layer_kwargs: Any,
    ) -> None:
        super().__init__()
        layer_class, base = _tell_apart(layer_and_base, noise_layer_class, base_model)
        if target_layer is not None and target_parameter is not None:
            raise ValueError(
                f"give target_layer or target_parameter, not both; got {target_layer!r} and {target_parameter!r}"
            )
        self.target_layer = target_layer
        self.target_parameter = target_parameter
        self._argument = _Argument(None, None) if target_layer is not None else _argument_of(base, target_parameter)
        target = base if target_layer is None else _submodule(base, target_layer)
        shape = check_input_shape(input_shape)
        if shape is not None and "input_shape" in inspect.signature(layer_class).parameters:
            noise_layer_kwargs["input_shape"] = shape
        noise_layer = layer_class(**noise_layer_kwargs)  # may raise, so it is made before the base model is changed
        self.base_model = base.requires_grad_(False).eval()
        device = next((parameter.device for parameter in base.parameters()), None)
        self.noise_layer = noise_layer if device is None else noise_layer.to(device=device)
        self.adaptive_alpha = None
        self._layer_arguments = frozenset(inspect.signature(noise_layer.estimate).parameters)
        self._forget()
        self._register_hook(target)

    def _forget(self) -> None:
        self._noise_mask: Tensor | None = None
        self._arguments_for_layer: dict[str, Any] = {}
        self.applied: Applied | None = None
        self._last_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def _register_hook(self, target: nn.Module) -> None:
        """Hook the target as long as this model lives."""
        if self.target_layer is None:
            hook_arguments(self, target, "_transform_argument")
        else:
            hook_forward(self, target, "_transform_output")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without the last forward."""
        forgotten: dict[str, Any] = {
            "_noise_mask": None,
            "_arguments_for_layer": {},
            "applied": None,
            "_last_call": None,
        }
        return dict(self.__dict__) | forgotten

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state and hook the copied base model, because the copied hook has no owner."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register_hook(
            self.base_model if self.target_layer is None else self.base_model.get_submodule(self.target_layer)
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """Make an ``adaptive_alpha`` if the saved model had one."""
        if self.adaptive_alpha is None and any(name.startswith(f"{prefix}adaptive_alpha.") for name in state_dict):
            self.adaptive_alpha = AdaptiveAlpha()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def train(self, mode: bool = True) -> "NoisyModel":
        """Set the mode of the noise layer. The frozen base model stays in eval mode."""
        super().train(mode)
        self.base_model.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would erase; see `sgfast.noise_layer.parameter_groups`."""
        return {f"noise_layer.{name}" for name in self.noise_layer.no_weight_decay()}

    @contextmanager
    def noise_disabled(self) -> Iterator[None]:
        """Run the base model on clean values inside the block, in calls of this model and in direct calls."""
        _running.append(self)  # prevents that another noisy model over this base model transforms a direct call
        try:
            with self.noise_layer.disabled():
                yield
        finally:
            _running.remove(self)

    def forward(self, *args: Any, noise_mask: Tensor | None = None, **kwargs: Any) -> NoisyModelOutput:
        """Run the base model with the transform.

        Args:
            args: the base model's arguments.
            noise_mask: 1 = transform. The mask has the leading dimensions of the values to transform, or broadcasts to
                their shape. None transforms everything.
            kwargs: the base model's keyword arguments. Arguments that the noise layer's estimators take too, such as
                ``attention_mask``, are also passed to the noise layer.

        Raises:
            ValueError: the target argument is missing, or a mask or an input has a wrong shape.
            TypeError: the value to transform is not a floating-point tensor.
            RuntimeError: the base model's forward did not run ``target_layer``.
        """
        self._forget()
        if self.training and self.adaptive_alpha is not None and self.adaptive_alpha.measuring:
            self._last_call = (args, kwargs)
        self._noise_mask = noise_mask
        self._arguments_for_layer = {name: kwargs[name] for name in kwargs if name in self._layer_arguments}
        _running.append(self)
        try:
            base_model_output = self.base_model(*args, **kwargs)
        finally:
            _running.remove(self)
            self._noise_mask, self._arguments_for_layer = None, {}
        layer, applied = self.noise_layer, self.applied
        if layer.enabled and applied is None:
            raise RuntimeError(f"target_layer {self.target_layer!r} did not run: nothing was transformed")
        return NoisyModelOutput(
            base_model_output=base_model_output,
            input=layer.input if applied is not None else None,
            transformed=layer.output if applied is not None else None,
            mean=layer.mean if applied is not None else None,
            std=applied.std if applied is not None else None,
            mask=applied.mask if applied is not None else None,
            noise_mask=noise_mask,
        )

    def noise_loss_wrapper(
        self, base_loss: Callable[..., Tensor], alpha: float | None, *, tolerance: float = 0.1
    ) -> Callable[..., dict[str, Tensor]]:
        """Wrap a task's loss: ``(1 − alpha) · base_loss + alpha · noise_loss``, noise_loss = −log(mean sigma).

        The mean is over the features of transformed elements, without suppressed features.

        Args:
            base_loss: a function ``base_loss(base_model_output, *targets)`` that returns a scalar.
            alpha: weight in [0, 1]: 0 trains only the task, 1 only the strength of the transform. None adapts alpha
                during training: alpha rises while the base loss stays near the base loss of the clean model (see
                `AdaptiveAlpha`). Each of the first ten batches needs one more forward, which measures the clean model.
                The state of alpha is saved with this model, and shared by all losses that adapt alpha.
            tolerance: the base loss aimed at is the clean model's base loss plus this number; only for ``alpha=None``.

        Returns:
            ``loss(output, *targets)``. Call it with the `NoisyModelOutput` of the last forward. The result is a
            dictionary with ``composite_loss``, for ``backward``, and, detached for logging, ``base_loss``,
            ``noise_loss`` and ``alpha``.

        Raises:
            ValueError: alpha lies outside [0, 1], tolerance is not positive, or the noise layer's scale starts at 0.
            TypeError: base_loss is not callable, or alpha is not a number; in a call, output is not a NoisyModelOutput.
            RuntimeError: in a call, noise was disabled in the forward.
        """
        check_loss_function("base_loss", base_loss)
        check_log_scale(self.noise_layer.scale)
        fixed_alpha = None if alpha is None else check_interpolation(alpha)
        if not check_real("tolerance", tolerance) > 0:
            raise ValueError(f"tolerance must be positive; got {tolerance}")
        if fixed_alpha is None and self.adaptive_alpha is None:
            self.adaptive_alpha = AdaptiveAlpha()

        def loss(output: NoisyModelOutput, *targets: Any, **keywords: Any) -> dict[str, Tensor]:
            if not isinstance(output, NoisyModelOutput):
                raise TypeError(f"output must be what the noisy model returned; got {type(output).__name__}")
            if output.std is None or output.input is None:
                raise RuntimeError("the loss reads the transform, but noise was disabled in the forward")
            task_loss = scalar_loss("base_loss", base_loss(output.base_model_output, *targets, **keywords))
            noise_loss = negative_log_mean(output.std, output.mask, output.noise_mask, output.input.shape)
            weight: float | Tensor
            if fixed_alpha is None:
                weight = self._adapted_alpha(task_loss, lambda clean: base_loss(clean, *targets, **keywords), tolerance)
            else:
                weight = fixed_alpha
            self.noise_layer.release_graph()
            return {
                "composite_loss": interpolate(task_loss, noise_loss, weight),
                "base_loss": task_loss.detach(),
                "noise_loss": noise_loss.detach(),
                "alpha": weight if isinstance(weight, Tensor) else task_loss.new_full((), weight),
            }

        return loss

    def _adapted_alpha(self, task_loss: Tensor, clean_loss_of: Callable[[Any], Any], tolerance: float) -> Tensor:
        """Return the alpha of this batch. During training, update alpha for the next batch."""
        adaptive = self.adaptive_alpha
        assert adaptive is not None  # noise_loss_wrapper made the module
        last_call, self._last_call = self._last_call, None
        if last_call is not None:
            with torch.no_grad(), self._bypassed():
                adaptive.measure(
                    scalar_loss("base_loss", clean_loss_of(self.base_model(*last_call[0], **last_call[1])))
                )
        alpha: Tensor = adaptive().to(task_loss.device)
        if self.training and torch.is_grad_enabled() and adaptive.measured:
            adaptive.update(task_loss, tolerance)
        return alpha

    @contextmanager
    def _bypassed(self) -> Iterator[None]:
        """Run the base model on clean values, and restore the values that the noise layer stores."""
        remembered = dict(self.noise_layer.__dict__)
        try:
            with self.noise_disabled():
                yield
        finally:
            self.noise_layer.__dict__.update(remembered)

    def _transform_argument(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._another_runs():
            return None
        name, position = self._argument
        if name is not None and name in kwargs:
            return args, kwargs | {name: self._transform(kwargs[name])}
        if position is None or position >= len(args):
            raise ValueError(f"the base model was called without its argument {name!r}, which is to be transformed")
        return (*args[:position], self._transform(args[position]), *args[position + 1 :]), kwargs

    def _transform_output(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._another_runs():
            return None
        if isinstance(output, Tensor):
            return self._transform(output)
        return (self._transform(output[0]), *output[1:])

    def _another_runs(self) -> bool:
        """Return whether the base model is running for another noisy model."""
        over_this_base = (model for model in reversed(_running) if model.base_model is self.base_model)
        return next(over_this_base, self) is not self

    def _transform(self, input: Tensor) -> Tensor:
        layer = self.noise_layer
        transformed: Tensor = layer(input, self._noise_mask, **self._arguments_for_layer)
        if layer.std is not None:  # None while the layer is disabled
            self.applied = Applied(layer.std, layer.mask, self._noise_mask, input.shape)
        return transformed


class Applied(NamedTuple):
    """Results of the noise layer in the last forward that losses read; std has its graph."""

    std: Tensor
    mask: Tensor | None
    noise_mask: Tensor | None
    shape: torch.Size


class _Argument(NamedTuple):
    """Name and position under which a call may pass the transformed argument."""

    name: str | None
    position: int | None


def _tell_apart(
    positional: tuple[Any, ...], noise_layer_class: Any, base_model: Any
) -> tuple[type[BaseNoiseLayer], nn.Module]:
    """Return the noise layer class and the base model from positional arguments in either order."""
    classes = [one for one in positional if isinstance(one, type)]
    others = [one for one in positional if not isinstance(one, type)]
    classes += [] if noise_layer_class is None else [noise_layer_class]
    others += [] if base_model is None else [base_model]
    if len(classes) != 1 or len(others) != 1:
        raise TypeError(
            f"NoisyModel takes one noise_layer_class and one base_model; got {len(classes)} classes and "
            f"{len(others)} other arguments"
        )
    if not (isinstance(classes[0], type) and issubclass(classes[0], BaseNoiseLayer)):
        raise TypeError(f"noise_layer_class must be a class of BaseNoiseLayer; got {classes[0]!r}")
    if not isinstance(others[0], nn.Module):
        raise TypeError(f"base_model must be a torch.nn.Module; got {type(others[0]).__name__}")
    return classes[0], others[0]


def _submodule(base_model: nn.Module, path: str) -> nn.Module:
    if not isinstance(path, str):
        raise TypeError(f"target_layer must be a str or None; got {type(path).__name__}")
    try:
        return base_model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"base_model has no module {path!r} (target_layer)") from error


def _argument_of(base_model: nn.Module, name: str | None) -> _Argument:
    """Find an argument of the base model's forward (the first one for None). A wrong name is an error at once."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"target_parameter must be a str or None; got {type(name).__name__}")
    parameters = inspect.signature(base_model.forward).parameters
    if name is None:
        first = next(iter(parameters.values()), None)
        named = first is not None and first.kind is not inspect.Parameter.VAR_POSITIONAL
        return _Argument(first.name if first is not None and named else None, 0)
    if name in parameters:
        by_position = parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY
        return _Argument(name, list(parameters).index(name) if by_position else None)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return _Argument(name, None)
    raise ValueError(
        f"target_parameter must be an argument of {type(base_model).__name__}.forward, one of "
        f"{', '.join(parameters)}; got {name!r}"
    )
