"""A small client file, and forged ones with a right checksum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgfast.client import StainedGlassTransformForText
from sgfast.client.file_format import read_client_file, write_client_file
from sgfast.huggingface import TokenizerWrapper
from sgfast.model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import TransformerCloak
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

EMBEDDING = "model.embed_tokens.weight"


def write_good_file(path: Path) -> None:
    """A client of a tiny untrained model."""
    base_model, body, target_layer = tiny_causal_lm("llama", vocab_size=300)
    model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak, base_model, None, target_layer, config_path=base_model.config, transformer_type=body
    )
    wrapper = TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM")
    StainedGlassTransformForText(model, wrapper, [EMBEDDING]).save_pretrained(path)


def forge(good: Path, path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change tensors and description of a good file; in the description, JSON inside strings is taken apart."""
    tensors, description = read_client_file(good)
    wrapper = json.loads(description["tokenizer_wrapper"])
    wrapper["tokenizer"]["backend"] = json.loads(wrapper["tokenizer"]["backend"])
    description["tokenizer_wrapper"] = wrapper
    edit(tensors, description)
    if isinstance(wrapper.get("tokenizer"), dict) and not isinstance(wrapper["tokenizer"].get("backend"), str):
        wrapper["tokenizer"]["backend"] = json.dumps(wrapper["tokenizer"].get("backend"))
    description["tokenizer_wrapper"] = json.dumps(description["tokenizer_wrapper"])
    write_client_file(path, tensors, description)
