"""Rows that divergences may meet: masked, infinite, NaN, strided, of any width, none at all."""

import pytest
import torch

from sgfast.ops import divergences
from sgfast.ops.divergence.kinds import KINDS
from tests.implementations import DEVICE, RUNS_TRITON, each_fast_implementation, each_implementation
from tests.ops.divergence.plain_sums import atoms, oracle
from tests.ops.divergence.problems import SUPPORTS, pair


@each_implementation
@pytest.mark.parametrize("support", SUPPORTS)
def test_masked_rows_are_never_read(impl, support):
    noisy, clean = pair(6, 5, 33)
    mask = (torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.4).to(DEVICE)
    k = None if support is None else 4
    options = {"top_k": k, "support": support or "truncate", "impl": impl}
    # The selected rows alone, and gradients wanted as below: the same compiled code, which sums in the same order.
    selected = (side[mask].requires_grad_() for side in (noisy, clean))
    expected = divergences(*selected, KINDS, **options)
    noisy[~mask], clean[~mask] = torch.nan, torch.inf
    noisy.requires_grad_()
    clean.requires_grad_()
    values = divergences(noisy, clean, KINDS, mask=mask, **options)
    for kind in KINDS:
        torch.testing.assert_close(values[kind][mask], expected[kind], rtol=0, atol=0)
        assert (values[kind][~mask] == 0).all()
    for gradient in torch.autograd.grad(sum(value.sum() for value in values.values()), (noisy, clean)):
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].isfinite().all()
        assert (gradient[mask] != 0).any(-1).all()


@pytest.mark.parametrize("impl", ["torch", "compile"])
def test_a_shift_of_all_logits_is_no_difference(impl):
    """Exactly, at any temperature: p and q are equal, whatever their logits' rounding to a common scale would say."""
    clean = (pair(4, 1000)[1] * 64).round() / 64  # a sum with 100 is exact
    values = divergences(clean + 100, clean, KINDS, temperature=0.7, impl=impl)
    for kind in set(KINDS) - {"cross_entropy"}:
        assert (values[kind] == 0).all()


@each_fast_implementation
def test_minus_infinity_on_either_side(impl):
    """Masked vocabulary entries: KL is inf where q > 0 = p; every other value and all gradients stay finite."""
    noisy, clean = pair(4, 20)
    noisy[0, 3] = clean[1, 4] = noisy[2, 5] = clean[2, 5] = -torch.inf
    noisy.requires_grad_()
    clean.requires_grad_()
    for support in SUPPORTS:
        values = divergences(noisy, clean, KINDS, top_k=support and 20, support=support or "truncate", impl=impl)
        for kind in KINDS:
            expected = torch.stack([oracle(kind, p, q, 0.5, 0.1) for p, q in atoms(noisy, clean, None, None)]).float()
            torch.testing.assert_close(values[kind], expected, rtol=1e-5, atol=1e-6)
        assert values["forward_kl"][0] == torch.inf
        assert values["reverse_kl"][1] == torch.inf
        gradients = torch.autograd.grad(sum(value.sum() for value in values.values()), (noisy, clean))
        assert all(gradient.isfinite().all() for gradient in gradients)


@each_fast_implementation
def test_extreme_logits_stay_finite(impl):
    noisy = torch.tensor([[0.0, -300.0, 80.0]], device=DEVICE)
    clean = torch.tensor([[500.0, -300.0, -3e4]], device=DEVICE)
    values = divergences(noisy.requires_grad_(), clean.requires_grad_(), KINDS, impl=impl)
    assert values["forward_kl"].item() == pytest.approx(80.0, rel=1e-6)
    assert values["reverse_kl"].item() == pytest.approx(30500.0, rel=1e-6)
    assert values["total_variation"].item() == 1.0
    gradients = torch.autograd.grad(sum(value.sum() for value in values.values()), (noisy, clean))
    assert all(gradient.isfinite().all() for gradient in gradients)


@each_fast_implementation
@pytest.mark.parametrize("side", [0, 1])
def test_nan_logits_are_not_hidden(impl, side):
    sides = pair(3, 10)
    sides[side][1, 2] = torch.nan
    for kind, value in divergences(*sides, KINDS, impl=impl).items():
        assert value.isnan().tolist() == [False, True, False], kind


@pytest.mark.parametrize("max_chunk_bytes", [1, 40_000, 10**9])
@pytest.mark.parametrize("support", SUPPORTS)
def test_chunking_never_changes_the_result(max_chunk_bytes, support):
    noisy, clean = pair(7, 9, 65)
    options = {"top_k": support and 6, "support": support or "truncate"}
    default = divergences(noisy, clean, KINDS, **options)
    chunked = divergences(noisy, clean, KINDS, max_chunk_bytes=max_chunk_bytes, **options)
    for kind in KINDS:
        torch.testing.assert_close(chunked[kind], default[kind], rtol=1e-6, atol=1e-7)


def test_strided_views_are_read_in_place_and_inputs_are_not_written():
    noisy, clean = pair(3, 8, 31)
    before = noisy.clone(), clean.clone()
    views = noisy[:, :-1].requires_grad_(), clean[:, 1:]
    values = divergences(*views, KINDS, top_k=4, support="tail")
    contiguous = divergences(views[0].contiguous(), views[1].contiguous(), KINDS, top_k=4, support="tail")
    for kind in KINDS:
        torch.testing.assert_close(values[kind], contiguous[kind], rtol=1e-6, atol=1e-7)
    sum(value.sum() for value in values.values()).backward()
    torch.testing.assert_close((noisy, clean), before, rtol=0, atol=0)


@each_fast_implementation
@pytest.mark.parametrize("top_k", [None, 2])
def test_no_rows(impl, top_k):
    noisy, clean = torch.zeros(0, 5, device=DEVICE, requires_grad=True), torch.zeros(0, 5, device=DEVICE)
    value = divergences(noisy, clean, "jeffreys", top_k=top_k, impl=impl)["jeffreys"]
    assert value.shape == (0,)
    value.sum().backward()
    assert noisy.grad.shape == (0, 5)


@pytest.mark.triton
@pytest.mark.skipif(not RUNS_TRITON, reason="nothing but kernels has tiles")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *((torch.float32, width) for width in (1, 2, 255, 256, 257, 775, 2047, 2048, 2049, 6151)),
        *((torch.bfloat16, width) for width in (1, 2, 256, 4095, 4096, 4097, 12295)),
        (torch.float16, 776),
    ],
    ids=str,
)
def test_widths_around_the_tile(dtype, width, rows):
    noisy, clean = pair(rows, width, noise=1.0, dtype=dtype)
    noisy, clean = noisy.requires_grad_(), clean.requires_grad_()
    weights = torch.linspace(1, 2, rows, device=DEVICE)
    temperature = torch.linspace(0.7, 2, rows, device=DEVICE)
    values = divergences(noisy, clean, KINDS, temperature=temperature, skew=0.3, beta=0.4, impl="triton")
    wide = [side.detach().double().requires_grad_() for side in (noisy, clean)]
    sums = atoms(*(side / temperature.double()[:, None] for side in wide), None, None)
    expected = torch.stack([torch.stack([oracle(kind, p, q, 0.4, 0.3) for p, q in sums]) for kind in KINDS])
    actual = torch.stack(list(values.values()))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=5e-7)
    got = torch.autograd.grad((actual * weights).sum(), (noisy, clean))
    want = torch.autograd.grad((expected * weights).sum(), wide)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    for side, reference in zip(got, want, strict=True):
        # The sum of the kinds may cancel; at width 1 both are zero.
        assert ((side.double() - reference).norm(dim=-1) <= rounding * reference.norm(dim=-1) + 2e-6).all()


@each_fast_implementation
@pytest.mark.parametrize("view", ["slice", "unaligned", "transposed", "mixed dtypes"])
def test_layouts_of_rows(impl, view):
    noisy, clean = pair(3, 6, 48)
    views = {
        "slice": (noisy[:, :-1], clean[:, 1:]),
        "unaligned": (noisy[..., 3:], clean[..., 3:]),
        "transposed": (noisy.transpose(0, 1), clean.transpose(0, 1).contiguous()),
        "mixed dtypes": (noisy.bfloat16(), clean),
    }[view]
    sides = [side.detach().requires_grad_() for side in views]
    values = torch.stack(list(divergences(*sides, KINDS, impl=impl).values()))
    plain = [side.detach().float().contiguous().requires_grad_() for side in views]
    expected = torch.stack(list(divergences(*plain, KINDS, impl="torch").values()))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    for side, other in zip(
        torch.autograd.grad(values.sum(), sides), torch.autograd.grad(expected.sum(), plain), strict=True
    ):
        torch.testing.assert_close(
            side, other.to(side.dtype), rtol=1e-2 if side.dtype != other.dtype else 1e-4, atol=1e-5
        )


@each_implementation
@pytest.mark.parametrize("support", [None, "truncate", "tail"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_an_infinite_divergence_has_no_gradient_where_it_would_be_infinite(kind, support, impl):
    """Whatever the support: each side rules out what the other is sure of."""
    ruled_out = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]], device=DEVICE)
    sure = torch.tensor([[-torch.inf, -torch.inf, 3.0, 1.0]], device=DEVICE)
    noisy, clean = ruled_out.requires_grad_(), sure.requires_grad_()
    value = divergences(noisy, clean, kind, top_k=support and 1, support=support or "tail", impl=impl)[kind]
    assert value.item() == torch.inf
    gradients = torch.autograd.grad(value.sum(), (noisy, clean))
    assert (gradients[kind == "forward_kl"] == 0).all()
