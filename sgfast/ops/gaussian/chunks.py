"""Chunks of positions and features: how `pairwise_gaussian_kl` bounds its memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sgfast.ops.gaussian.products import Triple

# Means, stds (n, T, D) and their mask as the caller gave them.
Side = tuple[Tensor, Tensor, Tensor | None]


def feature_chunks(like: Tensor, row_count: int, feature_bytes: int, max_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Slices of (positions, features), as many as fit ``row_count`` times: whole positions if one does."""
    _, positions, width = like.shape
    features = max(1, max_bytes // (feature_bytes * max(row_count, 1)))
    step, feature_step = max(1, features // width), min(features, width)
    for first in range(0, positions, step):
        for first_feature in range(0, width, feature_step):
            yield slice(first, first + step), slice(first_feature, first_feature + feature_step)


def read_side(side: Side, chunk: tuple[slice, slice], by_feature: bool, index: Tensor | None = None) -> Triple:
    """Read a side's means and stds (n, p, d) and their mask (n, p).

    With ``by_feature`` every feature becomes a position of width 1.
    """
    mean, std, mask = side
    mean, std = mean[:, *chunk], std[:, *chunk]
    mask = None if mask is None else mask[:, *chunk[: mask.dim() - 1]]
    if index is not None:
        mean, std = mean.index_select(0, index), std.index_select(0, index)
        mask = None if mask is None else mask.index_select(0, index)
    if mask is None:
        mask = mean.new_ones(mean.shape[:2], dtype=torch.bool)
    if not by_feature:
        return mean, std, mask
    mask = mask if mask.dim() == 3 else mask[..., None].expand(mean.shape)
    return mean.flatten(1)[..., None], std.flatten(1)[..., None], mask.flatten(1)
