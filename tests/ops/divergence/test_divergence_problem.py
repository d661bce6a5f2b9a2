"""What a call of `divergences` asks for: whose top k, smoothed labels, mixtures' weights, names, defaults."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sgfast
from sgfast.loss import divergences as single_divergences
from sgfast.ops import divergences
from sgfast.ops.divergence import chunks, masked_divergence
from sgfast.ops.divergence.atoms import Chunk, Settings
from sgfast.ops.divergence.kinds import KINDS, LABEL_KIND
from sgfast.ops.divergence.rows import forward_rows, write_gradients
from sgfast.ops.topk.selection import union_of_top_k
from tests import registration
from tests.implementations import DEVICE, RUNS_TRITON
from tests.live_bytes import LiveBytes
from tests.ops.divergence.problems import masked_case

SUPPORTS = ("truncate", "renormalize", "tail")


def pair(*shape: int, noise: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(*shape, generator=generator, dtype=torch.float64) * 2
    noisy = clean + noise * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return noisy.to(DEVICE, dtype), clean.to(DEVICE, dtype)


def first_k(logits: Tensor, k: int) -> Tensor:
    """The dense mask of the k largest logits, the lower index first among equal ones, one row at a time."""
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for row, chosen in zip(logits.cpu().flatten(0, -2), mask.flatten(0, -2), strict=True):
        chosen[sorted(range(len(row)), key=lambda i: (-row[i].item(), i))[:k]] = True
    return mask.to(logits.device)


@pytest.mark.parametrize(
    ("impl", "side", "support"),
    [
        *(
            pytest.param(impl, side, support, marks=[pytest.mark.triton] if impl == "triton" else [])
            for impl in (["triton"] if RUNS_TRITON else ["torch"])
            for side in ("noisy", "clean")
            for support in SUPPORTS
        ),
        ("compile", "clean", "tail"),  # compiling costs seconds a case
    ],
)
def test_the_top_k_of_one_side_are_the_support(impl, side, support):
    """Values and gradients of a dense support mask; logits on a grid tie at the k-th place in most rows."""
    noisy, clean = (logits.mul(2).round().div(2) for logits in pair(3, 4, 40, noise=2.0))
    mask = torch.arange(12, device=DEVICE).view(3, 4) % 5 != 4
    leaves = [logits.clone().requires_grad_() for logits in (noisy, clean)]
    wide = [logits.double().requires_grad_() for logits in (noisy, clean)]
    dense = first_k(noisy if side == "noisy" else clean, 6)
    options = {"support": support, "mask": mask}
    kinds = ("forward_kl",) if impl == "compile" else KINDS
    values = divergences(*leaves, kinds, top_k=6, top_k_of=side, impl=impl, **options)
    for kind in kinds:
        expected = masked_divergence(*wide, dense, kind, **options)
        torch.testing.assert_close(values[kind].double(), expected, rtol=2e-5, atol=1e-6, msg=kind)
        actual_gradients = torch.autograd.grad(values[kind].sum(), leaves, retain_graph=True)
        for actual, wanted in zip(actual_gradients, torch.autograd.grad(expected.sum(), wide), strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=2e-4, atol=2e-6, msg=kind)


@pytest.mark.triton
@pytest.mark.skipif(not RUNS_TRITON, reason="needs kernels")
@pytest.mark.parametrize("width", [40, 9000])  # rows of one tile, and of groups
@pytest.mark.parametrize("side", ["noisy", "clean"])
def test_the_other_side_may_lie_outside_the_support(side, width):
    """Its tail is then all it has, or nearly nothing: either way of summing it."""
    noisy, clean = pair(6, width, noise=0.5)
    chosen, other = (noisy, clean) if side == "noisy" else (clean, noisy)
    other[0] = -chosen[0]  # nothing of it inside
    other[1, chosen[1].argmax()] = 40  # next to nothing of it outside
    other[2, :5] = -torch.inf
    options = {"top_k": 3, "top_k_of": side, "support": "tail"}
    values = divergences(noisy, clean, KINDS, impl="triton", **options)
    expected = divergences(noisy.double(), clean.double(), KINDS, impl="torch", **options)
    for kind in KINDS:
        rows = slice(None) if kind in ("jensen_shannon", "total_variation", "squared_hellinger") else [0, 3, 4, 5]
        torch.testing.assert_close(values[kind][rows].double(), expected[kind][rows], rtol=2e-5, atol=1e-6, msg=kind)


def test_the_union_holds_each_side_and_is_the_default():
    noisy, clean = pair(5, 30, noise=3.0)
    both = divergences(noisy, clean, KINDS, top_k=4, support="truncate")
    union = first_k(noisy, 4) | first_k(clean, 4)
    for kind in KINDS:
        expected = masked_divergence(noisy, clean, union, kind, support="truncate")
        torch.testing.assert_close(both[kind], expected, rtol=1e-5, atol=1e-6)
    assert (union.sum(-1) > 4).any()
    one_sided = divergences(noisy, clean, "total_variation", top_k=4, top_k_of="clean", support="truncate")
    assert (one_sided["total_variation"] <= both["total_variation"] + 1e-6).all()
    assert (one_sided["total_variation"] < both["total_variation"]).any()


@pytest.mark.parametrize("support", SUPPORTS)
def test_one_sides_top_k_pass_finite_differences_twice(support):
    noisy, clean = (side.requires_grad_() for side in pair(2, 8, dtype=torch.float64))
    options = {"top_k": 3, "top_k_of": "noisy", "support": support, "impl": "torch"}

    def run(noisy: Tensor, clean: Tensor) -> Tensor:
        return divergences(noisy, clean, "jensen_shannon", **options)["jensen_shannon"]

    assert torch.autograd.gradcheck(run, (noisy, clean))
    assert torch.autograd.gradgradcheck(run, (noisy, clean))


def of_one_side(noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    options = {"mask": mask, "top_k": 3, "top_k_of": "clean", "temperature": 1.3}
    return divergences(noisy, clean, "forward_kl", **options)["forward_kl"]


@registration.each_check([registration.Case("one side", of_one_side, masked_case)])
def test_registration(check, case):
    check(case)


def smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    found = F.cross_entropy(
        logits.double().flatten(0, -2), labels.flatten(), ignore_index=-1, label_smoothing=smoothing, reduction="none"
    )
    return found.view(labels.shape)


@pytest.mark.parametrize(
    ("temperature", "smoothing", "impl"),
    [*itertools.product((1.0, 1.7), (0.1, 1.0), ("torch",)), (1.7, 0.1, "compile")],
)
def test_smoothed_labels_are_torchs(temperature, smoothing, impl):
    noisy, clean = pair(4, 3, 60, noise=2.0)
    labels = torch.arange(12).view(4, 3) * 5 - 1
    leaf, wide = noisy.clone().requires_grad_(), noisy.double().requires_grad_()
    options = {"labels": labels, "label_smoothing": smoothing, "temperature": temperature, "impl": impl}
    values = divergences(leaf, clean, "jensen_shannon", **options)
    actual, expected = values["label_cross_entropy"], smoothed(wide, labels, smoothing)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(actual.sum(), leaf, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(4, 3), rtol=0, atol=2e-6)
    without = divergences(leaf, clean, "jensen_shannon", temperature=temperature, impl=impl)
    torch.testing.assert_close(values["jensen_shannon"], without["jensen_shannon"], rtol=1e-6, atol=1e-7)


def test_smoothed_labels_beside_impossible_tokens():
    """As in PyTorch: a −inf logit has a share of the weight, so the value is infinite; the gradient is not."""
    noisy, clean = pair(3, 7)
    noisy[1, 2] = -torch.inf
    labels = torch.tensor([3, 4, 2])
    leaf, wide = noisy.clone().requires_grad_(), noisy.double().requires_grad_()
    actual = divergences(leaf, clean, (), labels=labels, label_smoothing=0.2)["label_cross_entropy"]
    expected = smoothed(wide, labels, 0.2)
    assert actual[1] == torch.inf
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(actual.sum(), leaf)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_smoothed_labels_of_shifted_logits(shift):
    """A constant on all logits changes nothing but the rounding of the logits themselves."""
    noisy, clean = pair(5, 3000)
    noisy, labels = noisy + shift, torch.arange(5) * 600
    actual = divergences(noisy, clean, (), labels=labels, label_smoothing=0.3)["label_cross_entropy"]
    torch.testing.assert_close(actual.double(), smoothed(noisy, labels, 0.3), rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("support", ["full", *SUPPORTS])
@pytest.mark.parametrize("kinds", [(), ("forward_kl",), KINDS])
def test_smoothed_labels_stay_within_the_memory_that_chunks_are_planned_for(kinds, support):
    noisy, clean = (side.cpu() for side in pair(4, 10_000))
    settings = Settings((*kinds, LABEL_KIND), support, 0.5, 0.1, label_smoothing=0.1)
    labels, temperature = torch.arange(4)[:, None], torch.full((4, 1), 2.0)
    indices, valid = union_of_top_k(noisy, clean, 50)
    chunk = Chunk(noisy, clean, (temperature, temperature), settings, indices, valid, labels)
    planned = noisy.nbytes * chunks.temporaries(settings, 100 / 10_000, converted=False) + 4096
    with LiveBytes() as counted:
        forward_rows(chunk)
    assert counted.peak <= planned
    targets, upstream = [torch.empty_like(noisy), torch.empty_like(clean)], torch.ones(len(settings.kinds), 4)
    with LiveBytes() as counted:
        write_gradients(chunk, upstream, targets)
    assert counted.peak <= planned


def test_smoothed_labels_pass_finite_differences_twice():
    noisy, clean = (side.requires_grad_() for side in pair(3, 8, dtype=torch.float64))
    labels, mask = torch.tensor([1, -1, 5]), torch.tensor([True, True, True])

    def run(noisy: Tensor, clean: Tensor) -> tuple[Tensor, ...]:
        options = {"labels": labels, "label_smoothing": 0.25, "mask": mask, "temperature": 1.4, "impl": "torch"}
        return tuple(divergences(noisy, clean, "jeffreys", **options).values())

    assert torch.autograd.gradcheck(run, (noisy, clean))
    assert torch.autograd.gradgradcheck(run, (noisy, clean))


def test_explain_says_why_smoothed_labels_do_not_run_in_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    noisy, clean = pair(2, 5)
    options = {"labels": torch.tensor([1, 2]), "label_smoothing": 0.1}
    choice = sgfast.explain(divergences, noisy, clean, "jeffreys", **options)
    assert choice.implementation == "torch"
    assert "label_smoothing" in choice.reason or "triton is not installed" in choice.reason
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: (label_smoothing=0.1|triton is not installed)"):
        divergences(noisy, clean, "jeffreys", impl="triton", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_one_default_support_everywhere(kind):
    """The function, the functions of one kind and the masked operation: ``tail`` where nothing is said."""
    noisy, clean = pair(6, 25)
    default = divergences(noisy, clean, kind, top_k=3)[kind]
    torch.testing.assert_close(default, divergences(noisy, clean, kind, top_k=3, support="tail")[kind], rtol=0, atol=0)
    assert not torch.allclose(default, divergences(noisy, clean, kind, top_k=3, support="truncate")[kind])
    union = first_k(noisy, 3) | first_k(clean, 3)
    torch.testing.assert_close(masked_divergence(noisy, clean, union, kind), default, rtol=1e-5, atol=1e-6)
    functions = {
        "jeffreys": single_divergences.jeffreys_divergence,
        "jensen_shannon": single_divergences.jensen_shannon_divergence,
        "total_variation": single_divergences.total_variation,
        "squared_hellinger": single_divergences.squared_hellinger_distance,
        "forward_kl": single_divergences.kl_divergence,
        "cross_entropy": single_divergences.cross_entropy,
    }
    if kind in functions:
        torch.testing.assert_close(functions[kind](noisy, clean, top_k=3), default, rtol=0, atol=0)
        torch.testing.assert_close(functions[kind](noisy, clean, union), default, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "users"), [("beta", {"jensen_shannon"}), ("skew", {k for k in KINDS if "skew" in k})])
def test_a_weight_that_no_kind_uses_is_refused(name, users):
    noisy, clean = pair(2, 5)
    for kinds in itertools.chain(((kind,) for kind in KINDS), [KINDS]):
        if users & set(kinds):
            divergences(noisy, clean, kinds, **{name: 0.3})
        else:
            with pytest.raises(
                ValueError, match=f"{name}=0.3 has no use: only .* take {name}; asked for are {kinds[0]}"
            ):
                divergences(noisy, clean, kinds, **{name: 0.3})
            with pytest.raises(ValueError, match=f"{name}=0.3 has no use"):
                masked_divergence(noisy, clean, noisy > 0, kinds[0], **{name: 0.3})
    with pytest.raises(ValueError, match=f"{name}=0.3 has no use.*labels alone"):
        divergences(noisy, clean, (), labels=torch.tensor([0, 1], device=DEVICE), **{name: 0.3})


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_the_ends_of_beta_have_names_of_their_own(beta):
    noisy, clean = pair(2, 5)
    for call in (
        lambda: divergences(noisy, clean, "jensen_shannon", beta=beta),
        lambda: single_divergences.jensen_shannon_divergence(noisy, clean, beta=beta),
        lambda: single_divergences.jensen_shannon_divergence(noisy, clean, noisy > 0, beta=beta),
    ):
        with pytest.raises(ValueError, match=r"beta must lie between 0 and 1.*forward_kl.*reverse_kl"):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": "foward_kl"}, "Did you mean 'forward_kl'"),
        ({"kinds": "jefferys"}, r"Did you mean 'jeffreys'\?"),
        ({"kinds": "hellinger"}, r"Did you mean 'squared_hellinger'\?"),
        ({"support": "truncated"}, r"Did you mean 'truncate'\?"),
        ({"top_k_of": "both_sides"}, r"top_k_of must be one of both, noisy, clean; got 'both_sides'"),
        ({"top_k_of": "Clean"}, r"Did you mean 'clean'\?"),
        ({"impl": "compiled"}, r"Did you mean 'compile'\?"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 needs labels; got None"),
        ({"label_smoothing": 1.5, "labels": torch.tensor([0, 1])}, "label_smoothing must be between 0 and 1; got 1.5"),
        ({"mask": torch.tensor([1.0, 0.5])}, "mask must be bool, or numbers equal to 0 or 1; got 0.5.*weights"),
        ({"mask": torch.tensor([1, -100])}, "mask must be bool, or numbers equal to 0 or 1; got -100"),
        ({"mask": torch.tensor([1.0, torch.nan])}, "got nan"),
    ],
)
def test_errors_suggest_what_was_meant(arguments, message):
    defaults = {"noisy_logits": torch.zeros(2, 5), "clean_logits": torch.zeros(2, 5), "kinds": "jeffreys"}
    with pytest.raises(ValueError, match=message):
        divergences(**(defaults | arguments))
