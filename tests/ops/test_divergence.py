"""Divergences against a float64 oracle, SciPy, closed forms and the properties their definitions imply."""

import itertools
import math

import pytest
import scipy.spatial.distance
import scipy.special
import torch
from torch import Tensor

import sgfast
from sgfast.ops import divergence as divergence_module
from sgfast.ops import divergence_chunks, divergences, top_k_support, topk
from sgfast.ops.divergence_atoms import LABEL_KIND, Settings
from sgfast.ops.divergence_rows import forward_rows, write_gradients
from sgfast.ops.divergence_terms import KINDS
from tests import registration
from tests.implementations import DEVICE, RUNS_TRITON, each_fast_implementation, each_implementation
from tests.live_bytes import LiveBytes
from tests.ops.problems import problem

SUPPORTS = (None, "truncate", "renormalize", "tail")
EACH_SUPPORT = SUPPORTS
SYMMETRIC = ("jeffreys", "jensen_shannon", "total_variation", "squared_hellinger")


def pair(*shape: int, noise: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Clean logits randn·3, noisy ones that differ by `noise`."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    noisy = clean + noise * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return noisy.to(DEVICE, dtype), clean.to(DEVICE, dtype)


def atoms(noisy: Tensor, clean: Tensor, k: int | None, support: str | None) -> list[tuple[Tensor, Tensor]]:
    """Per row, the float64 probabilities over the support's atoms, written as plainly as possible."""
    out = []
    for x, y in zip(noisy.double().flatten(0, -2), clean.double().flatten(0, -2), strict=True):
        p, q = x.softmax(-1), y.softmax(-1)
        if support is not None:
            chosen = set()
            for side in (x, y):
                order = sorted(range(len(side)), key=lambda i: (-side[i].item(), i))
                chosen.update(order[:k])
            inside = torch.tensor(sorted(chosen))
            if support == "renormalize":
                p, q = x[inside].softmax(-1), y[inside].softmax(-1)
            else:
                outside = torch.ones(len(x), dtype=torch.bool, device=x.device)
                outside[inside] = False
                rest_p, rest_q = p[outside].sum()[None], q[outside].sum()[None]
                p, q = p[inside], q[inside]
                if support == "tail":
                    p, q = torch.cat([p, rest_p]), torch.cat([q, rest_q])
        out.append((p, q))
    return out


def oracle(kind: str, p: Tensor, q: Tensor, beta: float, skew: float) -> Tensor:
    def kl(u: Tensor, v: Tensor) -> Tensor:
        return torch.special.xlogy(u, u).sub(torch.special.xlogy(u, v)).sum()

    match kind:
        case "forward_kl":
            return kl(q, p)
        case "reverse_kl":
            return kl(p, q)
        case "jeffreys":
            return kl(p, q) + kl(q, p)
        case "jensen_shannon":
            m = beta * q + (1 - beta) * p
            return beta * kl(q, m) + (1 - beta) * kl(p, m)
        case "total_variation":
            return (p - q).abs().sum() / 2
        case "squared_hellinger":
            return (p.sqrt() - q.sqrt()).square().sum() / 2
        case "cross_entropy":
            return -torch.special.xlogy(q, p).sum()
        case "skew_forward_kl":
            return kl(q, skew * q + (1 - skew) * p)
        case "skew_reverse_kl":
            return kl(p, skew * p + (1 - skew) * q)
    raise AssertionError(kind)


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
@pytest.mark.parametrize("support", EACH_SUPPORT)
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
@pytest.mark.parametrize("support", EACH_SUPPORT)
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
    for support in EACH_SUPPORT:
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


@each_implementation
@pytest.mark.parametrize("support", EACH_SUPPORT)
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
    for support in EACH_SUPPORT:
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


@pytest.mark.parametrize("support", SUPPORTS)
def test_first_and_second_derivatives(support):
    noisy, clean = (side.requires_grad_() for side in pair(2, 3, 9, noise=1.0, dtype=torch.float64))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])

    def function(noisy: Tensor, clean: Tensor) -> Tensor:
        values = divergences(
            noisy, clean, KINDS, top_k=support and 3, support=support or "tail", mask=mask, temperature=1.7
        )
        return torch.stack(list(values.values()))

    assert torch.autograd.gradcheck(function, (noisy, clean))
    assert torch.autograd.gradgradcheck(function, (noisy, clean))


@pytest.mark.parametrize("support", SUPPORTS)
def test_registration(support):
    noisy, clean = (side.requires_grad_() for side in pair(2, 3, 9))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    options = {"top_k": 2 if support else 0, "support": support or "tail", "mask": mask}
    asked = problem(noisy, clean, ["jeffreys", "forward_kl"], **options)
    operator = divergence_module._forward
    torch.library.opcheck(operator.overload, operator.flat(asked))


def test_compiled_training_step_matches_eager_with_masked_rows():
    def step(noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
        values = divergences(noisy, clean, ["jeffreys", "cross_entropy"], top_k=3, support="tail", mask=mask)
        return sum(value.sum() for value in values.values())

    compiled_step = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        noisy, clean = pair(rows, 21, seed=rows)
        mask = torch.arange(rows) % 3 != 0
        gradients = []
        for function in (step, compiled_step):
            leaf = noisy.clone().requires_grad_()
            loss = function(leaf, clean, mask)
            loss.backward()
            gradients.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


def test_nothing_per_logit_is_kept_for_backward():
    noisy, clean = (side.requires_grad_() for side in pair(16, 1000))
    inputs = {noisy.data_ptr(), clean.data_ptr()}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        divergences(noisy, clean, KINDS)
        row_scalars = 16 * (4 + 2 * len(KINDS)) * 4
        assert sum(kept) <= row_scalars + 8 * 16
        divergences(noisy, clean, KINDS, top_k=10, support="tail")
        assert sum(kept) <= row_scalars + 16 * 16 + 16 * 20 * 4


def test_retained_graph_gives_the_same_gradient_twice():
    noisy, clean = pair(4, 30)
    noisy.requires_grad_()
    loss = divergences(noisy, clean, "jensen_shannon")["jensen_shannon"].sum()
    first = torch.autograd.grad(loss, noisy, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, noisy), first, rtol=0, atol=0)


@each_fast_implementation
@pytest.mark.parametrize("top_k", [None, 2])
def test_no_rows(impl, top_k):
    noisy, clean = torch.zeros(0, 5, device=DEVICE, requires_grad=True), torch.zeros(0, 5, device=DEVICE)
    value = divergences(noisy, clean, "jeffreys", top_k=top_k, impl=impl)["jeffreys"]
    assert value.shape == (0,)
    value.sum().backward()
    assert noisy.grad.shape == (0, 5)


# Around the tiles' edges: 256 columns at least, 2048 in float32 and in backward, 4096 in 16 bits.
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


def test_what_the_kernels_refuse():
    noisy, clean = pair(2, 5)
    refused = {
        "noisy_logits is float64": ((noisy.double(), clean), {}),
        "clean_logits has strides": ((noisy, clean.T.contiguous().T), {}),
    }
    if not RUNS_TRITON:
        refused = {"cpu tensors": ((noisy, clean), {})}
    for reason, (sides, options) in refused.items():
        with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{reason}"):
            divergences(*sides, "jeffreys", impl="triton", **options)
        assert sgfast.explain(divergences, *sides, "jeffreys", **options).implementation == "torch"


@each_fast_implementation
def test_only_row_scalars_are_kept_for_backward(impl):
    noisy, clean = (side.requires_grad_() for side in pair(16, 1000))
    inputs, kept = {side.untyped_storage().data_ptr() for side in (noisy, clean)}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        divergences(noisy, clean, KINDS, impl=impl)
    assert sum(kept) <= 16 * (4 + 2 * len(KINDS)) * 4 + 4


def all_kinds(noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    return torch.stack(list(divergences(noisy, clean, KINDS, mask=mask, temperature=1.3).values()))


def masked_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    noisy, clean = (side.cpu() for side in pair(rows, 4, 6, noise=1.0, dtype=dtype))
    mask = torch.arange(rows * 4).view(rows, 4) % 3 != 0
    noisy[~mask] = float("nan")
    return noisy, clean, mask


@registration.each_check([registration.Case("masked", all_kinds, masked_case)])
def test_registration_of_the_whole_vocabulary(check, case):
    check(case)


@pytest.mark.parametrize("impl", ["torch", "compile"])
def test_kept_row_scalars_give_the_gradient_that_is_had_without(impl):
    """Also in rows whose divergence is infinite or NaN, with labels, a mask, and a temperature that is not theirs."""
    noisy, clean = pair(6, 50)
    noisy[0, :7] = clean[1, :7] = noisy[2, 9] = clean[2, 9] = -torch.inf
    noisy[3, 0] = torch.nan
    labels, mask = torch.tensor([0, 1, -1, 3, 4, 5]), torch.arange(6) != 4
    options = {
        "temperature": torch.linspace(0.5, 2, 6),
        "beta": 0.3,
        "skew": 0.2,
        "max_chunk_bytes": 4000,
        "impl": impl,
    }
    asked = problem(noisy, clean, (*KINDS, LABEL_KIND), labels=labels, mask=mask, **options)
    values, kept_indices, row_scalars = divergence_module._forward(asked)
    assert values[:, 3].isnan().all()
    upstream = torch.rand_like(values)
    kept, again = (
        divergence_module._backward(divergence_module._Backward(asked, upstream, kept_indices, one))
        for one in (row_scalars, None)
    )
    for gradient, expected in zip(kept, again, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert gradient[[0, 1, 2, 5]].isfinite().all()
        assert gradient[3].isnan().all()
        assert (gradient[4] == 0).all()


def test_row_scalars_are_for_the_sides_a_gradient_was_expected_of():
    """A side that starts to need a gradient after forward, as in a graph exported for inference, gets its own."""
    noisy, clean = (side.requires_grad_() for side in pair(3, 40))
    asked = problem(noisy, clean, ["jeffreys", "forward_kl"], impl="compile")
    expected, actual = (
        torch.autograd.grad(divergence_module._forward(one)[0].sum(), (noisy, clean))
        for one in (asked, asked._replace(clean_wanted=False))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.triton
@pytest.mark.skipif(not RUNS_TRITON, reason="needs kernels")
@pytest.mark.parametrize("top_k", [0, 4])
def test_backward_without_row_scalars(top_k):
    """A graph traced where PyTorch was to run, run where Triton does."""
    noisy, clean = (side.requires_grad_() for side in pair(3, 40))
    values = divergences(noisy, clean, "jeffreys", top_k=top_k or None, support="tail", impl="triton")["jeffreys"]
    expected = torch.autograd.grad(values.sum(), (noisy, clean))
    asked = problem(noisy.detach(), clean.detach(), ["jeffreys"], top_k=top_k, impl="triton")
    kept_indices, upstream = divergence_module._forward(asked)[1], torch.ones(1, 3, device=DEVICE)
    actual = divergence_module._backward(divergence_module._Backward(asked, upstream, kept_indices, None))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_autocast_does_not_change_the_result():
    noisy, clean = pair(4, 100)
    expected = divergences(noisy, clean, "jeffreys")["jeffreys"]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(divergences(noisy, clean, "jeffreys")["jeffreys"], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kinds": "kl"}, ValueError, "kinds must be among .*forward_kl.*got 'kl'"),
        ({"kinds": []}, ValueError, "at least one"),
        ({"top_k": 6}, ValueError, "top_k must be between 1 and the vocabulary's size, 5; got 6"),
        ({"top_k": 0}, ValueError, "got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"support": "union"}, ValueError, "support must be one of truncate"),
        ({"kinds": "jensen_shannon", "beta": 0.0}, ValueError, "At 0 it would be the kind forward_kl, at 1 reverse_kl"),
        ({"kinds": "skew_forward_kl", "skew": 1.0}, ValueError, "skew must be at least 0 and less than 1"),
        ({"beta": "a"}, TypeError, "beta must be a number; got str"),
        ({"skew": [0.1]}, TypeError, "skew must be a number; got list"),
        ({"temperature": "2"}, TypeError, "temperature must be a number; got str"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must be a number or have the row shape"),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"mask": torch.ones(2, 5)}, ValueError, "mask must have the shape of noisy_logits"),
        ({"clean_logits": torch.zeros(2, 4)}, ValueError, r"one shape; got \(2, 5\) and \(2, 4\)"),
        ({"clean_logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "clean_logits must be float32"),
        ({"kinds": "label_cross_entropy"}, ValueError, "kinds must be among"),
        ({"labels": [0, 1]}, TypeError, "labels must be a torch.Tensor or None; got list"),
        ({"labels": torch.zeros(2)}, TypeError, "labels must be integers; got torch.float32"),
        ({"labels": torch.zeros(2, dtype=torch.bool)}, TypeError, "labels must be integers; got torch.bool"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels must have the row shape \(2,\)"),
        (
            {"labels": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "labels and noisy_logits must be on",
        ),
        ({"labels": torch.tensor([-1, 5])}, ValueError, r"less than the vocabulary's size, 5; got 5 at \(1,\)"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(arguments, error, message):
    defaults = {"noisy_logits": torch.zeros(2, 5), "clean_logits": torch.zeros(2, 5), "kinds": "jeffreys"}
    with pytest.raises(error, match=message):
        divergences(**(defaults | arguments))


def test_forward_mode_is_refused():
    noisy, clean = pair(2, 5)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: divergences(x, clean, "jeffreys")["jeffreys"], (noisy,), (clean,))


def test_double_backward_through_another_implementation_is_refused():
    noisy, clean = pair(2, 5)
    noisy.requires_grad_()
    value = divergences(noisy, clean, "jeffreys", impl="compile")["jeffreys"].sum()
    (gradient,) = torch.autograd.grad(value, noisy, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='torch'"):
        gradient.sum().backward()


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


def test_explain_says_what_would_run():
    noisy, clean = pair(2, 5)
    assert sgfast.explain(divergences, noisy, clean, "jeffreys").implementation == "torch"
    assert sgfast.explain(divergences, noisy, clean, "jeffreys", impl="compile").implementation == "compile"


def test_reference_is_the_definition():
    """The reference behind double backward equals the operation it stands for."""
    noisy, clean = pair(3, 12, dtype=torch.float64)
    indices, valid = top_k_support(noisy, clean, 3)
    for support in SUPPORTS:
        options = {"top_k": 3 if support else 0, "support": support or "tail", "beta": 0.4, "skew": 0.2}
        asked = problem(noisy, clean, KINDS, temperature=torch.full((3,), 1.5).double(), **options)
        values = divergence_module.reference(asked, indices.masked_fill(~valid, -1))
        expected = divergences(
            noisy, clean, KINDS, top_k=support and 3, support=support or "tail", temperature=1.5, beta=0.4, skew=0.2
        )
        torch.testing.assert_close(values, torch.stack(list(expected.values())), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("support", EACH_SUPPORT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta", "top_k"), [(0.5, 50), (0.5, 1000), (0.3, 50)])
def test_temporaries_stay_within_what_chunks_are_planned_for(dtype, support, beta, top_k):
    noisy, clean = pair(4, 10_000, dtype=dtype)
    temperature, labels, row_vectors = torch.ones(4, 1), torch.arange(4)[:, None], 4 * 4 * 64
    with LiveBytes() as counted:
        indices, valid = topk.union_of_top_k(noisy, clean, top_k)
    assert counted.peak <= 4 * topk.temporary_bytes(noisy, top_k)
    for kinds in [(kind,) for kind in KINDS] + [KINDS[:2], KINDS[:3], KINDS[2:6], KINDS, (*KINDS, LABEL_KIND)]:
        settings = Settings(tuple(kinds), support or "full", beta, 0.1)
        count = divergence_chunks.temporaries(settings, 2 * top_k / 10_000, dtype != torch.float32)
        planned = noisy.numel() * 4 * count + row_vectors
        arguments = (noisy, clean, (temperature, temperature), settings, indices, valid)
        given_labels = labels if LABEL_KIND in kinds else None
        targets = [torch.empty_like(noisy), torch.empty_like(clean)]
        with LiveBytes() as counted:
            forward_rows(*arguments, given_labels)
        assert counted.peak <= planned
        with LiveBytes() as counted:
            write_gradients(*arguments, torch.ones(len(kinds), 4), targets, given_labels)
        assert counted.peak <= planned


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [
        ["jensen_shannon"],
        ["jeffreys", "jensen_shannon", "total_variation", "squared_hellinger"],
        ["jensen_shannon", "cross_entropy", "skew_forward_kl", "skew_reverse_kl"],
    ],
)
def test_compiled_temporaries_stay_within_what_chunks_are_planned_for(monkeypatch, kinds, wanted):
    monkeypatch.setattr(divergence_chunks.rows, "keep_freed_memory", lambda size: None)  # nobody writes to that block
    noisy, clean = (side.requires_grad_(wanted) for side in pair(24, 4000))

    def step():
        values = divergences(noisy, clean, kinds, impl="compile", max_chunk_bytes=2**30)
        return torch.autograd.grad(sum(values.values()).sum(), (noisy, clean)) if wanted else ()

    step()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients = step()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = list(itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))
    given = sum(gradient.nbytes for gradient in gradients)
    planned = divergence_chunks.compiled_temporaries(Settings(tuple(kinds), "full", 0.5, 0.1), torch.float32)
    row_vectors = 24 * 4 * 64
    assert given <= max(live) <= max(given, noisy.nbytes * planned) + row_vectors


@pytest.mark.parametrize("top_k", [0, 40])
@pytest.mark.parametrize("layout", ["contiguous", "masked", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_gradients_and_a_chunk(dtype, layout, top_k):
    """What a training step holds besides logits: at [512, 128256] as much more as the gradients are larger."""
    shape, width, bound = (8, 12), 4000, 2**20
    noisy, clean = (side.view(8, 13, width) for side in pair(8 * 13, width, dtype=dtype))
    noisy, clean = (side[:, 1:] if layout == "shifted" else side[:, 1:].contiguous() for side in (noisy, clean))
    mask = torch.arange(96).view(shape) % 3 != 0 if layout == "masked" else None
    kinds = ["jensen_shannon", "jeffreys"]
    asked = problem(noisy, clean, kinds, top_k=top_k, mask=mask, max_chunk_bytes=bound, impl="torch")
    row_vectors = 96 * 4 * (64 + 2 * top_k)
    with LiveBytes() as counted:
        values, indices, _ = divergence_module._forward.implementation(asked)
    assert counted.peak <= bound + row_vectors
    upstream = torch.ones_like(values)
    with LiveBytes() as counted:
        gradients = divergence_module._backward.implementation(
            divergence_module._Backward(asked, upstream, indices, None)
        )
    own = sum(gradient.nbytes for gradient in gradients)
    assert own == 2 * 96 * width * noisy.element_size()
    assert counted.peak <= own + bound + row_vectors
    with LiveBytes() as counted:
        topk._top_k_support.implementation(topk._Problem(noisy, clean, 40, bound, "torch"))
    assert counted.peak <= bound + 96 * 80 * 9


@pytest.mark.parametrize("top_k", [None, 10])
def test_a_twentieth_of_a_byte_per_logit_is_kept_for_backward(top_k):
    rows, width = 8, 32_000
    noisy, clean = (side.requires_grad_() for side in pair(rows, width, dtype=torch.bfloat16))
    inputs, kept = {side.untyped_storage().data_ptr() for side in (noisy, clean)}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        values = divergences(noisy, clean, KINDS, top_k=top_k, labels=torch.arange(rows))
    assert len(values) == len(KINDS) + 1
    assert sum(kept.values()) <= 0.05 * rows * width


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


def test_the_temperature_is_as_wide_as_the_wider_side():
    noisy, clean = pair(3, 50)
    mixed = divergences(noisy, clean.double(), "forward_kl", temperature=0.3)["forward_kl"]
    wide = divergences(noisy.double(), clean.double(), "forward_kl", temperature=0.3)["forward_kl"]
    torch.testing.assert_close(mixed, wide, rtol=1e-12, atol=0)
