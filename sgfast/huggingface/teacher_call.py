"""Call of a teacher: with the student's arguments, in eval mode and without a cache."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sgfast.huggingface.forward_calls import CACHES, ForwardCall

# The teacher computes no loss and needs none of these.
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def transformers_model(module: nn.Module) -> nn.Module:
    """Return the model of transformers inside adapters and other wrappers, or the module itself if there is none."""
    models = (
        part for part in module.modules() if any(kind.__name__ == "PreTrainedModel" for kind in type(part).__mro__)
    )
    return next(models, module)


def is_encoder_decoder(module: nn.Module) -> bool:
    """Return whether the model of transformers has an encoder and a decoder."""
    return bool(getattr(_config(transformers_model(module)), "is_encoder_decoder", False))


def as_module(teacher: Callable[..., Any]) -> nn.Module | None:
    """Return the teacher if it is a module, or the module that a partial or a bound ``forward`` calls; else None."""
    if isinstance(teacher, nn.Module):
        return teacher
    if isinstance(teacher, functools.partial):
        return as_module(teacher.func)
    owner = getattr(teacher, "__self__", None)
    called = getattr(teacher, "__name__", None) in ("forward", "__call__", "_wrapped_call_impl")
    return owner if called and isinstance(owner, nn.Module) else None


def check_separate(student: nn.Module, teacher: Callable[..., Any]) -> None:
    """Check that the student's training does not change the teacher.

    Frozen parameters may be shared. A function is not checked, because it may switch the student's adapters off.

    Raises:
        ValueError: the teacher is a module, and one of its parameters is a parameter that the student trains, or lies
            in the same memory.
    """
    module = as_module(teacher)
    if module is None:
        return
    trained = {key for parameter in student.parameters() if parameter.requires_grad for key in _identities(parameter)}
    for name, parameter in module.named_parameters():
        if not trained.isdisjoint(_identities(parameter)):
            raise ValueError(
                f"teacher must not have parameters that the student trains, because the training would change the "
                f"teacher; got {name} in both. If the teacher is the model under the student's adapters, write a "
                "function: def teacher(**inputs): with student.disable_adapter(): return student(**inputs). Otherwise "
                "pass a copy.deepcopy of the model, made before adapters are injected, or freeze the shared parameters "
                "with requires_grad_(False)"
            )


def teacher_inputs(
    call: ForwardCall, student: nn.Module, teacher: Callable[..., Any], logits: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the student's arguments for its teacher: without labels, with ``use_cache=False`` if the teacher takes it.

    The labels stay if an encoder-decoder made the inputs of its decoder from labels: the teacher must make the same.

    Raises:
        ValueError: the student was called with a cache, or is an encoder-decoder without inputs for its decoder.
    """
    names = _names_of(student, call.arguments)
    given = named_arguments(student, call.arguments, call.keywords)
    caches = [*call.caches, *(name for name in CACHES if given.get(name) is not None)]
    if caches:
        raise ValueError(
            f"the student must be called without a cache; got {caches[0]}. "
            "A cache holds tokens that the teacher has not seen"
        )
    dropped = set(_LOSS_ARGUMENTS)
    if is_encoder_decoder(student) and not any(given.get(name) is not None for name in _DECODER_INPUTS):
        if given.get("labels") is not None:
            dropped.remove("labels")
        elif logits.dim() > 2:
            raise ValueError(
                "an encoder-decoder student needs decoder_input_ids, because the Trainer does not pass labels from "
                "which the student could make them; use transformers.DataCollatorForSeq2Seq(tokenizer, model=student)"
            )
    changed: dict[str, Any] = dict.fromkeys(dropped) | {"use_cache": False}
    arguments = [changed.get(name, value) for name, value in zip(names, call.arguments, strict=False)]
    arguments.extend(call.arguments[len(names) :])
    keywords = {name: value for name, value in call.keywords.items() if name not in dropped}
    if "use_cache" in keywords or ("use_cache" not in names and _takes_use_cache(teacher, student)):
        keywords["use_cache"] = False
    return tuple(arguments), keywords


def named_arguments(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's forward by name, as far as positional ones have names."""
    return dict(zip(_names_of(module, arguments), arguments, strict=False)) | dict(keywords)


def _names_of(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[str, ...]:
    return _parameter_names(type(module).forward)[: len(arguments)] if arguments else ()


@contextlib.contextmanager
def evaluating(student: nn.Module, teacher: Callable[..., Any]) -> Iterator[None]:
    """Put the modules that a teacher runs into eval mode, switch their caches off, and restore both afterwards.

    These modules are the parts of the teacher. If the teacher is a function, they are the parts of the student and of
    the modules that `modules_in` finds in the function. The mode of each module is set without ``eval()``: the parts
    of a model may have different modes, and a model's own ``train`` may have side effects.
    """
    roots = [teacher] if isinstance(teacher, nn.Module) else [student, *modules_in(teacher)]
    modules = {id(module): module for root in roots for module in root.modules()}.values()
    modes = [(module, module.training) for module in modules]
    configs = {id(config): config for module in modules if getattr(config := _config(module), "use_cache", False)}
    caching = {key: config.use_cache for key, config in configs.items()}
    try:
        _set_modes((module, False) for module in modules)
        for config in configs.values():
            # Some models do not receive the keyword use_cache. Some configurations are read-only.
            with contextlib.suppress(AttributeError):
                config.use_cache = False
        yield
    finally:
        _set_modes(modes)
        for key, config in configs.items():
            with contextlib.suppress(AttributeError):
                config.use_cache = caching[key]


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:
            module.training = training


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _identities(parameter: nn.Parameter) -> Iterable[Any]:
    """Yield the identities of a parameter: the object, and the address of its values. Equal ones mean one parameter."""
    yield id(parameter)
    if type(parameter.data) is Tensor and parameter.device.type != "meta" and parameter.data_ptr():
        yield parameter.device, parameter.data_ptr()


def _takes_use_cache(teacher: Callable[..., Any], student: nn.Module) -> bool:
    """Return whether a teacher can be called with ``use_cache``.

    Either the teacher's signature names the argument, or the teacher takes ``**kwargs`` and one of its modules names
    the argument. If no module is found in a function, the function is treated like the student.
    """
    module = as_module(teacher)
    named, open_ended = _signature(type(module).forward if module is not None else teacher)
    if "use_cache" in named or not open_ended:
        return "use_cache" in named
    roots = [module] if module is not None else modules_in(teacher) or [student]
    forwards = {type(part).forward for root in roots for part in root.modules()}
    return any("use_cache" in _parameter_names(forward) for forward in forwards)


@functools.lru_cache(maxsize=1024)
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the parameters of a module class's ``forward``, without ``self``, ``*args``, ``**kwargs``."""
    names, _ = _signature(forward)
    return names[1:]


def _signature(function: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """Return the names of a function's parameters, and whether the function takes ``**kwargs``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins have none
        return (), False
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = tuple(parameter.name for parameter in parameters if parameter.kind not in variable)
    return names, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def modules_in(teacher: Any, seen: set[int] | None = None) -> list[nn.Module]:
    """Return the modules that a function uses, found in its closure, its globals, its defaults and its object."""
    seen = set() if seen is None else seen
    if isinstance(teacher, nn.Module):
        return [teacher]
    if id(teacher) in seen or not callable(teacher) or isinstance(teacher, type):
        return []
    seen.add(id(teacher))
    values: list[Any] = []
    if isinstance(teacher, functools.partial):
        values += [teacher.func, *teacher.args, *teacher.keywords.values()]
    owner = getattr(teacher, "__self__", None)
    values += [owner, *_attributes(owner)]
    function = getattr(teacher, "__func__", teacher)
    code = getattr(function, "__code__", None)
    if code is None:
        values += [*_attributes(teacher), type(teacher).__call__]
    else:
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # the variable has no value yet
                values.append(cell.cell_contents)
        values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        named = [function.__globals__.get(name) for name in code.co_names]
        values += [value for value in named if isinstance(value, nn.Module)]
    return [module for value in values for module in modules_in(value, seen)]


def _attributes(value: Any) -> Iterable[Any]:
    """Return an object's attributes. A Python module (the object of a builtin) gives none: it would hold everything."""
    return () if inspect.ismodule(value) else list(getattr(value, "__dict__", {}).values())
