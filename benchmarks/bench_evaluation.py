"""A whole evaluation of a transform over one batch beside plain PyTorch.

    python -m pytest benchmarks/bench_evaluation.py [--small] [--device cuda] [--out benchmarks/results]

One evaluation is a forward of the clean and the noisy half of a small Llama, the averages of four divergences per token
over the vocabulary and over the top 100, and the share of tokens whose nearest embedding belongs to another token.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sgfast.benchmarking import plain
from sgfast.benchmarking.families import COMPILED, METRICS
from sgfast.benchmarking.growth import EAGER
from sgfast.benchmarking.measuring import Outputs, Task
from sgfast.benchmarking.training_tasks import causal_lm, under_noise
from sgfast.metrics import get_utility_metrics_factory, nearest_neighbor_failure_rate
from sgfast.model.decoder import embedding_table_of


def evaluation_task(batch: int, tokens: int, vocab: int, top_k: int, device: str) -> Task:
    """Means of the metrics, (9,): four divergences in full, four over the top k, the failure rate."""
    input_ids = torch.randint(vocab, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    model = under_noise(causal_lm(vocab, 0).to(device)).eval()
    table = embedding_table_of(model.base_model)
    attended = torch.ones_like(input_ids)
    factories = [get_utility_metrics_factory(model, num_logits) for num_logits in (None, top_k)]

    def by_us(input_ids: Tensor) -> Outputs:
        output = model(input_ids, attended, noise_mask=attended != 0)
        means = [value for metrics in factories for value in metrics().values()]
        rate = nearest_neighbor_failure_rate(output.transformed.flatten(0, 1), table, input_ids.flatten())
        return (torch.stack([*means, torch.as_tensor(rate)])[None],)

    def by_formula(input_ids: Tensor) -> Outputs:
        base_model = model.base_model
        x = base_model.get_input_embeddings()(input_ids)
        mean, std = model.noise_layer.estimate(x, attention_mask=attended)
        transformed = plain.apply_noise(x, mean, std)
        clean, noisy = (base_model(inputs_embeds=one, use_cache=False).logits for one in (x, transformed))
        means = [one.mean() for one in plain.divergences(noisy, clean, METRICS).values()]
        means += [one.mean() for one in plain.top_k_divergences(noisy, clean, METRICS, top_k, "truncate").values()]
        _, nearest = plain.nearest_embeddings(transformed.flatten(0, 1), table, 1, "l2")
        rate = (nearest[:, 0] != input_ids.flatten()).float().mean()
        return (torch.stack([*means, rate])[None],)

    sizes: dict[str, float | str | None] = {
        "batch": batch,
        "tokens": tokens,
        "vocab": vocab,
        "top_k": top_k,
        "dtype": "float32",
    }
    implementations = {EAGER: by_formula, COMPILED: torch.compile(by_formula), "sgfast": by_us}
    return Task("evaluation", "utility and attack", sizes, (input_ids,), implementations, 0, 0.0, input_ids.numel())


@pytest.mark.parametrize("implementation", [EAGER, COMPILED, "sgfast"])
def test_evaluation(run_task: Callable[[Task, str], None], small: bool, device: str, implementation: str) -> None:
    sizes = (2, 8, 256, 10) if small else (4, 128, 32000, 100)
    run_task(evaluation_task(*sizes, device), implementation)
