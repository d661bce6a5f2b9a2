"""The site's hooks: result pages of ``benchmarks`` become pages of the site, and formulas become MathML.

MathML needs no script and no network: browsers draw it themselves.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

# Pages link to these files as GitHub shows them, relative to the repository.
_RESULTS = "benchmarks/results"
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the result pages and their pictures."""
    top = Path(config.config_file_path).parent
    for path in sorted((top / _RESULTS).iterdir()):
        if path.suffix in (".md", ".png"):
            name = path.relative_to(top).as_posix()
            file = File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to the result pages into the site."""
    return markdown.replace(f"](../{_RESULTS}/", f"]({_RESULTS}/")


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas of a page into MathML."""
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    return convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline")
