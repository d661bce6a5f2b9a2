"""Says once in a run that its loss has nothing to learn from, where the run would go on without a word."""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from sgfast.loss.factory import ComponentLossesDict

# Components that keep what the clean model computes; the others make the transform or its protection stronger.
_UTILITY = frozenset(
    {"distillation_layer_cosine_distance", "distillation_layer_l2_distance", "distillation_cross_entropy"}
)


class LossOverNothing:
    """Token counts of a run's first steps, until they are looked at.

    The counts stay on their device: `warn_once` reads them when a trainer logs, which synchronises anyway.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._looked = False

    def add(self, counts: Tensor) -> None:
        """Add a step's counts of tokens that count in the loss, that are transformed, and that are attended."""
        if not self._looked:
            self._counts = counts if self._counts is None else self._counts + counts

    def warn_once(self, components: Collection[str], hyperparameters: Callable[[], Mapping[str, Any]]) -> None:
        """Warn of empty masks and of weights that leave no utility, the first time that there are counts.

        Args:
            components: names of what the loss computes. Of names that are not the library's own nobody knows what they
                measure: they pass for utility.
            hyperparameters: gives the loss's; an ``alpha`` among them weighs the strength of a transform.
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
                f"the loss has no utility term: {weights}, so the training makes the transform stronger and nothing "
                f"keeps what the model computes (computed: {', '.join(sorted(measured))})",
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
