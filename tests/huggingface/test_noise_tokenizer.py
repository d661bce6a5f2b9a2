"""NoiseTokenizer, over the templates of several model families."""

import functools
import re
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgfast.huggingface import NoiseTokenizer, TokenizerWrapper
from sgfast.huggingface.tokenization_utils import NoiseTokenizer as DocumentedPlace
from tests.chat_templates import FAMILIES, family_tokenizer

# The real vocabulary lacks some bytes of control characters and of characters beyond these: it drops them.
CHARACTERS = st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"])
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=12),
    st.text(st.sampled_from(" \n\tab.<[|"), max_size=8),
    st.sampled_from(["user", "system\n", "assistant\n\n", "model", "[INST] a [/INST]", "</s>", "<end_of_turn>\n"]),
    st.sampled_from(["<|eot_id|>", "<|im_end|>\n<|im_start|>user\n", "<start_of_turn>model\n", "<|begin_of_text|>"]),
    st.sampled_from(["e\u0301tude", "👩\u200d👩\u200d👧", "नमस्ते", "ﷺ", "שלום", "漢字かな", "\u202eabc", "🇫🇷", "a\r\n"]),
)


def message(role, content):
    return {"role": role, "content": content}


@st.composite
def chats(draw):
    system = [message("system", draw(TEXTS))] if draw(st.booleans()) else []
    turns = [message(("user", "assistant")[i % 2], draw(TEXTS)) for i in range(draw(st.integers(1, 5)))]
    return system + turns


@functools.cache
def noise_tokenizer(kind, family):
    return NoiseTokenizer(family_tokenizer(kind, family))


def selected_text(tokenizer, encoding, mask, row=0):
    return tokenizer.decode(encoding["input_ids"][row][encoding[mask][row]])


def of_family(family, chat, normal_form=None):
    """A chat that the family takes, and the contents as it writes them: transformed ones, responses."""
    chat = [turn for turn in chat if family.takes_system or turn["role"] != "system"]
    written = [(turn["role"], turn["content"].strip() if family.strips else turn["content"]) for turn in chat]
    if normal_form:
        written = [(role, unicodedata.normalize(normal_form, content)) for role, content in written]
    transformed = [content for role, content in written if role != "assistant"]
    return chat, transformed, [content for role, content in written if role == "assistant"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("kind", ["tiny", "smollm2", "normalizing"])
@settings(max_examples=30)
@given(chat=chats())
def test_decoding_the_selected_tokens_gives_the_contents(kind, name, chat):
    family, tokenizer = FAMILIES[name], noise_tokenizer(kind, name)
    chat, transformed, responses = of_family(family, chat, "NFC" if kind == "normalizing" else None)
    encoding = tokenizer.apply_chat_template(chat, ignore_prompt_loss=True)
    expected = tokenizer.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert encoding["input_ids"][0].tolist() == expected
    found = selected_text(tokenizer.tokenizer, encoding, "noise_mask")
    # A token may also hold white space of the template that touches a content.
    around = r"[ \n]*" if family.touching else ""
    if family.touching or family.strips or not any(content[:1].isspace() for content in transformed):
        pattern = "".join(around + re.escape(content) + around for content in transformed)
        assert re.fullmatch(pattern, found), (found, transformed)
    if not (family.touching or family.strips):
        assert "".join(found.split()) == "".join("".join(transformed).split())
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}[name]
    if family.touching or family.strips or not any(content[:1].isspace() for content in responses):
        pattern = "".join(around + re.escape(content) + around + re.escape(end) for content in responses)
        assert re.fullmatch(pattern, selected_text(tokenizer.tokenizer, encoding, "loss_mask"))


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(max_examples=20)
@given(chat=chats())
def test_continued_and_opened_messages_are_those_of_transformers(name, chat):
    tokenizer = noise_tokenizer("tiny", name)
    chat, _, _ = of_family(FAMILIES[name], chat)
    plain = tokenizer.apply_chat_template(chat)["noise_mask"][0]
    opened = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    reference = tokenizer.tokenizer.apply_chat_template(chat, return_dict=True, add_generation_prompt=True)
    assert opened["input_ids"][0].tolist() == reference["input_ids"]
    assert torch.equal(opened["noise_mask"][0, : len(plain)], plain)
    assert not opened["noise_mask"][0, len(plain) :].any()
    if chat[-1]["content"].strip():  # without it transformers continues elsewhere: its marker takes the content's place
        continued = tokenizer.apply_chat_template(chat, continue_final_message=True)
        reference = tokenizer.tokenizer.apply_chat_template(chat, return_dict=True, continue_final_message=True)
        assert continued["input_ids"][0].tolist() == reference["input_ids"]


@pytest.fixture
def tokenizer():
    return NoiseTokenizer(family_tokenizer("tiny", "chatml"))


CHATS = [
    [message("system", "be brief"), message("user", "the keyword?"), message("assistant", "class")],
    [message("user", "é")],
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_the_wrappers(tokenizer, side):
    tokenizer.tokenizer.padding_side = side
    options = {"return_attention_mask": True, "ignore_prompt_loss": True}
    encoding = tokenizer.apply_chat_template(CHATS, **options)
    wrapper = TokenizerWrapper(tokenizer.tokenizer, "LlamaModel", ignore_prompt_loss=True)
    expected = wrapper(CHATS)
    assert encoding.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(encoding[name], tensor), name
    cut = tokenizer.apply_chat_template(CHATS, truncation=True, max_length=5, **options)
    for name, tensor in wrapper(CHATS, truncation=True, max_length=5).items():
        assert torch.equal(cut[name], tensor), name


def test_what_is_returned(tokenizer):
    assert tokenizer.apply_chat_template(CHATS[0]).keys() == {"input_ids", "noise_mask", "loss_mask"}
    assert tokenizer.apply_chat_template(CHATS[0], return_loss_mask=False).keys() == {"input_ids", "noise_mask"}
    assert DocumentedPlace is NoiseTokenizer


def test_all_tokens(tokenizer):
    encoding = tokenizer.apply_chat_template(CHATS, transform_all_tokens=True, return_attention_mask=True)
    assert torch.equal(encoding["noise_mask"], encoding["attention_mask"].bool())
    assert not encoding["attention_mask"].all()


def test_another_template(tokenizer):
    encoding = tokenizer.apply_chat_template(CHATS[0], "{% for m in messages %}({{ m.content }}){% endfor %}")
    assert tokenizer.tokenizer.decode(encoding["input_ids"][0]) == "(be brief)(the keyword?)(class)"
    assert selected_text(tokenizer.tokenizer, encoding, "noise_mask") == "be briefthe keyword?"
    tokenizer.tokenizer.chat_template = None
    assert tokenizer.apply_chat_template(CHATS[0], "{{ messages[0].content }}")["noise_mask"].all()
    with pytest.raises(ValueError, match=r"no chat template: set tokenizer\.chat_template"):
        tokenizer.apply_chat_template(CHATS[0])


def test_padding_to_a_length(tokenizer):
    alone = tokenizer.apply_chat_template(CHATS[1])
    length = alone["input_ids"].shape[1]
    wide = tokenizer.apply_chat_template(
        CHATS[1], padding="max_length", max_length=length + 2, tokenizer_kwargs={"padding_side": "left"}
    )
    assert wide["input_ids"][0].tolist() == [tokenizer.tokenizer.pad_token_id] * 2 + alone["input_ids"][0].tolist()
    assert wide["loss_mask"][0].tolist() == [False] * 2 + [True] * length
    multiple = tokenizer.apply_chat_template(CHATS[1], tokenizer_kwargs={"pad_to_multiple_of": 64})
    assert multiple["input_ids"].shape == (1, 64)
    assert torch.equal(multiple["noise_mask"][:, :length], alone["noise_mask"])
    assert torch.equal(tokenizer.apply_chat_template(CHATS[1], padding=False)["input_ids"], alone["input_ids"])


def test_a_continued_message_ends_with_its_content(tokenizer):
    chat = [message("user", "a"), message("assistant", "the keyword ")]
    encoding = tokenizer.apply_chat_template(chat, continue_final_message=True, ignore_prompt_loss=True)
    text = tokenizer.tokenizer.decode(encoding["input_ids"][0])
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nthe keyword "
    assert selected_text(tokenizer.tokenizer, encoding, "loss_mask") == "the keyword "
    dropping = "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="example 0 cannot be continued: the chat template leaves out the final"):
        tokenizer.apply_chat_template(chat, dropping, continue_final_message=True)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "choose one"),
        ({"padding": "longer"}, "padding must be True, False, longest or max_length; got 'longer'"),
        ({"padding": False}, "padding=False needs examples of one length; got"),
        ({"max_length": 3}, "max_length=3 needs truncation=True or padding='max_length'"),
        ({"padding": "max_length", "max_length": 3}, "padding to max_length=3 needs truncation=True"),
        ({"truncation": True}, "max_length must be given"),
        ({"tokenizer_kwargs": {"return_tensors": "pt"}}, "pad_to_multiple_of only; got 'return_tensors'"),
        ({"tokenizer_kwargs": {"padding_side": "up"}}, "padding_side must be left or right; got 'up'"),
        ({"tokenizer_kwargs": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of must be at least 1; got 0"),
    ],
)
def test_wrong_arguments(tokenizer, options, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        tokenizer.apply_chat_template(CHATS, **options)


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="must be a fast tokenizer"):
        NoiseTokenizer(object())
