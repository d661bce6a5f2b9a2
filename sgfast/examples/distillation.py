"""Distil one tiny random language model into another: a plain PyTorch loop, and a Hugging Face Trainer.

    python -m sgfast.examples.distillation            # the loop
    python -m sgfast.examples.distillation --trainer  # the same with transformers.Trainer

Both take a minute at most and need no download. Only one line differs from a loop without sgfast: compare `plain_loss`
with the call in `distil`.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sgfast.huggingface.compute_loss import distillation_compute_loss
from sgfast.loss import DivergenceLoss

IGNORED = -100
VOCABULARY = 512

Batch = dict[str, Tensor]


def plain_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """Compute Hinton's distillation loss as most loops have it, with several copies of the logits."""
    student_log_p = (student_logits / temperature).log_softmax(-1)
    teacher_log_p = (teacher_logits / temperature).log_softmax(-1)
    per_token = torch.nn.functional.kl_div(student_log_p, teacher_log_p, log_target=True, reduction="none").sum(-1)
    counted = labels != IGNORED
    return temperature**2 * (per_token * counted).sum() / counted.sum()


def distil(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Iterable[Batch],
    loss: Callable[..., Tensor],
    learning_rate: float = 3e-3,
) -> list[float]:
    """Train the student on the teacher's next-token distributions; return the loss of every step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    values = []
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            teacher_logits = teacher(**inputs).logits
        # The logits at t predict token t + 1. `loss` is a DivergenceLoss, which reads the slices in place.
        value = loss(student(**inputs).logits[:, :-1], teacher_logits[:, :-1], labels=batch["labels"][:, 1:])
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
    return values


def distil_with_trainer(
    student: Any, teacher: Any, examples: list[Batch], loss: DivergenceLoss, directory: str, **arguments: Any
) -> list[float]:
    """Train the student with transformers.Trainer; return the loss of every step."""
    import transformers

    settings = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1}
    trainer = transformers.Trainer(
        student,
        transformers.TrainingArguments(
            directory, save_strategy="no", report_to=[], disable_tqdm=True, **(settings | arguments)
        ),
        train_dataset=examples,
        compute_loss_func=distillation_compute_loss(student, teacher, loss),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tiny_model(layers: int, seed: int) -> Any:
    """Build a Llama of width 64 with random weights."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config)


def random_examples(count: int, length: int = 32, seed: int = 0) -> list[Batch]:
    """Draw right-padded sequences of uneven lengths. Padding and the first quarter, the prompt, have no labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        size = int(torch.randint(length // 2, length + 1, (), generator=generator))
        attention_mask = (torch.arange(length) < size).long()
        input_ids = torch.randint(1, VOCABULARY, (length,), generator=generator) * attention_mask
        labels = torch.where((torch.arange(length) >= length // 4) & (attention_mask != 0), input_ids, IGNORED)
        examples.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return examples


def collate(examples: list[Batch]) -> Batch:
    """Stack equally long examples to a batch."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def main() -> None:
    """Print the loss before and after."""
    parser = argparse.ArgumentParser(prog="python -m sgfast.examples.distillation", description="Distil a tiny model.")
    parser.add_argument("--trainer", action="store_true", help="with transformers.Trainer")
    parser.add_argument("--steps", type=int, default=60, help="batches of 16 sequences (60)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1; got {arguments.steps}")
    teacher, student = tiny_model(layers=2, seed=0).eval(), tiny_model(layers=1, seed=1)
    loss = DivergenceLoss("forward_kl", temperature=2.0, scale_by_temperature_squared=True)
    examples = random_examples(16 * arguments.steps)
    if arguments.trainer:
        with tempfile.TemporaryDirectory() as directory:
            values = distil_with_trainer(
                student,
                teacher,
                examples,
                loss,
                directory,
                num_train_epochs=1,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
            )
    else:
        batches = (collate(examples[start : start + 16]) for start in range(0, len(examples), 16))
        values = distil(student, teacher, batches, loss)
    print(f"loss in nats per token: {values[0]:.4f} at the first step, {values[-1]:.4f} at step {len(values)}")


if __name__ == "__main__":
    main()
