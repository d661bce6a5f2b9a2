"""The loss belongs to the forward that made the outputs, whatever has run or wrapped the student since."""

import copy
import gc
import weakref

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sgfast.huggingface import distillation_compute_loss
from sgfast.loss import DivergenceLoss
from tests.huggingface.test_distillation_compute_loss import examples, models, trainer
from tests.processes import in_processes
from tests.tiny_models import VOCABULARY

LOSS = DivergenceLoss("jensen_shannon", hard_label_weight=0.25)


def batches(count: int = 2) -> list[Tensor]:
    """Tokens that serve as labels too."""
    return [torch.randint(1, VOCABULARY, (2, 6)) for _ in range(count)]


def expected_loss(student: nn.Module, teacher: nn.Module, input_ids: Tensor, loss: DivergenceLoss = LOSS) -> Tensor:
    with torch.no_grad():
        student_logits, teacher_logits = student(input_ids).logits, teacher(input_ids).logits
        return loss(student_logits[:, :-1], teacher_logits[:, :-1], labels=input_ids[:, 1:])


def check_two_forwards(call, compute_loss, student, teacher, tolerance: float = 1e-5) -> None:
    """Two forwards, then their losses in both orders, one of them twice; a third forward without a loss."""
    first, second, third = batches(3)
    expected = [expected_loss(student, teacher, input_ids).item() for input_ids in (first, second)]
    assert abs(expected[0] - expected[1]) > 3 * tolerance
    for order in ((0, 1), (1, 0), (0, 0, 1)):
        outputs = [call(input_ids) for input_ids in (first, second)]
        call(third)
        for index in order:
            value = compute_loss(outputs[index], (first, second)[index])
            assert value.item() == pytest.approx(expected[index], rel=tolerance)
        value.backward()


class Rebuilt(nn.Module):
    """Returns other tensors than the module in it: cast, copied, and in a plain dictionary."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments, **keywords):
        logits = self.module(*arguments, **keywords).logits
        return {"logits": logits.double().clone()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda student: student,
        Rebuilt,
        lambda student: lambda input_ids, **keywords: student(input_ids, **keywords, return_dict=False),
        lambda student: lambda input_ids, **keywords: student(input_ids, **keywords, output_hidden_states=True),
        lambda student: lambda input_ids: student(input_ids.clone(), labels=input_ids),
    ],
    ids=["itself", "rebuilt", "tuple", "hidden states", "labels"],
)
def test_two_forwards_in_a_step(wrap):
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    check_two_forwards(wrap(student), compute_loss, student, teacher)


def test_gradient_checkpointing():
    student, teacher = models()
    student.train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    check_two_forwards(student, compute_loss, student, teacher)

    def whole(input_ids: Tensor) -> dict[str, Tensor]:
        """The student itself runs again in the backward."""
        run = torch.utils.checkpoint.checkpoint
        return {"logits": run(lambda tokens: student(tokens).logits, input_ids, use_reentrant=False)}

    check_two_forwards(whole, compute_loss, student, teacher)


def test_mixed_precision_of_accelerate():
    """Its wrapper returns float32 copies of what the model returned."""
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    reference = copy.deepcopy(student)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(student)
    assert prepared(batches(1)[0]).logits.dtype == torch.float32
    check_two_forwards(prepared, compute_loss, reference, teacher, tolerance=0.02)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Smallest(nn.Module):
    """One product, so that fullgraph compilation is quick."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 4)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, input_ids: Tensor) -> transformers.modeling_outputs.CausalLMOutput:
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(self.table(input_ids)))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_student_compiled_as_one_graph(in_place):
    """Two forwards are kept of those that a compiled graph ran; an older one is not taken for another."""
    student, teacher = Smallest(), Smallest()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    reference, compilations = copy.deepcopy(student), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    if in_place:
        student.compile(backend=backend, fullgraph=True)
        compiled = student
    else:
        compiled = torch.compile(student, backend=backend, fullgraph=True)
    for _ in range(3):
        first, second, third = batches(3)
        outputs = compiled(first), compiled(second)
        for index in (0, 1):
            expected = expected_loss(reference, teacher, (first, second)[index])
            torch.testing.assert_close(compute_loss(outputs[index], (first, second)[index]), expected)
        outputs = compiled(first), compiled(second), compiled(third)
        with pytest.raises(RuntimeError, match="no forward is known that made these logits"):
            compute_loss(outputs[0], first)
    assert len(compilations) == 1


def test_two_forwards_in_one_compiled_graph():
    """Both outputs have one node of the autograd graph."""
    student, teacher = Smallest(), Smallest()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)

    @torch.compile(backend="aot_eager")
    def both(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return student(first).logits, student(second).logits

    inputs = batches()
    expected = [expected_loss(student, teacher, input_ids) for input_ids in inputs]
    logits = both(*inputs)
    assert logits[0].grad_fn is logits[1].grad_fn
    for index in (1, 0):
        value = compute_loss({"logits": logits[index].double()}, inputs[index])
        assert value.item() == pytest.approx(expected[index].item(), rel=1e-5)


def _two_forwards_in_parallel(rank: int) -> None:
    """One of two processes. The sink of DistributedDataParallel and fully_shard's casts return other tensors."""
    torch.manual_seed(0)
    for wrap in (
        lambda student: DistributedDataParallel(student, find_unused_parameters=True),
        lambda student: DistributedDataParallel(student, static_graph=True),
        lambda student: fully_shard(student, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64)),
    ):
        student, teacher = models()
        reference = copy.deepcopy(student)
        compute_loss = distillation_compute_loss(student, teacher, LOSS)
        wrapped = wrap(student)
        first, second = batches()
        for inputs in (first, second):
            expected = expected_loss(reference, teacher, inputs)
            outputs = wrapped(input_ids=inputs, output_hidden_states=True)
            value = compute_loss(outputs, inputs)
            assert value.item() == pytest.approx(expected.item(), rel=1e-5)
            value.backward()
            with torch.no_grad():
                outputs = wrapped(input_ids=inputs)
                assert compute_loss(outputs, inputs).item() == pytest.approx(expected.item(), rel=1e-5)
        if not isinstance(wrapped, DistributedDataParallel):
            outputs = wrapped(input_ids=first), wrapped(input_ids=second)
            assert outputs[0].logits.dtype == torch.float64
            for index in (1, 0):
                expected = expected_loss(reference, teacher, (first, second)[index])
                value = compute_loss(outputs[index], (first, second)[index])
                assert value.item() == pytest.approx(expected.item(), rel=1e-5)
            with torch.no_grad():
                outputs = wrapped(input_ids=first), wrapped(input_ids=second)
                with pytest.raises(RuntimeError, match="no forward is known"):
                    compute_loss(outputs[0], first)


def test_wrappers_of_several_processes():
    in_processes(2, _two_forwards_in_parallel)


def test_evaluation_and_generation_between_forward_and_loss(tmp_path):
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    evaluating = trainer(student, compute_loss, tmp_path)
    (input_ids,) = batches(1)
    expected = expected_loss(student, teacher, input_ids)
    outputs = student(input_ids)
    before = evaluating.evaluate()["eval_loss"]
    student.generate(input_ids, max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(compute_loss(outputs, input_ids).detach(), expected, rtol=1e-5, atol=1e-7)
    assert evaluating.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-6)


def test_evaluation_in_every_step_changes_no_step(tmp_path):
    trained = []
    for arguments in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        student, teacher = models()
        compute_loss = distillation_compute_loss(student, teacher, LOSS)
        settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer(student, compute_loss, tmp_path, **settings, **arguments).train()
        trained.append(torch.cat([parameter.flatten() for parameter in student.parameters()]))
    assert torch.equal(*trained)


def test_mixed_precision_and_accumulation_in_a_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as transformers 4.57 does for all Trainers to come
    student, teacher = models()
    batch = {name: torch.stack([example[name] for example in examples()]) for name in examples()[0]}
    labels = batch.pop("labels")[:, 1:]
    expected = LOSS(student(**batch).logits[:, :-1], teacher(**batch).logits[:, :-1], labels=labels).item()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    settings = {"bf16": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    result = trainer(student, compute_loss, tmp_path, **settings).train()
    assert result.training_loss == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_a_graph_the_last_forward_is_known_by_its_values(dtype):
    """As fully_shard casts outputs in an evaluation, after the student's own hooks."""
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, lambda ids, **_: {"logits": teacher(ids).logits.to(dtype)}, LOSS)
    first, second = batches()
    with torch.no_grad():
        outputs = {"logits": student(first).logits.to(dtype)}
        expected = expected_loss(student, teacher, first)
        tolerance = 1e-5 if dtype == torch.float64 else 0.02
        assert compute_loss(outputs, first).item() == pytest.approx(expected.item(), rel=tolerance)
        student(second)
        with pytest.raises(RuntimeError, match="no forward is known that made these logits"):
            compute_loss(outputs, first)


@pytest.mark.parametrize("with_graph", [True, False])
def test_outputs_of_several_forwards_or_of_none_are_refused(with_graph):
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    first, second = batches()
    with torch.set_grad_enabled(with_graph):
        parts = [student(input_ids).logits for input_ids in (first, second)]
        gathered = {"logits": torch.cat(parts)}  # as DataParallel does
        message = "got outputs of 2 forwards.*one process for each GPU" if with_graph else "no forward is known"
        with pytest.raises(RuntimeError, match=message):
            compute_loss(gathered, torch.cat([first, second]))
        other = copy.deepcopy(student)
        with pytest.raises(RuntimeError, match="must be what a forward of the student returned"):
            compute_loss(other(first), first)  # of another model
    with pytest.raises(RuntimeError, match="no forward is known"):
        compute_loss({"logits": torch.randn(2, 6, VOCABULARY)}, first)


@pytest.mark.parametrize("with_graph", [True, False])
def test_forwards_leave_nothing_behind(with_graph):
    """Hundreds of evaluation forwards keep the inputs of one at most; a training step keeps none."""
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    inputs, outputs = [], []
    with torch.set_grad_enabled(with_graph):
        for input_ids in batches(20):
            made = student(input_ids=input_ids)
            value = compute_loss(made, input_ids)
            inputs.append(weakref.ref(input_ids))
            outputs.append(weakref.ref(made.logits))
    del input_ids, made, value
    gc.collect()
    assert sum(reference() is not None for reference in inputs) <= (0 if with_graph else 1)
    assert sum(reference() is not None for reference in outputs) == 0
