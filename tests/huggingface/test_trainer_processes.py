"""SgtTrainer in two processes: the steps, logs and evaluations of one."""

import copy

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sgfast.huggingface.trainer_checkpoint import load_trained, trained_state
from sgfast.model.decoder import decoder_layers
from sgfast.noise_layer import TransformerCloak
from tests.huggingface.sgt_training import (
    assert_steps_are,
    case,
    distillation,
    examples,
    gradients_of_one_batch,
    noisy_language_model,
    student_of,
    trainable,
    trainer,
    whole_batch,
)
from tests.processes import in_processes

NAMES = ("distillation", "adapters", "cross entropy", "jigsaw")


def made(name):
    """A model, its loss and what the trainer takes besides; with adapters, some are beyond the distilled layer."""
    if name == "adapters":
        student = student_of(noisy_language_model())
        return student, distillation(student, 1), {}
    return case(name)


def _data_parallel(rank, directory):
    """One step on two micro-batches of two in each process, and an evaluation of two and three sequences."""
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    results = {}
    for name in NAMES:
        model, loss, also = made(name)
        training = trainer(model, loss, directory, per_device_eval_batch_size=2, **arguments, **also)
        training.train()
        record = next(record for record in training.state.log_history if "loss" in record)
        evaluation = training.evaluate()
        results[name] = {"state": model.state_dict(), "record": record, "evaluation": evaluation}
    if rank == 0:
        torch.save(results, f"{directory}/data-parallel.pt")


def _resumed(rank, directory):
    """Straight training and the same from the first of two checkpoints: bit for bit, each process its own noise."""
    states, seeds = [], []
    for resume in (None, f"{directory}/run/checkpoint-1"):
        model = noisy_language_model(TransformerCloak, torch.float32)
        training = trainer(
            model,
            distillation(model),
            f"{directory}/run" if resume is None else f"{directory}/again",
            max_steps=2,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=1,
        )
        training.train(resume)
        states.append(copy.deepcopy(model.noise_layer.state_dict()))
        seeds.append(model.noise_layer.forward_seed.item())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert seeds[0] == seeds[1]
    both = [None, None]
    dist.all_gather_object(both, seeds[0])
    assert both[0] != both[1]


def _fully_sharded(rank, directory):
    """FSDP2 around a noisy model's parts: gradients of one step on four sequences in each process."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = noisy_language_model()
    loss_function, _, _ = distillation(model)
    for module in [*decoder_layers(model.base_model), model.noise_layer, model]:
        fully_shard(module, mesh=mesh)
    model.train()
    batch = whole_batch(examples()[rank::2])
    counts = {name: float(value) for name, value in token_counts().items()}
    model(**batch)
    (2 * loss_function(batch["loss_mask"], normalizers=counts)).backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in trainable(model)}
    if rank == 0:
        torch.save(gradients, f"{directory}/fully-sharded.pt")


def _sharded_by_accelerate(rank, directory):
    """One step under accelerate's FSDP2, which its launcher offers on accelerators only; saved, and read again."""
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )
    results = {}
    for name in NAMES:
        model, loss, also = made(name)
        folder = f"{directory}/sharded {name}"
        saving = {"save_strategy": "steps", "save_steps": 1, "ddp_backend": "gloo"}
        training = trainer(
            model, loss, folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, **saving, **also
        )
        shared = type(training.accelerator.state)._shared_state
        shared |= {"fsdp_plugin": plugin, "distributed_type": accelerate.DistributedType.FSDP}
        training.is_fsdp_enabled = True
        training.train()
        assert any(isinstance(parameter, DTensor) for parameter in model.noise_layer.parameters())
        state = trained_state(model)
        with torch.no_grad():
            for _, parameter in trainable(model):
                parameter.zero_()
        load_trained(model, f"{folder}/checkpoint-1")
        again = trained_state(model)
        for one, other in zip(state, again, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
        results[name] = {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in model.state_dict().items()
        }
    if rank == 0:
        torch.save(results, f"{directory}/sharded.pt")


def token_counts():
    batch = whole_batch()
    attended = batch["attention_mask"] != 0
    return {
        "loss_tokens": (batch["loss_mask"] & attended).sum(),
        "noise_tokens": (batch["noise_mask"] & attended).sum(),
    }


def _in_two(rank, directory):
    for check in (_data_parallel, _resumed, _fully_sharded, _sharded_by_accelerate):
        check(rank, directory)
        dist.barrier()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    in_processes(2, _in_two, str(directory))
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_data_parallel_processes_take_the_step_of_one(name, results):
    result = torch.load(results / "data-parallel.pt")[name]
    model, loss, also = made(name)
    before = copy.deepcopy(model.state_dict())
    components, gradients = gradients_of_one_batch(model, loss, **also)
    model.load_state_dict(result["state"])
    assert_steps_are(model, before, gradients)
    assert result["record"]["loss"] == pytest.approx(components.pop("total"), rel=1e-6)
    assert {key: result["record"][key] for key in components} == pytest.approx(components, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_data_parallel_processes_measure_what_one_measures(name, results, tmp_path):
    result = torch.load(results / "data-parallel.pt")[name]
    model, loss, also = made(name)
    model.load_state_dict(result["state"])
    metrics = trainer(model, loss, tmp_path, **also).evaluate()
    utility = {key: value for key, value in metrics.items() if "utility" in key}
    assert len(utility) == 4
    assert {key: result["evaluation"][key] for key in utility} == pytest.approx(utility, rel=1e-5)


def test_fully_sharded_processes_have_the_gradient_of_one(results):
    model = noisy_language_model()
    _, expected = gradients_of_one_batch(model, distillation(model))
    gradients = torch.load(results / "fully-sharded.pt")
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("name", NAMES)
def test_accelerates_sharded_processes_take_the_step_of_one(name, results):
    model, loss, also = made(name)
    before = copy.deepcopy(model.state_dict())
    _, gradients = gradients_of_one_batch(model, loss, **also)
    model.load_state_dict(torch.load(results / "sharded.pt")[name])
    assert_steps_are(model, before, gradients)
    written = {path.name for path in (results / f"sharded {name}" / "checkpoint-1").iterdir()}
    assert not any("model" in file and "adapter" not in file for file in written)
