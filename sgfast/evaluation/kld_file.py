"""The base-logits file of llama.cpp's ``llama-perplexity --kl-divergence-base``: a reference's log-probabilities.

All numbers are little-endian. The file has, in this order:

=================================== =====================================================================
bytes                               content
=================================== =====================================================================
8                                   ``_logits_``
4, 4, 4                             int32: n tokens a window, V tokens of the vocabulary, W windows
4 · W · n                           int32: the tokens of all windows
W · (n − 1 − ⌊n/2⌋) rows            the scored positions of each window, ⌊n/2⌋ … n − 2 (0-based)
=================================== =====================================================================

The row of a position describes the next token. A row has two float32 numbers, ``scale`` and ``minimum``, then V codes
of 16 bits, and one unused code if V is odd:

    log q_i = scale · code_i + minimum

The format keeps logits down to 16 below the largest one. Smaller logits are stored as if they were 16 below, so that
probabilities below e⁻¹⁶ of the largest are too large in the file. A step of ``scale`` is at most 2.4e-4 nats. Both
limit a divergence that is computed from such a file: it may be negative for llama.cpp, which does not normalise q. Here
the log-probabilities are logits, and a divergence normalises them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy
import torch
from torch import Tensor

from sgfast.ops import validation
from sgfast.utils.files import naming, replacing
from sgfast.utils.input_files import open_regular

_MAGIC = b"_logits_"
_HEADER_BYTES = len(_MAGIC) + 3 * 4
_INTEGER = numpy.dtype("<i4")
_LARGEST_INTEGER = 2**31 - 1
_LARGEST_CODE = 65535
# The range of logits that a row keeps, in nats.
_RANGE = 16.0
# A row's probabilities add up to 1, within the rounding to codes and the mass of logits that were out of the range.
_ROUNDING = 1e-3
# Three tokens have one position in their second half that has a next token.
_LEAST_CONTEXT = 3


def scored_positions(context: int) -> range:
    """Return the positions of a window whose next token is scored: those of the window's second half.

    Example:
        >>> scored_positions(8)
        range(4, 7)
    """
    return range(context // 2, context - 1)


class KldFile:
    """A base-logits file that is open for reading.

    The tokens are read at once. Log-probabilities are read a few rows at a time.

    Args:
        path: the file.

    Attributes:
        tokens: (W, n) int64, the windows.
        vocabulary: V.

    Raises:
        ValueError: the file cannot be read, is of another format, or is damaged or cut off. The message is one line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open_regular(path, wanted="base-logits file")
        try:
            self.tokens, self.vocabulary = self._read_header()
        except BaseException:
            self._file.close()
            raise
        windows, self.context = self.tokens.shape
        self._rows = windows * len(scored_positions(self.context))
        self._start = _HEADER_BYTES + self.tokens.numel() * _INTEGER.itemsize

    def _read_header(self) -> tuple[Tensor, int]:
        header = self._file.read(_HEADER_BYTES)
        if header[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{self.path} is no base-logits file of llama.cpp: it does not begin with _logits_")
        if len(header) < _HEADER_BYTES:
            raise ValueError(f"{self.path} is cut off: its header has {len(header)} of {_HEADER_BYTES} bytes")
        context, vocabulary, windows = numpy.frombuffer(header, _INTEGER, offset=len(_MAGIC)).tolist()
        for name, number, least in (
            ("tokens a window", context, _LEAST_CONTEXT),
            ("tokens of the vocabulary", vocabulary, 1),
            ("windows", windows, 1),
        ):
            if number < least:
                raise ValueError(f"{self.path} is damaged: its header has {number} {name}")
        rows = windows * len(scored_positions(context))
        expected = _HEADER_BYTES + windows * context * _INTEGER.itemsize + rows * _row_type(vocabulary).itemsize
        size = os.fstat(self._file.fileno()).st_size
        if size != expected:
            raise ValueError(
                f"{self.path} is damaged or cut off: it has {size} bytes, and {windows} windows of {context} tokens "
                f"with a vocabulary of {vocabulary} have {expected}"
            )
        stored = self._file.read(windows * context * _INTEGER.itemsize)
        tokens = torch.from_numpy(numpy.frombuffer(stored, _INTEGER).astype(numpy.int64)).view(windows, context)
        outside = ((tokens < 0) | (tokens >= vocabulary)).flatten().nonzero().flatten()
        if len(outside):
            first = int(outside[0])
            raise ValueError(
                f"{self.path} is damaged: token {first} is {int(tokens.flatten()[first])}, which is outside the "
                f"vocabulary of {vocabulary}"
            )
        return tokens, vocabulary

    def __len__(self) -> int:
        """Return the number of rows of all windows."""
        return self._rows

    def log_probs(self, start: int, stop: int) -> Tensor:
        """Read the rows ``start`` … ``stop − 1``, counted over all windows.

        Returns:
            (stop − start, V) float32. The row j of a window belongs to the position ``scored_positions(context)[j]``.

        Raises:
            IndexError: the file has no such rows.
            ValueError: a row is no distribution, or the file became shorter. The message is one line.
        """
        if not 0 <= start <= stop <= self._rows:
            raise IndexError(f"rows {start} to {stop} are outside the {self._rows} rows of {self.path}")
        kind = _row_type(self.vocabulary)
        self._file.seek(self._start + start * kind.itemsize)
        content = self._file.read((stop - start) * kind.itemsize)
        if len(content) != (stop - start) * kind.itemsize:
            raise ValueError(f"{self.path} is cut off: it ends within the rows {start} to {stop}")
        rows = numpy.frombuffer(content, kind)
        with numpy.errstate(all="ignore"):
            values = rows["codes"][:, : self.vocabulary].astype(numpy.float32)
            values *= rows["scale"][:, None]
            values += rows["minimum"][:, None]
        log_probs = torch.from_numpy(values)
        mass = log_probs.logsumexp(-1).exp()
        most = 1 + _ROUNDING + self.vocabulary * torch.tensor(-_RANGE).exp()
        valid = (mass >= 1 - _ROUNDING) & (mass <= most) & torch.from_numpy(rows["scale"] >= 0)
        if not valid.all():
            first = start + int((~valid).nonzero()[0])
            raise ValueError(
                f"{self.path} is damaged: the probabilities of row {first} add up to {float(mass[first - start]):.4g}"
            )
        return log_probs

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "KldFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class KldWriter:
    """A base-logits file that is being written; see `writing_kld`."""

    def __init__(self, file: IO[bytes], tokens: Tensor, vocabulary: int) -> None:
        self._file, self._vocabulary = file, vocabulary
        self.missing = len(tokens) * len(scored_positions(tokens.shape[1]))
        header = numpy.array([tokens.shape[1], vocabulary, len(tokens)], _INTEGER)
        file.write(_MAGIC + header.tobytes() + tokens.cpu().numpy().astype(_INTEGER).tobytes())

    def write(self, logits: Tensor) -> None:
        """Append the next rows: (rows, V) floating logits, in the order of windows and positions.

        Raises:
            TypeError: not a floating tensor.
            ValueError: another shape, more rows than the windows have, or a row with NaN, +inf or −inf alone.
        """
        validation.check_floating("logits", logits)
        if logits.dim() != 2 or logits.shape[1] != self._vocabulary:
            raise ValueError(f"logits must have shape (rows, {self._vocabulary}); got {tuple(logits.shape)}")
        if len(logits) > self.missing:
            raise ValueError(f"logits has {len(logits)} rows; the windows have {self.missing} more")
        shifted = logits.detach().to("cpu", torch.float32)
        largest = shifted.amax(-1, keepdim=True)
        if not largest.isfinite().all():  # amax passes NaN on
            raise ValueError("logits must have a finite largest number in every row")
        shifted = shifted - largest
        log_sum = shifted.double().logsumexp(-1, keepdim=True).float()
        smallest = shifted.amin(-1, keepdim=True).clamp(min=-_RANGE)
        scale = smallest.abs() / _LARGEST_CODE
        codes = torch.where(scale > 0, (shifted - smallest).clamp(min=0) / scale, 0).round()
        rows = numpy.zeros(len(logits), _row_type(self._vocabulary))
        rows["scale"], rows["minimum"] = scale[:, 0].numpy(), (smallest - log_sum)[:, 0].numpy()
        rows["codes"][:, : self._vocabulary] = codes.clamp(max=_LARGEST_CODE).to(torch.int32).numpy()
        self._file.write(rows.tobytes())
        self.missing -= len(logits)


@contextmanager
def writing_kld(path: str | os.PathLike[str], tokens: Tensor, vocabulary: int) -> Iterator[KldWriter]:
    """Write a base-logits file of llama.cpp. The file appears at the end of the block, whole.

    Args:
        path: the file, which is replaced.
        tokens: (W, n) integers below V, the windows; n ≥ 3.
        vocabulary: V.

    Raises:
        TypeError: ``tokens`` are no integers.
        ValueError: another shape, a token outside the vocabulary, or (at the end) rows that were not written.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import torch
        >>> path = Path(tempfile.mkdtemp()) / "reference.kld"
        >>> with writing_kld(path, torch.tensor([[0, 1, 2, 1]]), vocabulary=3) as writer:
        ...     writer.write(torch.tensor([[0.0, 0.0, 0.0]]))
        >>> with KldFile(path) as file:
        ...     file.log_probs(0, 1).exp()
        tensor([[0.3333, 0.3333, 0.3333]])
    """
    validation.check_tensor("tokens", tokens)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must hold integers; got {tokens.dtype}")
    validation.check_count("vocabulary", vocabulary)
    if tokens.dim() != 2 or tokens.shape[1] < _LEAST_CONTEXT or not len(tokens):
        raise ValueError(f"tokens must have shape (W, n) with n ≥ {_LEAST_CONTEXT}; got {tuple(tokens.shape)}")
    if max(vocabulary, *tokens.shape) > _LARGEST_INTEGER:
        raise ValueError("the format has no room for 2³¹ windows, tokens a window, or tokens of the vocabulary")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(f"tokens must be between 0 and {vocabulary - 1}")
    with replacing(path) as temporary, naming(path):
        with temporary.open("wb") as file:
            writer = KldWriter(file, tokens, vocabulary)
            yield writer
        if writer.missing:
            raise ValueError(f"{writer.missing} rows of {path} were not written")


def _row_type(vocabulary: int) -> numpy.dtype[numpy.void]:
    """Return the layout of a row. A row has an even number of codes."""
    return numpy.dtype([("scale", "<f4"), ("minimum", "<f4"), ("codes", "<u2", (vocabulary + vocabulary % 2,))])
