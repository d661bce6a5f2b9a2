import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgfast.utils.torch import split_2d


@given(
    st.tuples(st.integers(0, 5), st.integers(0, 7)),
    st.none() | st.integers(1, 8),
    st.none() | st.integers(1, 8),
    st.sampled_from([(), (3,)]),
)
def test_pieces_are_bounded_views_that_rebuild_the_tensor(shape, max_batch_size, max_sequence_length, rest):
    tensor = torch.arange(torch.Size((*shape, *rest)).numel()).view(*shape, *rest)
    rows = split_2d(tensor, max_batch_size, max_sequence_length)
    assert torch.equal(torch.cat([torch.cat(row, dim=1) for row in rows], dim=0), tensor)
    for row in rows:
        for piece in row:
            assert piece.shape[0] <= (max_batch_size or shape[0])
            assert piece.shape[1] <= (max_sequence_length or shape[1])
            assert piece.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_order_is_batch_then_sequence_with_small_last_pieces():
    rows = split_2d(torch.arange(15).view(3, 5), 2, 3)
    assert [[piece.tolist() for piece in row] for row in rows] == [
        [[[0, 1, 2], [5, 6, 7]], [[3, 4], [8, 9]]],
        [[[10, 11, 12]], [[13, 14]]],
    ]


def test_none_does_not_split():
    tensor = torch.randn(3, 5, 2)
    ((piece,),) = split_2d(tensor, None, None)
    assert torch.equal(piece, tensor)


def test_strided_tensors_are_not_copied():
    tensor = torch.arange(24).view(4, 6)[:, ::2]
    pieces = split_2d(tensor, 3, 2)
    assert pieces[1][1].tolist() == [[22]]
    assert pieces[1][1].data_ptr() == tensor[3:, 2:].data_ptr()


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, None), (None, -2)])
def test_sizes_below_one(sizes):
    with pytest.raises(ValueError, match=r"must be at least 1 or None; got (0|-1|-2)"):
        split_2d(torch.zeros(2, 2), *sizes)


@pytest.mark.parametrize("size", [1.5, True, "2"])
def test_sizes_of_other_types(size):
    with pytest.raises(TypeError, match="max_sequence_length must be an int or None"):
        split_2d(torch.zeros(2, 2), 1, size)


def test_other_inputs():
    with pytest.raises(ValueError, match=r"two dimensions; got shape \(3,\)"):
        split_2d(torch.zeros(3), 1, 1)
    with pytest.raises(TypeError, match=r"tensor must be a torch\.Tensor; got list"):
        split_2d([[1]], 1, 1)
