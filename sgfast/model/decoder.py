"""Parts of a Hugging Face causal language model: backbone, decoder layers, and a trunk of the first layers."""

import copy
from typing import Any, cast

from torch import Tensor, nn

from sgfast.ops.validation import check_integer

# Names of the norm after the last layer in different model families.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def causal_lm_of(base_model: Any) -> Any:
    """Return the model of transformers: the model inside a PEFT model, or the model itself."""
    return base_model.get_base_model() if hasattr(base_model, "get_base_model") else base_model


def backbone_of(base_model: nn.Module) -> nn.Module:
    """Return the model without its language-model head."""
    base_model = causal_lm_of(base_model)
    prefix = getattr(base_model, "base_model_prefix", "")
    backbone = getattr(base_model, prefix, None) if prefix else None
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"base_model must be a Hugging Face causal language model; {type(base_model).__name__} has no backbone"
        )
    return backbone


def _layer_list(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    depth = getattr(getattr(backbone, "config", None), "num_hidden_layers", None)
    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name, child
    raise ValueError(f"no list of {depth} decoder layers was found in {type(backbone).__name__}")


def decoder_layers(base_model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers, in order."""
    return _layer_list(backbone_of(base_model))[1]


def resolve_layer_index(base_model: nn.Module, index: int) -> int:
    """Check a decoder layer's index (a negative one counts from the end), and return the index from 0.

    Raises:
        TypeError: the index is not an int.
        ValueError: the index is out of range.
    """
    return check_layer_index(index, len(decoder_layers(base_model)))


def check_layer_index(index: int, depth: int) -> int:
    """Check a decoder layer's index for a model of ``depth`` layers, and return the index from 0.

    Raises:
        TypeError: the index is not an int.
        ValueError: the index is out of range.
    """
    check_integer("the decoder layer index", index)
    if not -depth <= index < depth:
        raise ValueError(f"the decoder layer index must lie in [{-depth}, {depth - 1}] for this model; got {index}")
    return index % depth


def layer_index_of(base_model: nn.Module, module: nn.Module) -> int | None:
    """Return the index of the decoder layer that is or contains a module; None for a module outside the layers."""
    for index, layer in enumerate(decoder_layers(base_model)):
        if any(part is module for part in layer.modules()):
            return index
    return None


def shallow_trunk(base_model: nn.Module, depth: int) -> nn.Module:
    """Make a backbone that shares the base model's modules and stops after ``depth`` layers, without the final norm.

    The base model does not change.
    """
    backbone = backbone_of(base_model)
    name, layers = _layer_list(backbone)
    trunk = copy.copy(backbone)
    # accelerate may store a forward on the instance. That forward is bound to the backbone and would run all layers.
    trunk.__dict__.pop("forward", None)
    modules: dict[str, nn.Module | None] = dict(backbone._modules)
    modules[name] = nn.ModuleList(list(layers)[:depth])
    for norm in _FINAL_NORMS:
        if norm in modules:
            modules[norm] = nn.Identity()
    trunk._modules = modules
    return trunk


def embedding_scale_of(embedding: nn.Module) -> float:
    """Return the factor by which an embedding module multiplies its table: √D for Gemma, 1 for most models."""
    return float(getattr(embedding, "embed_scale", 1.0))


def embedding_table_of(base_model: Any) -> Tensor:
    """Return the embeddings of all tokens, multiplied by the embedding's scale, (V, D), without graph."""
    embedding = base_model.get_input_embeddings()
    scale = embedding_scale_of(embedding)
    table: Tensor = embedding.weight.detach()
    return table if scale == 1 else table * scale


def hidden_states_of(layer_output: Any) -> Tensor:
    """Return the hidden states in a decoder layer's output, which is a tuple in some model families and versions."""
    return cast(Tensor, layer_output if isinstance(layer_output, Tensor) else layer_output[0])
