"""The accumulators as metrics of torchmetrics: the same bits, alone, in collections and in several processes."""

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from sgfast import metrics
from sgfast.metrics.torchmetrics import DivergenceMetrics, PrivacyMetrics, UtilityMetrics
from tests.metrics.test_accumulators import attacked, sequences
from tests.metrics.test_accumulators import exactly as exactly_flat
from tests.processes import in_processes

PAIRS = (
    (UtilityMetrics, metrics.UtilityMetrics, lambda: ({"top_k": 3, "kinds": "reverse_kl"}, sequences(9))),
    (UtilityMetrics, metrics.UtilityMetrics, lambda: ({}, sequences(9))),
    (PrivacyMetrics, metrics.PrivacyMetrics, lambda: ({"table": attacked(9)[1], "beta": 2}, attacked(9)[0])),
    (DivergenceMetrics, metrics.DivergenceMetrics, lambda: ({"top_k": 3}, sequences(9)[:3])),
)


def made(index):
    """A metric, the accumulator with the same options, and batches of one row for both."""
    of_torchmetrics, accumulator, case = PAIRS[index]
    arguments, tensors = case()
    batches = [tuple(tensor[row : row + 1] for tensor in tensors) for row in range(9)]
    return of_torchmetrics(**arguments), accumulator(**arguments), batches


def exactly(found, expected):
    """Equal to the last bit; a figure in a dictionary has the names of both."""
    flat = {}
    for name, figure in expected.items():
        parts = figure if isinstance(figure, dict) else {"": figure}
        flat |= {f"{name}/{part}".rstrip("/"): value for part, value in parts.items()}
    exactly_flat(found, flat)


def plain(figures):
    assert all(value.shape == () and value.dtype == torch.float64 for value in figures.values())
    return {name: value.item() for name, value in figures.items()}


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_the_figures_of_the_accumulator(index):
    metric, accumulator, batches = made(index)
    other = copy.deepcopy(metric)
    for row, batch in enumerate(batches):
        accumulator.update(*batch)
        if row < 3:
            metric.update(*batch)
        elif row < 6:  # a call gives the figures of this batch alone, and adds it
            alone = type(accumulator)(**PAIRS[index][2]()[0])
            alone.update(*batch)
            exactly(plain(metric(*batch)), alone.compute())
        else:
            other.update(*batch)
    metric.merge_state(other)
    exactly(plain(metric.compute()), accumulator.compute())
    again = pickle.loads(pickle.dumps(metric))
    again.update(*batches[0])
    accumulator.update(*batches[0])
    exactly(plain(again.compute()), accumulator.compute())
    metric.reset()
    metric.update(*batches[1])
    accumulator.reset()
    accumulator.update(*batches[1])
    exactly(plain(metric.compute()), accumulator.compute())


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_a_state_dict_in_a_model(index):
    metric, accumulator, batches = made(index)
    model = torch.nn.ModuleDict({"metric": metric})
    metric.update(*batches[0])
    assert not model.state_dict()
    metric.persistent(True)
    resumed, _, _ = made(index)
    saved = model.state_dict()
    metric.update(*batches[1])  # what was saved is a copy
    torch.nn.ModuleDict({"metric": resumed}).load_state_dict(saved)
    for batch in batches[1:]:
        resumed.update(*batch)
    for batch in batches:
        accumulator.update(*batch)
    exactly(plain(resumed.compute()), accumulator.compute())


def test_states_of_other_options_do_not_mix():
    clean, mask = torch.zeros(1, 2, 5), torch.zeros(1, 2)
    metric, other = UtilityMetrics(), UtilityMetrics(top_k=2)
    other.update(clean, clean, mask)
    with pytest.raises(ValueError, match="Expected state variable counts"):
        metric.merge_state(other)
    other.persistent(True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        metric.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"figure must be one of .* Did you mean 'noisy_perplexity'"):
        UtilityMetrics(figure="noisy_perplexit")


def test_collections_share_a_state_among_equal_options_alone():
    """The first batch of the second group has no attended token: both states are 0 after it."""
    first, rest = sequences(2, seed=1), sequences(9)
    collection = MetricCollection(
        {
            "agreement": UtilityMetrics(figure="next_token_agreement"),
            "whole": UtilityMetrics(figure="next_token_utility/jensen_shannon"),
            "top": UtilityMetrics(3, figure="next_token_utility/jensen_shannon"),
        }
    )
    collection.update(first[0], first[1], torch.zeros_like(first[2]), first[3])
    collection.update(*rest)
    groups = sorted(sorted(group) for group in collection.compute_groups.values())
    assert groups == [["agreement", "whole"], ["top"]]
    whole, top = metrics.UtilityMetrics(), metrics.UtilityMetrics(3)
    for accumulator in (whole, top):
        accumulator.update(*rest)
    expected = {
        "agreement": whole.compute()["next_token_agreement"],
        "whole": whole.compute()["next_token_utility/jensen_shannon"],
        "top": top.compute()["next_token_utility/jensen_shannon"],
    }
    exactly(plain(collection.compute()), expected)
    assert expected["top"] < expected["whole"]


def test_a_collection_names_all_figures():
    rows, table = attacked(9)
    collection = MetricCollection([PrivacyMetrics(table), UtilityMetrics()])
    collection["PrivacyMetrics"].update(*rows)
    collection["UtilityMetrics"].update(*sequences(9))
    privacy, utility = metrics.PrivacyMetrics(table), metrics.UtilityMetrics()
    privacy.update(*rows)
    utility.update(*sequences(9))
    exactly(plain(collection.compute()), privacy.compute() | utility.compute())


def test_moving_changes_devices_and_no_precision():
    rows, table = attacked(9)
    metric, accumulator = PrivacyMetrics(table), metrics.PrivacyMetrics(table)
    accumulator.update(*rows)
    model = torch.nn.ModuleDict({"metric": metric, "other": torch.nn.Linear(2, 2)})
    for move in (model.half, lambda: model.to(torch.bfloat16), lambda: metric.set_dtype(torch.float16), model.double):
        move()
    assert not list(model["metric"].buffers())
    metric.update(*rows)
    exactly(plain(metric.compute()), accumulator.compute())
    metric.to("meta")
    assert metric.metric_state.popitem()[1].device.type == "meta"
    assert metric._accumulator.table.device.type == "meta"
    assert metric._accumulator.table.dtype == table.dtype


def _in_two(rank):
    """Uneven shares, one row at a time: the figures of one accumulator over all rows; afterwards each its own again."""
    for index in range(len(PAIRS)):
        metric, accumulator, batches = made(index)
        _, own, _ = made(index)
        for row, batch in enumerate(batches):
            accumulator.update(*batch)
            if (row < 7) == (rank == 0):
                metric.update(*batch) if row % 2 else metric(*batch)
                own.update(*batch)
        exactly(plain(metric.compute()), accumulator.compute(all_processes=False))
        metric.merge_state(made(index)[0])  # of nothing: the state is this process's own again
        metric.sync_on_compute = metric._to_sync = False
        exactly(plain(metric.compute()), own.compute(all_processes=False))


def test_two_processes_have_the_figures_of_one():
    in_processes(2, _in_two)
