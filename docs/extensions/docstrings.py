"""Docstrings as pages: tables that ``help()`` shows well become Markdown tables, and examples become code."""

import re

import griffe

_RULE = re.compile(r"=+(?: +=+)+")
# mkdocstrings reads a doctest below "Examples:" only.
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# A colon in the first sentence would end the type of a value; a colon in front leaves the type to the annotation.
_RETURNS = re.compile(r"^(Returns:\n +)(?=\S)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrite every docstring before mkdocstrings renders it."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Rewrite what mkdocstrings would misread, without a change of the words."""
    text = with_markdown_tables(text.replace("*features", "\\*features"))
    return _RETURNS.sub(r"\1: ", _EXAMPLE.sub("Examples:", text))


def with_markdown_tables(text: str) -> str:
    """Replace each simple table of reStructuredText by a Markdown table.

    The first row after the first rule is the head, unless no second rule follows it. A row whose first cell is empty
    continues the row above.
    """
    result: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        if not _RULE.fullmatch(line.strip()):
            result.append(line)
            continue
        columns = [match.start() for match in re.finditer("=+", line)]
        groups: list[list[list[str]]] = [[]]
        for row in lines:
            if _RULE.fullmatch(row.strip()):
                groups.append([])
                if len(groups) == 3:
                    break
                continue
            if not row.strip():
                break
            _add_row(
                groups[-1], [row[start:end].strip() for start, end in zip(columns, [*columns[1:], None], strict=True)]
            )
        head, body = (groups[0], groups[1]) if len(groups) == 3 else ([[""] * len(columns)], groups[0])
        result += ["", *map(_markdown_row, head), _markdown_row(["---"] * len(columns)), *map(_markdown_row, body), ""]
    return "\n".join(result)


def _add_row(rows: list[list[str]], cells: list[str]) -> None:
    if rows and not cells[0]:
        rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    else:
        rows.append(cells)


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
