"""Warning, once in a run, that the loss has nothing to learn from. The run would otherwise go on silently."""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from sgfast.loss.factory import ComponentLossesDict

# Components that keep the clean model's outputs. The other components make the transform or its protection stronger.
_UTILITY = frozenset(
    {"distillation_layer_cosine_distance", "distillation_layer_l2_distance", "distillation_cross_entropy"}
)


class LossOverNothing:
    """Token counts of a run's first steps, kept until `warn_once` reads them.

    The counts stay on their device. A trainer calls `warn_once` when it logs: logging synchronises the device anyway.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._looked = False

    def add(self, counts: Tensor) -> None:
        """Add the counts (3,) of one step: tokens that count in the loss, transformed tokens, attended tokens."""
        if not self._looked:
            self._counts = counts if self._counts is None else self._counts + counts

    def warn_once(self, components: Collection[str], hyperparameters: Callable[[], Mapping[str, Any]]) -> None:
        """Warn of empty masks and of weights without a utility term, at the first call after `add`.

        Args:
            components: names of the components that the loss computes. A name that the library does not know counts
                as a utility component.
            hyperparameters: a function that returns the loss's hyperparameters. A hyperparameter ``alpha`` is the
                weight of the transform's strength.
        """
        if self._counts is None:
            return
        self._looked = True
        counted, transformed, _ = self._counts.tolist()
        self._counts = None
        alpha = hyperparameters().get("alpha")
        measured = set(components) - {"total"}
        known = ComponentLossesDict.__annotations__.keys()
        if measured <= known and (alpha == 1 or measured.isdisjoint(_UTILITY)):
            weights = "alpha is 1" if alpha == 1 else "no weight of a utility component is positive"
            warnings.warn(
                f"the loss has no utility term: {weights}. The training makes the transform stronger, and no term "
                f"keeps the model's outputs (computed: {', '.join(sorted(measured))})",
                stacklevel=4,
            )
        elif not counted:
            warnings.warn(
                "the utility terms of the loss are over nothing: no attended token has loss_mask=1 "
                "in the steps so far (with ignore_prompt_loss=True, only assistant turns within max_length count)",
                stacklevel=4,
            )
        if not transformed:
            warnings.warn(
                "the privacy terms of the loss are over nothing: no attended token has noise_mask=1 "
                "in the steps so far",
                stacklevel=4,
            )
