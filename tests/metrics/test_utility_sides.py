"""Utility of linear sides: the same values as of their logits."""

import pytest
import torch

from sgfast import LinearLogits, UtilityMetrics
from tests.ops.linear.heads import random_head


@pytest.mark.parametrize("clean", ["linear", "logits"])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_as_of_logits(dtype, top_k, clean):
    student, teacher = random_head(12, 5, 60, 1, dtype, scale=0.5, softcap=5.0), random_head(12, 7, 60, 2, dtype)
    mask, ids = torch.ones(2, 6), torch.arange(12).view(2, 6)
    mask[0, 4:] = 0
    with torch.no_grad():
        sides = [
            LinearLogits(head.hidden.view(2, 6, -1), head.weight, head.bias, scale=head.scale, softcap=head.softcap)
            for head in (student, teacher)
        ]
        logits = [(head.hidden.double() @ head.weight.double().T + head.bias.double()) for head in (student, teacher)]
        logits[0] = 5 * torch.tanh(logits[0] / 2 / 5)
        logits = [one.view(2, 6, -1) for one in logits]
    found, want = UtilityMetrics(top_k, max_chunk_bytes=40_000), UtilityMetrics(top_k)
    per_sequence = found.update(sides[0], sides[1] if clean == "linear" else logits[1], mask, ids)
    right = want.update(*logits, mask, ids)
    torch.testing.assert_close(per_sequence, right, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert found.compute()["attended_tokens"] == 10
