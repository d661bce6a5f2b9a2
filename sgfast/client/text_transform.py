"""The transform that a client loads from one file to turn its prompts into transformed embeddings.

The model's owner trains a transform and saves it with `StainedGlassTransformForText.save_pretrained`. A client loads
the file, transforms its prompts, and sends only embeddings. The file is safetensors: tensors, and JSON metadata with
the tokenizer and the transform's configuration. Nothing in the file is executed. The file names classes only by entries
of a fixed list.
"""

import math
import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgfast.client.file_format import read_client_file, write_client_file
from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.huggingface.tokenizer_state import TokenizerError
from sgfast.model.decoder import embedding_scale_of
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.transformer_cloak import KNOWN_BODIES, TransformerCloak
from sgfast.utils.files import check_output_file

_NOISE_LAYER_PREFIX, _PARAMETER_PREFIX = "noise_layer.", "base_model."
# Far above the count of any model. transformers makes a list or a dictionary of this many entries.
_LARGEST_COUNT = 10_000
_COUNTS = ("num_hidden_layers", "n_layer", "num_labels")
# The bytes of a rebuilt layer's buffers, such as rotary frequencies, which are not in the file.
_LARGEST_BUFFERS = 2**26
# The most tokens that a file's tokenizer and chat template may make of a text: the estimators' time grows with the
# square of their number.
_TOKENS, _TOKENS_PER_TEXT, _TOKENS_PER_BYTE = 2**13, 2**8, 8


class StainedGlassTransformForText:
    """A trained text transform with everything that a client needs: noise layer, embedding table, tokenizer.

    Args:
        model: the trained model.
        tokenizer_wrapper: turns prompts into tokens and masks.
        parameter_names: names of the base model's parameters to include, relative to ``model.causal_lm`` (the base
            model, without PEFT's wrapper). The weight of the model's target layer (the embedding table) must be among
            them.

    Raises:
        ValueError: a name the base model does not have, the embedding table is missing or has fewer rows than the
            tokenizer has tokens, or a noise layer that a file cannot describe.
        TypeError: an argument of another type, such as one name in place of a list of names.

    Nothing else of the base model is included. No seed is included: each call draws its noise from the operating
    system's randomness, unless the caller gives a seed.
    """

    def __init__(
        self,
        model: NoiseMaskedNoisyTransformerModel,
        tokenizer_wrapper: TokenizerWrapper,
        parameter_names: Collection[str],
    ) -> None:
        _check_parts(model, tokenizer_wrapper, parameter_names)
        embedding = model.causal_lm.get_submodule(model.target_layer)
        embedding_name = f"{model.target_layer}.weight"
        if embedding_name not in parameter_names:
            raise ValueError(f"parameter_names must include the embedding table, {embedding_name!r}")
        parameters = {}
        for name in parameter_names:
            try:
                parameters[name] = model.causal_lm.get_parameter(name).detach()
            except AttributeError as error:
                raise ValueError(f"the base model has no parameter {name!r} (parameter_names)") from error
        if not isinstance(model.noise_layer, TransformerCloak):
            raise ValueError(
                f"only a TransformerCloak can be saved for a client; got {type(model.noise_layer).__name__}"
            )
        body = model.noise_layer.settings()["transformer_type"]
        if body not in KNOWN_BODIES:
            raise ValueError(f"a client file can hold the bodies {', '.join(KNOWN_BODIES)}; got {body}")
        _check_table(parameters[embedding_name], model.noise_layer, tokenizer_wrapper)
        self.noise_layer = model.noise_layer
        self.tokenizer_wrapper = tokenizer_wrapper
        self.parameters: dict[str, Tensor] = parameters
        self.embedding_name = embedding_name
        self.embedding_scale = embedding_scale_of(embedding)
        self._path: str | os.PathLike[str] | None = None

    def __call__(
        self,
        examples: Sequence[Any] | Mapping[str, str],
        *,
        seed: int | None = None,
        add_generation_prompt: bool = True,
    ) -> Tensor:
        """Return the transformed embeddings (B, T, D) of the examples, ready for ``inputs_embeds``.

        For a batch of prompts of different lengths use `encode`, which also gives the attention mask.
        """
        return self.encode(examples, seed=seed, add_generation_prompt=add_generation_prompt)["inputs_embeds"]

    @torch.no_grad()
    def encode(
        self,
        examples: Sequence[Any] | Mapping[str, str],
        *,
        seed: int | None = None,
        add_generation_prompt: bool = True,
    ) -> dict[str, Tensor]:
        """Transform one example or a list of them.

        Args:
            examples: a chat, ``[{"role": "user", "content": "Hello"}]``, or a list of chats. With a tokenizer wrapper
                for instructions: an instruction or a list of instructions, see `TokenizerWrapper`.
            seed: 0 ≤ seed < 2⁶⁴, to repeat an output; by default fresh randomness from the operating system. Do not
                send two outputs under one seed: their difference has no noise.
            add_generation_prompt: end each prompt with the template's opening of an assistant message.

        Returns:
            ``inputs_embeds`` (B, T, D) and ``attention_mask`` (B, T), padded on the left because generation needs it.

        Raises:
            RuntimeError: the noise layer is disabled.
            ValueError: a tokenizer or chat template from a file failed or took too long; the message names the file.
        """
        if not self.noise_layer.enabled:
            raise RuntimeError("the noise layer is disabled: what would be sent is the clean text")
        tokens = self._tokenize(examples, add_generation_prompt)
        table = self.parameters[self.embedding_name]
        if tokens["input_ids"].shape[1] == 0:
            raise self._blamed("the chat template writes no token of these examples")
        tokens = {name: tensor.to(table.device) for name, tensor in tokens.items()}
        was_training = self.noise_layer.training
        self.noise_layer.eval()  # no dropout in the embeddings that are sent
        try:
            transformed = self.noise_layer(
                table[tokens["input_ids"]] * self.embedding_scale,
                tokens["noise_mask"],
                attention_mask=tokens["attention_mask"],
                seed=secrets.randbits(64) if seed is None else seed,
            )
        finally:
            self.noise_layer.train(was_training)
            self.noise_layer.clear()  # the clean embeddings must not outlive the call
        return {"inputs_embeds": transformed, "attention_mask": tokens["attention_mask"]}

    def _tokenize(self, examples: Sequence[Any] | Mapping[str, str], add_generation_prompt: bool) -> dict[str, Tensor]:
        """Tokenize and pad on the left, because generation continues at the right end."""
        tokenizer = self.tokenizer_wrapper.tokenizer
        side = tokenizer.padding_side
        texts, size = _text_size(examples)
        tokenizer.padding_side = "left"
        try:
            tokens = self.tokenizer_wrapper(examples, add_generation_prompt=add_generation_prompt)
        except TokenizerError as error:
            raise self._blamed(_first_line(error)) from error
        finally:
            tokenizer.padding_side = side
        count = tokens["input_ids"].shape[1]
        if self._path is not None and count > _TOKENS + _TOKENS_PER_TEXT * texts + _TOKENS_PER_BYTE * size:
            raise self._blamed(f"its tokenizer and chat template make {count} tokens of {size} bytes of text")
        return tokens

    def _blamed(self, fault: str) -> ValueError:
        """Return the error for a fault of the tokenizer. The message names the file that holds the tokenizer."""
        return ValueError(fault if self._path is None else f"{self._path} cannot be used: {fault}")

    def embedding_table(self) -> Tensor:
        """Return the clean embeddings of all tokens, (V, D)."""
        return self.parameters[self.embedding_name] * self.embedding_scale

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file. A file at the path is replaced once the new file is whole and on the disk.

        The same transform gives the same bytes in every process. If ``path`` is a symbolic link, the file that the link
        names is replaced.

        Raises:
            FileNotFoundError: there is no folder to write to.
            IsADirectoryError: ``path`` is a folder.
            OSError: ``path`` is a device, a pipe, a socket or a link that leads back to itself, or the disk is full.
        """
        check_output_file(path)
        # Only the parameters of the layer's state: the number of its forwards must not reach the client.
        tensors: dict[str, Tensor] = {
            _NOISE_LAYER_PREFIX + name: parameter for name, parameter in self.noise_layer.named_parameters()
        }
        tensors |= {_PARAMETER_PREFIX + name: tensor for name, tensor in self.parameters.items()}
        description = {
            "noise_layer": self.noise_layer.settings(),
            "tokenizer_wrapper": self.tokenizer_wrapper.to_json(),
            "embedding_name": self.embedding_name,
            "embedding_scale": self.embedding_scale,
        }
        write_client_file(path, tensors, description)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "StainedGlassTransformForText":
        """Load a file of `save_pretrained`.

        The SHA-256 in the file is checked. The checksum detects damage, not forgery: a forged file can still hold a
        transform that hides nothing. Load only files that you trust.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, truncated, of another kind or of a newer version, or its parts do not fit
                each other; the message names the path.
        """
        tensors, description = read_client_file(path)
        try:
            transform = cls._from_parts(tensors, description)
        except Exception as error:  # a forged file can make tokenizers and transformers raise anything
            raise ValueError(f"{path} cannot be used: {_first_line(error)}") from error
        transform._path = path
        return transform

    @classmethod
    def _from_parts(
        cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
    ) -> "StainedGlassTransformForText":
        _check_description(description)
        layer_tensors = _without_prefix(tensors, _NOISE_LAYER_PREFIX)
        transform = cls.__new__(cls)
        transform.parameters = _without_prefix(tensors, _PARAMETER_PREFIX)
        if len(layer_tensors) + len(transform.parameters) != len(tensors):
            raise ValueError("it holds tensors of neither the noise layer nor the base model")
        transform.noise_layer = _rebuild(description["noise_layer"], layer_tensors)
        transform.tokenizer_wrapper = TokenizerWrapper.from_json(description["tokenizer_wrapper"])
        transform.embedding_name = description["embedding_name"]
        transform.embedding_scale = description["embedding_scale"]
        if transform.embedding_name not in transform.parameters:
            raise ValueError("its embedding table is missing")
        table = transform.parameters[transform.embedding_name]
        _check_table(table, transform.noise_layer, transform.tokenizer_wrapper)
        _try_layer(transform.noise_layer, table)
        return transform


@torch.no_grad()
def _try_layer(layer: TransformerCloak, table: Tensor) -> None:
    """Run the layer once, because a configuration can fit its tensors and still fail to compute."""
    ones = torch.ones(1, 2, dtype=torch.int64)
    try:
        transformed = layer(table[:1].expand(2, -1)[None], ones == 1, attention_mask=ones, seed=0)
    finally:
        layer.clear()
    if transformed.shape != (1, 2, table.shape[1]):
        raise ValueError(f"its noise layer gives the shape {tuple(transformed.shape)}")


def _check_parts(model: Any, tokenizer_wrapper: Any, parameter_names: Any) -> None:
    if not isinstance(model, NoiseMaskedNoisyTransformerModel):
        raise TypeError(f"model must be a NoiseMaskedNoisyTransformerModel; got {type(model).__name__}")
    if not isinstance(tokenizer_wrapper, TokenizerWrapper):
        raise TypeError(f"tokenizer_wrapper must be a TokenizerWrapper; got {type(tokenizer_wrapper).__name__}")
    if isinstance(parameter_names, str) or not isinstance(parameter_names, Collection):
        raise TypeError(f"parameter_names must be a list of names; got {type(parameter_names).__name__}")


def _check_description(description: Mapping[str, Any]) -> None:
    types = {"noise_layer": dict, "tokenizer_wrapper": str, "embedding_name": str, "embedding_scale": float}
    if description.keys() != types.keys():
        raise ValueError(f"its description must have {', '.join(types)} and nothing else")
    for name, kind in types.items():
        if type(description[name]) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}; got {type(description[name]).__name__}")
    if not 0 < description["embedding_scale"] < math.inf:
        raise ValueError(f"embedding_scale must be positive; got {description['embedding_scale']}")


def _check_table(table: Tensor, layer: TransformerCloak, wrapper: TokenizerWrapper) -> None:
    """Check that every token has an embedding of the noise layer's width."""
    width = layer.mean_estimator.head.in_features
    if table.ndim != 2 or table.shape[1] != width:
        raise ValueError(f"the embedding table must be (V, {width}) as the noise layer is; got {tuple(table.shape)}")
    largest = max(wrapper.tokenizer.get_vocab().values(), default=-1)
    if table.shape[0] <= largest:
        raise ValueError(f"the tokenizer has ids up to {largest}, the embedding table only {table.shape[0]} rows")


def _rebuild(settings: dict[str, Any], parameters: dict[str, Tensor]) -> TransformerCloak:
    """Build the noise layer with its parameters. Buffers take the parameters' dtype."""
    _check_counts(settings, len(parameters))
    # The shapes of the settings must be the shapes in the file. They are compared first, on a device without memory.
    with torch.device("meta"):
        outline = TransformerCloak.from_settings({**settings, "directly_learn_stds": False})
    _check_shapes(outline, parameters)
    layer = TransformerCloak.from_settings(settings)
    dtypes = {tensor.dtype for tensor in parameters.values()}
    if len(dtypes) == 1:
        layer.to(dtypes.pop())
    layer.load_state_dict(parameters, strict=False, assign=True)
    return layer.eval().requires_grad_(False)


def _check_counts(settings: Mapping[str, Any], tensors: int) -> None:
    """Check the numbers that decide how large layers and configurations become, before shapes exist to compare."""
    config = settings["config"]
    counts = [(name, config[name], _LARGEST_COUNT) for name in _COUNTS if config.get(name) is not None]
    counts += [(name, settings[name], tensors) for name in ("mean_num_hidden_layers", "std_num_hidden_layers")]
    for name, count, largest in counts:
        if type(count) is not int or not 0 <= count <= largest:
            raise ValueError(f"{name} must be an integer of at most {largest}; got {str(count)[:20]}")


def _check_shapes(outline: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in outline.named_parameters()}
    different = [name for name in expected.keys() | parameters.keys() if name not in expected or name not in parameters]
    different += [name for name in expected.keys() & parameters.keys() if expected[name] != parameters[name].shape]
    if different:
        raise ValueError(f"its tensors are not those of its noise layer: {', '.join(sorted(different)[:4])}")
    if sum(buffer.nbytes for buffer in outline.buffers()) > _LARGEST_BUFFERS:
        raise ValueError("its noise layer needs more memory than its tensors")


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _text_size(examples: Any) -> tuple[int, int]:
    """Count the texts among examples and their bytes in UTF-8; UnicodeEncodeError if a text is no Unicode."""
    texts, size, waiting = 0, 0, [examples]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            texts, size = texts + 1, size + len(one.encode())
        elif isinstance(one, Mapping | Sequence):
            waiting += one.values() if isinstance(one, Mapping) else one
    return texts, size


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
