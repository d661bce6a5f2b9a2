"""Whole training steps beside plain PyTorch: a transform by distillation at a layer, a student by its logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgfast.benchmarking import plain
from sgfast.benchmarking.families import COMPILED, beside_compiled, ours
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.measuring import Outputs, Task
from sgfast.loss.distillation import distillation_loss_factory
from sgfast.loss.divergence_loss import DivergenceLoss
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.transformer_cloak import TransformerCloak
from sgfast.ops.dispatch import use_impl

_Loss = Callable[[Tensor], Tensor]
BATCH, WIDTH, LAYERS, LAYER = 2, 128, 4, 1
ALPHA, MAX_SCALE = 0.4, 2.0
WEIGHTS = {
    "std_log_ratio_loss_weight": 0.1,
    "input_embedding_similarity_loss_weight": 0.5,
    "distillation_layer_cosine_distance_loss_weight": 2.0,
    "distillation_layer_l2_distance_loss_weight": 0.3,
}


def training_tasks(
    *,
    tokens: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    impls: Sequence[str] = ("auto",),
) -> list[Task]:
    """Make tasks of training steps (forward, loss, backward) of a random Llama: 4 layers of width 128, a batch of 2.

    ``transform``: a noise layer trained through the frozen model by ``distillation_loss_factory`` at the second layer.
    ``student``: the model trained towards another's logits by Jensen–Shannon.
    """
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(vocab, (BATCH, tokens), generator=generator).to(device)
    student, teacher = (causal_lm(vocab, seed).to(device, dtype) for seed in (0, 1))
    noisy_model = under_noise(causal_lm(vocab, 0).to(device, dtype))
    loss_function = distillation_loss_factory(noisy_model, LAYER, ALPHA, **WEIGHTS)[0]
    divergence = DivergenceLoss("jensen_shannon")
    everything = torch.ones_like(input_ids, dtype=torch.bool)

    def transform(input_ids: Tensor) -> Tensor:
        noisy_model(input_ids, everything.long(), noise_mask=everything, loss_mask=everything)
        return loss_function(everything)

    def plain_transform(input_ids: Tensor) -> Tensor:
        return _plain_distillation(noisy_model, input_ids)

    def taught(loss: Callable[[Tensor, Tensor], Tensor]) -> _Loss:
        def step(input_ids: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher(input_ids, use_cache=False).logits
            return loss(student(input_ids, use_cache=False).logits, wanted)

        return step

    def by_formula(noisy: Tensor, clean: Tensor) -> Tensor:
        return plain.divergences(noisy, clean, ["jensen_shannon"])["jensen_shannon"].mean()

    def steps_by(model: torch.nn.Module, by_ours: _Loss, by_plain: _Loss) -> dict[str, Callable[..., Outputs]]:
        found = {EAGER: _step(model, by_plain, "auto")}
        if beside_compiled(impls, device):
            found[COMPILED] = _step(model, torch.compile(by_plain), "auto")
        return found | {ours(impl): _step(model, by_ours, impl) for impl in impls}

    steps = {
        "transform": (noisy_model.noise_layer, transform, plain_transform),
        "student": (student, taught(divergence), taught(by_formula)),
    }
    sizes: dict[str, float | str | None] = {
        "tokens": tokens,
        "vocab": vocab,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return [
        Task(
            "train",
            name,
            sizes,
            (input_ids,),
            steps_by(model, by_ours, by_plain),
            0,
            0.0,
            input_ids.numel(),
        )
        for name, (model, by_ours, by_plain) in steps.items()
    ]


def causal_lm(vocab: int, seed: int) -> Any:
    """Build a Llama with random weights."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def under_noise(base_model: Any) -> NoiseMaskedNoisyTransformerModel:
    """Put a model under a transform."""
    return NoiseMaskedNoisyTransformerModel(
        TransformerCloak,
        base_model,
        config_path=base_model.config,
        transformer_type=type(base_model.model),
        rhos_init=-2.0,
        seed=7,
    ).to(base_model.device)


def _step(model: torch.nn.Module, loss: _Loss, impl: str) -> Callable[..., Outputs]:
    """Run the loss and backward to a module's parameters, and drop the gradients as an optimizer does."""

    def step(input_ids: Tensor) -> Outputs:
        with torch.enable_grad(), use_impl(impl):  # type: ignore[arg-type]
            value = loss(input_ids)
            value.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        return (value.detach().reshape(1),)

    return step


def _plain_distillation(noisy_model: NoiseMaskedNoisyTransformerModel, input_ids: Tensor) -> Tensor:
    """Compute the same loss with PyTorch's functions, on the same layer's estimate."""
    body = noisy_model.base_model.model
    x = body.embed_tokens(input_ids)
    mean, std = noisy_model.noise_layer.estimate(x, attention_mask=torch.ones_like(input_ids))
    transformed = plain.apply_noise(x, mean, std).to(x.dtype)

    def layer(embeddings: Tensor) -> Tensor:
        outputs = body(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
        states: Tensor = outputs.hidden_states[LAYER + 1]
        return states.float()

    with torch.no_grad():
        v = layer(x)
    u = layer(transformed)
    weights = list(WEIGHTS.values())
    strength = weights[0] * (MAX_SCALE / std.float()).log().mean()
    strength = strength + weights[1] * F.cosine_similarity(transformed.float(), x.float(), dim=-1).mean()
    utility = weights[2] * (1 - F.cosine_similarity(u, v, dim=-1)).mean()
    utility = utility + weights[3] * ((u - v).norm(dim=-1) / v.norm(dim=-1)).mean()
    total: Tensor = ALPHA * strength + (1 - ALPHA) * utility
    return total
