"""Causal language models with PEFT adapters under a noise layer: the student that learns to read transformed tokens."""

from typing import Any

from sgfast.model.adapters import train_adapters
from sgfast.model.decoder import causal_lm_of
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel


class PeftNoiseMaskedNoisyTransformerModel(NoiseMaskedNoisyTransformerModel):
    """`NoiseMaskedNoisyTransformerModel` over a PEFT model, run with its adapters.

    All but the adapters is frozen and stays in eval mode; the adapters keep the ``requires_grad`` that PEFT gave them
    and follow ``.train()``, dropout included. A teacher and this student may share one base: PEFT puts adapters into
    the base in place, and a `NoiseMaskedNoisyTransformerModel` over that base runs it without them. Given
    ``noise_layer=teacher.noise_layer`` they also share one transform and one noise draw: called in turn with the same
    tensors, the second reuses what the first transformed, graph included (call backward once, on the sum of losses).

    Args:
        noise_layer_class: a `BaseNoiseLayer` class, or None with a ready ``noise_layer``.
        base_model: a ``peft.PeftModel`` over a causal language model, whose adapters leave the sequence as it is (LoRA
            and its kin; prompt and prefix tuning do not).
        input_shape: (-1, D); checked against the embedding width. None to skip the check.
        target_layer: path of the module whose output is transformed, relative to the unwrapped model.
        clean_pass: ``"separate"`` or ``"joint"``.
        noise_layer: a ready layer to share, in place of ``noise_layer_class`` and its arguments.
        noise_layer_kwargs: what ``noise_layer_class`` takes.

    Raises:
        ValueError: as `NoiseMaskedNoisyTransformerModel`, or prompt learning.
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
            raise ValueError("base_model's adapters add tokens (prompt learning), which have no place in the masks")

    def train(self, mode: bool = True) -> "PeftNoiseMaskedNoisyTransformerModel":
        """Set the mode of the noise layer and of the adapters; the frozen rest stays in eval mode."""
        super().train(mode)
        train_adapters(self.base_model, mode)
        return self
