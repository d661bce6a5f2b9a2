"""The median norm of what a noise layer transforms."""

import pytest
import torch

from sgfast.model import median_norm
from sgfast.model.median_norm import median_target_norm
from sgfast.ops import rows


def lower_median(norms):
    return norms.sort().values[(len(norms) - 1) // 2].item()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("size", [61, 60])
def test_lower_median_of_the_embeddings_norms_in_any_chunks(family, size, make_noisy_model, monkeypatch):
    noisy_model = make_noisy_model(family)
    noisy_model.base_model.resize_token_embeddings(size)
    with torch.no_grad():
        outputs = noisy_model.base_model.get_input_embeddings()(torch.arange(size)).double()
    expected = lower_median(outputs.norm(dim=-1))
    for chunk_bytes in (rows.DEFAULT_CHUNK_BYTES, 1, 500):
        monkeypatch.setattr(median_norm.rows, "DEFAULT_CHUNK_BYTES", chunk_bytes)
        assert median_target_norm(noisy_model) == pytest.approx(expected, rel=1e-6)


def test_half_precision_embeddings_are_measured_in_float32(make_noisy_model):
    noisy_model = make_noisy_model()
    noisy_model.base_model.to(torch.bfloat16)
    table = noisy_model.base_model.get_input_embeddings().weight.double()
    assert median_target_norm(noisy_model) == pytest.approx(lower_median(table.norm(dim=-1)), rel=1e-6)


@pytest.mark.parametrize("target_layer", ["model.layers.1", "model.norm"])
def test_a_deeper_target_sees_every_token_alone(target_layer, make_noisy_model):
    noisy_model = make_noisy_model()
    noisy_model.target_layer = target_layer
    seen = []
    handle = noisy_model.base_model.get_submodule(target_layer).register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        noisy_model.base_model(input_ids=torch.arange(61)[:, None])
    handle.remove()
    assert median_target_norm(noisy_model) == pytest.approx(lower_median(seen[0].norm(dim=-1).flatten()), rel=1e-5)


def test_adapters_are_off_and_noise_too(make_pair):
    teacher, student = make_pair()
    expected = median_target_norm(teacher)
    for model in (teacher, student):
        model.target_layer = "model.layers.1"
    teacher_norm, student_norm = (median_target_norm(model) for model in (teacher, student))
    assert teacher_norm == student_norm != expected
    alone, _ = make_pair()
    alone.target_layer = "model.layers.1"
    assert median_target_norm(alone) == pytest.approx(teacher_norm, rel=1e-6)
