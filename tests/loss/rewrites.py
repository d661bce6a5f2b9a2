"""Every loss factory's loss again: float64, the base model run by hand, and each formula written out row by row.

Nothing of `sgfast.loss`, `sgfast.ops` or of the noisy model's forward is used, except the noise itself, which is drawn
from the seed of the forward that is to be compared.
"""

import copy
import math

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from sgfast.ops import standard_normal


class Rewrite:
    """A float64 copy of a noisy model, and what it computes from the batch that the model last saw.

    Args:
        noisy_model: after a forward.
        tokens: what it was given.
        layer: the decoder layer to read, or None for the logits.
        student: a model with adapters over the same base and noise layer.
    """

    def __init__(self, noisy_model, tokens, layer, student=None):
        self.model, self.student = copy.deepcopy((noisy_model, student))
        for module in {
            id(m): m for one in (self.model, self.student) if one is not None for m in one.modules()
        }.values():
            module.to(torch.float64)
        _compute_norms_in_float64(self.model)
        self.layer = layer
        self.attended = tokens["attention_mask"] != 0
        self.selected = (tokens["noise_mask"] != 0) & self.attended
        self.counted = (tokens["loss_mask"] != 0) & self.attended
        seen = noisy_model.noise_layer
        suppressed = torch.zeros_like(seen.std, dtype=torch.bool) if seen.mask is None else seen.mask
        self.kept = ~suppressed
        self.x = self.model.base_model.get_input_embeddings()(tokens["input_ids"]).detach()
        noise = standard_normal(seen.input.shape, seen.forward_seed, dtype=torch.float32, device="cpu").double()
        self.mean, self.std = self.model.noise_layer.estimate(self.x, attention_mask=self.attended.long())
        transformed = (self.x + self.std * noise) * self.kept + self.mean
        self.transformed = torch.where(self.selected[..., None], transformed, self.x)

    def run(self, embeddings, adapters=False):
        """The layer's outputs, or logits, (B, T, ...)."""
        base_model = (self.student if adapters else self.model).base_model
        causal_lm = base_model.get_base_model() if adapters else base_model
        outputs = {}
        layers = causal_lm.model.layers
        handles = [
            layer.register_forward_hook(lambda m, i, output, index=index: outputs.update({index: output}))
            for index, layer in enumerate(layers)
        ]
        adapted = [module for module in causal_lm.modules() if hasattr(module, "lora_A")]
        for module in adapted:
            module._disable_adapters = not adapters
        positions = (self.attended.long().cumsum(-1) - 1).clamp(min=0)
        logits = causal_lm(
            inputs_embeds=embeddings, attention_mask=self.attended.long(), position_ids=positions, use_cache=False
        ).logits
        for handle in handles:
            handle.remove()
        if self.layer is None:
            return logits
        output = outputs[self.layer % len(layers)]
        return output if isinstance(output, torch.Tensor) else output[0]

    def component(self, name, **settings):
        """A component's value, a float64 scalar with a graph to this copy's parameters."""
        return getattr(self, name)(**settings)

    def _outputs(self):
        with torch.no_grad():
            clean = self.run(self.x)
        return self.run(self.transformed, adapters=self.student is not None)[self.counted], clean[self.counted]

    def distillation_layer_cosine_distance(self):
        noisy, clean = self._outputs()
        return _mean([1 - _cosine(u, v) for u, v in zip(noisy, clean, strict=True)])

    def distillation_layer_l2_distance(self):
        noisy, clean = self._outputs()
        return _mean([(u - v).norm() / v.norm() for u, v in zip(noisy, clean, strict=True)])

    def distillation_cross_entropy(self):
        noisy, clean = self._outputs()
        return _mean([-(v.softmax(0) * u.log_softmax(0)).sum() for u, v in zip(noisy, clean, strict=True)])

    def _tokens(self, *tensors):
        return zip(*(tensor[self.selected] for tensor in tensors), strict=True)

    def std_log_ratio(self, max_scale=2.0):
        return _mean([(math.log(max_scale) - s[k].log()).mean() for s, k in self._tokens(self.std, self.kept)])

    def input_embedding_similarity(self):
        return _mean([_cosine(u, v) for u, v in self._tokens(self.transformed, self.x)])

    def absolute_cosine_similarity(self):
        return _mean([_cosine(u, v).abs() for u, v in self._tokens(self.transformed, self.x)])

    def inverse_l2_power_law_catalyst(self, length=1.0, exponent=1.0):
        distances = [(u - v).norm() for u, v in self._tokens(self.transformed, self.x)]
        return _mean([((d**2 + (length / 100) ** 2) / length**2) ** (-exponent / 2) for d in distances])

    def median_norm_penalty(self):
        norms = self.model.base_model.get_input_embeddings().weight.norm(dim=-1).sort().values
        median = norms[(len(norms) - 1) // 2].detach()
        shifted = self.x * self.kept + self.mean
        return _mean([(row.norm() - median).abs() for (row,) in self._tokens(shifted)])

    def mutual_information(self, combine=True):
        half = len(self.x) // 2
        values = []
        for i in range(half):
            for j in range(half, len(self.x)):
                positions = self.selected[i] & (self.selected if combine else self.attended)[j]
                features = positions[:, None] & self.kept[i] & self.kept[j]
                if features.any():
                    first, second = (Normal(self.x[k] + self.mean[k], self.std[k]) for k in (i, j))
                    values.append(kl_divergence(first, second)[features].mean())
        return _mean(values)

    def distillation_protection_l2(self, masked=True):
        mask = self.counted if masked else self.attended
        return self._closeness(self.run(self.transformed)[mask], mask)

    def clean_embedding_performance(self):
        return self._closeness(self.run(self.x, adapters=True)[self.counted], self.counted)

    def _closeness(self, outputs, mask):
        with torch.no_grad():
            clean = self.run(self.x)[mask]
        ratios = [(u - v).norm() / v.norm() for u, v in zip(outputs, clean, strict=True)]
        return _mean([2 * (1 - 1 / (1 + (-ratio).exp())) for ratio in ratios])

    def gradients(self, total):
        """Gradients of a scalar to the noise layer's and the adapters' parameters, by name."""
        parameters = dict(learning_parameters(self.model, self.student))
        found = torch.autograd.grad(total, parameters.values(), allow_unused=True)
        return dict(zip(parameters, found, strict=True))


def learning_parameters(noisy_model, student=None):
    """The parameters that training changes: names and tensors."""
    yield from noisy_model.noise_layer.named_parameters()
    if student is not None:
        yield from ((name, p) for name, p in student.base_model.named_parameters() if "lora_" in name)


def relative_error(gradients, expected):
    """‖g − e‖ / ‖e‖ over all parameters; one without gradient counts as 0."""
    difference = norm = 0.0
    for name, value in expected.items():
        value = torch.zeros(1, dtype=torch.float64) if value is None else value
        found = torch.zeros(1) if gradients[name] is None else gradients[name]
        difference += (found.double() - value).square().sum().item()
        norm += value.square().sum().item()
    return math.sqrt(difference / norm)


def _cosine(u, v):
    return (u @ v) / (u.norm() * v.norm())


def _mean(values):
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def _compute_norms_in_float64(model):
    """transformers' RMS norms go through float32 whatever they are given."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
