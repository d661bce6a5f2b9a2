"""Count the bytes that every launch of ``kernel_proofs.cases`` moves, in the strict interpreter. No GPU is used.

    python -m benchmarks.traffic

The table shows the bytes loaded and stored per element, their sum over the floor, and the bytes where every row is
masked. The count knows no caches: a byte that is loaded twice counts twice.
"""

import os
import sys
from math import nan
from typing import NamedTuple

ROWS = 8


class Count(NamedTuple):
    """Bytes of one case per element. The numbers of masked rows are NaN if the case has no mask."""

    name: str
    floor: float
    loaded: float
    stored: float
    masked_loaded: float
    masked_stored: float
    #: The upper limit of (loaded + stored) over the floor.
    limit: float
    #: Bytes that masked rows must load as well.
    masked: float

    @property
    def ratio(self) -> float:
        """Bytes moved over the floor."""
        return (self.loaded + self.stored) / self.floor


def count_all() -> list[Count]:
    """Count every case twice: as the case is, and with all its boolean tensors False."""
    import torch

    from kernel_proofs import strict
    from kernel_proofs.cases import CASES

    strict.install()
    counts = []
    for case in CASES:
        arguments = case.arguments(ROWS, "cpu")
        masks = [one for one in arguments if isinstance(one, torch.Tensor) and one.dtype == torch.bool]
        moved = []
        for _ in range(2):
            with strict.count_traffic() as launches:
                case.function(*arguments)
            for one in ("loaded", "stored"):
                moved.append(sum(sum(getattr(launch, one).values()) for launch in launches) / (ROWS * case.width))
            for mask in masks:
                mask.zero_()
        counts.append(
            Count(case.name, case.floor, *(moved if masks else [*moved[:2], nan, nan]), case.traffic, case.masked)
        )
    return counts


def main() -> int:
    """Print the table; return the exit status."""
    # The variable must be set before the first import of triton.
    os.environ["TRITON_INTERPRET"] = "1"
    counts = count_all()
    width = max(len(count.name) for count in counts)
    print(f"{'bytes per element':{width}s}  floor  loaded  stored   ratio  limit   masked: loaded  stored")
    for c in counts:
        print(
            f"{c.name:{width}s} {c.floor:6.2f} {c.loaded:7.3f} {c.stored:7.3f} {c.ratio:7.3f} {c.limit:6.3f}"
            f" {c.masked_loaded:16.3f} {c.masked_stored:7.3f}"
        )
    # If all rows are masked, a kernel may read only the mask and the rows that it copies.
    over = [c.name for c in counts if c.ratio > c.limit or c.masked_loaded > c.masked + 0.01 * c.floor]
    print(f"over the limit: {', '.join(over)}" if over else "all within their limits")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
