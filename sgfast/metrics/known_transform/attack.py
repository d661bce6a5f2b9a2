r"""`known_transform_attack`: the attacker who knows the noise layer, and reads a text from left to right."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.metrics.known_transform.likelihood import Observation, observe
from sgfast.metrics.known_transform.rates import ReadingRates, reading_rates
from sgfast.metrics.known_transform.search import Attacker, read_sequence
from sgfast.metrics.known_transform.shortlist import shortlist
from sgfast.metrics.per_sequence import check_token_ids
from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.noise_layer.next_token import check_causal, evaluating
from sgfast.ops import validation
from sgfast.ops.nearest import nearest_embeddings
from sgfast.ops.precision import full_precision_products
from sgfast.ops.validation import check_count, check_real

DEFAULT_CHUNK_BYTES = 64 * 2**20


class KnownTransformResult(NamedTuple):
    """What the attacker read, and how often the reading was wrong.

    ``tokens`` (B, T) int64 are the tokens read, −1 where ``attention_mask`` is 0. ``scores`` (B,) float64 are the
    log-scores of the readings, from the first transformed token on. ``ranks`` and ``leads`` (B, T) are the true token's
    rank at its place (−1 without ``input_ids`` and at other tokens) and the attacker's confidence, the difference of
    the two best scores. The rates are float32 scalars, None without ``input_ids``; ``canary_recall`` also without
    ``canaries``.
    """

    tokens: Tensor
    scores: Tensor
    ranks: Tensor
    leads: Tensor
    failure_rate: Tensor | None = None
    top_10_failure_rate: Tensor | None = None
    worst_decile_failure_rate: Tensor | None = None
    exact_sequence_rate: Tensor | None = None
    canary_recall: Tensor | None = None


@torch.no_grad()
def known_transform_attack(
    transformed: Tensor,
    noise_layer: BaseNoiseLayer,
    table: Tensor,
    noise_mask: Tensor,
    *,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    canaries: Tensor | None = None,
    language_model: Any = None,
    prior_weight: float = 1.0,
    beam: int = 1,
    candidates: int | None = None,
    draws: int = 1,
    max_chunk_bytes: int | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> KnownTransformResult:
    r"""Read a text from its transformed embeddings, as an attacker who knows the noise layer does.

    The attack reads a sequence from left to right. The score of a token c at place t, after the tokens read so far, is

        Σ_f log N(x̃_tf; e_cf + µ_cf, σ_cf²)  +  prior_weight · log p_LM(c | tokens so far)

    with the mean shift µ_c and the deviation σ_c that the noise layer gives to c after these tokens. A feature that the
    layer suppresses for c must equal µ_cf instead (up to rounding). The ``beam`` best sequences are kept. For
    independent Gaussians and a uniform prior, the attack is Bayes-optimal: no attack on one text reads more tokens.

    A low failure rate proves that the text can be read by anyone who has the client's file. A high failure rate says
    that this search failed: a longer beam, all candidates or a better language model may do better.

    Args:
        transformed: (B, T, D) transformed embeddings, any floating dtype.
        noise_layer: the layer that made them. A token's mean and deviation must not depend on later tokens. A
            `TransformerCloak` keeps keys and values, so that a candidate costs one step of its estimators. Any other
            layer runs over the whole sequence for every candidate.
        table: (V, D), the embedding table, multiplied by the embedding's scale if the model has one.
        noise_mask: (B, T), 1 = transformed. The tokens elsewhere are read exactly, as the nearest row.
        attention_mask: (B, T), 1 = a token; None for all. Padding may stand on either side.
        input_ids: (B, T), the true tokens. They serve the rates alone.
        canaries: (B, T), 1 = a token of a secret; adjacent tokens make one secret. Needs ``input_ids``.
        language_model: a causal language model of transformers, the attacker's prior; None for a uniform one. The
            log-probability of a sequence's first token is 0.
        prior_weight: factor of the prior's log-probability, at least 0.
        beam: number of sequences that are kept.
        candidates: number of tokens that are scored exactly at a place; None for all V. They are the likeliest under
            the µ_c and σ_c that each token has after the tokens before the first transformed one, so that no token is
            lost for its mean shift. The cost is one pass over the vocabulary for all sequences that begin alike.
        draws: the number of transforms of the same text whose mean ``transformed`` is; the deviation is then σ/√draws.
        max_chunk_bytes: bound on temporaries; default 64 MiB. Keys and values, (T, D)-sized, come on top, as does what
            the language model takes. One candidate is scored at least.
        on_token: called after each transformed token that was read, to show progress.

    Returns:
        `KnownTransformResult`.

    Raises:
        TypeError: an argument's type.
        ValueError: shapes or devices do not fit, a number is out of range, the layer is not causal, ``canaries``
            without ``input_ids``, ``draws`` above 1 with a layer that clamps, or a language model with fewer logits
            than the table has rows.

    Example:
        >>> import torch
        >>> from sgfast.metrics.privacy import known_transform_attack
        >>> from sgfast.noise_layer import CloakNoiseLayer
        >>> _ = torch.manual_seed(0)
        >>> table, input_ids = torch.randn(50, 8), torch.tensor([[3, 1, 4]])
        >>> layer = CloakNoiseLayer(input_shape=(1, 3, 8), scale=(0.01, 0.1), seed=0).eval()
        >>> _ = torch.nn.init.normal_(layer.locs, std=10.0)  # a mean shift that hides nothing from this attacker
        >>> with torch.no_grad():
        ...     transformed = layer(table[input_ids])
        >>> result = known_transform_attack(transformed, layer, table, torch.ones(1, 3), input_ids=input_ids)
        >>> result.tokens, result.failure_rate
        (tensor([[3, 1, 4]]), tensor(0.))
    """
    attended, noised = _check_inputs(transformed, table, noise_mask, attention_mask)
    if not isinstance(noise_layer, BaseNoiseLayer):
        raise TypeError(f"noise_layer must be a noise layer of sgfast; got {type(noise_layer).__name__}")
    canaries = _check_truth(transformed, input_ids, canaries)
    check_count("beam", beam)
    check_count("draws", draws)
    if not 0 <= check_real("prior_weight", prior_weight) < float("inf"):
        raise ValueError(f"prior_weight must be at least 0; got {prior_weight}")
    if candidates is not None and check_count("candidates", candidates) > len(table):
        raise ValueError(f"candidates must be at most {len(table)}, the rows of table; got {candidates}")
    if draws > 1 and noise_layer.value_range is not None:
        raise ValueError("draws must be 1 for a layer with a value_range: a mean of clamped draws is no Gaussian")
    max_bytes = DEFAULT_CHUNK_BYTES if max_chunk_bytes is None else validation.chunk_bytes(max_chunk_bytes)
    attacker = Attacker(noise_layer, table.detach(), language_model, prior_weight, beam, draws, max_bytes)
    with ExitStack() as settings:
        for module in (noise_layer, language_model):
            if module is not None:
                settings.enter_context(evaluating(module))
        settings.enter_context(full_precision_products(table.device))
        # Some layers have parameters for each place, so the sequence has the length of the text.
        places = torch.arange(transformed.shape[1], device=table.device)
        check_causal(noise_layer, attacker.table[places % len(table)])
        result = _read(attacker, transformed, attended, noised, candidates, input_ids, on_token)
    if input_ids is None:
        return result
    return _with_rates(result, input_ids, attended & noised, canaries)


def _check_inputs(
    transformed: Tensor, table: Tensor, noise_mask: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the attacker's view; return the attended and the transformed tokens, (B, T) bool each."""
    validation.check_floating("transformed", transformed)
    validation.check_floating("table", table, transformed)
    if table.dim() != 2 or not len(table):
        raise ValueError(f"table must have shape (V, D); got {tuple(table.shape)}")
    if transformed.dim() != 3 or transformed.shape[-1] != table.shape[1]:
        raise ValueError(f"transformed must have shape (B, T, {table.shape[1]}); got {tuple(transformed.shape)}")
    validation.check_device("table", table, "transformed", transformed)
    noised = validation.row_mask(noise_mask, "noise_mask", "transformed", transformed)
    attended = validation.row_mask(attention_mask, "attention_mask", "transformed", transformed)
    if noised is None:
        raise TypeError("noise_mask must be a torch.Tensor; got None")
    return torch.ones_like(noised) if attended is None else attended, noised


def _check_truth(transformed: Tensor, input_ids: Tensor | None, canaries: Tensor | None) -> Tensor | None:
    if input_ids is None:
        if canaries is not None:
            raise ValueError("canaries need input_ids, the true tokens")
        return None
    check_token_ids(input_ids, transformed.shape[:-1])
    validation.check_device("input_ids", input_ids, "transformed", transformed)
    return validation.row_mask(canaries, "canaries", "transformed", transformed)


def _read(
    attacker: Attacker,
    transformed: Tensor,
    attended: Tensor,
    noised: Tensor,
    candidates: int | None,
    input_ids: Tensor | None,
    on_token: Callable[[], None],
) -> KnownTransformResult:
    shape, device = attended.shape, transformed.device
    tokens, ranks = (torch.full(shape, -1, dtype=torch.int64, device=device) for _ in range(2))
    leads = torch.full(shape, float("nan"), dtype=torch.float64, device=device)
    scores = torch.zeros(shape[0], dtype=torch.float64, device=device)
    known = _known_tokens(attacker, transformed, attended, noised)
    shortlists = _shortlists(attacker, transformed, attended, known, candidates)
    for row in range(shape[0]):
        here = attended[row]
        if not bool(here.any()):
            continue
        reading = read_sequence(
            attacker,
            observe(transformed[row, here]),
            known[row, here],
            shortlists.get(row),
            None if input_ids is None else input_ids[row, here],
            on_token,
        )
        tokens[row, here], ranks[row, here], leads[row, here] = reading.tokens, reading.ranks, reading.leads
        scores[row] = reading.score
    return KnownTransformResult(tokens, scores, ranks, leads)


def _known_tokens(attacker: Attacker, transformed: Tensor, attended: Tensor, noised: Tensor) -> Tensor:
    """Return (B, T) the tokens whose embeddings were not transformed, −1 elsewhere."""
    known = torch.full(attended.shape, -1, dtype=torch.int64, device=attended.device)
    clear = attended & ~noised
    if bool(clear.any()):
        _, nearest = nearest_embeddings(transformed[clear], attacker.table, max_chunk_bytes=attacker.max_bytes)
        known[clear] = nearest[:, 0]
    return known


def _shortlists(
    attacker: Attacker, transformed: Tensor, attended: Tensor, known: Tensor, candidates: int | None
) -> dict[int, Tensor]:
    """Return the candidates (T, K) of each row's attended tokens; nothing where all tokens are candidates."""
    if candidates is None or candidates == len(attacker.table):
        return {}
    alike: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(known)):
        tokens = known[row, attended[row]]
        hidden = (tokens < 0).nonzero()
        if len(hidden):
            alike.setdefault(tuple(tokens[: int(hidden[0])].tolist()), []).append(row)
    found = {}
    for prefix, rows in alike.items():
        observed = [observe(transformed[row, attended[row]]) for row in rows]
        hidden_tokens = [known[row, attended[row]] < 0 for row in rows]
        pairs = list(zip(observed, hidden_tokens, strict=True))
        embedding = torch.cat([one.embedding[hidden] for one, hidden in pairs])
        rounding = torch.cat([one.rounding[hidden] for one, hidden in pairs])
        tokens = shortlist(
            attacker.noise_layer,
            attacker.table,
            torch.tensor(prefix, dtype=torch.int64, device=known.device),
            Observation(embedding, rounding),
            candidates,
            draws=attacker.draws,
            length=known.shape[1],
            max_bytes=attacker.max_bytes,
        )
        parts = torch.split(tokens, [int(hidden.sum()) for hidden in hidden_tokens])
        for row, hidden, part in zip(rows, hidden_tokens, parts, strict=True):
            found[row] = part.new_zeros(len(hidden), candidates)
            found[row][hidden] = part
    return found


def _with_rates(
    result: KnownTransformResult, input_ids: Tensor, counted: Tensor, canaries: Tensor | None
) -> KnownTransformResult:
    rates: ReadingRates = reading_rates(result.tokens, result.ranks, result.leads, input_ids, counted, canaries)
    return result._replace(**rates._asdict())
