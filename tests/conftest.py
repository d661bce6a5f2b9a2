"""Fixtures over tiny causal language models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sgfast.model import NoiseMaskedNoisyTransformerModel, PeftNoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import TransformerCloak
from tests.tiny_models import VOCABULARY, WIDTH, tiny_causal_lm, with_lora


@pytest.fixture
def make_noisy_model() -> Callable[..., NoiseMaskedNoisyTransformerModel]:
    """Build a tiny noisy model whose transform is neither trivial nor the same for every token."""

    def make(family: str = "llama", **arguments: Any) -> NoiseMaskedNoisyTransformerModel:
        base_model, body, target_layer = tiny_causal_lm(family)
        settings = {"config_path": base_model.config, "transformer_type": body, "rhos_init": -1.0, "seed": 7}
        noisy_model = NoiseMaskedNoisyTransformerModel(
            TransformerCloak, base_model, (-1, WIDTH), target_layer, **(settings | arguments)
        )
        torch.manual_seed(1)
        for estimator in (noisy_model.noise_layer.mean_estimator, noisy_model.noise_layer.std_estimator):
            torch.nn.init.normal_(estimator.head.weight, std=0.1)
        return noisy_model

    return make


@pytest.fixture
def make_pair(make_noisy_model: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Build a teacher and a student over one base, or over equal ones, and one noise layer."""

    def make(
        family: str = "llama",
        dropout: float = 0.0,
        clean_pass: str = "separate",
        two_bases: bool = False,
        **arguments: Any,
    ) -> tuple[Any, Any]:
        teacher = make_noisy_model(family, clean_pass=clean_pass, **arguments)
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

    return make


@pytest.fixture
def tokens() -> dict[str, torch.Tensor]:
    """Three right-padded sequences of 9, 6 and 4 tokens; every third token is not transformed."""
    generator = torch.Generator().manual_seed(3)
    attention_mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    return {
        "input_ids": torch.randint(1, VOCABULARY, (3, 9), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "noise_mask": (torch.arange(9) % 3 != 0).expand(3, 9) & (attention_mask != 0),
        "loss_mask": attention_mask != 0,
    }
