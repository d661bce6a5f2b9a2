"""Capture of a forward pass for losses and metrics, and the consumers that read the capture."""

from typing import Literal, NamedTuple

from torch import Tensor

from sgfast.sides import LinearLogits

Half = Literal["clean", "noisy"]


class Transform(NamedTuple):
    """Inputs and results of the noise layer in one forward pass, with graph, (B, T, D) each."""

    input: Tensor
    mean: Tensor
    std: Tensor
    mask: Tensor | None  # True = suppressed feature
    output: Tensor
    seed: int | Tensor | None = None  # seed of the noise; models that share a draw hold the same object


class Outputs(NamedTuple):
    """Outputs of one half of a forward pass, up to the last layer that ran."""

    layers: dict[int, Tensor]  # index → (B, T, D)
    logits: Tensor | LinearLogits | None  # (B, T, V)

    def at(self, layer: int | None) -> Tensor:
        """Return the outputs of a decoder layer, or the logits for None. The consumer must have asked for them."""
        if layer is not None:
            return self.layers[layer]
        assert isinstance(self.logits, Tensor)
        return self.logits

    def side(self) -> Tensor | LinearLogits:
        """Return the logits in the form that they have. The consumer must have asked for them."""
        assert self.logits is not None
        return self.logits

    def detach(self) -> "Outputs":
        """Return the same outputs without graph."""
        layers = {index: output.detach() for index, output in self.layers.items()}
        return Outputs(layers, None if self.logits is None else without_graph(self.logits))


def without_graph(logits: Tensor | LinearLogits) -> Tensor | LinearLogits:
    """Return the same logits without graph."""
    if isinstance(logits, Tensor):
        return logits.detach()
    # A frozen head stays the same object, so that operations see that both halves share the head.
    weight, bias = (
        one if one is None or not one.requires_grad else one.detach() for one in (logits.weight, logits.bias)
    )
    assert weight is not None
    return LinearLogits(logits.hidden.detach(), weight, bias)


def halved(logits: Tensor | LinearLogits) -> tuple[Tensor | LinearLogits, Tensor | LinearLogits]:
    """Cut a batch's logits in two."""
    if isinstance(logits, Tensor):
        first, second = logits.chunk(2)
        return first, second
    one, other = logits.hidden.chunk(2)
    return LinearLogits(one, logits.weight, logits.bias), LinearLogits(other, logits.weight, logits.bias)


_NOTHING = Outputs({}, None)


class Capture(NamedTuple):
    """Values of one forward pass of a noisy language model.

    The clean half has a graph only for consumers that asked for the graph.
    """

    attention_mask: Tensor  # (B, T) bool
    noise_mask: Tensor  # (B, T) bool: transformed and attended
    enabled_transform: Transform | None  # None while noise is disabled
    clean: Outputs
    noisy: Outputs

    @property
    def transform(self) -> Transform:
        """The noise layer's transform. RuntimeError if noise was disabled."""
        if self.enabled_transform is None:
            raise RuntimeError("the loss reads the transform, but noise was disabled in the last forward")
        return self.enabled_transform

    def halves(self, layer: int | None) -> tuple[Tensor, Tensor]:
        """Return the (clean, noisy) outputs of a decoder layer, or the (clean, noisy) logits for None."""
        return self.clean.at(layer), self.noisy.at(layer)


class Consumer:
    """Loss or metric that is attached to a model: the outputs that it reads, and the last forward pass until used.

    Args:
        layers: indices of the decoder layers whose outputs the consumer reads.
        logits: whether the consumer reads the logits.
        clean_graph: whether the consumer sends gradients through the clean half, to adapters in the base model.
        clean: whether the consumer reads layers and logits of the clean half.
        noisy: whether the consumer reads layers and logits of the noisy half.
        sides: whether the consumer takes hidden states and head in place of logits (`Outputs.side`).
    """

    def __init__(
        self,
        layers: frozenset[int],
        logits: bool,
        clean_graph: bool = False,
        clean: bool = True,
        noisy: bool = True,
        sides: bool = False,
    ) -> None:
        self.layers = layers
        self.logits = logits
        self.clean_graph = clean_graph
        self.clean = clean
        self.noisy = noisy
        self.sides = sides
        self.forwards = 0
        self._capture: Capture | None = None

    def offer(self, capture: Capture | None) -> None:
        """Store a new forward pass. None drops the stored one before the next forward pass begins."""
        if capture is not None:
            self.forwards += 1
            capture = capture._replace(
                clean=self._read(capture.clean, "clean"), noisy=self._read(capture.noisy, "noisy")
            )
        self._capture = capture

    def reads(self, half: Half) -> bool:
        """Return whether the consumer reads any output of a half."""
        return (self.clean if half == "clean" else self.noisy) and (self.logits or bool(self.layers))

    def _read(self, outputs: Outputs, half: Half) -> Outputs:
        """Return only the outputs that the consumer reads: the others, above all logits, may be large."""
        if not self.reads(half):
            return _NOTHING
        layers = {index: output for index, output in outputs.layers.items() if index in self.layers}
        outputs = Outputs(layers, outputs.logits if self.logits else None)
        return outputs if half == "noisy" or self.clean_graph else outputs.detach()

    @property
    def has_forward(self) -> bool:
        """Whether there is a forward pass that the consumer has not taken."""
        return self._capture is not None

    def pending(self, caller: str) -> Capture:
        """Return the last forward pass, and keep it stored.

        Raises:
            RuntimeError: there was no forward pass since the last call of `take`.
        """
        if self._capture is None:
            raise RuntimeError(f"{caller} needs a forward pass of the noisy model since its last call")
        return self._capture

    def take(self, caller: str) -> Capture:
        """Return the last forward pass and drop it."""
        capture = self.pending(caller)
        self._capture = None
        return capture
