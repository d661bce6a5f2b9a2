"""Liger-Kernel's losses, if the package is installed: its kernels on a GPU, the core of its chunked losses elsewhere.

Each loss takes student and teacher logits and returns one number over all of them.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sgfast.benchmarking.measuring import Outputs
from sgfast.benchmarking.plain import log_softmax

LIGER = "Liger-Kernel"


def liger_loss(kind: str, device: str) -> Callable[..., Outputs] | None:
    """Return Liger-Kernel's loss of this kind, or None if it has none for the device."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    losses = {"jensen_shannon": _chunked_jensen_shannon}
    if torch.device(device).type == "cuda":
        losses = {
            "jensen_shannon": _jensen_shannon,
            "forward_kl": _forward_kl,
            "total_variation": _total_variation,
        }
    return losses.get(kind)


def _chunked_jensen_shannon(student: Tensor, teacher: Tensor) -> Outputs:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    return (LigerFusedLinearJSDFunction.distillation_loss_fn(student.float(), teacher.float(), beta=0.5).reshape(1),)


def _jensen_shannon(student: Tensor, teacher: Tensor) -> Outputs:
    from liger_kernel.transformers import LigerJSD

    return (LigerJSD()(log_softmax(student), log_softmax(teacher)).reshape(1),)


def _forward_kl(student: Tensor, teacher: Tensor) -> Outputs:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return (loss(log_softmax(student), log_softmax(teacher)).reshape(1),)


def _total_variation(student: Tensor, teacher: Tensor) -> Outputs:
    from liger_kernel.transformers import LigerTVDLoss

    return (LigerTVDLoss()(log_softmax(student).exp(), log_softmax(teacher).exp()).reshape(1),)
