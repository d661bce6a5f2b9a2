"""DivergenceLoss: several kinds at once, weights of positions, smoothed labels, whose top k, its parts."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sgfast.loss import DivergenceLoss, divergences
from sgfast.ops.divergence.kinds import KINDS
from tests.implementations import DEVICE, each_fast_implementation

IGNORED = -100
LABELS = torch.tensor([[1, IGNORED, 4, 0], [IGNORED, 2, 3, 3], [4, 1, IGNORED, 2]])


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(*shape, generator=generator, dtype=torch.float64) * 2
    student = teacher + torch.randn(*shape, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def assert_same(actual: Tensor, expected: Tensor, *sides: Tensor, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    """One value and one gradient."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    gradients = (torch.autograd.grad(value.sum(), sides, retain_graph=True) for value in (actual, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "temperature": 2.0, "scale_by_temperature_squared": True}])
def test_several_kinds_are_their_weighted_sum(settings):
    sides = logits(3, 4, 20)
    kinds = {kind: 0.25 * (place + 1) for place, kind in enumerate(KINDS)}
    settings = settings | {"hard_label_weight": 0.3}
    together = DivergenceLoss(kinds, **settings)(*sides, labels=LABELS)
    alone = sum(
        weight * DivergenceLoss(kind, **(settings | {"hard_label_weight": 0.0}))(*sides, labels=LABELS)
        for kind, weight in kinds.items()
    )
    hard = DivergenceLoss("jeffreys", **(settings | {"hard_label_weight": 1.0}))(*sides, labels=LABELS)
    assert_same(together, 0.7 * alone + 0.3 * hard, *sides)


def test_a_kind_of_weight_zero_is_not_computed():
    """Here it would be infinite."""
    student, teacher = logits(2, 5)
    with torch.no_grad():
        student[:, 0] = -torch.inf
    value = DivergenceLoss({"forward_kl": 0, "total_variation": 2.0})(student, teacher)
    torch.testing.assert_close(value, 2 * DivergenceLoss("total_variation")(student, teacher), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("beta", "end"), [(0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_beta_among_other_kinds(beta, end):
    sides = logits(3, 4, 20)
    mixed = DivergenceLoss({"jensen_shannon": 0.5, end: 0.25, "jeffreys": 1.0}, beta=beta)(*sides)
    assert_same(mixed, DivergenceLoss({end: 0.75, "jeffreys": 1.0})(*sides), *sides)
    assert_same(DivergenceLoss("jensen_shannon", beta=beta)(*sides), DivergenceLoss(end)(*sides), *sides)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_whole_weights_repeat_positions(with_labels, reduction):
    """Weight 3 is the position three times, weight 0 is none of it: loss, gradient and denominator."""
    student, teacher = (side.flatten(0, 1).detach().requires_grad_() for side in logits(3, 4, 20))
    labels = LABELS.flatten()
    counts = torch.tensor([1, 2, 0, 3, 1, 0, 2, 2, 4, 1, 1, 0])
    loss = DivergenceLoss("jensen_shannon", hard_label_weight=0.4 * with_labels, reduction=reduction)
    keywords = {"labels": labels} if with_labels else {}
    weighted = loss(student, teacher, weights=counts.float(), **keywords)
    repeated_keywords = {name: value.repeat_interleave(counts) for name, value in keywords.items()}
    repeated = loss(*(side.repeat_interleave(counts, 0) for side in (student, teacher)), **repeated_keywords)
    assert_same(weighted, repeated, student, teacher)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_zero_and_one_are_a_mask(reduction):
    sides = logits(3, 4, 20)
    mask = torch.arange(12).view(3, 4) % 3 != 1
    loss = DivergenceLoss("jeffreys", hard_label_weight=0.5, reduction=reduction)
    by_mask = loss(*sides, labels=LABELS, mask=mask)
    assert_same(loss(*sides, labels=LABELS, mask=torch.ones(3, 4), weights=mask.double()), by_mask, *sides)
    assert_same(loss(*sides, labels=LABELS, mask=mask.float()), by_mask, *sides)
    assert_same(loss(*sides, labels=LABELS, mask=mask, weights=torch.ones(3, 4)), by_mask, *sides)


def test_weights_of_the_trials():
    """Σ w·D of the positions, and that over Σ w also where this is below 1."""
    sides = logits(2, 4, 20)
    weights = torch.tensor([[1, 0.5, 0.1, 0], [0.25, 1, 1, 0.9]], dtype=torch.float64)
    each = DivergenceLoss("forward_kl", reduction="none")
    total = (each(*sides) * weights).sum()
    assert_same(each(*sides, weights=weights).sum(), total, *sides)
    assert_same(DivergenceLoss("forward_kl", reduction="sum")(*sides, weights=weights), total, *sides)
    mean = DivergenceLoss("forward_kl")
    assert_same(mean(*sides, weights=weights), total / 4.75, *sides)
    assert_same(mean(*sides, weights=weights / 100), total / 4.75, *sides)
    for num_items in (0.5, torch.tensor(0.5)):
        assert_same(mean(*sides, weights=weights / 100, num_items=num_items), total / 50, *sides)
    first_row = torch.tensor([[1], [0]]).expand(2, 4)
    expected = (each(*sides) * weights)[0].sum() / 1.6
    assert_same(mean(*sides, weights=weights, mask=first_row), expected, *sides)


def test_weights_have_gradients():
    sides = logits(2, 4, 20)
    weights = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    each = DivergenceLoss("forward_kl", reduction="none")(*sides).detach()
    actual = DivergenceLoss("forward_kl")(*sides, weights=weights)
    torch.testing.assert_close(actual, (each * weights).sum() / weights.sum())
    (gradient,) = torch.autograd.grad(actual, weights)
    torch.testing.assert_close(gradient, (each - actual.detach()) / weights.detach().sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_position_of_weight_zero_is_not_read(reduction):
    weights = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 0.0, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    sides = logits(3, 4, 20)
    poisoned = [side.detach().clone().requires_grad_() for side in sides]
    with torch.no_grad():
        poisoned[0][weights == 0] = torch.nan
        poisoned[1][weights == 0] = torch.inf
    loss = DivergenceLoss({"forward_kl": 1.0, "jensen_shannon": 2.0}, hard_label_weight=0.2, reduction=reduction)
    expected, actual = (loss(*pair, labels=LABELS, weights=weights) for pair in (sides, poisoned))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    gradients = (torch.autograd.grad(v.sum(), s) for v, s in ((actual, poisoned), (expected, sides)))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("num_items", [None, 0, 7])
def test_weights_that_leave_nothing_give_zero_with_a_graph(num_items):
    student, teacher = logits(3, 4, 20)
    value = DivergenceLoss("forward_kl")(student, teacher, weights=torch.zeros(3, 4), num_items=num_items)
    value.backward()
    assert value.item() == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_labels_are_torchs(smoothing, reduction):
    """Ignored labels count nowhere; every weight of the denominator is 1 there too."""
    student, teacher = logits(3, 4, 20)
    settings = {"label_smoothing": smoothing, "reduction": reduction}
    actual = DivergenceLoss("jeffreys", hard_label_weight=1.0, **settings)(student, teacher, labels=LABELS)
    expected = torch.nn.CrossEntropyLoss(ignore_index=IGNORED, **settings)(student.movedim(-1, 1), LABELS)
    assert_same(actual, expected, student)


def test_smoothing_spreads_over_the_shared_vocabulary():
    student, teacher = logits(3, 4, 20)
    with torch.no_grad():
        student[0, 0, 15] = -torch.inf  # padding of the student's: no part of the loss
    loss = DivergenceLoss("jeffreys", hard_label_weight=1.0, label_smoothing=0.2, shared_vocab=12)
    expected = F.cross_entropy(student[..., :12].movedim(-1, 1), LABELS, label_smoothing=0.2)
    assert_same(loss(student, teacher, labels=LABELS), expected, student)


@each_fast_implementation
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_whose_top_k(whose, impl):
    sides = [side.detach().to(DEVICE).requires_grad_() for side in logits(3, 4, 20, dtype=torch.float32)]
    chosen = sides[whose == "teacher"]
    dense = torch.zeros_like(chosen, dtype=torch.bool).scatter_(-1, chosen.topk(3).indices, True)
    actual = DivergenceLoss("forward_kl", top_k=3, top_k_of=whose, reduction="none", impl=impl)(*sides)
    expected = divergences.kl_divergence(*sides, dense)
    assert_same(actual, expected, *sides, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(actual, DivergenceLoss("forward_kl", top_k=3, reduction="none")(*sides))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [None, torch.linspace(0, 2, 12).view(3, 4)])
def test_components(weights, reduction):
    """The parts without their factors, reduced as the loss is, without a graph; only those that the loss has."""
    sides, keywords = logits(3, 4, 20), {"labels": LABELS, "weights": weights}
    settings = {"temperature": 2.0, "scale_by_temperature_squared": True, "reduction": reduction}
    both = DivergenceLoss("forward_kl", hard_label_weight=0.3, **settings)
    assert both.components == {}
    value = both(*sides, **keywords)
    assert set(both.components) == {"soft", "hard"}
    for name, weight in (("soft", 0.0), ("hard", 1.0)):
        alone = DivergenceLoss("forward_kl", hard_label_weight=weight, **settings)
        part = alone(*sides, **keywords)
        assert set(alone.components) == {name}
        torch.testing.assert_close(both.components[name], part.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(alone.components[name], part.detach(), rtol=0, atol=0)
        assert not both.components[name].requires_grad
        assert not alone.components[name].requires_grad
    combined = 0.7 * both.components["soft"] + 0.3 * both.components["hard"]
    torch.testing.assert_close(combined, value.detach(), rtol=1e-12, atol=0)


def test_components_are_of_the_last_call_and_of_one_module():
    student, teacher = logits(3, 4, 20)
    loss = DivergenceLoss("forward_kl", hard_label_weight=0.3)
    loss(student, teacher, labels=LABELS)
    kept = loss.components
    values = {name: value.clone() for name, value in kept.items()}
    loss(student * 2, teacher, labels=LABELS)
    assert all((kept[name] == values[name]).all() for name in values)
    assert not torch.allclose(kept["soft"], loss.components["soft"])
    for other in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.components == {}
        torch.testing.assert_close(other(student, teacher, labels=LABELS), loss(student, teacher, labels=LABELS))
    replica = loss._replicate_for_data_parallel()
    mine = loss.components
    replica(student * 3, teacher, labels=LABELS)
    assert loss.components is mine


def test_components_of_a_compiled_step():
    """One graph without a break, and the eager parts at every call."""
    loss = DivergenceLoss({"forward_kl": 1.0, "reverse_kl": 0.5}, hard_label_weight=0.3, label_smoothing=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        sides = logits(3, 4, 20, seed=seed)
        keywords = {"labels": LABELS, "mask": torch.ones(3, 4), "weights": torch.linspace(0, 1, 12).view(3, 4)}
        expected = loss(*sides, **keywords)
        parts = loss.components
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            assert_same(compiled(*sides, **keywords), expected, *sides)
        for name, part in parts.items():
            torch.testing.assert_close(loss.components[name], part, rtol=1e-12, atol=0)
            assert not loss.components[name].requires_grad


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    loss = DivergenceLoss({"forward_kl": 1.0, "jeffreys": 0.5}, hard_label_weight=0.3, top_k=5, top_k_of="teacher")
    sides = [side.detach() for side in logits(3, 4, 20)]
    keywords = {"labels": LABELS, "weights": torch.linspace(0, 1, 12).view(3, 4)}
    program = torch.export.export(loss, tuple(sides), keywords, strict=strict)
    torch.testing.assert_close(program.module()(*sides, **keywords), loss(*sides, **keywords))


def test_the_order_of_arguments_cannot_be_mistaken():
    student, teacher = logits(3, 4, 20)
    loss = DivergenceLoss("forward_kl")
    for argument in (LABELS, torch.ones(3, 4)):
        with pytest.raises(TypeError, match="positional argument"):
            loss(student, teacher, argument)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, ""),
        ({"beta": 0.5, "support": "tail", "reduction": "mean"}, ""),
        ({"beta": 0.25}, ", beta=0.25"),
        (
            {"top_k": 7, "top_k_of": "teacher", "support": "truncate", "temperature": 2.0, "beta": 0},
            ", top_k=7, top_k_of='teacher', support='truncate', temperature=2.0, beta=0.0",
        ),
        (
            {"scale_by_temperature_squared": True, "hard_label_weight": 0.5, "label_smoothing": 0.1, "ignore_index": 0},
            ", scale_by_temperature_squared=True, hard_label_weight=0.5, label_smoothing=0.1, ignore_index=0",
        ),
        (
            {"shared_vocab": 9, "reduction": "sum", "max_chunk_bytes": 4096, "impl": "torch"},
            ", shared_vocab=9, reduction='sum', max_chunk_bytes=4096, impl='torch'",
        ),
    ],
)
def test_repr_shows_what_is_not_at_its_default(settings, shown):
    loss = DivergenceLoss("jensen_shannon", **settings)
    assert repr(loss) == f"DivergenceLoss('jensen_shannon'{shown})"
    again = eval(repr(loss))  # what is shown makes the same loss
    assert repr(again) == repr(loss)
    kinds = {"skew_forward_kl": 1.0, "jensen_shannon": 0.5}
    assert repr(DivergenceLoss(kinds, skew=0.3)) == f"DivergenceLoss({kinds}, skew=0.3)"


def test_every_setting_is_shown():
    """No setting is forgotten when one is added."""
    loss = DivergenceLoss("jensen_shannon")
    for name in list(inspect.signature(DivergenceLoss).parameters)[1:]:
        setattr(loss, name, "changed")
        assert f"{name}='changed'" in loss.extra_repr()
