"""Nearest embeddings and ranks against brute force in float64, where order, ties and the last digits count."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import sgfast
from sgfast.ops.nearest import embedding_ranks, nearest_embeddings, scan
from sgfast.ops.nearest.operator import Ranking, Search, nearest, ranks
from sgfast.ops.precision import full_precision_products
from tests import registration
from tests.live_bytes import LiveBytes

IMPLEMENTATIONS = ("torch", "compile")
METRICS = ("l2", "cosine")
# From one row at a time to everything at once.
CHUNK_BYTES = (20_000, 200_000, None)


def search(queries, table, *, k, metric, max_chunk_bytes, farthest=False):
    """The arguments of the registered operator `nearest`."""
    return Search(queries, table, k=k, metric=metric, farthest=farthest, max_chunk_bytes=max_chunk_bytes, impl=None)


def ranking(queries, table, targets, *, metric, max_chunk_bytes):
    """The arguments of the registered operator `ranks`."""
    return Ranking(queries, table, targets, metric=metric, max_chunk_bytes=max_chunk_bytes, impl=None)


def oracle_distances(queries: Tensor, table: Tensor, metric: str) -> np.ndarray:
    """(Q, V) float64, by differences, one query at a time."""
    rows, out = table.double().numpy(), []
    for query in queries.double().numpy().reshape(-1, rows.shape[1]):
        if metric == "l2":
            out.append(np.sqrt(((rows - query) ** 2).sum(-1)))
            continue
        norms, norm = np.sqrt((rows**2).sum(-1)), np.sqrt((query**2).sum())
        nonzero = (norms > 0) & (norm > 0)
        units = rows / np.where(nonzero, norms, 1)[:, None]
        out.append(np.where(nonzero, ((units - query / (norm or 1)) ** 2).sum(-1) / 2, 1))
    return np.array(out)


def oracle_order(distances: np.ndarray, farthest: bool = False) -> np.ndarray:
    return np.argsort(-distances if farthest else distances, axis=1, kind="stable")


def check(queries: Tensor, table: Tensor, k: int, metric: str, farthest: bool = False, **settings) -> None:
    distances, indices = nearest_embeddings(queries, table, k, metric=metric, farthest=farthest, **settings)
    exact = oracle_distances(queries, table, metric)
    order = oracle_order(exact, farthest)[:, :k]
    assert np.array_equal(indices.reshape(-1, k).numpy(), order)
    expected = np.take_along_axis(exact, order, axis=1)
    np.testing.assert_allclose(distances.reshape(-1, k).numpy(), expected, rtol=1.2e-7, atol=1e-38)


def embeddings(vocabulary: int, width: int, queries: int, noise: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """(queries, table, targets): noisy rows of the table; a tenth of the table are copies of earlier rows."""
    generator = torch.Generator().manual_seed(vocabulary)
    table = torch.randn(vocabulary, width, generator=generator)
    copies = vocabulary // 10
    table[-copies:] = table[torch.randperm(vocabulary - copies, generator=generator)[:copies]]
    targets = torch.randint(vocabulary, (queries,), generator=generator)
    return table[targets] + noise * torch.randn(queries, width, generator=generator), table, targets


@pytest.mark.parametrize("max_chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("farthest", [False, True], ids=["nearest", "farthest"])
@pytest.mark.parametrize("k", [1, 2, 7, 300])
def test_equals_brute_force(metric, farthest, k, max_chunk_bytes):
    queries, table, _ = embeddings(300, 17, 12)
    check(queries, table, k, metric, farthest, max_chunk_bytes=max_chunk_bytes)


@pytest.mark.parametrize("width", [1, 2, 3, 64, 257])
@pytest.mark.parametrize("metric", METRICS)
def test_any_width(metric, width):
    queries, table, _ = embeddings(150, width, 9)
    # At width 1 every cosine is 1 or −1, and the ties are broken by index.
    check(queries, table, 5, metric, max_chunk_bytes=50_000)


@pytest.mark.parametrize("max_chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("farthest", [False, True], ids=["nearest", "farthest"])
def test_ties_of_a_lattice(farthest, max_chunk_bytes):
    """Small integers: dozens of rows share a distance exactly, and the lower index comes first."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-1, 2, (600, 4), generator=generator).float()
    queries = torch.randint(-2, 3, (15, 4), generator=generator).float()
    exact = oracle_distances(queries, table, "l2")
    assert max(np.unique(row, return_counts=True)[1].max() for row in exact) > 90
    check(queries, table, 80, "l2", farthest, max_chunk_bytes=max_chunk_bytes)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows(metric):
    """All candidates all the time."""
    table = torch.tensor([0.3, -1.2, 2.5]).expand(500, 3)
    distances, indices = nearest_embeddings(torch.randn(4, 3), table, 20, metric=metric, max_chunk_bytes=30_000)
    assert torch.equal(indices, torch.arange(20).expand(4, 20))
    assert torch.equal(distances, distances[:, :1].expand(4, 20))
    targets = torch.tensor([0, 3, 250, 499])
    assert torch.equal(embedding_ranks(torch.randn(4, 3), table, targets, metric=metric), targets)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [0.0, 30.0, 3000.0])
def test_near_duplicates_far_from_the_origin(metric, offset):
    """Rows 1e-4 apart in relative terms, behind a common offset that swamps them in a plain matrix product."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 64, generator=generator)
    table = (base[:, None] * (1 + 1e-4 * torch.randn(40, 20, 64, generator=generator))).flatten(0, 1) + offset
    targets = torch.randint(800, (30,), generator=generator)
    check(table[targets], table, 5, metric)
    queries = table[targets] + 1e-4 * torch.randn(30, 64, generator=generator)
    check(queries, table, 5, metric)
    check(queries, table, 5, metric, farthest=True)
    exact = oracle_distances(queries, table, metric)
    expected = (oracle_order(exact) == targets.numpy()[:, None]).argmax(1)
    assert embedding_ranks(queries, table, targets, metric=metric).tolist() == expected.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_one_unit_apart(metric):
    """The rows differ from each other in the last bit of one feature, and every row finds itself."""
    row = torch.linspace(1.0, 2.0, 50)
    table = row.repeat(50, 1)
    table.diagonal().copy_(row.nextafter(torch.tensor(9.0)))
    distances, indices = nearest_embeddings(table, table, metric=metric)
    assert torch.equal(indices.squeeze(-1), torch.arange(50))
    assert not distances.any()
    assert not embedding_ranks(table, table, torch.arange(50), metric=metric).any()


def test_cosine_with_zero_vectors():
    table = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    distances, indices = nearest_embeddings(queries, table, 5, metric="cosine")
    assert indices.tolist() == [[4, 0, 2, 3, 1], [0, 1, 2, 3, 4]]
    assert distances.tolist() == [[0, 1, 1, 1, 2], [1, 1, 1, 1, 1]]
    farthest = nearest_embeddings(queries, table, 3, metric="cosine", farthest=True)
    assert farthest[1].tolist() == [[1, 0, 2], [0, 1, 2]]
    ranks = embedding_ranks(queries.repeat_interleave(5, 0), table, torch.arange(5).repeat(2), metric="cosine")
    assert ranks.view(2, 5).tolist() == [[1, 4, 2, 3, 0], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("metric", METRICS)
def test_zero_vectors_among_many(metric):
    queries, table, _ = embeddings(400, 8, 6)
    table[::7], queries[::2] = 0, 0
    check(queries, table, 60, metric, max_chunk_bytes=60_000)
    check(queries, table, 60, metric, farthest=True, max_chunk_bytes=60_000)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-18, 1e15, 1e19, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_any_scale(metric, scale):
    """Squares under- and overflow float32; the rows that this blurs are compared directly."""
    queries, table, targets = embeddings(120, 6, 8)
    queries, table = queries * scale, table * scale
    check(queries, table, 4, metric)
    check(queries, table, 4, metric, farthest=True)
    table[::3] /= 1000
    check(queries, table, 4, metric)
    check(queries, table, 4, metric, farthest=True)
    expected = (oracle_order(oracle_distances(queries, table, metric)) == targets.numpy()[:, None]).argmax(1)
    assert embedding_ranks(queries, table, targets, metric=metric).tolist() == expected.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity_are_infinitely_far(metric):
    queries, table, _ = embeddings(60, 5, 3)
    clean = nearest_embeddings(queries, table, 5, metric=metric)
    table = torch.cat([table, torch.full((1, 5), math.nan), torch.full((1, 5), math.inf)])
    distances, indices = nearest_embeddings(queries, table, 5, metric=metric)
    assert torch.equal(indices, clean[1])
    assert torch.equal(distances, clean[0])
    distances, indices = nearest_embeddings(queries, table, 2, metric=metric, farthest=True)
    assert indices.tolist() == [[60, 61]] * 3
    assert distances.isinf().all()
    # A query that is NaN is infinitely far from every row, and its target is not declared found.
    lost = torch.full((2, 5), math.nan)
    assert nearest_embeddings(lost, table, 3, metric=metric)[1].tolist() == [[0, 1, 2]] * 2
    assert embedding_ranks(lost, table, torch.tensor([7, 61]), metric=metric).tolist() == [7, 61]


@pytest.mark.parametrize("max_chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("metric", METRICS)
def test_ranks_equal_brute_force(metric, max_chunk_bytes):
    queries, table, targets = embeddings(300, 17, 40, noise=1.5)
    order = oracle_order(oracle_distances(queries, table, metric))
    expected = (order == targets.numpy()[:, None]).argmax(1)
    assert len(np.unique(expected)) > 10
    ranks = embedding_ranks(queries, table, targets, metric=metric, max_chunk_bytes=max_chunk_bytes)
    assert ranks.tolist() == expected.tolist()
    _, indices = nearest_embeddings(queries, table, 300, metric=metric)
    assert torch.equal(indices.gather(1, ranks[:, None]).squeeze(1), targets)


@pytest.mark.parametrize("metric", METRICS)
def test_chunks_do_not_change_a_bit(metric):
    queries, table, _ = embeddings(500, 33, 20)
    queries, table = queries.double(), table.double()
    expected = nearest_embeddings(queries, table, 9, metric=metric)
    for max_chunk_bytes in (1, 10_000, 70_000, 10**6):
        actual = nearest_embeddings(queries[:5], table, 9, metric=metric, max_chunk_bytes=max_chunk_bytes)
        assert torch.equal(actual[0], expected[0][:5])
        assert torch.equal(actual[1], expected[1][:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes(metric, dtype):
    queries, table, targets = embeddings(200, 16, 10)
    for one, other in ((queries.to(dtype), table.to(dtype)), (queries, table.to(dtype)), (queries.to(dtype), table)):
        check(one, other, 4, metric)
        distances, indices = nearest_embeddings(one, other, metric=metric)
        assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert indices.dtype == torch.int64
        assert embedding_ranks(one, other, targets.int(), metric=metric).dtype == torch.int64
    if dtype == torch.float64:
        distances, _ = nearest_embeddings(queries.double(), table.double(), 4, metric=metric)
        exact = np.sort(oracle_distances(queries.double(), table.double(), metric), axis=1)[:, :4]
        np.testing.assert_allclose(distances.numpy(), exact, rtol=1e-14)


def test_leading_dimensions_and_strides():
    queries, table, targets = embeddings(90, 6, 24)
    expected = nearest_embeddings(queries, table, 3)
    ranks = embedding_ranks(queries, table, targets)
    shaped = queries.view(2, 3, 4, 6)
    distances, indices = nearest_embeddings(shaped, table, 3)
    assert torch.equal(indices, expected[1].view(2, 3, 4, 3))
    assert torch.equal(distances, expected[0].view(2, 3, 4, 3))
    assert torch.equal(embedding_ranks(shaped, table, targets.view(2, 3, 4)), ranks.view(2, 3, 4))
    moved = shaped.transpose(0, 2)
    columns = table.T.contiguous().T
    assert torch.equal(nearest_embeddings(moved, columns, 3)[1], indices.transpose(0, 2))
    assert torch.equal(
        embedding_ranks(moved, columns, targets.view(2, 3, 4).transpose(0, 2)).flatten().sort()[0], ranks.sort()[0]
    )
    one = nearest_embeddings(queries[5], table, 3)
    assert (one[0].shape, one[1].tolist()) == ((3,), expected[1][5].tolist())
    assert embedding_ranks(queries[5], table, targets[5]) == ranks[5]
    distances, indices = nearest_embeddings(queries[:0], table, 3)
    assert (distances.shape, indices.shape) == ((0, 3), (0, 3))
    assert embedding_ranks(queries[:0].view(2, 0, 6), table, targets[:0].view(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_bounds_hold_and_are_useful(metric):
    """Every exact d² lies in its interval, and few pairs of an ordinary table need a direct comparison."""
    generator = torch.Generator().manual_seed(3)
    for width, offset in ((8, 0.0), (768, 5.0), (4096, 1000.0)):
        table = torch.randn(200, width, generator=generator) + offset
        queries = table[:50] + 0.3 * torch.randn(50, width, generator=generator)
        center = scan.center_of(queries, table, metric, 2**24)
        sides = tuple(scan.side_of(side, center, metric) for side in (queries, table))
        exact = torch.stack([scan.squared_distances(query.expand_as(table), table, metric) for query in queries])
        for sign in (1, -1):
            bound, missing = (offset[:, None] for offset in scan._offsets(*sides, sign))
            error = scan._keys(*sides, sign).double() + missing - sign * exact
            assert (error.abs() <= bound).all()
        others = exact[~torch.eye(50, 200, dtype=torch.bool)]
        assert 2 * bound.max() < 0.01 * others.min()


@pytest.mark.parametrize("metric", METRICS)
def test_few_direct_comparisons(monkeypatch, metric):
    compared = []
    direct = scan.direct
    monkeypatch.setattr(scan, "direct", lambda *args: compared.append(len(args[1])) or direct(*args))
    queries, table, targets = embeddings(20_000, 64, 50)
    nearest_embeddings(queries, table, 5, metric=metric, max_chunk_bytes=4 * 2**20)
    assert sum(compared) < 100 * 50
    compared.clear()
    embedding_ranks(queries, table, targets, metric=metric)
    assert sum(compared) < 10 * 50


def test_zero_queries_are_compared_with_one_block(monkeypatch):
    """Cosine distances from zero are all 1: later rows at the same distance need no comparison."""
    compared = []
    direct = scan.direct
    monkeypatch.setattr(scan, "direct", lambda *args: compared.append(len(args[1])) or direct(*args))
    queries, table, _ = embeddings(20_000, 64, 50)
    queries[::2] = 0
    _, indices = nearest_embeddings(queries, table, 3, metric="cosine", max_chunk_bytes=4 * 2**20)
    assert indices[::2].tolist() == [[0, 1, 2]] * 25
    assert sum(compared) < 400 * 50


@pytest.mark.parametrize("farthest", [False, True], ids=["nearest", "farthest"])
def test_any_order_of_the_table(monkeypatch, farthest):
    """Rows sorted from far to near, so that every block brings nearer ones than all before."""
    compared = []
    direct = scan.direct
    monkeypatch.setattr(scan, "direct", lambda *args: compared.append(len(args[1])) or direct(*args))
    _, table, _ = embeddings(20_000, 16, 1)
    query = torch.zeros(1, 16)
    table = table[(table - query).norm(dim=1).argsort(descending=not farthest)]
    check(query, table, 4, "l2", farthest, max_chunk_bytes=2**20)
    blocks = -(-20_000 // scan.sizes_of(16, 4, 2**20).table)
    assert blocks > 100
    assert sum(compared) <= 2 * 4 * blocks


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("table_kind", ["random", "equal"])
@pytest.mark.parametrize("max_chunk_bytes", [2**17, 2**20])
def test_memory_is_bounded(metric, table_kind, max_chunk_bytes):
    queries, table, targets = embeddings(700, 24, 40)
    table = table if table_kind == "random" else table[:1].expand(700, 24)
    with LiveBytes() as counted:
        nearest.implementation(search(queries, table, k=10, metric=metric, max_chunk_bytes=max_chunk_bytes))
    outputs = 40 * 10 * (8 + 8 + 4)
    assert counted.peak <= max_chunk_bytes + outputs
    with LiveBytes() as counted:
        ranks.implementation(ranking(queries, table, targets, metric=metric, max_chunk_bytes=max_chunk_bytes))
    assert counted.peak <= max_chunk_bytes + 40 * (8 + 8)


def test_memory_is_bounded_for_many_queries():
    """More queries than are held as points at once."""
    _, table, _ = embeddings(3000, 24, 1)
    assert scan.sizes_of(24, 1, 2**17).held < 1000
    with LiveBytes() as counted:
        nearest.implementation(search(table, table, k=2, metric="l2", max_chunk_bytes=2**17))
    assert counted.peak <= 2**17 + 3000 * 2 * (8 + 8 + 4)
    check(table[:100], table, 2, "l2", max_chunk_bytes=2**17)


@pytest.mark.parametrize("metric", METRICS)
def test_autocast_and_coarse_products_change_nothing(metric):
    queries, table, targets = embeddings(400, 96, 20)
    expected = (
        *nearest_embeddings(queries, table, 5, metric=metric),
        embedding_ranks(queries, table, targets, metric=metric),
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = (
                *nearest_embeddings(queries, table, 5, metric=metric),
                embedding_ranks(queries, table, targets, metric=metric),
            )
            with full_precision_products(torch.device("cpu")):
                assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
                assert (queries @ table.T).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_no_gradient_and_inputs_untouched():
    queries, table, targets = embeddings(80, 6, 5)
    copies = queries.clone(), table.clone()
    distances, indices = nearest_embeddings(queries.requires_grad_(), table.requires_grad_(), 2)
    ranks = embedding_ranks(queries, table, targets)
    assert not any(one.requires_grad for one in (distances, indices, ranks))
    assert torch.equal(queries, copies[0])
    assert torch.equal(table, copies[1])


@pytest.mark.parametrize("metric", METRICS)
def test_through_the_compiler(metric):
    """``impl="compile"``: the scan fuses differently, the results are the same."""
    queries, table, targets = embeddings(350, 24, 30)
    expected = nearest_embeddings(queries, table, 6, metric=metric)
    actual = nearest_embeddings(queries, table, 6, metric=metric, max_chunk_bytes=100_000, impl="compile")
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(
        embedding_ranks(queries, table, targets, metric=metric, impl="compile"),
        embedding_ranks(queries, table, targets, metric=metric),
    )


@pytest.mark.parametrize("metric", METRICS)
def test_registration(metric):
    queries, table, targets = embeddings(70, 6, 12)
    farthest = search(queries.view(3, 4, 6), table, k=4, metric=metric, max_chunk_bytes=10**5, farthest=True)
    ranked = ranking(queries, table, targets, metric=metric, max_chunk_bytes=10**5)
    for operator, arguments in ((nearest, farthest), (ranks, ranked)):
        torch.library.opcheck(operator.overload, operator.flat(arguments))

    def both(queries: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        distances, indices = nearest_embeddings(queries, table, 3, metric=metric)
        return distances, indices, embedding_ranks(queries, table, targets, metric=metric)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for count in (12, 7):
        arguments = queries[:count], table, targets[:count]
        for one, other in zip(compiled(*arguments), both(*arguments), strict=True):
            assert torch.equal(one, other)


def test_fake_gpu():
    registration.check_fake_gpu(
        registration.Case(
            "both",
            lambda queries, table, targets: (
                *nearest_embeddings(queries.unsqueeze(1), table, 3),
                embedding_ranks(queries, table, targets),
            ),
            lambda rows, dtype: (torch.ones(rows, 6, dtype=dtype), torch.ones(9, 6), torch.zeros(rows).long()),
        )
    )


def test_explain_names_the_device():
    reason = "cpu tensors (Triton needs a GPU, or TRITON_INTERPRET=1 before the first import)"
    assert sgfast.explain(nearest_embeddings, torch.ones(2, 3), torch.ones(4, 3)) == ("torch", reason)
    with pytest.raises(RuntimeError, match="cpu tensors"):
        embedding_ranks(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), impl="triton")


@pytest.mark.parametrize("farthest", [False, True], ids=["nearest", "farthest"])
def test_cosine_of_any_float64(farthest):
    """Squares beyond 1e±308: powers of two change no cosine, not by a bit."""
    queries, table, targets = (one.double() if one.is_floating_point() else one for one in embeddings(90, 7, 6))
    table[4], queries[2] = 0, 0
    expected = nearest_embeddings(queries, table, 5, metric="cosine", farthest=farthest)
    ranks = embedding_ranks(queries, table, targets, metric="cosine")
    for up, down in ((2.0**700, 2.0**-700), (2.0**-900, 2.0**900)):
        actual = nearest_embeddings(queries * up, table * down, 5, metric="cosine", farthest=farthest)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        assert torch.equal(embedding_ranks(queries * up, table * down, targets, metric="cosine"), ranks)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "queries must be float32", {"queries": torch.ones(2, 3, dtype=torch.int64)}),
        (TypeError, "table must be a torch.Tensor; got list", {"table": [1.0]}),
        (ValueError, r"table must have shape \(V, D\), both at least 1; got \(3,\)", {"table": torch.ones(3)}),
        (ValueError, r"table must have shape .* got \(0, 3\)", {"table": torch.ones(0, 3)}),
        (ValueError, r"queries must have shape \(..., 4\) as table; got \(2, 3\)", {"table": torch.ones(5, 4)}),
        (ValueError, "table and queries must be on one device", {"table": torch.ones(5, 3, device="meta")}),
        (ValueError, r"k must lie in \[1, 5\], the rows of table; got 0", {"k": 0}),
        (ValueError, "k must lie .* got 6", {"k": 6}),
        (TypeError, "k must be an int; got float", {"k": 1.0}),
        (ValueError, "metric must be one of l2, cosine; got 'dot'", {"metric": "dot"}),
        (ValueError, "max_chunk_bytes must be positive", {"max_chunk_bytes": 0}),
        (ValueError, "impl must be one of", {"impl": "cuda"}),
    ],
)
def test_nearest_errors(error, match, arguments):
    with pytest.raises(error, match=match):
        nearest_embeddings(**{"queries": torch.ones(2, 3), "table": torch.ones(5, 3), **arguments})


@pytest.mark.parametrize(
    ("error", "match", "targets"),
    [
        (TypeError, "targets must be a torch.Tensor; got list", [0, 1]),
        (TypeError, "targets must hold integers; got torch.float32", torch.zeros(2)),
        (TypeError, "targets must hold integers; got torch.bool", torch.zeros(2, dtype=torch.bool)),
        (ValueError, r"targets must have the shape of queries .* \(2,\); got \(3,\)", torch.zeros(3).long()),
        (ValueError, r"targets must lie in \[0, 5\)", torch.tensor([0, 5])),
        (ValueError, r"targets must lie in \[0, 5\)", torch.tensor([-1, 0])),
    ],
)
def test_ranks_errors(error, match, targets):
    with pytest.raises(error, match=match):
        embedding_ranks(torch.ones(2, 3), torch.ones(5, 3), targets)
