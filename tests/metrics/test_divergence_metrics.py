"""Divergences over a stream of tokens: numpy's percentiles, exact means, and the same bytes in any order."""

import math
from fractions import Fraction

import numpy
import pytest
import torch

from sgfast import LinearLogits, divergences
from sgfast.metrics import DivergenceMetrics
from sgfast.metrics.distributions import PERCENTILES, Distributions
from tests.processes import in_processes

PLACES = {name: thousandths / 10 for name, thousandths in PERCENTILES.items()}


def logits(tokens, *, seed=0, vocabulary=11, distance=0.3):
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(tokens, vocabulary, generator=generator)
    step = distance * torch.rand(tokens, 1, generator=generator) ** 4
    return reference + step * torch.randn(tokens, vocabulary, generator=generator), reference


def wide(count, seed=0):
    """Values over forty orders of magnitude, of both signs, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.exp(45 * torch.randn(count, generator=generator, dtype=torch.float64).clamp(-1.8, 1.8))
    values *= torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return torch.where(torch.rand(count, generator=generator) < 0.1, 0, values)


def check(figures, values):
    """Compare with the values themselves: numpy's percentiles, and the mean of exact fractions."""
    assert figures["max"] == values.max().item()
    assert figures["min"] == values.min().item()
    mean = sum(map(Fraction, values.tolist())) / len(values)
    assert figures["mean"] == float(mean)
    ordered = values.sort().values.numpy()
    for name, place in PLACES.items():
        expected = numpy.percentile(ordered, place)
        below, above = (ordered[f(place / 100 * (len(ordered) - 1))] for f in (math.floor, math.ceil))
        assert abs(figures[name] - expected) <= 1e-3 * max(abs(below), abs(above)), name


@pytest.mark.parametrize("count", [1, 2, 3, 10, 999, 1001, 20_000])
def test_percentiles_are_numpys(count):
    for values in (wide(count), wide(count).abs(), wide(count).sign(), wide(count).clamp(-1, 1)):
        distributions = Distributions(["value"])
        for part in values.split(777):
            distributions.add({"value": part})
        figures = distributions.compute()
        check(figures["value"], values)
        assert figures["tokens"] == count
        assert list(figures["value"]) == ["mean", "max", *PERCENTILES, "min"]


def test_a_percentile_between_two_bins_of_one_sign_is_within_a_thousandth():
    values = torch.exp(torch.linspace(-30, 3, 54_321, dtype=torch.float64))
    distributions = Distributions(["value"])
    distributions.add({"value": values})
    for name, place in PLACES.items():
        assert distributions.compute()["value"][name] == pytest.approx(numpy.percentile(values, place), rel=1e-3)


def test_infinities_and_nothing_and_nan():
    distributions = Distributions(["value"])
    empty = distributions.compute()
    assert empty["tokens"] == 0
    assert all(math.isnan(figure) for figure in empty["value"].values())
    distributions.add({"value": torch.tensor([1.0, math.inf, 2.0, math.inf])})
    found = distributions.compute()["value"]
    assert (found["min"], found["max"], found["mean"], found["p99"]) == (1.0, math.inf, math.inf, math.inf)
    assert found["p10"] == pytest.approx(1.3, rel=1e-3)
    distributions.add({"value": torch.tensor([math.nan, 1.0])}, torch.tensor([False, True]))
    assert distributions.compute()["value"]["min"] == 1.0  # the NaN is masked
    distributions.add({"value": torch.tensor([math.nan])})
    assert all(math.isnan(figure) for figure in distributions.compute()["value"].values())
    distributions.reset()
    distributions.add({"value": torch.tensor([-3.0])})
    assert distributions.compute()["value"]["max"] == -3.0
    distributions.add({"value": torch.empty(0)})
    assert distributions.compute()["tokens"] == 1


@pytest.mark.parametrize("arguments", [{}, {"top_k": 3}, {"top_k": 2, "support": "truncate"}])
def test_the_divergences_of_every_token(arguments):
    kinds = ("forward_kl", "jensen_shannon", "skew_reverse_kl")
    candidate, reference = logits(400)
    mask = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.7
    metrics = DivergenceMetrics(kinds, **arguments)
    candidate[~mask] = math.nan  # is not read
    found = []
    for rows in torch.arange(400).split(123):
        metrics.update(candidate[rows], reference[rows], mask[rows].to(torch.int64))
        found.append(divergences(candidate[rows], reference[rows], kinds, mask=mask[rows], **arguments))
    values = {kind: torch.cat([part[kind] for part in found]) for kind in kinds}
    figures = metrics.compute()
    assert figures["tokens"] == mask.sum()
    for kind in kinds:
        check(figures[kind], values[kind][mask].double())


def test_forward_kl_is_from_reference_to_candidate():
    metrics = DivergenceMetrics("forward_kl")
    metrics.update(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log())
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert metrics.compute()["forward_kl"]["mean"] == pytest.approx(expected, rel=1e-6)


def test_hidden_states_and_a_head():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 4, generator=generator)
    hidden = torch.randn(2, 5, 4, generator=generator)
    near = hidden + 0.01 * torch.randn(2, 5, 4, generator=generator)
    linear, dense = DivergenceMetrics(), DivergenceMetrics()
    linear.update(LinearLogits(near, weight), LinearLogits(hidden, weight))
    dense.update((near.double() @ weight.double().T), (hidden.double() @ weight.double().T))
    for kind, figures in dense.compute().items():
        if kind != "tokens":
            assert linear.compute()[kind]["mean"] == pytest.approx(figures["mean"], rel=1e-4, abs=1e-9)
    assert linear.compute()["tokens"] == 10


def test_merging_in_any_order_gives_the_same_bytes():
    values, split = torch.stack([wide(100), wide(100, seed=1)]), (1, 3, 7, 50, 100)
    states = set()
    for seed, size in enumerate(split):
        merged = []
        for part in values.split(size, dim=1):
            merged.append(Distributions(["first", "second"]))
            merged[-1].add({"first": part[0], "second": part[1]})
        generator = torch.Generator().manual_seed(seed)
        while len(merged) > 1:
            first, second = torch.randperm(len(merged), generator=generator)[:2].tolist()
            merged[first].merge(merged[second])
            del merged[second]
        states.add(merged[0].state_dict()["counts"].numpy().tobytes())
    assert len(states) == 1
    check(merged[0].compute()["first"], values[0])
    check(merged[0].compute()["second"], values[1])


def test_a_state_that_is_saved_goes_on():
    whole, resumed = DivergenceMetrics(), DivergenceMetrics()
    candidate, reference = logits(50)
    whole.update(candidate[:20], reference[:20])
    resumed.load_state_dict(whole.state_dict())
    for metrics in (whole, resumed):
        metrics.update(candidate[20:], reference[20:])
    assert whole.compute() == resumed.compute()
    assert whole.compute()["tokens"] == 50
    with pytest.raises(ValueError, match="must have been made with the options"):
        resumed.merge(DivergenceMetrics(top_k=2))
    with pytest.raises(ValueError, match="must have been made with the options"):
        resumed.load_state_dict(DivergenceMetrics("reverse_kl").state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kinds": "forwardkl"}, ValueError, "kinds"),
        ({"kinds": ()}, ValueError, "kinds must name at least one kind"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 1.5}, TypeError, "top_k"),
        ({"support": "head"}, ValueError, "support"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes"),
    ],
)
def test_wrong_options(arguments, error, message):
    with pytest.raises(error, match=message):
        DivergenceMetrics(**arguments)


def _share(rank):
    candidate, reference = logits(60, seed=5)
    metrics, whole = DivergenceMetrics(), DivergenceMetrics()
    if rank < 2:  # the third process has no token
        metrics.update(candidate[rank::2], reference[rank::2])
    whole.update(candidate, reference)
    assert metrics.compute() == whole.compute(all_processes=False)


def test_three_processes_have_the_figures_of_one():
    in_processes(3, _share)
