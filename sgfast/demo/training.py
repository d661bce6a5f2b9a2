"""The demo's training loop: a generator, so that the caller owns progress bars and interruption."""

import random
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.loss.factory import LossFunctions
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel

_WARM_UP_STEPS = 20


class Step(NamedTuple):
    """One optimiser step."""

    number: int
    components: dict[str, float]  # unweighted, and "total"
    tokens_per_second: float


def as_chats(passages: Sequence[str]) -> list[list[dict[str, str]]]:
    """Passages as user messages, which is where a client's private text stands."""
    return [[{"role": "user", "content": passage}] for passage in passages]


def train(
    noisy_model: NoiseMaskedNoisyTransformerModel,
    loss_functions: LossFunctions,
    tokenizer_wrapper: TokenizerWrapper,
    passages: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    max_length: int,
    seed: int,
) -> Iterator[Step]:
    """Train the noise layer with AdamW, yielding after every step."""
    loss_function, get_losses, _ = loss_functions
    parameters = list(noisy_model.noise_layer.parameters())
    # Weight decay would pull the transform back to the identity.
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP_STEPS) * max(0.05, 1 - step / steps)
    )
    batches = random.Random(seed)
    noisy_model.train()
    for number in range(1, steps + 1):
        started = time.perf_counter()
        chosen = batches.sample(passages, min(batch_size, len(passages)))
        inputs = tokenizer_wrapper(as_chats(chosen), truncation=True, max_length=max_length)
        noisy_model(**inputs)
        loss = loss_function(inputs["loss_mask"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        components = {name: value.item() for name, value in get_losses().items()}  # type: ignore[attr-defined]
        tokens = int(inputs["attention_mask"].sum())
        yield Step(number, components, tokens / (time.perf_counter() - started))
