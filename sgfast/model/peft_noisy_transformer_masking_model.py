"""Causal language models with PEFT adapters and a noise layer: students that learn to read transformed tokens."""

from typing import Any

from sgfast.model.adapters import train_adapters
from sgfast.model.decoder import causal_lm_of
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel


class PeftNoiseMaskedNoisyTransformerModel(NoiseMaskedNoisyTransformerModel):
    """`NoiseMaskedNoisyTransformerModel` over a PEFT model that runs with its adapters.

    The base model except the adapters is frozen and stays in eval mode. The adapters keep the ``requires_grad`` that
    PEFT set, and their dropout follows ``.train()``. A teacher and this student may share one base model: PEFT puts
    adapters into the base model in place, and a `NoiseMaskedNoisyTransformerModel` runs that model without adapters.
    With ``noise_layer=teacher.noise_layer`` both models also share the transform and its noise. If both are called with
    the same tensors, the second model reuses the transformed values of the first, with their graph. Then call
    ``backward`` once, on the sum of the losses.

    Args:
        noise_layer_class: a subclass of `BaseNoiseLayer`, or None with a ready ``noise_layer``.
        base_model: a ``peft.PeftModel`` over a causal language model. Its adapters must not add tokens to the sequence:
            LoRA and similar adapters work, prompt and prefix tuning do not.
        input_shape: (-1, D); D is checked against the embedding width. None skips the check.
        target_layer: path of the module whose output is transformed, relative to the unwrapped model.
        clean_pass: ``"separate"`` or ``"joint"``.
        noise_layer: a ready noise layer to share, instead of ``noise_layer_class`` and its arguments.
        noise_layer_kwargs: arguments of ``noise_layer_class``.

    Raises:
        ValueError: as in `NoiseMaskedNoisyTransformerModel`, or the adapters use prompt learning.
        TypeError: base_model is not a PEFT model.

    Example:
        >>> import peft
        >>> from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
        >>> from sgfast.noise_layer import TransformerCloak
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> base_model = LlamaForCausalLM(config)
        >>> with_adapters = peft.get_peft_model(base_model, peft.LoraConfig(target_modules=["q_proj"]))
        >>> teacher = NoiseMaskedNoisyTransformerModel(
        ...     TransformerCloak, base_model, config_path=config, transformer_type=LlamaModel
        ... )
        >>> student = PeftNoiseMaskedNoisyTransformerModel(None, with_adapters, noise_layer=teacher.noise_layer)
    """

    _runs_adapters = True

    def _check_base(self, base_model: Any) -> None:
        if causal_lm_of(base_model) is base_model:
            raise TypeError(f"base_model must be a peft.PeftModel; got {type(base_model).__name__}")
        if base_model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "base_model must not have adapters that add tokens (prompt learning): masks do not cover added tokens"
            )

    def train(self, mode: bool = True) -> "PeftNoiseMaskedNoisyTransformerModel":
        """Set the mode of the noise layer and of the adapters. All other modules stay in eval mode."""
        super().train(mode)
        train_adapters(self.base_model, mode)
        return self
