"""State that the hooks of a noisy language model read and fill while its base model runs."""

from typing import Any

from torch import Tensor

from sgfast.model.capture import Capture, Outputs, Transform
from sgfast.model.decoder import hidden_states_of
from sgfast.sides import LinearLogits

# Logits, or hidden states and head in their place; None if a half did not run up to the logits.
Logits = Tensor | LinearLogits | None


class Pass:
    """State of one forward, for both halves.

    Args:
        attended: (B, T) bool.
        selected: (B, T) bool, True = transform this token.
        layers: indices of the decoder layers whose outputs are kept.
        batch: the caller's tensors. A shared draw recognizes a batch by these objects.
        clean_graph: whether the clean half keeps its graph.
    """

    def __init__(
        self,
        attended: Tensor,
        selected: Tensor,
        layers: frozenset[int],
        batch: tuple[Tensor | None, ...],
        clean_graph: bool,
    ) -> None:
        self.attended = attended
        self.selected = selected
        self.layers = layers
        self.batch = batch
        self.clean_graph = clean_graph
        self.seed: int | Tensor | None = None  # seed of a shared draw
        self.half = "clean"
        self.transform: Transform | None = None
        self.clean_layers: dict[int, Tensor] = {}
        self.noisy_layers: dict[int, Tensor] = {}

    def keep_layer(self, index: int, layer_output: Any) -> None:
        """Keep the output of a decoder layer if a consumer reads it."""
        if index not in self.layers:
            return
        hidden = hidden_states_of(layer_output)
        if self.half == "joint":
            clean, self.noisy_layers[index] = hidden.chunk(2)
            self.clean_layers[index] = clean if self.clean_graph else clean.detach()
        else:
            (self.clean_layers if self.half == "clean" else self.noisy_layers)[index] = hidden

    def capture(self, clean_logits: Logits, noisy_logits: Logits) -> Capture:
        """Return the kept outputs of both halves, for losses and metrics."""
        return Capture(
            attention_mask=self.attended,
            noise_mask=self.selected,
            enabled_transform=self.transform,
            clean=Outputs(self.clean_layers, clean_logits),
            noisy=Outputs(self.noisy_layers, noisy_logits),
        )
