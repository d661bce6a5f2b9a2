"""DivergenceLoss beside Liger-Kernel's chunked loss from hidden states, which runs on a CPU too."""

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

from sgfast.loss import DivergenceLoss

TOKENS, WIDTH, VOCABULARY = 23, 16, 301


@pytest.mark.parametrize("hard_label_weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_loss_and_gradients_are_ligers(beta, temperature, hard_label_weight):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, TOKENS, WIDTH, generator=generator)
    head, teacher_head = torch.randn(2, VOCABULARY, WIDTH, generator=generator)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::4] = -100
    leaves = hidden.requires_grad_(), head.requires_grad_()

    liger = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard_label_weight,
        weight_soft_loss=1 - hard_label_weight,
        beta=beta,
        temperature=temperature,
        compiled=False,
        chunk_size=7,
    )
    expected = liger(hidden, head, teacher_hidden, teacher_head, labels)
    expected_gradients = torch.autograd.grad(expected, leaves)

    loss = DivergenceLoss("jensen_shannon", beta=beta, temperature=temperature, hard_label_weight=hard_label_weight)
    value = loss(hidden @ head.T, teacher_hidden @ teacher_head.T, labels=labels)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for gradient, wanted in zip(torch.autograd.grad(value, leaves), expected_gradients, strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
