"""Chat templates in the structure of four families, and tokenizers that know their special tokens."""

import json
from typing import Any, NamedTuple

from tests.tiny_tokenizer import tiny_tokenizer


class Family(NamedTuple):
    """A template and what it does to messages."""

    template: str
    special_tokens: tuple[str, ...]
    takes_system: bool = True
    strips: bool = False
    touching: bool = False  # white space of the template touches contents, so that one token may hold both


FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strips=True,
    ),
    "mistral": Family(
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token }}{% for m in turns %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}[INST] {% if loop.first %}{{ system }}{% endif %}{{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        touching=True,
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        takes_system=False,
        strips=True,
    ),
}


def smollm2_tokenizer() -> Any:
    """The packaged real tokenizer; pad token and end of sequence are one token."""
    from sgfast.huggingface.assets import packaged_tokenizer

    return packaged_tokenizer()


def normalizing_tokenizer() -> Any:
    """Composed characters, "▁" for spaces, bytes for what it does not know: like tokenizers made by SentencePiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_and_padding = ["<pad>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=bytes_and_padding, show_progress=False)
    backend.train_from_iterator(["the user asks the assistant for étude, été and the end\n\n"] * 4, trainer)
    # A byte is a piece of the vocabulary, not a token that a text may name.
    vocabulary = json.loads(backend.to_str())
    vocabulary["added_tokens"] = vocabulary["added_tokens"][:2]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)), pad_token="<pad>", eos_token="<eos>"
    )


def with_family(tokenizer: Any, family: Family) -> Any:
    """Give a tokenizer the template of a family and its special tokens, as its models' tokenizers have them."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special_tokens)})
    tokenizer.bos_token = family.special_tokens[0]
    if "</s>" in family.special_tokens:
        tokenizer.eos_token = "</s>"
    tokenizer.chat_template = family.template
    return tokenizer


def family_tokenizer(kind: str, family: str) -> Any:
    """A tokenizer of a kind (smollm2, tiny, normalizing) with a template of a family."""
    make = {"smollm2": smollm2_tokenizer, "tiny": tiny_tokenizer, "normalizing": normalizing_tokenizer}[kind]
    return with_family(make(), FAMILIES[family])
