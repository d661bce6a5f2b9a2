"""The pages of the site: their examples run, and the reference has every public name.

A block of a page that begins with ```python runs, in the page's order and in one namespace. A block that begins with
```py is only shown, because it is a part of a longer program.
"""

import importlib
import importlib.util
import pkgutil
import re
import socket
import types
from pathlib import Path

import pytest

import sgfast

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    "index.md",
    "guides/accumulation.md",
    "guides/choosing.md",
    "guides/hosts.md",
    "guides/memory.md",
    "tutorials/distil_with_a_trainer.md",
    "tutorials/swap_a_loss.md",
    "tutorials/train_a_transform.md",
]
_BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_TARGET = re.compile(r"^::: (\S+)$", re.MULTILINE)
# Commands, programs and helpers: nothing that users import.
_NOT_FOR_USERS = ("cli", "examples", "demo", "benchmarking", "scripts", "utils", "__main__")


@pytest.fixture
def one_process(monkeypatch):
    """The environment of a program that torchrun starts as its only process."""
    import accelerate

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def run_blocks(path):
    """Run a page's blocks; lines of tracebacks are lines of the page."""
    text = path.read_text(encoding="utf-8")
    namespace = {"__name__": path.stem}
    for block in _BLOCK.finditer(text):
        indent, code = block[1], block[2]
        code = "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
        before = "\n" * (text[: block.start()].count("\n") + 1)
        exec(compile(before + code, str(path), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, one_process):
    monkeypatch.chdir(tmp_path)
    assert len(run_blocks(DOCS / page)) > 2


def test_every_page_with_examples_is_run():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if _BLOCK.search(path.read_text())}
    # training.md shows a server, whose model is not in the page. tests/huggingface/test_hosts.py runs the recipes.
    assert pages - {"training.md", "guides/recipes.md"} == set(PAGES)


def test_a_failing_block_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nfirst = 1\n```\n\nText.\n\n    ```python\n    assert first == 2\n    ```\n")
    with pytest.raises(AssertionError) as raised:
        run_blocks(page)
    assert raised.traceback[-1].lineno + 1 == 10


def public_modules():
    """Every module that users import from and that says which of its names are public."""
    for module in pkgutil.walk_packages(sgfast.__path__, "sgfast.", onerror=lambda name: None):
        if module.name.split(".")[1] not in _NOT_FOR_USERS and "__all__" in _source(module):
            yield importlib.import_module(module.name)
    yield sgfast


def _source(module):
    return Path(importlib.util.find_spec(module.name).origin).read_text(encoding="utf-8")


def resolved(target):
    """The object of a dotted name."""
    parts = target.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
            break
        except ImportError:
            continue
    for name in parts[count:]:
        found = getattr(found, name)
    return found


def test_every_public_name_is_on_a_reference_page():
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
    targets = _TARGET.findall(text)
    assert len(targets) == len(set(targets))
    documented = {id(resolved(target)) for target in targets}
    missing = []
    for module in public_modules():
        for name in module.__all__:
            value, path = getattr(module, name), f"{module.__name__}.{name}"
            named = isinstance(value, types.ModuleType | str) and f"`{path}`" in text
            if not named and id(value) not in documented:
                missing.append(path)
    assert not missing


def test_documented_functions_of_modules_have_no_page_twice():
    """A module whose members are shown is not listed again function by function."""
    for path in (DOCS / "reference").glob("*.md"):
        for block in path.read_text(encoding="utf-8").split("\n::: ")[1:]:
            name, _, options = block.partition("\n")
            if isinstance(resolved(name), types.ModuleType) and "members: []" not in options:
                assert f"::: {name}." not in path.read_text(encoding="utf-8")
