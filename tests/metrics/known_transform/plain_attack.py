"""The attack as a plain loop: the whole layer and the whole language model run again for every candidate."""

import math

import torch


@torch.no_grad()
def log_score(transformed, layer, table, noise_mask, tokens, language_model=None, prior_weight=1.0):
    """The log-score of a whole reading (T,) of one sequence (T, D), in float64."""
    embeddings = table[tokens]
    mean, std = (part.expand(1, *embeddings.shape)[0].double() for part in layer.estimate(embeddings[None]))
    suppressed = layer.suppressed_features(std[None].float())
    suppressed = (
        torch.zeros_like(mean, dtype=torch.bool) if suppressed is None else suppressed.expand(mean[None].shape)[0]
    )
    total = 0.0
    for place in range(len(tokens)):
        if noise_mask[place]:
            for feature in range(table.shape[1]):
                observed = float(transformed[place, feature])
                shift, deviation = float(mean[place, feature]), float(std[place, feature])
                if suppressed[place, feature]:
                    # A difference of rounding costs nothing, any other everything.
                    total += 0.0 if abs(observed - shift) < 1e-4 else -1e6
                    continue
                location = float(embeddings[place, feature]) + shift
                total -= (
                    0.5 * ((observed - location) / deviation) ** 2 + math.log(deviation) + 0.5 * math.log(2 * math.pi)
                )
        if language_model is not None and place > 0:
            logits = language_model(input_ids=tokens[None, :place]).logits[0, -1].double()
            total += prior_weight * float(logits[: len(table)].log_softmax(-1)[tokens[place]])
    return total


def read_greedily(transformed, layer, table, noise_mask, known, language_model=None, prior_weight=1.0):
    """Tokens (T,) of one sequence: at each place the candidate of the largest score after the tokens read so far."""
    tokens = torch.empty(0, dtype=torch.int64)
    for place in range(len(transformed)):
        if not noise_mask[place]:
            tokens = torch.cat([tokens, known[place][None]])
            continue
        scores = [
            log_score(
                transformed[: place + 1],
                layer,
                table,
                noise_mask[: place + 1],
                torch.cat([tokens, torch.tensor([candidate])]),
                language_model,
                prior_weight,
            )
            for candidate in range(len(table))
        ]
        tokens = torch.cat([tokens, torch.tensor([max(range(len(table)), key=scores.__getitem__)])])
    return tokens
