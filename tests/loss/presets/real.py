"""TextBrewer itself, from PyPI, to compare with.

Its import asks for a TensorBoard writer, which no loss uses: an empty one stands in where TensorBoard is missing.
"""

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

if "tensorboardX" not in sys.modules:
    stand_in = types.ModuleType("tensorboardX")
    stand_in.SummaryWriter = None
    sys.modules["tensorboardX"] = stand_in
    try:
        import textbrewer
    finally:
        del sys.modules["tensorboardX"]

KD_LOSS_MAP, MATCH_LOSS_MAP = textbrewer.KD_LOSS_MAP, textbrewer.MATCH_LOSS_MAP
DistillationConfig, TEMPERATURE_SCHEDULER = textbrewer.DistillationConfig, textbrewer.TEMPERATURE_SCHEDULER


def nst(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """The ``nst`` of TextBrewer's repository, from that of the release, which divides masked matrices by L, not D."""
    if mask is not None:
        scaled = [[pair[0] * (pair[0].shape[1] / pair[0].shape[2]), pair[1]] for pair in (state_S, state_T)]
        return textbrewer.MATCH_LOSS_MAP["nst"](*scaled, mask)
    return textbrewer.MATCH_LOSS_MAP["nst"](state_S, state_T)


def match_loss(name: str) -> Callable[..., Tensor]:
    return nst if name in ("nst", "mmd") else textbrewer.MATCH_LOSS_MAP[name]


def distiller(config: dict[str, Any], projections: Sequence[Any] = ()) -> Any:
    """A GeneralDistiller that computes losses (``compute_loss``) and trains nothing."""
    from textbrewer.distiller_general import GeneralDistiller

    built = GeneralDistiller.__new__(GeneralDistiller)
    built.d_config = DistillationConfig(**config)
    built.kd_loss = KD_LOSS_MAP[built.d_config.kd_loss_type]
    built.projs = list(projections) or [None] * len(built.d_config.intermediate_matches)
    built.has_custom_matches = False
    return built


def adapted(outputs: dict[str, Any]) -> dict[str, Any]:
    """What a distiller makes of an adaptor's dictionary; it writes into tensors, so they are copied."""
    from textbrewer.distiller_utils import post_adaptor

    copies = {
        key: [one.clone() for one in value] if isinstance(value, list) else value.clone()
        for key, value in outputs.items()
    }
    return post_adaptor(copies)
