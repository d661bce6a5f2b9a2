"""The noisy model on tiny models of every supported family."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from sgfast.loss import distillation_loss_factory
from sgfast.model import NoiseMaskedNoisyTransformerModel
from sgfast.model.decoder import decoder_layers
from sgfast.noise_layer import TransformerCloak
from tests.tiny_models import FAMILIES, LAYERS, WIDTH, tiny_causal_lm

WEIGHTS = {
    "std_log_ratio_loss_weight": 0.1,
    "input_embedding_similarity_loss_weight": 0.5,
    "distillation_layer_cosine_distance_loss_weight": 2.0,
    "distillation_layer_l2_distance_loss_weight": 0.3,
    "inverse_l2_power_law_catalyst_loss_weight": 0.2,
}


def loss_and_gradients(noisy_model, tokens, layer=1):
    loss_function, get_losses, _ = distillation_loss_factory(noisy_model, layer, 0.4, **WEIGHTS)
    noisy_model.train()
    noisy_model.noise_layer.forward_count.zero_()
    noisy_model(**tokens)
    loss = loss_function(tokens["loss_mask"])
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in noisy_model.noise_layer.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients, get_losses()


def count_layer_runs(base_model):
    counts = [0] * LAYERS
    for index, layer in enumerate(decoder_layers(base_model)):

        def count(*_, index=index):
            counts[index] += 1

        layer.register_forward_hook(count)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_half_is_the_base_model_and_both_passes_agree(family, make_noisy_model, tokens):
    separate, joint = make_noisy_model(family), make_noisy_model(family, clean_pass="joint")
    clean = separate.base_model(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        position_ids=(tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0),
    ).logits
    outputs = [model.eval()(**tokens).base_model_output for model in (separate, joint)]
    real = tokens["attention_mask"] != 0
    for output in outputs:
        assert output.logits.shape[0] == 2 * len(clean)
        torch.testing.assert_close(output.clean_logits[real], clean[real], rtol=1e-5, atol=1e-5)
        assert (output.noisy_logits[real] - clean[real]).abs().max() > 1e-3
    torch.testing.assert_close(outputs[0].noisy_logits[real], outputs[1].noisy_logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [1, LAYERS - 1, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_separate_and_joint_clean_pass_give_the_same_loss_and_gradients(family, layer, make_noisy_model, tokens):
    first = loss_and_gradients(make_noisy_model(family), tokens, layer)
    second = loss_and_gradients(make_noisy_model(family, clean_pass="joint"), tokens, layer)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert len(first[1]) > 10
    assert all(gradient.isfinite().all() for gradient in first[1].values())


@pytest.mark.parametrize("clean_pass", ["separate", "joint"])
def test_base_parameters_never_get_gradients(clean_pass, make_noisy_model, tokens):
    noisy_model = make_noisy_model(clean_pass=clean_pass)
    before = copy.deepcopy(noisy_model.base_model.state_dict())
    loss_and_gradients(noisy_model, tokens)
    assert all(parameter.grad is None for parameter in noisy_model.base_model.parameters())
    torch.testing.assert_close(dict(noisy_model.base_model.state_dict()), dict(before), rtol=0, atol=0)
    assert not noisy_model.base_model.training
    assert noisy_model.noise_layer.training


@pytest.mark.parametrize("family", FAMILIES)
def test_training_runs_exactly_the_layers_the_loss_needs(family, make_noisy_model, tokens):
    noisy_model = make_noisy_model(family)
    counts = count_layer_runs(noisy_model.base_model)
    loss = distillation_loss_factory(noisy_model, 1, 0.4, **WEIGHTS)
    noisy_model.train()
    assert noisy_model(**tokens).base_model_output.logits is None
    assert counts == [2, 2, 0, 0]
    noisy_model.eval()
    assert noisy_model(**tokens).base_model_output.logits is not None
    assert counts == [4, 4, 2, 2]
    noisy_model.train()
    consumer = noisy_model.attach(logits=True)
    noisy_model(**tokens)
    assert counts == [6, 6, 4, 4]
    del consumer, loss
    assert noisy_model(**tokens).base_model_output.logits is not None  # nothing attached: run whole


@pytest.mark.parametrize("family", FAMILIES)
def test_early_exit_sees_what_the_whole_model_computes(family, make_noisy_model, tokens):
    noisy_model = make_noisy_model(family)
    shallow = loss_and_gradients(noisy_model, tokens)
    noisy_model.zero_grad()
    consumer = noisy_model.attach(logits=True)
    whole = loss_and_gradients(noisy_model, tokens)
    assert consumer.forwards == 1
    torch.testing.assert_close(shallow, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_and_right_padding_give_the_same_loss(family, make_noisy_model, tokens):
    """The noise stream depends on the place in the batch, so the comparison is of its parts without noise."""
    lengths = tokens["attention_mask"].sum(-1)

    def shifted(tensor):
        return torch.stack([row.roll(9 - int(length)) for row, length in zip(tensor, lengths, strict=True)])

    noisy_model = make_noisy_model(family, scale=(1e-12, 2e-12))
    right = loss_and_gradients(noisy_model, tokens)
    noisy_model.zero_grad()
    left = loss_and_gradients(noisy_model, {name: shifted(value) for name, value in tokens.items()})
    torch.testing.assert_close(right[0], left[0], rtol=1e-5, atol=1e-6)
    for name, gradient in right[1].items():
        torch.testing.assert_close(gradient, left[1][name], rtol=1e-3, atol=1e-5)


def test_unselected_tokens_pass_bit_equal_and_padding_is_never_transformed(make_noisy_model, tokens):
    noisy_model = make_noisy_model().eval()
    output = noisy_model(**tokens)
    selected = tokens["noise_mask"]
    assert torch.equal(output.transformed[~selected], output.input[~selected])
    assert ((output.transformed != output.input).any(-1) == selected).all()
    for noise_mask in (None, torch.ones_like(tokens["attention_mask"])):
        everything = noisy_model(tokens["input_ids"], tokens["attention_mask"], noise_mask)
        assert ((everything.transformed != everything.input).any(-1) == (tokens["attention_mask"] != 0)).all()


def test_padding_tokens_do_not_influence_the_loss(make_noisy_model, tokens):
    noisy_model = make_noisy_model()
    first = loss_and_gradients(noisy_model, tokens)
    noisy_model.zero_grad()
    changed = tokens | {"input_ids": torch.where(tokens["attention_mask"] != 0, tokens["input_ids"], 5)}
    torch.testing.assert_close(loss_and_gradients(noisy_model, changed), first, rtol=1e-6, atol=1e-7)


def test_noise_disabled_gives_clean_values_in_both_halves(make_noisy_model, tokens):
    noisy_model = make_noisy_model().eval()
    with noisy_model.noise_disabled():
        output = noisy_model(**tokens)
    torch.testing.assert_close(output.base_model_output.noisy_logits, output.base_model_output.clean_logits)
    assert output.transformed is None
    assert noisy_model(**tokens).transformed is not None


def test_the_base_model_stays_clean_outside_the_noisy_model(make_noisy_model, tokens):
    noisy_model = make_noisy_model().eval()
    arguments = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    before = noisy_model.base_model(**arguments).logits
    noisy_model(**tokens)
    torch.testing.assert_close(noisy_model.base_model(**arguments).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_transforms_the_prompt_only(family, make_noisy_model, tokens):
    noisy_model = make_noisy_model(family).eval()
    prompt = tokens["input_ids"][:1]
    calls = []
    noisy_model.noise_layer.register_forward_hook(lambda _layer, inputs, _output: calls.append(inputs[0].shape))
    generated = noisy_model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert calls == [(1, 9, WIDTH)]
    assert generated.shape == (1, 13)
    assert torch.equal(generated[:, :9], prompt)
    noisy_model.noise_layer.forward_count.zero_()
    embeddings = noisy_model.transform(prompt)
    noisy_model.generate(prompt, loss_mask=prompt != 0, labels=prompt, max_new_tokens=1, pad_token_id=0)
    expected = noisy_model.base_model.generate(
        inputs_embeds=embeddings, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(generated[:, 9:], expected)


def test_inputs_embeds_are_transformed_too(make_noisy_model, tokens):
    noisy_model = make_noisy_model().eval()
    first = noisy_model(**tokens)
    noisy_model.noise_layer.forward_count.zero_()
    embeddings = noisy_model.base_model.get_input_embeddings()(tokens["input_ids"])
    rest = {name: value for name, value in tokens.items() if name != "input_ids"}
    second = noisy_model(inputs_embeds=embeddings, **rest)
    torch.testing.assert_close(second.base_model_output.logits, first.base_model_output.logits, rtol=0, atol=0)


def test_a_deep_copy_is_independent(make_noisy_model, tokens):
    noisy_model = make_noisy_model().eval()
    noisy_model(**tokens)
    copied = copy.deepcopy(noisy_model)
    with torch.no_grad():
        copied.noise_layer.mean_estimator.head.bias.add_(1.0)
    noisy_model.noise_layer.forward_count.zero_()
    copied.noise_layer.forward_count.zero_()
    original, changed = noisy_model(**tokens), copied(**tokens)
    shift = (changed.transformed - original.transformed)[tokens["noise_mask"]]
    assert shift.mean().item() == pytest.approx(1.0, abs=1e-5)


def test_copies_begin_without_losses_and_captured_forwards(make_noisy_model, tokens):
    noisy_model = make_noisy_model().train()
    loss_function, _, _ = distillation_loss_factory(noisy_model, 1, 0.4, **WEIGHTS)
    noisy_model(**tokens)
    copied = copy.deepcopy(noisy_model)
    copied(**tokens)
    loss_function(tokens["loss_mask"]).backward()
    assert all(parameter.grad is None for parameter in copied.noise_layer.parameters())
    assert any(parameter.grad is not None for parameter in noisy_model.noise_layer.parameters())
    own = distillation_loss_factory(copied, 1, 0.4, **WEIGHTS)[0]
    copied(**tokens)
    own(tokens["loss_mask"]).backward()
    assert any(parameter.grad is not None for parameter in copied.noise_layer.parameters())


def test_models_can_be_pickled(make_noisy_model, tokens):
    noisy_model = make_noisy_model().eval()
    consumer = noisy_model.attach(logits=True)
    noisy_model(**tokens)
    loaded = pickle.loads(pickle.dumps(noisy_model))
    pickle.dumps(noisy_model.base_model)
    copy.deepcopy(noisy_model.base_model)
    assert consumer.forwards == 1
    torch.testing.assert_close(
        loaded(**tokens).base_model_output.logits, noisy_model(**tokens).base_model_output.logits, rtol=0, atol=0
    )


def test_a_base_model_outlives_its_noisy_models(make_noisy_model, tokens):
    noisy_model = make_noisy_model()
    base_model, layer = noisy_model.base_model, weakref.ref(noisy_model.noise_layer)
    noisy_model(**tokens)
    del noisy_model
    gc.collect()
    assert layer() is None
    assert not any(module._forward_hooks for module in base_model.modules())


def test_layers_that_nothing_reads_do_not_run_behind_a_forward_of_the_backbones_own(make_noisy_model, tokens):
    """As accelerate's hooks give it one."""
    noisy_model = make_noisy_model().train()
    backbone, ran = noisy_model.base_model.model, []
    backbone.forward = backbone.forward
    for index, layer in enumerate(backbone.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    consumer = noisy_model.attach(layers=frozenset({1}))
    noisy_model(**tokens)
    assert ran == [0, 1, 0, 1]
    assert consumer.has_forward


def test_a_target_deeper_than_the_loss_reads_is_refused(make_noisy_model, tokens):
    base = make_noisy_model()
    noisy_model = NoiseMaskedNoisyTransformerModel(
        None, base.base_model, None, "model.layers.2", noise_layer=base.noise_layer
    ).train()
    loss = distillation_loss_factory(noisy_model, 1, 0.4, **WEIGHTS)
    with pytest.raises(RuntimeError, match=r"target_layer 'model\.layers\.2' did not run"):
        noisy_model(**tokens)
    del loss
    deep = loss_and_gradients(noisy_model, tokens, 3)
    assert deep[2]["distillation_layer_cosine_distance"] > 0


def test_compiled_model_gives_the_same_loss(make_noisy_model, tokens):
    eager = loss_and_gradients(make_noisy_model(), tokens)
    noisy_model = make_noisy_model()
    loss_function, _, _ = distillation_loss_factory(noisy_model, 1, 0.4, **WEIGHTS)
    torch.compile(noisy_model.train(), backend="aot_eager")(**tokens)
    torch.testing.assert_close(loss_function(tokens["loss_mask"]).detach(), eager[0], rtol=1e-5, atol=1e-6)


def test_half_precision_base_model(make_noisy_model, tokens):
    noisy_model = make_noisy_model()
    noisy_model.base_model.to(torch.bfloat16)
    loss, gradients, _ = loss_and_gradients(noisy_model, tokens)
    assert loss.dtype == torch.float32
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in gradients.values())
    torch.testing.assert_close(loss, loss_and_gradients(make_noisy_model(), tokens)[0], rtol=0.03, atol=0)


def test_state_dict_round_trip(make_noisy_model, tokens):
    noisy_model = make_noisy_model().eval()
    other = make_noisy_model().eval()
    for parameter in other.noise_layer.parameters():
        torch.nn.init.zeros_(parameter)
    noisy_model(**tokens)
    assert not [name for name in noisy_model.noise_layer.state_dict() if name in ("input", "mean", "std", "output")]
    other.noise_layer.load_state_dict(noisy_model.noise_layer.state_dict())
    torch.testing.assert_close(other(**tokens).transformed, noisy_model(**tokens).transformed, rtol=0, atol=0)


def test_separate_pass_keeps_half_the_activations(make_noisy_model, tokens):
    def saved_bytes(noisy_model):
        loss = distillation_loss_factory(noisy_model, 2, 0.4, **WEIGHTS)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in noisy_model.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        noisy_model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            noisy_model(**tokens)
            loss[0](tokens["loss_mask"])
        return sum(kept.values())

    assert saved_bytes(make_noisy_model()) < 0.75 * saved_bytes(make_noisy_model(clean_pass="joint"))


def test_errors(make_noisy_model, tokens):
    noisy_model = make_noisy_model()
    with pytest.raises(ValueError, match=r"noise_mask must have the shape of the tokens, \(3, 9\); got \(3, 8\)"):
        noisy_model(tokens["input_ids"], tokens["attention_mask"], tokens["noise_mask"][:, 1:])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        noisy_model(attention_mask=tokens["attention_mask"])
    with pytest.raises(ValueError, match="past_key_values cannot be given"):
        noisy_model(tokens["input_ids"], past_key_values=object())
    with pytest.raises(TypeError, match=r"attention_mask must be a torch\.Tensor or None; got list"):
        noisy_model(tokens["input_ids"], attention_mask=[[1]])
    with pytest.raises(TypeError, match="takes no arguments; got scale"):
        NoiseMaskedNoisyTransformerModel(
            None, noisy_model.base_model, noise_layer=noisy_model.noise_layer, scale=(1, 2)
        )
    base_model, body, _ = tiny_causal_lm("llama")
    settings = {"config_path": base_model.config, "transformer_type": body}
    with pytest.raises(ValueError, match=r"no module 'model\.embed'"):
        NoiseMaskedNoisyTransformerModel(TransformerCloak, base_model, None, "model.embed", **settings)
    with pytest.raises(ValueError, match="embedding width 16; got"):
        NoiseMaskedNoisyTransformerModel(TransformerCloak, base_model, (-1, 32), **settings)
    with pytest.raises(ValueError, match="clean_pass must be"):
        NoiseMaskedNoisyTransformerModel(TransformerCloak, base_model, clean_pass="both", **settings)
