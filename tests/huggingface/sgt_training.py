"""What the tests of SgtTrainer train: eight sequences of uneven lengths and masks, and noise that belongs to a row."""

from collections.abc import Iterator
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from sgfast.huggingface.trainer import SgtTrainer
from sgfast.loss import distillation_loss_factory
from sgfast.loss.jigsaw import jigsaw_loss_factory
from sgfast.model import NoiseMaskedNoisyTransformerModel, PeftNoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import TransformerCloak
from tests.loss.factory_cases import CASES
from tests.tiny_models import VOCABULARY, WIDTH, tiny_causal_lm

LENGTHS = (12, 3, 7, 5, 12, 2, 9, 4)


class RowNoise(TransformerCloak):
    """Each sequence's noise follows from its own values, so that batches may be cut anywhere."""

    def forward(self, input: Tensor, noise_mask: Tensor | None = None, *, seed: Any = None, **kwargs: Any) -> Tensor:
        if not self.enabled:
            return super().forward(input, noise_mask)
        pieces: dict[str, list[Tensor]] = {"mean": [], "std": [], "mask": [], "output": []}
        for row in range(len(input)):
            one = slice(row, row + 1)
            arguments = {name: value[one] for name, value in kwargs.items()}
            own = input[one].detach().double().sum().abs().log().mul(2**40).long()
            super().forward(input[one], None if noise_mask is None else noise_mask[one], seed=own, **arguments)
            for name, kept in pieces.items():
                kept.append(getattr(self, name))
        for name, kept in pieces.items():
            setattr(self, name, None if kept[0] is None else torch.cat(kept))
        self.input, self.noise_mask = input, noise_mask
        return self.output


def noisy_language_model(
    noise_layer_class: type = RowNoise, dtype: torch.dtype = torch.float64, **arguments: Any
) -> NoiseMaskedNoisyTransformerModel:
    """A tiny Llama with tied embeddings, under a transform that is neither trivial nor the same for every token."""
    base_model, body, target_layer = tiny_causal_lm("llama", tie_word_embeddings=True, initializer_range=0.3)
    settings = {"config_path": base_model.config, "transformer_type": body, "rhos_init": -1.0}
    noisy_model = NoiseMaskedNoisyTransformerModel(
        noise_layer_class, base_model, (-1, WIDTH), target_layer, **(settings | arguments)
    )
    torch.manual_seed(1)
    for estimator in (noisy_model.noise_layer.mean_estimator, noisy_model.noise_layer.std_estimator):
        torch.nn.init.normal_(estimator.head.weight, std=0.1)
    return noisy_model.to(dtype)


def student_of(teacher: NoiseMaskedNoisyTransformerModel, dropout: float = 0.0) -> PeftNoiseMaskedNoisyTransformerModel:
    """A student over the teacher's base, with adapters that change something."""
    adapted = peft.get_peft_model(
        teacher.base_model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    )
    adapted.to(teacher.base_model.dtype)
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return PeftNoiseMaskedNoisyTransformerModel(
        None, adapted, (-1, WIDTH), teacher.target_layer, noise_layer=teacher.noise_layer
    )


def examples() -> list[dict[str, Tensor]]:
    """Eight right-padded sequences; the sixth has no token that counts, the fourth none that is transformed."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(LENGTHS):
        attention_mask = (torch.arange(12) < length).long()
        made.append(
            {
                "input_ids": torch.randint(1, VOCABULARY, (12,), generator=generator) * attention_mask,
                "attention_mask": attention_mask,
                "noise_mask": (torch.arange(12) % 3 != 0) & (index != 3),
                "loss_mask": (torch.arange(12) > 1) & (index != 5),
            }
        )
    return made


def whole_batch(rows: list[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
    rows = examples() if rows is None else rows
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def distillation(noisy_model: NoiseMaskedNoisyTransformerModel, layer: int | None = 2) -> Any:
    """The distillation loss with all of its components."""
    return distillation_loss_factory(noisy_model, layer, 0.4, 0.1, 0.5, 2.0, 0.3, 0.2, 1.5, 2.0)


def case(name: str, **changed: Any) -> tuple[NoiseMaskedNoisyTransformerModel, Any, dict[str, Any]]:
    """A factory's model, loss and what the trainer takes besides, under weights for all components."""
    factory, arguments = CASES[name]
    noisy_model = noisy_language_model()
    if factory is not jigsaw_loss_factory:
        return noisy_model, factory(noisy_model, **(arguments | changed)), {}
    student = student_of(noisy_model)
    return student, factory(noisy_model, student, **(arguments | changed)), {"teacher": noisy_model}


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def trainer(model: Any, loss: Any, directory: Any, *, rate: float = 1.0, **settings: Any) -> SgtTrainer:
    """One step of SGD with rate 1 and nothing else, so that the parameters' change is the gradient."""
    own = {name: settings.pop(name) for name in ("train_dataset", "eval_dataset", "teacher") if name in settings}
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    parameters = [parameter for _, parameter in trainable(model)]
    return SgtTrainer(
        model,
        transformers.TrainingArguments(str(directory), **(arguments | settings)),
        loss=loss,
        optimizers=(torch.optim.SGD(parameters, lr=rate), None),
        **({"train_dataset": examples(), "eval_dataset": examples()[:5]} | own),
    )


def gradients_of_one_batch(model: Any, loss: Any, rows: list[dict[str, Tensor]] | None = None, teacher: Any = None):
    """The components and gradients of one batch of all rows, without a trainer."""
    batch = whole_batch(rows)
    loss_function, get_losses, _ = loss
    model.train()
    model(**batch)
    if teacher is not None:
        teacher.train()
        teacher(**batch)
    loss_function(batch["loss_mask"]).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainable(model) if parameter.grad is not None}
    model.zero_grad()
    return {name: value.item() for name, value in get_losses().items()}, gradients


def assert_steps_are(model: Any, before: dict[str, Tensor], gradients: dict[str, Tensor], tolerance: float = 1e-6):
    """Every trained parameter has moved by its gradient."""
    largest = max(gradient.norm() for gradient in gradients.values())
    assert gradients
    for name, gradient in gradients.items():
        step = before[name] - model.state_dict()[name]
        assert (step - gradient).norm() <= tolerance * gradient.norm() + 1e-9 * largest, name
