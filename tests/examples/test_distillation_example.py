"""The distillation example, end to end: the numbers of a plain loop, and what they cost."""

import copy
import runpy
import sys

import pytest
import torch
from torch import Tensor

from sgfast.examples import distillation
from sgfast.examples.distillation import IGNORED, collate, distil, plain_loss, random_examples, tiny_model
from sgfast.loss import DivergenceLoss


def plain_jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Before: the loss as GKD loops have it."""
    p, q = student_logits.softmax(-1), teacher_logits.softmax(-1)
    m = (p + q) / 2
    per_token = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    counted = labels != IGNORED
    return (per_token * counted).sum() / counted.sum()


SWAPS = {
    "kl": (plain_loss, DivergenceLoss("forward_kl", temperature=2.0, scale_by_temperature_squared=True)),
    "jensen_shannon": (plain_jensen_shannon, DivergenceLoss("jensen_shannon")),
}


@pytest.mark.parametrize(("before", "after"), SWAPS.values(), ids=SWAPS)
def test_a_swapped_loss_trains_the_same_model(before, after):
    """Ten steps of AdamW with either loss: equal losses at every step, and a student that learned."""
    teacher, student = tiny_model(layers=2, seed=0).eval(), tiny_model(layers=1, seed=1)
    examples = random_examples(4 * 10)
    batches = [collate(examples[start : start + 4]) for start in range(0, 40, 4)]
    values = [distil(copy.deepcopy(student), teacher, batches, loss) for loss in (before, after)]
    assert values[1] == pytest.approx(values[0], rel=2e-3)
    assert values[1][0] == pytest.approx(values[0][0], rel=1e-6)
    assert values[1][-1] < 0.97 * values[1][0]


@pytest.mark.parametrize(("before", "after"), SWAPS.values(), ids=SWAPS)
def test_a_swapped_loss_keeps_nothing_for_backward(before, after):
    """Bytes kept between forward and backward beyond the two sets of logits, per logit."""
    student = torch.randn(2, 65, 4000).requires_grad_()
    teacher, labels = torch.randn(2, 65, 4000), torch.randint(4000, (2, 65))
    inputs = {side.untyped_storage().data_ptr() for side in (student, teacher)}
    kept = []
    for loss in (before, after):
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(student[:, :-1], teacher[:, :-1], labels=labels[:, 1:])
        kept.append(sum(size for storage, size in storages.items() if storage not in inputs) / student.numel())
        del value
    assert kept[0] > 7  # two copies of the logits at least
    assert kept[1] < 0.01


@pytest.mark.parametrize("arguments", [[], ["--trainer"]], ids=["loop", "trainer"])
def test_the_program(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distillation", "--steps", "6", *arguments])
    runpy.run_module("sgfast.examples.distillation", run_name="__main__")
    first, last = (
        float(word)
        for word in capsys.readouterr().out.splitlines()[-1].split()
        if word.replace(".", "").isdigit() and "." in word
    )
    assert last < first


def test_the_programs_two_ways_agree(tmp_path):
    """Three steps on the same four examples: the Trainer accumulates 2 × 2, the loop takes 4."""
    teacher, student = tiny_model(layers=2, seed=0).eval(), tiny_model(layers=1, seed=1)
    loss, examples = SWAPS["kl"][1], random_examples(4)
    by_loop = distil(copy.deepcopy(student), teacher, [collate(examples)] * 3, loss)
    by_trainer = distillation.distil_with_trainer(
        student,
        teacher,
        examples,
        loss,
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        weight_decay=0.01,
        optim="adamw_torch",
    )
    assert by_trainer == pytest.approx(by_loop, rel=1e-4)


def test_a_wrong_number_of_steps_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distillation", "--steps", "0"])
    with pytest.raises(SystemExit) as error:
        distillation.main()
    assert error.value.code == 2
    assert "--steps must be at least 1; got 0" in capsys.readouterr().err
