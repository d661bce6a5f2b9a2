"""Nearest rows of an embedding table and ranks of given rows: `nearest_embeddings`, `embedding_ranks`."""

from sgfast.ops.nearest.operation import embedding_ranks, nearest_embeddings

__all__ = ["embedding_ranks", "nearest_embeddings"]
