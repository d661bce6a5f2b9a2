r"""A trained attack: it learns from pairs of a token and its transformed embedding to read tokens of unseen texts.

Anyone who can run a transform can make such pairs. The decoder scores every token v of the table E by

    score(v | x̃) = −‖g(x̃) − e_v‖² / (2 s²) + prior_v,   g(x̃) = A x̃ + c + MLP(x̃)

The decoder starts at the solution for a Gaussian transform. prior_v is the log of v's smoothed frequency in the
training text, c makes the mean error 0, and s² is the mean square of the error. A is the identity or the ridge
regression of x on x̃, whichever reads more of a validation part of the training text. Cross-entropy then trains all
parameters. The attack keeps the state that reads most of the validation part: the end of an epoch, the start, or the
frequencies alone (s = ∞).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgfast.metrics.per_sequence import check_token_ids
from sgfast.ops import validation
from sgfast.ops.nearest import nearest_embeddings
from sgfast.ops.precision import full_precision_products

_CHUNK_BYTES = 64 * 2**20
# Scores, their softmax and gradients, in float32.
_BYTES_PER_SCORE = 16
_VALIDATION_FRACTION = 0.1
_SMALLEST_VARIANCE = 1e-6
# So low that the scores equal the prior.
_NO_LOG_PRECISION = -30.0
# Training ends after this number of epochs without progress.
_PATIENCE = 3


class InversionResult(NamedTuple):
    """Failure rates on held-out text, as fractions of its selected tokens, and the numbers of tokens behind them."""

    failure_rate: float  # of the trained attack
    nearest_neighbor_failure_rate: float  # of the untrained one, on the same tokens
    unigram_failure_rate: float  # of always guessing the training text's most frequent token
    shuffled_failure_rate: float  # of the same attack on embeddings dealt out to the wrong tokens
    training_tokens: int
    held_out_tokens: int
    held_out_sequences: int


class _Decoder(nn.Module):
    """Computes ``score`` over a table (V, D) that the decoder does not own."""

    def __init__(self, table: Tensor, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        width, device = table.shape[1], table.device
        self.linear = nn.Linear(width, width, device=device)
        self.hidden = nn.Linear(width, hidden_size, device=device)
        self.output = nn.Linear(hidden_size, width, device=device)
        # Drawn on the CPU: the same numbers on every device.
        initial = torch.randn(self.hidden.weight.shape, generator=generator) / width**0.5
        with torch.no_grad():
            self.hidden.weight.copy_(initial)
            for parameter in (self.hidden.bias, self.output.weight, self.output.bias, self.linear.bias):
                parameter.zero_()
            self.linear.weight.copy_(torch.eye(width))
        self.log_precision = nn.Parameter(torch.zeros((), device=device))
        self.prior = nn.Parameter(torch.zeros(table.shape[0], device=device))

    def forward(self, transformed: Tensor, table: Tensor, half_squares: Tensor) -> Tensor:
        guess = self.linear(transformed) + self.output(nn.functional.gelu(self.hidden(transformed)))
        # ‖g‖² is left out, because it is the same for all tokens.
        scores: Tensor = self.log_precision.exp() * (guess @ table.T - half_squares) + self.prior
        return scores


class LearnedInversionAttack:
    """Train a decoder from transformed embeddings to tokens, and measure it on text outside of its training.

    A low failure rate proves that someone who can run the transform can read the text. A high failure rate proves only
    that this decoder, trained on this many tokens, fails. More pairs, several draws of the same text, or a decoder that
    reads neighbouring tokens and knows the language may do better. The rate is no bound.

    ``evaluate`` guards against errors that make such an attack look better than it is:

    * Sequences are held out, never single tokens, and equal sequences stay on one side. Texts that overlap without
      being equal (pieces of a document, boilerplate) stay on one side only if ``groups`` says so.
    * The epoch is chosen on a part of the training text. The held-out text is used once.
    * ``unigram_failure_rate`` is the failure rate of token frequencies alone. The attack's gain from the embeddings is
      the difference to this rate, not to 1.
    * ``shuffled_failure_rate`` is the failure rate of an attack that is trained and measured on embeddings dealt out at
      random to other tokens of the same part. If this rate lies clearly below the unigram rate, something other than
      the embedding gives the tokens away.

    Args:
        table: (V, D), the embedding table, which the attacker knows.
        hidden_size: width of the MLP; None for 2 D.
        epochs: largest number of passes over the training text, each of about 4 V D multiplications per token. Training
            ends earlier after three passes without progress on the validation part. 0 for the closed-form start alone.
        batch_size: tokens per step.
        learning_rate: learning rate of Adam, for embeddings scaled to a mean square of 1.
        held_out_fraction: fraction of the tokens to hold out, in (0, 1).
        seed: seed of the split, the order of batches and the MLP. The same seed gives the same numbers on one machine.
        max_chunk_bytes: bound on a chunk of scores with their gradients, at least one token's. Default 64 MiB. The
            float32 copies of the selected embeddings and of the table are not part of this bound.

    Raises:
        TypeError: the table is not a floating tensor, or an option of another type.
        ValueError: the table has another shape, or an option is out of range.

    Example:
        >>> import torch
        >>> from sgfast.metrics.privacy import LearnedInversionAttack
        >>> generator = torch.Generator().manual_seed(0)
        >>> table = torch.randn(20, 8, generator=generator)
        >>> input_ids = torch.randint(0, 20, (50, 10), generator=generator)
        >>> result = LearnedInversionAttack(table).evaluate(-table[input_ids], input_ids)  # all turned around
        >>> result.nearest_neighbor_failure_rate, result.failure_rate
        (1.0, 0.0)
    """

    def __init__(
        self,
        table: Tensor,
        *,
        hidden_size: int | None = None,
        epochs: int = 10,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        held_out_fraction: float = 0.2,
        seed: int = 0,
        max_chunk_bytes: int | None = None,
    ) -> None:
        validation.check_table("table", table)
        for name, value, least in (
            ("hidden_size", hidden_size, 1),
            ("epochs", epochs, 0),
            ("batch_size", batch_size, 1),
        ):
            if (value, name) != (None, "hidden_size"):
                validation.check_count(name, value, least)
        validation.check_number("learning_rate", learning_rate)
        validation.check_number("held_out_fraction", held_out_fraction)
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; got {learning_rate}")
        if not 0 < held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must lie between 0 and 1; got {held_out_fraction}")
        self._max_bytes = _CHUNK_BYTES if max_chunk_bytes is None else validation.chunk_bytes(max_chunk_bytes)
        self._hidden_size = hidden_size or 2 * table.shape[1]
        self._epochs, self._batch_size, self._learning_rate = epochs, batch_size, learning_rate
        self._held_out_fraction, self._seed = held_out_fraction, seed
        with torch.inference_mode(False), torch.no_grad():
            self._scale = float(table.to(torch.float32).square().mean().sqrt()) or 1.0
            self._table = table.to(torch.float32) / self._scale
            self._half_squares = self._table.square().sum(-1) / 2
        self._decoder: _Decoder | None = None

    def evaluate(
        self, transformed: Tensor, input_ids: Tensor, noise_mask: Tensor | None = None, groups: Tensor | None = None
    ) -> InversionResult:
        """Train on a part of the sequences, and count the tokens of the others that the attack fails to read.

        Args:
            transformed: (B, T, D) transformed embeddings of B sequences.
            input_ids: (B, T), the true tokens.
            noise_mask: (B, T), 1 = a transformed token; None for all.
            groups: (B,) integers. Sequences of one group, for instance of one document, are never on both sides. None
                makes groups of equal sequences.

        Returns:
            An `InversionResult`. ``predict`` then uses the attack that was trained for ``failure_rate``.

        Raises:
            TypeError: an argument's type.
            ValueError: shapes do not fit, a token outside [0, V), or fewer than three groups with a selected token.
        """
        embeddings, tokens, sequence, group = self._selected(transformed, input_ids, noise_mask, groups)
        generator = torch.Generator().manual_seed(self._seed)
        held_out = _held_out(group, self._held_out_fraction, generator, least=3)
        self._fit(embeddings[~held_out], tokens[~held_out], group[~held_out])
        targets = tokens[held_out]

        def failures(guesses: Tensor) -> float:
            return (guesses != targets).double().mean().item()

        failure_rate = failures(self._predict(embeddings[held_out]))
        nearest = nearest_embeddings(embeddings[held_out], self._table, max_chunk_bytes=self._max_bytes)[1]
        most_frequent = torch.bincount(tokens[~held_out], minlength=self._table.shape[0]).argmax()

        shuffled = embeddings.clone()
        for part in (held_out, ~held_out):
            rows = part.nonzero().squeeze(-1)
            shuffled[rows] = embeddings[rows[torch.randperm(len(rows), generator=generator).to(rows.device)]]
        attack, self._decoder = self._decoder, None
        self._fit(shuffled[~held_out], tokens[~held_out], group[~held_out])
        shuffled_failure_rate = failures(self._predict(shuffled[held_out]))
        self._decoder = attack
        return InversionResult(
            failure_rate=failure_rate,
            nearest_neighbor_failure_rate=failures(nearest.squeeze(-1)),
            unigram_failure_rate=failures(most_frequent),
            shuffled_failure_rate=shuffled_failure_rate,
            training_tokens=int((~held_out).sum()),
            held_out_tokens=int(held_out.sum()),
            held_out_sequences=len(torch.unique(sequence[held_out])),
        )

    def fit(
        self, transformed: Tensor, input_ids: Tensor, noise_mask: Tensor | None = None, groups: Tensor | None = None
    ) -> None:
        """Train on all sequences; see ``evaluate`` for the arguments and errors. Two groups are enough."""
        embeddings, tokens, _, group = self._selected(transformed, input_ids, noise_mask, groups)
        self._fit(embeddings, tokens, group)

    def predict(self, transformed: Tensor) -> Tensor:
        """Read tokens (...), int64, from transformed embeddings (..., D).

        Raises:
            RuntimeError: the attack was not trained.
            TypeError, ValueError: not a floating tensor of the table's width.
        """
        self._check_width(transformed)
        if self._decoder is None:
            raise RuntimeError("the attack must be trained, by fit or evaluate, before it predicts")
        flat = transformed.detach().reshape(-1, transformed.shape[-1]).to(torch.float32) / self._scale
        return self._predict(flat).view(transformed.shape[:-1])

    def _check_width(self, transformed: Tensor) -> None:
        validation.check_floating("transformed", transformed, self._table)
        validation.check_device("transformed", transformed, "table", self._table)
        if transformed.dim() == 0 or transformed.shape[-1] != self._table.shape[1]:
            raise ValueError(
                f"transformed must have shape (..., {self._table.shape[1]}), the width of table; "
                f"got {tuple(transformed.shape)}"
            )

    def _selected(
        self, transformed: Tensor, input_ids: Tensor, noise_mask: Tensor | None, groups: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the selected tokens' scaled embeddings (n, D), and their ids, sequences and groups, (n,) each."""
        self._check_width(transformed)
        if transformed.dim() != 3:
            raise ValueError(f"transformed must have shape (B, T, D); got {tuple(transformed.shape)}")
        check_token_ids(input_ids, transformed.shape[:-1])
        mask = validation.row_mask(noise_mask, "noise_mask", "transformed", transformed)
        validation.check_tensors(groups=groups)
        selected = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        if groups is None:
            groups = _groups_of_equal_sequences(input_ids, selected)
        elif groups.shape != input_ids.shape[:1]:
            raise ValueError(f"groups must have shape {tuple(input_ids.shape[:1])}; got {tuple(groups.shape)}")
        tokens = input_ids[selected].to(torch.int64)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._table.shape[0]:
            raise ValueError(f"selected input_ids must lie in [0, {self._table.shape[0]}), the rows of table")
        sequence = selected.nonzero()[:, 0]
        with torch.inference_mode(False):
            embeddings = transformed.detach()[selected].to(torch.float32) / self._scale
            return embeddings, tokens.clone(), sequence, groups.to(sequence.device)[sequence]

    def _fit(self, embeddings: Tensor, tokens: Tensor, group: Tensor) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        validating = _held_out(group, _VALIDATION_FRACTION, generator, least=2)
        training_set, validation_set = (
            (embeddings[part].clone(), tokens[part].clone()) for part in (~validating, validating)
        )
        device = self._table.device
        with torch.inference_mode(False), torch.enable_grad(), full_precision_products(device):
            decoder = self._decoder = _Decoder(self._table, self._hidden_size, generator)
            best, state = self._start(decoder, *training_set, *validation_set)
            optimizer = torch.optim.Adam(decoder.parameters(), self._learning_rate)
            best_epoch = -1
            for epoch in range(self._epochs):
                order = torch.randperm(len(training_set[1]), generator=generator).to(device)
                for batch in torch.split(order, self._batch_size):
                    self._step(decoder, optimizer, training_set[0][batch], training_set[1][batch])
                if (read := self._count_read(*validation_set)) > best:
                    best, best_epoch, state = read, epoch, _copy_of(decoder)
                if epoch - best_epoch >= _PATIENCE:
                    break
            decoder.load_state_dict(state)

    @torch.no_grad()
    def _start(
        self,
        decoder: _Decoder,
        embeddings: Tensor,
        tokens: Tensor,
        validation_embeddings: Tensor,
        validation_tokens: Tensor,
    ) -> tuple[int, dict[str, Tensor]]:
        """Put the decoder at its start. Return the tokens that the start or the prior reads, and its state."""
        size, width = self._table.shape
        frequencies = torch.bincount(tokens, minlength=size) + 1
        decoder.prior.copy_((frequencies / frequencies.sum()).log())
        clean = self._table[tokens]
        mean, clean_mean = embeddings.mean(0), clean.mean(0)
        residual = (clean - clean_mean) - (embeddings - mean)
        variance = residual.square().mean().clamp(min=_SMALLEST_VARIANCE)
        centered = (embeddings - mean).to(torch.float64)
        # The prior of the entries of A − I is N(0, 1/D), as for a random rotation.
        penalty = width * variance.to(torch.float64) * torch.eye(width, dtype=torch.float64, device=mean.device)
        change = torch.linalg.solve(centered.T @ centered + penalty, centered.T @ residual.to(torch.float64))
        regression = torch.eye(width, device=mean.device) + change.T.to(torch.float32)
        found: list[tuple[int, dict[str, Tensor]]] = []
        for matrix in (decoder.linear.weight.clone(), regression):
            decoder.linear.weight.copy_(matrix)
            decoder.linear.bias.copy_(clean_mean - matrix @ mean)
            remaining = (clean - decoder.linear(embeddings)).square().mean().clamp(min=_SMALLEST_VARIANCE)
            decoder.log_precision.copy_(-remaining.log())
            found.append((self._count_read(validation_embeddings, validation_tokens), _copy_of(decoder)))
        start = max(found, key=lambda one: one[0])
        # Training cannot begin at the prior alone: the gradient of everything else is 0 there.
        decoder.log_precision.fill_(_NO_LOG_PRECISION)
        prior = (self._count_read(validation_embeddings, validation_tokens), _copy_of(decoder))
        decoder.load_state_dict(start[1])
        return max(start, prior, key=lambda one: one[0])

    def _step(self, decoder: _Decoder, optimizer: torch.optim.Optimizer, embeddings: Tensor, tokens: Tensor) -> None:
        optimizer.zero_grad()
        for some, targets in zip(*(torch.split(part, self._rows()) for part in (embeddings, tokens)), strict=True):
            scores = decoder(some, self._table, self._half_squares)
            loss = nn.functional.cross_entropy(scores, targets, reduction="sum") / len(tokens)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def _rows(self) -> int:
        return max(1, self._max_bytes // (_BYTES_PER_SCORE * self._table.shape[0]))

    def _count_read(self, embeddings: Tensor, tokens: Tensor) -> int:
        return int((self._predict(embeddings) == tokens).sum())

    @torch.no_grad()
    def _predict(self, embeddings: Tensor) -> Tensor:
        assert self._decoder is not None
        with full_precision_products(self._table.device):
            guesses = [
                self._decoder(some, self._table, self._half_squares).argmax(-1)
                for some in torch.split(embeddings, self._rows())
            ]
        return torch.cat(guesses)


def _groups_of_equal_sequences(input_ids: Tensor, selected: Tensor) -> Tensor:
    """Return a number for each row, equal for rows that select the same tokens in the same order."""
    known: dict[tuple[int, ...], int] = {}
    rows = zip(input_ids.tolist(), selected.tolist(), strict=True)
    keys = [tuple(token for token, used in zip(*row, strict=True) if used) for row in rows]
    return torch.tensor([known.setdefault(key, len(known)) for key in keys], dtype=torch.int64)


def _held_out(group: Tensor, fraction: float, generator: torch.Generator, least: int) -> Tensor:
    """Choose the tokens to hold out: random whole groups, the fewest that reach the fraction, never all groups."""
    found, index, tokens = torch.unique(group, return_inverse=True, return_counts=True)
    if len(found) < least:
        raise ValueError(f"at least {least} different sequences with a selected token are needed; got {len(found)}")
    order = torch.randperm(len(found), generator=generator).to(group.device)
    before = tokens[order].cumsum(0) - tokens[order]
    chosen = before < fraction * tokens.sum()
    # Groups remain for training, also if one of them is nearly everything.
    chosen[1 - least :] = False
    held_out = torch.empty_like(chosen)
    held_out[order] = chosen
    return held_out[index]


def _copy_of(decoder: _Decoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in decoder.state_dict().items()}
