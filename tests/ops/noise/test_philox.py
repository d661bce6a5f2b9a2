"""The noise stream against known answers and an independent rewrite."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import sgfast
from sgfast.ops import standard_normal
from sgfast.ops.noise import philox
from sgfast.ops.noise.normal_draws import Draw, forward
from tests.implementations import DEVICE, RUNS_TRITON, each_implementation

if RUNS_TRITON:
    import sgfast_kernels.noise.forward
    from kernel_proofs import philox_kernels

# A GPU divides within 2 units in the last place and takes roots within 1.
ERROR = 1.2e-6 if DEVICE == "cpu" else philox.NORMAL_ERROR
# The parts of the stream by themselves; torch.compile's are proved in the draws.
each_part = pytest.mark.parametrize(
    "impl", [pytest.param("triton", marks=pytest.mark.triton)] if RUNS_TRITON else ["torch"]
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def oracle_words(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 of (n, 4) counter words, written from the paper in uint64: (n, 4)."""
    words, key = counter.astype(np.uint64).T.copy(), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first = words[0] * np.uint64(0xD2511F53)
        second = words[2] * np.uint64(0xCD9E8D57)
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        words = np.stack(
            [
                (second >> high) ^ words[1] ^ np.uint64(key[0]),
                second & low,
                (first >> high) ^ words[3] ^ np.uint64(key[1]),
                first & low,
            ]
        )
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return words.T


def oracle_normals(count: int, seed: int, offset: int = 0) -> np.ndarray:
    """The stream in float64."""
    counters = [(offset + i) % 2**64 for i in range((count + 3) // 4)]
    words = oracle_words(np.array([[c % 2**32, c >> 32, 0, 0] for c in counters], dtype=np.uint64).reshape(-1, 4), seed)
    draws = np.empty((len(counters), 4))
    for pair in (0, 2):
        radius = np.sqrt(-2 * oracle_logarithm(words[:, pair]))
        angle = 2 * np.pi * words[:, pair + 1].astype(np.float64) / 2**32
        draws[:, pair], draws[:, pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return draws.reshape(-1)[:count]


def oracle_logarithm(words: np.ndarray) -> np.ndarray:
    """ln((w+1)/2³²), with all its digits also near 0."""
    below_one = (2**32 - 1 - words.astype(np.float64)) / 2**32
    return np.where(below_one < 0.5, np.log1p(-np.minimum(below_one, 0.5)), np.log((words + 1.0) / 2**32))


def words_of(impl: str, counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 of (n, 4) counter words: (n, 4)."""
    key, columns = philox.seed_tensor(seed, DEVICE), torch.from_numpy(counter.astype(np.int64)).to(DEVICE)
    if impl == "triton":
        words = philox_kernels.words(columns, key)
    else:
        firsts, seconds = philox.philox(columns.unbind(-1), philox.round_keys(key))
        words = torch.stack([firsts[0], seconds[0], firsts[1], seconds[1]], dim=-1)
    return words.cpu().numpy().astype(np.uint64)


@each_part
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(impl, counter, key, expected):
    """The vectors that Random123 publishes."""
    c, k, answer = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    seed = k[0] | k[1] << 32
    assert words_of(impl, np.array([c], dtype=np.uint64), seed).tolist() == [answer]
    assert oracle_words(np.array([c]), seed).tolist() == [answer]


@each_part
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1, 0x923456789ABCDEF0])
def test_words_equal_the_oracle_bit_for_bit(impl, seed):
    """A million words each."""
    counter = np.random.default_rng(seed).integers(0, 2**32, (250_000, 4), dtype=np.uint64)
    assert np.array_equal(words_of(impl, counter, seed), oracle_words(counter, seed))


@each_implementation
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 1001, 1024, 4101])
@pytest.mark.parametrize(
    ("seed", "offset"), [(0, 0), (7, 0), (2**64 - 3, 5), (2**32 + 1, 2**32 - 2), (1 << 63, 2**63 - 1)]
)
def test_standard_normal_equals_the_formula(impl, count, seed, offset):
    draws = standard_normal((count,), seed, offset=offset, device=DEVICE, impl=impl)
    assert draws.dtype == torch.float32
    assert draws.shape == (count,)
    np.testing.assert_allclose(draws.cpu().numpy(), oracle_normals(count, seed, offset), rtol=0, atol=ERROR)


def edge_words() -> np.ndarray:
    """Words at both ends, around every power of two and every eighth of a turn, and random ones."""
    around = np.arange(-3000, 3000)
    generator = np.random.default_rng(1)
    centers = np.concatenate([2 ** np.arange(33), 2**29 * np.arange(9), (2 ** np.arange(33) * math.sqrt(0.5))])
    edges = (centers.astype(np.int64)[:, None] + around).reshape(-1)
    words = np.concatenate([edges, generator.integers(0, 2**32, 2**21), np.arange(2**20)])
    return words[(words >= 0) & (words < 2**32)]


def parts_of(impl: str, words: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Radius, cosine and sine of words of 32 bits, in float64 on the CPU."""
    tensor = torch.from_numpy(words).to(DEVICE)
    if impl == "triton":
        parts = philox_kernels.parts(tensor)
    else:
        parts = (philox.radius(tensor), *philox.cosine_and_sine(tensor))
    radius, cosine, sine = (one.cpu().double() for one in parts)
    return radius, cosine, sine


@each_part
def test_radius_error(impl):
    words = edge_words()
    exact = np.sqrt(-2 * oracle_logarithm(words))
    radius = parts_of(impl, words)[0].numpy()
    absolute, relative = (5e-7, 2.5e-7) if DEVICE == "cpu" else (1.2e-6, 4.5e-7)
    assert np.abs(radius - exact).max() < absolute
    # Relative, so that the small radii of words near 2³² keep their digits too.
    assert (np.abs(radius - exact) <= relative * exact).all()
    ends = parts_of(impl, np.array([0, 2**32 - 2, 2**32 - 1]))[0]
    assert ends[0].item() == pytest.approx(math.sqrt(64 * math.log(2)), rel=2e-7)
    assert ends[1].item() == pytest.approx(math.sqrt(2 * 2.0**-32), rel=2e-7)
    assert ends[2].item() == 0


@each_part
def test_cosine_and_sine_error(impl):
    words = edge_words()
    angle = 2 * np.pi * words / 2**32
    _, cosine, sine = (values.numpy() for values in parts_of(impl, words))
    assert np.abs(cosine - np.cos(angle)).max() < 9e-8
    assert np.abs(sine - np.sin(angle)).max() < 9e-8
    _, cosine, sine = parts_of(impl, np.arange(4) * 2**30)
    assert cosine.tolist() == [1, 0, -1, 0]
    assert sine.tolist() == [0, 1, 0, -1]


class Approximate(TorchFunctionMode):
    """Division and square root off by given relative errors, as a GPU's may be."""

    def __init__(self, division: float, root: float) -> None:
        super().__init__()
        self.errors = {"div": division, "__truediv__": division, "true_divide": division, "sqrt": root, "sqrt_": root}
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        error = self.errors.get(function.__name__)
        result = function(*args, **(kwargs or {}))
        if error is None:
            return result
        self.calls += 1
        return result.double().mul(1 + error).float()


@pytest.mark.parametrize("division", [-(2.0**-22), 0, 2.0**-22])
@pytest.mark.parametrize("root", [-(2.0**-23), 0, 2.0**-23])
def test_stated_bound_of_the_normals_covers_the_tail_and_a_gpu(division, root):
    """The worst radii (the first words) and others times many angles."""
    generator = np.random.default_rng(2)
    first = torch.cat([torch.arange(2000), torch.from_numpy(generator.integers(0, 2**32, 2000))])[:, None]
    second = torch.from_numpy(generator.integers(0, 2**32, 500))
    cosine, _ = philox.cosine_and_sine(second)
    exact = np.sqrt(-2 * oracle_logarithm(first.numpy())) * np.cos(2 * np.pi * second.numpy() / 2**32)
    with Approximate(division, root) as approximate:
        radius = philox.radius(first)
    assert approximate.calls == 2
    worst = np.abs((radius * cosine).double().numpy() - exact).max()
    assert worst < (philox.NORMAL_ERROR if division or root else 1.2e-6)


@pytest.mark.parametrize("elements", [1, 6, 100, 4096])
def test_stream_does_not_depend_on_chunks(monkeypatch, elements):
    expected = standard_normal((1003,), 11)
    monkeypatch.setattr(philox, "CHUNK_ELEMENTS", elements)
    assert torch.equal(standard_normal((1003,), 11), expected)


@pytest.mark.skipif(not RUNS_TRITON, reason="no kernels here")
@pytest.mark.triton
@pytest.mark.parametrize("columns", [16, 64, 4096])
def test_stream_does_not_depend_on_blocks(monkeypatch, columns):
    expected = standard_normal((1003,), 11, offset=2**34, device=DEVICE, impl="triton")
    monkeypatch.setattr(sgfast_kernels.noise.forward, "NORMAL_COLUMNS", columns)
    assert torch.equal(standard_normal((1003,), 11, offset=2**34, device=DEVICE, impl="triton"), expected)


@each_implementation
def test_stream_depends_on_the_linear_index_only(impl):
    def draw(shape: tuple[int, ...]) -> Tensor:
        return standard_normal(shape, 5, device=DEVICE, impl=impl)

    stream = draw((2 * 3 * 5 * 7,))
    assert torch.equal(draw((2, 3, 5, 7)).flatten(), stream)
    assert torch.equal(draw((100,)), stream[:100])
    assert torch.equal(draw(()), stream[0])
    assert draw((3, 0, 2)).shape == (3, 0, 2)
    # Long enough for several chunks and for every vector length.
    assert torch.equal(draw((30_001 if impl == "triton" else 300_001,))[:210], stream)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_round_the_float32_stream_once(impl, dtype):
    settings = {"device": DEVICE, "impl": impl}
    stream = standard_normal((999,), 5, **settings)
    assert torch.equal(standard_normal((999,), 5, dtype=dtype, **settings), stream.to(dtype))


@each_implementation
def test_offset_counts_groups_of_four(impl):
    stream = standard_normal((400,), 9, device=DEVICE, impl=impl)
    for offset in (1, 3, 25):
        part = standard_normal((40,), 9, offset=offset, device=DEVICE, impl=impl)
        assert torch.equal(part, stream[4 * offset :][:40])


@each_implementation
def test_seeds(impl):
    def draw(seed: int | Tensor) -> Tensor:
        return standard_normal((64,), seed, device=DEVICE, impl=impl)

    stream = draw(3)
    assert torch.equal(draw(torch.tensor(3, device=DEVICE)), stream)
    assert torch.equal(draw(torch.tensor([[3]], device=DEVICE)), stream)
    assert torch.equal(draw(2**64 - 3), draw(torch.tensor(-3, device=DEVICE)))
    for other in (2, 3 + 2**32, 3 + 2**63):
        assert (draw(other) != stream).all()


def test_distribution():
    """Moments, Kolmogorov-Smirnov, tails and neighbours of 2²⁰ draws of a fixed seed."""
    draws = standard_normal((2**20,), 2024).double().numpy()
    n = draws.size
    # Standard errors of the first four moments of a normal sample.
    for power, (moment, deviation) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((draws**power).mean() - moment) < 4 * math.sqrt(deviation / n)
    assert scipy.stats.kstest(draws, "norm").pvalue > 0.01
    for part in range(4):
        assert scipy.stats.kstest(draws[part::4], "norm").pvalue > 0.01
    for threshold in (2, 3, 4, 4.5):
        expected = 2 * n * scipy.stats.norm.sf(threshold)
        assert abs((np.abs(draws) > threshold).sum() - expected) < 4 * math.sqrt(expected)
    assert np.abs(draws).max() < math.sqrt(64 * math.log(2))
    for values in (draws, draws**2 - 1):
        for lag in (1, 2, 3, 4, 5, 8, 1024):
            assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4 / math.sqrt(n)
    # Rows follow one another like elements; close seeds, high seeds and far offsets give unrelated streams.
    for width in (64, 4096):
        rows = draws.reshape(-1, width)
        assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(draws, standard_normal((n,), 2024, offset=2**40).numpy())[0, 1]) < 4 / math.sqrt(n)
    for other in (2025, 2024 + 2**32):
        assert abs(np.corrcoef(draws, standard_normal((n,), other).numpy())[0, 1]) < 4 / math.sqrt(n)


def test_distribution_of_ten_million_draws():
    """Kolmogorov-Smirnov, and tails beyond 4 and 5 standard deviations against the binomial count."""
    draws = np.concatenate([standard_normal((10**6,), 77, offset=i * 250_000).double().numpy() for i in range(10)])
    assert scipy.stats.kstest(draws, "norm").pvalue > 0.01
    for threshold in (4, 4.5, 5):
        beyond = int((np.abs(draws) > threshold).sum())
        assert scipy.stats.binomtest(beyond, draws.size, 2 * scipy.stats.norm.sf(threshold)).pvalue > 0.01
    # Each tail by itself, where there are enough.
    for sign in (-1, 1):
        beyond = int((sign * draws > 4).sum())
        assert scipy.stats.binomtest(beyond, draws.size, scipy.stats.norm.sf(4)).pvalue > 0.01


def test_distribution_of_the_words():
    """Every byte of every word uniform, by chi-square."""
    zero = torch.zeros((), dtype=torch.int64)
    keys = philox.round_keys(philox.seed_tensor(1, None))
    for word in torch.cat(philox.philox((torch.arange(2**16), zero, zero, zero), keys)):
        for shift in (0, 8, 16, 24):
            counts = torch.bincount(word >> shift & 255, minlength=256).numpy()
            assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, r"seed must lie in \[0, 2\*\*64\); got -1", {"seed": -1}),
        (ValueError, "seed must lie", {"seed": 2**64}),
        (TypeError, "seed must be an int or an int64 tensor; got bool", {"seed": True}),
        (TypeError, "seed must be an int or an int64 tensor; got float", {"seed": 1.0}),
        (TypeError, "seed tensor must be int64; got torch.int32", {"seed": torch.tensor(1, dtype=torch.int32)}),
        (ValueError, r"seed tensor must have one element; got shape \(2,\)", {"seed": torch.tensor([1, 2])}),
        (ValueError, "seed tensor must be on meta; got cpu", {"seed": torch.tensor(1), "device": "meta"}),
        (ValueError, r"shape must have no negative size; got \(2, -1\)", {"shape": (2, -1)}),
        (ValueError, "offset must lie", {"offset": -1}),
        (ValueError, "offset must lie", {"offset": 2**63}),
        (TypeError, "offset must be an int; got float", {"offset": 1.0}),
        (TypeError, "dtype must be float32, .* got torch.int64", {"dtype": torch.int64}),
        (ValueError, "impl must be one of", {"impl": "cuda"}),
    ],
)
def test_standard_normal_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        standard_normal(**{"shape": (2,), "seed": 1, **arguments})


@pytest.mark.skipif(RUNS_TRITON, reason="kernels run here")
def test_explain_says_why_not_triton():
    choice = sgfast.explain(standard_normal, (2,), 1)
    assert choice.implementation == "torch"
    assert choice.reason.startswith(("cpu tensors (Triton needs a GPU", "triton is not installed"))
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        standard_normal((2,), 1, impl="triton")
    assert sgfast.explain(standard_normal, (2,), torch.tensor(1), dtype=torch.float64).implementation == "torch"


def test_standard_normal_registration():
    def draw(like: Tensor, seed: Tensor) -> Tensor:
        return standard_normal(like.shape, seed, offset=like.shape[0], dtype=torch.bfloat16)

    seed = torch.tensor(-9)
    operator = forward
    arguments = Draw(seed, shape=(3, 5), offset=2, dtype=torch.float16, impl=None)
    torch.library.opcheck(operator.overload, operator.flat(arguments))
    compiled = torch.compile(draw, fullgraph=True, dynamic=True)
    for rows in (3, 8):
        assert torch.equal(compiled(torch.empty(rows, 5), seed), draw(torch.empty(rows, 5), seed))
    meta = standard_normal((3, 5), 1, dtype=torch.float64, device="meta")
    assert (meta.shape, meta.dtype, meta.device.type) == ((3, 5), torch.float64, "meta")
