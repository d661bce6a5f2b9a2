"""What the measurements measure, on computations whose memory and errors are known."""

import math

import pytest
import torch

from sgfast.benchmarking import families, plain
from sgfast.benchmarking.growth import exponent, growth, largest_cliff
from sgfast.benchmarking.measuring import Task, kept_bytes, measure, peak_bytes
from sgfast.ops import divergences

CPU = torch.device("cpu")


def sum_of_exponentials(x):
    return (x.exp().sum(-1),)


def task(**implementations):
    inputs = (torch.randn(16, 100, generator=torch.Generator().manual_seed(0)),)
    return Task("family", "name", {"tokens": 16}, inputs, implementations, 1, 4800.0, 1600, sum_of_exponentials)


def test_peak_counts_what_lives_at_once_and_the_result():
    def function():
        for _ in range(3):
            temporary = torch.empty(2**20, dtype=torch.uint8)
        del temporary
        return torch.empty(2**19, dtype=torch.uint8)

    peak, result = peak_bytes(function, CPU)
    # A round's block is made before the last round's goes.
    assert peak == 2**21
    assert result.numel() == 2**19


def test_kept_bytes_are_those_beyond_the_inputs():
    x = torch.randn(8, 10)
    assert kept_bytes(lambda x: (x.exp().sum(),), (x,), 1) == 8 * 10 * 4  # exp keeps its result
    assert kept_bytes(lambda x: (x.square().sum(),), (x,), 1) == 0  # the square its input


def test_errors_are_the_planted_ones():
    def doubled_gradient(x):
        return (2 * x.exp().sum(-1) - x.detach().exp().sum(-1),)

    wrong = task(shifted=lambda x: (x.exp().sum(-1) + 0.5,), doubled=doubled_gradient)
    shifted, doubled = (measure(wrong, name, timed=False) for name in ("shifted", "doubled"))
    assert shifted["value_error"] == pytest.approx(0.5, rel=1e-4)
    assert shifted["gradient_error"] < 1e-6
    assert doubled["value_error"] < 1e-3
    assert doubled["gradient_error"] == pytest.approx(1.0, rel=1e-5)  # of the true gradient's norm


def test_rates_come_from_the_time_given():
    record = measure(task(ours=sum_of_exponentials), "ours", seconds=2e-6)
    assert record["milliseconds"] == pytest.approx(2e-3)
    assert record["floor_gb_per_s"] == pytest.approx(2.4)
    assert record["kept_bytes_per_element"] == 4
    assert (record["tokens"], record["dtype"], record["implementation"]) == (16, "float32", "ours")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tasks",
    [
        lambda dtype: families.divergence_tasks(tokens=5, vocab=301, dtype=dtype),
        lambda dtype: families.divergence_tasks(tokens=5, vocab=301, top_k=7, dtype=dtype),
        lambda dtype: families.hidden_tasks(tokens=5, width=33, dtype=dtype),
        lambda dtype: families.noise_tasks(tokens=5, width=33, dtype=dtype),
        lambda dtype: families.noise_tasks(tokens=20, width=33, shared=True, dtype=dtype),
    ],
    ids=["divergences", "top_k", "hidden", "noise", "shared_noise"],
)
def test_every_contender_computes_what_float64_computes(tasks, dtype):
    for one in tasks(dtype):
        assert one.implementations
        for implementation in one.implementations:
            found = measure(one, implementation, timed=False)
            if implementation in one.incomparable:
                assert "value_error" not in found
                continue
            # Noise in bfloat16 comes out rounded, some units wide; all else in float32.
            assert found["value_error"] < (0.05 if one.family == "noise" and dtype == torch.bfloat16 else 2e-6)
            if one.differentiated:
                # In float32 a plain formula loses digits where sides are close, and in the tail's 1 - sum.
                exact = 1e-6 if implementation == "sgfast" else 1e-4
                assert found["gradient_error"] < (4e-3 if dtype == torch.bfloat16 else exact)


@pytest.mark.parametrize("support", ["truncate", "renormalize", "tail"])
def test_plain_top_k_is_the_definition(support):
    generator = torch.Generator().manual_seed(2)
    # Many ties, which the lower index wins.
    noisy, clean = (torch.randint(-6, 7, (6, 50), generator=generator).double() for _ in range(2))
    found = plain.top_k_divergences(noisy, clean, ["jeffreys", "jensen_shannon"], 5, support, ties_in_order=True)
    expected = divergences(noisy, clean, list(found), top_k=5, support=support)
    for kind, values in found.items():
        torch.testing.assert_close(values, expected[kind], rtol=1e-9, atol=1e-12)


def test_growth_of_known_powers():
    sizes = [1000, 2000, 8000]
    assert exponent(sizes, [size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert math.isnan(exponent([5], [1]))
    assert largest_cliff(sizes, [1, 2, 24]) == pytest.approx(3.0)
    assert largest_cliff(sizes, sizes) == 1.0
    records = [
        {"sweep": sweep, "family": "f", "task": "t", "implementation": by, "dtype": "float32", "vocab": size}
        | {"milliseconds": size**power, "peak_bytes": 7}
        for sweep in ("vocab", None)
        for by, power in (("one", 1), ("two", 2))
        for size in sizes
    ]
    # A time that something else lengthened does not count where a faster round is known.
    records[0] |= {"milliseconds": 1e9, "fastest_milliseconds": records[0]["milliseconds"]}
    rows = growth(records)
    assert [(row["implementation"], row["milliseconds_exponent"]) for row in rows] == [("one", 1), ("two", 2)]
    assert {row["peak_bytes_exponent"] for row in rows} == {0}
    assert {(row["from"], row["to"]) for row in rows} == {(1000, 8000)}


def test_rise_over_the_peer_leaves_out_what_slows_both():
    times = {"eager PyTorch": [1.0, 20.0, 4.0], "sgfast": [2.0, 30.0, 8.0]}
    records = [
        {"sweep": "vocab", "family": "f", "task": "t", "implementation": by, "dtype": "float32", "vocab": size}
        | {"milliseconds": time, "peak_bytes": 7}
        for by, of_sizes in times.items()
        for size, time in zip([10, 20, 40], of_sizes, strict=True)
    ]
    eager, ours = growth(records)
    assert "ratio_cliff" not in eager
    assert ours["ratio_cliff"] == pytest.approx((8 / 4) / (30 / 20))
