"""SgtTrainer's checkpoints: the noise layer alone, whole or not there, and resumed bit for bit."""

import copy
import os
import signal
import subprocess
import sys

import peft
import pytest
import safetensors.torch
import torch

from sgfast.huggingface.trainer_checkpoint import checkpoints, load_trained, save_trained, trained_state
from sgfast.loss.jigsaw import jigsaw_loss_factory
from sgfast.model import PeftNoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import TransformerCloak
from tests.huggingface.sgt_training import distillation, noisy_language_model, student_of, trainer, whole_batch
from tests.loss.factory_cases import CASES


def model(kind="teacher", **arguments):
    noisy_model = noisy_language_model(TransformerCloak, torch.float32, **arguments)
    return noisy_model if kind == "teacher" else student_of(noisy_model, dropout=0.1)


def training_of(noisy_model, directory, **settings):
    """Adam with a falling rate over 2.5 epochs of two steps of two micro-batches, saved after every step."""
    arguments = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    loss = settings.pop("loss", None) or distillation(noisy_model)
    training = trainer(noisy_model, loss, directory, **(arguments | settings))
    training.optimizer = None  # Trainer's own
    return training


def values_of(noisy_model):
    adapters = {name: value for name, value in noisy_model.state_dict().items() if "lora_" in name}
    return copy.deepcopy(noisy_model.noise_layer.state_dict() | adapters)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def jigsaw():
    """A student with dropout, recomputed in backward, and its loss and teacher."""
    teacher = noisy_language_model(TransformerCloak, torch.float32, mean_dropout=0.1)
    student = student_of(teacher, dropout=0.1)
    loss = jigsaw_loss_factory(teacher, student, **CASES["jigsaw"][1])
    return student, {"loss": loss, "teacher": teacher, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "make",
    [
        lambda: (model(mean_dropout=0.1), {}),
        lambda: (model(seed=7), {"eval_strategy": "no"}),
        jigsaw,
    ],
    ids=["layer without a seed", "layer with a seed", "jigsaw"],
)
def test_a_resumed_training_is_the_straight_one_bit_for_bit(make, tmp_path):
    straight, settings = make()
    training = training_of(straight, tmp_path / "run", **settings)
    training.train()
    expected, optimizer = values_of(straight), training.optimizer.state_dict()["state"]
    losses = [record["loss"] for record in training.state.log_history if "loss" in record]
    for step in (1, 2, 3):  # in the middle of an epoch, and between two
        resumed, settings = make()
        again = training_of(resumed, tmp_path / f"from-{step}", **settings)
        torch.manual_seed(99)
        again.train(str(tmp_path / "run" / f"checkpoint-{step}"))
        assert_same(values_of(resumed), expected)
        for parameter, state in again.optimizer.state_dict()["state"].items():
            assert_same(state, optimizer[parameter])
        assert [record["loss"] for record in again.state.log_history if "loss" in record] == losses
        reported = [record for record in again.state.log_history if "hyperparameters/alpha" in record]
        assert len(reported) == 1


def test_a_finished_training_takes_no_step_more(tmp_path):
    straight, resumed = model(), model()
    training = training_of(straight, tmp_path / "run")
    training.train()
    steps = training.state.global_step
    again = training_of(resumed, tmp_path / "again")
    output = again.train(str(tmp_path / "run" / f"checkpoint-{steps}"))
    assert output.global_step == again.state.global_step == steps
    assert [record["step"] for record in again.state.log_history if "loss" in record] == list(range(1, steps + 1))
    assert_same(values_of(resumed), values_of(straight))


def test_what_a_checkpoint_holds(tmp_path):
    student = model("student")
    training = training_of(student, tmp_path, max_steps=1)
    training.train()
    folder = tmp_path / "checkpoint-1"
    stored = safetensors.torch.load_file(folder / "noise_layer.safetensors")
    assert_same(stored, dict(student.noise_layer.state_dict()))
    adapters = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1"}
    tensors = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    trained = sum(tensor.nbytes for tensor in [*stored.values(), *adapters.values()])
    assert sum(path.stat().st_size for path in tensors) < 3 * trained + 60_000  # Adam's two moments, arguments
    other = model("student")
    load_trained(other, folder)
    assert_same(values_of(other), values_of(student))


def test_the_best_model_is_loaded_and_the_oldest_are_dropped(tmp_path):
    noisy_model = model()
    training = training_of(
        noisy_model,
        tmp_path,
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="std_log_ratio",
        greater_is_better=False,  # it grows: here most weight is on what asks for small sigmas
        learning_rate=0.05,
    )
    training.train()
    evaluations = [record for record in training.state.log_history if "eval_loss" in record]
    values = {record["step"]: record["eval_std_log_ratio"] for record in evaluations}
    best = min(values, key=values.get)
    assert best < 5
    assert training.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert checkpoints(tmp_path) == [tmp_path / f"checkpoint-{best}", tmp_path / "checkpoint-5"]
    stored = safetensors.torch.load_file(tmp_path / f"checkpoint-{best}" / "noise_layer.safetensors")
    assert_same(stored, dict(noisy_model.noise_layer.state_dict()))
    assert training.evaluate()["eval_std_log_ratio"] == values[best]


KILLED = """
import os, signal, sys
from tests.huggingface.test_trainer_checkpoint import model, training_of

training = training_of(model(), sys.argv[1])
save = training._save_scaler  # after the optimizer's state, before the trainer's

def save_or_die(folder):
    save(folder)
    if training.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

training._save_scaler = save_or_die
training.train()
"""


def test_a_kill_in_the_middle_of_a_save_loses_one_interval(tmp_path):
    straight = model()
    training_of(straight, tmp_path / "straight").train()
    killed = tmp_path / "killed"
    result = subprocess.run([sys.executable, "-c", KILLED, str(killed)], timeout=300)
    assert result.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(killed)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert (killed / ".incomplete" / "checkpoint-4" / "optimizer.pt").exists()
    resumed = model()
    again = training_of(resumed, killed)
    again.train(resume_from_checkpoint=True)
    assert_same(values_of(resumed), values_of(straight))
    assert sorted(os.listdir(killed)) == [f"checkpoint-{step}" for step in range(1, 6)]


def test_a_step_that_was_saved_before_is_replaced(tmp_path):
    training_of(model(), tmp_path, max_steps=2).train()
    other = model()
    again = training_of(other, tmp_path, max_steps=2, learning_rate=0.05)
    again.train(str(tmp_path / "checkpoint-1"))
    stored = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "noise_layer.safetensors")
    assert_same(stored, dict(other.noise_layer.state_dict()))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]


def test_half_checkpoints_are_passed_over(tmp_path):
    training = training_of(model(), tmp_path)
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        training.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{}")
    assert checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="checkpoint-9 is no whole checkpoint"):
        training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_foreign_and_damaged_files(tmp_path):
    noisy_model, deeper, student = model(), model(mean_num_hidden_layers=2), model("student")
    with pytest.raises(ValueError, match=r"is no checkpoint of this trainer: it has no noise_layer\.safetensors"):
        load_trained(noisy_model, tmp_path)
    save_trained(deeper, trained_state(deeper), tmp_path)
    with pytest.raises(ValueError, match="another architecture than the model: they differ in mean_estimator"):
        load_trained(noisy_model, tmp_path)
    path = tmp_path / "noise_layer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"noise_layer\.safetensors is damaged"):
        load_trained(noisy_model, tmp_path)
    save_trained(student, trained_state(student), tmp_path / "student")
    adapted = peft.get_peft_model(noisy_model.base_model, peft.LoraConfig(r=2, target_modules=["k_proj"]))
    other = PeftNoiseMaskedNoisyTransformerModel(None, adapted, noise_layer=noisy_model.noise_layer)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has another architecture than the model"):
        load_trained(other, tmp_path / "student")


def test_adapters_are_files_of_peft(tmp_path):
    student = model("student")
    save_trained(student, trained_state(student), tmp_path)
    base_model = noisy_language_model(TransformerCloak, torch.float32).base_model
    loaded = peft.PeftModel.from_pretrained(base_model, tmp_path)
    batch = {name: value for name, value in whole_batch().items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, student.eval().base_model(**batch).logits)


def test_a_saved_model_is_what_the_trainer_holds(tmp_path):
    training = training_of(model(), tmp_path / "run")
    training.save_model(str(tmp_path / "final"))
    assert {path.name for path in (tmp_path / "final").iterdir()} == {"noise_layer.safetensors", "training_args.bin"}
