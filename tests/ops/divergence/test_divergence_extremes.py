"""Divergences where float32 is easily wrong: shifts, tails of no mass, peaked beside flat, tiny mixture weights.

`divergence_attack` draws the cases; its fixed seeds here are a sample of the long runs by hand.
"""

import math

import pytest
import torch
from torch import Tensor

from sgfast.loss import DivergenceLoss
from sgfast.loss import divergences as losses
from sgfast.ops import divergences
from sgfast.ops.divergence import masked_divergence
from sgfast.ops.divergence.kinds import KINDS
from tests.implementations import DEVICE, RUNS_TRITON, each_fast_implementation, each_implementation
from tests.ops.divergence import attack
from tests.ops.divergence.oracle import exact, top_k_mask

SUPPORTS = ("tail", "truncate", "renormalize")


def assert_within_promise(case: attack.Case, impl: str, kinds: tuple[str, ...] = KINDS) -> None:
    found = attack.errors(case, impl, kinds)
    assert max(found.values()) <= 1, (case.description, {name: ratio for name, ratio in found.items() if ratio > 1})


@pytest.mark.skipif(RUNS_TRITON, reason="PyTorch's implementation")
@pytest.mark.parametrize("first", range(0, 400, 50))
def test_attack(first):
    for seed in range(first, first + 50):
        assert_within_promise(attack.make(seed, widths=(1, 2, 3, 5, 17, 64, 257, 1000, 5000)), "torch")


@pytest.mark.skipif(RUNS_TRITON, reason="PyTorch's implementation")
def test_attack_on_the_widest_vocabularies():
    for seed in range(12):
        assert_within_promise(attack.make(seed, widths=(32_000, 151_936)), "torch")


@pytest.mark.skipif(RUNS_TRITON, reason="PyTorch's implementation")
def test_attack_compiled():
    """One width, dtype and set of weights: each other one is compiled anew, for seconds."""
    kinds = ("forward_kl", "jensen_shannon", "total_variation", "squared_hellinger")
    for seed in range(30):
        case = attack.make(seed, widths=(257,))
        sides = (case.noisy.float(), case.clean.float())
        case = case._replace(noisy=sides[0][:1], clean=sides[1][:1], temperatures=(case.temperatures[0][:1],) * 2)
        whole = {"support": "full", "support_mask": None, "top_k": None}
        assert_within_promise(case._replace(**whole, beta=0.5, skew=0.1), "compile", kinds)


@pytest.mark.triton
@pytest.mark.skipif(not RUNS_TRITON, reason="needs kernels")
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_attack_on_kernels(first):
    for seed in range(first, first + 10):
        case = attack.make(seed, widths=(1, 2, 5, 17, 64, 257), impl="triton")
        moved = {"noisy": case.noisy.to(DEVICE), "clean": case.clean.to(DEVICE)}
        temperatures = tuple(temperature.to(DEVICE) for temperature in case.temperatures)
        assert_within_promise(case._replace(**moved, temperatures=(temperatures[0],) * 2), "triton")


@each_implementation
def test_a_constant_on_one_side_is_no_difference(impl):
    """[1000, 1001, 1002.5] beside [0, 1, 2.25]: total variation 0.0477169, where the shift's rounding gives 0.04772."""
    noisy = torch.tensor([[1000.0, 1001.0, 1002.5]], device=DEVICE)
    clean = torch.tensor([[0.0, 1.0, 2.25]], device=DEVICE)
    value = divergences(noisy, clean, "total_variation", impl=impl)["total_variation"]
    assert value.item() == pytest.approx(0.0477169, abs=5e-7)
    everything = torch.ones(1, 3, dtype=torch.bool, device=DEVICE)
    if impl != "triton":
        masked = masked_divergence(noisy, clean, everything, "total_variation", impl=impl)
        assert masked.item() == pytest.approx(0.0477169, abs=5e-7)


@each_implementation
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("shift", [-1e4, -37.5, 3.0, 1e4])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_one_sided_shifts(impl, side, shift, temperature):
    """Against float64 on the shifted logits themselves, forward and both gradients, for every kind and support."""
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(2, 2, 57, generator=generator) * 2
    both[side] += shift
    noisy, clean = (one.to(DEVICE).requires_grad_() for one in both)
    temperatures = (torch.full((2,), temperature, dtype=torch.float32).double().to(DEVICE),) * 2
    # What all kinds share is where a shift could enter; compiling all nine takes a minute.
    kinds = ("forward_kl", "total_variation") if impl == "compile" else KINDS
    beta, skew = (None, None) if impl == "compile" else (0.3, 0.2)
    for support in ("full", "tail") if impl == "compile" else ("full", *SUPPORTS):
        top_k = None if support == "full" else 4
        wide = [one.detach().double() for one in (noisy, clean)]
        mask = None if top_k is None else top_k_mask(wide[0], top_k) | top_k_mask(wide[1], top_k)
        options = {"top_k": top_k, "support": "tail" if top_k is None else support, "temperature": temperature}
        values = divergences(noisy, clean, kinds, beta=beta, skew=skew, impl=impl, **options)
        for kind in kinds:
            truth = exact(kind, *wide, mask, support, temperatures, 0.3, 0.2)
            torch.testing.assert_close(values[kind].double(), truth.value, rtol=1e-5, atol=5e-7)
            gradients = torch.autograd.grad(values[kind].sum(), (noisy, clean), retain_graph=True)
            for gradient, expected in zip(gradients, truth.gradients, strict=True):
                error, size = ((one).norm(dim=-1) for one in (gradient.double() - expected, expected))
                rounding = (5e-7 + 3e-7 * truth.value.abs()) / temperature
                assert (error <= 1e-5 * size + rounding).all(), (kind, support)


def far_tails() -> tuple[Tensor, Tensor]:
    """The student's tail is far smaller than the teacher's."""
    noisy, clean = torch.zeros(2, 1, 17, device=DEVICE)
    noisy[0, 3], clean[0, 3] = 25.0, 4.0
    return noisy.requires_grad_(), clean


@each_implementation
def test_tails_of_unequal_mass(impl):
    noisy, clean = far_tails()
    kinds = ["forward_kl", "reverse_kl", "jensen_shannon"]
    values = divergences(noisy, clean, kinds, top_k=1, impl=impl)
    assert [values[kind].item() for kind in kinds] == pytest.approx([4.502, 0.2570, 0.0858], rel=5e-4)
    (gradient,) = torch.autograd.grad(values["jensen_shannon"].sum(), noisy)
    # Kernels and compiled code promise a gradient to the rounding of its terms.
    assert gradient.abs().max().item() == pytest.approx(2.3e-9, rel=0.05, abs=0 if impl == "torch" else 5e-7)
    if impl != "triton":
        mask = torch.arange(17) == 3
        masked = [masked_divergence(noisy, clean, mask, kind, impl=impl).item() for kind in kinds]
        assert masked == pytest.approx([values[kind].item() for kind in kinds], rel=1e-6)
    assert DivergenceLoss("forward_kl", top_k=1, impl=impl)(noisy, clean).item() == pytest.approx(4.502, rel=5e-4)


@each_implementation
def test_a_tail_that_underflows_is_finite(impl):
    """At temperature 0.1 the student's tail is e^−2500: no float32, but its logarithm is one."""
    noisy, clean = torch.zeros(2, 1, 40, device=DEVICE)
    noisy[0, 3], clean[0, 3] = 250.0, 0.2
    values = divergences(noisy, clean, ["forward_kl", "jensen_shannon"], top_k=1, temperature=0.1, impl=impl)
    temperatures = (torch.full((1,), 0.1, dtype=torch.float32).double().to(DEVICE),) * 2
    for kind, value in values.items():
        truth = exact(
            kind, noisy.double(), clean.double(), top_k_mask(noisy.double(), 1), "tail", temperatures, 0.5, 0.1
        )
        assert truth.value.isfinite().all()
        torch.testing.assert_close(value.double(), truth.value, rtol=1e-5, atol=5e-7)


@each_implementation
def test_peaked_beside_flat_over_a_wide_vocabulary(impl):
    kinds = ("forward_kl", "jensen_shannon", "total_variation") if impl == "compile" else KINDS
    noisy = torch.zeros(1, 4096 if impl == "triton" else 151_936, device=DEVICE)
    clean = torch.zeros_like(noisy)
    noisy[0, 3] = 25.0
    ones = (torch.ones(1, dtype=torch.float64, device=DEVICE),) * 2
    for kind, value in divergences(noisy, clean, kinds, impl=impl).items():
        truth = exact(kind, noisy.double(), clean.double(), None, "full", ones, 0.5, 0.1)
        torch.testing.assert_close(value.double(), truth.value, rtol=1e-5, atol=5e-7, msg=kind)


@each_fast_implementation
@pytest.mark.parametrize("weight", [1e-2, 1e-4, 2e-8, 1 - 1e-4])
def test_tiny_mixture_weights(impl, weight):
    assert_tiny_weight(impl, weight, KINDS)


@pytest.mark.skipif(RUNS_TRITON, reason="PyTorch's implementation")
def test_a_tiny_mixture_weight_compiled():
    """One weight and the kinds that have it: each other weight and set of kinds is compiled anew."""
    assert_tiny_weight("compile", 2e-8, ("jensen_shannon", "skew_forward_kl", "skew_reverse_kl"))


def assert_tiny_weight(impl: str, weight: float, kinds: tuple[str, ...]) -> None:
    """Disjoint peaks at a gap of 30; no kind's gradient holds another's NaN."""
    noisy, clean = torch.zeros(2, 1, 9, device=DEVICE)
    noisy[0, 1], clean[0, 6] = 30.0, 30.0
    noisy, clean = noisy.requires_grad_(), clean.requires_grad_()
    ones = (torch.ones(1, dtype=torch.float64, device=DEVICE),) * 2
    values = divergences(noisy, clean, kinds, beta=weight, skew=weight, impl=impl)
    for kind, value in values.items():
        truth = exact(kind, noisy.detach().double(), clean.detach().double(), None, "full", ones, weight, weight)
        torch.testing.assert_close(value.double(), truth.value, rtol=1e-5, atol=5e-7, msg=kind)
        gradients = torch.autograd.grad(value.sum(), (noisy, clean), retain_graph=True)
        for gradient, expected in zip(gradients, truth.gradients, strict=True):
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=5e-6, msg=kind)


@pytest.mark.skipif(RUNS_TRITON, reason="PyTorch's implementation")
@pytest.mark.parametrize("gap", [14.0, 15.0, 16.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_between_a_peak_and_a_plain_keeps_its_digits(kind, gap):
    """The student's gradient is the difference of terms a million times larger: 1e-5 of its norm in eager PyTorch."""
    noisy, clean = torch.zeros(2, 1, 17)
    noisy[0, 3] = gap
    noisy, clean = noisy.requires_grad_(), clean.requires_grad_()
    ones = (torch.ones(1, dtype=torch.float64),) * 2
    value = divergences(noisy, clean, kind, impl="torch")[kind]
    gradients = torch.autograd.grad(value.sum(), (noisy, clean))
    truth = exact(kind, noisy.detach().double(), clean.detach().double(), None, "full", ones, 0.5, 0.1)
    for gradient, expected in zip(gradients, truth.gradients, strict=True):
        assert (gradient.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.skipif(RUNS_TRITON, reason="PyTorch's implementation")
@pytest.mark.parametrize(
    ("impl", "support"), [("torch", "full"), *(("torch", one) for one in SUPPORTS), ("compile", "full")]
)
def test_a_temperature_for_each_side(impl, support):
    """A pair divides each side by its own: the same as logits divided before, and exact at proportional logits."""
    generator = torch.Generator().manual_seed(5)
    noisy, clean = (torch.randn(3, 41, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    options = {"top_k": None if support == "full" else 5, "support": "tail" if support == "full" else support}
    # One set of logits after the other: which k are the largest does not depend on the temperature.
    expected = divergences(noisy / rows[:, None], clean / 0.7, KINDS, **options, impl="torch")
    leaves = [side.clone().requires_grad_() for side in (noisy, clean)]
    kinds = ("forward_kl", "total_variation") if impl == "compile" else KINDS
    actual = divergences(*leaves, kinds, temperature=(rows, 0.7), **options, impl=impl)
    for kind in kinds:
        torch.testing.assert_close(actual[kind].detach(), expected[kind], rtol=1e-9, atol=1e-12)
    if impl == "torch":
        assert torch.autograd.gradcheck(
            lambda *sides: divergences(*sides, "jeffreys", temperature=(rows, 0.7), **options)["jeffreys"], leaves
        )
    doubled = divergences(2 * clean.float(), clean.float(), kinds, temperature=(2.0, 1.0), **options, impl=impl)
    for kind in set(kinds) - {"cross_entropy"}:
        assert (doubled[kind] == 0).all() or support == "truncate", kind


def test_a_pair_of_temperatures_in_the_losses():
    generator = torch.Generator().manual_seed(6)
    student, teacher = torch.randn(2, 4, 11, generator=generator)
    expected = divergences(student / 2, teacher / 3, "forward_kl", impl="torch")["forward_kl"]
    loss = DivergenceLoss("forward_kl", temperature=(2.0, 3.0), reduction="none", impl="torch")
    torch.testing.assert_close(loss(student, teacher), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses.kl_divergence(student, teacher, temperature=(2.0, 3.0), impl="torch"), expected)
    scaled = DivergenceLoss("forward_kl", temperature=(2.0, 3.0), scale_by_temperature_squared=True, reduction="none")
    torch.testing.assert_close(scaled(student, teacher), 4 * expected, rtol=1e-5, atol=1e-7)
    for wrong, error in (
        ((1.0,), ValueError),
        ((1.0, 2.0, 3.0), ValueError),
        ((1.0, "2"), TypeError),
        ((0.0, 1.0), ValueError),
    ):
        with pytest.raises(error, match="temperature"):
            DivergenceLoss("forward_kl", temperature=wrong)
        with pytest.raises(error, match="temperature"):
            divergences(student, teacher, "forward_kl", temperature=wrong)


def test_the_oracle_is_the_definition():
    """Closed forms of two-point distributions."""
    p, q = 0.5, 0.8
    noisy, clean = (torch.tensor([[math.log(u), math.log(1 - u)]], dtype=torch.float64) for u in (p, q))
    ones = (torch.ones(1, dtype=torch.float64),) * 2
    forward = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert exact("forward_kl", noisy, clean, None, "full", ones, 0.5, 0.1).value.item() == pytest.approx(forward)
    for kind in KINDS:
        leaves = [side.clone().requires_grad_() for side in (noisy, clean)]
        truth = exact(kind, *leaves, None, "full", ones, 0.3, 0.2)
        for gradient, expected in zip(torch.autograd.grad(truth.value.sum(), leaves), truth.gradients, strict=True):
            torch.testing.assert_close(gradient, expected.detach())


@each_fast_implementation
@pytest.mark.parametrize("value", [-1e10, -1e20, -1e30, torch.finfo(torch.float32).min, -math.inf])
@pytest.mark.parametrize(("support", "top_k"), [("full", None), ("tail", 3), ("renormalize", 50), ("truncate", 3)])
def test_masked_columns(impl, value, support, top_k):
    """Whole tiles and groups of a row hold nothing but the number that stands for an impossible token."""
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        noisy, clean = (torch.randn(3, 300, generator=generator) * 3 for _ in range(2))
        noisy[:, 40:] = clean[:, 40:] = value
        noisy[0, :40], noisy[0, 299] = value, 1.0
        sides = (noisy.to(DEVICE, dtype), clean.to(DEVICE, dtype))
        ones = (torch.ones(3, device=DEVICE),) * 2
        case = attack.Case(*sides, ones, top_k, None, support, 0.5, 0.1, f"{value} {support} {dtype}")
        assert_within_promise(case, impl, ("total_variation", "jensen_shannon", "skew_forward_kl"))
