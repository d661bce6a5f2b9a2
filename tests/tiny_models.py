"""Tiny causal language models of the supported families, with random weights."""

import copy
from typing import Any

import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2")
VOCABULARY, WIDTH, LAYERS = 61, 16, 4


def tiny_causal_lm(family: str, **overrides: Any) -> tuple[Any, type, str]:
    """A model with 4 layers of width 16, its body's class, and the path of its embedding."""
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
        **overrides,
    }
    if family == "gpt2":
        config = transformers.GPT2Config(**settings)
        return transformers.GPT2LMHeadModel(config).eval(), transformers.GPT2Model, "transformer.wte"
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}.get(
        family, "Phi3"
    )
    settings |= {"num_key_value_heads": 2, "intermediate_size": 32}
    if family in ("qwen3", "gemma2"):
        settings["head_dim"] = 8
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return model, getattr(transformers, f"{name}Model"), "model.embed_tokens"


def with_lora(base_model: Any, family: str = "llama", dropout: float = 0.0) -> Any:
    """The model with LoRA adapters that change what it computes."""
    import peft

    targets = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}.get(family, ["q_proj", "v_proj"])
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, fan_in_fan_out=family == "gpt2")
    adapted = peft.get_peft_model(base_model, config)
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first: the adapters would change nothing
            torch.nn.init.normal_(parameter, std=0.5)
    return adapted


def tiny_noisy_model(family: str = "llama", **arguments: Any) -> Any:
    """A noisy model whose transform is neither trivial nor the same for every token."""
    from sgfast.model import NoiseMaskedNoisyTransformerModel
    from sgfast.noise_layer import TransformerCloak

    base_model, body, target_layer = tiny_causal_lm(family)
    settings = {"config_path": base_model.config, "transformer_type": body, "rhos_init": -1.0, "seed": 7}
    noisy_model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak, base_model, (-1, WIDTH), target_layer, **(settings | arguments)
    )
    torch.manual_seed(1)
    for estimator in (noisy_model.noise_layer.mean_estimator, noisy_model.noise_layer.std_estimator):
        torch.nn.init.normal_(estimator.head.weight, std=0.1)
    return noisy_model


def tiny_pair(
    family: str = "llama",
    dropout: float = 0.0,
    clean_pass: str = "separate",
    two_bases: bool = False,
    **arguments: Any,
) -> tuple[Any, Any]:
    """A teacher and a student over one base, or over equal ones, and one noise layer."""
    from sgfast.model import PeftNoiseMaskedNoisyTransformerModel

    teacher = tiny_noisy_model(family, clean_pass=clean_pass, **arguments)
    base_model = copy.deepcopy(teacher.base_model) if two_bases else teacher.base_model
    student = PeftNoiseMaskedNoisyTransformerModel(
        None,
        with_lora(base_model, family, dropout),
        (-1, WIDTH),
        teacher.target_layer,
        noise_layer=teacher.noise_layer,
        clean_pass=clean_pass,
    )
    return teacher, student


def uneven_tokens() -> dict[str, torch.Tensor]:
    """Three right-padded sequences of 9, 6 and 4 tokens; every third token is not transformed."""
    generator = torch.Generator().manual_seed(3)
    attention_mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    return {
        "input_ids": torch.randint(1, VOCABULARY, (3, 9), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "noise_mask": (torch.arange(9) % 3 != 0).expand(3, 9) & (attention_mask != 0),
        "loss_mask": attention_mask != 0,
    }
