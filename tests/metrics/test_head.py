"""A head on its own against the model it comes from."""

import pytest
import torch

from sgfast.model.decoder import backbone_of
from sgfast.model.head import language_model_head
from tests.tiny_models import FAMILIES, VOCABULARY, WIDTH, tiny_causal_lm


def scaled_causal_lm(name, **scales):
    """A family that scales its logits."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **scales,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite", "peft"])
def test_logits_are_the_models(family):
    input_ids = torch.randint(1, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    match family:
        case "cohere":
            model = scaled_causal_lm("Cohere", logit_scale=0.3)
        case "granite":
            model = scaled_causal_lm("Granite", logits_scaling=3.0)
        case "gemma2":
            # Logits far enough from 0 for the cap to matter.
            model = tiny_causal_lm(family, final_logit_softcapping=0.05)[0]
        case "peft":
            import peft

            model = tiny_causal_lm("llama", tie_word_embeddings=False)[0]
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
        case _:
            model = tiny_causal_lm(family)[0]
    with torch.no_grad():
        hidden = backbone_of(model)(input_ids=input_ids).last_hidden_state
        expected = model(input_ids=input_ids).logits
        head = language_model_head(model)
        logits = head(hidden.flatten(0, 1)).view_as(expected)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(input_ids=input_ids).logits, expected, rtol=0, atol=0)
        if family == "gemma2":
            assert logits.abs().max() < 0.05
            assert (torch.nn.functional.linear(hidden, model.lm_head.weight) - expected).abs().max() > 0.01


def test_a_model_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match="has no backbone"):
        language_model_head(torch.nn.Linear(2, 2))
