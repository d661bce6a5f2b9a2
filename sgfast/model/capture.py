"""What a forward leaves for losses and metrics, and who asked for it."""

from typing import Literal, NamedTuple

from torch import Tensor

Half = Literal["clean", "noisy"]


class Transform(NamedTuple):
    """What the noise layer did, with its graph: (B, T, D) each."""

    input: Tensor
    mean: Tensor
    std: Tensor
    mask: Tensor | None  # True = suppressed feature
    output: Tensor
    seed: int | Tensor | None = None  # of the noise: one object wherever one draw is shared


class Outputs(NamedTuple):
    """What one half of a forward computed, as far as it ran."""

    layers: dict[int, Tensor]  # index → (B, T, D)
    logits: Tensor | None  # (B, T, V)

    def at(self, layer: int | None) -> Tensor:
        """The outputs of a decoder layer, or the logits for None; a consumer finds what it asked for."""
        if layer is not None:
            return self.layers[layer]
        assert self.logits is not None
        return self.logits

    def detach(self) -> "Outputs":
        """The same without graph."""
        layers = {index: output.detach() for index, output in self.layers.items()}
        return Outputs(layers, None if self.logits is None else self.logits.detach())


_NOTHING = Outputs({}, None)


class Capture(NamedTuple):
    """One forward of a noisy language model. The clean half has a graph only for consumers that asked for it."""

    attention_mask: Tensor  # (B, T) bool
    noise_mask: Tensor  # (B, T) bool: transformed and attended
    enabled_transform: Transform | None  # None while noise is disabled
    clean: Outputs
    noisy: Outputs

    @property
    def transform(self) -> Transform:
        """What the noise layer did; RuntimeError if it was disabled."""
        if self.enabled_transform is None:
            raise RuntimeError("the loss reads the transform, but noise was disabled in the last forward")
        return self.enabled_transform

    def halves(self, layer: int | None) -> tuple[Tensor, Tensor]:
        """(clean, noisy) outputs of a decoder layer, or logits for None."""
        return self.clean.at(layer), self.noisy.at(layer)


class Consumer:
    """One loss or metric attached to a model: what it needs of every forward, and the forward it has not used yet.

    Args:
        layers: indices of the decoder layers whose outputs it reads.
        logits: whether it reads the logits.
        clean_graph: whether it sends gradients through the clean half, to adapters in the base model.
        clean: whether it reads them of the clean half.
        noisy: whether it reads them of the noisy half.
    """

    def __init__(
        self, layers: frozenset[int], logits: bool, clean_graph: bool = False, clean: bool = True, noisy: bool = True
    ) -> None:
        self.layers = layers
        self.logits = logits
        self.clean_graph = clean_graph
        self.clean = clean
        self.noisy = noisy
        self.forwards = 0
        self._capture: Capture | None = None

    def offer(self, capture: Capture | None) -> None:
        """Hand over a new forward; None drops the last one before the next begins."""
        if capture is not None:
            self.forwards += 1
            capture = capture._replace(
                clean=self._read(capture.clean, "clean"), noisy=self._read(capture.noisy, "noisy")
            )
        self._capture = capture

    def reads(self, half: Half) -> bool:
        """Whether it reads any output of this half."""
        return (self.clean if half == "clean" else self.noisy) and (self.logits or bool(self.layers))

    def _read(self, outputs: Outputs, half: Half) -> Outputs:
        """What it asked for of what ran: the rest, logits above all, may be large."""
        if not self.reads(half):
            return _NOTHING
        layers = {index: output for index, output in outputs.layers.items() if index in self.layers}
        outputs = Outputs(layers, outputs.logits if self.logits else None)
        return outputs if half == "noisy" or self.clean_graph else outputs.detach()

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
