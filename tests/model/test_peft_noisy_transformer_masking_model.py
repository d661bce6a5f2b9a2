"""Teacher and student over one base: adapters off and on, one noise layer, one noise draw."""

import copy

import peft
import pytest
import torch
from torch import nn

from sgfast.loss import distillation_loss_factory
from sgfast.model import NoiseMaskedNoisyTransformerModel, PeftNoiseMaskedNoisyTransformerModel
from sgfast.model.adapters import with_adapters
from sgfast.noise_layer import TransformerCloak
from tests.model.test_noisy_transformer_masking_model import WEIGHTS
from tests.tiny_models import FAMILIES, LAYERS, WIDTH, tiny_causal_lm, with_lora


def halves(output):
    return output.base_model_output.clean_logits, output.base_model_output.noisy_logits


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_runs_without_adapters_and_student_with_them(family, make_pair, tokens):
    untouched, _, _ = tiny_causal_lm(family)
    teacher, student = make_pair(family)
    positions = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    arguments = {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "position_ids": positions,
    }
    real = tokens["attention_mask"] != 0
    teacher_clean, _ = halves(teacher.eval()(**tokens))
    student_clean, _ = halves(student.eval()(**tokens))
    with torch.no_grad():
        torch.testing.assert_close(teacher_clean[real], untouched(**arguments).logits[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            student_clean[real], student.base_model(**arguments).logits[real], rtol=1e-5, atol=1e-5
        )
    assert (student_clean[real] - teacher_clean[real]).abs().max() > 1e-3


def test_only_adapters_and_noise_layer_learn(make_pair, tokens):
    teacher, student = make_pair()
    consumer = student.attach(logits=True, clean_graph=True)
    student.train()
    student(**tokens)
    clean, noisy = consumer.take("the test").halves(None)
    (clean.square().mean() + noisy.square().mean()).backward()
    learned = {name for name, parameter in student.base_model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in student.base_model.named_parameters() if "lora_" in name}
    assert any(parameter.grad is not None for parameter in teacher.noise_layer.parameters())


@pytest.mark.parametrize("order", ["teacher first", "student first"])
def test_a_teacher_made_after_the_adapters_does_not_freeze_them(order, make_pair, make_noisy_model):
    teacher, student = make_pair()
    if order == "student first":
        NoiseMaskedNoisyTransformerModel(
            None, student.causal_lm, target_layer=teacher.target_layer, noise_layer=teacher.noise_layer
        )
    trainable = {name for name, parameter in student.base_model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in student.base_model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("clean_pass", ["separate", "joint"])
def test_the_clean_graph_reaches_only_who_asked_for_it(clean_pass, make_pair, tokens):
    _, student = make_pair(clean_pass=clean_pass)
    asked, plain = student.attach(layers=frozenset({1}), clean_graph=True), student.attach(layers=frozenset({1}))
    student.train()
    student(**tokens)
    with_graph, without = (consumer.take("the test").halves(1)[0] for consumer in (asked, plain))
    assert with_graph.requires_grad
    assert not without.requires_grad
    torch.testing.assert_close(with_graph.detach(), without, rtol=0, atol=0)


def test_separate_and_joint_passes_give_the_same_gradients_through_both_halves(make_pair, tokens):
    gradients = []
    for clean_pass in ("separate", "joint"):
        _, student = make_pair(clean_pass=clean_pass)
        consumer = student.attach(layers=frozenset({2}), clean_graph=True)
        student.train()
        student.noise_layer.forward_count.zero_()
        student(**tokens)
        clean, noisy = consumer.take("the test").halves(2)
        real = (tokens["attention_mask"] != 0)[..., None]
        ((clean - 2 * noisy).square() * real).mean().backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("first", ["teacher", "student"])
@pytest.mark.parametrize("seed", [None, 7])
def test_teacher_and_student_see_one_draw_per_batch(first, seed, make_pair, tokens):
    pair = make_pair(seed=seed)
    models = pair if first == "teacher" else pair[::-1]
    seen = []
    for _ in range(2):  # the same tensors again: the next step draws anew
        outputs = [model.train()(**tokens) for model in models]
        assert outputs[1].transformed is outputs[0].transformed
        seen.append(outputs[0].transformed)
    selected = tokens["noise_mask"] & (tokens["attention_mask"] != 0)
    assert ((seen[0] - seen[1]).abs().amax(-1) > 0)[selected].all()


def test_other_tensors_are_another_draw(make_pair, tokens):
    teacher, student = make_pair()
    first = teacher.train()(**tokens).transformed
    copied = student.train()(**{name: tensor.clone() for name, tensor in tokens.items()}).transformed
    assert not torch.equal(first, copied)
    first = teacher(**tokens).transformed
    tokens["input_ids"][:, 1] += 1  # the same tensor, changed
    changed = student(**tokens).transformed
    assert changed is not first
    torch.testing.assert_close(
        changed[:, 1][~tokens["noise_mask"][:, 1]],
        student.causal_lm.get_input_embeddings()(tokens["input_ids"][:, 1])[~tokens["noise_mask"][:, 1]],
    )


def test_disabled_noise_is_never_borrowed(make_pair, tokens):
    teacher, student = make_pair()
    teacher.train()(**tokens)
    with student.noise_disabled():
        output = student(**tokens)
    assert output.transformed is None
    torch.testing.assert_close(*halves(output), rtol=1e-5, atol=1e-6)


def test_one_backward_reaches_the_noise_layer_through_both_models(make_pair, tokens):
    """The gradient of a sum is the sum of the gradients under the same seed."""
    teacher, student = make_pair(seed=7)
    losses = [distillation_loss_factory(model, 2, 0.4, **WEIGHTS)[0] for model in (teacher, student)]

    def gradients(models):
        teacher.noise_layer.zero_grad()
        teacher.noise_layer.forward_count.zero_()
        for model in models:
            model.train()(**tokens)
        sum(losses[(teacher, student).index(model)](tokens["loss_mask"]) for model in models).backward()
        return {n: p.grad.clone() for n, p in teacher.noise_layer.named_parameters() if p.grad is not None}

    alone = [gradients([model]) for model in (teacher, student)]
    together = gradients([teacher, student])
    expected = {name: alone[0][name] + alone[1][name] for name in together}
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layer", [2, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family, layer, make_noisy_model, tokens):
    gradients = []
    for checkpointing in (False, True):
        noisy_model = make_noisy_model(family)
        loss = distillation_loss_factory(noisy_model, layer, 0.4, **WEIGHTS)[0]
        if checkpointing:
            noisy_model.gradient_checkpointing_enable({"use_reentrant": False})
        noisy_model.train()(**tokens)
        loss(tokens["loss_mask"]).backward()
        assert not any(module.training for module in noisy_model.base_model.modules())
        gradients.append({n: p.grad for n, p in noisy_model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_checkpointing_keeps_only_the_layers_inputs(make_noisy_model, tokens):
    kept = []
    for checkpointing in (False, True):
        noisy_model = make_noisy_model()
        consumer = noisy_model.attach(layers=frozenset({LAYERS - 1}))
        if checkpointing:
            noisy_model.gradient_checkpointing_enable()
        parameters = {p.data_ptr() for p in noisy_model.parameters()}
        kept.append(0)

        def count(tensor, parameters=parameters):
            kept[-1] += tensor.nbytes * (tensor.data_ptr() not in parameters)
            return tensor

        embeddings = noisy_model.base_model.get_input_embeddings()(tokens["input_ids"])
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            noisy_model.train()(**tokens)
            total = kept[-1]
            noisy_model.noise_layer(embeddings, attention_mask=tokens["attention_mask"])
        kept[-1] = total - (kept[-1] - total)  # the base model's part
        del consumer
    assert kept[1] < kept[0] / 5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_runs_under_the_adapter_state_of_the_forward(dropout, make_pair, tokens):
    """Backward finds the adapters on (they are by default), and later off, whatever each forward ran under."""
    gradients = []
    for checkpointing in (False, True):
        teacher, student = make_pair(dropout=dropout)
        losses = [distillation_loss_factory(model, 2, 0.4, **WEIGHTS)[0] for model in (teacher, student)]
        for model in (teacher, student):
            if checkpointing:
                model.gradient_checkpointing_enable()
        torch.manual_seed(11)
        for model in (teacher, student):
            model.train()(**tokens)
        total = sum(loss(tokens["loss_mask"]) for loss in losses)
        with with_adapters(student.base_model, False):
            total.backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert any("lora_" in name for name in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_adapter_dropout_follows_train_and_eval(make_pair):
    _, student = make_pair(dropout=0.3)
    dropouts = [module for name, module in student.named_modules() if "lora_dropout" in name]
    assert dropouts
    assert all(module.training for module in student.train().modules() if module in dropouts)
    assert not any(module.training for module in student.causal_lm.model.norm.modules())
    assert not any(module.training for module in student.eval().modules())


def test_generate_uses_each_models_own_adapters(make_pair, tokens):
    teacher, student = make_pair()
    untouched, _, _ = tiny_causal_lm("llama")
    prompt = tokens["input_ids"][:1]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with teacher.noise_disabled():  # the layer is shared: the student's is off too
        found = [model.generate(prompt, **options) for model in (teacher, student)]
    assert torch.equal(found[0], untouched.generate(prompt, **options))
    assert torch.equal(found[1], student.base_model.generate(input_ids=prompt, **options))
    assert not torch.equal(*found)


def test_a_deep_copy_of_the_pair_shares_as_the_pair_does(make_pair, tokens):
    teacher, student = copy.deepcopy(make_pair())
    assert teacher.noise_layer is student.noise_layer
    outputs = [model.train()(**tokens) for model in (teacher, student)]
    assert outputs[1].transformed is outputs[0].transformed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "attention"),
    # transformers has no sdpa for Gemma 2, whose scores are capped.
    [(family, name) for family in FAMILIES for name in ("sdpa", "eager") if (family, name) != ("gemma2", "sdpa")],
)
def test_attention_implementations_and_tied_embeddings(family, tied, attention, tokens):
    base_model, body, target_layer = tiny_causal_lm(family, tie_word_embeddings=tied)
    base_model.set_attn_implementation(attention)
    noisy_model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak,
        base_model,
        (-1, WIDTH),
        target_layer,
        config_path=base_model.config,
        transformer_type=body,
        rhos_init=-1.0,
        seed=7,
    )
    real = tokens["attention_mask"] != 0
    positions = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    arguments = {"attention_mask": tokens["attention_mask"], "position_ids": positions}
    output = noisy_model.eval()(**tokens)
    with torch.no_grad():
        clean = base_model(input_ids=tokens["input_ids"], **arguments).logits
        noisy = base_model(inputs_embeds=output.transformed, **arguments).logits
    torch.testing.assert_close(halves(output)[0][real], clean[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(halves(output)[1][real], noisy[real], rtol=1e-5, atol=1e-5)


def test_errors(make_pair):
    teacher, student = make_pair()
    adapted = student.base_model
    with pytest.raises(TypeError, match="PeftNoiseMaskedNoisyTransformerModel"):
        NoiseMaskedNoisyTransformerModel(None, adapted, noise_layer=teacher.noise_layer)
    with pytest.raises(TypeError, match=r"peft\.PeftModel; got LlamaForCausalLM"):
        PeftNoiseMaskedNoisyTransformerModel(None, teacher.base_model, noise_layer=teacher.noise_layer)
    prompts = peft.get_peft_model(
        tiny_causal_lm("llama")[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="prompt learning"):
        PeftNoiseMaskedNoisyTransformerModel(None, prompts, noise_layer=teacher.noise_layer)
    with pytest.raises(ValueError, match="use_reentrant"):
        teacher.gradient_checkpointing_enable({"use_reentrant": True})
    teacher.target_layer = "model.layers.1"
    with pytest.raises(ValueError, match=r"layers\.1.*cannot be checkpointed"):
        teacher.gradient_checkpointing_enable()


def test_a_draw_without_graph_is_drawn_again_under_the_same_noise(make_pair, tokens):
    teacher, student = make_pair()
    with torch.no_grad():
        first = teacher.train()(**tokens).transformed
    second = student.train()(**tokens).transformed
    assert second.requires_grad
    torch.testing.assert_close(second.detach(), first, rtol=0, atol=0)


def test_a_step_between_teacher_and_student_keeps_the_noise_only(make_pair, tokens):
    teacher, student = make_pair()
    first = teacher.train()(**tokens)
    with torch.no_grad():
        for parameter in teacher.noise_layer.parameters():
            parameter.mul_(1.5)
    second = student.train()(**tokens)
    assert not torch.equal(first.transformed, second.transformed)
    selected = tokens["noise_mask"] & (tokens["attention_mask"] != 0)
    eps = [((output.transformed - output.input - output.mean) / output.std)[selected] for output in (first, second)]
    torch.testing.assert_close(*eps, rtol=1e-3, atol=1e-3)


def test_a_student_over_another_base_shares_the_noise_only(make_pair, tokens):
    teacher, _ = make_pair()
    other = tiny_causal_lm("llama")[0]
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    student = PeftNoiseMaskedNoisyTransformerModel(
        None, with_lora(other), target_layer=teacher.target_layer, noise_layer=teacher.noise_layer
    )
    teacher.train()(**tokens)
    output = student.train()(**tokens)
    torch.testing.assert_close(output.input, other.get_input_embeddings()(tokens["input_ids"]), rtol=0, atol=0)


def test_sharing_works_under_inference_mode(make_pair, tokens):
    teacher, student = make_pair()
    with torch.inference_mode():
        inputs = {name: tensor.clone() for name, tensor in tokens.items()}
        outputs = [model.eval()(**inputs).transformed for model in (teacher, student)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"noise_layer_class": nn.Linear}, TypeError, "noise_layer_class must be a class of BaseNoiseLayer"),
        ({"noise_layer": nn.Linear(2, 2)}, TypeError, "noise_layer must be a BaseNoiseLayer; got Linear"),
        ({"target_layer": 3}, TypeError, "target_layer must be a string; got int"),
        ({"input_shape": 16}, TypeError, "input_shape"),
        ({"input_shape": ()}, ValueError, "input_shape"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    base_model, body, target_layer = tiny_causal_lm("llama")
    settings = {"noise_layer_class": TransformerCloak, "base_model": base_model, "target_layer": target_layer}
    if "noise_layer" in arguments:
        settings["noise_layer_class"] = None
    with pytest.raises(error, match=message):
        NoiseMaskedNoisyTransformerModel(
            **(settings | {"config_path": base_model.config, "transformer_type": body} | arguments)
        )
    assert base_model.get_input_embeddings().weight.requires_grad  # nothing was touched
