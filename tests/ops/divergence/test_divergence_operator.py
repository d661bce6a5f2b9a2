"""The registered operator of divergences: derivatives, compilation, kept row scalars, what is refused."""

import pytest
import torch
from torch import Tensor

from sgfast.ops import divergences
from sgfast.ops.divergence.kinds import KINDS, LABEL_KIND
from sgfast.ops.divergence.operator import BackwardProblem, backward, forward
from tests import registration
from tests.implementations import DEVICE, RUNS_TRITON
from tests.ops.divergence.problems import SUPPORTS, masked_case, pair, problem


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
    operator = forward
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


def test_retained_graph_gives_the_same_gradient_twice():
    noisy, clean = pair(4, 30)
    noisy.requires_grad_()
    loss = divergences(noisy, clean, "jensen_shannon")["jensen_shannon"].sum()
    first = torch.autograd.grad(loss, noisy, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, noisy), first, rtol=0, atol=0)


def all_kinds(noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    return torch.stack(list(divergences(noisy, clean, KINDS, mask=mask, temperature=1.3).values()))


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
    values, kept_indices, row_scalars = forward(asked)
    assert values[:, 3].isnan().all()
    upstream = torch.rand_like(values)
    kept, again = (
        backward(BackwardProblem(asked, upstream=upstream, kept_indices=kept_indices, row_scalars=one))
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
        torch.autograd.grad(forward(one)[0].sum(), (noisy, clean))
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
    kept_indices, upstream = forward(asked)[1], torch.ones(1, 3, device=DEVICE)
    actual = backward(BackwardProblem(asked, upstream=upstream, kept_indices=kept_indices, row_scalars=None))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_autocast_does_not_change_the_result():
    noisy, clean = pair(4, 100)
    expected = divergences(noisy, clean, "jeffreys")["jeffreys"]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(divergences(noisy, clean, "jeffreys")["jeffreys"], expected, rtol=0, atol=0)


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
