"""What a forward leaves for losses and metrics, and who asked for it."""

from typing import NamedTuple

from torch import Tensor


class Transform(NamedTuple):
    """What the noise layer did, with its graph: (B, T, D) each."""

    input: Tensor
    mean: Tensor
    std: Tensor
    mask: Tensor | None  # True = suppressed feature
    output: Tensor


class Capture(NamedTuple):
    """One forward of a noisy language model. Clean tensors have a graph only for consumers that asked for it."""

    attention_mask: Tensor  # (B, T) bool
    noise_mask: Tensor  # (B, T) bool: transformed and attended
    enabled_transform: Transform | None  # None while noise is disabled
    layers: dict[int, tuple[Tensor, Tensor]]  # index → (clean, noisy), (B, T, D)
    logits: tuple[Tensor, Tensor] | None  # (clean, noisy), (B, T, V)

    @property
    def transform(self) -> Transform:
        """What the noise layer did; RuntimeError if it was disabled."""
        if self.enabled_transform is None:
            raise RuntimeError("the loss reads the transform, but noise was disabled in the last forward")
        return self.enabled_transform

    def halves(self, layer: int | None) -> tuple[Tensor, Tensor]:
        """(clean, noisy) outputs of a decoder layer, or logits for None."""
        if layer is not None:
            return self.layers[layer]
        assert self.logits is not None  # a consumer of logits makes every forward run whole
        return self.logits


class Consumer:
    """One loss or metric attached to a model: what it needs of every forward, and the forward it has not used yet.

    Args:
        layers: indices of the decoder layers whose outputs it reads.
        logits: whether it reads the logits.
        clean_graph: whether it sends gradients through the clean half, to adapters in the base model.
    """

    def __init__(self, layers: frozenset[int], logits: bool, clean_graph: bool = False) -> None:
        self.layers = layers
        self.logits = logits
        self.clean_graph = clean_graph
        self.forwards = 0
        self._capture: Capture | None = None

    def offer(self, capture: Capture | None) -> None:
        """Hand over a new forward; None drops the last one before the next begins."""
        if capture is not None:
            self.forwards += 1
            if not self.logits:
                capture = capture._replace(logits=None)  # far larger than all that it reads
            if not self.clean_graph:
                capture = _without_clean_graph(capture)
        self._capture = capture

    @property
    def has_forward(self) -> bool:
        """Whether there was a forward since it was last let go of."""
        return self._capture is not None

    def pending(self, caller: str) -> Capture:
        """Return the last forward.

        Raises:
            RuntimeError: there was no forward since it was let go of.
        """
        if self._capture is None:
            raise RuntimeError(f"{caller} needs a forward pass of the noisy model since its last call")
        return self._capture

    def take(self, caller: str) -> Capture:
        """Return the last forward and let go of it."""
        capture = self.pending(caller)
        self._capture = None
        return capture


def _without_clean_graph(capture: Capture) -> Capture:
    layers = {index: (clean.detach(), noisy) for index, (clean, noisy) in capture.layers.items()}
    logits = None if capture.logits is None else (capture.logits[0].detach(), capture.logits[1])
    return capture._replace(layers=layers, logits=logits)
