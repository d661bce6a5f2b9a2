"""What JSON from elsewhere may be."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgfast.utils import strict_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_ordinary_json_is_read_as_by_the_standard_library(value, ascii_only):
    assert strict_json.loads(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a":1,"b":{"c":1,"c":2}}', "the key 'c' occurs twice"),
        ('{"a":1,"\\u0061":2}', "the key 'a' occurs twice"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[" * 500_000 + "]" * 500_000, "nested too deeply"),
        ("[" + "[]," * 400_000 + "[]]", "1200004 characters of JSON outside strings are more than the 1048576 allowed"),
        ("1" * 5000, "digits"),
        ("", "Expecting value"),
        ('"', "Unterminated string"),
        ('"' + "\\" * 99, "Unterminated string|Invalid"),
    ],
    ids=lambda value: value[:20],
)
def test_refused(text, fault):
    with pytest.raises(ValueError, match=fault):
        strict_json.loads(text)


def test_long_strings_are_no_structure():
    text = '[]{}\\"' * 1_000_000
    assert strict_json.loads(json.dumps({"text": text})) == {"text": text}
