"""Causal language models with a noise layer. Every forward runs the base model on clean and on noisy embeddings."""

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from sgfast.model.adapters import adapter_parameters, with_adapters
from sgfast.model.capture import Consumer, Half, Transform, halved, without_graph
from sgfast.model.checkpointing import check_checkpointing, checkpointed_layers
from sgfast.model.decoder import (
    causal_lm_of,
    decoder_layers,
    layer_index_of,
    resolve_layer_index,
    shallow_trunk,
)
from sgfast.model.head_weights import NotPlainError, linear_logits, plain_head_refusal
from sgfast.model.hooks import hook_forward
from sgfast.model.inputs import CleanPass, check_settings, check_target, doubled, prepare_inputs, ready_noise_layer
from sgfast.model.output import NoisyModelOutput, super_batch_output
from sgfast.model.passes import Logits, Pass
from sgfast.model.sharing import Draw, share_draws, shared_draw
from sgfast.noise_layer.arguments import check_input_shape
from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.sides import LinearLogits


class NoiseMaskedNoisyTransformerModel(nn.Module):
    """Frozen causal language model whose token embeddings pass through a noise layer.

    A forward on B rows gives a super-batch of 2B rows: clean and noisy logits. With ``clean_pass="separate"`` the clean
    half runs in a pass of its own without a graph, so training stores half the activations. ``"joint"`` runs one batch
    of 2B rows, for hooks that need both halves at once. Both settings give the same numbers.

    In training mode, each half runs only up to the deepest layer that attached losses and metrics read in that half. If
    this is layer k, the decoder layers 0..k run, but neither the final norm nor the head, and the output's logits are
    None. If only the transform is read, the model runs up to the target layer. A half runs whole if its logits are
    read, but without the head if every reader takes hidden states and head in place of logits. Both halves run whole in
    eval mode, and if nothing is attached.

    The base model is frozen (``requires_grad_(False)``) and stays in eval mode, also under ``.train()``. If PEFT has
    put adapters into the base model, this class runs the base model without adapters;
    `PeftNoiseMaskedNoisyTransformerModel` runs the base model with adapters. Only calls of this model are transformed:
    ``base_model(...)`` is the clean model. Only one thread at a time may use a noisy model and its base model.

    Args:
        noise_layer_class: a subclass of `BaseNoiseLayer`, such as `TransformerCloak`.
        base_model: a Hugging Face causal language model.
        input_shape: (-1, D); D is checked against the embedding width. None skips the check.
        target_layer: path of the module whose output is transformed.
        clean_pass: ``"separate"`` or ``"joint"``.
        noise_layer: a ready noise layer to share, instead of ``noise_layer_class`` and its arguments. Models that share
            a noise layer share its noise: if two models are called with the same tensors, the second model reuses
            the noise of the first.
        noise_layer_kwargs: arguments of ``noise_layer_class``.

    Raises:
        ValueError: the target layer does not exist, the width differs, or clean_pass is unknown.
        TypeError: base_model is not a module, or is a PEFT model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
        >>> import torch
        >>> from sgfast.noise_layer import TransformerCloak
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> noisy_model = NoiseMaskedNoisyTransformerModel(
        ...     TransformerCloak,
        ...     LlamaForCausalLM(config),
        ...     input_shape=(-1, 16),
        ...     target_layer="model.embed_tokens",
        ...     config_path=config,
        ...     transformer_type=LlamaModel,
        ... )
        >>> output = noisy_model(input_ids=torch.arange(6).view(2, 3))
        >>> output.base_model_output.logits.shape
        torch.Size([4, 3, 50])
    """

    base_model: Any
    noise_layer: BaseNoiseLayer
    _runs_adapters = False

    def __init__(
        self,
        noise_layer_class: type[BaseNoiseLayer] | None,
        base_model: Any,
        input_shape: tuple[int, ...] | None = None,
        target_layer: str = "model.embed_tokens",
        *,
        clean_pass: CleanPass = "separate",
        noise_layer: BaseNoiseLayer | None = None,
        **noise_layer_kwargs: Any,
    ) -> None:
        super().__init__()
        check_settings(base_model, target_layer, clean_pass)
        self._check_base(base_model)
        embedding_weight = base_model.get_input_embeddings().weight
        check_target(causal_lm_of(base_model), target_layer, check_input_shape(input_shape), embedding_weight.shape[-1])
        self.base_model = base_model
        self._shares_noise_layer = noise_layer is not None
        noise_layer = ready_noise_layer(noise_layer_class, noise_layer, noise_layer_kwargs)
        self.noise_layer = noise_layer.to(device=embedding_weight.device)
        self._freeze_base()
        self.target_layer = target_layer
        self.clean_pass = clean_pass
        self.is_gradient_checkpointing = False
        self._base_arguments = frozenset(inspect.signature(self.causal_lm.forward).parameters) - {"labels"}
        self._consumers: weakref.WeakSet[Consumer] = weakref.WeakSet()
        # Trunks share the base model's modules. Lists keep torch from registering trunks as submodules.
        self._trunks: dict[int, list[nn.Module]] = {}
        self._head_checked = False
        self._head_refusal: str | None = None
        # The hooks read the pass that is running; None outside this model's own calls.
        self._running: Pass | None = None
        self._register()

    @property
    def _target(self) -> nn.Module:
        return cast(nn.Module, self.causal_lm.get_submodule(self.target_layer))

    @property
    def causal_lm(self) -> Any:
        """The model of transformers: the model inside ``base_model`` if that is a PEFT model, else ``base_model``."""
        return causal_lm_of(self.base_model)

    def _check_base(self, base_model: Any) -> None:
        if causal_lm_of(base_model) is not base_model:
            raise TypeError(
                "base_model is a PEFT model: use PeftNoiseMaskedNoisyTransformerModel to run its adapters, or give "
                "base_model.get_base_model() to run without them"
            )

    def _freeze_base(self) -> None:
        """Freeze the base model except its adapters, which another noisy model may train."""
        adapters = {id(parameter) for parameter in adapter_parameters(self.base_model)}
        for parameter in self.base_model.parameters():
            if id(parameter) not in adapters:
                parameter.requires_grad_(False)
        self.base_model.eval()

    def _register(self) -> None:
        """Hook the target layer and all decoder layers as long as this model lives. Register a shared noise layer."""
        hook_forward(self, self._target, "_transform_hook")
        for index, layer in enumerate(decoder_layers(self.base_model)):
            hook_forward(self, layer, "_keep_layer", index)
        if self._shares_noise_layer:
            share_draws(self.noise_layer)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without losses, metrics and captured forwards."""
        return dict(self.__dict__) | {"_consumers": None, "_trunks": {}, "_running": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state and hook the copied base model, because the copied hooks have no owner."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._consumers = weakref.WeakSet()
        self._register()

    def train(self, mode: bool = True) -> "NoiseMaskedNoisyTransformerModel":
        """Set the mode of the noise layer. The frozen base model stays in eval mode."""
        super().train(mode)
        self.base_model.eval()
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Let training forwards keep only the inputs of decoder layers, and recompute the rest in the backward pass.

        Args:
            gradient_checkpointing_kwargs: None, or a dictionary with ``use_reentrant=False``, the only implementation.

        Raises:
            ValueError: another option is given, transformers cannot checkpoint the decoder layers, or the target layer
                lies inside a decoder layer: the recomputation would draw new noise.
        """
        check_checkpointing(self.base_model, self.target_layer, gradient_checkpointing_kwargs)
        self.is_gradient_checkpointing = True

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, **others: Any
    ) -> None:
        """Call `gradient_checkpointing_enable`; this name and these arguments are those of transformers 5's Trainer."""
        if every_n_layers != 1 or any(others.values()):
            raise ValueError(
                f"every_n_layers must be 1 and other options must be false; got {every_n_layers} and {others}"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Let training forwards keep all activations again."""
        self.is_gradient_checkpointing = False

    def attach(
        self,
        *,
        layers: frozenset[int] = frozenset(),
        logits: bool = False,
        clean_graph: bool = False,
        clean: bool = True,
        noisy: bool = True,
        sides: bool = False,
    ) -> Consumer:
        """Register a loss or metric that reads outputs of decoder layers, or logits, of every forward.

        The registration lasts as long as the returned `Consumer` is alive. If no consumer reads a half, training
        forwards run only the layers of this half that the transform needs.

        Args:
            layers: indices of the decoder layers to read; a negative index counts from the end.
            logits: whether to read the logits.
            clean_graph: whether to send gradients through the clean half too, which takes the memory of a second pass.
            clean: whether to read the clean half.
            noisy: whether to read the noisy half.
            sides: whether hidden states and head (`sgfast.sides.LinearLogits`) may stand for the logits. If every
                reader of logits takes them, training forwards run without the head.

        Raises:
            ValueError: an index is out of range.
        """
        resolved = frozenset(resolve_layer_index(self.base_model, index) for index in layers)
        consumer = Consumer(resolved, logits, clean_graph, clean, noisy, sides)
        self._consumers.add(consumer)
        return consumer

    @contextmanager
    def noise_disabled(self) -> Iterator[None]:
        """Run both halves on clean values inside the block."""
        with self.noise_layer.disabled():
            yield

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        noise_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> NoisyModelOutput:
        """Run the base model on clean and on noisy embeddings.

        Args:
            input_ids: (B, T); or give ``inputs_embeds`` (B, T, D).
            attention_mask: (B, T), 1 = token, 0 = padding. None attends to every token.
            noise_mask: (B, T), 1 = transform this token. None transforms every attended token. Padding is never
                transformed.
            kwargs: other arguments of the base model. ``labels`` and arguments that the base model does not know are
                dropped, so the whole output of a tokenizer wrapper may be passed.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds are given, a mask has another shape, or
                past_key_values are given.
            RuntimeError: the forward did not run ``target_layer``.
        """
        for consumer in self._consumers:
            consumer.offer(None)  # frees the graph of the last forward before this forward builds its own
        arguments, attended, selected = prepare_inputs(
            input_ids, attention_mask, noise_mask, kwargs, self._base_arguments
        )
        layers = frozenset().union(*(consumer.layers for consumer in self._consumers))
        run = self._run_joint if self.clean_pass == "joint" else self._run_separate
        batch = (arguments.get("input_ids", arguments.get("inputs_embeds")), attention_mask, noise_mask)
        clean_graph = any(consumer.clean_graph for consumer in self._consumers)
        current = Pass(attended, selected, layers, batch, clean_graph)
        draw = shared_draw(self.noise_layer) if self.noise_layer.enabled else None
        if draw is not None and (drawn := draw.find(self, batch, self.noise_layer, self._target)) is not None:
            current.seed, current.transform = drawn
        with with_adapters(self.base_model, self._runs_adapters):
            clean_logits, noisy_logits = run(current, arguments)
        if current.transform is None and self.noise_layer.enabled:
            raise RuntimeError(
                f"target_layer {self.target_layer!r} did not run: it lies deeper than all layers that losses read"
            )
        capture = current.capture(clean_logits, noisy_logits)
        for consumer in self._consumers:
            consumer.offer(capture)
        return super_batch_output(capture)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        noise_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate with the base model after a transformed prompt. Generated tokens are not transformed.

        Args:
            input_ids: (B, T), the prompts, padded on the left.
            attention_mask: as in `forward`.
            noise_mask: as in `forward`.
            kwargs: options of the base model's ``generate``. ``loss_mask`` and ``labels`` of a tokenizer wrapper are
                dropped.

        Returns:
            Token ids of the base model's ``generate``, prompt included.

        Raises:
            ValueError: as in `transform`.
        """
        embeddings = self.transform(input_ids, attention_mask, noise_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("loss_mask", "labels")}
        arguments = {"inputs_embeds": embeddings, "attention_mask": attention_mask.long()} | kwargs
        with with_adapters(self.base_model, self._runs_adapters):
            return cast(Tensor, self.causal_lm.generate(input_ids, **arguments))

    def transform(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        noise_mask: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Return the transformed embeddings of a prompt, (B, T, D), for the argument ``inputs_embeds``.

        Args:
            input_ids: (B, T).
            attention_mask: as in `forward`.
            noise_mask: as in `forward`.
            seed: seed of the noise. None takes the noise layer's own seed.

        Raises:
            ValueError: ``target_layer`` is not the input embedding, or a mask has another shape.
        """
        embedding = self.base_model.get_input_embeddings()
        if not self._targets_embeddings():
            raise ValueError(
                f"target_layer must be the input embedding to transform a prompt before the model runs; "
                f"got {self.target_layer!r}"
            )
        _, attended, selected = prepare_inputs(input_ids, attention_mask, noise_mask, {}, self._base_arguments)
        return self._apply_layer(embedding(input_ids), selected, attended, seed)

    def _apply_layer(self, clean: Tensor, selected: Tensor, attended: Tensor, seed: int | Tensor | None) -> Tensor:
        """Return the noise layer's output. Its estimators get the attention mask if they take one."""
        takes_attention = "attention_mask" in inspect.signature(self.noise_layer.estimate).parameters
        arguments = {"attention_mask": attended.long()} if takes_attention else {}
        return cast(Tensor, self.noise_layer(clean, selected, seed=seed, **arguments))

    @property
    def target_depth(self) -> int | None:
        """The last decoder layer that must run so that the target layer runs: −1 for none, None for all."""
        return -1 if self._targets_embeddings() else layer_index_of(self.base_model, self._target)

    def _runs_whole(self) -> bool:
        """Return whether both halves run up to the logits, independent of the consumers."""
        return not self.training or not self._consumers

    def _last_layer(self, half: Half) -> int | None:
        """Return the last layer that consumers of a half, or else the transform, need; None for the whole model."""
        readers = [consumer for consumer in self._consumers if consumer.reads(half)]
        if self._runs_whole() or any(consumer.logits for consumer in readers):
            return None
        layers = frozenset().union(*(consumer.layers for consumer in readers))
        return max(layers) if layers else self.target_depth

    def _run_separate(self, current: Pass, arguments: dict[str, Tensor]) -> tuple[Logits, Logits]:
        clean_logits = None
        if self._runs_whole() or any(consumer.reads("clean") for consumer in self._consumers):
            graph = torch.is_grad_enabled() and current.clean_graph
            with torch.set_grad_enabled(graph), self._during(current, "clean"):
                clean_logits = self._call_base(arguments, self._last_layer("clean"))
        with self._during(current, "noisy"):
            return clean_logits, self._call_base(arguments, self._last_layer("noisy"))

    def _run_joint(self, current: Pass, arguments: dict[str, Tensor]) -> tuple[Logits, Logits]:
        halves: tuple[Half, Half] = ("clean", "noisy")
        last_layers = [self._last_layer(half) for half in halves]
        last_layer = None if None in last_layers else max(cast(list[int], last_layers))
        with self._during(current, "joint"):
            logits = self._call_base(doubled(arguments, len(current.attended)), last_layer)
        if logits is None:
            return None, None
        clean_logits, noisy_logits = halved(logits)
        return clean_logits if current.clean_graph else without_graph(clean_logits), noisy_logits

    def _call_base(self, arguments: dict[str, Tensor], last_layer: int | None) -> Logits:
        """Run the whole model and return its logits, or run the layers 0..last_layer and return None."""
        embeddings = arguments.get("inputs_embeds")
        if embeddings is not None and self._targets_embeddings():
            arguments = arguments | {"inputs_embeds": self._transform(embeddings)}
        checkpointing = self.is_gradient_checkpointing and self.training and torch.is_grad_enabled()
        with checkpointed_layers(self.base_model) if checkpointing else nullcontext():
            if last_layer is None:
                return self._logits(arguments)
            self._trunk(last_layer)(**arguments)
            return None

    def _logits(self, arguments: dict[str, Tensor]) -> Tensor | LinearLogits:
        """Run the whole model; without its head if every reader of logits takes hidden states and head."""
        readers = [consumer for consumer in self._consumers if consumer.logits]
        if not self._runs_whole() and all(consumer.sides for consumer in readers) and self.head_refusal is None:
            try:
                return linear_logits(self.causal_lm, arguments)
            except NotPlainError:  # an adapter was put on the head after the check
                pass
        return cast(Tensor, self.causal_lm(**arguments).logits)

    @property
    def head_refusal(self) -> str | None:
        """The reason why training makes logits although no loss needs them; None if the base model's head is plain."""
        if not self._head_checked:
            self._head_refusal, self._head_checked = plain_head_refusal(self.causal_lm), True
        return self._head_refusal

    def _targets_embeddings(self) -> bool:
        return self._target is self.base_model.get_input_embeddings()

    def _trunk(self, last_layer: int) -> nn.Module:
        if last_layer not in self._trunks:
            self._trunks[last_layer] = [shallow_trunk(self.base_model, last_layer + 1)]
        return self._trunks[last_layer][0]

    @contextmanager
    def _during(self, current: Pass, half: str) -> Iterator[None]:
        current.half = half
        self._running = current
        try:
            yield
        finally:
            self._running = None

    def _transform_hook(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._running is None:
            return None
        if isinstance(output, Tensor):
            return self._transform(output)
        return (self._transform(output[0]), *output[1:])

    def _transform(self, hidden: Tensor) -> Tensor:
        """Return the value that replaces the target layer's output in the running pass."""
        current = self._running
        if current is None or current.half == "clean":
            return hidden
        clean = hidden.chunk(2)[0] if current.half == "joint" else hidden
        if current.transform is None:
            layer = self.noise_layer
            transformed = self._apply_layer(clean, current.selected, current.attended, current.seed)
            if layer.mean is not None and layer.std is not None:  # None while the layer is disabled
                current.transform = Transform(clean, layer.mean, layer.std, layer.mask, transformed, layer.forward_seed)
                if (draw := shared_draw(layer)) is not None:
                    draw.keep(self, current.batch, Draw(layer.forward_seed, current.transform), layer, self._target)
        else:
            transformed = current.transform.output
        return torch.cat([clean, transformed]) if current.half == "joint" else transformed

    def _keep_layer(self, index: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._running is not None:
            self._running.keep_layer(index, output)
