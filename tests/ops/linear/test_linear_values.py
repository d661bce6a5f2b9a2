"""Divergences of linear sides against float64: every kind, support, dtype and shape of a head."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from sgfast import LinearLogits, divergences
from sgfast.ops.divergence.kinds import KINDS
from sgfast.ops.linear.operation import linear_loss
from tests.implementations import DEVICE, RUNS_TRITON, each_fast_implementation
from tests.ops.linear.heads import Head, error, expected, random_head

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-12}
SMALL = 12_000  # bytes: a few rows at a time


def check(kinds, noisy: Head, clean: Head, impl, rounding, **options):
    """Values and all gradients of a weighted sum of one kind after the other."""
    rows = len(noisy.hidden)
    upstream = torch.linspace(0.5, 2, rows, device=DEVICE)
    values = divergences(noisy.side(), clean.side(), kinds, impl=impl, max_chunk_bytes=SMALL, **options)
    for kind in kinds:
        want = expected(kind, noisy, clean, upstream, **options)
        torch.testing.assert_close(values[kind].double().cpu(), want.values, rtol=1e-5, atol=1e-6)
        leaves = [*noisy.tensors(), *clean.tensors()]
        found = torch.autograd.grad((values[kind] * upstream).sum(), leaves, retain_graph=True)
        for gradient, right in zip(found, [*want.gradients[0], *want.gradients[1]], strict=True):
            assert error(gradient, right) <= rounding, kind


@each_fast_implementation
@pytest.mark.parametrize("support", [None, "tail"] if RUNS_TRITON else [None, "truncate", "renormalize", "tail"])
def test_every_kind_and_support(impl, support):
    """Widths, scales and soft caps of the sides differ; masked rows hold NaN."""
    noisy = random_head(9, 12, 301, seed=1, scale=1.3, softcap=4.0)
    clean = random_head(9, 7, 301, seed=2)
    mask = torch.arange(9, device=DEVICE) % 3 != 1
    options = {} if support is None else {"top_k": 6, "support": support}
    with torch.no_grad():
        noisy.hidden[~mask] = torch.nan
    clean_rows = noisy._replace(hidden=noisy.hidden.detach().nan_to_num(0.0).requires_grad_())
    kinds = KINDS[::2] if RUNS_TRITON else KINDS
    upstream = torch.linspace(0.5, 2, 9, device=DEVICE)
    values = divergences(noisy.side(), clean.side(), kinds, impl=impl, mask=mask, max_chunk_bytes=SMALL, **options)
    for kind in kinds:
        want = expected(kind, clean_rows, clean, upstream, mask=mask, **options)
        torch.testing.assert_close(values[kind].double().cpu(), want.values, rtol=1e-5, atol=5e-7)
        leaves = [*noisy.tensors(), *clean.tensors()]
        found = torch.autograd.grad((values[kind] * upstream).sum(), leaves, retain_graph=True)
        assert (found[0][~mask] == 0).all()
        for gradient, right in zip(found, [*want.gradients[0], *want.gradients[1]], strict=True):
            assert error(gradient, right) <= 1e-5, kind


@each_fast_implementation
def test_labels_beside_kinds_at_another_temperature(impl):
    noisy, clean = random_head(8, 12, 301, seed=1), random_head(8, 12, 301, seed=2, bias=False)
    labels = torch.tensor([3, -100, 300, 0, 7, 7, -1, 12], device=DEVICE)
    values = divergences(noisy.side(), clean.side(), "jeffreys", labels=labels, temperature=2.0, impl=impl)
    logits = noisy.hidden.double() @ noisy.weight.double().T + noisy.bias.double()
    want = cross_entropy(logits, labels.clamp(min=-1), ignore_index=-1, reduction="none")
    torch.testing.assert_close(values["label_cross_entropy"].double(), want.detach(), rtol=1e-5, atol=1e-6)
    leaves = noisy.tensors()
    right = torch.autograd.grad(want.sum(), leaves)
    found = torch.autograd.grad(values["label_cross_entropy"].sum(), leaves, retain_graph=True)
    for gradient, one in zip(found, right, strict=True):
        assert error(gradient, one.cpu().double()) <= 1e-5
    soft = expected("jeffreys", noisy, clean, torch.ones(8), temperature=2.0)
    torch.testing.assert_close(values["jeffreys"].double().cpu(), soft.values, rtol=1e-5, atol=5e-7)


@each_fast_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(impl, dtype):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    noisy = random_head(6, 16, 150, seed=1, dtype=dtype, scale=0.5)
    clean = random_head(6, 16, 150, seed=2, dtype=dtype)
    check(["forward_kl", "jensen_shannon"], noisy, clean, impl, 1.5 * ROUNDING[dtype])


def test_sides_of_different_dtypes():
    """A float32 student beside a bfloat16 teacher, and bfloat16 hidden states with a float32 head."""
    noisy, clean = random_head(6, 16, 150, seed=1), random_head(6, 8, 150, seed=2, dtype=torch.bfloat16)
    check(["reverse_kl"], noisy, clean, "torch", 4e-3)
    mixed = clean._replace(weight=clean.weight.detach().float().requires_grad_())
    check(["reverse_kl"], noisy, mixed, "torch", 4e-3)


def test_a_temperature_for_each_side_and_row():
    noisy, clean = random_head(6, 16, 150, seed=1), random_head(6, 8, 150, seed=2)
    temperature = (torch.linspace(0.5, 2, 6), 1.7)
    check(["forward_kl", "squared_hellinger"], noisy, clean, "torch", 1e-5, temperature=temperature)
    tied = clean._replace(hidden=(clean.hidden + 0.1).detach().requires_grad_())
    values = divergences(clean.side(), tied.side(), "forward_kl", temperature=temperature)["forward_kl"]
    want = expected("forward_kl", clean, tied, torch.ones(6), temperature=temperature)
    torch.testing.assert_close(values.double(), want.values, rtol=1e-5, atol=5e-7)


@each_fast_implementation
def test_logits_on_one_side(impl):
    """Logits (..., V) beside a linear side, either way round, with leading dimensions and a broken stride."""
    head = random_head(6, 16, 150, seed=1)
    student = LinearLogits(head.hidden.view(2, 3, 16), head.weight, head.bias)
    wide = torch.randn(2, 4, 150, device=DEVICE)
    given = wide[:, 1:].detach().requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, True]], device=DEVICE)
    with torch.no_grad():
        logits = (head.hidden @ head.weight.T + head.bias).view(2, 3, 150)
    dense = logits.requires_grad_()
    for sides, like in (((student, given), (dense, given)), ((given, student), (given, dense))):
        for chosen in (None, mask):
            values = divergences(*sides, "jensen_shannon", impl=impl, mask=chosen, max_chunk_bytes=5000)
            want = divergences(*like, "jensen_shannon", impl="torch", mask=chosen)
            torch.testing.assert_close(values, want, rtol=1e-5, atol=5e-7)
            (found,) = torch.autograd.grad(values["jensen_shannon"].sum(), given)
            (right,) = torch.autograd.grad(want["jensen_shannon"].sum(), given)
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)


def test_a_support_mask():
    from sgfast.loss.divergences import jeffreys_divergence

    noisy, clean = random_head(6, 16, 150, seed=1), random_head(6, 8, 150, seed=2)
    support_mask = torch.rand(6, 150) < 0.2
    support_mask[2] = False
    dense = [head.hidden @ head.weight.T + head.bias for head in (noisy, clean)]
    for support in ("tail", "truncate", "renormalize"):
        values = jeffreys_divergence(noisy.side(), clean.side(), support_mask, support=support)
        want = jeffreys_divergence(*dense, support_mask, support=support)
        torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-6)
        assert values[2] == 0
        found, right = (torch.autograd.grad(one.sum(), noisy.hidden, retain_graph=True)[0] for one in (values, want))
        assert error(found, right.double()) < 1e-5


def test_bias_of_minus_infinity_leaves_a_column_out():
    noisy, clean = random_head(5, 8, 60, seed=1), random_head(5, 8, 60, seed=2)
    shorter = [head._replace(weight=head.weight[:50], bias=head.bias[:50]) for head in (noisy, clean)]
    with torch.no_grad():
        noisy.bias[50:] = clean.bias[50:] = -torch.inf
    for pair, short in (((noisy, clean), shorter), ((noisy, noisy._replace(hidden=clean.hidden)), None)):
        values = divergences(pair[0].side(), pair[1].side(), KINDS)
        gradients = torch.autograd.grad(sum(values.values()).sum(), pair[0].tensors())
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[1][50:] == 0).all()
        if short:
            torch.testing.assert_close(values, divergences(short[0].side(), short[1].side(), KINDS))


@pytest.mark.parametrize("count", [0, 1])
def test_no_row_and_one_row(count):
    noisy, clean = random_head(count, 8, 60, seed=1), random_head(count, 8, 60, seed=2)
    values = divergences(noisy.side(), clean.side(), KINDS, labels=torch.zeros(count, dtype=torch.int64))
    assert all(value.shape == (count,) for value in values.values())
    gradients = torch.autograd.grad(sum(values.values()).sum(), [*noisy.tensors(), *clean.tensors()])
    assert [gradient.shape for gradient in gradients] == [
        tensor.shape for tensor in (*noisy.tensors(), *clean.tensors())
    ]
    assert all(bool((gradient != 0).any()) == bool(count) for gradient in gradients)
    vector = LinearLogits(torch.ones(8), torch.eye(8))
    assert divergences(vector, vector, "jeffreys")["jeffreys"].shape == ()


def near(kl: float, dtype: torch.dtype, rows: int) -> tuple[Head, Head]:
    """Two sides with one frozen head whose forward KL is about ``kl``."""
    head = random_head(rows, 64, 4000, seed=3, dtype=dtype, bias=False)
    weight = (head.weight.detach().float() / 4).to(dtype)
    clean = head.hidden.detach()
    step = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    noisy = (clean.float() + step * (kl / 2) ** 0.5).to(dtype)
    return Head(noisy.requires_grad_(), weight), Head(clean.clone().requires_grad_(), weight)


@pytest.mark.skipif(RUNS_TRITON, reason="one case by the kernels")
def test_compiled_chunks():
    """Gradients where the logits were, and through a soft cap in a place of their own; masked, in several chunks."""
    noisy, clean = random_head(9, 12, 301, seed=1), random_head(9, 7, 301, seed=2, bias=False, softcap=4.0)
    mask, leaves = torch.arange(9) % 3 != 1, [*noisy.tensors(), *clean.tensors()]
    results = []
    for impl in ("torch", "compile"):
        loss, values = linear_loss(
            noisy.side(),
            clean.side(),
            {"forward_kl": 1.0},
            reduction="sum",
            mask=mask,
            impl=impl,
            max_chunk_bytes=20_000,
        )
        results.append((values, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@each_fast_implementation
@pytest.mark.parametrize("kind", ["jensen_shannon"] if RUNS_TRITON else ["forward_kl", "jensen_shannon", "reverse_kl"])
@pytest.mark.parametrize(("kl", "dtype"), [(1e-6, torch.float32), (5e-3, torch.float32), (5e-3, torch.bfloat16)])
def test_a_shared_head_near_equality(impl, kind, kl, dtype):
    noisy, clean = near(kl, dtype, rows=8)
    loss, values = linear_loss(
        noisy.side(), clean.side(), {kind: 1.0}, reduction="sum", impl=impl, max_chunk_bytes=10**6
    )
    want = expected(kind, noisy, clean, torch.ones(8))
    relative = (values[kind].double().cpu() / want.values - 1).abs()
    # Rounded to float32, the logits leave the kernels an error of their own.
    assert relative.median() <= (2e-5 if impl == "torch" else 1e-3)
    found = torch.autograd.grad(loss, [noisy.hidden, clean.hidden])
    bound = 6e-3 if dtype == torch.bfloat16 else 1e-5 if impl == "torch" else 1e-3
    for gradient, right in zip(found, (want.gradients[0][0], want.gradients[1][0]), strict=True):
        assert error(gradient, right) <= bound


def test_a_shared_head_at_a_tiny_divergence_in_bfloat16():
    """Where rounded logits are far off, values are within 1 % (median) and gradients within 0.6 %."""
    noisy, clean = near(4e-6, torch.bfloat16, rows=64)
    with torch.no_grad():
        # Most features are equal; the rest differ by one unit of bfloat16's last place.
        step = torch.randn(clean.hidden.shape, generator=torch.Generator().manual_seed(5)) < -1.9
        noisy.hidden.copy_(torch.where(step, clean.hidden * (1 + 2**-7), clean.hidden))
    want = expected("forward_kl", noisy, clean, torch.ones(64))
    assert 1e-7 < want.values.median() < 2e-4
    loss, values = linear_loss(noisy.side(), clean.side(), {"forward_kl": 1.0}, reduction="sum")
    some = want.values > 0
    assert (values["forward_kl"].double()[some] / want.values[some] - 1).abs().median() <= 0.01
    (found,) = torch.autograd.grad(loss, noisy.hidden)
    assert error(found, want.gradients[0][0]) <= 6e-3
    rounded = [(head.hidden @ head.weight.T).detach() for head in (noisy, clean)]
    dense = divergences(*rounded, "forward_kl")["forward_kl"].double()
    assert (dense[some] / want.values[some] - 1).abs().median() > 1


def test_equal_sides_give_exactly_zero():
    head = random_head(6, 16, 150, seed=1, dtype=torch.bfloat16)
    same = head._replace(hidden=head.hidden.detach().clone().requires_grad_())
    values = divergences(head.side(), same.side(), [kind for kind in KINDS if kind != "cross_entropy"])
    assert all((value == 0).all() for value in values.values())
    for gradient in torch.autograd.grad(sum(values.values()).sum(), [head.hidden, same.hidden, head.weight]):
        assert (gradient == 0).all()


@pytest.mark.parametrize("weight", ["tied", "detached"])
def test_tied_weights_get_the_gradients_of_both_sides(weight):
    """A teacher with the student's own weight is trained through both; with ``weight.detach()`` through one."""
    head = random_head(6, 16, 150, seed=1)
    other = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    own = head.weight if weight == "tied" else head.weight.detach()
    bias = head.bias if weight == "tied" else head.bias.detach()
    upstream = torch.linspace(0.5, 2, 6)
    want = expected("jensen_shannon", head, head._replace(hidden=other), upstream)
    loss, _ = linear_loss(
        head.side(),
        LinearLogits(other, own, bias),
        {"jensen_shannon": 1.0},
        reduction="sum",
        row_weights=upstream,
    )
    found = torch.autograd.grad(loss, [head.hidden, other, head.weight, head.bias])
    both = weight == "tied"
    right = [
        want.gradients[0][0],
        want.gradients[1][0],
        *(want.gradients[0][i] + both * want.gradients[1][i] for i in (1, 2)),
    ]
    for gradient, one in zip(found, right, strict=True):
        assert error(gradient, one) <= 1e-5


def test_chunks_do_not_change_the_result():
    noisy, clean = random_head(17, 12, 301, seed=1), random_head(17, 7, 301, seed=2)
    results = []
    for bound in (1, 20_000, 10**8):
        values = divergences(noisy.side(), clean.side(), "reverse_kl", max_chunk_bytes=bound)["reverse_kl"]
        results.append([values.detach(), *torch.autograd.grad(values.sum(), [*noisy.tensors(), *clean.tensors()])])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-6)
