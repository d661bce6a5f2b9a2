"""Utility and privacy over any number of batches, files and processes, in constant memory.

The state is integers: exact sums (`sgfast.metrics.exact_sum`) of per-sequence values, and counts of tokens by rank.
Addition of integers has no order, so a result is the same to the last bit however the sequences are cut into updates,
processes and merged accumulators. The result is rounded once, in ``compute``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sgfast.metrics.exact_sum import WIDTH, carried, exact_sums, quotient
from sgfast.metrics.per_sequence import (
    AGREEMENT,
    PREDICTED_MEANS,
    check_comparison,
    sequence_utility,
    sequence_utility_from_hidden,
)
from sgfast.metrics.privacy import check_rank, token_ranks
from sgfast.ops import validation
from sgfast.ops.divergence.problem import Support
from sgfast.ops.nearest.operation import METRICS, Metric
from sgfast.ops.sides import LogitsOrSide

_TRANSFORMATION_RANKS = (10, 100, 1000)


class Accumulator:
    """Integers that updates add to, and the options that two accumulators must share to be added.

    Attributes:
        counts: the state, int64. An update replaces the tensor and never writes to it.
        options: plain numbers and strings.
        maxima: the number of integers at the end of ``counts`` of which the larger one is kept. All others add.
    """

    def __init__(self, counts: Tensor, options: dict[str, Any], maxima: int = 0) -> None:
        self.counts = counts
        self.options = options
        self.maxima = maxima
        self._empty = counts

    def reset(self) -> None:
        """Forget all updates."""
        self.counts = self._empty.to(self.counts.device, copy=True)

    def combined(self, counts: Tensor) -> Tensor:
        """Combine the states of several accumulators of these options, (n, ...) stacked, into one."""
        if not self.maxima:
            return counts.sum(0)
        return torch.cat([counts[:, : -self.maxima].sum(0), counts[:, -self.maxima :].amax(0)])

    def merge(self, other: "Accumulator") -> None:
        """Add the updates of another accumulator of the same options, in place.

        Raises:
            TypeError: ``other`` is of another class.
            ValueError: the options of ``other`` differ.
        """
        if type(other) is not type(self):
            raise TypeError(f"other must be a {type(self).__name__}; got {type(other).__name__}")
        self._check_options("other", other.options)
        self._add(other.counts.to(self.counts.device))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: ``counts``, an int64 tensor, and ``options``, plain numbers and strings."""
        return {"counts": self.counts.clone(), "options": dict(self.options)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace this accumulator's counts by the counts of a ``state_dict``.

        Raises:
            ValueError: the state has other options, or is no such state.
        """
        if set(state_dict) != {"counts", "options"}:
            raise ValueError(f"state_dict must have the keys counts and options; got {sorted(state_dict)}")
        self._check_options("state_dict", state_dict["options"])
        counts = state_dict["counts"]
        validation.check_tensors(counts=counts)
        if not isinstance(counts, Tensor) or counts.shape != self.counts.shape or counts.dtype != torch.int64:
            raise ValueError(f"state_dict's counts must be an int64 tensor of shape {tuple(self.counts.shape)}")
        self.counts = counts.to(self.counts.device, copy=True)

    def _check_options(self, name: str, options: dict[str, Any]) -> None:
        if options != self.options:
            raise ValueError(f"{name} must have been made with the options {self.options}; it has {options}")

    def _add(self, counts: Tensor) -> None:
        # An update decides the device.
        self.counts = self.combined(torch.stack([self.counts.to(counts.device), counts]))

    def _total(self, all_processes: bool) -> Tensor:
        """Return the counts of this process, or of all processes."""
        distributed = torch.distributed
        if not (all_processes and distributed.is_available() and distributed.is_initialized()):
            return self.counts
        # A process without updates does not know the device of the others' counts. The backend knows it.
        device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"
        total = self.counts.to(device, copy=True)
        added = total[: len(total) - self.maxima]
        distributed.all_reduce(added)
        if self.maxima:
            distributed.all_reduce(total[-self.maxima :], op=distributed.ReduceOp.MAX)
        return total


class UtilityMetrics(Accumulator):
    """Next-token utility over a stream of sequences.

    Every row of an update is a whole sequence. The result is the correctly rounded mean of per-sequence values,
    whatever the batches, order, padding, processes and merges are. The per-sequence values change only if a token's
    float32 divergence changes because it is computed in another chunk.

    Noisy and clean sides may belong to one model with and without a transform, or to a student and its teacher.

    Args:
        top_k: restrict each divergence to the union of both sides' top-k; None for all.
        kinds: one or more of the kinds of `sgfast.ops.divergences`; None for the four documented ones, the keys of
            `sgfast.metrics.per_sequence.UTILITY_DIVERGENCES`.
        support: meaning of the restriction, see `sgfast.metrics.sequence_utility`.
        shared_vocab: n: compare the first n columns only, when the two sides pad one vocabulary differently.
        max_chunk_bytes: bound on the divergences' temporaries, see ``sgfast.ops.divergences``; for hidden states
            see ``sequence_utility_from_hidden``.

    Raises:
        TypeError: an option is not an int.
        ValueError: an option below 1, an unknown kind or support, or no kind.

    Example:
        >>> import torch
        >>> from sgfast.metrics import UtilityMetrics
        >>> metrics = UtilityMetrics()
        >>> clean = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
        >>> noisy = torch.tensor([[[0.0, 0.0], [0.0, 3.0]]]).log1p()
        >>> per_sequence = metrics.update(noisy, clean, torch.ones(1, 2))
        >>> round(metrics.compute()["next_token_utility/total_variation"], 4)
        0.15
    """

    def __init__(
        self,
        top_k: int | None = None,
        *,
        kinds: str | Sequence[str] | None = None,
        support: Support = "truncate",
        shared_vocab: int | None = None,
        max_chunk_bytes: int | None = None,
    ) -> None:
        asked = check_comparison(kinds, top_k, support, shared_vocab)
        validation.chunk_bytes(max_chunk_bytes)
        self._max_chunk_bytes = max_chunk_bytes
        self._asked: dict[str, Any] = {"kinds": kinds, "top_k": top_k, "support": support, "shared_vocab": shared_vocab}
        self._attended_means = (*asked.kinds, AGREEMENT)
        options: dict[str, Any] = {"top_k": top_k}
        # An option at its default has no entry: states that were saved before the option existed can be loaded.
        for name, value, default in (("support", support, "truncate"), ("shared_vocab", shared_vocab, None)):
            if value != default:
                options[name] = value
        if kinds is not None:
            options["kinds"] = ",".join(asked.kinds.values())
        # A sum for each mean, then the numbers of sequences, tokens and predicted tokens.
        means = len(self._attended_means) + len(PREDICTED_MEANS)
        super().__init__(torch.zeros(means * WIDTH + 3, dtype=torch.int64), options)

    def update(
        self,
        noisy_logits: LogitsOrSide,
        clean_logits: LogitsOrSide,
        attention_mask: Tensor,
        input_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Add a batch of sequences.

        Args:
            noisy_logits: (..., T, V), or a `sgfast.LinearLogits` of this shape; the student's logits in distillation.
            clean_logits: of the same shape (with ``shared_vocab`` the last dimensions may differ), likewise; the
                teacher's logits in distillation.
            attention_mask: (..., T), 1 = real token.
            input_ids: (..., T), the tokens, for perplexities; None for none.

        Returns:
            The values of each sequence, as ``sgfast.metrics.sequence_utility`` returns them.

        Raises:
            TypeError, ValueError: see ``sequence_utility``.
        """
        per_sequence = sequence_utility(
            noisy_logits,
            clean_logits,
            attention_mask,
            input_ids=input_ids,
            max_chunk_bytes=self._max_chunk_bytes,
            **self._asked,
        )
        self.add(per_sequence)
        return per_sequence

    def update_from_hidden(
        self,
        noisy_hidden: Tensor,
        clean_hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        attention_mask: Tensor,
        input_ids: Tensor | None = None,
        *,
        clean_head: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Add a batch of sequences by final hidden states. The logits never exist as a whole.

        Args:
            noisy_hidden: (..., T, D), the input of the noisy side's head (after the final norm).
            clean_hidden: of the same shape (with ``clean_head`` the last dimension and the dtype may differ).
            head: function from (n, D) hidden states to (n, V) logits, `sgfast.metrics.language_model_head(model)`.
            attention_mask: (..., T), 1 = real token.
            input_ids: (..., T), the tokens, for perplexities; None for none.
            clean_head: the head of the clean side, if the clean side is another model; None: ``head``.

        Returns:
            The values of each sequence, as ``sgfast.metrics.sequence_utility`` returns them.

        Raises:
            TypeError, ValueError: see ``sequence_utility_from_hidden``.

        Example:
            >>> import torch
            >>> from sgfast.metrics import UtilityMetrics
            >>> student, teacher = torch.nn.Linear(2, 6), torch.nn.Linear(4, 5)  # heads, padded differently
            >>> metrics = UtilityMetrics(kinds="forward_kl", shared_vocab=5)
            >>> hidden, teacher_hidden, mask = torch.ones(1, 3, 2), torch.ones(1, 3, 4), torch.ones(1, 3)
            >>> _ = metrics.update_from_hidden(hidden, teacher_hidden, student, mask, clean_head=teacher)
            >>> metrics.compute()["attended_tokens"]
            3
        """
        per_sequence = sequence_utility_from_hidden(
            noisy_hidden,
            clean_hidden,
            head,
            attention_mask,
            clean_head=clean_head,
            input_ids=input_ids,
            max_chunk_bytes=self._max_chunk_bytes,
            **self._asked,
        )
        self.add(per_sequence)
        return per_sequence

    def add(self, per_sequence: dict[str, Tensor]) -> None:
        """Add sequences by the values that ``sequence_utility`` or ``sequence_utility_from_hidden`` returned.

        Raises:
            ValueError: a kind of this accumulator has no value.
        """
        validation.check_tensors(**per_sequence)
        missing = [name for name in self._attended_means if name not in per_sequence]
        if missing:
            raise ValueError(f"per_sequence needs the values {', '.join(missing)}; got {', '.join(per_sequence)}")
        attended, predicted = (per_sequence[name].flatten() for name in ("attended_tokens", "predicted_tokens"))
        nothing = torch.zeros_like(per_sequence[AGREEMENT]).flatten()
        columns = [torch.where(attended > 0, per_sequence[name].flatten(), 0) for name in self._attended_means]
        for name in PREDICTED_MEANS:  # a mean over all tokens, as perplexity is defined
            values = per_sequence[name].flatten() if name in per_sequence else nothing
            columns.append(torch.where(predicted > 0, values * predicted, 0))
        counts = torch.stack([(attended > 0).sum(), attended.sum(), predicted.sum()])
        self._add(torch.cat([exact_sums(torch.stack(columns)).flatten(), counts]))

    def _add(self, counts: Tensor) -> None:
        super()._add(counts)
        self.counts[:-3] = carried(self.counts[:-3].view(-1, WIDTH)).flatten()

    def compute(self, *, all_processes: bool = True) -> dict[str, float]:
        """Return the metrics of all updates, with one transfer from the device.

        Args:
            all_processes: True adds up the updates of all processes under torch.distributed. Every process must call
                this then, also a process without updates. False takes this process's updates alone.

        Returns:
            Means over sequences with an attended token: the divergences and
            ``next_token_agreement``. Over all tokens whose next token is attended, exp of the mean cross-entropy:
            ``clean_perplexity`` and ``noisy_perplexity``. A mean over nothing is NaN. Counts:
            ``sequences``, ``attended_tokens``, ``predicted_tokens``.
        """
        total = self._total(all_processes).tolist()
        sequences, attended, predicted = total[-3:]
        names = (*self._attended_means, *PREDICTED_MEANS)
        sums = {name: total[i * WIDTH : (i + 1) * WIDTH] for i, name in enumerate(names)}
        result = {name: quotient(sums[name], sequences) for name in self._attended_means}
        for side in ("clean", "noisy"):
            mean = torch.tensor(quotient(sums[f"{side}_cross_entropy"], predicted), dtype=torch.float64)
            result[f"{side}_perplexity"] = mean.exp().item()
        return result | {"sequences": sequences, "attended_tokens": attended, "predicted_tokens": predicted}


class PrivacyMetrics(Accumulator):
    """Failure rates and ranks of a nearest-neighbour attack over a stream of transformed tokens.

    The state is the number of tokens of each rank, V integers, from which all rates follow exactly. The functions of
    the same names in `sgfast.metrics.privacy` say what the rates prove and what they do not prove.

    Args:
        table: (V, D), the embedding table. It is not copied.
        metric: ``"l2"`` or ``"cosine"``.
        beta: the nearest-neighbour attack succeeds if the rank is below this.
        r: the max-rank attack takes the r-th farthest token.
        k: the ranks from which a token counts as transformed; None for 10, 100 and 1000, if they are ≤ V.
        max_chunk_bytes: bound on the search's temporaries; default 64 MiB.

    Raises:
        TypeError: the table is not a floating tensor, or a rank not an int.
        ValueError: the table has another shape, a rank is outside [1, V], or the metric is unknown.

    Example:
        >>> import torch
        >>> from sgfast.metrics import PrivacyMetrics
        >>> metrics = PrivacyMetrics(torch.eye(3), k=(1,))
        >>> ranks = metrics.update(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 2]))
        >>> metrics.compute()["mean_reconstruction_rank"]
        0.6666666666666666
    """

    def __init__(
        self,
        table: Tensor,
        *,
        metric: Metric = "l2",
        beta: int = 1,
        r: int = 1,
        k: Sequence[int] | None = None,
        max_chunk_bytes: int | None = None,
    ) -> None:
        validation.check_table("table", table)
        validation.check_choice("metric", metric, METRICS)
        size = table.shape[0]
        ranks = tuple(rank for rank in _TRANSFORMATION_RANKS if rank <= size) if k is None else tuple(k)
        for name, rank in (("beta", beta), ("r", r), *(("k", rank) for rank in ranks)):
            check_rank(name, rank, size)
        if max_chunk_bytes is not None:
            validation.chunk_bytes(max_chunk_bytes)
        self.table, self._metric, self._max_chunk_bytes = table.detach(), metric, max_chunk_bytes
        self._beta, self._r, self._k = beta, r, ranks
        options = {"table_size": size, "metric": metric}
        super().__init__(torch.zeros(size, dtype=torch.int64, device=table.device), options)

    def update(self, transformed: Tensor, input_ids: Tensor, noise_mask: Tensor | None = None) -> Tensor:
        """Add tokens.

        Args:
            transformed: (..., D) transformed embeddings.
            input_ids: (...), the true tokens.
            noise_mask: (...), 1 = count this token; None for all.

        Returns:
            (...) int64, the rank of each counted token, and −1 for other tokens: see
            `sgfast.metrics.privacy.token_ranks`.

        Raises:
            TypeError, ValueError: see ``token_ranks``.
        """
        ranks = token_ranks(
            transformed,
            self.table,
            input_ids,
            noise_mask,
            metric=self._metric,
            max_chunk_bytes=self._max_chunk_bytes,
        )
        self.add(ranks)
        return ranks

    def add(self, ranks: Tensor) -> None:
        """Add tokens by the ranks that ``token_ranks`` returned."""
        validation.check_tensor("ranks", ranks)
        ranks = ranks.flatten()
        # A rank of −1 is no index. Rank 0 with a weight of 0 replaces it.
        counts = torch.zeros_like(self.counts, device=ranks.device)
        self._add(counts.scatter_add_(0, ranks.clamp(min=0), (ranks >= 0).to(torch.int64)))

    def per_sequence(self, ranks: Tensor) -> dict[str, Tensor]:
        """Return the metrics of ``compute`` for each sequence alone, from ranks (..., T): means (...) in float64.

        A sequence without a counted token has NaN. ``transformed_tokens`` is int64. The accumulator does not change.
        """
        validation.check_tensor("ranks", ranks)
        counted, ranks = ranks >= 0, ranks.clamp(min=0)
        tokens = counted.sum(-1)
        means = {
            name: torch.where(counted, values[ranks], 0).sum(-1).to(torch.float64) / tokens
            for name, values in self._values_by_rank(ranks.device).items()
        }
        return means | {"transformed_tokens": tokens}

    def _values_by_rank(self, device: torch.device) -> dict[str, Tensor]:
        """Return the contribution of a token of each rank to each mean, (V,) int64."""
        size = self.counts.shape[0]
        rank = torch.arange(size, device=device)
        values = {
            "nearest_neighbor_failure_rate": rank >= self._beta,
            "max_rank_failure_rate": rank != size - self._r,
            "mean_reconstruction_rank": rank,
        }
        for k in self._k:
            values[f"token_transformation_rate_{k}"] = rank >= k
            values[f"symmetric_token_transformation_rate_{k}"] = (rank >= k) & (rank < size - k)
        return {name: value.to(torch.int64) for name, value in values.items()}

    def rank_counts(self, *, all_processes: bool = True) -> Tensor:
        """Return the number of tokens of each rank, (V,) int64; see ``compute`` for ``all_processes``."""
        return self._total(all_processes).clone()

    def compute(self, *, all_processes: bool = True) -> dict[str, float]:
        """Return the metrics of all updates, with one transfer from the device.

        Args:
            all_processes: True adds up the updates of all processes under torch.distributed. Every process must call
                this then, also a process without updates. False takes this process's updates alone.

        Returns:
            Over all counted tokens ``nearest_neighbor_failure_rate``, ``max_rank_failure_rate``,
            ``mean_reconstruction_rank`` and, for every k, ``token_transformation_rate_{k}`` and
            ``symmetric_token_transformation_rate_{k}``; NaN without a token. The count: ``transformed_tokens``.
        """
        counts = self._total(all_processes)
        sums = {name: (counts * values).sum() for name, values in self._values_by_rank(counts.device).items()}
        *totals, tokens = torch.stack([*sums.values(), counts.sum()]).tolist()
        means = {name: total / tokens if tokens else torch.nan for name, total in zip(sums, totals, strict=True)}
        return means | {"transformed_tokens": tokens}
