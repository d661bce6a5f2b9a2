"""A transform and records of few words, for tests of evaluation."""

import random

from sgfast.huggingface import TokenizerWrapper
from sgfast.training.building import models_over
from tests.tiny_tokenizer import tiny_tokenizer

WORDS = ["the", "keyword", "of", "function", "class", "module", "in", "a"]


def save_transform(base_model, path, **options):
    """An untrained transform."""
    wrapper = TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM")
    models_over(base_model, wrapper, {"rhos_init": 0.0, **options}).client.save_pretrained(path)
    return path


def records(count, seed=0):
    """Texts and chats of different lengths."""
    generator = random.Random(seed)
    lines = []
    for number in range(count):
        text = " ".join(generator.choices(WORDS, k=generator.randint(2, 12)))
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "the module"}]
        lines.append({"messages": chat, "id": f"chat {number}"} if number % 3 == 0 else {"text": text})
    return lines
