"""The accumulators of `sgfast.metrics` as metrics of torchmetrics (``pip install "sgfast[torchmetrics]"``).

The state is the accumulator's own: integers, which add without rounding. A result is therefore the same to the last bit
as the accumulator's, however the sequences are cut into updates, processes and merged metrics. The metrics work in
``MetricCollection``, move with ``to(device)``, add up all processes in ``compute``, and can be logged by Lightning.

As in all of torchmetrics, ``state_dict`` has the state only after ``metric.persistent(True)``. The name of the state
holds the options, so that neither a state of other options is loaded nor a ``MetricCollection`` shares one state among
metrics of different options.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor

from sgfast.metrics import accumulators, divergence_metrics
from sgfast.ops import validation
from sgfast.ops.divergence.problem import Support
from sgfast.ops.nearest.operation import Metric as Distance
from sgfast.ops.sides import CleanSide, LogitsOrSide


def _by_name(figures: dict[str, Any]) -> dict[str, float]:
    """Return numbers by name: ``{"kind": {"mean": 1.0}}`` becomes ``{"kind/mean": 1.0}``."""
    named: dict[str, float] = {}
    for name, figure in figures.items():
        if isinstance(figure, dict):
            named |= {f"{name}/{part}": value for part, value in figure.items()}
        else:
            named[name] = figure
    return named


class _AccumulatorMetric(torchmetrics.Metric):  # type: ignore[misc]
    """A metric whose state is the counts of an accumulator."""

    full_state_update = False
    is_differentiable = False

    def __init__(self, accumulator: Any, figure: str | None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._accumulator = accumulator
        if figure is not None:
            validation.check_choice("figure", figure, _by_name(accumulator.compute(all_processes=False)))
        self.figure = figure
        options = "_".join(f"{name}_{value}" for name, value in accumulator.options.items() if value is not None)
        self._state = re.sub(r"\W", "_", f"counts_{options}").rstrip("_")
        self.add_state(self._state, accumulator.counts, dist_reduce_fx=accumulator.combined)

    def _add(self, update: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        """Run an update of the accumulator on this metric's state."""
        self._accumulator.counts = getattr(self, self._state)
        update(*arguments, **keywords)
        setattr(self, self._state, self._accumulator.counts)

    def compute(self) -> dict[str, Tensor] | Tensor:
        """Return the figures of all updates of all processes, with one transfer from the device.

        Returns:
            The accumulator's figures by name, float64 scalars on the metric's device; with ``figure``, this one alone.
        """
        counts = getattr(self, self._state)
        self._accumulator.counts = counts
        figures = _by_name(self._accumulator.compute(all_processes=False))  # torchmetrics has added up the processes
        values = {
            name: torch.tensor(value, dtype=torch.float64, device=counts.device) for name, value in figures.items()
        }
        return values if self.figure is None else values[self.figure]

    def merge_state(self, incoming_state: "dict[str, Any] | torchmetrics.Metric") -> None:
        """Add the updates of another metric of the same class and options, or its ``metric_state``, in place.

        Raises:
            ValueError: another class, or other options.
        """
        super().merge_state(incoming_state)
        self._computed = None

    def set_dtype(self, dst_type: str | torch.dtype) -> "_AccumulatorMetric":
        """Return the metric as it is: integers have no other precision."""
        return self


class UtilityMetrics(_AccumulatorMetric):
    """`sgfast.metrics.UtilityMetrics` as a ``torchmetrics.Metric``: next-token utility over a stream of sequences.

    Args:
        top_k: see `sgfast.metrics.UtilityMetrics`, as for the next four.
        kinds: one or more of the kinds of `sgfast.ops.divergences`; None for the four documented ones.
        support: meaning of the restriction to ``top_k``.
        shared_vocab: n: compare the first n columns only.
        max_chunk_bytes: bound on the divergences' temporaries.
        figure: the name of one figure, which ``compute`` returns alone, for example
            ``"next_token_utility/jensen_shannon"``: Lightning's ``self.log`` takes a metric of one number. None: all.
        keywords: see ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: see `sgfast.metrics.UtilityMetrics`; an unknown figure.

    Example:
        >>> import torch
        >>> from sgfast.metrics.torchmetrics import UtilityMetrics
        >>> metric = UtilityMetrics(figure="next_token_utility/total_variation")
        >>> clean = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
        >>> noisy = torch.tensor([[[0.0, 0.0], [0.0, 3.0]]]).log1p()
        >>> metric.update(noisy, clean, torch.ones(1, 2))
        >>> metric.compute()
        tensor(0.1500, dtype=torch.float64)
    """

    def __init__(
        self,
        top_k: int | None = None,
        *,
        kinds: str | Sequence[str] | None = None,
        support: Support = "truncate",
        shared_vocab: int | None = None,
        max_chunk_bytes: int | None = None,
        figure: str | None = None,
        **keywords: Any,
    ) -> None:
        accumulator = accumulators.UtilityMetrics(
            top_k, kinds=kinds, support=support, shared_vocab=shared_vocab, max_chunk_bytes=max_chunk_bytes
        )
        super().__init__(accumulator, figure, **keywords)

    def update(
        self, noisy_logits: Tensor, clean_logits: Tensor, attention_mask: Tensor, input_ids: Tensor | None = None
    ) -> None:
        """Add a batch of sequences; see ``sgfast.metrics.UtilityMetrics.update``."""
        self._add(self._accumulator.update, noisy_logits, clean_logits, attention_mask, input_ids)


class PrivacyMetrics(_AccumulatorMetric):
    """`sgfast.metrics.PrivacyMetrics` as a ``torchmetrics.Metric``: a nearest-neighbour attack on a stream of tokens.

    The table is no parameter and no buffer. It moves with ``to(device)`` and keeps its dtype. A ``MetricCollection``
    cannot tell two tables of one size apart: give it ``compute_groups=False`` if it holds several.

    Args:
        table: (V, D), the embedding table. It is not copied.
        metric: ``"l2"`` or ``"cosine"``.
        beta: see `sgfast.metrics.PrivacyMetrics`, as for the next three.
        r: the max-rank attack takes the r-th farthest token.
        k: the ranks from which a token counts as transformed.
        max_chunk_bytes: bound on the search's temporaries.
        figure: the name of one figure, which ``compute`` returns alone, for example
            ``"nearest_neighbor_failure_rate"``: Lightning's ``self.log`` takes a metric of one number. None: all.
        keywords: see ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: see `sgfast.metrics.PrivacyMetrics`; an unknown figure.

    Example:
        >>> import torch
        >>> from sgfast.metrics.torchmetrics import PrivacyMetrics
        >>> metric = PrivacyMetrics(torch.eye(3), k=(1,))
        >>> metric.update(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 2]))
        >>> metric.compute()["mean_reconstruction_rank"]
        tensor(0.6667, dtype=torch.float64)
    """

    def __init__(
        self,
        table: Tensor,
        *,
        metric: Distance = "l2",
        beta: int = 1,
        r: int = 1,
        k: Sequence[int] | None = None,
        max_chunk_bytes: int | None = None,
        figure: str | None = None,
        **keywords: Any,
    ) -> None:
        accumulator = accumulators.PrivacyMetrics(
            table, metric=metric, beta=beta, r=r, k=k, max_chunk_bytes=max_chunk_bytes
        )
        super().__init__(accumulator, figure, **keywords)

    def update(self, transformed: Tensor, input_ids: Tensor, noise_mask: Tensor | None = None) -> None:
        """Add tokens; see ``sgfast.metrics.PrivacyMetrics.update``."""
        self._add(self._accumulator.update, transformed, input_ids, noise_mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        moved: torch.nn.Module = super()._apply(fn, exclude_state)
        self._accumulator.table = self._accumulator.table.to(self.device)
        return moved


class DivergenceMetrics(_AccumulatorMetric):
    """`sgfast.metrics.DivergenceMetrics` as a ``torchmetrics.Metric``: divergences over a stream of tokens.

    Args:
        kinds: see `sgfast.metrics.DivergenceMetrics`, as for the next three.
        top_k: restrict each divergence to the union of both sides' top-k.
        support: meaning of the restriction to ``top_k``.
        max_chunk_bytes: bound on the divergences' temporaries.
        figure: the name of one figure, which ``compute`` returns alone, for example ``"forward_kl/mean"``: Lightning's
            ``self.log`` takes a metric of one number. None: all.
        keywords: see ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: see `sgfast.metrics.DivergenceMetrics`; an unknown figure.

    Example:
        >>> import torch
        >>> from sgfast.metrics.torchmetrics import DivergenceMetrics
        >>> metric = DivergenceMetrics("total_variation", figure="total_variation/max")
        >>> metric.update(torch.tensor([[0.0, 3.0], [0.0, 0.0]]).log1p(), torch.zeros(2, 2))
        >>> metric.compute()
        tensor(0.3000, dtype=torch.float64)
    """

    def __init__(
        self,
        kinds: str | Sequence[str] = divergence_metrics.DEFAULT_KINDS,
        top_k: int | None = None,
        *,
        support: Support = "tail",
        max_chunk_bytes: int | None = None,
        figure: str | None = None,
        **keywords: Any,
    ) -> None:
        accumulator = divergence_metrics.DivergenceMetrics(
            kinds, top_k, support=support, max_chunk_bytes=max_chunk_bytes
        )
        super().__init__(accumulator, figure, **keywords)

    def update(self, candidate: LogitsOrSide, reference: CleanSide, mask: Tensor | None = None) -> None:
        """Add tokens; see ``sgfast.metrics.DivergenceMetrics.update``."""
        self._add(self._accumulator.update, candidate, reference, mask)
