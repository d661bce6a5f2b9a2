"""The collator: what is padded with what, what is added, what is refused."""

import pickle

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgfast.huggingface import NoiseMaskCollator, TokenizerWrapper
from tests.tiny_tokenizer import tiny_tokenizer

PAD = 2
COLLATING = tiny_tokenizer()
LONG = {
    "input_ids": [10, 11, 12],
    "attention_mask": [1, 1, 1],
    "noise_mask": [False, True, True],
    "loss_mask": [0, 0, 1],
    "labels": [-100, -100, 12],
}
SHORT = {
    "input_ids": [20],
    "attention_mask": [1],
    "noise_mask": [True],
    "loss_mask": [0],
    "labels": [-100],
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    "kind",
    [list, torch.tensor, numpy.array, lambda values: torch.tensor(values)[None]],
    ids=["list", "tensor", "array", "row"],
)
def test_right_padding(tokenizer, kind):
    batch = NoiseMaskCollator(tokenizer)(
        [{name: kind(values) for name, values in row.items()} for row in (LONG, SHORT)]
    )
    assert list(batch) == ["input_ids", "attention_mask", "noise_mask", "loss_mask", "labels"]
    assert batch["input_ids"].tolist() == [[10, 11, 12], [20, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["noise_mask"].tolist() == [[False, True, True], [True, False, False]]
    assert batch["loss_mask"].tolist() == [[False, False, True], [False, False, False]]
    assert batch["labels"].tolist() == [[-100, -100, 12], [-100, -100, -100]]
    assert [tensor.dtype for tensor in batch.values()] == [torch.int64] * 2 + [torch.bool] * 2 + [torch.int64]


def test_left_padding_and_multiples(tokenizer):
    batch = NoiseMaskCollator(tokenizer, padding_side="left", pad_to_multiple_of=4)([LONG, SHORT])
    assert batch["input_ids"].tolist() == [[PAD, 10, 11, 12], [PAD, PAD, PAD, 20]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["noise_mask"].tolist() == [[False, False, True, True], [False, False, False, True]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 12], [-100] * 4]
    assert NoiseMaskCollator(tokenizer, pad_to_multiple_of=3)([LONG])["input_ids"].shape == (1, 3)


def test_the_side_is_the_tokenizers_at_each_call(monkeypatch):
    tokenizer = tiny_tokenizer()
    collator = NoiseMaskCollator(tokenizer)
    tokenizer.padding_side = "left"
    assert collator([LONG, SHORT])["input_ids"][1].tolist() == [PAD, PAD, 20]


def test_what_is_left_out(tokenizer):
    collator = NoiseMaskCollator(tokenizer)
    batch = collator([{"input_ids": [10, 11]}, {"input_ids": [PAD]}])
    # The padding token within an example is a token like any other.
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert torch.equal(batch["noise_mask"], batch["attention_mask"].bool())
    assert torch.equal(batch["loss_mask"], batch["attention_mask"].bool())
    assert "labels" not in batch
    batch = collator([{"input_ids": [10, 11], "labels": [-100, 11]}])
    assert batch["loss_mask"].tolist() == [[False, True]]


def test_what_is_not_attended_counts_nowhere(tokenizer):
    example = {name: [1, 1] for name in ("noise_mask", "loss_mask", "labels")}
    batch = NoiseMaskCollator(tokenizer)([{"input_ids": [10, PAD], "attention_mask": [1, 0], **example}])
    assert batch["noise_mask"].tolist() == batch["loss_mask"].tolist() == [[True, False]]
    assert batch["labels"].tolist() == [[1, -100]]


@given(st.lists(st.lists(st.integers(0, 299), max_size=7), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
def test_every_row_comes_back(rows, side):
    noise = [[token % 3 == 0 for token in row] for row in rows]
    collator = NoiseMaskCollator(COLLATING, padding_side=side, pad_to_multiple_of=2)
    batch = collator([{"input_ids": i, "noise_mask": n} for i, n in zip(rows, noise, strict=True)])
    width = batch["input_ids"].shape[1]
    assert width == max(map(len, rows)) + max(map(len, rows)) % 2
    for index, row in enumerate(rows):
        real = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][real].tolist() == row
        assert batch["noise_mask"][index][real].tolist() == noise[index]
        assert (batch["input_ids"][index][~real] == PAD).all()
        assert not batch["noise_mask"][index][~real].any()
        padding = [False] * (width - len(row))
        assert real.tolist() == (padding + [True] * len(row) if side == "left" else [True] * len(row) + padding)


def test_examples_of_the_wrapper_collate_to_its_batch(tokenizer):
    wrapper = TokenizerWrapper(tokenizer, "LlamaForCausalLM", include_labels=True, ignore_prompt_loss=True)
    chats = [
        [{"role": "user", "content": "the keyword?"}, {"role": "assistant", "content": "class"}],
        [{"role": "user", "content": "é"}],
    ]
    batch = NoiseMaskCollator(tokenizer)([wrapper(chat) for chat in chats])
    for name, tensor in wrapper(chats).items():
        assert torch.equal(batch[name], tensor), name


def test_end_of_sequence_where_there_is_no_padding_token_and_pickling():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    collator = pickle.loads(pickle.dumps(NoiseMaskCollator(tokenizer)))  # as DataLoader's workers need it
    assert collator([LONG, SHORT])["input_ids"][1].tolist() == [20, 1, 1]
    tokenizer.eos_token = None
    collator = NoiseMaskCollator(tokenizer)
    assert collator([LONG])["input_ids"].tolist() == [[10, 11, 12]]
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token or eos_token"):
        collator([LONG, SHORT])


@pytest.mark.parametrize(
    ("examples", "error", "fault"),
    [
        ([], ValueError, "examples must hold at least one example"),
        (LONG, TypeError, "examples must be a list of dictionaries; got dict"),
        ([LONG, [1]], TypeError, "example 1 must be a dictionary; got list"),
        ([{"noise_mask": [1]}], ValueError, "example 0 has no input_ids"),
        ([{"input_ids": [1], "text": "a"}], ValueError, "example 0 may have the keys .* only; remove 'text'"),
        ([LONG, {"input_ids": [1]}], ValueError, "example 1 and example 0 differ in attention_mask, labels"),
        ([{"input_ids": [1, 2], "noise_mask": [1]}], ValueError, "noise_mask has 1 entries, input_ids has 2"),
        ([{"input_ids": [1], "loss_mask": [2]}], ValueError, "example 0: loss_mask must hold 0 and 1 only"),
        ([{"input_ids": [1.5]}], TypeError, "example 0: input_ids must hold integers or booleans; got torch.float32"),
        ([{"input_ids": ["a"]}], TypeError, "example 0: input_ids must be a list of integers"),
        ([{"input_ids": [[1], [2]]}], ValueError, r"must have one dimension; got the shape \(2, 1\)"),
    ],
)
def test_wrong_examples(tokenizer, examples, error, fault):
    with pytest.raises(error, match=fault):
        NoiseMaskCollator(tokenizer)(examples)


def test_wrong_arguments(tokenizer):
    with pytest.raises(ValueError, match="padding_side must be left or right; got 'both'"):
        NoiseMaskCollator(tokenizer, padding_side="both")
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1; got 0"):
        NoiseMaskCollator(tokenizer, pad_to_multiple_of=0)
