"""Top-k supports and the divergences over them: ties, tiles, tails, layouts (the rest: tests/ops/divergence)."""

import pytest
import torch
from torch import Tensor

import sgfast
from sgfast.ops import divergences, top_k_support
from sgfast.ops.divergence.kinds import KINDS
from sgfast.ops.topk import selection
from tests import registration
from tests.implementations import DEVICE, RUNS_TRITON, each_fast_implementation
from tests.ops.divergence.plain_sums import atoms, oracle
from tests.ops.divergence.problems import masked_case, pair
from tests.ops.divergence.test_divergence_kernels import far_apart

SUPPORTS = ("truncate", "renormalize", "tail")


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits that are equal in many places."""
    generator = torch.Generator().manual_seed(seed)
    noisy, clean = (torch.randint(-4, 4, shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return noisy, clean


def expected_support(noisy: Tensor, clean: Tensor, k: int) -> list[list[int]]:
    """By stable sorts: the lower index first among equal logits."""
    rows = []
    for sides in zip(noisy.double().flatten(0, -2), clean.double().flatten(0, -2), strict=True):
        chosen = {i for side in sides for i in side.sort(descending=True, stable=True).indices[:k].tolist()}
        rows.append(sorted(chosen))
    return rows


def assert_matches_oracle(noisy: Tensor, clean: Tensor, k: int, impl: str) -> None:
    """Values of all kinds and supports, and gradients of their weighted sum, against float64."""
    noisy, clean = noisy.detach().requires_grad_(), clean.detach().requires_grad_()
    wide = [side.detach().double().requires_grad_() for side in (noisy, clean)]
    rows = noisy.shape[:-1].numel()
    weights = torch.linspace(1, 2, rows, device=DEVICE)
    temperature = torch.linspace(0.7, 2, rows, device=DEVICE)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}[noisy.dtype]
    for support in SUPPORTS:
        options = {"temperature": temperature.view(noisy.shape[:-1]), "skew": 0.3, "beta": 0.4, "impl": impl}
        values = divergences(noisy, clean, KINDS, top_k=k, support=support, **options)
        actual = torch.stack(list(values.values())).flatten(1)
        sums = atoms(*(side.flatten(0, -2) / temperature.double()[:, None] for side in wide), k, support)
        expected = torch.stack([torch.stack([oracle(kind, p, q, 0.4, 0.3) for p, q in sums]) for kind in KINDS])
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-5, atol=5e-7, msg=lambda m, s=support: f"{s}: {m}"
        )
        got = torch.autograd.grad((actual * weights).sum(), (noisy, clean))
        want = torch.autograd.grad((expected * weights).sum(), wide)
        for side, reference in zip(got, want, strict=True):
            # The sum of the kinds may cancel.
            error = (side.double() - reference).norm(dim=-1)
            assert (error <= rounding * reference.norm(dim=-1) + 2e-6).all(), support


@each_fast_implementation
def test_ties_go_to_the_lower_index(impl):
    noisy = torch.tensor([[1.0, 3.0, 3.0, 3.0, -0.0, 0.0]], device=DEVICE)
    clean = torch.tensor([[0.0, -0.0, 0.0, -1.0, -1.0, -1.0]], device=DEVICE)
    indices, valid = top_k_support(noisy, clean, 2, impl=impl)
    assert indices[valid].tolist() == [0, 1, 2]
    assert not valid[0, 3]
    assert indices[0, 3] == 2


# One tile up to 8192 columns; groups beyond, in tiles of 8192 16-bit columns, 4096 of float32.
@each_fast_implementation
@pytest.mark.parametrize(
    ("dtype", "width", "k"),
    [
        *((torch.float32, width, k) for width, k in ((1, 1), (2, 1), (2, 2), (64, 9), (257, 128), (8192, 2))),
        *((torch.bfloat16, width, k) for width, k in ((8191, 128), (8193, 1), (8193, 128), (24583, 100))),
        *((torch.float16, width, k) for width, k in ((129, 128), (9000, 3))),
        *((torch.float32, width, k) for width, k in ((8193, 64), (12288, 2), (12295, 65))),
    ],
    ids=str,
)
def test_support_of_tie_heavy_logits(impl, dtype, width, k):
    noisy, clean = integers(2, 2, width, dtype=dtype)
    noisy[0, 0, 1:] = -torch.inf
    indices, valid = top_k_support(noisy, clean, k, impl=impl)
    assert indices.dtype == torch.int64
    assert indices.shape == (2, 2, min(2 * k, width))
    for row, mask, expected in zip(
        indices.flatten(0, 1), valid.flatten(0, 1), expected_support(noisy, clean, k), strict=True
    ):
        assert row[mask].tolist() == expected
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert (row[~mask] == expected[-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_selection_of_a_cpu_is_that_of_the_keys(dtype):
    # Few ties, crowds of them, zeros of both signs, infinities and NaN, in rows beside each other.
    noisy, _ = pair(12, 2000, noise=1.0, dtype=dtype)
    noisy[1:4] = (noisy[1:4] * 8).round()
    noisy[4], noisy[4, ::2] = 0.0, -0.0
    noisy[5, 40:] = -torch.inf
    noisy[6, :50] = torch.inf
    noisy[7, [3, 1900]], noisy[8] = torch.nan, torch.nan
    noisy[9] = torch.where(noisy[9] < 0, noisy[9], -0.0)
    for k in (1, 2, 7, 64, 1999, 2000):
        expected = selection.top_k_indices(noisy, k).sort(-1).values
        assert torch.equal(selection._top_k_set(noisy, k).sort(-1).values, expected), k


@pytest.mark.parametrize("equal", [1, 2, 17, 18, 19, 20, 300])
def test_ties_about_as_many_as_a_cpu_selects_at_once(equal):
    """A CPU takes k + k // 8 + 16 of a row at first; with more equals than that, others come before those taken."""
    k, width = 9, 400
    generator = torch.Generator().manual_seed(equal)
    logits = torch.zeros(6, width)
    for row in logits:
        order = torch.randperm(width, generator=generator)
        row[order[: k - 1]], row[order[k - 1 : k - 1 + equal]] = 2.0, 1.0
    expected = selection.top_k_indices(logits, k).sort(-1).values
    assert torch.equal(selection._top_k_set(logits, k).sort(-1).values, expected)


@each_fast_implementation
def test_support_of_no_rows(impl):
    indices, valid = top_k_support(torch.zeros(0, 9, device=DEVICE), torch.zeros(0, 9, device=DEVICE), 3, impl=impl)
    assert indices.shape == valid.shape == (0, 6)


@each_fast_implementation
@pytest.mark.parametrize(
    ("dtype", "width", "k", "rows"),
    [
        *((torch.float32, width, k, 5) for width, k in ((1, 1), (2, 1), (2, 2), (775, 2), (120, 120))),
        (torch.float32, 8193, 3, 1),
        (torch.float32, 12295, 128, 2),
        (torch.bfloat16, 8192, 1, 2),
        (torch.bfloat16, 24583, 64, 2),
        (torch.float16, 8200, 17, 2),
    ],
    ids=str,
)
def test_divergences_around_the_tile(impl, dtype, width, k, rows):
    assert_matches_oracle(*pair(rows, width, noise=1.0, dtype=dtype), k, impl)


@each_fast_implementation
@pytest.mark.parametrize("width", [300, 9001])
def test_divergences_where_logits_are_equal(impl, width):
    assert_matches_oracle(*integers(2, width), 6, impl)


@each_fast_implementation
@pytest.mark.parametrize("width", [300, 9001])
@pytest.mark.parametrize("height", [20.0, 60.0, 300.0])
def test_tail_keeps_its_digits(width, height, impl):
    """Two peaks, one for each side's top-1: what is left is nothing beside either, and counts all the same."""
    noisy, clean = pair(2, width, noise=1.0)
    noisy[:, 5] += 1.1 * height
    clean[:, 5] += height
    noisy[:, width - 2] += height
    clean[:, width - 2] += 1.1 * height
    assert_matches_oracle(noisy, clean, 1, impl)


@each_fast_implementation
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("width", [40, 9001])
def test_a_bad_logit_outside_the_support_is_not_hidden(impl, value, width):
    noisy, clean = pair(3, width)
    noisy[1, width - 1] = value
    for support in SUPPORTS:
        values = divergences(noisy, clean, KINDS, top_k=2, support=support, impl=impl)
        for kind in KINDS:
            assert values[kind].isnan().tolist() == [False, True, False], (support, kind)


@each_fast_implementation
@pytest.mark.parametrize("support", SUPPORTS)
def test_rows_with_fewer_finite_logits_than_k(impl, support):
    noisy, clean = pair(2, 50)
    noisy[0, 3:] = clean[0, 3:] = -torch.inf
    noisy[1, 10:] = -torch.inf
    options = {"top_k": 12, "support": support, "impl": impl}
    kinds = ["jensen_shannon", "total_variation", "squared_hellinger", "reverse_kl"]
    leaves = [side.requires_grad_() for side in (noisy, clean)]
    values = divergences(*leaves, kinds, **options)
    for kind in kinds:
        expected = torch.stack([oracle(kind, p, q, 0.5, 0.1) for p, q in atoms(noisy, clean, 12, support)]).float()
        torch.testing.assert_close(values[kind], expected, rtol=1e-5, atol=5e-7)
    gradients = torch.autograd.grad(sum(value.sum() for value in values.values()), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


@each_fast_implementation
@pytest.mark.parametrize("view", ["slice", "unaligned", "transposed", "mixed dtypes"])
@pytest.mark.parametrize("width", [48, 8300])
def test_layouts_of_rows(impl, view, width):
    noisy, clean = pair(2, 3, width)
    views = {
        "slice": (noisy[:, :-1], clean[:, 1:]),
        "unaligned": (noisy[..., 3:], clean[..., 3:]),
        "transposed": (noisy.transpose(0, 1), clean.transpose(0, 1).contiguous()),
        "mixed dtypes": (noisy.bfloat16(), clean),
    }[view]
    kinds = ("jeffreys", "cross_entropy")
    sides = [side.detach().requires_grad_() for side in views]
    values = torch.stack(list(divergences(*sides, kinds, top_k=4, support="tail", impl=impl).values()))
    plain = [side.detach().double().contiguous().requires_grad_() for side in views]
    expected = torch.stack(list(divergences(*plain, kinds, top_k=4, support="tail", impl="torch").values()))
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    for side, other in zip(
        torch.autograd.grad(values.sum(), sides), torch.autograd.grad(expected.sum(), plain), strict=True
    ):
        assert side.dtype == sides[0].dtype or side.dtype == sides[1].dtype
        rounding = 4e-3 if side.dtype == torch.bfloat16 else 1e-5
        assert (side.double() - other).norm() <= rounding * other.norm()


@each_fast_implementation
@pytest.mark.parametrize("support", SUPPORTS)
def test_one_gradient_is_the_one_of_both(impl, support):
    noisy, clean = pair(3, 200, noise=0.5)
    options = {"top_k": 5, "support": support, "impl": impl}

    def gradients(*needs: bool) -> list[Tensor | None]:
        sides = [side.detach().requires_grad_(needed) for side, needed in zip((noisy, clean), needs, strict=True)]
        sum(value.sum() for value in divergences(*sides, KINDS, **options).values()).backward()
        return [side.grad for side in sides]

    both = gradients(True, True)
    torch.testing.assert_close(gradients(True, False)[0], both[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients(False, True)[1], both[1], rtol=0, atol=0)
    if support == "renormalize":
        indices, _ = top_k_support(noisy, clean, 5)
        outside = torch.ones_like(noisy, dtype=torch.bool).scatter(-1, indices, False)
        assert all((gradient[outside] == 0).all() for gradient in both)


@each_fast_implementation
@pytest.mark.parametrize("width", [64, 8300])
def test_rows_more_than_2_31_elements_apart(impl, width):
    """On either side, so that every kernel that reads a side meets it."""
    noisy, clean = pair(2, width, noise=1.0, dtype=torch.bfloat16)
    for sides in ((far_apart(noisy), clean), (noisy, far_apart(clean))):
        indices, valid = top_k_support(*sides, 5, impl=impl)
        rows = [row[mask].tolist() for row, mask in zip(indices, valid, strict=True)]
        assert rows == expected_support(noisy, clean, 5)
        assert_matches_oracle(*sides, 5, impl)


def selected_logits(noisy: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' logits on their support, squared: what is differentiable about it, and not linear."""
    indices, valid = top_k_support(noisy, clean, 3)
    gathered = torch.stack([torch.where(valid, side.gather(-1, indices), 0.0) for side in (noisy, clean)])
    return indices, gathered.square()


def all_supports(noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    options = {"mask": mask, "temperature": 1.3, "top_k": 3}
    values = [
        divergences(noisy, clean, ["jensen_shannon", "reverse_kl"], support=support, **options) for support in SUPPORTS
    ]
    return torch.stack([value for by_kind in values for value in by_kind.values()])


def sliced_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows that lie apart, also the mask's."""
    return tuple(one[:, 0] for one in masked_case(rows, dtype))


@registration.each_check(
    [
        registration.Case("support", selected_logits, lambda rows, dtype: pair(rows, 6, noise=1.0, dtype=dtype)),
        registration.Case("divergences", all_supports, sliced_case),
    ]
)
def test_registration(check, case):
    check(case)


@pytest.mark.triton
@pytest.mark.skipif(not RUNS_TRITON, reason="needs kernels")
def test_what_the_kernels_refuse():
    small, wide = pair(1, 200), [torch.zeros(1, 1, device=DEVICE).expand(1, 2**19 + 1)] * 2
    for reason, sides, k in (
        (r"top k = 129 \(the kernels select at most 128", small, 129),
        ("a vocabulary of", wide, 2),
    ):
        for operation, arguments in ((divergences, ("jeffreys",)), (top_k_support, (k,))):
            options = {"top_k": k} if operation is divergences else {}
            with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: {reason}"):
                operation(*sides, *arguments, impl="triton", **options)
            assert sgfast.explain(operation, *sides, *arguments, **options).implementation == "torch"
