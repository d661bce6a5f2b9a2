"""What a student was called with, its labels, and a loss over nothing."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn

from sgfast.examples.distillation import IGNORED
from sgfast.huggingface import distillation_compute_loss
from sgfast.loss import DivergenceLoss
from tests.huggingface.test_distillation_compute_loss import examples, models, trainer
from tests.tiny_models import VOCABULARY

LOSS = DivergenceLoss("forward_kl", temperature=2.0, hard_label_weight=0.25)


def made(loss_class: type, settings: dict, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return loss_class(loss_class.config_class(**settings)).eval()


ENCODER_DECODERS = {
    "t5": (
        transformers.T5ForConditionalGeneration,
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "initializer_factor": 3.0},
    ),
    "bart": (
        transformers.BartForConditionalGeneration,
        {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.5}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        | {"max_position_embeddings": 64},
    ),
}
CLASSIFIER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 3,
    "initializer_range": 0.5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def plain_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> float:
    """0.75·KL at temperature 2 + 0.25·CE over the labels that count, in float64."""
    counted = labels != IGNORED
    logits = student_logits[counted].detach().double()
    q = (teacher_logits[counted].detach().double() / 2).softmax(-1)
    soft = (q * (q.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
    return (0.75 * soft + 0.25 * nn.functional.cross_entropy(logits, labels[counted])).item()


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders(family, tmp_path):
    student, teacher = (made(*ENCODER_DECODERS[family], seed) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"labels of the encoder-decoder .* are not shifted: pass shift_labels=False"):
        distillation_compute_loss(student, teacher, LOSS)
    compute_loss = distillation_compute_loss(student, teacher, LOSS, shift_labels=False)
    labels = torch.randint(2, VOCABULARY, (4, 5))
    labels[1, 3:] = IGNORED
    batch = {"input_ids": torch.randint(2, VOCABULARY, (4, 7))}
    decoder = {"decoder_input_ids": student.prepare_decoder_input_ids_from_labels(labels=labels)}
    expected = plain_loss(
        student(**batch, **decoder).logits, teacher(**batch, **decoder, use_cache=False).logits, labels
    )
    assert compute_loss(student(**batch, **decoder), labels).item() == pytest.approx(expected, rel=1e-5)
    # Labels in the call itself: both models make their decoder's inputs of them.
    assert compute_loss(student(**batch, labels=labels), labels).item() == pytest.approx(expected, rel=1e-5)
    value = compute_loss(student(**batch, **decoder, return_dict=False), labels)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    training = trainer(student.eval(), compute_loss, tmp_path, per_device_train_batch_size=4, learning_rate=0.0)
    rows = {**batch, **decoder, "labels": labels}
    training.train_dataset = [{name: values[row] for name, values in rows.items()} for row in range(4)]
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        for module in student.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    assert training.train().training_loss == pytest.approx(expected, rel=1e-5)


def test_an_encoder_decoder_without_decoder_inputs():
    """Bart shifts the encoder's tokens where it has no others: the Trainer has taken the labels away."""
    student, teacher = (made(*ENCODER_DECODERS["bart"], seed) for seed in (0, 1))
    compute_loss = distillation_compute_loss(student, teacher, LOSS, shift_labels=False)
    input_ids = torch.randint(2, VOCABULARY, (4, 7))
    with pytest.raises(ValueError, match=r"needs decoder_input_ids.*DataCollatorForSeq2Seq"):
        compute_loss(student(input_ids=input_ids), input_ids)


ALIGNED = {
    transformers.BertForSequenceClassification: (8,),
    transformers.BertForTokenClassification: (8, 12),
    transformers.BertForMaskedLM: (8, 12),
}


@pytest.mark.parametrize("kind", ALIGNED)
def test_labels_that_are_aligned_with_logits(kind, tmp_path):
    student, teacher = (made(kind, CLASSIFIER, seed) for seed in (0, 1))
    wrapped = with_lora_in_attention(copy.deepcopy(student))
    for model in (student, wrapped):
        with pytest.raises(ValueError, match=f"labels of {kind.__name__} are not shifted: pass shift_labels=False"):
            distillation_compute_loss(model, teacher, LOSS)
    rows = examples()
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    labels = torch.randint(3, ALIGNED[kind])
    labels[0] = IGNORED
    expected = plain_loss(student(**batch).logits, teacher(**batch).logits, labels)
    compute_loss = distillation_compute_loss(student, teacher, LOSS, shift_labels=False)
    training = trainer(student, compute_loss, tmp_path)
    training.train_dataset = [row | {"labels": label} for row, label in zip(rows, labels, strict=True)]
    assert training.train().training_loss == pytest.approx(expected, rel=1e-5)


def with_lora_in_attention(model: nn.Module) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))


def test_labels_without_a_sequence_dimension_are_not_shifted():
    """The class does not say so here; the shift would go across the batch."""
    student, teacher, features = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def outputs(model):
        return {"logits": model(features)}

    compute_loss = distillation_compute_loss(student, lambda _: outputs(teacher), LOSS)
    with pytest.raises(ValueError, match=r"must have a sequence dimension.*got the shape \(6,\).*shift_labels=False"):
        compute_loss(outputs(student), labels)
    aligned = distillation_compute_loss(student, lambda _: outputs(teacher), LOSS, shift_labels=False)
    expected = plain_loss(student(features), teacher(features), labels)
    assert aligned(outputs(student), labels).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(TypeError, match="shift_labels must be a bool; got str"):
        distillation_compute_loss(student, teacher, LOSS, shift_labels="no")


@pytest.mark.parametrize("kept", [4, torch.arange(3, 7)])
def test_logits_to_keep_are_the_teachers_too(kept):
    student, teacher = models()
    input_ids = torch.randint(1, VOCABULARY, (2, 9))
    positions = torch.arange(9)[-kept:] if isinstance(kept, int) else kept
    labels = input_ids[:, positions]
    logits = [model(input_ids).logits[:, positions][:, :-1] for model in (student, teacher)]
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    value = compute_loss(student(input_ids, logits_to_keep=kept), labels)
    assert value.item() == pytest.approx(plain_loss(*logits, labels[:, 1:]), rel=1e-5)


@pytest.mark.parametrize("by_position", [False, True])
def test_a_student_that_continues_a_cache(by_position):
    """The teacher would see the new tokens alone."""
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    input_ids = torch.randint(1, VOCABULARY, (2, 9))
    cache = student(input_ids[:, :4], use_cache=True).past_key_values
    outputs = (
        student(input_ids[:, 4:], None, None, cache)
        if by_position
        else student(input_ids[:, 4:], past_key_values=cache)
    )
    with pytest.raises(ValueError, match="must be called without a cache; got past_key_values"):
        compute_loss(outputs, input_ids[:, 4:])


def test_a_state_space_student():
    settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    student, teacher = (made(transformers.MambaForCausalLM, settings, seed) for seed in (0, 1))
    input_ids = torch.randint(1, VOCABULARY, (2, 9))
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    logits = [model(input_ids, use_cache=False).logits[:, :-1] for model in (student, teacher)]
    outputs = student(input_ids, use_cache=True)
    value = compute_loss(outputs, input_ids)
    assert value.item() == pytest.approx(plain_loss(*logits, input_ids[:, 1:]), rel=1e-5)
    outputs = student(input_ids[:, :1], cache_params=outputs.cache_params, use_cache=False)
    with pytest.raises(ValueError, match="without a cache; got cache_params"):
        compute_loss(outputs, input_ids[:, :1])


def without_labels(rows: list[dict[str, Tensor]], count: int | None = None) -> list[dict[str, Tensor]]:
    return [row | {"labels": torch.full_like(row["labels"], IGNORED)} for row in rows[:count]] + (
        [] if count is None else rows[count:]
    )


def warned_over_nothing(training, method="train") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(training, method)()
    return [str(warning.message) for warning in caught if "over nothing" in str(warning.message)]


@pytest.mark.parametrize("batch_size", [8, 1])
def test_a_loss_over_nothing_warns_once(batch_size, tmp_path):
    student, teacher = models()
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 8 // batch_size,
    }
    training = trainer(student, distillation_compute_loss(student, teacher, LOSS), tmp_path, **settings)
    training.train_dataset = without_labels(examples())
    messages = warned_over_nothing(training)
    assert len(messages) == 1
    assert "every label of the first training step is -100" in messages[0]
    assert not warned_over_nothing(training)
    training = trainer(student, distillation_compute_loss(student, teacher, LOSS), tmp_path, **settings)
    training.eval_dataset = without_labels(examples())
    assert len(warned_over_nothing(training, "evaluate")) == 1


def test_a_micro_batch_without_labels_is_no_step_over_nothing(tmp_path):
    student, teacher = models()
    settings = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    training = trainer(student, distillation_compute_loss(student, teacher, LOSS), tmp_path, **settings)
    training.train_dataset = without_labels(examples(), 3)
    training._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(training.train_dataset)
    assert not warned_over_nothing(training)


def test_the_first_token_alone_is_nothing_once_labels_are_shifted():
    student, teacher = models()
    compute_loss = distillation_compute_loss(student, teacher, LOSS)
    input_ids = torch.randint(1, VOCABULARY, (2, 5))
    labels = input_ids.masked_fill(torch.arange(5) > 0, IGNORED)
    with pytest.warns(UserWarning, match="distillation over nothing"):
        assert compute_loss(student(input_ids), labels).item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compute_loss(student(input_ids), labels)
    fresh = distillation_compute_loss(student, teacher, LOSS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh(student(input_ids), input_ids)
        fresh(student(input_ids), labels)


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts reads of a value, each of which makes the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("with_graph", [True, False])
@pytest.mark.parametrize("counts", [True, False])
def test_no_value_is_read_after_the_first_step(counts, with_graph):
    student, teacher, features = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(2, 6, 4)
    labels = torch.full((2, 6), 1 if counts else IGNORED)
    compute_loss = distillation_compute_loss(student, lambda x: {"logits": teacher(x)}, LOSS)
    reads = []
    with torch.set_grad_enabled(with_graph), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            with Reads() as counted:
                compute_loss({"logits": student(features)}, labels, num_items_in_batch=torch.tensor(10))
            reads.append(counted.count)
    assert reads[0] > 0
    assert reads[1:] == [0, 0]
