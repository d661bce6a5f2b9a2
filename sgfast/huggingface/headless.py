"""Forward passes of a causal language model that return final hidden states in place of logits.

A divergence does not need whole logits: with hidden states and the head's weights as a side (`sgfast.sides`), logits
exist for a few rows at a time. In a headless pass the model's head returns its input. Everything around the model
(adapters, mixed precision, data parallelism, checkpointing, torch.compile) works as before, because the model's forward
is the same.
"""

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from sgfast.huggingface.forward_calls import output_tensors
from sgfast.huggingface.teacher_call import as_module, modules_in, named_arguments, transformers_model
from sgfast.model.head_weights import HeadWeights, find_head, head_weights, plain_head_refusal

# Wrappers whose output is the output of the model inside.
_TRANSPARENT = ("PeftModel", "OptimizedModule")


class HeadlessPasses:
    """Headless passes of one model. ``begin`` and ``end`` enclose a pass.

    ``refusal`` is the reason why the model's passes keep their head, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.refusal = _wrapper_refusal(model) or plain_head_refusal(transformers_model(model))
        self.head = find_head(transformers_model(model)) if self.refusal is None else None
        self.active, self._calls = False, 0
        self._found: HeadWeights | None = None
        if self.head is not None:
            _HeadForward.of(self.head).watchers.append(self)

    def remove(self) -> None:
        """Give the model its head back, unless other headless passes need it."""
        if self.head is not None:
            _HeadForward.of(self.head).drop(self)
            self.head = None

    def begin(self) -> None:
        """Begin a pass without a head."""
        self.active, self._found, self._calls = self.head is not None, None, 0

    def end(self) -> HeadWeights | None:
        """End the pass; return the weights that the head would have applied, or None if the pass kept its head.

        Raises:
            RuntimeError: the pass called the head more than once.
        """
        found, calls = self._found, self._calls
        self.active, self._found, self._calls = False, None, 0
        if calls > 1:
            raise RuntimeError(
                "a forward that calls its head more than once cannot run without the head: pass from_hidden=False"
            )
        return found

    def usable(self, weights: HeadWeights) -> HeadWeights:
        """Return a pass's weights for the loss, gathered if fully_shard has freed them after the head's forward."""
        if weights.weight.untyped_storage().size():
            return weights
        assert self.head is not None
        weight, bias = head_weights(self.head)
        return HeadWeights(_gathered(weight), None if bias is None else _gathered(bias))

    def reach(self, weights: HeadWeights) -> None:
        """Note that a headless pass has reached the head."""
        self._found, self._calls = weights, self._calls + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _never_headless, ()  # a copy of the model keeps its head


def _never_headless() -> HeadlessPasses:
    passes = HeadlessPasses.__new__(HeadlessPasses)
    passes.refusal, passes.head = "the model is a copy", None
    passes.active, passes._found, passes._calls = False, None, 0
    return passes


class _HeadForward:
    """Forward of a head: its input while a watcher is active, else the head's own forward."""

    def __init__(self, head: nn.Module) -> None:
        self._head, self._own = head, head.__dict__.get("forward")
        self.watchers: list[HeadlessPasses] = []

    @classmethod
    def of(cls, head: nn.Module) -> "_HeadForward":
        """Return the forward of this class that a head has, or give the head one."""
        known = head.__dict__.get("forward")
        if not isinstance(known, cls):
            known = head.forward = cls(head)
        return known

    def drop(self, watcher: HeadlessPasses) -> None:
        """Remove a watcher, and with the last one this forward."""
        self.watchers.remove(watcher)
        if self.watchers or self._head.__dict__.get("forward") is not self:
            return
        if self._own is None:
            del self._head.forward
        else:
            self._head.forward = self._own

    def __call__(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        active = [watcher for watcher in self.watchers if watcher.active]
        if active:
            weights = head_weights(self._head)
            for watcher in active:
                watcher.reach(weights)
            if not torch.is_grad_enabled():
                return hidden
            reached: Tensor = _Reached.apply(hidden, *weights)  # type: ignore[no-untyped-call]
            return reached
        if self._own is not None:
            return self._own(hidden, *arguments, **keywords)  # type: ignore[no-any-return]
        return type(self._head).forward(self._head, hidden, *arguments, **keywords)  # type: ignore[no-any-return]


class _Reached(torch.autograd.Function):
    """The hidden states themselves, with the head in their graph.

    DistributedDataParallel looks for unused parameters in the graph of a forward's outputs. The loss uses the head, but
    after the forward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a view of the hidden states."""
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the hidden states, and none of the head."""
        return gradient, None, None


def _gathered(parameter: Tensor) -> Tensor:
    """Return the whole value of a sharded parameter. The gradient is averaged over the processes, as usual there."""
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    whole: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())  # type: ignore[no-untyped-call]
    return whole


# Students, and how many losses of each read logits in training.
_readers_of_logits: MutableMapping[nn.Module, int] = weakref.WeakKeyDictionary()


def keep_logits(student: nn.Module) -> Callable[[], None]:
    """Let the training passes of a student make logits until the returned function is called."""
    _readers_of_logits[student] = _readers_of_logits.get(student, 0) + 1
    reference = weakref.ref(student)

    def release() -> None:
        if (alive := reference()) is not None:
            _readers_of_logits[alive] -= 1

    return release


class StudentPasses:
    """Hooks that make a student's training passes headless. A pass in evaluation or with labels keeps its head."""

    def __init__(self, student: nn.Module) -> None:
        self.passes = HeadlessPasses(student)
        self.refusal = self.passes.refusal
        self._began = False
        self._handles = []
        if self.refusal is None:
            self._handles = [student.register_forward_pre_hook(self._before, with_kwargs=True)]

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_student_passes, ()

    def close_after(self, student: nn.Module) -> None:
        """Register the hook that ends a pass whatever happens in it, after the hooks that read its head."""
        if self.refusal is None:
            self._handles.append(student.register_forward_hook(self._after, always_call=True))

    def take(self) -> HeadWeights | None:
        """Return the head's weights of the pass that ends now; None for a pass with its head."""
        if not self._began:
            return None
        self._began = False
        return self.passes.end()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self.passes.remove()

    def _before(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = named_arguments(module, arguments, keywords)
        trains = module.training and torch.is_grad_enabled() and given.get("labels") is None
        if trains and not _readers_of_logits.get(module):
            self.passes.begin()
            self._began = True

    def _after(self, *_: Any) -> None:
        self.take()


def _no_student_passes() -> StudentPasses:
    found = StudentPasses.__new__(StudentPasses)
    found.passes, found.refusal = _never_headless(), "the model is a copy"
    found._began, found._handles = False, []
    return found


class TeacherPasses:
    """Headless calls of a teacher, a module or a function. ``refusal`` is the reason why the teacher makes logits."""

    def __init__(self, teacher: Callable[..., Any], student: StudentPasses) -> None:
        self.refusal: str | None
        self._function = as_module(teacher) is None
        self._model = _only_model(teacher)
        self._passes = None
        if self._model is None:
            self.refusal = "no model, or more than one, was found in the function"
            return
        # A teacher that is the student without its adapters has the student's head.
        shared = student.refusal is None and _head_of(self._model) is student.passes.head
        self._passes = student.passes if shared else HeadlessPasses(self._model)
        self._owned = not shared
        self.refusal = self._passes.refusal

    def call(self, teacher: Callable[..., Any], arguments: Any, keywords: Any) -> tuple[Any, HeadWeights | None]:
        """Call the teacher; return its outputs and the weights of its head, or None if the outputs are logits."""
        if self.refusal is not None or self._passes is None:
            return teacher(*arguments, **keywords), None
        assert self._model is not None
        made: list[tuple[Tensor, int]] = []

        def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
            made.extend((tensor, tensor._version) for tensor in output_tensors(outputs))

        handle = self._model.register_forward_hook(note)
        self._passes.begin()
        try:
            outputs = teacher(*arguments, **keywords)
        finally:
            handle.remove()
            head = self._passes.end()
        # A function may change the logits that its model made. Hidden states must not be changed like logits.
        returned = output_tensors(outputs)[:1]
        unchanged = any(one is tensor and one._version == version for tensor, version in made for one in returned)
        if head is not None and self._function and not unchanged:
            self.refusal = "the function does not return its model's logits as they are"
            return teacher(*arguments, **keywords), None
        return outputs, None if head is None else self._passes.usable(head)

    def remove(self) -> None:
        """Give the teacher its head back."""
        if self._passes is not None and self._owned:
            self._passes.remove()


def _only_model(teacher: Callable[..., Any]) -> nn.Module | None:
    """Return the model that a teacher runs, if there is exactly one."""
    module = as_module(teacher)
    if module is not None:
        return module
    found = {id(transformers_model(one)): one for one in modules_in(teacher)}
    return next(iter(found.values())) if len(found) == 1 else None


def _head_of(model: nn.Module) -> nn.Module | None:
    try:
        return find_head(transformers_model(model))
    except ValueError:
        return None


def _wrapper_refusal(model: nn.Module) -> str | None:
    """Return a reason if a module around the model of transformers may change the logits."""
    inner = transformers_model(model)
    if model is inner or any(kind.__name__ in _TRANSPARENT for kind in type(model).__mro__):
        return None
    return f"a {type(model).__name__} is around the model of transformers, and may change its logits"
