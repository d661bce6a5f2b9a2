"""Values and gradients of divergences: a float64 oracle, SciPy, closed forms and what their definitions imply."""

import math

import pytest
import scipy.spatial.distance
import scipy.special
import torch

from sgfast.ops import divergences, top_k_support
from sgfast.ops.divergence.definitions import definition_values
from sgfast.ops.divergence.kinds import KINDS
from tests.implementations import DEVICE, RUNS_TRITON, each_fast_implementation, each_implementation
from tests.ops.divergence.plain_sums import atoms, oracle
from tests.ops.divergence.problems import SUPPORTS, pair, problem

SYMMETRIC = ("jeffreys", "jensen_shannon", "total_variation", "squared_hellinger")


@pytest.mark.parametrize(
    ("impl", "dtype", "noise"),
    [
        *(
            pytest.param(impl, dtype, noise, marks=[pytest.mark.triton] if impl == "triton" else [])
            for impl in (["triton"] if RUNS_TRITON else ["torch"])
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for noise in (3.0, 0.05)
        ),
        ("compile", torch.float32, 3.0),  # compiling costs seconds a case
        ("compile", torch.bfloat16, 0.05),
    ],
)
@pytest.mark.parametrize("support", SUPPORTS)
def test_values_and_gradients_match_the_float64_oracle(impl, dtype, support, noise):
    """Outputs to rtol 1e-5 + atol 5e-7 whatever the dtype; gradients within one rounding of the input's dtype."""
    k = None if support is None else 5
    noisy, clean = pair(4, 3, 257, noise=noise, dtype=dtype)
    noisy.requires_grad_()
    clean.requires_grad_()
    values = divergences(noisy, clean, KINDS, top_k=k, support=support or "truncate", beta=0.3, skew=0.2, impl=impl)
    wide = [side.detach().double().requires_grad_() for side in (noisy, clean)]
    rows = atoms(*wide, k, support)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    for kind in KINDS:
        expected = torch.stack([oracle(kind, p, q, 0.3, 0.2) for p, q in rows]).view(4, 3)
        assert values[kind].dtype == torch.float32
        torch.testing.assert_close(values[kind].double(), expected, rtol=1e-5, atol=5e-7, msg=kind)
        got = torch.autograd.grad(values[kind].sum(), (noisy, clean), retain_graph=True)
        want = torch.autograd.grad(expected.sum(), wide, retain_graph=True)
        for side, reference in zip(got, want, strict=True):
            assert side.dtype == dtype
            error = (side.double() - reference).norm(dim=-1)
            assert (error <= rounding * reference.norm(dim=-1) + 1e-9).all(), (
                kind,
                (error / reference.norm(dim=-1)).max(),
            )


def test_scipy_agrees():
    noisy, clean = pair(1, 100, dtype=torch.float64)
    p, q = noisy.softmax(-1).numpy()[0], clean.softmax(-1).numpy()[0]
    values = divergences(noisy, clean, ["forward_kl", "reverse_kl", "jensen_shannon"])
    assert values["forward_kl"].item() == pytest.approx(scipy.special.rel_entr(q, p).sum(), rel=1e-12)
    assert values["reverse_kl"].item() == pytest.approx(scipy.special.rel_entr(p, q).sum(), rel=1e-12)
    assert values["jensen_shannon"].item() == pytest.approx(scipy.spatial.distance.jensenshannon(p, q) ** 2, rel=1e-12)


def test_closed_form_of_two_point_distributions():
    p, q = 0.5, 0.8
    logits = [torch.tensor([math.log(u), math.log(1 - u)], dtype=torch.float64) for u in (p, q)]
    values = divergences(*logits, ["forward_kl", "total_variation", "squared_hellinger", "cross_entropy"])
    assert values["forward_kl"].item() == pytest.approx(q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)))
    assert values["total_variation"].item() == pytest.approx(q - p)
    assert values["squared_hellinger"].item() == pytest.approx(1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q)))
    assert values["cross_entropy"].item() == pytest.approx(math.log(2))


@each_implementation
def test_properties(impl):
    noisy, clean = pair(64, 1000, noise=0.5)
    values = divergences(noisy, clean, KINDS, impl=impl)
    swapped = divergences(clean, noisy, KINDS, impl=impl)
    for kind in SYMMETRIC:
        torch.testing.assert_close(values[kind], swapped[kind], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(values["forward_kl"], swapped["reverse_kl"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(values["jeffreys"], values["forward_kl"] + values["reverse_kl"], rtol=1e-5, atol=1e-7)
    assert (values["jensen_shannon"] <= math.log(2)).all()
    assert (values["squared_hellinger"] <= values["total_variation"]).all()
    assert (values["total_variation"] <= (2 * values["squared_hellinger"]).sqrt()).all()
    shifted = divergences(noisy + 50, clean - 20, KINDS, impl=impl)
    for kind in KINDS:
        assert (values[kind] >= 0).all()
        torch.testing.assert_close(values[kind], shifted[kind], rtol=1e-4, atol=1e-6)


@each_fast_implementation
@pytest.mark.parametrize("support", SUPPORTS)
def test_exactly_zero_at_equal_logits(impl, support):
    _, clean = pair(16, 300)
    k = None if support is None else 7
    clean.requires_grad_()
    kinds = [kind for kind in KINDS if kind != "cross_entropy"]
    values = divergences(clean, clean.detach(), kinds, top_k=k, support=support or "truncate", impl=impl)
    for kind in kinds:
        assert (values[kind] == 0).all(), kind
    (gradient,) = torch.autograd.grad(sum(values[kind].sum() for kind in kinds), clean)
    assert gradient.abs().max() < 1e-6


@each_fast_implementation
def test_gradient_rows_sum_to_zero(impl):
    noisy, clean = (side.requires_grad_() for side in pair(8, 500))
    for support in SUPPORTS:
        values = divergences(noisy, clean, KINDS, top_k=support and 9, support=support or "tail", impl=impl)
        for gradient in torch.autograd.grad(sum(value.sum() for value in values.values()), (noisy, clean)):
            assert gradient.sum(-1).abs().max() < 1e-5


@each_fast_implementation
@pytest.mark.parametrize("support", ["truncate", "renormalize", "tail"])
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(impl, support):
    noisy, clean = pair(5, 40)
    full = divergences(noisy, clean, KINDS, impl=impl)
    restricted = divergences(noisy, clean, KINDS, top_k=40, support=support, impl=impl)
    for kind in KINDS:
        torch.testing.assert_close(restricted[kind], full[kind], rtol=2e-6, atol=1e-7)


def test_truncated_sums_grow_with_k_and_the_tail_bounds_from_below():
    noisy, clean = pair(32, 400, noise=1.0)
    full = divergences(noisy, clean, KINDS)
    previous = {kind: torch.zeros(32) for kind in SYMMETRIC}
    for k in (1, 3, 10, 100, 400):
        truncated = divergences(noisy, clean, SYMMETRIC, top_k=k, support="truncate")
        tail = divergences(noisy, clean, [k for k in KINDS if k != "cross_entropy"], top_k=k, support="tail")
        for kind in SYMMETRIC:
            assert (truncated[kind] >= previous[kind] - 1e-6).all()
            assert (truncated[kind] <= full[kind] + 1e-6).all()
        for kind, value in tail.items():
            assert (value <= full[kind] + 1e-6).all(), kind
        previous = truncated


@each_fast_implementation
def test_truncated_kl_may_be_negative_and_is_not_clamped(impl):
    noisy, clean = torch.tensor([[2.0, 0.0, 0.0]], device=DEVICE), torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE)
    p, q = noisy.softmax(-1)[0, 0], clean.softmax(-1)[0, 0]
    value = divergences(noisy, clean, "forward_kl", top_k=1, support="truncate", impl=impl)["forward_kl"]
    assert value.item() < 0
    assert value.item() == pytest.approx((q * (q / p).log()).item(), rel=1e-6)


@each_fast_implementation
def test_temperature_per_row_divides_both_sides(impl):
    noisy, clean = pair(6, 50)
    temperature = torch.linspace(0.5, 4, 6, device=DEVICE)
    values = divergences(noisy, clean, KINDS, temperature=temperature, impl=impl)
    scaled = divergences(noisy / temperature[:, None], clean / temperature[:, None], KINDS, impl=impl)
    for kind in KINDS:
        torch.testing.assert_close(values[kind], scaled[kind], rtol=2e-6, atol=2e-7)
    leaf, scaled_leaf = (noisy.clone().requires_grad_() for _ in range(2))
    halved = divergences(scaled_leaf / 2, clean / 2, "jeffreys", impl=impl)["jeffreys"]
    value = divergences(leaf, clean, "jeffreys", temperature=2.0, impl=impl)["jeffreys"]
    torch.testing.assert_close(value, halved)
    value.sum().backward()
    halved.sum().backward()
    torch.testing.assert_close(leaf.grad, scaled_leaf.grad)


@each_fast_implementation
@pytest.mark.parametrize("skew", [0.0, 0.1])
def test_kinds_do_not_depend_on_what_else_is_asked(impl, skew):
    """Every kind alone, and in another order: the values and gradients that it has among all."""
    noisy, clean = (side.requires_grad_() for side in pair(3, 300, noise=0.5))
    together = divergences(noisy, clean, KINDS, skew=skew, impl=impl)
    reordered = divergences(noisy, clean, KINDS[::-1], skew=skew, impl=impl)
    for kind in KINDS:
        alone = divergences(noisy, clean, kind, impl=impl, **({"skew": skew} if "skew" in kind else {}))[kind]
        expected = torch.autograd.grad(together[kind].sum(), (noisy, clean), retain_graph=True)
        for other in (alone, reordered[kind]):
            torch.testing.assert_close(other, together[kind], rtol=1e-6, atol=1e-8)
            actual = torch.autograd.grad(other.sum(), (noisy, clean), retain_graph=True)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_top_k_support_on_tie_heavy_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    noisy, clean = (torch.randint(-4, 4, (50, 64), generator=generator).to(dtype) for _ in range(2))
    indices, valid = top_k_support(noisy, clean, 9, max_chunk_bytes=5000)
    for row in range(50):
        expected = set()
        for side in (noisy[row].tolist(), clean[row].tolist()):
            expected.update(sorted(range(64), key=lambda i: (-side[i], i))[:9])
        assert indices[row][valid[row]].tolist() == sorted(expected)


def test_reference_is_the_definition():
    """The reference behind double backward equals the operation it stands for."""
    noisy, clean = pair(3, 12, dtype=torch.float64)
    indices, valid = top_k_support(noisy, clean, 3)
    for support in SUPPORTS:
        options = {"top_k": 3 if support else 0, "support": support or "tail", "beta": 0.4, "skew": 0.2}
        asked = problem(noisy, clean, KINDS, temperature=torch.full((3,), 1.5).double(), **options)
        values = definition_values(asked, indices.masked_fill(~valid, -1))
        expected = divergences(
            noisy, clean, KINDS, top_k=support and 3, support=support or "tail", temperature=1.5, beta=0.4, skew=0.2
        )
        torch.testing.assert_close(values, torch.stack(list(expected.values())), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "compile"])
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_digits_are_kept_near_equality(impl, noise):
    """Values of second order in the difference, gradients of first order: p − q would have lost them."""
    noisy, clean = pair(4, 2000, noise=noise)
    noisy = noisy.requires_grad_()
    wide = noisy.detach().double().requires_grad_()
    kinds = ["jeffreys", "squared_hellinger"]
    values = divergences(noisy, clean, kinds, impl=impl)
    for kind in kinds:
        p, q = wide.softmax(-1), clean.double().softmax(-1)
        # In float64 the oracle itself loses no more than 1e-8 of these.
        expected = torch.stack([oracle(kind, *pair_of_rows, 0.5, 0.1) for pair_of_rows in zip(p, q, strict=True)])
        torch.testing.assert_close(values[kind].double(), expected, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(values[kind].sum(), noisy, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), wide)
        error = (gradient.double() - expected_gradient).norm(dim=-1)
        assert (error <= 1e-5 * expected_gradient.norm(dim=-1)).all(), kind


def test_the_temperature_is_as_wide_as_the_wider_side():
    noisy, clean = pair(3, 50)
    mixed = divergences(noisy, clean.double(), "forward_kl", temperature=0.3)["forward_kl"]
    wide = divergences(noisy.double(), clean.double(), "forward_kl", temperature=0.3)["forward_kl"]
    torch.testing.assert_close(mixed, wide, rtol=1e-12, atol=0)
