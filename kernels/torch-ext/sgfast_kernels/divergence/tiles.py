"""The host side of launches over two sets of logits: tiles, row splits, labels, temperatures, weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import vector_columns


def weights_of(weight: float) -> tuple[float, float]:
    """Return a mixture's weights w and 1 − w. Computed in float32, 1 − w would lose the digits of a small w."""
    return float(weight), 1.0 - weight


def label_rows(labels: Tensor | None) -> Tensor | None:
    """Return the labels as one contiguous row."""
    return None if labels is None else labels.reshape(-1).contiguous()


def temperature_rows(temperature: Tensor) -> tuple[Tensor, int]:
    """Return flat float32 temperatures and the step from row to row: 0 for a number expanded to all rows."""
    temperature = temperature.float()
    if all(stride == 0 for stride in temperature.stride()):
        return temperature.as_strided((1,), (1,)), 0
    return temperature.reshape(-1).contiguous(), 1


def tile(noisy: Tensor, clean: Tensor, kinds: int, backward: bool) -> dict[str, int]:
    """Return a tile from the table: BV columns, num_warps; for forward also NEIGHBOURS that share a sum, and STAGES.

    =========  ==================  ==========  ============================================================
    pass       columns per thread  most warps  why
    =========  ==================  ==========  ============================================================
    forward    16 (float32: 8)     8           two 16-byte loads a side; 32 to 64 registers, so that at least
                                               half of an SM's warps are resident; the loop's own instructions
                                               are 1 to 3 of 11 to 30 a column
    unaligned  half of that        8           a load and an address per column leave no more registers
    backward   16 (float32: 8)     4           nothing is summed: more columns would only need more registers
    > 4 kinds  half of that        4           the coefficients of every kind are in registers too
    =========  ==================  ==========  ============================================================

    On AMD a warp is twice as wide and a thread has half the columns: one 16-byte load a side. Narrow vocabularies get
    narrow tiles, by powers of two, so that shapes share compiled kernels. The architecture changes nothing else. Loads
    are staged through shared memory if fewer than three kinds are asked for. Three kinds or more need so many
    instructions that the loads of other warps arrive in time, and staging costs 2 instructions a column.
    """
    adjacent = vector_columns(noisy, clean) > 1
    narrow = max(noisy.element_size(), clean.element_size()) == 2
    most_warps, halved = (4, kinds > 4) if backward else (8, not adjacent)
    columns_each = (512 if narrow else 256) // (2 if halved else 1)
    columns = min(max(triton.next_power_of_2(noisy.shape[-1]), 256), most_warps * columns_each)
    tile = {"BV": columns, "num_warps": max(1, columns // columns_each)}
    if backward:
        return tile
    # Unaligned tiles: the number of columns that a thread of AMD's wider warps has. An NVIDIA thread keeps two sums.
    neighbours = vector_columns(noisy, clean) if adjacent else columns_each // 64
    return tile | {"NEIGHBOURS": neighbours, "ADJACENT": adjacent, "STAGES": 3 if kinds < 3 else 1}


@triton.jit
def neighbours(b_x, BV: tl.constexpr, NEIGHBOURS: tl.constexpr, ADJACENT: tl.constexpr):
    """A tile with the columns of one thread along its last axis (adjacent) or along its first axis.

    A thread's columns are adjacent if one load fetches them. Otherwise all other threads have a column between two of
    them.
    """
    groups: tl.constexpr = BV // NEIGHBOURS
    return tl.reshape(b_x, [groups, NEIGHBOURS]) if ADJACENT else tl.reshape(b_x, [NEIGHBOURS, groups])


def split_rows(like: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """Return the number of programs that share a row, and the columns of each: a multiple of the tile."""
    processors = 132
    if like.device.type == "cuda":
        processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    tiles = triton.cdiv(like.shape[-1], columns)
    wanted = min(tiles, triton.cdiv(4 * processors, rows)) if rows < 4 * processors else 1
    tiles_each = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, tiles_each), tiles_each * columns
