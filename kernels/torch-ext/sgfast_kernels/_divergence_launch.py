"""What launches over two sets of logits share on the host: kinds as bits, tiles, row splits, masks, temperatures."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import vector_columns

# In the order of their bits in a kernel's ``KINDS``.
KINDS = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "total_variation",
    "squared_hellinger",
    "cross_entropy",
    "skew_forward_kl",
    "skew_reverse_kl",
    "label_cross_entropy",
)
FORWARD_KL, REVERSE_KL, JEFFREYS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
JENSEN_SHANNON, TOTAL_VARIATION, HELLINGER = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
CROSS_ENTROPY, SKEW_FORWARD, SKEW_REVERSE = tl.constexpr(64), tl.constexpr(128), tl.constexpr(256)
LABEL_CROSS_ENTROPY = tl.constexpr(512)

LOG2_E = tl.constexpr(1.4426950408889634)


def kind_bits(kinds: Sequence[str]) -> int:
    return sum(1 << KINDS.index(kind) for kind in kinds)


def row_count(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


def rows_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).view(torch.uint8)


def labels_of(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.reshape(-1)


def temperature_rows(temperature: Tensor) -> tuple[Tensor, int]:
    """The temperatures as a flat float32 tensor, and the step from row to row: 0 for a number expanded to all rows."""
    temperature = temperature.float()
    if all(stride == 0 for stride in temperature.stride()):
        return temperature.as_strided((1,), (1,)), 0
    return temperature.reshape(-1), 1


def tile(noisy: Tensor, clean: Tensor, kinds: int, backward: bool) -> dict[str, int]:
    """Columns of a tile, the columns that share a sum, and the warps.

    Sixteen 16-bit columns a thread, eight of float32, are two 16-byte loads a side (half of that on AMD, whose warps
    are twice as wide); where registers run short, half the columns. Forward adds up neighbouring columns before it
    keeps their sum. Narrow vocabularies get narrow tiles. Sizes depend on the width's power of two alone, so that
    shapes share compiled kernels.
    """
    adjacent = vector_columns(noisy, clean) > 1
    halved = kinds > 4 if backward else not adjacent
    narrow = max(noisy.element_size(), clean.element_size()) == 2
    most_warps, columns_each = (4 if backward else 8), (512 if narrow else 256) // (2 if halved else 1)
    columns = min(max(triton.next_power_of_2(noisy.shape[-1]), 256), most_warps * columns_each)
    tile = {"BV": columns, "num_warps": max(1, columns // columns_each)}
    neighbours = 16 // max(noisy.element_size(), clean.element_size())
    return tile if backward else tile | {"NEIGHBOURS": neighbours, "ADJACENT": adjacent}


@triton.jit
def neighbours(b_x, BV: tl.constexpr, NEIGHBOURS: tl.constexpr, ADJACENT: tl.constexpr):
    """A tile with the columns that one thread holds along an axis of their own: the last if adjacent, else the first.

    They are adjacent where one load fetches them; elsewhere a thread loads columns that are a round of all threads apart.
    """
    if ADJACENT:
        return tl.reshape(b_x, [BV // NEIGHBOURS, NEIGHBOURS])
    else:
        return tl.reshape(b_x, [NEIGHBOURS, BV // NEIGHBOURS])


def split_rows(like: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """How many programs share a row, and the columns of each: a multiple of the tile."""
    processors = 132
    if like.device.type == "cuda":
        processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    tiles = triton.cdiv(like.shape[-1], columns)
    wanted = min(tiles, triton.cdiv(4 * processors, rows)) if rows < 4 * processors else 1
    tiles_each = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, tiles_each), tiles_each * columns
