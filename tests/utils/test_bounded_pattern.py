"""Patterns are refused exactly where their time or size has no bound."""

import re
import time

import pytest

from sgfast.utils.bounded_pattern import check_pattern


@pytest.mark.parametrize(
    ("pattern", "width"),
    [
        (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", 1),
        (r"[^\r\n\p{L}\p{N}]?+\p{L}+| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]", 1),
        (r" ?[^(\s|[.,!?…])]+", 1),
        (r"[\p{Han}&&[^a]]+|[[:alpha:]]{2,3}|\x41|\x{1F600}", 1),
        (r"\d{1,3}(?=(?:\d{3})*\b)", 1),
        (" {2,}", 2),
        ("a{3}b?", 3),
        ("(?i)abc|de", 2),
        ("a{,2}", 0),
        ("x{a}", 4),
        ("", 0),
    ],
)
def test_allowed_patterns_and_what_they_match_at_least(pattern, width):
    assert check_pattern(pattern, "it") == width


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("(a+)+b", "more than one way"),
        ("(a|aa)*b", "more than one way"),
        ("(a?){20}", "more than 256 ways"),
        ("(a?)*", "more than one way"),
        ("(?:)*", "more than one way"),
        ("a{1,500}{1,500}b", "more than one way"),
        ("a**", "more than one way"),
        ("[^x]*[^x]*x", "too often"),
        ("a{1,99}a{1,99}b", "too often"),
        ("a?" * 12, "more than 256 ways"),
        ("((a{100}){100}){100}", "written out"),
        (r"(a)\1", "escape"),
        (r"\k<a>", "escape"),
        ("(?<a>b)", "kind that is not allowed"),
        ("(?R)", "kind that is not allowed"),
        ("(?x:a )", "kind that is not allowed"),
        ("(" * 40 + ")" * 40, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ("(a", "not closed"),
        ("a)", "too many"),
        ("[a", "not closed"),
        ("+a", "of nothing"),
        ("a{5,2}", "whose end is below its start"),
        ("\\", "escape"),
        ("a" * 10_001, "10001 characters"),
    ],
)
def test_refused_patterns(pattern, fault):
    with pytest.raises(ValueError, match=fault):
        check_pattern(pattern, "it")


@pytest.mark.parametrize("pattern", ["[^x]*x", r"(\d{3})+(?!\d)z", "(?:a?b?c?|d)e*f", r"\s*[\r\n]+", "a*(?=b)c"])
def test_what_is_allowed_takes_at_most_the_square_of_a_length(pattern):
    check_pattern(pattern, "it")
    for text in ("a" * 3000, "1" * 3000, " " * 3000, "abc" * 1000, "de" * 1500):
        begun = time.process_time()
        re.search(pattern, text)
        assert time.process_time() - begun < 1
