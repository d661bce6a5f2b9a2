"""The divergence functions: against a float64 rewrite of their definitions, with dense support masks and without."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sgfast.loss import divergences as losses
from sgfast.metrics import get_top_k_support_mask
from sgfast.ops.divergence import chunks, masked_divergence
from sgfast.ops.divergence.operator import BackwardProblem, backward, forward
from tests import registration
from tests.implementations import RUNS_TRITON
from tests.live_bytes import LiveBytes
from tests.ops.divergence.problems import problem

FUNCTIONS = {
    "jeffreys": losses.jeffreys_divergence,
    "jensen_shannon": losses.jensen_shannon_divergence,
    "total_variation": losses.total_variation,
    "squared_hellinger": losses.squared_hellinger_distance,
    "kl": losses.kl_divergence,
    "reverse_kl": lambda *args, **kwargs: losses.kl_divergence(*args, reverse=True, **kwargs),
    "cross_entropy": losses.cross_entropy,
}
SUPPORTS = ("truncate", "renormalize", "tail")


def pair(*shape: int, noise: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    noisy = clean + noise * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return noisy.to(dtype), clean.to(dtype)


def definition(name: str, p: Tensor, q: Tensor) -> Tensor:
    def kl(u: Tensor, v: Tensor) -> Tensor:
        return (torch.special.xlogy(u, u) - torch.special.xlogy(u, v)).sum()

    match name:
        case "jeffreys":
            return kl(p, q) + kl(q, p)
        case "jensen_shannon":
            return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2
        case "total_variation":
            return (p - q).abs().sum() / 2
        case "squared_hellinger":
            return (p.sqrt() - q.sqrt()).square().sum() / 2
        case "kl":
            return kl(q, p)
        case "reverse_kl":
            return kl(p, q)
        case "cross_entropy":
            return -torch.special.xlogy(q, p).sum()
    raise AssertionError(name)


def oracle(name: str, noisy: Tensor, clean: Tensor, support_mask: Tensor, support: str, temperature: float) -> Tensor:
    """Row by row, with the support's atoms picked out; 0 for an empty support."""
    values = []
    width = noisy.shape[-1]
    for x, y, inside in zip(
        (noisy / temperature).view(-1, width),
        (clean / temperature).view(-1, width),
        support_mask.view(-1, width),
        strict=True,
    ):
        if not inside.any():
            values.append(x.sum() * 0)
            continue
        p, q = x.softmax(-1), y.softmax(-1)
        if support == "renormalize":
            p, q = x[inside].softmax(-1), y[inside].softmax(-1)
        elif support == "truncate":
            p, q = p[inside], q[inside]
        elif not inside.all():
            p, q = (torch.cat([side[inside], side[~inside].sum()[None]]) for side in (p, q))
        values.append(definition(name, p, q))
    return torch.stack(values).view(noisy.shape[:-1])


def dense_mask(*shape: int) -> Tensor:
    """About a third of the entries; one empty row, one full one."""
    support_mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.3
    support_mask.view(-1, shape[-1])[1] = False
    support_mask.view(-1, shape[-1])[2] = True
    return support_mask


@pytest.mark.parametrize(
    ("name", "support", "impl"),
    [
        *((name, support, "torch") for name in FUNCTIONS for support in SUPPORTS),
        *(("jensen_shannon", support, "compile") for support in SUPPORTS),  # compiling costs seconds a case
    ],
)
def test_dense_supports_match_the_float64_definition(name, support, impl):
    noisy, clean = (side.requires_grad_() for side in pair(2, 4, 83))
    support_mask = dense_mask(2, 4, 83)
    values = FUNCTIONS[name](noisy, clean, support_mask, support=support, temperature=1.7, impl=impl)
    wide = [side.detach().double().requires_grad_() for side in (noisy, clean)]
    expected = oracle(name, *wide, support_mask, support, 1.7)
    assert values.dtype == torch.float32
    assert values[0, 1] == 0
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=5e-7)
    weights = torch.linspace(-1, 2, 8).view(2, 4)
    actual = torch.autograd.grad((values * weights).sum(), (noisy, clean))
    wanted = torch.autograd.grad((expected * weights).sum(), wide)
    for side, reference in zip(actual, wanted, strict=True):
        assert ((side.double() - reference).norm(dim=-1) <= 1e-5 * reference.norm(dim=-1) + 1e-7).all()
        assert (side[0, 1] == 0).all()


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_mask_of_top_k_is_top_k(name, support):
    sides = [side.requires_grad_() for side in pair(3, 5, 60)]
    support_mask = get_top_k_support_mask(*sides, 6)
    by_mask = FUNCTIONS[name](*sides, support_mask, support=support)
    by_top_k = FUNCTIONS[name](*sides, top_k=6, support=support)
    torch.testing.assert_close(by_mask, by_top_k, rtol=2e-6, atol=1e-7)
    for first, second in zip(
        torch.autograd.grad(by_mask.sum(), sides), torch.autograd.grad(by_top_k.sum(), sides), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_full_mask_is_the_whole_vocabulary(name, support):
    noisy, clean = pair(4, 60)
    everything = torch.ones(60, dtype=torch.bool)
    value = FUNCTIONS[name](noisy, clean, everything, support=support)
    torch.testing.assert_close(value, FUNCTIONS[name](noisy, clean), rtol=2e-6, atol=1e-7)


def test_closed_forms_of_two_point_distributions():
    p, q = 0.5, 0.8
    noisy, clean = (torch.tensor([math.log(u), math.log(1 - u)], dtype=torch.float64) for u in (p, q))
    forward = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    reverse = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    expected = {
        "jeffreys": forward + reverse,
        "total_variation": 0.3,
        "squared_hellinger": 1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q)),
        "kl": forward,
        "reverse_kl": reverse,
        "cross_entropy": math.log(2),
    }
    for name, value in expected.items():
        assert FUNCTIONS[name](noisy, clean).item() == pytest.approx(value, rel=1e-12), name
    assert losses.jefferys_divergence is losses.jeffreys_divergence
    m = 0.3 * q + 0.7 * p
    skewed = 0.3 * (q * math.log(q / m) + (1 - q) * math.log((1 - q) / (1 - m))) + 0.7 * (
        p * math.log(p / m) + (1 - p) * math.log((1 - p) / (1 - m))
    )
    assert losses.jensen_shannon_divergence(noisy, clean, beta=0.3).item() == pytest.approx(skewed, rel=1e-12)
    # First entry only, one side of the mean shift: the truncated KL is a single term.
    first = torch.tensor([True, False])
    assert losses.kl_divergence(noisy, clean, first, support="truncate").item() == pytest.approx(
        q * math.log(q / p), rel=1e-12
    )


def test_the_truncated_divergences_grow_with_the_mask():
    noisy, clean = pair(20, 200)
    order = torch.rand(20, 200, generator=torch.Generator().manual_seed(2)).argsort(-1)
    for name in ("jeffreys", "jensen_shannon", "total_variation", "squared_hellinger"):
        values = [FUNCTIONS[name](noisy, clean, order < size, support="truncate") for size in (0, 10, 50, 100, 200)]
        assert (values[0] == 0).all()
        assert all((larger >= smaller).all() for smaller, larger in itertools.pairwise(values))
        torch.testing.assert_close(values[-1], FUNCTIONS[name](noisy, clean))


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_infinite_and_masked_logits_never_reach_a_gradient(name, support):
    noisy, clean = pair(4, 30)
    noisy[0, :5], clean[0, :5] = -torch.inf, -torch.inf
    noisy[1], clean[1] = torch.nan, torch.inf
    noisy[2, 3], clean[2, 3] = torch.nan, torch.nan
    support_mask = dense_mask(4, 30)
    support_mask[0, :15] = torch.arange(15) % 2 == 0
    support_mask[2] = False  # an empty support reads nothing into its value, whatever the logits
    sides = [noisy.requires_grad_(), clean.requires_grad_()]
    mask = torch.tensor([1, 0, 1, 1])
    values = FUNCTIONS[name](*sides, support_mask, support=support, mask=mask)
    wide = [side.detach().double()[[0, 3]].clamp(min=-1e4) for side in sides]
    expected = oracle(name, *wide, support_mask[[0, 3]], support, 1.0)
    torch.testing.assert_close(values[[0, 3]].double(), expected, rtol=1e-5, atol=5e-7)
    assert (values[1:3] == 0).all()
    for gradient in torch.autograd.grad(values.sum(), sides):
        assert gradient.isfinite().all()
        assert (gradient[1:3] == 0).all()


def test_a_support_of_lost_mass_is_empty_not_nan():
    """Every logit of the support is −inf on both sides: no mass to compare."""
    noisy, clean = pair(1, 10)
    noisy[0, :2] = clean[0, :2] = -torch.inf
    support_mask = torch.arange(10) < 2
    for name, function in FUNCTIONS.items():
        assert function(noisy, clean, support_mask, support="truncate").item() == 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    sides = [side.requires_grad_() for side in pair(3, 40, noise=0.05, dtype=dtype)]
    support_mask = dense_mask(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        values = losses.jensen_shannon_divergence(*sides, support_mask, support="truncate")
    expected = oracle("jensen_shannon", *(side.detach().double() for side in sides), support_mask, "truncate", 1.0)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-9)
    assert all(gradient.dtype == dtype for gradient in torch.autograd.grad(values.sum(), sides))


def test_views_are_read_in_place_and_chunks_do_not_matter():
    noisy, clean = pair(3, 7, 50)
    support_mask = dense_mask(3, 7, 50)
    views = (noisy[:, :-1], clean[:, 1:], support_mask[:, :-1])
    expected = losses.jeffreys_divergence(*(view.clone() for view in views))
    assert torch.equal(losses.jeffreys_divergence(*views), expected)
    for chunk in (1, 100_000, 10**9):
        value = masked_divergence(*views, "jeffreys", max_chunk_bytes=chunk)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("support", SUPPORTS)
def test_temporaries_stay_within_what_chunks_are_planned_for(monkeypatch, support):
    monkeypatch.setattr(chunks.rows, "keep_freed_memory", lambda size: None)  # nobody writes to that block
    noisy, clean = pair(4, 10_000)
    support_mask = dense_mask(4, 10_000)
    options = {"support_mask": support_mask, "support": support, "max_chunk_bytes": 10**9, "impl": "torch"}
    asked = problem(noisy, clean, ["skew_forward_kl"], **options)
    with LiveBytes() as counted:
        forward.implementation(asked)
    planned = noisy.numel() * 4 * chunks.masked_temporaries(chunks.settings_of(asked))
    assert planned / 4 < counted.peak < planned
    no_indices = torch.empty(4, 0, dtype=torch.int32)
    with LiveBytes() as counted:
        backward.implementation(
            BackwardProblem(asked, upstream=torch.ones(1, 4), kept_indices=no_indices, row_scalars=None)
        )
    assert counted.peak - 2 * noisy.nbytes < planned


def all_supports(noisy: Tensor, clean: Tensor, support_mask: Tensor, mask: Tensor) -> Tensor:
    return torch.stack(
        [
            function(noisy, clean, support_mask, mask=mask, support=support, temperature=1.3)
            for function, support in zip(
                (losses.jeffreys_divergence, losses.jensen_shannon_divergence, losses.kl_divergence),
                SUPPORTS,
                strict=True,
            )
        ]
    )


def masked_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    noisy, clean = pair(rows, 4, 6, noise=1.0, dtype=dtype)
    mask = torch.arange(rows * 4).view(rows, 4) % 3 != 0
    noisy[~mask] = float("nan")
    return noisy, clean, dense_mask(rows, 4, 6), mask


if not RUNS_TRITON:  # there is no kernel for a support_mask

    @registration.each_check([registration.Case("support_mask", all_supports, masked_case)])
    def test_registration(check, case):
        check(case)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 2}, ValueError, "support_mask and top_k both choose the support"),
        ({"support_mask": torch.ones(2, 5)}, TypeError, "support_mask must be boolean; got torch.float32"),
        ({"support_mask": [True]}, TypeError, "support_mask must be a boolean torch.Tensor or None; got list"),
        (
            {"support_mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"logits' shape \(2, 5\) or broadcast to it; got \(2, 4\)",
        ),
        ({"support_mask": torch.ones(1, 2, 5, dtype=torch.bool)}, ValueError, r"got \(1, 2, 5\)"),
        ({"support_mask": torch.ones(5, dtype=torch.bool, device="meta")}, ValueError, "support_mask and noisy_logits"),
        ({"support": "union"}, ValueError, "support must be one of truncate"),
        ({"beta": 0.0}, ValueError, "At 0 it would be the kind forward_kl, at 1 reverse_kl"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"mask": torch.ones(2, 5)}, ValueError, "mask must have the shape of noisy_logits"),
        ({"clean_logits": torch.zeros(2, 4)}, ValueError, "one shape"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run: a support_mask runs in PyTorch"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(arguments, error, message):
    defaults = {
        "noisy_logits": torch.zeros(2, 5),
        "clean_logits": torch.zeros(2, 5),
        "support_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    with pytest.raises(error, match=message):
        losses.jensen_shannon_divergence(**(defaults | arguments))


def test_forward_mode_is_refused():
    noisy, clean = pair(2, 5)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda x: losses.jeffreys_divergence(x, clean, torch.ones(5, dtype=torch.bool)), (noisy,), (clean,)
        )
