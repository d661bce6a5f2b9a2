"""Hard labels' cross-entropy from the pass of the divergences, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sgfast.ops import divergences
from sgfast.ops.divergence.kinds import KINDS
from tests import registration
from tests.implementations import DEVICE, RUNS_TRITON, each_implementation
from tests.ops.divergence.problems import masked_case, pair

DTYPES = (torch.float32, torch.bfloat16, *(() if RUNS_TRITON else (torch.float64,)))


@pytest.mark.parametrize(
    ("impl", "dtype", "temperature", "kinds"),
    [
        *(
            pytest.param(impl, dtype, temperature, kinds, marks=[pytest.mark.triton] if RUNS_TRITON else [])
            for impl in (["triton"] if RUNS_TRITON else ["torch"])
            for dtype in DTYPES
            for temperature in (1.0, 2.5)
            for kinds in ((), KINDS)
        ),
        # Compiling costs half a minute with all kinds.
        ("compile", torch.float32, 1.0, ("jeffreys",)),
        ("compile", torch.bfloat16, 2.5, ("jeffreys", "jensen_shannon")),
    ],
)
def test_values_and_gradients_are_torchs(impl, dtype, temperature, kinds):
    """With ignored labels and masked rows, whatever the temperature and the kinds beside it."""
    noisy, clean = pair(4, 6, 130, dtype=dtype)
    labels = torch.arange(24, dtype=torch.int32, device=DEVICE).view(4, 6) * 5 - 20
    mask = torch.arange(24, device=DEVICE).view(4, 6) % 5 != 3
    noisy[~mask] = torch.nan
    noisy.requires_grad_()
    options = {"labels": labels, "mask": mask, "temperature": temperature, "impl": impl}
    values = divergences(noisy, clean, kinds, **options)
    assert list(values) == [*kinds, "label_cross_entropy"]
    oracle_leaf = noisy.detach().double().masked_fill(~mask[..., None], 0).requires_grad_()
    targets = labels.long().masked_fill((labels < 0) | ~mask, -100)
    expected = F.cross_entropy(oracle_leaf.flatten(0, 1), targets.flatten(), reduction="none").view(4, 6)
    tight = dtype == torch.float64
    actual = values["label_cross_entropy"]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-13 if tight else 1e-6, atol=1e-13 if tight else 5e-7)
    assert (actual[targets < 0] == 0).all()
    weights = torch.linspace(1, 2, 24, device=DEVICE).view(4, 6)
    (gradient,) = torch.autograd.grad((actual * weights).sum(), noisy, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), oracle_leaf)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float64: 1e-13}[dtype]
    error = (gradient.double() - expected_gradient).norm(dim=-1)
    assert (error <= rounding * expected_gradient.norm(dim=-1)).all()
    without = divergences(noisy, clean, kinds, mask=mask, temperature=temperature, impl=impl) if kinds else {}
    for kind, value in without.items():
        torch.testing.assert_close(values[kind], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("impl", "support"),
    [
        *(
            pytest.param(impl, support, marks=[pytest.mark.triton] if RUNS_TRITON else [])
            for impl in (["triton"] if RUNS_TRITON else ["torch"])
            for support in ("truncate", "renormalize", "tail")
        ),
        ("compile", "tail"),
    ],
)
def test_labels_cover_the_vocabulary_with_top_k(impl, support):
    noisy, clean = (side.requires_grad_() for side in pair(5, 40))
    labels = torch.tensor([0, 39, -1, 7, 20], device=DEVICE)
    options = {"top_k": 3, "support": support, "temperature": 2.0, "impl": impl}
    values = divergences(noisy, clean, "jeffreys", labels=labels, **options)
    expected = F.cross_entropy(noisy, labels, ignore_index=-1, reduction="none")
    torch.testing.assert_close(values["label_cross_entropy"], expected, rtol=1e-6, atol=5e-7)
    gradients = torch.autograd.grad(values["label_cross_entropy"].sum() + values["jeffreys"].sum(), (noisy, clean))
    alone = divergences(noisy, clean, "jeffreys", **options)["jeffreys"]
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.sum() + alone.sum(), (noisy, clean)), rtol=1e-5, atol=5e-7
    )


@each_implementation
def test_an_impossible_label_is_infinitely_far(impl):
    noisy, clean = pair(2, 5)
    noisy[0, 3] = -torch.inf
    labels = torch.tensor([3, 3], device=DEVICE)
    values = divergences(noisy.requires_grad_(), clean, (), labels=labels, impl=impl)["label_cross_entropy"]
    assert values.isinf().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(values.sum(), noisy)
    torch.testing.assert_close(gradient, noisy.detach().softmax(-1) - F.one_hot(labels, 5))


@each_implementation
def test_ignored_labels_alone_read_nothing(impl):
    noisy, clean = pair(3, 5)
    noisy[1] = torch.nan
    labels = torch.tensor([0, -100, 4], device=DEVICE)
    value = divergences(noisy.requires_grad_(), clean, (), labels=labels, impl=impl)["label_cross_entropy"]
    assert value[1] == 0
    (gradient,) = torch.autograd.grad(value.sum(), noisy)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


def with_labels(noisy: Tensor, clean: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    values = divergences(noisy, clean, ["jeffreys", "forward_kl"], mask=mask, labels=labels, temperature=1.3)
    return torch.stack(list(values.values()))


def with_labels_and_top_k(noisy: Tensor, clean: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    kinds = ["jeffreys", "forward_kl"]
    values = divergences(noisy, clean, kinds, mask=mask, labels=labels, temperature=1.3, top_k=3, support="tail")
    return torch.stack(list(values.values()))


def labelled_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *masked_case(rows, dtype), torch.arange(rows * 4).view(rows, 4) % 7 - 1


@registration.each_check(
    [
        registration.Case("labels", with_labels, labelled_case),
        registration.Case("labels and top_k", with_labels_and_top_k, labelled_case),
    ]
)
def test_registration(check, case):
    check(case)


def test_the_gradient_of_a_gradient_can_be_traced():
    """Tracing knows no values: a formula that looks at the temperature's cannot be traced."""

    def of_the_gradient(noisy: Tensor, clean: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        values = divergences(noisy, clean, "forward_kl", labels=labels, temperature=temperature, impl="torch")
        (gradient,) = torch.autograd.grad(sum(value.sum() for value in values.values()), noisy, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), noisy)[0]

    noisy, clean = pair(4, 7, dtype=torch.float64)
    arguments = (noisy.requires_grad_(), clean, torch.tensor([0, 1, -100, 6]), torch.tensor([1.0, 2, 1, 0.5]).double())
    traced = make_fx(of_the_gradient, tracing_mode="symbolic")(*arguments)
    torch.testing.assert_close(traced(*arguments), of_the_gradient(*arguments), rtol=0, atol=0)
