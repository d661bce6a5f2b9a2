"""The loss of TRL's GKDTrainer from this library's operation, beside TRL's own code.

``make`` installs TRL without its dependencies, because its ``datasets`` would bring pyarrow and pandas, some 260 MB.
The methods of its GKDTrainer are therefore read from the installed source and run outside of the Trainer. Where
``datasets`` is installed, the whole Trainer trains.
"""

import ast
import contextlib
import copy
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sgfast.huggingface.trl import chunked_divergence_loss, generalized_jsd_loss
from tests.live_bytes import LiveBytes
from tests.tiny_models import VOCABULARY, tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module")
def gkd():
    """A class with the two methods of GKDTrainer that compute its loss, as TRL wrote them."""
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("TRL is not installed")
    source = Path(found.submodule_search_locations[0]) / "experimental" / "gkd" / "gkd_trainer.py"
    (trainer,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "GKDTrainer"
    )
    methods = ("generalized_jsd_loss", "compute_loss")
    trainer.bases = []
    trainer.body = [node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name in methods]
    assert len(trainer.body) == len(methods)
    namespace = {"torch": torch, "F": functional, "empty_cache": lambda: None}
    exec(compile(ast.Module([trainer], []), str(source), "exec"), namespace)
    return namespace["GKDTrainer"]


def logits_and_labels(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(3, 6, 41, generator=generator, dtype=dtype) for _ in range(2))
    labels = torch.randint(0, 41, (3, 6), generator=generator)
    labels[0, :4] = labels[2, 5] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients(gkd, beta, with_labels):
    student, teacher, labels = logits_and_labels()
    for arguments in (
        {},
        {"temperature": 0.7},
        {"reduction": "sum"},
        {"reduction": "mean", "temperature": 3.0},
        {"num_items_in_batch": 29, "reduction": "sum"},
        {"num_items_in_batch": torch.tensor(29)},
    ):
        results = []
        for function in (gkd.generalized_jsd_loss, generalized_jsd_loss):
            value = function(student, teacher, labels if with_labels else None, beta=beta, **arguments)
            results.append((value.item(), torch.autograd.grad(value, student)[0]))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-12), arguments
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-9, atol=1e-14)


def test_no_counted_position_and_no_reduction(gkd):
    student, teacher, labels = logits_and_labels()
    nothing = torch.full_like(labels, -100)
    value = generalized_jsd_loss(student, teacher, nothing)
    assert value.item() == gkd.generalized_jsd_loss(student, teacher, nothing).item() == 0
    assert torch.equal(torch.autograd.grad(value, student)[0], torch.zeros_like(student))
    with pytest.raises(ValueError, match="reduction must be one of batchmean, sum, mean; got 'none'"):
        generalized_jsd_loss(student, teacher, reduction="none")
    with pytest.raises(ValueError, match="beta must be between 0 and 1"):
        generalized_jsd_loss(student, teacher, beta=1.5)


def test_memory(gkd):
    """The logits of one side take 7 MiB."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 64, 30_000, generator=generator) for _ in range(2))
    peaks = []
    for function in (gkd.generalized_jsd_loss, generalized_jsd_loss):
        with torch.no_grad(), LiveBytes() as memory:
            function(student, teacher)
        peaks.append(memory.peak)
    assert peaks[1] < peaks[0] / 2


def test_a_step_of_the_trainers_loss(gkd):
    """``compute_loss`` of TRL, with its shift and its masks, around either loss."""

    class Fused(gkd):
        generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    model, *_ = tiny_causal_lm("llama", num_hidden_layers=2, initializer_range=0.3)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, VOCABULARY, (2, 9), generator=generator)
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    labels = input_ids.masked_fill(torch.arange(9) < 4, -100)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    for beta in (0.0, 0.3, 1.0):
        gradients = []
        for kind in (gkd, Fused):
            trainer, student = kind(), copy.deepcopy(model)
            trainer.teacher_model, *_ = tiny_causal_lm("llama", initializer_range=0.3)
            trainer.beta = beta
            loss = trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(10))
            loss.backward()
            gradients.append((loss.item(), torch.cat([one.grad.flatten() for one in student.parameters()])))
        assert gradients[1][0] == pytest.approx(gradients[0][0], rel=2e-6)
        assert (gradients[1][1] - gradients[0][1]).norm() < 2e-6 * gradients[0][1].norm()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_whole_trainer(beta, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    datasets = pytest.importorskip("datasets", reason="GKDTrainer needs datasets")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Fused(GKDTrainer):
        generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    tokenizer = tiny_tokenizer()
    texts = (
        "the function",
        "the keyword",
        "a module of the class",
        "in the module the keyword",
        "no",
        "of",
        "a",
        "b c",
    )
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1] * 2}] for text in texts]
    data = datasets.Dataset.from_list([{"messages": row} for row in rows])
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 128}
    results = []
    for kind in (GKDTrainer, Fused):
        student, *_ = tiny_causal_lm("llama", num_hidden_layers=2, initializer_range=0.3, **sizes)
        teacher, *_ = tiny_causal_lm("llama", initializer_range=0.3, **sizes)
        arguments = GKDConfig(
            str(tmp_path),
            lmbda=0.5,
            beta=beta,
            max_steps=3,
            max_new_tokens=5,
            max_length=96,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = kind(student, teacher, arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        results.append((losses, torch.cat([one.detach().flatten() for one in student.parameters()])))
    assert len(results[0][0]) == 3
    assert min(results[0][0]) > 0.05
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def chunked():
    """The loss function of DistillationTrainer, as TRL wrote it, over TRL's own chunked divergence."""
    pytest.importorskip("trl")
    # The chunked divergence imports one function of the Trainers' module, which needs packages that are not installed.
    utils = types.ModuleType("trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *arguments: contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "trl.trainer.utils", utils)
        patch.setitem(sys.modules, "trl.trainer", types.ModuleType("trl.trainer"))
        patch.delitem(sys.modules, "trl.kernels.chunked_divergence", raising=False)
        divergence = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    source = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "trainer" / "distillation_trainer.py"
    (function,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "_chunked_divergence_loss"
    )
    namespace = {
        "torch": torch,
        "ChunkedDivergenceFunction": divergence,
        "_use_triton": lambda device: False,
    }
    exec(compile(ast.Module([function], []), str(source), "exec"), namespace)
    return namespace["_chunked_divergence_loss"]


def hidden_states_and_heads(with_bias):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = [normal(2, 5, 8), 2 * normal(2, 5, 12), normal(41, 8), normal(41, 12)]
    biases = [normal(41), normal(41)] if with_bias else [None, None]
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    return tensors, biases, mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.7, "num_items_in_batch": torch.tensor(11)},
        {"student_logit_scale": 0.3, "teacher_final_logit_softcapping": 2.0, "num_items_in_batch": 3},
        {"student_final_logit_softcapping": 3.0, "teacher_logit_scale": 0.5},
    ],
)
@pytest.mark.parametrize("beta", BETAS)
def test_the_distillation_trainers_loss(chunked, beta, options):
    for with_bias in (False, True):
        tensors, biases, mask = hidden_states_and_heads(with_bias)
        named = options | dict(zip(("student_lm_head_bias", "teacher_lm_head_bias"), biases, strict=True))
        found = []
        for function in (chunked, chunked_divergence_loss):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            loss, entropy, count = function(*leaves, mask, beta, **named)
            loss.backward()
            found.append((loss.detach(), entropy, count, leaves[0].grad, leaves[2].grad))
        for expected, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_nothing_counted_is_zero_with_a_graph():
    (student, teacher, *weights), _, mask = hidden_states_and_heads(False)
    student.requires_grad_()
    loss, entropy, count = chunked_divergence_loss(student, teacher, *weights, torch.zeros_like(mask), 0.5)
    loss.backward()
    assert (loss.item(), entropy.item(), count.item()) == (0.0, 0.0, 0)
    assert student.grad.abs().max() == 0
