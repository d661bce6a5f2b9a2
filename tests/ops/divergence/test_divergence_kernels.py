"""The divergence kernels: hard labels, rows with infinite ratios, rows apart by more than 2³¹ elements."""

import pytest
import torch
from torch import Tensor

from sgfast.ops import divergences
from sgfast.ops.divergence.kinds import KINDS
from tests.implementations import DEVICE, RUNS_TRITON
from tests.ops.divergence.plain_sums import atoms, oracle
from tests.ops.divergence.problems import pair

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not RUNS_TRITON, reason="needs kernels")]


def forward_and_gradients(
    noisy: Tensor, clean: Tensor, mask: Tensor | None, temperature: Tensor, kinds: tuple[str, ...], labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (kinds, ...), and both gradients of their sum weighted by 1, 2, …"""
    from sgfast_kernels import divergence_backward, divergence_forward

    values, row_scalars = divergence_forward(noisy, clean, mask, temperature, kinds, 0.5, 0.1, labels)
    weights = torch.arange(1.0, values.numel() + 1, device=DEVICE).view_as(values)
    options = (kinds, 0.5, 0.1, True, True, labels)
    return values, *divergence_backward(noisy, clean, mask, temperature, weights, row_scalars, *options)


def label_oracle(noisy: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(noisy)[label] per row; 0 where ignored."""
    taken = noisy.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels < 0, 0.0, -taken)


@pytest.mark.parametrize("others", [(), ("jeffreys", "total_variation")], ids=["alone", "with others"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(5, 1), (5, 301), (1, 4099), (6, 4112)])
def test_label_cross_entropy(rows, width, dtype, others):
    """At temperature 1 whatever the others' temperature, on split rows too; nothing reaches the clean side."""
    noisy, clean = pair(rows, width, dtype=dtype)
    labels = (torch.arange(rows, device=DEVICE) * 1013) % width
    labels[1::3] = -100
    temperature = torch.linspace(0.5, 3, rows, device=DEVICE)
    kinds = (*others, "label_cross_entropy")
    values, noisy_gradient, clean_gradient = forward_and_gradients(noisy, clean, None, temperature, kinds, labels)
    wide = noisy.double().requires_grad_()
    expected = label_oracle(wide, labels)
    torch.testing.assert_close(values[-1].double(), expected.detach(), rtol=1e-5, atol=5e-7)
    weights = torch.arange(1.0, values.numel() + 1, device=DEVICE).view_as(values)
    if others:
        alone = forward_and_gradients(noisy, clean, None, temperature, others, None)
        torch.testing.assert_close(values[:-1], alone[0], rtol=0, atol=0)
        torch.testing.assert_close(clean_gradient, alone[2], rtol=0, atol=0)
        return
    (want,) = torch.autograd.grad((expected * weights[-1]).sum(), wide)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    error = (noisy_gradient.double() - want).norm(dim=-1)
    assert (error <= rounding * want.norm(dim=-1) + 1e-6).all()
    assert (clean_gradient == 0).all()


def test_gradients_of_labels_and_other_kinds_add_up():
    noisy, clean = pair(4, 300)
    labels = torch.tensor([3, -1, 299, 0], device=DEVICE)
    temperature = torch.full((4,), 2.0, device=DEVICE)
    kinds = ("label_cross_entropy", "jeffreys")
    both = forward_and_gradients(noisy, clean, None, temperature, kinds, labels)[1]
    wide = noisy.double().requires_grad_()
    p, q = (wide / 2).log_softmax(-1), (clean.double() / 2).log_softmax(-1)
    jeffreys = ((p.exp() - q.exp()) * (p - q)).sum(-1)
    weights = torch.arange(1.0, 9.0, device=DEVICE).view(2, 4)
    (want,) = torch.autograd.grad((weights[0] * label_oracle(wide, labels) + weights[1] * jeffreys).sum(), wide)
    torch.testing.assert_close(both.double(), want, rtol=1e-5, atol=1e-6)


def test_labels_of_masked_and_broken_rows():
    """Masked and ignored rows are 0 whatever they hold; a NaN row is NaN; −inf at the label is an infinite loss."""
    noisy, clean = pair(6, 40)
    labels = torch.tensor([1, 1, -5, 1, 1, 40], device=DEVICE)
    mask = torch.tensor([True, False, True, True, True, True], device=DEVICE)
    noisy[1], noisy[2, 0], noisy[3, 0], noisy[4, 1] = torch.nan, torch.nan, torch.nan, -torch.inf
    clean[0] = torch.nan
    arguments = (mask, torch.ones(6, device=DEVICE), ("label_cross_entropy",), labels)
    (values,), gradient, _ = forward_and_gradients(noisy, clean, *arguments)
    assert values[0].isfinite()
    assert values[1] == 0
    assert values[2] == 0
    assert values[[3, 5]].isnan().all()
    assert values[4] == torch.inf
    assert (gradient[1:3] == 0).all()
    assert gradient[3].isnan().all()
    expected = noisy[4].double().softmax(-1)
    expected[1] -= 1
    torch.testing.assert_close(gradient[4].double(), 5 * expected, rtol=1e-5, atol=1e-6)


def expected_values(noisy: Tensor, clean: Tensor) -> Tensor:
    return torch.stack(
        [torch.stack([oracle(kind, p, q, 0.5, 0.1) for p, q in atoms(noisy, clean, None, None)]) for kind in KINDS]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [4096, 12400])
def test_infinite_ratios_in_any_tile(dtype, width):
    """−inf, or what overflows to it, in the plain loop's tiles: on either side, on both, and beside NaN and +inf."""
    noisy, clean = pair(8, width, noise=1.0, dtype=dtype)
    lowest = torch.finfo(dtype).min
    noisy[0, 3] = clean[1, 4] = noisy[2, 5] = clean[2, 5] = -torch.inf
    noisy[3, :2000] = clean[3, :2000] = lowest
    noisy[4, 7] = lowest
    clean[5, 7] = torch.nan
    noisy[6, 0], noisy[6, 1] = torch.inf, -torch.inf
    sides = (noisy.requires_grad_(), clean.requires_grad_())
    values = torch.stack(list(divergences(*sides, KINDS, impl="triton").values()))
    expected = expected_values(*sides).detach()
    # 3e38 / T nats times a probability: more than float32 holds once it is in bits.
    expected[torch.tensor([KINDS.index(kind) for kind in ("forward_kl", "jeffreys", "cross_entropy")]), 4] = torch.inf
    good = [0, 1, 2, 3, 4, 7]
    torch.testing.assert_close(values[:, good].double(), expected[:, good], rtol=1e-5, atol=5e-7)
    assert values[:, 5:7].isnan().all()
    for gradient in torch.autograd.grad(values.sum(), sides):
        assert gradient[good].isfinite().all()
        assert (gradient[good] != 0).any(-1).all()
        assert gradient[5:7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equal_logits_give_zeros(dtype):
    """Exactly, in values and in gradients, also where all but two logits are equal (but for those two)."""
    _, clean = pair(3, 4500, dtype=dtype)
    noisy = clean.clone()
    clean.requires_grad_()
    noisy.requires_grad_()
    kinds = [kind for kind in KINDS if kind != "cross_entropy"]
    values = torch.stack(list(divergences(noisy, clean, kinds, impl="triton").values()))
    assert (values == 0).all()
    for gradient in torch.autograd.grad(values.sum(), (noisy, clean)):
        assert (gradient == 0).all()


def test_total_variation_counts_no_ties():
    """Where p = q the subgradient is 0, and such columns do not count in the others' gradients."""
    clean = torch.zeros(1, 300, device=DEVICE)
    clean[0, 0] = 1.0
    noisy = clean.roll(1, dims=1).requires_grad_()
    value = divergences(noisy, clean, "total_variation", impl="triton")["total_variation"]
    (gradient,) = torch.autograd.grad(value.sum(), noisy)
    p = noisy.detach().double().softmax(-1)
    sign = torch.zeros_like(p)
    sign[0, 0], sign[0, 1] = -1, 1
    torch.testing.assert_close(gradient.double(), p * (sign - (p * sign).sum()) / 2, rtol=1e-5, atol=1e-9)


def far_apart(rows: Tensor) -> Tensor:
    """Two rows of bfloat16, each copied to where more than 2³¹ elements lie between their beginnings."""
    width, stride = rows.shape[-1], 2**31 + 64
    # Memory is mapped when it is touched: on a CPU, a few pages of four gigabytes.
    storage = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    storage.set_(torch.UntypedStorage(2 * (stride + width), device=DEVICE))
    return storage.as_strided((2, width), (stride, 1)).copy_(rows)


def test_rows_more_than_2_31_elements_apart():
    noisy = far_apart(pair(2, 64, dtype=torch.bfloat16)[0])
    clean = pair(2, 64, dtype=torch.bfloat16)[1].requires_grad_()
    noisy.requires_grad_()
    labels = torch.tensor([3, 63], device=DEVICE)
    values = divergences(noisy, clean, KINDS, impl="triton")
    wide = [side.detach().double().requires_grad_() for side in (noisy, clean)]
    expected = expected_values(*wide)
    torch.testing.assert_close(torch.stack(list(values.values())).double(), expected, rtol=1e-5, atol=5e-7)
    got = torch.autograd.grad(sum(value.sum() for value in values.values()), (noisy, clean))
    for side, reference in zip(got, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert ((side.double() - reference).norm(dim=-1) <= 4e-3 * reference.norm(dim=-1)).all()
    ones = torch.ones(2, device=DEVICE)
    (value,), gradient, _ = forward_and_gradients(
        noisy.detach(), clean.detach(), None, ones, ("label_cross_entropy",), labels
    )
    torch.testing.assert_close(value.double(), label_oracle(wide[0].detach(), labels), rtol=1e-5, atol=5e-7)
    assert (gradient.gather(-1, labels[:, None]) < 0).all()


def test_strided_masks_labels_and_temperatures():
    """What is one number a row may lie apart in memory too."""
    noisy, clean = pair(6, 40)
    mask = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    labels, temperature = torch.arange(6, device=DEVICE), torch.linspace(0.5, 3, 6, device=DEVICE)
    kinds = ("jeffreys", "label_cross_entropy")
    expected = forward_and_gradients(noisy, clean, mask, temperature, kinds, labels)
    mask, temperature, labels = (one[:, None].repeat(1, 3)[:, 1] for one in (mask, temperature, labels))
    actual = forward_and_gradients(noisy, clean, mask, temperature, kinds, labels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kinds", [KINDS, ("forward_kl", "label_cross_entropy")], ids=["all", "labels"])
@pytest.mark.parametrize("width", [301, 4112])
def test_gradients_where_the_logits_were(width, kinds):
    """The same numbers as in new tensors, for one side and for both."""
    from sgfast_kernels import divergence_backward, divergence_forward

    noisy, clean = pair(3, width)
    labels = torch.tensor([7, -100, 300], device=DEVICE) if "label_cross_entropy" in kinds else None
    ones = torch.ones(3, device=DEVICE)
    values, row_scalars = divergence_forward(noisy, clean, None, ones, kinds, 0.5, 0.1, labels)
    for wanted in ((True, True), (True, False)):
        sides = noisy.clone(), clean.clone()
        rest = (torch.ones_like(values), row_scalars, kinds, 0.5, 0.1, *wanted, labels)
        want = divergence_backward(*sides, None, ones, *rest)
        found = divergence_backward(*sides, None, ones, *rest, targets=sides)
        torch.testing.assert_close(found, want, rtol=0, atol=0)
        assert found[0] is sides[0]
        assert torch.equal(sides[1], clean) == (not wanted[1])
