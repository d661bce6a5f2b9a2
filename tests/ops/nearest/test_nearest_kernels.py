"""The nearest-embedding kernels against brute force in float64, and how rarely they leave a query to the scan."""

import math

import pytest
import torch
from torch import Tensor

import sgfast
from sgfast.ops import embedding_ranks, nearest_embeddings
from sgfast.ops.nearest import kernels as kernel_search
from sgfast.ops.nearest import scan as table_scan
from tests.implementations import DEVICE, RUNS_TRITON
from tests.ops.nearest.test_nearest import METRICS, embeddings, oracle_distances, oracle_order

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not RUNS_TRITON, reason="needs kernels")]


@pytest.fixture(autouse=True)
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call leaves to the scan."""
    counts: list[int] = []
    for name in ("nearest", "ranks"):
        scan = getattr(table_scan, name)

        def counted(queries: Tensor, *rest: object, scan=scan) -> object:
            counts.append(len(queries))
            return scan(queries, *rest)

        monkeypatch.setattr(table_scan, name, counted)
    return counts


def check(
    queries: Tensor, table: Tensor, k: int, metric: str, *, far: bool = True, targets: Tensor | None = None
) -> None:
    """Nearest, farthest and ranks, values and indices."""
    exact = oracle_distances(queries, table, metric)
    on_device = queries.to(DEVICE), table.to(DEVICE)
    for farthest in (False, True)[: 1 + far]:
        distances, indices = nearest_embeddings(*on_device, k, metric=metric, farthest=farthest, impl="triton")
        order = torch.from_numpy(oracle_order(exact, farthest)[:, :k].copy())
        assert torch.equal(indices.cpu(), order)
        expected = torch.from_numpy(exact).gather(1, order)
        torch.testing.assert_close(distances.cpu().double(), expected, rtol=1.2e-7, atol=1e-38)
    if targets is not None:
        ranks = embedding_ranks(*on_device, targets.to(DEVICE), metric=metric, impl="triton")
        assert ranks.tolist() == (oracle_order(exact) == targets.numpy()[:, None]).argmax(1).tolist()


@pytest.mark.parametrize("programs", [1, 256], ids=["one program", "shares"])
@pytest.mark.parametrize("metric", METRICS)
def test_equals_brute_force(monkeypatch, metric, programs, scanned):
    """Copies of rows, zero rows and a zero query; tables of several tiles, in one program and shared out."""
    from sgfast_kernels import nearest

    monkeypatch.setattr(nearest, "_PROGRAMS", programs)
    queries, table, targets = embeddings(200, 19, 7)
    table[40:52], queries[3] = 0, 0
    targets[5] = 47
    check(queries, table, 3, metric, targets=targets)
    # The zero query is as far from every row by cosine, as near to the zero rows by l2: more than there are candidates.
    assert sum(scanned) <= (2 if metric == "l2" else 1)


@pytest.mark.parametrize(
    ("vocabulary", "width", "queries", "k"), [(1, 1, 1, 1), (2, 16, 17, 2), (64, 5, 1, 56), (65, 33, 5, 24)]
)
@pytest.mark.parametrize("metric", METRICS)
def test_any_size(metric, vocabulary, width, queries, k):
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(vocabulary, width, generator=generator)
    # Columns in a row.
    check(torch.randn(width, queries, generator=generator).T, table, k, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_near_duplicates_far_from_the_origin(metric, scanned):
    """Five rows each within 1e-4, behind an offset that would swamp them in a product of the vectors themselves."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(30, 48, generator=generator)
    table = (base[:, None] * (1 + 1e-4 * torch.randn(30, 5, 48, generator=generator))).flatten(0, 1) + 30.0
    targets = torch.randint(150, (6,), generator=generator)
    check(table[targets] + 1e-4 * torch.randn(6, 48, generator=generator), table, 3, metric, targets=targets)
    # Only farthest rows, five of them within the bound, and only by chance more.
    assert sum(scanned) <= 6


@pytest.mark.parametrize("metric", METRICS)
def test_more_ties_than_candidates(metric, scanned):
    """Equal rows: nothing is proved, the scan decides, the lower index comes first."""
    table = torch.tensor([0.3, -1.2, 2.5]).expand(100, 3).contiguous().to(DEVICE)
    queries, targets = torch.randn(3, 3).to(DEVICE), torch.tensor([0, 50, 99], device=DEVICE)
    _, indices = nearest_embeddings(queries, table, 5, metric=metric, impl="triton")
    assert indices.tolist() == [list(range(5))] * 3
    assert torch.equal(embedding_ranks(queries, table, targets, metric=metric, impl="triton"), targets)
    assert scanned == [3, 3]


@pytest.mark.parametrize("metric", METRICS)
def test_nan_infinity_and_squares_that_overflow(metric):
    queries, table, targets = embeddings(70, 5, 4)
    table[60], table[61], table[62] = math.nan, math.inf, 1e30
    queries[1], queries[2] = 1e25, math.nan
    exact = oracle_distances(queries, table, metric)
    exact[:, 60:62] = exact[2] = math.inf
    for farthest in (False, True):
        _, indices = nearest_embeddings(
            queries.to(DEVICE), table.to(DEVICE), 3, metric=metric, farthest=farthest, impl="triton"
        )
        assert indices.tolist() == oracle_order(exact, farthest)[:, :3].tolist()
    ranks = embedding_ranks(queries.to(DEVICE), table.to(DEVICE), targets.to(DEVICE), metric=metric, impl="triton")
    assert ranks.tolist() == (oracle_order(exact) == targets.numpy()[:, None]).argmax(1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes_and_strides(metric, dtype):
    queries, table, targets = embeddings(90, 32, 6)
    rows = table.to(dtype)[:, 8:24]
    check(queries[:, 8:24], rows, 2, metric, far=False, targets=targets)
    expected = nearest_embeddings(queries[:, 8:24], rows, 2, metric=metric)
    shaped = queries[:, 8:24].to(DEVICE).view(2, 3, 16).transpose(0, 1)
    distances, indices = nearest_embeddings(shaped, rows.to(DEVICE), 2, metric=metric, max_chunk_bytes=1, impl="triton")
    assert torch.equal(indices.cpu(), expected[1].view(2, 3, 2).transpose(0, 1))
    torch.testing.assert_close(distances.cpu(), expected[0].view(2, 3, 2).transpose(0, 1), rtol=2e-7, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_bounds_hold(metric):
    """No row is nearer than the kernel's bound says, none that it counts as nearer is not, and the bounds are tight."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(64, 300, generator=generator) + 5
    queries, table = (one.to(DEVICE) for one in (table[:20] + 0.3 * torch.randn(20, 300, generator=generator), table))
    center, scale = table_scan.center_of(queries, table, metric, 2**24), kernel_search._scale(table, metric, 2**24)
    side, bound = table_scan.side_of(queries, center, metric), kernel_search._bound(table, metric)
    exact = torch.stack([table_scan.squared_distances(query.expand_as(table), table, metric) for query in queries])
    import sgfast_kernels as kernels

    for sign in (1, -1):
        least, rows = kernels.nearest_candidates(*side[:3], table, scale, center, sign, bound, 64)
        assert torch.equal(rows.sort(1).values, torch.arange(64, device=DEVICE).expand(20, 64))
        error = sign * (exact.gather(1, rows) - side.squares.double()[:, None]) - least.double()
        assert (error >= 0).all()
        assert error.max() < 0.01 * exact.max()
    limits = (exact[:, 30] - side.squares.double()).float()
    before, undecided, _ = kernels.rank_candidates(
        *side[:3], table, scale, center, bound, 16, torch.stack([limits, limits])
    )
    assert (before <= (exact < exact[:, 30:31]).sum(1)).all()
    assert (before + undecided > (exact < exact[:, 30:31]).sum(1)).all()


def test_rows_more_than_2_31_elements_apart():
    # Memory is mapped when it is touched.
    stride = 2**31 + 64
    storage = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    storage.set_(torch.UntypedStorage(2 * (stride + 16), device=DEVICE))
    table = storage.as_strided((2, 16), (stride, 1))
    table.copy_(torch.tensor([[0.0], [3.0]]).expand(2, 16))
    distances, indices = nearest_embeddings(torch.full((1, 16), 2.0, device=DEVICE), table, 2, impl="triton")
    assert indices.tolist() == [[1, 0]]
    assert distances.tolist() == [[4.0, 8.0]]


def test_refusals():
    queries, table = torch.ones(2, 3, device=DEVICE), torch.ones(60, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"k = 57 \(the kernels find at most 56\)"):
        sgfast.explain(nearest_embeddings, queries, table, 57, impl="triton")
    with pytest.raises(RuntimeError, match="queries is float64"):
        nearest_embeddings(queries.double(), table, impl="triton")
    with pytest.raises(RuntimeError, match="table is float64"):
        embedding_ranks(queries, table.double(), torch.zeros(2, device=DEVICE).long(), impl="triton")
    with pytest.raises(RuntimeError, match=r"table has strides \(1, 60\)"):
        nearest_embeddings(queries, torch.ones(3, 60, device=DEVICE).T, impl="triton")
    assert (
        sgfast.explain(embedding_ranks, queries, table, torch.zeros(2).long(), impl="triton").implementation == "triton"
    )
    assert nearest_embeddings(queries[:0], table, 3, impl="triton")[1].shape == (0, 3)
