"""The teacher as an expectation of the head's rows: the values and gradients of the whole teacher, in two products."""

import pytest
import torch
from torch import Tensor

import sgfast
from sgfast import DivergenceLoss, LinearLogits, divergences
from sgfast.ops.linear.expectation import ExpectationProblem, forward
from sgfast.sides import HeadExpectation, summarize_teacher
from tests import registration
from tests.live_bytes import LiveBytes
from tests.ops.linear.heads import Head, error, random_head

LABELS = torch.tensor([3, -100, 40, 0, 7, 7, -100, 12, 1])


def student_and_teacher(dtype: torch.dtype, *, bias: bool = True, scale: float = 1.5) -> tuple[Head, Head]:
    """Two sides with one frozen head."""
    head = random_head(9, 16, 200, 1, dtype, bias=bias, scale=scale)
    frozen = head._replace(weight=head.weight.detach(), bias=head.bias.detach() if bias else None)
    return frozen, frozen._replace(hidden=random_head(9, 16, 200, 2, dtype).hidden.detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_as_of_the_whole_teacher(dtype, bias):
    student, teacher = student_and_teacher(dtype, bias=bias)
    summary = summarize_teacher(teacher.side(), "head_expectation", max_chunk_bytes=8000)
    assert summary.vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mask = torch.arange(9) % 4 != 2
    with torch.no_grad():
        student.hidden[~mask] = torch.nan
    wide = [
        Head(head.hidden.detach().nan_to_num().double(), *(one.double() for one in head.tensors()[1:]))
        for head in (student, teacher)
    ]
    wide = [head._replace(scale=1.5) for head in wide]
    wide[0].hidden.requires_grad_()
    kinds = ("cross_entropy", "forward_kl")
    found = divergences(student.side(), summary, kinds, mask=mask, labels=LABELS, max_chunk_bytes=8000)
    want = divergences(wide[0].side(), wide[1].side(), kinds, mask=mask, labels=LABELS)
    upstream = torch.linspace(1, 2, 9)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float64: 1e-10}[dtype]
    for kind in want:
        torch.testing.assert_close(found[kind].double(), want[kind], rtol=1e-5, atol=2e-6)
        gradients = [
            torch.autograd.grad((values[kind] * upstream).sum(), side.hidden, retain_graph=True)[0]
            for values, side in ((found, student), (want, wide[0]))
        ]
        assert error(*gradients) <= rounding
        assert (gradients[0][~mask] == 0).all()


@pytest.mark.parametrize("options", [{}, {"hard_label_weight": 0.4}, {"reduction": "none"}, {"kind": "cross_entropy"}])
def test_a_loss(options):
    student, teacher = student_and_teacher(torch.float64)
    loss = DivergenceLoss(**({"kind": "forward_kl"} | options))
    summary = summarize_teacher(teacher.side(), "head_expectation")
    results = []
    for side in (summary, teacher.side()):
        value = loss(student.side(), side, labels=LABELS)
        results.append((value, loss.components, torch.autograd.grad(value.sum(), student.hidden)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_products_and_memory(monkeypatch):
    """Two products of a step: the logits, and the expectation of the head under the student."""
    student, teacher = student_and_teacher(torch.float32)
    summary = summarize_teacher(teacher.side(), "head_expectation")
    counts = []
    product = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *two, **out: counts.append(two[0].numel() * two[1].shape[1]) or product(*two, **out)
    )
    DivergenceLoss("forward_kl", max_chunk_bytes=5000)(student.side(), summary).backward()
    assert sum(counts) == 2 * 9 * 16 * 200
    bound, rows, vocabulary = 2**20, 400, 4000
    head = random_head(rows, 8, vocabulary, 1)
    asked = ExpectationProblem(
        head.hidden.detach(), head.weight.detach(), None, torch.zeros(rows, 8), None, None, None, 1.0, bound, None
    )
    with torch.no_grad(), LiveBytes() as counted:
        outputs = forward.implementation(asked)
    assert counted.peak <= sum(one.nbytes for one in outputs) + 1.05 * bound


def values(hidden: Tensor, vector: Tensor, labels: Tensor) -> Tensor:
    weight = torch.arange(44, dtype=hidden.dtype, device=hidden.device).sin().view(11, 4)
    clean = HeadExpectation(vector.detach(), vector.detach().select(-1, 0).abs())
    found = divergences(LinearLogits(hidden, weight, scale=2.0), clean, "cross_entropy", labels=labels)
    return torch.stack(list(found.values()))


def arguments(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    numbers = torch.arange(rows * 4, dtype=dtype).view(rows, 4)
    return numbers.cos(), numbers.sin(), torch.arange(rows) % 5 - 1


@pytest.mark.parametrize("check", [one for one in registration.CHECKS if one is not registration.check_gradients])
def test_registration(check):
    def function(hidden: Tensor, vector: Tensor, labels: Tensor) -> Tensor:
        return values(hidden, vector, labels) + 0 * vector.select(-1, 0)

    check(registration.Case("labels", function, arguments, double_backward=False))


def test_first_derivatives_and_the_refusal_of_second():
    hidden, vector, labels = arguments(3, torch.float64)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda one: values(one, vector, labels), hidden)
    (gradient,) = torch.autograd.grad(values(hidden, vector, labels).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        gradient.sum().backward()


SIDE = LinearLogits(torch.ones(2, 4), torch.ones(7, 4))
SUMMARY = HeadExpectation(torch.ones(2, 4), torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((SIDE, SUMMARY, "jeffreys"), {}, ValueError, "kinds with a HeadExpectation are cross_entropy and forward_kl"),
        ((SIDE, SUMMARY, "forward_kl"), {"top_k": 2}, ValueError, "top_k and support_mask need the teacher's logits"),
        ((SIDE, SUMMARY, "forward_kl"), {"temperature": 2.0}, ValueError, "temperature must be the number 1"),
        ((SIDE, SUMMARY, "forward_kl"), {"impl": "triton"}, RuntimeError, "a HeadExpectation runs in PyTorch"),
        ((SUMMARY, SIDE, "forward_kl"), {}, TypeError, "a HeadExpectation is a clean side"),
        ((torch.ones(2, 7), SUMMARY, "forward_kl"), {}, TypeError, "noisy_logits must be a LinearLogits beside"),
        (
            (LinearLogits(torch.ones(2, 4), torch.ones(7, 4), softcap=2.0), SUMMARY, "forward_kl"),
            {},
            ValueError,
            "softcap must be None with a HeadExpectation; got 2.0",
        ),
        (
            (LinearLogits(torch.ones(2, 4), torch.ones(7, 4).requires_grad_()), SUMMARY, "forward_kl"),
            {},
            ValueError,
            "weight and bias must not require a gradient",
        ),
        (
            (LinearLogits(torch.ones(2, 4), torch.ones(7, 4), torch.ones(7)), SUMMARY, "forward_kl"),
            {},
            ValueError,
            "got a bias beside expected_bias=None",
        ),
        (
            (SIDE, HeadExpectation(torch.ones(2, 5), torch.ones(2)), "forward_kl"),
            {},
            ValueError,
            r"must have a vector of the shape of noisy_logits's hidden, \(2, 4\); got \(2, 5\)",
        ),
    ],
)
def test_what_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        divergences(*arguments, **options)


def test_what_the_values_refuse():
    with pytest.raises(ValueError, match=r"entropy must have the row shape \(2,\); got \(3,\)"):
        HeadExpectation(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="form must be one of head_expectation"):
        summarize_teacher(SIDE, "top")
    with pytest.raises(ValueError, match="side must have no soft cap"):
        summarize_teacher(LinearLogits(torch.ones(2, 4), torch.ones(7, 4), softcap=2.0), "head_expectation")
    with pytest.raises(TypeError, match="side must be a LinearLogits"):
        summarize_teacher(torch.ones(2, 4), "head_expectation")
    with pytest.raises(ValueError, match="shared_vocab must be None with a HeadExpectation"):
        DivergenceLoss("forward_kl", shared_vocab=3)(SIDE, SUMMARY)
    assert sgfast.explain(divergences, SIDE, SUMMARY, "forward_kl").reason == "a HeadExpectation runs in PyTorch"
