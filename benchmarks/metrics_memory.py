"""The resident memory of the utility metrics beyond their inputs, on a CPU.

    python -m benchmarks.metrics_memory                          # [4, 2048, 151936] in bfloat16, full and top 100
    python -m benchmarks.metrics_memory --hidden 576 --vocabulary 49152 --rows 1 --budgets 16 64 256

The first command measures `get_utility_metrics_factory` on logits that exist as a whole. The second command measures
the way of `sgfast evaluate`: logits are computed from final hidden states, a few tokens at a time, within budgets in
MiB. Every measurement is one line of JSON. ``peak_mib`` is the peak of the process (VmHWM) less the resident memory
before the call. ``first_call_mib`` is the memory that PyTorch takes once in a process, measured on a single token.
Linux only.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgfast.metrics import get_utility_metrics_factory
from sgfast.metrics.per_sequence import sequence_utility_from_hidden
from sgfast.model.capture import Capture, Consumer, Outputs
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel

MIB = 2**20


def resident_mib(field: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def measured(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Return the peak beyond the memory before the call and the seconds, and the result."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from here
    before, start = resident_mib("VmRSS"), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return {"peak_mib": round(resident_mib("VmHWM") - before, 1), "seconds": round(seconds, 1)}, result


def random_logits(rows: int, length: int, vocabulary: int, seed: int) -> Tensor:
    """Random logits, filled block by block: a whole float32 copy would be larger than the measured memory."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty(rows * length, vocabulary, dtype=torch.bfloat16)
    block = 3 * torch.randn(16, vocabulary, generator=generator)
    for some in torch.split(logits, 16):
        some.copy_(block[: len(some)])
    return logits.view(rows, length, vocabulary)


class Vocabulary(torch.nn.Module):
    """The part of a language model that tells the size of its vocabulary."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(size, 1)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding


class LogitsAtHand(NoiseMaskedNoisyTransformerModel):
    """A noisy model whose last forward left these logits. A real model would take memory of its own."""

    def __init__(self, clean: Tensor, noisy: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.base_model = Vocabulary(clean.shape[-1])
        self.logits = clean, noisy

    def attach(self, **needs: Any) -> Consumer:
        mask = torch.ones(self.logits[0].shape[:2], dtype=torch.bool)
        consumer = Consumer(frozenset(), **needs)
        consumer.offer(Capture(mask, mask, None, *(Outputs({}, side) for side in self.logits)))
        return consumer


def factory(logits: tuple[Tensor, Tensor], num_logits: int | None, sizes: tuple[int | None, int | None]) -> Any:
    """Return the metric of a model whose last forward left these logits."""
    return get_utility_metrics_factory(LogitsAtHand(*logits), num_logits, *sizes)


def of_logits(rows: int, length: int, vocabulary: int) -> None:
    clean, noisy = (random_logits(rows, length, vocabulary, seed) for seed in range(2))
    inputs = 2 * clean.numel() * clean.element_size() / MIB
    for num_logits in (None, 100):
        first, _ = measured(factory((clean[:1, :1], noisy[:1, :1]), num_logits, (None, None)))
        for sizes in ((None, None), (1, max(1, length // 3))):
            figures, result = measured(factory((clean, noisy), num_logits, sizes))
            line = {
                "shape": [rows, length, vocabulary],
                "num_logits": num_logits,
                "sizes": sizes,
                "inputs_mib": round(inputs, 1),
                "first_call_mib": first["peak_mib"],
                "jefferys": result["next_token_utility/jefferys"].item(),
            }
            print(json.dumps(line | figures), flush=True)


def of_hidden_states(rows: int, length: int, vocabulary: int, width: int, budgets: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    clean = torch.randn(rows, length, width, generator=generator)
    noisy = clean + torch.randn(clean.shape, generator=generator)
    mask = torch.ones(rows, length)
    first, _ = measured(lambda: sequence_utility_from_hidden(noisy[:1, :1], clean[:1, :1], head, mask[:1, :1]))
    for budget in budgets:
        figures, result = measured(
            lambda: sequence_utility_from_hidden(noisy, clean, head, mask, max_chunk_bytes=budget * MIB)  # noqa: B023
        )
        line = {
            "shape": [rows, length, vocabulary],
            "budget_mib": budget,
            "logits_would_take_mib": round(2 * rows * length * vocabulary * 4 / MIB, 1),
            "first_call_mib": first["peak_mib"],
            "tokens_per_second": round(rows * length / max(figures["seconds"], 0.1)),
            "jefferys": result["next_token_utility/jefferys"].mean().item(),
        }
        print(json.dumps(line | figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, help="width of hidden states, to measure these in place of logits")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 256], help="MiB")
    arguments = parser.parse_args()
    sizes = arguments.rows, arguments.length, arguments.vocabulary
    if arguments.hidden is None:
        of_logits(*sizes)
    else:
        of_hidden_states(*sizes, arguments.hidden, arguments.budgets)


if __name__ == "__main__":
    main()
