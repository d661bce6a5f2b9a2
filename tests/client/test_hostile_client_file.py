"""Client files whose checksum is right and whose tokenizer, chat template or settings are hostile."""

import time

import pytest

from sgfast.client import StainedGlassTransformForText
from tests.client.forged_client import forge, write_good_file

CHAT = [{"role": "user", "content": "étude 1, the keyword?"}]
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "transform.safetensors"
    write_good_file(path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "transform.safetensors"


def tokenizer(edit):
    return lambda _, description: edit(description["tokenizer_wrapper"]["tokenizer"])


def settings(**values):
    return lambda _, description: description["noise_layer"].update(values)


def doubling(state):
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    state["backend"]["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 23}


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (settings(seed=7), "unknown or missing: seed"),
        (settings(scale="12"), "scale must not be of type str"),
        (settings(scale=["1", "2"]), "scale must be a pair of numbers"),
        (settings(scale=[True, 2.0]), "scale must be a pair of numbers"),
        (settings(scale=[1.0, 10**400]), "scale must be a pair of numbers"),
        (settings(value_range="01"), "value_range must not be of type str"),
        (settings(transformer_type=["LlamaModel"]), "transformer_type must not be of type list"),
        (settings(percent_to_mask="0.5"), "percent_to_mask"),
        (settings(mean_dropout=float(10**300)), "mean_dropout"),
        (lambda _, d: d["noise_layer"].pop("shallow"), "unknown or missing: shallow"),
        (tokenizer(doubling), "bytes of one"),
        (tokenizer(lambda state: state.update(other_special_tokens=[f"<{i}>" for i in range(30_000)])), "30000 other"),
        (tokenizer(lambda state: state["backend"].update(normalizer={"type": "Forged"})), "unknown kind"),
    ],
)
def test_refused_at_loading(good, path, edit, fault):
    forge(good, path, edit)
    begun = time.process_time()
    with pytest.raises(ValueError, match=fault) as caught:
        StainedGlassTransformForText.from_pretrained(path)
    assert str(path) in str(caught.value)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (tokenizer(lambda state: state.update(chat_template=LOOP)), "it takes too long"),
        (tokenizer(lambda state: state.update(chat_template="{{ 'a' * 10 ** 9 }}")), "it takes too long"),
        (tokenizer(lambda state: state.update(chat_template="{{ messages[0]['content'].no }}{{ 1 / 0 }}")), "division"),
        (
            tokenizer(lambda state: state.update(chat_template="{{ messages[0].content * 1000 }}")),
            "make [0-9]+ tokens of 26 bytes of text",
        ),
        (tokenizer(lambda state: state.update(chat_template="")), "no chat template"),
        (tokenizer(lambda state: state.update(chat_template='{{ "\\ud800" }}')), "cannot be used"),
        (tokenizer(lambda state: state.update(chat_template=" {# #}")), "chat template|no token"),
        (tokenizer(lambda state: state.update(chat_template="{% if %}")), "chat template refused"),
        (tokenizer(lambda state: state.update(chat_template=None)), "no chat template"),
        (
            tokenizer(
                lambda state: state["backend"].update(
                    pre_tokenizer=None,
                    model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"},
                    added_tokens=[],
                )
            ),
            "the tokenizer failed",
        ),
    ],
)
def test_refused_at_a_call(good, path, edit, fault):
    forge(good, path, edit)
    client = StainedGlassTransformForText.from_pretrained(path)
    begun = time.process_time()
    with pytest.raises(ValueError, match=fault) as caught:
        client(CHAT)
    assert str(path) in str(caught.value) or fault == "no chat template"
    assert time.process_time() - begun < 2


def test_a_users_own_mistake_does_not_blame_the_file(good):
    client = StainedGlassTransformForText.from_pretrained(good)
    with pytest.raises(ValueError, match="role") as caught:
        client([{"role": "nobody", "content": "hi"}])
    assert str(good) not in str(caught.value)
    with pytest.raises(UnicodeEncodeError):
        client([{"role": "user", "content": "\ud800"}])


def test_panics_are_errors_of_the_tokenizer(good, monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds")

    client = StainedGlassTransformForText.from_pretrained(good)
    client.tokenizer_wrapper._offset_tokenizer = type("Backend", (), {"encode_batch": panic})()
    with pytest.raises(ValueError, match="the tokenizer failed: index out of bounds") as caught:
        client(CHAT)
    assert str(good) in str(caught.value)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    client.tokenizer_wrapper._offset_tokenizer = type("Backend", (), {"encode_batch": interrupt})()
    with pytest.raises(KeyboardInterrupt):
        client(CHAT)
