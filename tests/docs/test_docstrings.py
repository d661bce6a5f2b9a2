"""Docstrings on the site: tables, examples and returned values keep the words of the docstring."""

import importlib.util
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe")
_PATH = Path(__file__).parents[2] / "docs" / "extensions" / "docstrings.py"
_SPECIFICATION = importlib.util.spec_from_file_location("docstrings", _PATH)
docstrings = importlib.util.module_from_spec(_SPECIFICATION)
_SPECIFICATION.loader.exec_module(docstrings)


def test_a_table_with_a_head():
    rule = "==== =======\n"
    text = f"Before:\n\n{rule}kind value\n{rule}a    ½ |x|\nb    first\n     second\n{rule}\nAfter."
    assert docstrings.with_markdown_tables(text).splitlines() == [
        *("Before:", "", ""),
        "| kind | value |",
        "| --- | --- |",
        "| a | ½ \\|x\\| |",
        "| b | first second |",
        *("", "", "After."),
    ]


def test_a_table_without_a_head():
    text = "  == ===\n  a  one\n  bb two\n  == ===\n\n  rest"
    rows = [line for line in docstrings.with_markdown_tables(text).splitlines() if line]
    assert rows == ["|  |  |", "| --- | --- |", "| a | one |", "| bb | two |", "  rest"]


def test_text_without_a_table_stays():
    text = "a == b\n\n=====\n\n    x = 1"
    assert docstrings.with_markdown_tables(text) == text


def test_a_doctest_is_read_as_one_and_a_colon_ends_no_type():
    text = "One.\n\nReturns:\n    float32 (float64 if an input is): a scalar.\n\nExample:\n    >>> 1 + 1\n    2"
    sections = griffe.Docstring(docstrings.as_markdown(text)).parse("google", returns_multiple_items=False)
    assert [section.kind.value for section in sections] == ["text", "returns", "examples"]
    assert sections[1].value[0].description == "float32 (float64 if an input is): a scalar."
    assert sections[2].value[0][1] == ">>> 1 + 1\n2"
