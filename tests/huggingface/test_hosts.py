"""The recipes of docs/guides/recipes.md, as they are written there: the losses and weights of a plain loop."""

import copy
import re
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor
from torch.nn import functional

from sgfast import metrics
from tests.huggingface.test_distillation_compute_loss import examples, models
from tests.processes import in_processes
from tests.tiny_models import tiny_causal_lm, with_lora

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "recipes.md"
RATE = 0.5
QUIETLY = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def recipe(host):
    """The names that the code under a heading of the page defines."""
    section = re.search(rf"^## {host}$(.*?)(^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {}
    exec(compile(block, f"{PAGE.name}, {host}", "exec"), names)
    return names


def batches(rank=0, count=1):
    """Two steps of four examples, or this process's share of each."""
    rows = [examples()[start + rank : start + 4 : count] for start in (0, 4)]
    return [{name: torch.stack([row[name] for row in step]) for name in step[0]} for step in rows]


def loader(rank=0, count=1):
    return torch.utils.data.DataLoader(batches(rank, count), batch_size=None)


def divergence_of(student, teacher, batch, temperature=1.0, reverse=False):
    """T²·KL over the labels of a batch, from PyTorch's own functions."""
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        q = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    p = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    log_p, log_q = (side.div(temperature).log_softmax(-1) for side in (p, q))
    first, second = (log_p, log_q) if reverse else (log_q, log_p)
    per_position = (first.exp() * (first - second)).sum(-1)
    return temperature**2 * per_position[labels != -100].mean()


def plainly(student, teacher, steps, **arguments):
    """Losses and weights of a plain loop of SGD."""
    optimizer = torch.optim.SGD([one for one in student.parameters() if one.requires_grad], lr=RATE)
    losses = []
    for batch in steps:
        value = divergence_of(student, teacher, batch, **arguments)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, student.state_dict()


def assert_same_training(found, before, expected):
    """The weights' change over the training, tensor by tensor; and the losses."""
    losses, state = expected
    assert found[0] == pytest.approx(losses, rel=1e-5)
    for name, value in state.items():
        change = value - before[name]
        assert (found[1][name] - value).norm() <= 2e-5 * change.norm() + 1e-7, name


def by_accelerate(rank, directory, way):
    """Two steps of the page's loop in one of two processes."""
    student, teacher = models()
    accelerator = accelerate.Accelerator(cpu=True)
    if way == "FSDP2":  # accelerate's launcher offers it on accelerators only
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        type(accelerator.state)._shared_state |= {
            "fsdp_plugin": plugin,
            "distributed_type": accelerate.DistributedType.FSDP,
        }
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    student, optimizer = accelerator.prepare(student, optimizer)
    assert (way == "FSDP2") == any(isinstance(one, DTensor) for one in student.parameters())
    losses = recipe("accelerate")["train"](accelerator, student, teacher, optimizer, batches(rank, 2))
    state = accelerator.unwrap_model(student).state_dict()
    state = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in state.items()}
    if rank == 0:
        torch.save(([one.item() for one in losses], state), f"{directory}/{way}.pt")
    type(accelerator.state)._reset_state(reset_partial_state=True)


def by_lightning(rank, directory):
    """The page's module in one of two processes."""
    import lightning
    from lightning.pytorch.plugins.environments import LightningEnvironment

    student, teacher = models()
    module = recipe("Lightning")["Distillation"](student, teacher, RATE)
    trainer = lightning.Trainer(
        strategy="ddp",
        devices=2,
        plugins=[LightningEnvironment()],
        use_distributed_sampler=False,
        **QUIETLY,
        default_root_dir=directory,
    )
    trainer.fit(module, loader(rank, 2))
    (found,) = trainer.validate(module, loader(rank, 2), verbose=False)
    if rank == 0:
        torch.save((found["agreement"], module.student.state_dict()), f"{directory}/lightning.pt")


def _in_two(rank, directory):
    for way in ("DDP", "FSDP2"):
        by_accelerate(rank, directory, way)
    by_lightning(rank, directory)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    in_processes(2, _in_two, str(directory))
    return directory


@pytest.mark.parametrize("way", ["alone", "DDP", "FSDP2"])
def test_accelerate(way, in_two):
    student, teacher = models()
    before = copy.deepcopy(student.state_dict())
    expected = plainly(student, teacher, batches(), temperature=2.0)
    if way != "alone":
        assert_same_training(torch.load(in_two / f"{way}.pt"), before, expected)
        return
    student, teacher = models()
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    accelerator = accelerate.Accelerator(cpu=True)
    losses = recipe("accelerate")["train"](accelerator, student, teacher, optimizer, batches())
    assert_same_training(([one.item() for one in losses], student.state_dict()), before, expected)


def test_lightning_alone(tmp_path):
    import lightning

    student, teacher = models()
    before = copy.deepcopy(student.state_dict())
    losses, state = plainly(copy.deepcopy(student), teacher, batches())
    module = recipe("Lightning")["Distillation"](student, teacher.train(), RATE)
    logged = []

    class Losses(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(trainer.callback_metrics["loss"].item())
            assert not teacher.training

    trainer = lightning.Trainer(**QUIETLY, callbacks=[Losses()], default_root_dir=tmp_path)
    trainer.fit(module, loader())
    assert_same_training((logged, student.state_dict()), before, (losses, state))
    (found,) = trainer.validate(module, loader(), verbose=False)
    assert found["agreement"] == agreement_of(student, teacher)


def agreement_of(student, teacher):
    accumulator = metrics.UtilityMetrics()
    with torch.no_grad():
        for batch in batches():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            accumulator.update(student(**inputs).logits, teacher(**inputs).logits, batch["attention_mask"])
    return accumulator.compute()["next_token_agreement"]


def test_lightning_in_two_processes(in_two):
    student, teacher = models()
    before = copy.deepcopy(student.state_dict())
    _, state = plainly(student, teacher, batches())
    found, trained = torch.load(in_two / "lightning.pt")
    assert_same_training(([], trained), before, ([], state))
    student.load_state_dict(trained)
    assert found == pytest.approx(agreement_of(student, teacher), rel=1e-6)


def test_an_adapters_base_as_teacher(tmp_path):
    base, *_ = tiny_causal_lm("llama", num_hidden_layers=2, initializer_range=0.3)
    teacher, student = copy.deepcopy(base), with_lora(base)
    reference = copy.deepcopy(student)
    before = copy.deepcopy(student.state_dict())
    expected = plainly(reference, teacher, batches(), reverse=True)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = recipe("PEFT")["adapter_trainer"](student, arguments, examples())
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert max(losses) > 1e-3
    assert_same_training((losses, student.state_dict()), before, expected)


def test_torchmetrics():
    table = torch.eye(4)
    utility, privacy = recipe("torchmetrics")["collection"](table)
    noisy, clean = torch.zeros(1, 3, 4), torch.eye(4)[None, :3]
    utility.update(noisy, clean, torch.ones(1, 3), torch.tensor([[0, 1, 2]]))
    assert [sorted(group) for group in utility.compute_groups.values()] == [
        ["next_token_agreement", "noisy_perplexity"]
    ]
    found = utility.compute()
    assert found["next_token_agreement"].item() == 1 / 3
    assert found["noisy_perplexity"].item() == pytest.approx(4)
    privacy.update(table[[0, 1]], torch.tensor([0, 2]))
    assert privacy.compute().item() == 0.5


def test_trl():
    pytest.importorskip("datasets", reason="GKDTrainer needs datasets")
    trainer = recipe("TRL")["FusedGKDTrainer"]
    student, teacher = torch.zeros(1, 2, 3), torch.eye(3)[None, :2]
    value = trainer.generalized_jsd_loss(student, teacher, torch.tensor([[-100, 1]]), beta=0.0)
    expected = functional.kl_div(student[0, 1].log_softmax(-1), teacher[0, 1].softmax(-1), reduction="sum")
    assert value.item() == pytest.approx(expected.item())
