import json
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from sgfast.huggingface import PromptType, TokenizerWrapper
from sgfast.huggingface.assets import packaged_tokenizer

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<end>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def smollm2():
    """The real tokenizer; pad token and end of sequence are one token."""
    return packaged_tokenizer()


@pytest.fixture(scope="module")
def wrapper(smollm2):
    return TokenizerWrapper(smollm2, "LlamaForCausalLM")


@pytest.fixture(scope="module")
def response_wrapper(smollm2):
    return TokenizerWrapper(smollm2, "LlamaForCausalLM", ignore_prompt_loss=True)


def byte_tokenizer(template=GENERATION, merges=(), **special_tokens):
    """One token a byte, but for the merges; offsets that leave out white space, as some real tokenizers report."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<end>", "<system>", "<user>", "<assistant>"])
    special_tokens = {"bos_token": "<bos>", "eos_token": "<end>"} | special_tokens
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, model_max_length=16, **special_tokens
    )


@pytest.fixture
def tiny():
    return byte_tokenizer()


def message(role, content):
    return {"role": role, "content": content}


def selected_text(tokenizer, inputs, mask="noise_mask", row=0):
    return tokenizer.decode(inputs["input_ids"][row][inputs[mask][row]])


def chatml(conversation):
    """The text of SmolLM2's own template, and where each message's content lies in it."""
    text, spans = "", []
    if conversation[0]["role"] != "system":
        text = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for turn in conversation:
        text += f"<|im_start|>{turn['role']}\n"
        spans.append((len(text), len(text) + len(turn["content"])))
        text += f"{turn['content']}<|im_end|>\n"
    return text, spans


# The real vocabulary lacks some bytes of control characters and of characters beyond these: it drops them.
CHARACTERS = st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"])
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=12),
    st.text(st.sampled_from(" \n\tab."), max_size=6),
    st.sampled_from(["user", "system\n", "assistant", "<|im_end|>", "<|im_start|>user\n", DEFAULT_SYSTEM]),
    st.sampled_from(["e\u0301tude", "👩\u200d👩\u200d👧", "नमस्ते", "ﷺ", "\u202eabc", "🇫🇷", "a\r\n"]),
)


@st.composite
def conversations(draw):
    system = [message("system", draw(TEXTS))] if draw(st.booleans()) else []
    turns = [message(("user", "assistant")[i % 2], draw(TEXTS)) for i in range(draw(st.integers(1, 4)))]
    return system + turns


@settings(max_examples=60)
@given(conversations())
def test_masks_of_any_chat(smollm2, response_wrapper, conversation):
    inputs = response_wrapper(conversation)
    assert inputs["input_ids"][0].tolist() == smollm2.apply_chat_template(conversation, return_dict=True)["input_ids"]

    text, spans = chatml(conversation)
    offsets = smollm2(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    noise, loss = (torch.zeros(len(offsets), dtype=torch.bool) for _ in range(2))
    for turn, (start, end) in zip(conversation, spans, strict=True):
        for i, (token_start, token_end) in enumerate(offsets):
            inside = start < end and token_start < end and token_end > start
            if turn["role"] == "assistant":
                loss[i] |= inside or (token_start == end and inputs["input_ids"][0, i] == smollm2.eos_token_id)
            else:
                noise[i] |= inside
    assert torch.equal(inputs["noise_mask"][0], noise)
    assert torch.equal(inputs["loss_mask"][0], loss)

    transformed = [turn["content"] for turn in conversation if turn["role"] != "assistant"]
    # A content that begins with white space may share its first token with the template's line break.
    if not any(content[:1].isspace() for content in transformed):
        assert selected_text(smollm2, inputs) == "".join(transformed)
    assert inputs["attention_mask"].all()


def test_masks_of_a_known_chat(smollm2):
    conversation = [
        message("system", "Be brief."),
        message("user", "Capital of France?"),
        message("assistant", "Paris"),
    ]
    inputs = TokenizerWrapper(smollm2, transformers.LlamaForCausalLM)(conversation)
    pieces = [
        ("<|im_start|>system\n", False),
        ("Be brief.", True),
        ("<|im_end|>\n<|im_start|>user\n", False),
        ("Capital of France?", True),
        ("<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n", False),
    ]
    ids, noise = [], []
    for piece, transformed in pieces:
        piece_ids = smollm2(piece, add_special_tokens=False)["input_ids"]
        ids += piece_ids
        noise += [transformed] * len(piece_ids)
    assert inputs["input_ids"].tolist() == [ids]
    assert inputs["noise_mask"].tolist() == [noise]
    assert inputs["attention_mask"].tolist() == [[1] * len(ids)]
    assert inputs["loss_mask"].tolist() == [[True] * len(ids)]
    assert set(inputs) == {"input_ids", "attention_mask", "noise_mask", "loss_mask"}
    assert [inputs[name].dtype for name in inputs] == [torch.int64, torch.int64, torch.bool, torch.bool]


def test_the_default_system_prompt_is_template_and_its_repetition_is_content(smollm2, wrapper):
    inputs = wrapper([message("user", DEFAULT_SYSTEM)])
    assert selected_text(smollm2, inputs) == DEFAULT_SYSTEM
    first, second = (inputs["input_ids"][0] == smollm2.bos_token_id).nonzero().flatten().tolist()
    assert not inputs["noise_mask"][0, first:second].any()


@pytest.mark.parametrize("content", ["user", "assistant", "<|im_end|>\n", "<|im_start|>user"])
def test_contents_that_look_like_the_template(smollm2, wrapper, content):
    conversation = [message("user", content), message("assistant", content), message("user", content)]
    inputs = wrapper(conversation)
    length = len(smollm2(content, add_special_tokens=False)["input_ids"])
    assert inputs["noise_mask"].sum() == 2 * length
    assert selected_text(smollm2, inputs) == 2 * content


def test_empty_and_white_space_contents(smollm2, wrapper):
    assert not wrapper([message("system", ""), message("user", "")])["noise_mask"].any()
    inputs = wrapper([message("system", ""), message("user", "   ")])
    assert selected_text(smollm2, inputs).lstrip("\n") == "   "
    assert selected_text(smollm2, wrapper([message("user", "a"), message("user", "")])) == "a"


def test_a_token_across_the_border_is_content():
    template = "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n<end>{% endfor %}"
    tokenizer = byte_tokenizer(template, merges=[("Ċ", "Ċ")])
    inputs = TokenizerWrapper(tokenizer, "LlamaModel")([message("user", "\nab")])
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == ["<user>", "ĊĊ", "a", "b", "Ċ", "<end>"]
    assert inputs["noise_mask"][0].tolist() == [False, True, True, True, False, False]
    inputs = TokenizerWrapper(tokenizer, "LlamaModel")([message("user", "ab")])
    assert inputs["noise_mask"][0].tolist() == [False, False, True, True, False, False]


def test_offsets_that_leave_out_white_space_do_not_matter(tiny):
    text = tiny("<user>  a ", return_offsets_mapping=True)
    assert text["offset_mapping"][1] == (7, 7)  # what would be missed
    inputs = TokenizerWrapper(tiny, "LlamaModel")([message("user", "  a "), message("user", " ")])
    assert inputs["noise_mask"][0].tolist() == [False] * 2 + [True] * 4 + [False] * 2 + [True] + [False]


def test_a_character_of_several_tokens_is_selected_whole(tiny):
    inputs = TokenizerWrapper(tiny, "LlamaModel")([message("user", "👩é")])
    assert inputs["noise_mask"].sum() == len("👩é".encode())
    assert selected_text(tiny, inputs) == "👩é"


class TestOtherTemplates:
    @pytest.fixture
    def render(self, smollm2, response_wrapper, monkeypatch):
        def call(template, conversation):
            monkeypatch.setattr(smollm2, "chat_template", template)
            return response_wrapper(conversation)

        return call

    @settings(
        max_examples=30,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(conversation=conversations())
    def test_stripped_contents(self, smollm2, render, conversation):
        inputs = render(TRIMMING, conversation)
        stripped = [message(turn["role"], turn["content"].strip()) for turn in conversation]
        transformed, answers = (
            [turn["content"] for turn in stripped if (turn["role"] == "assistant") == answer]
            for answer in (False, True)
        )
        assert selected_text(smollm2, inputs) == "".join(transformed)
        assert selected_text(smollm2, inputs, "loss_mask") == "".join(f"{answer}<|im_end|>" for answer in answers)

    def test_only_one_role_stripped(self, smollm2, render):
        template = (
            "{% for m in messages %}{{ m.role }}:"
            "{{ m.content.strip() if m.role == 'system' else m.content }}<|im_end|>{% endfor %}"
        )
        inputs = render(template, [message("system", " a "), message("user", " a "), message("user", "a")])
        assert smollm2.decode(inputs["input_ids"][0]) == "system:a<|im_end|>user: a <|im_end|>user:a<|im_end|>"
        assert selected_text(smollm2, inputs) == "a a a"

    def test_system_message_moved_into_the_last_user_message(self, smollm2, render):
        template = (
            "{% for m in messages[1:] %}[{{ m.role }}] "
            "{% if loop.last %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}</s>{% endfor %}"
        )
        turns = [("system", "two"), ("user", "one"), ("assistant", "two"), ("user", "three")]
        inputs = render(template, [message(*turn) for turn in turns])
        assert smollm2.decode(inputs["input_ids"][0]) == ("[user] one</s>[assistant] two</s>[user] two\n\nthree</s>")
        assert selected_text(smollm2, inputs) == " one twothree"

    def test_template_that_depends_on_empty_contents(self, smollm2, render):
        template = (
            "{% for m in messages %}{% if m.content %}[{{ m.content }}]{% else %}[nothing]{% endif %}{% endfor %}"
        )
        inputs = render(template, [message("system", ""), message("user", "nothing"), message("user", "x")])
        assert smollm2.decode(inputs["input_ids"][0]) == "[nothing][nothing][x]"
        assert selected_text(smollm2, inputs) == "nothingx"

    def test_rewritten_contents_are_selected_as_rendered(self, smollm2, render):
        template = "{% for m in messages %}{{ m.role }}\n{{ m.content | upper }}<|im_end|>{% endfor %}"
        inputs = render(template, [message("user", "Strauß"), message("assistant", "user"), message("user", "b")])
        assert smollm2.decode(inputs["input_ids"][0]) == (
            "user\nSTRAUSS<|im_end|>assistant\nUSER<|im_end|>user\nB<|im_end|>"
        )
        assert selected_text(smollm2, inputs) == "STRAUSSB"

    @pytest.mark.parametrize(
        ("template", "responses"),
        [
            ("{{ m.role }}: {{ m.content }} <|im_end|>", " yes<|im_end|> no<|im_end|>"),
            # The next turn's first token ends no turn, nor does a word.
            ("<|im_start|>{{ m.role }}\n{{ m.content }}\n", "yesno"),
            ("<|im_start|>{{ m.role }}\n{{ m.content }}\nOver.", "yesno"),
            ("<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last %}<|im_end|>{% endif %}", "yesno<|im_end|>"),
        ],
    )
    def test_ends_of_turns(self, smollm2, render, template, responses):
        conversation = [message(*turn) for turn in [("user", "q"), ("assistant", "yes")]]
        conversation += [message(*turn) for turn in [("user", "q"), ("assistant", "no")]]
        inputs = render(f"{{% for m in messages %}}{template}{{% endfor %}}", conversation)
        assert selected_text(smollm2, inputs, "loss_mask") == responses

    def test_refusal_of_the_template(self, render):
        template = "{% if messages[0].role != 'user' %}{{ raise_exception('no system role') }}{% endif %}"
        with pytest.raises(ValueError, match="chat template refused example 0: no system role"):
            render(template, [message("system", "a")])
        with pytest.raises(ValueError, match="chat template refused example 0: unsupported operand"):
            render("{{ 1 + messages[0].content }}", [message("user", "a")])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(smollm2, monkeypatch, side):
    monkeypatch.setattr(smollm2, "padding_side", side)
    wrapper = TokenizerWrapper(smollm2, "LlamaForCausalLM", include_labels=True)
    short = [message("user", "Hi")]
    long = [message("user", "A longer question?"), message("assistant", "An answer.")]
    batch, alone = wrapper([short, long]), wrapper(short)
    length, width = alone["input_ids"].shape[1], batch["input_ids"].shape[1]
    assert width > length
    real = slice(width - length, None) if side == "left" else slice(length)
    for name, padding in [
        ("input_ids", 2),
        ("attention_mask", 0),
        ("noise_mask", 0),
        ("loss_mask", 0),
        ("labels", -100),
    ]:
        row = batch[name][0].clone()
        assert torch.equal(row[real], alone[name][0]), name
        row[real] = padding
        assert (row == padding).all(), name
    # The end-of-turn token is the padding token, and yet attended where it ends a turn.
    assert smollm2.pad_token_id == smollm2.eos_token_id == 2
    assert batch["attention_mask"][batch["input_ids"] == 2].sum() == 5


def test_padding_falls_back_to_the_end_of_sequence_and_leaves_the_tokenizer_alone(tiny):
    assert tiny.pad_token is None
    batch = TokenizerWrapper(tiny, "LlamaModel")([[message("user", "a")], [message("user", "abc")]])
    assert batch["input_ids"][0, -2:].tolist() == [tiny.eos_token_id] * 2
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0]
    assert tiny.pad_token is None
    padded = byte_tokenizer(pad_token="<system>")
    batch = TokenizerWrapper(padded, "LlamaModel")([[message("user", "a")], [message("user", "abc")]])
    assert batch["input_ids"][0, -2:].tolist() == [padded.convert_tokens_to_ids("<system>")] * 2


def test_without_a_token_to_pad_with():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", eos_token=None)
    wrapper = TokenizerWrapper(tokenizer, "LlamaModel")
    assert wrapper([[message("user", "a")], [message("user", "b")]])["input_ids"].shape == (2, 1)
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        wrapper([[message("user", "a")], [message("user", "bc")]])


def test_responses_and_labels(smollm2):
    conversation = [
        message(*turn) for turn in [("user", "a?"), ("assistant", "b."), ("user", "c?"), ("assistant", "d.")]
    ]
    wrapper = TokenizerWrapper(smollm2, "LlamaForCausalLM", include_labels=True, ignore_prompt_loss=True)
    inputs = wrapper([conversation, [*conversation, message("user", "e?")]])
    for row in range(2):
        assert selected_text(smollm2, inputs, "loss_mask", row) == "b.<|im_end|>d.<|im_end|>"
    assert (inputs["labels"] == inputs["input_ids"].where(inputs["loss_mask"], -100)).all()
    assert (inputs["labels"] != -100).sum() == 12
    everything = TokenizerWrapper(smollm2, "LlamaForCausalLM", include_labels=True)(conversation)
    assert torch.equal(everything["labels"], everything["input_ids"])


def test_responses_agree_with_generation_tags(tiny):
    conversation = [message(*turn) for turn in [("user", " a"), ("assistant", "é "), ("user", "a"), ("assistant", "a")]]
    inputs = TokenizerWrapper(tiny, "LlamaModel", ignore_prompt_loss=True)(conversation)
    tagged = tiny.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    assert inputs["input_ids"][0].tolist() == tagged["input_ids"]
    assert inputs["loss_mask"][0].long().tolist() == tagged["assistant_masks"]
    assert sum(tagged["assistant_masks"]) == 4 + 2


def test_generation_prompt(smollm2, wrapper):
    plain, prompt = (wrapper([message("user", "Hi")], add_generation_prompt=flag) for flag in (False, True))
    width = plain["input_ids"].shape[1]
    assert torch.equal(prompt["input_ids"][:, :width], plain["input_ids"])
    assert smollm2.decode(prompt["input_ids"][0, width:]) == "<|im_start|>assistant\n"
    assert not prompt["noise_mask"][0, width:].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [1, 5, 12, 1000])
def test_truncation_cuts_ids_and_masks_alike(smollm2, monkeypatch, side, length):
    monkeypatch.setattr(smollm2, "truncation_side", side)
    wrapper = TokenizerWrapper(smollm2, "LlamaForCausalLM", include_labels=True, ignore_prompt_loss=True)
    conversation = [message("system", "s"), message("user", "Why? " * 5), message("assistant", "Because.")]
    whole = wrapper(conversation)
    cut = wrapper(conversation, truncation=True, max_length=length)
    for name in whole:
        expected = whole[name][:, -length:] if side == "left" else whole[name][:, :length]
        assert torch.equal(cut[name], expected), name


def test_truncation_happens_before_padding(tiny):
    batch = TokenizerWrapper(tiny, "LlamaModel")(
        [[message("user", "a" * 30)], [message("user", "a")]], truncation=True, max_length=6
    )
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    # Without max_length, the model's own.
    batch = TokenizerWrapper(tiny, "LlamaModel")([message("user", "a" * 30)], truncation=True)
    assert batch["input_ids"].shape == (1, 16)


def test_truncation_arguments(wrapper):
    chat = [message("user", "a")]
    with pytest.raises(ValueError, match="max_length=4 needs truncation=True"):
        wrapper(chat, max_length=4)
    with pytest.raises(ValueError, match="max_length must be given"):
        wrapper(chat, truncation=True)
    with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
        wrapper(chat, truncation=True, max_length=0)
    with pytest.raises(TypeError, match="max_length must be an int; got float"):
        wrapper.encode_text("a", truncation=True, max_length=2.0)


class TestInstructions:
    @pytest.fixture
    def wrapper(self, smollm2):
        return TokenizerWrapper(
            smollm2, "LlamaForCausalLM", ignore_prompt_loss=True, prompt_type=PromptType.INSTRUCTION
        )

    @staticmethod
    def instruction(instruction, system_prompt="", context="", response=""):
        return {
            "instruction": instruction,
            "system_prompt": system_prompt,
            "context": context,
            "response": response,
        }

    def test_full(self, smollm2, wrapper, response_wrapper):
        inputs = wrapper(self.instruction("Sum up.", "Be brief.", "A text.", "Done."))
        chat = [message("system", "Be brief."), message("user", "Sum up.\n\nA text."), message("assistant", "Done.")]
        for name, tensor in response_wrapper(chat).items():
            assert torch.equal(inputs[name], tensor), name
        assert selected_text(smollm2, inputs) == "Be brief.Sum up.\n\nA text."
        assert selected_text(smollm2, inputs, "loss_mask") == "Done.<|im_end|>"

    def test_instruction_only(self, smollm2, wrapper):
        inputs = wrapper(self.instruction("Go."), add_generation_prompt=True)
        assert smollm2.decode(inputs["input_ids"][0]) == (
            f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n"
        )
        assert selected_text(smollm2, inputs) == "Go."
        assert not inputs["loss_mask"].any()

    def test_batch(self, smollm2, wrapper):
        inputs = wrapper([self.instruction("One."), self.instruction("Two.", context="Three.")])
        assert [selected_text(smollm2, inputs, row=row) for row in range(2)] == ["One.", "Two.\n\nThree."]

    @pytest.mark.parametrize(
        ("example", "error", "fault"),
        [
            ({"instruction": "a", "context": ""}, ValueError, "missing: system_prompt, response"),
            ({**instruction("a"), "input": "b"}, ValueError, "got also 'input'"),
            (instruction("a", context=None), TypeError, "example 0: context must be a string; got NoneType"),
            ("a", TypeError, "examples must be a list of dictionaries, or one dictionary; got str"),
            (["a"], TypeError, "example 0 must be a dictionary of instruction, .*; got str"),
            ([], ValueError, "examples must hold at least one example"),
        ],
    )
    def test_wrong_examples(self, wrapper, example, error, fault):
        with pytest.raises(error, match=fault):
            wrapper(example)


@pytest.mark.parametrize(
    ("examples", "error", "fault"),
    [
        ([message("robot", "a")], ValueError, "message 0: role must be one of system, user, assistant; got 'robot'$"),
        ([message("asistant", "a")], ValueError, r"got 'asistant'\. Did you mean 'assistant'\?"),
        ([message("user", "a"), {"role": "user"}], ValueError, "example 0, message 1 .*missing: content"),
        ([{**message("user", "a"), "name": "b"}], ValueError, "got also 'name'"),
        ([message("user", None)], TypeError, "content must be a string; got NoneType"),
        ([message("user", [{"type": "text"}])], TypeError, "content must be a string; got list of dict"),
        ([message(1, "a")], TypeError, "role must be a string; got int"),
        (message("user", "a"), TypeError, "examples must be a list of messages, for example .*; got dict"),
        (
            "Hello",
            TypeError,
            r"examples must be a list of messages, for example \[{'role': 'user', 'content': 'Hello'}\]; got str",
        ),
        (["Hello"], TypeError, "message 0 must be a dictionary of role and content; got str"),
        ([[message("user", "a")], message("user", "a")], TypeError, "example 1 must be a list of messages; got dict"),
        ([message("user", "a"), [message("user", "a")]], TypeError, "message 1 must be a dictionary .*; got list"),
        ([], ValueError, "examples must hold at least one example"),
        ([[message("user", "a")], []], ValueError, "example 1 must hold at least one message"),
    ],
)
def test_wrong_chats(tiny, examples, error, fault):
    with pytest.raises(error, match=fault):
        TokenizerWrapper(tiny, "LlamaModel")(examples)


def test_errors_do_not_repeat_what_was_said(tiny):
    with pytest.raises(TypeError) as caught:
        TokenizerWrapper(tiny, "LlamaModel")([message("user", ["my secret"])])
    assert "secret" not in str(caught.value)


def test_wrong_construction(tiny):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"must be a fast tokenizer.*Slow does not report"):
        TokenizerWrapper(Slow(), "LlamaModel")
    with pytest.raises(TypeError, match="model_type must be a class or its name; got LlamaConfig"):
        TokenizerWrapper(tiny, transformers.LlamaConfig())
    with pytest.raises(ValueError, match=r"got 'pretraining'$"):
        TokenizerWrapper(tiny, "LlamaModel", prompt_type="pretraining")
    with pytest.raises(ValueError, match=r"got 'instructions'\. Did you mean 'instruction'\?"):
        TokenizerWrapper(tiny, "LlamaModel", prompt_type="instructions")


def test_without_a_chat_template(tiny):
    tiny.chat_template = None
    wrapper = TokenizerWrapper(tiny, "LlamaModel")
    with pytest.raises(ValueError, match=r"no chat template: set tokenizer\.chat_template"):
        wrapper([message("user", "a")])
    assert wrapper.encode_text("a")["input_ids"].shape == (1, 1)


class TestPlainText:
    def test_added_special_tokens_are_not_selected(self, tiny):
        bos, end = tiny.bos_token_id, tiny.eos_token_id
        tiny.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <end>", special_tokens=[("<bos>", bos), ("<end>", end)]
        )
        wrapper = TokenizerWrapper(tiny, "LlamaModel", include_labels=True, ignore_prompt_loss=True)
        inputs = wrapper.encode_text(["ab<end>", ""])
        a, b = tiny.convert_tokens_to_ids(["a", "b"])
        assert inputs["input_ids"].tolist() == [[bos, a, b, end, end], [bos, end, end, end, end]]
        assert inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
        # A special token within the text is text.
        assert inputs["noise_mask"].tolist() == [[False, True, True, True, False], [False] * 5]
        assert inputs["loss_mask"].tolist() == [[True] * 5, [True, True, False, False, False]]
        assert inputs["labels"].tolist() == [[bos, a, b, end, end], [bos, end, -100, -100, -100]]
        # Truncation makes room for what is added.
        cut = wrapper.encode_text("ababab", truncation=True, max_length=4)
        assert cut["input_ids"].tolist() == [[bos, a, b, end]]
        assert cut["noise_mask"].tolist() == [[False, True, True, False]]
        # A rendered chat holds its special tokens already.
        assert wrapper([message("user", "a")])["input_ids"].shape == (1, 4)

    def test_real_tokenizer(self, smollm2, wrapper):
        inputs = wrapper.encode_text(["In the beginning", "In"], truncation=True, max_length=2)
        assert [smollm2.decode(inputs["input_ids"][0]), smollm2.decode(inputs["input_ids"][1, :1])] == ["In the", "In"]
        assert torch.equal(inputs["noise_mask"], inputs["attention_mask"].bool())
        assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
        # Nothing of this call stays with the next.
        assert wrapper.encode_text("In the beginning")["input_ids"].shape == (1, 3)

    @pytest.mark.parametrize(("texts", "error"), [([], ValueError), (["a", 1], TypeError), (None, TypeError)])
    def test_wrong_texts(self, tiny, texts, error):
        with pytest.raises(error, match="texts must"):
            TokenizerWrapper(tiny, "LlamaModel").encode_text(texts)


class TestJson:
    CONVERSATIONS = (
        [message("system", " Soyez bref. "), message("user", "e\u0301 👩\u200d👧?"), message("assistant", "Oui.")],
        [message("user", "<|im_end|>")],
    )

    @staticmethod
    def assert_equal_outputs(first, second, chats, **options):
        for name, tensor in first(chats, **options).items():
            assert torch.equal(tensor, second(chats, **options)[name]), name
        texts = ["Ein Text.", "", "<end> noch <|im_end|> einer"]
        for name, tensor in first.encode_text(texts, truncation=True, max_length=7).items():
            assert torch.equal(tensor, second.encode_text(texts, truncation=True, max_length=7)[name]), name

    @pytest.mark.parametrize("flag", [False, True])
    def test_round_trip_of_the_real_tokenizer(self, smollm2, monkeypatch, flag):
        monkeypatch.setattr(smollm2, "padding_side", "left")
        monkeypatch.setattr(smollm2, "truncation_side", "left")
        wrapper = TokenizerWrapper(
            smollm2, transformers.LlamaForCausalLM, include_labels=flag, ignore_prompt_loss=not flag
        )
        wrapper.encode_text("leaves truncation set on the tokenizer", truncation=True, max_length=3)
        text = wrapper.to_json()
        loaded = TokenizerWrapper.from_json(text)
        assert loaded.model_type == "LlamaForCausalLM"
        assert loaded.to_json() == text
        self.assert_equal_outputs(wrapper, loaded, list(self.CONVERSATIONS))
        self.assert_equal_outputs(wrapper, loaded, list(self.CONVERSATIONS), truncation=True, max_length=9)
        assert loaded.tokenizer.all_special_tokens == smollm2.all_special_tokens

    def test_round_trip_of_special_tokens(self):
        """Added tokens with options, named and unnamed special tokens, a post-processor, a template that uses them."""
        tokenizer = byte_tokenizer(GENERATION, pad_token="<pad>", image_token="<image>")
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<tool>", lstrip=True)]})
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
        wrapper = TokenizerWrapper(tokenizer, "LlamaModel", prompt_type=PromptType.CHAT)
        loaded = TokenizerWrapper.from_json(wrapper.to_json())
        self.assert_equal_outputs(wrapper, loaded, [[message("user", "a <tool><image>")], [message("user", "b")]])
        assert loaded.tokenizer.special_tokens_map == tokenizer.special_tokens_map
        assert sorted(loaded.tokenizer.all_special_tokens) == sorted(tokenizer.all_special_tokens)
        assert len(loaded.tokenizer) == len(tokenizer)
        assert loaded.tokenizer.model_max_length == 16

    def test_round_trip_without_a_template(self, tiny):
        tiny.chat_template = None
        wrapper = TokenizerWrapper(tiny, "LlamaModel", prompt_type=PromptType.INSTRUCTION)
        loaded = TokenizerWrapper.from_json(wrapper.to_json())
        assert loaded.prompt_type is PromptType.INSTRUCTION
        assert torch.equal(loaded.encode_text("é")["input_ids"], wrapper.encode_text("é")["input_ids"])

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            (lambda state: state.update(format=2), "format 1; got 2"),
            (lambda state: state.pop("model_type"), "no valid model_type"),
            (lambda state: state.update(include_labels="yes"), "no valid include_labels"),
            (lambda state: state.update(prompt_type="shell"), "shell"),
            (lambda state: state["tokenizer"].pop("padding_side"), "no valid padding_side"),
            (lambda state: state["tokenizer"].update(backend="{}"), "cannot be read"),
            (lambda state: state["tokenizer"]["named_special_tokens"].update(vocab_file="/etc/passwd"), "vocab_file"),
        ],
    )
    def test_damaged(self, tiny, change, fault):
        state = json.loads(TokenizerWrapper(tiny, "LlamaModel").to_json())
        change(state)
        with pytest.raises(ValueError, match=fault):
            TokenizerWrapper.from_json(json.dumps(state))

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '"{}"'])
    def test_not_a_saved_wrapper(self, text):
        with pytest.raises(ValueError, match="a saved TokenizerWrapper must be"):
            TokenizerWrapper.from_json(text)


def test_importing_does_not_import_transformers():
    code = (
        "import sgfast, sgfast.huggingface, sys; print([m for m in ('transformers', 'tokenizers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
