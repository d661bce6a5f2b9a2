"""Distil SmolLM2 into a student made of its own first layers, with TextBrewer's presets.

    python -m sgfast.examples.presets [--steps 30]

The loss is a cross entropy between logits and two matches of hidden states, configured as for TextBrewer. The program
prints the losses, and the distance between student and teacher on held-out text before and after. It takes minutes on
a CPU and needs no download.
"""

import argparse
import copy
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgfast.demo.text import read_text, split_passages
from sgfast.huggingface.assets import load_causal_lm
from sgfast.loss.presets import DistillationConfig, DistillationLoss
from sgfast.ops import divergences

STUDENT_LAYERS = 6
CONFIG = {
    "temperature": 2,
    "kd_loss_type": "ce",
    "kd_loss_weight": 1,
    "intermediate_matches": [
        # Index 0 is the embeddings; the teacher has 30 layers, and the last states come after its final norm.
        {"layer_T": 15, "layer_S": 3, "feature": "hidden", "loss": "cos", "weight": 1},
        {
            "layer_T": 30,
            "layer_S": STUDENT_LAYERS,
            "feature": "hidden",
            "loss": "hidden_mse",
            "weight": 0.1,
            "proj": ["linear", 576, 576, {"lr": 1e-3}],
        },
    ],
}


class Distillation(nn.Module):
    """A student and the loss of its distillation as one model for Trainer and DDP.

    Args:
        student: a causal language model.
        teacher: a frozen causal language model; it is no part of the state_dict.
        loss: the loss. Its projections are trained, saved and moved with the student.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: DistillationLoss) -> None:
        super().__init__()
        self.student, self.loss = student, loss
        self._teacher = (teacher,)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return ``loss``, and the components under their names, for a batch of tokens (B, T)."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        with torch.no_grad():
            teacher = adaptor(batch, self._teacher[0](**batch, output_hidden_states=True))
        total, components = self.loss(adaptor(batch, self.student(**batch, output_hidden_states=True)), teacher)
        return {"loss": total, **components}


def adaptor(batch: Mapping[str, Tensor], model_outputs: Any) -> dict[str, Any]:
    """Return TextBrewer's dictionary for a model's outputs. Both models use the same adaptor here."""
    return {
        "logits": model_outputs.logits,
        "logits_mask": batch["attention_mask"],
        "inputs_mask": batch["attention_mask"],
        "hidden": model_outputs.hidden_states,
    }


def first_layers(teacher: nn.Module, layers: int) -> nn.Module:
    """Copy the first layers of a Llama-like model, with the embeddings, final norm and head."""
    every = teacher.model.layers  # type: ignore[union-attr]
    teacher.model.layers = every[:layers]  # type: ignore[union-attr,index]
    student = copy.deepcopy(teacher)
    teacher.model.layers = every  # type: ignore[union-attr]
    student.config.num_hidden_layers = layers  # type: ignore[union-attr]
    return student


class Distance(NamedTuple):
    """The distance between a student and its teacher."""

    kl: float  # mean KL(teacher‖student) over tokens, nats
    agreement: float  # share of tokens with the same most likely next token


@torch.no_grad()
def distance(student: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor]) -> Distance:
    """Compare next-token distributions over a batch's attended tokens."""
    logits, expected = (model(**batch).logits for model in (student, teacher))
    attended = batch["attention_mask"] != 0
    kl = divergences(logits, expected, "forward_kl", mask=attended)["forward_kl"].sum() / attended.sum()
    agreement = (logits.argmax(-1) == expected.argmax(-1))[attended].float().mean()
    return Distance(kl.item(), agreement.item())


def main(steps: int = 30, batch_size: int = 4) -> tuple[Distance, Distance]:
    """Run the example; return the held-out distances before and after."""
    torch.manual_seed(0)
    teacher, tokenizer = load_causal_lm()
    teacher.requires_grad_(False)
    student = first_layers(teacher, STUDENT_LAYERS).requires_grad_(True)
    loss = DistillationLoss(DistillationConfig.from_dict(CONFIG))
    model = Distillation(student, teacher, loss)
    passages = split_passages(read_text(None), words_per_passage=40, held_out=16, seed=0)

    def batch(texts: list[str]) -> dict[str, Tensor]:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    held_out = batch(passages.held_out)
    before = distance(student, teacher, held_out)
    optimizer = torch.optim.AdamW([{"params": student.parameters()}, *loss.parameter_groups()], lr=3e-4)
    started = time.perf_counter()
    for step in range(steps):
        texts = [passages.train[(step * batch_size + i) % len(passages.train)] for i in range(batch_size)]
        outputs = model(**batch(texts))
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        loss.set_progress((step + 1) / steps)
        if step % 10 == 0 or step == steps - 1:
            losses = "  ".join(f"{name.removeprefix('unweighted_')} {value:.4f}" for name, value in outputs.items())
            print(f"step {step + 1:3d}  {time.perf_counter() - started:5.0f} s  {losses}")
    after = distance(student, teacher, held_out)
    for name, found in (("before", before), ("after", after)):
        print(f"{name:6s}  KL from the teacher {found.kl:.3f} nats, same next token {found.agreement:.1%}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
