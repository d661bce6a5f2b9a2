"""The module in a plain loop, in a Trainer, in two processes and compiled; and how much it keeps."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sgfast.examples.presets import Distillation, first_layers
from sgfast.loss.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, DistillationConfig, DistillationLoss
from tests.live_bytes import LiveBytes
from tests.processes import in_processes
from tests.tiny_models import VOCABULARY, WIDTH, tiny_causal_lm

CONFIG = {
    "temperature": 2,
    "temperature_scheduler": ["cwsm", 0.01],
    "kd_loss_weight": 0.9,
    "kd_loss_weight_scheduler": "linear_decay",
    "intermediate_matches": [
        {"layer_T": 3, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1,
         "proj": ["linear", WIDTH, WIDTH]},
        {"layer_T": 4, "layer_S": 2, "feature": "hidden", "loss": "cos", "weight": 1},
        {"layer_T": [1, 2], "layer_S": [1, 2], "feature": "hidden", "loss": "nst", "weight": 1},
    ],
}  # fmt: skip


def distillation() -> Distillation:
    teacher, _, _ = tiny_causal_lm("llama", tie_word_embeddings=False)
    teacher.requires_grad_(False)
    student = first_layers(teacher, 2).requires_grad_(True)
    torch.manual_seed(1)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Distillation(student, teacher, DistillationLoss(DistillationConfig.from_dict(CONFIG)))


def batch(samples: int = 4) -> dict[str, Tensor]:
    """Every half of it has the same number of tokens, so that the mean of the halves' losses is the whole's."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 4])[torch.arange(samples) % 2]
    attention_mask = (torch.arange(6) < lengths[:, None]).long()
    return {
        "input_ids": torch.randint(1, VOCABULARY, (samples, 6), generator=generator),
        "attention_mask": attention_mask,
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_a_plain_loop_learns_and_resumes():
    model = distillation()
    optimizer = torch.optim.AdamW([{"params": model.student.parameters()}, *model.loss.parameter_groups()], lr=1e-2)
    first = model(**batch())
    for step in range(30):
        optimizer.zero_grad()
        model(**batch())["loss"].backward()
        optimizer.step()
        model.loss.set_progress((step + 1) / 60)
    last = model(**batch())
    for name in ("unweighted_kd_loss", "unweighted_hidden_hidden_mse_1_3", "unweighted_hidden_cos_2_4"):
        assert last[name] < first[name]
    resumed = distillation()
    resumed.load_state_dict(model.state_dict())
    assert resumed(**batch())["loss"] == last["loss"]


def test_trainer(tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Progress(TrainerCallback):
        def on_step_end(self, arguments, state, control, model, **_):
            model.loss.set_progress(state.global_step / state.max_steps)

    model = distillation()
    projection = model.loss.projections["0"].weight.detach().clone()
    examples = [{name: values[index] for name, values in batch(16).items()} for index in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=12,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[Progress()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert not model.loss.projections["0"].weight.equal(projection)
    assert model.loss.kd_loss_weight == 0
    from safetensors.torch import load_file

    saved = load_file(Path(tmp_path, "checkpoint-12", "model.safetensors"))
    assert saved["loss.projections.0.weight"].equal(model.loss.projections["0"].weight)


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    half = {name: values[2 * rank : 2 * rank + 2] for name, values in batch().items()}
    model = distillation()
    together = DistributedDataParallel(model)
    together(**half)["loss"].backward()
    # Or each of the two by itself.
    apart = distillation()
    student, loss = DistributedDataParallel(apart.student), DistributedDataParallel(apart.loss)
    teacher = apart._teacher[0](**half, output_hidden_states=True)
    outputs = student(**half, output_hidden_states=True)
    mask = half["attention_mask"]
    total, _ = loss(
        {"logits": outputs.logits, "logits_mask": mask, "inputs_mask": mask, "hidden": outputs.hidden_states},
        {"logits": teacher.logits, "logits_mask": mask, "hidden": teacher.hidden_states},
    )
    total.backward()
    torch.save([gradients(model), gradients(apart)], f"{folder}/{rank}.pt")


def test_two_processes(tmp_path):
    in_processes(2, run_process, str(tmp_path))
    model = distillation()
    for half in (slice(0, 2), slice(2, 4)):
        (model(**{name: values[half] for name, values in batch().items()})["loss"] / 2).backward()
    expected = gradients(model)
    assert expected["loss.projections.0.weight"].norm() > 0
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_compiled():
    """One graph, which the schedule's steps do not make anew."""
    torch._dynamo.reset()
    model = distillation()
    expected = copy.deepcopy(model)
    compiled = torch.compile(model.loss, fullgraph=True)
    inputs = batch()
    mask = inputs["attention_mask"]
    outputs, teacher = (one(**inputs, output_hidden_states=True) for one in (model.student, model._teacher[0]))
    sides = [
        {"logits": one.logits.detach(), "logits_mask": mask, "inputs_mask": mask,
         "hidden": [state.detach() for state in one.hidden_states]}
        for one in (outputs, teacher)
    ]  # fmt: skip
    sides[0]["logits"].requires_grad_()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for progress in (0.0, 0.25, 0.5):
            model.loss.set_progress(progress)
            expected.loss.set_progress(progress)
            total, components = compiled(*sides)
            other, other_components = expected.loss(*sides)
            torch.testing.assert_close(total, other)
            torch.testing.assert_close(components, other_components)
            torch.testing.assert_close(
                torch.autograd.grad(total, [sides[0]["logits"], *model.loss.parameters()]),
                torch.autograd.grad(other, [sides[0]["logits"], *expected.loss.parameters()]),
            )


BATCH, HEADS, LENGTH, CLASSES = 2, 4, 512, 4096
SHAPES = {
    "attention": (BATCH, HEADS, LENGTH, LENGTH),
    "hidden_mse": (BATCH, LENGTH, 1024),
    "cos": (BATCH, LENGTH, 1024),
    "fsp": (BATCH, LENGTH, 1024),
    "nst": (BATCH, LENGTH, 1024),
}


def kept_bytes(loss, student, teacher) -> int:
    """Bytes of the tensors that autograd keeps for backward, the inputs apart."""
    inputs = {one.untyped_storage().data_ptr() for one in (*student, *teacher)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(*((student, teacher) if len(student) == 2 else (student[0], teacher[0])))
    assert value.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["attention_mse", "attention_ce", "hidden_mse", "cos", "fsp", "nst", "mse", "ce"])
def test_kept_bytes(name, masked):
    """A few scalars a row."""
    shape = SHAPES.get("attention" if name.startswith("attention") else name, (BATCH, LENGTH, CLASSES))
    count = 2 if name in ("fsp", "nst") else 1
    student, teacher = ([torch.randn(shape).requires_grad_() for _ in range(count)] for _ in range(2))
    mask = torch.ones(BATCH, LENGTH) if masked else None
    if name in KD_LOSS_MAP:
        found = kept_bytes(lambda s, t: KD_LOSS_MAP[name](s, t, 2.0, mask=mask), student, teacher)
    else:
        found = kept_bytes(lambda s, t: MATCH_LOSS_MAP[name](s, t, mask), student, teacher)
    rows = shape[0] * shape[1] * (shape[2] if name.startswith("attention") else 1)
    assert found <= 112 * rows


@pytest.mark.parametrize("operator", ["score_rows", "gram_distance direct", "gram_distance dual"])
def test_temporaries_are_chunks(operator):
    """Forward and backward each hold a few chunks beyond inputs and gradients, whatever the tensors' size."""
    from sgfast.loss.presets import gram, score_rows

    torch.manual_seed(0)
    if operator == "score_rows":
        student, teacher = (torch.randn(4, 8, 512, 512) for _ in range(2))  # 32 MiB each
        keys, queries = torch.ones(4, 512), torch.ones(4, 8, 512, dtype=torch.bool)
        problem = score_rows._Problem(student, teacher, keys, queries, "cross_entropy", None, "torch")
        forward = (score_rows._forward, problem)
        backward = (score_rows._backward, score_rows._Backward(problem, torch.ones(4, 8, 512), [True] * 2))
        outputs, allowed = student.nbytes * 2, 2 * 2**23
    else:
        length, width = (512, 2048) if operator.endswith("direct") else (128, 8192)
        layers = [torch.randn(1, length, width) for _ in range(4)]
        weights = torch.ones(1, length)
        problem = gram._Problem(*layers, weights, "features", "torch")
        forward = (gram._forward, problem)
        backward = (gram._backward, gram._Backward(problem, torch.ones(1), [True] * 4))
        # One sample's factors and their gradients are of its layers' size; its Gram matrix is 16 or 256 MiB.
        outputs, allowed = 4 * layers[0].nbytes, 6 * 4 * layers[0].nbytes + 2 * 2**23
        assert allowed < 8 * width**2 * 4
    for (operation, arguments), beyond in ((forward, allowed), (backward, allowed + outputs)):
        with LiveBytes() as counted:
            operation.implementation(arguments)
        assert counted.peak < beyond, f"{counted.peak / 2**20:.0f} MiB"
