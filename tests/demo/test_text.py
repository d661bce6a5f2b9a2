"""The demo's text: disjoint, reproducible, long enough."""

import pytest

from sgfast.demo.text import read_text, split_passages


def test_passages_are_disjoint_reproducible_and_complete():
    text = " ".join(f"word{number}" for number in range(1000))
    passages = split_passages(text, words_per_passage=7, held_out=30, seed=1)
    everything = [word for passage in passages.train + passages.held_out for word in passage.split()]
    assert sorted(everything) == sorted(f"word{number}" for number in range(994))
    assert len(passages.held_out) == 30
    assert passages == split_passages(text, words_per_passage=7, held_out=30, seed=1)
    assert passages != split_passages(text, words_per_passage=7, held_out=30, seed=2)


def test_at_most_a_quarter_is_held_out():
    passages = split_passages("a " * 160, words_per_passage=10, held_out=100, seed=0)
    assert (len(passages.train), len(passages.held_out)) == (12, 4)


def test_short_text_is_refused():
    with pytest.raises(ValueError, match="the text holds 159 words; at least 160 are needed"):
        split_passages("a " * 159, words_per_passage=10, held_out=4, seed=0)


def test_python_carries_enough_text():
    assert len(read_text(None).split()) > 30_000


def test_files_that_are_not_text_are_named(tmp_path):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\xd8")
    faults = {binary: "as UTF-8 text", tmp_path: "is a folder, not a text file", tmp_path / "absent": "cannot be read"}
    for path, fault in faults.items():
        with pytest.raises(ValueError, match=fault) as caught:
            read_text(path)
        assert str(path) in str(caught.value)
