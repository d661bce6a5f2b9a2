"""Utility of each sequence of a batch: the similarity of two models' next-token distributions.

Every token has divergences between its noisy and its clean next-token distribution, in nats, by default the four of
`UTILITY_DIVERGENCES`, and 1 or 0 for agreement on the likeliest token. A sequence's value is the mean over its attended
tokens. The metric is the mean over the sequences with an attended token:

    D_b = Σ_t a_bt D_bt / Σ_t a_bt,   metric = mean of D_b over the b with Σ_t a_bt > 0

Sums are exact (`sgfast.metrics.exact_sum`): batches, order, padding and splits change only the last float32 digits of
D_bt.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgfast.metrics.exact_sum import exact_sums, to_float64
from sgfast.ops import rows, validation
from sgfast.ops.divergence import divergences
from sgfast.ops.divergence.problem import SUPPORTS, Support, check_kinds
from sgfast.ops.linear.operation import logits_of_rows
from sgfast.ops.sides import LinearLogits, LogitsOrSide, tensor_of
from sgfast.ops.validation import check_count

# Key in the result → kind of `sgfast.ops.divergences`. "jefferys" is the documented spelling.
UTILITY_DIVERGENCES = {
    "next_token_utility/jefferys": "jeffreys",
    "next_token_utility/jensen_shannon": "jensen_shannon",
    "next_token_utility/total_variation": "total_variation",
    "next_token_utility/squared_hellinger_distance": "squared_hellinger",
}
AGREEMENT = "next_token_agreement"
# Means over a sequence's tokens whose next one is attended too.
PREDICTED_MEANS = ("clean_cross_entropy", "noisy_cross_entropy")

_IGNORED = -100
_HIDDEN_CHUNK_BYTES = 256 * 2**20
# Logits, and what a head that scales or caps them makes of them.
_COPIES_OF_LOGITS = 2


class Comparison(NamedTuple):
    """The divergences that are asked for: kinds by key, and their terms."""

    kinds: Mapping[str, str]
    top_k: int | None
    support: Support
    shared_vocab: int | None


def check_comparison(
    kinds: str | Sequence[str] | None, top_k: int | None, support: Support, shared_vocab: int | None
) -> Comparison:
    """Check the options of a comparison, and give each kind its key.

    Raises:
        TypeError: ``top_k`` or ``shared_vocab`` is no int.
        ValueError: an unknown kind or support, no kind, or a number below 1.
    """
    validation.check_choice("support", support, SUPPORTS)
    for name, count in (("top_k", top_k), ("shared_vocab", shared_vocab)):
        if count is not None:
            check_count(name, count)
    if kinds is None:
        return Comparison(UTILITY_DIVERGENCES, top_k, support, shared_vocab)
    names = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    check_kinds("kinds", names)
    if not names:
        raise ValueError("kinds must name at least one kind, or be None for the kinds of UTILITY_DIVERGENCES")
    documented = {kind: key for key, kind in UTILITY_DIVERGENCES.items()}
    keys = {documented.get(kind, f"next_token_utility/{kind}"): kind for kind in names}
    return Comparison(keys, top_k, support, shared_vocab)


@torch.no_grad()
def sequence_utility(
    noisy_logits: LogitsOrSide,
    clean_logits: LogitsOrSide,
    attention_mask: Tensor,
    *,
    input_ids: Tensor | None = None,
    kinds: str | Sequence[str] | None = None,
    top_k: int | None = None,
    support: Support = "truncate",
    shared_vocab: int | None = None,
    max_chunk_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Measure the divergences between each sequence's noisy and clean next-token distributions.

    Noisy and clean logits may belong to one model with and without a transform, or to a student and its teacher. Values
    near 0 show that the model's predictions survive on this text. They say nothing about privacy. The text is only a
    sample of other texts.

    Args:
        noisy_logits: (..., T, V), float32, bfloat16, float16 or float64; or a `sgfast.LinearLogits` of this shape.
        clean_logits: of the same shape (with ``shared_vocab`` the last dimensions may differ); likewise.
        attention_mask: (..., T), 1 = real token. Other positions are not read.
        input_ids: (..., T) integers, the tokens. They add the cross-entropies to the result.
        kinds: one or more of the kinds of `sgfast.ops.divergences`; None for the four of `UTILITY_DIVERGENCES`.
        top_k: restrict each divergence to the union S of both sides' top-k; None for all.
        support: meaning of the restriction, see `sgfast.ops.divergences`. The default ``truncate`` takes the terms in
            S: the KL and skew kinds may be negative then, and ``tail`` keeps them true divergences.
        shared_vocab: n: compare the first n columns only, when the two sides pad one vocabulary differently. Attended
            tokens must be below n.
        max_chunk_bytes: bound on the divergences' temporaries, see ``sgfast.ops.divergences``; with a
            `sgfast.LinearLogits` see ``sequence_utility_from_hidden``.

    Returns:
        Values of shape (...) by name, on the logits' device. Means over a sequence's tokens, in float64:

        * each divergence in nats, under the keys of `UTILITY_DIVERGENCES`, and under ``next_token_utility/{kind}`` for
          other kinds; ``next_token_agreement``, the fraction of tokens for which both sides have the same likeliest
          next token (ties: the lower index); NaN if no token is attended;
        * with ``input_ids``, ``clean_cross_entropy`` and ``noisy_cross_entropy``, −log p(next token) in nats over the
          tokens whose next token is attended too; NaN if there are none. The perplexity is exp of this value.

        The numbers of tokens in these means, in int64: ``attended_tokens`` and ``predicted_tokens``.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes or devices do not fit, an unknown name, a number out of range; on a CPU also a token ≥ V.

    Example:
        >>> import torch
        >>> from sgfast.metrics import sequence_utility
        >>> noisy, clean = torch.tensor([[[0.0, 0.0], [9.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [9.0, 0.0]]])
        >>> sequence_utility(noisy, clean, torch.tensor([[1, 1]]))["next_token_agreement"]
        tensor([0.5000], dtype=torch.float64)
    """
    if isinstance(noisy_logits, LinearLogits) or isinstance(clean_logits, LinearLogits):
        return sequence_utility_from_hidden(
            tensor_of(noisy_logits),
            tensor_of(clean_logits),
            _head_of(noisy_logits),
            attention_mask,
            clean_head=_head_of(clean_logits),
            input_ids=input_ids,
            kinds=kinds,
            top_k=top_k,
            support=support,
            shared_vocab=shared_vocab,
            max_chunk_bytes=max_chunk_bytes,
        )
    asked = check_comparison(kinds, top_k, support, shared_vocab)
    _check_leading("noisy_logits", noisy_logits, "clean_logits", clean_logits)
    noisy_logits, clean_logits = _shared_columns(noisy_logits, clean_logits, shared_vocab)
    attended, labels = _check_tokens("noisy_logits", noisy_logits, attention_mask, input_ids)
    per_token = _token_utility(noisy_logits, clean_logits, attended, labels, asked, max_chunk_bytes)
    return _per_sequence(per_token, attended, labels)


@torch.no_grad()
def sequence_utility_from_hidden(
    noisy_hidden: Tensor,
    clean_hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    attention_mask: Tensor,
    *,
    clean_head: Callable[[Tensor], Tensor] | None = None,
    input_ids: Tensor | None = None,
    kinds: str | Sequence[str] | None = None,
    top_k: int | None = None,
    support: Support = "truncate",
    shared_vocab: int | None = None,
    max_chunk_bytes: int | None = None,
) -> dict[str, Tensor]:
    """Measure the values of ``sequence_utility`` from final hidden states. The logits never exist as a whole.

    Args:
        noisy_hidden: (..., T, D), the input of the model's head (after the final norm).
        clean_hidden: of the same shape (with ``clean_head`` the last dimension and the dtype may differ).
        head: function from (n, D) hidden states to (n, V) logits: `sgfast.metrics.language_model_head(model)`, or any
            function of rows.
        attention_mask: (..., T), 1 = real token.
        clean_head: the head of the clean side, if the clean side is another model; None: ``head``.
        input_ids: see ``sequence_utility``.
        kinds: see ``sequence_utility``.
        top_k: see ``sequence_utility``.
        support: see ``sequence_utility``.
        shared_vocab: see ``sequence_utility``.
        max_chunk_bytes: bound on all temporaries with the logits; default 256 MiB. At least one token's logits and
            their temporaries exist at once, about 128 bytes per vocabulary entry. Larger chunks make the products with
            the head's weight faster.

    Returns:
        See ``sequence_utility``.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes or devices do not fit, an unknown name, a number out of range; on a CPU also a token ≥ V.

    Example:
        >>> import torch
        >>> from sgfast.metrics import sequence_utility_from_hidden
        >>> head = torch.nn.Linear(2, 3, bias=False).requires_grad_(False)
        >>> hidden = torch.ones(1, 4, 2)
        >>> sequence_utility_from_hidden(hidden, hidden, head, torch.ones(1, 4))["next_token_utility/jefferys"]
        tensor([0.], dtype=torch.float64)
    """
    asked = check_comparison(kinds, top_k, support, shared_vocab)
    if clean_head is None:
        validation.check_pair("noisy_hidden", noisy_hidden, "clean_hidden", clean_hidden)
    _check_leading("noisy_hidden", noisy_hidden, "clean_hidden", clean_hidden)
    attended, labels = _check_tokens("noisy_hidden", noisy_hidden, attention_mask, input_ids)

    def both_logits(noisy: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        if clean_head is not None:
            return head(noisy), clean_head(clean)
        noisy_logits, clean_logits = head(torch.cat([noisy, clean])).chunk(2)  # one product is faster than two
        return noisy_logits, clean_logits

    max_bytes = _HIDDEN_CHUNK_BYTES if max_chunk_bytes is None else validation.chunk_bytes(max_chunk_bytes)
    # A third each for the logits, for the divergences, and for matrix products and the allocator.
    third = max(1, max_bytes // 3)
    probes = both_logits(*(hidden.new_zeros((1, hidden.shape[-1])) for hidden in (noisy_hidden, clean_hidden)))
    row_bytes = _COPIES_OF_LOGITS * sum(probe.numel() * probe.element_size() for probe in probes)
    per_token: dict[str, Tensor] = {}
    for chunk in rows.row_chunks(attended.shape, attended, row_bytes, third):
        logits = both_logits(rows.read_rows(noisy_hidden, chunk), rows.read_rows(clean_hidden, chunk))
        found = _token_utility(
            *_shared_columns(*logits, shared_vocab),
            attended.reshape(-1)[chunk],
            None if labels is None else labels.reshape(-1)[chunk],
            asked,
            third,
        )
        for name, values in found.items():
            if name not in per_token:
                per_token[name] = values.new_zeros(attended.numel())
            per_token[name][chunk] = values
    if not per_token:  # no token is attended
        nothing = _shared_columns(probes[0][:0], probes[1][:0], shared_vocab)
        per_token = _token_utility(*nothing, attended.new_empty(0), _no_labels(labels), asked, None)
        per_token = {name: values.new_zeros(attended.numel()) for name, values in per_token.items()}
    return _per_sequence({name: values.view(attended.shape) for name, values in per_token.items()}, attended, labels)


def _head_of(side: LogitsOrSide) -> Callable[[Tensor], Tensor]:
    """Return the function from rows of a side's tensor to logits."""
    if isinstance(side, LinearLogits):
        return functools.partial(logits_of_rows, side)
    return lambda logits: logits


def _check_leading(noisy_name: str, noisy: Tensor, clean_name: str, clean: Tensor) -> None:
    """Check two floating tensors (..., T, width) on one device, equal up to the width."""
    validation.check_floating(noisy_name, noisy)
    validation.check_floating(clean_name, clean, noisy)
    for name, tensor in ((noisy_name, noisy), (clean_name, clean)):
        if tensor.dim() < 2:
            letter = "V" if "logits" in name else "D"
            raise ValueError(f"{name} must have shape (..., T, {letter}); got {tuple(tensor.shape)}")
    if noisy.shape[:-1] != clean.shape[:-1]:
        raise ValueError(
            f"{noisy_name} and {clean_name} must have one shape; got {tuple(noisy.shape)} and {tuple(clean.shape)}"
        )
    validation.check_device(clean_name, clean, noisy_name, noisy)


def _shared_columns(noisy: Tensor, clean: Tensor, shared_vocab: int | None) -> tuple[Tensor, Tensor]:
    """Return the columns of both sides' logits that are compared."""
    if shared_vocab is not None:
        for name, logits in (("noisy_logits", noisy), ("clean_logits", clean)):
            if logits.shape[-1] < shared_vocab:
                raise ValueError(
                    f"{name} needs shared_vocab={shared_vocab} columns at least; got shape {tuple(logits.shape)}"
                )
        noisy, clean = noisy[..., :shared_vocab], clean[..., :shared_vocab]
    elif noisy.shape[-1] != clean.shape[-1]:
        raise ValueError(
            f"noisy_logits and clean_logits have {noisy.shape[-1]} and {clean.shape[-1]} columns; shared_vocab=n "
            "compares the first n"
        )
    validation.check_pair("noisy_logits", noisy, "clean_logits", clean)
    return noisy, clean


def _check_tokens(
    name: str, noisy: Tensor, attention_mask: Tensor, input_ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the mask of attended tokens and, for each token, the next token (`_IGNORED` if it is not attended)."""
    if attention_mask is None:
        raise TypeError("attention_mask must be a torch.Tensor; got None")
    attended = validation.row_mask(attention_mask, "attention_mask", name, noisy)
    assert attended is not None
    if input_ids is None:
        return attended, None
    check_token_ids(input_ids, attended.shape)
    validation.check_device("input_ids", input_ids, name, noisy)
    labels = torch.full(input_ids.shape, _IGNORED, dtype=torch.int64, device=input_ids.device)
    labels[..., :-1] = torch.where(attended[..., :-1] & attended[..., 1:], input_ids[..., 1:], _IGNORED)
    return attended, labels


def check_token_ids(input_ids: Tensor, shape: torch.Size) -> None:
    """Check for a tensor of integers of the given shape."""
    validation.check_tensor("input_ids", input_ids)
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must hold integers; got {input_ids.dtype}")
    if input_ids.shape != shape:
        raise ValueError(
            f"input_ids must have shape {tuple(shape)}, one token a position; got {tuple(input_ids.shape)}"
        )


def _token_utility(
    noisy_logits: Tensor,
    clean_logits: Tensor,
    attended: Tensor,
    labels: Tensor | None,
    asked: Comparison,
    max_chunk_bytes: int | None,
) -> dict[str, Tensor]:
    """Compute divergences, agreement and cross-entropies per token. Tokens that are not attended have any value."""
    values = divergences(
        noisy_logits,
        clean_logits,
        tuple(asked.kinds.values()),
        top_k=asked.top_k,
        support=asked.support,
        mask=attended,
        labels=labels,
        max_chunk_bytes=max_chunk_bytes,
    )
    per_token = {key: values[kind] for key, kind in asked.kinds.items()}
    per_token[AGREEMENT] = (noisy_logits.argmax(-1) == clean_logits.argmax(-1)).to(torch.float32)
    if labels is not None:
        clean = divergences(
            clean_logits, clean_logits, (), mask=attended, labels=labels, max_chunk_bytes=max_chunk_bytes
        )
        for name, found in (("clean_cross_entropy", clean), ("noisy_cross_entropy", values)):
            per_token[name] = found["label_cross_entropy"].clamp(min=0)  # log-sum-exp less logit may round below
    return per_token


def _no_labels(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.new_empty(0)


def _per_sequence(per_token: dict[str, Tensor], attended: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    predicted = torch.zeros_like(attended) if labels is None else labels != _IGNORED
    means = {
        name: sequence_means(values, predicted if name in PREDICTED_MEANS else attended)
        for name, values in per_token.items()
    }
    return means | {"attended_tokens": attended.sum(-1), "predicted_tokens": predicted.sum(-1)}


def sequence_means(values: Tensor, selected: Tensor) -> Tensor:
    """Average values over the selected tokens of each sequence, in float64; NaN without any."""
    # Truncated KL terms may be negative. The sums of both signs keep their digits apart.
    signs = torch.stack([values, -values]).clamp(min=0)
    positive, negative = to_float64(exact_sums(torch.where(selected, signs, 0)))
    means: Tensor = (positive - negative) / selected.sum(-1)
    return means
