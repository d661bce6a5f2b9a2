"""The client's half of a text transform: one file in, transformed embeddings out.

The model's owner trains a transform and saves it with `StainedGlassTransformForText.save_pretrained`; a client loads
the file, transforms its prompts, and sends only embeddings. The file is safetensors: tensors, and JSON metadata with
the tokenizer and the transform's configuration. Nothing in it is executed, and it names classes only by entries of a
fixed list.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.model.decoder import embedding_scale_of
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.transformer_cloak import KNOWN_BODIES, TransformerCloak
from sgfast.utils.files import replacing

FORMAT = "sgfast text transform"
FORMAT_VERSION = 1
_NOISE_LAYER_PREFIX, _PARAMETER_PREFIX = "noise_layer.", "base_model."


class StainedGlassTransformForText:
    """A trained text transform with all that a client needs: noise layer, embedding table, tokenizer.

    Args:
        model: the trained model.
        tokenizer_wrapper: how prompts become tokens and masks.
        parameter_names: names, relative to ``model.causal_lm`` (the base model, without PEFT's wrapper), of the base
            model's parameters to include. The weight of the model's target layer (the embedding table) must be among
            them.

    Raises:
        ValueError: a name the base model does not have, the embedding table is missing, or a noise layer that a file
            cannot describe.

    Nothing else of the base model is included, and no seed: each call draws its noise from the operating system's
    randomness, unless it is given a seed.
    """

    def __init__(
        self,
        model: NoiseMaskedNoisyTransformerModel,
        tokenizer_wrapper: TokenizerWrapper,
        parameter_names: Sequence[str],
    ) -> None:
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
        self.noise_layer = model.noise_layer
        self.tokenizer_wrapper = tokenizer_wrapper
        self.parameters: dict[str, Tensor] = parameters
        self.embedding_name = embedding_name
        self.embedding_scale = embedding_scale_of(embedding)

    def __call__(
        self,
        examples: Sequence[Any] | Mapping[str, str],
        *,
        seed: int | None = None,
        add_generation_prompt: bool = True,
    ) -> Tensor:
        """Transformed embeddings (B, T, D) of what the tokenizer wrapper takes, ready for ``inputs_embeds``.

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
            examples: what the tokenizer wrapper takes.
            seed: 0 ≤ seed < 2⁶⁴, to repeat an output; by default fresh randomness from the operating system. Do not
                send two outputs under one seed: their difference has no noise.
            add_generation_prompt: end with the template's opening of an assistant message.

        Returns:
            ``inputs_embeds`` (B, T, D) and ``attention_mask`` (B, T), padded on the left, as generation needs.

        Raises:
            RuntimeError: the noise layer is disabled.
        """
        if not self.noise_layer.enabled:
            raise RuntimeError("the noise layer is disabled: what would be sent is the clean text")
        tokens = self._tokenize(examples, add_generation_prompt)
        table = self.parameters[self.embedding_name]
        tokens = {name: tensor.to(table.device) for name, tensor in tokens.items()}
        was_training = self.noise_layer.training
        self.noise_layer.eval()  # no dropout in what is sent
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
        """Tokens and masks, padded on the left: generation continues at the right end."""
        tokenizer = self.tokenizer_wrapper.tokenizer
        side = tokenizer.padding_side
        tokenizer.padding_side = "left"
        try:
            return self.tokenizer_wrapper(examples, add_generation_prompt=add_generation_prompt)
        finally:
            tokenizer.padding_side = side

    def embedding_table(self) -> Tensor:
        """The clean embeddings of all tokens, (V, D)."""
        return self.parameters[self.embedding_name] * self.embedding_scale

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, replacing what is there only once it is whole."""
        from safetensors.torch import save_file

        # Of the layer's state only the parameters: how often it ran is nobody's business.
        tensors: dict[str, Tensor] = {
            _NOISE_LAYER_PREFIX + name: parameter for name, parameter in self.noise_layer.named_parameters()
        }
        tensors |= {_PARAMETER_PREFIX + name: tensor for name, tensor in self.parameters.items()}
        # Tied parameters share memory, which the format refuses.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        content = json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "noise_layer": self.noise_layer.settings(),
                "tokenizer_wrapper": self.tokenizer_wrapper.to_json(),
                "embedding_name": self.embedding_name,
                "embedding_scale": self.embedding_scale,
            }
        )
        metadata = {"format": FORMAT, "content": content, "sha256": _digest(content, tensors)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "StainedGlassTransformForText":
        """Load what `save_pretrained` wrote.

        The SHA-256 kept in the file is checked: it detects damage, not forgery. Load files you trust; a forged one can
        still hold a transform that hides nothing.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, truncated, of another kind or a newer version; the message names the path.
        """
        tensors, metadata = _read(Path(path))
        content = metadata.get("content", "")
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a text transform of sgfast")
        if metadata.get("sha256") != _digest(content, tensors):
            raise ValueError(f"{path} is damaged: its checksum does not match")
        try:
            description = json.loads(content)
            version = description["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"its format version is {version}, this sgfast reads {FORMAT_VERSION}")
            transform = cls.__new__(cls)
            transform.noise_layer = _rebuild(description["noise_layer"], _without_prefix(tensors, _NOISE_LAYER_PREFIX))
            transform.tokenizer_wrapper = TokenizerWrapper.from_json(description["tokenizer_wrapper"])
            transform.parameters = _without_prefix(tensors, _PARAMETER_PREFIX)
            transform.embedding_name = description["embedding_name"]
            transform.embedding_scale = float(description["embedding_scale"])
            if transform.embedding_name not in transform.parameters:
                raise ValueError("its embedding table is missing")
        except Exception as error:  # whatever a file from elsewhere provokes in tokenizers and transformers
            raise ValueError(f"{path} cannot be used: {error}") from error
        return transform


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a text transform")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _rebuild(settings: dict[str, Any], parameters: Mapping[str, Tensor]) -> TransformerCloak:
    """The noise layer with its parameters, in their dtype (buffers too), ready to use."""
    layer = TransformerCloak.from_settings(settings)
    dtypes = {tensor.dtype for tensor in parameters.values()}
    if len(dtypes) == 1:
        layer.to(dtypes.pop())
    missing, unexpected = layer.load_state_dict(parameters, strict=False)
    if unexpected or set(missing) - {"forward_count"}:
        raise ValueError("its tensors are not those of its noise layer")
    return layer.eval().requires_grad_(False)


def _digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
