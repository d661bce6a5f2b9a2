import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgfast.huggingface.content_spans import locate_contents, overlapping_tokens, skip_white_space

# Contents that look like template pieces and like each other.
CONTENTS = st.lists(
    st.text(st.sampled_from("ab<> \n\U000f0000é\u0301👩"), max_size=8) | st.sampled_from(["user", "<a>", "b</a>"]),
    min_size=1,
    max_size=5,
)
LITERALS = st.lists(st.sampled_from(["", "<a>", "</a>", "user\n", " ", "a", "\n"]), min_size=6, max_size=6)
EDITS = {"keep": str, "strip": str.strip, "lstrip": str.lstrip, "rstrip": str.rstrip, "drop": lambda _: ""}


def interleave(contents, literals):
    """A text and the range of each content in it."""
    text, spans = "", []
    for literal, content in zip(literals, contents, strict=False):
        text += literal
        spans.append((len(text), len(text) + len(content)))
        text += content
    return text + literals[len(contents)], spans


@given(CONTENTS, LITERALS)
def test_untouched_contents_are_found_exactly(contents, literals):
    text, spans = interleave(contents, literals)
    rendering = locate_contents(lambda given: interleave(given, literals)[0], contents)
    assert rendering.text == text
    assert rendering.spans == [[span] for span in spans]


@given(CONTENTS, LITERALS, st.lists(st.sampled_from(sorted(EDITS)), min_size=5, max_size=5))
def test_stripped_and_dropped_contents_are_found_exactly(contents, literals, edits):
    def edited(given):
        return [EDITS[edit](content) for edit, content in zip(edits, given, strict=False)]

    text, spans = interleave(edited(contents), literals)
    rendering = locate_contents(lambda given: interleave(edited(given), literals)[0], contents)
    assert rendering.text == text
    for found, (start, end) in zip(rendering.spans, spans, strict=True):
        # A dropped or emptied content has no range, or one of no characters.
        assert [span for span in found if span[0] < span[1]] == ([(start, end)] if start < end else [])


@given(CONTENTS, LITERALS)
def test_reordered_contents(contents, literals):
    text, spans = interleave(contents[::-1], literals)
    rendering = locate_contents(lambda given: interleave(given[::-1], literals)[0], contents)
    assert rendering.text == text
    assert rendering.spans == [[span] for span in spans[::-1]]


def test_a_content_used_twice_has_two_ranges():
    rendering = locate_contents(lambda contents: f"[{contents[0]}] {contents[1]} [{contents[0]}]", ["ab", "ab"])
    assert rendering == ("[ab] ab [ab]", [[(1, 3), (9, 11)], [(5, 7)]])


def test_a_rewritten_content_is_one_stretch_with_all_that_depends_on_it():
    rendering = locate_contents(lambda contents: f"<{contents[0].upper()}>({contents[1]})", ["mixed Case", "other"])
    assert rendering == ("<MIXED CASE>(other)", [[(1, 11)], [(13, 18)]])
    rendering = locate_contents(
        lambda contents: f"<think>{contents[0].partition('|')[0]}</think>{contents[0]}", ["a|b"]
    )
    assert rendering == ("<think>a</think>a|b", [[(7, 19)]])


def test_contents_of_the_rarest_characters():
    contents = [" \U000f0000", "\U000f0001 ", "\U000f0000\U000f0001"]
    rendering = locate_contents(lambda contents: "\U000f0002".join(c.strip() for c in contents), contents)
    assert rendering.spans == [[(0, 1)], [(2, 3)], [(4, 6)]]


@pytest.mark.parametrize("content", ["", " ", "\n\n"])
def test_text_in_place_of_an_empty_content_is_not_content(content):
    def render(contents):
        return f"<{contents[0].strip() or 'default'}>{contents[1]}"

    text, (empty, other) = locate_contents(render, [content, "ab"])
    assert text == "<default>ab"
    assert all(start == end for start, end in empty)
    assert other == [(9, 11)]


def test_overlapping_tokens():
    offsets = torch.tensor([[0, 2], [2, 5], [5, 5], [5, 6], [6, 9]])
    assert overlapping_tokens(offsets, 2, 5).tolist() == [False, True, False, False, False]
    assert overlapping_tokens(offsets, 4, 7).tolist() == [False, True, True, True, True]
    assert overlapping_tokens(offsets, 1, 2).tolist() == [True, False, False, False, False]
    # A token of no characters goes with the character that follows it.
    assert overlapping_tokens(offsets, 5, 6).tolist() == [False, False, True, True, False]
    # A range of no characters has no tokens, even within one.
    assert not overlapping_tokens(offsets, 3, 3).any()


def test_skip_white_space():
    assert [skip_white_space("a \n b ", position) for position in (0, 1, 4, 6)] == [0, 4, 4, 6]
    assert skip_white_space("a \n", 1) == 3
