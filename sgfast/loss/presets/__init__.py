"""TextBrewer's presets, exact and finite: change one import and get the same numbers.

The numbers equal the numbers of TextBrewer's repository, with gradients to both sides. (The repository's masked ``nst``
differs from the release on PyPI, see `mmd_loss`.) The presets are finite where TextBrewer gives NaN: for nothing but
masked positions, empty rows, −inf scores, counts beyond half precision, and zero vectors. They raise ValueError where
TextBrewer broadcasts sizes that do not fit. Everything is computed in float32 (float64 if an input is). Besides the
inputs, backward needs a few scalars per row.

=========================== ===========================================================================
``KD_LOSS_MAP``             ``mse``, ``ce``: between logits
``MATCH_LOSS_MAP``          ``attention_mse``, ``attention_mse_sum``, ``attention_ce``,
                            ``attention_ce_mean``, ``hidden_mse``, ``cos``, ``pkd``, ``fsp`` (= ``gram``),
                            ``nst`` (= ``mmd``): between intermediate features
``PROJ_MAP``                ``linear``, ``relu``, ``tanh``: from the student's width to the teacher's
``WEIGHT_SCHEDULER``        ``linear_decay``, ``linear_growth``
``TEMPERATURE_SCHEDULER``   ``constant``, ``flsw``, ``cwsm``
=========================== ===========================================================================

All are dictionaries that users extend: ``MATCH_LOSS_MAP["my_loss"] = my_loss``. A user's kd loss or temperature
scheduler receives the rows' mask if it has a parameter ``mask``. Otherwise it receives only the selected rows.
"""

from sgfast.loss.presets.config import DistillationConfig, IntermediateMatch
from sgfast.loss.presets.distillation_loss import DistillationLoss
from sgfast.loss.presets.registry import (
    ADAPTOR_KEYS,
    FEATURES,
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
    register_new,
)

__all__ = [
    "ADAPTOR_KEYS",
    "FEATURES",
    "KD_LOSS_MAP",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "TEMPERATURE_SCHEDULER",
    "WEIGHT_SCHEDULER",
    "DistillationConfig",
    "DistillationLoss",
    "IntermediateMatch",
    "register_new",
]
