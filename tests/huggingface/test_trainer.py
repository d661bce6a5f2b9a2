"""SgtTrainer's steps, logs and evaluations: those of the whole batch, however it is cut."""

import copy

import pytest
import torch
import transformers

from sgfast.huggingface.trainer import SgtTrainer
from sgfast.loss.jigsaw import jigsaw_loss_factory
from sgfast.metrics import get_utility_metrics_factory
from sgfast.noise_layer import TransformerCloak
from tests.huggingface.sgt_training import (
    assert_steps_are,
    case,
    distillation,
    examples,
    gradients_of_one_batch,
    noisy_language_model,
    trainer,
    whole_batch,
)
from tests.loss.factory_cases import CASES, MASK
from tests.tiny_models import tiny_pair
from tests.tiny_tokenizer import tiny_tokenizer


def sparse_examples():
    """Two tokens count, of two sequences; one is transformed: fewer than there are micro-batches."""
    rows = examples()
    for index, row in enumerate(rows):
        row["loss_mask"] = (torch.arange(12) == 2) & (index in (2, 6))
        row["noise_mask"] = (torch.arange(12) == 1) & (index == 1)
    return rows


@pytest.mark.parametrize("rows", [examples, sparse_examples])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("distillation", {}),
        ("distillation", {"distillation_layer_index": None}),
        ("cross entropy", {}),
        ("jigsaw", {}),
        ("jigsaw", {MASK: False}),
    ],
)
def test_every_accumulation_takes_the_step_of_the_whole_batch(name, changed, rows, tmp_path):
    noisy_model, loss, also = case(name, **changed)
    components, gradients = gradients_of_one_batch(noisy_model, loss, rows(), **also)
    before = copy.deepcopy(noisy_model.state_dict())
    for batch_size in (8, 2, 1):
        noisy_model.load_state_dict(before)
        training = trainer(
            noisy_model,
            loss,
            tmp_path,
            train_dataset=rows(),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            **also,
        )
        training.train()
        assert_steps_are(noisy_model, before, gradients)
        hyperparameters, record, _ = training.state.log_history
        assert record["loss"] == pytest.approx(components["total"], rel=1e-6)
        logged = {key: record[key] for key in components if key != "total"}
        assert logged == pytest.approx({key: components[key] for key in logged}, rel=1e-6)
        arguments = CASES[name][1] | changed
        reported = {f"hyperparameters/{key}": value for key, value in arguments.items() if key != MASK}
        assert reported.items() <= hyperparameters.items()


@pytest.mark.parametrize("name", ["mutual information", "mutual information, cross entropy"])
def test_mutual_information_is_averaged_over_micro_batches_by_their_tokens(name, tmp_path):
    noisy_model, loss, _ = case(name)
    rows = examples()
    batches = [rows[start : start + 2] for start in range(0, 8, 2)]
    weights = [
        (whole_batch(batch)["noise_mask"] & (whole_batch(batch)["attention_mask"] != 0)).sum() for batch in batches
    ]
    whole, _ = gradients_of_one_batch(noisy_model, loss, rows)
    parts = [gradients_of_one_batch(noisy_model, loss, batch) for batch in batches]
    training = trainer(
        noisy_model, loss, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **IN_ORDER
    )
    training._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    training.train()
    record = next(record for record in training.state.log_history if "loss" in record)
    information = sum(weight * part["mutual_information"] for weight, (part, _) in zip(weights, parts, strict=True))
    assert record["mutual_information"] == pytest.approx((information / sum(weights)).item(), rel=1e-6)
    assert record["mutual_information"] != pytest.approx(whole["mutual_information"], rel=1e-2)
    for component in whole.keys() - {"total", "mutual_information"}:
        assert record[component] == pytest.approx(whole[component], rel=1e-6)


IN_ORDER = {"accelerator_config": {"use_seedable_sampler": False}}


def test_components_are_means_over_the_steps_since_the_last_log(tmp_path):
    """Two windows of an epoch, the second of one micro-batch only; parameters that stay as they are."""
    noisy_model = noisy_language_model()
    loss = distillation(noisy_model)
    windows = [gradients_of_one_batch(noisy_model, loss, rows)[0] for rows in (examples()[:6], examples()[6:])]
    training = trainer(
        noisy_model,
        loss,
        tmp_path,
        rate=0.0,
        max_steps=2,
        logging_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **IN_ORDER,
    )
    training._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(examples())
    training.train()
    record = next(record for record in training.state.log_history if "loss" in record)
    for name in windows[0].keys() - {"total"}:
        assert record[name] == pytest.approx((windows[0][name] + windows[1][name]) / 2, rel=1e-6), name
    assert record["loss"] == pytest.approx((windows[0]["total"] + windows[1]["total"]) / 2, rel=1e-6)


def test_a_second_training_logs_its_own_steps_only(tmp_path):
    """The first one stops in the middle of a step, with components that were not logged."""
    noisy_model = noisy_language_model()
    loss = distillation(noisy_model)
    training = trainer(
        noisy_model, loss, tmp_path, rate=0.0, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )

    class Interrupt(transformers.TrainerCallback):
        def on_substep_end(self, *_, **__):
            raise KeyboardInterrupt

    training.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        training.train()
    training.remove_callback(Interrupt)
    training.train()
    components, _ = gradients_of_one_batch(noisy_model, loss)
    record = next(record for record in training.state.log_history if "loss" in record)
    for name in components.keys() - {"total"}:
        assert record[name] == pytest.approx(components[name], rel=1e-6), name


@pytest.mark.parametrize("batch_size", [5, 1])
def test_evaluation_measures_utility_and_loss(batch_size, tmp_path):
    noisy_model = noisy_language_model()
    loss = distillation(noisy_model)
    evaluating = trainer(noisy_model, loss, tmp_path, per_device_eval_batch_size=batch_size)
    metrics = evaluating.evaluate()
    expected_utility = get_utility_metrics_factory(noisy_model)
    with torch.no_grad():
        noisy_model.eval()(**whole_batch(examples()[:5]))
    for name, value in expected_utility().items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5), name
    losses = []
    for start in range(0, 5, batch_size):
        batch = whole_batch(examples()[start : start + batch_size])
        with torch.no_grad():
            noisy_model(**batch)
            losses.append(loss[0](batch["loss_mask"]).item())
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    weighted = 0.6 * (
        2.0 * metrics["eval_distillation_layer_cosine_distance"] + 0.3 * metrics["eval_distillation_layer_l2_distance"]
    ) + 0.4 * (
        0.1 * metrics["eval_std_log_ratio"]
        + 0.5 * metrics["eval_input_embedding_similarity"]
        + 0.2 * metrics["eval_inverse_l2_power_law_catalyst"]
    )
    assert weighted == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_a_student_is_measured_beside_its_teacher(tmp_path):
    student, loss, also = case("jigsaw")
    metrics = trainer(student, loss, tmp_path, **also).evaluate()
    batch = whole_batch(examples()[:5])
    attended = batch["attention_mask"] != 0
    with torch.no_grad():
        noisy = student.eval()(**batch).base_model_output.noisy_logits.log_softmax(-1)
        clean = also["teacher"].eval()(**batch).base_model_output.clean_logits.log_softmax(-1)
        loss_of_batch = loss[0](batch["loss_mask"]).item()
    distances = torch.where(attended, 0.5 * (noisy.exp() - clean.exp()).abs().sum(-1), 0)
    expected = (distances.sum(-1) / attended.sum(-1)).mean().item()
    assert metrics["eval_next_token_utility/total_variation"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx(loss_of_batch, rel=1e-6)


def test_a_teacher_with_a_base_of_its_own_is_put_where_the_student_is(tmp_path, monkeypatch):
    teacher, student = tiny_pair(two_bases=True)
    loss = jigsaw_loss_factory(teacher, student, **CASES["jigsaw"][1])
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert arguments.device.type == "cpu"  # sets up what Trainer reads besides
    monkeypatch.setattr(transformers.TrainingArguments, "device", torch.device("meta"))
    SgtTrainer(student, arguments, loss=loss, teacher=teacher)
    for model in (student, teacher):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("seed", [None, 7])
def test_evaluations_draw_the_same_noise_and_leave_training_its_own(seed, tmp_path):
    results = []
    for strategy in ("no", "steps"):
        noisy_model = noisy_language_model(TransformerCloak, torch.float32, seed=seed)
        training = trainer(
            noisy_model,
            distillation(noisy_model),
            tmp_path,
            rate=0.1,
            max_steps=3,
            per_device_train_batch_size=2,
            eval_strategy=strategy,
            eval_steps=1,
        )
        training.train()
        results.append(copy.deepcopy(noisy_model.noise_layer.state_dict()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    first, second = training.evaluate(), training.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert training.model.train()(**whole_batch()).base_model_output.logits is None  # evaluation left nothing attached


def test_prediction_gives_the_logits_of_the_transformed(tmp_path):
    rows = [row | {"labels": row["input_ids"]} for row in examples()[:3]]
    noisy_model = noisy_language_model()
    seen = {}

    def compute_metrics(prediction):
        seen["labels"] = prediction.label_ids
        return {"largest": prediction.predictions.max()}

    predicting = trainer(noisy_model, distillation(noisy_model), tmp_path)
    predicting.compute_metrics = compute_metrics
    metrics = predicting.evaluate(rows)
    prediction = predicting.predict(rows)
    with torch.no_grad():
        noisy = noisy_model(**whole_batch(rows)).base_model_output.noisy_logits
    assert torch.equal(torch.from_numpy(prediction.predictions), noisy)
    assert (seen["labels"] == whole_batch(rows)["labels"].numpy()).all()
    assert metrics["eval_largest"] == noisy.max().item()
    assert "test_next_token_utility/jefferys" in prediction.metrics


def test_checkpointing_and_autocast_flags(tmp_path):
    steps = {}
    for name, settings in {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
    }.items():
        noisy_model = noisy_language_model(dtype=torch.float32)
        before = copy.deepcopy(noisy_model.state_dict())
        dtypes = set()
        noisy_model.base_model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda _module, _inputs, output, dtypes=dtypes: dtypes.add(output.dtype)
        )
        training = trainer(noisy_model, distillation(noisy_model), tmp_path, **settings)
        training.train()
        assert noisy_model.is_gradient_checkpointing == (name == "checkpointed")
        assert dtypes == {torch.bfloat16 if name == "bf16" else torch.float32}
        after = noisy_model.noise_layer.state_dict()
        steps[name] = torch.cat([(after[key] - before[f"noise_layer.{key}"]).flatten().double() for key in after])
    assert torch.equal(steps["plain"], steps["checkpointed"])
    assert (steps["bf16"] - steps["plain"]).norm() < 0.05 * steps["plain"].norm()


def test_a_tokenizer_pads_and_masks_default_to_every_attended_token(tmp_path):
    rows = [
        {"input_ids": row["input_ids"][:length].tolist()} for row, length in zip(examples(), (12, 3, 7), strict=False)
    ]
    noisy_model = noisy_language_model()
    tokenizer = tiny_tokenizer()
    training = SgtTrainer(
        noisy_model,
        transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
        loss=distillation(noisy_model),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    batch = next(iter(training.get_train_dataloader()))
    assert batch["attention_mask"].sum(-1).sort().values.tolist() == [3, 7, 12]
    assert torch.equal(batch["noise_mask"], batch["attention_mask"] != 0)
    window = training.get_batch_samples(iter([batch]), 1, torch.device("cpu"))[1]
    assert window.token_counts.tolist() == [22, 22, 22]
    del batch["loss_mask"], batch["noise_mask"]
    window = training.get_batch_samples(iter([batch]), 1, torch.device("cpu"))[1]
    assert window.token_counts.tolist() == [22, 22, 22]
    noisy_model.train()
    without_masks = training.compute_loss(noisy_model, batch).item()
    loss_function, _, _ = distillation(noisy_model)
    noisy_model(**batch)
    assert without_masks == loss_function(batch["attention_mask"] != 0).item()


def test_weight_decay_leaves_the_heads_alone(tmp_path):
    noisy_model = noisy_language_model()
    training = SgtTrainer(
        noisy_model,
        transformers.TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[]),
        loss=distillation(noisy_model),
    )
    decayed = {
        id(p) for group in training.create_optimizer().param_groups if group["weight_decay"] for p in group["params"]
    }
    for name, parameter in noisy_model.noise_layer.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() > 1 and ".head." not in name), name


def test_errors():
    noisy_model = noisy_language_model()
    loss = distillation(noisy_model)
    with pytest.raises(TypeError, match="model must be a NoiseMaskedNoisyTransformerModel; got LlamaForCausalLM"):
        SgtTrainer(noisy_model.base_model, loss=loss)
    with pytest.raises(TypeError, match="loss must be the three functions that a loss factory returned; got function"):
        SgtTrainer(noisy_model, loss=loss[0])
    with pytest.raises(TypeError, match="teacher must be a NoiseMaskedNoisyTransformerModel; got str"):
        SgtTrainer(noisy_model, loss=loss, teacher="teacher")
    with pytest.raises(ValueError, match="teacher must share the model's noise layer"):
        SgtTrainer(noisy_model, loss=loss, teacher=noisy_language_model())
    with pytest.raises(TypeError, match="SgtTrainer takes no compute_loss_func"):
        SgtTrainer(noisy_model, loss=loss, compute_loss_func=print)
    for name in ("label_smoothing_factor", "neftune_noise_alpha"):
        with pytest.raises(ValueError, match=f"SgtTrainer takes no {name}"):
            SgtTrainer(noisy_model, transformers.TrainingArguments(use_cpu=True, **{name: 0.1}), loss=loss)
    with pytest.raises(ValueError, match="every_n_layers must be 1 and other options must be false; got 2"):
        noisy_model.activation_checkpointing_enable(every_n_layers=2)
