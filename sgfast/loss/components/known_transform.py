"""The attacker who knows the transform, as a component of a loss: how sure the attacker is of the true token.

The attacker of `sgfast.metrics.known_transform_attack` compares the likelihoods of candidates for a token. This
component measures, for some transformed tokens of a batch, by how many nats the true token leads some candidates.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgfast.loss.components.formulas import masked_mean, wide
from sgfast.model.capture import Capture
from sgfast.model.decoder import embedding_table_of
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.candidate_estimates import QUERIES_OF_A_PASS, candidate_estimates
from sgfast.noise_layer.transformer_cloak import TransformerCloak
from sgfast.ops import validation
from sgfast.ops.nearest import nearest_embeddings

# The attacker's effort in one batch: tokens that are attacked, and candidates beside the true token. On a CPU, these
# numbers cost about as much as a training step through six layers of a small model.
TOKENS, CANDIDATES = 48, 16


class Attack(NamedTuple):
    """The attacker's knowledge: the noise layer, and the embedding table (V, D)."""

    noise_layer: TransformerCloak
    table: Tensor


def attack_on(noisy_model: NoiseMaskedNoisyTransformerModel) -> Attack:
    """Check that the attack can be computed for a model, and return it.

    Raises:
        ValueError: another noise layer than `TransformerCloak`, a layer that suppresses or clamps features, or a target
            layer that is not the embedding.
    """
    layer = noisy_model.noise_layer
    if not isinstance(layer, TransformerCloak) or layer.masker is not None or layer.value_range is not None:
        raise ValueError(
            "known_transform_attack_loss_weight needs a TransformerCloak without percent_to_mask and value_range"
        )
    if noisy_model.target_depth != -1:
        raise ValueError(
            "known_transform_attack_loss_weight needs a transform of the embeddings, not of a deeper layer"
        )
    return Attack(layer, embedding_table_of(noisy_model.base_model))


def known_transform_log_odds(observed: Tensor, location: Tensor, std: Tensor) -> Tensor:
    r"""Log-odds, in nats, that the attacker gives to the true token against the mean of K other candidates.

        log N(x̃; m_0, σ_0²) − log (1/K) Σ_{c=1}^{K} N(x̃; m_c, σ_c²)

    0 means that the observation says nothing. The mean over observations bounds the information that an observation
    holds about its token: it is the leave-one-out bound of Poole et al., "On Variational Bounds of Mutual Information"
    (arXiv 1905.06922), with candidates that need not be drawn from the text. The attacker's posterior of the true token
    would be an equivalent measure, but a posterior that is 1 up to rounding has no gradient.

    Args:
        observed: (N, D), x̃.
        location: (N, K + 1, D), m = e + µ; the true token is the first one.
        std: (N, K + 1, D), σ, positive.

    Returns:
        (N,), float32 (float64 if an input is).

    Example:
        >>> import torch
        >>> location = torch.tensor([[[0.0], [0.0], [4.0]]])
        >>> known_transform_log_odds(torch.zeros(1, 1), location, torch.ones(1, 3, 1))
        tensor([0.6928])
    """
    validation.check_tensors(observed=observed, location=location, std=std)
    std = wide(std)
    standard = (wide(observed)[:, None] - wide(location)) / std
    log_likelihood = -(0.5 * standard.square() + std.log()).sum(-1)
    others = torch.logsumexp(log_likelihood[:, 1:], dim=1) - math.log(location.shape[1] - 1)
    return log_likelihood[:, 0] - others


def known_transform_component(
    capture: Capture, attack: Attack | None, count: Tensor | float | None
) -> dict[str, Tensor]:
    """Mean log-odds of the true token over random tokens among n & a; 0 without any.

    With a global ``count`` of tokens, the mean is multiplied by the batch's share. Candidates and tokens are drawn from
    torch's generator. Each pass of the estimators runs again in backward, which bounds memory.
    """
    if attack is None:
        return {}
    selected = capture.noise_mask
    rows, columns = selected.nonzero(as_tuple=True)
    if not len(rows):
        nothing = masked_mean(capture.transform.std.sum(-1), selected)
        return {"known_transform_attack": nothing}
    chosen = torch.randperm(len(rows), device=rows.device)[:TOKENS].sort().values
    mean = torch.cat(list(_odds_of_passes(capture, attack, rows[chosen], columns[chosen]))).mean()
    if count is not None:
        mean = masked_mean(mean.expand(selected.shape), selected, count)
    return {"known_transform_attack": mean}


def _odds_of_passes(capture: Capture, attack: Attack, rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield the log-odds of tokens, at ordered ``rows`` and ``columns`` of the batch, pass by pass."""
    transform = capture.transform
    tokens = _candidates(attack.table, transform.input[rows, columns])
    of_a_pass = max(1, QUERIES_OF_A_PASS // tokens.shape[1])
    for row in sorted(set(rows.tolist())):
        attended = capture.attention_mask[row]
        text, places = transform.input[row, attended], attended.cumsum(0) - 1
        for here in (rows == row).nonzero()[:, 0].split(of_a_pass):
            at = (rows[here], columns[here])
            location = wide(transform.input[at]) + wide(transform.mean[at])
            arguments = (tokens[here], transform.output[at], location, transform.std[at])
            yield checkpoint(_log_odds, attack, text, places[columns[here]], *arguments, use_reentrant=False)


def _candidates(table: Tensor, embeddings: Tensor) -> Tensor:
    """Return K other tokens for each embedding (N, D): the nearest for half of K, rounded up, and frequent tokens.

    The frequent tokens are drawn from the N tokens. Where the own token is drawn, a random row of the table stands.
    """
    count = min(CANDIDATES, len(table) - 1)
    nearest_count = (count + 1) // 2
    _, nearest = nearest_embeddings(embeddings, table, nearest_count + 1)
    own, shape = nearest[:, :1], (len(embeddings), count - nearest_count)
    frequent = own[:, 0][torch.randint(len(own), shape, device=own.device)]
    random = torch.randint(len(table) - 1, shape, device=own.device)
    random += random >= own
    return torch.cat([nearest[:, 1:], torch.where(frequent == own, random, frequent)], dim=1)


def _log_odds(
    attack: Attack, text: Tensor, places: Tensor, tokens: Tensor, observed: Tensor, location: Tensor, std: Tensor
) -> Tensor:
    embeddings = attack.table[tokens]
    means, stds = candidate_estimates(attack.noise_layer, text, places, embeddings)
    locations = torch.cat([location[:, None], wide(embeddings) + wide(means)], dim=1)
    return known_transform_log_odds(observed, locations, torch.cat([std[:, None], stds], dim=1))
