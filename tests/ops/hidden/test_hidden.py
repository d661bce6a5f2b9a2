import itertools

import pytest
import torch
from torch import Tensor

import sgfast
from sgfast.ops import HiddenDistances, dispatch, hidden_distances
from tests import registration
from tests.implementations import DEVICE, each_implementation

# Norm-wise error of a gradient row: one rounding to its dtype; float32 adds a few of arithmetic.
EPSILON = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def pair(*shape: int, dtype: torch.dtype = torch.float32, noise: float | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    clean = torch.randn(*shape, generator=generator, dtype=torch.float64)
    other = torch.randn(*shape, generator=generator, dtype=torch.float64)
    noisy = other if noise is None else clean + noise * other
    return noisy.to(dtype).to(DEVICE), clean.to(dtype).to(DEVICE)


def oracle(noisy: Tensor, clean: Tensor, eps: float = 1e-8) -> Tensor:
    """The definitions, word for word, in float64."""
    a, b = noisy.double(), clean.double()
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    l2 = (a - b).norm(dim=-1)
    return torch.stack([1 - cosine, l2, l2 / b.norm(dim=-1).clamp(min=eps), cosine])


def weights(values: Tensor) -> Tensor:
    return torch.linspace(-1, 2, values.numel(), dtype=torch.float64).view(values.shape).to(values)


def gradients(function, *sides: Tensor) -> tuple[Tensor, ...]:
    leaves = [side.detach().requires_grad_() for side in sides]
    values = function(*leaves)
    values = torch.stack(list(values)) if isinstance(values, tuple) else values
    return torch.autograd.grad((values * weights(values)).sum(), leaves)


def assert_rows_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Norm-wise, row by row."""
    error = (actual.double() - expected.double()).norm(dim=-1)
    assert (error <= tolerance * expected.double().norm(dim=-1) + 1e-30).all(), error.max()


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2, 16, 17, 255, 512, 513, 1543, 4097, 16384])
def test_values_and_gradients(impl, dtype, width):
    noisy, clean = pair(2, 3, width, dtype=dtype)
    if impl == "triton" and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="impl='triton' cannot run: noisy is float64"):
            hidden_distances(noisy, clean, impl=impl)
        return
    values = torch.stack(list(hidden_distances(noisy, clean, impl=impl)))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # torch.compile adds in sequence on a CPU, which costs a digit in the longest rows.
    bound = 2e-6 if impl == "compile" and width > 10_000 else 5e-7
    torch.testing.assert_close(values.double(), oracle(noisy, clean), rtol=1e-5, atol=bound)
    actual = gradients(lambda a, b: hidden_distances(a, b, impl=impl), noisy, clean)
    expected = gradients(oracle, noisy.double(), clean.double())
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        # At width 1 the cosine is constant and l2 / ‖b‖ cancels: rounding is measured against the terms, not the sum.
        assert_rows_close(one, other, (20 if width == 1 else 1) * EPSILON[dtype])


@each_implementation
def test_mixed_dtypes(impl):
    noisy, clean = pair(7, 64)[0].bfloat16(), pair(7, 64)[1]
    values = torch.stack(list(hidden_distances(noisy, clean, impl=impl)))
    torch.testing.assert_close(values.double(), oracle(noisy, clean), rtol=1e-5, atol=5e-7)
    of_noisy, of_clean = gradients(lambda a, b: hidden_distances(a, b, impl=impl), noisy, clean)
    assert (of_noisy.dtype, of_clean.dtype) == (torch.bfloat16, torch.float32)


@each_implementation
@pytest.mark.parametrize("ratio", [1e-6, 0.02, 1.5, 50.0, 1e6])
def test_digits_where_norms_are_far_apart(impl, ratio):
    noisy, clean = pair(64, 768)
    noisy = ratio * (noisy + clean)
    values = torch.stack(list(hidden_distances(noisy, clean, impl=impl))).double()
    torch.testing.assert_close(values, oracle(noisy, clean), rtol=1e-6, atol=5e-7)


@each_implementation
@pytest.mark.parametrize("noise", [0.05, 1e-2, 1e-3, 1e-4])
def test_digits_near_equality(impl, noise):
    noisy, clean = pair(5, 768, noise=noise)
    values = torch.stack(list(hidden_distances(noisy, clean, impl=impl))).double()
    expected = oracle(noisy, clean)
    # Distances of 5e-9 keep five digits; 1 − similarity would have none.
    torch.testing.assert_close(values[:3], expected[:3], rtol=1e-5, atol=0)
    for field in range(4):
        actual = gradients(lambda a, b, i=field: hidden_distances(a, b, impl=impl)[i], noisy, clean)
        wanted = gradients(lambda a, b, i=field: oracle(a, b)[i], noisy.double(), clean.double())
        for one, other in zip(actual, wanted, strict=True):
            assert_rows_close(one, other, 1e-5)


@each_implementation
def test_known_values(impl):
    a = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [1.0, 0.0]], device=DEVICE)
    b = torch.tensor([[3.0, 4.0], [6.0, 8.0], [-3.0, -4.0], [0.0, 2.0]], device=DEVICE)
    distances = hidden_distances(a, b, impl=impl)
    assert distances.cosine_distance.tolist() == pytest.approx([0, 0, 2, 1], abs=1e-7)
    assert distances.cosine_similarity.tolist() == pytest.approx([1, 1, -1, 0], abs=1e-7)
    assert distances.l2.tolist() == pytest.approx([0, 5, 10, 5**0.5])
    assert distances.normalized_l2.tolist() == pytest.approx([0, 0.5, 2, 5**0.5 / 2])


@each_implementation
def test_equal_rows_are_exactly_at_distance_zero(impl):
    clean = pair(4, 300)[1]
    distances = hidden_distances(clean, clean, impl=impl)
    assert distances.cosine_distance.eq(0).all()
    assert distances.l2.eq(0).all()
    assert distances.cosine_similarity.eq(1).all()
    for gradient in gradients(lambda a, b: hidden_distances(a, b, impl=impl), clean, clean.clone()):
        assert gradient.eq(0).all()


@each_implementation
def test_cosine_does_not_depend_on_scale_and_is_symmetric(impl):
    noisy, clean = pair(6, 200)
    distance = hidden_distances(noisy, clean, impl=impl).cosine_distance
    scaled = hidden_distances(8 * noisy, clean / 4, impl=impl).cosine_distance
    torch.testing.assert_close(scaled, distance)
    torch.testing.assert_close(hidden_distances(clean, noisy, impl=impl).cosine_distance, distance)
    assert distance.ge(0).all()
    assert distance.le(2).all()


@each_implementation
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-15])
def test_vanishing_rows(impl, scale):
    noisy, clean = pair(4, 32)
    noisy[0], clean[1] = noisy[0] * scale, clean[1] * scale
    noisy[2], clean[2] = noisy[2] * scale, clean[2] * scale
    distances = hidden_distances(noisy, clean, impl=impl)
    if scale < 1e-19:
        assert distances.cosine_distance[:3].tolist() == [1, 1, 1]
        assert distances.cosine_similarity[:3].tolist() == [0, 0, 0]
        both = gradients(lambda a, b: hidden_distances(a, b, impl=impl).cosine_distance, noisy, clean)
        assert all(gradient[:3].eq(0).all() and gradient[3].ne(0).all() for gradient in both)
    assert all(field.isfinite().all() for field in distances)
    both = gradients(lambda a, b: hidden_distances(a, b, impl=impl), noisy, clean)
    assert all(gradient.isfinite().all() for gradient in both)


@each_implementation
def test_eps_bounds_the_norm_of_clean(impl):
    noisy, clean = pair(3, 50)
    distances = hidden_distances(noisy, clean, eps=100.0, impl=impl)
    torch.testing.assert_close(distances.normalized_l2, distances.l2 / 100)
    actual = gradients(lambda a, b: hidden_distances(a, b, eps=100.0, impl=impl), noisy, clean)
    expected = gradients(lambda a, b: oracle(a, b, 100.0), noisy.double(), clean.double())
    for one, other in zip(actual, expected, strict=True):
        assert_rows_close(one, other, 1e-5)


@each_implementation
@pytest.mark.parametrize("width", [5, 700])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_rows_are_never_seen(impl, width, bad):
    noisy, clean = pair(3, 6, width)
    mask = torch.arange(18, device=DEVICE).view(3, 6) % 3 != 1
    mask[2] = False
    expected = hidden_distances(noisy, clean, impl=impl)
    expected_gradients = gradients(lambda a, b: torch.stack(hidden_distances(a, b, impl=impl)), noisy, clean)
    noisy[~mask], clean[~mask] = bad, bad
    values = hidden_distances(noisy, clean, mask, impl=impl)
    for one, other in zip(values, expected, strict=True):
        assert one[~mask].eq(0).all()
        torch.testing.assert_close(one[mask], other[mask])
    actual_gradients = gradients(lambda a, b: torch.stack(hidden_distances(a, b, mask, impl=impl)), noisy, clean)
    for one, other in zip(actual_gradients, expected_gradients, strict=True):
        assert one[~mask].eq(0).all()
        torch.testing.assert_close(one[mask], other[mask])


@each_implementation
def test_mask_of_integers(impl):
    noisy, clean = pair(4, 8)
    mask = torch.tensor([0, 1, 1, 0], device=DEVICE)
    for one, other in zip(
        hidden_distances(noisy, clean, mask, impl=impl),
        hidden_distances(noisy, clean, mask != 0, impl=impl),
        strict=True,
    ):
        assert one.equal(other)


@each_implementation
@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (3, 0, 7), (2, 1, 3, 7)])
def test_shapes(impl, shape):
    noisy, clean = pair(*shape)
    values = hidden_distances(noisy, clean, impl=impl)
    assert all(field.shape == shape[:-1] for field in values)
    torch.testing.assert_close(torch.stack(list(values)).double(), oracle(noisy, clean), rtol=1e-5, atol=5e-7)
    both = gradients(lambda a, b: hidden_distances(a, b, impl=impl), noisy, clean)
    assert all(gradient.shape == shape for gradient in both)


LAYOUTS = {
    "slice": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "every other row": lambda x: x[:, ::2],
    "padded rows": lambda x: x[..., :160],
    "unaligned": lambda x: x[..., 3:],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@each_implementation
@pytest.mark.parametrize(("of_noisy", "of_clean"), list(itertools.product(LAYOUTS, ["slice", None])))
def test_strided_rows_are_read_in_place(impl, of_noisy, of_clean):
    noisy = LAYOUTS[of_noisy](pair(4, 6, 176)[0])
    clean = pair(*noisy.shape)[1]
    if of_clean:
        clean = torch.cat([clean, clean[:, :1]], dim=1)[:, :-1]
    values = torch.stack(list(hidden_distances(noisy, clean, impl=impl)))
    contiguous = torch.stack(list(hidden_distances(noisy.contiguous(), clean.contiguous(), impl=impl)))
    torch.testing.assert_close(values, contiguous)
    both = gradients(lambda a, b: hidden_distances(a, b, impl=impl), noisy, clean)
    expected = gradients(oracle, noisy.double(), clean.double())
    for one, other in zip(both, expected, strict=True):
        assert_rows_close(one, other, 1e-5)


@each_implementation
@pytest.mark.parametrize("order", [(0, 1, 3, 2), (2, 1, 0, 3)], ids=["columns apart", "three strides between rows"])
def test_layouts_that_only_pytorch_reads(impl, order):
    noisy, clean = pair(2, 3, 2, 3)
    layout = noisy.permute(order).contiguous().permute(order)
    if impl == "triton":
        with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: noisy has strides \(.*contiguous"):
            hidden_distances(layout, clean, impl=impl)
        impl = "auto"
    torch.testing.assert_close(hidden_distances(layout, clean, impl=impl), hidden_distances(noisy, clean, impl="torch"))


@each_implementation
def test_tensors_of_more_than_2_31_elements(impl):
    # Memory is mapped when it is touched: on a CPU, two pages of four gigabytes.
    stride = 2**31 + 64
    storage = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    storage.set_(torch.UntypedStorage(2 * (stride + 64), device=DEVICE))
    noisy = storage.as_strided((2, 64), (stride, 1))
    noisy.copy_(pair(2, 64, dtype=torch.bfloat16)[0])
    clean = pair(2, 64, dtype=torch.bfloat16)[1]
    values = torch.stack(list(hidden_distances(noisy, clean, impl=impl)))
    torch.testing.assert_close(values.double(), oracle(noisy, clean), rtol=1e-5, atol=5e-7)
    both = gradients(lambda a, b: hidden_distances(a, b, impl=impl), noisy, clean)
    for one, other in zip(both, gradients(oracle, noisy.double(), clean.double()), strict=True):
        assert_rows_close(one, other, 2**-8)


@each_implementation
@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_needed_gradient_is_computed(impl, needed):
    sides = [side.requires_grad_(need) for side, need in zip(pair(3, 20), needed, strict=True)]
    recorder = registration.Recorder()
    with recorder:
        sum(field.sum() for field in hidden_distances(*sides, impl=impl)).backward()
    assert recorder.backward_arguments()["wanted"] == list(needed)
    leaves = [side.detach().double().requires_grad_() for side in sides]
    expected = torch.autograd.grad(oracle(*leaves).sum(), leaves)
    for side, need, other in zip(sides, needed, expected, strict=True):
        assert (side.grad is not None) == need
        if need:
            assert_rows_close(side.grad, other, 1e-5)


@each_implementation
def test_inputs_are_not_written(impl):
    noisy, clean = pair(3, 40)
    copies = noisy.clone(), clean.clone()
    gradients(lambda a, b: hidden_distances(a, b, impl=impl), noisy, clean)
    assert noisy.equal(copies[0])
    assert clean.equal(copies[1])


def masked_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    noisy, clean = (side.cpu() for side in pair(rows, 4, 6, dtype=dtype))
    mask = torch.arange(rows * 4).view(rows, 4) % 3 != 0
    noisy[~mask] = float("nan")
    return noisy, clean, mask


CASES = [
    registration.Case(
        "plain", hidden_distances, lambda rows, dtype: tuple(t.cpu() for t in pair(rows, 6, dtype=dtype))
    ),
    registration.Case("masked", hidden_distances, masked_case),
]


@registration.each_check(CASES)
def test_registration(check, case):
    check(case)


@each_implementation
def test_double_backward_is_pytorchs_alone(impl):
    noisy, clean = (side.requires_grad_() for side in pair(2, 5))
    value = hidden_distances(noisy, clean, impl=impl).cosine_distance.sum()
    (gradient,) = torch.autograd.grad(value, noisy, create_graph=True)
    if impl == "torch":
        gradient.sum().backward()
        assert clean.grad.ne(0).all()
    else:
        with pytest.raises(RuntimeError, match=f"hidden_distances has no double backward under impl='{impl}'"):
            gradient.sum().backward()


def test_forward_mode_is_refused():
    noisy, clean = pair(2, 5)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda a: hidden_distances(a, clean).l2, (noisy,), (noisy,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        hidden_distances(torch.autograd.forward_ad.make_dual(noisy, noisy), clean)


def test_returns_named_fields():
    distances = hidden_distances(*pair(2, 5))
    assert isinstance(distances, HiddenDistances)
    assert distances._fields == ("cosine_distance", "l2", "normalized_l2", "cosine_similarity")


def test_compiled_graph_obeys_a_later_choice(monkeypatch):
    noisy, clean = pair(2, 5)
    chosen = []
    select = dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *a: chosen.append(select(*a).implementation) or select(*a))
    torch._dynamo.reset()
    function = torch.compile(lambda a, b: hidden_distances(a, b).l2, fullgraph=True, backend="aot_eager")
    function(noisy, clean)
    with sgfast.use_impl("compile"):
        function(noisy, clean)
    assert chosen[-2:] == ["torch", "compile"] or chosen[-2:] == ["triton", "compile"]


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, torch.ones(2, 4)), {}, ValueError, r"one shape; got \(2, 3\) and \(2, 4\)"),
        ((torch.ones(()), torch.ones(())), {}, ValueError, "last dimension"),
        ((torch.ones(2, 0), torch.ones(2, 0)), {}, ValueError, "last dimension"),
        ((X.int(), X), {}, TypeError, "noisy must be float32"),
        ((X, [1.0]), {}, TypeError, "clean must be a torch.Tensor"),
        ((X, X, torch.ones(3)), {}, ValueError, r"mask must have the shape .* \(2,\); got \(3,\)"),
        ((X, X, [1, 0]), {}, TypeError, "mask must be a torch.Tensor or None"),
        ((X, X.to("meta")), {}, ValueError, "one device"),
        ((X, X), {"eps": 0.0}, ValueError, "eps must be positive; got 0.0"),
        ((X, X), {"impl": "cuda"}, ValueError, "impl must be one of auto, torch, compile, triton; got 'cuda'"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        hidden_distances(*arguments, **options)
