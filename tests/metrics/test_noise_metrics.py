import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sgfast.metrics.noise_metrics import get_noise_metrics_factory

KEYS = [
    "input_norm",
    "mean_norm",
    "unshifted_noise_norm",
    "mean_shifted_noise_norm",
    "mean_domination_percent",
    "mean_domination_ratio",
    "mean_cosine_similarity",
    "noise_domination_percent",
    "noise_domination_ratio",
    "noise_cosine_similarity",
]


def layer(input, mean, noise, noise_mask=None):
    """Stands for a noise layer after a forward."""
    return SimpleNamespace(input=input, mean=mean, noise=noise, noise_mask=noise_mask)


def random_layer(shape, noise_mask=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    return layer(*tensors, noise_mask=noise_mask)


def expected_at(x, mean, noise):
    """The ten quantities of one position, in float64 with numpy."""
    x, mean, noise = (np.asarray(vector, dtype=np.float64) for vector in (x, mean, noise))
    shifted = mean + noise
    norm = np.linalg.norm
    return [
        norm(x),
        norm(mean),
        norm(noise),
        norm(shifted),
        norm(mean) / (norm(mean) + norm(noise)),
        norm(mean) / norm(noise),
        x @ mean / (norm(x) * norm(mean)),
        norm(shifted) / (norm(x) + norm(shifted)),
        norm(shifted) / norm(x),
        x @ shifted / (norm(x) * norm(shifted)),
    ]


def test_known_triangle():
    metrics = get_noise_metrics_factory(
        layer(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 5.0]]]), torch.tensor([[[12.0, 0.0]]]))
    )()
    assert list(metrics) == KEYS
    values = [5, 5, 12, 13, 5 / 17, 5 / 12, 0.8, 13 / 18, 13 / 5, (36 + 20) / 65]
    for (name, metric), value in zip(metrics.items(), values, strict=True):
        assert metric.shape == (1,)
        assert metric.item() == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("dim", [-1, -2, -3])
def test_every_position_against_numpy(dim):
    noise_layer = random_layer((3, 4, 5))
    metrics = get_noise_metrics_factory(noise_layer, dim=dim)()
    moved = [t.movedim(dim, -1).reshape(-1, t.shape[dim]) for t in (noise_layer.input, noise_layer.mean)]
    moved.append(noise_layer.noise.movedim(dim, -1).reshape(-1, noise_layer.noise.shape[dim]))
    expected = torch.tensor([expected_at(*vectors) for vectors in zip(*moved, strict=True)]).T
    for (name, metric), values in zip(metrics.items(), expected, strict=True):
        torch.testing.assert_close(metric.double(), values, rtol=1e-5, atol=1e-6, msg=name)


def test_documented_image_example():
    """Input (4, 3, 2, 2), dim −3, a (2, 2) mask with two True: eight values each, sample by sample."""
    mask = torch.tensor([[True, False], [False, True]])
    noise_layer = random_layer((4, 3, 2, 2), mask)
    metrics = get_noise_metrics_factory(noise_layer, dim=-3)()
    assert {value.shape for value in metrics.values()} == {(8,)}
    norms = noise_layer.input.norm(dim=1)
    torch.testing.assert_close(metrics["input_norm"], torch.stack([norms[:, 0, 0], norms[:, 1, 1]], 1).flatten())


def test_leading_mask_selects_tokens_in_order():
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    noise_layer = random_layer((2, 3, 4), mask)
    norms = noise_layer.mean.norm(dim=-1)
    metrics = get_noise_metrics_factory(noise_layer)()
    torch.testing.assert_close(metrics["mean_norm"], torch.stack([norms[0, 1], norms[0, 2], norms[1, 0]]))


def test_leading_reading_wins_over_broadcasting():
    """A (3,) mask on (3, 3, 2) covers the first dimension; on (2, 3, 2) it can only broadcast to the second."""
    mask = torch.tensor([True, False, False])
    square, oblong = random_layer((3, 3, 2), mask), random_layer((2, 3, 2), mask)
    torch.testing.assert_close(get_noise_metrics_factory(square)()["input_norm"], square.input[0].norm(dim=-1))
    torch.testing.assert_close(get_noise_metrics_factory(oblong)()["input_norm"], oblong.input[:, 0].norm(dim=-1))


def test_mask_with_a_dimension_of_one_in_place_of_dim():
    mask = torch.tensor([[True, False], [True, True]]).view(1, 1, 2, 2)
    noise_layer = random_layer((4, 3, 2, 2), mask)
    norms = noise_layer.input.norm(dim=1)
    metrics = get_noise_metrics_factory(noise_layer, dim=-3)()
    torch.testing.assert_close(metrics["input_norm"], norms[mask[:, 0].expand(4, 2, 2)])


def test_parameters_without_a_batch_dimension_are_expanded():
    noise_layer = random_layer((2, 3, 4))
    noise_layer.mean = noise_layer.mean[0, 0]
    metrics = get_noise_metrics_factory(noise_layer)()
    torch.testing.assert_close(metrics["mean_norm"], noise_layer.mean.norm().expand(6))


def test_zero_vectors():
    zero, one = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]])
    nothing = get_noise_metrics_factory(layer(zero, zero, zero))()
    assert nothing["mean_domination_percent"].item() == nothing["noise_domination_percent"].item() == 0
    assert nothing["mean_cosine_similarity"].item() == nothing["noise_cosine_similarity"].item() == 0
    assert nothing["mean_domination_ratio"].isnan().all()
    mean_only = get_noise_metrics_factory(layer(one, one, zero))()
    assert mean_only["mean_domination_percent"].item() == 1
    assert mean_only["mean_domination_ratio"].item() == math.inf


def test_nan_shows_where_it_is_selected_and_only_there():
    noise_layer = random_layer((1, 3, 2), torch.tensor([[True, True, False]]))
    noise_layer.noise[0, 1:] = math.nan
    metrics = get_noise_metrics_factory(noise_layer)()
    assert metrics["unshifted_noise_norm"].isnan().tolist() == [False, True]
    assert metrics["mean_domination_percent"].isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_precision(dtype, computed):
    noise_layer = random_layer((2, 3, 64), dtype=dtype)
    metrics = get_noise_metrics_factory(noise_layer)()
    expected = get_noise_metrics_factory(layer(*(vars(noise_layer)[n].double() for n in ("input", "mean", "noise"))))()
    for name, metric in metrics.items():
        assert metric.dtype == computed
        torch.testing.assert_close(metric.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_follows_the_latest_forward_and_is_detached():
    noise_layer = layer(None, None, None)
    get_noise_metrics = get_noise_metrics_factory(noise_layer)
    with pytest.raises(RuntimeError, match="forward"):
        get_noise_metrics()
    vars(noise_layer).update(vars(random_layer((2, 5), seed=1)))
    noise_layer.mean.requires_grad_()
    first = get_noise_metrics()
    assert not any(metric.requires_grad for metric in first.values())
    torch.testing.assert_close(first["input_norm"], get_noise_metrics()["input_norm"])
    vars(noise_layer).update(vars(random_layer((3, 5), seed=2)))
    torch.testing.assert_close(get_noise_metrics()["input_norm"], noise_layer.input.norm(dim=-1))


def test_empty_selection():
    metrics = get_noise_metrics_factory(random_layer((2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)))()
    assert {value.shape for value in metrics.values()} == {(0,)}


def test_wrong_arguments():
    for dim in (0, 1):
        with pytest.raises(ValueError, match=f"dim must be negative; got {dim}"):
            get_noise_metrics_factory(random_layer((2, 3)), dim=dim)
    with pytest.raises(ValueError, match=r"dim=-3 does not fit .*\(2, 3\)"):
        get_noise_metrics_factory(random_layer((2, 3)), dim=-3)()
    with pytest.raises(ValueError, match=r"noise mask must select positions, \(2, 3\).*got shape \(5,\)"):
        get_noise_metrics_factory(random_layer((2, 3, 4), torch.ones(5)))()
    with pytest.raises(ValueError, match="noise mask"):
        get_noise_metrics_factory(random_layer((2, 3, 4), torch.ones(2, 3, 4)))()
