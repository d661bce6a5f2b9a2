"""A Hugging Face Trainer with a teacher: the gradient of the whole batch, however it is accumulated."""

import copy
import gc
import io
import weakref

import pytest
import torch
import transformers
from torch import Tensor, nn

from sgfast.examples.distillation import IGNORED
from sgfast.huggingface import distillation_compute_loss
from sgfast.loss import DivergenceLoss
from tests.live_bytes import LiveBytes
from tests.processes import in_processes
from tests.tiny_models import VOCABULARY, tiny_causal_lm

LENGTHS = (12, 3, 7, 5, 12, 2, 9, 4)


def models() -> tuple[nn.Module, nn.Module]:
    """Student and teacher: two layers of four, other weights."""
    teacher, *_ = tiny_causal_lm("llama", initializer_range=0.3)
    student, *_ = tiny_causal_lm("llama", num_hidden_layers=2, initializer_range=0.3)
    return student, teacher


def examples() -> list[dict[str, Tensor]]:
    """Eight right-padded sequences; the first token is never a label, nor is any token of the sixth."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(LENGTHS):
        attention_mask = (torch.arange(12) < length).long()
        input_ids = torch.randint(1, VOCABULARY, (12,), generator=generator) * attention_mask
        labels = input_ids.masked_fill((attention_mask == 0) | (torch.arange(12) == 0), IGNORED)
        if index == 5:
            labels.fill_(IGNORED)
        made.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return made


def trainer(student, compute_loss, directory, **arguments):
    """SGD with rate 1 and nothing else, so that the parameters' change is the gradient."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "max_grad_norm": 0.0, "use_cpu": True}
    return transformers.Trainer(
        student,
        transformers.TrainingArguments(
            str(directory), save_strategy="no", report_to=[], disable_tqdm=True, **(settings | arguments)
        ),
        train_dataset=examples(),
        eval_dataset=examples()[:5],
        compute_loss_func=compute_loss,
        optimizers=(torch.optim.SGD(student.parameters(), lr=1.0), None),
    )


def naive_loss(student, teacher) -> Tensor:
    """0.75·T²·KL + 0.25·CE over all eight sequences, from float64 logits."""
    batch = {name: torch.stack([example[name] for example in examples()]) for name in examples()[0]}
    labels = batch.pop("labels")[:, 1:]
    counted = labels != IGNORED
    with torch.no_grad():
        q = (teacher(**batch).logits[:, :-1].double() / 2).softmax(-1)
    logits = student(**batch).logits[:, :-1].double()
    soft = (q * (q.log() - (logits / 2).log_softmax(-1))).sum(-1)
    hard = nn.functional.cross_entropy(logits[counted], labels[counted])
    return 0.75 * 4 * soft[counted].mean() + 0.25 * hard


LOSS = DivergenceLoss("forward_kl", temperature=2.0, scale_by_temperature_squared=True, hard_label_weight=0.25)


@pytest.mark.parametrize("batch_size", [8, 4, 2, 1])
def test_every_accumulation_takes_the_step_of_the_whole_batch(batch_size, tmp_path):
    student, teacher = models()
    before = copy.deepcopy(student)
    expected = naive_loss(before, teacher)
    expected.backward()
    accumulating = trainer(
        student,
        distillation_compute_loss(student, teacher.train(), LOSS),
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
    )
    result = accumulating.train()
    assert all(module.training for module in teacher.modules())  # as it was given
    assert result.training_loss == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), old in zip(student.named_parameters(), before.parameters(), strict=True):
        step = old.detach() - parameter.detach()
        assert (step - old.grad).norm() <= 1e-5 * old.grad.norm() + 1e-7, name


def _train_in_two(rank: int, directory: str) -> None:
    """One of two processes that share the eight sequences, two at a time."""
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    trainer(student, compute_loss, directory, **arguments).train()
    if rank == 0:
        torch.save(student.state_dict(), f"{directory}/student.pt")


def test_two_processes_take_the_step_of_one(tmp_path):
    student, teacher = models()
    naive_loss(student, teacher).backward()
    in_processes(2, _train_in_two, str(tmp_path))
    after = torch.load(tmp_path / "student.pt")
    for name, old in student.named_parameters():
        assert (old.detach() - after[name] - old.grad).norm() <= 1e-5 * old.grad.norm() + 1e-7, name


def test_evaluation_uses_the_same_loss(tmp_path):
    student, teacher = models()
    evaluating = trainer(
        student, distillation_compute_loss(student, teacher, LOSS), tmp_path, per_device_eval_batch_size=5
    )
    batch = {name: torch.stack([example[name] for example in examples()[:5]]) for name in examples()[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = LOSS(student(**batch).logits[:, :-1], teacher(**batch).logits[:, :-1], labels=labels[:, 1:])
    assert evaluating.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_aligned_labels_and_positional_inputs():
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, features: Tensor) -> transformers.modeling_outputs.SequenceClassifierOutput:
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.head(features))

    torch.manual_seed(0)
    student, teacher, features = Classifier(), Classifier(), torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    compute_loss = distillation_compute_loss(student, teacher, LOSS, shift_labels=False)
    value = compute_loss(student(features), labels, num_items_in_batch=torch.tensor(12))
    expected = LOSS(student.head(features), teacher.head(features), labels=labels) / 2
    torch.testing.assert_close(value, expected)
    value.backward()
    assert teacher.head.weight.grad is None


@pytest.mark.parametrize(
    "wrap",
    [lambda logits: {"logits": logits}, lambda logits: (torch.tensor(7.0), logits), lambda logits: (logits,)],
    ids=["dict", "tuple with a loss", "tuple"],
)
def test_outputs_that_are_no_model_output(wrap):
    torch.manual_seed(0)
    student, head, features = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    compute_loss = distillation_compute_loss(student, lambda x: wrap(head(x)), LOSS, shift_labels=False)
    value = compute_loss(wrap(student(features)), labels)
    torch.testing.assert_close(value, LOSS(student(features), head(features), labels=labels), rtol=0, atol=0)
    compute_loss = distillation_compute_loss(student, lambda x: (), LOSS)
    student(features)
    with pytest.raises(TypeError, match="the teacher's output must have logits; got tuple"):
        compute_loss(wrap(student(features)), labels)


class Logits(nn.Module):
    """A language model that has learned its logits by heart."""

    def __init__(self, batch: int, length: int, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(batch, length, size))

    def forward(self, input_ids: Tensor) -> transformers.modeling_outputs.CausalLMOutput:
        return transformers.modeling_outputs.CausalLMOutput(logits=self.logits * 1)


def test_the_backward_makes_one_gradient_of_the_logits():
    torch.manual_seed(0)
    student, teacher, input_ids = Logits(2, 9, 5000), Logits(2, 9, 5000), torch.randint(5000, (2, 9))
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    value = compute_loss(student(input_ids), input_ids)
    expected = LOSS(student.logits[:, :-1], teacher.logits[:, :-1], labels=input_ids[:, 1:])
    torch.testing.assert_close(value, expected)
    outputs = student(input_ids)
    value = compute_loss(outputs, input_ids)
    with LiveBytes() as counted:
        (gradient,) = torch.autograd.grad(value, outputs.logits)
    assert counted.peak < 1.1 * gradient.nbytes
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student.logits)[0])


def test_a_student_that_is_its_own_teacher():
    """A function that runs the student another way, as PEFT's disable_adapter does."""
    student, _ = models()
    batch = {name: torch.stack([example[name] for example in examples()]) for name in examples()[0]}
    labels = batch.pop("labels")
    norm = student.model.norm.weight

    def teacher(**inputs):
        old = norm.detach().clone()
        norm.data.mul_(2)
        try:
            return student(**inputs)
        finally:
            norm.data.copy_(old)

    compute_loss = distillation_compute_loss(student, teacher, DivergenceLoss("jensen_shannon"))
    value = compute_loss(student(**batch), labels)
    logits = student(**batch).logits[:, :-1]
    expected = DivergenceLoss("jensen_shannon")(logits, 2 * logits.detach(), labels=labels[:, 1:])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    fresh = distillation_compute_loss(student, teacher, DivergenceLoss("jensen_shannon"))
    with pytest.raises(RuntimeError, match="needs a forward pass of the student since its last call"):
        fresh(student, labels)


def test_a_compiled_student():
    student, teacher = models()
    batch = {name: torch.stack([example[name] for example in examples()]) for name in examples()[0]}
    labels = batch.pop("labels")
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    expected = compute_loss(student(**batch), labels)
    compiled = torch.compile(student, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compute_loss(compiled(**batch), labels), expected, rtol=1e-5, atol=1e-6)


def test_the_student_keeps_nothing():
    """The hook goes with the function; before, a copy or a pickle of the student carries no teacher and no batch."""
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.int64)}
    compute_loss(student(**batch, use_cache=True), torch.ones(1, 3, dtype=torch.int64))
    copied, stream = copy.deepcopy(student), io.BytesIO()
    torch.save(copied, stream)
    assert stream.tell() < 1.1 * sum(parameter.nbytes for parameter in student.parameters()) + 100_000
    teacher_is_alive = weakref.ref(teacher)
    assert student._forward_hooks
    assert student._forward_pre_hooks
    del compute_loss, teacher
    gc.collect()
    assert not student._forward_hooks
    assert not student._forward_pre_hooks
    assert teacher_is_alive() is None


def test_errors():
    student, teacher = models()
    with pytest.raises(TypeError, match=r"student must be a torch\.nn\.Module; got function"):
        distillation_compute_loss(models, teacher, LOSS)
    with pytest.raises(TypeError, match="teacher must be a module or a function; got str"):
        distillation_compute_loss(student, "teacher", LOSS)
    with pytest.raises(TypeError, match="loss must be a DivergenceLoss; got MSELoss"):
        distillation_compute_loss(student, teacher, nn.MSELoss())
    with pytest.raises(ValueError, match="loss must have reduction='mean'; got 'sum'"):
        distillation_compute_loss(student, teacher, DivergenceLoss("jeffreys", reduction="sum"))
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    with pytest.raises(RuntimeError, match="needs a forward pass of the student"):
        compute_loss(None, torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match="distillation needs labels"):
        compute_loss(None, None)
