"""The arguments of one call of `divergences`: their checks, and the problem that the checked arguments make."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sgfast.ops import dispatch, rows, validation
from sgfast.ops.divergence.kinds import KINDS, LABEL_KIND, users_of
from sgfast.ops.topk.selection import support_width

Support = Literal["truncate", "renormalize", "tail"]
SUPPORTS = ("truncate", "renormalize", "tail")
# One temperature for both sides, or a pair (noisy, clean). Each is a number or a tensor of the row shape.
Temperature = float | Tensor | tuple[float | Tensor, float | Tensor]
TopKOf = Literal["both", "noisy", "clean"]
TOP_K_OF = ("both", "noisy", "clean")
# The default weights of the mixtures, and the kinds that have each weight.
DEFAULT_BETA, DEFAULT_SKEW = 0.5, 0.1
BETA_KINDS, SKEW_KINDS = users_of("beta"), users_of("skew")


class Problem(NamedTuple):
    """The arguments of the operator ``sgfast::divergences``; backward's has them too."""

    noisy: Tensor
    clean: Tensor
    labels: Tensor | None
    support_mask: Tensor | None
    mask: Tensor | None
    temperature: Tensor  # of the row shape
    clean_temperature: Tensor | None  # likewise, where the clean side has its own
    kinds: str  # joined by commas; that of hard labels is the last
    top_k: int  # 0: no top-k support
    top_k_of: str
    support: str
    beta: float
    skew: float
    label_smoothing: float
    max_chunk_bytes: int
    impl: str | None
    noisy_wanted: bool
    clean_wanted: bool

    @property
    def has_support(self) -> bool:
        """The sums are restricted to a part of the vocabulary."""
        return self.top_k > 0 or self.support_mask is not None

    @property
    def support_width(self) -> int:
        """The number of indices of a top-k support, padding included."""
        return support_width(self.top_k, self.top_k_of, self.noisy.shape[-1])

    @property
    def sides_wanted(self) -> tuple[bool, bool]:
        """The sides whose gradient is asked for: noisy, clean."""
        return self.noisy_wanted, self.clean_wanted

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The names of the kinds; the kind of hard labels is the last."""
        return tuple(self.kinds.split(","))

    @property
    def row_scalars_shape(self) -> tuple[int, ...]:
        """Shape of the scalars that forward keeps for backward."""
        return (row_scalar_count(self.kind_names, self.top_k), *self.noisy.shape[:-1])


def row_scalar_count(kinds: tuple[str, ...], top_k: int) -> int:
    """Count the scalars that a row keeps for backward.

    Each side has a maximum and a sum. With a top-k support the tail of each side has a maximum and a sum too. Each kind
    has two sums of partials. Hard labels beside a top-k support also keep the scalars of the whole vocabulary.
    """
    if top_k and LABEL_KIND in kinds:
        return row_scalar_count(kinds[:-1], top_k) + row_scalar_count((LABEL_KIND,), 0)
    return (8 if top_k else 4) + 2 * len(kinds)


class Options(NamedTuple):
    """Checked options: the kinds without repetition, the kind of hard labels last; the weights of the mixtures."""

    kinds: tuple[str, ...]
    beta: float
    skew: float


def check_options(
    kinds: str | Sequence[str],
    support: str,
    beta: float | None,
    skew: float | None,
    impl: str | None,
    *,
    with_labels: bool = False,
) -> Options:
    """Check the options and fill in the weights that are None.

    Raises:
        TypeError: kinds that are not names, or a mixture's weight that is not a number.
        ValueError: an unknown kind, support or implementation; a mixture's weight out of range, or of no kind asked.
    """
    if not isinstance(kinds, str | Sequence):
        raise TypeError(f"kinds must be a name or a sequence of names; got {type(kinds).__name__}")
    names = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not names and not with_labels:
        raise ValueError(f"kinds must name at least one of {', '.join(KINDS)} (it may be empty only with labels)")
    check_kinds("kinds", names)
    validation.check_choice("support", support, SUPPORTS)
    beta = mixture_weight("beta", beta, DEFAULT_BETA, BETA_KINDS, names)
    skew = mixture_weight("skew", skew, DEFAULT_SKEW, SKEW_KINDS, names)
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie between 0 and 1, both excluded; got {beta}. "
            "At 0 it would be the kind forward_kl, at 1 reverse_kl: ask for those"
        )
    if not 0 <= skew < 1:
        raise ValueError(f"skew must be at least 0 and less than 1; got {skew}")
    dispatch.check_impl(impl)
    return Options((*dict.fromkeys(names), *((LABEL_KIND,) if with_labels else ())), beta, skew)


def check_kinds(argument: str, kinds: Iterable[object]) -> None:
    """Check the names of kinds; the message suggests a kind for a misspelt one."""
    for kind in kinds:
        if kind not in KINDS:
            suggestion = validation.did_you_mean(kind, KINDS)
            raise ValueError(f"{argument} must be among {', '.join(KINDS)}; got {kind!r}{suggestion}")


def mixture_weight(name: str, value: float | None, default: float, users: Sequence[str], kinds: Sequence[str]) -> float:
    """Return a mixture's weight, or the default for None. Refuse a weight that no kind uses."""
    if value is None:
        return default
    validation.check_number(name, value)
    if not set(users) & set(kinds):
        asked = ", ".join(kinds) or "labels alone"
        raise ValueError(f"{name}={value} has no use: only {' and '.join(users)} take {name}; asked for are {asked}")
    return float(value)


def check_label_smoothing(label_smoothing: float) -> None:
    """Check the share of the label's weight that is spread over the vocabulary."""
    validation.check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1; got {label_smoothing}")


def check_labels(labels: Tensor | None, like_name: str, like: Tensor) -> Tensor | None:
    """Check hard labels of the row shape of ``like`` and return them as int64."""
    if labels is None:
        return None
    validation.check_tensor("labels", labels, "a torch.Tensor or None", like)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    if labels.shape != like.shape[:-1]:
        raise ValueError(f"labels must have the row shape {tuple(like.shape[:-1])}; got {tuple(labels.shape)}")
    validation.check_device("labels", labels, like_name, like)
    return labels.long()


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Check a temperature given as a number."""
    validation.check_number(name, temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{name} must be positive and finite; got {temperature}")


def check_pair_length(temperature: tuple[object, ...]) -> None:
    """Check that a tuple of temperatures has two elements."""
    if len(temperature) != 2:
        raise ValueError(f"temperature must be one for both sides or a pair (noisy, clean); got {len(temperature)}")


def row_temperatures(temperature: Temperature, noisy: Tensor, clean: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return temperatures as tensors of the row shape: the noisy side's, and the clean side's if it has its own."""
    if not isinstance(temperature, tuple):
        return _row_temperature("temperature", temperature, noisy, clean), None
    check_pair_length(temperature)
    return (
        _row_temperature("temperature[0]", temperature[0], noisy, clean),
        _row_temperature("temperature[1]", temperature[1], noisy, clean),
    )


def _row_temperature(name: str, temperature: float | Tensor, logits: Tensor, other_logits: Tensor) -> Tensor:
    """Return one temperature as a tensor; a number is expanded without memory."""
    dtype = rows.compute_dtype(logits, other_logits)
    if isinstance(temperature, Tensor):
        validation.check_tensor(name, temperature)
        if temperature.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it is a constant of the divergence")
        if temperature.shape not in (logits.shape[:-1], torch.Size([])):
            raise ValueError(
                f"{name} must be a number or have the row shape {tuple(logits.shape[:-1])}; "
                f"got {tuple(temperature.shape)}"
            )
        return temperature.to(logits.device, dtype).expand(logits.shape[:-1])
    check_temperature(temperature, name)
    return torch.full((), temperature, dtype=dtype, device=logits.device).expand(logits.shape[:-1])


def check_label_values(labels: Tensor, mask: Tensor | None, size: int) -> None:
    """Refuse a label outside the vocabulary on a CPU.

    On a GPU reading the labels would stop the queue. There the row of such a label becomes NaN.
    """
    if labels.device.type != "cpu":
        return
    outside = labels >= size if mask is None else (labels >= size) & mask
    if outside.any():
        position = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"labels must be less than the vocabulary's size, {size}; got {labels[position]} at {position}"
        )


def check_support_mask(support_mask: Tensor, shape: torch.Size, beside: Tensor) -> None:
    """Check a boolean mask that broadcasts to the logits' shape, on the device of a side's tensor."""
    validation.check_tensor("support_mask", support_mask, "a boolean torch.Tensor or None", beside)
    if support_mask.dtype != torch.bool:
        raise TypeError(f"support_mask must be boolean; got {support_mask.dtype}")
    trailing = shape[len(shape) - support_mask.dim() :]
    if support_mask.dim() > len(shape) or any(
        size not in (1, full) for size, full in zip(support_mask.shape, trailing, strict=True)
    ):
        raise ValueError(
            f"support_mask must have the logits' shape {tuple(shape)} or broadcast to it; "
            f"got {tuple(support_mask.shape)}"
        )
    validation.check_device("support_mask", support_mask, "noisy_logits", beside)
