"""The registered operator of linear sides: PyTorch's duties, products, kept memory, peak memory, what is refused."""

import gc

import pytest
import torch
from torch import Tensor

import sgfast
from sgfast import DivergenceLoss, LinearLogits, divergences
from sgfast.ops.linear import operation
from sgfast.ops.linear.operation import linear_loss
from sgfast.ops.linear.operator import forward
from tests import registration
from tests.live_bytes import LiveBytes
from tests.ops.linear.heads import random_head

KINDS = ("jensen_shannon", "forward_kl")


def case_arguments(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states of both sides with NaN in masked rows, two heads with a bias, and a mask."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.arange(rows) % 3 != 1
    noisy, clean = normal(rows, 4), normal(rows, 3)
    noisy[~mask] = clean[~mask] = torch.nan
    return noisy, clean, mask


def heads_of(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shapes = ((11, 4), (11,), (11, 3), (11,))
    sizes = (44, 11, 33, 11)
    numbers = [torch.arange(size, device=device, dtype=dtype) * (7 + i) for i, size in enumerate(sizes)]
    return [one.sin().view(shape) for one, shape in zip(numbers, shapes, strict=True)]


def sides_of(noisy: Tensor, clean: Tensor) -> tuple[LinearLogits, LinearLogits]:
    weight, bias, clean_weight, clean_bias = heads_of(noisy.dtype, noisy.device)
    student = LinearLogits(noisy, weight, bias, scale=1.5, softcap=3.0)
    return student, LinearLogits(clean, clean_weight, clean_bias)


def two_kinds(noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    return torch.stack(list(divergences(*sides_of(noisy, clean), KINDS, mask=mask).values()))


def one_kind(noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    return divergences(*sides_of(noisy, clean), "jeffreys", mask=mask)["jeffreys"]


def mean_loss(noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    return DivergenceLoss("reverse_kl")(*sides_of(noisy, clean), mask=mask)


@registration.each_check(
    [
        registration.Case(function.__name__, function, case_arguments, double_backward=False)
        for function in (two_kinds, one_kind, mean_loss)
    ]
)
def test_registration(check, case):
    check(case)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_heads_in_a_compiled_graph(tied):
    """A training step through torch.compile: the heads' gradients too, in one graph, for two numbers of rows."""

    def step(hidden: Tensor, other: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
        student = LinearLogits(hidden, weight, bias)
        side = LinearLogits(other, weight, bias) if tied else LinearLogits(other, teacher)
        return DivergenceLoss("forward_kl", reduction="sum")(student, side)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 7):
        head, other = random_head(rows, 4, 11, seed=rows), random_head(rows, 4, 11, seed=2)
        leaves = [*head.tensors(), other.hidden]
        found, want = (
            torch.autograd.grad(function(head.hidden, other.hidden, head.weight, head.bias, other.weight), leaves)
            for function in (compiled, step)
        )
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_gradients_of_everything_in_float64():
    tensors = [
        one.detach().double().requires_grad_() for head in (1, 2) for one in random_head(3, 4, 7, head).tensors()
    ]

    def of_values(noisy, weight, bias, clean, clean_weight, clean_bias):
        sides = LinearLogits(noisy, weight, bias, scale=2.0, softcap=3.0), LinearLogits(clean, clean_weight, clean_bias)
        return torch.stack(list(divergences(*sides, sgfast.ops.divergence.kinds.KINDS).values()))

    def of_loss(weights, noisy, weight, bias, clean, clean_weight, clean_bias):
        sides = LinearLogits(noisy, weight, bias, scale=2.0, softcap=3.0), LinearLogits(clean, clean_weight, clean_bias)
        factors = {"jeffreys": 0.3, "total_variation": 0.7}
        return linear_loss(*sides, factors, reduction="sum", row_weights=weights)[0]

    def of_tied(noisy, weight, bias, clean):
        sides = LinearLogits(noisy, weight, bias), LinearLogits(clean, weight, bias)
        return linear_loss(*sides, {"jensen_shannon": 1.0}, reduction="sum")[0]

    assert torch.autograd.gradcheck(of_values, tensors)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_loss, (weights, *tensors))
    assert torch.autograd.gradcheck(of_tied, tensors[:4])


class Products:
    """Counts the pairs of numbers that matrix products multiply, also inside of an operator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("mm", "addmm"):
            monkeypatch.setattr(torch, name, self._counting(getattr(torch, name)))

    def _counting(self, product):
        def run(*matrices: Tensor, **options) -> Tensor:
            left, right = matrices[-2:]
            self.count += left.numel() * right.shape[1]
            return product(*matrices, **options)

        return run


@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("head", "products"), [("trained", 4), ("frozen", 3), ("shared and frozen", 3), ("shared and trained", 4)]
)
def test_products_of_a_training_step(monkeypatch, head, products, reduction, kind):
    """2 forward, 1 for the hidden states, 1 for a trained head; `none` with a trained head recomputes both."""
    rows, width, vocabulary = 12, 8, 300
    student, teacher = random_head(rows, width, vocabulary, 1), random_head(rows, width, vocabulary, 2)
    weight = student.weight.detach().requires_grad_("trained" in head)
    other = weight.detach() if "shared" in head else teacher.weight.detach()
    sides = LinearLogits(student.hidden, weight), LinearLogits(teacher.hidden.detach(), other)
    loss = DivergenceLoss(kind, reduction=reduction, max_chunk_bytes=20_000)
    counted = Products(monkeypatch)
    loss(*sides).sum().backward()
    again = 2 if reduction == "none" and "trained" in head else 0
    assert counted.count == (products + again) * rows * width * vocabulary


def test_masked_rows_are_removed_before_the_product(monkeypatch):
    student, teacher = random_head(12, 8, 300, 1), random_head(12, 8, 300, 2)
    labels = torch.full((12,), -100)
    labels[3:5] = 7
    counted = Products(monkeypatch)
    with torch.no_grad():
        DivergenceLoss("forward_kl")(student.side(), teacher.side(), labels=labels)
    assert counted.count == 2 * 2 * 8 * 300


def kept_bytes(function, inputs) -> int:
    """The bytes that a graph keeps beyond the inputs."""
    given, kept = {one.untyped_storage().data_ptr() for one in inputs}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def test_nothing_per_logit_is_kept_for_backward():
    """Values keep a few scalars; a loss keeps the gradients it has made, of the inputs' sizes."""
    student, teacher = random_head(16, 8, 5000, 1), random_head(16, 8, 5000, 2)
    inputs = [*student.tensors(), *teacher.tensors()]
    small = 16 * 64
    assert kept_bytes(lambda: divergences(student.side(), teacher.side(), KINDS), inputs) <= small
    frozen = [head._replace(weight=head.weight.detach(), bias=None) for head in (student, teacher)]
    frozen_inputs = [one for head in frozen for one in head.tensors()]
    gradients = sum(head.hidden.nbytes for head in frozen)
    for reduction in ("mean", "none"):
        loss = DivergenceLoss("jeffreys", reduction=reduction)
        found = kept_bytes(lambda loss=loss: loss(frozen[0].side(), frozen[1].side()), frozen_inputs)
        assert gradients <= found <= gradients + small
    gradients = sum(one.nbytes for one in inputs)
    found = kept_bytes(lambda: DivergenceLoss("jeffreys")(student.side(), teacher.side()), inputs)
    assert gradients <= found <= gradients + small


@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("head", ["frozen", "trained", "shared", "bfloat16", "beside logits", "capped"])
@pytest.mark.parametrize("masked", [False, True])
def test_peak_memory_is_inputs_gradients_and_a_chunk(monkeypatch, head, top_k, masked):
    """Beyond inputs and gradients at most the bound and 5 %, and the float32 sum of a 16-bit head's gradient."""
    bound, rows, width, vocabulary = 2**21, 96, 24, 8000
    dtype = torch.bfloat16 if head == "bfloat16" else torch.float32
    student = random_head(rows, width, vocabulary, 1, dtype, bias=False, softcap=5.0 if head == "capped" else None)
    teacher = random_head(rows, width, vocabulary, 2, dtype, bias=False)
    if head == "frozen":
        student = student._replace(weight=student.weight.detach())
    teacher = teacher._replace(
        hidden=teacher.hidden.detach(), weight=student.weight.detach() if head == "shared" else teacher.weight.detach()
    )
    clean = torch.randn(rows, vocabulary) if head == "beside logits" else teacher.side()
    mask = torch.arange(rows) % 3 != 0 if masked else None
    monkeypatch.setattr("sgfast.ops.rows.keep_freed_memory", lambda size: None)  # nobody writes to that block
    asked = []
    monkeypatch.setattr(operation, "forward", lambda problem: (asked.append(problem), forward(problem))[1])
    DivergenceLoss("jensen_shannon", top_k=top_k, max_chunk_bytes=bound)(student.side(), clean, mask=mask)
    gc.collect()
    with torch.no_grad(), LiveBytes() as counted:
        outputs = forward.implementation(asked[0])
    gradients = sum(one.nbytes for one in outputs[2:])
    wanted = [one for one in student.tensors() if one.requires_grad]
    assert gradients == sum(one.numel() * (4 if one is student.weight else one.element_size()) for one in wanted)
    assert counted.peak <= gradients + 1.05 * bound


def test_a_second_backward_is_refused():
    student, teacher = random_head(3, 4, 11, 1), random_head(3, 4, 11, 2)
    for function in (
        lambda: divergences(student.side(), teacher.side(), KINDS)["forward_kl"].sum(),
        lambda: DivergenceLoss("forward_kl")(student.side(), teacher.side()),
    ):
        (gradient,) = torch.autograd.grad(function(), student.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward; compute the logits"):
            gradient.sum().backward()


def test_forward_mode_is_refused():
    student, teacher = random_head(3, 4, 11, 1), random_head(3, 4, 11, 2)
    weight = student.weight.detach()

    def of_weight(one: Tensor) -> Tensor:
        return divergences(LinearLogits(student.hidden.detach(), one), teacher.side(), "jeffreys")["jeffreys"]

    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(of_weight, (weight,), (weight,))


def test_a_retained_graph_gives_the_same_gradient_twice():
    """Kept gradients are multiplied in place only where the graph is freed."""
    student, teacher = random_head(5, 4, 11, 1), random_head(5, 4, 11, 2)
    loss = DivergenceLoss("jeffreys")(student.side(), teacher.side()) * 3
    leaves = student.tensors()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    last = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, last, rtol=1e-6, atol=0)


def test_autocast_and_coarse_products_do_not_change_the_result():
    student, teacher = random_head(5, 16, 110, 1), random_head(5, 16, 110, 2)
    want = divergences(student.side(), teacher.side(), "jeffreys")["jeffreys"]
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            found = divergences(student.side(), teacher.side(), "jeffreys")["jeffreys"]
            torch.testing.assert_close(found, want, rtol=0, atol=0)
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before


def test_inputs_are_never_written_to():
    student, teacher = random_head(5, 16, 110, 1), random_head(5, 16, 110, 2)
    logits = torch.randn(5, 110).requires_grad_()
    inputs = [*student.tensors(), *teacher.tensors(), logits]
    copies = [one.detach().clone() for one in inputs]
    for clean in (teacher.side(), logits):
        DivergenceLoss("jeffreys", hard_label_weight=0.5)(student.side(), clean, labels=torch.arange(5)).backward()
    for one, copy in zip(inputs, copies, strict=True):
        assert torch.equal(one.detach(), copy)


def test_explain_says_what_runs():
    student = random_head(5, 16, 110, 1)
    assert sgfast.explain(divergences, student.side(), student.side(), "jeffreys").implementation == "torch"
    assert sgfast.explain(divergences, student.side(), student.side(), "jeffreys", impl="compile").implementation == (
        "compile"
    )
    with pytest.raises(RuntimeError, match="cpu tensors"):
        sgfast.explain(divergences, student.side(), student.side(), "jeffreys", impl="triton")
