"""The teacher computes what the student computes: the same packing and masks, no cache, eval mode at every call."""

import copy
import functools
import types

import pytest
import torch
import transformers
from torch import Tensor, nn

from sgfast.examples.distillation import IGNORED
from sgfast.huggingface import distillation_compute_loss
from sgfast.loss import DivergenceLoss
from tests.huggingface.test_distillation_compute_loss import trainer
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_causal_lm, with_lora

LENGTHS = (7, 4, 9, 2)
LOSS = DivergenceLoss("forward_kl")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def packed_examples() -> list[dict[str, list[int]]]:
    return [{"input_ids": row, "labels": row} for row in rows()]


def tiny_models(family: str) -> tuple[nn.Module, nn.Module]:
    """Student and teacher; both cache by default, as every published configuration says."""
    settings = {"initializer_range": 0.3, "use_cache": True}
    if family == "gpt2":
        settings |= NO_DROPOUT
    teacher, *_ = tiny_causal_lm(family, **settings)
    student, *_ = tiny_causal_lm(family, num_hidden_layers=2, **settings)
    return student, teacher


def logits_one_by_one(model: nn.Module) -> Tensor:
    """Every row alone, in eval mode and without a cache: (Σ(length − 1), V), float64."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        parts = [model(torch.tensor([row]), use_cache=False).logits[0, :-1] for row in rows()]
    return torch.cat(parts).double()


def logits_of(student: nn.Module, outputs) -> Tensor:
    """A training step returns hidden states; the head of GPT-2 is one product."""
    return student.get_output_embeddings()(outputs.logits)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> float:
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["module", "function", "named arguments"])
def test_packed_rows_give_the_loss_of_rows_alone(family, form, tmp_path):
    """The Trainer of transformers 5 switches the cache off, in the student's configuration only."""
    student, teacher = tiny_models(family)
    student.config.use_cache = False
    expected = forward_kl(logits_one_by_one(student), logits_one_by_one(teacher))
    forms = {
        "module": teacher,
        "function": lambda **inputs: teacher(**inputs),
        # No keyword of ours reaches the model.
        "named arguments": lambda input_ids, position_ids, **_: teacher(input_ids, position_ids=position_ids),
    }
    training = trainer(student, distillation_compute_loss(student, forms[form], LOSS), tmp_path)
    training.train_dataset = packed_examples()
    training.data_collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=family == "llama")
    assert training.train().training_loss == pytest.approx(expected, rel=1e-5)
    assert teacher.config.use_cache is True


class StrictTeacher(nn.Module):
    """A forward that takes nothing but tokens."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits.expand(*input_ids.shape, -1)}


class CachingTeacher(StrictTeacher):
    """Remote code whose cache no configuration knows."""

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> dict[str, Tensor]:
        return {"logits": super().forward(input_ids)["logits"] * (2 if use_cache else 1)}


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **keywords):
        return self.inner(*arguments, **keywords)


def named(input_ids: Tensor, use_cache: bool = True, *, teacher: nn.Module) -> dict[str, Tensor]:
    return teacher(input_ids, use_cache)


@pytest.mark.parametrize(
    "wrap",
    [
        StrictTeacher,
        CachingTeacher,
        lambda logits: Wrapped(StrictTeacher(logits)),
        lambda logits: Wrapped(CachingTeacher(logits)),
        lambda logits: (lambda teacher: lambda **inputs: teacher(**inputs))(StrictTeacher(logits)),
        lambda logits: (lambda teacher: lambda **inputs: teacher(**inputs))(CachingTeacher(logits)),
        lambda logits: functools.partial(named, teacher=CachingTeacher(logits)),
        lambda logits: StrictTeacher(logits).forward,
        lambda logits: types.SimpleNamespace(call=CachingTeacher(logits)).call.forward,
        lambda logits: lambda input_ids: {"logits": logits.expand(*input_ids.shape, -1)},
    ],
)
def test_use_cache_goes_to_teachers_that_take_it(wrap):
    torch.manual_seed(0)
    (student, _), logits, input_ids = tiny_models("llama"), torch.randn(VOCABULARY), torch.tensor(rows((6,)))
    outputs = student(input_ids=input_ids)
    value = distillation_after(student, wrap(logits))(outputs_of(student, input_ids=input_ids), input_ids)
    expected = forward_kl(outputs.logits[0, :-1].double(), logits.expand(5, -1).double())
    assert value.item() == pytest.approx(expected, rel=1e-5)


def distillation_after(student, teacher, loss=LOSS, **settings):
    """A compute_loss whose student is called by `outputs_of` at each call."""
    compute_loss = distillation_compute_loss(student, teacher, loss, **settings)
    return lambda outputs, labels, **items: compute_loss(outputs(), labels, **items)


def outputs_of(student, *arguments, **keywords):
    return lambda: student(*arguments, **keywords)


@pytest.mark.parametrize("keyword", ["keyword", "position"])
def test_a_student_that_asked_for_its_cache(keyword):
    """use_cache=True in the call itself, on packed rows; the student attends across rows, its teacher must not."""
    student, teacher = tiny_models("llama")
    batch = transformers.DataCollatorWithFlattening()(packed_examples())
    labels = batch.pop("labels")
    if keyword == "keyword":
        outputs = outputs_of(student, **batch, use_cache=True)
    else:
        outputs = outputs_of(student, batch["input_ids"], None, batch["position_ids"], None, None, None, True)
    value = distillation_after(student, teacher)(outputs, labels)
    counted = labels[0, 1:] != IGNORED
    student_logits = outputs().logits[0, :-1][counted].double()
    assert value.item() == pytest.approx(forward_kl(student_logits, logits_one_by_one(teacher)), rel=1e-5)


def with_dropout(rate: float = 0.5) -> nn.Module:
    return tiny_causal_lm("gpt2", initializer_range=0.3, **dict.fromkeys(NO_DROPOUT, rate))[0]


def modes(*models: nn.Module) -> list[bool]:
    return [module.training for model in models for module in model.modules()]


def test_the_students_own_base_is_asked_in_eval_mode():
    """The docstring's recipe, with dropout in the student."""
    base = with_dropout()
    reference = logits_one_by_one(base)
    student = with_lora(base, "gpt2", dropout=0.5).train()
    student.get_base_model().transformer.h[0].eval()  # a part in another mode
    before = modes(student)

    def teacher(**inputs):
        assert not any(modes(student))
        with student.disable_adapter():
            outputs = student(**inputs)
        student.train()  # as a function may that puts the student into eval mode itself
        return outputs

    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    for step in range(3):
        batch = {"input_ids": torch.tensor(rows()[step : step + 1])}
        outputs = student(**batch)
        value = compute_loss(outputs, batch["input_ids"])
        assert modes(student) == before
        start = sum(LENGTHS[:step]) - step
        expected = forward_kl(
            logits_of(student, outputs)[0, :-1].double(), reference[start : start + LENGTHS[step] - 1]
        )
        assert value.item() == pytest.approx(expected, rel=1e-5)


class Holder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def ask(self, **inputs):
        return self.model(**inputs)

    def __call__(self, **inputs):
        return self.ask(**inputs)


GLOBAL_TEACHER = with_dropout()


def ask_a_global(**inputs):
    return GLOBAL_TEACHER(**inputs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: Wrapped(model),
        lambda model: lambda **inputs: model(**inputs),
        lambda model: lambda *, inner=model, **inputs: inner(**inputs),
        lambda model: Holder(model),
        lambda model: Holder(model).ask,
        lambda model: model.forward,
        lambda model: functools.partial(model),
        lambda model: functools.partial(lambda model, **inputs: model(**inputs), model),
        lambda model: (lambda inner: lambda **inputs: inner(**inputs))(lambda **inputs: model(**inputs)),
        lambda model: ask_a_global,
    ],
)
def test_a_teacher_is_in_eval_mode_at_every_call(wrap):
    """Someone calls train() on everything between two steps, as Trainer does with what it has wrapped."""
    student, teacher = tiny_models("gpt2")[0], GLOBAL_TEACHER
    reference = logits_one_by_one(teacher)
    compute_loss = distillation_compute_loss(student, wrap(teacher), LOSS)
    input_ids = torch.tensor([rows()[0]])
    for _ in range(2):
        teacher.train()
        student.train()
        teacher.lm_head.eval()
        before = modes(student, teacher)
        torch.manual_seed(0)
        outputs = student(input_ids=input_ids)
        value = compute_loss(outputs, input_ids)
        expected = forward_kl(logits_of(student, outputs)[0, :-1].double(), reference[: LENGTHS[0] - 1])
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert modes(student, teacher) == before
    assert teacher.config.use_cache is True


def test_modes_come_back_after_an_error():
    student, teacher = tiny_models("llama")
    student.train()

    def failing(**inputs):
        teacher.train()
        raise ArithmeticError

    compute_loss = distillation_compute_loss(student, failing, LOSS)
    before, input_ids = modes(student), torch.tensor(rows((5,)))
    with pytest.raises(ArithmeticError):
        compute_loss(student(input_ids=input_ids), input_ids)
    assert modes(student) == before
    assert teacher.config.use_cache is True


REMEDY = r"in both.*disable_adapter.*copy\.deepcopy.*requires_grad_\(False\)"


def assign_state(student: nn.Module) -> nn.Module:
    """Another object over the same memory."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.load_state_dict(student.state_dict(), assign=True)
    return teacher


@pytest.mark.parametrize(
    "teacher_of",
    [
        lambda base, student: base,
        lambda base, student: student,
        lambda base, student: student.get_base_model(),
        lambda base, student: Wrapped(base),
        lambda base, student: torch.compile(student, backend="eager"),
        lambda base, student: base.forward,
        lambda base, student: student.__call__,
        lambda base, student: functools.partial(base, use_cache=False),
        lambda base, student: assign_state(student),
        lambda base, student: base.model.layers[0].self_attn.q_proj,
    ],
)
def test_a_teacher_that_the_training_changes_is_refused(teacher_of):
    base = tiny_models("llama")[0]
    student = with_lora(base)
    with pytest.raises(ValueError, match=REMEDY):
        distillation_compute_loss(student, teacher_of(base, student), LOSS)
    whole = tiny_models("llama")[0]
    with pytest.raises(ValueError, match=REMEDY):
        distillation_compute_loss(whole, whole, LOSS)


def test_adapters_injected_later_are_found_at_the_next_call():
    student, teacher = tiny_models("llama")
    student.requires_grad_(False)
    student.model.embed_tokens = teacher.model.embed_tokens.requires_grad_(False)
    student.lm_head.requires_grad_(True)
    compute_loss, input_ids = distillation_compute_loss(student, teacher, LOSS), torch.tensor(rows((5,)))
    outputs = student(input_ids=input_ids)
    value = compute_loss(outputs, input_ids)
    expected = forward_kl(outputs.logits[0, :-1].double(), teacher(input_ids).logits[0, :-1].detach().double())
    assert value.item() == pytest.approx(expected, rel=1e-5)  # what nobody trains may be shared
    teacher.model.embed_tokens.requires_grad_(True)
    with pytest.raises(ValueError, match=rf"embed_tokens\.weight {REMEDY}"):
        compute_loss(student(input_ids=input_ids), input_ids)
    base = tiny_models("llama")[0].requires_grad_(False)
    compute_loss = distillation_compute_loss(base, base, LOSS)
    with_lora(base)
    with pytest.raises(ValueError, match=REMEDY):
        compute_loss(base(input_ids), input_ids)


def test_the_remedies_give_the_loss_of_the_model_without_adapters():
    base = tiny_models("llama")[0]
    before = copy.deepcopy(base)
    student = with_lora(base)
    expected = forward_kl(logits_one_by_one(student), logits_one_by_one(before))

    def disabled(**inputs):
        with student.disable_adapter():
            return student(**inputs)

    batch = transformers.DataCollatorWithFlattening()(packed_examples())
    labels = batch.pop("labels")
    gradients = []
    for teacher in (before, disabled):
        value = distillation_after(student, teacher)(outputs_of(student, **batch, use_cache=False), labels)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        gradients.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, trained)]))
    assert gradients[0].norm() > 1e-2
    torch.testing.assert_close(*gradients)
