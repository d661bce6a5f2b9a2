"""The application of the noise stream against the formula."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sgfast
from sgfast.ops import apply_noise, dispatch, standard_normal
from sgfast.ops.noise import normal_draws, operator, philox
from tests import registration
from tests.implementations import DEVICE, RUNS_TRITON, each_implementation
from tests.live_bytes import LiveBytes

if RUNS_TRITON:
    import sgfast_kernels.noise.forward

# The kernels compute in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, *(() if RUNS_TRITON else (torch.float64,)))


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def operands(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    input, mean, std = (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for _ in range(3))
    input, mean, std = (one.to(dtype).to(DEVICE) for one in (input, mean, std.abs()))
    return input, mean, std


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") < 0.6).to(DEVICE)


def draw(shape: tuple[int, ...], seed: int, **settings: Any) -> Tensor:
    return standard_normal(shape, seed, device=DEVICE, **settings)


def cut(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Let chunks, or the kernels' tiles, have this many elements, and kernels add up as many tiles as they ever do."""
    monkeypatch.setattr(philox, "CHUNK_ELEMENTS", elements)
    if RUNS_TRITON:
        monkeypatch.setattr(sgfast_kernels.noise.forward, "TILE_ELEMENTS", max(32, 1 << elements.bit_length()))
        monkeypatch.setattr(sys.modules["sgfast_kernels.noise.backward"], "_ENOUGH_PROGRAMS", 1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit; on a GPU, which contracts a·b + c, up to roundings."""
    assert actual.dtype == expected.dtype
    tolerance = 0 if DEVICE == "cpu" else EPSILON[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def formula(
    input: Tensor,
    mean: Tensor,
    std: Tensor,
    eps: Tensor,
    noise_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    value_range: tuple[float | None, float | None] | None = None,
) -> Tensor:
    """The definition, differentiable; masks broadcast already."""
    out = (input + std * eps) * (1 if keep_mask is None else keep_mask) + mean
    if value_range is not None:
        out = out.clamp(*value_range)
    return out if noise_mask is None else torch.where(noise_mask, out, input)


EPSILON = {torch.float64: 1e-15, torch.float32: 3e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_range", [None, (-0.5, 1.0), (None, 0.25), (0.0, None)], ids=str)
def test_values_and_gradients(monkeypatch, impl, dtype, value_range):
    # A chunk of 20 elements cuts the last dimensions and starts inside a group of four draws.
    cut(monkeypatch, 20)
    leaves = [one.requires_grad_() for one in operands(3, 5, 7, dtype=dtype)]
    rows, features = random_mask(3, 5, seed=1), random_mask(3, 5, 7, seed=2)
    settings = {"seed": 42, "offset": 3, "value_range": value_range, "impl": impl}
    out = apply_noise(*leaves, noise_mask=rows, keep_mask=features, **settings)
    doubles = [one.detach().double().requires_grad_() for one in leaves]
    eps = draw((3, 5, 7), 42, offset=3, dtype=dtype, impl=impl).double()
    expected = formula(*doubles, eps, rows[..., None], features, value_range)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=EPSILON[dtype], atol=EPSILON[dtype])
    weight = torch.linspace(-1, 2, 105, dtype=torch.float64).view(3, 5, 7).to(dtype)
    actual = torch.autograd.grad(out, leaves, weight)
    for one, other in zip(actual, torch.autograd.grad(expected, doubles, weight.double()), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=EPSILON[dtype], atol=0)


@each_implementation
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 9), (2, 0, 3), (2, 3, 1, 5), (3, 70)], ids=str)
@pytest.mark.parametrize("elements", [1, 2**17] if RUNS_TRITON else [1, 4, 7, 2**17])
def test_any_shape_and_chunk(monkeypatch, impl, shape, elements):
    cut(monkeypatch, elements)
    leaves = [one.requires_grad_() for one in operands(*shape)]
    out = apply_noise(*leaves, seed=1, impl=impl)
    expected = formula(*leaves, draw(shape, 1, impl=impl))
    assert_same(out, expected)
    weight = torch.arange(1.0, 1 + out.numel()).view(shape)
    for one, other in zip(
        torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, leaves, weight), strict=True
    ):
        assert_same(one, other)


@each_implementation
@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 1023, 1024, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_width(impl, dtype, width):
    """Rows that begin anywhere between multiples of four, under a row mask, a vector and a column of numbers."""
    input, mean, std = operands(7, width, dtype=dtype)
    leaves = [one.detach().requires_grad_() for one in (input, mean[0], std[:, :1])]
    noise_mask, keep_mask = random_mask(7), random_mask(width)
    arguments = {"noise_mask": noise_mask, "keep_mask": keep_mask}
    out = apply_noise(*leaves, seed=2**63 + 5, offset=2**32 - 1, impl=impl, **arguments)
    doubles = [one.detach().double().requires_grad_() for one in leaves]
    eps = draw((7, width), 2**63 + 5, offset=2**32 - 1, dtype=dtype, impl=impl).double()
    expected = formula(*doubles, eps, noise_mask[:, None], keep_mask)
    torch.testing.assert_close(out.double(), expected, rtol=EPSILON[dtype], atol=EPSILON[dtype])
    weight = torch.linspace(-1, 2, out.numel()).view(out.shape).to(dtype)
    actual = torch.autograd.grad(out, leaves, weight)
    for one, other in zip(actual, torch.autograd.grad(expected, doubles, weight.double()), strict=True):
        assert one.shape == other.shape
        # A float32 sum of terms up to 2·4 that cancel.
        bound = 0 if one.shape == out.shape else 1e-8 * 7 * width
        torch.testing.assert_close(one.double(), other, rtol=EPSILON[dtype], atol=bound)


@each_implementation
@pytest.mark.parametrize("mean_shape", [(), (1,), (5,), (3, 1), (3, 5), (1, 3, 5), (4, 1, 1), (4, 3, 5)], ids=str)
@pytest.mark.parametrize("std_shape", [(), (5,), (4, 1, 5)], ids=str)
@pytest.mark.parametrize("elements", [6] if RUNS_TRITON else [6, 2**17])
def test_broadcast_operands_and_their_gradients(monkeypatch, impl, mean_shape, std_shape, elements):
    cut(monkeypatch, elements)
    dtype, tolerance = (torch.float32, 1e-6) if impl == "triton" else (torch.float64, 1e-13)
    leaves = [
        operands(*shape, dtype=dtype, seed=i)[i].requires_grad_()
        for i, shape in enumerate([(4, 3, 5), mean_shape, std_shape])
    ]
    doubles = [one.detach().double().requires_grad_() for one in leaves]
    out = apply_noise(*leaves, seed=8, keep_mask=random_mask(5), impl=impl)
    expected = formula(*doubles, draw((4, 3, 5), 8, impl=impl).double(), None, random_mask(5))
    torch.testing.assert_close(out.double(), expected, rtol=EPSILON[dtype], atol=EPSILON[dtype])
    weight = torch.linspace(-1, 2, 60, dtype=torch.float64).view(4, 3, 5)
    for one, other in zip(
        torch.autograd.grad(out, leaves, weight.to(dtype)),
        torch.autograd.grad(expected, doubles, weight.to(dtype).double()),
        strict=True,
    ):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@each_implementation
@pytest.mark.parametrize("mean_shape", [(40,), (10, 1), (4, 1, 40), (3, 1), (4, 1, 1)], ids=str)
def test_long_sums(monkeypatch, impl, mean_shape):
    """Sums over inner rows, outer rows and columns, of more rows and columns than a tile has."""
    cut(monkeypatch, 30)
    shape = (4, 3, 40) if mean_shape in [(4, 1, 40), (3, 1), (4, 1, 1)] else (10, 40)
    input, mean, std = (operands(*one, seed=i)[i].requires_grad_() for i, one in enumerate((shape, mean_shape, (40,))))
    noise_mask, upstream = random_mask(*shape[:-1]), operands(*shape, seed=9)[0]
    out = apply_noise(input, mean, std, seed=8, noise_mask=noise_mask, impl=impl)
    of_mean, of_std = torch.autograd.grad(out, (mean, std), upstream)
    selected = torch.where(noise_mask[..., None], upstream, 0).double()
    expected_mean = selected.sum_to_size(mean_shape)
    expected_std = (selected * draw(shape, 8, impl=impl).double()).sum_to_size((40,))
    torch.testing.assert_close(of_mean.double(), expected_mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(of_std.double(), expected_std, rtol=1e-6, atol=1e-5)
    # The order of the sums is fixed.
    again = torch.autograd.grad(apply_noise(input, mean, std, seed=8, noise_mask=noise_mask, impl=impl), mean, upstream)
    assert torch.equal(again[0], of_mean)


def test_reduced_gradients_keep_their_digits(monkeypatch):
    """Every one of 1000 chunks adds a little to a scalar: a sum in the operand's bfloat16 would stall."""
    monkeypatch.setattr(philox, "CHUNK_ELEMENTS", 200)
    input = torch.zeros(200_000)
    mean, std = (torch.tensor(1.0, requires_grad=True) for _ in range(2))
    upstream = torch.full((200_000,), 0.1)
    of_mean, of_std = torch.autograd.grad(apply_noise(input, mean, std, seed=6), (mean, std), upstream)
    assert of_mean.item() == pytest.approx(0.1 * 200_000, rel=2e-7)
    exact = (upstream.double() * standard_normal((200_000,), 6).double()).sum().item()
    assert of_std.item() == pytest.approx(exact, rel=1e-6)
    low = torch.tensor(1.0, dtype=torch.bfloat16, requires_grad=True)
    (of_low,) = torch.autograd.grad(apply_noise(input, low, std, seed=6), low, upstream)
    assert of_low == torch.tensor(20_000.0).bfloat16()


@each_implementation
def test_masks_cover_leading_dimensions_or_broadcast(impl):
    input, mean, std = operands(3, 3, 4)
    full = apply_noise(input, mean, std, impl=impl, seed=2)
    rows, tokens, features = random_mask(3), random_mask(3, 3), random_mask(4)
    cases = [
        # Leading dimensions win where a shape could also broadcast.
        (rows, rows[:, None, None]),
        (tokens, tokens[:, :, None]),
        (features, features),
        (tokens[None, :, :1], tokens[None, :, :1]),
        (random_mask(3, 3, 4), random_mask(3, 3, 4)),
        (torch.tensor(True), torch.tensor(True)),
        (tokens.long(), tokens[:, :, None]),
        (tokens.float(), tokens[:, :, None]),
    ]
    for mask, broadcast in cases:
        expected = torch.where(broadcast, full, input)
        assert torch.equal(apply_noise(input, mean, std, impl=impl, seed=2, noise_mask=mask), expected)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unselected_elements_keep_every_bit_and_poison_nothing(impl, dtype):
    input, mean, std = operands(6, 5, dtype=dtype)
    noise_mask = torch.tensor([True, False, True, False, False, True])
    planted = [one.clone() for one in (input, mean, std)]
    for one in planted:
        one[1], one[3] = math.nan, math.inf
    planted[0][4] = torch.tensor([-0.0, 0.0, -math.inf, math.nan, torch.finfo(dtype).tiny / 4], dtype=dtype)
    settings = {"seed": 3, "impl": impl, "noise_mask": noise_mask, "value_range": (-1.0, 1.0)}
    upstream = torch.linspace(1, 2, 30).view(6, 5).to(dtype)

    def run(*tensors):
        leaves = [one.clone().requires_grad_() for one in tensors]
        out = apply_noise(*leaves, **settings)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    out, *gradients = run(*planted)
    clean_out, *clean_gradients = run(input, mean, std)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(out.view(bits)[~noise_mask], planted[0].view(bits)[~noise_mask])
    assert torch.equal(out[noise_mask], clean_out[noise_mask])
    for one, other in zip(gradients, clean_gradients, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(gradients[0][~noise_mask], upstream[~noise_mask])
    assert not gradients[1][~noise_mask].any()
    assert not gradients[2][~noise_mask].any()


@each_implementation
def test_nan_upstream_of_unselected_elements_reaches_only_the_input(impl):
    leaves = [one.requires_grad_() for one in operands(4, 3)]
    noise_mask = torch.tensor([True, False, True, False])
    upstream = torch.ones(4, 3)
    upstream[1] = math.nan
    out = apply_noise(leaves[0], leaves[1][0], leaves[2][0], impl=impl, seed=3, noise_mask=noise_mask)
    of_input, of_mean, of_std = torch.autograd.grad(out, leaves, upstream)
    assert of_input[1].isnan().all()
    assert of_input[[0, 2, 3]].eq(1).all()
    assert of_mean[0].eq(2).all()
    assert of_std.isfinite().all()


@each_implementation
def test_suppressed_features_are_their_mean(impl):
    """keep selects, it does not multiply: NaN in a suppressed input or std does not survive."""
    input, mean, std = operands(4, 5)
    keep = torch.tensor([True, False, True, True, False])
    input[:, 1], std[:, 4] = math.nan, math.inf
    leaves = [one.requires_grad_() for one in (input, mean, std)]
    out = apply_noise(*leaves, impl=impl, seed=3, keep_mask=keep)
    assert torch.equal(out[:, ~keep], mean[:, ~keep])
    of_input, of_mean, of_std = torch.autograd.grad(out.sum(), leaves)
    assert of_mean.eq(1).all()
    assert not of_input[:, ~keep].any()
    assert not of_std[:, ~keep].any()
    assert torch.equal(of_std[:, keep], draw((4, 5), 3, impl=impl)[:, keep])


@each_implementation
def test_value_range_clamps_selected_elements_only(impl):
    input = torch.tensor([[-3.0, 0.0, 3.0], [-3.0, 0.0, 3.0]])
    leaves = [input.requires_grad_(), torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)]
    noise_mask = torch.tensor([True, False])
    out = apply_noise(*leaves, impl=impl, seed=1, noise_mask=noise_mask, value_range=(-1.0, 2.0))
    assert out.tolist() == [[-1, 0, 2], [-3, 0, 3]]
    of_input, of_mean, of_std = torch.autograd.grad(out.sum(), leaves)
    assert of_input.tolist() == [[0, 1, 0], [1, 1, 1]]
    assert of_mean.tolist() == [0, 1, 0]
    assert of_std.tolist() == [0, draw((6,), 1, impl=impl)[1].item(), 0]


@each_implementation
def test_row_strides_do_not_matter(impl):
    input, mean, std = operands(4, 6, 5)
    noise_mask = random_mask(4, 6)
    settings = {"seed": 4, "impl": impl}
    expected = apply_noise(input, mean, std, noise_mask=noise_mask, **settings)
    wide = torch.zeros(4, 8, 10)
    wide[:, 1:7, 3:8] = input
    leaves = [
        wide.requires_grad_(),
        mean.transpose(0, 1).contiguous().requires_grad_(),
        std.requires_grad_(),
    ]
    turned_mask = noise_mask.T.contiguous().T
    out = apply_noise(leaves[0][:, 1:7, 3:8], leaves[1].transpose(0, 1), leaves[2], noise_mask=turned_mask, **settings)
    assert torch.equal(out, expected)
    # An expanded upstream gradient, and one in strided rows.
    of_wide, of_mean, _ = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert of_wide.sum() == input.numel()
    assert torch.equal(of_mean.transpose(0, 1), noise_mask[..., None].expand_as(mean).float())
    upstream = torch.arange(480.0).view(4, 6, 20)[..., 4:9]
    _, of_mean, of_std = torch.autograd.grad(out, leaves, upstream)
    selected = torch.where(noise_mask[..., None], upstream, 0)
    assert torch.equal(of_mean.transpose(0, 1), selected)
    assert torch.equal(of_std, selected * draw((4, 6, 5), 4, impl=impl))


@pytest.mark.parametrize("impl", ["torch", "compile"])
def test_any_strides_do_not_matter(impl):
    input, mean, std = operands(4, 6, 5)
    expected = apply_noise(input, mean, std, seed=4, impl=impl)
    strided = [one.transpose(0, 2).contiguous().transpose(0, 2) for one in (input, mean, std)]
    assert torch.equal(apply_noise(*strided, seed=4, impl=impl), expected)
    wide = torch.zeros(4, 6, 10)
    wide[..., ::2] = input
    assert torch.equal(apply_noise(wide[..., ::2], mean, std, seed=4, impl=impl), expected)


@pytest.mark.skipif(not RUNS_TRITON, reason="no kernels here")
@pytest.mark.triton
def test_explain_says_what_kernels_do_not_take():
    input, mean, std = operands(4, 6, 8)
    assert sgfast.explain(apply_noise, input, mean, std, seed=1, impl="triton").implementation == "triton"
    refused = {
        "input has strides": (input.transpose(1, 2).contiguous().transpose(1, 2), mean, std),
        "std has strides": (input, mean, std.repeat_interleave(2, -1)[..., ::2]),
        "input is float64": (input.double(), mean, std),
        "mean is float64": (input, mean.double(), std),
    }
    input, mean = (one.reshape(4, 3, 2, 8) for one in (input, mean))
    refused["need more than two strides"] = (input, mean, torch.ones(4, 1, 2, 1))
    for reason, arguments in refused.items():
        with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{reason}"):
            apply_noise(*arguments, seed=1, impl="triton")
        choice = sgfast.explain(apply_noise, *arguments, seed=1)
        assert choice.implementation == "torch"
        assert reason in choice.reason


@pytest.mark.skipif(not dispatch.interpreting(), reason="the interpreter counts what is read")
@pytest.mark.triton
def test_unselected_rows_read_no_mean_and_no_std():
    from kernel_proofs import strict

    input, mean, std = operands(6, 64)
    with strict.count_traffic() as launches:
        apply_noise(input, mean, std, seed=3, noise_mask=torch.zeros(6, dtype=torch.bool), impl="triton")
    (launch,) = launches
    assert launch.loaded == {"x_ptr": 4 * 6 * 64, "n_ptr": 6}


@each_implementation
def test_mixed_dtypes(impl):
    """The input decides about output and arithmetic; every gradient comes back in its own dtype."""
    input, mean, std = operands(8, 5)
    other = torch.float16 if impl == "triton" else torch.float64
    leaves = [input.bfloat16().requires_grad_(), mean.to(other).requires_grad_(), std.requires_grad_()]
    out = apply_noise(*leaves, impl=impl, seed=4)
    assert out.dtype == torch.bfloat16
    eps = draw((8, 5), 4, impl=impl, dtype=torch.bfloat16).float()
    assert_same(out, (leaves[0].float() + std * eps + leaves[1].float()).bfloat16())
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert [one.dtype for one in gradients] == [torch.bfloat16, other, torch.float32]
    assert torch.equal(gradients[2], eps)


@pytest.mark.parametrize("needed", [(False, True, True), (True, False, False), (False, False, True)])
def test_only_needed_gradients_are_computed(needed):
    leaves = [one.requires_grad_(need) for one, need in zip(operands(4, 5), needed, strict=True)]
    recorder = registration.Recorder()
    with recorder:
        apply_noise(*leaves, seed=4).sum().backward()
    assert recorder.backward_arguments()["wanted"] == list(needed)
    assert [leaf.grad is not None for leaf in leaves] == list(needed)
    for leaf, expected in zip(leaves, (torch.ones(4, 5), torch.ones(4, 5), standard_normal((4, 5), 4)), strict=True):
        assert leaf.grad is None or torch.equal(leaf.grad, expected)


def test_nothing_but_the_inputs_is_kept_for_backward():
    leaves = [one.requires_grad_() for one in operands(16, 32)]
    noise_mask, saved = random_mask(16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        apply_noise(*leaves, seed=4, noise_mask=noise_mask)
    storages = {tensor.untyped_storage().data_ptr() for tensor in saved if tensor.numel() > 1}
    assert storages == {tensor.untyped_storage().data_ptr() for tensor in (*leaves, noise_mask)}


def test_temporaries_are_bounded():
    input, mean, std = operands(256, 4096)
    seed, masks = philox.seed_tensor(1, None), (random_mask(256, 1), random_mask(4096))
    problem = operator.Problem(
        input,
        mean=mean,
        std=std,
        seed=seed,
        offset=0,
        noise_mask=masks[0],
        keep_mask=masks[1],
        lowest=-1.0,
        highest=1.0,
        impl=None,
    )
    bound = 4 * 2**20 * torch.get_num_threads()
    with LiveBytes() as counted:
        out = operator.forward.implementation(problem)
    assert counted.peak - 4 * out.numel() < bound
    with LiveBytes() as counted:
        operator.backward.implementation(operator.BackwardProblem(problem, upstream=out, wanted=[True] * 3))
    assert counted.peak - 3 * 4 * out.numel() < bound
    with LiveBytes() as counted:
        normal_draws.forward.implementation(
            normal_draws.Draw(seed, shape=(2**21,), offset=0, dtype=torch.float32, impl=None)
        )
    assert counted.peak - 4 * 2**21 < bound


def plain_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return operands(rows, 6, dtype=dtype)


def full_case(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    input, mean, std = operands(rows, 4, 3, dtype=dtype)
    noise_mask = random_mask(rows, 4)
    return input, mean[:, :, :1], std[:, :1], noise_mask, random_mask(rows, 4, 3, seed=1)


def full(input: Tensor, mean: Tensor, std: Tensor, noise_mask: Tensor, keep_mask: Tensor) -> Tensor:
    settings = {"noise_mask": noise_mask, "keep_mask": keep_mask, "value_range": (-0.7, 1.1)}
    return apply_noise(input, mean, std, seed=input.new_full((1,), 5, dtype=torch.int64), offset=2, **settings)


CASES = [
    registration.Case("plain", lambda *tensors: apply_noise(*tensors, seed=5), plain_case),
    registration.Case("full", full, full_case),
]


@registration.each_check(CASES)
def test_registration(check, case):
    check(case)


def test_compiled_with_changing_seeds():
    """One graph for all seeds: neither an int nor a tensor is burnt in."""
    input, mean, std = operands(4, 5)
    compiled = torch.compile(
        lambda seed: apply_noise(input, mean, std, seed=seed), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for kind in (int, torch.tensor):
        torch._dynamo.reset()
        compiled(kind(1))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in (2, 2**40, 2**63 - 1):
                assert torch.equal(compiled(kind(seed)), apply_noise(input, mean, std, seed=seed))


def test_double_backward_without_support_is_refused():
    leaves = [one.requires_grad_() for one in operands(2, 3)]
    (of_std,) = torch.autograd.grad(apply_noise(*leaves, seed=1, impl="compile").sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="apply_noise has no double backward under impl='compile'"):
        of_std.sum().backward()


def test_forward_mode_is_refused():
    input, mean, std = operands(2, 3)
    with pytest.raises(RuntimeError, match="apply_noise has no forward-mode derivative"):
        torch.func.jvp(lambda std: apply_noise(input, mean, std, seed=1), (std,), (std,))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input must be float32", {"input": torch.ones(3, 4, dtype=torch.int64)}),
        (TypeError, "mean must be a torch.Tensor; got float", {"mean": 1.0}),
        (ValueError, r"mean must broadcast to the shape of input, \(3, 4\); got \(3,\)", {"mean": torch.ones(3)}),
        (ValueError, r"std must broadcast .* got \(2, 3, 4\)", {"std": torch.ones(2, 3, 4)}),
        (ValueError, "std and input must be on one device", {"std": torch.ones(4, device="meta")}),
        (ValueError, r"noise_mask must broadcast .* got \(2,\)", {"noise_mask": torch.ones(2)}),
        (TypeError, "noise_mask must be a torch.Tensor or None; got list", {"noise_mask": [True]}),
        (ValueError, r"keep_mask must broadcast .* got \(3,\)", {"keep_mask": torch.ones(3)}),
        (ValueError, "value_range must have low ≤ high", {"value_range": (1.0, -1.0)}),
        (ValueError, "value_range must have low ≤ high", {"value_range": (math.nan, 1.0)}),
        (ValueError, "value_range must be", {"value_range": (1.0,)}),
        (ValueError, "seed must lie", {"seed": -1}),
        (ValueError, "seed tensor must be on cpu; got meta", {"seed": torch.tensor(1, device="meta")}),
        (TypeError, "offset must be an int; got bool", {"offset": True}),
    ],
)
def test_apply_noise_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        apply_noise(**{"input": torch.ones(3, 4), "mean": torch.zeros(4), "std": torch.ones(4), "seed": 1, **arguments})
