"""Docstrings' tables on the site: the rows, cells and text around them are those of the docstring."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("griffe")
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
