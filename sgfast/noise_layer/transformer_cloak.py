"""A noise layer for language models. Small transformers over the sequence estimate mean and standard deviation."""

import copy
import inspect
import json
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from sgfast.noise_layer.arguments import Scale, ValueRange
from sgfast.noise_layer.base import BaseNoiseLayer
from sgfast.noise_layer.masker import PercentMasker
from sgfast.noise_layer.parameterizations import (
    CloakStandardDeviationParameterization,
    DirectStandardDeviationParameterization,
)
from sgfast.ops import validation
from sgfast.ops.validation import check_bool, check_count, check_finite, check_real
from sgfast.utils.positions import position_ids_of

# The bodies that a saved layer may name. A file can make the program import nothing else.
KNOWN_BODIES = (
    "GPT2Model",
    "Gemma2Model",
    "LlamaModel",
    "MistralModel",
    "Phi3Model",
    "Qwen2Model",
    "Qwen3Model",
)
# The depth of the deepest models. Each layer takes memory before anything is learned.
MOST_LAYERS = 128


class TransformerCloak(BaseNoiseLayer):
    """Input-dependent Gaussian noise over token embeddings: ``x~ = x + n·(mu(x) + sigma(x)·eps)``.

    mu and sigma come from two estimators. Each is a body ``transformer_type(config)``, fed through ``inputs_embeds``,
    and a linear head. The mean head starts at 0 and the rho head at the constant ``rhos_init``, so that an untrained
    layer adds weak unshifted noise. The bodies keep their type's attention (causal for decoders), so a transformed
    prefix does not depend on later tokens. The architecture is our choice: only the arguments are public.

    Args:
        config_path: a path or hub id of the base model, or its ``PretrainedConfig``; hidden_size is the embedding
            width D.
        transformer_type: the class of the bodies, ``transformers.MistralModel``, say.
        scale: (min, max) of the standard deviations; see `recommend_scale`.
        shallow: temperature of the parameterization.
        percent_to_mask: fraction of each token's features to replace by their mean shift: the features of largest
            sigma.
        directly_learn_stds: True learns sigma itself, clamped to ``scale``, instead of rho.
        mean_num_hidden_layers: depth of the mean estimator.
        std_num_hidden_layers: depth of the std estimator.
        mean_num_attention_heads: attention heads of the mean estimator; None for the config's.
        std_num_attention_heads: attention heads of the std estimator; None for the config's.
        mean_dropout: dropout inside the mean estimator while training.
        std_dropout: dropout inside the std estimator while training.
        rhos_init: rho of the untrained layer.
        value_range: clamp on transformed elements.
        seed: see `BaseNoiseLayer`.

    Shape:
        input (B, T, D), noise_mask (B, T), attention_mask (B, T) → (B, T, D).

    Raises:
        ValueError: an argument out of range, or heads that do not divide the width.
        TypeError: an argument of another type, for example a transformer_type that is no module class.
    """

    def __init__(
        self,
        config_path: str | PathLike[str] | Any,
        transformer_type: type[nn.Module],
        scale: Scale = (1e-4, 2.0),
        shallow: float = 1.0,
        percent_to_mask: float | None = None,
        directly_learn_stds: bool = False,
        mean_num_hidden_layers: int = 1,
        std_num_hidden_layers: int = 1,
        mean_num_attention_heads: int | None = None,
        std_num_attention_heads: int | None = None,
        mean_dropout: float = 0.0,
        std_dropout: float = 0.0,
        rhos_init: float = -4.0,
        value_range: ValueRange | None = None,
        seed: int | None = None,
    ) -> None:
        masker = None if percent_to_mask is None else PercentMasker(percent_to_mask, feature_dimensions=1)
        super().__init__(scale, masker=masker, value_range=value_range, seed=seed)
        if not (isinstance(transformer_type, type) and issubclass(transformer_type, nn.Module)):
            raise TypeError(f"transformer_type must be a class of torch.nn.Module; got {transformer_type!r}")
        config = _load_config(config_path)
        _check_body(transformer_type, config)
        for name, heads in (("mean", mean_num_attention_heads), ("std", std_num_attention_heads)):
            _check_heads(f"{name}_num_attention_heads", heads, config.hidden_size)
        for name, layers in (("mean", mean_num_hidden_layers), ("std", std_num_hidden_layers)):
            if check_count(f"{name}_num_hidden_layers", layers) > MOST_LAYERS:
                raise ValueError(f"{name}_num_hidden_layers must be at most {MOST_LAYERS}; got {layers}")
        for name, dropout in (("mean", mean_dropout), ("std", std_dropout)):
            _check_dropout(f"{name}_dropout", dropout)
        check_bool("directly_learn_stds", directly_learn_stds)
        check_finite("rhos_init", rhos_init)
        self._settings = {
            "transformer_type": transformer_type.__name__,
            "config": _plain_config(config),
            "attention": _attention_of(config),
            "scale": list(self.scale),
            "shallow": shallow,
            "percent_to_mask": percent_to_mask,
            "directly_learn_stds": directly_learn_stds,
            "mean_num_hidden_layers": mean_num_hidden_layers,
            "std_num_hidden_layers": std_num_hidden_layers,
            "mean_num_attention_heads": mean_num_attention_heads,
            "std_num_attention_heads": std_num_attention_heads,
            "mean_dropout": mean_dropout,
            "std_dropout": std_dropout,
            "rhos_init": rhos_init,
            "value_range": None if value_range is None else list(value_range),
        }
        cloak = CloakStandardDeviationParameterization(scale, shallow)
        initial_rho = rhos_init
        self.parameterization: CloakStandardDeviationParameterization | DirectStandardDeviationParameterization = cloak
        if directly_learn_stds:
            self.parameterization = DirectStandardDeviationParameterization(scale)
            initial_rho = cloak(torch.tensor(float(rhos_init))).item()
        self.mean_estimator = _Estimator(
            config, transformer_type, mean_num_hidden_layers, mean_num_attention_heads, mean_dropout, 0.0
        )
        self.std_estimator = _Estimator(
            config, transformer_type, std_num_hidden_layers, std_num_attention_heads, std_dropout, initial_rho
        )

    def estimate(
        self,
        input: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean shift and the standard deviation of every token, (B, T, D) each; sigma in float32."""
        if attention_mask is not None and attention_mask.dim() == 2:
            validation.as_bool("attention_mask", attention_mask)
        if position_ids is None and attention_mask is not None:
            position_ids = position_ids_of(attention_mask)
        arguments = (input, attention_mask, position_ids)
        return self.mean_estimator(*arguments), self.parameterization(self.std_estimator(*arguments))

    def no_weight_decay(self) -> set[str]:
        """The names of both heads' parameters: decay would pull mu to 0 and sigma to the middle of the scale."""
        return {name for name, _ in self.named_parameters() if ".head." in name}

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments without the seed, as the JSON types that `from_settings` takes."""
        return copy.deepcopy(self._settings)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "TransformerCloak":
        """Rebuild an untrained layer of the same architecture.

        Raises:
            ValueError: a transformer type that is not among `KNOWN_BODIES`, a setting that is missing, unknown (a seed,
                say) or of another type than `settings` gives, or arguments that do not fit.
        """
        _check_settings(settings)
        arguments = dict(settings)
        body_name = arguments.pop("transformer_type")
        if body_name not in KNOWN_BODIES:
            raise ValueError(f"the transformer type must be one of {', '.join(KNOWN_BODIES)}; got {body_name!r}")
        import transformers

        body = getattr(transformers, body_name)
        config = body.config_class.from_dict(_architecture(arguments.pop("config")))
        config._attn_implementation = _known_attention(arguments.pop("attention"))
        arguments["scale"] = tuple(arguments["scale"])
        if arguments["value_range"] is not None:
            arguments["value_range"] = tuple(arguments["value_range"])
        return cls(config, body, **arguments)


def _check_settings(settings: dict[str, Any]) -> None:
    names = set(inspect.signature(TransformerCloak).parameters) - {"config_path", "seed"} | {"config", "attention"}
    if different := sorted(map(str, settings.keys() ^ names)):
        raise ValueError(f"the noise layer's settings are unknown or missing: {', '.join(different)[:100]}")
    types: dict[str, Any] = {"transformer_type": str, "config": dict, "attention": str, "scale": list}
    types["value_range"] = list | None
    for name, kind in types.items():
        if not isinstance(settings[name], kind):
            raise ValueError(f"the noise layer's {name} must not be of type {type(settings[name]).__name__}")


def _check_body(transformer_type: Any, config: Any) -> None:
    """Check that a class is a body (no head) for this configuration, as far as transformers can tell."""
    expected = getattr(transformer_type, "config_class", None)
    if expected is not None and not isinstance(config, expected):
        raise ValueError(
            f"transformer_type {transformer_type.__name__} takes a {expected.__name__}; "
            f"config_path gave a {type(config).__name__}"
        )
    if transformer_type.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"transformer_type must be a body without a head; got {transformer_type.__name__}")


class _Estimator(nn.Module):
    """A transformer body without an embedding table, and a linear head that starts at a constant."""

    body: Any

    def __init__(
        self,
        config: Any,
        transformer_type: type[nn.Module],
        num_hidden_layers: int,
        num_attention_heads: int | None,
        dropout: float,
        initial_output: float,
    ) -> None:
        super().__init__()
        self.body = transformer_type(_estimator_config(config, num_hidden_layers, num_attention_heads, dropout))
        # The input is embeddings: a table would be vocabulary × width parameters that nothing reads.
        self.body.set_input_embeddings(nn.Identity())
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, initial_output)

    def forward(self, input: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        hidden = self.body(
            inputs_embeds=input.to(self.head.weight.dtype),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        output: Tensor = self.head(hidden)
        return output


def _plain_config(config: Any) -> dict[str, Any]:
    """Return the config as JSON types, without its origin and without the storage of the base model's weights."""
    return _architecture(json.loads(config.to_json_string(use_diff=False)))


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config that is written and read. The rest may name files, code and repositories."""
    foreign = ("quantization_config", "_name_or_path", "_model_name_or_path", "auto_map")
    return {name: value for name, value in config.items() if name not in foreign and "attn_implementation" not in name}


def _attention_of(config: Any) -> str:
    """Return the name of the attention that gives the same numbers on a client's machine."""
    return "eager" if config._attn_implementation == "eager" else "sdpa"


def _known_attention(name: str) -> str:
    if name not in ("eager", "sdpa"):
        raise ValueError(f"attention must be eager or sdpa; got {name!r}")
    return name


def _load_config(config_path: str | PathLike[str] | Any) -> Any:
    if isinstance(config_path, str | PathLike):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(config_path)
    if not hasattr(config_path, "hidden_size"):
        raise TypeError(
            f"config_path must be a path, a hub id, or a configuration with a hidden_size; "
            f"got {type(config_path).__name__}"
        )
    return config_path


def _check_heads(name: str, heads: int | None, width: int) -> None:
    if heads is not None and width % check_count(name, heads):
        raise ValueError(f"{name} must divide the width {width}; got {heads}")


def _check_dropout(name: str, dropout: float) -> None:
    if not 0 <= check_real(name, dropout) < 1:
        raise ValueError(f"{name} must lie in [0, 1); got {dropout}")


def _estimator_config(config: Any, num_hidden_layers: int, num_attention_heads: int | None, dropout: float) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_hidden_layers
    config.vocab_size, config.pad_token_id = 1, None
    if hasattr(config, "quantization_config"):  # describes the base model's weights, not the estimators'
        del config.quantization_config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer % len(config.layer_types)] for layer in range(num_hidden_layers)]
    if num_attention_heads is not None:
        config.num_attention_heads = num_attention_heads
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = num_attention_heads
        if getattr(config, "head_dim", None):
            config.head_dim = config.hidden_size // num_attention_heads
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def recommend_scale(embedding_weight: Tensor) -> Scale:
    """Return a scale for an embedding table: a tenth of its smallest non-zero magnitude, ten times its largest.

    Args:
        embedding_weight: (V, D).

    Returns:
        (min, max) for a noise layer's ``scale``.

    Raises:
        TypeError: ``embedding_weight`` is not a floating tensor.
        ValueError: the table has no non-zero value, or a value that is not finite.

    Example:
        >>> import torch
        >>> recommend_scale(torch.tensor([[0.0, -0.5], [2.0, 1.0]]))
        (0.05, 20.0)
    """
    validation.check_floating("embedding_weight", embedding_weight)
    if embedding_weight.numel() == 0 or not bool(embedding_weight.isfinite().all()):
        raise ValueError("embedding_weight must have finite values, and some")
    magnitudes = embedding_weight.detach().abs().float()
    largest = magnitudes.max().item()
    if largest == 0:
        raise ValueError("embedding_weight must have a non-zero value")
    smallest = magnitudes.masked_fill(magnitudes == 0, largest).min().item()
    return smallest / 10, largest * 10
