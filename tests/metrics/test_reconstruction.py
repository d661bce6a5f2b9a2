import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgfast.metrics.reconstruction import percentage_changed_ids


def test_documented_example():
    changed = percentage_changed_ids(
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        torch.tensor([[1, 2, 3], [1, 2, 6]]),
        torch.tensor([[True, False, True], [True, True, True]]),
    )
    torch.testing.assert_close(changed, torch.tensor([0.0, 2 / 3]), rtol=0, atol=1e-7)


def test_row_without_transformed_tokens_is_nan_and_spares_the_others():
    changed = percentage_changed_ids(
        torch.tensor([[1, 2], [1, 2]]), torch.tensor([[9, 9], [9, 2]]), torch.tensor([[0, 0], [1, 1]])
    )
    assert changed[0].isnan()
    assert changed[1] == 0.5


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=20))
def test_equals_a_plain_count(tokens):
    input_ids, reconstructed, mask = (torch.tensor(column) for column in zip(*tokens, strict=True))
    changed = percentage_changed_ids(input_ids, reconstructed, mask)
    counted = [a != b for a, b, selected in tokens if selected]
    assert changed.shape == ()
    if counted:
        assert changed.item() == pytest.approx(sum(counted) / len(counted), abs=1e-6)
    else:
        assert changed.isnan()


def test_keeps_leading_dimensions():
    input_ids = torch.zeros(2, 3, 4, dtype=torch.int32)
    reconstructed = input_ids.long().clone()
    reconstructed[1, 2, :3] = 7
    changed = percentage_changed_ids(input_ids, reconstructed, torch.ones(2, 3, 4))
    expected = torch.zeros(2, 3)
    expected[1, 2] = 0.75
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reconstructed_ids": torch.zeros(2, 4, dtype=torch.long)}, ValueError, r"reconstructed_ids .*\(2, 4\)"),
        ({"noise_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"noise_mask .*\(3,\)"),
        ({"noise_mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "device"),
        ({"input_ids": torch.zeros(2, 3)}, TypeError, "input_ids must hold integers; got torch.float32"),
        ({"noise_mask": [[True] * 3] * 2}, TypeError, "noise_mask must be a torch.Tensor; got list"),
    ],
)
def test_wrong_inputs(change, error, message):
    ids = torch.zeros(2, 3, dtype=torch.long)
    arguments = {"input_ids": ids, "reconstructed_ids": ids, "noise_mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(error, match=message):
        percentage_changed_ids(**arguments | change)
