"""Records as training examples: what is hidden, what counts, what is cut, and which line an error names."""

import json

import pytest
import torch

from sgfast.huggingface import NoiseMaskCollator, TokenizerWrapper
from sgfast.training.data import TokenizedRecords, check_trainable
from sgfast.utils.records import IndexedRecords, RecordError
from tests.tiny_tokenizer import TEMPLATE, tiny_tokenizer

CHAT = [{"role": "user", "content": "the class"}, {"role": "assistant", "content": "of"}]


@pytest.fixture
def examples(tmp_path):
    def make(*lines, tokenizer=None, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        wrapper = TokenizerWrapper(tokenizer or tiny_tokenizer(), "LlamaForCausalLM", ignore_prompt_loss=True)
        return TokenizedRecords(IndexedRecords(path), wrapper, **{"max_length": 64} | options)

    return make


def decoded(example, mask):
    return tiny_tokenizer().decode(example["input_ids"][example[mask]])


def test_texts_are_messages_of_users(examples):
    text, chat = examples({"text": "the class"}, {"messages": CHAT})
    assert decoded(text, "noise_mask") == "the class"
    assert tiny_tokenizer().decode(text["input_ids"]) == "<|start|>user\nthe class<|end|>\n"
    assert decoded(chat, "noise_mask") == "the class"
    assert decoded(chat, "loss_mask") == "of<|end|>"


def test_plain_texts_are_hidden_whole_and_need_no_template(examples):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (plain,) = examples({"text": "the class"}, tokenizer=tokenizer, text_as="plain")
    assert decoded(plain, "noise_mask") == decoded(plain, "loss_mask") == "the class"
    with pytest.raises(RecordError, match=r"data.jsonl, line 1: the tokenizer has no chat template"):
        examples({"text": "the class"}, tokenizer=tokenizer)[0]


def test_long_records_are_cut(examples):
    whole, cut = (examples({"text": "the keyword of the class"}, max_length=kept)[0] for kept in (64, 7))
    assert cut.keys() == whole.keys()
    for name, values in cut.items():
        assert torch.equal(values, whole[name][:7])


def test_data_without_anything_to_learn_is_refused(examples):
    answer, question = {"messages": CHAT[1:]}, {"text": "the class"}
    check_trainable(examples(answer, question, {"messages": CHAT}))  # one token of each kind, anywhere
    for lines, options, message in (
        ([answer, answer], {}, r"no record has a token to transform \(.*\) among its first 64 tokens"),
        ([question, {"messages": CHAT}], {"max_length": 2}, "no record has a token to transform"),
        ([question, question], {}, "no record has a token that counts in the loss"),
        ([question, {"messages": CHAT}], {"max_length": 9}, "that counts in the loss .* its first 9 tokens"),
    ):
        with pytest.raises(RecordError, match=message):
            check_trainable(examples(*lines, **options))


def test_examples_make_batches(examples):
    records = examples({"text": "the class"}, {"messages": CHAT})
    batch = NoiseMaskCollator(tiny_tokenizer())([records[0], records[1]])
    lengths = [len(records[index]["input_ids"]) for index in (0, 1)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["noise_mask"].sum().item() == sum(int(records[index]["noise_mask"].sum()) for index in (0, 1))


def test_a_template_that_refuses_a_record_names_its_line(examples):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    )
    records = examples({"messages": CHAT}, {"messages": CHAT[1:]}, tokenizer=tokenizer)
    assert decoded(records[0], "noise_mask") == "the class"
    with pytest.raises(RecordError, match=r"data.jsonl, line 2: the chat template refused example 0: no"):
        records[1]
