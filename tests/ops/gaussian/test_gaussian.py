"""Pairwise KL divergences against torch.distributions in float64, where centers, masks and last digits count."""

import math

import pytest
import torch
from torch import Tensor

import sgfast
from sgfast.ops import pairwise_gaussian_kl
from sgfast.ops.gaussian import operator
from tests import registration
from tests.live_bytes import LiveBytes

IMPLEMENTATIONS = ("torch", "compile")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def gaussians(
    a: int, b: int, positions: int, width: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Sides:
    generator = torch.Generator().manual_seed(a + 10 * b + 100 * positions + width)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        mean = scale * torch.randn(count, positions, width, generator=generator, dtype=torch.float64)
        std = torch.exp(0.5 * torch.randn(count, positions, width, generator=generator, dtype=torch.float64))
        return mean.to(dtype), std.to(dtype)

    return *draw(a), *draw(b)


def oracle(sides: Sides, used: Tensor | None = None) -> Tensor:
    """(A, B) in float64 by PyTorch's own divergence, one pair against the other; ``used`` is (A, B, T, D)."""
    mean_a, std_a, mean_b, std_b = (side.double() for side in sides)
    if used is not None:
        fill = ((mean_a, 0), (std_a, 1), (mean_b, 0), (std_b, 1))
        mean_a, std_a, mean_b, std_b = (side.nan_to_num(0, 0, 0) if value == 0 else side for side, value in fill)
        std_a, std_b = (torch.where(std.isfinite() & (std > 0), std, 1) for std in (std_a, std_b))
    terms = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean_a[:, None], std_a[:, None]),
        torch.distributions.Normal(mean_b[None], std_b[None]),
    )
    return (terms if used is None else torch.where(used, terms, 0)).sum((2, 3))


def weights(kl: Tensor) -> Tensor:
    return torch.linspace(-1, 2, kl.numel(), dtype=torch.float64).view(kl.shape).to(kl)


def gradients(function, sides: Sides) -> tuple[Tensor, ...]:
    leaves = [side.detach().requires_grad_() for side in sides]
    kl = function(*leaves)
    return torch.autograd.grad((kl * weights(kl)).sum(), leaves)


def assert_gradients_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Norm-wise for every Gaussian, means and stds apart."""
    for one, other in zip(actual, expected, strict=True):
        error = (one.double() - other.double()).flatten(1).norm(dim=1)
        assert (error <= tolerance * other.double().flatten(1).norm(dim=1)).all(), error


def check_against_torch_distributions(impl: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    sides = gaussians(*shape, dtype=dtype)
    kl, count = pairwise_gaussian_kl(*sides, impl=impl)
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(kl.double(), oracle(sides), rtol=1e-12 if dtype == torch.float64 else 1e-7, atol=1e-12)
    assert torch.equal(count, torch.full(shape[:2], shape[2] * shape[3]))
    actual = gradients(lambda *leaves: pairwise_gaussian_kl(*leaves, impl=impl)[0], sides)
    expected = gradients(lambda *leaves: oracle(leaves), tuple(side.double() for side in sides))
    assert all(one.dtype == dtype for one in actual)
    epsilon = {torch.float64: 1e-12, torch.float32: 2e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert_gradients_close(actual, expected, epsilon)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 5, 6), (2, 7, 1, 33), (5, 2, 64, 17)], ids=str)
def test_equals_torch_distributions(dtype, shape):
    check_against_torch_distributions("torch", dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_torch_distributions_through_the_compiler(dtype):
    check_against_torch_distributions("compile", dtype, (3, 4, 5, 6))


def test_mixed_dtypes():
    sides = gaussians(3, 2, 4, 5)
    mixed = (sides[0].bfloat16(), sides[1], sides[2].half(), sides[3].double())
    kl, _ = pairwise_gaussian_kl(*mixed)
    torch.testing.assert_close(kl, oracle(mixed), rtol=1e-12, atol=0)
    for one, side in zip(gradients(lambda *leaves: pairwise_gaussian_kl(*leaves)[0], mixed), mixed, strict=True):
        assert one.dtype == side.dtype


def test_closed_forms():
    mean = torch.tensor([0.0, 3.0]).view(2, 1, 1)
    std = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    kl, _ = pairwise_gaussian_kl(mean, std, mean, std)
    expected = [[0, math.log(2) + (1 + 9) / 8 - 0.5], [-math.log(2) + (4 + 9) / 2 - 0.5, 0]]
    torch.testing.assert_close(kl, torch.tensor(expected))


@pytest.mark.parametrize("shift", [1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clusters_far_from_the_origin_and_from_each_other(shift, dtype):
    """Within a cluster divergences are of order one a feature; between clusters, of order shift²."""
    mean_a, std_a, mean_b, std_b = gaussians(8, 8, 4, 16, torch.float64)
    cluster = shift * torch.tensor([1.0, 3.0]).repeat(4).view(8, 1, 1)
    sides = tuple(side.to(dtype) for side in (mean_a + cluster, std_a, mean_b + cluster, std_b))
    kl, _ = pairwise_gaussian_kl(*sides)
    expected = oracle(sides)
    assert expected.max() > 1e4 * expected.min()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)
    actual = gradients(lambda *leaves: pairwise_gaussian_kl(*leaves)[0], sides)
    wanted = gradients(lambda *leaves: oracle(leaves), tuple(side.double() for side in sides))
    assert_gradients_close(actual, wanted, 1e-6)


@pytest.mark.parametrize("std", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_gaussians_are_at_zero(std, dtype):
    """Means up to 10⁸ sigma apart: a plain product is off by tens of nats a feature."""
    mean = torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    # The smallest float16 is 6e-8.
    stds = torch.full_like(mean, max(std, 1e-7 if dtype == torch.float16 else 0))
    mean[4:] = mean[1]
    kl, count = pairwise_gaussian_kl(mean, stds, mean, stds)
    same = torch.eye(6, dtype=torch.bool)
    same[4:, [1, 4, 5]] = same[1, 4:] = True
    assert (kl / count)[same].max() < 1e-6
    assert kl.isfinite().all()
    torch.testing.assert_close(kl[~same].double(), oracle((mean, stds, mean, stds))[~same], rtol=1e-6, atol=0)


def test_two_clusters_of_identical_gaussians():
    """Half of all pairs need a second look."""
    mean = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).repeat(10, 1, 1)
    std = torch.full_like(mean, 1e-8)
    kl, count = pairwise_gaussian_kl(mean, std, mean, std)
    same = (torch.arange(20)[:, None] - torch.arange(20)) % 2 == 0
    assert (kl / count)[same].max() < 1e-6
    torch.testing.assert_close(kl[~same].double(), oracle((mean, std, mean, std))[~same], rtol=1e-6, atol=0)


def test_nearly_identical_gaussians_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 3, 32, generator=generator, dtype=torch.float64)
    std = torch.full_like(mean, 1e-7)
    moved = mean + 1e-10 * torch.randn(4, 3, 32, generator=generator, dtype=torch.float64)
    sides = mean, std, moved, std * 1.0001
    torch.testing.assert_close(pairwise_gaussian_kl(*sides)[0], oracle(sides), rtol=1e-6, atol=1e-7)


def test_uncertain_pairs_on_a_gpu_have_a_fixed_number(monkeypatch):
    """Without a data-dependent shape: the A + B least certain pairs, here those of equal Gaussians."""
    twice = torch.rand(5, 4, dtype=torch.float64)
    magnitude = torch.full((5, 4), 1.0, dtype=torch.float64)
    magnitude[[0, 1, 3], [2, 2, 0]], twice[4, 3] = 1e15, math.nan
    on_cpu = torch.cat(list(operator._uncertain_pairs(twice, magnitude, torch.full((5, 4), 3.0), 10)))
    assert on_cpu.tolist() == [2, 6, 12, 19]
    monkeypatch.setattr(operator, "_on_cpu", lambda _: False)
    (on_gpu,) = operator._uncertain_pairs(twice, magnitude, torch.full((5, 4), 3.0), 10)
    assert on_gpu.numel() == 9
    assert set(on_cpu.tolist()) <= set(on_gpu.tolist())


def random_mask(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) > 0.4


MASKS = {
    "positions": (random_mask(4, 6), random_mask(3, 6)),
    "features": (random_mask(4, 6, 8), random_mask(3, 6, 8)),
    "features of a": (random_mask(4, 6, 8), random_mask(3, 6)),
    "positions of b": (None, random_mask(3, 6)),
    "integers": (random_mask(4, 6).int(), random_mask(3, 6).float()),
    "an empty row": (torch.arange(4)[:, None] * torch.ones(4, 6) > 0, None),
    "nothing": (torch.zeros(4, 6), torch.ones(3, 6)),
}


def used_features(mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
    both = []
    for mask, count in ((mask_a, 4), (mask_b, 3)):
        mask = torch.ones(count, 6, 8) if mask is None else mask
        both.append((mask if mask.dim() == 3 else mask[..., None].expand(count, 6, 8)) != 0)
    return both[0][:, None] & both[1][None]


def check_masks(bad: float, masks: tuple[Tensor | None, Tensor | None], combine_masks: bool, impl: str) -> None:
    sides = gaussians(4, 3, 6, 8)
    used = used_features(masks[0], masks[1] if combine_masks else None)
    expected = oracle(sides, used)
    expected_gradients = gradients(lambda *leaves: oracle(leaves, used), tuple(side.double() for side in sides))
    for side, seen in zip(sides, (used.any(1), used.any(1), used.any(0), used.any(0)), strict=True):
        side[~seen] = bad

    def function(*leaves):
        return pairwise_gaussian_kl(*leaves, *masks, combine_masks=combine_masks, impl=impl)

    kl, count = function(*sides)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-7, atol=1e-12)
    assert torch.equal(count, used.sum((2, 3)))
    actual = gradients(lambda *leaves: function(*leaves)[0], sides)
    for one, other, seen in zip(
        actual, expected_gradients, (used.any(1), used.any(1), used.any(0), used.any(0)), strict=True
    ):
        assert one[~seen].eq(0).all()
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0], ids=str)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("combine_masks", [True, False])
def test_masked_features_are_never_seen(bad, masks, combine_masks):
    check_masks(bad, masks, combine_masks, "torch")


def test_masked_features_are_never_seen_through_the_compiler():
    check_masks(math.nan, MASKS["positions"], True, "compile")


def test_nan_reaches_only_the_pairs_that_use_it():
    sides = gaussians(4, 3, 6, 8)
    mask_a = torch.ones(4, 6)
    mask_a[:2, 5] = 0
    expected = pairwise_gaussian_kl(*sides, mask_a)[0]
    sides[2][1, 5, 3] = math.nan
    kl = pairwise_gaussian_kl(*sides, mask_a)[0]
    poisoned = torch.zeros(4, 3, dtype=torch.bool)
    poisoned[2:, 1] = True
    assert kl[poisoned].isnan().all()
    torch.testing.assert_close(kl[~poisoned], expected[~poisoned])
    of_mean_a = gradients(lambda *leaves: pairwise_gaussian_kl(*leaves, mask_a)[0], sides)[0]
    assert of_mean_a[:2].isfinite().all()


@pytest.mark.parametrize("max_chunk_bytes", [1, 5_000, 40_000, None])
@pytest.mark.parametrize(
    "masks", [(None, None), MASKS["positions"], MASKS["features"]], ids=["all", "(A, T)", "(A, T, D)"]
)
def test_chunks_change_nothing(max_chunk_bytes, masks):
    sides = tuple(side.double() for side in gaussians(4, 3, 6, 8))
    sides[0][0], sides[2][0], sides[1][0], sides[3][0] = 1e5, 1e5, 1.0, 1.0

    def function(*leaves):
        return pairwise_gaussian_kl(*leaves, *masks, max_chunk_bytes=max_chunk_bytes)

    kl, count = function(*sides)
    expected, expected_count = pairwise_gaussian_kl(*sides, *masks, max_chunk_bytes=10**9)
    torch.testing.assert_close(kl, expected, rtol=1e-6, atol=1e-6)
    assert kl[0, 0] == 0
    assert torch.equal(count, expected_count)
    used = used_features(*masks)
    wanted = gradients(lambda *leaves: oracle(leaves, used), sides)
    for one, other in zip(gradients(lambda *leaves: function(*leaves)[0], sides), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("max_chunk_bytes", [2**16, 2**19])
@pytest.mark.parametrize("masked", [None, 2, 3], ids=["all", "(A, T)", "(A, T, D)"])
def test_memory_is_bounded(max_chunk_bytes, masked):
    """Far below a (A, B, T, D) tensor, 8 MiB here, also when every pair is summed again."""
    sides = gaussians(16, 16, 16, 256)
    sides[0].copy_(sides[0][:1].clone()), sides[2].copy_(sides[0])
    sides[1].fill_(1e-9), sides[3].fill_(1e-9)
    sides[0][::2] += 1e4
    sides[2][::2] += 1e4
    masks = [None, None] if masked is None else [random_mask(*(16, 16, 256)[:masked]) for _ in range(2)]
    pairs = 16 * 16 * 8
    problem = operator.Problem(*sides, *masks, max_chunk_bytes=max_chunk_bytes, impl=None)
    with LiveBytes() as counted:
        kl, _ = operator.forward.implementation(problem)
    assert kl[0, 0] == 0
    assert counted.peak <= max_chunk_bytes + 12 * pairs
    upstream = weights(kl)
    with LiveBytes() as counted:
        operator.backward.implementation(operator.BackwardProblem(problem, upstream=upstream, wanted=[True] * 4))
    assert counted.peak <= max_chunk_bytes + 12 * pairs + sum(side.nbytes for side in sides)


def test_strided_inputs_are_left_alone():
    sides = gaussians(4, 3, 7, 12)
    views = tuple(side[:, :-1, 2:] for side in sides)
    copies = tuple(side.clone() for side in sides)
    kl, count = pairwise_gaussian_kl(*views)
    torch.testing.assert_close(kl.double(), oracle(views), rtol=1e-7, atol=0)
    assert count.eq(60).all()
    moved = tuple(side.transpose(1, 2) for side in sides)
    torch.testing.assert_close(pairwise_gaussian_kl(*moved)[0], pairwise_gaussian_kl(*sides)[0])
    actual = gradients(lambda *leaves: pairwise_gaussian_kl(*leaves)[0], moved)
    expected = gradients(lambda *leaves: pairwise_gaussian_kl(*leaves)[0], sides)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.transpose(1, 2), other)
    for side, copy in zip(sides, copies, strict=True):
        assert torch.equal(side, copy)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5)], ids=str)
def test_empty(shape):
    sides = gaussians(*shape)
    kl, count = pairwise_gaussian_kl(*sides)
    assert (kl.tolist(), count.tolist()) == ([[0.0] * shape[1]] * shape[0], [[0] * shape[1]] * shape[0])
    assert all(not one.any() for one in gradients(lambda *leaves: pairwise_gaussian_kl(*leaves)[0], sides))


def test_gradients_only_where_needed():
    sides = gaussians(3, 2, 4, 5)
    leaves = [side.requires_grad_(needed) for side, needed in zip(sides, (True, False, False, True), strict=True)]
    recorder = registration.Recorder()
    with recorder:
        pairwise_gaussian_kl(*leaves)[0].sum().backward()
    assert recorder.backward_arguments()["wanted"] == [True, False, False, True]
    expected = gradients(lambda *all_leaves: oracle(all_leaves) / weights(torch.ones(3, 2)).double(), sides)
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False, True]
    torch.testing.assert_close(leaves[0].grad.double(), expected[0].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaves[3].grad.double(), expected[3].double(), rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing():
    sides = gaussians(3, 2, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise_gaussian_kl(*sides)[0], pairwise_gaussian_kl(*sides)[0])
        inside = pairwise_gaussian_kl(*sides)[0]
    assert torch.equal(inside, pairwise_gaussian_kl(*sides)[0])


def plain_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return gaussians(rows, rows, 2, 3, dtype)


def masked_case(*mask_shape: int):
    def arguments(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        sides = gaussians(rows, rows, 2, 3, dtype)
        mask_a, mask_b = (torch.arange(rows * math.prod(mask_shape)).view(rows, *mask_shape) % n != 0 for n in (3, 5))
        sides[0][~mask_a], sides[3][~mask_b] = math.nan, math.inf
        return *sides, mask_a, mask_b

    return arguments


def values(*tensors: Tensor) -> Tensor:
    return pairwise_gaussian_kl(*tensors)[0]


CASES = [
    registration.Case("plain", values, plain_case),
    registration.Case("masked positions", values, masked_case(2)),
    registration.Case("masked features", values, masked_case(2, 3)),
]


@registration.each_check(CASES, has_kernel=False)
def test_registration(check, case):
    check(case)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_double_backward_is_pytorchs_alone(impl):
    leaves = [side.requires_grad_() for side in gaussians(2, 3, 2, 4)]
    kl = pairwise_gaussian_kl(*leaves, impl=impl)[0].sum()
    (gradient,) = torch.autograd.grad(kl, leaves[0], create_graph=True)
    if impl == "torch":
        gradient.sum().backward()
        assert leaves[3].grad.ne(0).all()
    else:
        with pytest.raises(RuntimeError, match="pairwise_gaussian_kl has no double backward under impl='compile'"):
            gradient.sum().backward()


def test_forward_mode_is_refused():
    mean_a, *others = gaussians(2, 2, 2, 2)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda mean: pairwise_gaussian_kl(mean, *others)[0], (mean_a,), (mean_a,))


def test_explain_names_the_reason():
    sides = gaussians(2, 2, 2, 2)
    reason = "pairwise_gaussian_kl is float64 matrix products, which the vendor's library computes"
    assert sgfast.explain(pairwise_gaussian_kl, *sides) == ("torch", reason)
    with pytest.raises(RuntimeError, match=reason):
        pairwise_gaussian_kl(*sides, impl="triton")


X, Y = torch.ones(2, 3, 4), torch.ones(5, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, X[:1], Y, Y), {}, ValueError, r"mean_a and std_a must have one shape; got \(2, 3, 4\) and \(1, 3, 4\)"),
        ((X, X, Y, Y[..., :2]), {}, ValueError, "mean_b and std_b must have one shape"),
        ((X, X, Y[:, :2], Y[:, :2]), {}, ValueError, r"shapes \(A, T, D\) and \(B, T, D\); got \(2, 3, 4\) and \(5, 2"),
        ((X[0], X[0], Y, Y), {}, ValueError, r"shapes \(A, T, D\) and \(B, T, D\); got \(3, 4\)"),
        ((X.long(), X, Y, Y), {}, TypeError, "mean_a must be float32"),
        ((X, X, Y, 1.0), {}, TypeError, "std_b must be a torch.Tensor; got float"),
        ((X, X, Y.to("meta"), Y.to("meta")), {}, ValueError, "mean_b and mean_a must be on one device"),
        (
            (X, X, Y, Y, torch.ones(5, 3)),
            {},
            ValueError,
            r"mask_a must have the shape of mean_a, \(2, 3, 4\), or .*\(5, 3\)",
        ),
        ((X, X, Y, Y, None, [1]), {}, TypeError, "mask_b must be a torch.Tensor or None; got list"),
        ((X, X, Y, Y), {"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes must be positive"),
        ((X, X, Y, Y), {"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        pairwise_gaussian_kl(*arguments, **options)
