"""DivergenceLoss of linear sides: the same losses, parts and gradients as of their logits, for every option."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgfast import DivergenceLoss, LinearLogits
from sgfast.loss import divergences as functions
from tests.ops.linear.heads import Head, random_head

LABELS = torch.tensor([3, -100, 40, 0, 7, 7, -100, 12, 1])
CALLS = {
    "plain": ({}, {}),
    "sum": ({"reduction": "sum"}, {"mask": torch.arange(9) % 2}),
    "none": ({"reduction": "none"}, {"labels": LABELS}),
    "two kinds": ({"kind": {"forward_kl": 0.7, "reverse_kl": 0.3}}, {"labels": LABELS}),
    "labels": ({"hard_label_weight": 0.3, "label_smoothing": 0.1}, {"labels": LABELS}),
    "labels alone": ({"hard_label_weight": 1.0}, {"labels": LABELS, "num_items": 20}),
    "none, labels": ({"hard_label_weight": 0.3, "reduction": "none"}, {"labels": LABELS}),
    "temperature": ({"temperature": 2.0, "scale_by_temperature_squared": True, "top_k": 5}, {}),
    "teacher's top k": ({"top_k": 5, "top_k_of": "teacher", "support": "renormalize"}, {"num_items": 4.0}),
    "num_items": ({}, {"num_items": torch.tensor([17.0]), "mask": torch.arange(9) > 2}),
    "shared_vocab": ({"shared_vocab": 40, "temperature": (2.0, 1.5)}, {}),
    "end of beta": ({"kind": "jensen_shannon", "beta": 0.0}, {}),
    "nothing counts": ({"hard_label_weight": 0.5}, {"labels": torch.full((9,), -100)}),
}


def loss_of(name: str) -> tuple[DivergenceLoss, dict]:
    options, arguments = CALLS[name]
    return DivergenceLoss(**({"kind": "jeffreys", "max_chunk_bytes": 5000} | options)), arguments


def dense(head: Head) -> Tensor:
    logits = (head.hidden @ head.weight.T + head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_as_of_logits(name, frozen):
    loss, arguments = loss_of(name)
    student = random_head(9, 5, 50, 1, torch.float64, scale=0.5, softcap=4.0)
    teacher = random_head(9, 7, 45 if "shared_vocab" in CALLS[name][0] else 50, 2, torch.float64)
    leaves = [*student.tensors(), *teacher.tensors()]
    if frozen:
        leaves = [student.hidden, teacher.hidden]
        for tensor in (student.weight, student.bias, teacher.weight, teacher.bias):
            tensor.requires_grad_(False)
    weights = torch.linspace(0, 2, 9, dtype=torch.float64).requires_grad_()
    for extra in ({}, {"weights": weights}):
        results = []
        for sides in ((student.side(), teacher.side()), (dense(student), dense(teacher))):
            value = loss(*sides, **arguments, **extra)
            upstream = torch.linspace(1, 2, value.numel(), dtype=torch.float64).view_as(value)
            gradients = torch.autograd.grad((value * upstream).sum(), [*leaves, *extra.values()])
            results.append((value.detach(), loss.components, gradients))
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
        if name == "nothing counts":
            assert results[0][0] == 0


def test_one_head_of_both_sides_stays_one_under_shared_vocab():
    head = random_head(4, 5, 50, 1)
    other = head._replace(hidden=(head.hidden * 1.01).detach())
    loss = DivergenceLoss("forward_kl", shared_vocab=40)
    loss(head.side(), other.side()).backward()
    tied = head.weight.grad
    head.weight.grad = None
    full = torch.float64
    logits = [dense(Head(*(one.to(full) for one in side.tensors()))) for side in (head, other)]
    loss(*logits).backward()
    torch.testing.assert_close(tied, head.weight.grad, rtol=1e-4, atol=1e-7)
    assert (tied[40:] == 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    student, teacher = random_head(6, 5, 50, 1), random_head(6, 5, 50, 2)
    loss = DivergenceLoss("jensen_shannon")

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(LinearLogits(hidden * 2, weight), teacher.side())

    leaves = [student.hidden, student.weight]
    want = torch.autograd.grad(step(*leaves), leaves)
    for leaf in leaves:
        leaf.grad = None
    checkpoint(step, *leaves, use_reentrant=reentrant).backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(want), rtol=0, atol=0)


def test_a_loss_scale_and_accumulation():
    """Gradients of parts with num_items add up to those of the whole, also times a scale; float16 keeps its digits."""
    student, teacher = random_head(8, 16, 60, 1, torch.float16), random_head(8, 16, 60, 2, torch.float16)
    loss = DivergenceLoss("forward_kl")
    leaves = [student.hidden, student.weight]
    whole = torch.autograd.grad(loss(student.side(), teacher.side()) * 4096, leaves)
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        sides = [head._replace(hidden=head.hidden[rows]).side() for head in (student, teacher)]
        parts.append(torch.autograd.grad(loss(*sides, num_items=8) * 4096, leaves))
    wide = [Head(*(one.detach().double().requires_grad_() for one in head.tensors())) for head in (student, teacher)]
    exact = torch.autograd.grad(loss(wide[0].side(), wide[1].side()) * 4096, [wide[0].hidden, wide[0].weight])
    for one, first, second, right in zip(whole, *parts, exact, strict=True):
        assert ((first.double() + second.double() - right).norm() / right.norm()) < 6e-4
        assert ((one.double() - right).norm() / right.norm()) < 4e-4


@pytest.mark.parametrize(
    "function",
    [functions.jeffreys_divergence, functions.total_variation, functions.cross_entropy],
    ids=lambda function: function.__name__,
)
def test_functions_of_each_divergence(function):
    student, teacher = random_head(4, 5, 50, 1, torch.float64), random_head(4, 6, 50, 2, torch.float64)
    for options in ({}, {"top_k": 5, "support": "truncate"}):
        found = function(student.side(), teacher.side(), **options)
        torch.testing.assert_close(found, function(dense(student), dense(teacher), **options), rtol=1e-10, atol=1e-12)
