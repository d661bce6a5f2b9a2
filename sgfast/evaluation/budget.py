"""The memory budget of an evaluation: resident bytes beyond the loaded model and one pass through its body."""

from dataclasses import dataclass

from sgfast.evaluation.settings import EvaluationError

# Per vocabulary entry: one token's logits on both sides, with the divergences' temporaries.
_LEAST_LOGITS_BYTES = 128
# Per vocabulary entry: the counts of ranks, and a copy of the counts to save.
_RANK_BYTES = 128
# Per token and feature: embeddings, transformed embeddings and both final hidden states, in float32.
_KEPT_BYTES = 16
# A search needs some queries at once to be worth it.
_LEAST_CHUNK = 2**20
# The part that the allocator does not hold back.
_USABLE = 0.75
# Bytes of a learned inversion: per entry of the table (a float32 copy, and temporaries of making it), per entry of the
# decoder's four (D, D) matrices (parameters, gradients, Adam's two moments, two states kept), and per feature of a
# token of the sample (all, shuffled, training part, its copies, and float64 copies for the closed form).
_INVERSION_TABLE_BYTES, _INVERSION_DECODER_BYTES, _INVERSION_TOKEN_BYTES = 8, 5 * 4 * 8, 48
# PyTorch loads this much when the first optimizer is made.
_OPTIMIZER_BYTES = 128 * 2**20
_LEAST_INVERSION_CHUNK = 32 * 2**20
# Bytes of a known-transform attack: per feature of a token (transformed embeddings, their rounding, and copies), and
# per entry of the vocabulary (a prior in float64 and its temporaries).
_KNOWN_TOKEN_BYTES, _KNOWN_VOCABULARY_BYTES = 24, 64
_LEAST_KNOWN_CHUNK = 32 * 2**20


@dataclass(frozen=True)
class Budget:
    """The bytes that each step may take, for a model of a given vocabulary and width."""

    total: int
    vocabulary: int
    width: int

    def kept(self, length: int) -> int:
        """Return the bytes that stay while a sequence of this length is measured."""
        return _KEPT_BYTES * self.width * length + _RANK_BYTES * self.vocabulary

    def chunk_bytes(self, length: int) -> int:
        """Return the bytes for temporaries while a sequence of this length is measured.

        Raises:
            EvaluationError: not enough for one token's logits.
        """
        least = max(_LEAST_CHUNK, _LEAST_LOGITS_BYTES * self.vocabulary)
        usable = int(_USABLE * (self.total - self.kept(length)))
        if usable < least:
            needed = self.kept(length) + int(least / _USABLE) + 1
            raise EvaluationError(
                f"--memory-budget {readable_bytes(self.total)} is too small: a sequence of {length} tokens over "
                f"{self.vocabulary} x {self.width} embeddings needs {readable_bytes(needed)}"
            )
        return usable

    def inversion_needs(self, tokens: int) -> int:
        """Return the bytes that a learned inversion of this many tokens takes, with its smallest chunk of scores."""
        chunk = max(_LEAST_INVERSION_CHUNK, _LEAST_LOGITS_BYTES * self.vocabulary)
        return self._inversion_fixed(tokens) + int(chunk / _USABLE)

    def inversion_chunk_bytes(self, tokens: int) -> int:
        """Return the bytes for one chunk of scores; `inversion_needs` must lie within the budget."""
        return int(_USABLE * (self.total - self._inversion_fixed(tokens)))

    def known_needs(self, records: int, longest: int, cache_bytes: int) -> int:
        """Return the bytes that reading whole records takes, with its smallest chunk of candidates."""
        return self._known_fixed(records, longest, cache_bytes) + int(_LEAST_KNOWN_CHUNK / _USABLE)

    def known_chunk_bytes(self, records: int, longest: int, cache_bytes: int) -> int:
        """Return the bytes for one chunk of candidates; `known_needs` must lie within the budget."""
        return int(_USABLE * (self.total - self._known_fixed(records, longest, cache_bytes)))

    def _known_fixed(self, records: int, longest: int, cache_bytes: int) -> int:
        embeddings = _KNOWN_TOKEN_BYTES * self.width * records * longest
        return embeddings + 2 * cache_bytes * longest + _KNOWN_VOCABULARY_BYTES * self.vocabulary

    def _inversion_fixed(self, tokens: int) -> int:
        return (
            _OPTIMIZER_BYTES
            + _INVERSION_TABLE_BYTES * self.vocabulary * self.width
            + _INVERSION_DECODER_BYTES * self.width**2
            + _INVERSION_TOKEN_BYTES * self.width * tokens
        )


def readable_bytes(size: int) -> str:
    """Format a number of bytes for people, rounded up.

    Example:
        >>> readable_bytes(2**31), readable_bytes(1025)
        ('2 GiB', '1.01 KiB')
    """
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**bits:
            return f"{-(-size * 100 // 2**bits) / 100:g} {unit}"
    return f"{size} bytes"
