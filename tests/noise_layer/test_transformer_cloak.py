"""TransformerCloak: its start, its seeds, its memory of the last forward, its settings."""

import copy
import json

import pytest
import torch
import torch.utils.checkpoint
import transformers

from sgfast.noise_layer import TransformerCloak, recommend_scale
from sgfast.noise_layer.seeds import fold_in, mix_seed
from sgfast.ops import standard_normal
from tests.tiny_models import FAMILIES, VOCABULARY, WIDTH, tiny_causal_lm


def make_layer(family="llama", **arguments):
    base_model, body, _ = tiny_causal_lm(family)
    torch.manual_seed(0)
    return TransformerCloak(base_model.config, body, **arguments)


@pytest.fixture
def embeddings():
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_layer_adds_weak_unshifted_noise(family, embeddings):
    layer = make_layer(family, seed=3).eval()
    layer(embeddings)
    assert (layer.mean == 0).all()
    torch.testing.assert_close(layer.std, torch.full_like(embeddings, 1e-4 + (2 - 1e-4) / (1 + torch.e**8)))
    assert all(parameter.shape[0] != VOCABULARY for parameter in layer.parameters())


def test_the_transform_is_its_formula(embeddings):
    layer = make_layer(rhos_init=-1.0, percent_to_mask=0.25, value_range=(-2.0, 2.0)).eval()
    torch.nn.init.normal_(layer.mean_estimator.head.weight)
    torch.nn.init.normal_(layer.std_estimator.head.weight)
    noise_mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
    output = layer(embeddings, noise_mask, seed=99)
    eps = standard_normal(embeddings.shape, 99)
    expected = ((embeddings + layer.std * eps) * ~layer.mask + layer.mean).clamp(-2.0, 2.0)
    selected = noise_mask != 0
    torch.testing.assert_close(output[selected], expected[selected])
    assert torch.equal(output[~selected], embeddings[~selected])
    assert (layer.mask.sum(-1) == WIDTH // 4).all()
    torch.testing.assert_close(layer.noise, layer.std.detach() * eps)
    assert torch.equal(layer.output, output)


def test_fixed_seeds_give_equal_streams_that_advance(embeddings):
    first, second = make_layer(seed=5), make_layer(seed=5)
    one, two = first(embeddings), first(embeddings)
    assert not torch.equal(one, two)
    assert torch.equal(second(embeddings), one)
    assert torch.equal(second(embeddings), two)
    assert not torch.equal(make_layer(seed=6)(embeddings), one)


def test_without_a_seed_noise_follows_torch_generator(embeddings):
    layer = make_layer()
    torch.manual_seed(11)
    one, two = layer(embeddings), layer(embeddings)
    torch.manual_seed(11)
    assert torch.equal(layer(embeddings), one)
    assert not torch.equal(one, two)


def test_mixed_seeds_differ():
    seeds = {mix_seed(seed, count, rank) for seed in range(5) for count in range(50) for rank in range(4)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_directly_learned_stds_start_where_rho_would(embeddings):
    cloak, direct = make_layer(rhos_init=-2.0), make_layer(rhos_init=-2.0, directly_learn_stds=True)
    cloak(embeddings)
    direct(embeddings)
    torch.testing.assert_close(direct.std, cloak.std)
    direct.std.sum().backward()
    assert (direct.std_estimator.head.bias.grad != 0).all()


def test_estimators_take_their_own_depth_heads_and_dropout(embeddings):
    layer = make_layer(mean_num_hidden_layers=2, std_num_attention_heads=4, mean_dropout=0.5)
    assert len(layer.mean_estimator.body.layers) == 2
    assert len(layer.std_estimator.body.layers) == 1
    assert layer.std_estimator.body.config.num_attention_heads == 4
    assert layer.std_estimator.body.config.head_dim == WIDTH // 4
    assert layer.mean_estimator.body.config.attention_dropout == 0.5
    assert layer.std_estimator.body.config.attention_dropout == 0.0
    layer(embeddings)


def test_what_follows_a_prefix_does_not_change_it(embeddings):
    layer = make_layer(seed=1).eval()
    torch.nn.init.normal_(layer.mean_estimator.head.weight)
    layer(embeddings)
    whole = layer.mean
    layer(embeddings[:, :3])
    torch.testing.assert_close(layer.mean, whole[:, :3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_real_token(family, side, embeddings):
    layer = make_layer(family).eval()
    for estimator in (layer.mean_estimator, layer.std_estimator):
        torch.nn.init.normal_(estimator.head.weight, std=0.3)
    real = slice(2, None) if side == "left" else slice(0, 3)
    attention_mask = torch.zeros(2, 5, dtype=torch.long)
    attention_mask[0, real] = 1
    attention_mask[1] = 1
    padded = embeddings.clone()
    padded[0, attention_mask[0] == 0] = 50.0
    output = layer(padded, attention_mask != 0, attention_mask=attention_mask)
    mean, std = layer.mean, layer.std
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)
    assert torch.equal(output[0, attention_mask[0] == 0], padded[0, attention_mask[0] == 0])
    with pytest.raises(ValueError, match=r"attention_mask must be bool, or numbers equal to 0 or 1; got 0\.5"):
        layer(padded, attention_mask != 0, attention_mask=attention_mask * 0.5)
    layer(embeddings[:1, real])
    torch.testing.assert_close(mean[:1, real], layer.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std[:1, real], layer.std, rtol=1e-4, atol=1e-5)


def test_the_configuration_may_be_an_object_or_a_path(tmp_path, embeddings):
    base_model, body, _ = tiny_causal_lm("llama")
    base_model.config.save_pretrained(tmp_path)
    layers = []
    for config in (base_model.config, tmp_path, str(tmp_path)):
        torch.manual_seed(0)
        layers.append(TransformerCloak(config, body, seed=1))
    outputs = [layer(embeddings) for layer in layers]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_weight_decay_spares_the_heads():
    layer = make_layer()
    assert layer.no_weight_decay() == {
        f"{estimator}.head.{name}" for estimator in ("mean_estimator", "std_estimator") for name in ("weight", "bias")
    }


def test_disabled_passes_through_and_clear_forgets(embeddings):
    layer = make_layer()
    with layer.disabled():
        assert layer(embeddings) is embeddings
    assert layer.enabled
    layer(embeddings)
    layer.clear()
    assert [layer.input, layer.mean, layer.std, layer.mask, layer.noise, layer.output] == [None] * 6


def test_copies_and_state_dicts_leave_the_last_forward_behind(embeddings):
    layer = make_layer(seed=2)
    layer(embeddings)
    assert copy.deepcopy(layer).output is None
    assert layer.output is not None
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()} | {"forward_count"}


def test_a_resumed_layer_does_not_repeat_its_noise(embeddings):
    layer, resumed = make_layer(seed=5), make_layer(seed=5)
    first = layer(embeddings)
    resumed.load_state_dict(layer.state_dict())
    second = resumed(embeddings)
    assert not torch.equal(second, first)
    assert torch.equal(layer(embeddings), second)


def test_the_process_rank_is_folded_in(embeddings, monkeypatch):
    first = make_layer(seed=5)(embeddings)
    monkeypatch.setattr("sgfast.noise_layer.seeds.process_rank", lambda: 1)
    assert not torch.equal(make_layer(seed=5)(embeddings), first)


def test_the_count_is_folded_in_as_a_word_is():
    for seed in (0, 1, 2**63, 2**64 - 1):
        for count in (0, 1, 12345, 2**40):
            folded = fold_in(seed, torch.tensor(count)).item() % 2**64
            assert folded == mix_seed_step(seed, count)


def mix_seed_step(state, word):
    """One SplitMix64 step in Python's unbounded integers."""
    z = (state + word + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [None, 7])
def test_compiled_layers_do_not_recompile_for_every_forward(seed, embeddings):
    torch._dynamo.reset()
    layer, eager = make_layer(seed=seed), make_layer(seed=seed)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(12):
        torch.manual_seed(0)
        output = compiled(embeddings)
        torch.manual_seed(0)
        torch.testing.assert_close(output, eager(embeddings))


def test_activation_checkpointing_replays_the_noise_or_is_refused(embeddings):
    torch.manual_seed(3)
    layer = make_layer(rhos_init=-1.0)
    torch.nn.init.normal_(layer.std_estimator.head.weight)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        layer.zero_grad()
        run = (lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)) if checkpointed else layer
        run(embeddings).square().sum().backward()
        gradients.append(layer.std_estimator.head.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    seeded = make_layer(seed=7)
    output = torch.utils.checkpoint.checkpoint(seeded, embeddings, use_reentrant=False)
    with pytest.raises(RuntimeError, match="fixed seed cannot be recomputed under activation checkpointing"):
        output.sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_rebuild_the_layer(family, embeddings):
    layer = make_layer(family, scale=(1e-3, 0.5), percent_to_mask=0.1, value_range=(None, 3.0), seed=12345).eval()
    settings = json.loads(json.dumps(layer.settings()))
    assert "12345" not in json.dumps(settings)
    rebuilt = TransformerCloak.from_settings(settings).eval()
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt(embeddings, seed=4), layer(embeddings, seed=4))


def test_settings_naming_another_class_are_refused():
    settings = make_layer().settings()
    with pytest.raises(ValueError, match=r"must be one of .*LlamaModel.*; got 'pipeline'"):
        TransformerCloak.from_settings(settings | {"transformer_type": "pipeline"})


def test_settings_cannot_name_an_attention_to_fetch(embeddings):
    settings = make_layer().settings()
    assert settings["attention"] == "sdpa"
    with pytest.raises(ValueError, match="attention must be eager or sdpa; got 'someone/kernel'"):
        TransformerCloak.from_settings(settings | {"attention": "someone/kernel"})
    for name in ("attn_implementation", "_attn_implementation"):
        forged = settings | {"config": settings["config"] | {name: "someone/kernel"}}
        assert TransformerCloak.from_settings(forged).mean_estimator.body.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1.5}, "seed must be an int or None; got float"),
        ({"std_num_hidden_layers": 1.5}, "std_num_hidden_layers must be an int; got float"),
        ({"mean_num_attention_heads": "2"}, "mean_num_attention_heads must be an int; got str"),
        ({"mean_dropout": None}, "mean_dropout must be a number; got NoneType"),
        ({"directly_learn_stds": 1}, "directly_learn_stds must be a bool; got int"),
        ({"rhos_init": "low"}, "rhos_init must be a number; got str"),
        ({"value_range": 2.0}, "value_range must be"),
        ({"percent_to_mask": "half"}, "percent_to_mask must be a number; got str"),
        ({"scale": 1.0}, "scale must be a pair of numbers"),
        (
            {"transformer_type": "LlamaModel"},
            r"transformer_type must be a class of torch\.nn\.Module; got 'LlamaModel'",
        ),
        ({"config_path": 3}, "config_path must be a path, a hub id, or a configuration .* got int"),
    ],
)
def test_arguments_of_other_types(arguments, message):
    base_model, body, _ = tiny_causal_lm("llama")
    with pytest.raises(TypeError, match=message):
        TransformerCloak(**{"config_path": base_model.config, "transformer_type": body} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (1.0, 0.5)}, "0 <= min < max"),
        ({"percent_to_mask": 2.0}, "percent_to_mask"),
        ({"seed": -1}, "seed must be None or lie in"),
        ({"std_num_attention_heads": 3}, "std_num_attention_heads must divide the width 16; got 3"),
        ({"mean_num_attention_heads": 0}, "mean_num_attention_heads must be at least 1; got 0"),
        ({"std_dropout": 1.0}, r"std_dropout must lie in \[0, 1\); got 1.0"),
        ({"value_range": (1.0, -1.0)}, r"value_range must have low <= high; got \(1.0, -1.0\)"),
        ({"mean_num_hidden_layers": 0}, "mean_num_hidden_layers must be at least 1; got 0"),
        ({"shallow": 0.0}, "shallow must be positive"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rhos_init": float("inf")}, ValueError, "rhos_init must be finite; got inf"),
        ({"transformer_type": transformers.LlamaForCausalLM}, ValueError, "body without a head; got LlamaForCausalLM"),
        ({"transformer_type": transformers.GPT2Model}, ValueError, "GPT2Model takes a GPT2Config; .* a LlamaConfig"),
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments, error, message):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    settings = {"config_path": config, "transformer_type": transformers.LlamaModel}
    with pytest.raises(error, match=message):
        TransformerCloak(**(settings | arguments))


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ("x", TypeError, "embedding_weight must be a torch.Tensor; got str"),
        (torch.empty(0, 3), ValueError, "finite values"),
        (torch.tensor([[1.0, torch.nan]]), ValueError, "finite values"),
        (torch.zeros(2, 3), ValueError, "non-zero"),
    ],
)
def test_recommend_scale_names_what_is_wrong(table, error, message):
    with pytest.raises(error, match=message):
        recommend_scale(table)
