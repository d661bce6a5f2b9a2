"""Tiny causal language models of the supported families, with random weights."""

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
        **overrides,
    }
    if family == "gpt2":
        config = transformers.GPT2Config(**settings, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval(), transformers.GPT2Model, "transformer.wte"
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}.get(
        family, "Phi3"
    )
    settings |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
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
