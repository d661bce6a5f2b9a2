"""The strict layer catches one planted bug of every class, and lets correct kernels pass.

An ordinary session runs these tests in the interpreting process of ``kernel_proofs.interpreted``, and so does
``TRITON_INTERPRET=1 python -m pytest kernels/tests/test_strict_interpreter.py`` in its own process.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_proofs import strict
from triton.language.extra import libdevice

pytestmark = pytest.mark.triton


@triton.jit
def _copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)
    else:
        tl.store(out_ptr + offsets, tl.load(x_ptr + offsets))


def test_a_correct_kernel_passes():
    x, out = torch.randn(50), torch.empty(50)
    _copy[(4,)](x, out, 50, BLOCK=16, MASKED=True)
    torch.testing.assert_close(out, x, rtol=0, atol=0)


@pytest.mark.parametrize(("inputs", "outputs", "kind"), [(50, 64, "load"), (64, 50, "store")])
def test_out_of_bounds(inputs, outputs, kind):
    with pytest.raises(strict.StrictError, match=f"out of bounds: {kind} of 14 lanes in program 3 of _copy"):
        _copy[(4,)](torch.randn(inputs), torch.empty(outputs), 50, BLOCK=16, MASKED=False)


def test_gap_of_a_strided_view_is_out_of_bounds():
    x = torch.randn(4, 16)[:, :12]
    _copy[(1,)](x[0], torch.empty(12), 12, BLOCK=16, MASKED=True)
    with pytest.raises(strict.StrictError, match="out of bounds: load of 4 lanes"):
        _copy[(1,)](x, torch.empty(16), 16, BLOCK=16, MASKED=True)


@triton.jit
def _row_maximum(x_ptr, out_ptr, n, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if OTHER:
        x = tl.load(x_ptr + offsets, mask=offsets < n, other=-float("inf"))
    else:
        x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(out_ptr, tl.sum(x, axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masked_lanes_without_other_are_poison(dtype):
    x, out = torch.ones(10, dtype=dtype), torch.zeros(1, dtype=dtype)
    _row_maximum[(1,)](x, out, 10, BLOCK=16, OTHER=False)
    assert out.isnan().all()
    _row_maximum[(1,)](x, out, 10, BLOCK=16, OTHER=True)
    assert out.isinf().all()


def test_a_single_masked_lane_with_other_is_no_poison():
    @triton.jit
    def load_one(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n, other=0.0))

    out = torch.empty(1)
    load_one[(1,)](torch.ones(1), out, 0, BLOCK=1)
    assert out.item() == 0


def test_masked_indices_without_other_lead_out_of_bounds():
    @triton.jit
    def gather(index_ptr, x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        index = tl.load(index_ptr + offsets, mask=offsets < n)
        tl.store(out_ptr + offsets, tl.load(x_ptr + index), mask=offsets < n)

    with pytest.raises(strict.StrictError, match="out of bounds"):
        gather[(1,)](torch.arange(10), torch.randn(20), torch.empty(10), 10, BLOCK=16)


@triton.jit
def _accumulate(x_ptr, out_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), axis=0)
    if ATOMIC:
        tl.atomic_add(out_ptr, total)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + total)


def test_read_write_race():
    x, out = torch.ones(64), torch.zeros(1)
    with pytest.raises(strict.StrictError, match=r"race between programs \[.*\], in _accumulate at out_ptr \+0"):
        _accumulate[(4,)](x, out, ATOMIC=False, BLOCK=16)
    out.zero_()
    _accumulate[(4,)](x, out, ATOMIC=True, BLOCK=16)
    assert out.item() == 64


@triton.jit
def _write_first(out_ptr, BLOCK: tl.constexpr, LANES_APART: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) + tl.arange(0, BLOCK) * LANES_APART, 1.0)


def test_write_write_race():
    _write_first[(4,)](torch.empty(16), BLOCK=4, LANES_APART=4)
    with pytest.raises(strict.StrictError, match="write/write race between programs"):
        _write_first[(4,)](torch.empty(16), BLOCK=4, LANES_APART=1)
    with pytest.raises(strict.StrictError, match="two lanes of one store"):
        _write_first[(4,)](torch.empty(16), BLOCK=4, LANES_APART=0)


def test_race_through_an_alias_of_another_width():
    @triton.jit
    def through_alias(wide_ptr, narrow_ptr):
        if tl.program_id(0) == 0:
            tl.store(wide_ptr, 1.0)
        else:
            tl.store(narrow_ptr + 1, tl.load(narrow_ptr + 1))

    wide = torch.zeros(2)
    with pytest.raises(strict.StrictError, match="race between programs"):
        through_alias[(2,)](wide, wide.view(torch.int16))


@triton.jit
def _reverse(scratch_ptr, x_ptr, out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(scratch_ptr + offsets, tl.load(x_ptr + offsets))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + offsets, tl.load(scratch_ptr + BLOCK - 1 - offsets))


def test_missing_barrier():
    x, out = torch.randn(32), torch.empty(32)
    _reverse[(1,)](torch.empty(32), x, out, BLOCK=32, BARRIER=True)
    torch.testing.assert_close(out, x.flip(0), rtol=0, atol=0)
    with pytest.raises(strict.StrictError, match="stores and then loads without"):
        _reverse[(1,)](torch.empty(32), x, out, BLOCK=32, BARRIER=False)


def test_missing_barrier_between_stores():
    @triton.jit
    def clear_then_set(out_ptr, BLOCK: tl.constexpr):
        tl.store(out_ptr + tl.arange(0, BLOCK), 0.0)
        tl.store(out_ptr + 3, 1.0)

    with pytest.raises(strict.StrictError, match="stores and then stores without"):
        clear_then_set[(1,)](torch.empty(16), BLOCK=16)


@triton.jit
def _take_tickets(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


def test_order_dependence_shows():
    # No race, and yet the result is another in every order.
    results = {}
    for order in ("forward", "reverse", "random"):
        out = torch.empty(8, dtype=torch.int32)
        with strict.program_order(order):
            _take_tickets[(8,)](torch.zeros(1, dtype=torch.int32), out)
        results[order] = out.tolist()
    assert results["forward"] == list(range(8))
    assert results["reverse"] == list(range(8))[::-1]
    assert results["random"] not in (results["forward"], results["reverse"])


@triton.jit
def _row_of_a_large_tensor(x_ptr, out_ptr, row, stride, WIDE: tl.constexpr):
    offset = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(out_ptr, tl.load(x_ptr + offset))


def test_int32_overflow():
    # Only two pages of the five gigabytes are ever touched.
    storage = torch.from_numpy(np.zeros(5 * 2**30, np.uint8)).view(torch.float16)
    x = storage.as_strided((2, 8), (2**31 + 16, 1))
    x[1] = 7
    out = torch.zeros(1, dtype=torch.float16)
    _row_of_a_large_tensor[(1,)](x, out, 1, 2**31 + 16, WIDE=True)
    assert out.item() == 7
    with pytest.raises(AssertionError, match="overflow"):
        _row_of_a_large_tensor[(1,)](x, out, 3, 2**30, WIDE=False)


@triton.jit
def _assert_positive(x_ptr, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) > 0, "not positive")


def test_failed_assert():
    x = torch.ones(16)
    _assert_positive[(1,)](x, BLOCK=16)
    x[11] = -1
    with pytest.raises(AssertionError, match="not positive"):
        _assert_positive[(1,)](x, BLOCK=16)


def test_unwritten_output_shows():
    out = torch.empty(32)
    _copy[(1,)](torch.randn(16), out, 16, BLOCK=16, MASKED=True)
    assert out[16:].isnan().all()


@triton.jit
def _bfloat16_arithmetic(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "multiply":
        out = x * y
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    elif OPERATION == "select":
        out = tl.where(x > y, x, y)
    else:
        out = -x
    tl.store(out_ptr + offsets, out)


@pytest.mark.parametrize("operation", ["add", "multiply", "maximum", "select", "negate"])
def test_bfloat16_arithmetic(operation):
    x, y = torch.randn(2, 256).bfloat16()
    expected = {"add": x + y, "multiply": x * y, "negate": -x}.get(operation, torch.maximum(x, y))
    out = torch.empty_like(x)
    _bfloat16_arithmetic[(1,)](x, y, out, OPERATION=operation, BLOCK=256)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@triton.jit
def _cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64, torch.int32, torch.bfloat16])
def test_bfloat16_rounding(source):
    x = (torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1000).to(source)
    if source.is_floating_point:
        x[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1 + 2**-8]).to(source)
    out = torch.empty(4096, dtype=torch.bfloat16)
    _cast[(1,)](x, out, BLOCK=4096)
    # float64 rounds through float32, as Triton compiles it.
    torch.testing.assert_close(out, x.float().bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(4096)
    _cast[(1,)](out, back, BLOCK=4096)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_reduction_is_refused():
    with pytest.raises(strict.StrictError, match="reduction over bfloat16"):
        _row_maximum[(1,)](torch.ones(16).bfloat16(), torch.empty(1).bfloat16(), 16, BLOCK=16, OTHER=True)


def test_nan_in_maximum():
    @triton.jit
    def maximum(x_ptr, out_ptr, BLOCK: tl.constexpr):
        x = tl.load(x_ptr + tl.arange(0, BLOCK))
        tl.store(out_ptr + tl.arange(0, BLOCK), tl.maximum(x, 0.0))

    out = torch.empty(2)
    maximum[(1,)](torch.tensor([float("nan"), 3.0]), out, BLOCK=2)
    assert out.tolist() == [0, 3]


def test_libdevice_and_inline_assembly():
    @triton.jit
    def functions(x_ptr, out_ptr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets)
        tl.store(out_ptr + offsets, libdevice.expm1(x))
        power = tl.inline_asm_elementwise("ex2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        tl.store(out_ptr + BLOCK + offsets, power)

    x, out = torch.randn(16), torch.empty(32)
    functions[(1,)](x, out, BLOCK=16)
    torch.testing.assert_close(out, torch.cat([x.expm1(), x.exp2()]))


def test_loop_bound_from_a_tensor():
    @triton.jit
    def count(n_ptr, out_ptr):
        total = 0
        for i in tl.range(0, tl.load(n_ptr), num_stages=2):
            total += i
        for i in range(tl.load(n_ptr)):
            total += i
        tl.store(out_ptr, total)

    out = torch.empty(1, dtype=torch.int32)
    count[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.item() == 20


def test_traffic():
    with strict.count_traffic() as launches:
        _copy[(4,)](torch.randn(50), torch.empty(50), 50, BLOCK=16, MASKED=True)
    assert launches == [strict.Traffic("_copy", loaded={"x_ptr": 200}, stored={"out_ptr": 200})]
